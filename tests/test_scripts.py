"""Scripts that no test runs to the end: what they take from llmpack is there."""

import ast
import importlib
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"
PYTHON = sorted(
    path
    for path in SCRIPTS.rglob("*")
    if path.is_file() and (path.suffix == ".py" or b"python" in path.read_bytes()[:40])
)


def missing(source: str) -> list[str]:
    """Names that a script imports from llmpack, and that llmpack does not have."""
    lost = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "llmpack":
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                if not hasattr(module, alias.name):
                    try:
                        importlib.import_module(f"{node.module}.{alias.name}")
                    except ModuleNotFoundError:
                        lost.append(f"{node.module}.{alias.name}")
    return lost


def test_scripts_are_found():
    assert {"prune", "quality", "seven_b", "samples.py"} <= {path.name for path in PYTHON}


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: path.name)
def test_what_a_script_imports_is_there(path):
    assert missing(path.read_text()) == []


def test_a_name_that_is_gone_is_seen():
    assert missing("from llmpack.digest import sha256_value, gone") == ["llmpack.digest.gone"]
