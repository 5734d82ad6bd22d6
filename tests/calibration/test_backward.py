"""The way back against a whole transformers model with autograd, in float64."""

import pytest
import torch

from llmpack.calibration.backward import EMBEDDING, HEAD, Backward
from llmpack.calibration.corpus import Corpus
from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.errors import StepFailed
from llmpack.models import open_model

SEED = 5
KINDS = {
    "tied": {},
    "untied, with biases": {"tie_word_embeddings": False, "attention_bias": True},
    "scaled": {
        "model_type": "granite",
        "architectures": ["GraniteForCausalLM"],
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
    },
}


def corpus_of(count, length=40):
    return Corpus.of(torch.randint(0, 512, (count, length), generator=torch.Generator().manual_seed(3)))


def slow_moments(folder, tokens, chance):
    """Of every linear map E[x x^T] and E[g_o^2]; squared gradients by rows of the embedding as it is looked up."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval().requires_grad_(False)
    inputs, gradients, looked_up = {}, {}, []

    def keep(name):
        def hook(_, x, y):
            inputs[name] = x[0].detach().reshape(-1, x[0].shape[-1])
            y.register_hook(lambda g: gradients.__setitem__(name, g.reshape(-1, g.shape[-1])))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(keep(name))
    embedding = model.get_input_embeddings()
    embedding.register_forward_hook(lambda _, x, y: looked_up.append(y.requires_grad_()) or y)
    logits = model(tokens).logits.reshape(-1, 512)
    cumulative = torch.softmax(logits.detach(), -1).cumsum(-1)
    labels = (cumulative < chance[:, None]).sum(1)
    torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    squares = torch.zeros(512, embedding.embedding_dim, dtype=torch.float64)
    for token, gradient in zip(tokens.flatten().tolist(), looked_up[0].grad.reshape(tokens.numel(), -1), strict=True):
        squares[token] += gradient**2 / tokens.numel()
    moments = {n: (x.T @ x / len(x), (gradients[n] ** 2).mean(0)) for n, x in inputs.items()}
    return moments, squares


@pytest.mark.parametrize("kind", list(KINDS))
def test_moments_and_gradients_are_those_of_the_whole_model(kind, checkpoint_factory, tmp_path):
    checkpoint = Checkpoint.open(checkpoint_factory(num_hidden_layers=3, tokenizer=None, **KINDS[kind]))
    graph, corpus = open_model(checkpoint), corpus_of(70)
    chance = torch.rand(corpus.tokens.numel(), generator=torch.Generator().manual_seed(SEED), dtype=torch.float64)
    moments, squares = slow_moments(checkpoint.folder, corpus.tokens, chance)
    backward = Backward(checkpoint, graph, corpus, work=tmp_path, seed=SEED)
    found = {one.place: one for one in backward.run()}
    assert list(found) == backward.places == [HEAD, 2, 1, 0, EMBEDDING]
    for place in (2, 1, 0):
        for inputs, specs in graph.input_groups(place).items():
            for spec in specs:
                H, G = moments[spec.name.removesuffix(".weight")]
                close(found[place].hessians[inputs], H)
                close(found[place].gradients[spec.name], G)
    H, G = moments["lm_head"]
    close(found[HEAD].hessians[HEAD], H)
    (mine,) = found[HEAD].gradients.values()
    close(mine, G)
    rows = torch.zeros_like(squares)
    rows[found[EMBEDDING].tokens] = found[EMBEDDING].squares
    close(rows, squares)


def close(mine, theirs):
    torch.testing.assert_close(mine.double(), theirs, rtol=2e-3, atol=1e-5 * float(theirs.max()))


def test_peaks_are_the_largest_inputs(checkpoint_factory, tmp_path):
    checkpoint = Checkpoint.open(checkpoint_factory(tokenizer=None))
    graph = open_model(checkpoint)
    for one in Backward(checkpoint, graph, corpus_of(2), work=tmp_path, seed=0).run():
        for name, H in one.hessians.items():
            assert H.diagonal().max().sqrt() < one.peaks[name] < 80 * H.diagonal().max().sqrt()


def test_it_goes_on_where_it_was_with_the_same_numbers(checkpoint_factory, tmp_path):
    checkpoint = Checkpoint.open(checkpoint_factory(num_hidden_layers=3, tokenizer=None))
    graph, corpus = open_model(checkpoint), corpus_of(3)
    whole = {g.place: g for g in Backward(checkpoint, graph, corpus, work=tmp_path / "a", seed=1).run()}
    for kept in (1, 2, 3):
        work = tmp_path / f"b{kept}"
        places = []
        for gathered in Backward(checkpoint, graph, corpus, work=work, seed=1).run():
            places.append(gathered.place)
            if len(places) > kept:  # this one's results were not kept before the process died
                break
        rest = list(Backward(checkpoint, graph, corpus, work=work, seed=1).run(places[-1]))
        assert [one.place for one in rest] == list(whole)[kept:]
        for one in rest:
            for name, G in one.gradients.items():
                assert torch.equal(G, whole[one.place].gradients[name])
    assert torch.equal(rest[-1].squares, whole[EMBEDDING].squares)


def test_without_what_was_saved_it_does_not_go_on(checkpoint_factory, tmp_path):
    checkpoint = Checkpoint.open(checkpoint_factory(tokenizer=None))
    backward = Backward(checkpoint, open_model(checkpoint), corpus_of(1), work=tmp_path, seed=1)
    with pytest.raises(StepFailed, match="lacks the gradients of block 0"):
        next(backward.run(0))
