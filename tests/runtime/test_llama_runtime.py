"""llama.cpp in its child: what it computes, what it says about itself, and how it fails."""

import math
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import gguf
import numpy as np
import psutil
import pytest
from gguf.quants import dequantize
from pydantic import ValidationError
from tiny_gguf import BLOCKS, CHAT_TEMPLATE, CONTEXT, KV_HEADS, SPECIAL, WIDTH, byte_tokens, tensors, write_tiny_gguf

from llmpack.errors import EnvironmentProblem, MissingExtra, RuntimeFailed
from llmpack.process import Limits
from llmpack.runtime.llama import LlamaRuntime, crash_hint
from llmpack.runtime.settings import RuntimeSettings

ONE_THREAD = RuntimeSettings(threads=1)
TEXT = "Grüße, 世界! def f(x): return x**2"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture(scope="module")
def runtime(tiny):
    with LlamaRuntime() as runtime:
        runtime.open(tiny, ONE_THREAD, CONTEXT)
        yield runtime


def reference_logits(tokens):
    """The tiny Llama in float64, from the definition: no cache, no batching, one position at a time."""
    weights = {name: value.astype(np.float64) for name, value in tensors(259).items()}
    heads, size = 4, WIDTH // 4

    def norm(x, weight):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weight

    def rotate(x):  # x [T, heads, size], neighbouring pairs turn together, as in GGUF's order of rows
        angle = np.arange(len(x))[:, None] * 10000.0 ** (-np.arange(0, size, 2) / size)
        sin, cos = np.sin(angle)[:, None], np.cos(angle)[:, None]
        even, odd = x[..., 0::2], x[..., 1::2]
        return np.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(x.shape)

    x = weights["token_embd.weight"][tokens]
    mask = np.triu(np.full((len(tokens), len(tokens)), -np.inf), 1)
    for block in range(BLOCKS):
        w = {
            name: weights[f"blk.{block}.{name}.weight"]
            for name in (
                "attn_norm",
                "attn_q",
                "attn_k",
                "attn_v",
                "attn_output",
                "ffn_norm",
                "ffn_gate",
                "ffn_up",
                "ffn_down",
            )
        }
        h = norm(x, w["attn_norm"])
        q = rotate((h @ w["attn_q"].T).reshape(-1, heads, size))
        k = rotate((h @ w["attn_k"].T).reshape(-1, KV_HEADS, size)).repeat(heads // KV_HEADS, 1)
        v = (h @ w["attn_v"].T).reshape(-1, KV_HEADS, size).repeat(heads // KV_HEADS, 1)
        scores = np.einsum("qhd,khd->hqk", q, k) / math.sqrt(size) + mask
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        x = x + np.einsum("hqk,khd->qhd", p, v).reshape(-1, WIDTH) @ w["attn_output"].T
        h = norm(x, w["ffn_norm"])
        gate = h @ w["ffn_gate"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["ffn_up"].T)) @ w["ffn_down"].T
    return norm(x, weights["output_norm.weight"]) @ weights["token_embd.weight"].T


def test_logits_equal_the_definition(runtime):
    tokens = np.random.default_rng(1).integers(3, 259, 40).tolist()
    logits = runtime.logits(tokens)
    assert logits.shape == (40, 259)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, reference_logits(tokens), rtol=0, atol=2e-2)  # KV cache is f16


def test_logits_do_not_depend_on_the_batches(tiny):
    tokens = np.random.default_rng(2).integers(3, 259, 300).tolist()
    results = []
    with LlamaRuntime() as runtime:
        for batch in (512, 64):
            runtime.open(tiny, RuntimeSettings(threads=1, batch=batch, ubatch=batch), CONTEXT)
            results.append(runtime.logits(tokens))
    np.testing.assert_allclose(results[0], results[1], rtol=0, atol=5e-2)


def test_an_array_of_logits_outlives_the_next_call_and_the_runtime(tiny):
    with LlamaRuntime() as runtime:
        runtime.open(tiny, ONE_THREAD, CONTEXT)
        first = runtime.logits([5, 6, 7])
        kept = first.copy()
        runtime.logits([8, 9, 10])
    assert (first == kept).all()


