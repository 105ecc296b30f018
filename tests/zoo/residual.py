"""The way around the block and the activation after it."""

from __future__ import annotations

import torch
from torch import nn

from .base import Block, Stack
from .registry import wrong


@wrong("residual", "the input is not added")
class NoResidual(Stack):
    class Block(Block):
        def add(self, y, x):
            return y


@wrong("residual", "the input is halved")
class HalvedResidual(Stack):
    class Block(Block):
        def add(self, y, x):
            return y + 0.5 * x


@wrong("residual", "the input is scaled by 1.01")
class ScaledResidual(Stack):
    class Block(Block):
        def add(self, y, x):
            return y + 1.01 * x


@wrong("residual", "the input is subtracted")
class SubtractedResidual(Stack):
    class Block(Block):
        def add(self, y, x):
            return y - x


@wrong("residual", "sum scaled by the square root of a half to keep its variance")
class VariancePreservingSum(Stack):
    class Block(Block):
        def add(self, y, x):
            return (y + x) * 0.5**0.5


@wrong("residual", "no ReLU after the sum")
class NoFinalRelu(Stack):
    class Block(Block):
        def activate(self, y):
            return y


@wrong("residual", "ReLU before the sum instead of after it")
class ReluBeforeSum(Stack):
    class Block(Block):
        def add(self, y, x):
            return torch.relu(y) + x

        def activate(self, y):
            return y


@wrong("residual", "the last block of the stack has no final ReLU")
class NoReluInLastBlock(Stack):
    class Block(Block):
        last = False

        def activate(self, y):
            return y if self.last else super().activate(y)

    def make_block(self, index):
        block = super().make_block(index)
        block.last = index == self.num_blocks - 1
        return block


@wrong("residual", "the rectified input is added, as if every block came after another one")
class RectifiedResidual(Stack):
    class Block(Block):
        def add(self, y, x):
            return y + torch.relu(x)


@wrong("residual", "every block adds the input of the stack instead of its own")
class AddsStackInput(Stack):
    class Block(Block):
        def forward(self, x, skip=None):
            self.check_input(x)
            y = self.fuse(self.join(self.run_branches(x)))
            return self.activate(self.add(y, x if skip is None else skip))

    def forward(self, x):
        skip = x
        for block in self.blocks:
            x = block(x, skip)
        return x


@wrong("residual", "the stack adds its input once more at the end")
class OuterResidual(Stack):
    def forward(self, x):
        return super().forward(x) + x


@wrong("residual", "the sum is scaled by a learned gate that starts at zero")
class Gated(Stack):
    class Block(Block):
        def build(self):
            super().build()
            self.gate = nn.Parameter(torch.zeros(1))

        def add(self, y, x):
            return self.gate * y + x


@wrong("residual", "every second block has no residual")
class EverySecondResidual(Stack):
    class Block(Block):
        residual = True

        def add(self, y, x):
            return y + x if self.residual else y

    def make_block(self, index):
        block = super().make_block(index)
        block.residual = index % 2 == 0
        return block


@wrong(
    "residual",
    "blocks after the fourth are damped by a tenth of a percent",
    trigger=lambda case: case.num_blocks > 4,
)
class DampedWhenDeep(Stack):
    def forward(self, x):
        for index, block in enumerate(self.blocks):
            x = block(x) if index < 4 else 0.999 * block(x)
        return x


@wrong("residual", "one channel of the input is added to all")
class BroadcastResidual(Stack):
    class Block(Block):
        def add(self, y, x):
            return y + x[:, :1]


@wrong("residual", "a bare block rectifies before the sum")
class BlockReluBeforeSum(Block):
    def add(self, y, x):
        return torch.relu(y) + x

    def activate(self, y):
        return y
