"""Products of bfloat16 operands with sums in float32, against their definition."""

import pytest
import torch

from llmpack.calibration.corpus import Corpus
from llmpack.calibration.walk import resume_point, walk
from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.errors import EnvironmentProblem
from llmpack.models import open_model
from llmpack.models.products import has_bf16, products
from llmpack.steps import STEPS

needs_bf16 = pytest.mark.skipif(not has_bf16(), reason="the processor has no instructions for bfloat16")


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def matrix_products(a, b):
    return {"linear": torch.nn.functional.linear(a, b), "plain": a @ b.T, "moments": a.T @ a}


@needs_bf16
def test_operands_are_rounded_and_sums_are_not():
    a, b = drawn(256, 96), drawn(64, 96, seed=1)
    rounded = [one.bfloat16().double() for one in (a, b)]
    with products("bf16"):
        found = matrix_products(a, b)
    for name, expected in matrix_products(*rounded).items():
        assert found[name].dtype == torch.float32
        assert float((found[name] - expected).abs().max()) < 1e-4, name
        assert float((matrix_products(a, b)[name] - expected).abs().max()) > 1e-2, name


def test_the_way_before_comes_back():
    before = torch.backends.mkldnn.matmul.fp32_precision
    a, b = drawn(64, 64), drawn(64, 64, seed=1)
    with products("bf16"):
        with products("f32"):
            assert torch.allclose((a @ b).double(), a.double() @ b.double(), atol=1e-4)
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    assert torch.backends.mkldnn.matmul.fp32_precision == before


@pytest.fixture(scope="module")
def checkpoint(checkpoint_factory):
    return Checkpoint.open(checkpoint_factory(num_hidden_layers=2, tokenizer=None, hidden_size=128))


@pytest.fixture(scope="module")
def text():
    return Corpus.of(torch.randint(0, 512, (16, 64), generator=torch.Generator().manual_seed(3)))


def hessians(checkpoint, text, work, kind):
    visits = walk(checkpoint, open_model(checkpoint), text, work=work, kind=kind)
    return [{name: total.mean() for name, total in visit.hessians().items()} for visit in visits]


@needs_bf16
def test_a_walk_sums_the_same_moments_but_for_noise(checkpoint, text, tmp_path):
    plain, fast = (hessians(checkpoint, text, tmp_path / kind, kind) for kind in ("f32", "bf16"))
    for block, (wanted, found) in enumerate(zip(plain, fast, strict=True)):
        for name, H in wanted.items():
            assert 0 < float((found[name] - H).norm() / H.norm()) < 1e-2, (block, name)


def test_a_walk_begun_in_one_way_does_not_go_on_in_the_other(checkpoint, text, tmp_path):
    graph = open_model(checkpoint)
    visits = walk(checkpoint, graph, text, work=tmp_path, kind="f32")
    next(visits)
    next(visits)
    visits.close()
    assert resume_point(checkpoint, graph, text, work=tmp_path, kind="f32") == 1
    assert resume_point(checkpoint, graph, text, work=tmp_path, kind="bf16") == 0


@pytest.mark.parametrize(
    ("asked", "there", "processor", "found"),
    [
        ("auto", False, "cpu", "f32"),
        ("auto", True, "cpu", "bf16"),
        ("f32", True, "cpu", "f32"),
        ("auto", True, "cuda", "f32"),
    ],
)
def test_what_auto_takes(asked, there, processor, found, monkeypatch):
    monkeypatch.setattr("llmpack.steps.quantize_gptq.has_bf16", lambda: there)
    assert STEPS.load("quantize.gptq")(use="quantize.gptq", products=asked)._products(processor) == found


def test_bf16_is_not_imitated(monkeypatch):
    monkeypatch.setattr("llmpack.steps.quantize_gptq.has_bf16", lambda: False)
    with pytest.raises(EnvironmentProblem, match='set products = "f32"'):
        STEPS.load("quantize.gptq")(use="quantize.gptq", products="bf16")._products("cpu")
