"""The plan: a recipe folded over a graph. Exact bytes, an estimate on the device, what is cached; no data is read.

Only here do steps and formats meet: each step says what it makes of the graph, the format says how many
bytes the last one takes.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmpack.errors import EnvironmentProblem, RecipeError, StepFailed
from llmpack.formats.facts import Facts
from llmpack.models.graph import ModelGraph
from llmpack.pipeline.alternative import Alternative, alternative_to
from llmpack.pipeline.cache import Cache
from llmpack.pipeline.chain import Known, PlannedStep, follow, placed
from llmpack.pipeline.choosing import Choice
from llmpack.pipeline.corpora import Text
from llmpack.pipeline.gpu import require_gpu
from llmpack.pipeline.host_memory import HostMemory, host_memory, memory_problem
from llmpack.pipeline.limits import FileSize, Setting
from llmpack.pipeline.origin import Origin
from llmpack.pipeline.output import ModelFormat, file_format, outline_of, require_layout
from llmpack.pipeline.recipe import Recipe
from llmpack.pipeline.toml_positions import Key, TomlDocument, dotted
from llmpack.runtime.settings import usable_cores
from llmpack.runtime.transformers_runtime import require_processor
from llmpack.steps.quantize import Quantize
from llmpack.steps.quantize_auto import QuantizeAuto
from llmpack.target.budget import Verdict, judge
from llmpack.target.cure import cures
from llmpack.target.device import HOST, Device, device
from llmpack.target.estimate import Estimate, estimate
from llmpack.target.outline import Outline
from llmpack.units import format_size

SMALL_FILES = 256 << 10
"""Manifest, card, recipe, lock and checksums of a bundle: what is allowed for them before they are written."""
DISK_MARGIN = 1.1
DISK_RESERVE = 256 << 20


@dataclass(frozen=True)
class DiskNeed:
    """Bytes that one file system must have free: for what, and how many are."""

    folder: Path
    needed: int
    free: int
    what: str


@dataclass(frozen=True)
class Outlook:
    """One device: what the model will take and give there, and the budget judged on that alone."""

    device: Device
    estimate: Estimate
    verdict: Verdict


@dataclass(frozen=True)
class Plan:
    """What a build will do and make.

    graph    as it will stand in the model file
    nbytes   of the model file, or of all files of a model folder, exactly;
             where a step has still to choose, of a stand-in for what it will make
    bounds   of `nbytes`, while a step has still to choose
    disk     of the whole bundle, the small files beside the model estimated
    facts    what the model file will say about itself
    outlooks  one for each device of the recipe; `device`, `estimate` and `verdict` are those of the first
    host_memory  what the steps take of this machine while they build
    alternative  to what steps prune, where any do
    twice        what is rounded a second time, in words
    """

    outlooks: tuple[Outlook, ...]
    steps: tuple[PlannedStep, ...]
    graph: ModelGraph
    nbytes: int
    bounds: tuple[int, int] | None
    disk: int
    facts: Facts
    file_format: ModelFormat
    disk_needs: tuple[DiskNeed, ...]
    threads: int
    host_memory: HostMemory
    alternative: Alternative | None = None
    twice: tuple[str, ...] = ()

    @property
    def device(self) -> Device:
        """The first device."""
        return self.outlooks[0].device

    @property
    def estimate(self) -> Estimate:
        """That of the first device."""
        return self.outlooks[0].estimate

    @property
    def verdict(self) -> Verdict:
        """That of the first device."""
        return self.outlooks[0].verdict

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """Those of all devices."""
        return tuple(look.verdict for look in self.outlooks)

    @property
    def bits_per_weight(self) -> float:
        """Of all tensors, the container not counted."""
        return 8 * sum(nbytes for _, nbytes in self.totals.values()) / self.graph.parameters

    @property
    def totals(self) -> Mapping[str, tuple[int, int]]:
        """Tensors and bytes as they are written, by encoding."""
        return self.file_format.totals(self.graph)

    @property
    def choices(self) -> tuple[Choice, ...]:
        """What the steps that choose have chosen."""
        return tuple(planned.choice for planned in self.steps if planned.choice is not None)

    @property
    def misses(self) -> bool:
        """True if a limit is broken already on the estimate, by more than the estimate may be wrong."""
        return any(row.status == "FAIL" for verdict in self.verdicts for row in verdict.rows)

    def document(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "model_bytes": self.nbytes,
            "model_bytes_between": None if self.bounds is None else list(self.bounds),
            "bundle_bytes": self.disk,
            "parameters": self.graph.parameters,
            "bits_per_weight": self.bits_per_weight,
            "steps": [
                {"use": s.step.use, "options": s.step.model_dump(mode="json"), "state": s.state, "key": s.key}
                for s in self.steps
            ],
            "choices": [choice.document() for choice in self.choices if choice.scored],
            "second_quantizations": list(self.twice),
            "host_memory": self.host_memory.document(),
            "alternative": self.alternative.document() if self.alternative is not None else None,
            "estimates": [look.estimate.to_json() for look in self.outlooks],
            "verdicts": [verdict.to_json() for verdict in self.verdicts],
            "disk": [
                {"folder": str(n.folder), "needed": n.needed, "free": n.free, "for": n.what} for n in self.disk_needs
            ],
        }


def make_plan(
    recipe: Recipe, document: TomlDocument, origin: Origin, calibration: Text | None, cache: Cache, out: Path
) -> Plan:
    """Fold a recipe over the graph of its source.

    Raises RecipeError with everything that cannot work: encodings that do not fit, a context beyond the model's, a
    step that needs more memory than the recipe allows. MissingExtra and EnvironmentProblem for what this machine lacks.
    """
    devices = _devices(recipe, document)
    form = file_format(recipe.bundle)
    size = FileSize(form, origin.checkpoint, lambda graph: bundle_facts(origin, recipe, graph))
    small = SMALL_FILES + sum(path.stat().st_size for path in origin.located.licence.files)
    setting = Setting(recipe.budget, recipe.runtime, tuple(devices), form, size, small)
    threads = recipe.build.threads or usable_cores()
    corpus = calibration.known_digest(cache) if calibration else None
    known = Known(origin.known_digest(cache), corpus, seed_of(recipe), threads, recipe.build.processor)
    steps = follow(recipe, document, origin.graph, known, setting, cache)
    last = steps[-1].graph if steps else origin.graph
    require_layout(form, last, document)
    require_processor(recipe.runtime)
    try:
        graph = form.encode_graph(last)
    except StepFailed as error:
        raise RecipeError([document.problem(("bundle", "format"), str(error))]) from error
    trained = graph.config.get("max_position_embeddings")
    problems = list(dict.fromkeys(p for chosen in devices for p in recipe.budget.problems(chosen, trained)))
    if problems:
        raise RecipeError([placed(problem, document) for problem in problems])
    nbytes = size(graph)
    disk = nbytes + small
    outline = outline_of(form, graph)
    to_do = [planned.state != "cached" for planned in steps]
    before = [origin.graph, *(planned.graph for planned in steps)][: len(steps)]
    needs = host_memory(recipe, before, [planned.step for planned in steps], to_do)
    if (problem := memory_problem(needs, recipe, document)) is not None:
        raise RecipeError([problem])
    require_gpu(recipe.build.processor, [moment for step in needs.steps for moment in step.moments])
    alternative = alternative_to(recipe, origin.graph, steps, nbytes, known, setting, cache)
    return Plan(
        outlooks=tuple(_outlook(recipe, outline, chosen, disk) for chosen in devices),
        steps=steps,
        graph=graph,
        nbytes=nbytes,
        bounds=steps[-1].choice.between if steps and steps[-1].open and steps[-1].choice else None,
        disk=disk,
        facts=bundle_facts(origin, recipe, graph),
        file_format=form,
        disk_needs=_disk_needs(recipe, steps, origin, nbytes, cache, out, alternative),
        threads=threads,
        host_memory=needs,
        alternative=alternative,
        twice=tuple(words for planned, graph in zip(steps, before, strict=True) for words in _twice(planned, graph)),
    )


def _twice(planned: PlannedStep, graph: ModelGraph) -> Iterator[str]:
    """What of a graph the step rounds a second time."""
    if isinstance(planned.step, Quantize):
        for (first, second), count in planned.step.rounded_again(graph).items():
            yield f"{planned.step.use}: a second quantization of {count} matrices, {first} to {second}"


def _outlook(recipe: Recipe, outline: Outline, chosen: Device, disk: int) -> Outlook:
    context = recipe.budget.context
    guess = estimate(outline, recipe.runtime, chosen, context, disk=disk)
    verdict = judge(
        recipe.budget,
        guess.findings(),
        chosen,
        accept=recipe.target.accept,
        cure=cures(outline, recipe.runtime, chosen, context),
        missing=guess.missing,
    )
    return Outlook(chosen, guess, verdict)


def _devices(recipe: Recipe, document: TomlDocument) -> list[Device]:
    """The devices of a recipe; a profile's file is looked for from the recipe's folder. Raises RecipeError."""
    found, problems = [], []
    for index, name in enumerate(recipe.target.names):
        key: Key = ("target", "devices", index) if recipe.target.devices else ("target", "device")
        try:
            found.append(device(name, Path(document.file).parent))
        except RecipeError as error:
            problems += [replace(p, path=dotted(key), where=p.where or document.where(key)) for p in error.problems]
    if problems:
        raise RecipeError(problems)
    return found


def bundle_facts(origin: Origin, recipe: Recipe, graph: ModelGraph) -> Facts:
    """What the model file says about itself: the source's own words, and that it derives from the source.

    How many parameters it has is counted again where they are not those of the source.
    """
    from llmpack import __version__

    source = origin.facts
    base: dict[str, str] = {"name": source.name}
    for key, value in (("organization", source.organization), ("version", source.version)):
        base |= {key: value} if value else {}
    address = source.repo_url or source.source_repo_url
    if origin.located.ref.kind == "hf":
        address = f"https://huggingface.co/{origin.located.ref.repository}"
    base |= {"repo_url": address} if address else {}
    if graph.parameters != origin.graph.parameters:
        source = replace(source, size_label=None)
    return replace(
        source, quantized_by=f"llmpack {__version__}", base_models=(base,) if recipe.step else source.base_models
    )


def seed_of(recipe: Recipe) -> int:
    """The seed of everything that is drawn by chance."""
    return recipe.calibration.seed if recipe.calibration else 0


def _disk_needs(
    recipe: Recipe,
    steps: tuple[PlannedStep, ...],
    origin: Origin,
    nbytes: int,
    cache: Cache,
    out: Path,
    alternative: Alternative | None,
) -> tuple[DiskNeed, ...]:
    """Free bytes wanted, by file system: checkpoints of steps and spilled activations, the bundle."""
    hidden = next(spec.shape[1] for spec in origin.graph.outside if spec.part == "embedding")
    spilled = 2 * 4 * hidden * (recipe.calibration.tokens if recipe.calibration else 0)
    to_do = [planned for planned in steps if planned.state != "cached"]
    work = sum(p.step.copies * max(1, len(p.mixes)) * p.graph.nbytes for p in to_do) + (spilled if to_do else 0)
    if recipe.calibration is not None:
        work += sum(4 * hidden * _kept_for_scores(planned, recipe.calibration.tokens) for planned in to_do)
        if alternative is not None and alternative.possible and alternative.predicted is None:
            work += 4 * hidden * (origin.graph.block_count + 3) * min(recipe.calibration.tokens, alternative.tokens)
    if recipe.evaluation is not None:
        work += 4 * hidden * recipe.evaluation.tokens
    wanted: dict[int, DiskNeed] = {}
    for folder, needed, what in ((cache.root, work, "finished steps"), (out, nbytes + SMALL_FILES, "the bundle")):
        existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        system = existing.stat().st_dev
        before = wanted.get(system)
        total = needed + (before.needed if before else 0)
        words = f"{before.what} and {what}" if before else what
        wanted[system] = DiskNeed(existing, total, shutil.disk_usage(existing).free, words)
    return tuple(wanted.values())


def _kept_for_scores(planned: PlannedStep, tokens: int) -> int:
    """Tokens whose activations lie on disk at once while a step is scored: the inputs of every block, and gradients."""
    if not planned.open or not isinstance(planned.step, QuantizeAuto) or planned.mixes:
        return 0
    return (planned.graph.block_count + 3) * min(tokens, planned.step.tokens)


def require_disk(plan: Plan) -> None:
    """Raises EnvironmentProblem if a file system has too little room for what will be written to it."""
    for need in plan.disk_needs:
        asked = int(need.needed * DISK_MARGIN) + DISK_RESERVE
        if need.free < asked:
            raise EnvironmentProblem(
                f"{need.folder}: {format_size(asked)} are needed for {need.what}, {format_size(need.free)} are free; "
                "free some space, or choose other folders with --cache and --out"
            )


def is_host(recipe: Recipe) -> bool:
    """Whether the bundle is for this machine, among others."""
    return HOST in recipe.target.names
