"""The vocabulary in which a family's page is written: rows, sizes, settings."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One line of a family's table.

    name       of the tensor, below the block's path for the rows of a block
    part       the word recipes use (see `TensorSpec.part`)
    shape      names of sizes (see `Sizes`), one per axis
    gguf       name in a GGUF file, below ``blk.N.`` for the rows of a block; None where GGUF has none
    inputs     name of the input it reads, for a linear map
    row_order  name of the permutation of rows between checkpoint and GGUF
    when       the flag of the config without which the tensor does not exist
    """

    name: str
    part: str
    shape: tuple[str, ...]
    gguf: str | None
    inputs: str | None = None
    row_order: str | None = None
    when: str | None = None


@dataclass(frozen=True)
class Sizes:
    """The numbers of a config that shapes follow from."""

    vocab: int
    hidden: int
    ffn: int
    blocks: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def q_rows(self) -> int:
        """Rows of the query projection."""
        return self.heads * self.head_dim

    @property
    def kv_rows(self) -> int:
        """Rows of the key and of the value projection."""
        return self.kv_heads * self.head_dim

    @property
    def qkv_rows(self) -> int:
        """Rows of the three projections in one matrix: q, then k, then v."""
        return self.q_rows + 2 * self.kv_rows

    @property
    def gate_up_rows(self) -> int:
        """Rows of gate and up in one matrix, gate first."""
        return 2 * self.ffn


@dataclass(frozen=True)
class Setting:
    """A number of the config that a GGUF file states as it is.

    gguf    its key below the architecture's name
    config  its key in config.json
    kind    int for GGUF's UINT32, float for FLOAT32
    null    what the file states where the config says null; None for nothing
    """

    gguf: str
    config: str
    kind: type[int] | type[float] = float
    null: int | None = None


@dataclass(frozen=True)
class TokenizerRules:
    """What llama.cpp's converter does with the tokenizer files of one family and not with those of another.

    space_prefix     whether SentencePiece puts a space before a text: "configured" as tokenizer_config.json says,
                     "never", or "unsaid", which leaves it to llama.cpp's default
    added_as_stated  beside a SentencePiece model, added tokens are also those of tokenizer.json, and control tokens
                     where the files say so; else those of tokenizer_config.json, and whatever looks like ``<|this|>``
    """

    space_prefix: str = "configured"
    added_as_stated: bool = False


LIMITS = {
    "vocab_size": 1 << 22,
    "hidden_size": 131_072,
    "intermediate_size": 1 << 20,
    "num_hidden_layers": 1024,
    "num_attention_heads": 1024,
    "num_key_value_heads": 1024,
    "head_dim": 1024,
    "max_position_embeddings": 1 << 26,
}
"""Sizes that a config must give (or its family default), each from 1 to a bound that no real model exceeds."""
