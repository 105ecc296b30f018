"""What a run costs: floating-point operations counted as it runs, and the bytes it cannot avoid."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["flops_of", "least_bytes", "valid_taps"]


def flops_of(run: Callable[[], object]) -> int:
    """Floating-point operations of the convolutions and matrix products of a run.

    A multiply-add counts as two. Taps that fall on padding are left out: an implementation may skip
    them. Everything else (norms, activations, sums) is left out, too.
    """
    aten = torch.ops.aten
    own = {aten.convolution: _forward, aten.convolution_backward: _backward}
    with FlopCounterMode(display=False, custom_mapping=own) as counter:
        run()
    return int(counter.get_total_flops())


def least_bytes(tensors: Iterable[Tensor], module: nn.Module, *, backward: bool) -> int:
    """Bytes that any implementation moves: each input, parameter and output once.

    Args:
        tensors: the inputs and outputs.
        module: whose parameters and buffers are read.
        backward: whether gradients of the same tensors and parameters are written, too.
    """
    moved = sum(t.nbytes for t in (*tensors, *module.parameters())) * (2 if backward else 1)
    return moved + sum(t.nbytes for t in module.buffers())


def valid_taps(
    length: int, kernel: int, stride: int, padding: int, dilation: int, outputs: int
) -> int:
    """Pairs of an output position and a tap that meet a position of the input, not its padding.

    Output o and tap j meet position ``o·stride + j·dilation − padding``.
    """
    count = 0
    for tap in range(kernel):
        shift = tap * dilation - padding
        first = max(0, math.ceil(-shift / stride))
        last = min(outputs - 1, (length - 1 - shift) // stride)
        count += max(0, last - first + 1)
    return count


def _pass(
    x: Sequence[int],
    weight: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    out: Sequence[int],
) -> int:
    """Operations of one product of a convolution: the output's, or either gradient's."""
    if transposed:
        x, out = out, x
    sizes = zip(x[2:], weight[2:], stride, padding, dilation, out[2:], strict=True)
    taps = math.prod(valid_taps(*size) for size in sizes)
    return 2 * x[0] * weight[0] * weight[1] * taps


def _forward(
    x: Any,
    weight: Any,
    _bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    *_: Any,
    out_shape: Any = None,
    **__: Any,
) -> int:
    return _pass(x, weight, stride, padding, dilation, transposed, out_shape)


def _backward(
    gradient: Any,
    x: Any,
    weight: Any,
    _bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    _output_padding: Any,
    _groups: Any,
    wanted: Sequence[bool],
    **_: Any,
) -> int:
    one = _pass(x, weight, stride, padding, dilation, transposed, gradient)
    return one * sum(wanted[:2])
