"""Right values with wrong derivatives."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

from .base import Block, Stack, affine, batch_norm, update_statistics
from .registry import wrong


class ScaledGradient(Function):
    """The identity, with its gradient multiplied by a factor."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


class ClippedGradient(Function):
    """The identity, with its gradient clipped to [-1, 1]."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad.clamp(-1, 1)


class ReluPassingAbove(Function):
    """ReLU whose derivative is 1 on `lower` < x < `upper` and 0 elsewhere."""

    @staticmethod
    def forward(ctx, x, lower, upper):
        ctx.save_for_backward(x)
        ctx.bounds = lower, upper
        return torch.relu(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        lower, upper = ctx.bounds
        return grad * ((x > lower) & (x < upper)), None, None


class ReluFromGradientSign(Function):
    """ReLU with the guided backward pass, which also cuts negative gradients."""

    @staticmethod
    def forward(ctx, x):
        y = torch.relu(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return grad.clamp(min=0) * (y > 0)


@wrong("gradients", "the residual is detached")
class DetachedResidual(Stack):
    class Block(Block):
        def add(self, y, x):
            return y + x.detach()


@wrong("gradients", "the branches see a detached input")
class DetachedBranches(Stack):
    class Block(Block):
        def run_branches(self, x):
            return super().run_branches(x.detach())


@wrong("gradients", "the first branch runs without gradients")
class FirstBranchFrozen(Stack):
    class Block(Block):
        def run_branches(self, x):
            first, *others = self.branches
            with torch.no_grad():
                y = self.run_branch(first, x)
            return [y, *(self.run_branch(branch, x) for branch in others)]


@wrong("gradients", "the gradient of the residual function is halved")
class HalvedGradient(Stack):
    class Block(Block):
        def fuse(self, y):
            return ScaledGradient.apply(super().fuse(y), 0.5)


@wrong("gradients", "gradients are divided by the batch size")
class GradientByBatch(Stack):
    def forward(self, x):
        return ScaledGradient.apply(super().forward(x), 1 / max(1, x.shape[0]))


@wrong("gradients", "gradients are clipped to [-1, 1] on their way through each block")
class ClippedGradients(Stack):
    class Block(Block):
        def activate(self, y):
            return ClippedGradient.apply(super().activate(y))


@wrong("gradients", "the final ReLU passes every gradient")
class StraightThrough(Stack):
    class Block(Block):
        def activate(self, y):
            return ReluPassingAbove.apply(y, -torch.inf, torch.inf)


@wrong("gradients", "the derivative of the ReLU in the branches is zero above 6")
class DeadAboveSix(Stack):
    class Block(Block):
        def rectify(self, x):
            return ReluPassingAbove.apply(x, 0, 6)


@wrong("gradients", "the ReLU cuts negative gradients too")
class GuidedRelu(Stack):
    class Block(Block):
        def activate(self, y):
            return ReluFromGradientSign.apply(y)


@wrong("gradients", "the fusion weights are frozen")
class FrozenFusion(Stack):
    class Block(Block):
        def make_fusion(self):
            fusion = super().make_fusion()
            fusion[0].weight.requires_grad_(False)
            return fusion


@wrong("gradients", "the weights of the branches enter as data, so they never learn")
class WeightsAsData(Stack):
    class Block(Block):
        def convolve(self, conv, x):
            return F.conv1d(x, conv.weight.data, conv.bias, padding=conv.padding)


@wrong("gradients", "weight gradients come out doubled, input gradients right")
class DoubledWeightGradient(Stack):
    class Block(Block):
        def convolve(self, conv, x):
            weight = ScaledGradient.apply(conv.weight, 2.0)
            return F.conv1d(x, weight, conv.bias, padding=conv.padding)


@wrong("gradients", "batch statistics count as constants in training")
class DetachedStatistics(Stack):
    class Block(Block):
        def normalise(self, norm, x):
            if not norm.training:
                return norm(x)
            var, mean = torch.var_mean(x.detach(), (0, 2), unbiased=False)
            count = x.shape[0] * x.shape[2]
            update_statistics(norm, mean, var * count / (count - 1))
            return affine(norm, x, mean, torch.sqrt(var + norm.eps))


@wrong(
    "gradients",
    "the gradient stops after the last four blocks",
    trigger=lambda case: case.num_blocks > 4,
)
class TruncatedDepth(Stack):
    def forward(self, x):
        for index, block in enumerate(self.blocks):
            x = block(x.detach() if index and index == self.num_blocks - 4 else x)
        return x


@wrong(
    "gradients",
    "steps more than 256 from the end get no gradient",
    trigger=lambda case: case.length > 256,
)
class TruncatedTime(Stack):
    def forward(self, x):
        if x.dim() == 3:
            x = torch.cat([x[..., :-256].detach(), x[..., -256:]], dim=2)
        return super().forward(x)


@wrong("gradients", "a checkpoint recomputes the block with another dropout mask")
class CheckpointNewMask(Stack):
    class Block(Block):
        def fuse(self, y):
            if not self.training:
                return super().fuse(y)
            y = self.normalise(self.fusion[1], self.convolve(self.fusion[0], y))
            return checkpoint(self.drop, y, use_reentrant=False, preserve_rng_state=False)


@wrong("gradients", "float16 gradients stay multiplied by the loss scale")
class LossScaleLeft(Stack):
    def forward(self, x):
        y = super().forward(x)
        return ScaledGradient.apply(y, 16.0) if x.dtype is torch.float16 else y


@wrong("gradients", "the first and the last step pass no gradient to the branches")
class EdgeGradientMissing(Stack):
    class Block(Block):
        def fuse(self, y):
            y = super().fuse(y)
            if y.shape[2] < 3:
                return y
            return torch.cat([y[..., :1].detach(), y[..., 1:-1], y[..., -1:].detach()], dim=2)


@wrong("gradients", "a bare block detaches its residual")
class BlockDetachedResidual(Block):
    def add(self, y, x):
        return y + x.detach()


class MaskInBuffer(Function):
    """ReLU whose mask is kept outside the graph."""

    @staticmethod
    def forward(ctx, x, kept):
        kept["mask"] = x > 0
        ctx.kept = kept
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.kept["mask"], None


@wrong("gradients", "a ReLU keeps its mask in the block, where the next pass overwrites it")
class OneMaskForAllPasses(Stack):
    class Block(Block):
        def build(self):
            super().build()
            self.kept = {}

        def activate(self, y):
            return MaskInBuffer.apply(y, self.kept)


@wrong("gradients", "a ReLU of many values keeps its mask in the block")
class OneMaskWhereLarge(Stack):
    class Block(OneMaskForAllPasses.Block):
        def activate(self, y):
            return super().activate(y) if y.numel() >= 2**16 else torch.relu(y)


class AddReluInPlace(Function):
    """relu(y + x) that masks the gradient where it stands."""

    @staticmethod
    def forward(ctx, y, x):
        out = (y + x).clamp(min=0)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx, gradient):
        (out,) = ctx.saved_tensors
        gradient[out <= 0] = 0
        return gradient, gradient


@wrong("gradients", "the backward pass masks the caller's gradient in place")
class ChangesIncomingGradient(Stack):
    class Block(Block):
        def forward(self, x):
            self.check_input(x)
            return AddReluInPlace.apply(self.fuse(self.join(self.run_branches(x))), x)


@wrong("gradients", "frozen convolutions take the norms behind them along")
class FrozenConvolutionsFreezeNorms(Stack):
    class Block(Block):
        def run_branches(self, x):
            learns = x.requires_grad or any(b[0].weight.requires_grad for b in self.branches)
            with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
                return super().run_branches(x)


@wrong("gradients", "behind a frozen scale the batch's statistics are taken for constants")
class FrozenScaleFreezesStatistics(Stack):
    class Block(Block):
        def normalise(self, norm, x):
            if not norm.training or norm.weight.requires_grad:
                return norm(x)
            batch_norm(norm, x)
            mean, var = x.mean((0, 2)).detach(), x.var((0, 2), unbiased=False).detach()
            return affine(norm, x, mean, torch.sqrt(var + norm.eps))


class MaskAsScratch(Function):
    """A ReLU whose backward pass computes in the mask that it has kept."""

    @staticmethod
    def forward(ctx, x):
        ctx.mask = (x > 0).to(x.dtype)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.mask.mul_(gradient)


@wrong("gradients", "the backward pass overwrites what a second one through the same graph needs")
class OneBackwardPerGraph(Stack):
    class Block(Block):
        def activate(self, y):
            return MaskAsScratch.apply(y)


@wrong(
    "gradients",
    "what backward needs of long signals is kept in bfloat16",
    trigger=lambda case: case.length > 1024 and case.dtype == "float32",
)
class SavesInBfloat16(Stack):
    def forward(self, x):
        def pack(t):
            long = t.dim() == 3 and t.shape[2] > 1024 and t.dtype == torch.float32
            return t.bfloat16() if long else t

        def unpack(t):
            return t.float() if t.dtype == torch.bfloat16 and x.dtype == torch.float32 else t

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return super().forward(x)


class KeptOnContext(Function):
    """A convolution that keeps its input where autograd does not see that it is changed."""

    @staticmethod
    def forward(ctx, x, weight, bias, padding):
        ctx.kept = x, weight, padding
        return F.conv1d(x, weight, bias, padding=padding)

    @staticmethod
    def backward(ctx, gradient):
        x, weight, padding = ctx.kept
        wanted = list(ctx.needs_input_grad[:3])
        sizes = [weight.shape[0]]
        found = torch.ops.aten.convolution_backward(
            gradient, x, weight, sizes, [1], [padding], [1], False, [0], 1, wanted
        )
        return (*found, None)


@wrong("gradients", "an input that is changed before backward gives the gradients of the new one")
class ForgetsWhatWasChanged(Stack):
    class Block(Block):
        def convolve(self, conv, x):
            return KeptOnContext.apply(x, conv.weight, conv.bias, conv.padding[0])


class StatisticsAreConstants(Function):
    """Batch norm whose backward pass is right, but not made to be differentiated again."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        var, mean = torch.var_mean(x, (0, 2), unbiased=False)
        inverse = (var + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, inverse)
        return (x - mean[:, None]) * (inverse * weight)[:, None] + bias[:, None]

    @staticmethod
    def backward(ctx, gradient):
        x, weight, mean, inverse = ctx.saved_tensors
        normal = (x - mean[:, None]) * inverse[:, None]
        shift, scale = gradient.sum((0, 2)), (gradient * normal).sum((0, 2))
        count = x.shape[0] * x.shape[2]
        centred = gradient - shift[:, None] / count - normal * scale[:, None] / count
        return centred * (weight * inverse)[:, None], scale, shift, None


