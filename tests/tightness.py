"""How tight the bounds are: measured over bound in random cases, none above 1.

``python -m tests.tightness --cases 10000`` prints median and worst for every bound and exits with 1
if one is violated.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch.nn import functional as F

from rescnn import ResCNNStack
from rescnn_verify.bounds.gains import stack_gain
from rescnn_verify.bounds.norms import conv_norm_bound
from rescnn_verify.bounds.rounding import convolve, exactly, normalise
from rescnn_verify.bounds.roundoff import FORMATS, TF32
from rescnn_verify.case import Case
from rescnn_verify.finding import contract_handles
from rescnn_verify.oracles.layers import gradients_beside, read_network
from rescnn_verify.oracles.real import RealPass, real_pass, running_statistics
from rescnn_verify.probes import randomise, shrink_fusion
from rescnn_verify.subject import DTYPES, environment, onednn, seed_torch

Ratios = Iterator[float]


def dense(weight: np.ndarray, length: int, dilation: int = 1) -> np.ndarray:
    """The matrix of a zero-padded convolution, shape (out · length, in · length)."""
    out, inputs, kernel = weight.shape
    matrix = np.zeros((out, length, inputs, length))
    for t in range(length):
        for tap in range(kernel):
            s = t + (tap - kernel // 2) * dilation
            if 0 <= s < length:
                matrix[:, t, :, s] = weight[:, :, tap]
    return matrix.reshape(out * length, inputs * length)


def random_weight(rng: np.random.Generator) -> np.ndarray:
    out, inputs = rng.integers(1, 7, 2)
    weight = rng.standard_normal((out, inputs, int(rng.choice([1, 2, 3, 4, 5, 7, 9]))))
    if rng.random() < 0.3:
        weight *= rng.random(weight.shape) < 0.5
    return weight * 10.0 ** rng.uniform(-12, 12)


def norms_for_every_length(rng: np.random.Generator) -> Ratios:
    """The norm of one convolution, at a length of 24, over its bound for every length."""
    weight, dilation = random_weight(rng), int(rng.integers(1, 3))
    bound = conv_norm_bound(weight, dilation=dilation)
    yield _ratio(np.linalg.norm(dense(weight, 24, dilation), 2), bound)


def norms_for_one_length(rng: np.random.Generator) -> Ratios:
    """The same at a random length, over the bound for that length."""
    weight, dilation = random_weight(rng), int(rng.integers(1, 3))
    length = int(rng.integers(1, 25))
    bound = conv_norm_bound(weight, length=length, dilation=dilation)
    yield _ratio(np.linalg.norm(dense(weight, length, dilation), 2), bound)


def gains_in_eval(rng: np.random.Generator) -> Ratios:
    """The norm of a stack's Jacobian in eval mode over the Lipschitz bound."""
    model, case = _model(rng, "float64", 6, 9)
    gain = stack_gain(read_network(contract_handles(model, case)), length=case.length)
    x = torch.from_numpy(rng.standard_normal(case.shape[1:]))
    jacobian = torch.autograd.functional.jacobian(lambda v: model(v[None])[0], x)
    yield _ratio(float(torch.linalg.matrix_norm(jacobian.reshape(x.numel(), -1), 2)), gain.norm)


def gains_in_training(rng: np.random.Generator) -> Ratios:
    """‖Jᵀv‖/‖v‖ in train mode over the bound with the batch's statistics."""
    model, case = _model(rng, "float64", 6, 9)
    blocks = contract_handles(model, case)
    x, v = (rng.standard_normal((3, *case.shape[1:])) for _ in range(2))
    exact = real_pass(read_network(blocks), x, v=v, train=True)
    if exact.kink or not exact.in_range:
        return
    gain = stack_gain(read_network(blocks), trained=exact)
    gradient = _gradient(model.train(), x, v)
    slack = float(np.linalg.norm(exact.input_gradient.error.astype(float)))
    yield _ratio(np.linalg.norm(gradient), gain.norm * np.linalg.norm(v) + slack)


def departures(rng: np.random.Generator) -> Ratios:
    """‖Jᵀv − Dv‖/‖v‖ with a small fusion over the departure bound."""
    model, case = _model(rng, "float64", 8, 20)
    blocks = contract_handles(model, case)
    shrink_fusion(blocks, rng, 1e-3)
    gain = stack_gain(read_network(blocks), length=case.length)
    x = rng.uniform(1, 2, case.shape) * rng.choice([-1.0, 1.0], case.shape)
    v = rng.standard_normal(case.shape)
    off = np.linalg.norm(_gradient(model, x, v) - np.where(x > 0, v, 0))
    yield _ratio(off, gain.departure * np.linalg.norm(v))


