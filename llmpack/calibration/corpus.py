"""Corpus: token sequences of one length, with a digest.

Documents are cut into pieces at line ends, the seed puts the pieces in order (by hash, so that neither the order
of the recipe nor a library's random numbers matter), pieces are tokenized until there are tokens enough, and
the stream is cut into sequences. Where the tokenizer begins a text with a token (BOS), every sequence begins
with it, as every text does when the model is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmpack.calibration.text import read_texts
from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.digest import sha256_bytes
from llmpack.errors import InputRejected, Problem, RecipeError

if TYPE_CHECKING:
    import numpy as np
    import torch
    import transformers
    from torch import Tensor
else:
    from llmpack.lazy import LazyModule

    np = LazyModule("numpy")
    torch = LazyModule("torch")
    transformers = LazyModule("transformers")

PIECE = 32
"""Characters of a piece for each token of a sequence: pieces hold some eight sequences."""
RUN = 32
"""Tokens in a row that count as the same text in `Corpus.overlap`."""


@dataclass(frozen=True, eq=False)
class Corpus:
    """Token sequences.

    tokens  [N, length] int64
    digest  hex sha256 of shape and tokens
    texts   the pieces of text they come from
    """

    tokens: Tensor
    digest: str
    texts: tuple[str, ...]

    @classmethod
    def of(cls, tokens: Tensor, texts: Sequence[str] = ()) -> Corpus:
        """A corpus of tokens [N, length] int64."""
        values = np.ascontiguousarray(tokens.cpu().numpy().astype("<i8"))
        head = "x".join(map(str, values.shape)).encode() + b"\n"
        return cls(tokens, sha256_bytes(head + values.tobytes()), tuple(texts))

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return int(self.tokens.shape[1])

    def overlap(self, other: Corpus) -> float:
        """Share of the other corpus (0 to 1) that this one holds too, in runs of `RUN` tokens."""
        mine = {run.tobytes() for run in _runs(self.tokens, 1)}
        theirs = [run.tobytes() for run in _runs(other.tokens, RUN)]
        return sum(run in mine for run in theirs) / len(theirs) if theirs else 0.0


def _runs(tokens: Tensor, step: int) -> Iterator[np.ndarray]:
    for sequence in tokens.cpu().numpy():
        if len(sequence) >= RUN:
            yield from np.lib.stride_tricks.sliding_window_view(sequence, RUN)[::step]


def load_tokenizer(checkpoint: Checkpoint) -> transformers.PreTrainedTokenizerBase:
    """transformers' tokenizer of a checkpoint; local files only, never code of the repository.

    Raises InputRejected (``tokenizer``) where there is none, or transformers cannot load it.
    """
    where = str(checkpoint.folder)
    names = {path.name for path in checkpoint.tokenizer_files}
    if not names & {"tokenizer.json", "tokenizer.model", "vocab.json"}:
        text = "there is no tokenizer in this folder (tokenizer.json, tokenizer.model or vocab.json)"
        raise InputRejected([Problem(text, where=where, rule="tokenizer")])
    loader = transformers.AutoTokenizer
    try:
        return loader.from_pretrained(where, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the tokenizers library raises plain Exception for every kind of damage
        text = f"transformers cannot load the tokenizer ({type(error).__name__}: {error})"
        raise InputRejected([Problem(text, where=where, rule="tokenizer")]) from error


def pieces_of(texts: Sequence[str], characters: int, seed: int) -> list[str]:
    """All texts in pieces of at most that many characters, cut at line ends, in the seed's order; no piece twice."""
    pieces = dict.fromkeys(piece for text in texts for piece in _cut(text, characters) if piece.strip())
    return sorted(pieces, key=lambda piece: sha256_bytes(f"{seed}\n{piece}".encode()))


def _cut(text: str, characters: int) -> Iterator[str]:
    """Pieces end at the last line end that fits, else at the last space, else anywhere."""
    start = 0
    while start < len(text):
        stop = start + characters
        if stop < len(text):
            end = text.rfind("\n", start, stop)
            end = end if end > start else text.rfind(" ", start, stop)
            stop = end + 1 if end > start else stop
        yield text[start:stop]
        start = stop


def build_corpus(
    sources: Sequence[str],
    tokenizer: Any,
    *,
    tokens: int,
    length: int,
    seed: int = 0,
    base: Path,
    offline: bool = False,
) -> Corpus:
    """Sequences of `length` tokens, `tokens` of them in all (a multiple of `length` from below).

    sources    as in a recipe's ``text`` (see `llmpack.calibration.text`)
    tokenizer  of transformers (`load_tokenizer`)
    base       where relative paths start
    offline    touch no network

    Raises RecipeError for sources without text, or with too little of it.
    """
    count = tokens // length
    if count == 0:
        raise RecipeError([Problem(f"{tokens} tokens do not make one sequence of {length}; raise `tokens`")])
    texts = read_texts(sources, base, offline=offline)
    begin = _beginning(tokenizer)
    width = length - len(begin)
    stream: list[int] = []
    used = []
    for piece in pieces_of(texts, PIECE * length, seed):
        stream += tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        used.append(piece)
        if len(stream) >= count * width:
            break
    else:
        text = f"the text gives {len(stream)} tokens, {count * width} are asked for; name more text or lower `tokens`"
        raise RecipeError([Problem(text)])
    sequences = [begin + stream[i * width : (i + 1) * width] for i in range(count)]
    return Corpus.of(torch.tensor(sequences, dtype=torch.int64), used)


def _beginning(tokenizer: Any) -> list[int]:
    """The token that the tokenizer puts before every text, if there is one."""
    bos = tokenizer.bos_token_id
    ids = tokenizer("", verbose=False)["input_ids"]
    return [bos] if bos is not None and ids[:1] == [bos] else []
