"""The estimate against the definition, and against what llama.cpp really takes."""

import json

import gguf
import pytest
import tiny_gguf

from llmpack.models import family_of
from llmpack.runtime.llama import LlamaRuntime
from llmpack.runtime.settings import RuntimeSettings
from llmpack.target import memory_model
from llmpack.target.cure import cures
from llmpack.target.device import Figure, device
from llmpack.target.estimate import estimate, touched_bytes
from llmpack.target.memory_model import MEMORY_ERROR
from llmpack.target.outline import Outline
from llmpack.target.quantities import Flops

MIB = 1 << 20
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
SMOLLM = {
    **LLAMA_8B, "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True, "max_position_embeddings": 8192,
}  # fmt: skip
PI, N100, LAPTOP = device("raspberry-pi-5-8gb"), device("intel-n100-16gb"), device("laptop-8gb")


def outline_of(config, linear, embedding=None):
    def encoding(spec):
        if len(spec.shape) == 1:
            return "f32"
        return (embedding or linear) if spec.part in ("embedding", "output") else linear

    return Outline.of_graph(family_of(config).graph(config).with_encodings(encoding))


def named(outline, name):
    return next(tensor for tensor in outline.tensors if tensor.name == name)


@pytest.mark.parametrize(
    ("kv", "context", "mebibytes"), [("f16", 4096, 512), ("q8_0", 8192, 544), ("q4_0", 8192, 288), ("f16", 4000, 512)]
)
def test_the_cache_of_an_8b_model(kv, context, mebibytes):
    """The figures of llama.cpp for 32 blocks with 8 heads of 128."""
    assert memory_model.cache_bytes(outline_of(LLAMA_8B, "f16"), RuntimeSettings(kv=kv), context) == mebibytes * MIB


def test_weights_by_processor_and_load_mode():
    outline = outline_of(SMOLLM, "q4_0", "q8_0")
    linear = sum(s.nbytes for s in outline.tensors if s.is_linear)
    embedding = named(outline, "token_embd.weight").nbytes
    on_n100 = memory_model.weights(outline, N100.instruction_sets)
    assert (on_n100.stored, on_n100.repacked, on_n100.replaced) == (outline.nbytes, linear, linear)
    assert on_n100.resident("mmap") == outline.nbytes + linear
    assert on_n100.resident("no-mmap") == outline.nbytes
    on_pi = memory_model.weights(outline, PI.instruction_sets)  # q8_0 is repacked there, and the head is tied
    assert on_pi.repacked == linear + embedding
    assert on_pi.resident("no-mmap") == outline.nbytes + embedding
    on_old_pi = memory_model.weights(outline, device("raspberry-pi-4-4gb").instruction_sets)
    assert on_old_pi.resident("mmap") == outline.nbytes


def test_an_embedding_that_is_no_head_is_not_repacked():
    outline = outline_of(LLAMA_8B, "q4_0")
    found = memory_model.weights(outline, N100.instruction_sets)
    assert found.repacked == outline.nbytes - sum(s.nbytes for s in outline.tensors if s.part in ("embedding", "norm"))
    assert touched_bytes(outline) == outline.nbytes - named(outline, "token_embd.weight").nbytes


def test_the_terms_add_up_and_the_report_is_json():
    found = estimate(outline_of(SMOLLM, "q4_0", "q8_0"), RuntimeSettings(), PI, 2048, disk=1000)
    assert sum(term.nbytes for term in found.memory.terms) == found.memory.total.value
    assert found.memory.hard < found.memory.total.value
    report = json.loads(json.dumps(found.to_json()))
    assert report["kind"] == "estimate"
    assert {f.limit for f in found.findings()} == {"memory", "disk", "decode"}
    assert found.missing["prefill"] == "the arithmetic rate of raspberry-pi-5-8gb is unknown"


