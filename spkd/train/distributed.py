"""Training on several ranks: each takes some rows of every batch; the result equals that of one process.

torchrun starts the ranks. Losses that compare views gather them from all ranks, batch-norm takes its statistics over
all ranks, and gradients are averaged. Random numbers (crops, masks) are drawn for the whole batch, and each rank takes
those of its rows.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spkd.errors import UsageError
from spkd.networks.ssl import Noise

POLL = 0.1  # s between two looks at the store
DONE, FAILED = "done", "failed"
Value = TypeVar("Value")


@dataclass(frozen=True)
class ProcessGroup:
    """One of the processes (ranks) of a run.

    Attributes:
        number: number of this process, from 0.
        world: number of processes.
        store: texts that the ranks of a run share, by name.
    """

    number: int = 0
    world: int = 1
    store: dist.Store | None = None
    _uses: Iterator[int] = field(default_factory=itertools.count, repr=False, compare=False)

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and logs."""
        return self.number == 0

    def part(self, batch_size: int) -> slice:
        """Rows of a batch that this process takes."""
        size = batch_size // self.world
        return slice(self.number * size, (self.number + 1) * size)

    def barrier(self) -> None:
        """Wait until all ranks have called this."""
        if self.world > 1:
            others = dist.barrier(async_op=True)
            while not others.is_completed():
                time.sleep(POLL / 10)
            others.wait()

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """Let the first rank work alone while the block runs, however long: at its end, the others wait for it.

        They look into the store. In a collective operation they would give up after some minutes (NCCL: ten).

        Raises:
            RuntimeError: on the other ranks, where the block failed on the first.
        """
        if self.store is None:
            yield
            return
        key, outcome = f"block {next(self._uses)}", FAILED
        try:
            yield
            outcome = DONE
        finally:
            if self.is_first:
                self.store.set(key, outcome)
        if not self.is_first:
            while not answering(partial(self.store.check, [key])):
                time.sleep(POLL)
            if self.store.get(key).decode() == FAILED:
                raise RuntimeError("no connection to the first rank, which has failed")

    def exchanged(self, text: str) -> list[str]:
        """Texts of all ranks, in their order."""
        return [text] if self.store is None else answering(partial(self._exchanged, self.store, text))

    def _exchanged(self, store: dist.Store, text: str) -> list[str]:
        key = f"text {next(self._uses)} of"
        store.set(f"{key} {self.number}", text)
        texts = [store.get(f"{key} {number}").decode() for number in range(self.world)]
        store.set(f"{key} {self.number}, read", "")
        if self.is_first:  # it may hold the store, and may end after this
            store.wait([f"{key} {number}, read" for number in range(self.world)])
        return texts

    def most(self, value: int, device: torch.device) -> int:
        """Largest of the ranks' values."""
        if self.world == 1:
            return value
        greatest = torch.tensor(value, device=device)
        dist.all_reduce(greatest, dist.ReduceOp.MAX)
        return int(greatest)

    def any(self, asked: bool, device: torch.device) -> bool:
        """Whether `asked` is true on any rank."""
        return bool(self.most(int(asked), device))


def answering(function: Callable[[], Value]) -> Value:
    """The result of a function that waits for other ranks outside of Python, where no signal would be answered.

    A thread calls it. After an interruption it waits on, until this process ends.
    """
    result: Future[Value] = Future()

    def call() -> None:
        try:
            result.set_result(function())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=call, name="other ranks", daemon=True).start()
    return result.result()


ALONE = ProcessGroup()


def launched() -> bool:
    """Whether torchrun started this process as one of several."""
    return os.environ.get("WORLD_SIZE", "1").isdecimal() and int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def ranks_of(device: torch.device) -> Iterator[ProcessGroup]:
    """The ranks of a run, connected while the block runs.

    Raises:
        UsageError: torchrun did not start them, or they have devices of different kinds; they would wait for each
            other in vain, or train the same student one beside the other.
    """
    if not launched():
        tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "")  # of this srun; other variables count those of the whole job
        if "WORLD_SIZE" not in os.environ and tasks.isdecimal() and int(tasks) > 1:
            raise UsageError(
                f"srun starts this command in {tasks} tasks, and each would train the student alone; let one task of "
                "each machine start torchrun (srun --ntasks-per-node=1 torchrun ... --no-python spkd train), or one "
                "task train (srun --ntasks=1)"
            )
        yield ALONE
        return
    numbers = [os.environ.get(name, "") for name in ("RANK", "MASTER_PORT")]
    if "MASTER_ADDR" not in os.environ or not all(number.isdecimal() for number in numbers):
        raise UsageError("several ranks: start them with torchrun, which tells them how to meet")
    store, number, count = answering(lambda: next(dist.rendezvous("env://")))
    ranks = ProcessGroup(number, count, dist.PrefixStore("ranks", store))
    kinds = ranks.exchanged(device.type)
    if other := next((f"rank {i} has {kind}" for i, kind in enumerate(kinds) if kind != kinds[0]), None):
        raise UsageError(f"device: the first rank has {kinds[0]}, and {other}; name a device that all machines have")
    backend = "nccl" if device.type == "cuda" else "gloo"
    group = {"store": dist.PrefixStore("group", store), "rank": number, "world_size": count}
    answering(partial(dist.init_process_group, backend, **group))
    try:
        yield ranks
    finally:
        dist.destroy_process_group()


