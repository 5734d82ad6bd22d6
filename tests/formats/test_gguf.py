"""The writer: packed rows in GGUF's order, sizes known beforehand, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest

from llmpack.checkpoint.checkpoint import Checkpoint, Packed
from llmpack.checkpoint.gguf_file import GgufFile
from llmpack.checkpoint.writing import CheckpointWriter
from llmpack.encodings import encoding
from llmpack.errors import NumericalError, StepFailed
from llmpack.formats.facts import Facts
from llmpack.formats.gguf import GgufFormat, file_rows, rounded_minima
from llmpack.formats.gguf_parts import part_totals
from llmpack.models import family_of, open_model

FACTS = Facts("tiny")
CHOICE = {
    "embedding": "q8_0",
    "output": "q8_0",
    "ffn.down": "bf16",
    "attention.k": "q4_0",
    "norm": "f32",
    "bias": "f32",
}


@pytest.fixture(scope="module")
def quantized(with_files, spm_files, tmp_path_factory) -> Checkpoint:
    """A checkpoint as quantize steps leave it: codes in several encodings, vectors in f32."""
    source = Checkpoint.open(with_files("source", spm_files, tie_word_embeddings=False, attention_bias=True))
    writer = CheckpointWriter(tmp_path_factory.mktemp("steps") / "quantized", source)
    tensors = {}
    for spec in open_model(source).tensors:
        kind = encoding(CHOICE.get(spec.part, "iq4_nl"))
        values = source.read(spec.name).float()
        rows = kind.encode(values.reshape(-1, values.shape[-1]))
        tensors[spec.name] = Packed(kind.name, spec.shape, rows)
    writer.write("all", tensors)
    return writer.finish()


def write(checkpoint, path, file_format=None):
    file_format = file_format or GgufFormat()
    graph = open_model(checkpoint)
    container = file_format.write(checkpoint, graph, path, FACTS)
    assert container.nbytes == path.stat().st_size == file_format.nbytes(graph, checkpoint, FACTS)
    return GgufFile.open(path)


def test_codes_are_copied_row_by_row_in_ggufs_order(quantized, tmp_path):
    file = write(quantized, tmp_path / "x.gguf")
    graph, family = open_model(quantized), family_of(quantized.config)
    assert [t.gguf_name for t in graph.tensors] == list(file.tensors)
    ordered = 0
    for spec in graph.tensors:
        order = family.row_order(spec, quantized.config)
        stored, found = quantized.packed(spec.name), file.tensors[spec.gguf_name]
        assert (found.encoding, found.shape) == (spec.encoding, spec.shape)
        expected = stored.reshape(spec.shape[0], -1)
        expected = expected if order is None else expected[order]
        assert np.array_equal(file.packed(spec.gguf_name).reshape(expected.shape), expected)
        ordered += order is not None
    assert ordered == 8  # q and k, weight and bias, in two blocks


def test_rows_come_in_bounded_runs(quantized):
    graph = GgufFormat().encode_graph(open_model(quantized))
    for spec in graph.tensors:
        whole = np.concatenate([*file_rows(quantized, spec)])
        runs = list(file_rows(quantized, spec, nbytes=100))
        assert max(run.nbytes for run in runs) <= max(100, whole.shape[1])
        assert np.array_equal(np.concatenate(runs), whole)


def test_floats_are_converted_as_asked_and_codes_are_not(quantized, tmp_path):
    kept = write(quantized, tmp_path / "kept.gguf")
    asked = write(quantized, tmp_path / "asked.gguf", GgufFormat("f32"))
    assert kept.encodings.keys() == {"q8_0", "bf16", "q4_0", "iq4_nl", "f32"}
    assert asked.encodings.keys() == {"q8_0", "q4_0", "iq4_nl", "f32"}
    name = "blk.0.ffn_down.weight"
    widened = kept.packed(name).view("<u2").astype("<u4") << 16
    assert np.array_equal(asked.packed(name).view("<u4"), widened)


def test_the_graph_in_the_file(quantized):
    for floats in (None, "f16", "bf16", "f32"):
        graph = GgufFormat(floats).encode_graph(open_model(quantized))
        assert GgufFormat(floats).encode_graph(graph) == graph
        encodings = {t.part: t.encoding for t in graph.tensors}
        assert encodings["norm"] == encodings["bias"] == "f32"
        assert encodings["ffn.down"] == (floats or "bf16")
        assert encodings["attention.q"] == "iq4_nl"
    with pytest.raises(ValueError, match="floats = 'q4_0'"):
        GgufFormat("q4_0")


def test_a_preview_has_the_size_of_what_is_written(quantized, with_files, spm_files, tmp_path):
    """What plan does: the source's tokenizer, and a graph that no checkpoint has yet."""
    source = Checkpoint.open(with_files("plain", spm_files, tie_word_embeddings=False, attention_bias=True))
    preview = open_model(source).with_encodings(lambda t: CHOICE.get(t.part, "iq4_nl"))
    assert GgufFormat().nbytes(preview, source, FACTS) == write(quantized, tmp_path / "x.gguf").size


def test_the_same_model_gives_the_same_bytes_however_it_is_sharded(with_files, spm_files, tmp_path):
    one = Checkpoint.open(with_files("one", spm_files, tie_word_embeddings=False))
    many = Checkpoint.open(with_files("many", spm_files, tie_word_embeddings=False, shards=4))
    paths = [tmp_path / f"{i}.gguf" for i in range(3)]
    for checkpoint, path in zip((one, one, many), paths, strict=True):
        write(checkpoint, path, GgufFormat("f16"))
    assert len({path.read_bytes() for path in paths}) == 1


