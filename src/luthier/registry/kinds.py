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
        Kind("tuner", "tuners", "Tuners: which parameters are trained", "tuner: {}"),
        Kind("quantizer", "quantizers", "Quantizers: how frozen base weights are stored", "quantization: {}"),
        Kind("objective", "objectives", "Objectives: the loss", "objective: {}"),
        Kind("estimator", "estimators", "Estimators: how the gradient is computed", "estimator: {}"),
        Kind("transform", "transforms", "Transforms: steps from a gradient to an update", "optim: [{}]"),
        Kind("optimizer", "optimizers", "Optimizers: chains of transforms, by name", "optim: {}"),
        Kind("stage", "stages", "Stages: processing rows before or during training", "stages: [{}]"),
        Kind(
            "reward", "rewards", "Rewards: scores of a text", "online_stages: [{{name: score, reward: {}}}]"
        ),
        Kind(
            "environment",
            "environments",
            "Environments: worlds in which a policy acts over several turns",
            "online_stages: [{{name: episodes, environment: {}}}]",
        ),
        Kind(
            "role",
            "roles",
            "Roles: reference, teacher and other models beside the policy",
            "roles: {{reference: {}}}",
        ),
        Kind("plan", "plans", "Plans: recipes of several runs", "plan: {}"),
        Kind(
            "compiler",
            "compilers",
            "Compilers: optimizers of prompt programs",
            "tuned = compiler({!r}).compile(program, rows, metric)",
            group="programs",
        ),
        Kind(
            "merger",
            "mergers",
            "Mergers: combining several models into one",
            "init_from: {{merge: {}, of: [runs/a, runs/b]}}",
        ),
        Kind(
            "decoder",
            "decoders",
            "Decoders: how text is generated",
            "evaluate: [{{name: generate, decoder: {}}}]",
        ),
        Kind("evaluator", "evaluators", "Evaluators: what is measured", "evaluate: [{}]"),
        Kind(
            "architecture",
            "architectures",
            "Architectures: model classes and their input layouts",
            "architecture: {}",
        ),
        Kind(
            "format", "formats", "Formats: recognised row formats", "data: {{path: rows.jsonl, format: {}}}"
        ),
        Kind(
            "searcher",
            "searchers",
            "Searchers: which configuration to try next",
            "# luthier search recipe.yaml --sampler {}",
        ),
        Kind(
            "exporter",
            "exporters",
            "Exporters: a run's result in the form of other tools",
            "# luthier export runs/a --as {} --output-dir DIR",
        ),
    )
}
