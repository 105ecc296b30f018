"""A right implementation in which every step is a method, so that one fault is one override.

A faulty stack names its own block in a nested class `Block`; `Stack` builds its blocks from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn


def positive_integer(name: str, value: Any, context: str) -> int:
    """The value as an int, or the refusal that names the argument."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {context}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {context}")
    return int(value)


class Block(nn.Module):
    """Parallel convolutions, concatenated, fused by a 1x1 convolution, added to the input."""

    def __init__(
        self, channels: int, kernel_sizes: Iterable[int] = (3, 5, 7), dropout: float = 0.1
    ) -> None:
        channels, kernel_sizes, dropout = self.validate(channels, kernel_sizes, dropout)
        super().__init__()
        self.channels = channels
        self.kernel_sizes = kernel_sizes
        self.p = dropout
        self.build()

    # What is refused at construction

    @classmethod
    def validate(
        cls, channels: Any, kernel_sizes: Any, dropout: Any
    ) -> tuple[int, tuple[int, ...], float]:
        kernels = cls.check_kernel_sizes(kernel_sizes)
        return cls.check_channels(channels, kernels), kernels, cls.check_dropout(dropout)

    @classmethod
    def check_kernel_sizes(cls, kernel_sizes: Any) -> tuple[int, ...]:
        if isinstance(kernel_sizes, str | bytes) or not isinstance(kernel_sizes, Iterable):
            raise TypeError(f"kernel_sizes must be a sequence of integers, got {kernel_sizes!r}")
        if not isinstance(kernel_sizes, list | tuple):
            kernel_sizes = tuple(kernel_sizes)
        if not kernel_sizes:
            raise ValueError(f"kernel_sizes must not be empty, got kernel_sizes={kernel_sizes!r}")
        return tuple(cls.check_kernel(k, f"kernel_sizes={kernel_sizes!r}") for k in kernel_sizes)

    @classmethod
    def check_kernel(cls, kernel: Any, context: str) -> int:
        kernel = positive_integer("every entry of kernel_sizes", kernel, context)
        if kernel % 2 == 0:
            raise ValueError(f"every entry of kernel_sizes must be odd, got {context}")
        return kernel

    @classmethod
    def check_channels(cls, channels: Any, kernels: Sequence[int]) -> int:
        channels = positive_integer("channels", channels, f"channels={channels!r}")
        if channels < len(kernels):
            raise ValueError(
                "channels must be at least the number of kernels, "
                f"got channels={channels!r} and kernel_sizes={kernels!r}"
            )
        return channels

    @classmethod
    def check_dropout(cls, dropout: Any) -> float:
        if isinstance(dropout, bool) or not isinstance(dropout, Real):
            raise TypeError(f"dropout must be a number, got dropout={dropout!r}")
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout must lie in [0, 1], got dropout={dropout!r}")
        return float(dropout)

    # What is built

    def build(self) -> None:
        self.branches = self.make_branches()
        self.fusion = self.make_fusion()
        self.relu = self.make_relu()

    def widths(self) -> list[int]:
        n = len(self.kernel_sizes)
        width = self.channels // n
        return [width] * (n - 1) + [self.channels - width * (n - 1)]

    def padding(self, kernel: int) -> int:
        return kernel // 2

    def make_branches(self) -> nn.Module:
        pairs = zip(self.widths(), self.kernel_sizes, strict=True)
        return nn.ModuleList(self.make_branch(width, kernel) for width, kernel in pairs)

    def make_branch(self, width: int, kernel: int) -> nn.Module:
        return nn.Sequential(self.make_conv(width, kernel), self.make_norm(width), self.make_relu())

    def make_conv(self, width: int, kernel: int) -> nn.Module:
        return nn.Conv1d(self.channels, width, kernel, padding=self.padding(kernel))

    def make_norm(self, width: int) -> nn.Module:
        return nn.BatchNorm1d(width)

    def make_relu(self) -> nn.Module:
        return nn.ReLU()

    def make_fusion(self) -> nn.Module:
        conv = nn.Conv1d(self.channels, self.channels, 1)
        return nn.Sequential(conv, self.make_norm(self.channels), self.make_dropout())

    def make_dropout(self) -> nn.Module:
        return nn.Dropout1d(self.p)

    # What is computed

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        return self.activate(self.add(self.fuse(self.join(self.run_branches(x))), x))

    def check_input(self, x: Tensor) -> None:
        if x.dim() != 3 or x.shape[1] != self.channels:
            raise ValueError(
                f"expected an input of shape (batch, {self.channels}, length), got {tuple(x.shape)}"
            )

    def run_branches(self, x: Tensor) -> list[Tensor]:
        return [self.run_branch(branch, x) for branch in self.branches]

    def run_branch(self, branch: Any, x: Tensor) -> Tensor:
        return self.rectify(self.normalise(branch[1], self.convolve(branch[0], x)))

    def convolve(self, conv: Any, x: Tensor) -> Tensor:
        return conv(x)

    def normalise(self, norm: Any, x: Tensor) -> Tensor:
        return norm(x)

    def rectify(self, x: Tensor) -> Tensor:
        return torch.relu(x)

    def join(self, outputs: list[Tensor]) -> Tensor:
        return torch.cat(outputs, dim=1)

    def fuse(self, y: Tensor) -> Tensor:
        return self.drop(self.normalise(self.fusion[1], self.convolve(self.fusion[0], y)))

    def drop(self, y: Tensor) -> Tensor:
        return self.fusion[2](y)

    def add(self, y: Tensor, x: Tensor) -> Tensor:
        return y + x

    def activate(self, y: Tensor) -> Tensor:
        return self.relu(y)

    def get_receptive_field(self) -> int:
        return max(self.kernel_sizes)


