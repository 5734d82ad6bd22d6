"""A model file of any shape whose weights are all zero: it costs memory and time as a real one does.

No kernel looks at what a weight is, so a blank model of the right shape tells what a processor can do, without a
download and without training. Nearly nothing is written: the weights are a hole in the file. (Subnormal numbers are
the exception: a model whose logits of attention differ by more than 87 makes them, and is slower than its shape.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

ALIGNMENT = 32


@dataclass(frozen=True)
class Shape:
    """The sizes of a blank Llama with a head tied to its embedding."""

    hidden: int
    ffn: int
    blocks: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Names in GGUF and shapes, [rows, columns] for matrices."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        block: dict[str, tuple[int, ...]] = {
            "attn_norm": (self.hidden,),
            "attn_q": (q, self.hidden),
            "attn_k": (kv, self.hidden),
            "attn_v": (kv, self.hidden),
            "attn_output": (self.hidden, q),
            "ffn_norm": (self.hidden,),
            "ffn_gate": (self.ffn, self.hidden),
            "ffn_up": (self.ffn, self.hidden),
            "ffn_down": (self.hidden, self.ffn),
        }
        outside: dict[str, tuple[int, ...]] = {
            "token_embd.weight": (self.vocab, self.hidden),
            "output_norm.weight": (self.hidden,),
        }
        return outside | {
            f"blk.{index}.{name}.weight": shape for index in range(self.blocks) for name, shape in block.items()
        }


def write_blank_model(path: Path, shape: Shape, encoding: str) -> Path:
    """Write the file: every matrix in `encoding`, vectors in f32.

    The rows of every matrix must be whole blocks of the encoding; ValueError otherwise.
    """
    kind = gguf.GGMLQuantizationType[encoding.upper()]
    writer = gguf.GGUFWriter(path, "llama")
    _write_keys(writer, shape)
    end = 0
    for name, sizes in shape.tensors().items():
        stored = kind if len(sizes) > 1 else gguf.GGMLQuantizationType.F32
        nbytes = _bytes(sizes, stored)
        dtype, laid = _layout(sizes, stored)
        writer.add_tensor_info(name, laid, dtype, nbytes, raw_dtype=stored)
        end += -(-nbytes // ALIGNMENT) * ALIGNMENT
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    writer.fout[0].flush()
    start = -(-writer.fout[0].tell() // ALIGNMENT) * ALIGNMENT
    writer.close()
    with path.open("r+b") as file:
        file.truncate(start + end)
    return path


def _write_keys(writer: gguf.GGUFWriter, shape: Shape) -> None:
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.blocks)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocab)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([f"t{n}" for n in range(shape.vocab)])
    writer.add_token_types([1] * shape.vocab)
    writer.add_token_merges([f"t {n}" for n in range(shape.vocab)])


def _bytes(sizes: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> int:
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    if sizes[-1] % block:
        raise ValueError(f"rows of {sizes[-1]} are not a multiple of the {block} numbers in a block of {kind.name}")
    return math.prod(sizes) // int(block) * int(block_bytes)


def _layout(sizes: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> tuple[np.dtype, tuple[int, ...]]:
    """How the writer wants a tensor described: floats by shape, blocks by the bytes of a row."""
    floats = {gguf.GGMLQuantizationType.F32: np.float32, gguf.GGMLQuantizationType.F16: np.float16}
    if kind in floats:
        return np.dtype(floats[kind]), sizes
    return np.dtype(np.uint8), (*sizes[:-1], _bytes(sizes[-1:], kind))
