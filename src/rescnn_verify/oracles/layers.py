"""A network as plain arrays, and convolution in NumPy."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from torch import Tensor, nn

from rescnn_verify.compare import Falsified, NotApplicable, equal
from rescnn_verify.handles import BlockHandles, ConvNorm, put

__all__ = [
    "Array",
    "Block",
    "Gradients",
    "Layer",
    "UnsupportedLayerError",
    "apply",
    "check_layers",
    "column",
    "columns_of",
    "gradients_beside",
    "read_network",
    "rows_of",
    "transposed",
    "write_network",
]

Array = np.ndarray
T = TypeVar("T")


class UnsupportedLayerError(NotApplicable, ValueError):
    """A layer that the reference architecture does not have."""


@dataclass(frozen=True)
class Layer:
    """A convolution with "same" zero padding and the norm behind it.

    Args:
        weight: shape (out, in, kernel).
        bias: shape (out,); zero for a convolution without.
        scale, shift, mean, variance: of the norm, shape (out,).
        eps: of the norm.
        frozen: whether the norm keeps to its statistics while the model trains.
    """

    weight: Array
    bias: Array
    scale: Array
    shift: Array
    mean: Array
    variance: Array
    eps: float
    frozen: bool = False


@dataclass(frozen=True)
class Block:
    """The layers of one residual block.

    Args:
        branches: in the order of the kernel sizes.
        fusion: of what the branches return.
        mask: what dropout multiplies the fusion's output with, shape (batch, channels); None where
            it does nothing.
    """

    branches: tuple[Layer, ...]
    fusion: Layer
    mask: Array | None = None


@dataclass(frozen=True)
class Gradients(Generic[T]):
    """Gradients of a layer's parameters, each in the shape of the parameter."""

    weight: T
    bias: T
    scale: T
    shift: T


def write_network(network: Sequence[Block], blocks: Sequence[BlockHandles]) -> None:
    """Writes a network into a model's parameters and running statistics."""
    for block, handles in zip(network, blocks, strict=True):
        for layer, own in zip((*block.branches, block.fusion), handles.layers, strict=True):
            put(own.conv, "weight", layer.weight)
            put(own.conv, "bias", layer.bias)
            put(own.norm, "weight", layer.scale)
            put(own.norm, "bias", layer.shift)
            put(own.norm, "running_mean", layer.mean)
            put(own.norm, "running_var", layer.variance)


def read_network(blocks: Sequence[BlockHandles]) -> tuple[Block, ...]:
    """The network that a model's parameters and running statistics describe, in float64.

    Raises:
        UnsupportedLayerError: as `check_layers`.
    """
    check_layers(blocks)
    return tuple(
        Block(tuple(_read_layer(b) for b in block.branches), _read_layer(block.fusion))
        for block in blocks
    )


def check_layers(blocks: Sequence[BlockHandles]) -> None:
    """That a model's layers are those that a network as plain arrays has.

    Raises:
        UnsupportedLayerError: a convolution that is not the architecture's: strided, dilated,
            grouped, of an even kernel, padded with anything but zeros, or of other channels than
            those before it give and those after it take.
    """
    for block in blocks:
        channels = block.fusion.conv.weight.shape[0]
        joined = sum(branch.conv.weight.shape[0] for branch in block.branches)
        for layer, inputs in (*((b, channels) for b in block.branches), (block.fusion, joined)):
            conv = layer.conv
            plain = (conv.stride, conv.dilation, conv.groups, conv.padding_mode)
            if plain != ((1,), (1,), 1, "zeros") or conv.weight.shape[2] % 2 == 0:
                raise UnsupportedLayerError(
                    "only convolutions of an odd kernel with stride, dilation and groups 1 and "
                    f"zero padding are known, got {conv}"
                )
            if conv.weight.shape[1] != inputs or not conv.weight.numel():
                raise UnsupportedLayerError(f"{conv} stands where {inputs} channels come in")
    if len({block.fusion.conv.weight.shape[0] for block in blocks}) > 1:
        raise UnsupportedLayerError("the blocks have different numbers of channels")


def gradients_beside(
    blocks: Sequence[BlockHandles],
    expected: Sequence[Sequence[Gradients[T]]],
    without: Collection[nn.Parameter] = (),
) -> Iterator[tuple[str, Tensor, T]]:
    """Each parameter's name and gradient, beside what is expected of it.

    (A parametrized tensor is no parameter.)

    Args:
        blocks: where the parameters are.
        expected: what is expected of each.
        without: those that are frozen.

    Raises:
        Falsified: one has no gradient, or a frozen one has.
    """
    for i, (block, layers) in enumerate(zip(blocks, expected, strict=True)):
        for j, (layer, own) in enumerate(zip(block.layers, layers, strict=True)):
            for kind, parameter, gradient in (
                ("weight", layer.conv.weight, own.weight),
                ("bias", layer.conv.bias, own.bias),
                ("scale", layer.norm.weight, own.scale),
                ("shift", layer.norm.bias, own.shift),
            ):
                if not isinstance(parameter, nn.Parameter):
                    continue
                what = f"gradient of {kind} {j} of block {i}"
                if parameter in without:
                    equal(parameter.grad, None, what)
                    continue
                if parameter.grad is None:
                    raise Falsified(what, "a tensor", "None")
                yield what, parameter.grad, gradient


def _read_layer(layer: ConvNorm) -> Layer:
    conv, norm = layer.conv, layer.norm
    bias = np.zeros(conv.weight.shape[0]) if conv.bias is None else _array(conv.bias)
    assert norm.running_mean is not None and norm.running_var is not None
    return Layer(
        _array(conv.weight),
        bias,
        _array(norm.weight),
        _array(norm.bias),
        _array(norm.running_mean),
        _array(norm.running_var),
        norm.eps,
    )


def _array(tensor: Tensor) -> Array:
    # A copy: the model's own memory goes on changing.
    values: Array = tensor.detach().cpu().double().numpy().copy()
    return values


def columns_of(x: Array, kernel: int) -> Array:
    """Zero-padded windows as rows of a matrix, shape (batch · length, channels · kernel)."""
    batch, channels, length = x.shape
    side = kernel // 2
    padded = np.zeros((batch, channels, length + 2 * side), dtype=x.dtype)
    padded[:, :, side : side + length] = x
    strides = (padded.strides[0], padded.strides[2], padded.strides[1], padded.strides[2])
    windows = np.ndarray((batch, length, channels, kernel), x.dtype, padded, strides=strides)
    return windows.reshape(batch * length, channels * kernel)


def apply(columns: Array, weight: Array, batch: int) -> Array:
    """Windows times weights: shape (batch, out, length)."""
    out: Array = columns @ weight.reshape(weight.shape[0], -1).T
    return out.reshape(batch, -1, weight.shape[0]).swapaxes(1, 2)


def transposed(weight: Array) -> Array:
    """The weight whose convolution is the transpose: (out, in, kernel) → (in, out, kernel)."""
    return np.ascontiguousarray(weight[:, :, ::-1].swapaxes(0, 1))


def rows_of(g: Array) -> Array:
    """(batch, out, length) → (out, batch · length)."""
    return g.swapaxes(0, 1).reshape(g.shape[1], -1)


def column(values: Array) -> Array:
    return values[None, :, None]
