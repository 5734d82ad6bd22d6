"""Plans: exact bytes, what is cached, what cannot be; fast and without torch."""

import json
import os
import re
import struct
import subprocess
import sys
import textwrap

import pytest

from llmpack.errors import RecipeError
from llmpack.models import family_of
from llmpack.pipeline.planning import plan_bundle

BIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
}


@pytest.fixture(scope="session")
def big(packable, tmp_path_factory):
    """A model of 7B parameters: real headers, and data that takes no disk."""
    folder = tmp_path_factory.mktemp("big") / "big-llama"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(BIG))
    for path in packable.iterdir():
        if path.name.startswith(("tokenizer", "special", "chat", "generation")):
            (folder / path.name).write_bytes(path.read_bytes())
    specs = family_of(BIG).graph(BIG).tensors
    names = {}
    shards = [specs[i::4] for i in range(4)]
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-00004.safetensors"
        offset, header = 0, {}
        for spec in shard:
            end = offset + 2 * spec.parameters
            header[spec.name] = {"dtype": "F16", "shape": list(spec.shape), "data_offsets": [offset, end]}
            names[spec.name] = file
            offset = end
        raw = json.dumps(header).encode()
        with (folder / file).open("wb") as out:
            out.write(struct.pack("<Q", len(raw)) + raw)
            out.truncate(8 + len(raw) + offset)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return folder


def test_planning_a_7b_model_costs_little_memory_and_no_torch(big, tmp_path):
    recipe = tmp_path / "big.toml"
    recipe.write_text(
        f'schema = 1\nname = "big"\n[source]\nmodel = "{big}"\n[calibration]\ntext = ["python:pydoc_data.topics"]\n'
        '[[step]]\nuse = "quantize.gptq"\nencoding = "iq4_nl"\n[target]\ndevice = "raspberry-pi-5-8gb"\n'
        '[budget]\nmemory = "6 GiB"\ncontext = 2048\ndecode = "1 tok/s"\n'
    )
    code = f"""
        import json, sys, time
        start = time.process_time()
        from pathlib import Path
        from llmpack.pipeline.planning import plan_bundle
        from llmpack.pipeline.cache import Cache
        from llmpack.pipeline.state import Order
        plan = plan_bundle(Order(Path({str(recipe)!r}), Path("out"), Cache(Path({str(tmp_path / "cache")!r})))).plan
        heavy = sorted({{"torch", "transformers", "llama_cpp", "scipy"}} & set(sys.modules))
        status = Path("/proc/self/status").read_text()
        peak = [int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")][0]
        print(json.dumps({{"heavy": heavy, "peak": peak, "cpu": time.process_time() - start, "plan": plan.document()}}))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(found["cpu"], found["peak"])
    assert found["heavy"] == []
    assert found["peak"] < 150 * 1024
    assert found["plan"]["parameters"] == 6_878_924_800
    assert found["plan"]["steps"][0]["state"] == "to do"


def test_a_plan_says_what_is_to_do(order):
    plan = plan_bundle(order()).plan
    assert [(step.step.use, step.state, step.key) for step in plan.steps] == [("quantize.gptq", "to do", None)]
    assert {spec.encoding for spec in plan.graph.tensors} == {"iq4_nl", "q8_0", "f32"}
    rows = {row.limit: row for row in plan.verdict.rows}
    assert rows["memory"].status == "UNMEASURED"
    assert rows["memory"].value > plan.nbytes
    assert rows["quality.kl"].value is None
    assert not plan.misses


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["step.0.encoding=q4_k"], r"--set step.0.encoding: .*64.*multiple of.*q4_k.*256"),
        (['step.0.exceptions={"ffn.dwn"="q8_0"}'], r"step.0.exceptions.\"ffn.dwn\": no part `ffn.dwn`; did you mean"),
        (['step.0.exceptions={"ffn.down@2"="q8_0"}'], r"block 2 does not exist; the model has blocks 0-1"),
        (["budget.context=1024"], r"--set budget.context: a context of 1024 is beyond the 512"),
        (["budget.memory=900 TB"], r"--set budget.memory: .* is more than the .* of host"),
        (["target.device=raspberry-pi-6"], r"--set target.device: unknown device `raspberry-pi-6`; did you mean"),
        (['target.devices=["host", "steam-dek"]'], r"--set target.devices.1: unknown device `steam-dek`; did you mean"),
        (
            ['target.devices=["host", "host"]'],
            r"--set target.devices: devices names host twice|devices names host twice",
        ),
        (['target.devices=["host"]', "target.device=steam-deck"], r"exclude each other; name them all in devices"),
        (["source.model=hf:no"], r"--set source.model: 'hf:no' is not hf:org/name@revision"),
        (["source.dtype=f16"], r"--set source.dtype: only a GGUF source is decoded"),
    ],
)
def test_what_cannot_work_is_refused_with_its_place(order, overrides, message):
    with pytest.raises(RecipeError) as caught:
        plan_bundle(order(*overrides))
    assert any(re.search(message, str(problem)) for problem in caught.value.problems), caught.value.problems


def test_every_device_has_an_outlook(order):
    plan = plan_bundle(order('target.devices=["raspberry-pi-5-8gb", "raspberry-pi-4-4gb"]')).plan
    assert [look.device.name for look in plan.outlooks] == ["raspberry-pi-5-8gb", "raspberry-pi-4-4gb"]
    first, second = (look.estimate.memory for look in plan.outlooks)
    assert first.total.value > second.total.value  # the older one repacks nothing
    document = plan.document()
    assert [verdict["device"] for verdict in document["verdicts"]] == ["raspberry-pi-5-8gb", "raspberry-pi-4-4gb"]
    assert len(document["estimates"]) == 2


def test_steps_that_contradict_are_refused(order, recipe_file):
    recipe_file.write_text(recipe_file.read_text() + '[[step]]\nuse = "quantize.gptq"\nencoding = "q4_0"\n')
    with pytest.raises(RecipeError, match=r"step.1.*stored as iq4_nl already"):
        plan_bundle(order())


def test_a_budget_below_the_model_itself_is_missed_by_the_plan(order):
    plan = plan_bundle(order("budget.disk=1 MB", "budget.memory=3 MiB")).plan
    assert plan.misses
    assert {row.limit for row in plan.verdict.rows if row.status == "FAIL"} == {"disk", "memory"}


def test_texts_that_are_not_there_are_named_with_all_that_cannot_work(order):
    texts = ('calibration.text=["nope.txt", "python:json", "dataset:nope"]', 'evaluation.text=["python:nope"]')
    with pytest.raises(RecipeError) as refused:
        plan_bundle(order(*texts, "step.0.encoding=q4_k"))
    said = [problem.message for problem in refused.value.problems]
    assert "not a multiple" in said[0]
    assert "`nope.txt`: there is no such file" in said[-3]
    assert "`dataset:nope`: write dataset:OWNER" in said[-2]
    assert "`python:nope`: only modules" in said[-1]
