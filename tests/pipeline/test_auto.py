"""quantize.auto on the whole road: planned in bounds, scored once, chosen exactly, built to the byte."""

import itertools
import json
import subprocess
import sys
import textwrap

import pytest
from small_recipe import RECIPE

from llmpack.calibration.corpus import Corpus
from llmpack.checkpoint.gguf_file import GgufFile
from llmpack.encodings import encoding
from llmpack.errors import RecipeError
from llmpack.pipeline.build import STAGES
from llmpack.pipeline.cache import Cache
from llmpack.pipeline.planning import plan_bundle
from llmpack.pipeline.stages.writing import write
from llmpack.pipeline.state import Build, Order

AUTO = """
[[step]]
use = "quantize.auto"
target = "{target}"
tokens = 512
"""
LINEAR = 14


@pytest.fixture
def auto(packable, tmp_path):
    """Orders for the small model with quantize.auto; overrides as on the command line."""

    def make(target, *overrides, cache=None, progress=None):
        path = tmp_path / "auto.toml"
        head, tail = RECIPE.format(model=packable).split('[[step]]\nuse = "quantize.gptq"\nencoding = "iq4_nl"\n')
        path.write_text(head + AUTO.format(target=target) + tail)
        cache = cache or Cache(tmp_path / "cache")
        return Order(path, tmp_path / "out", cache, overrides, progress=cache.progress)

    return make


def written(order):
    """As far as the model file."""
    build = Build(order)
    for stage in STAGES[: STAGES.index(write) + 1]:
        build = stage(build)
    return build


@pytest.fixture(scope="module")
def scored(packable, tmp_path_factory):
    """A cache with the scores of the small model, and the build that made them."""
    folder = tmp_path_factory.mktemp("scored")
    head, tail = RECIPE.format(model=packable).split('[[step]]\nuse = "quantize.gptq"\nencoding = "iq4_nl"\n')
    (folder / "auto.toml").write_text(head + AUTO.format(target="4.1 MB") + tail)
    return written(Order(folder / "auto.toml", folder / "out", Cache(folder / "cache")))


def test_a_cold_plan_gives_bounds_and_a_stand_in(auto):
    plan = plan_bundle(auto("4.1 MB")).plan
    (step,) = plan.steps
    assert step.open
    assert step.state == "to do"
    assert not step.choice.scored
    low, high = plan.bounds
    assert low < plan.nbytes <= high == 4_100_000
    assert plan.document()["model_bytes_between"] == [low, high]
    assert plan.document()["choices"] == []


def test_the_file_is_what_was_chosen_to_the_byte(scored):
    (choice,) = scored.plan.choices
    assert scored.plan.bounds is None
    assert choice.scored
    assert scored.artifact.nbytes == scored.plan.nbytes == choice.nbytes <= 4_100_000
    file = GgufFile.open(scored.artifact.path)
    for name, chosen in choice.step.encodings.items():
        spec = scored.plan.graph[name]
        assert file.tensors[spec.gguf_name].encoding == chosen
    assert len(choice.step.encodings) == LINEAR + 1
    assert sum(itertools.chain(*(counts.values() for counts in choice.by_part().values()))) == LINEAR + 1


