"""A checkpoint of Llama 2 7B's shape with seeded random weights, written a few megabytes at a time.

Columns differ in size and a few are outliers, in the weights and through the norms in the activations, as in
trained models.
"""

from __future__ import annotations

import io
import json
import math
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import sentencepiece

from llmpack.progress import Progress

WIDTH, INNER, HEADS, VOCABULARY = 4096, 11008, 32, 32_000
BLOCKS = 32
SHARD_BYTES = 5_000_000_000
CHUNK = 1 << 22
OUTLIERS = 6
TRAINING_CHARACTERS = 6_000_000

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
TOKENIZER_CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "add_bos_token": True,
    "add_eos_token": False,
    "legacy": False,
    "model_max_length": 4096,
}


def shapes(blocks: int) -> dict[str, tuple[int, ...]]:
    """Every tensor, in the order of the files."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    for block in range(blocks):
        prefix = f"model.layers.{block}."
        found |= {f"{prefix}self_attn.{name}_proj.weight": (WIDTH, WIDTH) for name in "qkvo"}
        found |= {f"{prefix}mlp.{name}_proj.weight": (INNER, WIDTH) for name in ("gate", "up")}
        found[f"{prefix}mlp.down_proj.weight"] = (WIDTH, INNER)
        found |= {f"{prefix}{name}_layernorm.weight": (WIDTH,) for name in ("input", "post_attention")}
    return found | {"model.norm.weight": (WIDTH,), "lm_head.weight": (VOCABULARY, WIDTH)}


def parameters(blocks: int) -> int:
    """Numbers in all tensors."""
    return sum(math.prod(shape) for shape in shapes(blocks).values())


def _scales(draw: np.random.Generator, count: int) -> np.ndarray:
    """Sizes of channels: log-normal, a few of them outliers."""
    scales = np.exp(0.3 * draw.standard_normal(count, dtype=np.float32))
    scales[draw.integers(count, size=OUTLIERS)] *= 8
    return scales


def _numbers(index: int, shape: tuple[int, ...], seed: int) -> Iterator[np.ndarray]:
    """The float32 numbers of a tensor, run by run."""
    draw = np.random.Generator(np.random.SFC64([seed, index]))
    scales = _scales(draw, shape[-1])
    if len(shape) == 1:
        yield scales
        return
    rows = max(1, CHUNK // shape[1])
    size = 0.5 / np.float32(shape[1]) ** 0.5
    for start in range(0, shape[0], rows):
        count = min(rows, shape[0] - start)
        yield draw.standard_normal((count, shape[1]), dtype=np.float32) * (scales * size)


def _bf16(values: np.ndarray) -> bytes:
    """Rounded to nearest even."""
    bits = values.view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype("<u2").tobytes()


def _shards(blocks: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes(blocks).items():
        nbytes = 2 * math.prod(shape)
        if filled + nbytes > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += nbytes
    return shards


def make(folder: Path, blocks: int, seed: int, progress: Progress) -> None:
    """Write the checkpoint with its tokenizer."""
    folder.mkdir(parents=True)
    every = shapes(blocks)
    places = {name: index for index, name in enumerate(every)}
    shards, placed = _shards(blocks), {}
    with progress.task("making the checkpoint", parameters(blocks)) as done:
        for number, names in enumerate(shards, 1):
            path = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            header, offset = {}, 0
            for name in names:
                nbytes = 2 * math.prod(every[name])
                span = [offset, offset + nbytes]
                header[name] = {"dtype": "BF16", "shape": list(every[name]), "data_offsets": span}
                offset, placed[name] = offset + nbytes, path.name
            text = json.dumps(header).encode()
            text += b" " * (-len(text) % 8)
            with path.open("wb") as file:
                file.write(len(text).to_bytes(8, "little") + text)
                for name in names:
                    for values in _numbers(places[name], every[name], seed):
                        file.write(_bf16(values))
                        done(values.size)
    index = {"metadata": {"total_size": 2 * parameters(blocks)}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": blocks}, indent=2))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG, indent=2))
    (folder / "tokenizer.model").write_bytes(tokenizer())


def tokenizer() -> bytes:
    """A SentencePiece model of Llama 2's kind and size, learnt in seconds from the sources of Python's library."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_lines(),
        model_writer=model,
        vocab_size=VOCABULARY,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def _lines() -> Iterator[str]:
    taken = 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if {"site-packages", "test"} & set(path.parts):
            continue
        for line in path.read_text(errors="ignore").splitlines():
            if 0 < len(line) < 2000:
                taken += len(line)
                yield line
        if taken > TRAINING_CHARACTERS:
            return
