"""Options that all quantizing steps share, and what they make of a graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import AfterValidator, Field

from llmpack.encodings import ENCODINGS
from llmpack.encodings.names import INT_NAMES, ORDERED_NAMES
from llmpack.errors import Problem, RecipeError
from llmpack.models.graph import ModelGraph, TensorSpec
from llmpack.models.selection import Selection
from llmpack.registry import suggestion
from llmpack.steps.step import Step

FLOATS = ("f32", "f16", "bf16")


def _known_encoding(name: str) -> str:
    if name not in ENCODINGS:
        raise ValueError(f"unknown encoding `{name}`{suggestion(name, list(ENCODINGS))}")
    return name


EncodingName = Annotated[str, AfterValidator(_known_encoding)]
"""Name of an encoding, as `llmpack list encodings` shows them."""


def _readable(exceptions: dict[str, str]) -> dict[str, str]:
    for text in exceptions:
        Selection.parse(text)
    return exceptions


class Quantize(Step):
    """Store every linear map of every block, the embedding and the head with fewer bits.

    Norms and biases stay as they are. A tied head lives in the embedding.
    """

    encoding: EncodingName = "iq4_nl"
    """Encoding of every linear map."""

    embedding: EncodingName = "q8_0"
    """Encoding of the embedding."""

    output: EncodingName | None = None
    """Encoding of a head that is not tied to the embedding; by default that of the embedding."""

    exceptions: Annotated[dict[str, EncodingName], AfterValidator(_readable)] = Field(default_factory=dict)
    """Other encodings for some parts: `"attention.v" = "q8_0"`, or in some blocks `"ffn.down@0-3,29" = "q6_k"`."""

    requantize: bool = False
    """Decode what an earlier step has quantized, and round it a second time: that loses more than quantizing the source
    to this encoding. Without it the plan refuses."""

    unkeyed: ClassVar[frozenset[str]] = frozenset({"requantize"})

    @property
    def selections(self) -> tuple[tuple[Selection, str], ...]:
        """The exceptions, those without blocks first: one that names blocks has the last word."""
        parsed = [(Selection.parse(text), encoding) for text, encoding in self.exceptions.items()]
        return tuple(sorted(parsed, key=lambda pair: bool(pair[0].blocks)))

    def encoding_for(self, spec: TensorSpec) -> str:
        """How a tensor is to be stored."""
        if spec.part == "embedding":
            return self.embedding
        if spec.part == "output":
            return self.output or self.embedding
        if not spec.is_linear:
            return spec.encoding
        chosen = self.encoding
        for selection, encoding in self.selections:
            if spec in selection:
                chosen = encoding
        return chosen

    def preview(self, graph: ModelGraph) -> ModelGraph:
        """The graph with the encodings that the options ask for."""
        problems = [*self._selection_problems(graph), *self._tensor_problems(graph)]
        if problems:
            raise RecipeError(problems)
        return graph.with_encodings(self.encoding_for)

    def rounded_again(self, graph: ModelGraph) -> Counter[tuple[str, str]]:
        """How many matrices of a graph are quantized already and will be once more: from which encoding, to which.

        Those outside the blocks stay as they are where that is what is asked.
        """
        pairs = [(spec, self.encoding_for(spec)) for spec in graph.tensors if self._treats(spec)]
        return Counter(
            (spec.encoding, name)
            for spec, name in pairs
            if not {spec.encoding, name} & set(FLOATS) and (spec.encoding != name or spec.block is not None)
        )

    def encoding_problem(self, name: str) -> str | None:
        """Why this step cannot make tensors of an encoding, or None."""
        return None

    def _selection_problems(self, graph: ModelGraph) -> list[Problem]:
        parts = list(dict.fromkeys(spec.part for spec in graph.tensors if spec.is_linear))
        problems = []
        for selection, _ in self.selections:
            path = f'exceptions."{selection.text}"'
            if selection.part in ("embedding", "output"):
                problems.append(Problem(f"the {selection.part} has an option of its own: {selection.part} = ...", path))
            elif selection.part not in parts:
                problems.append(Problem(f"no part `{selection.part}`{suggestion(selection.part, parts)}", path))
            beyond = [last for _, last in selection.blocks if last >= graph.block_count]
            if beyond:
                message = f"block {max(beyond)} does not exist; the model has blocks 0-{graph.block_count - 1}"
                problems.append(Problem(message, path))
        return problems + self._contradictions(graph)

    def _contradictions(self, graph: ModelGraph) -> list[Problem]:
        ranged = [(selection, encoding) for selection, encoding in self.selections if selection.blocks]
        problems = []
        for at, (one, first) in enumerate(ranged):
            for other, second in ranged[at + 1 :]:
                both = [spec for spec in graph.tensors if spec in one and spec in other]
                if both and first != second:
                    message = f"{both[0].name} is {first} by `{one.text}` and {second} by `{other.text}`; say one"
                    problems.append(Problem(message, f'exceptions."{other.text}"'))
        return problems

    def _treats(self, spec: TensorSpec) -> bool:
        return spec.is_linear or spec.part in ("embedding", "output")

    def _tensor_problems(self, graph: ModelGraph) -> list[Problem]:
        groups: dict[tuple[str, str], list[TensorSpec]] = {}
        for spec in graph.tensors:
            if self._treats(spec):
                name = self.encoding_for(spec)
                problem = (
                    self.encoding_problem(name)
                    or ENCODINGS.load(name)().problem(spec.shape[-1])
                    or (None if self.requantize else _stored_problem(spec))
                )
                if problem:
                    groups.setdefault((problem, name), []).append(spec)
        return [_problem(text, name, specs) for (text, name), specs in groups.items()]


def _stored_problem(spec: TensorSpec) -> str | None:
    if spec.encoding in FLOATS:
        return None
    return (
        f"stored as {spec.encoding} already; rounding twice loses more than it saves: remove one of the steps, "
        "or set requantize = true"
    )


def _problem(text: str, name: str, specs: list[TensorSpec]) -> Problem:
    named = ", ".join(spec.name for spec in specs[:3])
    more = f" and {len(specs) - 3} more" if len(specs) > 3 else ""
    cure = ""
    if ENCODINGS.load(name)().problem(specs[0].shape[-1]) == text:
        fitting = _fitting(specs[0].shape[-1], name in INT_NAMES)
        parts = sorted({spec.part for spec in specs})
        cure = (
            f"; choose one that fits ({', '.join(fitting)}) for {', '.join(parts)},"
            f" or make the width a multiple of {ENCODINGS.load(name).block} with prune.width"
        )
    return Problem(f"{named}{more}: {text}{cure}", "encoding")


def _fitting(columns: int, ints: bool) -> list[str]:
    """Encodings of the same kind, of GGUF's types or of int groups, for rows of that length."""
    names = [n for n in ENCODINGS if n not in FLOATS and n not in ORDERED_NAMES and (n in INT_NAMES) == ints]
    return [name for name in names if ENCODINGS.load(name)().problem(columns) is None]


def options_of(step: Quantize) -> Mapping[str, str]:
    """The choices in one line each, for progress and records."""
    return {"linear": step.encoding, "embedding": step.embedding, **step.exceptions}
