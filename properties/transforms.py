"""Transforms: what torch makes of a model is the same function, within derived bounds."""

import math
import warnings
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.fusion import fuse_conv_bn_weights

from rescnn_verify.bounds.roundoff import FORMATS
from rescnn_verify.compare import describe, equal, same_tensors, same_values, within
from rescnn_verify.handles import put
from rescnn_verify.needs import BATCH_NORM, DIRECT, HANDLES, POST_ACTIVATION
from rescnn_verify.networks import certify, certify_prefixes
from rescnn_verify.oracles.layers import gradients_beside, read_network
from rescnn_verify.oracles.real import real_pass
from rescnn_verify.probes import (
    PARTS,
    Called,
    as_input,
    normal_input,
    part_of,
    randomise,
    set_norm,
    state_of,
)
from rescnn_verify.space import INPUTS, Choice, Constraint, Integers
from rescnn_verify.statement import statement
from rescnn_verify.subject import NotApplicable, NothingCompiledError, compiled, seed_torch

REFERENCE = (HANDLES, POST_ACTIVATION, BATCH_NORM, DIRECT)
EVAL = INPUTS.narrow(
    mode=Choice("eval"), batch=Integers(1, 5), length=Integers(1, 100),
    dtype=Choice("float32", "float64"),
)  # fmt: skip
# A tensor that a model keeps from one vmap to another does not fit two groups or more.
GROUPS = Constraint(
    "two or more groups of so many rows",
    lambda c: c.batch % c["rows"] == 0 and c.batch > c["rows"],
)


@statement(
    space=INPUTS.narrow(
        GROUPS, mode=Choice("eval"), batch=Integers(2, 6), length=Integers(1, 100),
        dtype=Choice("float32", "float64"), axis=Integers(0, 3), rows=Choice(1, 2, 3),
    ),
    needs=REFERENCE, evidence="bounded", work=2**15, effort=1.0,
)  # fmt: skip
def vmap_over_inputs_is_the_same_function(subject, case):
    """`torch.vmap` over groups of rows in eval mode is within the error bound of the reference.

    Whichever axis is mapped. It is what per-sample gradients are made with. (In train mode a batch
    norm's update in place cannot be mapped.)
    """

    def mapped(model, x):
        groups = x.unflatten(0, (-1, case["rows"])).movedim(0, case["axis"])
        run = torch.vmap(lambda part: subject.target.call(model, part), case["axis"], case["axis"])
        return run(groups).movedim(case["axis"], 0).flatten(0, 1)

    yield from _same_function(subject, case, mapped, "vmap")


@statement(
    space=INPUTS.narrow(
        GROUPS, mode=Choice("eval"), batch=Integers(2, 6), length=Integers(1, 60),
        dtype=Choice("float32", "float64"), axis=Integers(0, 3), rows=Choice(1, 2, 3),
    ),
    needs=REFERENCE, work=2**15, effort=0.6,
)  # fmt: skip
def vmap_over_gradients_is_exact(subject, case):
    """`torch.vmap` over the gradients of groups of rows is exact on a certified integer network.

    Those at the inputs are NumPy's, and those of the parameters add up to NumPy's: that is how
    gradients of single samples are computed.
    """
    model = subject.model(case)
    blocks = subject.handles(model, case)
    found = certify(blocks, case, bits="weight_bits", kinkless=True)
    if found is None:
        return
    axis, whole = case["axis"], Called(subject.target.call, model)
    x, v = (
        as_input(case, values).unflatten(0, (-1, case["rows"])).movedim(0, axis)
        for values in (found.x, found.v)
    )

    def gradients(part, vector):
        _, pull = torch.func.vjp(
            lambda own, given: torch.func.functional_call(whole, own, (given,)), parameters, part
        )
        return pull(vector)

    parameters = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    with _supported("vmap over gradients"), torch.enable_grad():
        own, gradient = torch.vmap(gradients, axis, (0, axis))(x, v)
    gradient = gradient.movedim(axis, 0).flatten(0, 1)
    yield same_values(gradient, found.expected.input_gradient, "gradient at the input under vmap")
    for name, p in model.named_parameters():
        p.grad = own[f"model.{name}"].sum(0)
    for name, total, exact in gradients_beside(blocks, found.expected.gradients):
        yield same_values(total, exact, f"{name}, added up under vmap")


