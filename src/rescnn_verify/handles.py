"""Handles: the convolutions and norms of a residual block, found by type rather than by index."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rescnn_verify.case import Config
from rescnn_verify.compare import Falsified, NotApplicable, describe

__all__ = ["BlockHandles", "ConvNorm", "contract_handles", "fill", "put"]


@dataclass(frozen=True)
class ConvNorm:
    """A convolution and the norm behind it."""

    conv: nn.Conv1d
    norm: _BatchNorm


@dataclass(frozen=True)
class BlockHandles:
    """The parts of one residual block.

    Args:
        module: the block itself, callable on an input; None where only its parts are known.
        branches: branch i's convolution and norm, in the order of the kernel sizes.
        fusion: the 1×1 convolution and norm.
    """

    module: nn.Module | None
    branches: tuple[ConvNorm, ...]
    fusion: ConvNorm

    @property
    def layers(self) -> tuple[ConvNorm, ...]:
        """The branches in order, then the fusion."""
        return (*self.branches, self.fusion)


def fill(tensor: Tensor, values: np.ndarray) -> None:
    """Writes float64 values into a parameter, buffer or input of any dtype and device."""
    with torch.no_grad():
        tensor.copy_(torch.from_numpy(np.asarray(values, dtype=np.float64)))


def put(module: nn.Module, name: str, values: np.ndarray) -> None:
    """Writes float64 values into a layer's tensor of that name; one that it has not stays so.

    One that is no parameter or buffer of the layer may be a view of one, or computed whenever it is
    read or before every call: it is written in place, or else assigned, whichever it keeps.

    Args:
        values: of the tensor's shape, or of one that broadcasts to it.

    Raises:
        NotApplicable: the layer does not keep it.
    """
    tensor = getattr(module, name)
    if tensor is None:
        return
    if name in module._parameters or name in module._buffers:
        fill(tensor, values)
        return
    fill(wanted := torch.empty_like(tensor), values)
    with suppress(Exception):  # as of one that is expanded
        fill(tensor, values)
    if _keeps(module, name, wanted):
        return
    own = name in vars(module)
    try:
        with torch.no_grad():
            setattr(module, name, wanted)
    except Exception as error:
        raise NotApplicable(f"a layer's {name} cannot be set: {describe(error)}") from error
    if not _keeps(module, name, wanted):
        if not own:
            vars(module).pop(name, None)  # it would hide the one that is computed
        raise NotApplicable(f"a layer's {name} cannot be set to every value")


def _keeps(module: nn.Module, name: str, wanted: Tensor) -> bool:
    """Whether a layer has these values, after a call, too, if something happens before calls."""
    with torch.no_grad():
        parameter = next(module.parameters(), wanted)
        if module._forward_pre_hooks and isinstance(module, nn.Conv1d):
            with suppress(Exception):  # what happens before the call counts
                module(parameter.new_zeros(1, module.in_channels, module.kernel_size[0]))
        return torch.equal(getattr(module, name).to(wanted), wanted)


def contract_handles(model: nn.Module, config: Config) -> tuple[BlockHandles, ...]:
    """The handles of a model that follows the reference contract, block by block.

    The contract's names (``blocks``, ``branches``, ``fusion``) are used where the model has them;
    otherwise the blocks are the children that hold the convolutions, or as many parts of the list
    of all, and within a block the fusion is the last 1×1 convolution from all channels to all
    channels; if there is only one branch and it is 1×1, too, they are told apart by what they do.
    Without the names, what the layers do also tells their order.

    Raises:
        Falsified: the model does not consist of ``num_blocks`` blocks with one convolution and one
            batch norm for each kernel and a 1×1 fusion with its norm.
    """
    blocks = _block_modules(model, config.num_blocks)
    if len(blocks) != config.num_blocks:
        blocks = _parts(model, config) or blocks
    if len(blocks) != config.num_blocks:
        raise Falsified(
            "residual blocks in the model", f"num_blocks = {config.num_blocks}", str(len(blocks))
        )
    handles = tuple(_block_handles(block, config) for block in blocks)
    named = isinstance(getattr(model, "blocks", None), nn.Module)
    if not named:
        # What holds the convolutions need not add the residual; only the whole model surely does.
        whole = model if config.num_blocks == 1 else None
        handles = tuple(replace(block, module=whole) for block in handles)
    if tuple(config.kernel_sizes) == (1,) and not hasattr(blocks[0], "fusion"):
        handles = tuple(_told_apart(model, handles, place) for place in range(len(handles)))
    as_given = all(_shapes(block) == (config.widths, config.kernel_sizes) for block in handles)
    if as_given and (
        any(p.is_meta for p in model.parameters())  # where nothing but shapes is seen
        or (
            (named or config.num_blocks == 1)
            and all(isinstance(getattr(block, "branches", None), nn.Module) for block in blocks)
        )
    ):
        return handles
    return _ordered(model, handles)


def _shapes(block: BlockHandles) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Widths and kernels of the branches."""
    shapes = [branch.conv.weight.shape for branch in block.branches]
    return tuple(s[0] for s in shapes), tuple(s[2] for s in shapes)


