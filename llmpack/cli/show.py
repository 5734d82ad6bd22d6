"""Answers as text for people: aligned columns, figures with their units, nothing that a pipe would choke on."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmpack.units import format_seconds, format_size

if TYPE_CHECKING:
    from llmpack.models.graph import ModelGraph
    from llmpack.pipeline.check import Checked
    from llmpack.pipeline.evaluate import Evaluated
    from llmpack.pipeline.host_memory import HostMemory
    from llmpack.pipeline.inspection import Inspection
    from llmpack.pipeline.plan import Plan
    from llmpack.pipeline.state import Build
    from llmpack.profile import Profile
    from llmpack.target.budget import Verdict
    from llmpack.target.device import Device
    from llmpack.target.memory_model import MemoryEstimate

_NUMBER = re.compile(r"-?[\d,.]*( [kKMGT]?i?B)?")
_COLOURS = {"PASS": "32", "FAIL": "31", "UNMEASURED": "33"}


def show_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows with equal keys, as columns under their names; nothing for no rows."""
    if rows:
        print("\n".join(columns([list(rows[0]), *(list(row.values()) for row in rows)])))


def columns(lines: Sequence[Sequence[object]]) -> list[str]:
    """Cells padded to the widest of their column; numbers stand right, text left."""
    texts = [["" if cell is None else str(cell) for cell in line] for line in lines]
    widths = [max(len(line[i]) for line in texts) for i in range(len(texts[0]))]
    right = [all(_NUMBER.fullmatch(line[i]) for line in texts[1:]) for i in range(len(widths))]
    padded = (
        "  ".join(
            cell.rjust(width) if flag else cell.ljust(width)
            for cell, width, flag in zip(line, widths, right, strict=True)
        )
        for line in texts
    )
    return [line.rstrip() for line in padded]


def coloured(status: str) -> str:
    """PASS, FAIL or UNMEASURED; in colour on a terminal that wants it."""
    import os

    if not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return status
    word = status.strip()
    return f"\x1b[{_COLOURS[word]}m{status}\x1b[0m" if word in _COLOURS else status


def show_inspection(found: Inspection, tensors: bool) -> None:
    """A model on disk."""
    print(f"{found.path}: {found.kind}, {format_size(found.nbytes)}")
    print(
        f"{found.parameters:,} parameters in {len(found.tensors)} tensors, {found.bits_per_weight:.3f} bits per weight"
    )
    rows = [
        {"encoding": name, "tensors": count, "parameters": f"{numbers:,}", "bytes": f"{nbytes:,}"}
        for name, (count, numbers, nbytes) in found.by_encoding().items()
    ]
    show_table(rows)
    if tensors:
        print()
        show_table(
            [
                {"tensor": t.name, "shape": " x ".join(map(str, t.shape)), "encoding": t.encoding, "bytes": t.nbytes}
                for t in found.tensors
            ]
        )
    print()
    for key, value in found.facts.items():
        print(f"{key} = {value}")


def verdict_lines(verdict: Verdict) -> list[str]:
    """A verdict as columns, with what would mend each row that is not kept."""
    from llmpack.target.verdict_table import verdict_rows

    head = ("limit", "wanted", "found", "status", "by")
    body = columns([head, *verdict_rows(verdict)])
    lines = [body[0]]
    for line, row in zip(body[1:], verdict.rows, strict=True):
        start = line.index(f"  {row.status}") + 2
        lines.append(line[:start] + coloured(row.status) + line[start + len(row.status) :])
    for row in verdict.rows:
        if row.status != "PASS":
            lines.append(
                f"  {row.limit}: {row.reason or 'the limit is not kept'}" + (f"; {row.cure}" if row.cure else "")
            )
    return lines


def verdicts_lines(verdicts: Sequence[Verdict]) -> list[str]:
    """Verdicts of several devices as one table, with what would mend each row that is not kept; of one as usual."""
    from llmpack.target.verdict_table import device_rows

    if len(verdicts) == 1:
        return verdict_lines(verdicts[0])
    lines = columns(device_rows(verdicts))
    for verdict in verdicts:
        for row in verdict.rows:
            if row.status != "PASS":
                cure = f"; {row.cure}" if row.cure else ""
                lines.append(f"  {row.limit} on {verdict.device}: {row.reason or 'the limit is not kept'}{cure}")
    return lines


def show_checked(checked: Checked) -> None:
    """A file judged."""
    names = ", ".join(verdict.device for verdict in checked.verdicts)
    print(f"{checked.path} for {names} at {checked.verdicts[0].context} tokens of context, {checked.source}:")
    print("\n".join(verdicts_lines(checked.verdicts)))
    for note in dict.fromkeys(note for found in checked.estimates for note in found.assumptions):
        print(f"note: {note}")


def show_device(found: Device) -> None:
    """A device with every figure, and what its instruction sets mean for models."""
    from llmpack.cli.listing import device_rows
    from llmpack.target.memory_model import repacked_rows

    print(f"{found.name}: {found.description} ({found.arch}, {found.cpu})")
    show_table(device_rows(found))
    if found.instruction_sets is None:
        print("\nwhich encodings llama.cpp has fast kernels for is unknown, as the instruction sets are")
        return
    names = ", ".join(sorted(repacked_rows(found.instruction_sets))) or "none"
    print(f"\nrepacked for its fastest kernels (a mapped file then stands in memory twice): {names}")


def _makes(graph: ModelGraph, before: ModelGraph) -> str:
    """What a step makes: the encodings, and the size where that changes."""
    encodings = ", ".join(_encodings(graph))
    if graph.parameters == before.parameters:
        return encodings
    return f"{encodings}; {graph.parameters:,} parameters in {graph.block_count} blocks"


