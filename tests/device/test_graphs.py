"""CUDA graphs, pretended on the CPU: compiled functions fill the same memory again in every step."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spkd import config
from spkd.device import compiled, sent
from spkd.errors import SpkdError
from spkd.registry import STUDENTS
from spkd.students import build
from spkd.train.settings import TrainConfig
from spkd.train.step import Optimisation
from tests.device.pretended import GPU, gpu
from tests.device.steps import CASES, DIM, STEPS, WIDTHS, batch, module_of, network_of, students_of

CPU = torch.device("cpu")


class Graphs:
    """Backend of torch.compile whose results lie in memory that is lost where the next step begins.

    As with CUDA graphs, each call within a step has memory of its own, which later steps fill again.

    Attributes:
        steps: number of steps that have begun.
        compiled: number of functions, forward and backward.
    """

    def __init__(self) -> None:
        self.steps, self.compiled = 0, 0
        self._memory: list[Tensor] = []
        from torch._dynamo.backends.common import aot_autograd  # a second, which other tests need not wait for

        self.backend = aot_autograd(fw_compiler=self._compiler, bw_compiler=self._compiler)

    def begin(self) -> None:
        """Begin a step, as torch.compiler.cudagraph_mark_step_begin does."""
        self.steps += 1
        for values in self._memory:
            if values.is_floating_point():
                values.fill_(torch.nan)

    def _compiler(self, graph: Any, _: Any) -> Callable[..., Any]:
        self.compiled += 1
        memory: list[list[Any]] = []  # results of each call within a step
        calls, within = 0, -1

        def run(*given: Any) -> list[Any]:
            nonlocal calls, within
            calls, within = (calls + 1 if within == self.steps else 0), self.steps
            results = graph(*given)
            if calls == len(memory):
                memory.append([x.clone() if isinstance(x, Tensor) else x for x in results])
                self._memory += [x for x in memory[calls] if isinstance(x, Tensor)]
            for kept, values in zip(memory[calls], results, strict=True):
                if isinstance(kept, Tensor):
                    kept.copy_(values)
            # Other tensors of the same memory: autograd takes one of its own as a gradient without a copy.
            return [x.view_as(x) if isinstance(x, Tensor) else x for x in memory[calls]]

        from torch._functorch.aot_autograd import make_boxed_func

        return make_boxed_func(run)

    @property
    def breaks(self) -> dict[str, int]:
        """Reasons for which a function was compiled in parts, and their number."""
        from torch._dynamo.utils import counters

        return dict(counters["graph_break"])


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    made, compile_ = Graphs(), torch.compile

    def with_graphs(function: Any, *, mode: str, dynamic: bool) -> Any:
        assert (mode, dynamic) == ("reduce-overhead", False)
        return compile_(function, backend=made.backend, dynamic=False)

    monkeypatch.setattr(torch, "compile", with_graphs)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", made.begin)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return made


def trained(student: str, case: str, *more: str) -> list[Tensor]:
    """Loss terms of three steps, and the weights after them."""
    keys = [*CASES[case], f"steps={STEPS}", "batch_size=4", "optim.warmup=0", *more]
    options = config.load(TrainConfig, keys, environ={})
    torch.manual_seed(0)
    network = network_of(student, case)
    module = module_of(options, network)
    optimisation, terms = Optimisation(options, module, CPU), []
    for number in range(STEPS - 3, STEPS):
        batches = [batch(network, case, CPU) for _ in range(options.accumulate)]
        terms += optimisation.step(number, batches).values()
    return [*terms, *(values for values in module.state_dict().values() if values.is_floating_point())]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("student", "case"),
    [*((s, "contrastive") for s in STUDENTS), *((students_of(case)[0], case) for case in CASES)],
)
def test_steps_from_graphs_are_those_without(
    student: str, case: str, graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spkd.networks.campplus.DENSE", ((2, 1), (2, 2), (1, 2)))  # 52 layers take a minute
    more = ["accumulate=2", "optim.swa_fraction=0.2"] if "memo" not in case and case != "dino" else []
    expected = trained(student, case, *more)
    assert not graphs.steps
    found = trained(student, case, "compile=reduce-overhead", *more)
    assert graphs.steps == 3 * (2 if more else 1)
    assert not graphs.breaks
    lengths = 1 + (case.split(",")[0] in ("memo", "dino"))  # their local crops are shorter
    assert graphs.compiled == 2 * lengths
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's compiler needs one for C++")
@pytest.mark.parametrize("setting", ["true", "reduce-overhead"])
def test_steps_of_torchs_own_compiler_are_those_without(setting: str) -> None:
    torch._dynamo.reset()
    expected = trained("tiny", "contrastive", "accumulate=2")
    found = trained("tiny", "contrastive", "accumulate=2", f"compile={setting}")
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("setting", ["false", "true", "reduce-overhead"])
def test_graphs_are_asked_for_by_name(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def watched(function: Any, **options: Any) -> Any:
        asked.append(options)
        return function

    monkeypatch.setattr(torch, "compile", watched)
    trained("tiny", "cosine", f"compile={setting}")
    assert (
        asked
        == {"false": [], "true": [{}], "reduce-overhead": [{"mode": "reduce-overhead", "dynamic": False}]}[setting]
    )


def test_a_function_that_cannot_be_compiled_is_a_line() -> None:
    def refusing(graph: Any, _: Any) -> Any:
        raise ValueError("no such instruction")

    def failing(graph: Any, _: Any) -> Any:
        def run(*_: Tensor) -> Any:
            raise RuntimeError("connection lost")

        return run

    with pytest.raises(SpkdError, match="compile=true: .*no such instruction.*; run without it"):
        compiled(lambda x: x + 1, "compile=true", backend=refusing)(torch.ones(1))
    with pytest.raises(RuntimeError, match="^connection lost"):
        compiled(lambda x: x + 2, "compile=true", backend=failing)(torch.ones(1))


class OnOneDevice(TorchDispatchMode):
    """Mode in which a result on the CPU is an error: torch makes no CUDA graph of what computes there, too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        assert all(x.device == GPU for x in tree_leaves(results) if isinstance(x, Tensor)), func
        return results


RELATIVE = {"relative": True, "adapters": 4}
SLOW = ("ecapa", "resnet34", "campplus")


@pytest.mark.parametrize(
    ("student", "more"),
    [*(pytest.param(s, {}, marks=[pytest.mark.slow] * (s in SLOW)) for s in STUDENTS), ("ssl", RELATIVE)],
)
def test_students_compute_nothing_on_the_host(student: str, more: dict[str, Any]) -> None:
    network = build(student, channels=WIDTHS.get(student, 16), embedding=DIM, **more)
    kind = network.input_kind
    crops = torch.randn(4, kind.num_frames(9840), kind.dim)
    with gpu():
        network.to(GPU)
        features = sent(crops, GPU)
        with OnOneDevice():
            levels = network(features, 2 if more else 0)
            torch.stack([values.sum() for values in levels.values()]).sum().backward()
    assert all(p.grad is not None for p in network.parameters())
