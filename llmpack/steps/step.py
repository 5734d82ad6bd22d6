"""What a step is: one change to a model, with its recipe options as fields."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import ConfigDict

from llmpack.documented import Documented
from llmpack.models.graph import ModelGraph
from llmpack.progress import QUIET, Progress

if TYPE_CHECKING:
    from llmpack.calibration.corpus import Corpus
    from llmpack.checkpoint.checkpoint import Checkpoint
    from llmpack.steps.host_memory import Batch, Moment

Processor = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Workbench:
    """Where a step works and what it works with.

    folder  the checkpoint that it writes; may hold the finished shards of a run of the same step that was killed
    work    scratch beside it, which survives a killed run
    source  the model that the recipe began with, before any step
    corpus  tokens to learn from, None for steps that need none
    threads compute threads: bytes are equal for equal threads on machines of one class
    processor  what runs the blocks of a step that `walks`
    """

    folder: Path
    work: Path
    source: Checkpoint
    corpus: Corpus | None
    seed: int
    threads: int
    progress: Progress = QUIET
    processor: Processor = "cpu"


class Step(Documented):
    """One change to a model. A frozen object; its fields are its options in a recipe.

    version  raised when equal options would give other tensors
    unkeyed  options that say what is allowed or becomes of the result, not how it is made: it is found without them
    trains   whether the result is a model of its own rather than the source in other numbers
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    version: ClassVar[int] = 1
    trains: ClassVar[bool] = False
    unkeyed: ClassVar[frozenset[str]] = frozenset()

    use: str
    """Name of the step."""

    @property
    def needs_corpus(self) -> bool:
        """Whether it learns from calibration text."""
        return False

    @property
    def walks(self) -> bool:
        """Whether it runs calibration text through block after block, on the processor that the workbench names."""
        return False

    @property
    def gpu_problem(self) -> str | None:
        """Why its options keep the blocks from running on a GPU, with the cure."""
        return None

    @property
    def copies(self) -> int:
        """How many times what it makes lies on disk while it works."""
        return 1

    @property
    def packages(self) -> tuple[str, ...]:
        """Packages that compute for it, besides those that compute for all."""
        return ()

    @property
    def open_amount(self) -> str | None:
        """The option that asks for as much as the budget wants, if there is one."""
        return None

    def amounts(self, graph: ModelGraph) -> Sequence[Step]:
        """The step with each number that its open amount could be, from the least that goes to the most."""
        return ()

    @abstractmethod
    def preview(self, graph: ModelGraph) -> ModelGraph:
        """The graph that `run` will produce; needs no data and no torch.

        Raises RecipeError with every tensor that cannot be treated as the options ask, and the cure.
        """

    def host_memory(self, graph: ModelGraph, batch: Batch | None) -> tuple[Moment, ...]:
        """What `run` takes of memory on the machine that builds, moment by moment; nothing where it cannot say.

        batch  tokens that run through a block at once, None for steps that read no text
        """
        return ()

    @abstractmethod
    def run(self, checkpoint: Checkpoint, graph: ModelGraph, bench: Workbench) -> Checkpoint:
        """Change `checkpoint`, whose graph is `graph`, and write the result to ``bench.folder``.

        Called again after a crash it goes on where it was, and ends with the same bytes.
        Raises StepFailed and its kind.
        """
