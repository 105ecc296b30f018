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
    "Bounded",
    "ExactPass",
    "Layer",
    "RealGradients",
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
                for tensor, values in (
                    (conv.weight, layer.weight),
                    (conv.bias, layer.bias),
                    (norm.weight, layer.scale),
                    (norm.bias, layer.shift),
                    (norm.running_mean, layer.mean),
                    (norm.running_var, layer.variance),
                ):
                    if tensor is not None:
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
    out: Array = columns @ weight.reshape(weight.shape[0], -1).T
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
        forward.need(np.abs(out) + fused.magnitude, unit * fraction**2)
        total = out + fused.out
        kink |= bool((total == 0).any())
        tape.append((inside, fused, total, unit))
        out, unit = np.maximum(total, 0), unit * fraction**2
    gradient = v
    gradients: list[tuple[LayerGradients, ...]] = []
    for block, (inside, fused, total, unit) in zip(reversed(network), reversed(tape), strict=True):
        through = np.where(total > 0, gradient, 0.0)
        back, _, own = _exact_back(block.fusion, fused, through, backward, weights, unit * fraction)
        layers = [own]
        gradient, magnitude = through, np.abs(through)
        at = back.shape[1]
        for layer, step in zip(reversed(block.branches), reversed(inside), strict=True):
            at -= layer.weight.shape[0]
            g = np.where(step.out > 0, back[:, at : at + layer.weight.shape[0]], 0.0)
            part, terms, own = _exact_back(layer, step, g, backward, weights, unit)
            layers.insert(0, own)
            gradient, magnitude = gradient + part, magnitude + terms
        backward.need(magnitude, 1.0)
        gradients.insert(0, tuple(layers))
    needed = max(forward.most, backward.most)
    return ExactPass(
        out, gradient, tuple(gradients), forward.most, needed, max(needed, weights.most), kink
    )


@dataclass(frozen=True)
class _Step:
    """What a layer's forward pass leaves for its backward pass.

    Args:
        columns: windows of the input.
        convolved: what goes into the norm, its mean subtracted.
        terms: the sum of the magnitudes of what ``convolved`` is a sum of.
        out: the norm's output.
        magnitude: the same for ``out``.
    """

    columns: Array
    convolved: Array
    terms: Array
    out: Array
    magnitude: Array


def _slope(layer: Layer) -> Array:
    """The exact factor of a norm whose eps is rounded off its variance."""
    slope: Array = layer.scale / np.sqrt(layer.variance)
    return slope


def _exact_layer(layer: Layer, x: Array, bits: _Bits, unit: float) -> _Step:
    """A convolution and its norm; ``unit`` is that of the norm's output."""
    slope, batch = _slope(layer), x.shape[0]
    columns = _columns(x, layer.weight.shape[2])
    z = _apply(columns, layer.weight, batch) + _column(layer.bias)
    # The terms' magnitudes bound every partial sum; with mean, shift and slope they also bound any
    # order of the affine map, and weights that the norm was folded into.
    terms = _apply(np.abs(columns), np.abs(layer.weight), batch)
    terms += _column(np.abs(layer.bias) + np.abs(layer.mean))
    magnitude = _column(np.abs(slope)) * terms + _column(np.abs(layer.shift))
    bits.need(magnitude, unit)
    centred = z - _column(layer.mean)
    pre = _column(slope) * centred + _column(layer.shift)
    return _Step(columns, centred, terms, pre, magnitude)


def _exact_back(
    layer: Layer, step: _Step, g: Array, backward: _Bits, weights: _Bits, unit: float
) -> tuple[Array, Array, LayerGradients]:
    """The gradient at a layer's input, its terms' magnitudes, and the parameters' gradients.

    Args:
        g: the gradient at the norm's output, integers.
        unit: of the layer's input.
    """
    batch = g.shape[0]
    before_norm = _column(_slope(layer)) * g
    weight = _transposed(layer.weight)
    columns = _columns(before_norm, layer.weight.shape[2])
    terms = _apply(np.abs(columns), np.abs(weight), batch)
    backward.need(terms, 1.0)
    rows = _rows(before_norm)
    weights.need(np.abs(rows) @ np.abs(step.columns), unit)
    weights.need((np.abs(g) * step.terms).sum(axis=(0, 2)), unit)
    weights.need(np.abs(rows).sum(axis=1), 1.0)
    return (
        _apply(columns, weight, batch),
        terms,
        LayerGradients(
            weight=(rows @ step.columns).reshape(layer.weight.shape),
            bias=rows.sum(axis=1),
            scale=(g * step.convolved).sum(axis=(0, 2)) / np.sqrt(layer.variance),
            shift=g.sum(axis=(0, 2)),
        ),
    )


