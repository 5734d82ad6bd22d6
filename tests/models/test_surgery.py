"""Surgery on every family: against transformers' whole model with the same parts silenced, and what cannot be cut."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from family_zoo import CONFIGS
from tiny_config import TINY

from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.checkpoint.writing import CheckpointWriter
from llmpack.errors import InputRejected
from llmpack.models import family_of, open_model
from llmpack.models.surgery import Kept, resized
from llmpack.steps.cutting import write_cut

LENGTH = 40
OWN_HEADS = [name for name in CONFIGS if family_of({**TINY, **CONFIGS[name]}).own_head_dim]


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(3, 512, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def whole_model(folder):
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model, loading = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


def cut(checkpoint, folder, kept, **sizes):
    """The checkpoint that is left."""
    graph = open_model(checkpoint)
    target = resized(graph, blocks=kept.blocks, **sizes)
    writer = CheckpointWriter(folder, checkpoint, target.config)
    write_cut(writer, checkpoint, graph, target, kept, {}, {})
    left = writer.finish()
    assert open_model(left).tensors == target.tensors
    return left


def original(name, checkpoint_factory):
    return Checkpoint.open(checkpoint_factory(tokenizer=None, **CONFIGS[name]))


def kept_blocks(checkpoint):
    """All blocks but a run of one period (of one block where that would leave nothing)."""
    family = family_of(checkpoint.config)
    count, period = checkpoint.config["num_hidden_layers"], family.period(checkpoint.config)
    assert period < count
    return [index for index in range(count) if not 1 <= index < 1 + period]


@pytest.mark.parametrize("name", CONFIGS)
def test_without_a_run_of_blocks(name, checkpoint_factory, tokens, tmp_path):
    checkpoint = original(name, checkpoint_factory)
    stay = kept_blocks(checkpoint)
    left = cut(checkpoint, tmp_path / "left", Kept(tuple(stay)))
    whole = whole_model(checkpoint.folder)
    whole.model.layers = torch.nn.ModuleList([whole.model.layers[index] for index in stay])
    whole.config.num_hidden_layers = len(stay)
    for key in ("layer_types", "no_rope_layers"):
        if getattr(whole.config, key, None) is not None:
            setattr(whole.config, key, [getattr(whole.config, key)[index] for index in stay])
    torch.testing.assert_close(logits(whole_model(left.folder), tokens), logits(whole, tokens), rtol=0, atol=1e-5)
    kinds = family_of(checkpoint.config).block_kinds(checkpoint.config)
    assert family_of(left.config).block_kinds(left.config) == tuple(kinds[index] for index in stay)


@pytest.mark.parametrize("name", CONFIGS)
def test_without_feed_forward_channels(name, checkpoint_factory, tokens, tmp_path):
    checkpoint = original(name, checkpoint_factory)
    blocks, width = checkpoint.config["num_hidden_layers"], checkpoint.config["intermediate_size"]
    rng = np.random.default_rng(3)
    ffn = {index: np.sort(rng.permutation(width)[:96]) for index in range(blocks)}
    left = cut(checkpoint, tmp_path / "left", Kept(tuple(range(blocks)), ffn=ffn), ffn=96)
    whole = whole_model(checkpoint.folder)
    for index, layer in enumerate(whole.model.layers):
        silent = np.setdiff1d(np.arange(width), ffn[index])
        layer.mlp.down_proj.weight.data[:, silent] = 0
    torch.testing.assert_close(logits(whole_model(left.folder), tokens), logits(whole, tokens), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", OWN_HEADS)
def test_without_a_group_of_heads(name, checkpoint_factory, tokens, tmp_path):
    checkpoint = original(name, checkpoint_factory)
    blocks = checkpoint.config["num_hidden_layers"]
    groups = {index: np.array([index % 2]) for index in range(blocks)}
    left = cut(checkpoint, tmp_path / "left", Kept(tuple(range(blocks)), groups=groups), groups=1)
    assert (left.config["num_attention_heads"], left.config["num_key_value_heads"]) == (2, 1)
    whole = whole_model(checkpoint.folder)
    for index, layer in enumerate(whole.model.layers):
        weight = layer.self_attn.o_proj.weight.data
        half = weight.shape[1] // 2
        weight[:, half * (1 - index % 2) :][:, :half] = 0
    torch.testing.assert_close(logits(whole_model(left.folder), tokens), logits(whole, tokens), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", OWN_HEADS)
def test_without_hidden_channels(name, checkpoint_factory, tokens, tmp_path):
    """Channels that hold nothing but zeros may go: only the means of the norms change, by a constant."""
    checkpoint = original(name, checkpoint_factory)
    blocks = checkpoint.config["num_hidden_layers"]
    hidden = np.sort(np.random.default_rng(4).permutation(64)[:48])
    left = cut(checkpoint, tmp_path / "left", Kept(tuple(range(blocks)), hidden=hidden), hidden=48)
    silent = np.setdiff1d(np.arange(64), hidden)
    whole, small = whole_model(checkpoint.folder), whole_model(left.folder)
    offset = family_of(checkpoint.config).norm_offset
    # Gemma scales its embedding, but not its head, by the root of the hidden size
    embedded = (48 / 64) ** 0.5 if offset else 1.0
    whole.lm_head.weight = torch.nn.Parameter(whole.lm_head.weight.detach().clone())
    with torch.no_grad():
        for path, weight in whole.named_parameters():
            if path in ("model.embed_tokens.weight", "lm_head.weight"):
                weight[:, silent] = 0
                weight *= embedded if path.startswith("model") else 1.0
            elif path.endswith(("o_proj.weight", "down_proj.weight", "o_proj.bias", "down_proj.bias")):
                weight[silent] = 0
            elif path.endswith("norm.weight") and weight.shape == (64,):
                # the mean over 64 channels is smaller than that over the 48 that hold something
                weight.copy_((weight + offset) * (48 / 64) ** 0.5 - offset)
    torch.testing.assert_close(logits(small, tokens), logits(whole, tokens), rtol=1e-3, atol=2e-3)


def test_everything_at_once_keeps_what_it_says(checkpoint_factory, tmp_path):
    checkpoint = Checkpoint.open(checkpoint_factory(tokenizer=None, num_hidden_layers=4))
    kept = Kept(
        (0, 3),
        ffn={0: np.arange(32), 3: np.arange(32, 64)},
        groups={0: np.array([1]), 3: np.array([0])},
        hidden=np.arange(8, 40),
    )
    left = cut(checkpoint, tmp_path / "left", kept, ffn=32, groups=1, hidden=32)
    assert family_of(left.config).sizes(left.config).head_dim == 16
    old, new = "model.layers.3.", "model.layers.1."
    up = checkpoint.read(old + "mlp.up_proj.weight")[32:64, 8:40]
    assert torch.equal(left.read(new + "mlp.up_proj.weight"), up)
    assert torch.equal(
        left.read(new + "self_attn.q_proj.weight"), checkpoint.read(old + "self_attn.q_proj.weight")[:32, 8:40]
    )
    assert torch.equal(
        left.read(new + "self_attn.o_proj.weight"), checkpoint.read(old + "self_attn.o_proj.weight")[8:40, :32]
    )
    assert torch.equal(left.read("model.embed_tokens.weight"), checkpoint.read("model.embed_tokens.weight")[:, 8:40])
    whole_model(left.folder)


def config_of(name, **changes):
    settings = {**TINY, **CONFIGS[name], **changes}
    return json.loads(json.dumps({key: value for key, value in settings.items() if value is not ...}))


@pytest.mark.parametrize(
    ("name", "changes", "sizes", "said"),
    [
        ("gemma3", {"num_hidden_layers": 13}, {"blocks": range(1, 13)}, "repeat every 6 blocks"),
        ("smollm3", {"num_hidden_layers": 9, "no_rope_layers": ...}, {"blocks": range(3, 9)}, "repeat every 4 blocks"),
        ("qwen2", {}, {"groups": 1}, "are not the hidden size 64"),
        ("llama", {"num_key_value_heads": 4}, {"groups": 3}, "64 is no multiple of 3 heads, which transformers asks"),
        ("granite", {}, {"hidden": 48}, "are not the hidden size 48"),
        ("phi3", {}, {"hidden": 48}, "are not the hidden size 48"),
    ],
)
def test_what_no_config_of_the_family_says_is_refused(name, changes, sizes, said):
    config = config_of(name, **changes)
    with pytest.raises(InputRejected, match=said):
        resized(family_of(config).graph(config), **sizes)


def test_heads_and_hidden_size_may_shrink_together_where_they_are_tied():
    config = config_of("qwen2")
    left = resized(family_of(config).graph(config), groups=1, hidden=32)
    assert left["model.layers.0.self_attn.q_proj.weight"].shape == (32, 32)


def test_lists_with_an_entry_for_each_block_follow():
    config = config_of("smollm3", num_hidden_layers=9, no_rope_layers=[1, 1, 1, 0] * 2 + [1])
    left = resized(family_of(config).graph(config), blocks=[0, 1, 2, 3, 8])
    assert left.config["no_rope_layers"] == [1, 1, 1, 0, 1]


@pytest.mark.parametrize("blocks", [[], [0, 0], [1, 0], [0, 2], [-1, 0]])
def test_blocks_that_are_no_part_of_the_model_are_a_mistake_of_the_caller(blocks):
    config = config_of("llama")
    with pytest.raises(ValueError, match="no ascending part"):
        resized(family_of(config).graph(config), blocks=blocks)
