"""Finding the convolutions and norms of a model: by their names, by what they do, or by place."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rescnn_verify.case import Config
from rescnn_verify.compare import Falsified, NotApplicable, describe
from rescnn_verify.handles import BlockHandles, ConvNorm, put

__all__ = ["contract_handles"]

T = TypeVar("T")

#: Bits of what one run of a model tells, so that what computes in float32 inside tells them, too.
ROOM = 20


def contract_handles(model: nn.Module, config: Config) -> tuple[BlockHandles, ...]:
    """The handles of a model that follows the reference contract, block by block.

    The contract's names (``blocks``, ``branches``, ``fusion``) are used where the model has them.
    Without the names, what the layers do tells what they are and their order. Of a model that does
    nothing of the kind the blocks are the children that hold the convolutions, or as many parts of
    the list of all, and within a block the fusion is the last 1×1 convolution from all channels to
    all channels.

    Raises:
        Falsified: the model does not consist of ``num_blocks`` blocks with one convolution and one
            batch norm for each kernel and a 1×1 fusion with its norm.
    """
    named = isinstance(getattr(model, "blocks", None), nn.Module)
    handles = None if _is_named(model, config) else _told_apart(model, config)
    if handles is None:
        try:
            handles = _by_place(model, config)
        except Falsified as error:
            if _is_meta(model) and not _is_named(model, config):
                raise NotApplicable(
                    "without data or names nobody can tell what the layers do"
                ) from error
            raise
        if not named:
            # What holds the convolutions need not add the residual; only the whole model does.
            whole = model if config.num_blocks == 1 else None
            handles = tuple(replace(block, module=whole) for block in handles)
        as_given = all(_shapes(block) == (config.widths, config.kernel_sizes) for block in handles)
        if as_given and (_is_named(model, config) or _is_meta(model)):
            return handles
    return _ordered(model, handles)


def _is_named(model: nn.Module, config: Config) -> bool:
    """Whether blocks, branches and fusions have the contract's names."""
    blocks = getattr(model, "blocks", None)
    if isinstance(blocks, nn.Module):
        holders = [child for child in _children(blocks) if _convolutions(child)]
    else:
        holders = [_innermost(model)] if config.num_blocks == 1 else []
    return bool(holders) and all(
        isinstance(getattr(holder, name, None), nn.Module)
        for holder in holders
        for name in ("branches", "fusion")
    )


def _is_meta(model: nn.Module) -> bool:
    """Whether nothing but shapes can be seen of a model."""
    return any(p.is_meta for p in model.parameters())


def _by_place(model: nn.Module, config: Config) -> tuple[BlockHandles, ...]:
    """The handles by where the layers stand."""
    blocks = _block_modules(model, config.num_blocks)
    if len(blocks) != config.num_blocks:
        blocks = _parts(model, config) or blocks
    if len(blocks) != config.num_blocks:
        raise Falsified(
            "residual blocks in the model", f"num_blocks = {config.num_blocks}", str(len(blocks))
        )
    return tuple(_block_handles(block, config) for block in blocks)


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


def _told_apart(model: nn.Module, config: Config) -> tuple[BlockHandles, ...] | None:
    """The layers of each block by what they do; None if that is not what a stack of blocks does.

    On a copy in float64 in which every norm returns 0, so that every block passes on an input of
    ones. A norm that returns 1 changes the output if it is a fusion's. If the branches return 1,
    and a fusion's norm what its convolution gives it, the output names the convolution that has a
    weight of its own. If a branch returns 1, it names the fusion's norm, if each has a scale of its
    own; and if a branch's norm returns what it is given, it names the branch's convolution.
    """
    convs, norms = _convolutions(model), _norms(model)
    if not len(convs) == len(norms) == (config.branches + 1) * config.num_blocks or _is_meta(model):
        return None
    try:
        twin = copy.deepcopy(model).double().eval()
        own: dict[nn.Module, Any] = dict(zip(twin.modules(), model.modules(), strict=True))
    except Exception:
        return None
    blocks = None
    for bits in (ROOM, 1):  # what sums up many channels in float32 tells less in one run
        with suppress(Exception):
            blocks = blocks or _by_behaviour(twin, config, bits)
    if blocks is None:
        return None
    named = isinstance(getattr(model, "blocks", None), nn.Module)
    holders = _block_modules(model, config.num_blocks) if named else [None] * len(blocks)
    for block in blocks:
        for part in block:
            _check_norm(part.norm)
            _check_convolution(part.conv, config)
    found = []
    for block in blocks:
        *branches, fusion = (ConvNorm(own[part.conv], own[part.norm]) for part in block)
        holder = next((h for h in holders if h and fusion.conv in _convolutions(h)), None)
        whole = model if config.num_blocks == 1 and not named else holder
        found.append(BlockHandles(whole, tuple(branches), fusion))
    return tuple(found)


