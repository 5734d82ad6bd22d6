"""Recipes: what is read, what is refused, and how it is said."""

import json
from pathlib import Path

import jsonschema
import pytest

from llmpack.calibration.text import read_texts
from llmpack.errors import RecipeError
from llmpack.pipeline.recipe import read_recipe, validate
from llmpack.pipeline.schema import recipe_schema, schema_text
from llmpack.pipeline.toml_positions import parse_toml
from llmpack.steps import STEPS

RECIPES = Path(__file__).parents[2] / "recipes"
GOOD = """\
schema = 1
name = "tiny"
[source]
model = "tiny"
[calibration]
text = ["python:pydoc_data.topics"]
tokens = 1024
length = 64
[[step]]
use = "quantize.rtn"
encoding = "iq4_nl"
[evaluation]
text = ["python:statistics"]
[budget]
memory = "400 MiB"
decode = "8 tok/s"
quality = { kl = 0.1 }
"""


def problems(text, *overrides):
    with pytest.raises(RecipeError) as caught:
        validate(parse_toml(text.encode(), "r.toml").with_overrides(overrides))
    return [str(problem) for problem in caught.value.problems]


def test_a_recipe_becomes_frozen_values_with_defaults():
    recipe = validate(parse_toml(GOOD.encode(), "r.toml"))
    assert recipe.budget.memory == 400 * 2**20
    assert recipe.budget.decode == 8.0
    assert recipe.step[0].use == "quantize.rtn"
    assert recipe.step[0].encoding == "iq4_nl"
    assert recipe.target.device == "host"
    assert recipe.calibration.text == ("python:pydoc_data.topics",)
    with pytest.raises(ValueError, match="frozen"):
        recipe.name = "other"


def test_options_are_json_with_every_default_and_read_back_as_the_same_recipe():
    recipe = validate(parse_toml(GOOD.encode(), "r.toml"))
    options = json.loads(json.dumps(recipe.options()))
    assert options["schema"] == 1
    assert options["step"][0]["embedding"] == "q8_0"
    body = {key: value for key, value in options.items() if key != "step"}
    again = type(recipe).model_validate_json(json.dumps(body))
    steps = [STEPS.load(step["use"]).model_validate_json(json.dumps(step)) for step in options["step"]]
    assert again.model_copy(update={"step": tuple(steps)}) == recipe


