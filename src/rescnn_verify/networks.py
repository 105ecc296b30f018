"""Networks to write into a model: certified integer ones and real-valued ones of any magnitude."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from rescnn_verify.bounds.roundoff import SIGNIFICAND_BITS, UNIT
from rescnn_verify.case import Case
from rescnn_verify.handles import BlockHandles, ConvNorm, put
from rescnn_verify.oracles.integer import ExactPass, exact_pass
from rescnn_verify.oracles.layers import (
    Block,
    Layer,
    check_layers,
    read_network,
    write_network,
)
from rescnn_verify.patterns import in_pattern, patterned
from rescnn_verify.probes import BIG_VARIANCE, as_input, set_norm

__all__ = [
    "Certified",
    "certify",
    "certify_prefixes",
    "make_alternating",
    "make_balanced",
    "make_real",
    "values_of",
]


@dataclass(frozen=True)
class Certified:
    """An integer network that a model now holds, with data and what the oracle makes of them.

    Args:
        network: what was written into the model.
        x, v: input and vector of the vector-Jacobian product, shape (batch, channels, length).
        expected: the oracle's passes.
    """

    network: tuple[Block, ...]
    x: np.ndarray
    v: np.ndarray
    expected: ExactPass


def certify(
    blocks: Sequence[BlockHandles],
    case: Case,
    *,
    bits: str,
    kinkless: bool = False,
    pattern: str | None = None,
) -> Certified | None:
    """Writes a random integer network that is certified for the case's dtype into a model.

    In half of the cases the inputs, or one parameter of one layer, are as large as the certificate
    allows, so that clamps, saturation and shortened significands show. Where the first network
    needs too many bits, sparser ones are tried.

    Args:
        blocks: the model's handles.
        case: gives shape, dtype, layout and seed.
        bits: the field of `ExactPass` that must stay within the dtype's significand.
        kinkless: choose the shifts so that no ReLU has an input of exactly 0.
        pattern: of the input, one of `PATTERNS`; None: any, or none.

    Returns:
        None if even the sparsest network tried needs more bits than the dtype has.
    """
    limit = SIGNIFICAND_BITS[case.dtype]
    rng = case.rng("integer network")
    fraction = 0.5 if kinkless else 1.0
    for density in (float(rng.choice([1.0, 0.5, 0.25])), 0.1, 0.03):
        small = _integer_network(blocks, case.dtype, rng, density, fraction)
        x, v = _data(case, 1, pattern)
        through = None if bits == "forward_bits" else v
        plain = exact_pass(small, x, through, fraction=fraction)
        room = limit - getattr(plain, bits)
        if room < 0:
            continue
        grown = str(rng.choice(["input", "input", "weight", "bias", "mean", "shift"]))
        place = int(rng.integers(len(blocks))), int(rng.integers(len(blocks[0].layers)))
        most = min(int(room), 30)
        exponent = int(rng.choice([0, most, most, int(rng.integers(0, most + 1))]))
        for smaller in range(exponent, 0, -1):
            network, large = small, x
            if grown == "input":
                large, _ = _data(case, 2**smaller, pattern)
            else:
                network = _grow(small, place, grown, case, smaller)
            expected = exact_pass(network, large, through, fraction=fraction)
            if getattr(expected, bits) <= limit:
                write_network(network, blocks)
                return Certified(network, large, v, expected)
        write_network(small, blocks)
        return Certified(small, x, v, plain)
    return None


def certify_prefixes(
    blocks: Sequence[BlockHandles], case: Case, *, bits: str, kinkless: bool = False
) -> Certified | None:
    """As `certify`, for every prefix of the data, along the batch or the length.

    The network of the magnitudes of all numbers gives, on the largest magnitudes that the data may
    have, at least the magnitude of every intermediate on the data and on each of their prefixes,
    which only have fewer terms to add up. (Its own ReLUs let everything pass, as its shifts are
    positive where a backward pass is wanted.) Inputs are as large as that allows, or small.
    """
    limit = SIGNIFICAND_BITS[case.dtype]
    rng = case.rng("integer network")
    fraction = 0.5 if kinkless else 1.0
    ones = np.ones(case.shape)
    for density in (float(rng.choice([1.0, 0.5, 0.25])), 0.1, 0.03):
        network = _integer_network(blocks, case.dtype, rng, density, fraction)
        through = None if bits == "forward_bits" else 2 * ones
        most = exact_pass(_majorant(network), ones, through, fraction=fraction)
        room = limit - getattr(most, bits)
        if room >= 0:
            # An input 2^e times as large makes no intermediate larger than 2^e times.
            x, v = _data(case, 2 ** int(rng.choice([0, min(int(room), 30)])))
            write_network(network, blocks)
            through = None if bits == "forward_bits" else v
            return Certified(network, x, v, exact_pass(network, x, through, fraction=fraction))
    return None


def _majorant(network: tuple[Block, ...]) -> tuple[Block, ...]:
    """The network of the magnitudes of all numbers of a network."""
    return tuple(
        Block(tuple(map(_magnitudes, block.branches)), _magnitudes(block.fusion))
        for block in network
    )


def _magnitudes(layer: Layer) -> Layer:
    return replace(
        layer,
        weight=np.abs(layer.weight),
        bias=np.abs(layer.bias),
        scale=np.abs(layer.scale),
        shift=np.abs(layer.shift),
        mean=-np.abs(layer.mean),  # it is subtracted
    )


def _grow(
    network: tuple[Block, ...], place: tuple[int, int], field: str, case: Case, exponent: int
) -> tuple[Block, ...]:
    """The network with large integers in one parameter of one layer.

    Integer multiples leave every unit, and with them the certificate, as they are.
    """
    block, index = network[place[0]], place[1]
    layers = [*block.branches, block.fusion]
    values = getattr(layers[index], field)
    size = 2**exponent
    factors = case.rng("large integers").integers(-size, size + 1, values.shape)
    if field == "shift":
        factors = 2 * (factors // 2) + 1  # an odd multiple stays an odd multiple
    layers[index] = replace(layers[index], **{field: values * factors})
    changed = Block(tuple(layers[:-1]), layers[-1])
    return (*network[: place[0]], changed, *network[place[0] + 1 :])


def _data(case: Case, most: int, pattern: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    x = case.rng("integer input").integers(-most, most + 1, case.shape).astype(np.float64)
    v = case.rng("integer gradient").integers(-2, 3, case.shape).astype(np.float64)
    rng = case.rng("input pattern")
    x = in_pattern(x, pattern, rng) if pattern else patterned(x, rng)
    return values_of(case, x), values_of(case, patterned(v, case.rng("gradient pattern")))


def values_of(case: Case, values: np.ndarray) -> np.ndarray:
    """The values that an input of the case's layout and dtype really has, as float64."""
    out: np.ndarray = as_input(replace(case, device="cpu"), values).double().numpy()
    return out