def outputs(dtype: str) -> Callable[[np.random.Generator], Ratios]:
    def ratios(rng: np.random.Generator) -> Ratios:
        model, case = _model(rng, dtype, 40, 60)
        x = torch.from_numpy(rng.standard_normal((2, *case.shape[1:]))).to(DTYPES[dtype])
        exact = _reference(model, case, x)
        with onednn(bool(rng.integers(2))), torch.no_grad():
            out = model(x)
        if exact.in_range:
            yield _worst(out, exact.out.value, exact.out.error)

    ratios.__doc__ = f"A stack's output in {dtype} over its running error bound."
    return ratios


def gradients(dtype: str) -> Callable[[np.random.Generator], Ratios]:
    def ratios(rng: np.random.Generator) -> Ratios:
        model, case = _model(rng, dtype, 24, 40)
        model.train(bool(rng.integers(2)))
        x, v = (
            torch.from_numpy(rng.standard_normal((2, *case.shape[1:]))).to(DTYPES[dtype])
            for _ in range(2)
        )
        exact = _reference(model, case, x, v=v.double().numpy(), train=model.training)
        if not exact.kink and exact.in_range:
            x.requires_grad_()
            model(x).backward(v)
            yield _worst(x.grad, exact.input_gradient.value, exact.input_gradient.error)
            for _, gradient, own in gradients_beside(
                contract_handles(model, case), exact.gradients
            ):
                yield _worst(gradient, own.value, own.error)

    ratios.__doc__ = f"A stack's gradients in {dtype}, in both modes, over their bounds."
    return ratios


def statistics(dtype: str) -> Callable[[np.random.Generator], Ratios]:
    def ratios(rng: np.random.Generator) -> Ratios:
        model, case = _model(rng, dtype, 12, 120)  # in 16 bits only the first block has bounds
        blocks = contract_handles(model.train(), case)
        network = read_network(blocks)
        x = torch.from_numpy(rng.standard_normal((9, *case.shape[1:]))).to(DTYPES[dtype])
        exact = _reference(model, case, x, train=True)
        with torch.no_grad():
            model(x)
        for block, before, learned in zip(blocks, network, exact.statistics, strict=True):
            layers = (*before.branches, before.fusion)
            for handle, old, new in zip(block.layers, layers, learned, strict=True):
                mean, variance = running_statistics(old, new, FORMATS[dtype])
                for got, own in (
                    (handle.norm.running_mean, mean),
                    (handle.norm.running_var, variance),
                ):
                    if np.isfinite(own.error).all():
                        yield _worst(got, own.value, own.error)

    ratios.__doc__ = f"Running statistics in {dtype} after a training batch, over their bounds."
    return ratios


