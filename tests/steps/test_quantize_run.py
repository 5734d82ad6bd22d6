"""Quantizing steps on a small real model: what they write, that they resume, and what llama.cpp itself makes."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager

import gguf
import numpy as np
import pytest
import torch

from llmpack.algorithms.divergence import kl_divergence
from llmpack.algorithms.gptq import relative_error
from llmpack.calibration.corpus import Corpus
from llmpack.calibration.walk import walk
from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.checkpoint.gguf_file import GgufFile
from llmpack.encodings import encoding
from llmpack.errors import NumericalError, StepFailed
from llmpack.models import family_of, open_model
from llmpack.models.forward import Forward, final_hidden
from llmpack.progress import QUIET
from llmpack.steps import STEPS
from llmpack.steps.blocks import compute_threads, noted
from llmpack.steps.quantize import Quantize
from llmpack.steps.step import Workbench

BLOCKS = 3
THREADS = 1
QUANTIZERS = [name for name, kind in STEPS.items() if issubclass(kind, Quantize)]


@pytest.fixture(scope="module")
def checkpoint(checkpoint_factory):
    return Checkpoint.open(checkpoint_factory(num_hidden_layers=BLOCKS))


@pytest.fixture(scope="module")
def graph(checkpoint):
    return open_model(checkpoint)


def corpus_of(seed, count=24):
    return Corpus.of(torch.randint(0, 512, (count, 48), generator=torch.Generator().manual_seed(seed)))


def step(name, **options):
    return STEPS.load(name).model_validate_json(json.dumps({"use": name, **options}))


def bench(folder, checkpoint, corpus, progress=QUIET):
    return Workbench(folder / "content", folder / "work", checkpoint, corpus, 0, THREADS, progress)


def divergence(checkpoint, changed, tokens):
    graphs = [open_model(one) for one in (checkpoint, changed)]
    logits = []
    for one, graph in zip((checkpoint, changed), graphs, strict=True):
        hidden = final_hidden(one, graph, tokens)
        logits.append(Forward(one, graph).logits(hidden).reshape(-1, 512))
    return float(kl_divergence(*logits).mean())


@pytest.fixture(scope="module")
def results(checkpoint, graph, tmp_path_factory):
    """Each step's output with its defaults."""
    return {
        name: step(name).run(checkpoint, graph, bench(tmp_path_factory.mktemp("step"), checkpoint, corpus_of(1)))
        for name in QUANTIZERS
    }


@pytest.mark.parametrize("name", QUANTIZERS)
def test_the_result_is_what_the_preview_promised(name, results, checkpoint, graph):
    result = results[name]
    assert open_model(result).tensors == step(name).preview(graph).tensors
    for spec in graph.tensors:
        if spec.part == "norm":
            assert np.array_equal(result.packed(spec.name), checkpoint.packed(spec.name))
    assert [path.name for path in result.tokenizer_files] == [path.name for path in checkpoint.tokenizer_files]


def test_gptq_is_nearer_to_the_model_than_rounding_on_text_it_has_not_seen(results, checkpoint):
    tokens = corpus_of(2).tokens
    kl = {name: divergence(checkpoint, result, tokens) for name, result in results.items()}
    assert kl["quantize.gptq"] < kl["quantize.rtn"]
    assert kl["quantize.rtn"] < 1.05 * kl["quantize.llamacpp"]


def notes_of(result, block):
    for line in (result.folder / "llmpack-journal.jsonl").read_text().splitlines():
        entry = json.loads(line.partition(" ")[2])
        if entry.get("shard") == f"block-{block:04d}":
            return entry["note"]["tensors"]
    raise AssertionError(f"no block {block} in the journal")


def test_gptq_notes_error_damping_and_clipping_of_every_matrix(results, graph):
    for block in range(BLOCKS):
        notes = notes_of(results["quantize.gptq"], block)
        assert set(notes) == {spec.name for spec in graph.block(block) if spec.is_linear}
        for note in notes.values():
            assert 0 < note["error"] < 0.02
            assert note["damping"] == step("quantize.gptq").damping
            assert 0 <= note["clipped"] < 0.2


