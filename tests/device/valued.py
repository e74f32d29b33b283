"""A pretended GPU whose tensors have values: whole commands run on it, and give what they give on the CPU.

A tensor of it wraps one on the CPU and reports a `cuda` device. Every operation is computed on the CPU, and refused
where it mixes devices.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from tests.device.pretended import INDEXING, gradients, moved

GPU = torch.device("cuda", 1)  # features keep their filters on a device: those of the other one have no values
aten = torch.ops.aten
COPYING = {aten._to_copy, aten.copy_}


class OnGPU(Tensor):
    """A tensor on the pretended GPU."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> OnGPU:
        made = Tensor._make_wrapper_subclass(
            cls, values.size(), values.stride(), values.storage_offset(), dtype=values.dtype, device=GPU
        )
        made.values = values
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnGPU({self.values})"

    def tolist(self) -> Any:  # torch has none for other kinds of tensors
        return self.values.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


class Everywhere(TorchDispatchMode):
    """Mode in which tensors can be made on the pretended GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


def computed(func: Any, args: Any, kwargs: Any) -> Any:
    """Result of an operation. Raises RuntimeError where its tensors are on several devices."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    here = [x for x in tensors if not isinstance(x, OnGPU)]
    on_gpu = len(here) < len(tensors)
    # A GPU takes numbers of the host, and the host's indices.
    foreign = [x for x in here if x.ndim] if func.overloadpacket not in COPYING | INDEXING else []
    if on_gpu and foreign:
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, but found at least two devices")
    asked = kwargs.get("device")
    if asked is not None:
        on_gpu = torch.device(asked).type == "cuda"
        kwargs = kwargs | {"device": torch.device("cpu")}
    kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"}
    wrappers = {id(x.values): x for x in tensors if isinstance(x, OnGPU)}
    args, kwargs = tree_map_only(OnGPU, lambda x: x.values, (args, kwargs))
    result = func(*args, **kwargs)
    if func.overloadpacket is aten.copy_:
        return wrappers.get(id(result), result)

    def placed(x: Any) -> Any:
        if not isinstance(x, Tensor) or not on_gpu:
            return x
        return wrappers[id(x)] if id(x) in wrappers else OnGPU(x)

    return tree_map(placed, result)


SUBMIT = ThreadPoolExecutor.submit


def submitted(pool: ThreadPoolExecutor, call: Callable, *args: Any, **kwargs: Any) -> Any:
    """Submit a call to another thread, where modes of this one do not act."""

    def within() -> Any:
        with Everywhere():
            return call(*args, **kwargs)

    return SUBMIT(pool, within)


class Done:
    """An event of which the host need not wait."""

    def record_event(self) -> Done:
        return self

    def synchronize(self) -> None: ...


@contextlib.contextmanager
def gpu_with_values() -> Iterator[None]:
    """Pretend a GPU that computes, while the block runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch.cuda, "current_stream", lambda device: Done())
        patch.setattr(torch.cuda, "get_device_name", lambda device: "pretended")
        patch.setattr(torch.cuda, "max_memory_allocated", lambda device: 0)
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
        patch.setattr(Tensor, "pin_memory", lambda values: values)
        patch.setattr(nn.Module, "to", moved)
        patch.setattr(Tensor, "backward", lambda loss, *_, **__: gradients([loss]))
        patch.setattr(ThreadPoolExecutor, "submit", submitted)
        torch._C._ensureCUDADeviceGuardSet()  # as in FakeTensorMode: torch asks for the current device
        with torch.backends.cudnn.flags(enabled=False), Everywhere():  # a CPU has none of its operations
            yield
