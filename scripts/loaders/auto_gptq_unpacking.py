"""auto-gptq's own loader and its unpacking in torch on the CPU, in float32."""

import torch
from answers import main
from auto_gptq import AutoGPTQForCausalLM


def load(folder: str) -> torch.nn.Module:
    found = AutoGPTQForCausalLM.from_quantized(
        folder, device="cpu", use_safetensors=True, disable_exllama=True, disable_exllamav2=True,
        torch_dtype=torch.float32, inject_fused_attention=False, inject_fused_mlp=False,
    )  # fmt: skip
    return found.model.float()


main(load, ("auto_gptq", "transformers", "torch"))