def _by_behaviour(twin: nn.Module, config: Config, bits: int) -> list[list[ConvNorm]] | None:
    """For each block its branches and its fusion, as `_told_apart` finds them.

    Args:
        twin: the copy.
        config: of the model.
        bits: how much one run may tell.
    """
    convs, norms = _convolutions(twin), _norms(twin)
    x = torch.ones(1, config.channels, 1, dtype=torch.float64)

    def run(scales: dict[_BatchNorm, float], shifts: dict[_BatchNorm, float]) -> float:
        """What the model adds to ones, if the norms have these scales and shifts and else 0."""
        for norm in norms:
            put(norm, "weight", np.full((), scales.get(norm, 0.0)))
            put(norm, "bias", np.full((), shifts.get(norm, 0.0)))
        with torch.no_grad():
            return float(twin(x).max()) - 1

    def weigh(weights: dict[nn.Conv1d, float]) -> None:
        for conv in convs:
            put(conv, "weight", np.full((), weights.get(conv, 0.0)))

    def shared(values: dict[_BatchNorm, float]) -> dict[_BatchNorm, float]:
        """What each of a norm's channels must have for all of them to sum up to its value."""
        return {norm: value / norm.num_features for norm, value in values.items()}

    for conv in convs:
        put(conv, "bias", np.zeros(()))
    for norm in norms:
        put(norm, "running_mean", np.zeros(()))
        put(norm, "running_var", np.full((), 1 - norm.eps))  # they scale by exactly 1, or nearly
    weigh({})
    counted = _numbers(norms, 1, lambda shifts: run({}, shifts), bits)
    fusion_norms = [norm for norm, count in zip(norms, counted, strict=True) if count == 1]
    branch_norms = [norm for norm in norms if norm not in fusion_norms]
    if len(fusion_norms) != config.num_blocks:
        return None
    # Of one position one tap of each kernel is seen, so weights of c/inputs make a sum of c.
    weigh({conv: i / conv.weight.shape[1] for i, conv in enumerate(convs, 1)})
    active = dict.fromkeys(branch_norms, 1.0)
    places = _numbers(fusion_norms, len(convs), lambda scales: run(scales, active), bits)
    fusions = [_numbered(convs, place) for place in places]
    if len(set(fusions)) != len(fusions):
        return None
    weigh(dict.fromkeys(fusions, 1.0))
    numbered = {norm: float(i) for i, norm in enumerate(fusion_norms, 1)}
    members: list[list[_BatchNorm]] = [[] for _ in fusion_norms]
    places = _numbers(
        branch_norms, len(fusions), lambda shifts: run(numbered, shared(shifts)), bits
    )
    for norm, place in zip(branch_norms, places, strict=True):
        _numbered(members, place).append(norm)
    own = {c: i / c.weight.shape[1] for i, c in enumerate(convs, 1) if c not in fusions}
    weigh(own | dict.fromkeys(fusions, 1.0))
    passing = dict.fromkeys(fusion_norms, 1.0)
    blocks = []
    for fusion, fusion_norm, inside in zip(fusions, fusion_norms, members, strict=True):
        places = _numbers(
            inside, len(convs), lambda scales: run(passing | shared(scales), {}), bits
        )
        branches = [
            ConvNorm(_numbered(convs, place), norm)
            for norm, place in zip(inside, places, strict=True)
        ]
        blocks.append([*branches, ConvNorm(fusion, fusion_norm)])
    found = [part.conv for block in blocks for part in block]
    sizes = {len(block) for block in blocks}
    return blocks if len(set(found)) == len(convs) and sizes == {config.branches + 1} else None


def _numbers(
    norms: Sequence[_BatchNorm],
    most: int,
    run: Callable[[dict[_BatchNorm, float]], float],
    bits: int,
) -> list[int]:
    """The integer, up to ``most``, that a model multiplies each norm's value with.

    The values are powers of a base, so that one run tells several.

    Args:
        norms: which.
        most: the largest integer.
        run: the sum of all values so multiplied.
        bits: how much one run may tell.
    """
    base = most + 1
    room = max(1, int(bits / math.log2(base)))
    numbers = []
    for at in range(0, len(norms), room):
        some = norms[at : at + room]
        total = round(run({norm: float(base**k) for k, norm in enumerate(some)}))
        numbers += [total // base**k % base for k in range(len(some))]
    return numbers


def _numbered(items: Sequence[T], number: int) -> T:
    """The item of a number, counted from 1.

    Raises:
        LookupError: there is none.
    """
    if not 1 <= number <= len(items):
        raise LookupError(number)
    return items[number - 1]


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
