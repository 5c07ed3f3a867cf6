"""A tuner and the parts that roles bring (a critic's head, a memory of features): one thing to list, save,
exchange and step.

What of a part is trained moves along with the tuner; its buffers are memory: kept in checkpoints, not taken
away.
"""

from __future__ import annotations

from luthier.methods.roles._base import Part
from luthier.methods.tuners._base import ParamGroup, TunedModel


class Also(TunedModel):
    """Everything of the tuner, and the parts that roles brought."""

    def __init__(self, attached: TunedModel, parts: dict[str, Part]):
        self.attached, self.parts = attached, parts
        super().__init__(attached.settings, attached.model)
        self.extra = [
            ParamGroup(n, dict(m.named_parameters()), None)
            for n, m in parts.items()
            if any(True for _ in m.parameters())
        ]

    def __getattr__(self, name):  # peft and whatever else the tuner has
        return getattr(self.__dict__["attached"], name)

    @property
    def virtual(self):
        return self.attached.virtual

    @property
    def told(self):
        return self.attached.told

    def all_param_groups(self):
        return [*self.attached.all_param_groups(), *self.extra]

    def buffers(self):
        return self.attached.buffers()

    def memory(self):
        return self.attached.memory() | {
            f"{n}.{k}": b for n, m in self.parts.items() for k, b in m.named_buffers()
        }

    def initialize(self, rows, roles):
        self.attached.initialize(rows, roles)

    def ready(self, rows, roles):
        for part in self.parts.values():
            part.ready(rows, roles)

    def before_step(self, clock):
        self.attached.before_step(clock)

    def reset_masks(self, group):
        return self.attached.reset_masks(group)

    def extra_grads(self, group):
        return self.attached.extra_grads(group)

    def after_step(self, clock):
        self.attached.after_step(clock)
        for part in self.parts.values():
            part.after_step(clock)

    def soft(self):
        return self.attached.soft()

    def soft_rows(self, batch):
        return self.attached.soft_rows(batch)

    def off(self):
        return self.attached.off()

    def merged(self):
        return self.attached.merged()

    def save(self, folder):
        self.attached.save(folder)
