"""GPTQModel's own loader on the CPU."""

import torchvision_operators  # noqa: F401 (before GPTQModel)
from answers import main
from gptqmodel import BACKEND, GPTQModel

main(
    lambda folder: GPTQModel.load(folder, device="cpu", backend=BACKEND.TORCH).model,
    ("gptqmodel", "transformers", "torch"),
)
