"""Rounding: in every dtype, outputs and gradients are within derived bounds on round-off."""

import numpy as np
import torch

from rescnn_verify.bounds.rounding import convolve, exactly, normalise
from rescnn_verify.bounds.roundoff import FORMATS
from rescnn_verify.compare import within
from rescnn_verify.needs import BATCH_NORM, DIRECT, HANDLES, POST_ACTIVATION
from rescnn_verify.oracles.layers import gradients_beside, read_network
from rescnn_verify.oracles.real import real_pass
from rescnn_verify.probes import (
    as_input,
    make_positive,
    normal_input,
    own_calls,
    randomise,
    with_small_variances,
)
from rescnn_verify.space import INPUTS, Choice, Integers, Lists, at_least
from rescnn_verify.statement import statement
from rescnn_verify.subject import NotApplicable, kernel_sets, onednn

#: From here up the variance of a norm is a normal number, and eps is no small part of the least.
LEAST_VARIANCE = {"float64": 1e-9, "float32": 1e-7, "bfloat16": 1e-7, "float16": 1e-4}
REFERENCE = (HANDLES, POST_ACTIVATION, BATCH_NORM, DIRECT)
#: What a loss is scaled by.
LOSSES = (1.0, 2.0**10, 2.0**-5)


@statement(
    space=INPUTS.narrow(
        mode=Choice("eval"), dtype=Choice("float32"), batch=at_least(1),
    ),
    needs=REFERENCE,
    evidence="bounded",
    work=2**16, effort=0.6)  # fmt: skip
def outputs_are_within_the_bound(subject, case):
    """In float32 the output is within the running error bound.

    The bound is carried through the reference in float64 (`oracles.real`): γ_n Σ|w||v| for every
    sum of n products, whatever its order, a unit round-off for what is stored. Where the dtype may
    overflow nothing is claimed.
    """
    yield from _output_is_within(subject, case)


@statement(
    space=INPUTS.narrow(
        mode=Choice("eval"), dtype=Choice("bfloat16", "float16"), num_blocks=Choice(1),
        channels=Integers(1, 24), batch=Integers(1, 17), length=Integers(1, 300),
    ),
    needs=REFERENCE,
    evidence="bounded",
    work=2**15, effort=0.6)  # fmt: skip
def one_block_is_within_the_bound_in_16_bits(subject, case):
    """The same in float16 and bfloat16 for one block of few channels.

    For more the bound grows far beyond the values themselves and says nothing.
    """
    yield from _output_is_within(subject, case)


def _output_is_within(subject, case):
    model = subject.model(case)
    blocks = subject.handles(model, case)
    randomise(model, case.rng("weights"))
    with_small_variances(blocks, case.rng("variances"), LEAST_VARIANCE[case.dtype])
    x = normal_input(case)
    exact = _reference(blocks, case, x)
    if not exact.in_range:
        return
    for enabled in kernel_sets(case):
        with onednn(enabled), torch.no_grad():
            out = subject(model, x)
        yield within(out, exact.out, f"output in {case.dtype}, against the reference")


@statement(
    space=INPUTS.narrow(
        dtype=Choice("float32"), dropout=Choice(0.0), batch=at_least(1),
    ),
    needs=REFERENCE,
    evidence="bounded",
    work=2**15, effort=0.8)  # fmt: skip
def gradients_are_within_the_bound(subject, case):
    """In float32 Jᵀv and every parameter's gradient are within their bounds, in either mode.

    Cases in which round-off may switch a ReLU are left out, and so is dropout.
    """
    model = subject.model(case)
    blocks = subject.handles(model, case)
    randomise(model, case.rng("weights"))
    x, v = normal_input(case), as_input(case, case.rng("gradient").standard_normal(case.shape))
    exact = _reference(blocks, case, x, v=v.cpu().double().numpy(), train=case.mode == "train")
    if exact.kink or not exact.in_range:
        return
    for enabled in kernel_sets(case):
        for parameter in model.parameters():
            parameter.grad = None
        with onednn(enabled):
            out, gradient = subject.vjp(model, x, v)
        yield within(out, exact.out, f"output in {case.mode} mode, against the reference")
        yield within(gradient, exact.input_gradient, "gradient at the input, against the reference")
        for what, gradient, bounded in gradients_beside(blocks, exact.gradients):
            yield within(gradient, bounded, what)


