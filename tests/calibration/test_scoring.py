"""Scores against their definition in float64, and against the divergence that is measured."""

import json

import pytest
import torch
from test_backward import corpus_of, slow_moments

from llmpack.algorithms.divergence import kl_divergence
from llmpack.calibration.backward import Backward
from llmpack.calibration.probing import TOKENS, Probes
from llmpack.calibration.scores import Scores, scorable
from llmpack.calibration.scoring import Scoring, first_sequences
from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.encodings import encoding
from llmpack.errors import StepFailed
from llmpack.models import open_model

EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def checkpoint(checkpoint_factory):
    return Checkpoint.open(checkpoint_factory(num_hidden_layers=2, tokenizer=None))


@pytest.fixture(scope="module")
def scores(checkpoint, tmp_path_factory):
    work = tmp_path_factory.mktemp("scores")
    return Scoring(checkpoint, open_model(checkpoint), corpus_of(40), work=work, seed=5, rows=(999, 999)).run()


def rounded(checkpoint, name, candidate, importance=None):
    W = checkpoint.read(name).float()
    return W, encoding(candidate).decode(encoding(candidate).encode(W, importance), W.shape[1])


def test_every_matrix_has_a_score_for_every_encoding_that_fits(checkpoint, scores):
    graph = open_model(checkpoint)
    assert [one.name for one in scores.tensors] == [s.name for s in graph.tensors if s.is_linear or s.name == EMBEDDING]
    for one in scores.tensors:
        fitting = {name for name in scorable() if encoding(name).problem(one.shape[1]) is None}
        assert set(one.predicted) == set(one.nearest) == fitting
        assert "f16" in fitting
        assert "q4_k" not in fitting
        assert one.energy > one.nearest["q4_0"] > one.nearest["q8_0"] > one.nearest["f16"] > 0
        if one.block is not None:
            assert one.predicted["q4_0"] < one.nearest["q4_0"]
            assert one.peak > 1
            assert 0 < one.concentration < 1


