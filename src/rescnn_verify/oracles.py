"""Oracles: the reference architecture computed independently, in NumPy.

`exact_pass` evaluates integer networks in float64 together with a certificate: as long as no
intermediate needs more bits than a dtype has, every evaluation order in that dtype gives the same
exact result. `real_pass` evaluates real-valued networks in extended precision together with a bound
on the error that any float64 evaluation can make.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rescnn_verify.handles import BlockHandles, ConvNorm

__all__ = [
    "SIGNIFICAND_BITS",
    "Block",
    "ExactPass",
    "Layer",
    "RealPass",
    "TrainStatistics",
    "exact_pass",
    "read_network",
    "real_pass",
    "write_network",
]

Array = np.ndarray

#: Bits of the significand, the hidden one included: integers up to 2^p are exact.
SIGNIFICAND_BITS = {"float64": 53, "float32": 24, "float16": 11, "bfloat16": 8}

UNIT = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
_SMALLEST_DOUBLE = 5e-324


@dataclass(frozen=True)
class Layer:
    """A convolution with "same" zero padding and the norm behind it.

    Args:
        weight: shape (out, in, kernel).
        bias: shape (out,); zero for a convolution without.
        scale, shift, mean, variance: of the norm, shape (out,).
        eps: of the norm.
    """

    weight: Array
    bias: Array
    scale: Array
    shift: Array
    mean: Array
    variance: Array
    eps: float


@dataclass(frozen=True)
class Block:
    """The layers of one residual block."""

    branches: tuple[Layer, ...]
    fusion: Layer


def write_network(network: Sequence[Block], blocks: Sequence[BlockHandles]) -> None:
    """Writes a network into a model's parameters and running statistics."""
    with torch.no_grad():
        for block, handles in zip(network, blocks, strict=True):
            for layer, own in zip((*block.branches, block.fusion), handles.layers, strict=True):
                conv, norm = own.conv, own.norm
                pairs = [(conv.weight, layer.weight), (norm.weight, layer.scale)]
                pairs += [(norm.bias, layer.shift), (norm.running_mean, layer.mean)]
                pairs += [(norm.running_var, layer.variance)]
                if conv.bias is not None:
                    pairs.append((conv.bias, layer.bias))
                for tensor, values in pairs:
                    tensor.copy_(torch.from_numpy(values))


def read_network(blocks: Sequence[BlockHandles]) -> tuple[Block, ...]:
    """The network that a model's parameters and running statistics describe, in float64."""
    return tuple(
        Block(tuple(_read_layer(b) for b in block.branches), _read_layer(block.fusion))
        for block in blocks
    )


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


def _columns(x: Array, kernel: int) -> Array:
    """Zero-padded windows as rows of a matrix, shape (batch · length, channels · kernel)."""
    batch, channels, length = x.shape
    side = kernel // 2
    padded = np.zeros((batch, channels, length + 2 * side), dtype=x.dtype)
    padded[:, :, side : side + length] = x
    strides = (padded.strides[0], padded.strides[2], padded.strides[1], padded.strides[2])
    windows = np.ndarray((batch, length, channels, kernel), x.dtype, padded, strides=strides)
    return windows.reshape(batch * length, channels * kernel)


def _apply(columns: Array, weight: Array, batch: int) -> Array:
    """Windows times weights: shape (batch, out, length)."""
    out = columns @ weight.reshape(weight.shape[0], -1).T
    return out.reshape(batch, -1, weight.shape[0]).swapaxes(1, 2)


def _transposed(weight: Array) -> Array:
    """The weight whose convolution is the transpose: (out, in, kernel) → (in, out, kernel)."""
    return np.ascontiguousarray(weight[:, :, ::-1].swapaxes(0, 1))


def _rows(g: Array) -> Array:
    """(batch, out, length) → (out, batch · length)."""
    return g.swapaxes(0, 1).reshape(g.shape[1], -1)


def _column(values: Array) -> Array:
    return values[None, :, None]