def layers(dtype: str) -> Callable[[np.random.Generator], Ratios]:
    def ratios(rng: np.random.Generator) -> Ratios:
        form, to = FORMATS[dtype], DTYPES[dtype]
        channels, kernel = int(rng.integers(1, 65)), int(rng.choice([1, 3, 5, 7, 15]))
        x = torch.from_numpy(rng.standard_normal((2, channels, int(rng.integers(1, 200))))).to(to)
        weight = torch.from_numpy(rng.standard_normal((5, channels, kernel))).to(to)
        bias = torch.from_numpy(rng.standard_normal(5)).to(to)
        with onednn(bool(rng.integers(2))):
            out = F.conv1d(x, weight, bias, padding=kernel // 2)
        given = exactly(x)
        bound = convolve(form, given, weight.double(), bias.double(), padding=kernel // 2)
        yield _worst(out, bound.value, bound.error)
        scale, shift, mean = (
            torch.from_numpy(rng.standard_normal(channels)).to(to) for _ in range(3)
        )
        variance = torch.from_numpy(rng.uniform(0.1, 2, channels)).to(to)
        out = F.batch_norm(x, mean, variance, scale, shift)
        bound = normalise(form, given, *(t.double() for t in (scale, shift, mean, variance)), 1e-5)
        yield _worst(out, bound.value, bound.error)

    ratios.__doc__ = f"A convolution's or norm's output in {dtype} over its own bound."
    return ratios


def tf32_outputs(rng: np.random.Generator) -> Ratios:
    """A float32 stack whose convolutions round their operands to TF32, over TF32's bound."""
    model, case = _model(rng, "float32", 40, 60)
    x = torch.from_numpy(rng.standard_normal((2, *case.shape[1:]))).float()
    network = read_network(contract_handles(model, case))
    exact = real_pass(network, x.double().numpy(), form=TF32).out
    for layer in (layer for block in contract_handles(model, case) for layer in block.layers):
        with torch.no_grad():
            layer.conv.weight.copy_(to_tf32(layer.conv.weight))
        layer.conv.register_forward_pre_hook(lambda module, inputs: (to_tf32(inputs[0]),))
    with torch.no_grad():
        yield _worst(model(x), exact.value, exact.error)


def to_tf32(x: torch.Tensor) -> torch.Tensor:
    """Rounded to 11 significant bits, to the nearest."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp(torch.round(mantissa * 2.0**11), exponent - 11).to(x.dtype)


BOUNDS: dict[str, Callable[[np.random.Generator], Ratios]] = {
    "norm, every length": norms_for_every_length,
    "norm, one length": norms_for_one_length,
    "gain, eval": gains_in_eval,
    "gain, train": gains_in_training,
    "departure": departures,
    **{f"output, {dtype}": outputs(dtype) for dtype in FORMATS},
    **{f"gradient, {dtype}": gradients(dtype) for dtype in ("float64", "float32")},
    **{f"statistics, {dtype}": statistics(dtype) for dtype in FORMATS},
    **{f"layer, {dtype}": layers(dtype) for dtype in FORMATS},
    "output, TF32": tf32_outputs,
}


def measure(name: str, cases: int, seed: int = 0) -> np.ndarray:
    """The ratios of at least ``cases`` random cases of a bound; those without a bound left out."""
    found: list[float] = []
    rng = np.random.default_rng([seed, sorted(BOUNDS).index(name)])
    with environment():
        seed_torch(seed)
        while len(found) < cases:
            found += list(BOUNDS[name](rng))
    return np.array(found)


def _model(rng: np.random.Generator, dtype: str, channels: int, length: int):
    kernels = tuple(int(rng.choice([1, 3, 5, 7])) for _ in range(rng.integers(1, 4)))
    case = Case(
        channels=int(rng.integers(len(kernels), channels + 1)),
        num_blocks=int(rng.integers(1, 4)), kernel_sizes=kernels,
        length=int(rng.integers(1, length + 1)), dtype=dtype,
    )  # fmt: skip
    model = ResCNNStack(case.channels, case.num_blocks, kernels, 0.0).to(DTYPES[dtype])
    randomise(model, rng)
    return model.eval(), case


def _reference(model, case, x, **options) -> RealPass:
    network = read_network(contract_handles(model, case))
    return real_pass(network, x.double().numpy(), form=FORMATS[case.dtype], **options)


def _gradient(model, x, v) -> np.ndarray:
    leaf = torch.from_numpy(x).requires_grad_()
    model(leaf).backward(torch.from_numpy(v))
    return leaf.grad.numpy()


def _ratio(measured: float, bound: float) -> float:
    return float(measured / bound) if bound > 0 else float(measured > 0)


def _worst(out: torch.Tensor, exact: np.ndarray, bound: np.ndarray) -> float:
    off = np.abs(out.detach().double().numpy().astype(exact.dtype) - exact)
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.where(off > 0, off / bound, 0).max(initial=0.0))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10000, help="random cases for each bound")
    parser.add_argument("--only", nargs="*", default=list(BOUNDS), choices=list(BOUNDS))
    options = parser.parse_args(arguments)
    violated = 0
    print(f"{'bound':22}{'cases':>8}{'median':>10}{'worst':>10}{'s':>8}")
    for name in options.only:
        start = time.perf_counter()
        ratios = measure(name, options.cases)
        violated += int((ratios > 1).sum())
        print(
            f"{name:22}{len(ratios):>8}{np.median(ratios):>10.2g}{ratios.max():>10.6f}"
            f"{time.perf_counter() - start:>8.0f}",
            flush=True,
        )
    print(f"{violated} violations")
    return 1 if violated else 0


if __name__ == "__main__":
    sys.exit(main())
