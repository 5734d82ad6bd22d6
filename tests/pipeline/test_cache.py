"""Entries are found by their facts, survive their makers, and are made again when damaged."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from llmpack.errors import Busy, UsageError
from llmpack.pipeline.cache import Cache, default_root

FACTS = {"step": "quantize.rtn", "options": {"damping": 0.01}, "input": "ab" * 32}


class Said:
    def __init__(self):
        self.lines = []

    def say(self, message):
        self.lines.append(message)


@pytest.fixture
def said():
    return Said()


@pytest.fixture
def cache(tmp_path, said):
    return Cache(tmp_path / "cache", progress=said)


def make(cache, facts=FACTS, data=b"weights", result=None):
    with cache.claim("step", facts, "the step") as slot:
        assert slot.entry is None
        (slot.content / "sub").mkdir(parents=True)
        (slot.content / "sub" / "model.bin").write_bytes(data)
        slot.work.mkdir()
        return slot.finish(result or {"digest": "cd"})


def test_work_is_found_by_what_went_into_it(cache):
    assert cache.find("step", FACTS) is None
    made = make(cache)
    found = cache.find("step", json.loads(json.dumps(FACTS)))
    assert found == made
    assert found.result == {"digest": "cd"}
    assert found.nbytes == 7
    assert (found.content / "sub" / "model.bin").read_bytes() == b"weights"
    assert not (found.folder / "work").exists()


@pytest.mark.parametrize(
    "facts", [{**FACTS, "step": "x"}, {**FACTS, "options": {"damping": 0.02}}, {**FACTS, "extra": None}]
)
def test_other_facts_are_other_work(cache, facts):
    make(cache)
    assert cache.find("step", facts) is None
    assert cache.find("source", FACTS) is None


def test_unfinished_work_is_gone_on_with(cache):
    def die():
        with cache.claim("step", FACTS, "the step") as slot:
            slot.content.mkdir()
            (slot.content / "block-0").write_text("done")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        die()
    assert cache.unfinished("step", FACTS)
    assert cache.find("step", FACTS) is None
    with cache.claim("step", FACTS, "the step") as slot:
        assert slot.entry is None
        assert (slot.content / "block-0").read_text() == "done"
        slot.finish({})
    assert not cache.unfinished("step", FACTS)
    assert cache.find("step", FACTS) is not None


def damage_byte(entry):
    path = entry.content / "sub" / "model.bin"
    path.write_bytes(b"weighty")
    return "has changed since it was written"


def damage_length(entry):
    (entry.content / "sub" / "model.bin").write_bytes(b"weight")
    return "has 6 bytes, not 7"


def damage_missing(entry):
    (entry.content / "sub" / "model.bin").unlink()
    return "is missing"


def damage_marker(entry):
    (entry.folder / "entry.json").write_text("{")
    return "cannot be read"


def damage_format(entry):
    marker = json.loads((entry.folder / "entry.json").read_text())
    (entry.folder / "entry.json").write_text(json.dumps({**marker, "format": 99}))
    return "another version of llmpack"


def damage_facts(entry):
    marker = json.loads((entry.folder / "entry.json").read_text())
    (entry.folder / "entry.json").write_text(json.dumps({**marker, "facts": {}}))
    return "belongs to another entry"


def damage_fields(entry):
    (entry.folder / "entry.json").write_text('{"format": 1}')
    return "is incomplete"


@pytest.mark.parametrize(
    "damage",
    [damage_byte, damage_length, damage_missing, damage_marker, damage_format, damage_facts, damage_fields],
)
def test_damaged_work_is_made_again_with_a_word(cache, said, damage):
    message = damage(make(cache))
    assert cache.find("step", FACTS) is None
    make(cache)
    assert cache.find("step", FACTS) is not None
    assert len(said.lines) == 1
    assert message in said.lines[0]


def test_a_touched_but_equal_file_is_fine(cache):
    entry = make(cache)
    os.utime(entry.content / "sub" / "model.bin")
    assert cache.find("step", FACTS) is not None


def test_silent_damage_is_found_by_a_thorough_look(cache):
    entry = make(cache)
    path = entry.content / "sub" / "model.bin"
    before = path.stat()
    path.write_bytes(b"weighty")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert entry.damage() is None
    assert "has changed" in entry.damage(thorough=True)


HOLDER = """
    import sys, time
    from pathlib import Path
    from llmpack.pipeline.cache import Cache
    with Cache(Path(sys.argv[1])).claim("step", {"a": 1}, "the step") as slot:
        slot.content.mkdir(exist_ok=True)
        print("held", flush=True)
        time.sleep(60)
"""


@pytest.fixture
def holder(cache):
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLDER), str(cache.root)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "held\n"
    yield child
    child.kill()
    child.wait()
    child.stdout.close()


def test_held_work_is_busy_and_names_the_process(cache, holder):
    impatient = Cache(cache.root, wait=False)
    message = f"the step is being worked on by process {holder.pid}"
    with pytest.raises(Busy, match=message), impatient.claim("step", {"a": 1}, "the step"):
        pass
    with impatient.claim("step", {"a": 2}, "another step"):
        pass


def test_waiting_ends_when_the_holder_is_killed(cache, said, holder):
    waiter = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLDER), str(cache.root)], stdout=subprocess.PIPE, text=True
    )
    time.sleep(0.3)
    holder.send_signal(signal.SIGKILL)
    assert waiter.stdout.readline() == "held\n"
    waiter.kill()
    waiter.wait()
    waiter.stdout.close()
    with cache.claim("step", {"a": 1}, "the step") as slot:
        assert slot.entry is None
        assert slot.content.exists()


def test_entries_are_listed_removed_and_collected(cache):
    entry = make(cache)
    with cache.claim("source", {"b": 1}, "a source") as slot:
        slot.content.mkdir()
    listed = {kind: entry for kind, _, _, entry, _ in cache.entries()}
    assert listed == {"step": entry, "source": None}
    assert cache.collect(days=1) == []
    os.utime(entry.folder, (1, 1))
    assert cache.collect(days=1) == [("step", entry.key, 7 + cache_marker_size(entry))]
    assert cache.find("step", FACTS) is None
    with pytest.raises(UsageError, match="no cache entry starts with `zz`"):
        cache.remove("zz")
    key = Cache.key("source", {"b": 1})
    assert cache.remove(key[:12]) == [key]
    assert list(cache.entries()) == []


def cache_marker_size(entry):
    marker = {
        "format": 1,
        "kind": entry.kind,
        "key": entry.key,
        "facts": entry.facts,
        "result": entry.result,
        "files": entry.files,
    }
    return len(json.dumps(marker, indent=1)) + 1


def test_what_is_held_is_not_collected(cache, holder):
    os.utime(cache.folder("step", Cache.key("step", {"a": 1})), (1, 1))
    assert cache.collect(days=1) == []


def test_the_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("LLMPACK_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_root() == tmp_path / ".cache" / "llmpack"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert str(default_root()) == "/x/llmpack"
    monkeypatch.setenv("LLMPACK_CACHE", "/y")
    assert str(default_root()) == "/y"