@statement(
    space=EVAL.narrow(
        mapped=Choice("parameters", "parameters and inputs"),
        own=Choice("everything", *PARTS),
    ),
    needs=REFERENCE, evidence="bounded", work=2**14, effort=0.4,
)  # fmt: skip
def vmap_over_weights_is_each_one_s_function(subject, case):
    """`torch.vmap` over stacked parameters and buffers gives what each of them gives.

    It is what ensembles are made with. Each may have some parameters of its own and share others.
    """
    model = subject.model(case)
    blocks = subject.handles(model, case)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    some = part_of(model, blocks, case["own"], case.rng("own")) if case["own"] in PARTS else ()
    own = {n for n, tensor in tensors.items() if case["own"] == "everything" or tensor in some}
    x = normal_input(case)
    inputs = [x, normal_input(case, "other input")] if "inputs" in case["mapped"] else [x, x]
    states, expected = [], []
    for i, given in enumerate(inputs):
        randomise(model, case.rng(f"weights {i}"))
        with torch.no_grad():
            for name in tensors.keys() - own if states else ():
                tensors[name].copy_(states[0][name])
        values = given.cpu().double().numpy()
        expected.append(real_pass(read_network(blocks), values, form=FORMATS[case.dtype]))
        states.append({name: tensor.detach().clone() for name, tensor in tensors.items()})
    if not all(bounded.in_range for bounded in expected):
        return
    stacked = {
        name: torch.stack([state[name] for state in states]) if name in own else shared
        for name, shared in states[0].items()
    }
    axes = {name: 0 if name in own else None for name in stacked}
    if not own and "inputs" not in case["mapped"]:
        return
    whole = Called(subject.target.call, model)

    def run(state, given):
        named = {f"model.{name}": tensor for name, tensor in state.items()}
        return torch.func.functional_call(whole, named, (given,))

    with _supported("vmap over weights"):
        if "inputs" in case["mapped"]:
            outs = torch.vmap(run, (axes, 0))(stacked, torch.stack(inputs))
        else:
            outs = torch.vmap(run, (axes, None))(stacked, x)
    for i, bounded in enumerate(expected):
        yield within(outs[i], bounded.out, f"output {i} under vmap, against the reference")


@statement(
    space=EVAL.narrow(dtype=Choice("float32"), num_blocks=Choice(1), channels=Integers(1, 24)),
    needs=REFERENCE, evidence="bounded", work=2**15, effort=0.4,
)  # fmt: skip
def autocast_is_the_same_function(subject, case):
    """Under `torch.autocast` to bfloat16 one block's output is within bfloat16's error bound."""

    def cast(model, x):
        with torch.autocast(case.device, torch.bfloat16):
            return subject.target.call(model, x)

    yield from _same_function(subject, case, cast, "autocast", FORMATS["bfloat16"])


@statement(space=EVAL, needs=REFERENCE, evidence="bounded", work=2**15, effort=0.4)
def folded_norms_are_the_same_function(subject, case):
    """With its norms folded into the convolutions a model is within the same error bound.

    The folded weights are written into the model, whose norms are left to do nothing.
    """

    def folded(model, x):
        return subject.target.call(model, x)

    yield from _same_function(subject, case, folded, "folding the norms", prepare=_fold_all)


@statement(
    space=INPUTS.narrow(mode=Choice("eval"), batch=Integers(1, 5), length=Integers(1, 100)),
    needs=REFERENCE,
    work=2**15,
    effort=0.3,
)
def forward_derivatives_are_those_of_the_backward_pass(subject, case):
    """`torch.func.jvp` gives J·u with ⟨v, J·u⟩ = ⟨Jᵀv, u⟩, exactly on a certified integer network.

    Jᵀv is NumPy's. The network of the magnitudes certifies the forward pass of any u in its range,
    too: a tangent is the same sums without shifts. Python adds both products up without error.
    """
    model = subject.model(case)
    found = certify_prefixes(
        subject.handles(model, case), case, bits="backward_bits", kinkless=True
    )
    if found is None:
        return
    u = as_input(case, case.rng("tangent").integers(-1, 2, case.shape).astype(np.float64))
    with _supported("forward-mode derivatives"), torch.enable_grad():
        out, tangent = torch.func.jvp(
            lambda x: subject.target.call(model, x), (as_input(case, found.x),), (u,)
        )
    yield same_values(out, found.expected.out, "output beside its forward derivative")
    got = tangent.detach().cpu().double().numpy() * found.v
    expected = found.expected.input_gradient * u.cpu().double().numpy()
    yield equal(math.fsum(got.flat), math.fsum(expected.flat), "⟨v, J·u⟩, against ⟨Jᵀv, u⟩")


@statement(
    space=INPUTS.narrow(
        mode=Choice("eval"), batch=Integers(1, 5), length=Integers(1, 100),
        dtype=Choice("float32", "float64"),
    ),
    needs=REFERENCE, work=2**15, effort=0.4,
)  # fmt: skip
def forward_derivatives_along_parameters_are_their_gradients(subject, case):
    """`torch.func.jvp` along a parameter θ gives J·θ with ⟨v, J·θ⟩ = ⟨gradient of θ, θ⟩, exactly.

    Along itself, as then a tangent is sums of what the certified integer network sums up.
    """
    model = subject.model(case)
    blocks = subject.handles(model, case)
    found = certify_prefixes(blocks, case, bits="weight_bits", kinkless=True)
    if found is None:
        return
    names = {parameter: name for name, parameter in model.named_parameters()}
    options = [
        (names[parameter], parameter, gradient)
        for block, gradients in zip(blocks, found.expected.gradients, strict=True)
        for layer, own in zip(block.layers, gradients, strict=True)
        for parameter, gradient in (
            (layer.conv.weight, own.weight), (layer.conv.bias, own.bias),
            (layer.norm.weight, own.scale), (layer.norm.bias, own.shift),
        )
        if parameter in names
    ]  # fmt: skip
    if not options:
        raise NotApplicable("its parameters are computed from others")
    whole, x = Called(subject.target.call, model), as_input(case, found.x)
    for place in case.rng("parameters").permutation(len(options))[:4]:
        name, parameter, gradient = options[place]
        value = parameter.detach().clone()
        with _supported("forward-mode derivatives"), torch.enable_grad():
            _, tangent = torch.func.jvp(
                lambda given, name=name: torch.func.functional_call(
                    whole, {f"model.{name}": given}, (x,)
                ),
                (value,), (value,),
            )  # fmt: skip
        got = tangent.detach().cpu().double().numpy() * found.v
        expected = gradient * value.cpu().double().numpy()
        what = f"⟨v, J·θ⟩ for θ = {name}, against ⟨its gradient, θ⟩"
        yield equal(math.fsum(got.flat), math.fsum(expected.flat), what)


