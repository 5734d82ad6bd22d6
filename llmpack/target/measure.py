"""Measurement: a model run on this machine in a fresh child, at the full declared context.

Protocol ``bench/1``: its files leave the page cache; a fresh process loads it (cold load); one
discarded run of the full shape warms it up; then prompts that fill the context but for the tokens
that are written after them are computed from an empty cache, and after each of them tokens are
written one at a time, so that every timing of writing has a full KV cache before it. At least five
repetitions, all kept. What spreads beyond `NOISY_CV`, or was disturbed, is measured again, up to three
rounds; what stays noisy is kept, flagged, and is no evidence but for limits that every repetition keeps; what stays
disturbed proves no failure.
Verdicts use the pessimistic side: p10 of rates, p90 of delays, peak of memory.

Synthetic tokens, as in llama-bench: the time of a dense model does not depend on which tokens it reads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from llmpack.checkpoint.gguf_file import GgufFile
from llmpack.digest import sha256_file
from llmpack.errors import UsageError
from llmpack.progress import QUIET, Progress
from llmpack.runtime.meter import Memory
from llmpack.runtime.runners import runtime_for
from llmpack.runtime.runtime import Build, Opened, Runtime
from llmpack.runtime.settings import RuntimeSettings, pinned_cpus
from llmpack.target.budget import Evidence, Finding, LimitName
from llmpack.target.device import Device
from llmpack.target.disturbance import conditions, disturbances
from llmpack.target.enforcement import CapExceededError, Exceeded, held, reserved_bytes
from llmpack.target.outline import Outline
from llmpack.target.page_cache import drop_from_cache
from llmpack.target.probe import load_average, probe_host
from llmpack.target.protocol import STANDARD, Protocol
from llmpack.target.samples import Samples

NOISY_CV = 0.10
"""Spread (standard deviation over mean) above which a timing is noisy."""
COLD_SHARE = 0.01
"""A start counts as cold if at most this share of the file was cached before."""
WRITTEN_TOKENS = 32
"""Tokens written after each prompt; a quarter of very short contexts."""


@dataclass(frozen=True)
class Round:
    """One round of repetitions.

    prefill      seconds of each prompt
    decode       seconds of each token, a tuple for each repetition
    other_load   share of the machine's processor time that other processes took meanwhile
    disturbed    what made it slower, in words (see `target.disturbance`)
    conditions   what the system told of heat, frequencies and stalls before it, after each repetition, in order
    """

    prefill: tuple[float, ...]
    decode: tuple[tuple[float, ...], ...]
    other_load: float
    disturbed: tuple[str, ...] = ()
    conditions: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Measurement:
    """What was observed of one file on one machine under one set of settings.

    artifact       sha256 of the file
    device         the machine, as probed
    build, opened  the runtime, and the modes that really held
    context        tokens; `prompt` of them are read, `written` are written after them
    cold           True if the file was not cached before the load, None if the system does not tell
    cap            bytes of memory that the process was held to, or None, and by what means
    load           seconds from a fresh process to a model that is ready
    warm_up        seconds of the discarded first prompt; with `load`, a cold time to first token
    memory         at the end; `peak` is the kernel's high-water mark of the whole run
    highest        the highest sample of each part (anonymous memory, pages of files)
    prefill        tokens per second of each repetition of the last round
    decode         tokens per second of each repetition of the last round
    first_token    seconds from the prompt to the first token, likewise
    rounds         every sample of every round
    load_averages  of the system, before and after
    """

    artifact: str
    device: Device
    settings: RuntimeSettings
    build: Build
    opened: Opened
    context: int
    prompt: int
    written: int
    cold: bool | None
    cap: int | None
    means: str
    load: float
    warm_up: float
    memory: Memory
    highest: Memory
    prefill: Samples
    decode: Samples
    first_token: Samples
    rounds: tuple[Round, ...]
    load_averages: tuple[float | None, float | None]

    @property
    def noise(self) -> dict[LimitName, str]:
        """The timings that are no evidence, and why: spread, or a start that was not cold."""
        found: dict[LimitName, str] = {}
        timings: tuple[tuple[LimitName, Samples], ...] = (
            ("prefill", self.prefill),
            ("first_token", self.first_token),
            ("decode", self.decode),
        )
        other = self.rounds[-1].other_load
        for name, samples in timings:
            if samples.cv > NOISY_CV:
                text = f"noisy: spread {samples.cv:.0%} after {len(self.rounds)} rounds"
                found[name] = f"{text}, other processes took {other:.0%} of the processor" if other > 0.05 else text
        if not self.cold:
            known = self.cold is not None
            found["load"] = "the file was still cached" if known else "this system does not tell what it has cached"
            found["load"] += "; the start was not cold" if known else "; the start may not have been cold"
        return found

    def worst(self, limit: LimitName) -> float | None:
        """The slowest repetition of all rounds, of what is measured in repetitions."""
        if limit == "decode":
            return min(len(times) / sum(times) for one in self.rounds for times in one.decode)
        longest = max(seconds for one in self.rounds for seconds in one.prefill)
        return {"prefill": self.prompt / longest, "first_token": longest}.get(limit)

    @property
    def evidence(self) -> Evidence:
        """What its figures rest on."""
        held = {"load": self.opened.load, "flash_attention": self.opened.flash_attention}
        return Evidence(
            kind="measurement",
            artifact=self.artifact,
            device=self.device.fingerprint,
            machine=self.device.description,
            settings={
                **self.settings.model_dump(mode="json"),
                "threads": self.opened.threads,
                "context": self.context,
                "effective": held,
            },
            build=dict(self.build.versions),
        )

    def findings(self) -> list[Finding]:
        """The figures as evidence for a verdict."""
        noise, evidence = self.noise, self.evidence
        disturbed = f"disturbed: {'; '.join(self.rounds[-1].disturbed)}" if self.rounds[-1].disturbed else ""
        count = len(self.prefill.values)

        def finding(limit: LimitName, value: float, reason: str) -> Finding:
            why = noise.get(limit, "")
            return Finding(
                limit=limit,
                value=value,
                best=value,
                evidence=evidence,
                reason=why or reason,
                usable=not why,
                worst=self.worst(limit) if why else None,
                disturbed="" if limit == "memory" else disturbed,
            )

        rates = f"p10 of {count} repetitions, median "
        how = f"peak with load = {self.opened.load}" + (f", {self.means}" if self.means else "")
        return [
            finding("memory", self.memory.peak, how),
            finding("load", self.load, "cold start"),
            finding("prefill", self.prefill.p10, f"{rates}{self.prefill.median:.4g}"),
            finding("decode", self.decode.p10, f"{rates}{self.decode.median:.4g}"),
            finding("first_token", self.first_token.p90, f"p90 of {count}, median {self.first_token.median:.4g} s"),
        ]

    def to_json(self) -> dict[str, Any]:
        """JSON values for the manifest: every sample, and the summary."""
        return {
            "kind": "measurement",
            "protocol": "bench/1",
            "artifact": self.artifact,
            "device": self.device.model_dump(mode="json"),
            "fingerprint": self.device.fingerprint,
            "settings": self.settings.model_dump(mode="json"),
            "build": asdict(self.build),
            "opened": asdict(self.opened),
            "context": self.context,
            "prompt": self.prompt,
            "written": self.written,
            "cold": self.cold,
            "cap": self.cap,
            "means": self.means,
            "load_seconds": self.load,
            "warm_up_seconds": self.warm_up,
            "memory": asdict(self.memory),
            "highest": asdict(self.highest),
            "prefill": self.prefill.to_json(),
            "decode": self.decode.to_json(),
            "first_token": self.first_token.to_json(),
            "rounds": [asdict(r) for r in self.rounds],
            "noise": dict(self.noise),
            "load_averages": list(self.load_averages),
        }


def measure(
    model: Path,
    settings: RuntimeSettings,
    context: int,
    *,
    artifact: str | None = None,
    cap: int | None = None,
    protocol: Protocol = STANDARD,
    progress: Progress = QUIET,
) -> Measurement | Exceeded:
    """Measure a GGUF file or a model folder on this machine.

    context   tokens, as declared by the budget
    artifact  sha256 that stands for the model; that of a file is computed if it is not given
    cap       bytes of memory that the process is held to (see `target.enforcement`); what wants more comes back as
              `Exceeded`

    Raises RuntimeFailed: "oom" if memory does not suffice, "refused" for a context that the model was not trained for,
    and as `llmpack.process` lists.
    """
    if artifact is None:
        if model.is_dir():
            raise UsageError(f"{model}: the digest of a folder has to be given")
        artifact = sha256_file(model)
    device = probe_host()
    before = load_average()
    cached = _still_cached(model)
    reserved = reserved_bytes(Outline.of_gguf(GgufFile.open(model)), settings, context) if model.is_file() else None
    if settings.processor != "cpu":
        cap = None  # no cap counts memory of a GPU, and CUDA reserves more addresses than any limit allows
    cpus = pinned_cpus(max(device.cores or 1, settings.effective_threads))
    try:
        with held(runtime_for(model), cap, cpus, reserved) as run:
            seen = _observe(run.runtime, model, settings, context, protocol, progress)
    except CapExceededError as ended:
        assert cap is not None
        return Exceeded(artifact, device, settings, context, cap, ended.means, ended.memory)
    last = seen.rounds[-1]
    return Measurement(
        artifact=artifact,
        device=device,
        settings=settings,
        build=seen.build,
        opened=seen.opened,
        context=context,
        prompt=seen.prompt,
        written=context - seen.prompt,
        cold=None if cached is None else cached <= COLD_SHARE,
        cap=cap,
        means=run.means,
        load=seen.opened.seconds,
        warm_up=seen.warm_up,
        memory=seen.memory,
        highest=replace(run.watch.highest, peak=max(run.watch.highest.peak, seen.memory.peak)),
        prefill=Samples(tuple(seen.prompt / seconds for seconds in last.prefill)),
        decode=Samples(tuple(len(times) / sum(times) for times in last.decode)),
        first_token=Samples(last.prefill),
        rounds=seen.rounds,
        load_averages=(before, load_average()),
    )


@dataclass(frozen=True)
class _Observed:
    """What one run of the runtime showed."""

    build: Build
    opened: Opened
    prompt: int
    warm_up: float
    rounds: tuple[Round, ...]
    memory: Memory


def _still_cached(model: Path) -> float | None:
    """The share of a model's files that stays cached after the system was asked to forget them, at worst."""
    shares = [drop_from_cache(path) for path in (sorted(model.glob("*.safetensors")) if model.is_dir() else [model])]
    known = [share for share in shares if share is not None]
    return max(known) if len(known) == len(shares) and known else None


