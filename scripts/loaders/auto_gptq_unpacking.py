"""auto-gptq's own loader and its unpacking in torch on the CPU, in float32.

A head that is tied to the embedding lies in a folder once, as the embedding. accelerate reads it and then ties both
names to the head again, which was never filled; so the embedding is read here once more.
"""

from pathlib import Path

import torch
from answers import Unpacked, main
from auto_gptq import AutoGPTQForCausalLM
from safetensors import safe_open


def load(folder: str) -> torch.nn.Module:
    model = AutoGPTQForCausalLM.from_quantized(
        folder, device="cpu", use_safetensors=True, disable_exllama=True, disable_exllamav2=True,
        torch_dtype=torch.float32, inject_fused_attention=False, inject_fused_mlp=False,
    ).model  # fmt: skip
    embedding = model.get_input_embeddings().weight
    if embedding is model.get_output_embeddings().weight:
        names = [name for name, parameter in model.named_parameters() if parameter is embedding]
        for path in Path(folder).glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                for name in set(names) & set(file.keys()):
                    embedding.data.copy_(file.get_tensor(name))
    return model.float()


def unpacked(model: torch.nn.Module) -> Unpacked:
    """Unpacking is a part of multiplying, so the unit matrix goes through: every sum has one term that is not zero."""
    for name, module in model.named_modules():
        if hasattr(module, "qweight"):
            module.bias = None
            yield f"{name}.weight", module(torch.eye(module.infeatures)).T


main(load, ("auto_gptq", "transformers", "torch"), unpacked)
