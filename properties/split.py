"""Split: the branches share the channels exactly, and each has its own kernel."""

import torch

from rescnn_verify.compare import Falsified, NotApplicable, attempt, equal, same_bits
from rescnn_verify.needs import CONTRACT, DIRECT, HANDLES
from rescnn_verify.probes import (
    as_input,
    impulse_rows,
    make_positive,
    only_branch,
    positions,
    reach,
)
from rescnn_verify.space import A_CHANNEL_PER_BRANCH, INPUTS, Choice, Integers, Space
from rescnn_verify.statement import statement

KERNELS = (
    (3,), (5, 3), (3, 5, 7), (7, 1, 5, 3), (3, 9, 3, 5, 1), (11, 3, 5, 7, 9, 1),
    (1, 3, 5, 7, 9, 11, 13), (15, 13, 11, 9, 7, 5, 3, 1),
)  # fmt: skip


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
        mode=Choice("eval"), batch=Choice(1), layout=Choice("contiguous"), branch=Integers(0, 19),
        dtype=Choice("float64", "float32"),
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


@statement(
    space=Space(
        num_blocks=Integers(1, 8), kernel_sizes=Choice(*KERNELS), channels=Integers(1, 1024),
        where=(A_CHANNEL_PER_BRANCH,),
    ),
    needs=(CONTRACT, HANDLES),
    exhaustive=True,
)  # fmt: skip
def split_and_field_of_every_configuration(subject, case):
    """Widths, kernels, block count and claimed field are the formulas', up to 1024 channels.

    For up to 8 branches, one list of kernels for each number of them, and up to 8 blocks: every
    configuration in the thorough profile. Built on the meta device, where no weight is stored.
    """
    try:
        with torch.device("meta"):
            model = subject.build_with(case.config)
    except Falsified as error:
        raise NotApplicable(f"it cannot be built on the meta device: {error.got}") from error
    blocks = subject.handles(model, case)
    yield equal(len(blocks), case.num_blocks, "number of blocks")
    shapes = {
        tuple(tuple(branch.conv.weight.shape) for branch in block.branches) for block in blocks
    }
    expected = tuple(
        (width, case.channels, kernel)
        for width, kernel in zip(case.widths, case.kernel_sizes, strict=True)
    )
    yield equal(shapes, {expected}, "weight shapes of the branches, the same in every block")
    claim = subject.target.claims.get("receptive field")
    if claim is not None:
        try:
            claimed = attempt("claimed receptive field", lambda: claim(model, case.config))
        except Falsified:
            return  # a claim may look at data, which a meta device does not have
        yield equal(claimed, case.field, "claimed receptive field")
