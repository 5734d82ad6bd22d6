"""`llmpack run`: ask a bundle something, under the runtime settings that ship in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmpack.formats.bundle import MANIFEST, Bundle
from llmpack.pipeline.manifest import Manifest
from llmpack.runtime.runners import runtime_for
from llmpack.runtime.settings import RuntimeSettings


@dataclass(frozen=True)
class Question:
    """What to ask and how long the answer may be.

    raw          continue the prompt as it stands, without the chat template
    temperature  0 takes the likeliest token each time
    """

    prompt: str
    tokens: int = 256
    system: str | None = None
    raw: bool = False
    temperature: float = 0.0
    seed: int = 0


def ask(folder: Path, question: Question, spoken: Callable[[str], None]) -> dict[str, Any]:
    """The answer of a bundle, whole; `spoken` gets it piece by piece while it comes.

    Raises VerificationFailed for a folder that is no bundle, RuntimeFailed where its runtime fails.
    """
    bundle = Bundle.open(folder, contents=False)
    recipe = Manifest.read(bundle.manifest, str(folder / MANIFEST)).made["recipe"]
    settings = RuntimeSettings.model_validate(recipe["runtime"])
    with runtime_for(bundle.model)() as runtime:
        runtime.open(bundle.model, settings, int(recipe["budget"]["context"]))
        prompt = question.prompt if question.raw else runtime.render(_messages(question))
        ids = runtime.tokenize(prompt, add_special=question.raw, parse_special=not question.raw)
        answer = runtime.generate(ids, question.tokens, temperature=question.temperature, seed=question.seed)
        while True:
            try:
                spoken(next(answer))
            except StopIteration as finished:
                made = finished.value
                break
    return {
        "answer": made.text,
        "tokens": len(made.tokens),
        "prompt_tokens": len(ids),
        "first_token_seconds": made.first_token,
        "seconds": made.seconds,
    }


def _messages(question: Question) -> list[dict[str, str]]:
    system = [{"role": "system", "content": question.system}] if question.system else []
    return [*system, {"role": "user", "content": question.prompt}]
