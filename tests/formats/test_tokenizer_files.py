"""tokenizer.json in parts: the merges are decoded in batches, cut where a cut leaves whole merges."""

from __future__ import annotations

import json
import random
from itertools import chain

import pytest

from llmpack.errors import InputRejected
from llmpack.formats.gguf_special import merge_texts
from llmpack.formats.tokenizer_files import TokenizerFiles

NASTY = ['"', "\\", "],[", '"],["', '\\"],[\\"', "[", "]", ",", '","', "\\\\", "é", "🦙", "a", "\n", '"]', '["']


def read(folder, content, indent=None) -> TokenizerFiles:
    (folder / "tokenizer.json").write_text(json.dumps(content, indent=indent, ensure_ascii=False))
    return TokenizerFiles.read(folder, [folder / "tokenizer.json"])


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("texts", [False, True])
def test_merges_come_whole_in_order_whatever_is_in_them(tmp_path, indent, texts):
    chance = random.Random(0)
    pairs = [["".join(chance.choices(NASTY, k=chance.randint(1, 4))) for _ in range(2)] for _ in range(60_000)]
    merges = [" ".join(pair) for pair in pairs] if texts else pairs
    model = {"type": "BPE", "vocab": {"a": 0}, "merges": merges, "unk_token": None}
    files = read(tmp_path, {"added_tokens": [], "model": model, "decoder": None}, indent)
    batches = list(files.merge_batches())
    assert len(batches) > 3
    assert list(chain.from_iterable(batches)) == merges
    assert merge_texts(files) == [" ".join(pair) for pair in pairs]
    assert files.tokenizer == {
        "added_tokens": [],
        "decoder": None,
        "model": {k: v for k, v in model.items() if k != "merges"},
    }


def test_a_token_that_looks_like_the_end_of_every_merge_costs_no_more_than_the_whole(tmp_path):
    merges = [["a", '"],["' * 200_000], ["b", "c"]]
    files = read(tmp_path, {"model": {"merges": merges}})
    assert list(chain.from_iterable(files.merge_batches())) == merges


@pytest.mark.parametrize("merges", [[], None])
def test_no_merges(tmp_path, merges):
    model = {"vocab": {}} | ({} if merges is None else {"merges": merges})
    assert list(chain.from_iterable(read(tmp_path, {"model": model}).merge_batches())) == []


@pytest.mark.parametrize("merge", [3, None, {"a": 1, "b": 2}, ["a", 3], ["a"], ["a", "b", "c"]])
def test_what_is_no_merge_is_refused(tmp_path, merge):
    with pytest.raises(InputRejected, match="a merge is a pair of texts"):
        merge_texts(read(tmp_path, {"model": {"merges": [["a", "b"], merge]}}))
