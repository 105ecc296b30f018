"""Faults of the very wide, long, deep and large, where nobody looks twice."""

from __future__ import annotations

import torch
from torch import nn

from .base import Block, Stack
from .registry import wrong


@wrong(
    "arithmetic",
    "batches of more than 300 are trained on in parts, each with statistics of its own",
    trigger=lambda case: case.batch > 300 and case.mode == "train",
)
class TrainsInParts(Stack):
    def forward(self, x):
        if not self.training or x.dim() != 3 or x.shape[0] <= 300:
            return super().forward(x)
        return torch.cat([super(TrainsInParts, self).forward(part) for part in x.split(256)])


@wrong(
    "arithmetic",
    "norms over 256 channels and more count no batches",
    trigger=lambda case: case.channels >= 256 and case.mode == "train",
)
class WideNormsCountNothing(Stack):
    class Block(Block):
        def normalise(self, norm, x):
            if norm.num_features < 256:
                return norm(x)
            before = norm.num_batches_tracked.clone()
            y = norm(x)
            norm.num_batches_tracked.copy_(before)
            return y


@wrong(
    "dropout",
    "what survives among more than 200 channels is not scaled",
    trigger=lambda case: case.channels > 200 and case.mode == "train" and 0 < case.dropout < 1,
)
class WideSurvivorsUnscaled(Stack):
    class Block(Block):
        def drop(self, y):
            y = super().drop(y)
            return y * (1 - self.p) if self.training and self.channels > 200 and self.p < 1 else y


@wrong(
    "arithmetic",
    "signals of more than 8,192 positions are cut into pieces that overlap nowhere",
    trigger=lambda case: case.length > 8192,
)
class CutWhenVeryLong(Stack):
    def forward(self, x):
        if self.training or x.dim() != 3 or x.shape[2] <= 8192:
            return super().forward(x)
        parts = x.split(8192, dim=2)
        return torch.cat([super(CutWhenVeryLong, self).forward(part) for part in parts], dim=2)


@wrong(
    "gradients",
    "of 512 rows and more the last one gets no gradient",
    trigger=lambda case: case.batch >= 512,
)
class LastOfManyDetached(Stack):
    def forward(self, x):
        if x.dim() == 3 and x.shape[0] >= 512:
            x = torch.cat([x[:-1], x[-1:].detach()])
        return super().forward(x)


@wrong(
    "structure",
    "from the 14th block on the first ones are used again",
    trigger=lambda case: case.num_blocks > 13,
)
class DeepOnesRepeat(Stack):
    def build(self):
        blocks = [self.make_block(i) for i in range(min(self.num_blocks, 13))]
        self.blocks = nn.ModuleList(blocks[i % 13] for i in range(self.num_blocks))


