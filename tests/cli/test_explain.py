"""What people see of scores and choices, and the heat map."""

import json
import xml.etree.ElementTree as ElementTree

import pytest
from small_recipe import RECIPE

from llmpack.cli.heatmap import Panel, heat_map

pytestmark = pytest.mark.xdist_group("pipeline-build")
HEAD, TAIL = RECIPE.split('[[step]]\nuse = "quantize.gptq"\nencoding = "iq4_nl"\n')
AUTO = '[[step]]\nuse = "quantize.auto"\ntarget = "4.1 MB"\ntokens = 256\n'
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def place(tmp_path_factory, packable):
    folder = tmp_path_factory.mktemp("explain")
    recipe = (HEAD + AUTO + TAIL).format(model=packable).replace('memory = "600 MiB"\n', "")
    (folder / "auto.toml").write_text(recipe)
    return folder


def test_plan_sensitivity_build_and_plan_again(llmpack, place):
    recipe = place / "auto.toml"
    code, out, _ = llmpack("plan", recipe)
    assert code == 0
    assert "still to be chosen: between" in out
    assert "predicted KL" not in out

    code, out, _ = llmpack("sensitivity", recipe, "--svg", place / "map.svg", "--top", 3)
    assert code == 0
    assert "not measured" in out
    assert "the 3 most sensitive matrices at iq4_nl:" in out
    assert "model.embed_tokens" in out
    cells = ElementTree.parse(place / "map.svg").getroot().iter(f"{SVG}rect")
    tips = [cell.find(f"{SVG}title").text for cell in cells if cell.find(f"{SVG}title") is not None]
    assert sum("attention.v, block 1: " in tip for tip in tips) == 2

    code, out, _ = llmpack("sensitivity", recipe, "--json", "--encoding", "q4_0")
    document = json.loads(out)
    assert code == 0
    assert document["predicted_by"].startswith("second-order model")
    assert len(document["tensors"]) == 15
    assert document["uniform"]["q4_0"] == pytest.approx(sum(t["predicted_kl"]["q4_0"] for t in document["tensors"]))

    code, out, _ = llmpack("plan", recipe)
    assert "still to be chosen" not in out
    assert "with 9.537 MiB more it would be" in out

    code, out, err = llmpack("build", recipe, "--out", place / "out")
    assert code == 0, err
    assert "predicted KL" in out
    manifest = json.loads((place / "out" / "tiny" / "manifest.json").read_text())
    (choice,) = manifest["observed"]["reports"]["choices"]
    assert choice["predicted_by"] == "second-order model, not measured"
    assert choice["model_bytes"] == manifest["made"]["artifact"]["bytes"] <= 4_100_000
    assert choice["more"]["predicted_kl"] <= choice["predicted_kl"]
    assert any("chosen by predicted KL" in note for note in manifest["observed"]["notes"])
    assert manifest["made"]["recipe"]["step"][0]["target"] == "4.1 MB"
    assert "chosen by predicted KL" in (place / "out" / "tiny" / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("auto.toml", "--encoding", "q4_k"), 2, "not every matrix"),
        (("auto.toml", "--text", "python:json"), 2, "a recipe says itself"),
        (("tiny-llama", "--set", "name=x"), 2, "--set changes a recipe"),
        (("nowhere", "--tokens", "512"), 6, "nowhere"),
        (("bad.toml",), 3, r"bad.toml"),
    ],
)
def test_what_cannot_be_scored_is_refused(arguments, code, message, llmpack, place):
    first = place / arguments[0] if arguments[0].endswith(".toml") else arguments[0]
    found, _, err = llmpack("sensitivity", first, *arguments[1:])
    assert found == code
    assert message in err


def test_a_source_needs_no_recipe(llmpack, packable):
    code, out, err = llmpack("sensitivity", packable, "--tokens", "1024", "--json")
    assert code == 0, err
    document = json.loads(out)
    assert document["tokens"] == 1024
    assert document["text"] == ["python:pydoc_data.topics"]


def test_a_heat_map_is_well_formed_and_equal_each_time():
    panel = Panel("a < b", ["x & y", "z"], ["0", "1", "2"], [[1e-6, None, 1e-2], [0.0, 3e-4, 1e-3]], "nats")
    text = heat_map("title", [panel, panel])
    assert text == heat_map("title", [panel, panel])
    root = ElementTree.fromstring(text)
    fills = [rect.get("fill") for rect in root.iter(f"{SVG}rect")]
    assert fills.count("#eeeeee") == 2
    assert "#440154" in fills  # the least
    assert "#fde725" in fills  # the most
    assert any(title.text == "x & y, block 2: 0.01 nats" for title in root.iter(f"{SVG}title"))
