"""A device that is not there: numbers are computed on the processor, and operations that mix both places fail.

As with a GPU, tensors get to it and back by being moved, single numbers of the processor may take part in operations of
the device, and anything else may not. So a test finds what would fail on a GPU without one.
"""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "vulkan"  # of the devices whose kernels torch has not loaded here
MOVES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}
COMPOSED = {torch.nn.functional.scaled_dot_product_attention, torch.where}  # make tensors of their own on the way
INDEXED = {torch.ops.aten.index.Tensor}  # indices may be on the processor


class Far(torch.Tensor):
    """A tensor of the device; `near` holds its numbers. To torch's own code it is on no device ("meta")."""

    @staticmethod
    def __new__(cls, near):
        layout = {"strides": near.stride(), "storage_offset": near.storage_offset()}
        return torch.Tensor._make_wrapper_subclass(cls, near.shape, dtype=near.dtype, device="meta", **layout)

    def __init__(self, near):
        self.near = near

    @property
    def device(self):
        return torch.device(NAME)

    def __repr__(self):
        return f"Far({self.near})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} was asked for when the device was closed")


def near(value):
    return value.near if isinstance(value, Far) else value


def there(device):
    return device is not None and torch.device(device).type == NAME


class FarDevice(TorchDispatchMode):
    """Open while it is entered; `operations` counts what was computed on it."""

    def __init__(self):
        super().__init__()
        self.operations = 0
        self._moving = Moving()

    def __enter__(self):
        self._moving.__enter__()
        return super().__enter__()

    def __exit__(self, *failure):
        super().__exit__(*failure)
        self._moving.__exit__(*failure)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        far = any(isinstance(one, Far) for one in tensors)
        asked = kwargs.get("device")
        if there(asked):
            kwargs["device"] = torch.device("cpu")
        if far and func not in MOVES:
            mixed = [one for one in tensors if not isinstance(one, Far) and one.dim() > 0]
            fine = func in INDEXED and all(one.device.type == "cpu" for one in mixed)
            assert not mixed or fine, f"{func} mixes {NAME} and {mixed[0].device}"
        found = func(*tree_map(near, args), **tree_map(near, kwargs))
        if func._schema.is_mutable:
            return args[0] if not isinstance(found, tuple) else found
        if there(asked) or (far and asked is None):
            self.operations += 1
            return tree_map(lambda one: Far(one) if isinstance(one, torch.Tensor) else one, found)
        return found


class Moving(TorchFunctionMode):
    """`Tensor.to` the device, which torch would refuse before it asks; and what makes tensors where torch sees ours."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.to:
            place = kwargs.get("device", args[1] if len(args) > 1 and not isinstance(args[1], torch.dtype) else None)
            if isinstance(place, torch.Tensor):
                place = place.device
            if there(place):
                dtype = kwargs.get("dtype") or next((one for one in args[1:] if isinstance(one, torch.dtype)), None)
                moved = args[0] if dtype is None else func(args[0], dtype)
                return moved if isinstance(moved, Far) else Far(moved.detach().clone())
        if func is torch.tensor and there(kwargs.get("device")):
            return Far(func(*args, **{**kwargs, "device": "cpu"}))
        if func is torch.Tensor.__getitem__ and isinstance(args[0], Far) and isinstance(args[1], list):
            return func(args[0], torch.tensor(args[1]))
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        if func in COMPOSED and any(isinstance(one, Far) for one in tensors):
            assert all(isinstance(one, Far) or one.dim() == 0 for one in tensors), f"{func} mixes devices"
            return Far(func(*tree_map(near, args), **tree_map(near, kwargs)))
        return func(*args, **kwargs)
