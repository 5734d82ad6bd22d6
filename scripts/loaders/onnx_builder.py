"""onnxruntime-genai's model builder, from the folder to an int4 model in ONNX, which then runs in ONNX Runtime.

Head and embedding stay in floats, which the builder would round to 4 bits itself, and activations are not rounded to 8
bits, so that what is compared is the numbers of the folder.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from types import SimpleNamespace

import onnxruntime_genai as genai
import torch
from answers import main

BUILDER = "onnxruntime_genai.models.builder"
IN_FLOATS = "nodes_to_exclude=/lm_head/MatMul,/model/embed_tokens/Gather"
OPTIONS = ("--extra_options", IN_FLOATS, "accuracy_level=1")


class OnnxModel:
    """Answers as a model of transformers does, as far as it is asked."""

    def __init__(self, folder: str) -> None:
        self._files = tempfile.TemporaryDirectory()
        place = self._files.name
        command = [sys.executable, "-m", BUILDER, "-i", folder, "-o", place, "-p", "int4", "-e", "cpu", "-c", place]
        done = subprocess.run([*command, *OPTIONS], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the builder says: {done.stderr.strip().splitlines()[-1]}")
        self._model = genai.Model(place)

    def eval(self) -> OnnxModel:
        return self

    def __call__(self, input_ids: torch.Tensor) -> SimpleNamespace:
        parameters = genai.GeneratorParams(self._model)
        parameters.set_search_options(max_length=input_ids.shape[1] + 1, do_sample=False)
        generator = genai.Generator(self._model, parameters)
        generator.append_tokens(input_ids.numpy().astype("int32"))
        return SimpleNamespace(logits=torch.from_numpy(generator.get_output("logits").copy()))


main(OnnxModel, ("onnxruntime-genai", "onnxruntime", "onnx", "transformers", "torch"))
