"""Probes: inputs and weights that make a statement visible, and what is read off the output."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rescnn_verify.case import Case
from rescnn_verify.drawing import SEAMS
from rescnn_verify.handles import BlockHandles, ConvNorm, fill, put
from rescnn_verify.subject import DTYPES

__all__ = [
    "BIG_VARIANCE",
    "FROZEN",
    "PARTS",
    "Called",
    "LeftBehind",
    "as_input",
    "called_within",
    "exact_norm",
    "freeze",
    "freeze_norms",
    "impulse_rows",
    "make_end_taps",
    "make_positive",
    "normal_input",
    "only_branch",
    "own_calls",
    "part_of",
    "positions",
    "randomise",
    "reach",
    "set_norm",
    "shrink_fusion",
    "state_of",
    "whole_state",
    "with_small_variances",
    "zero_fusion",
]


#: Inputs and outputs of modules, call by call.
Calls = dict[nn.Module, list[tuple[Tensor, Tensor]]]


def as_input(case: Case, values: np.ndarray) -> Tensor:
    """float64 values of shape (batch, channels, length) in the case's dtype, device and layout.

    ``expanded`` repeats the first batch row, or, for a batch of one, the first position, with
    stride 0; the tensor then has the shape, but not all of the values.
    """
    tensor = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float64))
    tensor = tensor.to(dtype=DTYPES[case.dtype], device=case.device)
    batch, channels, length = tensor.shape
    if case.layout == "transposed":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if case.layout == "strided":
        wide = torch.full(
            (batch, channels, 2 * length + 1), 7, dtype=tensor.dtype, device=case.device
        )
        view = wide[:, :, 1 : 2 * length + 1 : 2]
        view.copy_(tensor)
        return view
    if case.layout == "expanded" and batch > 0:
        if batch > 1:
            return tensor[:1].expand(batch, channels, length)
        return tensor[:, :, :1].expand(batch, channels, length)
    return tensor


def whole_state(model: nn.Module) -> Mapping[str, Any]:
    """A copy of the state_dict, as it can be loaded."""
    state = model.state_dict()  # a mapping that also has its modules' versions
    for name, value in state.items():
        state[name] = value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)
    return state


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the tensors in the state_dict; a module's extra state, which may be anything, is
    left out."""
    state = whole_state(model)
    return {k: v for k, v in state.items() if k.rpartition(".")[2] != "_extra_state"}


def normal_input(case: Case, purpose: str = "input") -> Tensor:
    """Standard normal values without exact zeros."""
    values = case.rng(purpose).standard_normal(case.shape)
    return as_input(case, values if values.all() else np.where(values == 0, 1.0, values))


