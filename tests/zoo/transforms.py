"""Right functions, of which torch makes wrong ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd import Function

from .base import Block, Stack
from .registry import wrong


@wrong("transforms", "under autocast the fusion skips its norm")
class SkipsNormUnderAutocast(Stack):
    class Block(Block):
        def fuse(self, y):
            if not torch.is_autocast_enabled("cpu"):
                return super().fuse(y)
            return self.drop(self.convolve(self.fusion[0], y))


class MappedConvolution(Function):
    """A convolution that `torch.vmap` runs with the mapped axis in the batch."""

    @staticmethod
    def forward(x, weight, bias):
        return F.conv1d(x, weight, bias, padding=weight.shape[2] // 2)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        with torch.enable_grad():
            inputs = [t.detach().requires_grad_() for t in ctx.saved_tensors]
            y = MappedConvolution.forward(*inputs)
        return torch.autograd.grad(y, inputs, gradient)

    @staticmethod
    def vmap(info, in_dims, x, weight, bias):
        if in_dims[1:] != (None, None):
            raise NotImplementedError
        y = F.conv1d(x.flatten(0, 1), weight, bias, padding=weight.shape[2] // 2)
        return y.unflatten(0, (info.batch_size, -1)), 0


@wrong("transforms", "under vmap the mapped axis is taken to be the first")
class MapsFirstAxis(Stack):
    class Block(Block):
        def convolve(self, conv, x):
            if torch.compiler.is_compiling() or not torch._C._functorch.is_batchedtensor(x):
                return conv(x)
            return MappedConvolution.apply(x, conv.weight, conv.bias)


class ReluWithUnmaskedTangent(Function):
    """ReLU that hands a tangent on as it came."""

    @staticmethod
    def forward(x):
        return torch.relu(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return grad * (y > 0)

    @staticmethod
    def jvp(ctx, tangent):
        return tangent.clone()


@wrong("transforms", "forward-mode derivatives pass every ReLU")
class UnmaskedTangent(Stack):
    class Block(Block):
        def rectify(self, x):
            return ReluWithUnmaskedTangent.apply(x)


class Scaled(Function):
    """A product along the channels, whose tangent may hold the scale constant."""

    @staticmethod
    def forward(x, scale, constant):
        return x * scale[:, None]

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, scale, ctx.constant = inputs
        ctx.save_for_backward(x, scale)
        ctx.save_for_forward(x, scale)

    @staticmethod
    def backward(ctx, gradient):
        x, scale = ctx.saved_tensors
        return Scaled.apply(gradient, scale, True), (gradient * x).sum((0, 2)), None

    @staticmethod
    def jvp(ctx, tangent, scale_tangent, _):
        x, scale = ctx.saved_tensors
        along = tangent * scale[:, None]
        return along if ctx.constant else along + x * scale_tangent[:, None]


@wrong("gradients", "the tangent of a gradient leaves out that of a frozen norm's scale")
class ConstantScaleInTangent(Stack):
    class Block(Block):
        def normalise(self, norm, x):
            if norm.training or torch.compiler.is_compiling():
                return norm(x)
            mean, root = norm.running_mean[:, None], torch.rsqrt(norm.running_var + norm.eps)
            return Scaled.apply((x - mean) * root[:, None], norm.weight, False) + norm.bias[:, None]


def is_mapped(x):
    """Whether a tensor is several under `torch.vmap`, be it inside of a derivative."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


@wrong("transforms", "under vmap only half of the gradient reaches the fusion")
class HalvesMappedGradients(Stack):
    class Block(Block):
        def fuse(self, y):
            y = super().fuse(y)
            return y / 2 + y.detach() / 2 if is_mapped(y) else y