def test_text_and_tokens(runtime):
    plain = runtime.tokenize(TEXT)
    assert plain == [len(SPECIAL) + byte for byte in TEXT.encode()]
    assert runtime.detokenize(plain) == TEXT
    assert runtime.tokenize("<|im_start|>a", parse_special=True) == [1, 3 + ord("a")]
    assert runtime.tokenize("<|im_start|>a") != [1, 3 + ord("a")]
    assert runtime.tokenize_all(["", "ab"]) == [[], [3 + ord("a"), 3 + ord("b")]]


def test_the_chat_template_is_rendered(runtime):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    expected = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n"
    assert runtime.render(messages, add_generation_prompt=False) == expected
    assert runtime.render(messages) == expected + "<|im_start|>assistant\n"
    assert "<|im_start|>" in CHAT_TEMPLATE


def collect(conversation):
    pieces = []
    while True:
        try:
            pieces.append(next(conversation))
        except StopIteration as end:
            return pieces, end.value


def test_greedy_generation_takes_the_likeliest_token_each_time(runtime):
    prompt = runtime.tokenize("abc")
    pieces, generated = collect(runtime.generate(prompt, 8))
    assert "".join(pieces) == generated.text
    expected = list(prompt)
    for token in generated.tokens:
        assert token == int(runtime.logits(expected)[-1].argmax())
        expected.append(token)
    assert 0 < generated.first_token <= generated.seconds