def test_the_scores_are_what_the_formula_says(checkpoint, scores):
    tokens = corpus_of(40).tokens
    chance = torch.rand(tokens.numel(), generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    moments, squares = slow_moments(checkpoint.folder, tokens, chance)
    factor = {probe.part: probe.factor for probe in scores.probes}
    for one in scores.tensors:
        if one.name == EMBEDDING:
            continue
        H, G = moments[one.name.removesuffix(".weight")]
        for candidate in ("q4_1", "iq4_nl"):
            W, Q = rounded(checkpoint, one.name, candidate, H.diagonal().float())
            error = (Q - W).double()
            slow = factor[one.part] * float(0.5 * G @ (error @ H * error).sum(1))
            assert one.nearest[candidate] == pytest.approx(slow, rel=2e-3)
    one = scores.tensors[0]
    H, G = moments["lm_head"]
    W, Q = rounded(checkpoint, EMBEDDING, "q4_0")
    error = (Q - W).double()
    slow = 0.5 * G @ (error @ H * error).sum(1) + 0.5 * (squares * error**2).sum()
    assert one.name == EMBEDDING
    assert one.nearest["q4_0"] == pytest.approx(factor["embedding"] * float(slow), rel=2e-3)


def test_a_sample_of_rows_estimates_the_score_of_all(checkpoint, scores, tmp_path):
    some = Scoring(checkpoint, open_model(checkpoint), corpus_of(40), work=tmp_path, seed=5, rows=(24, 200)).run()
    whole = [sum(one.predicted[name] for one in scores.tensors) for name in ("q4_0", "q8_0")]
    parts = [sum(one.predicted[name] for one in some.tensors) for name in ("q4_0", "q8_0")]
    assert parts == pytest.approx(whole, rel=0.05)
    assert parts != whole


def test_probes_are_measured_divergences(checkpoint, scores):
    """Each part's matrices rounded in a whole model; the scores then say the same of that part."""
    tokens = first_sequences(corpus_of(40), TOKENS).tokens
    assert [probe.part for probe in scores.probes] == list(dict.fromkeys(one.part for one in scores.tensors))
    for probe in scores.probes:
        assert probe.measured == pytest.approx(measured(checkpoint, {probe.part}, probe.encoding, tokens), rel=0.02)
        scaled = sum(one.nearest[probe.encoding] for one in scores.tensors if one.part == probe.part)
        assert scaled == pytest.approx(probe.measured)
        assert 0.3 < probe.factor < 5
        assert probe.tokens == tokens.numel()


def test_an_untied_head_is_probed_on_its_own(checkpoint_factory):
    checkpoint = Checkpoint.open(checkpoint_factory(tokenizer=None, tie_word_embeddings=False))
    tokens = corpus_of(6).tokens
    found = Probes(checkpoint, open_model(checkpoint), tokens).run()
    for part in ("embedding", "output"):
        assert found[part] == pytest.approx(measured(checkpoint, {part}, "q5_0", tokens), rel=0.02)


def measured(checkpoint, parts, candidate, tokens):
    """Divergence of a whole model with the matrices of some parts rounded."""
    from transformers import AutoModelForCausalLM

    graph = open_model(checkpoint)
    moments, _ = slow_moments(checkpoint.folder, tokens, torch.rand(tokens.numel(), dtype=torch.float64))
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()
    with torch.no_grad():
        before = model(tokens).logits.reshape(-1, 512)
        for name, parameter in model.named_parameters():
            if graph[name].part in parts:
                H = moments[name.removesuffix(".weight")][0].diagonal().float() if graph[name].is_linear else None
                parameter.copy_(rounded(checkpoint, name, candidate, H)[1])
        return float(kl_divergence(before, model(tokens).logits.reshape(-1, 512)).mean())


@pytest.mark.parametrize("candidate", ["q5_0", "q8_0"])
def test_the_prediction_is_near_the_divergence_that_is_measured(candidate, checkpoint, scores):
    tokens = torch.randint(0, 512, (24, 40), generator=torch.Generator().manual_seed(9))
    parts = {one.part for one in scores.tensors}
    predicted = sum(one.nearest[candidate] for one in scores.tensors)
    assert predicted == pytest.approx(measured(checkpoint, parts, candidate, tokens), rel=0.3)


def test_scores_are_read_as_they_were_written(scores, tmp_path):
    scores.write(tmp_path)
    assert Scores.read(tmp_path) == scores
    document = json.loads((tmp_path / "scores.json").read_text()) | {"format": 99}
    (tmp_path / "scores.json").write_text(json.dumps(document))
    with pytest.raises(StepFailed, match="format 99"):
        Scores.read(tmp_path)


def test_a_killed_run_goes_on_with_the_same_scores(checkpoint, scores, tmp_path, monkeypatch):
    graph = open_model(checkpoint)
    run, places = Backward.run, []

    def dies(self, first="head"):
        for gathered in run(self, first):
            places.append(gathered.place)
            if places == ["head", 1]:
                raise KeyboardInterrupt
            yield gathered

    monkeypatch.setattr(Backward, "run", dies)
    with pytest.raises(KeyboardInterrupt):
        Scoring(checkpoint, graph, corpus_of(40), work=tmp_path, seed=5, rows=(999, 999)).run()
    again = Scoring(checkpoint, graph, corpus_of(40), work=tmp_path, seed=5, rows=(999, 999)).run()
    assert again == scores
    assert places == ["head", 1, 1, 0, "embedding"]


def test_the_first_sequences_of_a_corpus():
    corpus = corpus_of(10)
    assert first_sequences(corpus, 100).tokens.shape == (2, 40)
    assert first_sequences(corpus, 1).tokens.shape == (1, 40)
    assert first_sequences(corpus, 400) is corpus
    assert first_sequences(corpus, 100).digest != corpus.digest