def test_every_problem_is_told_at_once_where_it_is():
    text = """\
schema = 1
nmae = "x"
[source]
model = 3
[calibration]
text = "python:this"
tokens = 1.5
[[step]]
use = "quantize.gtpq"
[[step]]
use = "quantize.rtn"
encodng = "q4_0"
embedding = "q8"
[runtime]
kv = "q8"
[budget]
memory = "2G"
context = "2k"
quality = { kl = -1.0 }
"""
    found = problems(text)
    expected = [
        "r.toml:9:7 step.0.use: unknown step `quantize.gtpq`; did you mean `quantize.gptq`?",
        "r.toml:12:1 step.1.encodng: unknown key `encodng`; did you mean `encoding`?",
        "r.toml:13:13 step.1.embedding: unknown encoding `q8`",
        "r.toml:2:1 nmae: unknown key `nmae`; did you mean `name`?",
        "r.toml name: is missing",
        "r.toml:4:9 source.model: expected text in quotes, got 3",
        'r.toml:6:8 calibration.text: expected an array, got "python:this"',
        "r.toml:7:10 calibration.tokens: expected a whole number, got 1.5",
        'r.toml:15:6 runtime.kv: "q8" is not known here; did you mean `q8_0`?',
        "r.toml:17:10 budget.memory: '2G': G is not a unit of size; did you mean GB or GiB?",
        'r.toml:18:11 budget.context: expected a whole number, got "2k"',
        "r.toml:19:18 budget.quality.kl: input should be greater than 0, got -1.0",
    ]
    for line in expected:
        assert any(line in problem for problem in found), (line, found)
    assert len(found) == len(expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("schema=2", "--set schema: 2 is not known here"),
        ("name=../x", "--set name: "),
        ("name=", "--set name: "),
        ("source.dequantize=1", "--set source.dequantize: expected true or false, got 1"),
        ("source.dtype=f8", '--set source.dtype: "f8" is not known here; known: bf16, f16, f32'),
        ("calibration.tokens=0", "--set calibration.tokens: input should be greater than or equal to 1, got 0"),
        ("calibration.tokens=true", "--set calibration.tokens: expected a whole number, got true"),
        ("calibration.length=2048", "calibration.tokens: 1024 tokens are less than one sequence of 2048"),
        ("calibration.text=[]", "--set calibration.text: "),
        ('evaluation.text=["python:pydoc_data.topics"]', "python:pydoc_data.topics is calibration text too"),
        ("budget.memory=8 gigs", "--set budget.memory: '8 gigs': gigs is not a unit of size"),
        ("budget.memory=1000", "--set budget.memory: 1000 has no unit"),
        ("budget.memory=-1 MiB", "--set budget.memory: '-1 MiB' is not a size"),
        ("budget.decode=-3 tok/s", "--set budget.decode: '-3 tok/s' is not a rate"),
        ("budget.decode=nan", "--set budget.decode: nan is not a finite number"),
        ("budget.quality={kl=0.1, kll=2}", "budget.quality.kll: unknown key `kll`; did you mean `kl`?"),
        ("target.accept=maybe", '--set target.accept: "maybe" is not known here'),
        ("build.threads=0", "--set build.threads: input should be greater than or equal to 1, got 0"),
        ("step.0.use=1", "step.0.use: every step says what it does: use = one of "),
        ("step=3", "--set step: steps are an array of tables"),
        ("bundle.format=zip", '--set bundle.format: "zip" is not known here'),
        ("runtime.ubatch=1024", "runtime: ubatch (1024) is larger than batch (512)"),
        ('step.0.exceptions={"ffn.down"=3}', 'step.0.exceptions."ffn.down": expected text in quotes, got 3'),
        ('step.0.exceptions={"ffn.down@x"="q8_0"}', "`ffn.down@x` is no selection"),
    ],
)
def test_wrong_values_are_named(change, message):
    found = problems(GOOD, change)
    assert len(found) == 1
    assert message in found[0]


def test_a_step_that_learns_needs_text():
    text = GOOD.replace("[calibration]", "[x]").partition("[x]")[0] + "[[step]]\nuse = 'quantize.rtn'\n"
    assert problems(text) == [
        "r.toml:6:7 step.0.use: quantize.rtn needs text to learn from; add a [calibration] section"
    ]


def test_missing_things_say_what_they_are():
    found = problems("schema = 1\nname = 'x'\n[source]\n")
    assert found[0].startswith("r.toml:3:2 source.model: is missing; A folder, `gguf:FILE`")


def test_the_checked_in_schema_is_current():
    assert (RECIPES / "recipe.schema.json").read_text() == schema_text(), (
        "run: llmpack schema > recipes/recipe.schema.json"
    )


def test_the_schema_is_good_for_editors_of_draft_4_and_draft_7():
    for validator in (jsonschema.Draft4Validator, jsonschema.Draft7Validator):
        validator.check_schema(recipe_schema())


SHIPPED = sorted(RECIPES.rglob("*.toml"))


def test_recipes_are_found():
    assert len(SHIPPED) >= 1


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_recipes_are_read_and_accepted_by_the_schema(path):
    recipe, document = read_recipe(path)
    assert recipe.name == path.stem
    assert document.text.startswith("#:schema recipe.schema.json\n")
    jsonschema.Draft7Validator(recipe_schema()).validate(document.values)
    texts = [source for part in (recipe.calibration, recipe.evaluation) if part for source in part.text]
    assert read_texts(texts, path.parent, offline=True)


@pytest.mark.parametrize("change", ["nmae=3", "step.0.use=quantize.gtpq", "step.0.encodng=q4_0", "budget.memory=2G"])
def test_the_schema_refuses_what_reading_refuses(change):
    document = parse_toml(GOOD.encode(), "r.toml").with_overrides([change])
    assert not jsonschema.Draft7Validator(recipe_schema()).is_valid(document.values)
    problems(GOOD, change)
