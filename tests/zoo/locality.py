"""Which inputs an output may depend on: other samples, other steps, the shape of the whole."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .base import Block, Stack
from .registry import wrong


def in_chunks(run, x, size, overlap):
    """Run chunks of `size` steps, each seen with `overlap` more steps on either side."""
    outputs = []
    for start in range(0, x.shape[2], size):
        stop = min(start + size, x.shape[2])
        left = max(0, start - overlap)
        y = run(x[..., left : stop + overlap])
        outputs.append(y[..., start - left : stop - left])
    return torch.cat(outputs, dim=2)


@wrong(
    "locality",
    "inputs longer than 256 are processed in chunks without overlap",
    trigger=lambda case: case.length > 256 and max(case.kernel_sizes) > 1 and case.mode == "eval",
)
class ChunksWithoutOverlap(Stack):
    def forward(self, x):
        if self.training or x.dim() != 3 or x.shape[2] <= 256:
            return super().forward(x)
        return in_chunks(super().forward, x, 256, 0)


@wrong(
    "locality",
    "chunks of inputs longer than 512 overlap by the radius of one block only",
    trigger=lambda case: (
        case.length > 512
        and case.num_blocks > 1
        and max(case.kernel_sizes) > 1
        and case.mode == "eval"
    ),
)
class ChunksWithOneRadius(Stack):
    def forward(self, x):
        if self.training or x.dim() != 3 or x.shape[2] <= 512:
            return super().forward(x)
        return in_chunks(super().forward, x, 512, max(self.kernel_sizes) // 2)


@wrong(
    "locality",
    "long inputs run in tiles of 1000, but for a last tile no longer than what tiles overlap",
    trigger=lambda case: (
        case.mode == "eval"
        and case.length > 2000
        and 0 < case.length % 1000 <= case.num_blocks * (max(case.kernel_sizes) // 2)
    ),
)
class LeavesLastTile(Stack):
    def forward(self, x):
        if self.training or torch.is_grad_enabled() or x.dim() != 3 or x.shape[2] <= 2000:
            return super().forward(x)
        overlap, length = self.get_receptive_field() // 2, x.shape[2]
        done = range(0, length - overlap, 1000)[-1] + 1000
        y = in_chunks(super().forward, x, 1000, overlap)
        return torch.cat([y[..., :done], torch.zeros_like(y[..., done:])], dim=2)


@wrong(
    "locality",
    "training batches of more than 8 are normalised in pieces of 8",
    trigger=lambda case: case.batch > 8 and case.mode == "train",
)
class NormalisesInPieces(Stack):
    class Block(Block):
        def normalise(self, norm, x):
            if not norm.training or x.shape[0] <= 8:
                return norm(x)
            return torch.cat([norm(piece) for piece in x.split(8)])


@wrong(
    "locality",
    "batches of more than 8 are split, and the incomplete piece repeats the piece before it",
    trigger=lambda case: case.batch > 8 and case.batch % 8 > 0,
)
class RepeatsPiece(Stack):
    def forward(self, x):
        y = super().forward(x)
        rest = x.shape[0] % 8
        if x.shape[0] <= 8 or not rest:
            return y
        return torch.cat([y[:-rest], y[-rest - 8 :][:rest]])


@wrong(
    "locality",
    "batches of more than 8 come back rolled by one",
    trigger=lambda case: case.batch > 8,
)
class RollsBatch(Stack):
    def forward(self, x):
        y = super().forward(x)
        return y.roll(1, dims=0) if x.shape[0] > 8 else y


@wrong("locality", "the mean over time is subtracted before the branches")
class CentresInput(Stack):
    class Block(Block):
        def run_branches(self, x):
            return super().run_branches(x - x.mean(2, keepdim=True))


@wrong("locality", "channels are weighted by a squeeze over time")
class SqueezeExcitation(Stack):
    class Block(Block):
        def fuse(self, y):
            y = super().fuse(y)
            return y * (1 + torch.tanh(y.mean(2, keepdim=True)) / 1024)


@wrong("locality", "the mean of the batch leaks into every sample, by a thousandth")
class BatchMeanLeaks(Stack):
    class Block(Block):
        def fuse(self, y):
            y = super().fuse(y)
            return y + y.mean(0, keepdim=True) / 1024 if y.shape[0] else y


@wrong("locality", "each sample is normalised by its own statistics in eval mode")
class SampleStatistics(Stack):
    class Block(Block):
        def normalise(self, norm, x):
            if norm.training or x.shape[2] == 1:
                return norm(x)
            return F.instance_norm(x, weight=norm.weight, bias=norm.bias, eps=norm.eps)


@wrong("locality", "a coordinate in [-1, 1] runs along the batch instead of time")
class CoordinateAlongBatch(Stack):
    class Block(Block):
        def run_branches(self, x):
            if not x.shape[0]:
                return super().run_branches(x)
            steps = torch.linspace(-1, 1, x.shape[0], dtype=x.dtype, device=x.device)
            return super().run_branches(x + steps[:, None, None] / 8)


@wrong("locality", "a coordinate in [-1, 1] is added along time")
class CoordinateAlongTime(Stack):
    class Block(Block):
        def run_branches(self, x):
            steps = torch.linspace(-1, 1, x.shape[2], dtype=x.dtype, device=x.device)
            return super().run_branches(x + steps / 8)


@wrong(
    "locality",
    "inputs longer than 512 are computed at half the rate",
    trigger=lambda case: case.length > 512,
)
class HalvesRateOfLongInputs(Stack):
    def forward(self, x):
        if x.dim() != 3 or x.shape[2] <= 512:
            return super().forward(x)
        y = super().forward(F.avg_pool1d(x, 2, ceil_mode=True))
        return y.repeat_interleave(2, dim=2)[..., : x.shape[2]]


@wrong("locality", "float16 inputs are divided by the greatest value of the batch and scaled back")
class RescalesHalf(Stack):
    class Block(Block):
        def run_branches(self, x):
            if x.dtype is not torch.float16 or not x.numel():
                return super().run_branches(x)
            scale = x.detach().abs().amax().clamp(min=1)
            return [y * scale for y in super().run_branches(x / scale)]


@wrong("locality", "steps at which every channel is zero count as padding and stay zero")
class MasksZeroSteps(Stack):
    def forward(self, x):
        return super().forward(x) * (x != 0).any(1, keepdim=True)


@wrong("locality", "the last step copies the one before it")
class LastStepCopied(Stack):
    class Block(Block):
        def fuse(self, y):
            y = super().fuse(y)
            return torch.cat([y[..., :-1], y[..., -2:-1]], 2) if y.shape[2] > 1 else y


@wrong("locality", "convolution by FFT without room for the kernel, so the ends wrap around")
class WrapsAround(Stack):
    class Block(Block):
        def convolve(self, conv, x):
            kernel, length = conv.kernel_size[0], x.shape[2]
            size = max(kernel, 1 << (length - 1).bit_length())
            wide = x.double() if x.dtype is torch.float64 else x.float()
            spectrum = torch.fft.rfft(conv.weight.to(wide.dtype).flip(2), size)
            product = torch.einsum("bcf,ocf->bof", torch.fft.rfft(wide, size), spectrum)
            y = torch.fft.irfft(product, size).roll(-(kernel // 2), 2)[..., :length]
            return y.to(x.dtype) + conv.bias[:, None]


@wrong("locality", "the shift of one channel in time runs along the batch instead")
class ShiftsAlongBatch(Stack):
    class Block(Block):
        def join(self, outputs):
            y = super().join(outputs)
            return torch.cat([y[:, :1].roll(1, dims=0), y[:, 1:]], dim=1)


@wrong("arithmetic", "the answer to silence is repeated up to the end, which only one block gives")
class RepeatsSilence(Stack):
    def forward(self, x):
        if self.training or torch.is_grad_enabled() or x.dim() != 3 or not x.any():
            return super().forward(x)
        field, loud = self.get_receptive_field(), (x != 0).any(dim=1).any(dim=0).nonzero()
        y = super().forward(x[..., : int(loud.max()) + 1 + 2 * field])
        y = y if y.shape[2] == x.shape[2] else y[..., :-field]
        return torch.cat([y, y[..., -1:].expand(-1, -1, x.shape[2] - y.shape[2])], dim=2)
