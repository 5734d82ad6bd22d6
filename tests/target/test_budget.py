"""Verdicts: which evidence may pass, fail or leave open what."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from llmpack.target.budget import Budget, Evidence, Finding, Verdict, judge
from llmpack.target.device import device, read_device
from llmpack.target.samples import Samples

MIB = 1 << 20
PI = device("raspberry-pi-5-8gb")
N100 = device("intel-n100-16gb")


def evidence(kind, machine=PI):
    return Evidence(kind=kind, artifact="a" * 64, device=machine.fingerprint, machine=machine.description)


def finding(limit, value, kind="measurement", best=None, machine=PI, **more):
    best = value if best is None else best
    return Finding(limit=limit, value=value, best=best, evidence=evidence(kind, machine), **more)


def only_row(budget, *findings, **options):
    (row,) = judge(Budget(**budget), findings, PI, **options).rows
    return row


def test_quantities_carry_units_and_come_back():
    budget = Budget(memory="350 MiB", disk="120 MB", decode="8 tok/s", first_token="1.5 s", load="300 ms",
                    quality={"kl": 0.1, "top1": 0.85})  # fmt: skip
    assert budget.limits == {
        "memory": 350 * MIB,
        "disk": 120_000_000,
        "decode": 8.0,
        "first_token": 1.5,
        "load": 0.3,
        "quality.kl": 0.1,
        "quality.top1": 0.85,
    }
    assert Budget.model_validate_json(budget.model_dump_json()) == budget
    assert Budget().limits == {}


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"memory": "2G"}, "not a unit of size"),
        ({"memory": 1000}, "has no unit"),
        ({"memory": "0 B"}, "greater than 0"),
        ({"decode": "8"}, "not a rate"),
        ({"decode": "-8 tok/s"}, "not a rate"),
        ({"quality": {"top1": 1.5}}, "less than or equal to 1"),
        ({"quality": {"kl": float("nan")}}, "finite"),
        ({"context": "2k"}, "valid integer"),
        ({"context": 0}, "greater than or equal to 16"),
        ({"memmory": "1 GiB"}, "Extra inputs"),
    ],
)
def test_a_budget_is_strict(wrong, words):
    with pytest.raises(ValidationError, match=words):
        Budget(**wrong)


def test_the_schema_speaks_of_text_with_units():
    schema = Budget.model_json_schema()
    assert "MiB" in json.dumps(schema["properties"]["memory"])
    assert schema["properties"]["context"]["default"] == 2048


def test_impossible_budgets_are_named_all_at_once():
    problems = Budget(memory="64 GiB", context=9000).problems(PI, trained_context=8192)
    assert [p.path for p in problems] == ["budget.context", "budget.memory"]
    assert "beyond the 8192 tokens" in problems[0].message
    assert "more than the 8 GiB of raspberry-pi-5-8gb" in problems[1].message
    assert Budget(memory="8 GiB", context=8192).problems(PI, 8192) == []


def test_a_measurement_on_the_device_passes_or_fails_with_its_margin():
    row = only_row({"memory": "400 MiB"}, finding("memory", 300 * MIB))
    assert (row.status, row.margin) == ("PASS", 25.0)
    row = only_row({"decode": "8 tok/s"}, finding("decode", 6.0))
    assert (row.status, row.margin) == ("FAIL", -25.0)
    assert row.text == "decode 6 tok/s of at least 8 tok/s: FAIL, 25 % short"
    assert only_row({"memory": "300 MiB"}, finding("memory", 300 * MIB)).status == "PASS"


def test_an_estimate_fails_but_passes_only_where_it_is_accepted():
    good = finding("memory", 300 * MIB, "estimate", best=285 * MIB)
    row = only_row({"memory": "400 MiB"}, good)
    assert row.status == "UNMEASURED"
    assert "an estimate alone does not pass" in row.reason
    row = only_row({"memory": "400 MiB"}, good, accept="estimate")
    assert row.status == "PASS"
    assert "accepted on an estimate" in row.reason
    assert only_row({"memory": "200 MiB"}, good).status == "FAIL"


def test_an_estimate_that_may_be_wrong_by_as_much_does_not_fail():
    near = finding("memory", 300 * MIB, "estimate", best=285 * MIB)
    assert only_row({"memory": "290 MiB"}, near).status == "UNMEASURED"
    assert only_row({"memory": "290 MiB"}, near, accept="estimate").status == "FAIL"
    slow = finding("decode", 8.0, "estimate", best=9.6)
    assert only_row({"decode": "9 tok/s"}, slow).status == "UNMEASURED"
    assert only_row({"decode": "10 tok/s"}, slow).status == "FAIL"


def test_a_measurement_goes_before_an_estimate():
    estimate = finding("memory", 900 * MIB, "estimate")
    assert only_row({"memory": "400 MiB"}, estimate, finding("memory", 300 * MIB)).status == "PASS"
    assert only_row({"memory": "400 MiB"}, finding("memory", 300 * MIB), estimate).status == "PASS"


def test_another_machine_is_no_evidence_except_for_what_depends_on_none():
    row = only_row({"decode": "1 tok/s"}, finding("decode", 50.0, machine=N100))
    assert row.status == "UNMEASURED"
    assert "which is not raspberry-pi-5-8gb" in row.reason
    assert only_row({"quality": {"kl": 0.1}}, finding("quality.kl", 0.05, machine=N100)).status == "PASS"
    assert only_row({"disk": "1 MB"}, finding("disk", 900_000, machine=N100)).status == "PASS"


def test_noise_is_unmeasured_and_no_estimate_overrules_it():
    noisy = finding("decode", 9.0, reason="noisy: spread 30% after 3 rounds", usable=False)
    row = only_row({"decode": "8 tok/s"}, noisy, finding("decode", 9.0, "estimate"), accept="estimate")
    assert row.status == "UNMEASURED"
    assert row.reason.startswith("noisy")
    assert row.value == 9.0


@pytest.mark.parametrize(("worst", "status"), [(8.5, "PASS"), (7.5, "UNMEASURED"), (None, "UNMEASURED")])
def test_noise_passes_a_limit_that_its_worst_repetition_keeps(worst, status):
    noisy = finding("decode", 9.0, reason="noisy: spread 30% after 3 rounds", usable=False, worst=worst)
    row = only_row({"decode": "8 tok/s"}, noisy)
    assert row.status == status
    assert row.value == (worst if status == "PASS" else 9.0)


def test_noise_fails_no_limit():
    noisy = finding("decode", 5.0, reason="noisy: spread 30% after 3 rounds", usable=False, worst=4.0)
    assert only_row({"decode": "8 tok/s"}, noisy).status == "UNMEASURED"


def test_nothing_known_is_unmeasured_with_the_reason():
    row = only_row({"prefill": "8 tok/s"}, missing={"prefill": "the arithmetic rate of the device is unknown"})
    assert (row.status, row.value) == ("UNMEASURED", None)
    assert "arithmetic rate" in row.text
    verdict = judge(Budget(prefill="8 tok/s"), [], PI)
    assert not verdict.passes


def test_the_cure_is_asked_with_what_is_missing():
    asked = []

    def cure(limit, needed):
        asked.append((limit, needed))
        return 'load = "no-mmap" saves 90 MiB'

    budget = Budget(memory="100 MiB", decode="8 tok/s", disk="1 GB")
    found = [finding("memory", 150 * MIB), finding("decode", 7.0), finding("disk", 5)]
    verdict = judge(budget, found, PI, cure=cure)
    assert asked == [("memory", 50 * MIB), ("decode", 1.0)]
    assert "no-mmap" in verdict.rows[0].text
    assert verdict.rows[1].cure == ""


def test_a_verdict_comes_back_from_json():
    budget = Budget(memory="100 MiB", quality={"top1": 0.9})
    verdict = judge(budget, [finding("memory", 50 * MIB, "estimate"), finding("quality.top1", 0.95)], PI,
                    accept="estimate")  # fmt: skip
    assert verdict.passes
    assert verdict.on_estimates
    text = json.dumps(verdict.to_json())
    assert Verdict.from_json(json.loads(text)) == verdict
    with pytest.raises(ValidationError):
        Verdict.from_json({**json.loads(text), "format": 2})


def test_samples_are_summarized_by_definition():
    samples = Samples((4.0, 1.0, 3.0, 2.0, 5.0))
    assert (samples.median, samples.p10, samples.p90) == (3.0, 1.4, 4.6)
    assert samples.cv == pytest.approx(2.5**0.5 / 3)
    assert Samples((7.0,)).cv == 0
    assert Samples.from_json(json.loads(json.dumps(samples.to_json()))) == samples
    with pytest.raises(ValueError, match="finite"):
        Samples((1.0, float("inf")))


def test_budgets_of_profiles_stay_apart():
    twin = read_device("twin", (Path(__file__).parent / "twin.toml").read_text(), "twin.toml")
    assert twin.fingerprint != PI.fingerprint
