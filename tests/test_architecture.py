"""The house itself: imports point downward, files stay small, names say something."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "llmpack"

# Floors from top to bottom; rooms on one floor do not see each other.
FLOORS = (
    {"__main__"},
    {"cli"},
    {"pipeline"},
    {"steps", "formats", "target"},
    {"calibration"},
    {"models"},
    {"runtime"},
    {"algorithms", "checkpoint"},
    {"encodings"},
    {"registry", "process", "parallel", "compiled"},
    {"lazy", "gpu"},
    {"errors", "units", "documented", "digest", "progress", "profile", "allocator", "torchvision_operators"},
)
FLOOR_OF = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
MODULES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def upward(path: Path) -> list[str]:
    here = room_of(path)
    rooms = {name.split(".")[1] for name in imports_of(path) if name.startswith("llmpack.")}
    rooms &= FLOOR_OF.keys()
    return sorted(r for r in rooms if r != here and FLOOR_OF[r] <= FLOOR_OF[here])


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downward(path):
    if room_of(path) != "__init__":
        assert upward(path) == []


def test_every_room_has_a_floor():
    assert {room_of(path) for path in MODULES} - {"__init__"} <= FLOOR_OF.keys()


def test_the_import_check_sees_a_planted_upward_import(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    planted = tmp_path / "algorithms" / "planted.py"
    planted.parent.mkdir()
    planted.write_text("from llmpack.pipeline.recipe import Recipe\nfrom llmpack.checkpoint import x\n")
    assert upward(planted) == ["checkpoint", "pipeline"]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_and_functions_stay_small(path):
    source = path.read_text()
    assert len(source.splitlines()) <= 400
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60, f"{path.name}:{node.lineno} {node.name}"


def test_no_room_for_leftovers():
    leftovers = {"utils", "helpers", "common", "misc", "util"}
    assert [p for p in MODULES if p.stem in leftovers] == []


def test_every_module_imports_without_torch():
    names = [".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in MODULES]
    names = [n for n in names if not n.endswith("__main__")]
    code = (
        "import importlib, sys\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "heavy = {'torch', 'transformers', 'accelerate', 'llama_cpp'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
