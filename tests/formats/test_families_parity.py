"""Every family through the whole road: transformers' checkpoint, our GGUF file, llama.cpp's logits.

The checkpoints are random and small (see tests/family_zoo.py). Real tokenizers are SmolLM2's own (byte-level BPE, from
the demo model); in the place of others stand, because no package at hand carries them:

    mistral, phi3    SentencePiece trained on Python's help texts, with Phi-3's end of text among the added tokens
    gemma2, gemma3   the same, without the space before a text, as Gemma has it
    qwen2            the same: transformers splits any byte-level vocabulary of a Qwen2 in Qwen2's way, and SmolLM2's
                     numbers for the converter's check text are then in no table
    qwen3, olmo2, smollm3, granite   SmolLM2's
"""

from __future__ import annotations

import functools
import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from damage import (
    Patched,
    exchanged,
    filled,
    halves_exchanged,
    interleaved,
    number,
    rows,
    shifted,
)
from family_files import F16, LENGTH, LIMIT, SETTINGS, error_of, reference, tokens_of, write
from family_zoo import CONFIGS
from filelock import FileLock
from gguf_oracle import convert, differing, keys_of, tensors_of

from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.checkpoint.gguf_file import GgufFile
from llmpack.errors import InputRejected
from llmpack.formats.facts import Facts
from llmpack.formats.readback import read_back
from llmpack.models import family_of, open_model
from llmpack.models.from_gguf import import_gguf

pytestmark = pytest.mark.skipif(find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")

ROPED = ("attn_q.weight", "attn_k.weight")
QK_NORMS = ("attn_q_norm.weight", "attn_k_norm.weight")


@pytest.fixture(scope="session")
def folders(make_family, shared_tmp):
    """The checkpoints, made once for all workers of a run."""
    root = shared_tmp / "families"
    with FileLock(f"{root}.lock"):
        if not root.is_dir():
            for name in CONFIGS:
                made = make_family(name)
                shutil.copytree(made, root / name / made.name)
    return {name: next(path for path in (root / name).iterdir() if path.is_dir()) for name in CONFIGS}


@pytest.fixture(scope="session")
def converted(folders, shared_tmp):
    """The converter's files, made once for all workers of a run."""
    done = shared_tmp / "families.converted"
    with FileLock(f"{done}.lock"):
        if not done.exists():
            convert(list(folders.values()))
            done.touch()
    return {name: Path(f"{folder}.gguf") for name, folder in folders.items()}


@pytest.fixture(scope="session")
def written(folders, tmp_path_factory):
    """Our file of a family."""
    out = tmp_path_factory.mktemp("families")
    return functools.cache(lambda name: write(folders[name], out / f"{name}.gguf"))


@pytest.fixture(scope="session")
def references(folders):
    """Logits by family and length, computed once."""
    found: dict[tuple[str, int], np.ndarray] = {}

    def get(name: str, length: int = LENGTH) -> np.ndarray:
        if (name, length) not in found:
            found[name, length] = reference(folders[name], tokens_of(length))
        return found[name, length]

    return get


# --- what the converter writes


@pytest.mark.parametrize("name", CONFIGS)
def test_the_file_is_the_converters(written, converted, name):
    mine, theirs = tensors_of(written(name)), tensors_of(converted[name])
    assert mine.keys() == theirs.keys()
    for tensor, (encoding, shape, data) in mine.items():
        assert (encoding, shape) == theirs[tensor][:2], tensor
        assert np.array_equal(data, theirs[tensor][2]), tensor
    assert differing(keys_of(written(name)), keys_of(converted[name])) == set()


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "gemma2", "gemma3", "phi3"])
def test_token_ids_are_the_checkpoints(written, folders, name):
    checkpoint = Checkpoint.open(folders[name])
    graph = open_model(checkpoint)
    facts = Facts.of_folder(folders[name], folders[name].name, graph.parameters)
    assert read_back(written(name), checkpoint, graph, F16, facts, SETTINGS).tensors == len(tensors_of(written(name)))


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ("mistral", "phi3-long")])
def test_a_file_comes_back_as_the_checkpoint(make_family, tmp_path, name):
    folder = make_family(name, tokenizer="phi" if name == "phi3" else "spm")
    source = Checkpoint.open(folder)
    back = import_gguf(GgufFile.open(write(folder, tmp_path / "model.gguf")), tmp_path / "back")
    assert back.tensors.keys() == source.tensors.keys()
    for tensor in source.tensors:
        # halves of float16, and norms that had one added and taken away
        torch.testing.assert_close(back.read(tensor).float(), source.read(tensor).float(), rtol=1e-3, atol=1e-6)
    assert family_of(back.config).block_kinds(back.config) == family_of(source.config).block_kinds(source.config)


