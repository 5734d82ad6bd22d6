"""Small folders of every kind that loaders are held to: a random Llama of two blocks, in all bits, groups and types."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from llmpack.calibration.corpus import Corpus
from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.formats.facts import Facts
from llmpack.formats.layout_bnb import BnbFp4, BnbNf4
from llmpack.formats.layout_gptq import Gptq
from llmpack.formats.layouts import Layout
from llmpack.formats.safetensors_folder import SafetensorsFormat
from llmpack.models import open_model
from llmpack.steps import STEPS
from llmpack.steps.step import Workbench

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from conftest import make_checkpoint

SHARD = 200_000
LEFT = {"attention.v": "f16", "ffn.down@1": "f16"}

GPTQ: dict[str, dict[str, Any]] = {
    "int4_g128": {"encoding": "int4_g128"},
    "int4_g64": {"encoding": "int4_g64"},
    "int4_g32": {"encoding": "int4_g32"},
    "int4_row": {"encoding": "int4_row"},
    "int4_g128_asym": {"encoding": "int4_g128_asym"},
    "int4_g32_asym": {"encoding": "int4_g32_asym"},
    "int4_g32_parts_in_f16": {"encoding": "int4_g32", "exceptions": LEFT},
    "int8_g32": {"encoding": "int8_g32"},
    "int8_g128_asym": {"encoding": "int8_g128_asym"},
    "int3_g32": {"encoding": "int3_g32"},
    "int3_row_asym": {"encoding": "int3_row_asym"},
    "int2_g32": {"encoding": "int2_g32"},
    "int2_g64_asym": {"encoding": "int2_g64_asym"},
    "int4_g32_act": {"encoding": "int4_g32_act", "importance": True},
    "int3_g64_act": {"encoding": "int3_g64_act", "importance": True},
    "int4_g128_asym_act": {"encoding": "int4_g128_asym_act", "importance": True},
}
"""Options of the step that rounds, by the name of the folder."""

BITSANDBYTES: dict[str, Layout] = {
    "nf4": BnbNf4("f32"),
    "nf4_scales_in_f32": BnbNf4("f32", double_quant=False),
    "nf4_parts_in_f32": BnbNf4("f32", keep=("attention.v", "ffn.down@1")),
    "fp4": BnbFp4("f32"),
}


def make(root: Path) -> list[Path]:
    """Write them all below `root`; each of them sharded, with biases."""
    source = Checkpoint.open(
        make_checkpoint(root / "source", hidden_size=128, intermediate_size=256, attention_bias=True)
    )
    found = []
    for name, options in GPTQ.items():
        found.append(_written(_rounded(source, options, root / "steps" / name), Gptq(), root / name))
    for name, layout in BITSANDBYTES.items():
        found.append(_written(source, layout, root / name))
    return found


def _rounded(source: Checkpoint, options: dict[str, Any], work: Path) -> Checkpoint:
    asked = {"use": "quantize.rtn", "importance": False, "embedding": "f16", **options}
    step = STEPS.load("quantize.rtn").model_validate_json(json.dumps(asked))
    text = Corpus.of(torch.randint(0, 512, (4, 64), generator=torch.Generator().manual_seed(0)))
    return step.run(source, open_model(source), Workbench(work / "out", work / "work", source, text, 0, 1))


def _written(checkpoint: Checkpoint, layout: Layout, folder: Path) -> Path:
    form = SafetensorsFormat(layout, SHARD)
    graph = form.encode_graph(open_model(checkpoint))
    folder.mkdir()
    form.write(checkpoint, graph, folder, Facts("tiny", ()))
    return folder
