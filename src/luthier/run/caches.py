"""What never changes during a run is computed once and kept beside it: hidden states of frozen layers, and
log-probabilities of constant roles.
"""

from __future__ import annotations

import atexit
import json
from dataclasses import dataclass, field
from typing import Any

from luthier.methods.formats._base import BadRow
from luthier.model.policy import Policy
from luthier.registry import spec
from luthier.run.rows import EncodedRows, sample_batch
from luthier.run.session import Session
from luthier.train import hidden_cache, logprob_cache
from luthier.train.batched_forward import share_weights
from luthier.train.trainer import Trainer
from luthier.train.trunk import common_tokens

COMPARED = 32  # rows whose common beginning is read once for all


@dataclass
class SharedBase:
    """What runs side by side in one process have in common."""

    model: Any  # the base, with nothing on it
    tokenizer: Any
    renderer: Any = None  # of the first run; with it rows as tokens
    logprob_caches: dict[str, logprob_cache.LogprobCache] = field(default_factory=dict)  # by role

    def network(self) -> tuple[Any, Any]:
        """For one of the runs: a network of its own on the same weights, and the tokenizer."""
        return share_weights(self.model), self.tokenizer


def _beginning(roles: Any, trainer: Trainer) -> list[int]:
    """The tokens that the first rows' prompts begin with in common; none where one of them is empty."""
    prompts = []
    for row in trainer.rows[:COMPARED]:
        try:
            prompts.append(roles.renderer.prompt(row))
        except BadRow:
            return []
    return list(common_tokens(prompts))


def cache_hidden_states(session: Session, trainer: Trainer, row_tokens: int) -> None:
    """The hidden states below the lowest trained layer are kept, where rows are read again."""
    setting, roles = session.recipe.cache_frozen, trainer.roles
    if setting is False or not trainer.rows or not roles.clock.total:
        return
    readers = [policy for policy in roles.policies() if policy.model is roles.policy.model]
    cache: Any = trainer.no_reuse()
    if cache is None or (len(readers) > 1 and not trainer.batches.live):
        path = session.folder / f"hidden_cache-{session.processes.index}.bin"
        sample = sample_batch(roles, list(trainer.rows[:2]))
        beginning = _beginning(roles, trainer)
        cache = hidden_cache.open_cache(roles.policy, sample, path, row_tokens, beginning)
    if isinstance(cache, str):  # why there is none
        if setting is True:
            session.warn(f"cache_frozen: hidden states are not cached: {cache}")
        return
    roles.policy.attached.hidden_cache = cache
    atexit.register(cache.close)
    session.warn(
        f"the lowest {cache.first} of {len(cache.layers)} layers are frozen: their hidden"
        f" states are computed once per row and cached ({cache.table.nbytes / 2**20:,.0f} MB"
        " on disk until the run ends)"
    )


def cache_logprobs(
    session: Session,
    trainer: Trainer,
    training: EncodedRows,
    held_out: EncodedRows,
    shared: SharedBase | None,
) -> None:
    """The log-probabilities of constant roles are kept, where rows are read again."""
    setting, roles = session.recipe.cache_reference, trainer.roles
    constant = []
    for name, role in session.methods.roles.items():
        if role.constant and isinstance(roles.players[name], Policy):
            constant.append(name)
    if setting is False or not trainer.rows or not roles.clock.total or (setting == "auto" and not constant):
        return
    why_not = trainer.no_reuse()
    if why_not is None and not constant:
        why_not = "every role's model changes during training"
    if why_not is None:
        room = 0
        for rows in (training, held_out):
            if rows.stats:
                supervised = rows.stats["row_tokens"] * rows.stats["supervised_share"]
                room += logprob_cache.words_needed(len(rows.rows), supervised)
        for name in constant:
            why_not = _cache_role(session, roles, name, room, shared) or why_not
    if why_not and setting is True:
        session.warn(f"cache_reference: log-probabilities are not cached: {why_not}")


def _cache_role(session: Session, roles: Any, name: str, room: int, shared: SharedBase | None) -> str | None:
    """Put a cache before a constant role; returns why it could not be."""
    player, role = roles.players[name], session.methods.roles[name]
    caches = shared.logprob_caches if shared else {}
    if name in caches:
        roles.players[name] = logprob_cache.CachedPolicy(player, caches[name])
        return None
    path = session.folder / f"logprob_cache-{name}-{session.processes.index}.bin"
    cached = logprob_cache.open_cache(player, path, room, json.dumps(spec(role), default=str))
    if isinstance(cached, str):
        return cached
    if not role.per_run:
        caches[name] = cached.cache
    roles.players[name] = cached
    session.warn(
        f"role '{name}' does not change: its log-probabilities are computed once per row and"
        " cached on disk until the run ends"
    )
    return None


def close_caches(trainer: Trainer, shared: SharedBase | None) -> None:
    """Give the files back; those that other runs read too are theirs."""
    roles = trainer.roles
    if roles.tuner.hidden_cache:
        roles.tuner.hidden_cache.close()
    others = list(shared.logprob_caches.values()) if shared else []
    for policy in roles.policies():
        if isinstance(policy, logprob_cache.CachedPolicy) and policy.cache not in others:
            policy.cache.close()