def test_refinement_lowers_the_error_of_every_matrix(checkpoint, graph, tmp_path):
    """In the first block, whose inputs are the same with and without it."""
    notes = []
    for rounds in (0, 1, 3):
        run = bench(tmp_path / str(rounds), checkpoint, corpus_of(1))
        one = step("quantize.gptq", refine=rounds, damping=0.0, correction=0.0)
        notes.append(notes_of(one.run(checkpoint, graph, run), 0))
    for name in notes[0]:
        plain, once, thrice = (note[name]["error"] for note in notes)
        assert thrice < once < plain


def test_text_kept_out_decides_whether_a_matrix_stays_refined(results, checkpoint, graph, tmp_path):
    """Refining until the second moments of little text are met to the last digit is no gain on other text."""
    run = bench(tmp_path, checkpoint, corpus_of(1, count=8))
    overdone = step("quantize.gptq", encoding="q4_0", refine=12, damping=1e-4).run(checkpoint, graph, run)
    for result in (overdone, results["quantize.gptq"]):
        won = []
        for block in range(BLOCKS):
            notes = notes_of(result, block).values()
            assert all(note["refined"] == (note["unseen_ratio"] < 1) for note in notes)
            won.append(sum(note["refined"] for note in notes))
            kept = noted(result.folder, BLOCKS)["blocks"][str(block)]["refinement"]
            assert kept == {"kept": won[-1], "of": len(notes)}
        assert (sum(won) < BLOCKS * len(notes)) == (result is overdone)


def test_correction_is_noted_where_something_has_moved(results, checkpoint, graph, tmp_path):
    notes = [notes_of(results["quantize.gptq"], block) for block in range(BLOCKS)]
    assert all(note["correction"] == 0 for note in notes[0].values())
    later = [note["correction"] for block in notes[1:] for note in block.values()]
    assert all(0 <= much <= 0.5 for much in later)
    assert max(later) > 0.1
    few = step("quantize.gptq").run(checkpoint, graph, bench(tmp_path, checkpoint, corpus_of(1, count=7)))
    assert all(note["correction"] == 0 for block in range(BLOCKS) for note in notes_of(few, block).values())


def test_gptq_sees_the_blocks_that_it_rounded_before(checkpoint, graph, tmp_path):
    """The error that it notes in the last block is measured on inputs that come out of rounded blocks."""
    corpus = corpus_of(1)
    exact = step("quantize.gptq", correction=0.0, products="f32")
    result = exact.run(checkpoint, graph, bench(tmp_path, checkpoint, corpus))
    name = f"model.layers.{BLOCKS - 1}.self_attn.o_proj.weight"
    for visit in walk(checkpoint, graph, corpus, work=tmp_path / "again"):
        if visit.index == BLOCKS - 1:
            break
        for spec in graph.block(visit.index):
            if spec.is_linear:
                visit.replace(spec.name, result.read(spec.name))
    H = visit.hessians()["attention.out"].mean()
    error = relative_error(checkpoint.read(name), result.read(name), H)
    assert notes_of(result, BLOCKS - 1)[name]["error"] == pytest.approx(error, rel=1e-6)


@pytest.mark.parametrize("name", ["quantize.gptq", "quantize.rtn"])
def test_exceptions_reach_the_file(name, checkpoint, graph, tmp_path):
    options = {"encoding": "q4_0", "exceptions": {"attention.v": "f16", "ffn.up@1": "q8_0"}, "embedding": "f16"}
    one = step(name, **options)
    result = one.run(checkpoint, graph, bench(tmp_path, checkpoint, corpus_of(1)))
    assert open_model(result).tensors == one.preview(graph).tensors
    value = "model.layers.0.self_attn.v_proj.weight"
    assert torch.equal(result.read(value), checkpoint.read(value).half())
    embedding = "model.embed_tokens.weight"
    assert torch.equal(result.read(embedding), checkpoint.read(embedding).half())
    assert len({result.tensors[f"model.layers.{i}.mlp.up_proj.weight"].encoding for i in range(2)}) == 2