@statement(
    space=INPUTS.narrow(mode=Choice("eval"), batch=at_least(1), loss=Choice(*LOSSES)),
    needs=REFERENCE,
    evidence="bounded",
    work=2**18,
)
def positive_networks_are_within_the_bound_at_any_size(subject, case):
    """In every dtype output and gradients of a positive network are within their bounds.

    Nothing cancels and no ReLU is near 0, so that the bounds stay a few roundings of the values
    themselves, however many are summed. Losses may be scaled, as they are in 16 bits.
    """
    yield from _positive_is_within(subject, case)


@statement(
    space=INPUTS.narrow(
        mode=Choice("eval"), dtype=Choice("float32", "bfloat16", "float16"), batch=Choice(1),
        length=at_least(1025), channels=Integers(1, 6), num_blocks=Integers(1, 6),
        kernel_sizes=Lists(Choice(3, 1, 5, 7), 1, 3), loss=Choice(*LOSSES),
    ),
    needs=REFERENCE,
    evidence="bounded",
    work=2**20, effort=0.5)  # fmt: skip
def positive_networks_are_within_the_bound_for_long_signals(subject, case):
    """The same for signals of more than a thousand positions.

    That is where an implementation saves memory on what it keeps for the backward pass.
    """
    yield from _positive_is_within(subject, case)


def _positive_is_within(subject, case):
    model = subject.model(case)
    blocks = subject.handles(model, case)
    make_positive(blocks, case.rng("weights"))
    x = as_input(case, case.rng("input").uniform(0.5, 1.5, case.shape))
    rng = case.rng("gradient")
    v = rng.uniform(0.5, 1.5, case.shape) * case["loss"] / case.length
    if rng.integers(2):  # one position alone: in sums of many terms errors average out
        v[:, :, np.arange(case.length) != rng.integers(case.length)] = 0
    v = as_input(case, v)
    exact = _reference(blocks, case, x, v=v.cpu().double().numpy())
    if exact.kink or not exact.in_range:
        return
    out, gradient = subject.vjp(model, x, v)
    yield within(out, exact.out, f"output of a positive network in {case.dtype}")
    yield within(gradient, exact.input_gradient, "gradient at the input")
    for what, gradient, bounded in gradients_beside(blocks, exact.gradients):
        yield within(gradient, bounded, what)


@statement(
    space=INPUTS.narrow(
        mode=Choice("eval"), batch=at_least(1),
    ),
    needs=(HANDLES, BATCH_NORM, DIRECT),
    evidence="bounded",
    documented=True,
    work=2**18, effort=0.5)  # fmt: skip
def each_layer_is_within_its_own_bound(subject, case):
    """Each convolution and each norm is within the error bound for the input that it really gets.

    End to end such bounds grow with every layer and say little for 512 channels; layer by layer
    they stay sharp at any size. A layer that is not called as a module, or calculates in a way of
    its own, is left to the bounds end to end.
    """
    model = subject.model(case)
    blocks = subject.handles(model, case)
    randomise(model, case.rng("weights"))
    with_small_variances(blocks, case.rng("variances"), LEAST_VARIANCE[case.dtype])
    layers = [layer for block in blocks for layer in block.layers]
    modules = [module for layer in layers for module in (layer.conv, layer.norm)]
    for enabled in kernel_sets(case):
        with own_calls(modules) as calls, onednn(enabled), torch.no_grad():
            subject(model, normal_input(case))
        if not calls:
            raise NotApplicable("no convolution or norm is called as a module of torch's own")
        yield from _each_layer(case, layers, calls)


def _each_layer(case, layers, calls):
    form, rng = FORMATS[case.dtype], case.rng("channels")
    for place, layer in enumerate(layers):
        channels = torch.from_numpy(rng.permutation(layer.norm.num_features)[:24].copy())
        for module, check in ((layer.conv, _convolution), (layer.norm, _norm)):
            for x, out in calls.get(module, ()):
                expected = check(form, module, x, channels)
                if bool(torch.isfinite(expected.bound).all()):
                    what = f"{type(module).__name__} {place} on its own input"
                    yield within(out[:, channels], expected, what)


def _convolution(form, conv, x, channels):
    weight = conv.weight.detach().cpu().double()[channels]
    bias = None if conv.bias is None else conv.bias.detach().cpu().double()[channels]
    return convolve(
        form, exactly(x), weight, bias,
        stride=conv.stride, padding=conv.padding, dilation=conv.dilation,
    )  # fmt: skip


def _norm(form, norm, x, channels):
    values = [
        tensor.detach().cpu().double()[channels]
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    ]
    return normalise(form, exactly(x[:, channels]), *values, norm.eps)


def _reference(blocks, case, x, **options):
    form = FORMATS[case.dtype]
    return real_pass(read_network(blocks), x.cpu().double().numpy(), form=form, **options)