def test_norms_of_a_gemma_in_float16_are_added_to_in_float32(make_family, tmp_path):
    source = Checkpoint.open(make_family("gemma2", torch_dtype="float16"))
    data = tensors_of(write(source.folder, tmp_path / "model.gguf"))["blk.1.post_ffw_norm.weight"][2]
    norm = source.read("model.layers.1.post_feedforward_layernorm.weight")
    assert np.array_equal(data.view(np.float32), norm.float().numpy() + np.float32(1))
    assert not np.array_equal(data.view(np.float32), (norm + 1).float().numpy())


@pytest.mark.parametrize(("name", "prefix"), [("gemma3", ((7,), False)), ("phi3", None)])
def test_a_sentencepiece_vocabulary_is_found_in_tokenizer_json(make_family, runtime, tmp_path, name, prefix):
    folder = make_family(name)
    (folder / "tokenizer.model").unlink()
    keys = keys_of(write(folder, tmp_path / "model.gguf"))
    assert keys["tokenizer.ggml.model"] == ((8,), "llama")
    assert keys.get("tokenizer.ggml.add_space_prefix") == prefix
    opened = runtime.open(tmp_path / "model.gguf", SETTINGS, None)
    assert opened.vocabulary == 608


# --- what llama.cpp computes

RUNS = [(name, LENGTH, 256) for name in CONFIGS] + [("phi3-long", 300, 512)]


@pytest.mark.parametrize(("name", "length", "context"), RUNS)
def test_logits_are_transformers(written, references, runtime, name, length, context):
    expected = references(name, length)
    assert expected.std() > 1  # not flat
    assert error_of(runtime, written(name), expected, context) < LIMIT


# --- that the comparison would notice

QKV = ("attn_q.bias", "attn_k.bias", "attn_v.bias")
ROPED_BIASES = ("attn_q.bias", "attn_k.bias")


def order_of_rotary(numbers: np.ndarray) -> np.ndarray:
    """Halves of heads interleaved in q and k, in rows of 4 heads of q, 2 of k, 2 of v."""
    roped = numbers[:96].reshape(-1, 2, 8).swapaxes(1, 2).reshape(-1)
    return np.concatenate([roped, numbers[96:]])


def order_of_qkv(numbers: np.ndarray) -> np.ndarray:
    """k before q, in rows of 4 heads of q, 2 of k, 2 of v."""
    q, k, v = np.split(numbers, [64, 96])
    return np.concatenate([k, q, v])


WRONG = {
    "llama": {
        "rotary rows as in the checkpoint": interleaved(ROPED, 16, back=True),
        "rotary base": number("rope.freq_base", 1e6),
        "epsilon": number("attention.layer_norm_rms_epsilon", 0.1),
    },
    "mistral": {
        "rotary rows as in the checkpoint": interleaved(ROPED, 32, back=True),
        "rows interleaved over two heads": interleaved(ROPED, 64),
        "gate and up exchanged": exchanged("ffn_gate.weight", "ffn_up.weight"),
    },
    "qwen2": {
        "rotary rows interleaved": interleaved(ROPED, 16),
        "biases dropped": filled(QKV, 0),
        "bias of v dropped": filled(("attn_v.bias",), 0),
        "biases interleaved": interleaved(ROPED_BIASES, 16),
        "rotary base": number("rope.freq_base", 1e4),
    },
    "qwen3": {
        "rotary rows interleaved": interleaved(ROPED, 32),
        "norms of q and k dropped": filled(QK_NORMS, 1),
        "norm of k dropped": filled(("attn_k_norm.weight",), 1),
        "norms of q and k exchanged": exchanged(*QK_NORMS),
    },
    "gemma2": {
        "rotary rows interleaved": interleaved(ROPED, 32),
        "cap of scores": number("attn_logit_softcapping", 50.0),
        "cap of logits": number("final_logit_softcapping", 30.0),
        "window twice as long": number("attention.sliding_window", 32),
        "window one token short": number("attention.sliding_window", 15),
        "norms without their one": shifted(-1.0),
        "norms before and after exchanged": exchanged("attn_norm.weight", "post_attention_norm.weight"),
    },
    "gemma3": {
        "norms of q and k dropped": filled(QK_NORMS, 1),
        "window twice as long": number("attention.sliding_window", 32),
        "window one token short": number("attention.sliding_window", 15),
        "no window": number("attention.sliding_window", 0),
        "rotary base of windows": number("rope.freq_base_swa", 1e6),
        "rotary base": number("rope.freq_base", 1e4),
        "scaling of positions": number("rope.scaling.factor", 1.0),
        "norms without their one": shifted(-1.0),
    },
    "phi3": {
        "rotary rows interleaved": rows("attn_qkv.weight", order_of_rotary),
        "k before q": rows("attn_qkv.weight", order_of_qkv),
        "up before gate": rows("ffn_up.weight", halves_exchanged),
        "rotary base": number("rope.freq_base", 1e6),
    },
    "phi3-long": {
        "divisors for long contexts": number("rope.scaling.original_context_length", 128),
        "length of rotated vectors": number("rope.scaling.attn_factor", 1.0),
        "k before q": rows("attn_qkv.weight", order_of_qkv),
    },
    "olmo2": {
        "rotary rows interleaved": interleaved(ROPED, 16),
        "norms of q and k dropped": filled(QK_NORMS, 1),
        "norms after exchanged": exchanged("post_attention_norm.weight", "post_ffw_norm.weight"),
    },
    "smollm3": {
        "rotary rows as in the checkpoint": interleaved(ROPED, 16, back=True),
        "rotary base": number("rope.freq_base", 1e4),
    },
    "granite": {
        "no multiplier of embeddings": number("embedding_scale", 1.0),
        "no multiplier of scores": number("attention.scale", 0.25),
        "no multiplier of what blocks add": number("residual_scale", 1.0),
        "no divisor of logits": number("logit_scale", 1.0),
        "biases dropped": filled((*QKV, "attn_output.bias", "ffn_down.bias"), 0),
        "biases of q and k not interleaved": interleaved(ROPED_BIASES, 16, back=True),
    },
}


