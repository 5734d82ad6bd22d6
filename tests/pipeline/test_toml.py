"""Positions, overrides, and everything TOML that no recipe may be."""

import re
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmpack.errors import RecipeError
from llmpack.pipeline.toml_positions import dotted, parse_toml, read_toml

TEXT = """\
schema = 1
"a b".c = 2
[source]
model = "x"
q = { kl = 0.1, top1 = 0.2, "x.y@0" = [1, {a=2}] }
[[step]]
use = "a"
[step.exceptions]
"ffn.down" = "q"
[[step]]
v = "ä" # a comment
"""


def test_places_point_at_values_and_keys_at_keys():
    document = parse_toml(TEXT.encode(), "r.toml")
    expected = {
        ("schema",): ("1:1", "1:10"),
        ("a b", "c"): ("2:7", "2:11"),
        ("source",): ("3:2", "3:2"),
        ("source", "q", "top1"): ("5:17", "5:24"),
        ("source", "q", "x.y@0", 1, "a"): ("5:44", "5:46"),
        ("step", 0, "use"): ("7:1", "7:7"),
        ("step", 0, "exceptions", "ffn.down"): ("9:1", "9:14"),
        ("step", 1): ("10:3", "10:3"),
    }
    for key, (of_key, of_value) in expected.items():
        assert document.where(key, of_key=True) == f"r.toml:{of_key}"
        assert document.where(key) == f"r.toml:{of_value}"


def test_a_place_that_does_not_exist_is_the_table_around_it():
    document = parse_toml(TEXT.encode(), "r.toml")
    assert document.where(("step", 1, "encoding")) == "r.toml:10:3"
    assert document.where(("budget", "memory")) == "r.toml"


def test_columns_count_characters_not_bytes():
    document = parse_toml('a = { "ü" = 1, b = 2 }\n'.encode(), "r.toml")
    assert document.where(("a", "b"), of_key=True) == "r.toml:1:16"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\xef\xbb\xbfa = 1", "r.toml:1:1: begins with a byte order mark"),
        ("a = 1".encode("utf-16"), "r.toml:1:1: begins with a byte order mark"),
        (b"a = 1\nb = '\xff'", "r.toml:2:6: byte 0xff is not UTF-8"),
        (b"a = " + b"7" * 5000, "r.toml:1:5: a whole number of 5000 digits"),
        (b"a = " + b"[" * 2000 + b"]" * 2000, "nested deeper than 32"),
        (b"a = " + b"[" * 40 + b"]" * 40, "r.toml:1:5 a: values are nested deeper than 32"),
        (b"a = nan", "r.toml:1:5 a: nan is not a finite number"),
        (b"b = [1, -inf]", "r.toml:1:9 b.1: -inf is not a finite number"),
        (b"a = 9223372036854775808", "r.toml:1:5 a: whole numbers end at"),
        (b"a = 2020-01-01", "r.toml:1:5 a: 2020-01-01 is a date"),
        (b"a = ", "r.toml:1:5: not TOML: Invalid value"),
        (b"a = 1\na = 2", "r.toml:2:6: not TOML: Cannot overwrite a value"),
        (b"[a\n", "not TOML"),
        (b'a = """', "not TOML"),
        (b"#" * (1 << 20) + b"\n", "the limit is 1048576"),
    ],
    ids=lambda value: value[:12] if isinstance(value, bytes) else "",
)
def test_what_is_no_recipe_is_refused_at_its_place(data, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        parse_toml(data, "r.toml")


def test_all_unsuitable_values_are_named_at_once():
    with pytest.raises(RecipeError) as caught:
        parse_toml(b"a = nan\nb = [1, inf]\nc = 2020-01-01\n", "r.toml")
    assert [problem.where for problem in caught.value.problems] == ["r.toml:1:5", "r.toml:2:9", "r.toml:3:5"]


def test_a_missing_file_is_a_recipe_error(tmp_path):
    with pytest.raises(RecipeError, match="No such file"):
        read_toml(tmp_path / "none.toml")


def test_overrides_set_values_of_every_kind():
    document = parse_toml(TEXT.encode(), "r.toml").with_overrides(
        [
            "step.1.use=c",
            'step.0.exceptions."ffn.down"=q8_0',
            "budget.memory=350 MiB",
            "source.q.kl=0.5",
            "source.ok=true",
        ]
    )
    assert document.values["step"][1]["use"] == "c"
    assert document.values["step"][0]["exceptions"] == {"ffn.down": "q8_0"}
    assert document.values["budget"] == {"memory": "350 MiB"}
    assert document.values["source"]["q"]["kl"] == 0.5
    assert document.values["source"]["ok"] is True
    assert document.where(("budget", "memory")) == "--set"
    assert document.where(("step", 0, "use")) == "r.toml:7:7"


def test_an_override_leaves_the_document_alone():
    document = parse_toml(TEXT.encode(), "r.toml")
    document.with_overrides(["schema=2"])
    assert document.values["schema"] == 1


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("x", "has no `=`"),
        ("=3", "`` is not a path"),
        ("a b=3", "`a b` is not a path"),
        ("a\nb=3", "is not a path"),
        ("step.7.use=c", "step has 2 elements, counted from 0; there is no element `7`"),
        ("step.x.use=c", "there is no element `x`"),
        ("step.2=c", "there is no element `2`"),
        ("schema.x=1", "schema is no table"),
        ("schema.x.y=1", "schema is no table"),
        ("schema=nan", "--set schema: nan is not a finite number"),
    ],
)
def test_impossible_overrides_say_why(assignment, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        parse_toml(TEXT.encode(), "r.toml").with_overrides([assignment])


def test_all_impossible_overrides_are_named_at_once():
    with pytest.raises(RecipeError) as caught:
        parse_toml(TEXT.encode(), "r.toml").with_overrides(["x", "step.7.use=c", "y=inf"])
    assert len(caught.value.problems) == 3


@given(st.binary(max_size=60))
def test_any_bytes_are_a_document_or_a_recipe_error(data):
    try:
        values = parse_toml(data, "r.toml").values
    except RecipeError:
        return
    assert values == tomllib.loads(data.decode())


KEYS = st.text(alphabet="ab.é \"'\\0-_@", min_size=1, max_size=6)
VALUES = st.recursive(
    st.integers(-9, 9) | st.booleans() | st.text(alphabet='xy "\\', max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)


def _toml(value):
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_quoted(k)} = {_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return _quoted(value) if isinstance(value, str) else str(value).lower()


def _quoted(text):
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


@given(st.dictionaries(KEYS, VALUES, min_size=1, max_size=4))
def test_every_value_has_a_place_and_the_place_is_right(values):
    text = "".join(f"{_quoted(key)} = {_toml(value)}\n" for key, value in values.items())
    document = parse_toml(text.encode(), "r.toml")
    assert document.values == values
    stack = [((), values)]
    while stack:
        key, value = stack.pop()
        children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        stack += [((*key, name), inner) for name, inner in children]
        if key:
            _, line, column = document.places[key].split(":")
            assert text.splitlines()[int(line) - 1][int(column) - 1 :].startswith(_toml(value))


def test_dotted_paths_quote_what_needs_quotes():
    assert dotted(("step", 0, "exceptions", "ffn.down@0-3")) == 'step.0.exceptions."ffn.down@0-3"'
