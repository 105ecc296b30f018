"""Real-valued networks: forward and backward pass with running bounds on round-off."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rescnn_verify.bounds.roundoff import FLOAT64, Format
from rescnn_verify.compare import NotApplicable
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

#: Parameters' gradients may be rounded once for so many positions of each sample, as an
#: implementation that works in chunks adds them up.
SHORTEST = 64

__all__ = ["Bounded", "RealPass", "TrainStatistics", "real_pass", "running_statistics"]


@dataclass(frozen=True)
class Bounded:
    """Values in a wider format, and how far any evaluation in a narrower one can be from each.

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
    """What a training pass makes of a norm's input.

    Args:
        mean: what the running mean learns.
        variance: what the running variance learns, the unbiased one.
        biased: the variance that it normalises with.
    """

    mean: Bounded
    variance: Bounded
    biased: Bounded


def running_statistics(
    layer: Layer, batch: TrainStatistics, form: Format = FLOAT64, stored: Format | None = None
) -> tuple[Bounded, Bounded]:
    """A norm's running mean and variance after a training batch, by the documented law.

    0.9 times the old and 0.1 times the batch's, with at most ten roundings: 0.1 and 1 − 0.1 in the
    format, two products, a sum and the factor m/(m − 1).

    Args:
        layer: with the statistics before.
        batch: what a training pass made of the norm's input.
        form: the format that the bounds are for.
        stored: that of the running statistics where it is another.
    """
    keep, take, own = form.exact("0.9"), form.exact("0.1"), stored or form

    def moved(old: Array, new: Bounded) -> Bounded:
        value = keep * old + take * new.value
        rounded = (
            form.exact(own.unit) * np.abs(old) + form.exact(own.unit + form.unit) * take * new.most
        )
        error = take * new.error + 10 * rounded + max(form.smallest, own.smallest)
        return Bounded(value, error)

    return moved(layer.mean, batch.mean), moved(layer.variance, batch.variance)