# --- integer networks ----------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerGradients:
    """Gradients of a layer's parameters, each in the shape of the parameter."""

    weight: Array
    bias: Array
    scale: Array
    shift: Array


@dataclass(frozen=True)
class ExactPass:
    """Forward and backward pass of an integer network.

    Args:
        out: the output, shape of the input.
        input_gradient: Jᵀv, shape of the input.
        gradients: of the parameters, block by block, branches in order and then the fusion.
        forward_bits, backward_bits, weight_bits: bits of the significand that the pass needs, in
            whatever order sums are taken; each includes those before it.
        kink: whether some ReLU had an input of exactly 0, where any subgradient is right.
    """

    out: Array
    input_gradient: Array
    gradients: tuple[tuple[LayerGradients, ...], ...]
    forward_bits: float
    backward_bits: float
    weight_bits: float
    kink: bool


class _Bits:
    """The most bits that any value so far needs."""

    def __init__(self) -> None:
        self.most = 0.0

    def need(self, magnitude: Array, unit: float) -> None:
        """Takes note of values up to ``magnitude`` that are multiples of ``unit``."""
        largest = float(np.max(magnitude, initial=0.0))
        if largest > 0:
            self.most = max(self.most, float(np.log2(largest / unit)))


def exact_pass(
    network: tuple[Block, ...], x: Array, v: Array, *, fraction: float = 1.0
) -> ExactPass:
    """Forward and backward pass of a network whose norms multiply by ±2^i, i ≥ 0.

    Args:
        network: weights, biases and means are integers; the variance is a power of four to which
            adding eps changes nothing in the dtype under test. Block i's shifts are multiples of
            ``fraction^(2i + 1)`` in the branches and ``fraction^(2i + 2)`` in the fusion, i ≥ 0.
        x, v: the input and the vector of the vector-Jacobian product, integers of shape (batch,
            channels, length).
        fraction: 1 or ½.
    """
    forward, backward, weights = _Bits(), _Bits(), _Bits()
    kink = False
    tape = []
    out, unit = x, 1.0
    for block in network:
        inside = [_exact_layer(layer, out, forward, unit * fraction) for layer in block.branches]
        kink |= any(bool((step.out == 0).any()) for step in inside)
        joined = np.concatenate([np.maximum(step.out, 0) for step in inside], axis=1)
        fused = _exact_layer(block.fusion, joined, forward, unit * fraction**2)
        forward.need(np.abs(out) + np.abs(fused.out), unit * fraction**2)
        total = out + fused.out
        kink |= bool((total == 0).any())
        tape.append((inside, fused, total, unit))
        out, unit = np.maximum(total, 0), unit * fraction**2
    gradient = v
    gradients = []
    for block, (inside, fused, total, unit) in zip(reversed(network), reversed(tape), strict=True):
        through = np.where(total > 0, gradient, 0.0)
        back, own = _exact_back(block.fusion, fused, through, backward, weights, unit * fraction)
        layers = [own]
        gradient, magnitude = through, np.abs(through)
        at = back.shape[1]
        for layer, step in zip(reversed(block.branches), reversed(inside), strict=True):
            at -= layer.weight.shape[0]
            g = np.where(step.out > 0, back[:, at : at + layer.weight.shape[0]], 0.0)
            part, own = _exact_back(layer, step, g, backward, weights, unit)
            layers.insert(0, own)
            gradient, magnitude = gradient + part, magnitude + np.abs(part)
        backward.need(magnitude, 1.0)
        gradients.insert(0, tuple(layers))
    needed = max(forward.most, backward.most)
    return ExactPass(
        out, gradient, tuple(gradients), forward.most, needed, max(needed, weights.most), kink
    )


@dataclass(frozen=True)
class _Step:
    """What a layer's forward pass leaves for its backward pass."""

    columns: Array
    convolved: Array
    out: Array


def _slope(layer: Layer) -> Array:
    """The exact factor of a norm whose eps is rounded off its variance."""
    return layer.scale / np.sqrt(layer.variance)


