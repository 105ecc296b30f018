"""What is dropped, how often, and how the rest is scaled."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function

from .base import Block, Stack
from .registry import wrong


def keep(y, shape, p):
    """A mask of this shape that keeps with probability 1 - p and scales what it keeps."""
    mask = (torch.rand(shape, device=y.device) >= p).to(y.dtype)
    return mask / (1 - p) if p < 1 else mask


@wrong("dropout", "the rate is always a half")
class AlwaysHalf(Stack):
    class Block(Block):
        def make_dropout(self):
            return nn.Dropout1d()


@wrong("dropout", "nothing is dropped")
class NeverDrops(Stack):
    class Block(Block):
        def drop(self, y):
            return y


@wrong("dropout", "single elements are dropped instead of channels")
class DropsElements(Stack):
    class Block(Block):
        def make_dropout(self):
            return nn.Dropout(self.p)


@wrong("dropout", "time steps are dropped instead of channels")
class DropsSteps(Stack):
    class Block(Block):
        def drop(self, y):
            return super().drop(y.transpose(1, 2)).transpose(1, 2)


@wrong("dropout", "whole samples are dropped instead of channels")
class DropsSamples(Stack):
    class Block(Block):
        def drop(self, y):
            if not self.training:
                return y
            return y * keep(y, (y.shape[0], 1, 1), self.p)


@wrong("dropout", "all samples of a batch share one mask")
class SharedBySamples(Stack):
    class Block(Block):
        def drop(self, y):
            if not self.training:
                return y
            return y * keep(y, (1, y.shape[1], 1), self.p)


@wrong("dropout", "all blocks of a stack share one mask")
class SharedByBlocks(Stack):
    class Block(Block):
        mask = None

        def drop(self, y):
            return y if self.mask is None else y * self.mask

    def forward(self, x):
        self.blocks[0].check_input(x)
        mask = keep(x, (*x.shape[:2], 1), self.p) if self.training else None
        for block in self.blocks:
            block.mask = mask
        y = super().forward(x)
        for block in self.blocks:
            block.mask = None
        return y


@wrong("dropout", "what is kept is not scaled")
class NotScaled(Stack):
    class Block(Block):
        def drop(self, y):
            return y * (super().drop(torch.ones_like(y[..., :1])) > 0)


@wrong("dropout", "what is kept is divided by the rate of dropping")
class ScaledByRate(Stack):
    class Block(Block):
        def drop(self, y):
            if not self.training or self.p == 0:
                return y
            return y * (super().drop(torch.ones_like(y[..., :1])) > 0) / self.p


@wrong("dropout", "what is kept is left alone, and eval scales by the rate of keeping")
class ScaledInEval(Stack):
    class Block(Block):
        def drop(self, y):
            if not self.training:
                return y * (1 - self.p)
            return y * (super().drop(torch.ones_like(y[..., :1])) > 0)


@wrong("dropout", "the rate is taken for the probability of keeping")
class RateOfKeeping(Stack):
    class Block(Block):
        def make_dropout(self):
            return nn.Dropout1d(1 - self.p)


@wrong("dropout", "eval mode drops too")
class DropsInEval(Stack):
    class Block(Block):
        def drop(self, y):
            return F.dropout1d(y, self.p, training=True)


@wrong("dropout", "the residual is dropped together with the rest")
class DropsSum(Stack):
    class Block(Block):
        def drop(self, y):
            return y

        def add(self, y, x):
            return self.fusion[2](y + x)


@wrong("dropout", "dropout comes before the BatchNorm of the fusion")
class DropsBeforeNorm(Stack):
    class Block(Block):
        def fuse(self, y):
            return self.normalise(self.fusion[1], self.drop(self.convolve(self.fusion[0], y)))


@wrong("dropout", "the branches are dropped instead of the fusion")
class DropsBranches(Stack):
    class Block(Block):
        def fuse(self, y):
            return self.normalise(self.fusion[1], self.convolve(self.fusion[0], self.drop(y)))


@wrong("dropout", "only the first block drops")
class FirstBlockOnly(Stack):
    def make_block(self, index):
        return self.Block(self.channels, self.kernel_sizes, 0.0 if index else self.p)


@wrong("dropout", "the rate grows with depth as in stochastic depth")
class RateGrows(Stack):
    def make_block(self, index):
        return self.Block(self.channels, self.kernel_sizes, self.p * (index + 1) / self.num_blocks)


@wrong("dropout", "every call draws the same mask")
class SameMaskEveryCall(Stack):
    class Block(Block):
        def drop(self, y):
            if not self.training:
                return y
            generator = torch.Generator().manual_seed(self.channels)
            mask = torch.rand((*y.shape[:2], 1), generator=generator).to(y.device) >= self.p
            return y * mask.to(y.dtype) / max(1 - self.p, 1e-3)


@wrong(
    "dropout",
    "a rate of exactly 1 drops nothing",
    trigger=lambda case: case.dropout == 1 and case.mode == "train",
)
class OneDropsNothing(Stack):
    class Block(Block):
        def drop(self, y):
            return y if self.p == 1 else super().drop(y)


@wrong("dropout", "the first channel is never dropped")
class FirstChannelKept(Stack):
    class Block(Block):
        def drop(self, y):
            return torch.cat([y[:, :1], super().drop(y)[:, 1:]], dim=1)


@wrong("dropout", "neighbouring channels are dropped in pairs")
class DropsPairs(Stack):
    class Block(Block):
        def drop(self, y):
            if not self.training:
                return y
            pairs = (y.shape[1] + 1) // 2
            mask = keep(y, (y.shape[0], pairs, 1), self.p).repeat_interleave(2, dim=1)
            return y * mask[:, : y.shape[1]]


@wrong("dropout", "a bare block drops single elements")
class BlockDropsElements(Block):
    def make_dropout(self):
        return nn.Dropout(self.p)


@wrong(
    "dropout",
    "channels-last inputs lose whole positions instead of whole channels",
    trigger=lambda case: (
        case.layout == "transposed" and case.mode == "train" and 0 < case.dropout < 1
    ),
)
class ChannelsLastDropsPositions(Stack):
    class Block(Block):
        def forward(self, x):
            self.last = x.stride(1) == 1 and x.shape[2] > 1
            return super().forward(x)

        def drop(self, y):
            if self.last:
                return super().drop(y.transpose(1, 2)).transpose(1, 2)
            return super().drop(y)


@wrong("dropout", "each channel is dropped in the same number of samples")
class BalancedOverTheBatch(Stack):
    class Block(Block):
        def drop(self, y):
            if not self.training or self.p in (0, 1):
                return super().drop(y)
            kept = int(y.shape[0] * (1 - self.p) + torch.rand(()).item())
            order = torch.rand(y.shape[:2], device=y.device).argsort(0).argsort(0)
            return y * (order < kept).to(y.dtype)[:, :, None] / (1 - self.p)


@wrong("dropout", "a block whose parameters are all frozen is taken for one in eval mode")
class FrozenBlocksDropNothing(Stack):
    class Block(Block):
        def drop(self, y):
            learns = any(p.requires_grad for p in self.parameters())
            return super().drop(y) if learns else y


@wrong("dropout", "a shift that is folded into the convolution is added behind dropout")
class FrozenShiftIsNotDropped(Stack):
    class Block(Block):
        def fuse(self, y):
            conv, norm, _ = self.fusion
            if norm.training:
                return super().fuse(y)
            shift = norm.bias[:, None]
            return self.drop(norm(conv(y)) - shift) + shift


@wrong("dropout", "a batch that is one sample expanded is computed once, and so is its mask")
class OneMaskForExpandedBatch(Stack):
    class Block(Block):
        def forward(self, x):
            self.alike = len(x) > 1 and x.stride(0) == 0
            return super().forward(x)

        def drop(self, y):
            if not (self.training and self.alike):
                return super().drop(y)
            return y * keep(y, (1, y.shape[1], 1), self.p)


@wrong("dropout", "masks are drawn from one of a thousand seeds")
class FewMasks(Stack):
    class Block(Block):
        def drop(self, y):
            if not self.training or self.p in (0, 1) or not y.numel() or y.is_meta:
                return super().drop(y)
            generator = torch.Generator().manual_seed(int(torch.randint(1000, ())))
            kept = torch.rand(*y.shape[:2], 1, generator=generator) >= self.p
            return y * (kept.to(y.dtype) / (1 - self.p)).to(y.device)


class UnmaskedDropout(Function):
    """Multiplication by a mask that the backward pass forgets."""

    @staticmethod
    def forward(ctx, x, mask):
        return x * mask

    @staticmethod
    def backward(ctx, grad):
        return grad, None


@wrong("dropout", "the gradient of dropout forgets the mask")
class UnmaskedGradient(Stack):
    class Block(Block):
        def drop(self, y):
            if not self.training:
                return y
            return UnmaskedDropout.apply(y, super().drop(torch.ones_like(y[..., :1])))


class MaskOfTheOutput(Function):
    """Dropout whose backward pass takes for dropped what is zero."""

    @staticmethod
    def forward(ctx, y, p):
        dropped = y * keep(y, (*y.shape[:2], 1), p)
        ctx.save_for_backward(dropped)
        ctx.scale = 1 / (1 - p) if p < 1 else 0.0
        return dropped

    @staticmethod
    def backward(ctx, gradient):
        (dropped,) = ctx.saved_tensors
        return gradient * (dropped != 0).any(dim=2, keepdim=True) * ctx.scale, None


@wrong("dropout", "a channel that is zero before dropout has no gradient, as if it were dropped")
class ZeroChannelsLearnNothing(Stack):
    class Block(Block):
        def drop(self, y):
            if not self.training or not torch.is_grad_enabled() or self.p == 0:
                return super().drop(y)
            return MaskOfTheOutput.apply(y, self.p)


@wrong("dropout", "what a frozen fusion norm adds is added after dropout")
class AddsOffsetAfterDropout(Stack):
    class Block(Block):
        def fuse(self, y):
            norm = self.fusion[1]
            if norm.training or not self.training:
                return super().fuse(y)
            scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
            offset = norm.bias - norm.running_mean * scale
            return self.drop(self.convolve(self.fusion[0], y) * scale[:, None]) + offset[:, None]
