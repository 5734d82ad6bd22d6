"""Every family against transformers: names, shapes, inputs, patterns, and one block at a time against the whole."""

from __future__ import annotations

import json

import pytest
import torch
from family_zoo import CONFIGS
from tiny_config import TINY

from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.errors import InputRejected
from llmpack.models import FAMILIES, family_of, open_model
from llmpack.models.forward import Forward, final_hidden, skeleton

LENGTH = 40
"""Tokens of a sequence: more than the windows in the zoo."""


def config_of(name, **changes):
    settings = {**TINY, **CONFIGS[name], **changes}
    return json.loads(json.dumps({key: value for key, value in settings.items() if value is not ...}))


def whole_model(folder):
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model, loading = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.fixture
def tokens():
    return torch.randint(3, 512, (3, LENGTH), generator=torch.Generator().manual_seed(1))


def test_every_family_is_in_the_zoo():
    assert {family_of(config_of(name)).name for name in CONFIGS} == set(FAMILIES)


@pytest.mark.parametrize("name", CONFIGS)
def test_names_and_shapes_are_those_of_the_skeleton(name):
    config = config_of(name)
    family, module = family_of(config), skeleton(config)
    module.tie_weights()
    theirs = {path: tuple(parameter.shape) for path, parameter in module.named_parameters()}
    assert {family.module_name(t.name): t.shape for t in family.graph(config).tensors} == theirs


@pytest.mark.parametrize("name", CONFIGS)
def test_matrices_of_a_group_read_one_input_and_no_other(name, checkpoint_factory, tokens):
    checkpoint = Checkpoint.open(checkpoint_factory(tokenizer=None, **CONFIGS[name]))
    graph = open_model(checkpoint)
    forward = Forward(checkpoint, graph)
    block, seen = forward.load_block(1), {}
    linears = {path for path, module in block.module.named_modules() if isinstance(module, torch.nn.Linear)}
    for path in linears:
        note = lambda _, given, path=path: seen.__setitem__(path, given[0].data_ptr())  # noqa: E731
        block.module.get_submodule(path).register_forward_pre_hook(note)
    forward.run(block, forward.embed(tokens))
    groups = graph.input_groups(1)
    paths = {
        key: [forward.module_path(spec).removesuffix(".weight") for spec in group] for key, group in groups.items()
    }
    assert {path for group in paths.values() for path in group} == linears
    assert list(groups) == ["attention.in", "attention.out", "ffn.in", "ffn.out"]
    for group in paths.values():
        assert len({seen[path] for path in group}) == 1


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_the_whole_model(name, checkpoint_factory, tokens):
    folder = checkpoint_factory(tokenizer=None, **CONFIGS[name])
    checkpoint = Checkpoint.open(folder)
    graph = open_model(checkpoint)
    with torch.no_grad():
        theirs = whole_model(folder)(tokens).logits
    forward = Forward(checkpoint, graph)
    torch.testing.assert_close(forward.logits(final_hidden(checkpoint, graph, tokens)), theirs, rtol=0, atol=1e-4)
    hidden = forward.embed(tokens[:1])
    for index in range(graph.block_count):
        hidden = forward.run(forward.load_block(index), hidden)
    torch.testing.assert_close(forward.logits(forward.finish(hidden)), theirs[:1], rtol=0, atol=1e-4)


def test_a_padding_token_without_a_row_is_no_obstacle(checkpoint_factory):
    checkpoint = Checkpoint.open(checkpoint_factory(tokenizer=None, pad_token_id=500))
    forward = Forward(checkpoint, open_model(checkpoint))
    assert forward.embed(torch.zeros((1, 4), dtype=torch.int64)).shape == (1, 4, 64)


# --- published configs

