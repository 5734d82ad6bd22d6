"""Optimum's loader, without what transformers adds to it: an empty model and the folder."""

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
        empty = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    empty.tie_weights()
    return load_quantized_model(empty, folder, device_map={"": "cpu"})


main(load, ("optimum", "gptqmodel", "transformers", "torch"))