def test_drawn_generation_follows_its_seed(runtime):
    prompt = runtime.tokenize("abc")
    draws = [collect(runtime.generate(prompt, 12, temperature=2.0, seed=seed))[1].tokens for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_generation_stops_at_the_end_of_the_context(runtime):
    prompt = [5] * (CONTEXT - 3)
    assert len(collect(runtime.generate(prompt, 50, temperature=2.0, seed=3))[1].tokens) <= 4


def test_it_says_what_it_is(tiny):
    with LlamaRuntime() as runtime:
        build = runtime.info()
        assert build.commit
        assert "REPACK" in build.features or "OPENMP" in build.features
        assert 0 < build.bare_memory.peak < 64 << 20
        opened = runtime.open(tiny, ONE_THREAD, 100)
        assert (opened.context, opened.trained_context, opened.vocabulary) == (256, CONTEXT, 259)  # padded to 256
        # reported in hundredths of a MiB
        assert opened.buffers["KV.CPU"] == pytest.approx(2 * BLOCKS * KV_HEADS * (WIDTH // 4) * 256 * 2, abs=5300)
        assert opened.memory.peak >= opened.memory.resident > build.bare_memory.resident
        assert (opened.bos, opened.eos) == (1, 2)


@pytest.mark.parametrize(("load", "effective"), [("auto", "mmap"), ("mmap", "mmap"), ("no-mmap", "no-mmap")])
def test_the_load_mode_holds(tiny, load, effective):
    with LlamaRuntime() as runtime:
        opened = runtime.open(tiny, RuntimeSettings(threads=1, load=load), 256)
        assert opened.load == effective
        mapped = any(str(tiny) in m.path for m in psutil.Process(runtime.pid).memory_maps())
        assert mapped == (effective == "mmap")


def test_cache_types_change_the_cache_and_hardly_the_logits(tmp_path):
    path = write_tiny_gguf(tmp_path / "m.gguf")
    tokens = np.random.default_rng(4).integers(3, 259, 64).tolist()
    with LlamaRuntime() as runtime:
        with pytest.raises(RuntimeFailed, match="block size 32 does not divide") as refusal:
            runtime.open(path, RuntimeSettings(kv="q8_0", threads=1), 256)  # heads of 16 do not hold a block
        assert refusal.value.kind == "refused"
        on = runtime.open(path, RuntimeSettings(flash_attention="on", threads=1), 256)
        with_flash = runtime.logits(tokens)
        off = runtime.open(path, RuntimeSettings(flash_attention="off", threads=1), 256)
        assert (on.flash_attention, off.flash_attention) == ("on", "off")
        np.testing.assert_allclose(with_flash, runtime.logits(tokens), rtol=0, atol=2e-2)


def test_timings_leave_the_cache_as_it_was(runtime):
    assert runtime.time_prefill([5] * 100) > 0
    for _ in range(2):
        times = runtime.time_decode([6] * 5)
        assert len(times) == 5
        assert min(times) > 0
    with pytest.raises(RuntimeFailed, match=r"513 tokens do not fit a context of 512"):
        runtime.time_prefill([5] * (CONTEXT + 1))


def test_only_the_vocabulary(tiny):
    with LlamaRuntime() as runtime:
        opened = runtime.open(tiny, ONE_THREAD, None)
        assert opened.context == 0
        assert runtime.tokenize("a") == [3 + ord("a")]
        with pytest.raises(RuntimeFailed, match="only the vocabulary is loaded"):
            runtime.logits([1, 2])


def test_refusals_are_clear_and_survivable(tiny, tmp_path):
    garbage = tmp_path / "garbage.gguf"
    garbage.write_bytes(b"GGUF" + bytes(range(256)) * 16)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny.read_bytes()[:-5000])
    silent = write_tiny_gguf(tmp_path / "silent.gguf", chat_template=None)
    broken = write_tiny_gguf(tmp_path / "broken.gguf", chat_template="{% for %}")
    raising = write_tiny_gguf(tmp_path / "raising.gguf", chat_template="{{ raise_exception('roles must alternate') }}")
    with LlamaRuntime() as runtime:
        for path, words in (
            (tmp_path / "absent.gguf", "is not a file"),
            (garbage, "while opening .*garbage.gguf"),
            (cut, "while opening .*cut.gguf"),
        ):
            with pytest.raises(RuntimeFailed, match=words) as refusal:
                runtime.open(path, ONE_THREAD, 256)
            assert refusal.value.kind == "refused"
        with pytest.raises(RuntimeFailed, match="no model is open"):
            runtime.tokenize("a")
        with pytest.raises(RuntimeFailed, match=f"a context of 513 is beyond the {CONTEXT}"):
            runtime.open(tiny, ONE_THREAD, CONTEXT + 1)
        for path, words in ((silent, "no chat template"), (broken, "TemplateSyntaxError"), (raising, "must alternate")):
            runtime.open(path, ONE_THREAD, None)
            with pytest.raises(RuntimeFailed, match=words):
                runtime.render([{"role": "user", "content": "a"}])
        runtime.open(tiny, ONE_THREAD, 256)
        with pytest.raises(RuntimeFailed, match="token 259 is not in the vocabulary of 259"):
            runtime.logits([1, 259])
        assert runtime.logits([1, 2]).shape == (2, 259)


def open_and_compute(runtime, path):
    runtime.open(path, ONE_THREAD, 256)
    runtime.logits([5, 6])


@pytest.mark.parametrize(
    "lie", [{"blocks": 0}, {"epsilon": math.nan}, {"tokens": [*SPECIAL, *byte_tokens()[:-1], "!"]}]
)
def test_a_file_that_makes_llama_cpp_abort_ends_the_child_alone(tmp_path, lie):
    path = write_tiny_gguf(tmp_path / "lie.gguf", **lie)
    with LlamaRuntime() as runtime, pytest.raises(RuntimeFailed, match="SIGABRT") as ending:
        open_and_compute(runtime, path)
    assert ending.value.kind == "abort"
    assert "GGML_ASSERT" in str(ending.value)


def test_a_template_without_end_is_a_hang(tmp_path):
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    path = write_tiny_gguf(tmp_path / "endless.gguf", chat_template=endless)
    with LlamaRuntime(silence=3) as runtime:
        runtime.open(path, ONE_THREAD, None)
        with pytest.raises(RuntimeFailed, match="no answer to `render`") as hang:
            runtime.render([])
        assert hang.value.kind == "hang"


def test_the_cap_on_memory_makes_opening_fail_in_words(demo_gguf):
    with LlamaRuntime(Limits(data=160 << 20)) as runtime, pytest.raises(RuntimeFailed) as failure:
        runtime.open(demo_gguf, RuntimeSettings(threads=1, load="no-mmap"), 8192)
    assert failure.value.kind == "oom"


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'llmpack\[run\]'"):
        LlamaRuntime()


@pytest.mark.parametrize(
    "kind", [gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.IQ4_NL, gguf.GGMLQuantizationType.Q6_K]
)
def test_quantizing_rows(runtime, kind):
    random = np.random.default_rng(7)
    weight = random.standard_normal((48, 512)).astype(np.float32)
    importance = random.uniform(0.1, 10, 512).astype(np.float32)
    plain = runtime.quantize_rows(weight, int(kind))
    weighted = runtime.quantize_rows(weight, int(kind), importance)
    assert plain.shape == weighted.shape == (48, gguf.quants.quant_shape_to_byte_shape((48, 512), kind)[1])
    assert (runtime.quantize_rows(weight, int(kind), importance, threads=3) == weighted).all()

    def loss(packed):
        return float((((dequantize(packed, kind) - weight) ** 2) * importance).sum())

    assert loss(weighted) < loss(plain) < 0.02 * float((weight**2 * importance).sum())


def test_a_type_that_needs_importance_says_so(runtime):
    with pytest.raises(RuntimeFailed, match="without importance"):
        runtime.quantize_rows(np.ones((4, 256), np.float32), int(gguf.GGMLQuantizationType.IQ2_XXS))


def test_a_generation_left_early_ends_the_child(tiny):
    with LlamaRuntime() as runtime:
        runtime.open(tiny, ONE_THREAD, CONTEXT)
        conversation = runtime.generate([5], 400, temperature=3.0, seed=1)
        next(conversation)
        conversation.close()
        with pytest.raises(RuntimeFailed):
            runtime.tokenize("a")


def test_a_crash_names_amx_where_it_is_built_in(tiny):
    with LlamaRuntime() as runtime:
        runtime.open(tiny, ONE_THREAD, CONTEXT)
        features = runtime.info().features
        os.kill(runtime.pid, signal.SIGSEGV)
        with pytest.raises(RuntimeFailed, match="SIGSEGV") as caught:
            runtime.tokenize("a")
    assert caught.value.kind == "crash"
    assert ("-mno-amx-tile" in str(caught.value)) == any("AMX" in name for name in features)
    assert crash_hint(("AVX2", "AVX512_BF16")) == ""
    assert "-mno-amx-int8" in crash_hint(("AVX2", "AMX_INT8"))


def test_children_end_when_their_thread_is_done_with_them(tiny):
    def work():
        with LlamaRuntime() as runtime:
            runtime.open(tiny, ONE_THREAD, None)
            return runtime.pid

    with ThreadPoolExecutor(1) as pool:
        pid = pool.submit(work).result()
    for _ in range(50):
        if not psutil.pid_exists(pid):
            break
        time.sleep(0.1)
    assert not psutil.pid_exists(pid)


def test_the_demo_model_knows_paris(demo_gguf):
    with LlamaRuntime() as runtime:
        opened = runtime.open(demo_gguf, RuntimeSettings(threads=1, kv="q8_0"), 256)
        assert opened.flash_attention == "on"
        _, generated = collect(runtime.generate(runtime.tokenize("The capital of France is"), 3))
        assert generated.text.strip().startswith("Paris")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"kv": "q9"}, "f16"),
        ({"batch": 128, "ubatch": 256}, "ubatch .256. is larger than batch"),
        ({"kv": "q8_0", "flash_attention": "off"}, "needs flash attention"),
        ({"threads": 0}, "greater than or equal to 1"),
        ({"treads": 4}, "Extra inputs"),
    ],
)
def test_settings_are_strict(wrong, words):
    with pytest.raises(ValidationError, match=words):
        RuntimeSettings(**wrong)


def test_a_full_disk_is_said_before_the_child_meets_it(runtime, monkeypatch):
    import errno
    import os

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(EnvironmentProblem, match=r"no room for .* TMPDIR"):
        runtime.logits([1, 2])
