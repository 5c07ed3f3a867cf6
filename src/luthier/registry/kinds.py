"""The kinds of methods: one table that says where each kind lies, and how a recipe names one of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """A kind of method.

    folder: its place below luthier/methods. group: the group of entry points (`luthier.<group>`) by which
    other packages announce methods of it. title: heading of its page in the docs. example: how a recipe names
    one.
    """

    name: str
    folder: str
    title: str
    example: str
    group: str = ""

    @property
    def entry_points(self) -> str:
        return f"luthier.{self.group or self.folder}"


KINDS = {
    kind.name: kind
    for kind in (
        Kind("tuner", "tuners", "Tuners: what moves", "tuner: {}"),
        Kind(
            "quantizer", "quantizers", "Quantizers: what the frozen weights are kept in", "quantization: {}"
        ),
        Kind("objective", "objectives", "Objectives: toward what", "objective: {}"),
        Kind("estimator", "estimators", "Estimators: where the gradient comes from", "estimator: {}"),
        Kind("transform", "transforms", "Transforms: what becomes of a gradient", "optim: [{}]"),
        Kind("optimizer", "optimizers", "Optimizers: chains of transforms, by name", "optim: {}"),
        Kind("stage", "stages", "Stages: rows in, rows out", "stages: [{}]"),
        Kind(
            "reward", "rewards", "Rewards: how good a text is", "online_stages: [{{name: score, reward: {}}}]"
        ),
        Kind(
            "role",
            "roles",
            "Roles: references, teachers and other networks of a run",
            "roles: {{reference: {}}}",
        ),
        Kind("plan", "plans", "Plans: several runs", "plan: {}"),
        Kind(
            "compiler",
            "compilers",
            "Compilers: tuned programs of prompts",
            "tuned = compiler({!r}).compile(program, rows, metric)",
            group="programs",
        ),
        Kind(
            "merger",
            "mergers",
            "Mergers: one model out of several",
            "init_from: {{merge: {}, of: [runs/a, runs/b]}}",
        ),
        Kind("decoder", "decoders", "Decoders: how text is generated", "decoder: {}"),
        Kind("evaluator", "evaluators", "Evaluators: what is measured", "evaluate: [{}]"),
        Kind(
            "architecture",
            "architectures",
            "Architectures: how a network reads and writes",
            "architecture: {}",
        ),
        Kind(
            "format", "formats", "Formats: how rows are recognised", "data: {{path: rows.jsonl, format: {}}}"
        ),
        Kind(
            "searcher",
            "searchers",
            "Searchers: which configuration to try next",
            "# luthier search recipe.yaml --sampler {}",
        ),
    )
}
