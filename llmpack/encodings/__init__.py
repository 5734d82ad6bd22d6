"""The table of encodings. A name is written here once; its class is loaded at first use."""

from llmpack.encodings.encoding import Encoding
from llmpack.encodings.names import INT_NAMES, ORDERED_NAMES
from llmpack.registry import Table

ENCODINGS: Table[type[Encoding]] = Table(
    "encoding",
    {
        "f32": "llmpack.encodings.floats:F32",
        "f16": "llmpack.encodings.floats:F16",
        "bf16": "llmpack.encodings.floats:BF16",
        "q8_0": "llmpack.encodings.legacy:Q8_0",
        "q4_0": "llmpack.encodings.legacy:Q4_0",
        "q4_1": "llmpack.encodings.legacy:Q4_1",
        "q5_0": "llmpack.encodings.legacy:Q5_0",
        "q5_1": "llmpack.encodings.legacy:Q5_1",
        "iq4_nl": "llmpack.encodings.legacy:IQ4_NL",
        "mxfp4": "llmpack.encodings.mxfp4:MXFP4",
        "q2_k": "llmpack.encodings.kquants:Q2_K",
        "q3_k": "llmpack.encodings.kquants:Q3_K",
        "q4_k": "llmpack.encodings.kquants:Q4_K",
        "q5_k": "llmpack.encodings.kquants:Q5_K",
        "q6_k": "llmpack.encodings.kquants:Q6_K",
        "iq4_xs": "llmpack.encodings.kquants:IQ4_XS",
    }
    | {name: f"llmpack.encodings.{'ordered' if name in ORDERED_NAMES else 'grouped'}:{name}" for name in INT_NAMES},
    group="llmpack.encodings",
)


def encoding(name: str) -> Encoding:
    """The encoding of that name. Raises UsageError with a suggestion for an unknown one."""
    return ENCODINGS.load(name)()
