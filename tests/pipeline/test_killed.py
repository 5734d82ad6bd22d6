"""Killed at any instant and started again: the same bytes, and at most one block done twice."""

import json
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

RECIPE = """\
schema = 1
name = "killed"
[source]
model = "{model}"
[calibration]
text = ["python:pydoc_data.topics"]
tokens = 512
length = 64
[[step]]
use = "quantize.gptq"
[budget]
context = 128
[build]
threads = 1
"""

# One process loads the libraries and forks for every attempt. A run is killed at its n-th call of a Python function
# since the first task of the step began: n is drawn from all calls of a run that nobody kills.
PROGRAM = """
    import json, os, random, signal, sys
    from contextlib import contextmanager
    from pathlib import Path
    import accelerate, torch, transformers
    from transformers.models.llama import modeling_llama
    from llmpack.pipeline.build import STAGES
    from llmpack.pipeline.cache import Cache
    from llmpack.pipeline.stages.running import run
    from llmpack.pipeline.state import Build, Order

    recipe, root = map(Path, sys.argv[1:3])

    class Deadly:
        def __init__(self, deadline, log):
            self.calls, self.deadline, self.log = 0, deadline, log

        def count(self, frame, event, argument):
            if event == "call":
                self.calls += 1
                if self.calls == self.deadline:
                    os.kill(os.getpid(), signal.SIGKILL)

        @contextmanager
        def task(self, title, total):
            os.write(self.log, (title + "\\n").encode())
            if title == "embedding" or title.startswith("block"):
                sys.setprofile(self.count)
            yield lambda done: None

        def say(self, message):
            pass

    def attempt(name, deadline):
        log = os.open(root / "log", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        pid = os.fork()
        if pid == 0:
            deadly = Deadly(deadline, log)
            build = Build(Order(recipe, root / "out", Cache(root / name, progress=deadly), progress=deadly))
            for stage in STAGES[: STAGES.index(run) + 1]:
                build = stage(build)
            sys.setprofile(None)
            (root / "answer").write_text(json.dumps([build.steps[0].output, deadly.calls]))
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        os.close(log)
        return os.waitstatus_to_exitcode(status), (root / "log").read_text().split("\\n")[:-1]

    ended, titles = attempt("whole", 0)
    output, calls = json.loads((root / "answer").read_text())
    print(json.dumps([ended, titles, output]), flush=True)
    draw = random.Random(int(sys.argv[3]))
    deadlines = [draw.randrange(1, calls // 5) for _ in range(5)] + [0]
    for deadline in deadlines:
        ended, titles = attempt("killed", deadline)
        output = json.loads((root / "answer").read_text())[0] if deadline == 0 else None
        print(json.dumps([ended, titles, output]), flush=True)
"""


def files_of(root: Path) -> dict[str, bytes]:
    """What the step wrote, the journal's order of lines included."""
    (content,) = root.glob("step/*/content")
    return {path.name: path.read_bytes() for path in sorted(content.iterdir())}


def blocks_of(titles: list[str]) -> list[int]:
    return [int(title.split()[1].rstrip(",")) for title in titles if title.startswith("block ")]  # "block 3, inputs"


@pytest.mark.parametrize("seed", [5])
def test_killed_at_five_random_instants_it_ends_in_the_same_bytes(checkpoint_factory, packable, tmp_path, seed):
    sizes = {"num_hidden_layers": 5, "hidden_size": 32, "intermediate_size": 64, "vocab_size": 49152}
    model = tmp_path / "model"
    shutil.copytree(checkpoint_factory(tokenizer=None, **sizes), model)
    for path in packable.glob("*token*"):
        shutil.copy(path, model)
    recipe = tmp_path / "killed.toml"
    recipe.write_text(RECIPE.format(model=model))
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(recipe), str(tmp_path), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    whole, *killed, last = (json.loads(line) for line in done.stdout.splitlines())
    assert [ended for ended, *_ in killed] == [-signal.SIGKILL] * 5
    assert (whole[0], last[0]) == (0, 0)
    assert last[2] == whole[2]
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")
    reached = -1
    for _, titles, _ in (*killed, last):
        blocks = blocks_of(titles)
        if blocks:
            assert blocks[0] >= reached  # at most the block that was being done is done again
            reached = blocks[-1]
    assert reached == 4
