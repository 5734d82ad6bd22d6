"""transformers with bitsandbytes on the CPU: plain from_pretrained."""

import torch
from answers import main
from transformers import AutoModelForCausalLM

main(
    lambda folder: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu"),
    ("transformers", "bitsandbytes", "torch"),
)
