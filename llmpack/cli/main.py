"""The commands. Each is a few lines: options in, one call, the answer out.

Modules that do work are imported when a command runs, so that `llmpack --help` costs nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmpack.cli.arguments import CacheFolder, On, open_cache
from llmpack.cli.command import command
from llmpack.cli.groups import cache_app, device_app
from llmpack.cli.session import Session

if TYPE_CHECKING:
    from llmpack.pipeline.state import Order

app = typer.Typer(
    name="llmpack",
    help="From a checkpoint to the best bundle a device can run, with the proof inside.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(cache_app, name="cache")
app.add_typer(device_app, name="device")

RecipeFile = Annotated[Path, typer.Argument(help="The recipe, a TOML file.", show_default=False)]
BundlePath = Annotated[Path, typer.Argument(help="A bundle's folder.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Change the recipe, e.g. --set step.0.encoding=q4_0. Repeatable."),
]
Limits = Annotated[
    list[str] | None,
    typer.Option(
        "--budget",
        metavar="LIMIT=VALUE|FILE",
        help='A limit, e.g. --budget memory="350 MiB", or a TOML file with a [budget] table. Repeatable.',
    ),
]
NoWait = Annotated[
    bool, typer.Option("--no-wait", help="Stop with exit code 75 if another process does the same work.")
]
Offline = Annotated[bool, typer.Option("--offline", help="Touch no network.")]


def _order(recipe: Path, out: Path, sets: list[str] | None, cache: Path | None, no_wait: bool, offline: bool) -> Order:
    from llmpack.pipeline.state import Order

    held = open_cache(cache, no_wait)
    return Order(recipe, out, held, tuple(sets or ()), offline, held.progress)


@app.command()
@command
def build(
    session: Session,
    recipe: RecipeFile,
    out: Annotated[Path, typer.Option("--out", help="Folder in which the bundle's folder appears.")] = Path("bundles"),
    set: Overrides = None,
    cache: CacheFolder = None,
    no_wait: NoWait = False,
    offline: Offline = False,
    profile: Annotated[bool, typer.Option("--profile", help="Show where the time goes, phase by phase.")] = False,
) -> None:
    """Make a bundle: quantize, write, read back, measure, judge. A killed build goes on where it was."""
    from llmpack.calibration import ranks

    if ranks.follows():  # of several processes that a launcher started, the first builds
        from llmpack.calibration.training import follow

        return follow()
    from llmpack.cli.show import show_built, show_profile
    from llmpack.pipeline.build import build_bundle
    from llmpack.profile import profiling

    with profiling() as found:
        made = build_bundle(_order(recipe, out, set, cache, no_wait, offline))
    ranks.call(None)
    session.answer(made.summary() | ({"profile": found.rows()} if profile else {}), lambda: show_built(made))
    if profile and not session.json:
        show_profile(found)
    return None


@app.command()
@command
def plan(
    session: Session,
    recipe: RecipeFile,
    set: Overrides = None,
    cache: CacheFolder = None,
    offline: Offline = False,
) -> int:
    """Show what a build would make: exact bytes, expected memory and speed, what is cached. Reads headers only."""
    import gc

    gc.disable()  # a plan lives for a second; looking for cycles among a vocabulary's tokens takes a tenth of it
    from llmpack.cli.show import show_plan
    from llmpack.errors import BudgetMissed
    from llmpack.pipeline.planning import plan_bundle

    planned = plan_bundle(_order(recipe, Path("bundles"), set, cache, False, offline))
    session.answer(planned.plan.document(), lambda: show_plan(planned))
    gc.freeze()  # nor are they looked through as the process ends
    return BudgetMissed.exit_code if planned.plan.misses else 0


@app.command()
@command
def check(
    session: Session,
    path: Annotated[
        Path, typer.Argument(help="A bundle, a GGUF file, or a folder of safetensors files.", show_default=False)
    ],
    budget: Limits = None,
    device: Annotated[
        list[str] | None,
        typer.Option("--device", help="Judge for this device: a name, a profile's FILE.toml, `host`. Repeatable."),
    ] = None,
    accept: Annotated[str | None, typer.Option("--accept", help="`estimate`: computed figures are enough.")] = None,
    estimate_only: Annotated[
        bool, typer.Option("--estimate-only", help="Read the header alone and measure nothing.")
    ] = False,
    on: On = None,
    junit: Annotated[Path | None, typer.Option("--junit", metavar="FILE", help="Write JUnit XML.")] = None,
    set: Overrides = None,
    cache: CacheFolder = None,
    no_wait: NoWait = False,
) -> int:
    """Judge a bundle or any model against a budget; exit code 0 only if every limit passes, else 4."""
    import gc

    gc.disable()  # as for a plan
    from llmpack.cli.gate import reported
    from llmpack.cli.show import show_checked
    from llmpack.errors import BudgetMissed
    from llmpack.pipeline.check import Question
    from llmpack.pipeline.check import check as judge

    question = Question(tuple(budget or ()), tuple(set or ()), tuple(device or ()), accept, estimate_only, on)
    checked = reported(path, junit, lambda: judge(path, open_cache(cache, no_wait), question))
    session.answer(checked.document(), lambda: show_checked(checked))
    return 0 if checked.passed else BudgetMissed.exit_code


@app.command()
@command
def verify(session: Session, bundle: BundlePath) -> None:
    """Check a bundle's files against its checksums and its manifest, and its model file against the format."""
    from llmpack.pipeline.verify import verify_bundle

    verified = verify_bundle(bundle)
    session.answer(verified, lambda: print(f"{bundle}: {len(verified['files'])} files are what the manifest says"))


