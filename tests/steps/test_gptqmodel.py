"""GPTQModel as the engine: what it is asked, and what becomes of a folder that it wrote.

The engine itself wants an environment of its own: `scripts/bench/gptq_bundles` builds with it.
"""

import importlib.util
import json

import numpy as np
import pytest
import torch
import trial
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from llmpack.calibration.corpus import Corpus
from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.errors import MissingExtra, RecipeError, StepFailed
from llmpack.formats.facts import Facts
from llmpack.formats.layout_gptq import Gptq
from llmpack.formats.safetensors_folder import SafetensorsFormat
from llmpack.models import open_model
from llmpack.steps.gptqmodel import Folder, config_of

TEXT = Corpus.of(torch.randint(0, 512, (4, 64), generator=torch.Generator().manual_seed(0)))


@pytest.fixture(scope="module")
def source(checkpoint_factory):
    return Checkpoint.open(checkpoint_factory(hidden_size=128, intermediate_size=256))


@pytest.fixture
def gptq_folder(source, tmp_path):
    """A checkpoint of int groups, and the same as a folder of the GPTQ layout."""

    def made(encoding):
        step = trial.made("quantize.rtn", encoding=encoding, embedding="f16")
        checkpoint = trial.run(step, source, tmp_path / "steps", TEXT)
        form, folder = SafetensorsFormat(Gptq()), tmp_path / "folder"
        folder.mkdir()
        form.write(checkpoint, form.encode_graph(open_model(checkpoint)), folder, Facts("tiny", ()))
        (folder / "versions.json").write_text("{}")
        return checkpoint, folder

    return made


@pytest.mark.parametrize("encoding", ["int4_g32", "int3_row_asym", "int8_g64_act", "int2_g32_asym_act"])
def test_codes_scales_zeros_and_groups_are_taken_over(encoding, gptq_folder):
    checkpoint, folder = gptq_folder(encoding)
    rounded = Folder(folder)
    for spec in open_model(checkpoint).tensors:
        if spec.is_linear:
            np.testing.assert_array_equal(rounded.taken(spec).data, checkpoint.packed(spec.name))


def changed(folder, part, change):
    """The folder with one of the four tensors of the first matrix changed; the matrix's name."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = f"model.layers.0.mlp.down_proj.{part}"
    tensors[name] = change(tensors[name])
    save_file(tensors, path)
    return name.replace(part, "weight")


@pytest.mark.parametrize(
    ("encoding", "part", "change", "told"),
    [
        ("int4_g32", "qzeros", lambda words: words + 1, "zeros are not in the middle; set an _asym encoding"),
        ("int4_g32", "g_idx", lambda groups: groups.flip(0), "out of order; set encoding = int4_g32_act"),
        ("int4_g32_act", "g_idx", lambda groups: groups * 0, "groups are not full"),
        ("int4_g32", "scales", lambda scales: scales.float() + 1e-7, "scales do not fit float16"),
        ("int4_g32", "scales", lambda scales: scales[:1].clone(), r"wrote \[128, 256\] in 1 groups"),
    ],
)
def test_what_was_not_asked_for_is_refused(encoding, part, change, told, gptq_folder):
    checkpoint, folder = gptq_folder(encoding)
    name = changed(folder, part, change)
    with pytest.raises(StepFailed, match=told):
        Folder(folder).taken(open_model(checkpoint)[name])


def asked(source, **options):
    step = trial.made("quantize.gptq", **{"embedding": "f16", "encoding": "int4_g32", **options})
    return config_of(step.preview(open_model(source)), step.damping, step.order == "activation")


def test_what_it_is_asked(source):
    left = {"ffn.down@1": "f16"}
    assert asked(source, exceptions=left) == {
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "desc_act": False,
        "act_group_aware": True,
        "damp_percent": 0.03,
        "checkpoint_format": "gptq",
        "dynamic": {r"-:^model\.layers\.1\.mlp\.down_proj$": {}},
    }
    ordered = asked(source, encoding="int3_g64_asym_act", damping=0.1)
    assert (ordered["desc_act"], ordered["act_group_aware"], ordered["checkpoint_format"]) == (True, False, "gptq_v2")
    assert (ordered["sym"], ordered["damp_percent"], ordered["dynamic"]) == (False, 0.1, None)
    assert not asked(source, order="natural")["act_group_aware"]
    assert not asked(source, encoding="int4_row")["act_group_aware"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"correction": 0.0, "tune": 3}, 'GPTQModel has no correction, tune; remove it, or set engine = "native"'),
        ({"damping": 0.0}, "damping lies between 0 and 1"),
    ],
)
def test_options_that_it_does_not_know(options, told):
    with pytest.raises(ValidationError, match=told):
        trial.made("quantize.gptq", engine="gptqmodel", encoding="int4_g32", **options)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"encoding": "iq4_nl"}, 'int groups of one kind, not iq4_nl; set encoding = "int4_g128"'),
        ({"encoding": "int4_g32", "exceptions": {"ffn.up": "int8_g32"}}, "of one kind, not int4_g32, int8_g32"),
        ({"encoding": "int4_g32_act", "order": "natural"}, 'is in activation order; set order = "activation"'),
    ],
)
def test_encodings_that_it_does_not_make(options, told, source):
    step = trial.made("quantize.gptq", engine="gptqmodel", embedding="f16", **options)
    with pytest.raises(RecipeError, match=told):
        step.preview(open_model(source))


@pytest.mark.skipif(importlib.util.find_spec("gptqmodel") is not None, reason="GPTQModel is installed")
def test_it_is_missed_at_plan_time(source):
    step = trial.made("quantize.gptq", engine="gptqmodel", encoding="int4_g32", embedding="f16")
    with pytest.raises(MissingExtra, match=r"pip install 'llmpack\[gptq\]'"):
        step.preview(open_model(source))
    assert json.loads(step.model_dump_json())["engine"] == "gptqmodel"
