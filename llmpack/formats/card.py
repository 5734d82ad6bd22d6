"""The model card of a bundle: what the hub reads at its top, and what a person reads below."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmpack import __version__
from llmpack.formats.facts import HUB, Facts
from llmpack.units import format_size

if TYPE_CHECKING:
    import huggingface_hub
else:
    from llmpack.lazy import LazyModule

    huggingface_hub = LazyModule("huggingface_hub")

_UNSAFE = re.compile(r"[\x00-\x1f\x7f]+")


@dataclass(frozen=True)
class Card:
    """What a card says.

    title      name of the bundle
    facts      of the model in it
    source     where it came from, as the recipe names it
    relation   how it derives from its base models: "quantized", or "finetune" where weights were trained
    sizes      bytes of the file and numbers in it
    encodings  tensors and bytes by encoding
    quality    lines of what was measured against the source: name, value
    verdict    rows of the verdict, its head first: a column for each device, or found, status and evidence of one
    notes      what a user should know
    recipe     the recipe's text
    layout     of a safetensors folder; None for a GGUF file
    """

    title: str
    facts: Facts
    source: str
    nbytes: int
    parameters: int
    recipe: str
    relation: str = "quantized"
    layout: str | None = None
    encodings: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    quality: Sequence[tuple[str, str]] = ()
    verdict: Sequence[tuple[str, ...]] = ()
    notes: Sequence[str] = ()

    def text(self) -> str:
        """The card, front matter first; the same facts give the same bytes."""
        parts = [f"---\n{self._front_matter()}\n---", f"# {_line(self.title)}", self._opening(), self._use()]
        encodings = [(name, str(count), format_size(nbytes)) for name, (count, nbytes) in self.encodings.items()]
        parts += _table("What is inside", ("encoding", "tensors", "bytes"), encodings)
        parts += _table("Quality against the source", ("measure", "value"), self.quality)
        parts += _table("Verdict", self.verdict[0], self.verdict[1:]) if self.verdict else []
        if self.notes:
            parts += ["## Notes", "\n".join(f"- {_line(note)}" for note in self.notes)]
        fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", self.recipe)), default=0))
        parts += ["## Recipe", f"{fence}toml\n{self.recipe.rstrip()}\n{fence}", self._licence()]
        return "\n\n".join(part for part in parts if part) + "\n"

    def _front_matter(self) -> str:
        facts = self.facts
        repositories = [_repository(model) for model in facts.base_models or ()]
        kind, library = ("gguf", "gguf") if self.layout is None else ("safetensors", "transformers")
        data = huggingface_hub.ModelCardData(
            license=facts.license,
            license_name=facts.license_name,
            license_link=facts.license_link,
            language=list(facts.languages) or None,
            base_model=[name for name in repositories if name] or None,
            base_model_relation=self.relation if any(repositories) else None,
            library_name=library,
            tags=list(
                dict.fromkeys((kind, "llmpack", *(tag for tag in facts.tags if tag not in ("gguf", "safetensors"))))
            ),
            quantized_by=f"llmpack {__version__}",
            ignore_metadata_errors=True,
        )
        return str(data.to_yaml())

    def _opening(self) -> str:
        bits = 8 * self.nbytes / max(1, self.parameters)
        return (
            f"{_line(self.facts.name)}, packed by llmpack {__version__} from `{_line(self.source)}`: "
            f"{self.parameters / 1e6:.1f} million parameters in {format_size(self.nbytes)}, {bits:.2f} bits each.\n"
            "How it was made and what was measured, in full: `manifest.json`."
        )

    def _use(self) -> str:
        if self.layout is None:
            return (
                "```sh\nllmpack run . 'Your prompt'     # or any program that reads GGUF: llama-cli -m model.gguf\n```"
            )
        lines = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'model = AutoModelForCausalLM.from_pretrained(".")',
            'tokenizer = AutoTokenizer.from_pretrained(".")',
        )
        return f"```sh\nllmpack run . 'Your prompt'\n```\n\n```python\n{chr(10).join(lines)}\n```"

    def _licence(self) -> str:
        facts = self.facts
        if facts.license is None:
            return "## Licence\n\nThe source names no licence."
        name = facts.license_name or facts.license
        link = f" ({_line(facts.license_link)})" if facts.license_link else ""
        return f"## Licence\n\n{_line(name)}{link}, as the source says; its texts lie beside this file."


def _repository(model: Mapping[str, str]) -> str | None:
    """``org/name`` of a base model on the hub."""
    address = model.get("repo_url", "")
    name = address.removeprefix(HUB)
    return name if address.startswith(HUB) and name.count("/") == 1 else None


def _line(text: str) -> str:
    """A stranger's text on one line, without control characters."""
    return _UNSAFE.sub(" ", text).strip()


def _cell(text: str) -> str:
    return _line(text).replace("|", "\\|")


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return []
    lines = [head, ["---"] * len(head), *rows]
    return [f"## {title}", "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)]
