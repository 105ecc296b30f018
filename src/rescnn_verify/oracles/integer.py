"""Integer networks: forward and backward pass in float64, exact, with a certificate.

As long as no intermediate needs more bits than a dtype has, every evaluation order in that dtype
gives the same exact result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rescnn_verify.oracles.layers import (
    Array,
    Block,
    Gradients,
    Layer,
    apply,
    column,
    columns_of,
    rows_of,
    transposed,
)

__all__ = ["ExactPass", "exact_pass", "outputs_of_prefixes"]


@dataclass(frozen=True)
class ExactPass:
    """Forward and backward pass of an integer network.

    Without a backward pass there are no gradients, and nobody knows how many bits it needs: they
    are infinitely many.

    Args:
        out: the output, shape of the input.
        input_gradient: Jᵀv, shape of the input.
        gradients: of the parameters, block by block, branches in order and then the fusion.
        forward_bits, backward_bits, weight_bits: bits of the significand that the pass needs, in
            whatever order sums are taken; each includes those before it.
        kink: whether some ReLU had an input of exactly 0, where any subgradient is right.
        masks: where each ReLU's input is positive, in the order of evaluation.
    """

    out: Array
    input_gradient: Array
    gradients: tuple[tuple[Gradients[Array], ...], ...]
    forward_bits: float
    backward_bits: float
    weight_bits: float
    kink: bool
    masks: tuple[Array, ...]


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
    network: tuple[Block, ...],
    x: Array,
    v: Array | None,
    *,
    fraction: float = 1.0,
    present: Array | None = None,
) -> ExactPass:
    """Forward and backward pass of a network whose norms multiply by ±2^i, i ≥ 0.

    Args:
        network: weights, biases and means are integers; the variance is a power of four to which
            adding eps changes nothing in the dtype under test. Block i's shifts are multiples of
            ``fraction^(2i + 1)`` in the branches and ``fraction^(2i + 2)`` in the fusion, i ≥ 0.
        x, v: the input and the vector of the vector-Jacobian product, integers of shape (batch,
            channels, length); v None: no backward pass.
        fraction: 1 or ½.
        present: 1 where a row's signal is and 0 where it is padded, shape (batch, 1, length), for
            signals of several lengths in one batch; only without a backward pass.
    """
    forward, backward, weights = _Bits(), _Bits(), _Bits()
    kink = False
    masks: list[Array] = []
    tape = []
    out, unit = x, 1.0
    for block in network:
        inside = [_exact_layer(layer, out, forward, unit * fraction) for layer in block.branches]
        kink |= any(bool((step.out == 0).any()) for step in inside)
        joined = np.concatenate([np.maximum(step.out, 0) for step in inside], axis=1)
        fused = _exact_layer(block.fusion, joined, forward, unit * fraction**2)
        forward.need(np.abs(out) + fused.magnitude, unit * fraction**2)
        total = out + fused.out
        masks += [*(step.out > 0 for step in inside), total > 0]
        kink |= bool((total == 0).any())
        tape.append((inside, fused, total, unit))
        out, unit = np.maximum(total, 0), unit * fraction**2
        if present is not None:
            out = out * present
    if v is None:
        nothing = np.empty(0)
        return ExactPass(out, nothing, (), forward.most, np.inf, np.inf, kink, tuple(masks))
    gradient = v
    gradients: list[tuple[Gradients[Array], ...]] = []
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
        out,
        gradient,
        tuple(gradients),
        forward.most,
        needed,
        max(needed, weights.most),
        kink,
        tuple(masks),
    )


def outputs_of_prefixes(
    network: tuple[Block, ...], x: Array, out: Array, lengths: Sequence[int]
) -> dict[int, Array]:
    """The outputs for the first so many positions of an input, for several lengths at once.

    Only at the end, as far as the network reaches, is a prefix's output not that of the whole
    input; there it is a function of the prefix's last positions, twice as many.

    Args:
        network, x: as of `exact_pass`.
        out: the network's output for x.
        lengths: from 1 to the length of x.

    Returns:
        Length → output, shape (batch, channels, length).
    """
    reach = sum(max(b.weight.shape[2] for b in block.branches) // 2 for block in network)
    batch, channels, _ = x.shape
    width = max(1, min(2 * reach, max(lengths)))
    ends = np.zeros((len(lengths), batch, channels, width))
    present = np.zeros((len(lengths), batch, 1, width))
    for i, length in enumerate(lengths):
        last = x[:, :, max(length - width, 0) : length]
        ends[i, :, :, width - last.shape[2] :] = last
        present[i, :, :, width - last.shape[2] :] = 1
    flat = exact_pass(
        network,
        ends.reshape(-1, channels, width),
        None,
        present=present.reshape(-1, 1, width),
    )
    tails = flat.out.reshape(ends.shape)
    return {
        length: np.concatenate(
            (out[:, :, : max(length - reach, 0)], tails[i, :, :, width - min(length, reach) :]), 2
        )
        for i, length in enumerate(lengths)
    }


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
    columns = columns_of(x, layer.weight.shape[2])
    z = apply(columns, layer.weight, batch) + column(layer.bias)
    # The terms' magnitudes bound every partial sum; with mean, shift and slope they also bound any
    # order of the affine map, and weights that the norm was folded into.
    terms = apply(np.abs(columns), np.abs(layer.weight), batch)
    terms += column(np.abs(layer.bias) + np.abs(layer.mean))
    magnitude = column(np.abs(slope)) * terms + column(np.abs(layer.shift))
    bits.need(magnitude, unit)
    centred = z - column(layer.mean)
    pre = column(slope) * centred + column(layer.shift)
    return _Step(columns, centred, terms, pre, magnitude)


def _exact_back(
    layer: Layer, step: _Step, g: Array, backward: _Bits, weights: _Bits, unit: float
) -> tuple[Array, Array, Gradients[Array]]:
    """The gradient at a layer's input, its terms' magnitudes, and the parameters' gradients.

    Args:
        g: the gradient at the norm's output, integers.
        unit: of the layer's input.
    """
    batch = g.shape[0]
    before_norm = column(_slope(layer)) * g
    weight = transposed(layer.weight)
    columns = columns_of(before_norm, layer.weight.shape[2])
    terms = apply(np.abs(columns), np.abs(weight), batch)
    backward.need(terms, 1.0)
    rows = rows_of(before_norm)
    weights.need(np.abs(rows) @ np.abs(step.columns), unit)
    weights.need((np.abs(g) * step.terms).sum(axis=(0, 2)), unit)
    weights.need(np.abs(rows).sum(axis=1), 1.0)
    return (
        apply(columns, weight, batch),
        terms,
        Gradients(
            weight=(rows @ step.columns).reshape(layer.weight.shape),
            bias=rows.sum(axis=1),
            scale=(g * step.convolved).sum(axis=(0, 2)) / np.sqrt(layer.variance),
            shift=g.sum(axis=(0, 2)),
        ),
    )