PUBLISHED = {
    "Qwen2.5-0.5B": ("qwen2", (896, 4864, 24, 14, 2, 151936), 494_032_768, {"tie_word_embeddings": True}),
    "Qwen3-0.6B": (
        "qwen3",
        (1024, 3072, 28, 16, 8, 151936),
        596_049_920,
        {"tie_word_embeddings": True, "head_dim": 128},
    ),
    "gemma-2-2b": ("gemma2", (2304, 9216, 26, 8, 4, 256000), 2_614_341_888, {"cache_implementation": "hybrid"}),
    "gemma-2-27b": (
        "gemma2",
        (4608, 36864, 46, 32, 16, 256000),
        27_227_128_320,
        {"head_dim": 128, "query_pre_attn_scalar": 144},
    ),
    "gemma-3-1b": (
        "gemma3_text",
        (1152, 6912, 26, 4, 1, 262144),
        999_885_952,
        {"sliding_window": 512, "sliding_window_pattern": 6, "rope_local_base_freq": 10000, "rope_theta": 1000000},
    ),
    "Phi-3-mini-4k": ("phi3", (3072, 8192, 32, 32, 32, 32064), 3_821_079_552, {"sliding_window": 2047}),
    "Phi-4-mini": (
        "phi3",
        (3072, 8192, 32, 24, 8, 200064),
        3_836_021_760,
        {
            "tie_word_embeddings": True,
            "partial_rotary_factor": 0.75,
            "max_position_embeddings": 131072,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.1] * 48},
        },
    ),
    "OLMo-2-1B": ("olmo2", (2048, 8192, 16, 16, 16, 100352), 1_484_916_736, {"rope_theta": 500000}),
    "SmolLM3-3B": (
        "smollm3",
        (2048, 11008, 36, 16, 4, 128256),
        3_075_098_624,
        {"no_rope_layers": [1, 1, 1, 0] * 9, "layer_types": ["full_attention"] * 36},
    ),
    "granite-3.3-2b": (
        "granite",
        (2048, 8192, 40, 32, 8, 49159),
        2_533_539_840,
        {"tie_word_embeddings": True, "embedding_multiplier": 12.0, "logits_scaling": 8.0},
    ),
}
"""Model type; hidden, feed-forward, blocks, heads, key and value heads, vocabulary; parameters; other settings."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_the_parameters_that_their_makers_state(name):
    model_type, sizes, parameters, settings = PUBLISHED[name]
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    family = next(family() for _, family in FAMILIES.items() if family.model_type == model_type)
    config = dict(zip((*keys, "vocab_size"), sizes, strict=True)) | settings
    assert family.problems(config) == []
    assert family.graph(config).parameters == parameters


# --- patterns over blocks


@pytest.mark.parametrize(
    ("name", "blocks", "kinds", "period"),
    [
        ("llama", 3, "fff", 1),
        ("mistral", 3, "fff", 1),
        ("qwen2", 3, "fff", 1),
        ("gemma2", 5, "sfsfs", 2),
        ("gemma3", 26, "sssssf" * 4 + "ss", 6),
        ("gemma3", 4, "ssss", 1),
        ("smollm3", 9, "fffufffuf", 4),
    ],
)
def test_kinds_of_blocks_and_their_period(name, blocks, kinds, period):
    config = config_of(name, num_hidden_layers=blocks, no_rope_layers=...)
    family = family_of(config)
    assert "".join(kind[0] for kind in family.block_kinds(config)) == kinds
    assert family.period(config) == period


def test_kinds_are_transformers():
    for name in ("gemma2", "gemma3", "qwen2", "qwen3"):
        for changes in ({}, {"use_sliding_window": True}, {"num_hidden_layers": 13, "layer_types": ...}):
            config = config_of(name, **changes)
            theirs = skeleton(config).config.layer_types
            assert [
                f"{'full' if k == 'full' else 'sliding'}_attention" for k in family_of(config).block_kinds(config)
            ] == theirs
    config = config_of("smollm3", num_hidden_layers=9, no_rope_layers=...)
    assert [int(k != "unrotated") for k in family_of(config).block_kinds(config)] == skeleton(
        config
    ).config.no_rope_layers


def test_blocks_are_dropped_only_where_the_pattern_goes_on():
    gemma = config_of("gemma3", num_hidden_layers=26)
    family = family_of(gemma)
    assert not family.breaks_pattern(gemma, range(6, 12))
    assert not family.breaks_pattern(gemma, [3, 4, 5, 6, 7, 8])
    assert not family.breaks_pattern(gemma, [24, 25])
    assert family.breaks_pattern(gemma, [0])
    assert family.breaks_pattern(gemma, [5, 11])
    assert not family.breaks_pattern(gemma, [])
    llama = config_of("llama", num_hidden_layers=6)
    assert not family_of(llama).breaks_pattern(llama, [0, 3])
    mixed = config_of("qwen2", num_hidden_layers=4, use_sliding_window=True, max_window_layers=2)
    assert family_of(mixed).period(mixed) == 4
    assert family_of(mixed).breaks_pattern(mixed, [0])
    assert not family_of(mixed).breaks_pattern(mixed, [3])


# --- GGUF's numbers and back


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ("mistral", "phi3-long")])
def test_a_config_comes_back_from_the_numbers_of_a_file(name):
    config = config_of(name)
    family = family_of(config)
    keys = family.hyperparameters(config) | {"tokenizer.ggml.tokens": [""] * config["vocab_size"]}
    names = [spec.gguf_name for spec in family.graph(config).tensors]
    back = family.config_from_gguf(keys) | dict(family.config_of_names(names))
    assert family.hyperparameters(back) == family.hyperparameters(config)
    assert family.graph(back).tensors == family.graph(config | {"torch_dtype": "float32"}).tensors
    assert family.rope(back) == family.rope(config)
    assert family.block_kinds(back) == family.block_kinds(config)


# --- what is refused

LONG = CONFIGS["phi3-long"]["rope_scaling"]


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("qwen2", {"head_dim": 32}, "heads of 32"),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types is not a list of 2"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 0}, "sliding_window is 0"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("qwen3", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "supported: default, linear"),
        ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping is None"),
        ("gemma2", {"final_logit_softcapping": -1.0}, "final_logit_softcapping is -1.0"),
        ("gemma2", {"tie_word_embeddings": False}, "tie_word_embeddings"),
        ("gemma2", {"hidden_activation": "gelu"}, "supported: gelu_pytorch_tanh"),
        ("gemma2", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "supported: default"),
        ("gemma2", {"layer_types": ["full", "full", "full", "full"]}, "sliding_attention"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma3", {"query_pre_attn_scalar": 168}, "llama.cpp has 32 built in"),
        ("gemma3", {"sliding_window_pattern": 0}, "sliding_window_pattern is 0"),
        ("gemma3", {"rope_parameters": {"full_attention": {}, "sliding_attention": {"rope_type": "yarn"}},
                    "rope_scaling": ...}, "yarn"),
        ("phi3", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "supported: default, longrope"),
        ("phi3-long", {"rope_scaling": {**LONG, "short_factor": [1.0]}}, "short_factor has 1 numbers for 6 pairs"),
        ("phi3-long", {"rope_scaling": {**LONG, "long_factor": [1.0] * 5 + ["1"]}}, "long_factor is '1'"),
        ("phi3-long", {"partial_rotary_factor": 0.45}, "7 features"),
        ("phi3-long", {"partial_rotary_factor": 1.5}, "partial_rotary_factor 1.5"),
        ("olmo2", {"tie_word_embeddings": True}, "tie_word_embeddings"),
        ("smollm3", {"no_rope_layers": ..., "no_rope_layer_interval": 3}, "every 4. block"),
        ("smollm3", {"mlp_bias": True}, "mlp_bias"),
        ("granite", {"logits_scaling": 0}, "logits_scaling is 0"),
        ("granite", {"residual_multiplier": "0.2"}, "residual_multiplier is '0.2'"),
        ("granite", {"head_dim": 24}, "heads of 24"),
    ],
)  # fmt: skip
def test_configs_that_llama_cpp_would_run_as_something_else_are_refused(name, change, said):
    config = config_of(name, **change)
    with pytest.raises(InputRejected) as caught:
        family_of(config).graph(config)
    assert said in str(caught.value)
    assert {problem.rule for problem in caught.value.problems} <= {"config-range", "unsupported-config"}


def test_both_spellings_of_gemma_3s_rotary_embedding_mean_the_same():
    old = config_of("gemma3")
    nested = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    }
    dropped = dict.fromkeys(("rope_theta", "rope_local_base_freq", "rope_scaling"), ...)
    new = config_of("gemma3", rope_parameters=nested, **dropped)
    family = family_of(old)
    assert family.hyperparameters(old) == family.hyperparameters(new)
    assert family.hyperparameters(new)["gemma3.rope.freq_base_swa"] == 10_000.0


def test_scores_of_the_largest_gemmas_are_scaled_by_another_width():
    for name, blocks in (("gemma2", 46), ("gemma3", 62)):
        change = {"num_hidden_layers": blocks, "num_attention_heads": 4, "head_dim": 32}
        config = config_of(name, **change, query_pre_attn_scalar=16)
        assert family_of(config).problems(config) == []
        assert family_of(config).problems(config | {"query_pre_attn_scalar": 32}) != []


def test_longrope_lengthens_vectors_as_transformers_does():
    config = config_of("phi3-long")
    rotary = skeleton(config).base_model.rotary_emb
    rope = family_of(config).rope(config)
    assert rope.length == pytest.approx(rotary.attention_scaling)
    assert family_of(config).rope(config | {"rope_scaling": {**LONG, "attention_factor": 2.0}}).length == 2.0
    assert family_of(config).rope(config | {"rope_scaling": {**LONG, "type": "su"}}) == rope


def test_notes_hold_for_a_context():
    config = config_of("phi3", sliding_window=64)
    family = family_of(config)
    assert "2 blocks" in family.notes(config)[0]
    assert family.notes(config, context=64) == ()
    long = config_of("phi3-long")
    assert family_of(long).notes(long, context=256) == ()
    assert len(family_of(long).notes(long, context=257)) == 1
