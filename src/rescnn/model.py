"""A stack of multi-scale residual blocks for (batch, channels, length) signals.

The architecture is the temporal front end of an EEG seizure detector: parallel convolutions of
several kernel sizes see the signal at several scales, a 1×1 convolution mixes them, and a residual
connection carries the input past them.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

__all__ = ["ResCNNBlock", "ResCNNStack"]


class ResCNNBlock(nn.Module):
    """``relu(x + fusion(concatenation of the branches(x)))``.

    Branch i is Conv1d (kernel ``kernel_sizes[i]``, "same" zero padding) → BatchNorm1d → ReLU. The
    widths of the n branches are ``channels // n``, the last one taking the remainder, so that they
    sum to ``channels`` exactly. The fusion is Conv1d 1×1 → BatchNorm1d → Dropout1d.

    Args:
        channels: channels of the input, of the output, and of all branches together.
        kernel_sizes: one odd positive kernel size for each branch, in any order.
        dropout: probability of zeroing a whole channel of the fusion in train mode, in [0, 1].

    Shape:
        (batch, channels, length) → (batch, channels, length).

    Raises:
        TypeError: an argument is not of the kind named above (a bool is not an integer).
        ValueError: fewer channels than kernels, an even or non-positive kernel, no kernel at all,
            a dropout outside [0, 1] or NaN; in ``forward``, an input of another shape.
    """

    def __init__(
        self, channels: int, kernel_sizes: Iterable[int] = (3, 5, 7), dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.channels = _positive_integer("channels", channels)
        self.kernel_sizes = _odd_kernels(kernel_sizes)
        self.dropout = _probability("dropout", dropout)
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Conv1d(channels, width, kernel, padding=kernel // 2),
                nn.BatchNorm1d(width),
                nn.ReLU(),
            )
            for width, kernel in zip(
                _branch_widths(channels, self.kernel_sizes), self.kernel_sizes, strict=True
            )
        )
        self.fusion = nn.Sequential(
            nn.Conv1d(channels, channels, 1),
            nn.BatchNorm1d(channels),
            nn.Dropout1d(self.dropout),
        )
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        _check_input(x, self.channels)
        scales = torch.cat([branch(x) for branch in self.branches], dim=1)
        out: Tensor = self.relu(x + self.fusion(scales))
        return out

    def get_receptive_field(self) -> int:
        """Input positions that one output position depends on in eval mode: the widest kernel."""
        return max(self.kernel_sizes)


class ResCNNStack(nn.Module):
    """``num_blocks`` residual blocks in order.

    Args:
        channels: channels of the input, of the output and of every block.
        num_blocks: number of blocks, at least one.
        kernel_sizes: as in `ResCNNBlock`, the same for every block.
        dropout: as in `ResCNNBlock`, the same for every block.

    Shape:
        (batch, channels, length) → (batch, channels, length).

    Raises:
        TypeError, ValueError: as in `ResCNNBlock`, and for fewer than one block.
    """

    def __init__(
        self,
        channels: int = 512,
        num_blocks: int = 3,
        kernel_sizes: Iterable[int] = (3, 5, 7),
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.num_blocks = _positive_integer("num_blocks", num_blocks)
        self.kernel_sizes = _odd_kernels(kernel_sizes)
        self.blocks = nn.ModuleList(
            ResCNNBlock(channels, self.kernel_sizes, dropout) for _ in range(num_blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def get_receptive_field(self) -> int:
        """Input positions that one output position depends on in eval mode.

        Each block reaches ``(widest kernel − 1) / 2`` positions further on either side.
        """
        return 1 + self.num_blocks * (max(self.kernel_sizes) - 1)


def _branch_widths(channels: int, kernel_sizes: tuple[int, ...]) -> list[int]:
    count = len(kernel_sizes)
    if channels < count:
        raise ValueError(
            f"channels={channels} is fewer than the {count} kernels of "
            f"kernel_sizes={list(kernel_sizes)}: every branch needs at least one channel"
        )
    each = channels // count
    return [each] * (count - 1) + [channels - each * (count - 1)]


def _positive_integer(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r} must be an integer, not {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}={value} must be at least 1")
    return value


def _odd_kernels(kernel_sizes: Iterable[int]) -> tuple[int, ...]:
    try:
        kernels = tuple(kernel_sizes)
    except TypeError:  # an array without a dimension claims to be iterable
        message = f"kernel_sizes={kernel_sizes!r} must be a sequence of odd integers"
        raise TypeError(message) from None
    if not kernels:
        raise ValueError(f"kernel_sizes={list(kernels)} must name at least one kernel")
    for kernel in kernels:
        if isinstance(kernel, bool) or not isinstance(kernel, int):
            raise TypeError(f"kernel_sizes={list(kernels)}: {kernel!r} is not an integer")
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel_sizes={list(kernels)}: {kernel} is not odd and positive")
    return kernels


def _probability(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}={value!r} must be a number, not {type(value).__name__}")
    if not 0 <= value <= 1:  # false for NaN, too
        raise ValueError(f"{name}={value} must be a probability in [0, 1]")
    return float(value)


def _check_input(x: Tensor, channels: int) -> None:
    if x.dim() != 3 or x.shape[1] != channels:
        raise ValueError(
            f"expected an input of shape (batch, {channels}, length), got {tuple(x.shape)}"
        )