def test_an_encoding_that_no_step_made_is_refused(quantized, tmp_path):
    graph = open_model(quantized).with_encodings(lambda t: "q8_0" if t.part == "attention.v" else t.encoding)
    with pytest.raises(StepFailed, match=r"v_proj\.weight is stored as iq4_nl and the bundle wants q8_0"):
        GgufFormat().write(quantized, graph, tmp_path / "x.gguf", FACTS)
    assert list(tmp_path.iterdir()) == []


def test_numbers_beyond_half_precision_are_refused_by_name(with_files, spm_files, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = with_files("large", spm_files, num_key_value_heads=1)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = 70000.0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    checkpoint = Checkpoint.open(folder)
    with pytest.raises(NumericalError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: 70000 is beyond f16"):
        GgufFormat("f16").write(checkpoint, open_model(checkpoint), tmp_path / "x.gguf", FACTS)
    assert list(tmp_path.iterdir()) == []
    write(checkpoint, tmp_path / "x.gguf", GgufFormat("bf16"))


def test_a_tensor_without_a_name_in_gguf_is_refused(quantized):
    graph = open_model(quantized)
    first = dataclasses.replace(graph.tensors[0], gguf_name=None)
    graph = graph.with_tensors(graph.config, (first, *graph.tensors[1:]))
    with pytest.raises(StepFailed, match=r"without a name: model\.embed_tokens\.weight"):
        GgufFormat().encode_graph(graph)


def test_a_file_is_there_whole_or_not_at_all(quantized, tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"older")
    graph = open_model(quantized).with_encodings(lambda t: "q8_0" if t.part == "ffn.up" else t.encoding)
    with pytest.raises(StepFailed):
        GgufFormat().write(quantized, graph, path, FACTS)
    assert path.read_bytes() == b"older"


def test_parts_of_a_file(quantized, spm_llama, tmp_path):
    file = write(quantized, tmp_path / "x.gguf")
    totals = part_totals(file)
    graph = open_model(quantized)
    assert set(totals) == set(graph.parts)
    for part, total in totals.items():
        specs = [t for t in graph.tensors if t.part == part]
        assert (total.tensors, total.parameters) == (len(specs), sum(t.parameters for t in specs))
        assert total.nbytes == sum(t.nbytes for t in specs)
    assert totals["attention.q"].bits_per_weight == 4.5
    scaled = write(Checkpoint.open(spm_llama), tmp_path / "y.gguf")
    assert part_totals(scaled)["rope"].parameters == 8


def test_facts_of_the_bundle_are_added(quantized, tmp_path):
    base = {"name": "Base", "repo_url": "https://huggingface.co/org/base", "version": "abc"}
    facts = Facts("Tiny", quantized_by="llmpack", license="mit", base_models=(base,))
    GgufFormat().write(quantized, open_model(quantized), tmp_path / "x.gguf", facts)
    keys = GgufFile.open(tmp_path / "x.gguf").metadata
    assert keys["general.quantized_by"] == "llmpack"
    assert keys["general.license"] == "mit"
    assert keys["general.base_model.count"] == 1
    assert keys["general.base_model.0.repo_url"] == base["repo_url"]
    assert keys["general.size_label"] == "152K"


def test_a_smaller_config_counts_not_the_checkpoints(with_files, spm_files, tmp_path):
    """After surgery the graph's config differs from the source's; the size follows the graph."""
    folder = with_files("deep", spm_files, num_hidden_layers=3)
    source = Checkpoint.open(folder)
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 2}
    preview = family_of(config).graph(config)
    pruned = tmp_path / "pruned"
    shutil.copytree(with_files("shallow", spm_files, num_hidden_layers=2), pruned)
    checkpoint = Checkpoint.open(pruned)
    assert GgufFormat().nbytes(preview, source, FACTS) == write(checkpoint, tmp_path / "x.gguf").size


def test_int_groups_become_blocks_with_the_same_codes(with_files, spm_files, tmp_path):
    """The codes that a GPTQ folder would hold: exactly where they are symmetric, else with minima in float16."""
    source = Checkpoint.open(with_files("source", spm_files, tie_word_embeddings=False, hidden_size=64))
    exact, rounded = "int4_g32", "int4_g32_asym"
    writer = CheckpointWriter(tmp_path / "ints", source)
    tensors = {}
    for spec in open_model(source).tensors:
        values = source.read(spec.name).float()
        kind = encoding((rounded if spec.part == "ffn.down" else exact) if spec.is_linear else "f16")
        tensors[spec.name] = Packed(kind.name, spec.shape, kind.encode(values.reshape(-1, values.shape[-1])))
    writer.write("all", tensors)
    checkpoint = writer.finish()
    file = write(checkpoint, tmp_path / "x.gguf")
    graph = GgufFormat().encode_graph(open_model(checkpoint))
    family = family_of(checkpoint.config)
    for spec in graph.tensors:
        if spec.is_linear:
            assert spec.encoding == ("q4_1" if spec.part == "ffn.down" else "q4_0")
            order = family.row_order(spec, checkpoint.config)
            expected = checkpoint.read(spec.name)
            values = encoding(spec.encoding).decode(
                file.packed(spec.gguf_name).reshape(spec.shape[0], -1), spec.shape[1]
            )
            expected = expected if order is None else expected[order]
            assert float((values - expected).abs().max()) <= (0 if spec.encoding == "q4_0" else 2e-3)
    count, share = rounded_minima(checkpoint, graph)
    assert count == sum(spec.part == "ffn.down" for spec in graph.tensors)
    assert 0 < share < 1e-3


def test_a_second_quantization_is_refused(quantized):
    graph = open_model(quantized)
    graph = graph.with_encodings(lambda spec: "int3_g32" if spec.is_linear else spec.encoding)
    with pytest.raises(StepFailed, match="would be a second quantization of these codes"):
        GgufFormat().encode_graph(graph)
