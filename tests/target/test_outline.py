"""Outlines: a header says of a model what its graph says, and owns up to what it does not know."""

import gguf
import numpy as np
import pytest
from family_zoo import CONFIGS
from tiny_config import TINY
from tiny_gguf import write_tiny_gguf

from llmpack.checkpoint.gguf_file import GgufFile
from llmpack.errors import InputRejected
from llmpack.models import family_of
from llmpack.runtime.settings import RuntimeSettings
from llmpack.target.cure import cures
from llmpack.target.device import device
from llmpack.target.estimate import estimate, touched_bytes
from llmpack.target.memory_model import MEMORY_ERROR, UNVERIFIED_ERROR, cache_tokens
from llmpack.target.outline import NOT_ESTIMATED, SPEED_NOT_ESTIMATED, Outline
from llmpack.target.transformers_memory import loader_of

PI = device("raspberry-pi-5-8gb")
BLOCK = {"attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64), "ffn_up": (128, 64)}


def config_of(name):
    config = {**TINY, **CONFIGS[name]}
    return {key: value for key, value in config.items() if value is not ...}


def write_file(path, arch, keys, tensors):
    """A GGUF file of any architecture: sizes and zeros."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in keys.items():
        writer.add_array(f"{arch}.{key}", value) if isinstance(value, list) else writer.add_uint32(
            f"{arch}.{key}", value
        )
    for name, shape in tensors.items():
        writer.add_tensor(name, np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufFile.open(path)


def test_what_is_computed_of_transformers():
    config = config_of("llama")
    outline = Outline.of_graph(family_of(config).graph(config))
    told = {"quantization_config": {"quant_method": "awq", "bits": 4}}
    for changes, known in (({}, True), (told, False)):
        inside = outline.in_transformers(loader_of({**config, **changes}, 1 << 20))
        found = estimate(inside, RuntimeSettings(), PI, 64)
        assert (found.memory is not None) is known
        assert found.decode is found.prefill is None
        unknown = {} if known else {"memory": NOT_ESTIMATED}
        speed = dict.fromkeys(("decode", "prefill", "first_token"), SPEED_NOT_ESTIMATED)
        assert found.missing == {**unknown, **speed, "load": "the time to load is not estimated"}
        assert cures(inside, RuntimeSettings(), PI, 64)("disk", 1) == ""
    assert estimate(Outline.of_config(config), RuntimeSettings(), PI, 64).missing["memory"] == NOT_ESTIMATED


def stranger(path, *, arch="gpt9", blocks=2, keys=None, block=None, outside=None):
    sizes = {"block_count": blocks, "embedding_length": 64, "feed_forward_length": 128, "attention.head_count": 4,
             "attention.head_count_kv": 2, "context_length": 1024, **(keys or {})}  # fmt: skip
    tensors = {"token_embd.weight": (300, 64), **(outside or {})}
    for index in range(blocks):
        tensors |= {f"blk.{index}.{stem}.weight": shape for stem, shape in (block or BLOCK).items()}
    return Outline.of_gguf(write_file(path, arch, sizes, tensors))


@pytest.mark.parametrize("name", [name for name in CONFIGS if family_of(config_of(name)).from_gguf])
def test_a_header_says_what_the_graph_says(name, tmp_path):
    config = config_of(name)
    family = family_of(config)
    graph = family.graph(config).with_encodings(lambda spec: "f32")
    prefix = f"{family.gguf_arch}."
    keys = {k.removeprefix(prefix): v for k, v in family.hyperparameters(config).items() if isinstance(v, int)}
    tensors = {spec.gguf_name: spec.shape for spec in graph.tensors}
    read = Outline.of_gguf(write_file(tmp_path / "f.gguf", family.gguf_arch, keys, tensors))
    known = Outline.of_graph(graph)
    assert {(t.name, t.shape, t.nbytes, t.block) for t in read.tensors} == {
        (t.name, t.shape, t.nbytes, t.block) for t in known.tensors
    }
    for field in ("architecture", "verified", "vocab", "hidden", "ffn", "heads", "head_rows", "kept", "context",
                  "tied", "unmodelled"):  # fmt: skip
        assert getattr(read, field) == getattr(known, field), field
    for kv in ("f16", "q8_0"):
        settings = RuntimeSettings(kv=kv, ubatch=16, batch=16)
        assert estimate(read, settings, PI, 64).memory == estimate(known, settings, PI, 64).memory


def test_a_stranger_is_estimated_with_a_wider_margin(tmp_path):
    outline = stranger(tmp_path / "x.gguf")
    found = estimate(outline, RuntimeSettings(), PI, 512)
    assert [kept.numbers for kept in outline.kept] == [64, 64]
    assert outline.context == 1024
    assert found.memory.total.low == pytest.approx(found.memory.total.value * (1 - UNVERIFIED_ERROR))
    assert UNVERIFIED_ERROR > MEMORY_ERROR
    assert "the memory of gpt9 was never compared with llama.cpp" in found.assumptions[0]
    assert {f.limit for f in found.findings()} >= {"memory", "decode"}


def test_fused_projections_are_counted_by_heads(tmp_path):
    fused = {"attn_qkv": (128, 64), "attn_output": (64, 64), "ffn_up": (128, 64)}
    assert [kept.numbers for kept in stranger(tmp_path / "x.gguf", block=fused).kept] == [64, 64]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"block": {**BLOCK, "ssm_in": (64, 64)}}, "keep more than keys and values"),
        ({"block": {"ffn_up": (128, 64)}}, "block 0 of gpt9 has no keys and values of its own"),
        ({"keys": {"attention.sliding_window": 128}}, "which blocks of gpt9 have a sliding window is unknown"),
        ({"keys": {"expert_count": 8, "expert_used_count": 2}}, "scratch memory of experts"),
    ],
)
def test_what_is_not_modelled_is_not_estimated(tmp_path, options, reason):
    found = estimate(stranger(tmp_path / "x.gguf", **options), RuntimeSettings(), PI, 512)
    assert found.memory is None
    assert reason in found.missing["memory"]
    assert "memory" not in {f.limit for f in found.findings()}


def test_a_token_reads_the_experts_that_it_asks(tmp_path):
    experts = {**BLOCK, "ffn_down_exps": (8, 64, 128)}
    outline = stranger(tmp_path / "x.gguf", keys={"expert_count": 8, "expert_used_count": 2}, block=experts)
    dense = stranger(tmp_path / "y.gguf")
    assert touched_bytes(outline) - touched_bytes(dense) == 2 * 8 * 64 * 128 * 4 * 2 / 8


def test_windows_follow_the_pattern_of_the_architecture(tmp_path):
    window = {"attention.sliding_window": 128}
    gemma = stranger(tmp_path / "x.gguf", arch="gemma2", blocks=4, keys=window)
    assert [kept.window for kept in gemma.kept] == [128, None, 128, None]
    assert cache_tokens(gemma, RuntimeSettings(ubatch=64, batch=64), 1024) == (256, 1024, 256, 1024)
    phi = stranger(tmp_path / "y.gguf", arch="phi3", keys=window)
    assert [kept.window for kept in phi.kept] == [None, None]


@pytest.mark.parametrize("key", ["block_count", "embedding_length"])
def test_a_header_without_sizes_is_refused(tmp_path, key):
    sizes = {"block_count": 1, "embedding_length": 64}
    del sizes[key]
    opened = write_file(tmp_path / "x.gguf", "gpt9", sizes, {"token_embd.weight": (300, 64)})
    with pytest.raises(InputRejected, match=f"gpt9.{key} is missing"):
        Outline.of_gguf(opened)


def test_a_file_without_an_embedding_is_no_model(tmp_path):
    opened = write_file(tmp_path / "x.gguf", "gpt9", {"block_count": 1}, {"v.patch_embd.weight": (300, 64)})
    with pytest.raises(InputRejected, match="holds no whole model"):
        Outline.of_gguf(opened)


def test_one_number_for_each_block_is_read(tmp_path):
    heads = {"attention.head_count_kv": [2, 1]}
    fused = {"attn_qkv": (128, 64), "ffn_up": (128, 64)}
    assert [kept.numbers for kept in stranger(tmp_path / "x.gguf", keys=heads, block=fused).kept] == [64, 32]


def test_it_reads_what_the_other_tests_write(tmp_path):
    outline = Outline.of_gguf(GgufFile.open(write_tiny_gguf(tmp_path / "tiny.gguf")))
    assert (outline.blocks, outline.hidden, outline.heads, outline.tied) == (2, 64, 4, True)