def test_the_load_mode_is_recommended_with_its_arithmetic():
    outline = outline_of(LLAMA_8B, "q4_0", "q8_0")
    mapped = estimate(outline, RuntimeSettings(), PI, 4096).memory
    unmapped = estimate(outline, RuntimeSettings(load="no-mmap"), PI, 4096).memory
    assert mapped.other_load == ("no-mmap", unmapped.total.value)
    assert mapped.hard == unmapped.total.value
    assert "at the same speed: recommended" in mapped.advice[0]
    assert "more, for copies beside the mapped originals" in unmapped.advice[0]
    assert mapped.advice[1] == "KV cache: 512 MiB in f16, 272 MiB in q8_0, 144 MiB in q4_0"
    old = estimate(outline, RuntimeSettings(), device("raspberry-pi-4-4gb"), 4096).memory
    assert old.advice[0].endswith("takes the same: nothing is repacked")


def test_speed_of_a_known_device():
    """Llama-3.1-8B at 4.9 GB decodes at 2.17 tok/s on a Raspberry Pi 5: the report behind its profile."""
    outline = outline_of(LLAMA_8B, "q4_1")  # 5.0 bits; the report's Q4_K_M has 4.9
    assert 4.9e9 < outline.nbytes < 5.2e9
    found = estimate(outline, RuntimeSettings(), PI, 512).decode
    assert found.low < 2.17 < found.high
    assert found.value == pytest.approx(2.17, rel=0.1)
    assert "arithmetic rate" in estimate(outline, RuntimeSettings(), N100, 512).missing["prefill"]
    rate = Figure[Flops](value="105 GFLOP/s", provenance="measured", source="at 6.53 tok/s")
    figures = N100.figures.model_copy(update={"arithmetic": rate})
    prefill = estimate(outline, RuntimeSettings(), N100.model_copy(update={"figures": figures}), 512).prefill
    assert prefill.value == pytest.approx(6.53, rel=0.2)


def test_what_a_profile_does_not_say_is_not_estimated():
    found = estimate(outline_of(SMOLLM, "q8_0"), RuntimeSettings(), LAPTOP, 2048)
    assert found.decode is None
    assert "bandwidth of laptop-8gb is unknown" in found.missing["decode"]


def random_model(path, kind, *, tied=True):
    """A wide and short real file: its embedding, blocks and vocabulary weigh what they do in real models."""
    config = {
        **SMOLLM, "vocab_size": 16000, "hidden_size": 768, "intermediate_size": 2560, "num_hidden_layers": 3,
        "num_attention_heads": 12, "num_key_value_heads": 4, "tie_word_embeddings": tied,
        "max_position_embeddings": 4096,
    }  # fmt: skip
    tiny_gguf.write_empty_gguf(path, config, kind, tied=tied)
    return outline_of(config, kind.name.lower())


@pytest.mark.parametrize(
    ("kind", "options", "context"),
    [
        ("Q4_0", {}, 1024),
        ("Q4_0", {"load": "no-mmap"}, 1024),
        ("IQ4_NL", {"kv": "q8_0"}, 768),
        ("Q8_0", {"ubatch": 128}, 1024),
        ("F16", {"flash_attention": "off"}, 1024),
    ],
)
def test_the_estimate_of_memory_holds_on_this_machine(tmp_path, kind, options, context):
    path = tmp_path / "model.gguf"
    outline = random_model(path, gguf.GGMLQuantizationType[kind])
    settings = RuntimeSettings(threads=1, **options)
    expected = estimate(outline, settings, device("host"), context)
    with LlamaRuntime() as runtime:
        opened = runtime.open(path, settings, context)
        runtime.time_prefill([7] * (context - 8))
        runtime.time_decode([5] * 2)
        peak = runtime.memory().peak
    cache = memory_model.cache_bytes(outline, settings, context)
    assert opened.buffers["KV.CPU"] == pytest.approx(cache, abs=0.01 * MIB)
    assert opened.buffers.get("model.CPU_REPACK", 0) == pytest.approx(
        memory_model.weights(outline, device("host").instruction_sets).repacked, abs=0.1 * MIB
    )
    assert expected.memory.total.value == pytest.approx(peak, rel=MEMORY_ERROR)