def _observe(
    runtime: Runtime, model: Path, settings: RuntimeSettings, context: int, protocol: Protocol, progress: Progress
) -> _Observed:
    build = runtime.info()
    opened = runtime.open(model, settings, context)
    written = max(1, min(WRITTEN_TOKENS, context // 4))
    bench = _Bench(runtime, _synthetic(context, opened.vocabulary), context - written, written)
    warm_up = bench.repetition()[0]
    rounds = tuple(_rounds(bench, protocol, progress))
    return _Observed(build, opened, bench.prompt, warm_up, rounds, runtime.memory())


def _synthetic(count: int, vocabulary: int) -> list[int]:
    """Tokens spread over the vocabulary, the same in every run."""
    return [(7919 * index + 17) % vocabulary for index in range(count)]


@dataclass(frozen=True)
class _Bench:
    """One repetition: read the prompt from an empty cache, then write after it."""

    runtime: Runtime
    tokens: list[int]
    prompt: int
    written: int

    def repetition(self) -> tuple[float, tuple[float, ...]]:
        """Seconds of the prompt, and of each token written after it."""
        read = self.runtime.time_prefill(self.tokens[: self.prompt])
        return read, tuple(self.runtime.time_decode(self.tokens[self.prompt :]))


def _rounds(bench: _Bench, protocol: Protocol, progress: Progress) -> list[Round]:
    """Rounds until one is quiet enough, at most `protocol.rounds`."""
    started = time.monotonic()
    rounds: list[Round] = []
    while True:
        rounds.append(_one_round(bench, protocol, progress, f"measuring, round {len(rounds) + 1}"))
        spent = time.monotonic() - started
        if _quiet(rounds[-1]) or len(rounds) == protocol.rounds or spent > protocol.most_seconds:
            return rounds


def _quiet(found: Round) -> bool:
    rates = Samples(found.prefill), Samples(tuple(len(t) / sum(t) for t in found.decode))
    return not found.disturbed and all(samples.cv <= NOISY_CV for samples in rates)


def _one_round(bench: _Bench, protocol: Protocol, progress: Progress, title: str) -> Round:
    others, seen = _other_load(bench.runtime.pid), [conditions()]
    started = time.monotonic()
    prefill: list[float] = []
    decode: list[tuple[float, ...]] = []
    with progress.task(title, protocol.repetitions) as done:
        while True:
            read, times = bench.repetition()
            prefill.append(read)
            decode.append(times)
            seen.append(conditions())
            if len(prefill) <= protocol.repetitions:
                done(1)
            spent = time.monotonic() - started
            enough = len(prefill) >= protocol.repetitions
            if enough and (spent >= protocol.least_seconds or spent > protocol.most_seconds):
                load = others()
                told = tuple(one.to_json() for one in seen)
                return Round(tuple(prefill), tuple(decode), load, disturbances(seen, load), told)


def _other_load(pid: int) -> Callable[[], float]:
    """Starts a count; the callable gives the share of all processors that processes other than `pid` took since."""
    process = psutil.Process(pid)

    def busy() -> float:
        times: Mapping[str, float] = psutil.cpu_times()._asdict()
        idle = ("idle", "iowait", "guest", "guest_nice")  # time of guests is counted in that of users too
        return sum(value for name, value in times.items() if name not in idle)

    def own() -> float:
        times = process.cpu_times()
        return float(times.user + times.system)

    began, busy_before, own_before = time.monotonic(), busy(), own()

    def share() -> float:
        wall = (time.monotonic() - began) * (psutil.cpu_count() or 1)
        return max(0.0, min(1.0, (busy() - busy_before - (own() - own_before)) / wall))

    return share
