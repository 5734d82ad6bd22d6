"""Bundles: what is accepted, what is refused with every difference, and publishing under crashes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llmpack.errors import UsageError, VerificationFailed
from llmpack.formats.bundle import (
    REQUIRED,
    SUMS,
    Bundle,
    begin_bundle,
    copy_licences,
    name_problem,
    publish_bundle,
    write_sums,
)


def fill(folder: Path, text: str = "new") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in REQUIRED:
        if name != SUMS:
            (folder / name).write_text(f'{{"made": "{text}"}}' if name == "manifest.json" else f"{name} {text}\n")
    (folder / "LICENSE").write_text("text\n")
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def bundle(tmp_path) -> Path:
    folder = fill(tmp_path / "bundle")
    write_sums(folder)
    return folder


def problems(folder: Path, **how) -> list[str]:
    with pytest.raises(VerificationFailed) as refusal:
        Bundle.open(folder, **how)
    assert refusal.value.exit_code == 8
    return [p.message for p in refusal.value.problems]


def test_a_bundle_opens(bundle):
    opened = Bundle.open(bundle)
    assert opened.manifest == {"made": "new"}
    assert set(opened.digests) == {*REQUIRED, "LICENSE"} - {SUMS}
    assert opened.model == bundle / "model.gguf"
    assert opened.nbytes == sum(p.stat().st_size for p in bundle.iterdir())


def test_a_model_folder_stands_in_for_the_file(bundle):
    (bundle / "model.gguf").rename(bundle / "model.safetensors")
    write_sums(bundle)
    assert problems(bundle) == ["model.gguf is missing; a bundle has it"]
    (bundle / "config.json").write_text("{}")
    write_sums(bundle)
    assert Bundle.open(bundle).model == bundle


def test_the_digests_are_those_of_coreutils(bundle):
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", SUMS], cwd=bundle, check=True)
    assert (bundle / SUMS).read_text().splitlines() == sorted(
        (bundle / SUMS).read_text().splitlines(), key=lambda line: line[66:]
    )


def test_every_difference_is_listed(bundle):
    (bundle / "extra.txt").write_text("x")
    (bundle / "recipe.toml").unlink()
    (bundle / "LICENSE").unlink()
    data = bytearray((bundle / "model.gguf").read_bytes())
    data[3] ^= 1
    (bundle / "model.gguf").write_bytes(data)
    found = problems(bundle)
    assert [f for f in found if "recipe.toml is missing" in f]
    assert [f for f in found if "LICENSE is listed in SHA256SUMS and missing" in f]
    assert [f for f in found if "extra.txt is not listed" in f]
    assert [f for f in found if "model.gguf was changed" in f]
    assert len(found) == 4
    assert len(problems(bundle, contents=False)) == 3


def test_without_contents_only_names_are_compared(bundle):
    (bundle / "model.gguf").write_text("other")
    Bundle.open(bundle, contents=False)
    assert "was changed" in problems(bundle)[0]


@pytest.mark.parametrize("make", [
    lambda path: path.symlink_to("/etc/passwd"),
    lambda path: path.mkdir(),
    os.mkfifo,
])  # fmt: skip
def test_what_is_no_plain_file_is_refused_unopened(bundle, make):
    make(bundle / "LINK")
    assert problems(bundle) == ["LINK is not a plain file (a link, a folder or a device)"]
    (bundle / "model.gguf").unlink()
    (bundle / "model.gguf").symlink_to(bundle / "README.md")
    assert len(problems(bundle)) == 2


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/passwd", "a/b", "a\\b", ".hidden", "con", "NUL.txt", "com1", "a\tb", "x ", "ü", "", "a.", "-x"],
)
def test_names_that_are_not_plain(bundle, name):
    assert name_problem(name)
    (bundle / SUMS).write_text((bundle / SUMS).read_text() + f"{'0' * 64}  {name}\n")
    assert SUMS in problems(bundle)[0]


def test_names_on_disk_that_are_not_plain(bundle):
    (bundle / "AUX.md").write_text("")
    (bundle / "license").write_text("")
    (bundle / "two words").write_text("")
    found = "\n".join(problems(bundle))
    assert "'AUX.md' is a device" in found
    assert "2 files are called 'license'" in found
    assert "'two words' is not a plain file name" in found


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("zz  model.gguf", "line 7 is not a digest and a name"),
        (f"{'0' * 64}  model.gguf", "'model.gguf' is listed twice"),
        (f"{'0' * 64}  Model.gguf", "2 files are called 'model.gguf'"),
        (f"{'0' * 64}  {SUMS}", "SHA256SUMS lists itself"),
        ("\xff", "line 7 is not a digest"),
    ],
)
def test_damaged_lists(bundle, line, message):
    (bundle / SUMS).write_text((bundle / SUMS).read_text() + line + "\n", encoding="latin-1")
    assert message in "\n".join(problems(bundle))


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1, "a": 2}', "\xff", "[" * 5000])
def test_manifests_that_are_none(bundle, content):
    (bundle / "manifest.json").write_text(content, encoding="latin-1")
    write_sums(bundle)
    assert "manifest.json" in problems(bundle)[0]


def test_a_bundle_is_a_folder(tmp_path):
    (tmp_path / "x.zip").write_text("PK")
    for name, words in (("x.zip", "unpack archives first"), ("nowhere", "no such folder")):
        with pytest.raises(UsageError, match=words):
            Bundle.open(tmp_path / name)
    (tmp_path / "empty").mkdir()
    assert len(problems(tmp_path / "empty")) == len(REQUIRED)


# --- putting one together


def test_publishing_and_replacing(tmp_path):
    final = tmp_path / "out" / "bundle"
    for text in ("one", "two"):
        temporary = begin_bundle(final)
        assert temporary.parent == final.parent
        fill(temporary, text)
        published = publish_bundle(temporary, final)
        assert published.folder == final
        assert Bundle.open(final).manifest == {"made": text}
        assert names(final.parent) == ["bundle"]


def test_what_is_no_bundle_is_not_replaced(tmp_path):
    final = tmp_path / "home"
    final.mkdir()
    begin_bundle(final).rmdir()  # an empty folder may be taken
    (final / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="is no bundle"):
        begin_bundle(final)
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "home")
    for name in ("file", "link"):
        with pytest.raises(UsageError, match="a file or a link"):
            begin_bundle(tmp_path / name)
    temporary = fill(tmp_path / ".home.1.tmp")
    with pytest.raises(UsageError, match="is no bundle"):
        publish_bundle(temporary, final)
    assert names(final) == ["thesis.tex"]


def test_leftovers_of_killed_builds_are_removed_and_nothing_else(tmp_path):
    for name in (".bundle.99.tmp", ".other.99.tmp", "bundle.tmp", ".bundle-2.99.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("x")
    begin_bundle(tmp_path / "bundle").rmdir()
    assert names(tmp_path) == [".bundle-2.99.tmp", ".other.99.tmp", "bundle.tmp"]


def test_an_incomplete_folder_is_not_published(tmp_path):
    final = tmp_path / "bundle"
    temporary = fill(begin_bundle(final))
    (temporary / "model.gguf").unlink()
    with pytest.raises(VerificationFailed, match=r"model\.gguf is missing"):
        publish_bundle(temporary, final)
    assert not final.exists()


def test_licences_keep_their_names_made_plain(tmp_path):
    (tmp_path / "b").mkdir()
    files = [tmp_path / "LICENSE", tmp_path / "b" / "LICENSE", tmp_path / "USE POLICY (v2).md", tmp_path / "README.md"]
    for number, file in enumerate(files):
        file.write_text(f"text {number}")
    folder = tmp_path / "bundle"
    folder.mkdir()
    assert copy_licences(files, folder) == ["LICENSE", "LICENSE.2", "USE_POLICY_v2_.md", "README.md.2"]
    assert (folder / "LICENSE.2").read_text() == "text 1"
    assert all(name_problem(name) is None for name in names(folder))


CRASH = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_bundle import fill
from llmpack.formats.bundle import begin_bundle, publish_bundle
countdown = int(sys.argv[3])
started = False
def watch(event, arguments):
    global countdown
    if started and event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "ctypes.dlsym"):
        countdown -= 1
        if countdown < 0:
            os._exit(9)
sys.addaudithook(watch)
final = Path(sys.argv[2])
started = True
temporary = begin_bundle(final)
fill(temporary, "two")
publish_bundle(temporary, final)
started = False
"""


def test_a_crash_at_any_moment_leaves_the_old_bundle_or_the_new_one(tmp_path):
    final = tmp_path / "bundle"
    publish_bundle(fill(begin_bundle(final), "one"), final)
    shutil.copytree(final, tmp_path / "kept")
    seen = set()
    moment = 0
    while True:
        shutil.rmtree(final)
        shutil.copytree(tmp_path / "kept", final)
        run = subprocess.run(
            [sys.executable, "-c", CRASH, str(Path(__file__).parent), str(final), str(moment)],
            check=False, capture_output=True, text=True,
        )  # fmt: skip
        assert run.returncode in (0, 9), run.stderr
        seen.add(Bundle.open(final).manifest["made"])
        moment += 1 if moment < 4 else 7
        if run.returncode == 0:
            break
    assert seen == {"one", "two"}
    begin_bundle(final).rmdir()  # and the next build cleans up
    assert names(tmp_path) == ["bundle", "kept"]
