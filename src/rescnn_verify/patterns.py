"""What signals often have and random numbers never: silence, repetition, one sign."""

from __future__ import annotations

import numpy as np

__all__ = ["PATTERNS", "in_pattern", "patterned"]

PATTERNS = (
    "silent start", "silent end", "silent rows", "silent channels",
    "equal rows", "equal positions", "periodic", "one sign",
)  # fmt: skip


def patterned(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Half of the time the values as they are, else in one of `PATTERNS`.

    Implementations that skip, share or cut short what they take for empty or known show there.

    Args:
        values: shape (batch, channels, length).
        rng: chooses.

    Returns:
        An array of the same shape. Each of its elements is one of the values, its magnitude, or 0.
    """
    if not values.size or rng.integers(2):
        return values
    return in_pattern(values, str(rng.choice(PATTERNS)), rng)


def in_pattern(values: np.ndarray, pattern: str, rng: np.random.Generator) -> np.ndarray:
    """The values in one of `PATTERNS`, as `patterned` gives them."""
    batch, channels, length = values.shape
    place, period = int(rng.integers(length + 1)), int(rng.integers(1, length + 1))
    kept = {
        "silent start": np.arange(length) >= place,
        "silent end": np.arange(length) < place,
        "silent rows": rng.random((batch, 1, 1)) < 0.5,
        "silent channels": rng.random((1, channels, 1)) < 0.5,
    }
    if pattern in kept:
        return np.where(kept[pattern], values, 0.0)
    found: np.ndarray
    if pattern == "one sign":
        found = np.abs(values)
    elif pattern == "equal rows":
        found = np.take(values, rng.integers(batch, size=batch), axis=0)
    else:
        period = 1 if pattern == "equal positions" else period
        found = np.take(values, np.arange(length) % period, axis=2)
    return found
