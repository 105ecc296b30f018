"""Running round-off bounds for networks of convolutions, batch norms, ReLUs, sums and cats."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rescnn_verify.bounds.roundoff import FORMATS, TF32, Format

__all__ = [
    "Approximation",
    "UnknownOperationError",
    "convolve",
    "error_bound",
    "exactly",
    "normalise",
]


class UnknownOperationError(ValueError):
    """A network contains an operation for which there is no bound."""


@dataclass(frozen=True)
class Approximation:
    """What a network computes, and how far a narrower format can be from it.

    Args:
        exact: the values in float64.
        bound: how far each computed value can be from ``exact``, of the same shape, float64;
            infinite where the format may overflow.
    """

    exact: Tensor
    bound: Tensor

    @property
    def value(self) -> np.ndarray:
        """``exact`` as an array."""
        values: np.ndarray = self.exact.cpu().numpy()
        return values

    @property
    def error(self) -> np.ndarray:
        """``bound`` as an array."""
        values: np.ndarray = self.bound.cpu().numpy()
        return values

    @property
    def most(self) -> Tensor:
        """The largest magnitude that a computed value can have."""
        return self.exact.abs() + self.bound


def error_bound(module: nn.Module, x: Tensor) -> Approximation:
    """What a network computes for x, and a bound on its round-off in x's dtype.

    The network is traced by `torch.export`, and each operation carries a value and a bound on its
    error (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., sections 3.1 and 3.3):
    a sum of n products in any order is off by at most γ_n Σ|w||v|, a stored result by its unit
    round-off. float16 and bfloat16 sum in float32. The values themselves
    are computed in float64; what that is off by is included. Sharp to about 40 channels; with 512
    channels end to end it says little.

    It holds for direct convolution. torch may use other algorithms: NNPACK for large float32
    batches without oneDNN (``torch.backends.nnpack.flags(enabled=False)`` forbids it), FFT,
    Winograd or reduced-precision sums on CUDA. TF32 is reckoned with where it is on.

    Args:
        module: in eval mode, its parameters of x's dtype and on its device; made of Conv1d,
            BatchNorm1d, ReLU, Dropout, addition and concatenation.
        x: the input, with a batch dimension.

    Raises:
        UnknownOperationError: the network contains something else; the message names it.
        ValueError: it is in training mode, or its dtype is not x's.
    """
    if any(part.training for part in module.modules()):
        raise ValueError("error_bound needs a network in eval mode: call .eval() first")
    form = _format_of(module, x)
    with torch.no_grad():
        program = torch.export.export(module, (x,)).run_decompositions()
    results: dict[torch.fx.Node, Any] = {}
    given = _inputs(program, x)
    for node in program.graph.nodes:
        if node.op == "placeholder":
            results[node] = exactly(given[node.name])
        elif node.op == "call_function":
            arguments = torch.fx.node.map_arg(node.args, results.__getitem__)
            options = torch.fx.node.map_arg(dict(node.kwargs), results.__getitem__)
            results[node] = _operation(node.target)(form, *arguments, **options)
        elif node.op == "output":
            (out,) = torch.fx.node.map_arg(node.args[0], results.__getitem__)
    assert isinstance(out, Approximation)
    return out


def _format_of(module: nn.Module, x: Tensor) -> Format:
    name = str(x.dtype).removeprefix("torch.")
    if name not in FORMATS:
        raise ValueError(f"x has dtype {name}; there are bounds for {', '.join(FORMATS)}")
    for key, parameter in module.named_parameters():
        if parameter.dtype != x.dtype:
            raise ValueError(f"x is {x.dtype}, but the parameter {key} is {parameter.dtype}")
    if x.is_cuda and name == "float32" and torch.backends.cudnn.allow_tf32:
        return TF32
    return FORMATS[name]


def _inputs(program: torch.export.ExportedProgram, x: Tensor) -> Mapping[str, Tensor]:
    signature = program.graph_signature
    stored = {**program.state_dict, **program.constants}
    places = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    given: dict[str, Tensor] = {name: stored[place] for name, place in places.items()}
    return given | {name: x for name in signature.user_inputs}


def exactly(tensor: Tensor) -> Approximation:
    """What is given: nothing has been rounded yet."""
    values = tensor.detach().cpu().double()
    return Approximation(values, torch.zeros_like(values))


def _gamma(form: Format, terms: int, stored: int) -> float:
    """γ for a computation in ``form`` and, where it is no wider, for that of the oracle, too."""
    own = 2.0 if form.dtype == "float64" else 1.0
    return own * float(form.gamma(terms, stored))


def convolve(
    form: Format, x: Approximation, weight: Tensor, bias: Tensor | None, **options: Any
) -> Approximation:
    """A convolution with n products in each sum: off by γ_{n+1} Σ|w||v| and what it stores.

    Args:
        form: the format.
        x: its input.
        weight, bias: of float64.
        options: stride, padding, dilation and groups of `torch.nn.functional.conv1d`.
    """
    terms = weight[0].numel() + 1
    magnitude = weight.abs()
    size = F.conv1d(x.most, magnitude, None if bias is None else bias.abs(), **options)
    bound = F.conv1d(x.bound, magnitude, **options)
    bound = bound + _gamma(form, terms, 2) * size + terms * form.smallest
    return _finite(form, Approximation(F.conv1d(x.exact, weight, bias, **options), bound))


def normalise(
    form: Format,
    x: Approximation,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
    variance: Tensor,
    eps: float,
) -> Approximation:
    """An eval-mode norm, a(v − mean) + shift with a = scale/√(variance + eps): nine roundings.

    They are relative to |a|(|v| + |mean|) + |shift|, so that it may be computed as av + (shift −
    a mean), too. Any of them may be stored: torch takes another path where memory has gaps.
    """
    slope = (scale / (variance + eps).sqrt())[:, None]
    size = slope.abs() * (x.most + mean.abs()[:, None]) + shift.abs()[:, None]
    bound = slope.abs() * x.bound + _gamma(form, 9, 9) * size + 4 * form.smallest
    exact = slope * (x.exact - mean[:, None]) + shift[:, None]
    return _finite(form, Approximation(exact, bound))


def _finite(form: Format, x: Approximation) -> Approximation:
    """The same, unbounded where the format may overflow."""
    return Approximation(x.exact, torch.where(x.most < form.largest, x.bound, torch.inf))


def _convolution(
    form: Format,
    x: Approximation,
    weight: Approximation,
    bias: Approximation | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> Approximation:
    if transposed or weight.exact.dim() != 3:
        raise UnknownOperationError(
            "error_bound knows one-dimensional convolutions that are not transposed, got weight "
            f"shape {tuple(weight.exact.shape)}, transposed={transposed}"
        )
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return convolve(form, x, weight.exact, bias.exact if bias else None, **options)


def _batch_norm(
    form: Format,
    x: Approximation,
    scale: Approximation | None,
    shift: Approximation | None,
    mean: Approximation,
    variance: Approximation,
    momentum: float,
    eps: float,
) -> tuple[Approximation]:
    one = torch.ones_like(mean.exact)
    a, b = scale.exact if scale else one, shift.exact if shift else 0 * one
    return (normalise(form, x, a, b, mean.exact, variance.exact, eps),)


def _relu(form: Format, x: Approximation) -> Approximation:
    cut = torch.clamp(x.exact + x.bound, min=0)
    return Approximation(x.exact.relu(), torch.where(x.exact > 0, x.bound, cut))


def _add(form: Format, a: Approximation, b: Approximation, *, alpha: float = 1) -> Approximation:
    if alpha != 1 or not isinstance(b, Approximation):
        raise UnknownOperationError("error_bound knows sums of two tensors without a factor")
    unit = _gamma(form, 1, 1)
    return _finite(
        form, Approximation(a.exact + b.exact, a.bound + b.bound + unit * (a.most + b.most))
    )


def _cat(form: Format, parts: list[Approximation], dim: int = 0) -> Approximation:
    return Approximation(
        torch.cat([part.exact for part in parts], dim), torch.cat([p.bound for p in parts], dim)
    )


def _same(form: Format, x: Approximation, *rest: Any, **options: Any) -> Approximation:
    return x


def _item(form: Format, parts: tuple[Approximation, ...], place: int) -> Approximation:
    return parts[place]


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "aten.convolution.default": _convolution,
    "aten._native_batch_norm_legit_no_training.default": _batch_norm,
    "aten.relu.default": _relu,
    "aten.add.Tensor": _add,
    "aten.cat.default": _cat,
    "aten.clone.default": _same,
    "aten.alias.default": _same,
    "aten.detach.default": _same,
    "<built-in function getitem>": _item,
}


def _operation(target: Any) -> Callable[..., Any]:
    if str(target) in _OPERATIONS:
        return _OPERATIONS[str(target)]
    raise UnknownOperationError(
        f"error_bound has no bound for {target}; it knows Conv1d, BatchNorm1d, ReLU, Dropout, "
        "addition of two tensors and concatenation"
    )