def _integer_network(
    blocks: Sequence[BlockHandles],
    dtype: str,
    rng: np.random.Generator,
    density: float,
    fraction: float,
) -> tuple[Block, ...]:
    """A network of small integers with the shapes of a model's layers.

    With a fraction of ½ the shifts are halves before the first branches' ReLU, quarters before the
    first block's, and so on: an odd multiple of a unit that nothing else needs is never zero.

    Raises:
        UnsupportedLayerError: as `check_layers`.
    """
    check_layers(blocks)
    network = []
    unit = 1.0
    for block in blocks:
        layers = []
        for layer in block.layers:
            unit = unit * fraction if layer in (block.branches[0], block.fusion) else unit
            layers.append(_integer_layer(layer, dtype, rng, density, unit, fraction))
        network.append(Block(tuple(layers[:-1]), layers[-1]))
    return tuple(network)


_WEIGHTS = np.array([-2.0, -1.0, -1.0, 1.0, 1.0, 2.0])
_SCALES = np.array([-1.0, 1.0, 1.0, 2.0])
_ODD = np.array([-3.0, -1.0, 1.0, 3.0])


def _integer_layer(
    layer: ConvNorm,
    dtype: str,
    rng: np.random.Generator,
    density: float,
    unit: float,
    fraction: float,
) -> Layer:
    shape = tuple(layer.conv.weight.shape)
    count = shape[0]
    weight = _WEIGHTS[rng.integers(0, len(_WEIGHTS), shape)]
    if density < 1:
        weight = weight * (rng.random(shape) < density)
    has_bias = layer.conv.bias is not None
    shift = _ODD[rng.integers(0, 4, count)] * unit if fraction < 1 else _small(rng, count)
    variance = BIG_VARIANCE[dtype]
    return Layer(
        weight=weight,
        bias=_small(rng, count) if has_bias else np.zeros(count),
        scale=_SCALES[rng.integers(0, 4, count)] * _pruned(rng, count) * np.sqrt(variance),
        shift=shift,
        mean=_small(rng, count),
        variance=np.full(count, variance),
        eps=layer.norm.eps,
    )


def _pruned(rng: np.random.Generator, count: int) -> np.ndarray:
    """Factors of a norm's scales: in one layer of eight half are 0, as pruning leaves them.

    Never all of them, as then nothing would depend on the layer.
    """
    kept = np.ones(count)
    if rng.random() < 1 / 8:
        kept = rng.integers(2, size=count).astype(np.float64)
        kept[rng.integers(count)] = 1
    return kept


