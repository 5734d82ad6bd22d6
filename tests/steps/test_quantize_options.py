"""Options of quantizing steps and the graph that they promise."""

import json
import subprocess
import sys

import pytest
from pydantic import ValidationError

from llmpack.encodings import ENCODINGS
from llmpack.errors import RecipeError
from llmpack.models import family_of
from llmpack.models.selection import Selection
from llmpack.steps import STEPS
from llmpack.steps.quantize import Quantize
from llmpack.steps.quantize_gptq import QuantizeGptq
from llmpack.steps.quantize_llamacpp import QuantizeLlamacpp
from llmpack.steps.quantize_rtn import QuantizeRtn
from tests.conftest import TINY

STEP_CLASSES = [QuantizeRtn, QuantizeGptq, QuantizeLlamacpp]


def graph_of(encodings=None, **config):
    settings = {**TINY, **config}
    return family_of(settings).graph(settings, encodings)


def step(kind=QuantizeGptq, **options):
    name = next(name for name, entry in STEPS.items() if entry is kind)
    return kind.model_validate_json(json.dumps({"use": name, **options}))


def problems_of(options, kind=QuantizeGptq, graph=None):
    with pytest.raises(RecipeError) as caught:
        step(kind, **options).preview(graph or graph_of())
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize("kind", STEP_CLASSES)
def test_defaults(kind):
    graph = step(kind).preview(graph_of())
    for spec in graph.tensors:
        wanted = "iq4_nl" if spec.is_linear else "q8_0" if spec.part == "embedding" else "f32"
        assert spec.encoding == wanted, spec.name


def test_a_head_of_its_own_follows_the_embedding_unless_told():
    graph = graph_of(tie_word_embeddings=False)
    assert step().preview(graph)["lm_head.weight"].encoding == "q8_0"
    assert step(output="q4_0").preview(graph)["lm_head.weight"].encoding == "q4_0"
    assert step(embedding="f16").preview(graph)["lm_head.weight"].encoding == "f16"


def test_exceptions_by_part_and_by_block_and_the_narrower_wins():
    options = {"exceptions": {"ffn.down@0,2-3": "q8_0", "ffn.down": "q4_0", "attention.v@1": "f16"}}
    graph = step(**options).preview(graph_of(num_hidden_layers=5))
    down = [graph[f"model.layers.{i}.mlp.down_proj.weight"].encoding for i in range(5)]
    assert down == ["q8_0", "q4_0", "q8_0", "q8_0", "q4_0"]
    values = [graph[f"model.layers.{i}.self_attn.v_proj.weight"].encoding for i in range(5)]
    assert values == ["iq4_nl", "f16", "iq4_nl", "iq4_nl", "iq4_nl"]


def test_norms_and_biases_stay():
    graph = graph_of(attention_bias=True, torch_dtype="bfloat16")
    after = step().preview(graph)
    assert {spec.part for spec in after.tensors if spec.encoding == "bf16"} == {"norm", "bias"}


@pytest.mark.parametrize(
    ("text", "part", "blocks"),
    [
        ("ffn.down", "ffn.down", ()),
        ("ffn.down@4", "ffn.down", ((4, 4),)),
        ("attention.v@0-3, 29", "attention.v", ((0, 3), (29, 29))),
    ],
)
def test_selections(text, part, blocks):
    selection = Selection.parse(text)
    assert (selection.part, selection.blocks) == (part, blocks)


@pytest.mark.parametrize("text", ["ffn.down@", "ffn.down@a", "ffn.down@3-1", "ffn.down@-1", "ffn.down@1;2"])
def test_a_selection_that_cannot_be_read_is_a_validation_error(text):
    with pytest.raises(ValidationError, match=r"ffn\.down"):
        step(exceptions={text: "q8_0"})


@pytest.mark.parametrize(
    "options",
    [{"encoding": "q4_2"}, {"embedding": "q9"}, {"exceptions": {"ffn.up": "iq4nl"}}, {"damping": -1}, {"dampng": 0.1}],
)
def test_wrong_options_are_validation_errors(options):
    with pytest.raises(ValidationError):
        step(**options)


