"""Floating-point formats as round-off analysis sees them, and its constants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["FLOAT64", "FORMATS", "SIGNIFICAND_BITS", "TF32", "UNIT", "Format", "gamma"]

#: Bits of the significand, the hidden one included: integers up to 2^p are exact.
SIGNIFICAND_BITS = {"float64": 53, "float32": 24, "float16": 11, "bfloat16": 8}

#: Unit round-off: a correctly rounded result is off by at most this much of itself.
UNIT = {dtype: 2.0**-bits for dtype, bits in SIGNIFICAND_BITS.items()}


def gamma(terms: int, unit: float = UNIT["float64"]) -> float:
    """γ_n = nu / (1 − nu), the relative error that n roundings add up to.

    Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., lemma 3.1. Infinite where nu
    reaches 1: nothing is known then.
    """
    product = terms * unit
    return product / (1 - product) if product < 1 else float("inf")


@dataclass(frozen=True)
class Format:
    """A floating-point format, and how a device computes in it.

    Args:
        dtype: its name.
        unit: unit round-off of what is stored.
        accumulation: unit round-off in which products are summed.
        smallest: what underflow loses at most.
        largest: the largest finite value.
        exact: the NumPy type in which an oracle for it computes. The oracle's own round-off is
            below 2^-10 of the bound, which includes it.
    """

    dtype: str
    unit: float
    accumulation: float
    smallest: float
    largest: float
    exact: Any

    def gamma(self, terms: int, stored: int) -> Any:
        """The relative error of a sum of products.

        Args:
            terms: all roundings, those of partial sums included.
            stored: how many of them may be those of what is stored: operands, partial results, the
                result. It matters only where sums are taken in a wider format.
        """
        total = gamma(terms, self.accumulation)
        if self.unit > self.accumulation:
            total += gamma(stored, self.unit) * (1 + total)
        return self.exact(total * (1 + 2.0**-10))


FLOAT64 = Format("float64", UNIT["float64"], UNIT["float64"], 5e-324, 2.0**1023, np.longdouble)

#: As on the CPU and, TF32 and reduced-precision sums off, on CUDA: products are summed in float32.
#: Subnormals are lost in some of the instructions for float32 and bfloat16.
FORMATS = {
    "float64": FLOAT64,
    "float32": Format("float32", UNIT["float32"], UNIT["float32"], 2.0**-126, 2.0**127, np.float64),
    "float16": Format("float16", UNIT["float16"], UNIT["float32"], 2.0**-24, 2.0**15, np.float64),
    "bfloat16": Format(
        "bfloat16", UNIT["bfloat16"], UNIT["float32"], 2.0**-126, 2.0**127, np.float64
    ),
}

#: float32 whose convolutions round their operands to 11 significant bits.
TF32 = Format("float32", UNIT["float16"], UNIT["float32"], 2.0**-126, 2.0**127, np.float64)
