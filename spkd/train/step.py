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
from spkd.train.settings import TrainConfig
from spkd.train.sharding import divisions
from spkd.train.specaugment import mask

TYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Optimisation:
    """The optimiser of a run, and all that a step of it takes.

    Attributes:
        optimiser: of every trained parameter.
        first_bad: step whose loss was the first that is not finite, -1 where there was none: a tensor on the device,
            which is looked at now and then, so that no step waits for it.
    """

    def __init__(
        self, config: TrainConfig, module: TrainingModule, device: torch.device, ranks: ProcessGroup = ALONE
    ) -> None:
        """Raises UsageError: half precision without a GPU, whose gradients it would lose."""
        self._config, self._module, self._device, self._ranks = config, module, device, ranks
        self._type = TYPES[config.precision]
        if self._type is torch.float16 and device.type != "cuda":
            raise UsageError("precision=fp16: needs a GPU; bf16 works everywhere")
        if config.channels_last:
            convert: Callable[..., nn.Module] = module.network.to  # torch 2.11 types it without this argument
            convert(memory_format=torch.channels_last)
        if config.compile:
            module.network.compile()
        self._connected: nn.Module = module
        if ranks.world > 1:
            share_over_ranks(module, config.batch_size // ranks.world)
            # Every rank has rows of its own of these; there is nothing to average.
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, list(divisions(module)))
            with warnings.catch_warnings():
                # torch 2.14 advises against broadcast_buffers, but has no other way to leave buffers alone yet.
                warnings.simplefilter("ignore", FutureWarning)
                self._connected = DistributedDataParallel(module, broadcast_buffers=False, find_unused_parameters=True)
        self.optimiser = make_optimiser(config.optim, module)
        self._scaler = torch.amp.GradScaler(device.type, enabled=self._type is torch.float16)
        self.first_bad = torch.full((), -1, device=device)

    def step(self, number: int, batches: Sequence[TrainBatch]) -> dict[str, Tensor]:
        """Step `number` over its batches. Returns the loss terms, their mean over the batches, on the device."""
        config, module = self._config, self._module
        module.train()
        self.optimiser.zero_grad(set_to_none=True)
        found: list[dict[str, Tensor]] = []
        for index, batch in enumerate(batches, number * len(batches)):
            # Gradients are averaged over the ranks once a step, with the last batch.
            last = self._ranks.world == 1 or index == (number + 1) * len(batches) - 1
            with contextlib.nullcontext() if last else self._connected.no_sync():  # type: ignore[operator]
                total, terms = self._forward(number, index, batch)
                self.first_bad = torch.where((self.first_bad < 0) & ~total.isfinite(), number, self.first_bad)
                self._scaler.scale(total / len(batches)).backward()
            found.append({name: term.detach() for name, term in terms.items()})
        self._scaler.unscale_(self.optimiser)
        clip_gradients(config.optim, module)
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(config.optim, number, config.steps, config.large_margin)
        self._scaler.step(self.optimiser)
        self._scaler.update()
        module.after_step(min((number + 1) / config.steps, 1.0))
        if len(found) == 1:
            return found[0]
        return {name: torch.stack([terms[name] for terms in found]).mean() for name in found[0]}

    def _forward(self, number: int, index: int, batch: TrainBatch) -> tuple[Tensor, dict[str, Tensor]]:
        config, module = self._config, self._module
        seed = seed_of(Purpose.STEP, config.seed, index)
        torch.manual_seed(seed)  # of dropout and the adapters' noise: a resumed run has the same
        generator = torch.Generator().manual_seed(seed)
        frames, bands = config.mask.frames, config.mask.bands if is_fbank(module.network.input_kind) else 0
        # Several ranks draw for the whole batch; a small cache's batch may be shorter than asked for.
        whole = (None, 0) if self._ranks.world == 1 else (self._ranks.part(config.batch_size), config.batch_size)
        masked = [mask(crop, frames, bands, generator, *whole) for crop in batch.crops]
        finetune = batch.finetune_batch
        if finetune is not None:
            finetune = mask(finetune, frames, bands, generator, *whole)
        inputs = replace(
            batch.inputs,
            progress=min(number / config.steps, 1.0),
            margin=config.large_margin.margin if number >= config.steps else None,
        )
        lower = contextlib.nullcontext() if self._type is None else torch.autocast(self._device.type, self._type)
        with lower:
            return self._connected(masked, inputs, finetune)

    def state(self) -> dict[str, Tensor]:
        """What a run that continues needs beside parameters and the optimiser's state."""
        if not self._scaler.is_enabled():
            return {}
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in self._scaler.state_dict().items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        if self._scaler.is_enabled() and state:
            whole = ("growth_interval", "_growth_tracker")
            self._scaler.load_state_dict({k: int(v) if k in whole else float(v) for k, v in state.items()})
