"""Declares the operators without which torchvision does not import beside a torch for CPUs.

GPTQModel 7.0.0 imports torchvision for one vision model. The wheel of the package index is built for CUDA: beside a
torch for CPUs its library does not load, and the import stops at two operators that the library would have defined.
"""

import torch

LIBRARY = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
