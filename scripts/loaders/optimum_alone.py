"""Optimum's loader, without what transformers adds to it: an empty model, the folder and a kernel (see
transformers_gptqmodel.py)."""

import torch
import torchvision_operators  # noqa: F401 (before GPTQModel)
from accelerate import init_empty_weights
from answers import main
from optimum.gptq import load_quantized_model
from transformers import AutoConfig, AutoModelForCausalLM


def load(folder: str) -> torch.nn.Module:
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    with init_empty_weights():
        empty = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    empty.tie_weights()
    return load_quantized_model(empty, folder, device_map={"": "cpu"}, backend="torch")


main(load, ("optimum", "gptqmodel", "transformers", "torch"))
