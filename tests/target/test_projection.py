"""Projections: ratios of what both machines can do, labelled as estimates with wide intervals."""

import pytest

from llmpack.target.budget import Budget, Evidence, Finding, judge
from llmpack.target.device import device, read_device
from llmpack.target.projection import ALIKE_ERROR, UNLIKE_ERROR, project

BASE = """
description = "{name}"
arch = "x86_64"
cpu = "{name}"
[figures.memory]
value = "8 GiB"
provenance = "datasheet"
source = "made up for a test"
"""
FIGURE = '[figures.{name}]\nvalue = "{value}"\nprovenance = "{provenance}"\nsource = "made up for a test"\n'


def machine(name, bandwidth, f32, provenance="measured"):
    figures = (("bandwidth", bandwidth), ("f32", f32))
    text = "".join(FIGURE.format(name=n, value=v, provenance=provenance) for n, v in figures if v)
    return read_device(name, BASE.format(name=name) + text, f"{name}.toml")


HERE = machine("fast", "40 GB/s", "400 GFLOP/s")
THERE = machine("slow", "10 GB/s", "50 GFLOP/s")


def measured(limit, value, where=HERE, **more):
    evidence = Evidence(kind="measurement", artifact="a" * 64, device=where.fingerprint, machine=where.description)
    return Finding(limit=limit, value=value, best=value, evidence=evidence, **more)


def test_writing_follows_bandwidth_and_reading_arithmetic():
    found = project([measured("decode", 40.0), measured("prefill", 400.0), measured("first_token", 2.0)], HERE, THERE)
    assert [f.value for f in found] == [10.0, 50.0, 16.0]
    assert [f.best for f in found] == pytest.approx(
        [10 * (1 + ALIKE_ERROR), 50 * (1 + ALIKE_ERROR), 16 / (1 + ALIKE_ERROR)]
    )
    assert {f.evidence.kind for f in found} == {"estimate"}
    assert {f.evidence.device for f in found} == {THERE.fingerprint}
    assert found[0].reason == "projected from fast by 0.25 times its bandwidth, 35% off at most"


def test_a_nominal_figure_widens_the_interval():
    (found,) = project([measured("decode", 40.0)], HERE, machine("nominal", "10 GB/s", None, "datasheet"))
    assert found.best == pytest.approx(10 * (1 + UNLIKE_ERROR))


def test_what_is_not_known_of_both_is_not_projected():
    assert project([measured("prefill", 40.0)], HERE, machine("half", "10 GB/s", None)) == []
    assert project([measured("memory", 40.0)], HERE, THERE) == []


@pytest.mark.parametrize(
    "finding",
    [
        measured("decode", 40.0, where=THERE),
        measured("decode", 40.0, usable=False),
        measured("decode", 40.0).model_copy(
            update={"evidence": measured("decode", 1.0).evidence.model_copy(update={"kind": "estimate"})}
        ),
    ],
)
def test_only_a_usable_measurement_made_here_counts(finding):
    assert project([finding], HERE, THERE) == []


def test_a_projection_fails_but_passes_only_where_estimates_are_accepted():
    (found,) = project([measured("decode", 40.0)], HERE, THERE)

    def status(limit, accept="measurement"):
        (row,) = judge(Budget(decode=limit), [found, measured("decode", 40.0)], THERE, accept=accept).rows
        return row.status

    assert status("20 tok/s") == "FAIL"
    assert status("8 tok/s") == "UNMEASURED"
    assert status("8 tok/s", "estimate") == "PASS"
    assert status("12 tok/s", "estimate") == "FAIL"
    assert device("raspberry-pi-5-8gb").figures.f32 is None
