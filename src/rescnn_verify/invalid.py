"""Invalid configurations: a valid one with one argument spoiled."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from rescnn_verify.case import Config

__all__ = ["IMPOSSIBLE", "UNUSUAL", "legal_equal", "spoilable", "spoiled"]

#: What has no meaning: the argument and the value it is given.
IMPOSSIBLE: tuple[tuple[str, Any], ...] = (
    *(("channels", value) for value in (0, -4, True, 8.0, 6.5)),
    *(("num_blocks", value) for value in (0, -1, True, 2.0, 1.5)),
    ("kernel_sizes", ()),
    *(("one kernel", value) for value in (0, -3, -1, True, 3.0, 2.5)),
    # Beside an equal one that is valid.
    *(("two kernels", values) for values in ((3.0, 3), (True, 1))),
    *(("dropout", value) for value in (-0.5, -1e-9, 1.5, 1.0000001)),
    *(("dropout", value) for value in (math.nan, math.inf, -math.inf)),
)
#: What an implementation may honour, if it does so fully.
UNUSUAL: tuple[tuple[str, Any], ...] = (
    *(("one kernel", value) for value in (2, 4, 6)),
    *(("every kernel", value) for value in (2, 4, 8)),
    ("two kernels", (2, 4)),
    *(("fewer channels", value) for value in (1, 2)),
)


def spoilable(config: Config, how: tuple[str, Any]) -> bool:
    """Whether a configuration has enough kernels to be spoiled in that way."""
    kind, value = how
    if kind == "fewer channels":
        return config.branches > int(value)
    return config.branches >= (2 if kind == "two kernels" else 1)


def spoiled(
    config: Config, how: tuple[str, Any], place: int = 0
) -> tuple[Config, tuple[str, ...], Any]:
    """A configuration with one argument spoiled.

    Args:
        config: a valid configuration.
        how: an entry of `IMPOSSIBLE` or `UNUSUAL`.
        place: which kernel, modulo their number.

    Returns:
        The configuration, what a refusal must mention of the arguments' names, and the value that
        it must give, None where there is no single one.
    """
    kind, value = how
    kernels = list(config.kernel_sizes)
    place %= len(kernels)
    if kind == "fewer channels":
        return replace(config, channels=value), ("channel", "kernel"), value
    if kind in ("channels", "num_blocks", "dropout"):
        mentions = {"num_blocks": "block", "channels": "channel", "dropout": "dropout"}[kind]
        return replace(config, **{kind: value}), (mentions,), value
    if kind == "one kernel":
        kernels[place] = value
    elif kind == "every kernel":
        kernels = [value] * len(kernels)
    else:
        kernels = [] if kind == "kernel_sizes" else _two(kernels, place, value)
        value = None
    return replace(config, kernel_sizes=tuple(kernels)), ("kernel",), value


def legal_equal(config: Config) -> Config | None:
    """The legal configuration that equals a spoiled one by ``==``, None if there is none.

    Such as 8 channels for 8.0, or one block for True.
    """
    numbers = (config.channels, config.num_blocks, *config.kernel_sizes)
    if not config.kernel_sizes or any(n != n // 1 or n < 1 for n in numbers):
        return None
    channels, num_blocks, *kernels = map(int, numbers)
    if channels < len(kernels) or not 0 <= config.dropout <= 1:
        return None
    return replace(config, channels=channels, num_blocks=num_blocks, kernel_sizes=tuple(kernels))


def _two(kernels: list[Any], place: int, values: tuple[int, int]) -> list[Any]:
    changed = list(kernels)
    changed[place], changed[place - 1] = values
    return changed
