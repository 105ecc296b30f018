"""Right implementations of the whole contract, each written differently."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.checkpoint import checkpoint

from .base import Block, Stack, positive_integer
from .registry import right


@right("every step is a method of its own")
class Plain(Stack):
    pass


@right("a bare block")
class PlainBlock(Block):
    pass


@right("a bare block without convolution biases")
class BlockWithoutBiases(Block):
    def make_conv(self, width, kernel):
        return nn.Conv1d(self.channels, width, kernel, padding=kernel // 2, bias=False)


@right("a bare block with its fusion registered first and its dropout apart")
class BlockFusionFirst(Block):
    def build(self):
        self.dropout = nn.Dropout1d(self.p)
        self.fusion = self.make_fusion()
        self.relu = nn.ReLU()
        self.branches = self.make_branches()

    def make_fusion(self):
        return nn.Sequential(
            nn.Conv1d(self.channels, self.channels, 1), nn.BatchNorm1d(self.channels)
        )

    def drop(self, y):
        return self.dropout(y)


@right("modules hold the parameters, functions compute")
class Functional(Stack):
    class Block(Block):
        def convolve(self, conv, x):
            return F.conv1d(x, conv.weight, conv.bias, padding=conv.weight.shape[2] // 2)

        def normalise(self, norm, x):
            if norm.training:
                norm.num_batches_tracked.add_(1)
            return F.batch_norm(
                x,
                norm.running_mean,
                norm.running_var,
                norm.weight,
                norm.bias,
                norm.training,
                norm.momentum,
                norm.eps,
            )

        def drop(self, y):
            return F.dropout1d(y, self.fusion[2].p, self.training)

        def activate(self, y):
            return F.relu(y)


@right("no convolution biases in front of a BatchNorm")
class WithoutBiases(Stack):
    class Block(Block):
        def make_conv(self, width, kernel):
            return nn.Conv1d(self.channels, width, kernel, padding=kernel // 2, bias=False)

        def make_fusion(self):
            conv = nn.Conv1d(self.channels, self.channels, 1, bias=False)
            return nn.Sequential(conv, nn.BatchNorm1d(self.channels), self.make_dropout())


@right("branches in a ModuleDict, under names")
class NamedBranches(Stack):
    class Block(Block):
        def make_branches(self):
            branches = super().make_branches()
            pairs = zip(self.kernel_sizes, branches, strict=True)
            return nn.ModuleDict({f"b{i}_k{k}": b for i, (k, b) in enumerate(pairs)})

        def run_branches(self, x):
            return [branch(x) for branch in self.branches.values()]


@right("BatchNorm folded into the convolution in eval, anew on each call")
class FoldedOnTheFly(Stack):
    """Folds in float32 at least: rounding folded weights to 16 bits would add to the error."""

    class Block(Block):
        def run_branch(self, branch, x):
            if branch[1].training:
                return super().run_branch(branch, x)
            return torch.relu(self.folded(branch[0], branch[1], x))

        def fuse(self, y):
            if self.fusion[1].training:
                return super().fuse(y)
            return self.drop(self.folded(self.fusion[0], self.fusion[1], y))

        def folded(self, conv, norm, x):
            wide = torch.promote_types(x.dtype, torch.float32)
            scale = norm.weight.to(wide) / torch.sqrt(norm.running_var.to(wide) + norm.eps)
            weight = conv.weight.to(wide) * scale[:, None, None]
            bias = (conv.bias.to(wide) - norm.running_mean.to(wide)) * scale + norm.bias.to(wide)
            y = F.conv1d(x.to(wide), weight, bias, padding=conv.padding)
            return y.to(x.dtype)


class ChannelDropout(nn.Module):
    """Dropout of whole channels, written out."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        mask = x.new_empty(x.shape[0], x.shape[1], 1).bernoulli_(1 - self.p)
        return x * mask.div_(1 - self.p) if self.p < 1 else x * mask


@right("dropout as a module of its own that multiplies by a Bernoulli mask")
class OwnDropout(Stack):
    class Block(Block):
        def make_dropout(self):
            return ChannelDropout(self.p)


@right("the branches write into slices of an output allocated beforehand")
class FillsSlices(Stack):
    class Block(Block):
        def run_branches(self, x):
            y = torch.empty_like(x, memory_format=torch.contiguous_format)
            start = 0
            for branch in self.branches:
                stop = start + branch[0].out_channels
                y[:, start:stop] = branch(x)
                start = stop
            return [y]