@pytest.mark.parametrize(("name", "what"), [(name, what) for name in WRONG for what in WRONG[name]])
def test_what_would_be_wrong_is_seen(written, references, runtime, tmp_path, name, what):
    patched = Patched(written(name), tmp_path / "wrong.gguf")
    WRONG[name][what](patched)
    patched.raw.flush()
    error = error_of(runtime, patched.path, references(name))
    assert error > 2 * LIMIT


# --- what llama.cpp has built in, and what it lacks

BUILT_IN = {
    "smollm3: every block rotated": ("smollm3", {"no_rope_layers": [1] * 5}, "no_rope_layers"),
    "gemma2: another scale of scores": ("gemma2", {"query_pre_attn_scalar": 16}, "query_pre_attn_scalar"),
    "gemma2: another rotary base": ("gemma2", {"rope_theta": 1e6}, "rope_theta"),
    "gemma2: windows nowhere": ("gemma2", {"layer_types": ["full_attention"] * 4}, "layer_types"),
    "gemma3: another period": ("gemma3", {"sliding_window_pattern": 3}, "layer_types"),
}


@pytest.mark.parametrize("which", BUILT_IN)
def test_what_a_file_cannot_say_is_refused_and_would_be_wrong(folders, written, runtime, tmp_path, which):
    name, change, key = BUILT_IN[which]
    other = tmp_path / "other"
    shutil.copytree(folders[name], other)
    config = json.loads((other / "config.json").read_text()) | change
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputRejected, match=key) as caught:
        open_model(Checkpoint.open(other))
    assert {problem.rule for problem in caught.value.problems} == {"unsupported-config"}
    assert error_of(runtime, written(name), reference(other, tokens_of(LENGTH))) > 2 * LIMIT


WINDOWS = {
    "mistral": {"sliding_window": 32},
    "qwen2": {"use_sliding_window": True},
    "phi3": {"sliding_window": 32},
    "smollm3": {"use_sliding_window": True, "sliding_window": 32, "layer_types": ["sliding_attention"] * 5},
}


@pytest.mark.parametrize("name", WINDOWS)
def test_windows_that_llama_cpp_lacks_are_told_and_right_up_to_their_length(make_family, runtime, tmp_path, name):
    folder = make_family(name, **WINDOWS[name])
    config = Checkpoint.open(folder).config
    (note,) = family_of(config).notes(config)
    assert "last 32 tokens" in note
    path = write(folder, tmp_path / "window.gguf")
    assert error_of(runtime, path, reference(folder, tokens_of(32))) < LIMIT
    assert error_of(runtime, path, reference(folder, tokens_of(LENGTH))) > 2 * LIMIT


def test_a_gemma_3_without_windows_has_none_in_llama_cpp_either(make_family, runtime, tmp_path):
    folder = make_family("gemma3", layer_types=["full_attention"] * 7)
    path = write(folder, tmp_path / "full.gguf")
    assert "gemma3.attention.sliding_window" not in keys_of(path)
    assert error_of(runtime, path, reference(folder, tokens_of(LENGTH))) < LIMIT


def test_longrope_goes_by_the_context_that_llama_cpp_is_opened_with(folders, written, references, runtime):
    config = Checkpoint.open(folders["phi3-long"]).config
    assert "at most 256" in family_of(config).notes(config)[-1]
    assert error_of(runtime, written("phi3-long"), references("phi3-long"), context=512) > 2 * LIMIT
