"""The hub: the cache is enough where it is whole, a download brings only what may be read."""

import json

import pytest
from checkpoint_files import CONFIG, rules, write_folder, write_sharded
from hub_server import COMMIT, Hub
from huggingface_hub import constants

from llmpack.checkpoint import hub
from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.checkpoint.source import SourceRef, locate
from llmpack.errors import EnvironmentProblem, InputRejected


def files_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def lay_out(store, files, revision="main"):
    """A cache as huggingface_hub's guide describes it: blobs, links in a snapshot, a ref."""
    home = store / "models--org--name"
    for part in ("blobs", "refs", f"snapshots/{COMMIT}"):
        (home / part).mkdir(parents=True)
    (home / "refs" / revision).write_text(COMMIT)
    for number, (name, data) in enumerate(files.items()):
        (home / "blobs" / f"{number:040x}").write_bytes(data)
        (home / "snapshots" / COMMIT / name).symlink_to(f"../../blobs/{number:040x}")
    return home


@pytest.fixture(autouse=True)
def online(monkeypatch):
    """Whatever the environment says; only the local server is ever asked."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "store"))
    return tmp_path / "store"


@pytest.mark.parametrize("make", [write_folder, write_sharded])
@pytest.mark.parametrize("revision", ["main", COMMIT])
def test_a_whole_cache_is_enough(store, tmp_path, make, revision):
    lay_out(store, files_of(make(tmp_path / "model")))
    located = locate(SourceRef.parse(f"hf:org/name@{revision}"), offline=True)
    assert located.kind == "folder"
    assert located.resolved == {"source": "hf", "repository": "org/name", "revision": revision, "commit": COMMIT}
    assert len(Checkpoint.open(located.path).tensors) == 3


def test_branches_with_slashes_are_refs_too(store, folder):
    home = lay_out(store, files_of(folder))
    (home / "refs" / "refs" / "pr").mkdir(parents=True)
    (home / "refs" / "refs" / "pr" / "1").write_text(COMMIT)
    assert hub.snapshot("org/name", "refs/pr/1", offline=True).commit == COMMIT


@pytest.mark.parametrize("switch", ["offline", "HF_HUB_OFFLINE"])
def test_offline_and_nothing_cached(store, monkeypatch, switch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", switch == "HF_HUB_OFFLINE")
    with pytest.raises(EnvironmentProblem, match="hf download org/name --revision main") as problem:
        hub.snapshot("org/name", "main", offline=switch == "offline")
    assert "config.json" in str(problem.value)
    assert ("HF_HUB_OFFLINE is set" in str(problem.value)) == (switch == "HF_HUB_OFFLINE")


@pytest.mark.parametrize(
    "missing", ["config.json", "model-00002-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json"]
)
def test_offline_and_a_partial_cache_names_the_missing_files(store, sharded, missing):
    files = files_of(sharded)
    del files[missing]
    lay_out(store, files)
    with pytest.raises(EnvironmentProblem) as problem:
        hub.snapshot("org/name", "main", offline=True)
    assert missing in str(problem.value)
    assert "config.json" not in str(problem.value) or missing == "config.json"


def test_a_link_without_its_blob_is_missing(store, folder):
    home = lay_out(store, files_of(folder))
    (home / "snapshots" / COMMIT / "model.safetensors").resolve().unlink()
    with pytest.raises(EnvironmentProblem, match=r"model\.safetensors"):
        hub.snapshot("org/name", "main", offline=True)


def test_a_ref_that_is_no_commit_is_not_believed(store, folder):
    home = lay_out(store, files_of(folder))
    (home / "refs" / "main").write_text("../../../elsewhere")
    with pytest.raises(EnvironmentProblem):
        hub.snapshot("org/name", "main", offline=True)


def test_a_download_brings_what_may_be_read_and_pins_the_branch(tmp_path, sharded):
    wanted = files_of(sharded) | {"LICENSE": b"text", "README.md": b"---\nlicense: mit\n---\n"}
    other = {
        "pytorch_model.bin": b"pickle",
        "consolidated.safetensors": b"again",
        "model.gguf": b"GGUF",
        "original/params.json": b"{}",
        "image.png": b"png",
    }
    with Hub(wanted | other) as served:
        found = hub.snapshot("org/name", "main", offline=False, cache=tmp_path / "c", endpoint=served.endpoint)
        assert found.commit == COMMIT
        assert set(served.fetched) == wanted.keys()
        first_weights = min(i for i, name in enumerate(served.fetched) if name.endswith(".safetensors"))
        assert served.fetched.index("config.json") < first_weights
    assert files_of(found.folder) == wanted
    assert len(Checkpoint.open(found.folder).tensors) == 3
    again = hub.snapshot("org/name", "main", offline=True, cache=tmp_path / "c")
    assert again == found


@pytest.mark.parametrize(
    ("change", "rule", "fetched"),
    [
        ({"modeling_x.py": b"raise SystemExit"}, "remote-code", set()),
        ({"model.safetensors": None, "pytorch_model.bin": b"x"}, "pickle-weights", set()),
        ({"model.safetensors": None, "m.gguf": b"x"}, "not-weights", set()),
        (
            {"config.json": json.dumps(CONFIG | {"auto_map": {"AutoModel": "x.X"}}).encode()},
            "remote-code",
            {"config.json", "tokenizer.json", "tokenizer_config.json"},
        ),
        ({"config.json": None}, "not-weights", {"model.safetensors", "tokenizer.json", "tokenizer_config.json"}),
    ],
)
def test_hostile_repositories_are_refused_before_their_weights_are_fetched(tmp_path, folder, change, rule, fetched):
    files = {name: data for name, data in (files_of(folder) | change).items() if data is not None}
    with Hub(files) as served, pytest.raises(InputRejected) as refusal:
        hub.snapshot("org/name", "main", offline=False, cache=tmp_path / "c", endpoint=served.endpoint)
    assert rules(refusal) == {rule}
    assert set(served.fetched) == fetched


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (401, "GatedRepo", "HF_TOKEN"),
        (403, "GatedRepo", "gated"),
        (404, "RepoNotFound", "no such repository"),
        (500, "", "cannot be reached"),
    ],
)
def test_refusals_of_the_hub_are_explained(tmp_path, status, code, said):
    with Hub({}, status, code) as served, pytest.raises(EnvironmentProblem, match=said):
        hub.snapshot("org/name", "main", offline=False, cache=tmp_path / "c", endpoint=served.endpoint)


def test_an_unknown_revision_is_explained(tmp_path, folder):
    with Hub(files_of(folder)) as served, pytest.raises(EnvironmentProblem, match="no such commit, tag or branch"):
        hub.snapshot("org/name", "v9", offline=False, cache=tmp_path / "c", endpoint=served.endpoint)


def test_a_hub_that_is_not_there_is_explained(tmp_path):
    with pytest.raises(EnvironmentProblem, match="cannot be reached"):
        hub.snapshot("org/name", "main", offline=False, cache=tmp_path / "c", endpoint="http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("config.json", True),
        ("tokenizer.model", True),
        ("model-00001-of-00002.safetensors", True),
        ("LICENSE.txt", True),
        ("Notice", True),
        ("USE_POLICY.md", True),
        ("pytorch_model.bin", False),
        ("consolidated.safetensors", False),
        ("consolidated.00.safetensors", False),
        ("license.py", False),
        ("sub/model.safetensors", False),
        ("modeling.py", False),
        ("training_args.bin", False),
    ],
)
def test_only_known_names_are_fetched(name, wanted):
    assert hub.is_wanted(name) is wanted
