"""How many tensors, numbers and bytes of a GGUF file belong to each part of the model."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from llmpack.checkpoint.gguf_file import GgufFile
from llmpack.models import FAMILIES

_BLOCK = re.compile(r"blk\.\d+\.(?P<rest>.+)")
OTHER = "other"


@dataclass(frozen=True)
class PartTotal:
    """What one part takes."""

    tensors: int
    parameters: int
    nbytes: int

    @property
    def bits_per_weight(self) -> float:
        """Bits of storage per number."""
        return 8 * self.nbytes / self.parameters


def part_totals(file: GgufFile) -> dict[str, PartTotal]:
    """Totals by part, the words that recipes use ("ffn.down"), in order of the file.

    Tensors that no family of that architecture names are counted under "other".
    """
    names = _part_names(str(file.metadata.get("general.architecture", "")))
    totals: dict[str, PartTotal] = {}
    for tensor in file.tensors.values():
        match = _BLOCK.fullmatch(tensor.name)
        part = names.get(("blk.", match["rest"]) if match else ("", tensor.name), OTHER)
        before = totals.get(part, PartTotal(0, 0, 0))
        numbers = before.parameters + math.prod(tensor.shape)
        totals[part] = PartTotal(before.tensors + 1, numbers, before.nbytes + tensor.nbytes)
    return totals


def _part_names(architecture: str) -> dict[tuple[str, str], str]:
    found: dict[tuple[str, str], str] = {}
    for _, family in FAMILIES.items():
        if family.gguf_arch == architecture:
            found |= {("", row.gguf): row.part for row in family.outside if row.gguf}
            found |= {("blk.", row.gguf): row.part for row in family.block if row.gguf}
    return found | {("", "rope_freqs.weight"): "rope"}
