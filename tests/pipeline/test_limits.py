"""Limits of a target against the estimates that they are taken from."""

from dataclasses import replace

import pytest
from tiny_config import TINY

from llmpack.errors import RecipeError
from llmpack.formats.gguf import GgufFormat
from llmpack.models import family_of
from llmpack.pipeline.limits import Limit, Setting, limits_of
from llmpack.runtime.settings import RuntimeSettings
from llmpack.steps.quantize_auto import Target
from llmpack.target.budget import Budget
from llmpack.target.device import AttentionRate, Kernel, device
from llmpack.target.estimate import estimate
from llmpack.target.outline import Outline
from llmpack.target.probe import with_rates
from llmpack.target.speed_model import Rates, decode_seconds

RATES = Rates(
    {"f16": Kernel.of(12e9, 10e9, 30e9, 200e9), "q8_0": Kernel.of(9e9, 12e9, 25e9, 150e9),
     "q4_0": Kernel.of(7e9, 8e9, 20e9, 90e9), "f32": Kernel.of(12e9, 12e9, 12e9, 100e9)},
    {"f16@64/4": AttentionRate.of(20e9, 60e9), "f16@128/4": AttentionRate.of(30e9, 80e9)},
    3e9,
    60e-6,
    1,
    1024.0,
)  # fmt: skip
FILE = Limit("model file", 0, 0, lambda spec: spec.nbytes)
FORMAT = GgufFormat("f16")


def setting(budget, *devices):
    values = {"context": 128, **budget}
    return Setting(Budget.model_validate(values), RuntimeSettings(), devices, FORMAT, lambda graph: 0, 0)


def graph_of(choose, **config):
    graph = family_of({**TINY, **config}).graph({**TINY, **config})
    chosen = {
        s.name: choose(at) for at, s in enumerate(graph.tensors) if s.is_linear or s.part in ("embedding", "output")
    }
    made = graph.with_encodings(lambda spec: chosen.get(spec.name, spec.encoding))
    return made, [made[name] for name in chosen]


LOWER = ("q4_0", "iq4_nl")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("lowest", LOWER)
def test_what_a_mix_uses_is_what_the_estimate_says(tied, lowest):
    """Of memory and of time per token, on a device whose kernels were timed, whatever the limits were taken from."""
    board = with_rates(device("raspberry-pi-5-8gb"), RATES)
    lower, least = graph_of(lambda at: lowest, tie_word_embeddings=tied)
    place = setting({"memory": "1 GiB", "decode": "10 tok/s"}, board)
    memory, decode = limits_of(Target("budget"), place, lower, least, FILE)
    mix, chosen = graph_of(lambda at: ("q8_0", "q4_0", "f16")[at % 3], tie_word_embeddings=tied)
    outline = Outline.of_graph(FORMAT.encode_graph(mix))
    found = estimate(outline, place.runtime, board, 128)
    assert memory.used(chosen) == pytest.approx(found.memory.total.value, abs=2)
    assert memory.bound == pytest.approx(2**30 * found.memory.total.value / found.memory.total.high)
    seconds = decode_seconds(outline, place.runtime, 128, RATES)
    assert decode.unit == "picoseconds"
    assert decode.used(chosen) == pytest.approx(1e12 * seconds, abs=100)
    assert decode.bound == 1e11


def test_an_encoding_whose_kernel_was_not_timed_fits_no_time():
    board = with_rates(device("raspberry-pi-5-8gb"), RATES)
    lower, least = graph_of(lambda at: "q4_0")
    (decode,) = limits_of(Target("budget"), setting({"decode": "10 tok/s"}, board), lower, least, FILE)
    assert decode.cost(replace(least[1], encoding="q5_1")) > decode.bound


def test_without_timed_kernels_decoding_is_limited_by_bytes():
    board = device("raspberry-pi-5-8gb")
    lower, least = graph_of(lambda at: "q4_0")
    place = setting({"decode": "3000 tok/s"}, board)
    (decode,) = limits_of(Target("budget"), place, lower, least, FILE)
    assert decode.unit == "bytes"
    at_limit = decode.bound - decode.used(least)
    speed = estimate(Outline.of_graph(FORMAT.encode_graph(lower)), place.runtime, board, 128).decode.value
    assert (at_limit > 0) == (speed > 3000)


def test_every_device_sets_its_limits():
    boards = (device("raspberry-pi-5-8gb"), device("raspberry-pi-4-4gb"))
    lower, least = graph_of(lambda at: "q4_0")
    limits = limits_of(Target("budget"), setting({"memory": "1 GiB"}, *boards), lower, least, FILE)
    assert [limit.words for limit in limits] == [f"budget.memory on {board.name}" for board in boards]


def test_bits_count_every_tensor():
    lower, least = graph_of(lambda at: "q4_0")
    (limit,) = limits_of(Target("bits", 5.0), setting({}, device("raspberry-pi-5-8gb")), lower, least, FILE)
    file = FORMAT.encode_graph(lower)
    assert limit.used(least) == file.nbytes
    assert limit.bound == int(5.0 * file.parameters / 8)


def test_a_budget_without_limits_is_refused():
    lower, least = graph_of(lambda at: "q4_0")
    with pytest.raises(RecipeError, match="set disk, memory or decode"):
        limits_of(Target("budget"), setting({}, device("raspberry-pi-5-8gb")), lower, least, FILE)
