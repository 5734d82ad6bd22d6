"""Environments of the programs that load bundles: what is in each, made at first use and kept."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

TORCH = "torch==2.13.0"  # the build for CPUs; a newer one, or one left to chance, brings gigabytes of CUDA
GPTQMODEL = ("gptqmodel==7.0.0", "optimum==2.3.0", "transformers==5.8.1", "torchvision==0.28.0", "requests")
AUTO_GPTQ = ("auto-gptq==0.7.1", "transformers==4.46.3", "optimum==2.3.0", "peft==0.13.2")
BITSANDBYTES = ("bitsandbytes==0.50.2", "transformers==5.23.0", "accelerate==1.15.0")
ONNX = ("onnxruntime-genai==0.18.0", "onnxruntime==1.32.0", "onnx==1.23.2", "onnx-ir==1.1.0", "transformers==5.23.0")
NEURAL_COMPRESSOR = ("neural-compressor-pt==3.10", "transformers==5.23.0", "accelerate==1.15.0")

CACHE = Path.home() / ".cache/llmpack/interop"
VARIABLES = {
    **os.environ,
    "TORCH_COMPILE_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""What a loader sees. What GPTQModel hands to the compiler gives the same numbers uncompiled, minutes sooner."""


def environment(packages: tuple[str, ...], cache: Path, project: Path | None = None) -> Path:
    """The Python of an environment with these packages and torch, made unless a run before did.

    project  a folder whose code is to run there as it stands, with what it needs to build

    Raises CalledProcessError with pip's complaint in `stderr`.
    """
    wanted = [TORCH, *packages]
    needs = [] if project is None else [(project / "pyproject.toml").read_text()]
    wanted += [] if project is None else ["-e", f"{project}[build]"]
    folder = cache / hashlib.sha256("\n".join([*wanted, *needs]).encode()).hexdigest()[:16]
    python, whole = folder / "bin/python", folder / "made"
    if not whole.is_file():
        print(f"making an environment of {', '.join(wanted)}", file=sys.stderr)
        cache.mkdir(parents=True, exist_ok=True)
        venv.EnvBuilder(with_pip=True, clear=True).create(folder)
        constraint = folder / "constraints.txt"
        constraint.write_text(TORCH + "\n")
        command = [python, "-m", "pip", "install", "-q", "-c", constraint, *wanted]
        subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
        whole.touch()
    return python
