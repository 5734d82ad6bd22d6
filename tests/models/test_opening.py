"""Opening a checkpoint as a model: complete, and nothing else."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.errors import InputRejected
from llmpack.models import open_model


@pytest.fixture
def folder(tiny_llama, tmp_path):
    return shutil.copytree(tiny_llama, tmp_path / "model")


def change(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def refusal(folder):
    with pytest.raises(InputRejected) as caught:
        open_model(Checkpoint.open(folder))
    return caught.value.problems


def test_the_graph_knows_how_each_tensor_is_stored(checkpoint_factory):
    graph = open_model(Checkpoint.open(checkpoint_factory(torch_dtype="bfloat16", tokenizer=None)))
    assert {t.encoding for t in graph.tensors} == {"bf16"}
    assert graph.nbytes == 2 * graph.parameters
    assert [t.part for t in graph.outside] == ["embedding", "norm"]
    assert graph.tensors[0].part == "embedding"


def test_missing_extra_and_misshaped_tensors_are_all_named(folder):
    def edit(tensors):
        del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.0.mlp.down_proj.weight"] = tensors["model.layers.0.mlp.down_proj.weight"][:, :-1].clone()
        tensors["model.layers.0.self_attn.q_proj.wieght"] = tensors.pop("model.layers.0.self_attn.q_proj.weight")
        tensors["model.layers.7.mlp.up_proj.weight"] = tensors["model.norm.weight"] = tensors.pop(
            "model.layers.0.input_layernorm.weight"
        )
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:32].clone()

    change(folder, edit)
    problems = refusal(folder)
    found = {(p.rule, p.message.split("`")[1]) for p in problems}
    assert found == {
        ("weights-incomplete", "model.layers.1.mlp.up_proj.weight"),
        ("weights-incomplete", "model.layers.0.self_attn.q_proj.weight"),
        ("weights-incomplete", "model.layers.0.self_attn.q_proj.wieght"),
        ("weights-incomplete", "model.layers.0.input_layernorm.weight"),
        ("weights-incomplete", "model.layers.7.mlp.up_proj.weight"),
        ("weights-misshaped", "model.norm.weight"),
        ("weights-misshaped", "model.layers.0.mlp.down_proj.weight"),
    }
    text = str(InputRejected(problems))
    assert "[64, 127]; config.json implies [64, 128]" in text
    assert "did you mean `model.layers.0.self_attn.q_proj.weight`" in text


def test_what_follows_from_other_tensors_may_be_stored(folder):
    def edit(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = tensors["model.norm.weight"][:8].clone()

    change(folder, edit)
    graph = open_model(Checkpoint.open(folder))
    assert "lm_head.weight" not in graph


def test_an_untied_model_without_its_head_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    (problem,) = refusal(folder)
    assert problem.rule == "weights-incomplete"
    assert "`lm_head.weight` [512, 64] is missing" in problem.message


def test_an_unknown_architecture_is_refused_with_the_known_ones(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["MambaForCausalLM"]}))
    (problem,) = refusal(folder)
    assert problem.rule == "unsupported-arch"
    assert "LlamaForCausalLM" in problem.message
    assert "MistralForCausalLM" in problem.message


def test_an_embedding_shorter_than_the_config_says_is_refused(folder):
    # so the tokenizer, which the intake compares with the config, cannot be larger than the embedding
    change(folder, lambda t: t.update({"model.embed_tokens.weight": t["model.embed_tokens.weight"][:500].clone()}))
    (problem,) = refusal(folder)
    assert problem.rule == "weights-misshaped"
