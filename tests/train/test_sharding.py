"""How rows are divided; that losses, gradients and files come out as if they were not is in test_distributed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from spkd.train import sharding
from spkd.train.distributed import ProcessGroup
from spkd.train.sharding import Division, division_of, divisions, gradient_norm, own_state


@given(groups=st.integers(1, 60), group=st.integers(1, 5), world=st.integers(1, 9))
def test_parts_cover_all_rows_in_order_and_keep_groups_together(groups: int, group: int, world: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "world", lambda: ProcessGroup(0, world))
        parts = [Division(groups * group, group).part(number) for number in range(world)]
    rows = [row for part in parts for row in range(part.start, part.stop)]
    assert rows == list(range(groups * group))
    assert all(part.start % group == part.stop % group == 0 for part in parts)
    sizes = [(part.stop - part.start) // group for part in parts]
    assert max(sizes) - min(sizes) <= 1


def test_a_divided_parameter_holds_its_rows_and_its_gradient_is_that_of_one_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sharding, "world", lambda: ProcessGroup(1, 3))
    weight, division = torch.arange(14.0).view(7, 2), Division(7)
    module = nn.Module()
    module.rows, module.plain = sharding.divided(weight, division), nn.Parameter(torch.ones(2))
    assert torch.equal(module.rows, weight[2:4])
    assert division_of(module.rows) == division
    assert division_of(module.plain) is None
    assert divisions(module) == {"rows": division}
    held = own_state({"rows": weight, "other": weight}, divisions(module))
    assert torch.equal(held["rows"], weight[2:4])
    assert torch.equal(held["other"], weight)
    # What the ranks exchange brings the gradient once for each of them.
    (3.0 * module.rows).sum().backward()
    assert torch.equal(module.rows.grad, torch.ones(2, 2))


def test_the_norm_of_whole_parameters_is_torchs() -> None:
    parameters = [nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(1))]
    for parameter in parameters[:2]:
        parameter.grad = torch.randn_like(parameter)
    expected = nn.utils.clip_grad_norm_(parameters, float("inf"))
    assert torch.equal(gradient_norm(parameters), expected)