@dataclass(frozen=True)
class RealPass:
    """Forward and backward pass of a real-valued network.

    Args:
        out: the output, shape of the input.
        statistics: of the norms after a training pass, as in `ExactPass.gradients`, None for a
            frozen one; else empty.
        input_gradient: Jᵀv, None without v.
        gradients: of the parameters, as in `ExactPass`; empty without v.
        kink: whether some ReLU's input is so close to 0 that round-off may switch it.
        in_range: whether every value on the way surely stays below the largest of the format; if
            not, nothing is claimed.
    """

    out: Bounded
    statistics: tuple[tuple[TrainStatistics | None, ...], ...]
    input_gradient: Bounded | None
    gradients: tuple[tuple[Gradients[Bounded], ...], ...]
    kink: bool
    in_range: bool


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
        reach: the largest magnitudes on the way, with the norm folded into the weights or not.
        terms: how many products each of its values is a sum of.
        statistics: of the batch, after a training pass.
    """

    columns: Bounded
    normalised: Bounded
    size: Array
    root: Array
    root_relative: Array
    out: Bounded
    reach: Array
    terms: int
    statistics: TrainStatistics | None


def real_pass(
    network: tuple[Block, ...],
    x: Array,
    *,
    v: Array | None = None,
    train: bool = False,
    form: Format = FLOAT64,
) -> RealPass:
    """Forward and backward pass in a wider format with running error bounds for a narrower one.

    The bounds follow Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., sections 3.1
    and 3.3: a sum of n products in any order is off by at most γ_n Σ|w||v|, γ_n = nu/(1 − nu). They
    are carried from layer to layer beside the values. Rounding is bounded by what goes into a norm
    before anything cancels, so that the bounds also hold for weights with the norm folded in.

    Args:
        network: any finite weights.
        x: input, shape (batch, channels, length).
        v: vector of the vector-Jacobian product, of the same shape; None for the forward pass only.
        train: normalise with the batch's own statistics, but for frozen norms; dropout is what the
            blocks' masks say.
        form: the format that the bounds are for. What is stored on the way may be rounded as often
            as a kernel has taps or a fusion has branches, and a few times more; a parameter's
            gradient once for each `SHORTEST` positions of a sample: torch's own kernels add it up
            sample by sample, and what works in chunks adds up those.
    """
    if form is FLOAT64 and np.finfo(form.exact).nmant <= np.finfo(np.float64).nmant:
        raise NotApplicable("long double is no wider than float64 on this machine")
    out, reach = _given(x, form), _Reach()
    kink = False
    tape = []
    for block in network:
        inside = [_real_layer(layer, out, train, form) for layer in block.branches]
        active = [_relu(step.out) for step in inside]
        joined = Bounded(
            np.concatenate([a.value for a in active], 1),
            np.concatenate([a.error for a in active], 1),
        )
        fused = _real_layer(block.fusion, joined, train, form, parts=len(block.branches))
        dropped = _dropped(fused.out, block.mask, form)
        total = _sum(out, dropped, fused.terms, len(inside), form)
        kink |= any(_undecided(step.out) for step in inside) or _undecided(total)
        reach.note(*(step.reach for step in (*inside, fused)), dropped.most, total.most)
        tape.append((inside, fused, total))
        out = _relu(total)
    statistics = tuple(
        tuple(step.statistics for step in (*inside, fused)) if train else ()
        for inside, fused, _ in tape
    )
    if v is None:
        return RealPass(out, statistics, None, (), kink, bool(reach.most < form.largest))
    gradient = _given(v, form)
    gradients: list[tuple[Gradients[Bounded], ...]] = []
    for block, (inside, fused, total) in zip(reversed(network), reversed(tape), strict=True):
        gradient = _masked(gradient, total)
        kept = _dropped(gradient, block.mask, form)
        back, own = _real_back(block.fusion, fused, kept, train, form, reach)
        layers = []
        at, kernels = 0, sum(layer.weight.shape[2] for layer in block.branches)
        for layer, step in zip(block.branches, inside, strict=True):
            end = at + layer.weight.shape[0]
            share = Bounded(back.value[:, at:end], back.error[:, at:end])
            part, grads = _real_back(layer, step, _masked(share, step.out), train, form, reach)
            gradient, at = (
                _sum(gradient, part, block.fusion.weight.shape[0] * kernels, kernels, form),
                end,
            )
            layers.append(grads)
            reach.note(gradient.most)
        gradients.insert(0, (*layers, own))
    in_range = bool(reach.most < form.largest)
    return RealPass(out, statistics, gradient, tuple(gradients), kink, in_range)


class _Reach:
    """The largest magnitude met so far; NaN once there was one without a bound."""

    def __init__(self) -> None:
        self.most = 0.0

    def note(self, *magnitudes: Array) -> None:
        for magnitude in magnitudes:
            largest = float(np.max(magnitude, initial=0.0))
            self.most = largest if np.isnan(largest) else max(self.most, largest)


def _relu(x: Bounded) -> Bounded:
    error = np.where(x.value > 0, x.error, np.maximum(0, x.value + x.error))
    return Bounded(np.maximum(x.value, 0), error)


def _undecided(x: Bounded) -> bool:
    return not bool((np.abs(x.value) > x.error).all())


def _masked(gradient: Bounded, x: Bounded) -> Bounded:
    return Bounded(
        np.where(x.value > 0, gradient.value, 0), np.where(x.value > 0, gradient.error, 0)
    )


def _dropped(x: Bounded, mask: Array | None, form: Format) -> Bounded:
    """What dropout leaves of x, by a mask of 0 and s = 1/(1 − p).

    Roundings of p, of 1 − p, of its inverse and of the product: with p/(1 − p) = s − 1 they come
    to less than 4s units.
    """
    if mask is None:
        return x
    scale = mask.astype(form.exact)[:, :, None]
    return Bounded(scale * x.value, scale * (x.error + form.gamma(4, 4) * scale * x.most))


def _sum(a: Bounded, b: Bounded, terms: int, stored: int, form: Format) -> Bounded:
    """The sum, where both may be taken apart into the terms of either and added in any order."""
    error = a.error + b.error + form.gamma(terms + 8, stored + 8) * (a.most + b.most)
    return Bounded(a.value + b.value, error)


def _real_layer(
    layer: Layer, x: Bounded, train: bool, form: Format, *, parts: int = 1
) -> _RealStep:
    """A convolution and its norm; ``parts``: of how many pieces its input was put together."""
    weight = layer.weight.astype(form.exact)
    kernel, terms, batch = weight.shape[2], weight.shape[1] * weight.shape[2], x.value.shape[0]
    columns = Bounded(columns_of(x.value, kernel), columns_of(x.error, kernel))
    convolved = apply(columns.value, weight, batch) + column(layer.bias)
    size = apply(columns.most, np.abs(weight), batch) + column(np.abs(layer.bias))
    stored = kernel + parts + 2
    error = apply(columns.error, np.abs(weight), batch) + form.gamma(terms + 1, stored) * size
    z = Bounded(convolved, error + (terms + 1) * form.smallest)
    if train and not layer.frozen:
        mean, variance, statistics = _batch_statistics(z, size, form)
    else:
        mean, variance = _given(layer.mean, form), _given(layer.variance, form)
        statistics = None
    total = variance.value + layer.eps
    certain = total - variance.error
    # Where the batch is so nearly constant that the variance is not certain there is no bound.
    relative = np.where(certain > 0, variance.error / np.where(certain > 0, certain, 1), np.nan)
    relative = np.expm1(np.log1p(relative) / 2)  # that of the inverse root: √(total/certain) − 1
    root = 1 / np.sqrt(total)
    before = size + z.error
    size = column(root) * (size + column(mean.most))
    normalised = column(root) * (z.value - column(mean.value))
    off = column(root * (1 + relative)) * (z.error + column(mean.error))
    off = off + column(relative) * np.abs(normalised)
    # The sum, and up to nine more roundings in the norm or in folding it into the weights.
    off = off + (form.gamma(terms + 10, stored + 6) * size) * (1 + column(relative)) + form.smallest
    out = column(layer.scale) * normalised + column(layer.shift)
    scale = column(np.abs(layer.scale))
    # A folded shift is a bias: it goes through the whole sum.
    shifted = form.gamma(terms + 10, stored + 6) * column(np.abs(layer.shift))
    out_error = scale * off + form.gamma(4, 4) * scale * (size + off) + shifted
    return _RealStep(
        columns,
        Bounded(normalised, off),
        size,
        root,
        relative,
        Bounded(out, out_error + form.smallest),
        np.maximum(before, scale * (size + off) + column(np.abs(layer.shift))),
        terms,
        statistics,
    )


def _given(values: Array, form: Format) -> Bounded:
    return Bounded(values.astype(form.exact), np.zeros(values.shape, dtype=form.exact))


def _batch_statistics(
    z: Bounded, size: Array, form: Format
) -> tuple[Bounded, Bounded, TrainStatistics]:
    """Mean and biased variance of a batch, and what the running statistics learn of it.

    With m values per channel, the mean is off by the mean error of its terms and γ_{2m+8} of their
    mean magnitude, running means included. The variance is off by 2·mean|d|·δ + mean δ² for
    deviations d that are each off by δ, and γ_{3m+8} of the mean square, which also covers the
    formula E z² − (E z)²: m + 1 roundings of the first term and 2m + 1 of the second.
    """
    axes, m = (0, 2), z.value.shape[0] * z.value.shape[2]
    size = size + z.error
    off = z.error + form.gamma(2 * m + 8, 8) * size
    mean = Bounded(z.value.mean(axis=axes), off.mean(axis=axes))
    deviation = z.value - column(mean.value)
    off = z.error + column(mean.error) + form.unit * np.abs(deviation)
    own = form.gamma(3 * m + 8, 8) * (size**2).mean(axis=axes)
    spread = (2 * np.abs(deviation) * off + off**2).mean(axis=axes) + own
    variance = Bounded((deviation**2).mean(axis=axes), spread)
    factor = form.exact(m) / (m - 1)
    unbiased = Bounded(variance.value * factor, variance.error * factor)
    return mean, variance, TrainStatistics(mean, unbiased, variance)


def _real_back(
    layer: Layer, step: _RealStep, g: Bounded, train: bool, form: Format, reach: _Reach
) -> tuple[Bounded, Gradients[Bounded]]:
    """The gradient at a layer's input and those of its parameters, given that at its output.

    Training, the statistics depend on the input: with n the normalised values, the gradient before
    the norm is scale/√(variance + eps) · (g − mean g − n · mean(g n)) (Ioffe and Szegedy 2015).
    """
    batch, _, length = g.value.shape
    m, axes = batch * length, (0, 2)
    parts = batch * -(-length // SHORTEST)
    n, size = step.normalised, step.size + step.normalised.error
    along = (g.value * n.value).sum(axis=axes)
    along_size = (g.most * size).sum(axis=axes)
    along_error = (np.abs(g.value) * n.error + g.error * n.most).sum(axis=axes)
    along_error = along_error + form.gamma(m + layer.weight[0].size + 10, parts + 10) * along_size
    total = g.value.sum(axis=axes)
    total_error = g.error.sum(axis=axes) + form.gamma(m, parts + 2) * g.most.sum(axis=axes)
    core, core_error, core_size = g.value, g.error, g.most
    if train and not layer.frozen:
        core = core - column(total / m) - n.value * column(along / m)
        core_error = (
            core_error + column(total_error / m) + np.abs(n.value) * column(along_error / m)
        )
        core_error = core_error + n.error * column((np.abs(along) + along_error) / m)
        core_size = core_size + column(g.most.sum(axis=axes) / m) + size * column(along_size / m)
        core_error = core_error + form.gamma(6, 6) * core_size
    slope = np.abs(layer.scale) * step.root
    before = column(layer.scale * step.root) * core
    error = column(slope * (1 + step.root_relative)) * core_error
    error = error + column(slope * (step.root_relative + form.gamma(8, 8))) * core_size
    dz = Bounded(before, error + form.smallest)
    weight = transposed(layer.weight.astype(form.exact))
    kernel, terms = weight.shape[2], weight.shape[1] * weight.shape[2]
    spread = apply(columns_of(dz.error, kernel), np.abs(weight), batch)
    own = form.gamma(terms + 2, kernel + 2)
    spread = spread + own * apply(columns_of(dz.most, kernel), np.abs(weight), batch)
    back = Bounded(apply(columns_of(dz.value, kernel), weight, batch), spread)
    rows, row_errors, row_sizes = rows_of(dz.value), rows_of(dz.error), rows_of(dz.most)
    columns = step.columns
    own = row_errors @ columns.most + np.abs(rows) @ columns.error
    own = own + form.gamma(m + 10, parts + 10) * (row_sizes @ columns.most)
    row_error = row_errors.sum(axis=1) + form.gamma(m, parts + 2) * row_sizes.sum(axis=1)
    weights = Bounded(
        (rows @ columns.value).reshape(layer.weight.shape), own.reshape(layer.weight.shape)
    )
    bias, scale = Bounded(rows.sum(axis=1), row_error), Bounded(along, along_error)
    shift = Bounded(total, total_error)
    reach.note(core_size, *(b.most for b in (dz, back, weights, bias, scale, shift)))
    return back, Gradients(weight=weights, bias=bias, scale=scale, shift=shift)