def test_no_other_mix_of_that_size_is_predicted_to_be_better(scored):
    """Every single change, and every pair of changes, of the chosen mix either costs more or does not fit."""
    from llmpack.pipeline.scoring import find_scores

    (choice,) = scored.plan.choices
    scores = find_scores(scored.cache, scored.plan.steps[0].scores)
    changes = []
    for one in scores.tensors:
        now = choice.step.encodings[one.name]
        size = {name: -(-encoding(name).nbytes(one.shape) // 32) * 32 for name in one.predicted}
        changes.append([(0, 0.0)])
        changes[-1] += [(size[n] - size[now], one.predicted[n] - one.predicted[now]) for n in one.predicted if n != now]
    assert choice.predicted == pytest.approx(sum(t.predicted[choice.step.encodings[t.name]] for t in scores.tensors))
    room = 4_100_000 - choice.nbytes
    for first, second in itertools.combinations(changes, 2):
        for (a, x), (b, y) in itertools.product(first, second):
            assert a + b > room or x + y > -1e-12


def test_another_target_uses_the_same_scores(auto, scored):
    progress = Watcher()
    cache = Cache(scored.cache.root, progress=progress)
    before = {path.name for path in (cache.root / "scores").iterdir()}
    predicted = []
    for target in ("3.64 MB", "4 MB", "6.1 bpw", "8 bpw"):
        plan = plan_bundle(auto(target, cache=cache)).plan
        assert plan.bounds is None
        predicted.append(plan.choices[0].predicted)
        ((_, used, bound),) = plan.choices[0].limits
        assert used <= bound
    assert predicted == sorted(predicted, reverse=True)
    assert plan.bits_per_weight <= 8
    assert {path.name for path in (cache.root / "scores").iterdir()} == before
    assert progress.tasks == []


class Watcher:
    def __init__(self):
        self.tasks = []

    def task(self, title, total):
        self.tasks.append(title)
        raise AssertionError(title)

    def say(self, message):
        pass


def test_a_second_build_finds_everything(auto, scored):
    again = written(auto("4.1 MB", cache=Cache(scored.cache.root)))
    assert [step.cached for step in again.steps] == [True]
    assert again.artifact.sha256 == scored.artifact.sha256


def test_mixes_are_compared_by_measurement_and_the_best_is_kept(auto, scored):
    order = auto("3.6 MB", "step.0.mixes=3", cache=Cache(scored.cache.root))
    cold = plan_bundle(order).plan
    assert cold.steps[0].open
    assert len(cold.steps[0].mixes) > 1
    made = written(order)
    (choice,) = made.plan.choices
    assert len(choice.compared) == len(cold.steps[0].mixes)
    assert choice.compared[0][0] == choice.predicted
    assert choice.compared[0][1] == min(found for _, found in choice.compared)
    assert len({found for _, found in choice.compared}) > 1
    assert choice.predicted >= cold.choices[0].predicted
    assert made.artifact.nbytes == made.plan.nbytes <= 3_600_000
    again = written(order)
    assert again.artifact.sha256 == made.artifact.sha256
    assert [step.cached for step in again.steps] == [True]


def test_mixes_are_judged_on_text_that_comes_after_the_calibration_text(scored):
    seen = scored.calibration.build(scored.cache)
    after = scored.calibration.after(3 * seen.length + 1)
    assert after.shape == (3, seen.length)
    assert scored.calibration.after(1).shape == (1, seen.length)
    assert seen.overlap(Corpus.of(after)) < 0.02
    with pytest.raises(RecipeError, match=r"auto.toml:\d+:\d+.*name more text or lower `tokens`"):
        scored.calibration.after(10**8)


def test_the_budget_is_filled_and_kept(auto, scored):
    cache = Cache(scored.cache.root)
    wide = plan_bundle(auto("budget", "budget.disk=4.5 MB", cache=cache)).plan
    assert wide.nbytes + (256 << 10) <= 4_500_000 < wide.nbytes * 1.2
    assert [row.status for row in wide.verdict.rows if row.limit == "disk"] != ["FAIL"]
    memory = int(wide.estimate.memory.total.high) - 300_000
    tight = plan_bundle(auto("budget", "budget.disk=4.5 MB", f"budget.memory={memory} B", cache=cache)).plan
    assert tight.estimate.memory.total.high <= memory
    assert tight.choices[0].predicted > wide.choices[0].predicted
    assert {words for words, _, _ in tight.choices[0].limits} == {
        "budget.disk, in bytes",
        "budget.memory on host, in bytes",
    }


def test_decode_limits_the_bytes_that_are_read(auto, scored):
    cache = Cache(scored.cache.root)
    place = ("target.device=raspberry-pi-5-8gb", "budget.memory=1 GiB", "budget.disk=1 GB")
    fast = plan_bundle(auto("budget", *place, "budget.decode=4000 tok/s", cache=cache)).plan
    slow = plan_bundle(auto("budget", *place, "budget.decode=1000 tok/s", cache=cache)).plan
    assert fast.nbytes < slow.nbytes
    assert fast.estimate.decode.value >= 4000


def test_candidates_and_forbidden_encodings_are_kept(auto, scored):
    cache = Cache(scored.cache.root)
    some = plan_bundle(auto("4.1 MB", 'step.0.candidates=["q4_0","q5_1","q8_0"]', cache=cache)).plan
    assert set(some.choices[0].step.encodings.values()) <= {"q4_0", "q5_1", "q8_0"}
    without = plan_bundle(auto("4.1 MB", 'step.0.forbid=["iq4_nl","q5_1"]', cache=cache)).plan
    assert not {"iq4_nl", "q5_1"} & set(without.choices[0].step.encodings.values())
    assert without.choices[0].predicted >= plan_bundle(auto("4.1 MB", cache=cache)).plan.choices[0].predicted


@pytest.mark.parametrize(
    ("target", "overrides", "message"),
    [
        (
            "1 MB",
            (),
            r"auto.toml:\d+:\d+ step.0.target: model file allows 1,000,000 bytes, and the smallest mix takes 3,[45]",
        ),
        ("1.9 bpw", (), r"step.0.target: 1.9 bits per weight allows"),
        ("105", (), r"step.0.target: .*a target is bits per weight .* a size, or \"budget\""),
        ("budget", ("budget={context=128}",), r"set disk, memory or decode"),
        ("4 MB", ('step.0.candidates=["q4_k"]',), r"has rows of 64, which no candidate fits; allow one of f16, q8_0"),
        ("4 MB", ('step.0.forbid=["q4_9"]',), r"unknown encoding `q4_9`; did you mean"),
        ("4 MB", ('step.0.candidates=["bf16"]',), r"bf16 cannot be chosen by score"),
        ("4 MB", ("step.0.gptq={dampin=0.1}",), r"unknown key `dampin`; did you mean `damping`"),
        ("4 MB", ("step.0.gptq={damping=-1.0}",), r"damping: Input should be greater than or equal to 0"),
        ("4 MB", ('step.0.candidates=["f16"]', "bundle.float=bf16"), r"none of the candidates .* float = 'bf16'"),
    ],
)
def test_what_cannot_work_is_refused_with_its_place(target, overrides, message, auto):
    with pytest.raises(RecipeError, match=message):
        plan_bundle(auto(target, *overrides))


def test_a_step_after_a_quantizing_one_is_refused(auto, tmp_path):
    order = auto("4 MB")
    order.recipe.write_text(order.recipe.read_text() + '[[step]]\nuse = "quantize.auto"\ntarget = "4 MB"\n')
    with pytest.raises(RecipeError, match=r"step.1.use: model.embed_tokens.weight is stored as .* already"):
        plan_bundle(order)


def test_planning_from_scores_costs_no_torch(auto, scored):
    order = auto("3.9 MB")
    code = f"""
        import json, sys, time
        start = time.process_time()
        from pathlib import Path
        from llmpack.pipeline.planning import plan_bundle
        from llmpack.pipeline.cache import Cache
        from llmpack.pipeline.state import Order
        cache = Cache(Path({str(scored.cache.root)!r}))
        plan = plan_bundle(Order(Path({str(order.recipe)!r}), Path("out"), cache)).plan
        heavy = sorted({{"torch", "transformers", "llama_cpp", "scipy"}} & set(sys.modules))
        print(json.dumps({{"heavy": heavy, "scored": plan.choices[0].scored, "cpu": time.process_time() - start}}))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(found["cpu"])
    assert (found["heavy"], found["scored"]) == ([], True)
