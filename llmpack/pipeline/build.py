"""A build, as a tuple of stages. Each takes a frozen `Build` and returns it with more of it filled in.

    read        TOML to Recipe                          nothing but the recipe is read
    open        the source, validated by its headers
    plan        exact bytes, estimate, what is cached   a recipe that cannot work or fit stops here
    run         the steps, each found or done
    write       the model file
    read_back   parsed afresh, compared, loaded by its runtime
    measure     memory and speed in a fresh process, quality against the source
    judge       the budget against what was found
    record      manifest, card, lock, checksums; one rename makes the bundle appear

A stage stops the build by raising. What steps have finished stays in the cache; the unpublished folder goes.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmpack.checkpoint.atomic import temporary_name
from llmpack.digest import sha256_value
from llmpack.pipeline.cache import Cache
from llmpack.pipeline.planning import PLANNING, Stage
from llmpack.pipeline.stages.judging import judge
from llmpack.pipeline.stages.measuring import measure
from llmpack.pipeline.stages.reading_back import read_back
from llmpack.pipeline.stages.recording import record
from llmpack.pipeline.stages.running import run
from llmpack.pipeline.stages.writing import write
from llmpack.pipeline.state import Build, Order
from llmpack.profile import phase

STAGES: tuple[Stage, ...] = (*PLANNING, run, write, read_back, measure, judge, record)


def build_bundle(order: Order) -> Build:
    """Make and publish the bundle of a recipe. Raises what the stages raise (see `llmpack.errors`)."""
    first, *others = STAGES
    build = first(Build(order))
    with reserved(build.cache, build.final):
        for stage in others:
            with phase(stage.__name__):
                build = stage(build)
    return build


@contextmanager
def reserved(cache: Cache, final: Path) -> Iterator[None]:
    """One build at a time makes the bundle `final`; whatever happens, no unpublished folder stays behind.

    Raises Busy.
    """
    with cache.lock(f"bundle-{sha256_value(str(final.absolute()))[:16]}", f"the bundle {final}"):
        try:
            yield
        finally:
            workspace = temporary_name(final)
            if workspace.exists():
                shutil.rmtree(workspace)
