"""GGUF files written byte by byte, so that each can be wrong in exactly one way."""

import struct

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
CODES = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "B", U64: "Q", I64: "q", F64: "d"}
SIZES = {0: (1, 4), 1: (1, 2), 2: (32, 18), 8: (32, 34), 30: (1, 2)}


def text(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def scalar(kind, value):
    return text(value) if kind == STRING else struct.pack("<" + CODES[kind], value)


def pair(key, kind, value):
    """One metadata entry; `kind` is a type, or (ARRAY, element type)."""
    if isinstance(kind, tuple):
        items = b"".join(scalar(kind[1], item) for item in value)
        return text(key) + struct.pack("<IIQ", ARRAY, kind[1], len(value)) + items
    return text(key) + struct.pack("<I", kind) + scalar(kind, value)


def info(name, sizes, kind, offset, dimensions=None):
    """One tensor entry; `sizes` in the order of the file (columns first)."""
    count = len(sizes) if dimensions is None else dimensions
    return (
        text(name)
        + struct.pack("<I", count)
        + struct.pack(f"<{len(sizes)}Q", *sizes)
        + struct.pack("<IQ", kind, offset)
    )


def file_bytes(pairs=(), infos=(), data=b"", *, magic=b"GGUF", version=3, tensors=None, keys=None, alignment=32):
    head = magic + struct.pack("<I", version)
    head += struct.pack("<QQ", len(infos) if tensors is None else tensors, len(pairs) if keys is None else keys)
    body = head + b"".join(pairs) + b"".join(infos)
    return body + b"\0" * (-len(body) % alignment if alignment else 0) + data


def good_pairs():
    return [
        pair("general.architecture", STRING, "llama"),
        pair("llama.block_count", U32, 2),
        pair("llama.attention.head_count", U32, 4),
        pair("llama.attention.layer_norm_rms_epsilon", F32, 1e-5),
        pair("tokenizer.ggml.model", STRING, "gpt2"),
        pair("tokenizer.ggml.tokens", (ARRAY, STRING), ["<s>", "a", "é", ""]),
        pair("tokenizer.ggml.scores", (ARRAY, F32), [0.0, -1.0, -2.0, -3.0]),
        pair("tokenizer.ggml.token_type", (ARRAY, I32), [3, 1, 1, 1]),
        pair("tokenizer.ggml.merges", (ARRAY, STRING), ["a é"]),
        pair("tokenizer.ggml.bos_token_id", U32, 0),
        pair("tokenizer.ggml.add_bos_token", BOOL, 1),
        pair("odd.numbers", (ARRAY, U64), [2**64 - 1, 0]),
        pair("odd.flags", (ARRAY, BOOL), [1, 0]),
        pair("odd.nothing", (ARRAY, F64), []),
    ]


def good_file():
    """Two tensors: f32 [3, 4] (48 bytes, padded to 64) and q8_0 [2, 32] (68 bytes, padded to 96)."""
    infos = [info("a.weight", (4, 3), 0, 0), info("b.weight", (32, 2), 8, 64)]
    data = bytes(range(48)) + b"\0" * 16 + bytes(range(68)) + b"\0" * 28
    return file_bytes(good_pairs(), infos, data)
