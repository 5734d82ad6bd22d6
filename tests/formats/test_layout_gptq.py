"""GPTQ folders: what they hold, number for number, and what the loaders are told of it."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

from llmpack.calibration.corpus import Corpus
from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.encodings.names import INT_NAMES, ORDERED_NAMES, int_options
from llmpack.errors import StepFailed
from llmpack.formats.facts import Facts
from llmpack.formats.layout_gptq import Gptq
from llmpack.formats.safetensors_folder import SafetensorsFormat
from llmpack.models import open_model
from llmpack.steps import STEPS
from llmpack.steps.step import Workbench

NAMED = ("int4_g32", "int4_row", "int8_g64", "int2_g32_asym", "int3_row_asym", "int3_g128")
ORDERED = ("int4_g32_act", "int3_g64_asym_act")
FACTS = Facts("tiny", ())
TEXT = Corpus.of(torch.randint(0, 512, (4, 64), generator=torch.Generator().manual_seed(0)))


@pytest.fixture(scope="module")
def source(checkpoint_factory):
    return Checkpoint.open(checkpoint_factory(hidden_size=128, intermediate_size=256, attention_bias=True))


@pytest.fixture(scope="module")
def rounded(source, tmp_path_factory):
    """The source rounded by a step; equal options give the same checkpoint."""
    made = {}

    def factory(encoding, **options):
        key = json.dumps([encoding, options], sort_keys=True)
        if key not in made:
            corpus = TEXT if encoding in ORDERED_NAMES else None
            asked = {"use": "quantize.rtn", "embedding": "f16", "encoding": encoding}
            asked |= {"importance": corpus is not None, **options}
            step = STEPS.load("quantize.rtn").model_validate_json(json.dumps(asked))
            folder = tmp_path_factory.mktemp("rounded")
            bench = Workbench(folder / "out", folder / "work", source, corpus, 0, 1)
            made[key] = step.run(source, open_model(source), bench)
        return made[key]

    return factory


def written(checkpoint, folder, layout=None, **options):
    format_ = SafetensorsFormat(layout or Gptq(), **options)
    graph = format_.encode_graph(open_model(checkpoint))
    folder.mkdir()
    format_.write(checkpoint, graph, folder, FACTS)
    sizes = format_.sizes(graph, checkpoint)
    assert {path.name: path.stat().st_size for path in folder.iterdir()} == sizes
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    return graph, tensors


def slow_value(tensors, base, name, row, column):
    """One number of a matrix out of its words, bit by bit."""
    bits, _, symmetric, _ = int_options(name)
    group = int(tensors[f"{base}.g_idx"][column])

    def number(words, place):
        return sum((int(words[bit // 32]) >> bit % 32 & 1) << k for k, bit in enumerate(_bits(place, bits)))

    code = number(tensors[f"{base}.qweight"][:, row].tolist(), column)
    zero = number(tensors[f"{base}.qzeros"][group].tolist(), row) + (1 if symmetric else 0)
    return np.float32(tensors[f"{base}.scales"][group, row].numpy()) * np.float32(code - zero)


def _bits(place, bits):
    return range(place * bits, (place + 1) * bits)


@pytest.mark.parametrize("name", NAMED + ORDERED)
def test_the_folder_holds_the_numbers_of_the_checkpoint(name, rounded, tmp_path):
    checkpoint = rounded(name)
    graph, tensors = written(checkpoint, tmp_path / "folder")
    rng = np.random.default_rng(0)
    for spec in graph.tensors:
        values = Gptq().decode(tensors.__getitem__, spec)
        expected = checkpoint.read(spec.name).float()
        if not spec.is_linear:
            assert tensors[spec.name].dtype == torch.float16
            assert torch.equal(values, expected.half().float())
            continue
        assert spec.name not in tensors
        assert torch.equal(values, expected)
        base = spec.name.removesuffix(".weight")
        for row, column in zip(rng.integers(0, spec.shape[0], 20), rng.integers(0, spec.shape[1], 20), strict=True):
            assert slow_value(tensors, base, name, row, column) == expected[row, column]
        _, group, _, act_order = int_options(name)
        groups = [0 if group < 0 else i // group for i in range(spec.shape[1])]
        assert (tensors[f"{base}.g_idx"].tolist() == groups) is not act_order
        assert sorted(tensors[f"{base}.g_idx"].tolist()) == groups


def test_matrices_that_read_one_input_have_one_order(rounded, tmp_path):
    graph, tensors = written(rounded("int4_g32_act"), tmp_path / "folder")
    for specs in graph.input_groups(1).values():
        orders = [tensors[spec.name.replace(".weight", ".g_idx")] for spec in specs]
        assert all(torch.equal(one, orders[0]) for one in orders)


@pytest.mark.parametrize("name", ["int4_g128", "int3_row_asym", "int4_g32_act"])
def test_loaders_are_told_what_it_is(name, rounded, tmp_path):
    bits, group, symmetric, act_order = int_options(name)
    written(rounded(name), tmp_path / "folder")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    told = json.loads((tmp_path / "folder" / "quantize_config.json").read_text())
    assert config["quantization_config"] == told
    assert config["torch_dtype"] == "float16"
    assert (told["bits"], told["group_size"], told["sym"], told["desc_act"]) == (bits, group, symmetric, act_order)
    assert told["checkpoint_format"] == told["format"] == ("gptq" if symmetric else "gptq_v2")
    assert told["quant_method"] == "gptq"
    assert "dynamic" not in told


def test_what_stays_in_floats_is_named(rounded, tmp_path):
    checkpoint = rounded("int4_g32", exceptions={"ffn.down@1": "f16", "attention.v": "bf16"})
    _, tensors = written(checkpoint, tmp_path / "folder")
    left = ["model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj", "model.layers.1.mlp.down_proj"]
    told = json.loads((tmp_path / "folder" / "quantize_config.json").read_text())
    (named,) = told["modules_in_block_to_quantize"]
    assert sorted(named) == sorted(name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight"))
    assert len(named) == 2 * 7 - len(left)
    assert not set(named) & set(left)
    for name in left:
        assert tensors[f"{name}.weight"].dtype == torch.float16
        assert "-:^" + name.replace(".", r"\.") + "$" in told["dynamic"]


def test_shards_and_strips_change_no_number(rounded, tmp_path, monkeypatch):
    checkpoint = rounded("int3_g32")
    _, whole = written(checkpoint, tmp_path / "one")
    monkeypatch.setattr("llmpack.formats.layout_gptq.STRIP", 1)
    monkeypatch.setattr("llmpack.formats.layout_gptq.SLAB", 1000)
    _, parts = written(checkpoint, tmp_path / "many", shard=100_000)
    assert (tmp_path / "many" / "model.safetensors.index.json").is_file()
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"encoding": "q4_0"}, "not q4_0; set encoding"),
        ({"encoding": "int4_g32", "embedding": "int4_g32"}, 'set embedding = "f16"'),
        ({"encoding": "int4_g32", "exceptions": {"ffn.up": "int8_g32"}}, "of one kind, not int4_g32, int8_g32"),
        ({"encoding": "f16"}, "no matrix has int groups"),
    ],
)
def test_what_it_cannot_hold_is_refused_with_the_cure(options, told, source):
    asked = {"use": "quantize.rtn", "embedding": "f16", **options}
    graph = STEPS.load("quantize.rtn").model_validate_json(json.dumps(asked)).preview(open_model(source))
    with pytest.raises(StepFailed, match=told):
        SafetensorsFormat(Gptq()).encode_graph(graph)


def test_rows_that_share_words_of_zeros_are_whole_runs(checkpoint_factory):
    narrow = Checkpoint.open(checkpoint_factory(num_attention_heads=4, num_key_value_heads=1, head_dim=16))
    step = STEPS.load("quantize.rtn").model_validate_json(
        json.dumps({"use": "quantize.rtn", "embedding": "f16", "encoding": "int4_g32"})
    )
    with pytest.raises(StepFailed, match=r"it has 16; leave attention\.k in f16"):
        SafetensorsFormat(Gptq()).encode_graph(step.preview(open_model(narrow)))


def test_every_int_encoding_has_a_layout():
    assert len(INT_NAMES) == 4 * 4 * 2 + 4 * 3 * 2
