"""Quality: the artifact in its runtime against the source model, token by token on the same text.

A `Reference` is the source's last hidden states on the evaluation text, computed once and kept; its
logits are recomputed from them a few tokens at a time, so that no matrix of all logits is ever stored.
Token ids are fed to both sides as they are, so both see the same beginning.

`fidelity` is the other comparison: the artifact in its runtime against its own decoded weights. There
a difference is a fault of what was written or of how it is read, not of the rounding.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmpack.algorithms.divergence import Comparison, Divergence, compare
from llmpack.checkpoint.atomic import write_atomic
from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.digest import sha256_bytes, sha256_value
from llmpack.errors import Problem, VerificationFailed
from llmpack.models.forward import Forward, final_hidden
from llmpack.models.graph import ModelGraph
from llmpack.progress import QUIET, Progress
from llmpack.runtime.runners import runtime_for
from llmpack.runtime.settings import RuntimeSettings
from llmpack.target.budget import Evidence, Finding, LimitName

if TYPE_CHECKING:
    import safetensors.torch as safetensors_torch
    import torch
    from torch import Tensor
else:
    from llmpack.lazy import LazyModule

    torch = LazyModule("torch")
    safetensors_torch = LazyModule("safetensors.torch")

REFERENCE_VERSION = 1
"""Raised when equal inputs would give other hidden states."""
CHUNK = 128
"""Tokens whose logits are compared at once: 25 MB each at a vocabulary of 50k."""

FIDELITY_KL = 0.03
"""Most mean divergence, in nats, of an artifact from its own decoded weights. The runtime's integer kernels round
activations to 8 bits, which costs 0.001 to 0.005 on the demo model; a wrong order of rows costs more than 1."""
FIDELITY_TOP1 = 0.90
"""Least share of tokens on which both find the same token likeliest; 0.96 is usual on the demo model."""


@dataclass(frozen=True)
class Reference:
    """The source model on a text.

    tokens   [N, T] int64
    hidden   [N, T, D] float32, after the last norm
    forward  the source's head; it gives logits for hidden states
    digest   of the source and the text
    """

    tokens: Tensor
    hidden: Tensor
    forward: Forward
    digest: str

    @classmethod
    def build(
        cls, checkpoint: Checkpoint, graph: ModelGraph, tokens: Tensor, folder: Path | None, progress: Progress = QUIET
    ) -> Reference:
        """Run the source over `tokens` [N, T], or read what an earlier run kept in `folder`.

        A kept file that is damaged, or is of another source or text, is computed again. Raises
        InputRejected as the checkpoint does, and NumericalError where hidden states are not finite.
        """
        text = sha256_bytes(tokens.contiguous().numpy().tobytes() + json.dumps([*tokens.shape]).encode())
        digest = sha256_value({"version": REFERENCE_VERSION, "source": checkpoint.digest, "text": text})
        forward = Forward(checkpoint, graph)
        path = folder / f"reference-{digest[:16]}.safetensors" if folder is not None else None
        hidden = _kept(path, digest, tokens) if path is not None else None
        if hidden is None:
            hidden = final_hidden(checkpoint, graph, tokens, progress)
            if path is not None:
                _keep(path, digest, hidden)
        return cls(tokens, hidden, forward, digest)

    @property
    def vocabulary(self) -> int:
        """Rows of the head."""
        return int(self.forward.head().shape[0])

    def logits(self, sequence: int, rows: slice) -> Tensor:
        """[rows, V] float32 logits of some positions of one sequence."""
        return self.forward.logits(self.hidden[sequence : sequence + 1, rows])[0].float()


def _keep(path: Path, digest: str, hidden: Tensor) -> None:
    """Hidden states with their own checksum: a cache must not pass a flipped bit for a worse model."""
    data = safetensors_torch.save({"hidden": hidden.contiguous()})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, data)
    note = {"digest": digest, "sha256": sha256_bytes(data)}
    write_atomic(path.with_suffix(".json"), json.dumps(note, sort_keys=True).encode())


def _kept(path: Path, digest: str, tokens: Tensor) -> Tensor | None:
    """What `_keep` wrote, or None where it is absent, damaged or about something else."""
    try:
        data, note = path.read_bytes(), json.loads(path.with_suffix(".json").read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    if note != {"digest": digest, "sha256": sha256_bytes(data)}:
        return None
    hidden = safetensors_torch.load(data)["hidden"]
    return hidden if hidden.shape[:2] == tokens.shape else None


def evaluate(model: Path, reference: Reference, settings: RuntimeSettings, progress: Progress = QUIET) -> Divergence:
    """KL divergence of the source's predictions to those of a model in its runtime, and what goes with it.

    model  a GGUF file, or a model folder

    Raises VerificationFailed where the vocabularies differ, NumericalError where logits are not finite,
    RuntimeFailed as `Runtime` does.
    """
    return Divergence.of(list(comparisons(model, reference, settings, progress)))


def comparisons(
    model: Path, reference: Reference, settings: RuntimeSettings, progress: Progress = QUIET
) -> Iterator[Comparison]:
    """One comparison for each sequence of the reference."""
    count, length = reference.tokens.shape
    with runtime_for(model)() as runtime, progress.task("comparing with the source", count * length) as done:
        opened = runtime.open(model, settings, length)
        if opened.vocabulary != reference.vocabulary:
            text = f"{model.name} has a vocabulary of {opened.vocabulary}, the source one of {reference.vocabulary}"
            raise VerificationFailed([Problem(text, rule="vocabulary")])
        for index in range(count):
            tokens = reference.tokens[index]
            yield _compare(reference, index, torch.from_numpy(runtime.logits(tokens.tolist()).copy()))
            done(length)


def _compare(reference: Reference, index: int, logits: Tensor) -> Comparison:
    """The reference against logits [T, V] of the same sequence, a few tokens at a time."""
    tokens = reference.tokens[index]
    parts = []
    for start in range(0, len(tokens), CHUNK):
        rows = slice(start, min(start + CHUNK, len(tokens)))
        following = tokens[start + 1 : rows.stop + 1]  # the last token of the text has no successor
        parts.append(compare(reference.logits(index, rows), logits[rows], following))
    return Comparison.joined(parts)


def fidelity(
    model: Path,
    checkpoint: Checkpoint,
    graph: ModelGraph,
    tokens: Tensor,
    settings: RuntimeSettings,
    progress: Progress = QUIET,
) -> Divergence:
    """A model in its runtime against the checkpoint that it was written from, decoded and run in float32.

    The KV cache is kept in f16 whatever `settings` say: a coarser one belongs to quality. Raises as `evaluate`.
    """
    plain = settings.model_copy(update={"kv": "f16"})
    return evaluate(model, Reference.build(checkpoint, graph, tokens, None, progress), plain, progress)


def fidelity_problems(found: Divergence) -> list[Problem]:
    """What is wrong if an artifact does not compute what its own weights say; empty if it does."""
    problems = []
    if found.mean > FIDELITY_KL:
        text = f"the model does not compute what its weights say: mean KL {found.mean:.4g} nats, at most {FIDELITY_KL}"
        problems.append(Problem(text, rule="fidelity"))
    if found.top1 < FIDELITY_TOP1:
        text = (
            f"the model and its weights agree on the likeliest token in {found.top1:.1%}, at least {FIDELITY_TOP1:.0%}"
        )
        problems.append(Problem(text, rule="fidelity"))
    return problems


def quality_findings(found: Divergence, evidence: Evidence) -> list[Finding]:
    """The figures as evidence for a verdict."""
    reason = f"{found.tokens} tokens"
    figures: tuple[tuple[LimitName, float], ...] = (
        ("quality.kl", found.mean),
        ("quality.kl_p99", found.p99),
        ("quality.top1", found.top1),
        ("quality.ppl_ratio", found.ppl_ratio),
    )
    return [Finding(limit=n, value=value, best=value, evidence=evidence, reason=reason) for n, value in figures]
