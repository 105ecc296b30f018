"""How far an output sees, and what the class says about it."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from .base import Block, Stack
from .registry import wrong


@wrong("receptive_field", "19 is reported whatever the configuration")
class ReportsNineteen(Stack):
    def get_receptive_field(self):
        return 19


@wrong("receptive_field", "the number of blocks is left out of the report")
class ReportsOneBlock(Stack):
    def get_receptive_field(self):
        return max(self.kernel_sizes)


@wrong("receptive_field", "the report is off by one")
class ReportsOneLess(Stack):
    def get_receptive_field(self):
        return super().get_receptive_field() - 1


@wrong("receptive_field", "the report adds whole kernels instead of kernels less one")
class ReportsSumOfKernels(Stack):
    def get_receptive_field(self):
        return self.num_blocks * max(self.kernel_sizes)


@wrong("receptive_field", "the report takes the last kernel for the widest")
class ReportsLastKernel(Stack):
    def get_receptive_field(self):
        return 1 + self.num_blocks * (self.kernel_sizes[-1] - 1)


@wrong("receptive_field", "the report counts the branches as if they came one after the other")
class ReportsSerialBranches(Stack):
    def get_receptive_field(self):
        return 1 + self.num_blocks * sum(k - 1 for k in self.kernel_sizes)


@wrong("receptive_field", "the report of the first model is kept for all later ones")
class ReportsFirstModel(Stack):
    reported: ClassVar[list[int]] = []

    def get_receptive_field(self):
        if not self.reported:
            self.reported.append(super().get_receptive_field())
        return self.reported[0]


@wrong(
    "receptive_field",
    "the report grows no more after five blocks",
    trigger=lambda case: case.num_blocks > 5 and max(case.kernel_sizes) > 1,
)
class ReportsAtMostFiveBlocks(Stack):
    def get_receptive_field(self):
        return 1 + min(5, self.num_blocks) * (max(self.kernel_sizes) - 1)


@wrong("receptive_field", "kernels are dilated by two from the second block on")
class DilatedLaterBlocks(Stack):
    def make_block(self, index):
        block = super().make_block(index)
        if index:
            for conv, *_ in block.branches:
                conv.dilation = (2,)
                conv.padding = (conv.kernel_size[0] // 2 * 2,)
                conv._reversed_padding_repeated_twice = [conv.padding[0]] * 2
        return block


@wrong("receptive_field", "padding is on the left only")
class Causal(Stack):
    class Block(Block):
        def padding(self, kernel):
            return 0

        def convolve(self, conv, x):
            return conv(F.pad(x, (conv.kernel_size[0] - 1, 0)))


@wrong("receptive_field", "the window is off centre by one step for kernels of 5 and more")
class OffCentre(Stack):
    class Block(Block):
        def padding(self, kernel):
            return 0

        def convolve(self, conv, x):
            side = conv.kernel_size[0] // 2
            shift = int(side > 1)
            return conv(F.pad(x, (side + shift, side - shift)))


@wrong(
    "receptive_field",
    "the outermost taps of kernels of 9 and more are masked",
    trigger=lambda case: max(case.kernel_sizes) >= 9 and case.length >= 5,
)
class MasksOuterTaps(Stack):
    class Block(Block):
        def convolve(self, conv, x):
            weight = conv.weight
            if weight.shape[2] >= 9:
                weight = F.pad(weight[..., 1:-1], (1, 1))
            return F.conv1d(x, weight, conv.bias, padding=conv.padding)


@wrong("receptive_field", "circular padding")
class CircularPadding(Stack):
    class Block(Block):
        def make_conv(self, width, kernel):
            padding = self.padding(kernel)
            return nn.Conv1d(self.channels, width, kernel, padding=padding, padding_mode="circular")


@wrong("receptive_field", "the last tap is never used")
class LastTapIgnored(Stack):
    class Block(Block):
        def convolve(self, conv, x):
            if conv.kernel_size[0] == 1:
                return conv(x)
            weight = F.pad(conv.weight[..., :-1], (0, 1))
            return F.conv1d(x, weight, conv.bias, padding=conv.padding)


@wrong("receptive_field", "a bare block reports the radius instead of the width")
class BlockReportsRadius(Block):
    def get_receptive_field(self):
        return max(self.kernel_sizes) // 2


@wrong("receptive_field", "the edge value is repeated as padding")
class ReplicatePadding(Stack):
    class Block(Block):
        def make_conv(self, width, kernel):
            padding = self.padding(kernel)
            return nn.Conv1d(
                self.channels, width, kernel, padding=padding, padding_mode="replicate"
            )


@wrong("receptive_field", "the ReLU selects by comparison and so turns NaN into zero")
class ReluSwallowsNan(Stack):
    class Block(Block):
        def activate(self, y):
            return torch.where(y > 0, y, torch.zeros_like(y))