class Stack(nn.Module):
    """Blocks one after the other."""

    Block: type[Block] = Block

    def __init__(
        self,
        channels: int = 512,
        num_blocks: int = 3,
        kernel_sizes: Iterable[int] = (3, 5, 7),
        dropout: float = 0.1,
    ) -> None:
        num_blocks = self.check_num_blocks(num_blocks)
        channels, kernel_sizes, dropout = self.Block.validate(channels, kernel_sizes, dropout)
        super().__init__()
        self.channels = channels
        self.num_blocks = num_blocks
        self.kernel_sizes = kernel_sizes
        self.p = dropout
        self.build()

    def check_num_blocks(self, num_blocks: Any) -> int:
        return positive_integer("num_blocks", num_blocks, f"num_blocks={num_blocks!r}")

    def build(self) -> None:
        self.blocks = nn.ModuleList(self.make_block(i) for i in range(self.num_blocks))

    def make_block(self, index: int) -> nn.Module:
        return self.Block(self.channels, self.kernel_sizes, self.p)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def get_receptive_field(self) -> int:
        return 1 + self.num_blocks * (max(self.kernel_sizes) - 1)


def batch_norm(
    norm: Any, x: Tensor, *, momentum: float | None = None, unbiased: bool = False
) -> Tensor:
    """BatchNorm1d in plain arithmetic; faults change one of its arguments or one of its lines."""
    if norm.training:
        mean, var = x.mean((0, 2)), x.var((0, 2), unbiased=False)
        count = x.shape[0] * x.shape[2]
        update_statistics(norm, mean, var * count / (count - 1), momentum)
        if unbiased:
            var = var * count / (count - 1)
    else:
        mean, var = norm.running_mean, norm.running_var
    return affine(norm, x, mean, torch.sqrt(var + norm.eps))


def affine(norm: Any, x: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """(x - mean) / deviation, scaled and shifted by channel."""
    scale = (norm.weight / deviation)[:, None]
    return (x - mean[:, None]) * scale + norm.bias[:, None]


def update_statistics(norm: Any, mean: Tensor, var: Tensor, momentum: float | None = None) -> None:
    """One step of the running averages, and the count."""
    momentum = norm.momentum if momentum is None else momentum
    with torch.no_grad():
        norm.running_mean.lerp_(mean.detach().to(norm.running_mean.dtype), momentum)
        norm.running_var.lerp_(var.detach().to(norm.running_var.dtype), momentum)
        norm.num_batches_tracked += 1
