"""Layouts of safetensors folders: what is announced is what is written, and what their own loaders make of it."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file

from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.errors import NumericalError, StepFailed, VerificationFailed
from llmpack.formats import layout_bnb
from llmpack.formats.folder_readback import compare_folder, read_folder_back
from llmpack.formats.layout_bnb import BnbFp4, BnbNf4
from llmpack.formats.layout_plain import Plain
from llmpack.formats.layouts import LAYOUTS
from llmpack.formats.safetensors_folder import SafetensorsFormat
from llmpack.formats.written import Written
from llmpack.models import open_model
from llmpack.runtime.settings import RuntimeSettings

IDS = torch.arange(40)[None]


@pytest.fixture(scope="module")
def checkpoint(checkpoint_factory):
    return Checkpoint.open(checkpoint_factory())


@pytest.fixture(scope="module")
def graph(checkpoint):
    return open_model(checkpoint)


def written(form, checkpoint, graph, folder):
    folder.mkdir()
    names = form.write(checkpoint, graph, folder, None)
    assert sorted(names) == sorted(path.name for path in folder.iterdir())
    assert form.sizes(graph, checkpoint) == {path.name: path.stat().st_size for path in folder.iterdir()}
    return folder


def tensors_of(folder):
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def logits(folder, **options):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    with torch.no_grad():
        return model(IDS).logits.float()


LAYOUTS_TO_WRITE = [
    Plain("f16"),
    Plain("bf16"),
    BnbNf4("f16"),
    BnbNf4("bf16", double_quant=False),
    BnbFp4("f32"),
    BnbNf4("f16", keep=("attention.v", "ffn.down@1")),
]


@pytest.mark.parametrize("layout", LAYOUTS_TO_WRITE, ids=str)
@pytest.mark.parametrize("shard", [5 * 10**9, 60_000])
def test_every_byte_is_announced_and_reads_back(layout, shard, checkpoint, graph, tmp_path):
    form = SafetensorsFormat(layout, shard)
    folder = written(form, checkpoint, graph, tmp_path / "model")
    assert compare_folder(folder, checkpoint, form.encode_graph(graph), form) == []
    total = sum(t.numel() * t.element_size() for t in tensors_of(folder).values())
    assert sum(nbytes for _, nbytes in form.totals(graph).values()) == total
    assert ((folder / "model.safetensors.index.json").exists()) == (shard < total)


def test_plain_in_the_type_of_the_source_is_the_source(checkpoint, graph, tmp_path):
    folder = written(SafetensorsFormat(Plain("f32"), 60_000), checkpoint, graph, tmp_path / "model")
    assert torch.equal(logits(folder), logits(checkpoint.folder, dtype=torch.float32))


@pytest.mark.parametrize("double", [True, False])
def test_nf4_is_what_transformers_saves(double, checkpoint, graph, tmp_path):
    """The oracle: transformers quantizes the same model with bitsandbytes and saves it."""
    ours = written(SafetensorsFormat(BnbNf4("f16", double_quant=double)), checkpoint, graph, tmp_path / "ours")
    wanted = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float16,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint.folder, quantization_config=wanted, dtype=torch.float16
    )
    model.save_pretrained(tmp_path / "theirs")
    found, expected = tensors_of(ours), tensors_of(tmp_path / "theirs")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if "quant_state" in name:
            assert json.loads(bytes(found[name].numpy())) == json.loads(bytes(tensor.numpy()))
        else:
            assert torch.equal(found[name], tensor), name
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())["quantization_config"]
    mine = json.loads((ours / "config.json").read_text())["quantization_config"]
    assert {k: v for k, v in mine.items() if k != "llm_int8_skip_modules"} == {
        k: v for k, v in config.items() if k in mine and k != "llm_int8_skip_modules"
    }
    with torch.no_grad():
        assert torch.equal(logits(ours), model(IDS).logits.float())


def test_slabs_do_not_change_bytes(checkpoint, graph, tmp_path, monkeypatch):
    whole = written(SafetensorsFormat(BnbNf4()), checkpoint, graph, tmp_path / "whole")
    monkeypatch.setattr(layout_bnb, "SLAB", 1)
    parts = written(SafetensorsFormat(BnbNf4()), checkpoint, graph, tmp_path / "parts")
    assert (whole / "model.safetensors").read_bytes() == (parts / "model.safetensors").read_bytes()


@pytest.mark.parametrize("layout", [BnbNf4("f32"), BnbFp4("f32"), BnbNf4("f32", double_quant=False)], ids=str)
def test_decoding_agrees_with_bitsandbytes(layout, checkpoint, graph, tmp_path, monkeypatch):
    from bitsandbytes.functional import QuantState, dequantize_4bit

    monkeypatch.setattr(layout_bnb, "SLAB_DECODED", 640)
    form = SafetensorsFormat(layout)
    folder = written(form, checkpoint, graph, tmp_path / "model")
    own, _ = Written.reading(folder, checkpoint, graph, form, "")
    tensors = tensors_of(folder)
    for spec in graph.tensors:
        if spec.is_linear:
            state = {k.removeprefix(f"{spec.name}."): v for k, v in tensors.items() if k.startswith(f"{spec.name}.")}
            theirs = dequantize_4bit(tensors[spec.name], QuantState.from_dict(dict(state), torch.device("cpu")))
            assert torch.allclose(own.read(spec.name), theirs, rtol=1e-5, atol=1e-7)
        else:
            assert torch.equal(own.read(spec.name), checkpoint.read(spec.name).float())


def test_what_is_kept_stays_a_float_for_the_loader_too(checkpoint, graph, tmp_path):
    layout = BnbNf4("f16", keep=("attention.v", "ffn.down@1"))
    folder = written(SafetensorsFormat(layout), checkpoint, graph, tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    kinds = {name: type(m).__name__ for name, m in model.named_modules() if "Linear" in type(m).__name__}
    kept = {name for name, kind in kinds.items() if kind == "Linear"}
    blocks = range(graph.block_count)
    assert kept == {"lm_head", "model.layers.1.mlp.down_proj", *(f"model.layers.{b}.self_attn.v_proj" for b in blocks)}


def test_options_that_mean_nothing_are_problems(graph):
    problems = BnbNf4(keep=("attention.w", "ffn.down@0-7", "ffn.up@3-1", "ffn.up")).option_problems(graph)
    assert [problem.path for problem in problems] == ["keep"] * 3
    assert "attention.w" in problems[0].message
    assert "block 7" in problems[1].message
    assert "backwards" in problems[2].message


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_codes_of_another_kind_are_refused(name, graph):
    if name == "gptq":
        pytest.skip("holds codes of its own")
    coded = graph.with_encodings(lambda spec: "q4_0" if spec.is_linear else spec.encoding)
    with pytest.raises(StepFailed, match=r"q_proj.* and \d+ more: it holds f32, f16, bf16, not q4_0"):
        SafetensorsFormat(LAYOUTS.load(name)()).encode_graph(coded)


@pytest.mark.parametrize("layout", [Plain("f16"), BnbNf4("f16")], ids=str)
def test_numbers_beyond_the_floats_stop_the_writing(layout, checkpoint_factory, tmp_path):
    from safetensors.torch import save_file

    folder = tmp_path / "large"
    shutil.copytree(checkpoint_factory(), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][3, 5] = 1e6
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    large = Checkpoint.open(folder)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(NumericalError, match="down_proj"):
        SafetensorsFormat(layout).write(large, open_model(large), out, None)


def test_a_changed_folder_does_not_read_back(checkpoint, graph, tmp_path):
    form = SafetensorsFormat(BnbNf4(), 60_000)
    folder = written(form, checkpoint, graph, tmp_path / "model")
    (folder / "config.json").write_text((folder / "config.json").read_text().replace("2", "3", 1))
    problems = compare_folder(folder, checkpoint, form.encode_graph(graph), form)
    assert [problem.message for problem in problems] == ["config.json is not what was meant"]
    form = replace(form, layout=replace(form.layout, floats="bf16"))
    with pytest.raises(VerificationFailed):
        read_folder_back(folder, checkpoint, graph, form, RuntimeSettings(threads=1))


def test_a_flipped_bit_is_found(checkpoint, graph, tmp_path):
    form = SafetensorsFormat(BnbNf4())
    folder = written(form, checkpoint, graph, tmp_path / "model")
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-100] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    problems = compare_folder(folder, checkpoint, form.encode_graph(graph), form)
    assert len(problems) == 1
    assert "1 bytes are not those of" in problems[0].message
