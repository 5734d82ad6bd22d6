"""Which tensors a recipe means by a part and, where it says so, by blocks."""

from __future__ import annotations

import re
from dataclasses import dataclass

from llmpack.models.graph import TensorSpec


@dataclass(frozen=True)
class Selection:
    """Which tensors an exception means: ``ffn.down`` in all blocks, or ``ffn.down@0-3,29`` in some."""

    text: str
    part: str
    blocks: tuple[tuple[int, int], ...]

    def __contains__(self, spec: TensorSpec) -> bool:
        block = -1 if spec.block is None else spec.block
        return spec.part == self.part and (not self.blocks or any(a <= block <= b for a, b in self.blocks))

    @classmethod
    def parse(cls, text: str) -> Selection:
        """Read ``part`` or ``part@first-last,block``. Raises ValueError for anything else."""
        part, at, ranges = text.partition("@")
        if not at:
            return cls(text, part, ())
        blocks = []
        for piece in ranges.split(","):
            match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", piece)
            if match is None:
                raise ValueError(f'`{text}` is no selection; write a part and blocks like "ffn.down@0-3,29"')
            first = int(match[1])
            last = first if match[2] is None else int(match[2])
            if last < first:
                raise ValueError(f"`{text}`: blocks {first}-{last} run backwards")
            blocks.append((first, last))
        return cls(text, part, tuple(blocks))
