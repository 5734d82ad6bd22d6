"""The table of families, and the one way to open a checkpoint as a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llmpack.errors import InputRejected, Problem
from llmpack.models.family import Family
from llmpack.models.graph import ModelGraph
from llmpack.registry import Table, suggestion

if TYPE_CHECKING:
    from llmpack.checkpoint.checkpoint import Checkpoint

FAMILIES: Table[type[Family]] = Table(
    "family",
    {
        "llama": "llmpack.models.llama:Llama",
        "mistral": "llmpack.models.mistral:Mistral",
        "qwen2": "llmpack.models.qwen2:Qwen2",
        "qwen3": "llmpack.models.qwen3:Qwen3",
        "gemma2": "llmpack.models.gemma2:Gemma2",
        "gemma3": "llmpack.models.gemma3:Gemma3",
        "phi3": "llmpack.models.phi3:Phi3",
        "olmo2": "llmpack.models.olmo2:Olmo2",
        "smollm3": "llmpack.models.smollm3:SmolLM3",
        "granite": "llmpack.models.granite:Granite",
    },
    group="llmpack.families",
)

IGNORED_SUFFIX = ".rotary_emb.inv_freq"
"""A buffer that old Llama checkpoints store; it follows from the config."""

HINTS = 8
"""How many tensors that are not part of a model get a suggestion; each is compared with every name."""


def family_of(config: Mapping[str, Any]) -> Family:
    """The family that ``architectures`` in a config.json names.

    Raises InputRejected (``unsupported-arch``) for an unknown one, listing those that are supported.
    """
    declared = config.get("architectures")
    names = declared if isinstance(declared, list) else []
    by_architecture = {arch: family for _, family in FAMILIES.items() for arch in family.architectures}
    if len(names) != 1 or names[0] not in by_architecture:
        text = f"architectures is {declared!r}; supported: {', '.join(by_architecture)}"
        raise InputRejected([Problem(text, "architectures", "config.json", rule="unsupported-arch")])
    return by_architecture[names[0]]()


def open_model(checkpoint: Checkpoint) -> ModelGraph:
    """The graph of a checkpoint, with the encodings in which it is stored.

    Raises InputRejected naming every tensor that is missing or not part of the model (``weights-incomplete``)
    or of another shape than the config implies (``weights-misshaped``). That every token id has a row in the
    embedding follows: the intake compared the tokenizer with ``vocab_size``, this compares the embedding.
    """
    family = family_of(checkpoint.config)
    graph = family.graph(checkpoint.config)
    stored = checkpoint.tensors
    problems = []
    for spec in graph.tensors:
        if spec.name not in stored:
            problems.append(Problem(f"tensor `{spec.name}` {list(spec.shape)} is missing", rule="weights-incomplete"))
        elif tuple(stored[spec.name].shape) != spec.shape:
            text = f"tensor `{spec.name}` is {list(stored[spec.name].shape)}; config.json implies {list(spec.shape)}"
            problems.append(Problem(text, rule="weights-misshaped"))
    extra = [name for name in stored if name not in graph and not _follows(name, graph)]
    for number, name in enumerate(extra):
        hint = _near(name, graph) if number < HINTS else ""
        text = f"tensor `{name}` is not part of {family.name} with this config{hint}"
        problems.append(Problem(text, rule="weights-incomplete"))
    if problems:
        raise InputRejected(problems)
    return family.graph(checkpoint.config, {spec.name: stored[spec.name].encoding for spec in graph.tensors})


def _follows(name: str, graph: ModelGraph) -> bool:
    """True for tensors that loaders ignore because they follow from others: rotary buffers, a tied head."""
    return name.endswith(IGNORED_SUFFIX) or (name == "lm_head.weight" and name not in graph)


def _near(name: str, graph: ModelGraph) -> str:
    hint = suggestion(name, [spec.name for spec in graph.tensors])
    return hint if "did you mean" in hint else ""