# --- real-valued networks ------------------------------------------------------------------------


@dataclass(frozen=True)
class Bounded:
    """Values in extended precision, and how far any float64 evaluation can be from each.

    Args:
        value: the exact values but for errors far below ``error``.
        error: the bound, of the same shape; NaN where there is none.
    """

    value: Array
    error: Array

    @property
    def most(self) -> Array:
        """The largest magnitude that an evaluation can have."""
        most: Array = np.abs(self.value) + self.error
        return most


@dataclass(frozen=True)
class TrainStatistics:
    """What a training pass leaves in a norm: mean and unbiased variance of its input."""

    mean: Bounded
    variance: Bounded


@dataclass(frozen=True)
class RealGradients:
    """Gradients of a layer's parameters, each in the shape of the parameter."""

    weight: Bounded
    bias: Bounded
    scale: Bounded
    shift: Bounded


@dataclass(frozen=True)
class RealPass:
    """Forward and backward pass of a real-valued network.

    Args:
        out: the output, shape of the input.
        statistics: of the norms after a training pass, as in `ExactPass.gradients`; else empty.
        input_gradient: Jᵀv, None without v.
        gradients: of the parameters, as in `ExactPass`; empty without v.
        kink: whether some ReLU's input is so close to 0 that round-off may switch it.
    """

    out: Bounded
    statistics: tuple[tuple[TrainStatistics, ...], ...]
    input_gradient: Bounded | None
    gradients: tuple[tuple[RealGradients, ...], ...]
    kink: bool


@dataclass(frozen=True)
class _RealStep:
    """A layer's forward pass.

    Args:
        columns: windows of the input.
        normalised: the norm's output before scale and shift.
        size: the magnitude of what cancels in it.
        root: 1/√(variance + eps).
        root_relative: relative error of ``root``.
        out: the norm's output.
        terms: how many products each of its values is a sum of.
        statistics: of the batch, after a training pass.
    """

    columns: Bounded
    normalised: Bounded
    size: Array
    root: Array
    root_relative: Array
    out: Bounded
    terms: int
    statistics: TrainStatistics | None


def real_pass(
    network: tuple[Block, ...], x: Array, *, v: Array | None = None, train: bool = False
) -> RealPass:
    """Forward and backward pass in extended precision with running error bounds for float64.

    The bounds follow Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., sections 3.1
    and 3.3: a sum of n products in any order is off by at most γ_n Σ|w||v|, γ_n = nu/(1 − nu). They
    are carried from layer to layer beside the values. Rounding is bounded by what goes into a norm
    before anything cancels, so that the bounds also hold for weights with the norm folded in.

    Args:
        network: any finite weights.
        x: input, shape (batch, channels, length).
        v: vector of the vector-Jacobian product, of the same shape; None for the forward pass only.
        train: normalise with the batch's own statistics (no dropout).
    """
    out = Bounded(x.astype(np.longdouble), np.zeros(x.shape, dtype=np.longdouble))
    kink = False
    tape = []
    for block in network:
        inside = [_real_layer(layer, out, train) for layer in block.branches]
        active = [_relu(step.out) for step in inside]
        joined = Bounded(
            np.concatenate([a.value for a in active], 1),
            np.concatenate([a.error for a in active], 1),
        )
        fused = _real_layer(block.fusion, joined, train)
        total = _sum(out, fused.out, fused.terms)
        kink |= any(_undecided(step.out) for step in inside) or _undecided(total)
        tape.append((inside, fused, total))
        out = _relu(total)
    statistics = tuple(
        tuple(step.statistics for step in (*inside, fused) if step.statistics is not None)
        for inside, fused, _ in tape
    )
    if v is None:
        return RealPass(out, statistics, None, (), kink)
    gradient = Bounded(v.astype(np.longdouble), np.zeros(v.shape, dtype=np.longdouble))
    gradients: list[tuple[RealGradients, ...]] = []
    for block, (inside, fused, total) in zip(reversed(network), reversed(tape), strict=True):
        gradient = _masked(gradient, total)
        back, own = _real_back(block.fusion, fused, gradient, train)
        layers = []
        at, kernels = 0, sum(layer.weight.shape[2] for layer in block.branches)
        for layer, step in zip(block.branches, inside, strict=True):
            end = at + layer.weight.shape[0]
            share = Bounded(back.value[:, at:end], back.error[:, at:end])
            part, grads = _real_back(layer, step, _masked(share, step.out), train)
            gradient, at = _sum(gradient, part, block.fusion.weight.shape[0] * kernels), end
            layers.append(grads)
        gradients.insert(0, (*layers, own))
    return RealPass(out, statistics, gradient, tuple(gradients), kink)


