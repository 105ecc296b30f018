"""How the channels are divided among the branches."""

from __future__ import annotations

import math
from itertools import accumulate, pairwise

import torch
from torch import nn

from .base import Block, Stack
from .registry import wrong


@wrong("split", "the remainder goes to the first branch")
class RemainderToFirst(Stack):
    class Block(Block):
        def widths(self):
            return super().widths()[::-1]


@wrong("split", "the remainder is spread over the first branches, as numpy.array_split does")
class RemainderSpread(Stack):
    class Block(Block):
        def widths(self):
            width, rest = divmod(self.channels, len(self.kernel_sizes))
            return [width + (i < rest) for i in range(len(self.kernel_sizes))]


@wrong("split", "the remainder is dropped, the fusion makes up for it")
class RemainderDropped(Stack):
    class Block(Block):
        def widths(self):
            n = len(self.kernel_sizes)
            return [self.channels // n] * n

        def make_fusion(self):
            conv = nn.Conv1d(sum(self.widths()), self.channels, 1)
            return nn.Sequential(conv, self.make_norm(self.channels), self.make_dropout())


@wrong("split", "widths are rounded up and the last branch gets what is left")
class RoundedUp(Stack):
    class Block(Block):
        def widths(self):
            n = len(self.kernel_sizes)
            width = math.ceil(self.channels / n)
            return [width] * (n - 1) + [self.channels - width * (n - 1)]


@wrong("split", "widths are rounded to the nearest integer instead of down")
class RoundedToNearest(Stack):
    class Block(Block):
        def widths(self):
            n = len(self.kernel_sizes)
            width = int(self.channels / n + 0.5)
            if width * (n - 1) >= self.channels:
                return super().widths()
            return [width] * (n - 1) + [self.channels - width * (n - 1)]


@wrong("split", "widths follow cumulative rounded boundaries, i * channels // n")
class CumulativeBoundaries(Stack):
    class Block(Block):
        def widths(self):
            n = len(self.kernel_sizes)
            bounds = [i * self.channels // n for i in range(n + 1)]
            return [stop - start for start, stop in pairwise(bounds)]


@wrong("split", "widths are proportional to the kernel sizes")
class ProportionalToKernel(Stack):
    class Block(Block):
        def widths(self):
            total = sum(self.kernel_sizes)
            widths = [max(1, self.channels * k // total) for k in self.kernel_sizes[:-1]]
            left = self.channels - sum(widths)
            return [*widths, left] if left > 0 else super().widths()


@wrong("split", "the remainder goes to the branch with the widest kernel")
class RemainderToWidest(Stack):
    class Block(Block):
        def widths(self):
            width, rest = divmod(self.channels, len(self.kernel_sizes))
            widths = [width] * len(self.kernel_sizes)
            widths[self.kernel_sizes.index(max(self.kernel_sizes))] += rest
            return widths


@wrong("split", "every branch has all channels, the fusion reduces their number")
class EveryBranchFull(Stack):
    class Block(Block):
        def widths(self):
            return [self.channels] * len(self.kernel_sizes)

        def make_fusion(self):
            conv = nn.Conv1d(sum(self.widths()), self.channels, 1)
            return nn.Sequential(conv, self.make_norm(self.channels), self.make_dropout())


@wrong(
    "split",
    "widths of 16 and more are rounded down to multiples of 8",
    trigger=lambda case: (
        len(case.kernel_sizes) > 1
        and case.channels // len(case.kernel_sizes) >= 16
        and case.channels // len(case.kernel_sizes) % 8 > 0
    ),
)
class MultiplesOfEight(Stack):
    class Block(Block):
        def widths(self):
            n = len(self.kernel_sizes)
            width = self.channels // n
            if width >= 16:
                width -= width % 8
            return [width] * (n - 1) + [self.channels - width * (n - 1)]


@wrong("split", "each branch halves what is left, so only two branches are split evenly")
class HalvesWhatIsLeft(Stack):
    class Block(Block):
        def widths(self):
            n = len(self.kernel_sizes)
            left, widths = self.channels, []
            for i in range(n - 1):
                widths.append(max(1, min(left // 2, left - (n - 1 - i))))
                left -= widths[-1]
            return [*widths, left]


@wrong("split", "each branch reads only its own group of the input channels")
class SplitsTheInput(Stack):
    class Block(Block):
        def run_branches(self, x):
            starts = accumulate(self.widths(), initial=0)
            masked = []
            for start, width in zip(starts, self.widths(), strict=False):
                group = torch.zeros_like(x)
                group[:, start : start + width] = x[:, start : start + width]
                masked.append(group)
            pairs = zip(self.branches, masked, strict=True)
            return [self.run_branch(branch, group) for branch, group in pairs]


@wrong("split", "a bare block gives the remainder to the first branch")
class BlockRemainderToFirst(Block):
    def widths(self):
        return super().widths()[::-1]
