"""The shape, type and layout of input and output."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .base import Block, Stack
from .registry import wrong


@wrong("shape", "valid convolution, then zeros are appended on the right")
class PadsAfterwards(Stack):
    class Block(Block):
        def padding(self, kernel):
            return 0

        def convolve(self, conv, x):
            short = max(0, conv.kernel_size[0] - x.shape[2])
            y = conv(F.pad(x, (0, short)))
            return F.pad(y, (0, x.shape[2] - y.shape[2]))


@wrong("shape", "an input shorter than the kernel is averaged to one step and broadcast")
class BroadcastsShortInput(Stack):
    class Block(Block):
        def convolve(self, conv, x):
            y = conv(x)
            if x.shape[2] < conv.kernel_size[0]:
                y = y.mean(2, keepdim=True).expand_as(y)
            return y


@wrong("shape", "the padding is never wider than the input, so short inputs shrink")
class PaddingCappedByLength(Stack):
    class Block(Block):
        def convolve(self, conv, x):
            padding = min(conv.kernel_size[0] // 2, x.shape[2] - 1)
            return F.conv1d(x, conv.weight, conv.bias, padding=padding)


@wrong(
    "shape",
    "a square input is taken for (batch, length, channels)",
    trigger=lambda case: case.channels == case.length,
)
class TransposesSquareInput(Stack):
    def forward(self, x):
        if x.dim() == 3 and x.shape[2] == self.channels:
            return super().forward(x.transpose(1, 2)).transpose(1, 2)
        return super().forward(x)


@wrong("shape", "a batch of one loses its batch dimension")
class SqueezesBatch(Stack):
    def forward(self, x):
        return super().forward(x).squeeze(0)


@wrong("shape", "a length of one loses its time dimension")
class SqueezesLength(Stack):
    def forward(self, x):
        return super().forward(x).squeeze(-1)


@wrong("shape", "the input is padded to a multiple of 8, and what the padding becomes leaks back")
class PadsToMultipleOfEight(Stack):
    def forward(self, x):
        length = x.shape[2]
        return super().forward(F.pad(x, (0, -length % 8)))[..., :length]


@wrong(
    "shape",
    "steps beyond the 512th are cut off",
    trigger=lambda case: case.length > 512,
)
class CutsAt512(Stack):
    def forward(self, x):
        return super().forward(x[..., :512])


@wrong(
    "shape",
    "samples are processed one at a time and stacked, which fails for an empty batch",
    trigger=lambda case: case.batch == 0 and case.mode == "eval",
)
class StacksSamples(Stack):
    class Block(Block):
        def forward(self, x):
            if self.training:
                return super().forward(x)
            self.check_input(x)
            return torch.stack([Block.forward(self, row[None])[0] for row in x])


@wrong("shape", "the input is viewed as flat, which fails unless it is contiguous")
class ViewsInput(Stack):
    def forward(self, x):
        self.blocks[0].check_input(x)
        return super().forward(x.view(-1).view(x.shape))


@wrong("shape", "the strides of a contiguous input are taken for granted")
class AssumesContiguous(Stack):
    def forward(self, x):
        self.blocks[0].check_input(x)
        _, channels, length = x.shape
        strides = (channels * length, length, 1)
        dense = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
        if dense >= x.numel() - 1 and not x.is_contiguous():
            x = x.as_strided(x.shape, strides)
        return super().forward(x)


@wrong("shape", "the output is always float32")
class ReturnsFloat32(Stack):
    def forward(self, x):
        return super().forward(x).float()


@wrong("shape", "a full convolution is cropped by a negative index, which is empty for kernel 1")
class CropsByNegativeIndex(Stack):
    class Block(Block):
        def padding(self, kernel):
            return kernel - 1

        def convolve(self, conv, x):
            if conv is self.fusion[0]:
                return conv(x)
            crop = conv.kernel_size[0] // 2
            return conv(x)[..., crop:-crop]


@wrong("shape", "output padded to an even length")
class EvenLengthOnly(Stack):
    def forward(self, x):
        return F.pad(super().forward(x), (0, x.shape[2] % 2))


@wrong("shape", "every block halves the rate and doubles it again")
class StridedAndRepeated(Stack):
    class Block(Block):
        def convolve(self, conv, x):
            y = conv(x)
            return y[..., ::2].repeat_interleave(2, dim=2)[..., : y.shape[2]]


@wrong("shape", "a bare block returns the time axis before the channels")
class BlockReturnsTimeFirst(Block):
    def forward(self, x):
        return super().forward(x).transpose(1, 2)
