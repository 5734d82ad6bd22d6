"""A real GGUF file of some hundred kilobytes, written with the `gguf` package alone: two Llama blocks, byte tokens.

Every fact can be overridden, so that hostile files are the same file with one lie in it.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
WIDTH, HIDDEN, BLOCKS, HEADS, KV_HEADS, CONTEXT = 64, 128, 2, 4, 2, 512


def byte_tokens() -> list[str]:
    """The 256 printable stand-ins of byte-level BPE."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in kept]
    table = {b: chr(b) for b in kept} | {b: chr(256 + i) for i, b in enumerate(others)}
    return [table[b] for b in range(256)]


def tensors(vocabulary: int, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)

    def matrix(rows: int, columns: int, scale: float = 1.0) -> np.ndarray:
        return (random.standard_normal((rows, columns)) * scale / columns**0.5).astype(np.float32)

    found = {"token_embd.weight": matrix(vocabulary, WIDTH, 3.0), "output_norm.weight": np.ones(WIDTH, np.float32)}
    kv = WIDTH // HEADS * KV_HEADS
    for block in range(BLOCKS):
        for name, shape in {
            "attn_q": (WIDTH, WIDTH),
            "attn_k": (kv, WIDTH),
            "attn_v": (kv, WIDTH),
            "attn_output": (WIDTH, WIDTH),
            "ffn_gate": (HIDDEN, WIDTH),
            "ffn_up": (HIDDEN, WIDTH),
            "ffn_down": (WIDTH, HIDDEN),
        }.items():
            found[f"blk.{block}.{name}.weight"] = matrix(*shape)
        for name in ("attn_norm", "ffn_norm"):
            found[f"blk.{block}.{name}.weight"] = np.ones(WIDTH, np.float32)
    return found


def write_tiny_gguf(
    path: Path,
    *,
    blocks: int = BLOCKS,
    epsilon: float = 1e-5,
    tokens: list[str] | None = None,
    chat_template: str | None = CHAT_TEMPLATE,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
) -> Path:
    tokens = tokens or [*SPECIAL, *byte_tokens()]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(blocks)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(epsilon)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(["ÿ ÿ"])  # llama.cpp wants one; it joins nothing that has a token
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    for name, values in tensors(len(tokens)).items():
        if values.ndim == 2 and kind != gguf.GGMLQuantizationType.F32:
            packed = gguf.quants.quantize(values, kind)
            writer.add_tensor(name, packed, raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_empty_gguf(path: Path, config: dict, kind: gguf.GGMLQuantizationType, *, tied: bool, window: int = 0) -> Path:
    """A Llama of any size (a Gemma 2 with a window) with weights all zero: it costs what a real one does."""
    width, hidden, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head = config.get("head_dim", width // config["num_attention_heads"])
    q, kv = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, "gemma2" if window else "llama")
    if window:
        writer.add_sliding_window(window)
        writer.add_key_length(head)
        writer.add_value_length(head)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(width)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([f"tok{n}" for n in range(vocabulary)])
    writer.add_token_types([1] * vocabulary)
    writer.add_token_merges([f"to{n} k{n}" for n in range(vocabulary - 300)])
    shapes = {"token_embd.weight": (vocabulary, width), "output_norm.weight": (width,)}
    if not tied:
        shapes["output.weight"] = (vocabulary, width)
    for block in range(config["num_hidden_layers"]):
        shapes |= {
            f"blk.{block}.{name}.weight": shape
            for name, shape in {
                "attn_norm": (width,), "attn_q": (q, width), "attn_k": (kv, width), "attn_v": (kv, width),
                "attn_output": (width, q), "ffn_norm": (width,), "ffn_gate": (hidden, width),
                "ffn_up": (hidden, width), "ffn_down": (width, hidden),
                **({"post_attention_norm": (width,), "post_ffw_norm": (width,)} if window else {}),
            }.items()
        }  # fmt: skip
    end = 0
    for name, shape in shapes.items():
        stored = kind if len(shape) == 2 else gguf.GGMLQuantizationType.F32
        floats = {gguf.GGMLQuantizationType.F32: np.float32, gguf.GGMLQuantizationType.F16: np.float16}
        size, block_bytes = gguf.GGML_QUANT_SIZES[stored]
        nbytes = int(np.prod(shape)) // size * block_bytes
        if stored not in floats:
            shape = (*shape[:-1], shape[-1] // size * block_bytes)
        writer.add_tensor_info(name, shape, np.dtype(floats.get(stored, np.uint8)), nbytes, raw_dtype=stored)
        end += -(-nbytes // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.fout[0].flush()
    start = -(-writer.fout[0].tell() // 32) * 32
    writer.close()
    with path.open("r+b") as file:
        file.truncate(start + end)
    return path