@right("padding by F.pad in front of convolutions without padding")
class PadsBefore(Stack):
    class Block(Block):
        def padding(self, kernel):
            return 0

        def convolve(self, conv, x):
            side = conv.kernel_size[0] // 2
            return conv(F.pad(x, (side, side)))


@right('convolutions with padding="same"')
class PaddingSame(Stack):
    class Block(Block):
        def padding(self, kernel):
            return "same"


@right("samples are processed one at a time in eval mode")
class OneSampleAtATime(Stack):
    class Block(Block):
        def forward(self, x):
            if self.training:
                return super().forward(x)
            self.check_input(x)
            return torch.cat([Block.forward(self, row) for row in x.split(1)])


@right("convolution as unfolding and one matrix product, in float32 at least")
class Unfolded(Stack):
    class Block(Block):
        def convolve(self, conv, x):
            kernel = conv.kernel_size[0]
            wide = torch.promote_types(x.dtype, torch.float32)
            padded = F.pad(x.to(wide), (kernel // 2, kernel // 2))
            columns = padded.unfold(2, kernel, 1).permute(0, 1, 3, 2).flatten(1, 2).contiguous()
            weight = conv.weight.to(wide).flatten(1).expand(x.shape[0], -1, -1)
            return (torch.bmm(weight, columns) + conv.bias.to(wide)[:, None]).to(x.dtype)


@right("convolution as a sum of shifted products, one tap at a time, in float32 at least")
class TapByTap(Stack):
    class Block(Block):
        def convolve(self, conv, x):
            kernel, length = conv.kernel_size[0], x.shape[2]
            wide = torch.promote_types(x.dtype, torch.float32)
            padded = F.pad(x.to(wide), (kernel // 2, kernel // 2))
            weight = conv.weight.to(wide).expand(x.shape[0], -1, -1, -1)
            y = conv.bias.to(wide)[:, None]
            for tap in range(kernel):
                shifted = padded[..., tap : tap + length].contiguous()
                y = y + torch.bmm(weight[..., tap], shifted)
            return y.to(x.dtype)


@right("even kernels are honoured, with one more step of padding on the right")
class HonoursEvenKernels(Stack):
    class Block(Block):
        @classmethod
        def check_kernel(cls, kernel, context):
            return positive_integer("every entry of kernel_sizes", kernel, context)

        def padding(self, kernel):
            return 0

        def convolve(self, conv, x):
            kernel = conv.kernel_size[0]
            return conv(F.pad(x, ((kernel - 1) // 2, kernel // 2)))


@right("branches are checkpointed in eval mode, where no statistics would be updated twice")
class Checkpointed(Stack):
    class Block(Block):
        def run_branches(self, x):
            if self.training or not torch.is_grad_enabled():
                return super().run_branches(x)
            return [checkpoint(branch, x, use_reentrant=False) for branch in self.branches]


@right("2-D convolution of height 1")
class TwoDimensional(Stack):
    class Block(Block):
        def convolve(self, conv, x):
            padding = (0, conv.kernel_size[0] // 2)
            weight = conv.weight[:, :, None]
            return F.conv2d(x.contiguous()[:, :, None], weight, conv.bias, padding=padding)[:, :, 0]


@right("the constructor passes on whatever it gets")
class PassesArguments(Stack):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)


@right("the class itself chooses which subclass to build")
class Factory(Stack):
    def __new__(cls, channels=512, num_blocks=3, kernel_sizes=(3, 5, 7), dropout=0.1):
        if cls is Factory and isinstance(kernel_sizes, list | tuple) and len(kernel_sizes) == 1:
            cls = FactorySingle
        return super().__new__(cls)


class FactorySingle(Factory):
    """What `Factory` builds for one kernel: there is nothing to concatenate."""

    class Block(Block):
        def join(self, outputs):
            return outputs[0]


@right("the fusion is registered before the branches")
class FusionFirst(Stack):
    class Block(Block):
        def build(self):
            self.relu = self.make_relu()
            self.fusion = self.make_fusion()
            self.branches = self.make_branches()


@right("the blocks are an nn.Sequential")
class SequentialBlocks(Stack):
    def build(self):
        self.blocks = nn.Sequential(*(self.make_block(i) for i in range(self.num_blocks)))

    def forward(self, x):
        return self.blocks(x)


@right("the block has its dropout apart from the fusion")
class DropoutApart(Stack):
    class Block(Block):
        def build(self):
            super().build()
            self.dropout = nn.Dropout1d(self.p)

        def make_fusion(self):
            conv = nn.Conv1d(self.channels, self.channels, 1)
            return nn.Sequential(conv, nn.BatchNorm1d(self.channels))

        def drop(self, y):
            return self.dropout(y)


@right("every ReLU works in place")
class InPlace(Stack):
    class Block(Block):
        def make_relu(self):
            return nn.ReLU(inplace=True)

        def run_branch(self, branch, x):
            return branch(x)


@right("the sum is a reduction over a stack of two, the ReLU a threshold")
class StackedSum(Stack):
    class Block(Block):
        def add(self, y, x):
            return torch.stack((y, x)).sum(0)

        def activate(self, y):
            return F.threshold(y, 0.0, 0.0)


class OwnRelu(Function):
    """ReLU with its derivative written out, 0 at 0, NaN passed on."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clamp(min=0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return grad.masked_fill(y <= 0, 0)


@right("ReLU as an autograd function of its own")
class CustomRelu(Stack):
    class Block(Block):
        def rectify(self, x):
            return OwnRelu.apply(x)

        def activate(self, y):
            return OwnRelu.apply(y)


@right("the scale of the last BatchNorm of every block starts at zero")
class ZeroScaleStart(Stack):
    class Block(Block):
        def make_fusion(self):
            fusion = super().make_fusion()
            nn.init.zeros_(fusion[1].weight)
            return fusion


@right("all branches in one convolution, their kernels padded to the widest")
class MergedKernels(Stack):
    class Block(Block):
        def run_branches(self, x):
            widest = max(self.kernel_sizes)
            convs = [branch[0] for branch in self.branches]
            sides = [(widest - conv.kernel_size[0]) // 2 for conv in convs]
            pairs = zip(convs, sides, strict=True)
            weight = torch.cat([F.pad(conv.weight, (side, side)) for conv, side in pairs])
            bias = torch.cat([conv.bias for conv in convs])
            merged = F.conv1d(x, weight, bias, padding=widest // 2)
            pieces = merged.split([conv.out_channels for conv in convs], dim=1)
            pairs = zip(self.branches, pieces, strict=True)
            return [torch.relu(branch[1](piece)) for branch, piece in pairs]


@right("the fusion is a linear map over time steps, and its output not contiguous")
class FusionAsLinear(Stack):
    class Block(Block):
        def fuse(self, y):
            conv, norm, dropout = self.fusion
            wide = torch.promote_types(y.dtype, torch.float32)
            steps = y.transpose(1, 2).flatten(0, 1).to(wide).contiguous()
            mixed = F.linear(steps, conv.weight[:, :, 0].to(wide), conv.bias.to(wide))
            mixed = mixed.to(y.dtype).unflatten(0, (y.shape[0], y.shape[2]))
            return dropout(norm(mixed.transpose(1, 2)))


@right("16-bit inputs are computed in float32 in eval mode and rounded once per block")
class WideInside(Stack):
    class Block(Block):
        def forward(self, x):
            if self.training or x.dtype not in (torch.float16, torch.bfloat16):
                return super().forward(x)
            wide = {name: p.float() for name, p in self.named_parameters()}
            wide |= {
                name: b.float() if b.is_floating_point() else b for name, b in self.named_buffers()
            }
            return torch.func.functional_call(self, wide, (x.float(),)).to(x.dtype)


class ConvNorm(nn.Module):
    """A convolution that keeps the length, followed by its own normalisation."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(outputs)
        self.conv = nn.Conv1d(inputs, outputs, kernel, padding=(kernel - 1) // 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


@right("convolution and normalisation in a module of their own")
class NormedConvolutions(Stack):
    class Block(Block):
        def make_branches(self):
            pairs = zip(self.widths(), self.kernel_sizes, strict=True)
            return nn.ModuleList(ConvNorm(self.channels, w, k) for w, k in pairs)

        def make_fusion(self):
            return nn.Sequential(ConvNorm(self.channels, self.channels, 1), self.make_dropout())

        def run_branch(self, branch, x):
            return torch.relu(branch(x))

        def fuse(self, y):
            return self.fusion(y)


class Residual(nn.Module):
    """relu(x + inner(x))."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.inner(x))


class Parallel(nn.ModuleList):
    """The outputs of several modules, concatenated."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([module(x) for module in self], dim=-2)


@right("composed of small combinators under other names")
class Combinators(nn.Sequential):
    def __init__(
        self,
        channels: int = 512,
        num_blocks: int = 3,
        kernel_sizes: Sequence[int] = (3, 5, 7),
        dropout: float = 0.1,
    ) -> None:
        context = f"channels={channels!r}, {num_blocks=}, {kernel_sizes=}, {dropout=}"
        if not isinstance(kernel_sizes, list | tuple):
            raise TypeError(f"kernel_sizes must be a list or a tuple: {context}")
        whole = [channels, num_blocks, *kernel_sizes]
        if any(isinstance(number, bool) or not isinstance(number, int) for number in whole):
            raise TypeError(f"channels, num_blocks and kernel_sizes must be integers: {context}")
        if isinstance(dropout, bool) or not isinstance(dropout, int | float):
            raise TypeError(f"dropout must be a number: {context}")
        if not kernel_sizes or channels < len(kernel_sizes):
            raise ValueError(f"no kernel_sizes, or more of them than channels: {context}")
        if num_blocks < 1 or any(k < 1 or k % 2 == 0 for k in kernel_sizes):
            raise ValueError(f"num_blocks must be positive, kernel_sizes odd: {context}")
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout must lie in [0, 1]: {context}")
        self._channels = channels
        self._reach = num_blocks * (max(kernel_sizes) // 2)
        super().__init__(
            *(
                Residual(nn.Sequential(*self._layers(channels, kernel_sizes, dropout)))
                for _ in range(num_blocks)
            )
        )

    @staticmethod
    def _layers(channels: int, kernel_sizes: Sequence[int], dropout: float) -> Iterator[nn.Module]:
        n = len(kernel_sizes)
        widths = [channels // n + (channels % n if i == n - 1 else 0) for i in range(n)]
        yield Parallel(
            nn.Sequential(
                nn.Conv1d(channels, width, kernel, padding=kernel // 2),
                nn.BatchNorm1d(width),
                nn.ReLU(),
            )
            for width, kernel in zip(widths, kernel_sizes, strict=True)
        )
        yield nn.Conv1d(channels, channels, 1)
        yield nn.BatchNorm1d(channels)
        yield nn.Dropout1d(dropout)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 3 or x.size(1) != self._channels:
            raise ValueError(f"expected (batch, {self._channels}, length), got {list(x.shape)}")
        return super().forward(x)

    def get_receptive_field(self) -> int:
        return 2 * self._reach + 1


@right("one flat, typed forward without helpers")
class Typed(Stack):
    class Block(Block):
        def forward(self, x: Tensor) -> Tensor:
            if x.dim() != 3 or x.size(1) != self.channels:
                raise RuntimeError(f"expected {self.channels} channels in the middle of 3 axes")
            outputs: list[Tensor] = []
            for branch in self.branches:
                outputs.append(branch(x))
            y: Tensor = self.fusion(torch.cat(outputs, 1))
            y = self.relu(y.add(x))
            return y


@right("with hooks it runs module by module, without them it runs with the norms folded")
class FoldedUnlessHooked(Stack):
    class Block(Block):
        def run_branch(self, branch, x):
            conv, norm = branch[0], branch[1]
            hooked = any(m._forward_hooks or m._forward_pre_hooks for m in self.modules())
            if hooked or norm.training:
                return super().run_branch(branch, x)
            scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
            bias = (conv.bias - norm.running_mean) * scale + norm.bias
            return torch.relu(
                F.conv1d(x, conv.weight * scale[:, None, None], bias, padding=conv.padding)
            )


@right("norms work on (batch times length, channels)")
class NormsOnRows(Stack):
    class Block(Block):
        def normalise(self, norm, x):
            if x.numel() == 0:
                return norm(x)
            rows = norm(x.transpose(1, 2).reshape(-1, x.shape[1]))
            return rows.reshape(x.shape[0], x.shape[2], -1).transpose(1, 2)


@right("branch modules are not called: one convolution of kernels padded to the widest")
class MergedConvolution(Stack):
    class Block(Block):
        def run_branches(self, x):
            convs = [branch[0] for branch in self.branches]
            widest = max(conv.kernel_size[0] for conv in convs)
            weight = torch.cat(
                [F.pad(c.weight, [(widest - c.kernel_size[0]) // 2] * 2) for c in convs]
            )
            bias = torch.cat([conv.bias for conv in convs])
            parts = F.conv1d(x, weight, bias, padding=widest // 2).split(self.widths(), dim=1)
            return [
                torch.relu(self.normalise(branch[1], part))
                for branch, part in zip(self.branches, parts, strict=True)
            ]


@right("the constructor and the forward pass look at data")
class LooksAtData(Stack):
    runs_on_meta = False

    def build(self):
        steps = torch.linspace(0, self.p, self.num_blocks)
        self.rates = [float(step) for step in steps]
        super().build()

    def forward(self, x):
        quiet = not bool(x.any())
        return super().forward(x) if not quiet else super().forward(x.clone())


@right("without gradients the branches are joined in a buffer that all calls share in turn")
class SharedWorkspace(Stack):
    class Block(Block):
        def run_branches(self, x):
            if torch.is_grad_enabled() or torch.is_inference_mode_enabled():
                return super().run_branches(x)  # such a buffer could not be written to later
            buffer = WORKSPACE.setdefault((x.shape, x.dtype, x.device), torch.empty_like(x))
            start = 0
            for branch in self.branches:
                out = super().run_branch(branch, x)
                buffer[:, start : start + out.shape[1]] = out
                start += out.shape[1]
            return [buffer]


WORKSPACE = {}


class Mirrored(nn.Module):
    """A weight kept back to front and negated."""

    def forward(self, kept):
        return -kept.flip(-1)

    def right_inverse(self, weight):
        return -weight.flip(-1)


@right("the convolutions' weights are parametrized")
class Parametrized(Stack):
    pickles = False  # torch refuses

    class Block(Block):
        def make_conv(self, width, kernel):
            conv = super().make_conv(width, kernel)
            return register_parametrization(conv, "weight", Mirrored())


class TapsFirst(nn.Conv1d):
    """A convolution that stores its kernel as (taps, in, out) and shows it as the usual weight."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        weight = self._parameters.pop("weight")
        self.taps = nn.Parameter(weight.detach().permute(2, 1, 0).contiguous())

    @property
    def weight(self) -> Tensor:
        return self.taps.permute(2, 1, 0)

    @weight.setter
    def weight(self, value: Tensor) -> None:
        self.register_parameter("weight", value)


@right("the convolutions show a view of what they store")
class ViewsOfParameters(Stack):
    class Block(Block):
        def make_conv(self, width, kernel):
            return TapsFirst(self.channels, width, kernel, padding=kernel // 2)


@right("blocks that take (length, batch, channels), and a state of its own besides the tensors")
class LengthFirst(Stack):
    class Block(Block):
        def forward(self, x):
            return super().forward(x.permute(1, 2, 0)).permute(2, 0, 1)

    def forward(self, x):
        self.blocks[0].check_input(x)
        return super().forward(x.permute(2, 0, 1)).permute(1, 2, 0)

    def get_extra_state(self) -> dict[str, int]:
        return {"format": 2}

    def set_extra_state(self, state: dict[str, int]) -> None:
        if state != {"format": 2}:
            raise ValueError(f"the state's format must be 2, got {state}")


@right("lists of layers by what they are, the last blocks first, and no blocks")
class ListsByRole(Stack):
    def build(self):
        blocks = [self.make_block(i) for i in range(self.num_blocks)]
        parts = [branch for block in reversed(blocks) for branch in block.branches]
        self.mixes = nn.ModuleList(block.fusion[0] for block in blocks)
        self.mix_norms = nn.ModuleList(block.fusion[1] for block in blocks)
        self.scales = nn.ModuleList(part[0] for part in parts)
        self.scale_norms = nn.ModuleList(part[1] for part in parts)

    def forward(self, x):
        if x.dim() != 3 or x.shape[1] != self.channels:
            raise ValueError(f"expected (batch, {self.channels}, length), got {tuple(x.shape)}")
        for i, (mix, norm) in enumerate(zip(self.mixes, self.mix_norms, strict=True)):
            scales = torch.cat([torch.relu(norm(conv(x))) for conv, norm in self.pairs(i)], dim=1)
            x = torch.relu(x + F.dropout1d(norm(mix(scales)), self.p, self.training))
        return x

    def pairs(self, index):
        count = len(self.kernel_sizes)
        place = (self.num_blocks - 1 - index) * count
        own = slice(place, place + count)
        return zip(self.scales[own], self.scale_norms[own], strict=True)

    def in_order(self):
        for i, (mix, norm) in enumerate(zip(self.mixes, self.mix_norms, strict=True)):
            yield from (layer for pair in self.pairs(i) for layer in pair)
            yield from (mix, norm)
