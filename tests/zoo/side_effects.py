"""What happens to the caller's objects, and to the model, while it is used."""

from __future__ import annotations

import torch

from .base import Block, Stack
from .registry import wrong


@wrong("side_effects", "the caller's kernel list is kept, so changing it changes the report")
class KeepsCallersList(Stack):
    def __init__(self, channels=512, num_blocks=3, kernel_sizes=(3, 5, 7), dropout=0.1):
        super().__init__(channels, num_blocks, kernel_sizes, dropout)
        self.kernel_sizes = kernel_sizes


@wrong("side_effects", "the caller's kernel list is sorted in place")
class SortsCallersList(Stack):
    def __init__(self, channels=512, num_blocks=3, kernel_sizes=(3, 5, 7), dropout=0.1):
        super().__init__(channels, num_blocks, kernel_sizes, dropout)
        if isinstance(kernel_sizes, list):
            kernel_sizes.sort()


@wrong("side_effects", "the caller's kernel list is emptied while the branches are built")
class PopsCallersList(Stack):
    def __init__(self, channels=512, num_blocks=3, kernel_sizes=(3, 5, 7), dropout=0.1):
        super().__init__(channels, num_blocks, kernel_sizes, dropout)
        while isinstance(kernel_sizes, list) and kernel_sizes:
            kernel_sizes.pop(0)


@wrong("side_effects", "the sum is written into the input where no gradient is wanted")
class SumsIntoInput(Stack):
    class Block(Block):
        def add(self, y, x):
            return y + x if torch.is_grad_enabled() else x.add_(y)


@wrong("side_effects", "the sum is written into float16 inputs to save memory")
class SumsIntoHalfInput(Stack):
    class Block(Block):
        def add(self, y, x):
            if x.dtype is not torch.float16 or torch.is_grad_enabled():
                return y + x
            return x.add_(y)


@wrong("side_effects", "NaN is removed from the input in place")
class CleansInput(Stack):
    def forward(self, x):
        with torch.no_grad():
            torch.nan_to_num_(x.detach())
        return super().forward(x)


@wrong("side_effects", "the input of the last call is kept")
class KeepsInput(Stack):
    def forward(self, x):
        self.last_input = x
        return super().forward(x)


@wrong("side_effects", "the result lies in a buffer that the next call overwrites")
class ReusesResult(Stack):
    result = None

    def forward(self, x):
        y = super().forward(x)
        if torch.is_grad_enabled():
            return y
        if self.result is None or self.result.shape != y.shape or self.result.dtype != y.dtype:
            self.result = torch.empty_like(y)
        return self.result.copy_(y)


@wrong("side_effects", "weights beyond 1 are clipped in every forward pass")
class ClipsWeights(Stack):
    class Block(Block):
        def convolve(self, conv, x):
            with torch.no_grad():
                conv.weight.clamp_(-1, 1)
            return conv(x)


@wrong("side_effects", "the padding of a non-contiguous input is written into its last step")
class ZeroesLastStep(Stack):
    def forward(self, x):
        if x.dim() == 3 and not x.is_contiguous() and not x.requires_grad:
            x[..., -1] = 0
        return super().forward(x)


@wrong("side_effects", "the generator is seeded in every training pass")
class SeedsInForward(Stack):
    def forward(self, x):
        if self.training:
            torch.manual_seed(0)
        return super().forward(x)


@wrong("side_effects", "subnormal numbers are flushed to zero from then on, for speed")
class FlushesSubnormals(Stack):
    def build(self):
        super().build()
        torch.set_flush_denormal(True)
