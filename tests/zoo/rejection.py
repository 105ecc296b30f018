"""What must be refused, and how."""

from __future__ import annotations

import math
from numbers import Integral
from typing import ClassVar

import torch
from torch import nn

from .base import Block, Stack, positive_integer
from .registry import wrong


@wrong("rejection", "fewer channels than kernels are accepted and fail in forward")
class AcceptsTooFewChannels(Stack):
    class Block(Block):
        @classmethod
        def check_channels(cls, channels, kernels):
            return positive_integer("channels", channels, f"channels={channels!r}")


@wrong("rejection", "even kernels are accepted, padded by half of themselves")
class AcceptsEvenKernels(Stack):
    class Block(Block):
        @classmethod
        def check_kernel(cls, kernel, context):
            return positive_integer("every entry of kernel_sizes", kernel, context)


@wrong("rejection", "kernels below one are replaced by one")
class RaisesKernelsToOne(Stack):
    class Block(Block):
        @classmethod
        def check_kernel(cls, kernel, context):
            if isinstance(kernel, Integral) and kernel < 1 and kernel is not False:
                kernel = 1
            return super().check_kernel(kernel, context)


@wrong("rejection", "even kernels are replaced by the next odd ones")
class MakesKernelsOdd(Stack):
    class Block(Block):
        @classmethod
        def check_kernel(cls, kernel, context):
            return positive_integer("every entry of kernel_sizes", kernel, context) | 1


@wrong("rejection", "no blocks at all are accepted and build the identity")
class AcceptsNoBlocks(Stack):
    def check_num_blocks(self, num_blocks):
        return 0 if num_blocks == 0 else super().check_num_blocks(num_blocks)


@wrong("rejection", "a negative number of blocks is accepted and builds the identity")
class AcceptsNegativeBlocks(Stack):
    def check_num_blocks(self, num_blocks):
        negative = isinstance(num_blocks, int) and num_blocks < 0
        return num_blocks if negative else super().check_num_blocks(num_blocks)


@wrong("rejection", "a dropout below zero is taken for none")
class AcceptsNegativeDropout(Stack):
    class Block(Block):
        @classmethod
        def check_dropout(cls, dropout):
            return 0.0 if dropout < 0 else super().check_dropout(dropout)


@wrong("rejection", "a dropout above one is clipped")
class ClipsDropout(Stack):
    class Block(Block):
        @classmethod
        def check_dropout(cls, dropout):
            return 1.0 if dropout > 1 else super().check_dropout(dropout)


@wrong("rejection", "NaN passes the comparison with the ends of the interval")
class AcceptsNanDropout(Stack):
    class Block(Block):
        @classmethod
        def check_dropout(cls, dropout):
            if isinstance(dropout, float) and math.isnan(dropout):
                return dropout
            return super().check_dropout(dropout)

        def make_dropout(self):
            return nn.Dropout1d(self.p) if self.p > 0 else nn.Identity()


@wrong("rejection", "bools count as integers")
class AcceptsBools(Stack):
    class Block(Block):
        @classmethod
        def check_kernel(cls, kernel, context):
            return super().check_kernel(int(kernel) if kernel is True else kernel, context)

        @classmethod
        def check_channels(cls, channels, kernels):
            return super().check_channels(1 if channels is True else channels, kernels)

    def check_num_blocks(self, num_blocks):
        return super().check_num_blocks(1 if num_blocks is True else num_blocks)


@wrong("rejection", "a number of blocks that is not an integer is truncated")
class TruncatesBlocks(Stack):
    def check_num_blocks(self, num_blocks):
        if isinstance(num_blocks, float):
            num_blocks = int(num_blocks)
        return super().check_num_blocks(num_blocks)


@wrong("rejection", "channels that are not an integer are truncated")
class TruncatesChannels(Stack):
    class Block(Block):
        @classmethod
        def check_channels(cls, channels, kernels):
            if isinstance(channels, float):
                channels = int(channels)
            return super().check_channels(channels, kernels)


@wrong("rejection", "an empty kernel list stands for the default")
class EmptyMeansDefault(Stack):
    class Block(Block):
        @classmethod
        def check_kernel_sizes(cls, kernel_sizes):
            return super().check_kernel_sizes(kernel_sizes or (3, 5, 7))


@wrong("rejection", "refusals say neither which argument nor which value")
class SilentMessage(Stack):
    def __init__(self, channels=512, num_blocks=3, kernel_sizes=(3, 5, 7), dropout=0.1):
        try:
            super().__init__(channels, num_blocks, kernel_sizes, dropout)
        except (TypeError, ValueError):
            raise ValueError("invalid configuration") from None


@wrong("rejection", "refusals name the argument but not its value")
class ValueNotNamed(Stack):
    class Block(Block):
        @classmethod
        def check_kernel(cls, kernel, context):
            return super().check_kernel(kernel, "something else in kernel_sizes")


