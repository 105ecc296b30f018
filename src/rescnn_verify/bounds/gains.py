"""How much a stack of residual blocks can amplify a gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rescnn_verify.bounds.norms import conv_norm_bound
from rescnn_verify.bounds.roundoff import gamma
from rescnn_verify.handles import BlockHandles
from rescnn_verify.oracles.layers import Block, Layer, read_network
from rescnn_verify.oracles.real import RealPass, TrainStatistics

__all__ = ["Gain", "block_gain", "lipschitz_bound", "stack_gain"]

Array = np.ndarray


@dataclass(frozen=True)
class Gain:
    """Bounds on a network's Jacobian J, whatever the signs before its ReLUs.

    Args:
        norm: ‖J‖ ≤ norm, and so for the transpose: the network's Lipschitz constant.
        departure: ‖Jᵀv − D v‖ ≤ departure · ‖v‖, D the product of the masks behind the residuals.
    """

    norm: float
    departure: float


def lipschitz_bound(blocks: Sequence[BlockHandles], *, length: int | None = None) -> float:
    """An upper bound on the Lipschitz constant, in the 2-norm, of a stack of residual blocks.

    For y = relu(x + F relu(W x)) in eval mode, block by block. It also bounds every gradient:
    ‖Jᵀv‖ ≤ bound · ‖v‖ for any input and any v. There is no such bound from below: a ReLU behind
    the residual can make a gradient vanish.

    Args:
        blocks: as a target's handles give them; ``contract_handles(model, config)`` finds those of
            the reference architecture.
        length: of the signal; None for a bound that holds for every length.

    Returns:
        The product over the blocks of `block_gain`, within a few per cent of the norm for one
        block and ever looser for more (see docs/bounds.md).

    Raises:
        UnsupportedLayerError: a convolution that is strided, dilated, grouped, of an even kernel,
            or not padded with zeros.
    """
    return stack_gain(read_network(blocks), length=length).norm


def stack_gain(
    network: Sequence[Block],
    *,
    length: int | None = None,
    trained: RealPass | None = None,
    dropout: float = 0.0,
) -> Gain:
    """The gain of blocks one after the other.

    Args:
        network: the blocks.
        length: of the signal; None for a bound that holds for every length.
        trained: the training pass whose batch statistics the norms use; None for eval mode.
        dropout: probability of zeroing a channel in training; survivors grow by 1/(1 − p).
    """
    norm = through = 1.0
    for place, block in enumerate(network):
        statistics = trained.statistics[place] if trained else ()
        gain = block_gain(block, length=length, statistics=statistics, dropout=dropout)
        norm, through = norm * gain.norm, through * (1 + gain.departure)
    own = gamma(4 * len(network) + 4)
    return Gain(norm * (1 + own), (through - 1) * (1 + own) + through * own)


def block_gain(
    block: Block,
    *,
    length: int | None = None,
    statistics: Sequence[TrainStatistics | None] = (),
    dropout: float = 0.0,
) -> Gain:
    """The gain of one block y = relu(x + F relu(W x)), norms folded into F and W.

    With any 0/1 masks D₁ and D₂, J = D₂(I + F D₁ W). So ‖J‖ ≤ 1 + ρ for ρ ≥ ‖F D₁ W‖, and both
    ‖F‖‖W‖ and ‖F T⁻¹‖‖T W‖ are such ρ for any positive diagonal T, which commutes with D₁; here
    T_i = √(‖F_:i‖ / ‖W_i‖). As D₁ = ½(I + S) with ‖S‖ = 1, also ‖J‖ ≤ ‖I + ½FW‖ + ½‖F‖‖W‖.

    In training a norm's Jacobian is γ/√(variance + eps) times a contraction in each channel (Ioffe
    and Szegedy 2015), which commutes with T and shortens; ρ stands, with the batch's variance and F
    divided by 1 − p.
    """
    layers = (*block.branches, block.fusion)
    slopes = [_slope(layer, place, statistics) for place, layer in enumerate(layers)]
    scaled = [s[:, None, None] * x.weight for s, x in zip(slopes, layers, strict=True)]
    branches = _stacked(scaled[:-1])
    fusion = scaled[-1] / (1 - dropout) if dropout < 1 else np.zeros_like(scaled[-1])
    rounding = 1 + gamma(16)
    f_norm, w_norm = conv_norm_bound(fusion), conv_norm_bound(branches, length=length)
    columns = np.linalg.norm(fusion[:, :, 0], axis=0)
    rows = np.linalg.norm(branches.reshape(len(branches), -1), axis=1)
    usable = (columns > 0) & (rows > 0)
    balance = np.sqrt(np.where(usable, columns, 1.0) / np.where(usable, rows, 1.0))
    balanced = conv_norm_bound(fusion / balance[None, :, None]) * conv_norm_bound(
        branches * balance[:, None, None], length=length
    )
    departure = min(f_norm * w_norm, balanced) * rounding
    norm = 1 + departure
    if not statistics:
        norm = min(norm, _half(fusion, branches, length) + f_norm * w_norm * rounding / 2)
    return Gain(norm * rounding, departure)


def _half(fusion: Array, branches: Array, length: int | None) -> float:
    """A bound on ‖I + ½FW‖."""
    channels, kernel = fusion.shape[0], branches.shape[2]
    product = np.tensordot(fusion[:, :, 0], branches, axes=1) / 2
    product[np.arange(channels), np.arange(channels), kernel // 2] += 1
    terms = np.tensordot(np.abs(fusion[:, :, 0]), np.abs(branches), axes=1)
    off = gamma(fusion.shape[1] + 20) * float(np.linalg.norm(terms.sum(axis=2) + 1))
    return conv_norm_bound(product, length=length) + off * (1 + gamma(terms.size + 8))


def _slope(layer: Layer, place: int, statistics: Sequence[TrainStatistics | None]) -> Array:
    """The factor of a norm in each channel, rounded up in magnitude."""
    variance = layer.variance
    batch = statistics[place] if statistics else None
    if batch is not None:
        # The biased variance from below: that of the statistics is unbiased, so larger.
        learned = batch.biased
        variance = np.maximum(0, (learned.value - learned.error).astype(np.float64))
    slope: Array = layer.scale / np.sqrt(variance + layer.eps) * (1 + gamma(8))
    return slope


def _stacked(weights: Sequence[Array]) -> Array:
    """Convolutions of one input as one, each padded with zeros to the widest kernel and centred."""
    widest = max(weight.shape[2] for weight in weights)
    sides = [(widest - weight.shape[2]) // 2 for weight in weights]
    return np.concatenate(
        [
            np.pad(weight, ((0, 0), (0, 0), (side, side)))
            for weight, side in zip(weights, sides, strict=True)
        ]
    )