def _exact_layer(layer: Layer, x: Array, bits: _Bits, unit: float) -> _Step:
    """A convolution and its norm; ``unit`` is that of the norm's output."""
    slope, batch = _slope(layer), x.shape[0]
    columns = _columns(x, layer.weight.shape[2])
    z = _apply(columns, layer.weight, batch) + _column(layer.bias)
    # The terms' magnitudes bound every partial sum; with mean, shift and slope they also bound any
    # order of the affine map, and weights that the norm was folded into.
    terms = _apply(np.abs(columns), np.abs(layer.weight), batch)
    terms += _column(np.abs(layer.bias) + np.abs(layer.mean))
    bits.need(_column(np.abs(slope)) * terms + _column(np.abs(layer.shift)), unit)
    pre = _column(slope) * (z - _column(layer.mean)) + _column(layer.shift)
    return _Step(columns, z, pre)


def _exact_back(
    layer: Layer, step: _Step, g: Array, backward: _Bits, weights: _Bits, unit: float
) -> tuple[Array, LayerGradients]:
    """The gradient at a layer's input and those of its parameters.

    Args:
        g: the gradient at the norm's output, integers.
        unit: of the layer's input.
    """
    batch = g.shape[0]
    before_norm = _column(_slope(layer)) * g
    weight = _transposed(layer.weight)
    columns = _columns(before_norm, layer.weight.shape[2])
    backward.need(_apply(np.abs(columns), np.abs(weight), batch), 1.0)
    rows = _rows(before_norm)
    weights.need(np.abs(rows) @ np.abs(step.columns), unit)
    sizes = np.abs(step.convolved) + _column(np.abs(layer.mean))
    weights.need((np.abs(g) * sizes).sum(axis=(0, 2)), unit)
    weights.need(np.abs(rows).sum(axis=1), 1.0)
    centred = step.convolved - _column(layer.mean)
    return _apply(columns, weight, batch), LayerGradients(
        weight=(rows @ step.columns).reshape(layer.weight.shape),
        bias=rows.sum(axis=1),
        scale=(g * centred).sum(axis=(0, 2)) / np.sqrt(layer.variance),
        shift=g.sum(axis=(0, 2)),
    )


# --- real-valued networks ------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainStatistics:
    """What a training pass leaves in a norm, with error bounds; each of shape (out,)."""

    mean: Array
    mean_error: Array
    variance: Array
    variance_error: Array


@dataclass(frozen=True)
class RealPass:
    """Output of a real-valued network.

    Args:
        out: in extended precision, shape of the input.
        error: how far any float64 evaluation of the architecture can be from it, same shape; NaN
            where there is no bound.
        statistics: of the norms after a training pass, as in `ExactPass.gradients`; else empty.
    """

    out: Array
    error: Array
    statistics: tuple[tuple[TrainStatistics, ...], ...]


def real_pass(network: tuple[Block, ...], x: Array, *, train: bool = False) -> RealPass:
    """Forward pass in extended precision with a running error bound for float64.

    The bound follows Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., sections 3.1
    and 3.3: a sum of n products in any order is off by at most γ_n Σ|w||v|, γ_n = nu/(1 − nu). It
    is carried from layer to layer beside the value. Convolution and norm are bounded together, so
    that it also holds for weights with the norm folded into them.

    Args:
        network: any finite weights.
        x: input, shape (batch, channels, length).
        train: normalise with the batch's own statistics (no dropout).
    """
    out = x.astype(np.longdouble)
    error = np.zeros_like(out)
    statistics = []
    for block in network:
        layers = []
        joined, joined_error = [], []
        for layer in block.branches:
            value, bound, learned = _real_layer(layer, out, error, train)
            layers.append(learned)
            joined.append(np.maximum(value, 0))
            joined_error.append(_relu_error(value, bound))
        fused, bound, learned = _real_layer(
            block.fusion, np.concatenate(joined, 1), np.concatenate(joined_error, 1), train
        )
        statistics.append((*layers, learned))
        total = out + fused
        error = error + bound
        error = error + UNIT["float64"] * (np.abs(total) + error)
        error = _relu_error(total, error)
        out = np.maximum(total, 0)
    kept = tuple(tuple(s for s in layers if s is not None) for layers in statistics)
    return RealPass(out, error, kept)


