"""Units, digests, tables, errors, lazy modules."""

import math
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmpack import digest, errors, units
from llmpack.lazy import LazyModule
from llmpack.registry import Table, suggestion


@pytest.mark.parametrize(
    ("text", "count"),
    [("2.5 GiB", 2_684_354_560), ("2.5 GB", 2_500_000_000), ("900MB", 900_000_000), ("1 B", 1), ("64 KiB", 65536)],
)
def test_sizes(text, count):
    assert units.parse_size(text) == count


@pytest.mark.parametrize(
    "text", ["2G", "2", 2, 2.5, "8 gigs", "-1 GiB", "1e3 MB", "", "GiB", "nan GiB", None, "9" * 80]
)
def test_sizes_without_a_clear_unit_are_refused(text):
    with pytest.raises(ValueError, match=r"unit|size"):
        units.parse_size(text)


def test_a_bare_letter_gets_both_meanings_as_suggestion():
    with pytest.raises(ValueError, match=r"GB or GiB"):
        units.parse_size("2G")


@given(st.integers(0, 1 << 50))
def test_sizes_survive_printing_to_four_digits(count):
    assert units.parse_size(units.format_size(count)) == pytest.approx(count, rel=6e-4, abs=1)


def test_times_and_rates():
    assert units.parse_seconds("300 ms") == pytest.approx(0.3)
    assert units.parse_seconds("2 min") == 120
    assert units.parse_rate("8 tok/s") == 8
    with pytest.raises(ValueError, match="rate"):
        units.parse_rate("8 tokens")
    with pytest.raises(ValueError, match="time"):
        units.parse_seconds("3 sec")
    assert units.format_seconds(250) == "4 min 10 s"
    assert units.format_seconds(3725) == "1 h 02 min"


def test_canonical_json_is_independent_of_order_and_tells_floats_from_ints():
    assert digest.canonical_json({"b": 1, "a": [1.5, None]}) == digest.canonical_json({"a": (1.5, None), "b": 1})
    assert digest.sha256_value(1.0) != digest.sha256_value(1)
    assert digest.sha256_value(math.nan) == digest.sha256_value(float("nan"))
    with pytest.raises(TypeError):
        digest.canonical_json({"a": object()})


def test_file_digest_equals_byte_digest(tmp_path):
    (tmp_path / "f").write_bytes(b"abc" * 5_000_000)
    assert digest.sha256_file(tmp_path / "f") == digest.sha256_bytes(b"abc" * 5_000_000)


def every_error() -> list[type[errors.LlmpackError]]:
    found, queue = [], [errors.LlmpackError]
    while queue:
        queue += queue[0].__subclasses__()
        found.append(queue.pop(0))
    return [e for e in found if not e.__name__.startswith("_")]


def test_exit_codes_are_those_of_the_tree_in_the_docstring():
    for error in every_error():
        if error.__module__ == "llmpack.errors":
            line = next(x for x in errors.__doc__.splitlines() if error.__name__ in x)
            assert f" {error.exit_code} " in line


def test_listed_errors_show_every_problem():
    error = errors.RecipeError([errors.Problem("too big", "budget.memory", "r.toml:3:1"), "second"])
    assert str(error) == "r.toml:3:1 budget.memory: too big\nsecond"
    assert len(error.problems) == 2


def test_tables_load_late_and_suggest():
    table: Table[type] = Table("thing", {"ordered": "collections:OrderedDict", "broken": "no_such_module:x"})
    assert table.load("ordered").__name__ == "OrderedDict"
    assert list(table) == ["ordered", "broken"]
    with pytest.raises(errors.UsageError, match="did you mean `ordered`"):
        table.load("orderd")
    with pytest.raises(ModuleNotFoundError):
        table.load("broken")
    assert suggestion("zzz", ["a", "b"]) == "; known: a, b"


def test_lazy_modules_load_at_first_use_and_name_the_extra():
    sys.modules.pop("this", None)
    lazy = LazyModule("colorsys")
    assert lazy.rgb_to_hsv(0, 0, 0) == (0, 0, 0)
    with pytest.raises(errors.MissingExtra, match=r"llmpack\[run\]"):
        _ = LazyModule("no_such_package", "run").anything