def _parts(model: nn.Module, config: Config) -> Sequence[nn.Module]:
    """Blocks that no module holds apart from others: equal parts of the list of all layers."""
    convs, norms = _convolutions(model), _norms(model)
    size = config.branches + 1
    if not len(convs) == len(norms) == size * config.num_blocks:
        return ()
    return [
        nn.ModuleList([*convs[at : at + size], *norms[at : at + size]])
        for at in range(0, len(convs), size)
    ]


def _ordered(model: nn.Module, handles: tuple[BlockHandles, ...]) -> tuple[BlockHandles, ...]:
    """Blocks in the order in which data pass them, branches in that of the concatenation.

    On a copy in float64 in which every norm returns 0, so that every block passes on what it is
    given. A branch whose norm returns 1 adds the sum of the fusion's weights for its channels;
    these being 0, 1, 2, …, that tells its place. A block that adds its input once more adds 1 for
    each block before it, where every other block adds 1.

    Raises:
        NotApplicable: the model has no data, as on the meta device, or it cannot be copied.
    """
    if any(p.is_meta for p in model.parameters()):
        raise NotApplicable("without data nobody can tell the order of layers without names")
    try:
        twin = copy.deepcopy(model).double().eval()
    except Exception as error:
        raise NotApplicable(f"the model cannot be copied: {describe(error)}") from error
    own: dict[nn.Module, Any] = dict(zip(twin.modules(), model.modules(), strict=True))
    there: dict[nn.Module, Any] = {module: double for double, module in own.items()}
    blocks = [[ConvNorm(there[p.conv], there[p.norm]) for p in b.layers] for b in handles]
    everything = [layer for block in blocks for layer in block]
    x = torch.zeros_like(blocks[0][-1].conv.weight[:1, :, :1]).detach()

    def reset() -> None:
        for layer in everything:
            for name in ("weight", "bias"):
                put(layer.conv, name, np.zeros(()))
                put(layer.norm, name, np.zeros(()))
            put(layer.norm, "running_mean", np.zeros(()))
            put(layer.norm, "running_var", np.ones(()))

    def first_output() -> float:
        with torch.no_grad():
            return float(twin(x)[0, 0, 0])

    try:
        for block in blocks:
            *branches, fusion = block
            reset()
            count = fusion.conv.weight.shape[1]
            put(fusion.conv, "weight", np.arange(count, dtype=np.float64)[None, :, None])
            put(fusion.norm, "weight", np.ones(()))
            places = {}
            for branch in branches:
                put(branch.norm, "bias", np.ones(()))
                places[branch.conv] = first_output() / branch.conv.out_channels
                put(branch.norm, "bias", np.zeros(()))
            block[:-1] = sorted(branches, key=lambda branch: places[branch.conv])
        before = []
        for block in blocks:
            reset()
            for other in blocks:
                put(other[-1].norm, "bias", np.full((), float(other is not block)))
            first, fusion = block[0], block[-1]
            tap = np.zeros(tuple(first.conv.weight.shape))
            tap[0, 0, tap.shape[2] // 2] = 1
            handed = np.zeros(tuple(fusion.conv.weight.shape))
            handed[0, 0, 0] = 1
            for layer, weight in ((first, tap), (fusion, handed)):
                put(layer.conv, "weight", weight)
                put(layer.norm, "weight", np.ones(()))
            before.append(first_output())
    except Exception:
        return handles  # a model that does not run is for other properties to falsify
    found = []
    for _, block, handle in sorted(zip(before, blocks, handles, strict=True), key=lambda t: t[0]):
        layers = [ConvNorm(own[p.conv], own[p.norm]) for p in block]
        found.append(BlockHandles(handle.module, tuple(layers[:-1]), layers[-1]))
    return tuple(found)


def _told_apart(model: nn.Module, handles: tuple[BlockHandles, ...], place: int) -> BlockHandles:
    """A block of one 1×1 branch, its branch told from its fusion by what they do.

    Both are dense 1×1 convolutions of all channels. With every norm returning 0 but one that
    returns 1, the output on ones is 2 if that one is the fusion's. With the branch returning 1, the
    output is larger than 1 if it is the fusion's weights that are 1 and the branch's that are 0.
    """
    block = handles[place]
    (branch,), fusion = block.branches, block.fusion
    saved = [(t, t.detach().clone()) for t in (*model.parameters(), *model.buffers())]
    training = model.training
    x = torch.ones_like(fusion.conv.weight[:1, :, :1]).detach()
    try:
        with torch.no_grad():
            model.eval()
            for layer in (layer for other in handles for layer in other.layers):
                put(layer.norm, "weight", np.zeros(()))
                put(layer.norm, "bias", np.zeros(()))
            put(branch.norm, "bias", np.ones(()))
            fusion_norm, branch_norm = fusion.norm, branch.norm
            if bool((model(x) > 1.5).all()):
                fusion_norm, branch_norm = branch_norm, fusion_norm
            for norm, scale, shift in ((branch_norm, 0, 1), (fusion_norm, 1, 0)):
                put(norm, "weight", np.full((), scale))
                put(norm, "bias", np.full((), shift))
            for conv, weight in ((branch.conv, 1), (fusion.conv, 0)):
                put(conv, "weight", np.full((), weight))
                put(conv, "bias", np.zeros(()))
            fusion_conv, branch_conv = fusion.conv, branch.conv
            if bool((model(x) > 1.5).all()):
                fusion_conv, branch_conv = branch_conv, fusion_conv
    except Exception:
        return block  # a model that does not run is for other properties to falsify
    finally:
        with torch.no_grad():
            for tensor, before in saved:
                tensor.copy_(before)
        model.train(training)
    return BlockHandles(
        block.module, (ConvNorm(branch_conv, branch_norm),), ConvNorm(fusion_conv, fusion_norm)
    )


def _block_modules(model: nn.Module, count: int) -> Sequence[nn.Module]:
    if isinstance(named := getattr(model, "blocks", None), nn.Module):
        return [child for child in _children(named) if _convolutions(child)]
    total = len(_convolutions(model))
    for container in model.modules():
        inside = [child for child in _children(container) if _convolutions(child)]
        repeated = len(inside) == count and len({len(_convolutions(c)) for c in inside}) == 1
        if count > 1 and repeated and sum(len(_convolutions(c)) for c in inside) == total:
            return inside
    return [_innermost(model)]


def _innermost(module: nn.Module) -> nn.Module:
    """The smallest submodule that holds all convolutions of a module."""
    inside = [child for child in _children(module) if _convolutions(child)]
    if len(inside) == 1 and len(_convolutions(inside[0])) == len(_convolutions(module)):
        return _innermost(inside[0])
    return module


def _block_handles(block: nn.Module, config: Config) -> BlockHandles:
    convs = _convolutions(block)
    expected = config.branches + 1
    if len(convs) != expected:
        raise Falsified(
            "Conv1d modules in a block",
            f"{expected}: one for each of kernel_sizes={list(config.kernel_sizes)} and the fusion",
            str(len(convs)),
        )
    norms = _norms(block)
    if len(norms) != expected:
        raise Falsified(
            "BatchNorm modules in a block", f"{expected}: one for each convolution", str(len(norms))
        )
    fusion = _fusion_convolution(block, convs, config)
    branch_convs = [conv for conv in convs if conv is not fusion]
    fusion_norm = _fusion_norm(block, norms, config, convs.index(fusion))
    branch_norms = [norm for norm in norms if norm is not fusion_norm]
    for norm in norms:
        _check_norm(norm)
    for conv in (*branch_convs, fusion):
        _check_convolution(conv, config)
    paired = _pair(block, branch_convs, branch_norms)
    return BlockHandles(block, paired, ConvNorm(fusion, fusion_norm))


def _check_norm(norm: _BatchNorm) -> None:
    """That a norm has what the contract's state_dict names."""
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        if getattr(norm, name) is None:
            raise Falsified("a BatchNorm of a block", f"one with {name}", str(norm))


def _check_convolution(conv: nn.Conv1d, config: Config) -> None:
    """That a convolution sees all channels: the block's own or, as many, the branches' together."""
    if conv.weight.shape[1] != config.channels:
        raise Falsified(
            "a convolution of a block", f"one that sees {config.channels} channels", str(conv)
        )


def _fusion_convolution(block: nn.Module, convs: Sequence[nn.Conv1d], config: Config) -> nn.Conv1d:
    within = _convolutions(getattr(block, "fusion", None))
    if len(within) == 1:
        return within[0]
    branches = _convolutions(getattr(block, "branches", None))
    shape = (config.channels, config.channels, 1)
    candidates = [c for c in convs if c not in branches and tuple(c.weight.shape) == shape]
    if not candidates:
        raise Falsified(
            "fusion of a block",
            f"a dense 1x1 convolution with weight {shape}",
            f"convolutions with weights {[tuple(c.weight.shape) for c in convs]}",
        )
    return candidates[-1]


def _fusion_norm(
    block: nn.Module, norms: Sequence[_BatchNorm], config: Config, place: int
) -> _BatchNorm:
    """The fusion's norm; ``place`` is that of its convolution among the block's."""
    within = _norms(getattr(block, "fusion", None))
    if len(within) == 1:
        return within[0]
    branches = _norms(getattr(block, "branches", None))
    candidates = [
        norm for norm in norms if norm not in branches and norm.num_features == config.channels
    ]
    if not candidates:
        raise Falsified(
            "norm of the fusion",
            f"a BatchNorm over {config.channels} channels",
            f"norms over {[norm.num_features for norm in norms]} channels",
        )
    return norms[place] if norms[place] in candidates else candidates[-1]


def _pair(
    block: nn.Module, convs: Sequence[nn.Conv1d], norms: Sequence[_BatchNorm]
) -> tuple[ConvNorm, ...]:
    """Each branch's convolution with the norm of the same submodule, else in order.

    Raises:
        Falsified: a norm is over another number of channels than its convolution has.
    """
    partner: dict[nn.Conv1d, _BatchNorm] = {}
    for part in (m for m in block.modules() if m._modules):
        own_convs = [c for c in _convolutions(part) if c in convs]
        own_norms = [n for n in _norms(part) if n in norms]
        if len(own_convs) == len(own_norms) == 1:
            partner[own_convs[0]] = own_norms[0]
    if len(partner) != len(convs):
        partner = dict(zip(convs, norms, strict=True))
    for i, conv in enumerate(convs):
        if partner[conv].num_features != conv.out_channels:
            raise Falsified(
                f"norm of branch {i}",
                f"a BatchNorm over the {conv.out_channels} channels of its convolution",
                f"one over {partner[conv].num_features}",
            )
    return tuple(ConvNorm(conv, partner[conv]) for conv in convs)


def _children(module: nn.Module) -> list[nn.Module]:
    """The direct children, a shared one as often as it is named."""
    return [child for child in module._modules.values() if child is not None]


def _convolutions(module: nn.Module | None) -> list[nn.Conv1d]:
    if not isinstance(module, nn.Module):
        return []
    return [m for m in module.modules() if isinstance(m, nn.Conv1d)]


def _norms(module: nn.Module | None) -> list[_BatchNorm]:
    if not isinstance(module, nn.Module):
        return []
    return [m for m in module.modules() if isinstance(m, _BatchNorm)]
