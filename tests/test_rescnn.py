"""The model's documented claims, one test each."""

import re

import numpy as np
import pytest
import torch
from torch import nn

from rescnn import ResCNNBlock, ResCNNStack


@pytest.fixture(scope="module")
def x():
    return torch.randn(2, 512, 960, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def block():
    torch.manual_seed(0)
    return ResCNNBlock(512).eval()


@pytest.fixture(scope="module")
def stack():
    torch.manual_seed(0)
    return ResCNNStack().eval()


def test_a_block_keeps_the_shape(block, x):
    with torch.no_grad():
        assert block(x).shape == (2, 512, 960)


def test_a_stack_keeps_the_shape(stack, x):
    with torch.no_grad():
        assert stack(x).shape == (2, 512, 960)


def test_a_block_is_not_the_identity(block, x):
    with torch.no_grad():
        assert not torch.equal(block(x), x)


def test_every_branch_is_used_and_the_widths_sum_to_the_channels(block, x):
    widths = [branch[0].out_channels for branch in block.branches]
    assert widths == [170, 170, 172]
    assert sum(widths) == 512
    with torch.no_grad():
        whole = block(x)
        for branch in block.branches:
            weight = branch[1].weight.clone()
            branch[1].weight.zero_()
            assert not torch.equal(block(x), whole)
            branch[1].weight.copy_(weight)


def test_the_gradient_at_the_input_exists_and_is_finite_and_moderate(stack, x):
    leaf = x[:, :, :96].clone().requires_grad_()
    stack(leaf).sum().backward()
    assert leaf.grad is not None
    assert torch.isfinite(leaf.grad).all()
    assert 0 < leaf.grad.norm() < 1000


def test_the_receptive_field_of_the_default_stack_is_19(stack):
    assert stack.get_receptive_field() == 19


def test_the_output_has_no_nan_or_infinity(stack, x):
    with torch.no_grad():
        assert torch.isfinite(stack(x)).all()


def test_state_dict_has_the_documented_keys(stack):
    keys = stack.state_dict().keys()
    assert {"blocks.0.branches.0.0.weight", "blocks.0.fusion.1.running_mean"} <= keys


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"channels": 2}, "channels=2"),
        ({"channels": True}, "channels=True"),
        ({"channels": 8.0}, "channels=8.0"),
        ({"kernel_sizes": (3, 4)}, "4"),
        ({"kernel_sizes": ()}, "kernel_sizes=[]"),
        ({"kernel_sizes": 3}, "kernel_sizes=3"),
        ({"kernel_sizes": np.array(3)}, "kernel_sizes=array(3)"),
        ({"num_blocks": 0}, "num_blocks=0"),
        ({"dropout": float("nan")}, "dropout=nan"),
        ({"dropout": 1.5}, "dropout=1.5"),
        ({"dropout": "0.1"}, "dropout='0.1' must be a number, not str"),
        ({"channels": "8"}, "channels='8' must be an integer, not str"),
        ({"kernel_sizes": (3, 5.0)}, "kernel_sizes=[3, 5.0]: 5.0 is not an integer"),
        ({"dropout": 10**400}, "dropout=1000"),
        ({"kernel_sizes": (3, True)}, "kernel_sizes=[3, True]: True is not an integer"),
    ],
)
def test_impossible_arguments_are_refused_by_name_and_value(arguments, named):
    with pytest.raises((ValueError, TypeError), match=re.escape(named)):
        ResCNNStack(**{"channels": 8, **arguments})


def test_the_defaults_are_the_documented_ones():
    stack = ResCNNStack()
    assert len(stack.blocks) == 3
    assert stack.blocks[0].get_receptive_field() == 7
    assert [m.p for m in stack.modules() if isinstance(m, nn.Dropout1d)] == [0.1] * 3


def test_a_dropout_of_1_leaves_the_rectified_input():
    x = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ResCNNBlock(8, dropout=1.0)(x), x.relu())


@pytest.mark.parametrize("shape", [(8, 8), (2, 7, 8), (2, 8, 8, 1), (8,)])
def test_an_input_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"\(batch, 8, length\)"):
        ResCNNStack(8)(torch.zeros(shape))
