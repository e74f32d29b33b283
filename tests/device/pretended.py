"""A pretended GPU: tensors without values on a `cuda` device of a machine that has none.

torch's FakeTensorMode knows shape, type and device of every result, and refuses operations between devices. On top of
it, everything for which the host would wait is an error.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

GPU = torch.device("cuda", 0)
aten = torch.ops.aten
# Operations whose result, or its shape, the host has to know.
ASKING = {
    *(aten._local_scalar_dense, aten.equal, aten.is_nonzero, aten.nonzero, aten.nonzero_numpy, aten.masked_select),
    *(aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.bincount, aten.histc),
}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}
COPYING = {aten._to_copy, aten.copy_, aten._copy_from}


class HostWaits(AssertionError):
    """The host would wait for the GPU."""


class NoWaits(TorchDispatchMode):
    """Mode in which an operation for which the host waits is an error."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kind, tensors = func.overloadpacket, [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_gpu = any(x.is_cuda for x in tensors)
        if on_gpu and (kind in ASKING or (kind is aten.repeat_interleave and len(tensors) == 1)):
            raise HostWaits(str(func))
        masks = [x for x in tree_leaves(args[1:2]) if isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8)]
        # A single number is filled in by the mask itself.
        fills = kind in INDEXING - {aten.index, aten._unsafe_index} and args[2].numel() == 1
        if on_gpu and kind in INDEXING and masks and not fills:
            raise HostWaits(f"{func} by a mask")
        if kind in COPYING:
            self._check_copy(func, args, kwargs)
        if kind is aten._fused_sgd_:  # the only one of ours that torch cannot pretend
            assert all(x.device == GPU for x in tensors)
            return None
        # Other operations take a number on the host as an argument; this one copies it.
        if kind is aten.where and on_gpu and not all(x.is_cuda for x in tensors):
            raise HostWaits(f"{func} of a number on the host")
        return func(*args, **kwargs)

    def _check_copy(self, func: Any, args: Any, kwargs: Any) -> None:
        if func.overloadpacket is aten._to_copy:
            source, device, flag = args[0], kwargs.get("device"), kwargs.get("non_blocking", False)
            target = source.device if device is None else torch.device(device)
        else:
            target, source, flag = args[0].device, args[1], args[2] if len(args) > 2 else False
        if target.type == source.device.type or not source.numel():
            return
        if target.type == "cpu" and flag and func.overloadpacket is aten._to_copy:
            return  # into pinned memory; an event tells when it is there
        if target.type == "cpu":
            raise HostWaits(f"{func} to the host")
        if not flag or not getattr(source, "pinned", False):
            raise HostWaits(f"{func} from memory that is not pinned, or blocking")


class Stream:
    """The work of the GPU, on which events are recorded."""

    def record_event(self) -> Stream:
        return self

    def synchronize(self) -> None:
        raise HostWaits("for an event")


@contextlib.contextmanager
def gpu(waits: bool = False) -> Iterator[FakeTensorMode]:
    """Pretend a GPU while the block runs.

    Args:
        waits: whether the host may wait for it.
    """
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode(allow_non_fake_inputs=True) as mode:
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
        patch.setattr(torch.cuda, "current_stream", lambda device: Stream())
        patch.setattr(Tensor, "pin_memory", pinned)
        # torch swaps the content of parameters, which pretended ones do not allow.
        patch.setattr(nn.Module, "to", moved)
        # torch's engine asks CUDA for its streams.
        patch.setattr(Tensor, "backward", lambda loss, *_, **__: gradients([loss]))
        patch.setattr(torch.autograd, "grad", lambda loss, inputs, **_: gradients([loss], list(inputs)))
        with contextlib.nullcontext() if waits else NoWaits():
            yield mode


def pinned(values: Tensor) -> Tensor:
    """The same values, marked as in pinned memory."""
    values = values if hasattr(values, "fake_mode") else values.view_as(values)
    values.pinned = True  # type: ignore[attr-defined]
    return values


def moved(module: nn.Module, device: Any = None, memory_format: Any = None) -> nn.Module:
    """A module on a device, or in a memory format, which only tensors of four axes have."""
    for part in module.modules():
        for name, values in list(part._parameters.items()):
            if values is not None:
                # Recurrent layers keep their parameters in a list as well, which this updates.
                placed = _placed(values.detach(), device, memory_format)
                setattr(part, name, nn.Parameter(placed, values.requires_grad))
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = _placed(buffer, device, memory_format)
    return module


def _placed(values: Tensor, device: Any, memory_format: Any) -> Tensor:
    if memory_format is not None:
        return values.to(memory_format=memory_format) if values.ndim == 4 else values
    return sent(values, device)


def sent(tree: Any, device: Any = GPU) -> Any:
    """Every tensor in a tree on a device, without waiting."""
    return tree_map_only(Tensor, lambda x: pinned(x).to(device, non_blocking=True), tree)


@contextlib.contextmanager
def real() -> Iterator[None]:
    """Compute with real values while the block runs."""
    with unset_fake_temporarily():
        yield


def gradients(outputs: Sequence[Tensor], inputs: list[Tensor] | None = None) -> tuple[Tensor, ...]:
    """Gradients of a sum of numbers by the chain rule, node by node.

    Args:
        inputs: tensors whose gradients are returned; None: those of the leaves are added to their `grad`.
    """
    given: dict[Any, dict[int, Tensor]] = defaultdict(dict)
    wanted = {(x.grad_fn, x.output_nr): i for i, x in enumerate(inputs or []) if x.grad_fn is not None}
    found: dict[int, Tensor] = {}

    def add(node: Any, number: int, gradient: Tensor) -> None:
        before = given[node].get(number)
        given[node][number] = gradient if before is None else before + gradient

    with torch.no_grad():
        for output in outputs:
            add(output.grad_fn, output.output_nr, torch.ones_like(output))
        for node in _from_the_end([output.grad_fn for output in outputs]):
            of_node = given.pop(node, {})
            for number, gradient in of_node.items():
                if (node, number) in wanted:
                    found[wanted[node, number]] = gradient
            if not of_node:
                continue
            if hasattr(node, "variable"):
                leaf = node.variable
                if inputs is None:
                    leaf.grad = of_node[0] if leaf.grad is None else leaf.grad + of_node[0]
                continue
            inputs_of_node = [of_node.get(number) for number in range(len(node._input_metadata))]
            if hasattr(node, "apply"):  # a function in Python, which gets zeros where there is no gradient
                inputs_of_node = [
                    torch.zeros(meta.shape, dtype=meta.dtype, device=meta.device) if values is None else values
                    for values, meta in zip(inputs_of_node, node._input_metadata, strict=True)
                ]
            results = (node.apply if hasattr(node, "apply") else node)(*inputs_of_node)
            results = results if isinstance(results, tuple) else (results,)
            for (further, number), gradient in zip(node.next_functions, results, strict=False):
                if further is not None and gradient is not None:
                    meta = further._input_metadata[number]
                    assert gradient.device == meta.device, (node, further)
                    add(further, number, gradient.sum_to_size(meta.shape).to(meta.dtype))
    return tuple(found[i] for i in range(len(inputs or [])))


def _from_the_end(roots: list[Any]) -> list[Any]:
    """Nodes of a graph, each before those that it passes gradients to."""
    order: list[Any] = []
    seen = set()
    stack = [(root, False) for root in roots]
    while stack:
        node, is_done = stack.pop()
        if is_done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((further, False) for further, _ in node.next_functions if further is not None)
    return order[::-1]
