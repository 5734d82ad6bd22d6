"""The worker of GPTQModel: ``python -m llmpack.runtime.gptqmodel_worker``, which rounds a model folder into another.

GPTQModel loads the whole model, and imports what only it needs; both end with this process.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from llmpack.runtime.conversation import RefusedError, Tell, serve

ENVIRONMENT = {"TORCH_COMPILE_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
"""Variables that the process needs. What GPTQModel hands to the compiler gives the same numbers uncompiled, sooner."""


def quantize(arguments: Mapping[str, Any], tell: Tell) -> dict[str, Any]:
    """Round the folder `source` into the folder `out`; the versions of what did it.

    Paths are absolute: it works in the folder of `out`, since GPTQModel leaves logs where it runs.

    tokens   file of numpy integers [sequences, length]: the calibration text
    config   options of GPTQModel's QuantizeConfig
    threads  compute threads
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.chdir(Path(arguments["out"]).parent)
    import numpy as np
    import torch

    from llmpack.torchvision_operators import declare_operators

    torch.set_num_threads(arguments["threads"])
    declare_operators()
    try:
        from gptqmodel import GPTQModel, QuantizeConfig

        model = GPTQModel.load(arguments["source"], QuantizeConfig(device="cpu", **arguments["config"]))
        text = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in np.load(arguments["tokens"])]
        model.quantize(text, batch_size=1)
        model.save(arguments["out"])
    except MemoryError:
        raise
    except Exception as fault:  # whatever it complains of is the answer
        raise RefusedError(f"{type(fault).__name__}: {fault}") from fault
    return {"versions": {name: metadata.version(name) for name in ("gptqmodel", "transformers", "torch")}}


if __name__ == "__main__":
    serve({"quantize": quantize})
