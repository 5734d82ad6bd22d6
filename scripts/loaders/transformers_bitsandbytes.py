"""transformers with bitsandbytes on the CPU: plain from_pretrained.

On processors with instructions for bfloat16, bitsandbytes multiplies in it whatever the model's type is. That is
switched off, so that what is compared is the numbers of the folder and not 16-bit arithmetic.
"""

import torch
from answers import main
from transformers import AutoModelForCausalLM


def load(folder: str) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu")
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


main(load, ("transformers", "bitsandbytes", "torch"))
