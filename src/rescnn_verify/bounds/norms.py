"""Operator norms of zero-padded convolutions, bounded from above, their own round-off included."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from rescnn_verify.bounds.roundoff import UNIT, gamma

__all__ = ["conv_norm_bound"]

Array = np.ndarray

#: Sampled frequencies for each degree of the symbol; cos(π/24) costs 0.9 %.
OVERSAMPLING = 24

#: A trial value for matrices of zeros.
TINY = 2.0**-1000

#: Elements of the matrices that are factorised together.
IN_CACHE = 2**19


def conv_norm_bound(
    weight: Array, *, length: int | None = None, dilation: int = 1, groups: int = 1
) -> float:
    """An upper bound on the 2-norm of a stride-1 convolution with zero padding.

    For every length, the convolution is a compression of the bi-infinite one, whose norm is the
    largest singular value of the symbol Ŵ(ω) = Σ_j W_j exp(−iωj) over all ω. It is taken at N
    equispaced frequencies and divided by cos(πr/N), r = kernel // 2: for unit vectors u and v,
    u*Ŵ(ω)v is a trigonometric polynomial of degree r up to a phase, and Ehlich and Zeller
    (Math. Z. 86, 1964) bound the maximum of those by their samples. Dilation changes the frequency
    at which a value is taken and no value.

    For one length L, it is also a compression of the circulant convolution of L + dilation · r
    points, whose norm is the largest singular value at its own frequencies; the smaller bound of
    the two is returned. (The circulant of L points is no bound: it wraps around.)

    Round-off is included: the singular values are certified by Cholesky factorisations
    (`largest_eigenvalue_bound`). For a long signal the result is within 1 % of the norm.

    Args:
        weight: shape (out, in / groups, kernel), any finite values.
        length: of the signal, "same" padding; None for a bound that holds for every length.
        dilation, groups: of the convolution.

    Raises:
        ValueError: a weight that is not of that shape or not finite, or arguments below 1.
    """
    weight = np.asarray(weight, dtype=np.float64)
    if weight.ndim != 3 or not np.isfinite(weight).all():
        raise ValueError(
            f"weight must be a finite array of shape (out, in / groups, kernel), got shape "
            f"{weight.shape}{'' if np.isfinite(weight).all() else ' with non-finite values'}"
        )
    for name, value in (("dilation", dilation), ("groups", groups), ("length", length)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if weight.shape[0] % groups:
        raise ValueError(f"{weight.shape[0]} output channels are no multiple of {groups} groups")
    parts = np.split(weight, groups) if weight.size else []
    return max((_dense_bound(part, length, dilation) for part in parts), default=0.0)


def _dense_bound(weight: Array, length: int | None, dilation: int) -> float:
    degree = weight.shape[2] // 2
    if length is not None and weight.shape[2] % 2:  # taps that never meet the signal
        reach = min(degree, (length - 1) // dilation)
        weight, degree = weight[:, :, degree - reach : degree + reach + 1], reach
    largest = float(np.abs(weight).max(initial=0.0))
    if largest == 0.0:
        return 0.0
    scale = math.ldexp(1.0, math.frexp(largest)[1] - 1)  # exact; squares stay in range
    weight = weight / scale
    count = max(1, OVERSAMPLING * degree)
    bound = _largest_at(weight, count, 1) / math.cos(math.pi * degree / count)
    circulant = count if length is None else length + dilation * degree
    if circulant < count:
        bound = min(bound, _largest_at(weight, circulant, dilation))
    return bound * scale * (1 + 4 * UNIT["float64"])


def _largest_at(weight: Array, count: int, dilation: int) -> float:
    """A bound on the largest singular value of the symbol at ``count`` equispaced frequencies.

    Its square is the largest eigenvalue of Ŵ(ω)Ŵ(ω)* = Σ_d C_d exp(−iωd), where C_d = Σ_t W_{t+d}
    W_tᵀ and C_{−d} = C_dᵀ. That of −ω is the conjugate of that of ω, so half of them do.
    """
    if weight.shape[0] > weight.shape[1]:
        weight = weight.swapaxes(0, 1)
    out, inputs, kernel = weight.shape
    taps = torch.from_numpy(np.ascontiguousarray(weight.transpose(2, 0, 1)))
    lags = [
        torch.tensordot(taps[lag:], taps[: kernel - lag], dims=([0, 2], [0, 2]))
        for lag in range(kernel)
    ]
    turns = np.outer(np.arange(count // 2 + 1), dilation * np.arange(1, kernel)) % count
    phases = torch.from_numpy(np.exp(-2j * np.pi * turns / count))
    stacked = torch.stack(lags[1:]).to(phases.dtype) if kernel > 1 else None

    def grams() -> Iterator[Tensor]:
        for some in torch.split(phases, max(1, IN_CACHE // out**2)):
            gram = lags[0].to(phases.dtype).expand(len(some), out, out)
            if stacked is not None:
                upper = torch.tensordot(some, stacked, dims=1)
                gram = gram + upper + upper.mH
            yield gram

    # Each element is a sum of kernel² · inputs products, each with a phase that is off by less than
    # 16 units: those of π, the product and the quotient, times an angle below 2π, and of the
    # exponential. Twice that for the two parts of a complex number; Frobenius bounds the 2-norm.
    size = float((np.abs(weight).sum(axis=2) ** 2).sum()) * (1 + gamma(weight.size + 8))
    return math.sqrt(largest_eigenvalue_bound(grams(), gamma(2 * (kernel**2 * inputs + 48)) * size))


def largest_eigenvalue_bound(batches: Iterable[Tensor], error: float = 0.0) -> float:
    """An upper bound on the largest eigenvalue of any of many Hermitian matrices.

    A Cholesky factorisation of cI − M that runs to completion proves cI − M ≥ −E with ‖E‖ ≤
    γ tr(cI − M) / (1 − γ), γ = γ_{4(n+2)} (Higham, Accuracy and Stability of Numerical Algorithms,
    2nd ed., theorem 10.3; by lemma 3.5 the constants for complex numbers are at most four times
    those for real ones). The trial values c are computed eigenvalues and a little more.

    Args:
        batches: positive semidefinite but for ``error``, each of shape (count, n, n).
        error: a bound on the 2-norm of what they are off by.
    """
    bound, n = 0.0, 0
    for rest in batches:
        n = rest.shape[1]
        identity = torch.eye(n, dtype=rest.dtype)
        while len(rest):
            _, info = torch.linalg.cholesky_ex(bound * identity - rest)
            rest = rest[info != 0]
            if len(rest):
                largest = float(torch.linalg.eigvalsh(rest[len(rest) // 2])[-1])
                # Raised by more than the next factorisation's own round-off uses up.
                bound = max(bound, largest, TINY) + error
                bound *= 1 + 1e-9 + 4 * gamma(4 * (n + 2)) * n
    # The trace is at most n · bound, and each diagonal element of cI − M is rounded once.
    own = gamma(4 * (n + 2))
    trace = (own / (1 - own) + UNIT["float64"]) * n
    return (bound + error) * (1 + trace) * (1 + gamma(8))
