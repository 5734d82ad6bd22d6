"""GPTQModel quantizes a model folder on the CPU, with its defaults; runs in its environment.

``gptqmodel_quantize.py FOLDER OUT TOKENS.npy CONFIG THREADS``: tokens [N, T] are the calibration text, sequence by
sequence; CONFIG is JSON, options of its QuantizeConfig. Tells seconds from loading to saving, and the kernel's mark of
the peak, as a line of JSON.
"""

import json
import resource
import sys
import time

import numpy as np
import torch
import torchvision_operators  # noqa: F401 (before GPTQModel)
from gptqmodel import GPTQModel, QuantizeConfig

folder, out, tokens, config, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
started = time.perf_counter()
asked = QuantizeConfig(device="cpu", **json.loads(config))
model = GPTQModel.load(folder, asked)
text = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in np.load(tokens)]
model.quantize(text, batch_size=1)
model.save(out)
seconds = time.perf_counter() - started
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print("@" + json.dumps({"phase": "quantize", "seconds": seconds, "cpu": time.process_time(), "peak": peak}), flush=True)
