"""LESS: the rows whose step of training points where the target's loss falls.

After a short run of LoRA on some rows (`warmup`), a checkpoint is left for each epoch. At each of them the
gradient of every row becomes the direction that Adam would take from there, is projected at random, and made
of length one; the target's rows have plain gradients. A row's influence is the sum over checkpoints of the
learning rate times the inner product with the mean of a target's gradients, of several targets the largest
(Xia et al., 2024). Gradients lie in `store`: another target, or a larger model that is to be trained on the
same rows (`scorer`: the small one), reads them again. Departs: the projection adds signed entries
(`projection: rademacher` is the paper's, and takes thousands of times longer on a CPU).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from luthier.data.load import load_rows
from luthier.errors import RecipeError
from luthier.methods.architectures._base import LOGPROBS
from luthier.methods.formats._base import COMPLETIONS
from luthier.methods.stages._base import Stage, workspace
from luthier.methods.stages.select._influence.gradients import adam_direction, parameters, row_gradients
from luthier.methods.stages.select._influence.projection import Projection
from luthier.methods.stages.select._influence.store import VectorStore, digest_of, fingerprint
from luthier.methods.stages.select._short_run import ShortRun, restored
from luthier.model.load import assemble
from luthier.recipe.recipe import Recipe
from luthier.recipe.validate import build_methods
from luthier.registry import Range, stage


@dataclass(frozen=True)
class Point:
    """A checkpoint of the short run."""

    tensors: dict[str, Tensor]
    m: Tensor  # [D] Adam's moments
    v: Tensor
    rate: float  # mean learning rate of its epoch


@stage(
    example={"n": 3, "target": "toy:arithmetic/train", "limit": 4, "epochs": 1, "dim": 64},
    paper="arXiv:2402.04333",
    row="less",
    requires=[COMPLETIONS, LOGPROBS],
    use_when="a few rows of the task that counts are at hand, and a large mixed pool: some percent of it are"
    " often as good as all.",
    costs="a short run on `warmup` of the rows, and for each epoch a forward and a backward pass over each"
    " row; `dim` numbers of two bytes a row and epoch on disk. What it will take is said before it begins.",
    covers="per-row LoRA gradients in Adam's form at each epoch's checkpoint, projected and normalised, plain"
    " gradients of the target, the largest of several targets; gradients on disk for other targets and"
    " models; all rows of a batch by one backward pass.",
    omits="LoRA of rank 128 as the paper's warm-up has it: the recipe's own tuner is used.",
    tests=[
        "methods/stages/select/test_less.py::test_gradients_of_rows_are_those_of_autograd",
        "methods/stages/select/test_less.py::test_scores_are_those_of_brute_force",
        "methods/stages/select/test_less.py::test_copies_of_the_target_rank_first",
        "methods/stages/select/test_less.py::test_projected_products_rank_as_exact_ones",
        "methods/stages/select/test_less.py::test_chosen_rows_teach_the_target_more_than_random_ones",
    ],
)
class Less(Stage):
    """The `n` rows, or the share, with the highest influence on the target; column `influence`."""

    target: Any = "toy:arithmetic/train"  # rows of the task that counts: a file, or rows
    limit: Annotated[int, Field(ge=1)] = 64  # rows of the target that are read
    by: str = "task"  # column of the target's rows that tells subtasks apart, where they have it
    n: Annotated[int, Field(ge=1)] | None = None  # rows that stay
    share: Annotated[float, Field(gt=0, le=1), Range(0.01, 0.5, log=True)] = 0.05  # or a share, without `n`
    warmup: Annotated[float, Field(gt=0, le=1)] = 0.05  # share of the rows in the short run
    epochs: Annotated[int, Field(ge=1)] = 4  # of the short run: so many checkpoints
    rate: Annotated[float, Field(gt=0)] = 2e-4  # learning rate of the short run
    dim: Annotated[int, Field(ge=0)] = 8192  # numbers of a projected gradient; 0: not projected
    projection: Literal["sparse", "rademacher"] = "sparse"  # how
    seed: int = 0  # of the projection
    batch_size: Annotated[int, Field(ge=1)] = 8  # rows per backward pass
    # folder or hub name of a (small) model whose gradients count; null: the policy's
    scorer: str | None = None
    scorer_tuner: Any = "lora"  # what trains of it
    store: str | None = None  # folder of the gradients, for other recipes too; null: the run's own

    def __call__(self, rows, roles):
        own = roles if self.scorer is None else self.scorer_roles(roles)
        rows = self.usable(rows, own)
        targets = self.targets(own)
        if not rows or not targets:
            return []
        scores = self.influences(own, rows, targets)
        n = self.n if self.n is not None else max(1, round(self.share * len(rows)))
        chosen = torch.tensor(scores).argsort(descending=True, stable=True)[:n].tolist()
        marked = []
        for row, score in zip(rows, scores, strict=True):
            marked.append({**row, "influence": score})
        return self.drop(roles, marked, chosen, f"their influence on the target is not among the {n} highest")

    def targets(self, roles: Any) -> dict[str, list[dict]]:
        """Subtask -> its rows."""
        by_task: dict[str, list[dict]] = {}
        for row in self.usable(load_rows(self.target).rows[: self.limit], roles):
            by_task.setdefault(str(row.get(self.by, "")), []).append(row)
        return by_task

    def scorer_roles(self, roles: Any) -> Any:
        """Roles of the model whose gradients count, with a tuner of its own."""
        dtype = str(next(roles.policy.model.parameters()).dtype).removeprefix("torch.")
        recipe = Recipe.load(
            {"model": self.scorer, "tuner": self.scorer_tuner, "dtype": dtype, "seed": roles.clock.seed}
        )
        other = assemble(recipe, build_methods(recipe))
        other.warn, other.folder = roles.warn, roles.folder
        return other

    def influences(self, roles: Any, rows: list[dict], targets: dict[str, list[dict]]) -> list[float]:
        """Of each row the largest over subtasks of the sum over checkpoints."""
        total = torch.zeros(len(rows), len(targets), dtype=torch.float64)
        with restored(roles):
            for number, point in enumerate(self.points(roles, rows)):
                roles.tuner.load(point.tensors)
                means = []
                for own in targets.values():
                    means.append(self.unit(roles, own).double().mean(0))
                stored = self.stored(roles, rows, point, number)
                total += point.rate * stored.products(rows, torch.stack(means))
        return total.max(1).values.tolist()

    # ------------------------------------------------------------------------------------ the short run

    def points(self, roles: Any, rows: list[dict]) -> Iterator[Point]:
        """The checkpoints of the short run, read back where they are there; their rates add up to one."""
        rng = roles.clock.rng("less", "warmup", at=0)
        order = torch.randperm(len(rows), generator=rng).tolist()
        some = [rows[i] for i in order[: max(1, round(self.warmup * len(rows)))]]
        folder = self.points_folder(roles, some)
        points = []
        run = ShortRun(roles, self.rate, self.batch_size, self.name)
        for number in range(self.epochs):
            path = folder and folder / f"epoch-{number}.safetensors"
            if path is not None and path.is_file():
                point = read_point(path)
                roles.tuner.load(point.tensors)
                run.moments.m, run.moments.v, run.moments.rate = point.m, point.v, point.rate
                run.moments.steps = (number + 1) * -(-len(some) // self.batch_size)
            else:
                moments = run.epoch(some, number, self.epochs)
                point = Point(roles.tuner.tensors(), moments.m, moments.v, moments.rate)
                if path is not None:
                    write_point(path, point)
            points.append(point)
        total = sum(point.rate for point in points)
        for point in points:
            yield Point(point.tensors, point.m, point.v, point.rate / total)

    def points_folder(self, roles: Any, rows: list[dict]) -> Path | None:
        place = workspace(roles, self.name, self.store)
        if place is None:
            return None
        settings = (self.epochs, self.rate, self.batch_size, roles.clock.seed)
        text = repr((settings, [digest_of(row) for row in rows]))
        name = fingerprint(roles.policy)[:12] + "-" + digest_of({"prompt": text})[:12]
        path = place / f"warmup-{name}"
        path.mkdir(exist_ok=True)
        return path

    # ---------------------------------------------------------------------------------------- gradients

    def project(self, roles: Any, vectors: Tensor) -> Tensor:
        """[G, D] -> [G, width] of length one."""
        seed = self.seed * 1_000_003 + 1
        projected = Projection(vectors.shape[1], self.dim, seed, self.projection)(vectors)
        return torch.nn.functional.normalize(projected, dim=-1)

    def unit(self, roles: Any, rows: list[dict]) -> Tensor:
        """[N, width] plain gradients, projected."""
        parts = []
        for first in range(0, len(rows), self.batch_size):
            gradients = row_gradients(roles, rows[first : first + self.batch_size])
            parts.append(self.project(roles, gradients).cpu())
        return torch.cat(parts)

    def stored(self, roles: Any, rows: list[dict], point: Point, number: int) -> VectorStore:
        """Adam's directions of all rows at a checkpoint, those that are missing computed."""
        size = sum(p.numel() for p in parameters(roles.tuner))
        place = workspace(roles, self.name, self.store)
        if place is not None:
            kind = f"{self.projection}-{self.dim}-{self.seed}"
            moments = digest_of({"prompt": [point.m.double().sum().item(), point.v.double().sum().item()]})
            place = place / f"gradients-{fingerprint(roles.policy)[:12]}-{moments[:8]}-{kind}"
        store = VectorStore(place, self.dim or size, exact=not self.dim)
        missing = store.missing(rows)
        store.check_disk(len(missing) * (self.epochs - number))
        begun = time.monotonic()
        for first in range(0, len(missing), self.batch_size):
            some = missing[first : first + self.batch_size]
            directions = adam_direction(row_gradients(roles, some), point.m, point.v)
            store.add(some, self.project(roles, directions))
            if first == 0 and number == 0:
                self.predict(roles, store, len(missing), len(rows), time.monotonic() - begun)
        return store

    def predict(self, roles: Any, store: VectorStore, missing: int, total: int, seconds: float) -> None:
        """Say what the gradients will take, after the first batch."""
        size = missing * self.epochs * store.width * store.type.itemsize / 2**20
        minutes = seconds / min(missing, self.batch_size) * missing * self.epochs / 60
        self.warn(
            roles,
            f"gradients of {missing:,} of {total:,} rows at {self.epochs} checkpoints will take about"
            f" {minutes:,.1f} minutes and {size:,.1f} MB; the others are there already",
        )


def write_point(path: Path, point: Point) -> None:
    """A checkpoint of the short run, complete or not there at all."""
    tensors = {f"tensor.{name}": tensor.contiguous() for name, tensor in point.tensors.items()}
    tensors |= {"m": point.m, "v": point.v, "rate": torch.tensor(point.rate, dtype=torch.float64)}
    beside = path.with_suffix(".part")
    save_file(tensors, str(beside))
    beside.replace(path)


def read_point(path: Path) -> Point:
    """Raises RecipeError where the file cannot be read."""
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except Exception as error:
        raise RecipeError(f"{path} cannot be read ({error}); delete it to have it computed again") from None
    own = {name.removeprefix("tensor."): t for name, t in tensors.items() if name.startswith("tensor.")}
    return Point(own, tensors["m"], tensors["v"], float(tensors["rate"]))
