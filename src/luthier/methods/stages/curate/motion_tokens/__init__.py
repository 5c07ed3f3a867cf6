"""MotionGPT-2's motions as words: a VQ-VAE is learned on motions, and rows hold their codes as text.

A motion is a list of frames, each with the same number of features, or a path of a .npy file of them. In a
row's prompt and completions `<motion>` becomes `<motion_start><motion_12>...<motion_end>`; `<motion:first>`,
`<motion:middle>` and `<motion:last>` are the code of one frame, a pose; `<motion:head>` and `<motion:tail>`
the codes of the first half and of the others. With `tasks` every row becomes one of each task, such as text
to motion, motion to text, and completion. Beside a recipe's `add_tokens` with the same words, each code is
one token (Wang et al., 2024).

The codec depends on its motions, its settings and `seed` alone, and lies in the run's folder as
motion_codec.safetensors; `MotionCodec.load(path).decode_text(answer)` gives the frames of an answer.
`codec: run:0` takes that of a plan's first run. Departs: the velocity is of all features; a pose is encoded
as a motion that stands still.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from luthier.clock import Clock
from luthier.errors import RecipeError
from luthier.methods.formats._base import COMPLETIONS
from luthier.methods.stages._base import Stage, text_of, without
from luthier.methods.stages.curate.motion_tokens.codec import MotionCodec, Shape, Training, learn
from luthier.methods.stages.select._embedding import question
from luthier.processes import group
from luthier.registry import Artifact, Column, stage

MOTION = Column(
    "motion",
    says="rows with a `motion`: frames of numbers, or a path of a .npy file of them",
    example=(
        [[0.1, 1.0], [0.2, 1.0], [0.3, 1.0], [0.4, 1.0], [0.5, 1.0]],
        [[1.0, 0.2], [1.0, 0.4], [1.0, 0.6]],
        [[-0.3, 0.0], [-0.6, 0.0], [-0.9, 0.0], [-1.2, 0.0], [-1.5, 0.0], [-1.8, 0.0]],
    ),
)
MOTION_CODES = Column("motion_codes", says="the codes of a row's motion (stage motion_tokens)")
FILE = "motion_codec.safetensors"  # in the run's folder
POSES = ("first", "middle", "last")


@stage(
    paper="arXiv:2410.21747",
    row="motiongpt-2",
    requires=[MOTION, COMPLETIONS],
    provides=[MOTION_CODES],
    removes=[MOTION],
    artifacts=[Artifact("motion_codec.safetensors", says="encoder, codebook and decoder of motions")],
    example={
        "codes": 4,
        "width": 4,
        "depth": 1,
        "steps": 2,
        "batch_size": 2,
        "window": 4,
        "tasks": ["{prompt}=><motion>"],
    },
    use_when="a language model is to write or describe motions, or other series of many features, as tokens.",
    costs="training a small network, unless `codec` names one.",
    covers="encoder, codebook with averages and resets, decoder; losses of frames, velocity and commitment;"
    " poses as codes; tasks of text to motion, motion to text and completion; the codec is saved, and decodes"
    " answers.",
    omits="separate codebooks of body and hands (Part-Aware VQ-VAE); FID, R-precision and MM-dist, which need"
    " the authors' evaluator networks; rows of eval_data, which no stage reads.",
    tests=[
        "methods/stages/curate/test_motion_tokens.py::test_the_nearest_entry_is_that_of_all_distances",
        "methods/stages/curate/test_motion_tokens.py::test_commitment_reaches_the_encoder_alone",
        "methods/stages/curate/test_motion_tokens.py::test_entries_follow_the_mean_and_rare_ones_move",
        "methods/stages/curate/test_motion_tokens.py::test_sines_come_back",
        "methods/stages/curate/test_motion_tokens.py::test_marks_become_codes",
    ],
)
class MotionTokens(Stage):
    """Rows in which motions are tokens; `motion` becomes `motion_codes`."""

    # "PROMPT=>COMPLETION", for each a row of every row; {prompt} and {completion} are the row's
    tasks: list[str] = field(default_factory=list)
    motions: Any = None  # rows whose motions the codec is learned from; null: the rows themselves
    codec: str | None = None  # folder of a run, or file, with a codec that is taken as it is
    codes: Annotated[int, Field(ge=2)] = 512  # entries of the codebook
    width: Annotated[int, Field(ge=1)] = 512  # of the codec's network and of an entry
    downsample: Annotated[int, Field(ge=1)] = 4  # frames of one code, a power of two
    depth: Annotated[int, Field(ge=0)] = 3  # residual blocks of a level of the codec
    steps: Annotated[int, Field(ge=1)] = 20_000  # of the codec's training
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4  # of the codec's training
    batch_size: Annotated[int, Field(ge=1)] = 256  # windows of a step
    window: Annotated[int, Field(ge=1)] = 64  # frames of a window
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.99  # of the averages that entries follow
    velocity: Annotated[float, Field(ge=0)] = 0.5  # weight of the loss of differences of frames
    commitment: Annotated[float, Field(ge=0)] = 0.02  # weight of the loss of vectors and their entries
    seed: int = 0  # of the codec

    def __post_init__(self):
        if self.downsample & (self.downsample - 1):
            raise RecipeError(
                f"stage 'motion_tokens': downsample is a power of two (1, 2, 4, 8), not {self.downsample}"
            )
        if self.window % self.downsample:
            raise RecipeError("stage 'motion_tokens': window is to be a multiple of downsample")
        for task in self.tasks:
            if task.count("=>") != 1:
                raise RecipeError(f"stage 'motion_tokens': a task is PROMPT=>COMPLETION, not {task!r}")

    def __call__(self, rows, roles):
        rows = list(rows)
        with_motion = [row for row in rows if row.get("motion") is not None]
        motions = [frames_of(row) for row in with_motion]
        source = motions
        if self.motions is not None:
            from luthier.data.load import load_rows

            source = [frames_of(row) for row in load_rows(self.motions).rows if row.get("motion") is not None]
        codec = self.fitted(source, roles)
        self.check(motions, codec)
        folder = getattr(roles, "folder", None)
        if folder is not None and group.current().index == 0:
            codec.save(Path(folder) / FILE)
        self.report(motions, codec, roles)
        series = dict(zip([row["id"] for row in with_motion], motions, strict=True))
        out = []
        for row in rows:
            out += self.written(row, series.get(row["id"]), codec, roles)
        return out

    def fitted(self, motions: Sequence[Tensor], roles: Any) -> MotionCodec:
        """A codec that was learned before, or one of these motions."""
        device = getattr(roles, "device", "cpu")
        if self.codec is not None:
            path = Path(self.codec).expanduser()
            return MotionCodec.load(path / FILE if path.is_dir() else path).to(device)
        if not motions:
            raise RecipeError("stage 'motion_tokens': no row has a motion; name its column `motion`")
        shape = Shape(motions[0].shape[1], self.codes, self.width, self.downsample, self.depth)
        for motion in motions:
            if motion.shape[1] != shape.channels:
                raise RecipeError(
                    f"stage 'motion_tokens': frames have {shape.channels} and {motion.shape[1]} features; all"
                    " motions need as many"
                )
        how = Training(
            self.steps,
            self.learning_rate,
            self.batch_size,
            self.window,
            self.decay,
            self.velocity,
            self.commitment,
        )
        return learn(motions, shape, how, Clock(self.seed), device)

    def check(self, motions: Sequence[Tensor], codec: MotionCodec) -> None:
        for motion in motions:
            if motion.shape[1] != codec.shape.channels:
                raise RecipeError(
                    f"stage 'motion_tokens': frames have {motion.shape[1]} features, the codec's have"
                    f" {codec.shape.channels}"
                )

    def report(self, motions: Sequence[Tensor], codec: MotionCodec, roles: Any) -> None:
        """How much of the motions' variance their codes lose, and how many entries they use."""
        if not motions:
            return
        error, codes = 0.0, set()
        for motion in motions:
            numbers = codec.encode(motion)
            codes |= set(numbers)
            difference = (codec.decode(numbers)[: len(motion)] - motion.to(codec.mean)) / codec.deviation
            error += float(difference.square().sum())
        entries = sum(motion.numel() for motion in motions)
        self.measure(roles, motion_error=error / entries, motion_codes_in_use=float(len(codes)))

    def written(self, row: dict, motion: Tensor | None, codec: MotionCodec, roles: Any) -> list[dict]:
        """A row's rows: one, or one for each task."""
        rest = {name: value for name, value in row.items() if name != "motion"}
        if motion is None:
            if "<motion" in f"{question(row)} {row['completions']}":
                raise RecipeError(
                    f"stage 'motion_tokens': row {row['id']} has a mark of a motion and no `motion`"
                )
            return [rest]
        marks = texts_of(motion, codec)
        rest["motion_codes"] = codec.encode(motion)
        if not self.tasks:
            new = {**rest, "prompt": filled(row["prompt"], marks)}
            return [{**new, "completions": [filled(each, marks) for each in row["completions"]]}]
        values = {"{prompt}": question(row), "{completion}": text_of(roles, row["completions"][0])}
        out = []
        for number, task in enumerate(self.tasks):
            asks, answers = (filled(filled(part, values), marks) for part in task.split("=>"))
            new = {**without(rest), "id": f"{row['id']}/{number}", "prompt": asks, "completions": [answers]}
            if not isinstance(row["prompt"], str):
                new["prompt"] = [{"role": "user", "content": asks}]
                new["completions"] = [[{"role": "assistant", "content": answers}]]
            out.append(new)
        return out