def _small(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.integers(-1, 2, count).astype(np.float64)


def make_real(blocks: Sequence[BlockHandles], case: Case, magnitude: float) -> tuple[Block, ...]:
    """Writes a real-valued network whose activations are all of about one magnitude.

    Weights, means and variances of each layer have a magnitude of their own between 1e-6 and
    1e4; the norm's scale brings the result back to ``magnitude``. Small variances make eps matter.
    """
    rng, pruning = case.rng("real network"), case.rng("pruning")
    for block in blocks:
        for layer in block.layers:
            shape = tuple(layer.conv.weight.shape)
            size = 10.0 ** rng.uniform(-6, 3)
            put(
                layer.conv,
                "weight",
                rng.standard_normal(shape) * size / np.sqrt(shape[1] * shape[2]),
            )
            scale = magnitude * size
            if layer.conv.bias is not None:
                put(layer.conv, "bias", rng.normal(0, 0.3, shape[0]) * scale)
            variance = 10.0 ** rng.uniform(-9, 4, shape[0])
            signs = rng.choice([-1, 1, 1], shape[0]) * _pruned(pruning, shape[0])
            slope = signs * rng.uniform(0.3, 1.5, shape[0]) / size
            set_norm(
                layer.norm,
                scale=slope * np.sqrt(variance + layer.norm.eps),
                shift=rng.normal(0, 0.5, shape[0]) * magnitude,
                mean=rng.normal(0, 0.5, shape[0]) * scale,
                variance=variance,
            )
    return read_network(blocks)


def make_alternating(block: BlockHandles, case: Case) -> np.ndarray:
    """Writes a block that hands on single channels, and makes an input that alternates in sign.

    So nothing cancels, norms make about ±1 of the values, and bounds for few bits say something.

    Returns:
        The input, of shape (batch, channels, length).
    """
    rng = case.rng("alternating network")
    for layer in block.layers:
        out, given, kernel = layer.conv.weight.shape
        taps = np.zeros((out, given, kernel))
        picked, weight = rng.integers(given, size=out), rng.choice([-1.0, 1.0, 2.0], out)
        taps[np.arange(out), picked, kernel // 2] = weight
        put(layer.conv, "weight", taps)
        put(layer.conv, "bias", np.zeros(()))
        scale, shift = rng.choice([-1.0, 1.0, 2.0], out), rng.choice([-0.25, 0.25], out)
        set_norm(layer.norm, scale=scale, shift=shift, mean=_small(rng, out))
    batch, channels, length = case.shape
    turns = np.arange(batch * length).reshape(batch, 1, length) + rng.integers(
        2, size=(channels, 1)
    )
    values: np.ndarray = (-1.0) ** turns * rng.uniform(4, 6, case.shape)
    return values


def make_balanced(block: BlockHandles, case: Case, dtype: str) -> tuple[np.ndarray, float]:
    """Writes a block, and makes an input, whose norms see half of their values at −s, half at s.

    So a batch's variance is s² to the bit, s a power of two so large that eps is rounded off, and
    a norm multiplies by a power of two in either mode. Each branch channel hands on one channel
    of the input, each fusion channel one of the branches, and no ReLU has an input near 0.

    Args:
        block: where it is written.
        case: of an even number of values for each channel.
        dtype: what the block computes in.

    Returns:
        The input, of shape (batch, channels, length), and s, to which inputs, biases and weights of
        the fusion are proportional.
    """
    rng = case.rng("balanced network")
    # Half a unit in the last place of s² exceeds eps.
    eps = max(layer.norm.eps for layer in block.layers)
    size = 2.0 ** math.ceil(math.log2(eps / UNIT[dtype]) / 2 + 1)
    signs = np.repeat([-1.0, 1.0], case.batch * case.length // 2)
    x = np.stack([rng.permutation(signs) for _ in range(case.channels)])
    x = x.reshape(case.channels, case.batch, case.length).swapaxes(0, 1) * size
    heights: list[np.ndarray] = []
    for layer in block.layers:
        out, given, kernel = layer.conv.weight.shape
        slopes = rng.choice([-2.0, -1.0, 1.0, 2.0], out)
        picked, weight = rng.integers(given, size=out), rng.choice([-1.0, 1.0], out)
        mean = np.zeros(out)
        if layer is block.fusion:
            # A branch's output is 0 or its slope.
            mean = weight * size
            weight = 2 * mean / np.concatenate(heights)[picked]
        heights.append(np.abs(slopes))
        taps = np.zeros((out, given, kernel))
        taps[np.arange(out), picked, kernel // 2] = weight
        put(layer.conv, "weight", taps)
        bias = size * _small(rng, out)
        if layer.conv.bias is not None:
            put(layer.conv, "bias", bias)
            mean = mean + bias
        shift = 3 * _small(rng, out) if layer is block.fusion else 0.0
        set_norm(layer.norm, scale=slopes, shift=shift, mean=mean, variance=size**2)
    return x, size
