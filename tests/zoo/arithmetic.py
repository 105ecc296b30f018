"""What is computed from the right layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .base import Block, Stack, affine
from .registry import wrong


@wrong("arithmetic", "the fusion runs in float32 whatever the dtype of the input")
class FusionInFloat32(Stack):
    class Block(Block):
        def convolve(self, conv, x):
            if conv.kernel_size[0] > 1:
                return conv(x)
            bias = None if conv.bias is None else conv.bias.float()
            return F.conv1d(x.float(), conv.weight.float(), bias).to(x.dtype)


@wrong("arithmetic", "the sum is rounded to bfloat16 on its way")
class SumInBfloat16(Stack):
    class Block(Block):
        def add(self, y, x):
            return (y.bfloat16() + x.bfloat16()).to(x.dtype)


@wrong("arithmetic", "float32 weights are cut to the ten bits of TF32")
class CutsToTf32(Stack):
    class Block(Block):
        def convolve(self, conv, x):
            if x.dtype is not torch.float32:
                return conv(x)
            weight = conv.weight
            cut = (weight.detach().view(torch.int32) & ~0x1FFF).view(torch.float32)
            weight = weight + (cut - weight).detach()
            return F.conv1d(x, weight, conv.bias, padding=conv.padding)


@wrong("arithmetic", "the output saturates at 6")
class SaturatesAtSix(Stack):
    class Block(Block):
        def make_relu(self):
            return nn.ReLU6()


@wrong(
    "arithmetic",
    "sums are clamped to the range of float16 in every dtype",
    trigger=lambda case: case.dtype != "float16",
)
class ClampsToHalfRange(Stack):
    class Block(Block):
        def add(self, y, x):
            return (y + x).clamp(-65504, 65504)


@wrong("arithmetic", "eps is added to the deviation instead of the variance")
class EpsOutsideRoot(Stack):
    class Block(Block):
        def normalise(self, norm, x):
            if norm.training:
                return norm(x)
            return affine(norm, x, norm.running_mean, norm.running_var.sqrt() + norm.eps)


@wrong("arithmetic", "eps is forgotten in eval mode")
class EpsForgotten(Stack):
    class Block(Block):
        def normalise(self, norm, x):
            if norm.training:
                return norm(x)
            return affine(norm, x, norm.running_mean, norm.running_var.sqrt())


@wrong("arithmetic", "division by the variance instead of its root in eval mode")
class RootForgotten(Stack):
    class Block(Block):
        def normalise(self, norm, x):
            if norm.training:
                return norm(x)
            return affine(norm, x, norm.running_mean, norm.running_var + norm.eps)


@wrong("arithmetic", "the scale of a BatchNorm loses its sign")
class ScaleWithoutSign(Stack):
    class Block(Block):
        def normalise(self, norm, x):
            return F.batch_norm(
                x,
                norm.running_mean,
                norm.running_var,
                norm.weight.abs(),
                norm.bias,
                norm.training,
                norm.momentum,
                norm.eps,
            )


@wrong("arithmetic", "BatchNorm after the ReLU in the branches")
class NormAfterRelu(Stack):
    class Block(Block):
        def run_branch(self, branch, x):
            return self.normalise(branch[1], self.rectify(self.convolve(branch[0], x)))


@wrong("arithmetic", "BatchNorm and ReLU before the convolution")
class Preactivation(Stack):
    class Block(Block):
        def make_norm(self, width):
            return nn.BatchNorm1d(self.channels)

        def run_branch(self, branch, x):
            return self.convolve(branch[0], self.rectify(self.normalise(branch[1], x)))


@wrong("arithmetic", "leaky ReLU in the branches")
class LeakyBranches(Stack):
    class Block(Block):
        def rectify(self, x):
            return F.leaky_relu(x, 0.01)


@wrong("arithmetic", "GELU in the branches")
class GeluBranches(Stack):
    class Block(Block):
        def rectify(self, x):
            return F.gelu(x)


@wrong("arithmetic", "leaky ReLU after the sum")
class LeakyOutput(Stack):
    class Block(Block):
        def make_relu(self):
            return nn.LeakyReLU(0.001)


@wrong("arithmetic", "the taps are applied in reverse, as convolution has it in textbooks")
class FlippedTaps(Stack):
    class Block(Block):
        def convolve(self, conv, x):
            return F.conv1d(x, conv.weight.flip(2), conv.bias, padding=conv.padding)


@wrong("arithmetic", "reflection as padding wherever the input is long enough")
class ReflectPadding(Stack):
    class Block(Block):
        def convolve(self, conv, x):
            side = conv.kernel_size[0] // 2
            if x.shape[2] <= side:
                return conv(x)
            return F.conv1d(F.pad(x, (side, side), "reflect"), conv.weight, conv.bias)


@wrong("arithmetic", "edge outputs are scaled up for the taps that meet padding")
class PartialConvolution(Stack):
    class Block(Block):
        def convolve(self, conv, x):
            kernel = conv.kernel_size[0]
            ones = x.new_ones(1, 1, x.shape[2])
            met = F.conv1d(ones, x.new_ones(1, 1, kernel), padding=kernel // 2)
            return conv(x) * (kernel / met)


@wrong("arithmetic", "the branches are concatenated in reverse order")
class BranchesReversed(Stack):
    class Block(Block):
        def join(self, outputs):
            return torch.cat(outputs[::-1], dim=1)


@wrong("arithmetic", "the channels of the branches are interleaved instead of concatenated")
class BranchesInterleaved(Stack):
    class Block(Block):
        def join(self, outputs):
            joined = torch.cat(outputs, dim=1)
            n = len(outputs)
            if self.channels % n:
                return joined
            order = torch.arange(self.channels, device=joined.device).view(n, -1).t().flatten()
            return joined[:, order]


@wrong("arithmetic", "the branches are divided by their number")
class BranchesAveraged(Stack):
    class Block(Block):
        def join(self, outputs):
            return super().join(outputs) / len(outputs)


@wrong("arithmetic", "the bias of the fusion convolution is dropped")
class FusionBiasDropped(Stack):
    class Block(Block):
        def convolve(self, conv, x):
            if conv.kernel_size[0] > 1:
                return conv(x)
            return F.conv1d(x, conv.weight)


@wrong("arithmetic", "outputs below a thousandth are flushed to zero")
class FlushesSmall(Stack):
    class Block(Block):
        def activate(self, y):
            return F.threshold(y, 1e-3, 0.0)


@wrong("arithmetic", "outputs are quantised to multiples of 2**-8 in eval mode")
class Quantised(Stack):
    class Block(Block):
        def activate(self, y):
            y = super().activate(y)
            return y if self.training else y + (torch.round(y * 256) / 256 - y).detach()


@wrong("arithmetic", "a path for bfloat16 leaves the shift of the BatchNorm out")
class ShiftMissingInBfloat16(Stack):
    class Block(Block):
        def normalise(self, norm, x):
            y = norm(x)
            return y - norm.bias[:, None] if x.dtype is torch.bfloat16 else y


@wrong("arithmetic", "variances below a tenth are raised to it in eval mode")
class VarianceFloor(Stack):
    class Block(Block):
        def normalise(self, norm, x):
            if norm.training:
                return norm(x)
            var = norm.running_var.clamp(min=0.1)
            return affine(norm, x, norm.running_mean, torch.sqrt(var + norm.eps))


@wrong("arithmetic", "a kernel of 1 skips its convolution's bias")
class PointwiseWithoutBias(Stack):
    class Block(Block):
        def run_branch(self, branch, x):
            conv, norm, _ = branch
            if conv.kernel_size[0] > 1:
                return super().run_branch(branch, x)
            return self.rectify(self.normalise(norm, F.conv1d(x, conv.weight)))


@wrong("arithmetic", "a bare block averages its branches")
class BlockBranchesAveraged(Block):
    def join(self, outputs):
        return super().join(outputs) / len(outputs)


@wrong(
    "arithmetic",
    "a norm adds eps only where the variance is smaller",
    trigger=lambda case: case.mode == "eval" and case.dtype != "float64",
)
class EpsilonIsAFloor(Stack):
    class Block(Block):
        def normalise(self, norm, x):
            if norm.training or x.dtype == torch.float64:
                return norm(x)
            return affine(norm, x, norm.running_mean, norm.running_var.clamp(min=norm.eps).sqrt())


@wrong(
    "arithmetic",
    "with more than 256 channels the fusion accumulates in float32",
    trigger=lambda case: case.channels > 256,
)
class WideFusionInFloat32(Stack):
    class Block(Block):
        def convolve(self, conv, x):
            if conv.kernel_size[0] > 1 or x.dtype is not torch.float64 or self.channels <= 256:
                return conv(x)
            return F.conv1d(x.float(), conv.weight.float(), conv.bias.float()).double()


@wrong("arithmetic", "branches are joined in the order of their numbers as text: 1, 10, 2")
class JoinedInTextOrder(Stack):
    class Block(Block):
        def join(self, outputs):
            return super().join([outputs[i] for i in sorted(range(len(outputs)), key=str)])


@wrong("arithmetic", "a float32 block scales by ones of the default dtype, whichever that is")
class ScalesInDefaultDtype(Stack):
    class Block(Block):
        def fuse(self, y):
            ones = torch.ones(y.shape[1], dtype=None if y.dtype is torch.float32 else y.dtype)
            return super().fuse(y * ones.to(y.device)[:, None])


@wrong("arithmetic", "folding takes a branch norm's scale of exactly 0 for 1")
class ZeroScaleIsOne(Stack):
    class Block(Block):
        def normalise(self, norm, x):
            if norm.training or norm is self.fusion[1] or not (norm.weight == 0).any():
                return norm(x)
            scale = torch.where(norm.weight == 0, 1.0, norm.weight)
            mean, var = norm.running_mean, norm.running_var
            return F.batch_norm(x, mean, var, scale.to(x.dtype), norm.bias, eps=norm.eps)
