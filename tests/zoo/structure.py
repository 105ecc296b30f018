"""Which layers there are and how they are put together."""

from __future__ import annotations

from math import gcd

from torch import nn

from .base import Block, Stack
from .registry import wrong


@wrong("structure", "one block is used for every position of the stack")
class SharedBlocks(Stack):
    def build(self):
        self.blocks = nn.ModuleList([self.make_block(0)] * self.num_blocks)


@wrong("structure", "all kernels are 3, whatever kernel_sizes says")
class AllKernelsThree(Stack):
    class Block(Block):
        def make_conv(self, width, kernel):
            return super().make_conv(width, 3)


@wrong("structure", "no BatchNorm after the fusion")
class NoFusionNorm(Stack):
    class Block(Block):
        def make_fusion(self):
            conv = nn.Conv1d(self.channels, self.channels, 1)
            return nn.Sequential(conv, nn.Identity(), self.make_dropout())


@wrong("structure", "no BatchNorm in the branches")
class NoBranchNorm(Stack):
    class Block(Block):
        def make_branch(self, width, kernel):
            return nn.Sequential(self.make_conv(width, kernel), nn.Identity(), nn.ReLU())


@wrong("structure", "no ReLU in the branches")
class NoBranchRelu(Stack):
    class Block(Block):
        def rectify(self, x):
            return x


@wrong("structure", "a ReLU follows the fusion's BatchNorm")
class ReluAfterFusion(Stack):
    class Block(Block):
        def fuse(self, y):
            return self.rectify(super().fuse(y))


@wrong("structure", "the fusion convolution has kernel 3")
class FusionKernelThree(Stack):
    class Block(Block):
        def make_fusion(self):
            conv = nn.Conv1d(self.channels, self.channels, 3, padding=1)
            return nn.Sequential(conv, self.make_norm(self.channels), self.make_dropout())


@wrong("structure", "a fourth and further kernel is ignored")
class IgnoresFourthKernel(Stack):
    class Block(Block):
        @classmethod
        def validate(cls, channels, kernel_sizes, dropout):
            channels, kernels, dropout = super().validate(channels, kernel_sizes, dropout)
            return channels, kernels[:3], dropout


@wrong("structure", "branches are kept by kernel size, so a repeated kernel shares its weights")
class RepeatedKernelShares(Stack):
    class Block(Block):
        def make_branches(self):
            known = {}
            pairs = zip(self.widths(), self.kernel_sizes, strict=True)
            return nn.ModuleList(known.setdefault(pair, self.make_branch(*pair)) for pair in pairs)


@wrong("structure", "repeated kernels are merged into one branch")
class RepeatedKernelsMerged(Stack):
    class Block(Block):
        @classmethod
        def validate(cls, channels, kernel_sizes, dropout):
            channels, kernels, dropout = super().validate(channels, kernel_sizes, dropout)
            return channels, tuple(dict.fromkeys(kernels)), dropout


@wrong("structure", "kernels are sorted first")
class SortsKernels(Stack):
    class Block(Block):
        @classmethod
        def check_kernel_sizes(cls, kernel_sizes):
            return tuple(sorted(super().check_kernel_sizes(kernel_sizes)))


@wrong("structure", "the default is four blocks")
class FourBlocksByDefault(Stack):
    def __init__(self, channels=512, num_blocks=4, kernel_sizes=(3, 5, 7), dropout=0.1):
        super().__init__(channels, num_blocks, kernel_sizes, dropout)


@wrong(
    "structure",
    "a stack has at most four blocks",
    trigger=lambda case: case.num_blocks > 4,
)
class AtMostFourBlocks(Stack):
    def build(self):
        self.blocks = nn.ModuleList(self.make_block(i) for i in range(min(4, self.num_blocks)))


@wrong("structure", "the fusion is grouped where the channels allow it, so branches never mix")
class GroupedFusion(Stack):
    class Block(Block):
        def make_fusion(self):
            groups = gcd(self.channels, len(self.kernel_sizes))
            conv = nn.Conv1d(self.channels, self.channels, 1, groups=groups)
            return nn.Sequential(conv, self.make_norm(self.channels), self.make_dropout())


@wrong("structure", "the blocks run in reverse order")
class BlocksReversed(Stack):
    def forward(self, x):
        for block in reversed(self.blocks):
            x = block(x)
        return x


@wrong("structure", "the norm is an instance norm with running statistics declared")
class InstanceNorm(Stack):
    class Block(Block):
        def make_norm(self, width):
            return nn.InstanceNorm1d(width, affine=True, track_running_stats=True)


@wrong("structure", "the norm is a group norm with one group")
class GroupNorm(Stack):
    class Block(Block):
        def make_norm(self, width):
            return nn.GroupNorm(1, width)


@wrong("structure", "the norm has neither scale nor shift")
class NormWithoutAffine(Stack):
    class Block(Block):
        def make_norm(self, width):
            return nn.BatchNorm1d(width, affine=False)


@wrong("structure", "one BatchNorm object is shared by the branches of equal width")
class SharedBranchNorm(Stack):
    class Block(Block):
        def build(self):
            self.norms = {}
            super().build()
            del self.norms

        def make_branch(self, width, kernel):
            norm = self.norms.setdefault(width, self.make_norm(width))
            return nn.Sequential(self.make_conv(width, kernel), norm, nn.ReLU())