def test_an_unknown_encoding_is_answered_with_the_nearest():
    with pytest.raises(ValidationError, match="did you mean `iq4_nl`"):
        step(encoding="iq4nl")


def test_rows_that_do_not_divide_name_tensors_and_cure():
    (problem,) = problems_of({"embedding": "f16"}, graph=graph_of(intermediate_size=144))
    assert "model.layers.0.mlp.down_proj.weight, model.layers.1.mlp.down_proj.weight" in problem
    assert "rows of 144 are not a multiple of iq4_nl's block of 32" in problem
    assert "ffn.down" in problem
    assert "prune.width" in problem


@pytest.mark.skipif("q6_k" not in ENCODINGS, reason="needs an encoding with blocks of 256")
def test_the_cure_names_encodings_that_fit():
    (problem,) = problems_of({"exceptions": {"attention.v": "q6_k"}})
    assert "q8_0" in problem
    assert "iq4_nl" in problem


def test_all_problems_at_once():
    options = {
        "encoding": "q4_0",
        "exceptions": {
            "atention.v": "q8_0",
            "embedding": "q4_0",
            "ffn.up@7": "q8_0",
            "ffn.gate@0-1": "q8_0",
            "ffn.gate@1": "f16",
        },
    }
    text = problems_of(options, graph=graph_of(intermediate_size=80))
    assert any("did you mean `attention.v`" in line for line in text)
    assert any("embedding = " in line for line in text)
    assert any("block 7 does not exist; the model has blocks 0-1" in line for line in text)
    assert any("model.layers.1.mlp.gate_proj.weight is q8_0 by" in line for line in text)
    assert any("rows of 80" in line for line in text)


def test_nothing_is_rounded_twice():
    once = step().preview(graph_of())
    (problem, *_) = problems_of({}, graph=once)
    assert "already" in problem
    assert "requantize = true" in problem


def test_a_step_that_is_told_rounds_twice_and_counts_what():
    once = step(encoding="int3_g32").preview(graph_of())
    again = step(encoding="q4_0", exceptions={"attention.v": "f16"}, requantize=True)
    twice = again.preview(once)
    linear = [spec for spec in twice.tensors if spec.is_linear]
    assert {spec.encoding for spec in linear} == {"q4_0", "f16"}
    count = sum(spec.encoding == "q4_0" for spec in linear)
    assert again.rounded_again(once) == {("int3_g32", "q4_0"): count}  # the embedding stays as it is, in q8_0
    assert not again.rounded_again(graph_of())


def test_gptqmodel_does_not_round_twice():
    with pytest.raises(ValidationError, match="GPTQModel has no requantize"):
        step(engine="gptqmodel", encoding="int4_g32", requantize=True)


def test_llamacpp_rounds_to_types_of_gguf_only():
    foreign = [name for name, kind in ENCODINGS.items() if kind.ggml_type is None]
    for name in foreign:
        assert "llama.cpp has no type" in problems_of({"encoding": name}, QuantizeLlamacpp)[0]


def test_text_is_needed_only_to_weigh():
    assert step(QuantizeGptq).needs_corpus
    for kind in (QuantizeRtn, QuantizeLlamacpp):
        assert step(kind).needs_corpus
        assert not step(kind, importance=False).needs_corpus


def test_every_step_file_is_in_the_table_and_described():
    for name, kind in STEPS.items():
        if issubclass(kind, Quantize):
            assert kind.__doc__
            assert kind.version >= 1
            for option, info in kind.model_json_schema()["properties"].items():
                assert info.get("description") or option == "use", f"{name}: {option} has no description"


def test_preview_needs_no_torch():
    code = (
        "import sys, json\n"
        "from llmpack.steps import STEPS\n"
        "from llmpack.models import family_of\n"
        f"config = json.loads({json.dumps(json.dumps(dict(TINY)))})\n"
        "asked = {'prune.depth': {'drop': 1}, 'prune.width': {'ffn': 0.25, 'multiple_of': 32}}\n"
        "for name, kind in STEPS.items():\n"
        "    step = kind.model_validate_json(json.dumps({'use': name, **asked.get(name, {})}))\n"
        "    step.preview(family_of(config).graph(config)).nbytes\n"
        "assert not {'torch', 'transformers', 'llama_cpp'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
