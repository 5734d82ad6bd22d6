"""A measurement of a real file: what it records, and what makes it no evidence."""

import json
import sys
from dataclasses import replace

import pytest
from tiny_gguf import CONTEXT, write_tiny_gguf

from llmpack.digest import sha256_file
from llmpack.errors import RuntimeFailed
from llmpack.runtime.settings import RuntimeSettings
from llmpack.target.budget import Budget, judge
from llmpack.target.measure import NOISY_CV, Measurement, Round, measure
from llmpack.target.page_cache import cached_share, drop_from_cache, measure_storage
from llmpack.target.protocol import Protocol
from llmpack.target.samples import Samples

SHORT = Protocol(repetitions=5, least_seconds=0.0, rounds=2)
SETTINGS = RuntimeSettings(threads=1)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_tiny_gguf(tmp_path_factory.mktemp("measured") / "tiny.gguf")


@pytest.fixture(scope="module")
def measured(path):
    return measure(path, SETTINGS, CONTEXT, protocol=SHORT)


def test_it_records_the_run(measured, path):
    assert measured.artifact == sha256_file(path)
    assert (measured.prompt, measured.written) == (CONTEXT - 32, 32)
    assert measured.opened.context == CONTEXT
    assert measured.opened.load == "mmap"
    assert 1 <= len(measured.rounds) <= 2
    for found in measured.rounds:
        assert len(found.prefill) == len(found.decode) == 5
        assert all(len(times) == 32 for times in found.decode)
        assert 0 <= found.other_load <= 1
    assert measured.prefill.values == tuple(measured.prompt / t for t in measured.rounds[-1].prefill)
    assert measured.first_token.values == measured.rounds[-1].prefill
    assert measured.memory.peak >= measured.memory.resident
    assert measured.highest.anon >= measured.opened.buffers["KV.CPU"]
    assert measured.load > 0
    assert measured.warm_up > 0


def test_it_becomes_json_without_loss(measured):
    report = json.loads(json.dumps(measured.to_json()))
    assert report["protocol"] == "bench/1"
    assert report["prefill"]["samples"] == list(measured.prefill.values)
    assert report["rounds"][-1]["decode"][0] == list(measured.rounds[-1].decode[0])
    assert report["opened"]["buffers"]["KV.CPU"] == measured.opened.buffers["KV.CPU"]


def quiet(measured: Measurement) -> Measurement:
    """The same with timings as a machine without other work would give."""
    calm = Round(prefill=(0.1, 0.101, 0.1, 0.102, 0.1), decode=((0.01,) * 32,) * 5, other_load=0.0)
    prefill = tuple(measured.prompt / t for t in calm.prefill)
    return replace(
        measured,
        rounds=(calm,),
        prefill=Samples(prefill),
        decode=Samples((100.0,) * 5),
        first_token=Samples(calm.prefill),
        cold=True,
    )


def test_its_findings_take_the_pessimistic_side(measured):
    calm = quiet(measured)
    found = {f.limit: f for f in calm.findings()}
    assert found["memory"].value == measured.memory.peak
    assert found["prefill"].value == calm.prefill.p10 < calm.prefill.median
    assert found["first_token"].value == calm.first_token.p90
    assert all(f.usable and f.evidence.kind == "measurement" for f in found.values())
    assert found["decode"].evidence.artifact == measured.artifact
    assert found["decode"].evidence.settings["effective"]["load"] == "mmap"
    budget = Budget(memory="1 GiB", decode="90 tok/s", prefill="1 tok/s", first_token="0.2 s", context=CONTEXT)
    assert judge(budget, calm.findings(), measured.device).passes


def test_noise_keeps_only_limits_that_every_repetition_keeps(measured):
    calm = quiet(measured)
    rates = (100.0, 40.0, 160.0, 90.0, 110.0)
    before = replace(calm.rounds[0], decode=((1 / 30.0,) * 32,) * 5)
    last = replace(calm.rounds[0], decode=tuple((1 / rate,) * 32 for rate in rates))
    wild = replace(calm, decode=Samples(rates), rounds=(before, last))
    assert wild.decode.cv > NOISY_CV
    found = {f.limit: f for f in wild.findings()}
    assert not found["decode"].usable
    assert found["decode"].worst == pytest.approx(30.0)
    assert found["prefill"].usable
    assert found["prefill"].worst is None
    verdict = judge(Budget(decode="31 tok/s", prefill="1 tok/s"), wild.findings(), measured.device)
    assert [row.status for row in verdict.rows] == ["UNMEASURED", "PASS"]
    assert verdict.rows[0].reason.startswith("noisy: spread")
    (row,) = judge(Budget(decode="29 tok/s"), wild.findings(), measured.device).rows
    assert row.status == "PASS"
    assert row.value == pytest.approx(30.0)
    assert row.reason.startswith("noisy: spread")
    assert row.reason.endswith("the worst of all repetitions")


def test_the_worst_of_a_noisy_delay_is_the_longest(measured):
    calm = quiet(measured)
    wild = replace(calm, rounds=(replace(calm.rounds[0], prefill=(0.1, 0.3, 0.1, 0.2, 0.1)),))
    assert wild.worst("first_token") == 0.3
    assert wild.worst("prefill") == measured.prompt / 0.3
    assert wild.worst("memory") is None


@pytest.mark.parametrize(("cold", "words"), [(False, "was still cached"), (None, "does not tell")])
def test_a_start_that_was_not_cold_is_no_evidence(measured, cold, words):
    found = {f.limit: f for f in replace(quiet(measured), cold=cold).findings()}
    assert not found["load"].usable
    assert words in found["load"].reason
    assert found["memory"].usable


def test_the_file_leaves_the_cache_before_the_load(path, measured):
    if sys.platform != "linux":
        assert measured.cold is None
        return
    path.read_bytes()
    assert cached_share(path) == 1.0
    share = drop_from_cache(path)
    assert share == cached_share(path)
    assert measured.cold in (True, False)


def test_a_context_beyond_the_model_is_refused(path):
    with pytest.raises(RuntimeFailed, match=f"beyond the {CONTEXT}"):
        measure(path, SETTINGS, 2 * CONTEXT, protocol=SHORT)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what is cached")
def test_the_disk_is_read_and_not_the_cache(tmp_path):
    found = measure_storage(tmp_path)
    if found is None:  # a file system in memory: then no file of it ever leaves the cache
        (tmp_path / "file").write_bytes(b"x" * (1 << 20))
        assert drop_from_cache(tmp_path / "file") > 0.5
    else:
        assert 1e5 < found < 1e12
    assert list(tmp_path.glob(".llmpack-*")) == []
    assert measure_storage(tmp_path / "missing") is None