def _relu(x: Bounded) -> Bounded:
    error = np.where(x.value > 0, x.error, np.maximum(0, x.value + x.error))
    return Bounded(np.maximum(x.value, 0), error)


def _undecided(x: Bounded) -> bool:
    return not bool((np.abs(x.value) > x.error).all())


def _masked(gradient: Bounded, x: Bounded) -> Bounded:
    return Bounded(
        np.where(x.value > 0, gradient.value, 0), np.where(x.value > 0, gradient.error, 0)
    )


def _sum(a: Bounded, b: Bounded, terms: int) -> Bounded:
    """The sum, where b is itself a sum of terms to which a may have been added first."""
    error = a.error + b.error + _gamma(terms + 8) * a.most + _gamma(8) * b.most
    return Bounded(a.value + b.value, error)


def _gamma(terms: int) -> np.longdouble:
    unit = np.longdouble(UNIT["float64"])
    return terms * unit / (1 - terms * unit)


def _real_layer(layer: Layer, x: Bounded, train: bool) -> _RealStep:
    weight = layer.weight.astype(np.longdouble)
    kernel, terms, batch = weight.shape[2], weight.shape[1] * weight.shape[2], x.value.shape[0]
    columns = Bounded(_columns(x.value, kernel), _columns(x.error, kernel))
    convolved = _apply(columns.value, weight, batch) + _column(layer.bias)
    size = _apply(columns.most, np.abs(weight), batch) + _column(np.abs(layer.bias))
    # Products that underflow are each off by less than the smallest double.
    error = _apply(columns.error, np.abs(weight), batch) + _gamma(terms + 1) * size
    z = Bounded(convolved, error + (terms + 1) * _SMALLEST_DOUBLE)
    if train:
        mean, variance, statistics = _batch_statistics(z, size)
    else:
        mean, variance = _given(layer.mean), _given(layer.variance)
        statistics = None
    total = variance.value + layer.eps
    certain = total - variance.error
    # Where the batch is so nearly constant that the variance is not certain there is no bound.
    relative = np.where(certain > 0, variance.error / np.where(certain > 0, certain, 1), np.nan)
    relative = np.expm1(np.log1p(relative) / 2)  # that of the inverse root: √(total/certain) − 1
    root = 1 / np.sqrt(total)
    size = _column(root) * (size + _column(mean.most))
    normalised = _column(root) * (z.value - _column(mean.value))
    off = _column(root * (1 + relative)) * (z.error + _column(mean.error))
    off = off + _column(relative) * np.abs(normalised)
    # The sum, and up to nine more roundings in the norm or in folding it into the weights.
    off = off + (_gamma(terms + 10) * size) * (1 + _column(relative)) + _SMALLEST_DOUBLE
    out = _column(layer.scale) * normalised + _column(layer.shift)
    scale = _column(np.abs(layer.scale))
    out_error = scale * off + _gamma(4) * (scale * (size + off) + _column(np.abs(layer.shift)))
    return _RealStep(
        columns,
        Bounded(normalised, off),
        size,
        root,
        relative,
        Bounded(out, out_error + _SMALLEST_DOUBLE),
        terms,
        statistics,
    )


def _given(values: Array) -> Bounded:
    return Bounded(values.astype(np.longdouble), np.zeros(values.shape, dtype=np.longdouble))


