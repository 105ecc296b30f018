"""Handles: the convolutions and norms of a residual block, and how values are written into them."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rescnn_verify.compare import NotApplicable, describe

__all__ = ["BlockHandles", "ConvNorm", "fill", "put"]


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