@wrong("rejection", "refusals are assertions, gone under python -O")
class RefusesByAssertion(Stack):
    def __init__(self, channels=512, num_blocks=3, kernel_sizes=(3, 5, 7), dropout=0.1):
        try:
            super().__init__(channels, num_blocks, kernel_sizes, dropout)
        except (TypeError, ValueError) as error:
            raise AssertionError(str(error)) from None


@wrong("rejection", "even kernels are refused only when the model is first called")
class RefusesInForward(Stack):
    class Block(Block):
        @classmethod
        def check_kernel(cls, kernel, context):
            return positive_integer("every entry of kernel_sizes", kernel, context)

        def forward(self, x):
            if any(k % 2 == 0 for k in self.kernel_sizes):
                raise ValueError(f"kernel_sizes must be odd, got {self.kernel_sizes}")
            return super().forward(x)


@wrong("rejection", "an input without batch dimension is accepted")
class AcceptsUnbatched(Stack):
    def forward(self, x):
        return super().forward(x[None])[0] if x.dim() == 2 else super().forward(x)


@wrong(
    "rejection",
    "the input is not checked: with one kernel, (C, C) runs and is normalised along time",
    trigger=lambda case: len(case.kernel_sizes) == 1,
)
class UncheckedInput(Stack):
    class Block(Block):
        def check_input(self, x):
            pass

        def run_branch(self, branch, x):
            return branch(x)

        def join(self, outputs):
            return torch.cat(outputs, dim=-2)

        def fuse(self, y):
            return self.fusion[:2](y) if y.dim() == 2 else self.fusion(y)


@wrong("rejection", "an input of one channel is broadcast")
class BroadcastsChannels(Stack):
    def forward(self, x):
        if x.dim() == 3 and x.shape[1] == 1:
            x = x.expand(-1, self.channels, -1)
        return super().forward(x)


@wrong("rejection", "an input with further dimensions is flattened")
class FlattensInput(Stack):
    def forward(self, x):
        if x.dim() == 4:
            return super().forward(x.flatten(2)).view(x.shape)
        return super().forward(x)


@wrong("rejection", "surplus input channels are cut off")
class CutsChannels(Stack):
    def forward(self, x):
        return super().forward(x[:, : self.channels])


@wrong("rejection", "an input given as (batch, length, channels) is transposed silently")
class AcceptsChannelsLast(Stack):
    def forward(self, x):
        if x.dim() == 3 and x.shape[1] != self.channels and x.shape[2] == self.channels:
            x = x.transpose(1, 2)
        return super().forward(x)


@wrong("rejection", "a kernel of 1 is refused")
class RefusesKernelOne(Stack):
    class Block(Block):
        @classmethod
        def check_kernel(cls, kernel, context):
            if kernel == 1:
                raise ValueError(f"every entry of kernel_sizes must exceed 1, got {context}")
            return super().check_kernel(kernel, context)


@wrong("rejection", "a dropout of exactly 1 is refused", trigger=lambda case: case.dropout == 1)
class RefusesDropoutOne(Stack):
    class Block(Block):
        @classmethod
        def check_dropout(cls, dropout):
            if dropout == 1:
                raise ValueError(f"dropout must lie in [0, 1), got dropout={dropout!r}")
            return super().check_dropout(dropout)


@wrong("rejection", "a bare block accepts fewer channels than kernels")
class BlockAcceptsTooFewChannels(Block):
    @classmethod
    def check_channels(cls, channels, kernels):
        return positive_integer("channels", channels, f"channels={channels!r}")


@wrong("rejection", "an empty batch is answered before its shape is looked at")
class EmptyBatchUnchecked(Stack):
    def forward(self, x):
        return x.clone() if x.numel() == 0 else super().forward(x)


@wrong("rejection", "a refusal gives six kernels at most, and the one it refuses may be another")
class GivesSixKernels(Stack):
    class Block(Block):
        @classmethod
        def check_kernel(cls, kernel, context):
            try:
                return super().check_kernel(kernel, context)
            except (TypeError, ValueError) as error:
                shortened = ", ".join(context.split(", ")[:6])
                raise type(error)(f"a kernel is not odd and positive in {shortened}") from None


@wrong("rejection", "what was accepted once is not checked again, and True == 1")
class ChecksOnce(Stack):
    class Block(Block):
        accepted: ClassVar[set] = set()

        @classmethod
        def validate(cls, channels, kernel_sizes, dropout):
            asked = channels, tuple(kernel_sizes), dropout
            if asked not in cls.accepted:
                super().validate(*asked)
                cls.accepted.add(asked)
            return int(channels), tuple(map(int, asked[1])), float(dropout)


@wrong("rejection", "the kernels' integers are kept in the caller's type, where products overflow")
class KeepsNarrowIntegers(Stack):
    def __init__(self, channels=512, num_blocks=3, kernel_sizes=(3, 5, 7), dropout=0.1):
        kernel_sizes = tuple(kernel_sizes)
        super().__init__(channels, num_blocks, kernel_sizes, dropout)
        self.asked = num_blocks, max(kernel_sizes)

    def get_receptive_field(self):
        return 1 + self.asked[0] * (self.asked[1] - 1)
