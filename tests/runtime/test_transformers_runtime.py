"""transformers in its child: what it computes is what transformers computes here, and how it fails."""

import importlib.util
import json
import shutil

import numpy as np
import pytest
import torch
import transformers

from llmpack.errors import EnvironmentProblem, MissingExtra, RuntimeFailed
from llmpack.runtime.llama import LlamaRuntime
from llmpack.runtime.runners import runtime_for
from llmpack.runtime.settings import RuntimeSettings
from llmpack.runtime.transformers_runtime import TransformersRuntime, require_processor

SETTINGS = RuntimeSettings(threads=1, batch=16, ubatch=16)
CONTEXT = 64
TOKENS = [(7919 * i + 17) % 512 for i in range(40)]


@pytest.fixture(scope="module")
def folder(checkpoint_factory):
    return checkpoint_factory()


@pytest.fixture(scope="module")
def runtime(folder):
    with TransformersRuntime() as runtime:
        runtime.opened = runtime.open(folder, SETTINGS, CONTEXT)
        yield runtime


@pytest.fixture(scope="module")
def model(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def tokenizer(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_a_folder_runs_in_transformers_and_a_file_in_llama_cpp(folder):
    assert runtime_for(folder) is TransformersRuntime
    assert runtime_for(folder / "model.safetensors") is LlamaRuntime


def test_what_is_said_of_the_model_and_the_runtime(runtime, model):
    opened = runtime.opened
    assert (opened.context, opened.trained_context, opened.vocabulary, opened.threads) == (CONTEXT, 512, 512, 1)
    assert opened.parameters == model.num_parameters()
    assert opened.memory.peak > 10 * runtime.info().bare_memory.peak
    assert runtime.info().versions["transformers"] == transformers.__version__


def test_logits_are_those_of_one_forward_pass(runtime, model):
    """Three batches over a cache against one pass without."""
    with torch.no_grad():
        expected = model(torch.tensor([TOKENS])).logits[0].numpy()
    assert np.allclose(runtime.logits(TOKENS), expected, atol=1e-4)


def test_text_is_the_tokenizer_s(runtime, tokenizer):
    texts = ["Grüße, 世界!", "<|im_start|>user"]
    assert runtime.tokenize_all(texts, parse_special=True) == [tokenizer(text).input_ids for text in texts]
    assert 1 not in runtime.tokenize(texts[1], parse_special=False)
    messages = [{"role": "user", "content": "Hi"}]
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert runtime.render(messages) == expected
    assert runtime.detokenize(runtime.tokenize(texts[0])) == texts[0]


def told(answer):
    """The text of an answer as it came, and what it was in the end."""
    pieces = []
    while True:
        try:
            pieces.append(next(answer))
        except StopIteration as finished:
            return "".join(pieces), finished.value


def test_a_greedy_answer_is_that_of_generate(runtime, model, tokenizer):
    prompt = tokenizer("The quick brown").input_ids
    whole = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :].tolist()
    end = whole.index(model.config.eos_token_id) if model.config.eos_token_id in whole else len(whole)
    pieces, answer = told(runtime.generate(prompt, 12))
    assert list(answer.tokens) == whole[:end]
    assert pieces == tokenizer.decode(whole[:end], skip_special_tokens=True)


def test_drawn_answers_follow_the_seed(runtime):
    def tokens(seed):
        return told(runtime.generate(TOKENS[:8], 12, temperature=2.0, seed=seed))[1].tokens

    assert tokens(1) == tokens(1)
    assert len({tokens(seed) for seed in range(4)}) > 1


def test_timing_leaves_the_cache_as_it_was(runtime):
    assert runtime.time_prefill(TOKENS) > 0
    first = runtime.time_decode(TOKENS[:20])
    assert len(first) == 20
    assert all(seconds > 0 for seconds in first)
    assert len(runtime.time_decode(TOKENS[:20])) == 20  # 40 + 20 fit into the context of 64, 40 + 20 + 20 would not


def test_what_does_not_fit_is_refused_and_the_child_lives(runtime, folder):
    with pytest.raises(RuntimeFailed, match="do not fit into a context of 64"):
        runtime.time_prefill(TOKENS * 2)
    with pytest.raises(RuntimeFailed, match="beyond the 512"):
        runtime.open(folder, SETTINGS, 1024)
    with pytest.raises(RuntimeFailed, match=r"config\.json is missing"):
        runtime.open(folder.parent, SETTINGS, CONTEXT)
    runtime.open(folder, SETTINGS, CONTEXT)
    assert len(runtime.logits(TOKENS[:2])) == 2


def test_weights_that_are_missing_are_refused_not_drawn(runtime, folder, tmp_path):
    """transformers would go on with random numbers and a warning."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    with pytest.raises(RuntimeFailed, match=r"missing keys: model\.layers\.0\.mlp\.up_proj\.weight"):
        runtime.open(tmp_path / "m", SETTINGS, CONTEXT)
    runtime.open(folder, SETTINGS, CONTEXT)


def test_kernels_that_are_not_installed_are_told_before_anything_loads(runtime, folder, tmp_path, monkeypatch):
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "gptqmodel" else find(name))
    with pytest.raises(MissingExtra, match="gptqmodel"):
        runtime.open(tmp_path, SETTINGS, CONTEXT)


ON_GPU = RuntimeSettings(threads=1, batch=16, ubatch=16, processor="cuda")
GPU = torch.cuda.is_available()


@pytest.mark.skipif(GPU, reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_told_before_and_while_a_model_opens(folder):
    with pytest.raises(EnvironmentProblem, match=r"finds no GPU by CUDA; leave out runtime\.processor") as refused:
        require_processor(ON_GPU)
    assert refused.value.exit_code == 6
    with TransformersRuntime() as runtime, pytest.raises(RuntimeFailed, match="finds no GPU") as failed:
        runtime.open(folder, ON_GPU, CONTEXT)
    assert failed.value.kind == "refused"


@pytest.mark.skipif(not GPU, reason="there is no GPU")
def test_a_gpu_computes_the_same_and_its_memory_counts(folder, runtime):
    with TransformersRuntime() as other:
        opened = other.open(folder, ON_GPU, CONTEXT)
        assert set(opened.buffers) == {"model.CUDA"}
        np.testing.assert_allclose(other.logits(TOKENS), runtime.logits(TOKENS), rtol=1e-3, atol=1e-3)
        seen = other.memory()
    assert seen.peak > opened.buffers["model.CUDA"]