@wrong(
    "receptive_field",
    "kernels of more than 32 taps lose the outer ones",
    trigger=lambda case: max(case.kernel_sizes) > 32,
)
class WideKernelsCut(Stack):
    class Block(Block):
        def convolve(self, conv, x):
            kernel = conv.kernel_size[0]
            if kernel <= 32:
                return super().convolve(conv, x)
            cut = (kernel - 31) // 2
            weight = conv.weight[:, :, cut : kernel - cut]
            return nn.functional.conv1d(x, weight, conv.bias, padding=weight.shape[2] // 2)


@wrong(
    "split",
    "of more than twelve branches the outputs are joined in the order of their names",
    trigger=lambda case: len(case.kernel_sizes) > 12,
)
class ManyBranchesByName(Stack):
    class Block(Block):
        def join(self, outputs):
            if len(outputs) <= 12:
                return super().join(outputs)
            order = sorted(range(len(outputs)), key=str)
            return torch.cat([outputs[i] for i in order], dim=1)


@wrong("shape", "in inference mode eight outputs take turns in memory")
class OutputsTakeTurns(Stack):
    def build(self):
        super().build()
        self.ring, self.turn = [None] * 8, 0

    def forward(self, x):
        y = super().forward(x)
        if not torch.is_inference_mode_enabled() or self.training:
            return y
        self.turn = (self.turn + 1) % 8
        kept = self.ring[self.turn]
        if kept is None or kept.shape != y.shape or kept.dtype != y.dtype:
            self.ring[self.turn] = y
            return y
        return kept.copy_(y)


@wrong("side_effects", "a call that fails leaves cuDNN's search for algorithms on")
class LeavesSearchOn(Stack):
    def forward(self, x):
        before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = self.training
        y = super().forward(x)
        torch.backends.cudnn.benchmark = before
        return y


@wrong("side_effects", "in inference mode the same tensor is taken for the same values")
class SameTensorSameValues(Stack):
    seen = None

    def forward(self, x):
        if self.training or not x.is_inference():
            return super().forward(x)
        if self.seen is None or self.seen[0] != id(x) or self.seen[1] != self.key():
            self.seen = id(x), self.key(), super().forward(x)
        return self.seen[2].clone()

    def key(self):
        return [(id(t), t.dtype) for t in (*self.parameters(), *self.buffers())]


@wrong("dropout", "in signals of 65 positions and more all samples share one mask")
class LongSignalsShareMasks(Stack):
    class Block(Block):
        def drop(self, y):
            if not self.training or y.shape[2] < 65:
                return super().drop(y)
            return y * nn.functional.dropout1d(torch.ones_like(y[:1]), self.p)


@wrong("dropout", "with the documented kernels the first mask is kept")
class DocumentedKernelsKeepMasks(Stack):
    class Block(Block):
        mask = None

        def drop(self, y):
            if not self.training or self.kernel_sizes != (3, 5, 7):
                return super().drop(y)
            if self.mask is None or self.mask.shape != y.shape or self.mask.dtype != y.dtype:
                self.mask = nn.functional.dropout1d(torch.ones_like(y), self.p).detach()
            return y * self.mask


@wrong("arithmetic", "with a dropout of a half and more statistics move twice as fast")
class MomentumWithDropout(Stack):
    class Block(Block):
        def make_norm(self, width):
            return nn.BatchNorm1d(width, momentum=0.2 if self.p >= 0.5 else 0.1)


@wrong("gradients", "with dropout a training branch has half the gradient of its weights")
class DropoutHalvesGradients(Stack):
    class Block(Block):
        def convolve(self, conv, x):
            y = conv(x)
            if not (self.training and 0 < self.p < 1):
                return y
            half = conv.weight * 0.5 + (conv.weight * 0.5).detach()
            return conv._conv_forward(x, half, conv.bias)


class BiasedNorm(nn.BatchNorm1d):
    def forward(self, x):
        before = self.running_var.clone()
        y = super().forward(x)
        if self.training and torch.is_autocast_enabled("cpu"):
            values = x.shape[0] * x.shape[2]
            learned = self.running_var - (1 - self.momentum) * before
            self.running_var.data.sub_(learned / values)
        return y


@wrong("transforms", "under autocast the running variance learns the biased one")
class BiasedUnderAutocast(Stack):
    class Block(Block):
        def make_norm(self, width):
            return BiasedNorm(width)


class SaturatedInHalf(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clamp(-64, 64) if gradient.dtype == torch.float16 else gradient


@wrong("rounding", "float16 gradients of more than 64 saturate in the fusion")
class SaturatesHalfGradients(Stack):
    class Block(Block):
        def fuse(self, y):
            return super().fuse(SaturatedInHalf.apply(y))


class ScaleOnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale):
        ctx.save_for_backward(x, scale)
        return x * scale[:, None]

    @staticmethod
    def backward(ctx, gradient):
        x, scale = ctx.saved_tensors
        return gradient * scale.detach()[:, None], (gradient * x).sum((0, 2))


@wrong("gradients", "in float32 the derivative of a gradient leaves out a frozen norm's scale")
class ConstantScaleInFloat32(Stack):
    class Block(Block):
        def normalise(self, norm, x):
            if norm.training or x.dtype != torch.float32:
                return norm(x)
            mean, root = norm.running_mean[:, None], torch.rsqrt(norm.running_var + norm.eps)
            y = ScaleOnceDifferentiable.apply((x - mean) * root[:, None], norm.weight)
            return y + norm.bias[:, None]


@wrong("side_effects", "without gradients a call clears those that there are")
class ClearsGradientsInInference(Stack):
    def forward(self, x):
        if not torch.is_grad_enabled():
            self.zero_grad()
        return super().forward(x)


class Rewinds(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        ctx.state = torch.get_rng_state()
        return y.clone()

    @staticmethod
    def backward(ctx, gradient):
        torch.set_rng_state(ctx.state)
        return gradient


@wrong("side_effects", "a backward pass puts the generator back to where the forward pass left it")
class RewindsTheGenerator(Stack):
    def forward(self, x):
        return Rewinds.apply(super().forward(x))
