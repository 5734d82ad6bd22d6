"""A device as a place to measure at: what is there, its lock, and the models that were pushed to it.

Models lie in ``~/.cache/llmpack/models`` of the device (on Android ``/data/local/tmp/llmpack``), each named by the
sha256 of its contents; an unfinished one is named ``.part`` and is continued. Nothing is compiled or downloaded there.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from llmpack.digest import CHUNK
from llmpack.errors import Busy, DeviceProblem, RuntimeFailed, VerificationFailed
from llmpack.progress import QUIET, Progress
from llmpack.target.remote.transport import Reply, Transport
from llmpack.units import format_size

SPARE = 64 << 20
"""Bytes of disk that a push leaves free."""
TRIES = 6
"""How often a push goes on after the connection broke, if each time something more arrived."""
DIGEST_SECONDS = 900.0
LOCK_SECONDS = 10.0
_SURVEY = r"""
umask 077
folder=%(folder)s
if [ -z "$folder" ]; then
  if [ -d /data/local/tmp ] && [ -w /data/local/tmp ]; then folder=/data/local/tmp/llmpack
  else folder="${XDG_CACHE_HOME:-$HOME/.cache}/llmpack/models"; fi
fi
mkdir -p "$folder" || exit 73
echo "folder=$folder"
found() { name=$1; shift; for f in "$@"; do
  p=$(command -v "$f" 2>/dev/null) && [ -x "$p" ] && { echo "$name=$p"; return; }; done; }
found llmpack %(llmpack)s
found llama-bench %(bench)s
for name in flock python3 sha256sum shasum; do command -v $name >/dev/null 2>&1 && echo "has=$name"; done
exit 0
"""
_LLMPACK = 'llmpack "$HOME/.local/bin/llmpack" "$HOME/llmpack/.venv/bin/llmpack" "$HOME/.venv/bin/llmpack"'
_BENCH = 'llama-bench "$HOME/llama.cpp/build/bin/llama-bench" "$HOME/.local/bin/llama-bench" "$folder/llama-bench"'
# In a subshell with the descriptor as its own redirection: shells that close descriptors above 2 keep that one.
_LOCK = r"""
cd %(folder)s || exit 73
( %(take)s || { echo "busy $(cat lock.owner 2>/dev/null)"; exit 75; }
  echo %(owner)s > lock.owner; echo held; cat > /dev/null ) 9>> lock
