"""A device measured by a ``llama-bench`` that is there, for devices without Python.

It times a prompt that fills the context but for the tokens written after it, and those tokens at that depth, as
protocol ``bench/1`` does; it prints every repetition (source: llama.cpp, tools/llama-bench). Peak memory is the
kernel's high-water mark of its process (VmHWM), looked at five times a second until it ends; with a budget of memory,
one look that finds more ends the process, and that is the verdict. What such a build reserves without touching it is
unknown, so private memory is not limited beside. It does not time a cold load, and what disturbed it is known by the
load average before it alone.
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from typing import Any

from llmpack.errors import DeviceProblem, RuntimeFailed
from llmpack.runtime.meter import Memory
from llmpack.runtime.settings import RuntimeSettings
from llmpack.target.budget import Evidence, Finding, LimitName
from llmpack.target.device import Device
from llmpack.target.enforcement import CapExceededError
from llmpack.target.measure import NOISY_CV, WRITTEN_TOKENS
from llmpack.target.protocol import Protocol
from llmpack.target.remote.station import Station
from llmpack.target.remote.transport import Reply
from llmpack.target.samples import Samples
from llmpack.units import format_size

SILENCE = 900.0
"""Seconds without a word after which llama-bench counts as hung; it tells each repetition."""
BUSY = 0.5
"""Processes for each core over the last minute, from which on the device counts as busy."""
STEADY = 5
"""Looks in a row, at the end, that must have found the same peak."""
_MAPPED = {"True": "mmap", "False": "no-mmap"}
_WATCHED = r"""
%(command)s > bench.json & pid=$!
peak=; steady=0; over=
while kill -0 $pid 2>/dev/null; do
  now=$(sed -n 's/^VmHWM:[^0-9]*\([0-9]*\).*/\1/p' /proc/$pid/status 2>/dev/null)
  if [ -n "$now" ]; then
    [ "$now" = "$peak" ] && steady=$((steady + 1)) || steady=0
    peak=$now
    [ -n "%(cap)s" ] && [ "$now" -gt "%(cap)s" ] && { over=1; kill -s KILL $pid; }
  fi
  sleep 0.2 2>/dev/null || sleep 1
