"""What disturbs a measurement is read from the system's own files, and decides what the figures may prove."""

from dataclasses import replace

import pytest

from llmpack.target.budget import Budget, Evidence, Finding, judge
from llmpack.target.device import device
from llmpack.target.disturbance import Conditions, conditions, disturbances

DEVICE = device("raspberry-pi-5-8gb")


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")


BOARD = {
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal",
    "sys/class/thermal/thermal_zone0/temp": "61234",
    "sys/class/thermal/thermal_zone0/trip_point_0_type": "passive",
    "sys/class/thermal/thermal_zone0/trip_point_0_temp": "80000",
    "sys/class/thermal/cooling_device0/type": "pwm-fan",
    "sys/class/thermal/cooling_device0/cur_state": "3",
    "sys/class/thermal/cooling_device1/type": "thermal-cpufreq-0",
    "sys/class/thermal/cooling_device1/cur_state": "0",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_max_freq": "2400000",
    "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": "7",
    "sys/devices/system/cpu/cpu1/thermal_throttle/core_throttle_count": "1",
    "sys/devices/platform/soc/soc:firmware/get_throttled": "50000",
    "proc/pressure/memory": "some avg10=0.00 avg60=0.00 avg300=0.00 total=9\nfull avg10=0.00 total=2500000",
}


def test_a_calm_board(tmp_path):
    write(tmp_path, BOARD)
    found = conditions(tmp_path)
    assert found.temperature == pytest.approx(61.234)
    assert found.limits == {"policy0": 2_400_000_000}
    assert found.cooling == {"cooling_device1": 0}  # a fan is no throttle
    assert (found.throttled, found.flags, found.hot, found.stalled) == (8, (), (), 2.5)
    assert disturbances([found, replace(conditions(tmp_path), stolen=found.stolen)], 0.1) == ()
    assert found.to_json()["temperature"] == pytest.approx(61.234)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("sys/class/thermal/thermal_zone0/temp", "80500", "throttled at 80 degrees"),
        ("sys/class/thermal/cooling_device1/cur_state", "2", "throttled at 61 degrees"),
        ("sys/devices/system/cpu/cpufreq/policy0/scaling_max_freq", "1500000", "throttled"),
        ("sys/devices/system/cpu/cpu1/thermal_throttle/core_throttle_count", "2", "throttled"),
        ("sys/devices/platform/soc/soc:firmware/get_throttled", "50005", "reports throttled, under-voltage"),
        ("proc/pressure/memory", "full avg10=0.00 total=99000000", "waited for memory"),
    ],
)
def test_what_slows_it_down_is_seen(tmp_path, name, text, words):
    write(tmp_path, BOARD)
    before = conditions(tmp_path)
    write(tmp_path, {name: text})
    after = replace(conditions(tmp_path), stolen=before.stolen)
    (found,) = disturbances([before, after], 0.0)
    assert words in found


def test_a_system_that_tells_nothing(tmp_path):
    found = conditions(tmp_path)
    assert {name for name in found.to_json() if name != "stolen"} == set()
    write(tmp_path, {"sys/class/thermal/thermal_zone0/temp": "not a number", "proc/pressure/memory": "?"})
    assert conditions(tmp_path).temperature is None


def test_other_work_and_a_greedy_host_are_seen():
    before, after = Conditions(time=0.0), Conditions(time=10.0, stolen=1000.0)
    found = disturbances([before, after], 0.5)
    assert "other processes took 50%" in found[0]
    assert "host took" in found[1]


def finding(value, disturbed):
    evidence = Evidence(kind="measurement", device=DEVICE.fingerprint)
    return Finding(limit="decode", value=value, best=value, evidence=evidence, reason="p10", disturbed=disturbed)


def test_what_is_kept_in_spite_of_it_is_kept_and_nothing_fails_by_it():
    budget = Budget.model_validate({"decode": "8 tok/s"})
    assert judge(budget, [finding(9.0, "disturbed: heat")], DEVICE).rows[0].status == "PASS"
    row = judge(budget, [finding(7.0, "disturbed: heat")], DEVICE).rows[0]
    assert (row.status, row.reason, row.value) == ("UNMEASURED", "disturbed: heat", 7.0)
    assert judge(budget, [finding(7.0, "")], DEVICE).rows[0].status == "FAIL"