"""
_PYTHON_LOCK = "import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)"


@dataclass(frozen=True)
class Programs:
    """What was found on a device.

    folder       where models are kept
    llmpack      path of the program, empty where there is none
    llama_bench  likewise
    tools        of flock, python3, sha256sum and shasum those that are there
    """

    folder: str
    llmpack: str
    llama_bench: str
    tools: frozenset[str]


class Station:
    """One device, spoken to through a transport."""

    def __init__(self, transport: Transport, progress: Progress = QUIET) -> None:
        """Looks at once what is there. Raises DeviceProblem, RuntimeFailed."""
        self.transport = transport
        self.name = transport.address.text
        self.progress = progress
        self.sent = 0
        """Bytes of models that were sent so far."""
        self.programs = self._survey()

    def _survey(self) -> Programs:
        place = self.transport.address.place

        def candidates(name: str, usual: str) -> str:
            return shlex.quote(place(name)) if place(name) else usual

        script = _SURVEY % {
            "folder": shlex.quote(place("folder")),
            "llmpack": candidates("llmpack", _LLMPACK),
            "bench": candidates("llama-bench", _BENCH),
        }
        reply = self.transport.run(script)
        if reply.code == 73:
            raise DeviceProblem(f"{self.name}: no folder for models can be made: {reply.last_words}", kind="no-space")
        pairs = [line.partition("=") for line in reply.text.splitlines()]
        facts = {key: value for key, _, value in pairs if key != "has"}
        if reply.code or "folder" not in facts:
            raise self._garbage("when it was looked at", reply)
        for name in ("llmpack", "llama-bench"):
            if place(name) and not facts.get(name):
                text = f"{self.name}: there is no program {place(name)} that may be run"
                raise DeviceProblem(f"{text}; mend `{name}` in --on", kind="no-runner")
        tools = frozenset(value for key, _, value in pairs if key == "has")
        return Programs(facts["folder"], facts.get("llmpack", ""), facts.get("llama-bench", ""), tools)

    def _garbage(self, when: str, reply: Reply) -> RuntimeFailed:
        shown = reply.text.strip()[:80]
        text = f"{self.name}: {when} it answered with exit status {reply.code} and {shown!r}: {reply.last_words}"
        return RuntimeFailed(text, kind="protocol")

    def _run(self, script: str, **options: object) -> Reply:
        return self.transport.run(f"cd {shlex.quote(self.programs.folder)} || exit 73\n{script}", **options)  # type: ignore[arg-type]

    @contextmanager
    def locked(self, owner: str, *, wait: bool = True) -> Iterator[None]:
        """No other check works on the device meanwhile; the device itself lets go when the connection ends.

        owner  who holds it, for the messages of others

        Raises Busy if another holds it and `wait` is False.
        """
        tools, told = self.programs.tools, False
        if not tools & {"flock", "python3"}:
            text = f"{self.name}: a device is locked with flock or python3, and has neither"
            raise DeviceProblem(f"{text}; install util-linux or Python there", kind="no-runner")
        take = "flock -n 9" if "flock" in tools else f"python3 -c {shlex.quote(_PYTHON_LOCK)} 2>/dev/null"
        folder = shlex.quote(self.programs.folder)
        script = _LOCK % {"folder": folder, "take": take, "owner": shlex.quote(owner)}
        while True:
            with self.transport.hold(script) as line:
                if line == "held":
                    yield
                    return
            if not line.startswith("busy"):
                raise RuntimeFailed(f"{self.name}: cannot be locked: it answered {line[:80]!r}", kind="protocol")
            message = f"{self.name} is being measured by {line.removeprefix('busy').strip() or 'another check'}"
            if not wait:
                raise Busy(message)
            if not told:
                self.progress.say(f"{message}; waiting for it")
                told = True
            time.sleep(1)

    def push(self, path: Path, sha256: str) -> str:
        """Bring a file to the device if it is not there; gives its path there. Call it with the lock held.

        Only what is missing is sent. Raises DeviceProblem (no-space, lost, ...), VerificationFailed for contents that
        arrive damaged twice.
        """
        size = path.stat().st_size
        whole = f"{sha256}.gguf"
        for attempt in range(2):
            part, at = self._present(whole, f"{whole}.part")
            if part != whole:
                self._room(size - at)
                self._send(path, f"{whole}.part", at, size)
                part = f"{whole}.part"
            if self._digest(part) == sha256:
                self._run(f"mv -f {part} {whole}") if part != whole else None
                return f"{self.programs.folder}/{whole}"
            self._run(f"rm -f {part}")
            if attempt == 0:
                self.progress.say(f"what lies on {self.name} as {part} is damaged; it is sent again")
        raise VerificationFailed([f"{self.name}: {path.name} arrived damaged twice; look at its disk and its memory"])

    def _present(self, whole: str, part: str) -> tuple[str, int]:
        """Which of the two files is there, and how many bytes of it."""
        look = f"for f in {whole} {part}; do [ -f $f ] && {{ echo $f; wc -c < $f; exit 0; }}; done; echo none; echo 0"
        script = f"{self._alone('true')}\n{look}"
        reply = self._run(script)
        words = reply.text.split()
        if reply.code or len(words) != 2 or not words[1].isdigit():
            raise self._garbage("when it was asked for a file", reply)
        return words[0], int(words[1])

    def _room(self, nbytes: int) -> None:
        reply = self._run("df -Pk . | tail -n 1; du -sk . 2>/dev/null")
        words = reply.text.split()
        try:
            free = int(words[3]) << 10
        except (IndexError, ValueError):
            raise self._garbage("when it was asked for free space", reply) from None
        if free < nbytes + SPARE:
            raise self._full(f"{format_size(free)} are free, {format_size(nbytes)} are to be sent")

    def _full(self, what: str) -> DeviceProblem:
        text = f"{self.name}: no space in {self.programs.folder} ({what}); models of earlier checks lie there and may"
        return DeviceProblem(f"{text} be removed, or give `?folder=/path` in --on", kind="no-space")

    def _send(self, path: Path, part: str, at: int, size: int) -> None:
        """Append what is missing of a file."""
        if at > size:
            self._run(f"rm -f {part}")
            at = 0
        if at:
            self.progress.say(f"{self.name} has {format_size(at)} of {path.name} already; sending the rest")
        with self.progress.task(f"sending {path.name} to {self.name}", size - at) as done:
            reply = self._run(self._alone(f"cat >> {part}"), stdin=self._pieces(path, at, done))
        if reply.code:
            if "space" in reply.last_words.lower() or "quota" in reply.last_words.lower():
                raise self._full(reply.last_words)
            raise self._garbage("while a model was sent", reply)

    def _alone(self, script: str) -> str:
        """The script once no other writes a model: after a broken connection the one before may not have ended yet."""
        return f"( flock 8; {script} ) 8>> writing" if "flock" in self.programs.tools else script

    def _pieces(self, path: Path, at: int, done: Callable[[float], None]) -> Iterator[bytes]:
        """What follows after `at` bytes of a file."""
        with path.open("rb") as file:
            file.seek(at)
            while piece := file.read(CHUNK >> 2):
                yield piece
                self.sent += len(piece)
                done(len(piece))

    def _digest(self, name: str) -> str:
        tools = self.programs.tools
        if "sha256sum" in tools:
            script = f"sha256sum {name}"
        elif "shasum" in tools:
            script = f"shasum -a 256 {name}"
        else:
            code = "import hashlib, sys; print(hashlib.file_digest(open(sys.argv[1], 'rb'), 'sha256').hexdigest())"
            script = f"python3 -c {shlex.quote(code)} {name}"
        reply = self._run(script, silence=DIGEST_SECONDS)
        words = reply.text.split()
        if reply.code or not words or len(words[0]) != 64:
            raise self._garbage("when it was asked for a digest", reply)
        return words[0].lower()

    def measure(self, script: str, *, stdin: bytes = b"", silence: float) -> Reply:
        """Run the script that measures; if it hangs, it is ended on the device too, so that it disturbs nobody."""
        guarded = f"echo $$ > running\n{script}"
        try:
            return self._run(guarded, stdin=(stdin,) if stdin else (), silence=silence)
        except RuntimeFailed:
            self._run("kill -s KILL -- -$(cat running) || kill -s KILL $(cat running)")
            raise
