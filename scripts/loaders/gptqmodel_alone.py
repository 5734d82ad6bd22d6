"""GPTQModel's own loader and its unpacking in torch on the CPU.

Loaded in float16, the type of the folder: left to itself, GPTQModel takes bfloat16 on processors, and scales lose three
bits. Then widened, so that what is compared is the numbers of the folder and not 16-bit arithmetic.
"""

import torch
import torchvision_operators  # noqa: F401 (before GPTQModel)
from answers import Unpacked, main
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.nn_modules.qlinear import BaseQuantLinear


def load(folder: str) -> torch.nn.Module:
    return GPTQModel.load(folder, device="cpu", backend=BACKEND.TORCH, dtype=torch.float16).model.float()


def unpacked(model: torch.nn.Module) -> Unpacked:
    for name, module in model.named_modules():
        if isinstance(module, BaseQuantLinear):
            yield f"{name}.weight", module.dequantize_weight().T


main(load, ("gptqmodel", "transformers", "torch"), unpacked)
