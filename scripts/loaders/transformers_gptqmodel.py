"""transformers with GPTQModel on the CPU: from_pretrained, with a kernel named that multiplies in the model's type.

Left to itself, transformers takes a kernel for 4 bits on processors that rounds scales and inputs to bfloat16; then
arithmetic is compared, and not the numbers of the folder. Scales stay in float16, and so do products of them.
"""

import json
from pathlib import Path

import torch
import torchvision_operators  # noqa: F401 (before GPTQModel)
from answers import main
from transformers import AutoModelForCausalLM, GPTQConfig


def load(folder: str) -> torch.nn.Module:
    bits = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]["bits"]
    kernel = GPTQConfig(bits=bits, backend="torch")
    options = {"dtype": torch.float32, "device_map": "cpu", "quantization_config": kernel}
    return AutoModelForCausalLM.from_pretrained(folder, **options)


main(load, ("transformers", "gptqmodel", "optimum", "torch"))
