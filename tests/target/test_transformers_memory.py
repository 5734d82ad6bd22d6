"""The memory of transformers as estimated, against what a process really takes; shapes that nothing was fitted on."""

from dataclasses import replace

import pytest

from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.formats.facts import Facts
from llmpack.formats.layout_bnb import BnbNf4
from llmpack.formats.layout_plain import Plain
from llmpack.formats.safetensors_folder import SafetensorsFormat
from llmpack.models import family_of, open_model
from llmpack.pipeline.model_folder import ModelFolder
from llmpack.runtime.settings import RuntimeSettings
from llmpack.runtime.transformers_runtime import TransformersRuntime
from llmpack.target.outline import Loader, Outline
from llmpack.target.transformers_memory import ERROR, PROGRAMS_ERROR, loader_of, memory
from tests.conftest import TINY

SHAPE = {"hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 5, "num_attention_heads": 12}
SHAPE |= {"head_dim": 64, "max_position_embeddings": 4096}


@pytest.mark.parametrize(
    ("layout", "kv_heads", "context"),
    [(Plain("f32"), 4, 1536), (Plain("bf16"), 12, 1024), (BnbNf4("f32"), 4, 1536)],
    ids=["f32", "bf16, a key for every head", "nf4"],
)
def test_the_estimate_is_near_what_is_taken(layout, kv_heads, context, checkpoint_factory, tmp_path):
    """What a model adds, to a process that had next to nothing of one before: its libraries are as the system has
    them, which is another thing on another day."""
    large = Checkpoint.open(checkpoint_factory(**SHAPE, num_key_value_heads=kv_heads))
    small = Checkpoint.open(checkpoint_factory())
    folder, settings = written(large, layout, tmp_path / "large"), RuntimeSettings(threads=1)
    found = memory(ModelFolder.found(folder).outline, settings, context)
    with TransformersRuntime() as runtime:
        programs = peak(runtime, written(small, layout, tmp_path / "small"), settings, 64)
        whole = peak(runtime, folder, settings, context)
    expected = next(term.nbytes for term in found.terms if term.name == "programs")
    assert programs == pytest.approx(expected, rel=PROGRAMS_ERROR)
    assert whole - programs == pytest.approx(found.total.value - expected, abs=ERROR * whole), found.to_json()
    assert sum(term.nbytes for term in found.terms) == found.total.value == found.hard
    assert found.total.low < whole < found.total.high
    assert found.advice == ()


def written(checkpoint, layout, folder):
    form = SafetensorsFormat(layout)
    folder.mkdir()
    form.write(checkpoint, form.encode_graph(open_model(checkpoint)), folder, Facts("tiny", ()))
    return folder


def peak(runtime, folder, settings, context):
    """Of the process so far, when a prompt of the whole context was read and some tokens were written."""
    runtime.open(folder, settings, context)
    runtime.time_prefill([(7 * i) % 500 for i in range(context - 16)])
    runtime.time_decode([5] * 8)
    return runtime.memory().peak


def outline_of(kernel, floats=2, **config):
    settings = {**TINY, **SHAPE, "num_key_value_heads": 4, **config}
    outline = Outline.of_graph(family_of(settings).graph(settings))
    return outline.in_transformers(Loader(kernel, floats, 10 << 20))


def terms(outline, context=1024):
    return {term.name: term.nbytes for term in memory(outline, RuntimeSettings(), context).terms}


def test_the_terms():
    linear, largest = 5 * (2 * 768 * 768 + 2 * 256 * 768 + 3 * 2304 * 768), 2304 * 768
    plain = terms(outline_of("floats"))
    assert plain["weights"] == 10 << 20
    assert plain["KV cache"] == 5 * 512 * 1024 * 2
    assert terms(outline_of("floats", 4))["KV cache"] == 2 * plain["KV cache"]
    assert not {"repacked weights", "unpacked matrix"} & plain.keys()
    assert terms(outline_of("bitsandbytes"))["repacked weights"] == linear // 2
    assert terms(outline_of("bitsandbytes", 4))["unpacked matrix"] == 3 * 4 * largest
    assert terms(outline_of("gptq"))["unpacked matrix"] == 40 * largest
    assert terms(outline_of("gptq-int4"))["repacked weights"] == int(2.5 * linear)
    assert memory(outline_of("awq"), RuntimeSettings(), 64) is None


def test_the_matrix_of_all_scores_is_not_estimated():
    outline = outline_of("floats")
    assert memory(outline, RuntimeSettings(), 64) is not None
    assert memory(replace(outline, architecture="gemma2"), RuntimeSettings(), 64) is None


@pytest.mark.parametrize(
    ("told", "kernel"),
    [
        (None, "floats"),
        ({"quant_method": "gptq", "bits": 4}, "gptq-int4"),
        ({"quant_method": "gptq", "bits": 8}, "gptq-int8"),
        ({"quant_method": "gptq", "bits": 3}, "gptq"),
        ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes-int8"),
        ({"quant_method": "awq"}, "awq"),
    ],
)
def test_which_kernel_runs_a_folder(told, kernel):
    config = {"torch_dtype": "float16"} | ({"quantization_config": told} if told else {})
    assert loader_of(config, 5) == Loader(kernel, 2, 5)
    assert loader_of({**config, "torch_dtype": "float32"}, 5).floats == 4
