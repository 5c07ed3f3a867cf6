"""A tuner and further trained parts (a critic's head, a projector): one thing to list, save, exchange and step."""

from __future__ import annotations

from torch import nn

from luthier.tuners._tuner import Attached, Site


class Also(Attached):
    """Everything of the tuner, and the parameters of modules that roles brought."""

    def __init__(self, attached: Attached, parts: dict[str, nn.Module]):
        self.attached = attached
        super().__init__(attached.settings, attached.model)
        self.extra = [Site(n, dict(m.named_parameters()), None) for n, m in parts.items()]

    def __getattr__(self, name):  # soft, peft and whatever else the tuner has
        return getattr(self.__dict__["attached"], name)

    @property
    def virtual(self):
        return self.attached.virtual

    @property
    def told(self):
        return self.attached.told

    def every_site(self):
        return [*self.attached.every_site(), *self.extra]

    def buffers(self):
        return self.attached.buffers()

    def memory(self):
        return self.attached.memory()

    def initialize(self, rows, roles):
        self.attached.initialize(rows, roles)

    def before_step(self, clock):
        self.attached.before_step(clock)

    def renewed(self, site):
        return self.attached.renewed(site)

    def after_step(self, clock):
        self.attached.after_step(clock)

    def off(self):
        return self.attached.off()

    def merged(self):
        return self.attached.merged()

    def save(self, folder):
        self.attached.save(folder)