@pytest.mark.parametrize("name", ["quantize.rtn", "quantize.llamacpp"])
def test_without_importance_no_text_is_read(name, checkpoint, graph, tmp_path):
    one = step(name, importance=False)
    result = one.run(checkpoint, graph, bench(tmp_path, checkpoint, None))
    assert open_model(result).tensors == one.preview(graph).tensors
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("name", QUANTIZERS)
def test_without_text_a_step_that_needs_it_says_so(name, checkpoint, graph, tmp_path):
    with pytest.raises(StepFailed, match="calibration"):
        step(name).run(checkpoint, graph, bench(tmp_path, checkpoint, None))


# ---- failure


def damaged(checkpoint_factory, tmp_path):
    """A model whose first feed-forward overflows float32: its second moments are not finite."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "damaged"
    source = checkpoint_factory()
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] *= 1e38
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return Checkpoint.open(folder)


def test_a_numerical_error_names_step_block_and_tensors(checkpoint_factory, tmp_path):
    broken = damaged(checkpoint_factory, tmp_path)
    options = {"exceptions": {"ffn.up": "f32"}}
    with pytest.raises(NumericalError, match=r"quantize.gptq, block 0, model.layers.0.mlp.down_proj.weight: .*finite"):
        step("quantize.gptq", **options).run(broken, open_model(broken), bench(tmp_path, broken, corpus_of(1, 2)))


# ---- resuming


class Killer:
    """Progress that kills the process at its n-th sign of life, and counts passes over blocks."""

    def __init__(self, at=None):
        self.at, self.signs, self.passes = at, 0, []

    def _sign(self):
        self.signs += 1
        if self.signs == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    @contextmanager
    def task(self, title, total):
        self._sign()
        self.passes.append(title)
        yield lambda done: self._sign()

    def say(self, message):
        self._sign()


KILLED = """
import sys, torch
from pathlib import Path
from tests.steps.test_quantize_run import Killer, bench, corpus_of, step
from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.models import open_model
name, folder, source, at = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
checkpoint = Checkpoint.open(source)
step(name).run(checkpoint, open_model(checkpoint), bench(folder, checkpoint, corpus_of(1), Killer(at)))
"""


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["quantize.gptq", "quantize.rtn"])
def test_a_killed_run_goes_on_with_the_same_bytes_and_repeats_at_most_one_block(
    name, results, checkpoint, graph, tmp_path
):
    counter = Killer()
    whole = step(name).run(checkpoint, graph, bench(tmp_path / "whole", checkpoint, corpus_of(1), counter))
    assert files_of(whole.folder) == files_of(results[name].folder)
    started = sum(title.startswith("block") for title in counter.passes)
    for at in (counter.signs * 2 // 3, counter.signs):
        folder = tmp_path / f"killed-{at}"
        arguments = [name, str(folder), str(checkpoint.folder), str(at)]
        child = subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False, capture_output=True)
        assert child.returncode == -signal.SIGKILL, child.stderr.decode()
        finished = sum((folder / "content" / f"block-{i:04d}.safetensors").exists() for i in range(BLOCKS))
        rest = Killer()
        result = step(name).run(checkpoint, graph, bench(folder, checkpoint, corpus_of(1), rest))
        assert files_of(result.folder) == files_of(whole.folder)
        repeated = sum(title.startswith("block") for title in rest.passes)
        per_block = 2 if name == "quantize.gptq" else 1
        assert repeated <= started - per_block * max(0, finished - 1)
        assert finished > 0


def test_a_folder_of_something_else_is_refused(checkpoint, graph, tmp_path):
    (tmp_path / "content").mkdir()
    (tmp_path / "content" / "notes.txt").write_text("mine")
    with pytest.raises(StepFailed, match=r"notes\.txt"):
        step("quantize.rtn").run(checkpoint, graph, bench(tmp_path, checkpoint, corpus_of(1)))
    assert (tmp_path / "content" / "notes.txt").read_text() == "mine"


# ---- llama.cpp as the oracle

ORACLE = """
import ctypes, json, sys
import llama_cpp, numpy as np
source, target, ftype, moments = sys.argv[1], sys.argv[2], int(sys.argv[3]), np.load(sys.argv[4])
params = llama_cpp.llama_model_quantize_default_params()
params.ftype, params.pure, params.nthread = ftype, True, 1
params.token_embedding_type = 8
entry = llama_cpp.llama_cpp.llama_model_imatrix_data
keep = [np.ascontiguousarray(moments[name], dtype=np.float32) for name in moments.files]
table = (entry * (len(keep) + 1))()
for slot, name, values in zip(table, moments.files, keep):
    slot.name, slot.size = name.encode(), values.size
    slot.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