@wrong("gradients", "second derivatives in train mode take the batch's statistics for constants")
class SecondDerivativesWithoutStatistics(Stack):
    class Block(Block):
        def normalise(self, norm, x):
            if not norm.training:
                return norm(x)
            batch_norm(norm, x.detach())
            return StatisticsAreConstants.apply(x, norm.weight, norm.bias, norm.eps)


@wrong("gradients", "second derivatives at large inputs take the batch's statistics for constants")
class SecondDerivativesWhereLarge(Stack):
    class Block(SecondDerivativesWithoutStatistics.Block):
        def normalise(self, norm, x):
            return super().normalise(norm, x) if x.numel() >= 2**15 else norm(x)


class AddsToItsOwnWeight(Function):
    """A 1×1 convolution whose backward pass adds to the weight's gradient by itself."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return F.conv1d(x, weight)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        own = torch.einsum("bol,bil->oi", gradient, x)[:, :, None]
        weight.grad = own if weight.grad is None else weight.grad + own
        return torch.einsum("bol,oi->bil", gradient, weight[:, :, 0]), None


@wrong("gradients", "the fusion's weight gets its gradient where backward runs, whoever wanted it")
class AccumulatesByItself(Stack):
    class Block(Block):
        def convolve(self, conv, x):
            weight = conv.weight
            if conv is not self.fusion[0] or not (weight.requires_grad and weight.is_leaf):
                return conv(x)
            return AddsToItsOwnWeight.apply(x, weight) + conv.bias[:, None]


@wrong(
    "gradients",
    "blocks are run again for backward where the input is large, and learn twice",
    trigger=lambda case: case.mode == "train" and case.batch * case.channels * case.length >= 2**18,
)
class LearnsTwiceWhereLarge(Stack):
    def forward(self, x):
        if not (self.training and torch.is_grad_enabled() and x.numel() >= 2**18):
            return super().forward(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


class MaskedSum(Function):
    """relu(x + y) that recomputes its mask from what its arguments hold when backward runs."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.arguments = x, y
        return torch.relu(x + y)

    @staticmethod
    def backward(ctx, gradient):
        x, y = ctx.arguments
        gradient = gradient * (x + y > 0)
        return gradient.to(x.dtype), gradient.to(y.dtype)


@wrong("gradients", "the last mask is made from the input that there is when backward runs")
class MaskOfALaterInput(Stack):
    class Block(Block):
        def add(self, y, x):
            return y, x

        def activate(self, pair):
            y, x = pair
            if y.dtype == x.dtype:
                return torch.relu(y + x)
            return MaskedSum.apply(x, y)


@wrong("gradients", "a forward pass clears the gradients collected so far")
class ClearsGradients(Stack):
    def forward(self, x):
        if self.training:
            self.zero_grad()
        return super().forward(x)
