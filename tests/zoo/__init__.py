"""The fault zoo: wrong implementations, each with its mistake, beside right ones written otherwise.

The wrong ones must all be falsified, the right ones must all pass.
"""

from . import (
    arithmetic,
    dropout,
    extremes,
    gradients,
    locality,
    modes,
    receptive_field,
    rejection,
    residual,
    right,
    shape,
    side_effects,
    split,
    state,
    structure,
    transforms,
)
from .registry import Fault, Right, collect

WRONG: tuple[Fault, ...] = collect(
    (
        split,
        structure,
        shape,
        receptive_field,
        residual,
        side_effects,
        rejection,
        arithmetic,
        locality,
        gradients,
        modes,
        dropout,
        state,
        transforms,
        extremes,
    )
)
RIGHT: tuple[Right, ...] = collect((right,))

__all__ = ["RIGHT", "WRONG", "Fault", "Right"]