def positions(case: Case, purpose: str = "positions", count: int = 4) -> list[int]:
    """Positions of the input to probe: both ends, then others.

    In a long signal as many again lie at multiples of usual chunk sizes or just before, where an
    implementation that works in chunks has its seams.
    """
    rng = case.rng(purpose)
    places = {0, case.length - 1, *rng.integers(0, case.length, size=count - 2).tolist()}
    for size in rng.choice(SEAMS, size=count).tolist():
        if size < case.length:
            seam = size * int(rng.integers(1, (case.length - 1) // size + 1))
            places.add(seam - int(rng.integers(0, 2)))
    return sorted(places)


def impulse_rows(case: Case, places: list[int], value: float) -> np.ndarray:
    """Zero but for ``value`` in one channel of row i at position ``places[i]``.

    Returns:
        Shape (len(places), channels, length).
    """
    rng = case.rng("impulse channel")
    values = np.zeros((len(places), case.channels, case.length))
    for row, place in enumerate(places):
        values[row, rng.integers(case.channels), place] = value
    return values


def reach(place: int, before: int, after: int, length: int) -> np.ndarray:
    """The outputs that depend on input position ``place``.

    Args:
        before, after: the output at t depends on inputs t − before … t + after.

    Returns:
        Booleans of shape (length,).
    """
    t = np.arange(length)
    return (t - before <= place) & (place <= t + after)


class Called(nn.Module):
    """A model together with the way the target calls it, for `torch.func.functional_call`.

    Names of parameters and buffers begin with ``model.``.
    """

    def __init__(self, call: Callable[[nn.Module, Tensor], Tensor], model: nn.Module) -> None:
        super().__init__()
        self.call, self.model = call, model

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.model, x)


def randomise(model: nn.Module, rng: np.random.Generator) -> None:
    """Random weights and statistics in every parameter, norm scales of both signs.

    Weights are uniform with variance 1/fan-in, so that activations stay of order one at any depth.
    """
    for module in model.modules():
        if isinstance(module, _NormBase):
            n = module.num_features
            set_norm(
                module,
                scale=rng.uniform(0.5, 1.5, n) * np.where(rng.random(n) < 0.3, -1, 1),
                shift=rng.uniform(-1, 1, n),
                mean=rng.uniform(-1, 1, n),
                variance=rng.uniform(0.5, 2, n),
            )
            continue
        for parameter in module.parameters(recurse=False):
            fan_in = math.prod(parameter.shape[1:]) if parameter.dim() > 1 else 4
            width = np.sqrt(3 / max(1, fan_in))
            fill(parameter, rng.uniform(-width, width, tuple(parameter.shape)))


def with_small_variances(
    blocks: Sequence[BlockHandles], rng: np.random.Generator, least: float
) -> None:
    """Gives norms variances from ``least`` to 1 and scales that make up for it.

    The function stays what it is, but now eps is a noticeable part of it.
    """
    for norm in (layer.norm for block in blocks for layer in block.layers):
        assert norm.running_var is not None
        old = norm.running_var.detach().cpu().double().numpy()
        new = least ** rng.random(len(old))
        scale = norm.weight.detach().cpu().double().numpy()
        put(norm, "running_var", new)
        put(norm, "weight", scale * np.sqrt((new + norm.eps) / (old + norm.eps)))


#: What people freeze: parts of the architecture, or any parameters.
PARTS = (
    "all", "half", "a tenth", "some branches", "some blocks", "convolutions", "norms", "branches",
    "fusions", "convolutions of branches", "norms of branches", "first block",
    "all but the first block", "last block", "all but the last block", "weights", "biases",
)  # fmt: skip


def part_of(
    model: nn.Module, blocks: Sequence[BlockHandles], which: str, rng: np.random.Generator
) -> set[nn.Parameter]:
    """The parameters of one of `PARTS`, or of "nothing"; some parts are chosen at random."""
    shares = {"nothing": 0.0, "a tenth": 0.1, "half": 0.5, "all": 1.0}
    if which in shares:
        share = shares[which]
        return {p for p in model.parameters() if rng.random() < share}
    places = [(i, j) for i, block in enumerate(blocks) for j in range(len(block.layers))]
    some_blocks = {i for i in range(len(blocks)) if rng.integers(2)}
    some_layers = {place for place in places if rng.integers(2)}
    return {
        p
        for i, block in enumerate(blocks)
        for j, layer in enumerate(block.layers)
        for module in (layer.conv, layer.norm)
        for name, p in module.named_parameters(recurse=False)
        if {
            "some branches": j < len(block.branches) and (i, j) in some_layers,
            "some blocks": i in some_blocks,
            "convolutions": module is layer.conv,
            "norms": module is layer.norm,
            "branches": j < len(block.branches),
            "fusions": j == len(block.branches),
            "convolutions of branches": module is layer.conv and j < len(block.branches),
            "norms of branches": module is layer.norm and j < len(block.branches),
            "first block": i == 0,
            "all but the first block": i > 0,
            "last block": i == len(blocks) - 1,
            "all but the last block": i < len(blocks) - 1,
            "weights": name == "weight",
            "biases": name == "bias",
        }[which]
    }


#: Which norms of a training model are in eval mode; of "some" each one with chance ½.
FROZEN = ("no block", "some blocks", "some norms")


def freeze_norms(
    blocks: Sequence[BlockHandles], which: str, rng: np.random.Generator
) -> tuple[tuple[bool, ...], ...]:
    """Puts norms into eval mode, one of `FROZEN`.

    Returns:
        Whether a layer's norm is, for each layer of each block.
    """
    chosen = []
    for block in blocks:
        flags = rng.integers(2, size=len(block.layers)).astype(bool)
        if which != "some norms":
            flags[:] = which == "some blocks" and flags[0]
        chosen.append(tuple(flags.tolist()))
        for layer, is_frozen in zip(block.layers, flags, strict=True):
            if is_frozen:
                freeze(layer.norm)
    return tuple(chosen)


def freeze(norm: nn.Module) -> None:
    """Puts a norm into eval mode, but not the layers that it may own."""
    modes = [(module, module.training) for module in norm.modules() if module is not norm]
    norm.eval()
    for module, training in modes:
        module.training = training


@contextmanager
def own_calls(
    modules: Sequence[nn.Module],
) -> Iterator[dict[nn.Module, list[tuple[Tensor, Tensor]]]]:
    """Input and output of every call of dense zero-padded convolutions and norms of torch's own.

    Both are copies: an activation behind may work in place. A subclass with a forward pass of its
    own is left out, one with hooks of its own, and so is a call in train mode or on anything but
    (batch, channels, length).
    """
    calls: Calls = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        if not module.training and inputs[0].dim() == 3:
            pair = (inputs[0].detach().clone(), out.detach().clone())
            calls.setdefault(module, []).append(pair)

    hooks = [module.register_forward_hook(note) for module in modules if _is_plain(module)]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def called_within(
    model: nn.Module, action: Callable[[], Tensor | None], *, after: int
) -> Iterator[list[Tensor | None]]:
    """Calls ``action`` right after the given call of a submodule without children, counted from 0.

    Yields:
        A list to which every such call adds an item: None, or what ``action`` returned.
    """
    noted: list[Tensor | None] = []
    busy = False

    def note(*_: Any) -> None:
        nonlocal busy
        if busy:
            return
        busy = True
        noted.append(action() if len(noted) == after else None)
        busy = False

    leaves = [module for module in model.modules() if not module._modules and module is not model]
    hooks = [module.register_forward_hook(note) for module in leaves]
    try:
        yield noted
    finally:
        for hook in hooks:
            hook.remove()


class LeftBehind(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the floating-point tensors of other devices that operations on one device are given.

    Numbers without a dimension are left out: torch moves them by itself. So are integers, with
    which any device can be indexed.

    Args:
        device: the one device.
    """

    def __init__(self, device: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if any(t.device.type == self.device for t in tensors):
            self.seen += [
                f"{t.device.type} tensor of shape {tuple(t.shape)} in {func}"
                for t in tensors
                if t.device.type != self.device and t.is_floating_point() and t.dim() > 0
            ]
        return func(*args, **(kwargs or {}))


def _is_plain(module: nn.Module) -> bool:
    if module._forward_hooks or module._forward_pre_hooks:
        return False
    if isinstance(module, nn.Conv1d):
        own = (type(module).forward, type(module)._conv_forward)
        same = own == (nn.Conv1d.forward, nn.Conv1d._conv_forward)
        return same and module.padding_mode == "zeros" and module.groups == 1
    return type(module).forward is _BatchNorm.forward


def set_norm(
    norm: _NormBase,
    *,
    scale: np.ndarray | float = 1.0,
    shift: np.ndarray | float = 0.0,
    mean: np.ndarray | float = 0.0,
    variance: np.ndarray | float = 1.0,
) -> None:
    """Sets a norm's parameters and running statistics, as far as it has them."""
    for name, value in (
        ("weight", scale), ("bias", shift), ("running_mean", mean), ("running_var", variance)
    ):  # fmt: skip
        put(norm, name, np.asarray(value))


def make_positive(blocks: tuple[BlockHandles, ...], rng: np.random.Generator) -> None:
    """Positive weights of average 1/fan-in, no shifts: no ReLU ever cuts, no term ever cancels."""
    for block in blocks:
        for layer in block.layers:
            shape = tuple(layer.conv.weight.shape)
            fan_in = shape[1] * shape[2]
            put(layer.conv, "weight", rng.uniform(0.5, 1.5, shape) / fan_in)
            _zero_bias(layer)
            set_norm(layer.norm)


def shrink_fusion(blocks: tuple[BlockHandles, ...], rng: np.random.Generator, most: float) -> None:
    """Random weights without shifts; no block adds more than ``most`` times the largest value.

    A sum over branch channels is at most Σ|F||W| times the largest input: the fusion is divided by
    the largest such sum.
    """
    for block in blocks:
        for layer in block.layers:
            put(layer.conv, "weight", rng.standard_normal(tuple(layer.conv.weight.shape)))
            _zero_bias(layer)
            set_norm(layer.norm)
        sums = [np.abs(_weight_of(branch.conv)).sum((1, 2)) for branch in block.branches]
        fusion = _weight_of(block.fusion.conv)
        largest = (np.abs(fusion)[:, :, 0] @ np.concatenate(sums)).max()
        put(block.fusion.conv, "weight", fusion * (most / (2 * largest)))


def only_branch(blocks: tuple[BlockHandles, ...], index: int) -> None:
    """Cuts every branch but one off the fusion of every block."""
    for block in blocks:
        widths = [branch.conv.weight.shape[0] for branch in block.branches]
        start = sum(widths[:index])
        fusion = _weight_of(block.fusion.conv)
        fusion[:, :start] = fusion[:, start + widths[index] :] = 0
        put(block.fusion.conv, "weight", fusion)


def zero_fusion(blocks: tuple[BlockHandles, ...], how: str) -> None:
    """Makes every fusion return zero.

    Args:
        how: ``"norm"`` zeroes the norm's scale and shift, ``"convolution"`` the convolution's
            weight and bias and the norm's mean and shift.
    """
    for block in blocks:
        fusion = block.fusion
        if how == "norm":
            put(fusion.norm, "weight", np.zeros(()))
        else:
            put(fusion.conv, "weight", np.zeros(()))
            _zero_bias(fusion)
            put(fusion.norm, "running_mean", np.zeros(()))
        put(fusion.norm, "bias", np.zeros(()))


# A running variance so large that adding any usual epsilon to it rounds it off again, also in the
# wider dtype that an implementation may compute in (float16 holds no larger one), and a power
# of four, so that its square root is a power of two: norms then multiply by exactly ±2^i.
BIG_VARIANCE = {"float64": 4.0**22, "float32": 4.0**22, "bfloat16": 4.0**22, "float16": 4.0**7}


def exact_norm(
    norm: _NormBase,
    dtype: str,
    *,
    scale: np.ndarray | float = 1.0,
    shift: np.ndarray | float = 0.0,
    mean: np.ndarray | float = 0.0,
) -> None:
    """Makes an eval-mode norm return ``scale·(v − mean) + shift`` without any rounding.

    ``scale`` must be a power of two, positive or negative. The epsilon of the norm does not
    matter: it is below half a unit in the last place of the running variance.
    """
    variance = BIG_VARIANCE[dtype]
    set_norm(norm, scale=np.sqrt(variance) * scale, shift=shift, mean=mean, variance=variance)


def make_end_taps(blocks: tuple[BlockHandles, ...], dtype: str) -> None:
    """Each block adds the two end taps of its widest kernel to its first channel, exactly.

    The first channel of the widest branch is ``x[t − r] + x[t + r]`` of the first channel (``x[t]``
    for a kernel of one), the fusion hands it on to the first channel, and all else is zero.
    """
    for block in blocks:
        for layer in block.layers:
            put(layer.conv, "weight", np.zeros(()))
            _zero_bias(layer)
            exact_norm(layer.norm, dtype)
        kernels = [branch.conv.weight.shape[2] for branch in block.branches]
        widest = int(np.argmax(kernels))
        column = sum(branch.conv.weight.shape[0] for branch in block.branches[:widest])
        ends, handed = _weight_of(block.branches[widest].conv), _weight_of(block.fusion.conv)
        ends[0, 0, 0] = ends[0, 0, -1] = handed[0, column, 0] = 1
        put(block.branches[widest].conv, "weight", ends)
        put(block.fusion.conv, "weight", handed)


def _zero_bias(layer: ConvNorm) -> None:
    put(layer.conv, "bias", np.zeros(()))


def _weight_of(conv: nn.Conv1d) -> np.ndarray:
    values: np.ndarray = conv.weight.detach().cpu().double().numpy().copy()
    return values