done
wait $pid; code=$?
echo "peak_kib=$peak steady=$steady over=$over"; cat bench.json; rm -f bench.json
exit $code
"""


@dataclass(frozen=True)
class Bench:
    """What two runs of llama-bench showed. Bytes, tokens per second, seconds."""

    peak: int | None  # None where it was not seen to the end
    prefill: Samples
    decode: Samples
    first_token: Samples
    build: dict[str, str]
    load_mode: str


def bench(
    station: Station,
    model: str,
    settings: RuntimeSettings,
    context: int,
    threads: int,
    protocol: Protocol,
    cap: int | None = None,
) -> Bench:
    """Measure a model that lies on the device.

    cap  bytes of memory that it is held to

    Raises CapExceededError where it wanted more, DeviceProblem for a llama-bench that is too old, RuntimeFailed for one
    that fails, hangs or talks nonsense.
    """
    program = shlex.quote(station.programs.llama_bench)
    options = Options.of(station, program)
    written = max(1, min(WRITTEN_TOKENS, context // 4))
    prompt = context - written
    fixed = [program, "-m", shlex.quote(model), *options.words(settings, threads), "-r", str(protocol.repetitions)]
    runs = []
    for shape in (["-p", str(prompt), "-n", "0"], ["-p", "0", "-n", str(written), "-d", str(prompt)]):
        command = " ".join([*fixed, *shape])
        watched = _WATCHED % {"command": command, "cap": "" if cap is None else cap >> 10}
        reply = station.measure(watched, silence=SILENCE)
        runs.append(_result(station.name, reply, settings))
    (peak, read), (peak_later, wrote) = runs
    seconds = [ns / 1e9 for ns in read["samples_ns"]]
    return Bench(
        peak=max(peak, peak_later) if peak and peak_later else None,
        prefill=Samples(tuple(prompt / s for s in seconds)),
        decode=Samples(tuple(written * 1e9 / ns for ns in wrote["samples_ns"])),
        first_token=Samples(tuple(seconds)),
        build={"llama.cpp": str(read["build_commit"])[:40]},
        load_mode=str(read.get("load_mode") or _MAPPED.get(str(read.get("use_mmap")), "")),
    )


@dataclass(frozen=True)
class Options:
    """How this build of llama-bench spells what is asked of it, by its own help."""

    help: str

    @classmethod
    def of(cls, station: Station, program: str) -> Options:
        """Ask it. Raises DeviceProblem where it cannot do what is needed."""
        reply = station.transport.run(f"{program} --help 2>&1")
        missing = [name for name in ("--n-depth", "--cache-type-k", "--output") if name not in reply.text]
        if missing:
            text = f"{station.name}: {station.programs.llama_bench} does not know {', '.join(missing)}"
            raise DeviceProblem(f"{text} ({reply.last_words}); put one of 2025-05 or newer there", kind="no-runner")
        return cls(reply.text)

    def words(self, settings: RuntimeSettings, threads: int) -> list[str]:
        """The options that say how the model is run."""
        words = ["-o", "json", "-ngl", "0", "-t", str(threads), "-b", str(settings.batch), "-ub", str(settings.ubatch)]
        words += ["-ctk", settings.kv, "-ctv", settings.kv]
        if settings.flash_attention != "auto" or settings.kv != "f16":
            words += ["-fa", "0" if settings.flash_attention == "off" else "1"]
        if settings.load != "auto":
            mapped = settings.load == "mmap"
            words += ["-lm", "mmap" if mapped else "none"] if "--load-mode" in self.help else ["-mmp", str(int(mapped))]
        return [*words, "--progress"] if "--progress" in self.help else words


def _result(name: str, reply: Reply, settings: RuntimeSettings) -> tuple[int | None, dict[str, Any]]:
    """Peak memory and the one result of a run. Raises CapExceededError, RuntimeFailed."""
    head, _, body = reply.text.partition("\n")
    peak = re.fullmatch(r"peak_kib=(\d*) steady=(\d+) over=(1?)", head.strip())
    if peak is not None and peak[3]:
        seen = int(peak[1]) << 10
        raise CapExceededError(f"ended when {format_size(seen)} were resident", Memory(seen, seen))
    if reply.code:
        kind = "killed" if reply.code == 137 else "crash"
        raise RuntimeFailed(f"{name}: llama-bench ended with exit status {reply.code}: {reply.last_words}", kind=kind)
    try:
        values = json.loads(body)
        (result,) = values
        samples = [float(ns) for ns in result["samples_ns"]]
        good = peak is not None and samples and all(0 < ns < 1e15 for ns in samples)
        if not good or result["type_k"] != settings.kv or not isinstance(result["build_commit"], str):
            raise ValueError("its figures are impossible, or are not what was asked for")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        text = f"{name}: llama-bench answered what is no result ({error}): {body.strip()[:80]!r}"
        raise RuntimeFailed(text, kind="protocol") from error
    assert peak is not None
    known = peak[1] and int(peak[2]) >= STEADY  # a run that ended sooner may have grown after the last look
    return (int(peak[1]) << 10 if known else None), result


def bench_findings(
    found: Bench, artifact: str, device: Device, settings: RuntimeSettings, context: int, threads: int,
    load_average: float | None, cap: int | None = None,
) -> list[Finding]:  # fmt: skip
    """The figures as evidence. What was noisy or began on a busy device proves no failure."""
    evidence = Evidence(
        kind="measurement",
        artifact=artifact,
        device=device.fingerprint,
        machine=device.description,
        settings={**settings.model_dump(mode="json"), "threads": threads, "context": context},
        build=found.build,
    )
    busy = ""
    if load_average is not None and load_average > BUSY * (device.cores or 1):
        busy = f"disturbed: {load_average:.1f} processes wanted to run in the minute before"

    def finding(limit: LimitName, value: float, samples: Samples, reason: str) -> Finding:
        why = f"noisy: spread {samples.cv:.0%}" if samples.cv > NOISY_CV else ""
        worst = max(samples.values) if limit == "first_token" else min(samples.values)
        return Finding(limit=limit, value=value, best=value, evidence=evidence, reason=why or reason, usable=not why,
                       worst=worst if why else None, disturbed=busy)  # fmt: skip

    count = len(found.prefill.values)
    by = f"of {count} repetitions of llama-bench, median "
    findings = [
        finding("prefill", found.prefill.p10, found.prefill, f"p10 {by}{found.prefill.median:.4g}"),
        finding("decode", found.decode.p10, found.decode, f"p10 {by}{found.decode.median:.4g}"),
        finding("first_token", found.first_token.p90, found.first_token, f"p90 {by}{found.first_token.median:.4g} s"),
    ]
    if found.peak is not None:
        held = "not capped" if cap is None else f"held to {format_size(cap)} by a watch on resident memory"
        reason = f"peak of llama-bench with load = {found.load_mode or 'its own choice'}, {held}"
        memory = Finding(limit="memory", value=found.peak, best=found.peak, evidence=evidence, reason=reason)
        findings.insert(0, memory)
    return findings