def show_plan(build: Build) -> None:
    """What a build would do and make."""
    plan = build.plan
    source = build.origin.graph
    print(f"{build.recipe.name}: {source.family}, {source.parameters:,} parameters, {source.block_count} blocks")
    what = "model file" if build.recipe.bundle.format == "gguf" else "model folder"
    print(f"{what}: {plan.nbytes:,} bytes ({format_size(plan.nbytes)}), {plan.bits_per_weight:.3f} bits per weight")
    before = [source, *(step.graph for step in plan.steps)]
    if plan.bounds is not None:
        low, high = plan.bounds
        print(f"  still to be chosen: between {low:,} and {high:,} bytes; a stand-in is shown here")
    rows = [
        {"step": step.step.use, "makes": _makes(step.graph, graph), "state": step.state}
        for step, graph in zip(plan.steps, before, strict=False)
    ]
    show_table(rows)
    for asked, planned in zip(build.recipe.step, plan.steps, strict=True):
        if asked.open_amount is not None:
            print(f'{asked.use}: {asked.open_amount} = "budget" is {getattr(planned.step, asked.open_amount)} here')
    if plan.alternative is not None:
        print(plan.alternative.words())
    _show_choices(plan)
    for look in plan.outlooks:
        if look.estimate.memory:
            print(f"\nmemory at {look.estimate.context} tokens of context on {look.device.name} (estimate):")
            show_memory(look.estimate.memory)
    _show_host_memory(plan.host_memory)
    for need in plan.disk_needs:
        print(f"disk for {need.what}: {format_size(need.needed)} of {format_size(need.free)} free in {need.folder}")
    for note in dict.fromkeys([*plan.twice, *(note for look in plan.outlooks for note in look.estimate.assumptions)]):
        print(f"note: {note}")
    if plan.verdict.rows:
        names = ", ".join(verdict.device for verdict in plan.verdicts)
        print(f"\nbudget, by the estimate alone, for {names}:")
        print("\n".join(verdicts_lines(plan.verdicts)))


def _show_choices(plan: Plan) -> None:
    from llmpack.cli.explain import show_choice

    for choice in plan.choices:
        if choice.scored:
            show_choice(choice)


def show_memory(found: MemoryEstimate) -> None:
    """The terms of a memory estimate, their sum, how much of it is needed, and the other ways to load the model."""
    rows = [{"part": t.name, "size": format_size(t.nbytes), "why": t.why} for t in found.terms]
    mode = f'with load = "{found.load}"' if found.other_load else ""
    rows.append({"part": "in all", "size": format_size(found.total.value), "why": mode})
    if found.hard < found.total.value:
        why = "the rest is mapped originals that nothing reads any more; the system may drop their pages"
        rows.append({"part": "thereof needed", "size": format_size(found.hard), "why": why})
    show_table(rows)
    for line in found.advice:
        print(line)


def _show_host_memory(memory: HostMemory) -> None:
    """The moment of building that takes most memory, part by part."""
    silent = [step.use for step in memory.steps if not step.moments]
    if memory.largest is not None:
        step, moment = memory.largest
        limit = "" if memory.limit is None else f", of {format_size(memory.limit)} allowed"
        print(f"\nmemory to build (predicted): {format_size(moment.nbytes)}{limit}; {step.use}, {moment.name}:")
        show_table([{"part": part.name, "size": format_size(part.nbytes)} for part in moment.parts if part.nbytes])
    if silent:
        print(f"memory to build is not predicted for {', '.join(silent)}")


def _encodings(graph: Any) -> list[str]:
    return list(dict.fromkeys(spec.encoding for spec in graph.tensors if len(spec.shape) > 1))


def show_built(build: Build) -> None:
    """A finished bundle."""
    artifact, verdicts = build.artifact, build.observed.verdicts
    bits = build.plan.bits_per_weight
    print(f"{build.final}: {format_size(artifact.nbytes)}, {bits:.3f} bits per weight, sha256 {artifact.sha256}")
    _show_choices(build.plan)
    word = "PASS" if all(verdict.passes for verdict in verdicts) else "FAIL"
    names = ", ".join(verdict.device for verdict in verdicts)
    print(f"verdict for {names} at {build.verdict.context} tokens of context: {coloured(word)}")
    print("\n".join(verdicts_lines(verdicts)))
    for note in build.observed.notes:
        print(f"note: {note}")


def show_profile(profile: Profile) -> None:
    """Where the time went; rates are by wall clock."""
    rows = [
        {
            "phase": row["phase"],
            "time": format_seconds(row["seconds"]),
            "share": f"{row['share']:.1%}",
            "processor": format_seconds(row["cpu_seconds"]),
            "tok/s": _figure(row["tokens_per_second"]),
            "GFLOP/s": _figure(row["gflops"]),
            "M weights/s": _figure(row["million_weights_per_second"]),
        }
        for row in profile.rows()
    ]
    print()
    show_table(rows)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"


def show_quality(found: Evaluated) -> None:
    """A comparison with the source."""
    report = found.report
    print(f"{found.path} against its source on {report['tokens']} tokens of {', '.join(found.text)}:")
    spread = f"p99 {report['p99']:.3f}, max {report['max']:.3f} nats"
    print(f"KL divergence  mean {report['mean']:.4f} +- {report['stderr']:.4f}, {spread}")
    print(f"same top token {report['top1']:.2%}")
    print(f"perplexity     {report['ppl_ratio']:.4f} of the source's")