@app.command()
@command
def inspect(
    session: Session,
    path: Annotated[Path, typer.Argument(help="A GGUF file, a checkpoint folder or a bundle.", show_default=False)],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
) -> None:
    """Show tensors, encodings, bits per weight and bytes of a model on disk."""
    from llmpack.cli.show import show_inspection
    from llmpack.pipeline.inspection import inspect as look

    found = look(path)
    session.answer(found.document(), lambda: show_inspection(found, tensors))


@app.command("eval")
@command
def evaluate(
    session: Session,
    bundle: BundlePath,
    text: Annotated[
        list[str] | None, typer.Option("--text", help="Text to judge on, as in a recipe. Repeatable.")
    ] = None,
    tokens: Annotated[int | None, typer.Option("--tokens", help="How many tokens to compare.")] = None,
    cache: CacheFolder = None,
    offline: Offline = False,
) -> None:
    """Compare a bundle in its runtime with the model that it was made from, token by token."""
    from llmpack.cli.show import show_quality
    from llmpack.pipeline.evaluate import evaluate_bundle

    found = evaluate_bundle(bundle, open_cache(cache), text=tuple(text or ()), tokens=tokens, offline=offline)
    session.answer(found.document(), lambda: show_quality(found))


@app.command()
@command
def run(
    session: Session,
    bundle: BundlePath,
    prompt: Annotated[str, typer.Argument(help="What to ask.", show_default=False)],
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Longest answer.")] = 256,
    system: Annotated[str | None, typer.Option("--system", help="System message.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it is, without the chat template.")
    ] = False,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the drawing of tokens.")] = 0,
) -> None:
    """Ask a bundle something, under the runtime settings that ship in it."""
    from llmpack.pipeline.talk import Question, ask

    question = Question(prompt, tokens=tokens, system=system, raw=raw, temperature=temperature, seed=seed)
    spoken = (lambda text: None) if session.json else (lambda text: print(text, end="", flush=True))
    answer = ask(bundle, question, spoken)
    session.answer(answer, print)


@app.command()
@command
def sensitivity(
    session: Session,
    model: Annotated[str, typer.Argument(help="A source as in a recipe, or a recipe (.toml).", show_default=False)],
    encoding: Annotated[
        str | None,
        typer.Option("--encoding", help="Compare matrices in this encoding (default: one that all can have)."),
    ] = None,
    top: Annotated[int, typer.Option("--top", min=1, help="How many matrices to list.")] = 12,
    svg: Annotated[Path | None, typer.Option("--svg", help="Write a heat map to this file.")] = None,
    text: Annotated[
        list[str] | None, typer.Option("--text", help="Calibration text for a source, as in a recipe. Repeatable.")
    ] = None,
    tokens: Annotated[int | None, typer.Option("--tokens", min=1, help="How many tokens of it (8192).")] = None,
    dequantize: Annotated[bool, typer.Option("--dequantize", help="The source may be quantized already.")] = False,
    set: Overrides = None,
    cache: CacheFolder = None,
    no_wait: NoWait = False,
    offline: Offline = False,
) -> None:
    """Predict what each encoding of each matrix would cost: which must stay precise, and why."""
    from llmpack.cli.explain import diagnosis_svg, show_diagnosis
    from llmpack.pipeline.sensitivity import diagnose

    found = diagnose(
        model,
        open_cache(cache, no_wait),
        text=tuple(text or ()),
        tokens=tokens,
        dequantize=dequantize,
        overrides=tuple(set or ()),
        offline=offline,
    )
    name = found.require(encoding or found.usual)
    if svg is not None:
        svg.write_text(diagnosis_svg(found, name))
    session.answer(found.document(), lambda: show_diagnosis(found, name, top))


@app.command("list")
@command
def list_(
    session: Session,
    what: Annotated[str, typer.Argument(help="steps, encodings, layouts, devices or families.", show_default=False)],
) -> None:
    """List what recipes may name."""
    from llmpack.cli.listing import listing
    from llmpack.cli.show import show_table

    rows = listing(what)
    session.answer(rows, lambda: show_table(rows))


@app.command()
@command
def schema(session: Session) -> None:
    """Print the JSON Schema of recipes, for editors."""
    from llmpack.pipeline.schema import schema_text

    print(schema_text(), end="")


def _version(asked: bool) -> None:
    if asked:
        from llmpack import __version__

        print(f"llmpack {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """The `llmpack` program."""
    app()
