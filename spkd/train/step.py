"""One step of the optimiser: in reduced precision, over several batches, without waiting for the device."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from spkd.errors import UsageError
from spkd.outputs.features import is_fbank
from spkd.seeding import Purpose, seed_of
from spkd.train.distributed import ALONE, ProcessGroup, share_over_ranks
from spkd.train.loading import TrainBatch
from spkd.train.module import TrainingModule
from spkd.train.optim import clip_gradients, learning_rate, make_optimiser
from spkd.train.settings import GRAPHS, NOT_COMPILED, TrainConfig
from spkd.train.sharding import divisions
from spkd.train.specaugment import mask

TYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Optimisation:
    """Optimiser of a run, and its steps.

    Attributes:
        first_bad: number of the first step whose loss was not finite, -1 where there was none. It is a tensor on the
            device, which is read only now and then, so that not every step waits for it.
    """

    def __init__(
        self, config: TrainConfig, module: TrainingModule, device: torch.device, ranks: ProcessGroup = ALONE
    ) -> None:
        """Make the optimiser. Raises UsageError: half precision without a GPU, where small gradients would be lost."""
        self._config, self._module, self._device, self._ranks = config, module, device, ranks
        self._type = TYPES[config.precision]
        if self._type is torch.float16 and device.type != "cuda":
            raise UsageError("precision=fp16: needs a GPU; bf16 works everywhere")
        if config.channels_last:
            convert: Callable[..., nn.Module] = module.network.to  # torch 2.11 has no type for this argument
            convert(memory_format=torch.channels_last)
        if config.compile != NOT_COMPILED:
            module.compile_student(config.compile)
        self._connected: nn.Module = module
        if ranks.world > 1:
            share_over_ranks(module, config.batch_size // ranks.world)
            # Each rank holds different rows of these; there is nothing to average.
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, list(divisions(module)))
            with warnings.catch_warnings():
                # torch 2.14 advises against broadcast_buffers, but has no other way yet not to broadcast buffers.
                warnings.simplefilter("ignore", FutureWarning)
                self._connected = DistributedDataParallel(module, broadcast_buffers=False, find_unused_parameters=True)
        self.optimiser = make_optimiser(config.optim, module)
        self._scaler = torch.amp.GradScaler(device.type, enabled=self._type is torch.float16)
        self.first_bad = torch.full((), -1, device=device)

    def step(self, number: int, batches: Sequence[TrainBatch]) -> dict[str, Tensor]:
        """Do step `number` over its batches. Returns the loss terms on the device, averaged over the batches."""
        config, module = self._config, self._module
        module.train()
        self.optimiser.zero_grad(set_to_none=True)
        of_batches: list[dict[str, Tensor]] = []
        for index, batch in enumerate(batches, number * len(batches)):
            # Gradients are averaged over the ranks once a step, with the last batch.
            last = self._ranks.world == 1 or index == (number + 1) * len(batches) - 1
            with contextlib.nullcontext() if last else self._connected.no_sync():  # type: ignore[operator]
                total, terms = self._forward(number, index, batch)
                self.first_bad = torch.where((self.first_bad < 0) & ~total.isfinite(), number, self.first_bad)
                self._scaler.scale(total / len(batches)).backward()
            if self._config.compile == GRAPHS and len(of_batches) + 1 < len(batches):
                _copy_gradients(module)
            of_batches.append({name: term.detach() for name, term in terms.items()})
        self._scaler.unscale_(self.optimiser)
        clip_gradients(config.optim, module)
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(config.optim, number, config.steps, config.large_margin)
        self._scaler.step(self.optimiser)
        self._scaler.update()
        later = config.large_margin.steps
        last_phase = (number + 1 - config.steps) / later if later else (number + 1) / config.steps
        module.after_step(min((number + 1) / config.steps, 1.0), last_phase)
        if len(of_batches) == 1:
            return of_batches[0]
        return {name: torch.stack([terms[name] for terms in of_batches]).mean() for name in of_batches[0]}

    def _forward(self, number: int, index: int, batch: TrainBatch) -> tuple[Tensor, dict[str, Tensor]]:
        config, module = self._config, self._module
        if config.compile == GRAPHS:
            torch.compiler.cudagraph_mark_step_begin()  # nothing uses the outputs of the last batch any more
        seed = seed_of(Purpose.STEP, config.seed, index)
        torch.manual_seed(seed)  # dropout and the adapters' noise are equal in a resumed run
        generator = torch.Generator().manual_seed(seed)
        frames, bands = config.mask.frames, config.mask.bands if is_fbank(module.network.input_kind) else 0
        # Several ranks draw for the whole batch; in one process that of a small cache may be shorter than asked for.
        of_ranks = (None, 0) if self._ranks.world == 1 else (self._ranks.part(config.batch_size), config.batch_size)
        masked = [mask(crop, frames, bands, generator, *of_ranks) for crop in batch.crops]
        finetune = batch.finetune_batch
        if finetune is not None:
            finetune = mask(finetune, frames, bands, generator, *of_ranks)
        inputs = replace(
            batch.inputs,
            progress=min(number / config.steps, 1.0),
            margin=config.large_margin.margin if number >= config.steps else None,
        )
        lower = contextlib.nullcontext() if self._type is None else torch.autocast(self._device.type, self._type)
        with lower:
            return self._connected(masked, inputs, finetune)

    def state(self) -> dict[str, Tensor]:
        """State that a continued run needs in addition to the parameters and the optimiser's state."""
        if not self._scaler.is_enabled():
            return {}
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in self._scaler.state_dict().items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        if self._scaler.is_enabled() and state:
            integers = ("growth_interval", "_growth_tracker")
            self._scaler.load_state_dict({k: int(v) if k in integers else float(v) for k, v in state.items()})


def _copy_gradients(module: nn.Module) -> None:
    """Copy the gradients so far: those of a CUDA graph are in memory that its next run fills again."""
    for parameter in module.parameters():
        if parameter.grad is not None:
            parameter.grad = parameter.grad.clone()
