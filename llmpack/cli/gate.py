"""What pipelines read beside the exit code: JUnit XML, GitHub's annotations and its step summary.

A limit that failed is a failure, one that could not be measured is an error: neither is ever shown as skipped.
Sources: the JUnit schema of Apache Ant as CI servers read it; GitHub's workflow commands (``::error``, escaping of
``%``, line ends, ``:`` and ``,``) and ``GITHUB_STEP_SUMMARY``.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from llmpack.errors import LlmpackError, UsageError

if TYPE_CHECKING:
    from llmpack.pipeline.check import Checked
    from llmpack.target.budget import Row, Verdict

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_KINDS = {"FAIL": "failure", "UNMEASURED": "error"}


def reported(path: Path, junit: Path | None, judge: Callable[[], Checked]) -> Checked:
    """What `judge` says, written where a pipeline looks for it; an error of llmpack is written there too, and raised.

    Raises UsageError, before anything is judged, for a file that cannot be written.
    """
    if junit is not None and not junit.resolve().parent.is_dir():
        raise UsageError(f"--junit {junit}: there is no folder {junit.resolve().parent}")
    try:
        checked = judge()
    except LlmpackError as error:
        _write(junit, error_document(path, error), [annotation(f"llmpack check {path.name}", str(error), path)], "")
        raise
    rows = [(verdict, row) for verdict in checked.verdicts for row in verdict.rows if row.status != "PASS"]
    lines = [annotation(f"{row.limit} on {verdict.device}: {row.status}", row.text, path) for verdict, row in rows]
    _write(junit, verdict_document(path, checked.verdicts), lines, summary(path, checked.verdicts))
    return checked


def _write(junit: Path | None, document: bytes, annotations: list[str], text: str) -> None:
    from llmpack.checkpoint.atomic import write_atomic

    if junit is not None:
        write_atomic(junit, document)
    if os.environ.get("GITHUB_ACTIONS") == "true":
        print("\n".join(annotations), file=sys.stderr, flush=True)
    target = os.environ.get("GITHUB_STEP_SUMMARY")
    if target and text:
        with Path(target).open("a", encoding="utf-8") as file:
            file.write(text)


def _text(text: str) -> str:
    """What XML 1.0 can hold of a text."""
    return _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text)


def _document(suites: list[ElementTree.Element]) -> bytes:
    root = ElementTree.Element("testsuites", name="llmpack check")
    root.extend(suites)
    ElementTree.indent(root)
    return bytes(ElementTree.tostring(root, "utf-8", xml_declaration=True)) + b"\n"


def _suite(name: str, cases: list[ElementTree.Element]) -> ElementTree.Element:
    counts = {f"{kind}s": str(sum(case.find(kind) is not None for case in cases)) for kind in _KINDS.values()}
    suite = ElementTree.Element("testsuite", {"name": _text(name), "tests": str(len(cases)), **counts, "skipped": "0"})
    suite.extend(cases)
    return suite


def verdict_document(path: Path, verdicts: tuple[Verdict, ...]) -> bytes:
    """JUnit XML: a suite for each device, a case for each limit."""
    return _document([_suite(f"{path} on {v.device}", [_case(v, row) for row in v.rows]) for v in verdicts])


def _case(verdict: Verdict, row: Row) -> ElementTree.Element:
    case = ElementTree.Element("testcase", classname=_text(f"budget.{verdict.device}"), name=row.limit)
    if row.status in _KINDS:
        problem = ElementTree.SubElement(case, _KINDS[row.status], message=_text(row.text), type=row.status)
        problem.text = _text(row.text)
    else:
        ElementTree.SubElement(case, "system-out").text = _text(row.text)
    return case


def error_document(path: Path, error: LlmpackError) -> bytes:
    """JUnit XML of a check that came to no verdict."""
    case = ElementTree.Element("testcase", classname="budget", name="check")
    problem = ElementTree.SubElement(case, "error", message=_text(str(error)), type=type(error).__name__)
    problem.text = _text(str(error))
    return _document([_suite(str(path), [case])])


def annotation(title: str, message: str, path: Path) -> str:
    """One ``::error`` line of GitHub's workflow commands."""
    plain = {"%": "%25", "\r": "%0D", "\n": "%0A"}
    in_property = {**plain, ":": "%3A", ",": "%2C"}
    shown = ",".join(f"{key}={_escaped(value, in_property)}" for key, value in (("title", title), ("file", str(path))))
    return f"::error {shown}::{_escaped(message, plain)}"


def _escaped(text: str, table: Mapping[str, str]) -> str:
    return "".join(table.get(letter, letter) for letter in text)


def summary(path: Path, verdicts: tuple[Verdict, ...]) -> str:
    """Markdown for the page of a run: a table for each device."""
    from llmpack.target.verdict_table import verdict_rows

    parts = []
    for verdict in verdicts:
        word = "PASS" if verdict.passes else "FAIL"
        parts.append(f"### {word}: `{path}` on {verdict.device} at {verdict.context} tokens of context\n")
        rows = [("limit", "wanted", "found", "status", "by"), ("---",) * 5, *verdict_rows(verdict)]
        parts += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
        parts.append("")
        parts += [f"- {row.text}" for row in verdict.rows if row.status != "PASS"]
    return "\n".join(parts) + "\n"