def _relu_error(value: Array, error: Array) -> Array:
    return np.where(value > 0, error, np.maximum(0, value + error))


def _gamma(terms: int) -> np.longdouble:
    unit = np.longdouble(UNIT["float64"])
    return terms * unit / (1 - terms * unit)


def _real_layer(
    layer: Layer, x: Array, error: Array, train: bool
) -> tuple[Array, Array, TrainStatistics | None]:
    """The norm's output, its error bound, and the statistics after a training pass."""
    weight = layer.weight.astype(np.longdouble)
    terms, batch = weight.shape[1] * weight.shape[2], x.shape[0]
    columns, errors = _columns(x, weight.shape[2]), _columns(error, weight.shape[2])
    z = _apply(columns, weight, batch) + _column(layer.bias)
    sizes = _apply(np.abs(columns) + errors, np.abs(weight), batch) + _column(np.abs(layer.bias))
    carried = _apply(errors, np.abs(weight), batch)
    # Products that underflow are each off by less than the smallest double.
    own = _gamma(terms + 1) * sizes + (terms + 1) * _SMALLEST_DOUBLE
    if train:
        return _train_norm(layer, z, carried + own)
    slope = layer.scale / np.sqrt(layer.variance.astype(np.longdouble) + layer.eps)
    value = _column(slope) * (z - _column(layer.mean)) + _column(layer.shift)
    # γ_{n+1} for the sum and up to nine more roundings in the norm, or in folding it.
    size = _column(np.abs(slope)) * (sizes + _column(np.abs(layer.mean)))
    size = size + _column(np.abs(layer.shift))
    slack = (terms + 10) * _SMALLEST_DOUBLE * (1 + _column(np.abs(slope)))
    return value, _column(np.abs(slope)) * carried + _gamma(terms + 10) * size + slack, None


def _train_norm(layer: Layer, z: Array, error: Array) -> tuple[Array, Array, TrainStatistics]:
    """Batch normalisation by the batch's own mean and biased variance.

    With m values per channel, the mean is off by the mean error of its terms and γ_{m+1} of the
    mean magnitude. The variance is off by 2·mean|d|·δ + mean δ² for deviations d that are each off
    by δ, and γ_{m+4} of the mean square, which also covers the formula E z² − (E z)². The inverse
    root is then off by half the relative error of variance + eps.
    """
    m = z.shape[0] * z.shape[2]
    axes = (0, 2)
    mean = z.mean(axis=axes)
    magnitude = np.abs(z) + error
    mean_error = error.mean(axis=axes) + _gamma(m + 1) * magnitude.mean(axis=axes)
    deviation = z - _column(mean)
    off = error + _column(mean_error) + UNIT["float64"] * np.abs(deviation)
    variance = (deviation**2).mean(axis=axes)
    variance_error = (2 * np.abs(deviation) * off + off**2).mean(axis=axes) + _gamma(m + 4) * (
        magnitude**2
    ).mean(axis=axes)
    total = variance + layer.eps
    certain = total - variance_error
    # Where the batch is so nearly constant that the variance is not certain there is no bound.
    relative = np.where(certain > 0, variance_error / np.where(certain > 0, certain, 1), np.nan)
    slope = layer.scale / np.sqrt(total)
    value = _column(slope) * deviation + _column(layer.shift)
    size = _column(np.abs(slope)) * (np.abs(deviation) + off)
    bound = _column(np.abs(slope) * (1 + relative)) * off + _column(relative) * size
    bound = bound + _gamma(10) * (
        size * (1 + _column(relative))
        + _column(np.abs(slope) * (1 + relative)) * (magnitude + _column(np.abs(mean)))
        + _column(np.abs(layer.shift))
    )
    unbiased = variance * m / (m - 1)
    learned = TrainStatistics(mean, mean_error, unbiased, variance_error * m / (m - 1))
    return value, bound, learned