def is_of_connection(error: RuntimeError) -> bool:
    """Whether an error of torch means that the connection to another rank is lost."""
    text = str(error).lower()
    return any(word in text for word in ("connection", "gloo", "nccl", "socket", "timed out"))


def world() -> ProcessGroup:
    """This process among the ranks, as torch.distributed has them."""
    if dist.is_available() and dist.is_initialized():
        return ProcessGroup(dist.get_rank(), dist.get_world_size())
    return ALONE


def gathered(x: Tensor) -> Tensor:
    """Rows of all ranks, in the order of the ranks: (B, ...) -> (world * B, ...).

    The gradient of each row goes back to its rank.
    """
    if world().world == 1:
        return x
    rows: Tensor = _Gathered.apply(x)
    return rows


def summed(x: Tensor) -> Tensor:
    """Sum over the ranks, (...) -> (...); gradients are summed over the ranks too."""
    total: Tensor = _Summed.apply(x)
    return total


def own_rows(x: Tensor) -> Tensor:
    """Places (B,) of this rank's rows among those that `gathered` returns."""
    return world().number * len(x) + torch.arange(len(x), device=x.device)


@torch.no_grad()
def averaged(x: Tensor) -> Tensor:
    """Mean over the ranks, without gradient: (...) -> (...)."""
    ranks = world()
    if ranks.world == 1:
        return x.detach()
    return _sum(x) / ranks.world


class _Gathered(torch.autograd.Function):
    """Concatenation over the ranks, with a gradient.

    torch.distributed.nn has this and the sum below, but they are deprecated from torch 2.14 on and have no public
    successor.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.count = len(x)
        rows = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, x.contiguous())
        return torch.cat(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        first = dist.get_rank() * ctx.count
        return _sum(gradients[0])[first : first + ctx.count]


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _sum(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _sum(gradients[0])


def _sum(x: Tensor) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


def first_ranks(value: Tensor) -> Tensor:
    """The first rank's tensor; that of the other ranks gives its shape and type."""
    if world().world > 1:
        dist.broadcast(value, 0)
    return value


def mean_over_ranks(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """Means over the ranks of values by name, for the log."""
    if world().world == 1 or not values:
        return values
    stacked = torch.tensor(list(values.values()), device=device)
    dist.all_reduce(stacked)
    return dict(zip(values, (stacked / world().world).tolist(), strict=True))


def _normalised(module: nn.BatchNorm1d | nn.BatchNorm2d, x: Tensor) -> Tensor:
    """Batch-norm in training, with the statistics of the batches of all ranks, on any device (torch's needs a GPU).

    Counts, sums and the division are in float32 whatever the type of `x`, as in torch.nn.SyncBatchNorm: float16 cannot
    count beyond 65,504, and bfloat16 rounds a count by up to 0.4 %.

    Args:
        module: layer whose running statistics are updated.
        x: (B, C, ...).
    Returns:
        (B, C, ...), of the type of `x`.
    """
    axes, shape = [0, *range(2, x.dim())], [1, -1] + [1] * (x.dim() - 2)
    kept_type, x = x.dtype, x.float()
    # Mean over all ranks.
    count = torch.full((1,), x.numel() / x.shape[1], device=x.device)
    sums = summed(torch.cat([x.sum(axes), count]))
    count = sums[-1].detach()
    mean = sums[:-1] / count
    # Variance over all ranks.
    centred = x - mean.view(shape)
    squares = summed(centred.square().sum(axes))
    if module.running_mean is not None and module.running_var is not None:
        with torch.no_grad():
            momentum = 0.1 if module.momentum is None else module.momentum
            module.running_mean.lerp_(mean.to(module.running_mean.dtype), momentum)
            module.running_var.lerp_((squares / (count - 1).clamp_min(1)).to(module.running_var.dtype), momentum)
            if module.num_batches_tracked is not None:
                module.num_batches_tracked += 1
    normalised = centred * (squares / count + module.eps).rsqrt().view(shape)
    if module.affine:
        normalised = normalised * module.weight.view(shape) + module.bias.view(shape)
    return normalised.to(kept_type)


class _BatchNorm1d(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return _normalised(self, x) if self.training else super().forward(x)


class _BatchNorm2d(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return _normalised(self, x) if self.training else super().forward(x)


class _Noise(Noise):
    """Noise drawn for the batches of all ranks, of which each rank takes its rows.

    Attributes:
        views: number of views of a rank in a batch.
    """

    views: int

    def deviation(self, hidden: Tensor) -> Tensor:
        return averaged(super().deviation(hidden))

    def normal(self, hidden: Tensor) -> Tensor:
        # Several crops, or the two paths of a student with adapters, may share one batch: (crops * views, T, C) here,
        # and (crops * world * views, T, C) in one process.
        ranks, crops = world(), len(hidden) // self.views
        drawn = hidden.new_empty(crops * ranks.world * self.views, *hidden.shape[1:]).normal_()
        return drawn.unflatten(0, (crops, ranks.world, self.views))[:, ranks.number].flatten(0, 1)


def share_over_ranks(module: nn.Module, views: int) -> None:
    """Make every batch-norm of a module use the batches of all ranks, and draw its noise for all of them.

    Args:
        views: number of views of a rank in a batch.
    """
    for layer in module.modules():
        for kind, shared in ((nn.BatchNorm1d, _BatchNorm1d), (nn.BatchNorm2d, _BatchNorm2d), (Noise, _Noise)):
            if type(layer) is kind:
                layer.__class__ = shared
        if isinstance(layer, _Noise):
            layer.views = views