GEMMA2 = {
    "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "vocab_size": 4000, "hidden_size": 256,
    "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 256, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6, "torch_dtype": "float32", "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
}  # fmt: skip


@pytest.mark.parametrize(("ubatch", "context"), [(512, 2048), (128, 2048), (512, 512)])
def test_windows_shorten_the_cache_as_in_llama_cpp(tmp_path, ubatch, context):
    path = tiny_gguf.write_empty_gguf(
        tmp_path / "gemma.gguf", GEMMA2, gguf.GGMLQuantizationType.F16, tied=True, window=256
    )
    settings = RuntimeSettings(threads=1, ubatch=ubatch)
    tokens = memory_model.cache_tokens(outline_of(GEMMA2, "f16"), settings, context)
    assert len({*tokens}) == (1 if context == 512 else 2)
    with LlamaRuntime() as runtime:
        opened = runtime.open(path, settings, context)
        runtime.time_prefill([7] * (context - 8))
        assert min(runtime.time_decode([5] * 8) + runtime.time_decode([5] * 8)) > 0
    assert opened.buffers["KV.CPU"] == pytest.approx(
        memory_model.cache_bytes(outline_of(GEMMA2, "f16"), settings, context), abs=0.02 * MIB
    )


def test_cures_begin_with_what_costs_nothing():
    outline = outline_of(LLAMA_8B, "q4_0", "q8_0")
    cure = cures(outline, RuntimeSettings(), PI, 4096)
    assert cure("memory", 300 * MIB).startswith('over by 300 MiB: load = "no-mmap" saves ')
    unmapped = cures(outline, RuntimeSettings(load="no-mmap"), PI, 4096)
    assert unmapped("memory", 10 * MIB).startswith("over by 10 MiB: ubatch = 128 saves ")
    small = RuntimeSettings(load="no-mmap", ubatch=128)
    assert cures(outline, small, PI, 4096)("memory", 200 * MIB) == 'over by 200 MiB: kv = "q8_0" saves 240 MiB'


def test_cures_by_encoding_name_the_smallest_that_suffices():
    outline = outline_of(LLAMA_8B, "iq4_nl", "q8_0")
    exhausted = RuntimeSettings(load="no-mmap", ubatch=128, kv="q4_0")
    row = 128256 * 4096 // 256
    saved = 128256 * 4096 // 32 * 34 - row * 210
    text = cures(outline, exhausted, N100, 2048)("disk", saved - 5)
    assert text.split(": ")[1].startswith(("embedding q8_0 -> q6_k saves ", "output q8_0 -> q6_k saves "))
    text = cures(outline, exhausted, N100, 2048)("disk", 1 << 40)
    assert text.endswith("that alone is not enough")


def test_a_row_that_no_k_quant_holds_gets_another_cure():
    outline = outline_of(SMOLLM, "iq4_nl", "q8_0")  # rows of 576 are no multiple of 256
    settings = RuntimeSettings(load="no-mmap", ubatch=128, kv="q4_0")
    text = cures(outline, settings, N100, 2048)("memory", 3 * MIB)
    assert text == "over by 3 MiB: embedding q8_0 -> q5_1 saves 8.438 MiB"


def test_cures_for_speed_and_for_what_has_none():
    outline = outline_of(LLAMA_8B, "q8_0")
    text = cures(outline, RuntimeSettings(), PI, 2048)("decode", 0.01)
    assert text.startswith('short by 0.01 tok/s: kv = "q8_0" gains ')
    cure = cures(outline, RuntimeSettings(kv="q8_0"), PI, 2048)
    assert " -> q6_k gains " in cure("decode", 0.01)
    assert cure("first_token", 1.0) == ""
    assert cure("quality.kl", 0.1) == ""
