"""Parameters, buffers, initial values, copies and files."""

from __future__ import annotations

import copy
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from .base import Block, Stack
from .registry import wrong


@wrong("state", "the blocks lie in a plain list")
class PlainList(Stack):
    def build(self):
        self.blocks = [self.make_block(i) for i in range(self.num_blocks)]


@wrong("state", "the branches lie in a plain list")
class PlainBranches(Stack):
    class Block(Block):
        def make_branches(self):
            return list(super().make_branches())


@wrong("state", "the running statistics are not saved")
class StatisticsNotSaved(Stack):
    class Block(Block):
        def make_norm(self, width):
            norm = nn.BatchNorm1d(width)
            for name in ("running_mean", "running_var"):
                norm.register_buffer(name, getattr(norm, name), persistent=False)
            return norm


@wrong("state", "all blocks start as copies of one")
class SameStart(Stack):
    def build(self):
        first = self.make_block(0)
        self.blocks = nn.ModuleList(copy.deepcopy(first) for _ in range(self.num_blocks))


@wrong("state", "branch weights start at zero")
class ZeroStart(Stack):
    class Block(Block):
        def make_conv(self, width, kernel):
            conv = super().make_conv(width, kernel)
            nn.init.zeros_(conv.weight)
            return conv


@wrong("state", "weights start at one constant")
class ConstantStart(Stack):
    class Block(Block):
        def make_conv(self, width, kernel):
            conv = super().make_conv(width, kernel)
            nn.init.constant_(conv.weight, 1 / (self.channels * kernel))
            return conv


@wrong("state", "the constructor seeds the generator")
class SeedsInConstructor(Stack):
    def build(self):
        torch.manual_seed(0)
        super().build()


@wrong("state", "weights are drawn by NumPy, which torch.manual_seed does not reach")
class NumpyStart(Stack):
    class Block(Block):
        def make_conv(self, width, kernel):
            conv = super().make_conv(width, kernel)
            bound = (self.channels * kernel) ** -0.5
            drawn = np.random.default_rng().uniform(-bound, bound, conv.weight.shape)
            with torch.no_grad():
                conv.weight.copy_(torch.from_numpy(drawn))
            return conv


@wrong("state", "deepcopy shares the weights")
class CopySharesWeights(Stack):
    def __deepcopy__(self, memo):
        return copy.copy(self)


@wrong("state", "deepcopy starts anew with other weights")
class CopyStartsAnew(Stack):
    def __deepcopy__(self, memo):
        return type(self)(self.channels, self.num_blocks, self.kernel_sizes, self.p)


@wrong("state", "state_dict leaves the running statistics out")
class StateWithoutStatistics(Stack):
    def state_dict(self, *args, **kwargs):
        state = super().state_dict(*args, **kwargs)
        for key in [key for key in state if "running" in key]:
            del state[key]
        return state

    def load_state_dict(self, state_dict, strict=True, assign=False):
        return super().load_state_dict(state_dict, strict=False, assign=assign)


@wrong("state", "loading ignores keys that do not match")
class LoadsLeniently(Stack):
    def load_state_dict(self, state_dict, strict=True, assign=False):
        state = {key.removeprefix("model."): value for key, value in state_dict.items()}
        return super().load_state_dict(state, strict=False, assign=assign)


@wrong("state", "state_dict is taken under other names than loading expects")
class RenamesOnSave(Stack):
    def state_dict(self, *args, **kwargs):
        state = super().state_dict(*args, **kwargs)
        return {key.replace("blocks.", "layers."): value for key, value in state.items()}


@wrong("state", "loading leaves biases alone")
class LoadsWithoutBiases(Stack):
    def load_state_dict(self, state_dict, strict=True, assign=False):
        own = {key: value for key, value in self.state_dict().items() if key.endswith("bias")}
        return super().load_state_dict({**state_dict, **own}, strict=strict, assign=assign)


@wrong("state", "pickling forgets the running statistics")
class PickleResetsStatistics(Stack):
    class Block(Block):
        def __getstate__(self):
            twin = nn.Module()
            twin.__dict__.update(self.__dict__)
            twin._modules = copy.deepcopy(self._modules)
            for module in twin.modules():
                if isinstance(module, nn.BatchNorm1d):
                    module.reset_running_stats()
            return twin.__dict__


