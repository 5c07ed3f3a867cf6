"""GRPO with a verifier on a real model: one-step word problems, a short supervised start on equations, then
reinforcement by whether the answer is right. What is compared is the accuracy on held-out problems before and
after GRPO.

python benchmarks/real_grpo.py MODEL math_word.jsonl --output-dir runs/real_grpo

Rows are JSON lines with `question`, `answer` and `equation`, such as those of SVAMP and ASDiv; problems whose
equation is a single step are used. The split goes by the question alone, so that the held-out problems
are the same for every seed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from pathlib import Path

from luthier import Recipe, tune
from luthier.methods.evaluators._base import paired_change, per_example_file

STEP = re.compile(r"\(?\s*(\d+)(?:\.0)?\s*([-+*/])\s*(\d+)(?:\.0)?\s*\)?(?:\s*=.*)?")
REWARD = {"name": "math"}
PROMPT = "{question}\nWrite the equation with its result."


def one_step(line: str) -> dict | None:
    """A row of a problem that takes one operation on whole numbers; None of any other."""
    row = json.loads(line)
    step = STEP.fullmatch(row.get("equation") or "")
    number = re.match(r"\d+(?:\.0)?(?![\d./])", str(row["answer"]))
    if step is None or number is None:
        return None
    answer = str(int(float(number.group())))
    turns = [{"role": "user", "content": PROMPT.format(question=row["question"])}]
    equation = f"{step[1]} {step[2]} {step[3]} = {answer}"
    completion = [{"role": "assistant", "content": equation}]
    name = hashlib.sha256(row["question"].encode()).hexdigest()[:12]
    return {"id": name, "prompt": turns, "completion": completion, "answer": answer}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", help="folder of the model")
    parser.add_argument("rows", type=Path, help="JSON lines of word problems")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/real_grpo"))
    parser.add_argument("--start", type=int, default=240, help="rows of the supervised start")
    parser.add_argument("--steps", type=int, default=20, help="steps of GRPO")
    parser.add_argument("--prompts", type=int, default=8, help="problems of a step")
    parser.add_argument("--samples", type=int, default=8, help="answers to each")
    parser.add_argument("--held-out", type=int, default=250, help="held-out problems")
    parser.add_argument("--rate", type=float, default=1e-4, help="learning rate of GRPO")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    usable: dict[str, dict] = {}
    for line in options.rows.read_text(encoding="utf-8").splitlines():
        row = one_step(line)
        if row is not None:
            usable[row["id"]] = row
    rows = [usable[name] for name in sorted(usable)]
    test = rows[: options.held_out]
    start = rows[options.held_out : options.held_out + options.start]
    others = rows[options.held_out + options.start :]
    parts = f"{len(start)} to start, {len(others)} for GRPO, {len(test)} held out"
    print(f"{len(rows):,} one-step problems: {parts}")
    answers = {"name": "sampled", "n": len(test), "samples": 2, "max_new_tokens": 16, "reward": REWARD}
    greedy = {"name": "generate", "n": len(test), "max_new_tokens": 16, "reward": REWARD}
    rollout = {"name": "rollout", "n": options.samples, "max_new_tokens": 16}
    common = Recipe.load(
        {
            "model": options.model,
            "tuner": {"name": "lora", "r": 16},
            "eval_data": test,
            "max_eval_samples": "all",
            "per_device_train_batch_size": 8,
            "num_train_epochs": 1,
            "seed": options.seed,
            "evaluate": [greedy, answers],
        }
    )
    folder = options.output_dir
    first = tune(
        common.but(data=start, learning_rate=1e-3, output_dir=str(folder / "start"), evaluate=["loss"]),
    )
    second = tune(
        common.but(
            data=others,
            init_from=first.folder,
            objective={"name": "grpo", "beta": 0.0},
            online_stages=[rollout, {"name": "score", "reward": REWARD}],
            per_device_train_batch_size=options.prompts,
            max_steps=options.steps,
            learning_rate=options.rate,
            output_dir=str(folder / "grpo"),
        ),
    )
    before, after = (
        json.loads(per_example_file(Path(second.folder), when).read_text(encoding="utf-8"))
        for when in ("before", "after")
    )
    for name, label in (("generated_reward", "greedy"), ("sampled_reward", "sampled at temperature 1")):
        if name in before:
            change = paired_change(before[name], after[name])
            span = f"{change.low:+.1%} to {change.high:+.1%}"
            print(f"{label}: {change.before:.1%} -> {change.after:.1%} (95% of the change: {span})")
    print(f"{options.steps} steps, {options.steps * options.prompts * options.samples:,} samples")


if __name__ == "__main__":
    main()
