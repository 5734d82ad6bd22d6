"""distill: a smaller model learns from the source what pruning took from it."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field

from llmpack.calibration import ranks
from llmpack.calibration.self_text import self_written
from llmpack.calibration.teacher import predictions
from llmpack.calibration.training import Job, Schedule, train
from llmpack.checkpoint.atomic import write_atomic
from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.checkpoint.tensors import torch_dtype
from llmpack.checkpoint.writing import CheckpointWriter
from llmpack.errors import InputRejected, Problem, RecipeError
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
    where none does better. The whole model is trained in memory, with accelerate's loop; `accelerate launch` runs it in
    several processes.
    """

    version: ClassVar[int] = 1
    trains: ClassVar[bool] = True

    data: Literal["calibration", "self"] = "calibration"
    """What is learned from: calibration text, or text that the source writes, each sequence begun with the first words
    of one of calibration text. Held-out text is calibration text either way."""

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

    hidden: float = Field(default=0.0, ge=0, le=1000, allow_inf_nan=False)
    """Weight of the relative error of the last hidden states beside the divergence of predictions; 0 leaves it out. The
    student's states must be as wide as the source's."""

    precision: Literal["float32", "bfloat16", "auto"] = "float32"
    """Of the products inside the model; "auto" is bfloat16 where the hardware has instructions for it."""

    checkpointing: bool = False
    """Compute what blocks keep for their gradients again, in place of keeping it: less memory, a third more time."""

    @property
    def copies(self) -> int:
        """The state with the optimizer's moments, the best numbers, and the result."""
        return 5

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
        return (training(graph, learning[self.train], batch, again=self.checkpointing),)

    def run(self, checkpoint: Checkpoint, graph: ModelGraph, bench: Workbench) -> Checkpoint:
        """Write the trained checkpoint to ``bench.folder``."""
        self.preview(graph)
        _require_one_vocabulary(checkpoint, bench.source)
        self._require_one_width(graph, open_model(bench.source))
        bench.work.mkdir(parents=True, exist_ok=True)
        with compute_threads(bench.threads):
            self._ask_teacher(bench)
        job = self._job(checkpoint, bench)
        ranks.call(job.values())
        with compute_threads(ranks.threads(bench.threads)):
            student, done = train(job, bench.progress)
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

    def _ask_teacher(self, bench: Workbench) -> None:
        """Write tokens and what the teacher says after each of them, for whoever trains."""
        learn, held = split(bench.corpus, self.use)
        graph = open_model(bench.source)
        tokens = {"learn": learn.tokens, "held": held.tokens}
        if self.data == "self":
            tokens["learn"] = self_written(bench.source, graph, learn.tokens, bench.seed, bench.work, bench.progress)
        teacher = Forward(bench.source, graph)
        for name, part in tokens.items():
            content = io.BytesIO()
            np.save(content, part.numpy())
            write_atomic(bench.work / f"{name}.npy", content.getvalue())
            predictions(
                teacher,
                part,
                self.top,
                self.temperature,
                bench.work,
                name,
                bench.progress,
                hidden=self.hidden > 0,
            )

    def _job(self, checkpoint: Checkpoint, bench: Workbench) -> Job:
        return Job(
            checkpoint=str(checkpoint.folder.absolute()),
            work=str(bench.work.absolute()),
            trainable=self.train,
            rank=self.rank,
            save_memory=self.checkpointing,
            seed=bench.seed,
            threads=bench.threads,
            schedule=self._schedule(),
        )

    def _require_one_width(self, student: ModelGraph, teacher: ModelGraph) -> None:
        """Raises RecipeError where hidden states are to be compared and are not of one width."""
        widths = [next(s.shape[1] for s in graph.outside if s.part == "embedding") for graph in (student, teacher)]
        if self.hidden and widths[0] != widths[1]:
            text = f"the student's hidden states have {widths[0]} channels, the source's {widths[1]}; set hidden = 0"
            raise RecipeError([Problem(text, "hidden")])

    def _schedule(self) -> Schedule:
        precision = self.precision
        if precision == "auto":
            precision = "bfloat16" if _has_bfloat16() else "float32"
        return Schedule(
            learning_rate=self.learning_rate,
            batch=self.batch,
            epochs=self.epochs,
            warmup=self.warmup,
            check=self.check,
            patience=self.patience,
            temperature=self.temperature,
            precision=precision,
            hidden=self.hidden,
        )


def _has_bfloat16() -> bool:
    """Whether products of bfloat16 are faster than those of float32 where models are trained."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    has = torch.cpu.get_capabilities()
    return any(has.get(name, False) for name in ("avx512_bf16", "amx_tile", "amx_bf16", "bf16"))


def _require_one_vocabulary(student: Checkpoint, teacher: Checkpoint) -> None:
    """Raises InputRejected where token ids would not mean the same to both."""
    sizes = [one.config.get("vocab_size") for one in (student, teacher)]
    if sizes[0] != sizes[1]:
        text = (
            f"the student has a vocabulary of {sizes[0]}, its teacher one of {sizes[1]}; token ids must mean the same"
        )
        raise InputRejected([Problem(text, "vocab_size", str(teacher.folder), rule="vocabulary")])