def frames_of(row: dict) -> Tensor:
    """A row's motion [T, channels]. Raises RecipeError where it is none."""
    motion = row["motion"]
    try:
        if isinstance(motion, str):
            motion = np.load(Path(motion).expanduser(), allow_pickle=False)
        frames = torch.as_tensor(np.asarray(motion, dtype=np.float32))
    except (OSError, ValueError, TypeError) as error:
        raise RecipeError(
            f"stage 'motion_tokens': row {row.get('id')}: its motion cannot be read: {error}"
        ) from None
    if frames.ndim != 2 or not frames.numel() or not frames.isfinite().all():
        raise RecipeError(
            f"stage 'motion_tokens': row {row.get('id')}: a motion is a list of frames with as many finite"
            " numbers each"
        )
    return frames


def texts_of(motion: Tensor, codec: MotionCodec) -> dict[str, str]:
    """Mark -> the codes that it stands for, as text."""
    codes = codec.encode(motion)
    half = -(-len(codes) // 2)
    marks = {
        "<motion>": words(codes),
        "<motion:head>": words(codes[:half]),
        "<motion:tail>": words(codes[half:]),
    }
    places = dict(zip(POSES, (0, len(motion) // 2, len(motion) - 1), strict=True))
    for name, place in places.items():
        still = motion[place : place + 1].expand(codec.shape.downsample, -1)
        marks[f"<motion:{name}>"] = words(codec.encode(still))
    return marks


def words(codes: Sequence[int]) -> str:
    """Codes as tokens' texts."""
    return "<motion_start>" + "".join(f"<motion_{code}>" for code in codes) + "<motion_end>"


def filled(content: Any, values: dict[str, str]) -> Any:
    """A text, or turns, with values in place of marks; ids stay."""
    if isinstance(content, str):
        for mark, value in values.items():
            content = content.replace(mark, value)
        return content
    if isinstance(content, list) and content and isinstance(content[0], dict):
        return [{**turn, "content": filled(turn.get("content"), values)} for turn in content]
    return content
