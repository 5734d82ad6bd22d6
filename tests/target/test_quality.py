"""Quality and fidelity of a real file in llama.cpp, against the definition and against planted faults."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llmpack.algorithms.divergence import Divergence
from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.errors import VerificationFailed
from llmpack.formats.facts import Facts
from llmpack.formats.gguf import GgufFormat
from llmpack.models import open_model
from llmpack.runtime.llama import LlamaRuntime
from llmpack.runtime.settings import RuntimeSettings
from llmpack.target.budget import Budget, Evidence, judge
from llmpack.target.device import device
from llmpack.target.quality import (
    CHUNK,
    FIDELITY_KL,
    Reference,
    comparisons,
    evaluate,
    fidelity,
    fidelity_problems,
    quality_findings,
)

SETTINGS = RuntimeSettings(threads=1)
LENGTH = CHUNK + 40  # so that chunks end inside a sequence


@pytest.fixture(scope="module")
def folder(checkpoint_factory, demo_gguf, tmp_path_factory):
    """A small Llama under SmolLM2's tokenizer, whose vocabulary GGUF knows."""
    import shutil

    from llmpack.checkpoint.gguf_file import GgufFile
    from llmpack.models.gguf_tokenizer import tokenizer_files

    made = checkpoint_factory(tokenizer=None, vocab_size=49152)
    folder = tmp_path_factory.mktemp("quality") / "source"
    shutil.copytree(made, folder)
    for name, content in tokenizer_files(GgufFile.open(demo_gguf).metadata).items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def source(folder):
    checkpoint = Checkpoint.open(folder)
    return checkpoint, open_model(checkpoint)


def write_gguf(checkpoint, graph, path, floats="f16"):
    GgufFormat(floats).write(checkpoint, graph, path, Facts("tiny"))
    return path


@pytest.fixture(scope="module")
def f16(source, tmp_path_factory):
    return write_gguf(*source, tmp_path_factory.mktemp("quality") / "f16.gguf")


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 49152, (2, LENGTH), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def reference(source, tokens, tmp_path_factory):
    return Reference.build(*source, tokens, tmp_path_factory.mktemp("references"))


def definition(folder, gguf, tokens):
    """KL in float64 from transformers' whole model and from llama.cpp's logits; no chunks, no hidden states kept."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        p = model(tokens).logits.double().numpy()
    with LlamaRuntime() as runtime:
        runtime.open(gguf, SETTINGS, LENGTH)
        q = np.stack([runtime.logits(row.tolist()) for row in tokens]).astype(np.float64)

    def log_softmax(x):
        x = x - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    log_p, log_q = log_softmax(p), log_softmax(q)
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    nexts = tokens[:, 1:, None].numpy()
    loss_p = -np.take_along_axis(log_p[:, :-1], nexts, -1).mean()
    loss_q = -np.take_along_axis(log_q[:, :-1], nexts, -1).mean()
    top1 = (p.argmax(-1) == q.argmax(-1)).mean()
    return kl, top1, np.exp(loss_q - loss_p)


def test_the_divergence_equals_its_definition(folder, f16, tokens, reference):
    kl, top1, ratio = definition(folder, f16, tokens)
    found = evaluate(f16, reference, SETTINGS)
    assert found.tokens == tokens.numel()
    assert found.mean == pytest.approx(kl.mean(), rel=1e-3, abs=1e-9)
    assert found.max == pytest.approx(kl.max(), rel=1e-2, abs=1e-8)
    assert found.top1 == pytest.approx(top1, abs=2 / tokens.numel())
    assert found.ppl_ratio == pytest.approx(ratio, rel=1e-5)
    assert found.mean < 1e-3


def test_a_coarser_file_is_farther_away(source, f16, reference, tmp_path):
    coarse = write_gguf(*source, tmp_path / "bf16.gguf", "bf16")
    near, far = (evaluate(path, reference, SETTINGS) for path in (f16, coarse))
    assert far.mean > 3 * near.mean
    assert [c.kl.numel() for c in comparisons(f16, reference, SETTINGS)] == [LENGTH, LENGTH]


def test_a_reference_is_kept_and_a_damaged_one_made_again(source, tokens, tmp_path):
    first = Reference.build(*source, tokens, tmp_path)
    (kept,) = tmp_path.glob("reference-*.safetensors")
    content = kept.read_bytes()
    stamp = kept.stat().st_mtime_ns
    assert torch.equal(Reference.build(*source, tokens, tmp_path).hidden, first.hidden)
    assert kept.stat().st_mtime_ns == stamp
    kept.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert torch.equal(Reference.build(*source, tokens, tmp_path).hidden, first.hidden)
    assert kept.read_bytes() == content
    other = Reference.build(*source, tokens[:1], tmp_path)
    assert other.digest != first.digest
    assert len(list(tmp_path.glob("reference-*.safetensors"))) == 2


def test_fidelity_passes_what_is_written_right(source, f16, tokens):
    found = fidelity(f16, *source, tokens, RuntimeSettings(threads=1, kv="f16"))
    assert found.mean < FIDELITY_KL / 10
    assert fidelity_problems(found) == []


def test_fidelity_sees_rows_in_a_wrong_order(source, folder, tokens, tmp_path):
    """The rotary permutation left out: the file loads, answers, and is wrong."""
    checkpoint, graph = source
    tampered = tmp_path / "tampered"
    tampered.mkdir()
    for path in folder.iterdir():
        (tampered / path.name).write_bytes(path.read_bytes())
    weights = load_file(folder / "model.safetensors")
    for name in list(weights):
        if name.endswith("q_proj.weight"):
            weights[name] = weights[name].flip(0).contiguous()
    save_file(weights, tampered / "model.safetensors", {"format": "pt"})
    other = Checkpoint.open(tampered)
    wrong = write_gguf(other, open_model(other), tmp_path / "wrong.gguf")
    found = fidelity(wrong, checkpoint, graph, tokens, SETTINGS)
    assert found.mean > FIDELITY_KL
    assert all(problem.rule == "fidelity" for problem in fidelity_problems(found))
    assert "does not compute what its weights say" in str(fidelity_problems(found)[0])


def test_another_vocabulary_is_refused(reference, tmp_path):
    from tiny_gguf import write_tiny_gguf

    with pytest.raises(VerificationFailed, match="vocabulary of 259, the source one of 49152"):
        evaluate(write_tiny_gguf(tmp_path / "tiny.gguf"), reference, SETTINGS)


def test_quality_becomes_rows_of_a_verdict():
    found = Divergence(mean=0.05, stderr=0.001, p99=0.4, max=1.2, top1=0.9, tokens=4096, ppl_ratio=1.03)
    evidence = Evidence(kind="measurement", artifact="a" * 64, device="elsewhere")
    budget = Budget(quality={"kl": 0.1, "kl_p99": 0.3, "top1": 0.85, "ppl_ratio": 1.05})
    verdict = judge(budget, quality_findings(found, evidence), device("laptop-8gb"))
    assert [row.status for row in verdict.rows] == ["PASS", "FAIL", "PASS", "PASS"]
