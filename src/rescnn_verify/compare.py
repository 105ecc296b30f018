"""Comparisons: what a property yields, and what a falsified one says.

Every function here makes one comparison. It returns a `Comparison` when it holds and raises
`Falsified` when it does not: a property reads ``yield equal(got, expected, "what")``, and the
number of values yielded is the number of assertions made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "Comparison",
    "Falsified",
    "NotApplicable",
    "at_most",
    "attempt",
    "describe",
    "equal",
    "holds",
    "refuses",
    "same_bits",
    "same_tensors",
    "same_values",
    "within",
]


@dataclass(frozen=True)
class Comparison:
    """One comparison that held.

    Args:
        what: the quantity compared.
        ratio: worst error over bound for a bounded comparison, None for an exact one.
    """

    what: str
    ratio: float | None = None


class NotApplicable(Exception):
    """The target does not support what a property needs, which only running it could tell."""


class Falsified(AssertionError):
    """The target does not do what the property states.

    Args:
        what: the quantity compared.
        expected, got: both sides, as text.
    """

    def __init__(self, what: str, expected: str, got: str) -> None:
        super().__init__(what, expected, got)
        self.what, self.expected, self.got = what, expected, got

    def __str__(self) -> str:
        return f"{self.what}: expected {self.expected}, got {self.got}"


def holds(condition: bool, what: str, expected: str, got: str) -> Comparison:
    """``condition`` is true."""
    if not condition:
        raise Falsified(what, expected, got)
    return Comparison(what)


def equal(got: Any, expected: Any, what: str) -> Comparison:
    """``got == expected``, for plain values (numbers, tuples, names)."""
    return holds(bool(got == expected), what, repr(expected), repr(got))


def same_bits(got: Tensor, expected: Tensor | np.ndarray, what: str) -> Comparison:
    """Equal shape and equal values, NaN equal to NaN and −0 to +0; no tolerance.

    Args:
        got: any tensor.
        expected: a tensor of the same dtype, or a float64 array that ``got``'s dtype can hold.
    """
    if got.is_meta:
        raise Falsified(what, "values", "a tensor without any, on the device meta")
    got = got.detach().cpu()
    if isinstance(expected, np.ndarray):
        expected = torch.from_numpy(np.ascontiguousarray(expected)).to(got.dtype)
    expected = expected.detach().cpu()
    if got.shape != expected.shape or got.dtype != expected.dtype:
        raise Falsified(what, _kind(expected), _kind(got))
    if torch.equal(got, expected):
        return Comparison(what)
    different = (got != expected) & ~(torch.isnan(got) & torch.isnan(expected))
    return _no_difference(got, expected, different, what)


#: How near to 0 a value of an integer network in float16 may be that is 0 exactly. There norms have
#: a variance of 4^7 (`probes.BIG_VARIANCE`), off which the contract's eps of 10^-5 is rounded in
#: float16 and float32, but not in float64. What is computed there is off by the relative error that
#: eps makes of 1/√variance, eps/(2·4^7) to first order, for each of two norms in a block; the
#: certificate keeps the magnitudes of what cancels within 2^11. So 2n · eps/(2·4^7) · 2^11 < 2^-14
#: for n ≤ 48 blocks. Any other value is rounded to what it is exactly.
TINY = 2.0**-14


def same_values(got: Tensor, expected: Tensor | np.ndarray, what: str) -> Comparison:
    """`same_bits` of what an integer network gives; in float16 a 0 may be up to `TINY` off.

    Args:
        got: any tensor.
        expected: exact values, or a tensor of the same dtype that may be as far off as ``got``.
    """
    if got.dtype != torch.float16 or got.is_meta:
        return same_bits(got, expected, what)
    got = got.detach().cpu()
    if isinstance(expected, np.ndarray):
        expected = torch.from_numpy(np.ascontiguousarray(expected)).to(got.dtype)
        zero = expected == 0
    else:
        expected = expected.detach().cpu()
        zero = expected.abs() < TINY
        expected = expected.masked_fill(zero, 0)
    if got.shape == expected.shape:
        got = got.masked_fill(zero & (got.abs() < TINY), 0)
    return same_bits(got, expected, what)


def same_tensors(
    got: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str
) -> Comparison:
    """The same names in the same order, and the same bits under each."""
    if list(got) != list(expected):
        raise Falsified(f"{what}: names", repr(list(expected)), repr(list(got)))
    for name, tensor in expected.items():
        same_bits(got[name], tensor, f"{what}: {name}")
    return Comparison(what)


class HasBound(Protocol):
    """Values with an error bound for each, as the oracles give them."""

    @property
    def value(self) -> np.ndarray: ...
    @property
    def error(self) -> np.ndarray: ...


def within(got: Tensor, expected: HasBound, what: str) -> Comparison:
    """|got − value| ≤ error elementwise, in extended precision.

    Args:
        got: any tensor.
        expected: the exact values up to an error that the derived bound includes; same shape.
    """
    values = got.detach().cpu().to(torch.float64).numpy()
    exact, bound = expected.value, expected.error
    if values.shape != exact.shape:
        raise Falsified(what, f"shape {exact.shape}", f"shape {values.shape}")
    error = np.abs(values.astype(exact.dtype) - exact)
    bad = ~(error <= bound)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(error > 0, error / bound, 0)
    if not bad.any():
        return Comparison(what, float(ratio.max(initial=0.0)))
    worst = np.unravel_index(np.argmax(np.where(bad, np.nan_to_num(ratio), -1)), bad.shape)
    place = tuple(int(i) for i in worst)
    raise Falsified(
        f"{what} at {list(place)} ({int(bad.sum())} of {bad.size} elements are off)",
        f"{float(exact[place])!r} ± {float(bound[place]):.3g}",
        f"{float(values[place])!r} (error {float(error[place]):.3g})",
    )


def at_most(got: float, bound: float, what: str) -> Comparison:
    """``got ≤ bound``, for a magnitude and a derived bound."""
    if not got <= bound:
        raise Falsified(what, f"at most {bound!r}", repr(got))
    return Comparison(what, got / bound if bound > 0 else 0.0)


def attempt(what: str, action: Callable[[], Any]) -> Any:
    """The result of the target's code; an exception in it falsifies.

    Everything that runs code of the target on a case it promised goes through here, so that an
    exception anywhere else is the suite's own.
    """
    try:
        return action()
    except (Falsified, NotApplicable, torch.OutOfMemoryError):
        raise  # a device that is too small says nothing about the target
    except (Exception, SystemExit) as error:
        raise Falsified(what, "no exception", describe(error)) from error


def refuses(
    action: Callable[[], Any], errors: tuple[type[Exception], ...], what: str
) -> Exception | None:
    """The exception with which ``action`` refuses, None when it returns.

    Raises:
        Falsified: an exception of another type than ``errors``.
    """
    try:
        action()
    except errors as error:
        return error
    except (Exception, SystemExit) as error:
        names = " or ".join(kind.__name__ for kind in errors)
        raise Falsified(what, f"{names}, or no exception", describe(error)) from error
    return None


def describe(error: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"


def _no_difference(got: Tensor, expected: Tensor, different: Tensor, what: str) -> Comparison:
    where = different.nonzero()
    if len(where) == 0:
        return Comparison(what)
    place = tuple(int(i) for i in where[0])
    raise Falsified(
        f"{what} at {list(place)} ({len(where)} of {different.numel()} elements differ)",
        repr(expected[place].item()),
        repr(got[place].item()),
    )
