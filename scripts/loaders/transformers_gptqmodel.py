"""transformers with GPTQModel's kernels on the CPU: plain from_pretrained."""

import torch
import torchvision_operators  # noqa: F401 (before GPTQModel)
from answers import main
from transformers import AutoModelForCausalLM

main(
    lambda folder: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu"),
    ("transformers", "gptqmodel", "optimum", "torch"),
)
