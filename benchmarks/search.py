"""Searchers on toy tasks at equal numbers of runs, compared seed by seed.

    python benchmarks/search.py        # the default: both tasks, four searchers, four seeds
    python benchmarks/search.py --tasks style --samplers bayes random --seeds 6 --trials 24

Every searcher goes over the learning rate (five decades), rank and scale of LoRA on the small toy model. Its
score is the lowest held-out loss it has measured, in nats a token, and the mean of that on the way. For each
pair of searchers: the mean difference over seeds, paired, with its 95 % t interval. The results go to
benchmarks/results/search.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from itertools import combinations
from pathlib import Path

import numpy as np

from luthier.study.search import measure, open_store, optimize, search_spec
from luthier.study.statistics import paired_difference

SPACE = "learning_rate=1e-5..1 log, tuner.r=1..32 log, tuner.lora_alpha=1..128 log"
DIVERGED = 9.0  # stands for a loss that is not finite
RESULTS = Path(__file__).parent / "results" / "search.json"


def losses(task: str, sampler: str, seed: int, trials: int, folder: Path) -> list[float]:
    """Held-out losses in the order in which they were measured."""
    recipe = {
        "model": "toy:lm-small",
        "data": {"path": f"toy:{task}/new", "n": 300},
        "tuner": "lora",
        "max_steps": 20,
        "seed": seed,
    }
    spec = search_spec(
        recipe,
        [SPACE],
        ["quality"],
        trials=trials,
        sampler=sampler,
        seeds=[100 + seed],
        test_seeds=[0],
        subprocesses=False,
    )
    finished = optimize(
        open_store(spec, folder),
        spec.searcher,
        lambda t, number: measure(spec, folder, t, number),
        trials=trials,
        seed=seed,
    )
    return [trial.observation.values[0] for trial in finished]


def best_so_far(values: list[float]) -> list[float]:
    finite = np.nan_to_num(values, nan=DIVERGED, posinf=DIVERGED)
    return np.minimum.accumulate(finite).tolist()


def compare(curves: dict[str, dict[str, list[list[float]]]]) -> list[dict]:
    """curves: task -> sampler -> [seeds][trials], best so far. A positive mean is in favour of `better`."""
    rows = []
    tasks = list(curves)
    for a, b in combinations(curves[tasks[0]], 2):
        for score in ("best", "on the way"):
            gaps: dict[str, np.ndarray] = {}
            for task in tasks:
                one, other = np.array(curves[task][a]), np.array(curves[task][b])
                gap = other[:, -1] - one[:, -1] if score == "best" else other.mean(1) - one.mean(1)
                gaps[task] = gap
            gaps["all"] = np.concatenate(list(gaps.values()))
            for task, gap in gaps.items():
                difference = paired_difference(gap[:, None], np.zeros((len(gap), 1)))
                rows.append(
                    {
                        "better": a,
                        "than": b,
                        "task": task,
                        "score": score,
                        "pairs": len(gap),
                        "wins": int((gap > 0).sum()),
                        "mean": difference.mean,
                        "low": difference.low,
                        "high": difference.high,
                    }
                )
    return rows


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--tasks", nargs="+", default=["style", "people"])
    parser.add_argument("--samplers", nargs="+", default=["bayes", "tpe", "gp", "botorch"])
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    curves = {task: {name: [] for name in options.samplers} for task in options.tasks}
    for seed in range(options.seeds):
        for task in options.tasks:
            for name in options.samplers:
                with tempfile.TemporaryDirectory() as folder:
                    values = losses(task, name, seed, options.trials, Path(folder))
                curves[task][name].append(best_so_far(values))
                print(f"seed {seed} {task} {name:<8} best {min(curves[task][name][-1]):.4f}", flush=True)
    rows = compare(curves)
    for row in rows:
        print(
            f"{row['task']:<7} {row['score']:<10} {row['better']} below {row['than']}: {row['mean']:+.4f}"
            f" ({row['low']:+.4f} to {row['high']:+.4f}), lower on {row['wins']} of {row['pairs']} seeds"
        )
    setting = {"space": SPACE, "seeds": options.seeds, "trials": options.trials, "unit": "nats a token"}
    result = {**setting, "differences": rows, "best_so_far": curves}
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
