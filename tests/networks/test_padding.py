from __future__ import annotations

import pytest
import torch

from spkd.networks import padding


@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize("lengths", [None, [9, 5, 1]])
def test_moments_are_those_of_the_valid_steps(lengths: list[int] | None, correction: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, 9) + 1000  # far from 0: the difference of mean square and squared mean would be lost
    variance, mean = padding.var_mean(x, None if lengths is None else torch.tensor(lengths), correction)
    for row, length in enumerate(lengths or [9, 9, 9]):
        steps = x[row, :, :length].double()
        expected = steps.var(-1, correction=min(correction, length - 1))
        torch.testing.assert_close(variance[row, :, 0].double(), expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(mean[row, :, 0].double(), steps.mean(-1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_moments_of_half_precision_are_rounded_once(kind: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(2, 3, 2000) * 3 + 8).to(kind)
    variance, mean = padding.var_mean(x, None)
    assert variance.dtype == mean.dtype == kind
    torch.testing.assert_close(variance, x.double().var(-1, correction=0, keepdim=True).to(kind))
    torch.testing.assert_close(mean, x.double().mean(-1, keepdim=True).to(kind))


def test_moments_are_differentiable() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: padding.var_mean(x, torch.tensor([5, 3]), 1), x)
    assert torch.autograd.gradcheck(lambda x: padding.var_mean(x, None), x)
    assert torch.autograd.gradcheck(lambda x: padding.var_mean(x, None, 1), x)
    single = x[..., :1].detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: padding.var_mean(x, None, 1), single)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_trace_is_right_for_other_batches() -> None:
    """A model that others export by tracing keeps nothing of the example's size."""

    class Moments(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat(padding.var_mean(x, None), -1)

    torch.manual_seed(0)
    traced = torch.jit.trace(Moments(), torch.randn(2, 256, 2000, requires_grad=True))
    x = torch.randn(5, 256, 300)
    expected = torch.stack(torch.var_mean(x, -1, correction=0), -1)
    torch.testing.assert_close(traced(x), expected, rtol=1e-5, atol=1e-5)
