"""The table of steps. A name is written here once; its class is loaded at first use."""

from llmpack.registry import Table
from llmpack.steps.step import Step

STEPS: Table[type[Step]] = Table(
    "step",
    {
        "prune.depth": "llmpack.steps.prune_depth:PruneDepth",
        "prune.width": "llmpack.steps.prune_width:PruneWidth",
        "distill": "llmpack.steps.distill:Distill",
        "quantize.rtn": "llmpack.steps.quantize_rtn:QuantizeRtn",
        "quantize.gptq": "llmpack.steps.quantize_gptq:QuantizeGptq",
        "quantize.auto": "llmpack.steps.quantize_auto:QuantizeAuto",
        "quantize.llamacpp": "llmpack.steps.quantize_llamacpp:QuantizeLlamacpp",
    },
    group="llmpack.steps",
)
