"""The training loop of a distillation: durable state, held-out validation, the best numbers kept.

The order of sequences follows from the seed and the epoch alone and nothing else is drawn by chance, so numbers,
moments of the optimizer and the count of steps are the whole state: a run that was killed goes on from the last one
that was saved and ends in the same bytes. The state is a safetensors file; nothing is ever unpickled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmpack.algorithms.distillation import relative_error, tail_kl
from llmpack.calibration import ranks
from llmpack.calibration.student import Student, Trainable
from llmpack.calibration.teacher import Predictions
from llmpack.checkpoint.atomic import write_atomic
from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.errors import NumericalError
from llmpack.models import open_model
from llmpack.progress import QUIET, Progress

if TYPE_CHECKING:
    import safetensors
    import safetensors.torch as safetensors_torch
    import torch
    from torch import Tensor, nn
else:
    from llmpack.lazy import LazyModule

    torch = LazyModule("torch")
    safetensors = LazyModule("safetensors")
    safetensors_torch = LazyModule("safetensors.torch")

CLIP = 1.0
"""Largest norm of a gradient."""
LAST = 0.1
"""Share of the learning rate at the end of the cosine."""


@dataclass(frozen=True)
class Schedule:
    """How a student learns.

    batch     sequences of one step
    warmup    steps until the learning rate is reached
    check     steps between two looks at held-out text, at which the state becomes durable too
    patience  looks without a new best after which it stops
    hidden    weight of the relative error of hidden states beside the divergence
    """

    learning_rate: float
    batch: int
    epochs: int
    warmup: int
    check: int
    patience: int
    temperature: float = 1.0
    precision: str = "float32"
    hidden: float = 0.0

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of a step: a line up, then half a cosine down to a tenth."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        way = (step - self.warmup) / max(1, steps - self.warmup)
        return self.learning_rate * (LAST + (1 - LAST) * 0.5 * (1 + math.cos(math.pi * way)))


@dataclass(frozen=True)
class Text:
    """Tokens [N, T] int64 and what the teacher says after each of them."""

    tokens: Tensor
    predictions: Predictions


@dataclass
class _Progressed:
    """Where a run stands: steps done, held-out loss before the first and at its best, looks since the best."""

    step: int
    first: float
    best: float
    best_step: int = 0
    since: int = 0


@dataclass(frozen=True)
class Learned:
    """Result: numbers by name (None where nothing was better than at the start), and figures for the record."""

    numbers: dict[str, Tensor] | None
    found: dict[str, Any]


class Training:
    """One distillation, resumable from `work`."""

    def __init__(
        self,
        student: Student,
        learn: Text,
        held: Text,
        schedule: Schedule,
        seed: int,
        work: Path,
        progress: Progress = QUIET,
    ) -> None:
        self._student, self._learn, self._held = student, learn, held
        self._schedule, self._seed, self._progress = schedule, seed, progress
        self._state, self._best = work / "state.safetensors", work / "best.safetensors"
        self._accelerator = ranks.accelerator({"float32": "no", "bfloat16": "bf16"}[schedule.precision])
        optimizer = torch.optim.AdamW(student.learning.values(), lr=schedule.learning_rate, weight_decay=0.0)
        # not wrapped for several processes: gradients are summed once for each step, whatever each of them had to do
        self._model = self._accelerator.prepare_model(student.model, evaluation_mode=True)
        self._optimizer = self._accelerator.prepare_optimizer(optimizer)
        self._hidden: list[Tensor] = []
        if schedule.hidden:
            student.model.base_model.register_forward_hook(self._note_hidden)

    @property
    def steps(self) -> int:
        """Steps of the whole schedule."""
        return self._schedule.epochs * math.ceil(len(self._learn.tokens) / self._schedule.batch)

    def run(self) -> Learned:
        """Learn to the end, or until held-out text says that it is enough.

        Raises NumericalError where a loss is not finite; what was saved before stays as it is.
        """
        at = self._resume()
        left = (self.steps - at.step) * self._schedule.batch * self._learn.tokens.shape[1]
        with self._progress.task("distilling", left) as done:
            while at.step < self.steps and at.since < self._schedule.patience:
                self._step(at.step)
                at.step += 1
                done(self._schedule.batch * self._learn.tokens.shape[1])
                if at.step % self._schedule.check == 0 or at.step == self.steps:
                    self._look(at)
        found = {"held_out": {"before": at.first, "after": at.best}, "steps": at.step, "best_step": at.best_step}
        if at.best_step == 0:
            return Learned(None, found)
        self._accelerator.wait_for_everyone()  # the best may still be on its way to the disk
        return Learned(safetensors_torch.load(self._best.read_bytes()), found)

    def _note_hidden(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        self._hidden[:] = [output.last_hidden_state]

    def _mine(self, sequences: Tensor) -> Tensor:
        """Those of some sequences that this process runs."""
        return sequences[self._accelerator.process_index :: self._accelerator.num_processes]

    def _sum(self, value: float) -> float:
        """The sum over all processes."""
        if self._accelerator.num_processes == 1:
            return value
        whole = torch.tensor(value, dtype=torch.float64, device=self._accelerator.device)
        torch.distributed.all_reduce(whole)
        return float(whole)

    def _sum_gradients(self) -> None:
        if self._accelerator.num_processes > 1:
            for number in self._student.learning.values():
                if number.grad is None:  # fewer sequences than processes
                    number.grad = torch.zeros_like(number)
                torch.distributed.all_reduce(number.grad)

    def _sequences(self, step: int) -> Tensor:
        """Numbers of the sequences of a step."""
        count = len(self._learn.tokens)
        per_epoch = math.ceil(count / self._schedule.batch)
        epoch, place = divmod(step, per_epoch)
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        order = torch.randperm(count, generator=generator)
        return order[place * self._schedule.batch : (place + 1) * self._schedule.batch]

    def _loss(self, text: Text, sequences: Tensor) -> Tensor:
        """What is made small: divergence, and the distance of hidden states if asked."""
        loss = self._divergence(text, sequences)
        if self._schedule.hidden:
            wanted = text.predictions.states(sequences).to(self._accelerator.device)
            loss = loss + self._schedule.hidden * relative_error(self._hidden.pop(), wanted).mean()
        return loss

    def _divergence(self, text: Text, sequences: Tensor) -> Tensor:
        """Mean KL divergence over some sequences."""
        device = self._accelerator.device
        ids, log_p = (part.to(device) for part in text.predictions.batch(sequences))
        logits = self._model(input_ids=text.tokens[sequences].to(device), use_cache=False).logits
        return tail_kl(logits.flatten(0, 1), ids.flatten(0, 1), log_p.flatten(0, 1), self._schedule.temperature).mean()

    def _step(self, step: int) -> None:
        """One step; sequences run one by one, so that the logits of one are in memory."""
        sequences = self._sequences(step)
        total = 0.0
        for one in self._mine(sequences):
            loss = self._loss(self._learn, one[None]) / len(sequences)
            self._accelerator.backward(loss)
            total += float(loss.detach())
        total = self._sum(total)
        if not math.isfinite(total):
            raise self._diverged(f"the loss of step {step + 1} is {total}")
        self._sum_gradients()
        self._accelerator.clip_grad_norm_(self._student.learning.values(), CLIP)
        for group in self._optimizer.param_groups:
            group["lr"] = self._schedule.rate(step, self.steps)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _diverged(self, what: str) -> NumericalError:
        return NumericalError(
            f"{what}; lower learning_rate (it is {self._schedule.learning_rate:g}) or raise warmup; "
            "the model that the step began with is untouched"
        )

    def _validate(self) -> float:
        with torch.no_grad():
            mine = self._mine(torch.arange(len(self._held.tokens)))
            losses = [float(self._divergence(self._held, one[None])) for one in mine]
        return self._sum(sum(losses)) / len(self._held.tokens)

    def _look(self, at: _Progressed) -> None:
        """Judge on held-out text, keep the best, make the state durable."""
        loss = self._validate()
        if not math.isfinite(loss):
            raise self._diverged(f"the held-out loss after step {at.step} is {loss}")
        self._progress.say(f"step {at.step} of {self.steps}: held-out KL {loss:.4g} (best {min(at.best, loss):.4g})")
        if loss < at.best:
            at.best, at.best_step, at.since = loss, at.step, 0
            if self._accelerator.is_main_process:
                write_atomic(self._best, safetensors_torch.save(self._numbers()))
        else:
            at.since += 1
        if self._accelerator.is_main_process:
            self._save(at)

    def _numbers(self) -> dict[str, Tensor]:
        return {name: value.detach().cpu().clone() for name, value in self._student.learning.items()}

    def _save(self, at: _Progressed) -> None:
        tensors = self._numbers()
        for name, value in self._student.learning.items():
            moments = self._optimizer.state[value]
            tensors |= {f"{name}:{key}": moments[key].detach().cpu() for key in ("exp_avg", "exp_avg_sq", "step")}
        write_atomic(self._state, safetensors_torch.save(tensors, {"llmpack": json.dumps(asdict(at))}))

    def _resume(self) -> _Progressed:
        """Where the last saved state stands, loaded; or the beginning, judged."""
        if not self._state.exists():
            first = self._validate()
            if not math.isfinite(first):
                raise NumericalError(f"the held-out loss before the first step is {first}; the model is damaged")
            return _Progressed(0, first, first)
        with safetensors.safe_open(self._state, "pt") as file:
            at = _Progressed(**json.loads(file.metadata()["llmpack"]))
            with torch.no_grad():
                for name, value in self._student.learning.items():
                    value.copy_(file.get_tensor(name))
                    keys = ("exp_avg", "exp_avg_sq", "step")
                    moments = {key: file.get_tensor(f"{name}:{key}") for key in keys}
                    self._optimizer.state[value] = {
                        key: one if key == "step" else one.to(value.device) for key, one in moments.items()
                    }
        return at


@dataclass(frozen=True)
class Job:
    """A distillation as every process that takes part can do it: all that it needs lies on disk.

    checkpoint  folder of the student
    work        holds tokens and the teacher's predictions, and the state
    threads     of all processes on a machine
    """

    checkpoint: str
    work: str
    trainable: Trainable
    rank: int
    save_memory: bool
    seed: int
    threads: int
    schedule: Schedule

    def values(self) -> dict[str, Any]:
        """For `Job.of`."""
        return asdict(self)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Job:
        """The inverse of `values`."""
        return cls(**{**values, "schedule": Schedule(**values["schedule"])})


def train(job: Job, progress: Progress = QUIET) -> tuple[Student, Learned]:
    """Do a job, alone or as one of several processes. Raises NumericalError where a loss is not finite."""
    checkpoint, work = Checkpoint.open(Path(job.checkpoint)), Path(job.work)
    hidden = job.schedule.hidden > 0
    learn, held = (
        Text(torch.from_numpy(np.load(work / f"{name}.npy")), Predictions.read(work, name, hidden=hidden))
        for name in ("learn", "held")
    )
    generator = torch.Generator().manual_seed(job.seed)
    student = Student(checkpoint, open_model(checkpoint), job.trainable, job.rank, generator)
    if job.save_memory:
        student.save_memory()
    return student, Training(student, learn, held, job.schedule, job.seed, work, progress).run()


def follow() -> None:
    """Train whenever the first process does, until it sends this one home."""
    while (values := ranks.called()) is not None:
        job = Job.of(values)
        torch.set_num_threads(ranks.threads(job.threads))
        train(job)
