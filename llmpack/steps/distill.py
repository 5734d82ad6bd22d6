"""distill: a smaller model learns from the source what pruning took from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from llmpack.calibration.student import Student
from llmpack.calibration.teacher import predictions
from llmpack.calibration.training import Schedule, Text, Training
from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.checkpoint.tensors import torch_dtype
from llmpack.checkpoint.writing import CheckpointWriter
from llmpack.errors import InputRejected, Problem
from llmpack.models import open_model
from llmpack.models.forward import Forward
from llmpack.models.graph import ModelGraph
from llmpack.steps.blocks import compute_threads, shard_name
from llmpack.steps.cutting import require_floats, split
from llmpack.steps.host_memory import Batch, Moment
from llmpack.steps.pruning_memory import training
from llmpack.steps.step import Step, Workbench

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from llmpack.lazy import LazyModule

    torch = LazyModule("torch")


class Distill(Step):
    """Train the model on calibration text to predict what the source predicts (forward KL divergence).

    The source's likeliest tokens at every position are written once, so that teacher and student are never in memory
    together. An eighth of the text is held out: the state that does best on it is kept, and the weights as they were
    where none does better. Training runs in float32 on the whole model, with accelerate's loop.
    """

    version: ClassVar[int] = 1
    trains: ClassVar[bool] = True
    copies: ClassVar[int] = 5  # the state with the optimizer's moments, and the best numbers

    train: Literal["full", "lora", "norms"] = "full"
    """What learns: every number, thin matrices added to the linear maps of blocks, or norms and biases alone."""

    rank: int = Field(default=16, ge=1, le=1024)
    """Rank of the thin matrices of `lora`; they are merged at the end."""

    learning_rate: float = Field(default=1e-4, gt=0, allow_inf_nan=False)
    """Of AdamW, reached after `warmup` and then lowered along half a cosine to a tenth."""

    batch: int = Field(default=4, ge=1, le=4096)
    """Sequences of calibration text in one step."""

    epochs: int = Field(default=1, ge=1, le=1000)
    """How often the text is gone through."""

    warmup: int = Field(default=4, ge=1, le=10**6)
    """Steps until the learning rate is reached."""

    check: int = Field(default=16, ge=1, le=10**6)
    """Steps between two looks at held-out text; at each the state becomes durable."""

    patience: int = Field(default=3, ge=1, le=1000)
    """Looks without a new best after which training stops."""

    top: int = Field(default=64, ge=1, le=4096)
    """Tokens of the teacher's prediction that are kept at every position; the rest counts as one."""

    temperature: float = Field(default=1.0, gt=0, le=100)
    """By what both models' logits are divided before they are compared."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the products inside the model; bfloat16 is faster where the hardware has it."""

    @property
    def needs_corpus(self) -> bool:
        """Always."""
        return True

    def preview(self, graph: ModelGraph) -> ModelGraph:
        """The same graph: other numbers, stored as they were."""
        require_floats(graph)
        return graph

    def host_memory(self, graph: ModelGraph, batch: Batch | None) -> tuple[Moment, ...]:
        """The whole model, and three numbers more for each one that learns."""
        if batch is None:
            return ()
        learning = {
            "full": graph.parameters,
            "norms": sum(spec.parameters for spec in graph.tensors if spec.part in ("norm", "bias")),
            "lora": sum(self.rank * sum(spec.shape) for spec in graph.tensors if spec.is_linear),
        }
        return (training(graph, learning[self.train], batch),)

    def run(self, checkpoint: Checkpoint, graph: ModelGraph, bench: Workbench) -> Checkpoint:
        """Write the trained checkpoint to ``bench.folder``."""
        self.preview(graph)
        _require_one_vocabulary(checkpoint, bench.source)
        learn, held = split(bench.corpus, self.use)
        bench.work.mkdir(parents=True, exist_ok=True)
        with compute_threads(bench.threads):
            teacher = Forward(bench.source, open_model(bench.source))
            texts = [
                Text(
                    part.tokens,
                    predictions(teacher, part.tokens, self.top, self.temperature, bench.work, name, bench.progress),
                )
                for name, part in (("learn", learn), ("held", held))
            ]
            del teacher
            generator = torch.Generator().manual_seed(bench.seed)
            student = Student(checkpoint, graph, self.train, self.rank, generator)
            done = Training(student, texts[0], texts[1], self._schedule(), bench.seed, bench.work, bench.progress).run()
            kl = done.found["held_out"]
            if done.numbers is None:
                changed: dict[str, Tensor] = {}
                bench.progress.say(
                    f"{self.use}: kept the weights as they were: nothing was better than KL {kl['before']:.3g}"
                )
            else:
                changed = student.tensors(done.numbers)
                bench.progress.say(f"{self.use}: held-out KL {kl['before']:.3g} to {kl['after']:.3g}")
        writer = CheckpointWriter(bench.folder, checkpoint)
        for block in (None, *range(graph.block_count)):
            if writer.finished(shard_name(block)) is None:
                specs = graph.outside if block is None else graph.block(block)
                tensors = {
                    spec.name: changed[spec.name].to(torch_dtype(spec.encoding))
                    if spec.name in changed
                    else checkpoint.stored(spec.name)
                    for spec in specs
                }
                writer.write(shard_name(block), tensors, done.found if block is None else None)
        return writer.finish()

    def _schedule(self) -> Schedule:
        return Schedule(
            learning_rate=self.learning_rate,
            batch=self.batch,
            epochs=self.epochs,
            warmup=self.warmup,
            check=self.check,
            patience=self.patience,
            temperature=self.temperature,
            precision=self.precision,
        )


def _require_one_vocabulary(student: Checkpoint, teacher: Checkpoint) -> None:
    """Raises InputRejected where token ids would not mean the same to both."""
    sizes = [one.config.get("vocab_size") for one in (student, teacher)]
    if sizes[0] != sizes[1]:
        text = (
            f"the student has a vocabulary of {sizes[0]}, its teacher one of {sizes[1]}; token ids must mean the same"
        )
        raise InputRejected([Problem(text, "vocab_size", str(teacher.folder), rule="vocabulary")])
