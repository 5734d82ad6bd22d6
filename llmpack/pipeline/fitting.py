"""The amount "budget" of a pruning step as a number: as little as has to go for the finished model to keep its limits.

Every step behind it counts: the model is followed to its last encoding, and weighed as the target "budget" of
quantize.auto is.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from llmpack.errors import Problem, RecipeError
from llmpack.models.graph import ModelGraph
from llmpack.pipeline.choosing import choose
from llmpack.pipeline.limits import Limit, Setting, file_size, limits_of
from llmpack.steps.quantize_auto import QuantizeAuto, Target
from llmpack.steps.step import Step


def fitted(steps: Sequence[Step], graph: ModelGraph, setting: Setting) -> Step:
    """The first of `steps` with a number as its open amount.

    steps  it and all that follow it in the recipe
    graph  what it starts from

    Raises RecipeError where nothing has to go, nothing that can go is enough, or a later step fills the budget anyway.
    """
    step, *rest = steps
    name = str(step.open_amount)
    _require_open_once(name, step, rest)
    try:
        before = _broken(graph, rest, setting)
        if not before:
            text = "the model keeps every limit of [budget] as it is; take the step out, or give a number"
            raise RecipeError([Problem(text, name)])
        amounts = step.amounts(graph)
        at = bisect_left(amounts, True, key=lambda one: not _broken(one.preview(graph), rest, setting))
        if at < len(amounts):
            return amounts[at]
        left = _broken(amounts[-1].preview(graph), rest, setting) if amounts else before
    except RecipeError as error:
        raise RecipeError([_named(problem, name) for problem in error.problems]) from error
    raise RecipeError([Problem(_too_much(limit, name), name) for limit in left])


def _require_open_once(name: str, step: Step, rest: Sequence[Step]) -> None:
    others = [f"{one.use} ({one.open_amount})" for one in rest if one.open_amount is not None]
    others += [f"{step.use} ({other})" for other, value in step if value == "budget" and other != name]
    for one in rest:
        if isinstance(one, QuantizeAuto) and Target.parse(one.target).kind != "bits":
            others.append(f'{one.use} (target = "{one.target}")')
    if others:
        text = f"{', '.join(others)} fills what there is as well; give all but one of them as numbers"
        raise RecipeError([Problem(text, name)])


def _broken(graph: ModelGraph, steps: Sequence[Step], setting: Setting) -> list[Limit]:
    """The limits that a model breaks once `steps` are done with it."""
    for step in steps:
        graph = choose(step, graph, None, setting).graph if isinstance(step, QuantizeAuto) else step.preview(graph)
    limits = limits_of(Target("budget"), setting, graph, (), file_size(setting, graph, ()))
    return [limit for limit in limits if limit.fixed > limit.bound]


def _named(problem: Problem, name: str) -> Problem:
    """A problem of limits, told of the option that asked for them; those of other steps say whose they are."""
    return Problem(problem.message, name, rule=problem.rule)


def _too_much(limit: Limit, name: str) -> str:
    text = f"{limit.words} allows {limit.bound:,} {limit.unit}, and with all {name} gone that may go"
    return f"{text} {limit.fixed:,} are taken; raise it, or let other steps take more"
