"""Split: the branches share the channels exactly, and each has its own kernel."""

import torch

from rescnn_verify.compare import equal, same_bits
from rescnn_verify.needs import DIRECT, HANDLES
from rescnn_verify.probes import (
    as_input,
    impulse_rows,
    make_positive,
    only_branch,
    positions,
    reach,
)
from rescnn_verify.space import INPUTS, Choice, Integers, Space
from rescnn_verify.statement import statement


@statement(space=Space(), needs=(HANDLES,), documented=True, effort=4)
def widths_sum_to_channels(subject, case):
    """The branch widths are channels // n each, the remainder to the last; they sum to channels.

    Source: the reference contract; 512 channels over 3 kernels are 170, 170 and 172.
    """
    for i, block in enumerate(subject.handles(subject.model(case), case)):
        widths = tuple(branch.conv.weight.shape[0] for branch in block.branches)
        yield equal(widths, case.widths, f"branch widths of block {i}")
        yield equal(sum(widths), case.channels, f"sum of the branch widths of block {i}")


@statement(space=Space(), needs=(HANDLES,), documented=True, effort=3)
def kernel_i_belongs_to_branch_i(subject, case):
    """The kernel sizes of the branches are the given ones, in the order given, repeats included."""
    for i, block in enumerate(subject.handles(subject.model(case), case)):
        kernels = tuple(branch.conv.weight.shape[2] for branch in block.branches)
        yield equal(kernels, tuple(case.kernel_sizes), f"kernel sizes of the branches of block {i}")


@statement(
    space=INPUTS.narrow(
        mode=Choice("eval"), batch=Choice(1), layout=Choice("contiguous"), branch=Integers(0, 5),
        length=Integers(1, 300), dtype=Choice("float64", "float32"),
    ),
    needs=(HANDLES, DIRECT),
)  # fmt: skip
def branch_i_sees_kernel_i(subject, case):
    """With only branch i joined to the fusion, the field is that of kernel i alone.

    Branch i fills the i-th share of the concatenation, and its positive taps reach
    n·(kernel i − 1)/2 positions to either side through n blocks: weights are positive, shifts zero
    and the input a positive impulse, so no term cancels and no ReLU cuts.
    """
    index = case["branch"] % case.branches
    model = subject.model(case)
    blocks = subject.handles(model, case)
    make_positive(blocks, case.rng("weights"))
    only_branch(blocks, index)
    places = positions(case)
    out = subject(model, as_input(case, impulse_rows(case, places, 1.0)))
    side = case.num_blocks * (case.kernel_sizes[index] // 2)
    for row, place in enumerate(places):
        window = torch.from_numpy(reach(place, side, side, case.length))
        seen = (out[row] != 0).any(dim=0)
        yield same_bits(seen, window, f"outputs that see position {place} by branch {index} alone")