def _batch_statistics(z: Bounded, size: Array) -> tuple[Bounded, Bounded, TrainStatistics]:
    """Mean and biased variance of a batch, and what the running statistics learn of it.

    With m values per channel, the mean is off by the mean error of its terms and γ_{2m+8} of their
    mean magnitude, running means included. The variance is off by 2·mean|d|·δ + mean δ² for
    deviations d that are each off by δ, and γ_{3m+8} of the mean square, which also covers the
    formula E z² − (E z)²: m + 1 roundings of the first term and 2m + 1 of the second.
    """
    axes, m = (0, 2), z.value.shape[0] * z.value.shape[2]
    size = size + z.error
    mean = Bounded(z.value.mean(axis=axes), (z.error + _gamma(2 * m + 8) * size).mean(axis=axes))
    deviation = z.value - _column(mean.value)
    off = z.error + _column(mean.error) + UNIT["float64"] * np.abs(deviation)
    own = _gamma(3 * m + 8) * (size**2).mean(axis=axes)
    spread = (2 * np.abs(deviation) * off + off**2).mean(axis=axes) + own
    variance = Bounded((deviation**2).mean(axis=axes), spread)
    factor = np.longdouble(m) / (m - 1)
    unbiased = Bounded(variance.value * factor, variance.error * factor)
    return mean, variance, TrainStatistics(mean, unbiased)


def _real_back(
    layer: Layer, step: _RealStep, g: Bounded, train: bool
) -> tuple[Bounded, RealGradients]:
    """The gradient at a layer's input and those of its parameters, given that at its output.

    Training, the statistics depend on the input: with n the normalised values, the gradient before
    the norm is scale/√(variance + eps) · (g − mean g − n · mean(g n)) (Ioffe and Szegedy 2015).
    """
    batch, _, length = g.value.shape
    m, axes = batch * length, (0, 2)
    n, size = step.normalised, step.size + step.normalised.error
    along = (g.value * n.value).sum(axis=axes)
    along_size = (g.most * size).sum(axis=axes)
    along_error = (np.abs(g.value) * n.error + g.error * n.most).sum(axis=axes)
    along_error = along_error + _gamma(m + layer.weight[0].size + 10) * along_size
    total = g.value.sum(axis=axes)
    total_error = g.error.sum(axis=axes) + _gamma(m) * g.most.sum(axis=axes)
    core, core_error, core_size = g.value, g.error, g.most
    if train:
        core = core - _column(total / m) - n.value * _column(along / m)
        core_error = (
            core_error + _column(total_error / m) + np.abs(n.value) * _column(along_error / m)
        )
        core_error = core_error + n.error * _column((np.abs(along) + along_error) / m)
        core_size = core_size + _column(g.most.sum(axis=axes) / m) + size * _column(along_size / m)
        core_error = core_error + _gamma(6) * core_size
    slope = np.abs(layer.scale) * step.root
    before = _column(layer.scale * step.root) * core
    error = _column(slope * (1 + step.root_relative)) * core_error
    error = error + _column(slope * (step.root_relative + _gamma(8))) * core_size
    dz = Bounded(before, error + _SMALLEST_DOUBLE)
    weight = _transposed(layer.weight.astype(np.longdouble))
    kernel, terms = weight.shape[2], weight.shape[1] * weight.shape[2]
    spread = _apply(_columns(dz.error, kernel), np.abs(weight), batch)
    spread = spread + _gamma(terms + 2) * _apply(_columns(dz.most, kernel), np.abs(weight), batch)
    back = Bounded(_apply(_columns(dz.value, kernel), weight, batch), spread)
    rows, row_errors, row_sizes = _rows(dz.value), _rows(dz.error), _rows(dz.most)
    columns = step.columns
    own = row_errors @ columns.most + np.abs(rows) @ columns.error
    own = own + _gamma(m + 10) * (row_sizes @ columns.most)
    return back, RealGradients(
        weight=Bounded(
            (rows @ columns.value).reshape(layer.weight.shape), own.reshape(layer.weight.shape)
        ),
        bias=Bounded(rows.sum(axis=1), row_errors.sum(axis=1) + _gamma(m) * row_sizes.sum(axis=1)),
        scale=Bounded(along, along_error),
        shift=Bounded(total, total_error),
    )