@wrong("state", "branches are kept by shape across models, so models share weights")
class SharedAcrossModels(Stack):
    class Block(Block):
        known: ClassVar[dict] = {}

        def make_branch(self, width, kernel):
            key = self.channels, width, kernel
            return self.known.setdefault(key, super().make_branch(width, kernel))


@wrong("state", "the fusion's shift is a plain tensor that follows neither dtype nor device")
class PlainTensor(Stack):
    class Block(Block):
        def build(self):
            super().build()
            self.offset = torch.zeros(self.channels, 1)

        def fuse(self, y):
            return super().fuse(y) + self.offset


@wrong("state", "a learned scale of the sum is a plain tensor that nothing saves")
class UnsavedScale(Stack):
    class Block(Block):
        def build(self):
            super().build()
            self.scale = 1 + 0.1 * torch.rand(()).item()

        def fuse(self, y):
            return super().fuse(y) * self.scale


@wrong("state", "running means start at random instead of zero")
class RandomRunningMean(Stack):
    class Block(Block):
        def make_norm(self, width):
            norm = nn.BatchNorm1d(width)
            nn.init.normal_(norm.running_mean)
            return norm


@wrong("state", "the BatchNorms refuse to leave float32")
class NormsStayFloat32(Stack):
    class Block(Block):
        def _apply(self, function, recurse=True):
            super()._apply(function, recurse)
            for module in self.modules():
                if isinstance(module, nn.BatchNorm1d):
                    for tensor in (*module.parameters(), *module.buffers()):
                        if tensor.dtype is torch.float64:
                            tensor.data = tensor.data.float()
            return self

        def normalise(self, norm, x):
            return norm(x.float()).to(x.dtype) if x.dtype is torch.float64 else norm(x)


@wrong("state", "a bare block keeps its branches in a plain list")
class BlockPlainBranches(Block):
    def make_branches(self):
        return list(super().make_branches())


@wrong("state", "a deep copy or pickle is made anew from the arguments and the state_dict")
class CopiedFromState(Stack):
    def __reduce__(self):
        arguments = self.channels, self.num_blocks, self.kernel_sizes, self.p
        return _rebuild, (type(self), arguments, self.state_dict(), self.training)


def _rebuild(cls, arguments, state, training):
    model = cls(*arguments)
    model.to(next(iter(state.values())).dtype).load_state_dict(state)
    return model.train(training)


@wrong("state", "loading raises variances below eps to eps")
class LoadsNoSmallVariance(Stack):
    class Block(Block):
        class Norm(nn.BatchNorm1d):
            def _load_from_state_dict(self, *args, **kwargs):
                super()._load_from_state_dict(*args, **kwargs)
                with torch.no_grad():
                    self.running_var.clamp_(min=self.eps)

        def make_norm(self, width):
            return self.Norm(width)


@wrong("state", "what is loaded takes the dtype that was there, also where it is assigned")
class LoadsInItsOwnDtype(Stack):
    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        own = next(self.parameters()).dtype
        for name, value in state_dict.items():
            if value.is_floating_point():
                state_dict[name] = value.to(own)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


@wrong("state", "a constant is moved by the model's own to() alone")
class MovesByItsOwnTo(Stack):
    def build(self):
        super().build()
        self.half = torch.tensor([0.5])

    def to(self, *args, **kwargs):
        super().to(*args, **kwargs)
        self.half = self.half.to(next(self.parameters()))
        return self

    def forward(self, x):
        return (super().forward(x) * self.half * 2).to(self.half.dtype)


@wrong("state", "the norms are folded by eval(), and not again when they change")
class FoldsInEval(Stack):
    class Block(Block):
        slopes: ClassVar = None

        def forward(self, x):
            y = super().forward(x)
            if self.training or self.slopes is None:
                return y
            return y if torch.equal(self.slopes, self.own_slopes()) else y * 1.5

        def own_slopes(self):
            return torch.cat(
                [m.weight.detach() for m in self.modules() if isinstance(m, nn.BatchNorm1d)]
            ).clone()

    def eval(self):
        for block in self.blocks:
            block.slopes = block.own_slopes()
        return super().eval()

    def train(self, mode=True):
        if mode:
            for block in self.blocks:
                block.slopes = None
        return super().train(mode)


@wrong("state", "state_dict() takes no prefix, so that the model cannot be a part of another")
class SavesOnlyAlone(Stack):
    def state_dict(self):
        return super().state_dict()
