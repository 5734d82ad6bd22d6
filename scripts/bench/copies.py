"""Copies of the demo model that compute the same function, for benches that its own weights would flatter.

The demo's weights were decoded from a Q4_1 file, so they lie on a 4-bit grid already. `rescaled` multiplies channels by
random factors and divides the matrices that read them by the same; `wide` adds to that hidden channels and a group of
heads that are zero, up to a width that k-quants can store (a multiple of 256); `widened` does that alone. What was
added is free to remove, so these copies are for no bench of pruning.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from llmpack.checkpoint.checkpoint import Checkpoint
from llmpack.checkpoint.writing import CheckpointWriter
from llmpack.models import open_model
from llmpack.models.forward import Forward, final_hidden

SEED = 20
SPREAD = 0.4
"""Standard deviation of the logarithm of a factor."""

MULTIPLE = 256
TOLERANCE = 1e-4

Weights = dict[str, Tensor]


def factors(count: int, rng: torch.Generator) -> Tensor:
    return torch.exp(SPREAD * torch.randn(count, generator=rng))


def rescaled_block(w: Weights, heads: int, groups: int, rng: torch.Generator) -> Weights:
    """One block of a Llama, its channels scaled: norms into what reads them, v into o, up into down."""
    out = dict(w)
    norms = {"input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")}
    norms["post_attention_layernorm"] = ("mlp.gate_proj", "mlp.up_proj")
    for norm, readers in norms.items():
        scale = factors(len(w[norm]), rng)
        out[norm] = w[norm] * scale
        for name in readers:
            out[name] = out[name] / scale
    value = factors(len(w["self_attn.v_proj"]), rng)
    size = len(value) // groups
    seen = value.view(groups, 1, size).expand(groups, heads // groups, size).reshape(-1)
    out["self_attn.v_proj"] = out["self_attn.v_proj"] * value[:, None]
    out["self_attn.o_proj"] = w["self_attn.o_proj"] / seen
    up = factors(len(w["mlp.up_proj"]), rng)
    out["mlp.up_proj"] = out["mlp.up_proj"] * up[:, None]
    out["mlp.down_proj"] = w["mlp.down_proj"] / up
    return out


def padded(W: Tensor, rows: int, columns: int | None = None) -> Tensor:
    """Zeros below, and to the right."""
    shape = (rows,) if W.dim() == 1 else (rows, columns if columns is not None else W.shape[1])
    out = torch.zeros(shape)
    out[tuple(slice(0, n) for n in W.shape)] = W
    return out


def widened_block(w: Weights, width: int, queries: int, keys: int) -> Weights:
    """One block with zero channels and zero heads; norms make up for the mean over more channels."""
    kept = (w["input_layernorm"].shape[0] / width) ** 0.5
    out = {name: padded(W * kept, width) for name, W in w.items() if W.dim() == 1}
    ffn = len(w["mlp.up_proj"])
    shapes = {
        "self_attn.q_proj": (queries, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, queries),
        "mlp.gate_proj": (ffn, width),
        "mlp.up_proj": (ffn, width),
        "mlp.down_proj": (width, ffn),
    }
    return out | {name: padded(w[name], *shape) for name, shape in shapes.items()}


def make_copy(source: Checkpoint, kind: str, folder: Path) -> Checkpoint:
    """The copy in `folder` ("rescaled", "wide" or "widened"), made unless it is there whole; its logits are checked."""
    config = dict(source.config)
    heads, groups, hidden = (config[k] for k in ("num_attention_heads", "num_key_value_heads", "hidden_size"))
    size, per = hidden // heads, heads // groups
    wide = kind != "rescaled"
    width = -(-hidden // MULTIPLE) * MULTIPLE if wide else hidden
    more = (width - hidden) // (per * size)
    if hidden + more * per * size != width:
        raise SystemExit(f"{hidden} channels cannot be widened to {width} by whole groups of {per} heads")
    if wide:
        config |= {"hidden_size": width, "num_attention_heads": heads + more * per}
        config |= {"num_key_value_heads": groups + more, "head_dim": size}
        config["rms_norm_eps"] = config["rms_norm_eps"] * hidden / width

    def change(w: Weights, rng: torch.Generator) -> Weights:
        scaled = w if kind == "widened" else rescaled_block(w, heads, groups, rng)
        return widened_block(scaled, width, (heads + more * per) * size, (groups + more) * size) if wide else scaled

    writer = CheckpointWriter(folder, source, config)
    _write(source, writer, change, width)
    made = writer.finish()
    print(f"{kind} copy: logits differ by {_difference(source, made):.1e} of their size")
    return made


def _write(
    source: Checkpoint, writer: CheckpointWriter, change: Callable[[Weights, torch.Generator], Weights], width: int
) -> None:
    graph = open_model(source)
    for index in range(graph.block_count):
        if writer.finished(f"block-{index:04d}") is None:
            prefix = f"model.layers.{index}."
            names = {spec.name: spec.name.removeprefix(prefix).removesuffix(".weight") for spec in graph.block(index)}
            rng = torch.Generator().manual_seed(SEED + index)
            block = change({short: source.read(name).float() for name, short in names.items()}, rng)
            writer.write(f"block-{index:04d}", {name: block[short] for name, short in names.items()})
    if writer.finished("outside") is None:
        kept = (source.config["hidden_size"] / width) ** 0.5
        outside = {}
        for spec in graph.outside:
            W = source.read(spec.name).float()
            outside[spec.name] = padded(W * kept, width) if W.dim() == 1 else padded(W, len(W), width)
        writer.write("outside", outside)


def _difference(a: Checkpoint, b: Checkpoint) -> float:
    tokens = torch.arange(100, 164)[None]
    seen = []
    for one in (a, b):
        graph = open_model(one)
        seen.append(Forward(one, graph).logits(final_hidden(one, graph, tokens)))
    difference = float((seen[0] - seen[1]).norm() / seen[0].norm())
    if difference > TOLERANCE:
        raise SystemExit(f"the copy computes another function: logits differ by {difference:.1e}")
    return difference
