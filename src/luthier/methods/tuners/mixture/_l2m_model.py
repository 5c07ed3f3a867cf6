"""L2M on a model: queries, the choice of modulators, and the gradient of their keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.methods.tuners._peft import ADAPTER
from luthier.methods.tuners.mixture._routed import RoutedModel
from luthier.processes import group as processes

if TYPE_CHECKING:
    from luthier.model.batch import Batch
    from luthier.model.network import Network


class L2MModel(RoutedModel):
    """Each row is read under the modulator whose key is nearest to its prompt."""

    def __init__(self, settings: Any, model: Network):
        super().__init__(settings, model)
        holder: Any = self.layers[settings.keys_at]
        self.keys: Any = holder.adapter_params[ADAPTER].keys
        self.counts = torch.zeros(settings.pool, device=self.keys.device)  # how often each was trained
        self.noted: Any = None  # the batch that was noted last
        self.forget()

    def forget(self) -> None:
        """Queries of the step that is over."""
        self.pull = torch.zeros_like(self.keys.data)  # sum of the gradients of cos(query, key) by key
        self.used = torch.zeros_like(self.counts)
        self.pulled: Tensor | None = None  # the gradient of the keys over all processes

    def memory(self):
        return {"l2m.counts": self.counts}

    # --- queries

    @torch.no_grad()
    def queries(self, batch: Batch) -> Tensor:
        """[G, width] the mean embedding of each row's prompt; of all of a row where it has none."""
        row, inside = batch.row[batch.segment], batch.prompt_places >= 0
        prompted = torch.zeros(len(batch.rows), dtype=torch.bool, device=row.device)
        prompted[row[inside]] = True
        counted = inside | ~prompted[row]
        return self.means(batch.ids[counted], row[counted], len(batch.rows))

    def means(self, ids: Tensor, row: Tensor, rows: int) -> Tensor:
        """Tokens and the row of each -> [rows, width] their mean embeddings."""
        with self.off():
            embed = self.model.get_input_embeddings()(ids).float()
        total = embed.new_zeros(rows, embed.shape[1]).index_add(0, row, embed)
        return total / torch.bincount(row, minlength=rows).clamp(min=1)[:, None]

    def similarity(self, queries: Tensor) -> Tensor:
        """[G, pool] cosine of each query and key."""
        return F.normalize(queries, dim=-1) @ F.normalize(self.keys.detach(), dim=-1).T

    def choose(self, queries: Tensor, training: bool) -> Tensor:
        """[G] the modulator of each query."""
        score = 1 + self.similarity(queries)
        if training:
            score = score * (self.counts.min() + 1) / (self.counts + 1)
        return score.argmax(-1)

    def routes(self, batch):
        queries = self.queries(batch)
        if not (self.model.training and torch.is_grad_enabled()):
            return self.choose(queries, training=False)
        if self.noted is not batch:  # encoders and decoders ask for the same batch
            self.noted = batch
            self.note(queries, self.choose(queries, training=True))
        return self.choose(queries, training=True)

    def prompt_routes(self, prompts, rows):
        device = self.keys.device
        ids = torch.tensor([token for prompt in prompts for token in prompt], device=device)
        sizes = torch.tensor([len(prompt) for prompt in prompts], device=device)
        row = torch.arange(len(prompts), device=device).repeat_interleave(sizes)
        return self.choose(self.means(ids, row, len(prompts)), training=False)

    # --- keys

    @torch.no_grad()
    def note(self, queries: Tensor, chosen: Tensor) -> None:
        """These were chosen in training: the gradients of their cosines with the keys."""
        keys, q = self.keys.detach()[chosen], F.normalize(queries, dim=-1)
        k = F.normalize(keys, dim=-1)
        slope = (q - (q * k).sum(-1, keepdim=True) * k) / keys.norm(dim=-1, keepdim=True)
        self.pull.index_add_(0, chosen, slope)
        self.used += torch.bincount(chosen, minlength=len(self.used))

    def before_step(self, clock):
        self.forget()

    def extra_grads(self, group):
        if group != self.settings.keys_at:
            return {}
        if self.pulled is None:
            every = processes.current().gather((self.pull.cpu(), self.used.cpu()))
            pull, used = (sum(parts).to(self.keys.device) for parts in zip(*every, strict=True))
            self.used = used
            self.pulled = -self.settings.key_weight * pull / used.sum().clamp(min=1)
        return {"keys": self.pulled}

    def after_step(self, clock):
        self.counts += self.used
        self.noted = None
