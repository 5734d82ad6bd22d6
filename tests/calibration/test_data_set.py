"""Data sets as text: what is refused, what is missing, and, where `datasets` is installed, what is read."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest

from llmpack.calibration.text import read_texts
from llmpack.errors import EnvironmentProblem, MissingExtra, RecipeError

COMMIT = "0123456789" * 4
INSTALLED = find_spec("datasets") is not None


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").mkdir()
    lines = [{"text": f"sentence {i} of a data set", "number": i} for i in range(5)]
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


@pytest.mark.parametrize(
    "source",
    ["owner/name/train#text", f"owner/name@{COMMIT}/train", "owner/name@main/train#text", f"name@{COMMIT}/train#text"],
)
def test_a_data_set_is_named_with_commit_split_and_field(source, tmp_path):
    with pytest.raises(RecipeError, match="write dataset:OWNER/NAME@COMMIT/SPLIT#FIELD"):
        read_texts([f"dataset:{source}"], tmp_path)


def test_a_folder_that_is_not_there_is_told(tmp_path):
    with pytest.raises(RecipeError, match="there is no folder"):
        read_texts(["dataset:./data/train#text"], tmp_path)


@pytest.mark.skipif(INSTALLED, reason="the package datasets is installed")
def test_without_the_library_the_extra_is_named(folder):
    with pytest.raises(MissingExtra, match=r"`datasets` is not installed.*llmpack\[data\]") as caught:
        read_texts(["dataset:./data/train#text"], folder)
    assert caught.value.exit_code == 6


def test_an_offline_build_does_not_look_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(EnvironmentProblem, match="the build is offline"):
        read_texts([f"dataset:owner/name@{COMMIT}/train#text"], tmp_path, offline=True)


@pytest.mark.skipif(not INSTALLED, reason="the package datasets is not installed")
def test_rows_of_a_folder_are_read_in_order(folder, monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    found = read_texts(["dataset:./data/train[1:4]#text"], folder)
    assert found == [f"sentence {i} of a data set" for i in (1, 2, 3)]
    with pytest.raises(RecipeError, match="no column `words`; there are text, number"):
        read_texts(["dataset:./data/train#words"], folder)
    with pytest.raises(RecipeError, match="column `number` holds no text but int"):
        read_texts(["dataset:./data/train#number"], folder)
    with pytest.raises(RecipeError, match="nowhere"):
        read_texts(["dataset:./data/nowhere#text"], folder)
