"""Rules C1 to C4 and C6: what a stranger's config.json may say."""

import json

import pytest
from checkpoint_files import CONFIG, is_refused, rules, write_folder
from hypothesis import given, settings
from hypothesis import strategies as st

from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.checkpoint.config_intake import read_config
from llmpack.errors import InputRejected


def refused(path):
    with pytest.raises(InputRejected) as refusal:
        read_config(path)
    return refusal


RAW = {
    "not JSON": b"{",
    "a list": b"[]",
    "a number": b"3",
    "empty": b"",
    "bad UTF-8": b'{"a": "\xff"}',
    "over 1 MiB": json.dumps({"a": "x" * (1 << 20)}).encode(),
    "nested 65 deep": b'{"a":' + b"[" * 64 + b"]" * 64 + b"}",
    "nested 100000 deep": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "duplicate keys": b'{"hidden_size": 8, "hidden_size": 16}',
    "duplicate keys, nested": b'{"rope_scaling": {"a": 1, "a": 2}}',
    "half a surrogate pair": b'{"a": "\\udc00"}',
    "integer of 5000 digits": b'{"a": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("case", RAW)
def test_what_is_no_plain_table_is_refused(tmp_path, case):
    path = tmp_path / "config.json"
    path.write_bytes(RAW[case])
    assert rules(refused(path)) == {"config-json"}


ADDED = {
    "auto_map": ({"auto_map": {"AutoModel": "modeling_x.XModel"}}, "remote-code"),
    "auto_map in a part": ({"text_config": {"auto_map": {"AutoModel": "m.X"}}}, "remote-code"),
    "trust_remote_code": ({"trust_remote_code": True}, "remote-code"),
    "attention kernel of the hub": ({"_attn_implementation": "evil/kernel"}, "config-hub-ref"),
    "attention kernel by a plain name": ({"attn_implementation": "flash_attention_2"}, "config-hub-ref"),
    "internal attention kernel": ({"_attn_implementation_internal": "evil/kernel"}, "config-hub-ref"),
    "experts kernel": ({"_experts_implementation": "evil/kernel"}, "config-hub-ref"),
    "attention kernel in a part": ({"text_config": {"_attn_implementation": "evil/kernel"}}, "config-hub-ref"),
    "cache of the hub": ({"cache_implementation": "evil/cache"}, "config-hub-ref"),
    "table of caches": ({"cache_implementation": {"a": "b"}}, "config-hub-ref"),
    "table of kernels": ({"_attn_implementation": {"text": "evil/kernel"}}, "config-hub-ref"),
    "commit hash": ({"_commit_hash": "0" * 40}, "config-hub-ref"),
    "repository as a value": ({"draft_model": "evil/model"}, "config-hub-ref"),
    "repository in a list": ({"adapters": [{"from": "evil/model@main"}]}, "config-hub-ref"),
    "no layers": ({"num_hidden_layers": 0}, "config-range"),
    "layers -1": ({"num_hidden_layers": -1}, "config-range"),
    "layers 100000": ({"num_hidden_layers": 100_000}, "config-range"),
    "layers true": ({"num_hidden_layers": True}, "config-range"),
    "layers 2.0": ({"num_hidden_layers": 2.0}, "config-range"),
    "layers as text": ({"num_hidden_layers": "2"}, "config-range"),
    "no heads": ({"num_attention_heads": 0}, "config-range"),
    "heads 1025": ({"num_attention_heads": 1025}, "config-range"),
    "hidden too large": ({"hidden_size": 131_080}, "config-range"),
    "vocabulary too large": ({"vocab_size": 4_194_305}, "config-range"),
    "a list of layers with a bad one": ({"num_key_value_heads": [1, 0]}, "config-range"),
    "hidden not divided by heads": ({"hidden_size": 9}, "config-range"),
    "heads not divided by kv heads": ({"num_attention_heads": 4, "num_key_value_heads": 3}, "config-range"),
    "epsilon NaN": ({"rms_norm_eps": float("nan")}, "config-range"),
    "epsilon 0": ({"rms_norm_eps": 0}, "config-range"),
    "epsilon infinite": ({"rms_norm_eps": float("inf")}, "config-range"),
    "theta NaN": ({"rope_theta": float("nan")}, "config-range"),
    "theta negative": ({"rope_theta": -1.0}, "config-range"),
    "theta in rope_parameters": ({"rope_parameters": {"rope_theta": 0.0}}, "config-range"),
    "scaling factor NaN": ({"rope_scaling": {"factor": float("nan")}}, "config-range"),
    "NaN anywhere": ({"odd": [float("nan")]}, "config-range"),
}


@pytest.mark.parametrize("case", ADDED)
def test_hostile_values_are_refused(tmp_path, case):
    added, rule = ADDED[case]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG | added))
    refusal = refused(path)
    assert rule in rules(refusal)
    assert all(problem.where == str(path) for problem in refusal.value.problems)


def test_all_problems_come_at_once_with_their_keys(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps(CONFIG | {"num_hidden_layers": 0, "rms_norm_eps": -1, "text_config": {"auto_map": {"a": "b"}}})
    )
    refusal = refused(path)
    assert [p.path for p in refusal.value.problems] == ["num_hidden_layers", "rms_norm_eps", "text_config.auto_map"]


def test_what_ordinary_configs_say_is_let_through_and_loaders_are_not_steered(tmp_path):
    path = tmp_path / "config.json"
    ordinary = CONFIG | {
        "_name_or_path": "meta-llama/Llama-3.2-1B",
        "_attn_implementation_autoset": True,
        "cache_implementation": "hybrid",
        "head_dim": 5,
        "hidden_size": 9,
        "num_key_value_heads": None,
        "rope_scaling": None,
        "time_step_limit": [0.0, float("inf")],
        "text_config": {"_name_or_path": "org/other", "_commit_hash": None},
    }
    path.write_text(json.dumps(ordinary))
    config = read_config(path)
    assert config["text_config"] == {}
    dropped = {"_name_or_path", "_attn_implementation_autoset", "cache_implementation"}
    assert config.keys() == ordinary.keys() - dropped


@pytest.mark.parametrize("method", ["gptq", "bitsandbytes", "zzz"])
def test_quantized_weights_are_refused_at_opening(tmp_path, method):
    folder = write_folder(tmp_path / "m", CONFIG | {"quantization_config": {"quant_method": method}})
    with pytest.raises(InputRejected, match=method) as refusal:
        Checkpoint.open(folder)
    assert rules(refusal) == {"already-quantized"}


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
keys = st.sampled_from([*CONFIG, "text_config", "rope_scaling", "factor", "auto_map", "head_dim"]) | st.text(max_size=6)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(keys, values, max_size=6) | values)
def test_any_json_gives_a_config_or_a_refusal(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "any-config.json"
    path.write_text(json.dumps(value))
    assert is_refused(read_config, path) or isinstance(read_config(path), dict)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_give_a_config_or_a_refusal(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any-config.json"
    path.write_bytes(data)
    assert is_refused(read_config, path) or isinstance(read_config(path), dict)
