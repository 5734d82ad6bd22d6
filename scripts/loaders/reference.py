"""A quantized model folder decoded by llmpack's layouts into the plain transformers model, in float32.

Reads GPTQ folders of every writer (groups in any order), and those of bitsandbytes in 4 bits.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from llmpack.encodings.gptq_words import dequantize
from llmpack.formats.layout_bnb import BnbFp4, BnbNf4
from llmpack.formats.written import WrittenTensors
from llmpack.models import family_of
from llmpack.models.graph import TensorSpec


def weights(folder: Path) -> Iterator[tuple[str, Tensor, bool]]:
    """Every tensor of the model by its name, float32, and whether it was decoded from codes."""
    config = json.loads((folder / "config.json").read_text())
    quantized = config.pop("quantization_config", {})
    written = WrittenTensors(folder, sorted(path.name for path in folder.glob("*.safetensors")))
    for spec in family_of(config).graph(config).tensors:
        coded = f"{_module(spec)}.qweight" in written.placed or f"{spec.name}.absmax" in written.placed
        yield spec.name, _decoded(written, spec, quantized), coded


def model_of(folder: Path, state: dict[str, Tensor]) -> Any:
    """The transformers model of a folder's config with these weights. Raises SystemExit if they are not all of them."""
    config = transformers.AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    missing, unexpected = model.load_state_dict(state, strict=False)
    model.tie_weights()
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if set(missing) - tied or unexpected:
        raise SystemExit(f"{folder}: {missing} {unexpected}")
    return model.eval()


def _module(spec: TensorSpec) -> str:
    return spec.name.removesuffix(".weight")


def _decoded(written: WrittenTensors, spec: TensorSpec, quantized: dict[str, Any]) -> Tensor:
    base = _module(spec)
    if f"{base}.qweight" in written.placed:
        four = [written.read(f"{base}.{part}") for part in ("qweight", "qzeros", "scales", "g_idx")]
        version = 2 if quantized["checkpoint_format"] == "gptq_v2" else 1
        return dequantize(*four, bits=quantized["bits"], version=version)
    if f"{spec.name}.absmax" in written.placed:
        kind = BnbFp4 if quantized["bnb_4bit_quant_type"] == "fp4" else BnbNf4
        layout = kind("f32", double_quant=quantized["bnb_4bit_use_double_quant"])
        return layout.decode(written.read, spec)
    return written.read(spec.name).float()
