"""The same checkpoint at f16, written by llmpack and by llama.cpp's convert_hf_to_gguf.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf_oracle import convert, differing, keys_of, tensors_of

from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.formats.facts import Facts
from llmpack.formats.gguf import GgufFormat
from llmpack.models import open_model

F16 = GgufFormat("f16")
KINDS = ("smollm", "spm_llama", "spm_mistral", "json_llama", "silent_llama")
BOS_FLAG = "tokenizer.ggml.add_bos_token"


def write(folder: Path, path: Path, **facts) -> Path:
    checkpoint = Checkpoint.open(folder)
    graph = open_model(checkpoint)
    described = Facts.of_folder(folder, folder.name, graph.parameters)
    F16.write(checkpoint, graph, path, described)
    assert path.stat().st_size == F16.nbytes(graph, checkpoint, described)
    return path


@pytest.fixture(scope="session")
def pairs(request, tmp_path_factory):
    """The file of llmpack and the converter's, by kind of checkpoint."""
    folders = {kind: request.getfixturevalue(kind) for kind in KINDS}
    out = tmp_path_factory.mktemp("mine")
    theirs = dict(zip(folders, convert(list(folders.values())), strict=True))
    return {kind: (write(folder, out / f"{kind}.gguf"), theirs[kind]) for kind, folder in folders.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_are_equal_bit_for_bit(pairs, kind):
    mine, theirs = (tensors_of(path) for path in pairs[kind])
    assert mine.keys() == theirs.keys()
    for name, (encoding, shape, data) in mine.items():
        their_encoding, their_shape, their_data = theirs[name]
        assert (encoding, shape) == (their_encoding, their_shape), name
        if name == "rope_freqs.weight":  # torch's float32 power is not rounded correctly on every machine
            np.testing.assert_array_max_ulp(data.view(np.float32), their_data.view(np.float32), 1)
        else:
            assert np.array_equal(data, their_data), name


@pytest.mark.parametrize("kind", ["smollm", "spm_llama", "spm_mistral"])
def test_keys_are_equal_with_their_types(pairs, kind):
    mine, theirs = (keys_of(path) for path in pairs[kind])
    assert differing(mine, theirs) == set()


def test_the_kinds_exercise_what_they_are_meant_to(pairs):
    smollm, spm, mistral = (keys_of(pairs[kind][0]) for kind in KINDS[:3])
    assert smollm["tokenizer.ggml.pre"][1] == "smollm"
    assert smollm[BOS_FLAG][1] is False
    assert len(smollm["tokenizer.ggml.merges"][1]) > 48000
    assert smollm["general.finetune"][1] == "Instruct"
    assert spm["general.license.name"][1] == "tiny-licence"
    assert spm["general.languages"][1] == ["en", "no"]
    assert spm["general.base_model.0.repo_url"][1] == "https://huggingface.co/acme-labs/Grand-7B-Chat-v0.1"
    assert spm["general.sampling.top_k"] == ((5,), 40)
    assert spm["tokenizer.ggml.tokens"][1][600:604] == ["<|user|>", "<|end|>", "[TOOL]", "[PAD603]"]
    assert spm["tokenizer.ggml.token_type"][1][600:604] == [3, 3, 4, 5]
    assert "rope_freqs.weight" in tensors_of(pairs["spm_llama"][0])
    assert "output.weight" in tensors_of(pairs["spm_llama"][0])
    assert "output.weight" not in tensors_of(pairs["smollm"][0])
    assert mistral["general.architecture"][1] == "llama"
    assert mistral["tokenizer.ggml.scores"][1][603] == -10000.0
    assert BOS_FLAG not in mistral


def test_a_sentencepiece_vocabulary_without_its_model_differs_as_documented(pairs):
    mine, theirs = (keys_of(path) for path in pairs["json_llama"])
    vocabulary = {f"tokenizer.ggml.{name}" for name in ("tokens", "scores", "token_type")}
    assert differing(mine, theirs) == vocabulary
    tokens, scores, types = (mine[f"tokenizer.ggml.{n}"][1] for n in ("tokens", "scores", "token_type"))
    known = len(theirs["tokenizer.ggml.tokens"][1])
    # the converter's vocabulary is shorter than the embedding; llama.cpp does not load its file
    assert (known, len(tokens)) == (603, 608)
    assert tokens[:known] == theirs["tokenizer.ggml.tokens"][1]
    assert types[known:] == [5] * 5
    assert set(theirs["tokenizer.ggml.scores"][1]) == {-1000.0}
    # what SentencePiece itself says about the same pieces: another scale, the same order
    original = keys_of(pairs["spm_mistral"][0])["tokenizer.ggml.scores"][1]
    merged = [i for i in range(600) if types[i] == 1 and len(tokens[i]) > 1]
    assert sorted(merged, key=lambda i: -scores[i]) == sorted(merged, key=lambda i: -original[i])


def test_bos_flag_is_written_where_a_tokenizer_json_says_nothing(pairs):
    mine, theirs = (keys_of(path) for path in pairs["silent_llama"])
    assert differing(mine, theirs) == {BOS_FLAG}
    assert mine[BOS_FLAG] == ((7,), False)


def test_nothing_heavy_is_imported_to_know_the_size(smollm):
    program = f"""
import sys
from pathlib import Path
from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.formats.facts import Facts
from llmpack.formats.gguf import GgufFormat
from llmpack.models import open_model
checkpoint = Checkpoint.open(Path({str(smollm)!r}))
graph = open_model(checkpoint)
GgufFormat("f16").nbytes(graph, checkpoint, Facts.of_folder(checkpoint.folder, "x", graph.parameters))
print([name for name in ("torch", "transformers", "sentencepiece", "gguf") if name in sys.modules])
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def named_as_on_the_hub(folder: Path, target: Path) -> Path:
    """The same checkpoint with shards that begin with "model", the only ones that the converter looks at."""
    target.mkdir()
    for path in folder.iterdir():
        name = f"model-{path.name}" if path.suffix == ".safetensors" else path.name
        (target / name).hardlink_to(path)
    index = target / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = {name: f"model-{shard}" for name, shard in content["weight_map"].items()}
    index.unlink()
    index.write_text(json.dumps(content))
    return target


@pytest.mark.slow
def test_the_demo_model_is_written_as_the_converter_writes_it(demo_checkpoint, tmp_path):
    folder = named_as_on_the_hub(demo_checkpoint, tmp_path / "demo-checkpoint")
    mine = write(folder, tmp_path / "mine.gguf")
    (theirs,) = convert([folder])
    assert differing(keys_of(mine), keys_of(theirs)) == set()
    ours, others = tensors_of(mine), tensors_of(theirs)
    assert ours.keys() == others.keys()
    assert all(ours[name][:2] == others[name][:2] and np.array_equal(ours[name][2], others[name][2]) for name in ours)
