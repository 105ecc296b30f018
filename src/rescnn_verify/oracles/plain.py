"""The reference as torch operations, for what autograd makes of it again: second derivatives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from rescnn_verify.handles import BlockHandles, ConvNorm

__all__ = ["filled", "plain_call", "two_derivatives"]


def plain_call(
    blocks: Sequence[BlockHandles],
    values: Mapping[Tensor, Tensor],
    x: Tensor,
    *,
    train: bool,
) -> Tensor:
    """The output of a network without dropout.

    Args:
        blocks: where parameters and running statistics are.
        values: what stands in the place of the parameters.
        x: shape (batch, channels, length).
        train: whether norms use the statistics of the batch.
    """

    def run(layer: ConvNorm, part: Tensor) -> Tensor:
        conv, norm = layer.conv, layer.norm
        bias = None if conv.bias is None else values[conv.bias]
        weight = values[conv.weight]
        z = functional.conv1d(part, weight, bias, padding=weight.shape[2] // 2)
        scale, shift = values[norm.weight], values[norm.bias]
        mean, variance = None, None
        if not train:
            assert norm.running_mean is not None and norm.running_var is not None
            mean, variance = norm.running_mean.to(z), norm.running_var.to(z)
        return functional.batch_norm(z, mean, variance, scale, shift, train, eps=norm.eps)

    for block in blocks:
        inside = torch.cat([run(branch, x).relu() for branch in block.branches], dim=1)
        x = (x + run(block.fusion, inside)).relu()
    return x


def two_derivatives(
    out: Tensor, leaves: Sequence[Tensor], v: Tensor, directions: Sequence[Tensor]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """∇⟨v, out⟩ and ∇⟨∇⟨v, out⟩, directions⟩ at each leaf, zeros where there is none.

    Args:
        out: what depends on the leaves.
        leaves: where derivatives are taken.
        v: shape of the output.
        directions: one for each leaf, of its shape.
    """
    first = torch.autograd.grad(out, leaves, v, create_graph=True, allow_unused=True)
    total = torch.zeros((), dtype=out.dtype, device=out.device)
    for gradient, direction in zip(first, directions, strict=True):
        if gradient is not None:
            total = total + (gradient * direction).sum()
    second: Sequence[Tensor | None] = [None] * len(leaves)
    if total.requires_grad:
        second = torch.autograd.grad(total, leaves, allow_unused=True)
    return filled(leaves, first), filled(leaves, second)


def filled(leaves: Sequence[Tensor], found: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """What was found at each leaf, zeros where there is none."""
    return tuple(
        torch.zeros_like(leaf) if part is None else part.detach()
        for leaf, part in zip(leaves, found, strict=True)
    )