params.imatrix = table
assert llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)) == 0
"""

FTYPES = {"q4_0": 2, "iq4_nl": 25}


def write_bare_gguf(checkpoint, graph, path):
    """Weights and sizes in float32, without a vocabulary: enough for llama-quantize."""
    family = family_of(graph.config)
    writer = gguf.GGUFWriter(path, family.gguf_arch)
    for key, value in family.hyperparameters(graph.config).items():
        (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(key, value)
    for spec in graph.tensors:
        order = family.row_order(spec, graph.config)
        values = checkpoint.read(spec.name).numpy()
        writer.add_tensor(spec.gguf_name, values if order is None else values[order])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="needs llama-cpp-python")
@pytest.mark.parametrize("name", list(FTYPES))
def test_llamacpp_gives_the_bytes_of_llama_quantize(name, checkpoint, graph, tmp_path):
    corpus = corpus_of(1)
    moments = {}
    with compute_threads(THREADS):  # sums in another order differ in their last bits
        for visit in walk(checkpoint, graph, corpus, work=tmp_path / "walk", observe=True):
            for inputs, total in visit.hessians().items():
                for spec in graph.input_groups(visit.index)[inputs]:
                    moments[spec.gguf_name] = total.mean().diagonal().numpy()
    np.savez(tmp_path / "moments.npz", **moments)
    write_bare_gguf(checkpoint, graph, tmp_path / "f32.gguf")
    arguments = [tmp_path / "f32.gguf", tmp_path / "theirs.gguf", FTYPES[name], tmp_path / "moments.npz"]
    subprocess.run([sys.executable, "-c", ORACLE, *map(str, arguments)], check=True, capture_output=True)
    theirs = GgufFile.open(tmp_path / "theirs.gguf")
    ours = step("quantize.llamacpp", encoding=name).run(checkpoint, graph, bench(tmp_path, checkpoint, corpus))
    family = family_of(graph.config)
    for spec in graph.tensors:
        if spec.is_linear or spec.part == "embedding":
            packed = ours.packed(spec.name)
            order = family.row_order(spec, graph.config)
            assert theirs.tensors[spec.gguf_name].encoding == ours.tensors[spec.name].encoding
            assert np.array_equal(packed if order is None else packed[order], theirs.packed(spec.gguf_name)), spec.name


def test_gptq_packs_what_it_decoded(results, graph):
    result = results["quantize.gptq"]
    for spec in graph.block(0):
        if spec.is_linear:
            kind = encoding(result.tensors[spec.name].encoding)
            codes, grid = kind.unpack(result.packed(spec.name), spec.shape[1])
            assert np.array_equal(kind.pack(codes, grid), result.packed(spec.name))


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_second_rounding_starts_from_the_numbers_of_the_first(name, checkpoint, graph, tmp_path):
    first = step("quantize.rtn", encoding="int3_g32", importance=False)
    coarse = first.run(checkpoint, graph, bench(tmp_path / "first", checkpoint, None))
    again = step(name, encoding="q8_0", requantize=True)
    found = again.run(coarse, open_model(coarse), bench(tmp_path / "second", coarse, corpus_of(1)))
    for spec in open_model(found).tensors:
        if spec.is_linear:
            assert spec.encoding == "q8_0"
            before, after = coarse.read(spec.name), found.read(spec.name)
            assert float((after - before).norm() / before.norm()) < 0.01, spec.name
            assert float((after - checkpoint.read(spec.name).float()).norm() / before.norm()) > 0.05, spec.name
