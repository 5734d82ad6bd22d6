"""What a step takes of memory: as the arithmetic of its buffers says, and as the system counts it."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from tiny_config import TINY

from llmpack.models import family_of
from llmpack.steps import STEPS
from llmpack.steps.host_memory import BASE, KEPT, Batch

GIB = 1 << 30
SEVEN_B = {
    **TINY,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
WITHIN = 0.10

MEASURED = """
    import json, sys
    from dataclasses import asdict
    from pathlib import Path
    import torch
    torch.set_num_threads(2)
    from llmpack.calibration.corpus import Corpus
    from llmpack.checkpoint.checkpoint import Checkpoint
    from llmpack.models import open_model
    from llmpack.runtime.meter import read_memory
    from llmpack.steps import STEPS
    from llmpack.steps.step import Workbench

    def memory_of(folder, work, length):
        Path("/proc/self/clear_refs").write_text("5")
        checkpoint = Checkpoint.open(Path(folder))
        tokens = torch.randint(0, 512, (2048 // length, length), generator=torch.Generator().manual_seed(0))
        bench = Workbench(work / "made", work / "work", checkpoint, Corpus.of(tokens), 0, 2)
        made = STEPS.load(use)(use=use, encoding="q4_0", **json.loads(options))
        made.run(checkpoint, open_model(checkpoint), bench)
        return asdict(read_memory())

    small, folder, work, use, length, options = sys.argv[1:]
    work = Path(work)
    programs = memory_of(small, work / "small", 256)
    print(json.dumps([programs, memory_of(folder, work / "large", int(length))]))
"""


def step(use, **options):
    return STEPS.load(use)(use=use, **options)


def graph_of(config):
    return family_of(config).graph(config)


def test_a_model_of_seven_billion_parameters_is_built_in_less_than_four_gibibytes():
    plain = {"encoding": "q4_k", "correction": 0.0, "refine": 0}
    moments = step("quantize.gptq", **plain).host_memory(graph_of(SEVEN_B), Batch.of(16 * 512, 512))
    largest = max(moments, key=lambda moment: moment.nbytes)
    assert largest.name == "factorizing ffn.out"
    parts = {part.name: part.nbytes for part in largest.parts}
    assert parts["weights of one block"] == 4 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096)
    assert parts["second moments of ffn.out"] == 4 * 11008**2
    assert parts["the same in float64, factored"] == 8 * 11008**2
    assert parts["second moments of other inputs"] == 0
    assert 2 * GIB < largest.nbytes < 3 * GIB


def test_following_and_refining_take_more_and_are_told():
    graph, batch = graph_of(SEVEN_B), Batch.of(16 * 512, 512)
    peaks = [
        max(m.nbytes for m in step("quantize.gptq", correction=c, refine=r).host_memory(graph, batch))
        for c, r in ((0.0, 0), (0.0, 1), (0.5, 0), (0.5, 1))
    ]
    assert peaks == sorted(peaks)
    assert len(set(peaks)) == 4
    assert peaks[-1] < 4.5 * GIB


def test_blocks_of_one_shape_are_counted_once_and_others_apart():
    plain = step("quantize.gptq", encoding="q4_0").host_memory(graph_of(SEVEN_B), Batch.of(8192, 512))
    mixed = step("quantize.gptq", encoding="q4_0", exceptions={"ffn.down@3": "q8_0"})
    assert len({moment.name for moment in plain}) == len(plain)
    assert len(mixed.host_memory(graph_of(SEVEN_B), Batch.of(8192, 512))) == len(plain)


def test_a_batch_holds_whole_sequences():
    assert Batch.of(8192, 512) == Batch(512, 2048, 8192)
    assert Batch.of(1024, 512) == Batch(512, 1024, 1024)
    assert Batch.of(8192, 4096) == Batch(4096, 4096, 8192)


@pytest.fixture(scope="module")
def small(checkpoint_factory):
    """A model that is next to nothing: what a process takes with it is programs and libraries."""
    return checkpoint_factory(tokenizer=None, num_hidden_layers=2, torch_dtype="bfloat16")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system keeps no mark of the peak")
@pytest.mark.parametrize(
    ("use", "options", "sizes", "length"),
    [
        ("quantize.gptq", {"correction": 0.0, "refine": 0}, {"hidden_size": 256, "intermediate_size": 5632}, 256),
        ("quantize.gptq", {"correction": 0.0, "refine": 0}, {"hidden_size": 768, "intermediate_size": 2048}, 2048),
        ("quantize.gptq", {}, {"hidden_size": 128, "intermediate_size": 4096}, 128),
        ("quantize.gptq", {"tune": 2, "refine": 0}, {"hidden_size": 512, "intermediate_size": 1536}, 128),
        ("quantize.rtn", {}, {"hidden_size": 256, "intermediate_size": 4096}, 512),
    ],
    ids=["factor", "batch", "followed and refined", "tuned", "rtn"],
)
def test_the_prediction_is_what_the_system_counts(small, checkpoint_factory, tmp_path, use, options, sizes, length):
    """Beyond the programs themselves, as the same process had them with next to nothing of a model.

    Another process may map more of the same libraries, or less: tens of MB, by what the system has in its cache.
    """
    folder = checkpoint_factory(
        tokenizer=None, num_hidden_layers=2, max_position_embeddings=4096, torch_dtype="bfloat16", **sizes
    )
    config = json.loads((folder / "config.json").read_text())
    moments = step(use, encoding="q4_0", **options).host_memory(graph_of(config), Batch.of(2048, length))
    predicted = max(moment.nbytes for moment in moments)
    arguments = [str(small), str(folder), str(tmp_path), use, str(length), json.dumps(options)]
    command = [sys.executable, "-c", textwrap.dedent(MEASURED), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    programs, found = json.loads(done.stdout)
    beyond, expected = found["peak"] - programs["peak"], predicted - (BASE - KEPT)
    assert programs["peak"] == pytest.approx(BASE - KEPT, rel=0.25), programs
    assert beyond == pytest.approx(expected, abs=WITHIN * predicted), (programs, found)
