"""The speed model: rates come back from timings that follow from them, and blank models are what they say."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from llmpack.checkpoint.gguf_file import GgufFile
from llmpack.errors import NumericalError
from llmpack.runtime.llama import LlamaRuntime
from llmpack.runtime.settings import RuntimeSettings
from llmpack.target import kernel_rates
from llmpack.target.blank_model import Shape, write_blank_model
from llmpack.target.device import AttentionRate, Kernel, device
from llmpack.target.estimate import estimate
from llmpack.target.kernel_rates import (
    CACHED,
    EMPTY,
    FETCHED,
    FIRST,
    GROWING,
    LONG,
    NARROW,
    SHORT,
    TIMED,
    WIDE,
    WRITTEN,
    Timing,
    Timings,
    heads_model,
    model_of,
    solve,
    time_kernels,
)
from llmpack.target.outline import Kept, Outline, Stored
from llmpack.target.probe import with_rates
from llmpack.target.speed_model import (
    Rates,
    decode_seconds,
    held_share,
    prefill_seconds,
    written_attention,
    written_pairs,
)

SMALL = Shape(hidden=64, ffn=128, blocks=2, heads=4, kv_heads=2, head_dim=32, vocab=256, context=512)
RATES = Rates(
    {
        "f16": Kernel.of(12e9, 10e9, 30e9, 200e9),
        "q8_0": Kernel.of(9e9, 12e9, 25e9, 150e9),
        "f32": Kernel.of(12e9, 12e9, 12e9, 100e9),
    },
    {"f16@64/4": AttentionRate.of(20e9, 60e9), "f16@128/4": AttentionRate.of(30e9, 80e9)},
    3e9,
    60e-6,
    1,
    1024.0,
)


def outline(*, tied=True, window=None, heads=4, head_rows=256):
    """One block of 1000 x 1000 in f16, a head of 500 x 1000 in q8_0."""
    tensors = [
        Stored("token_embd.weight", "embedding", (500, 1000), "q8_0", 531_250),
        Stored("blk.0.ffn_up.weight", "ffn.up", (1000, 1000), "f16", 2_000_000, 0),
        Stored("blk.0.attn_norm.weight", "norm", (1000,), "f32", 4000, 0),
    ]
    if not tied:
        tensors.append(Stored("output.weight", "output", (500, 1000), "f16", 1_000_000))
    return Outline("llama", True, tuple(tensors), 500, 1000, 1000, heads, head_rows, (Kept(256, window),), 4096)


def test_a_written_token_by_hand():
    rest = (8 * 1000 + 4 * 1000 + 4 * 256) / 3e9 + 60e-6
    part = (1 / 1000 - 1 / 2048) / (1 / 512 - 1 / 2048)  # of the way from rows of 2048 to rows of 512
    floats, rounded = (1 - part) / 12e9 + part / 10e9, (1 - part) / 9e9 + part / 12e9
    tied = 2e6 * floats + 531_250 * rounded
    seconds = decode_seconds(outline(), RuntimeSettings(), 100, RATES)
    assert seconds == pytest.approx(tied + 4 * 256 * 100 / 20e9 + rest)
    seconds = decode_seconds(outline(tied=False), RuntimeSettings(), 100, RATES)
    assert seconds == pytest.approx(3e6 * floats + 4 * 256 * 100 / 20e9 + rest)
    assert decode_seconds(outline(window=10), RuntimeSettings(), 100, RATES) == pytest.approx(
        tied + 4 * 256 * 10 / 20e9 + rest
    )


def test_a_read_prompt_by_hand():
    pairs = sum(min(position, 30) for position in range(1, 101))
    elements = 8 * 1000 + 4 * 1000 + 4 * 256
    part = (1 / 1000 - 1 / 2048) / (1 / 512 - 1 / 2048)
    head = 531_250 * ((1 - part) / 9e9 + part / 12e9)
    expected = 100 * 2e6 / 200e9 + head + 4 * 256 * pairs / 60e9 + 100 * elements / 3e9
    assert prefill_seconds(outline(window=30), RuntimeSettings(), 100, RATES) == pytest.approx(expected)


def test_between_two_widths_of_heads_attention_is_linear_and_beyond_them_its_rate_stays():
    narrow, wide = 4 * 64 / 20e9, 4 * 128 / 30e9
    assert RATES.pair_seconds("f16", 64, 4, prefill=False) == pytest.approx(narrow)
    assert RATES.pair_seconds("f16", 128, 1, prefill=False) == pytest.approx(wide)
    assert RATES.pair_seconds("f16", 80, 8, prefill=False) == pytest.approx(narrow + (wide - narrow) / 4)
    assert RATES.pair_seconds("f16", 256, 4, prefill=False) == pytest.approx(2 * wide)
    assert RATES.pair_seconds("f16", 32, 4, prefill=True) == pytest.approx(4 * 32 / 60e9)


def test_attention_is_linear_in_the_keys_of_each_query_head():
    alone = {"f16@64/1": AttentionRate.of(10e9, 60e9), **RATES.attention}
    rates = replace(RATES, attention=alone)
    shared, own = 4 * 64 / 20e9, 4 * 64 / 10e9
    for sharing, expected in ((1, own), (2, shared + (own - shared) / 3), (4, shared), (8, shared)):
        assert rates.pair_seconds("f16", 64, sharing, prefill=False) == pytest.approx(expected)
    assert rates.pair_seconds("f16", 128, 1, prefill=False) == RATES.pair_seconds("f16", 128, 1, prefill=False)
    for numbers, expected in ((512, own), (256, shared + (own - shared) / 3), (128, shared)):
        block = replace(outline(), kept=(Kept(numbers),))
        assert written_attention(block, "f16", 100, rates) == pytest.approx(4 * 100 * expected)


@pytest.mark.parametrize(
    ("kv", "heads", "seen", "threads", "pairs"),
    [
        ("q8_0", 9, 100, 1, 900),
        ("q8_0", 9, 100, 2, 1000),  # two heads at a time: 2, 2 and 1 for one thread, 2 and 2 for the other
        ("q8_0", 16, 100, 2, 1600),
        ("q8_0", 10, 100, 4, 1200),  # one at a time: 3 for two of four threads
        ("q8_0", 2, 100, 4, 400),  # two threads have nothing to do
        ("f16", 9, 200, 2, 2000),
        ("f16", 9, 512, 2, 9 * 512),
        ("f16", 9, 300, 2, 9 * 256 * 2),  # 512 places, of which the first thread has 256 and the other 44
        ("f16", 2, 1000, 4, 2 * 256 * 4),
    ],
)
def test_threads_wait_for_the_one_with_most_of_the_attention(kv, heads, seen, threads, pairs):
    assert written_pairs(kv, heads, seen, threads) == pairs


@pytest.mark.parametrize(
    ("change", "settings", "words"),
    [
        (lambda tensor: "q4_0", {}, "the kernels of q4_0 were not timed"),
        (lambda tensor: tensor.encoding, {"kv": "q8_0"}, "attention over a cache in q8_0 was not timed"),
        (lambda tensor: tensor.encoding, {"flash_attention": "off"}, "without flash attention"),
    ],
)
def test_what_was_not_timed_is_not_predicted(change, settings, words):
    shaped = outline() if change(outline().tensors[1]) == "f16" else blank(SMALL, "q4_0")
    assert words in RATES.lacks(shaped, RuntimeSettings(**settings))
    assert RATES.lacks(outline(), RuntimeSettings()) == ""
    one = replace(RATES, attention={"f16@64/4": RATES.attention["f16@64/4"]})
    assert one.lacks(outline(), RuntimeSettings()) == ""
    assert "attention over a cache in f16 was not timed" in one.lacks(outline(head_rows=512), RuntimeSettings())
    found = estimate(shaped, RuntimeSettings(**settings), with_rates(device("steam-deck"), RATES), 512)
    assert (found.decode, found.prefill) == (None, None)
    assert words in found.missing["decode"]
    assert words in found.missing["first_token"]


def blank(shape, encoding):
    """The outline of a blank model, from its shape alone."""
    sizes = {"f16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}
    tensors = []
    for name, sides in shape.tensors().items():
        count = sides[0] * (sides[1] if len(sides) > 1 else 1)
        kind = encoding if len(sides) > 1 else "f32"
        block = int(name.split(".")[1]) if name.startswith("blk") else None
        part = "embedding" if name.startswith("token") else "linear"
        tensors.append(Stored(name, part, sides, kind, int(count * sizes.get(kind, 4.0)), block))
    kept = tuple(Kept(2 * shape.kv_heads * shape.head_dim) for _ in range(shape.blocks))
    return Outline("llama", True, tuple(tensors), shape.vocab, shape.hidden, shape.ffn, shape.heads,
                   shape.heads * shape.head_dim, kept, shape.context)  # fmt: skip


def timed(shape, encoding, rates, kv="f16"):
    shaped, settings = blank(shape, encoding), RuntimeSettings(kv=kv)
    return Timing(
        shaped,
        {tokens: prefill_seconds(shaped, settings, tokens, rates) for tokens in (SHORT, LONG)},
        {after: decode_seconds(shaped, settings, after + WRITTEN // 2, rates) for after in (FIRST, LONG)},
    )


@pytest.mark.parametrize(("row", "part"), [(64, 1), (512, 1), (819.2, 0.5), (2048, 0), (5632, 0)])
def test_the_time_of_a_row_is_linear_in_its_length(row, part):
    kernel = RATES.kernels["f16"]
    assert kernel.decode_seconds(1e6, row) == pytest.approx(1e6 * ((1 - part) / 12e9 + part / 10e9))


def test_models_are_as_heavy_as_they_are_said_to_be():
    for shape, name, nbytes, blocks in (
        (WIDE, "f16", FETCHED, 16), (WIDE, "q4_0", FETCHED, 17), (NARROW, "f16", CACHED, 4),
        (NARROW, "q4_0", CACHED, 10), (NARROW, "f16", FETCHED, 70), (NARROW, "q8_0", FETCHED, 131),
    ):  # fmt: skip
        assert model_of(shape, name, nbytes) == replace(shape, blocks=blocks)
        assert blank(model_of(shape, name, nbytes), name).nbytes > nbytes
    assert max(model_of(NARROW, name, FETCHED).blocks for name in TIMED) <= 512  # llama.cpp knows no more


@pytest.mark.parametrize(("touched", "cache"), [(300, 400), (500, 400), (800, 400), (2000, 400)])
def test_a_cache_holds_what_one_that_gives_up_by_chance_holds(touched, cache):
    """Pieces are read in turn; one that is not held takes the place of any."""
    random = np.random.default_rng(0)
    places, held = np.full(cache, -1), np.zeros(touched, bool)
    hits = 0
    for turn in range(60):
        for piece in range(touched):
            hits += held[piece] and turn >= 30
            if not held[piece]:
                free = np.flatnonzero(places < 0)
                place = free[0] if len(free) else random.integers(cache)
                held[places[place]] &= places[place] < 0
                places[place], held[piece] = piece, True
    assert hits / (30 * touched) == pytest.approx(held_share(touched, cache), abs=0.02)


def test_weights_that_a_cache_holds_are_read_faster_and_the_kv_cache_takes_its_share():
    rates = replace(RATES, cache=2e6)
    plain, settings = outline(), RuntimeSettings()
    part = (1 / 1000 - 1 / 2048) / (1 / 512 - 1 / 2048)
    floats, rounded = (1 - part) / 12e9 + part / 10e9, (1 - part) / 9e9 + part / 12e9
    for context in (256, 4096):
        held = held_share(2_531_250 + 512 * context, 2e6)
        assert 0 < held < 1
        saved = held * (2e6 * (floats - 1 / 30e9) + 531_250 * (rounded - 1 / 25e9))
        seconds = decode_seconds(plain, settings, context, RATES) - decode_seconds(plain, settings, context, rates)
        assert seconds == pytest.approx(saved)
    assert held_share(10, 0) == 0
    assert held_share(10, 10) == 1


def attention_rates(of_f16, of_q8_0):
    return {
        f"{kv}@{width}/{sharing}": AttentionRate.of(rate * width * (1 + sharing) / 64, (2 + sharing) * rate)
        for kv, rate in (("f16", of_f16), ("q8_0", of_q8_0))
        for width in (64, 128)
        for sharing in (1, 4)
    }


def head_timings(rates):
    return {
        f"{kv}@{width}/{sharing}": timed(heads_model(width, sharing), "f16", rates, kv)
        for kv, width, sharing in product(("f16", "q8_0"), (64, 128), (1, 4))
    }


def timings(rates, heads, names):
    long_rows, short_rows, cached = (
        {name: timed(model_of(shape, name, nbytes), name, rates) for name in names}
        for shape, nbytes in ((WIDE, FETCHED), (NARROW, FETCHED), (NARROW, CACHED))
    )
    growing = [timed(replace(NARROW, blocks=blocks), "f16", rates) for blocks in GROWING]
    return Timings(long_rows, short_rows, cached, growing, timed(EMPTY, "f16", rates), heads)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_rates_of_attention_come_back_where_no_cache_holds_weights(threads):
    truth = replace(RATES, attention=attention_rates(20e9, 12e9), threads=threads)
    heads = head_timings(truth)
    assert heads.keys() == truth.attention.keys()
    found = solve(timings(replace(truth, cache=60e6), heads, ("f16",)), threads)
    for name, rate in truth.attention.items():
        assert found.attention[name].decode == pytest.approx(rate.decode, rel=0.01)
        assert found.attention[name].prefill == pytest.approx(rate.prefill, rel=0.01)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_rates_come_back_from_the_timings_that_they_give(threads):
    truth = Rates(
        {
            "f16": Kernel.of(12e9, 10e9, 30e9, 200e9),
            "q8_0": Kernel.of(9e9, 12e9, 25e9, 150e9),
            "f32": Kernel.of(12e9, 12e9, 12e9, 100e9),
        },
        attention_rates(3e9, 2e9),
        3e9,
        60e-6,
        threads,
        60e6,
    )
    heads = head_timings(truth)
    found = solve(timings(truth, heads, ("f16", "q8_0")), threads)
    assert found.cache == pytest.approx(truth.cache, rel=0.05)
    for name in ("f16", "q8_0"):
        assert found.kernels[name].decode == pytest.approx(truth.kernels[name].decode, rel=0.03)
        assert found.kernels[name].cached == pytest.approx(truth.kernels[name].cached, rel=0.03)
        assert found.kernels[name].short == pytest.approx(truth.kernels[name].short, rel=0.03)
        assert found.kernels[name].prefill == pytest.approx(truth.kernels[name].prefill, rel=0.03)
    for name, rate in truth.attention.items():  # that the keys drive the few weights out of the cache is not told apart
        assert found.attention[name].decode == pytest.approx(rate.decode, rel=0.05)
        assert found.attention[name].prefill == pytest.approx(rate.prefill, rel=0.01)
    assert found.elementwise == pytest.approx(truth.elementwise, rel=0.05)
    assert found.overhead == pytest.approx(truth.overhead, rel=0.01)
    profile = with_rates(device("steam-deck"), found)
    assert Rates.of(profile).overhead == pytest.approx(found.overhead, rel=1e-4)
    other = blank(SMALL, "q8_0")
    predicted = estimate(other, RuntimeSettings(), profile, 512)
    assert predicted.decode.value == pytest.approx(1 / decode_seconds(other, RuntimeSettings(), 512, truth), rel=0.5)
    assert predicted.first_token.value == pytest.approx(512 / predicted.prefill.value)


def test_every_kernel_that_is_asked_for_is_timed(monkeypatch):
    """In the runtime, on small models; what follows from such timings is tested above."""
    small = replace(SMALL, context=1024)
    shapes = {"WIDE": replace(small, hidden=256, ffn=256), "NARROW": small, "EMPTY": replace(small, blocks=1)}
    for name, shape in shapes.items():
        monkeypatch.setattr(kernel_rates, name, shape)
    for name, value in (("FETCHED", 1), ("CACHED", 1), ("GROWING", (3,)), ("solve", lambda *found: found)):
        monkeypatch.setattr(kernel_rates, name, value)
    monkeypatch.setattr(kernel_rates, "heads_model", lambda width, sharing: replace(
        SMALL, head_dim=width, kv_heads=SMALL.heads // sharing, context=LONG + 256))  # fmt: skip
    found, threads = time_kernels(1, ("q8_0",), ("f16@64/4", "q4_0@32/1"), "mmap")
    assert (list(found.heads), threads) == (["f16@64/4", "q4_0@32/1"], 1)
    for those, hidden in ((found.long_rows, 256), (found.short_rows, 64), (found.cached, 64)):
        assert [(name, t.outline.tensors[0].encoding, t.outline.hidden) for name, t in those.items()] == [
            ("f16", "f16", hidden), ("q8_0", "q8_0", hidden)]  # fmt: skip
    assert [timing.outline.blocks for timing in (found.empty, *found.growing)] == [1, 3]
    assert [timing.outline.kept[0].numbers for timing in found.heads.values()] == [2 * 64, 2 * 4 * 32]
    for timing in (*found.long_rows.values(), found.short_rows["f16"]):
        assert (timing.read.keys(), timing.written.keys()) == ({SHORT}, {FIRST})
    for timing in found.heads.values():
        assert (timing.read.keys(), timing.written.keys()) == ({SHORT, LONG}, {FIRST, LONG})
        assert timing.read[LONG] > timing.read[SHORT] > 0


def faster(timing, times):
    return replace(timing, written={after: seconds / times for after, seconds in timing.written.items()})


def test_timings_that_contradict_each_other_are_refused():
    heads = {f"f16@{width}/4": timed(heads_model(width, 4), "f16", RATES) for width in (64, 128)}
    given = timings(replace(RATES, cache=60e6), heads, ("f16",))
    with pytest.raises(NumericalError, match="a block contradict each other; probe again"):
        solve(replace(given, empty=faster(given.empty, 1e3)), 1)


@pytest.mark.parametrize("encoding", ["f16", "q8_0", "q4_0"])
def test_a_blank_model_runs_and_weighs_what_its_shape_says(tmp_path, encoding):
    path = write_blank_model(tmp_path / "blank.gguf", SMALL, encoding)
    read, expected = Outline.of_gguf(GgufFile.open(path)), blank(SMALL, encoding)
    assert (read.nbytes, read.kept, read.head_rows) == (expected.nbytes, expected.kept, expected.head_rows)
    with LlamaRuntime() as runtime:
        runtime.open(path, RuntimeSettings(threads=1), 128)
        assert runtime.time_prefill([1] * 64) > 0
        assert len(runtime.time_decode([2] * 3)) == 3


def test_rows_that_no_block_divides_are_refused(tmp_path):
    with pytest.raises(ValueError, match="rows of 64 are not a multiple of the 256 numbers"):
        write_blank_model(tmp_path / "x.gguf", SMALL, "q4_k")
