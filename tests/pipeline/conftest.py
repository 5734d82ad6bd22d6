"""A small model with a vocabulary that llama.cpp knows, recipes for it, and a cache of its own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from llmpack.pipeline.cache import Cache
from llmpack.pipeline.state import Order
from llmpack.progress import QUIET
from llmpack.target.measure import Protocol

RECIPE = """\
schema = 1
name = "tiny"

[source]
model = "{model}"

[calibration]
text = ["python:pydoc_data.topics"]
tokens = 1024
length = 64

[[step]]
use = "quantize.gptq"
encoding = "iq4_nl"

[evaluation]
text = ["python:statistics"]
tokens = 256
length = 64

[runtime]
threads = 1

[budget]
memory = "600 MiB"
disk = "8 MB"
context = 128
quality = {{ kl = 9.0, top1 = 0.001 }}

[build]
threads = 1
"""


SHORT = Protocol(repetitions=2, least_seconds=0.0, rounds=1)


@pytest.fixture(scope="session")
def packable(
    checkpoint_factory: Callable[..., Path], demo_gguf: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A tied Llama of two narrow blocks with SmolLM2's vocabulary, as a folder."""
    from llmpack.checkpoint.gguf_file import GgufFile
    from llmpack.models.gguf_tokenizer import tokenizer_files

    made = checkpoint_factory(tokenizer=None, vocab_size=49152)
    folder = tmp_path_factory.mktemp("packable") / "tiny-llama"
    shutil.copytree(made, folder)
    for name, content in tokenizer_files(GgufFile.open(demo_gguf).metadata).items():
        (folder / name).write_bytes(content)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A tiny Llama\n")
    (folder / "LICENSE").write_text("The licence of a tiny Llama.\n")
    return folder


@pytest.fixture
def recipe_file(packable: Path, tmp_path: Path) -> Path:
    """A recipe for the small model that passes on any machine."""
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE.format(model=packable))
    return path


@pytest.fixture
def order(recipe_file: Path, tmp_path: Path) -> Callable[..., Order]:
    """Orders for that recipe; keyword arguments are fields of `Order`."""

    def make(*overrides: str, **fields: object) -> Order:
        cache = fields.pop("cache", None) or Cache(tmp_path / "cache", progress=fields.get("progress", QUIET))
        fields.setdefault("protocol", SHORT)
        return Order(recipe_file, tmp_path / "out", cache, overrides, **fields)

    return make