@statement(space=EVAL, needs=REFERENCE, evidence="bounded", work=2**15, effort=0.02, slow=True)
def export_is_the_same_function(subject, case):
    """What `torch.export` makes of a model is within the error bound, on other data, too."""

    def exported(model, x):
        whole = Called(subject.target.call, model)
        return torch.export.export(whole, (torch.zeros_like(x),)).module()(x)

    yield from _same_function(subject, case, exported, "torch.export")


@statement(
    space=EVAL.narrow(num_blocks=Integers(1, 2), length=Integers(1, 40)), needs=REFERENCE,
    evidence="bounded", work=2**13, effort=0.01, slow=True,
)  # fmt: skip
def compile_is_the_same_function(subject, case):
    """What `torch.compile` makes of a model is within the error bound.

    Dynamo starts afresh for every model, because it gives up compiling after a few. A model of
    which it compiles nothing, as one may ask it to, does not support it.
    """

    def run(model, x):
        with compiled(model) as fast:
            return subject.target.call(fast, x)

    yield from _same_function(subject, case, run, "torch.compile")


@statement(
    space=INPUTS.narrow(
        mode=Choice("train"), batch=Integers(2, 5), length=Integers(1, 40),
        num_blocks=Integers(1, 2), dtype=Choice("float32", "float64"),
        norms=Choice("as the model", "some in eval mode"),
    ),
    effort=0.02, slow=True,
)  # fmt: skip
def a_traced_training_call_learns_the_same(subject, case):
    """What `torch.compile` traces of a training call gives the same output and learns the same.

    To the bit, as the graph is run without an optimising backend. Norms in eval mode learn nothing.
    """
    found = []
    for traced in (False, True):
        model = subject.model(case)
        randomise(model, case.rng("weights"))
        rng = case.rng("norms")
        for norm in (module for module in model.modules() if isinstance(module, _NormBase)):
            norm.train(case["norms"] == "as the model" or bool(rng.integers(2)))
        x = normal_input(case)
        seed_torch(case.seed)
        if traced:
            with _supported("torch.compile"), compiled(model, "eager") as fast:
                out = subject.target.call(fast, x)
        else:
            with torch.no_grad():
                out = subject(model, x)
        state = state_of(model)
        found.append({"the output": out.clone(), **state})
    yield same_tensors(found[1], found[0], "after a traced training call, against a plain one")


def _same_function(subject, case, transformed, name, form=None, prepare=None):
    model = subject.model(case)
    blocks = subject.handles(model, case)
    randomise(model, case.rng("weights"))
    x = normal_input(case)
    network = read_network(blocks)
    expected = real_pass(network, x.cpu().double().numpy(), form=form or FORMATS[case.dtype])
    if not expected.in_range:
        return
    if prepare:
        prepare(blocks)
    seed_torch(case.seed)
    with _supported(name):
        out = transformed(model, x)
    yield within(out, expected.out, f"output under {name}, against the reference")


@contextmanager
def _supported(name):
    """Runs without gradients what a target need not support."""
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # vmap says so of operations that it runs one by one
            warnings.filterwarnings("ignore", "There is a performance drop")
            yield
    except NothingCompiledError:
        with compiled(nn.ReLU(), "eager") as simple:  # raises where nothing at all is compiled
            simple(torch.zeros(1))
        raise NotApplicable(f"the target does not support {name}: nothing is compiled") from None
    except Exception as error:
        raise NotApplicable(f"the target does not support {name}: {describe(error)}") from error


def _fold_all(blocks):
    for layer in (layer for block in blocks for layer in block.layers):
        _fold(layer.conv, layer.norm)


def _fold(conv, norm):
    """Folds a norm into its convolution; a shift stays in the norm if there is no bias for it."""
    bias = conv.bias if conv.bias is not None else torch.zeros_like(norm.running_mean)
    weight, shift = fuse_conv_bn_weights(
        conv.weight, bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    weight, shift = (t.detach().cpu().double().numpy() for t in (weight, shift))
    put(conv, "weight", weight)
    put(conv, "bias", shift)
    left = shift if conv.bias is None else 0.0
    set_norm(norm, scale=np.sqrt(1 + norm.eps), shift=left)
