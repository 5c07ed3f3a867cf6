"""Searchers beside chance on the practice worlds, at equal numbers of runs: what each finds, paired over
seeds.

python benchmarks/search.py                       # style: bayes beside random; eight minutes on one core
python benchmarks/search.py people tpe gp --seeds 8 --trials 16

Every searcher goes over the learning rate (five decades), rank and scale of LoRA on the small practice model;
the score of a search is the lowest held-out loss that it has seen, in nats a token, and its mean on the way.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

from luthier.study.search import _book, _measure, optimize, quest

OVER = "learning_rate=1e-5..1 log, tuner.r=1..32 log, tuner.lora_alpha=1..128 log"


def seen(world: str, sampler: str, seed: int, trials: int, folder: Path) -> list[float]:
    """Held-out losses in the order in which they were measured."""
    recipe = {
        "model": "toy:lm-small",
        "data": {"path": f"toy:{world}/new", "n": 300},
        "tuner": "lora",
        "max_steps": 20,
        "seed": seed,
    }
    made = quest(
        recipe,
        [OVER],
        ["quality"],
        trials=trials,
        sampler=sampler,
        seeds=[100 + seed],
        test_seeds=[0],
        apart=False,
    )
    book = _book(made, folder, None)
    done = optimize(book, made.searcher, lambda t, i: _measure(made, folder, t, i), trials=trials, seed=seed)
    return [t.seen.values[0] for t in done]


def main() -> None:
    says = argparse.ArgumentParser()
    says.add_argument("world", nargs="?", default="style")
    says.add_argument("samplers", nargs="*", default=["bayes"])
    says.add_argument("--seeds", type=int, default=6)
    says.add_argument("--trials", type=int, default=24)
    asked = says.parse_args()
    found: dict[str, np.ndarray] = {}
    for name in [*asked.samplers, "random"]:
        lines = []
        for seed in range(asked.seeds):
            with tempfile.TemporaryDirectory() as folder:
                lines.append(
                    np.minimum.accumulate(
                        np.nan_to_num(
                            seen(asked.world, name, seed, asked.trials, Path(folder)), nan=9.0, posinf=9.0
                        )
                    )
                )
        found[name] = np.stack(lines)
        print(
            f"{asked.world} {name:<8} best {found[name][:, -1].round(4).tolist()} mean"
            f" {found[name][:, -1].mean():.4f}, on the way {found[name].mean():.4f}",
            flush=True,
        )
    for name in asked.samplers:
        for what, gain in (
            ("best", found["random"][:, -1] - found[name][:, -1]),
            ("on the way", found["random"].mean(1) - found[name].mean(1)),
        ):
            print(
                f"{asked.world} {name} below random, {what}: {gain.mean():+.4f} +-"
                f" {gain.std(ddof=1) / len(gain) ** 0.5:.4f}, {(gain > 0).sum()} of {len(gain)} seeds"
            )


if __name__ == "__main__":
    main()
