"""One block at a time against the whole model of transformers."""

import gc

import pytest
import torch

from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.models import open_model
from llmpack.models.forward import BATCH_TOKENS, Forward, batches, final_hidden

VARIANTS = {
    "llama, tied": {},
    "llama, untied, bf16 on disk": {"tie_word_embeddings": False, "torch_dtype": "bfloat16", "shards": 3},
    "llama, biases, wide heads": {"attention_bias": True, "mlp_bias": True, "head_dim": 32},
    "llama, linear rope": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "llama, llama3 rope": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "mistral, sliding window": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": 16,
        "attention_bias": ...,
        "mlp_bias": ...,
    },
}


def whole_model(folder, dtype=torch.float32):
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model, loading = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def folder(request, checkpoint_factory):
    return checkpoint_factory(tokenizer=None, **request.param)


@pytest.fixture
def tokens():
    return torch.randint(0, 512, (6, 48), generator=torch.Generator().manual_seed(1))


def test_logits_equal_the_whole_models(folder, tokens):
    checkpoint = Checkpoint.open(folder)
    graph = open_model(checkpoint)
    forward = Forward(checkpoint, graph)
    hidden = final_hidden(checkpoint, graph, tokens)
    with torch.no_grad():
        theirs = whole_model(folder)(tokens).logits
    assert theirs.std() > 1  # not flat
    torch.testing.assert_close(forward.logits(hidden), theirs, rtol=0, atol=1e-5)
    torch.testing.assert_close(hidden @ forward.head().T, theirs, rtol=0, atol=1e-4)


def test_every_block_equals_the_whole_models(folder, tokens):
    checkpoint = Checkpoint.open(folder)
    graph = open_model(checkpoint)
    forward = Forward(checkpoint, graph)
    with torch.no_grad():
        theirs = whole_model(folder)(tokens, output_hidden_states=True).hidden_states
    hidden = forward.embed(tokens)
    assert torch.equal(hidden, theirs[0])
    for index in range(graph.block_count - 1):
        hidden = forward.run(forward.load_block(index), hidden)
        torch.testing.assert_close(hidden, theirs[index + 1], rtol=0, atol=1e-5)


def test_bf16_is_what_transformers_computes_in_bf16(checkpoint_factory, tokens):
    folder = checkpoint_factory(tokenizer=None, torch_dtype="bfloat16")
    checkpoint = Checkpoint.open(folder)
    graph = open_model(checkpoint)
    forward = Forward(checkpoint, graph, torch.bfloat16)
    hidden = final_hidden(checkpoint, graph, tokens, dtype=torch.bfloat16)
    assert hidden.dtype == torch.float32
    with torch.no_grad():
        theirs = whole_model(folder, torch.bfloat16)(tokens).logits
    assert torch.equal(forward.logits(hidden.bfloat16()), theirs)


def test_one_block_is_in_memory_at_a_time(tiny_llama, tokens):
    checkpoint = Checkpoint.open(tiny_llama)
    graph = open_model(checkpoint)
    forward = Forward(checkpoint, graph)
    hidden = forward.embed(tokens)
    gc.collect()
    real = [p for p in forward._model.parameters() if p.device.type != "meta"]
    assert sum(p.numel() for p in real) == 64  # the last norm
    block = forward.load_block(1)
    own = sum(p.numel() for p in block.module.parameters())
    assert own == sum(spec.parameters for spec in graph.block(1))
    assert all(p.device.type == "meta" for layer in forward._blocks for p in layer.parameters())
    forward.run(block, hidden)


def test_loading_a_block_leaves_the_skeleton_as_it_was(tiny_llama, tokens):
    checkpoint = Checkpoint.open(tiny_llama)
    forward = Forward(checkpoint, open_model(checkpoint))
    hidden = forward.embed(tokens)
    first = forward.run(forward.load_block(0), hidden)
    changed = forward.load_block(0)
    changed.module.mlp.down_proj.weight.zero_()
    assert not torch.equal(forward.run(changed, hidden), first)
    assert torch.equal(forward.run(forward.load_block(0), hidden), first)


def test_logits_can_be_asked_for_twice_and_between_batches(tiny_llama, tokens):
    checkpoint = Checkpoint.open(tiny_llama)
    graph = open_model(checkpoint)
    forward = Forward(checkpoint, graph)
    hidden = final_hidden(checkpoint, graph, tokens)
    first = forward.logits(hidden)
    forward.embed(tokens)
    assert torch.equal(forward.logits(hidden), first)


def test_packed_tensors_run_as_what_they_decode_to(tiny_llama, tokens, tmp_path):
    from llmpack.checkpoint.tensors import Packed
    from llmpack.checkpoint.writing import CheckpointWriter
    from llmpack.encodings import encoding

    source = Checkpoint.open(tiny_llama)
    packed, decoded = (CheckpointWriter(tmp_path / name, source) for name in ("packed", "decoded"))
    for name in source.tensors:
        values = source.read(name)
        if values.ndim == 2:
            blocks = encoding("q8_0").encode(values)
            packed.write(name, {name: Packed("q8_0", tuple(values.shape), blocks)})
            decoded.write(name, {name: encoding("q8_0").decode(blocks, values.shape[1])})
        else:
            packed.write(name, {name: values})
            decoded.write(name, {name: values})
    runs = []
    for checkpoint in (packed.finish(), decoded.finish()):
        graph = open_model(checkpoint)
        hidden = final_hidden(checkpoint, graph, tokens)
        runs.append((hidden, Forward(checkpoint, graph).logits(hidden)))
    assert open_model(Checkpoint.open(tmp_path / "packed"))["model.layers.0.mlp.up_proj.weight"].encoding == "q8_0"
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])


def test_batches_cover_every_sequence_once():
    for count, length in ((1, 1), (7, 512), (9, 5000), (100, 2048), (5, BATCH_TOKENS + 1)):
        parts = list(batches(count, length))
        assert [i for part in parts for i in range(part.start, part.stop)] == list(range(count))
        assert all((part.stop - part.start) * length <= max(BATCH_TOKENS, length) for part in parts)
