"""Structure: the model has the parts that the architecture names, and no others."""

import inspect

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from rescnn_verify.compare import Falsified, attempt, equal, same_bits
from rescnn_verify.needs import (
    A_PARAMETER_CLAIM,
    BATCH_NORM,
    CONTRACT,
    HANDLES,
)
from rescnn_verify.probes import state_of
from rescnn_verify.space import INPUTS, Space
from rescnn_verify.statement import statement
from rescnn_verify.subject import seed_torch


@statement(space=Space(), needs=(HANDLES,), documented=True, effort=2)
def a_dense_convolution_per_branch(subject, case):
    """Branch i is one dense convolution from all channels to its share of them."""
    for i, block in enumerate(subject.handles(subject.model(case), case)):
        for j, branch in enumerate(block.branches):
            shape = (case.widths[j], case.channels, case.kernel_sizes[j])
            where = f"branch {j} of block {i}"
            yield equal(tuple(branch.conv.weight.shape), shape, f"weight shape of {where}")
            yield equal(branch.conv.groups, 1, f"groups of {where}")
            yield equal(tuple(branch.conv.stride), (1,), f"stride of {where}")
            yield equal(tuple(branch.conv.dilation), (1,), f"dilation of {where}")


@statement(space=Space(), needs=(HANDLES,), documented=True, effort=2)
def a_dense_fusion(subject, case):
    """The fusion is one dense 1×1 convolution from all channels to all channels."""
    for i, block in enumerate(subject.handles(subject.model(case), case)):
        shape = (case.channels, case.channels, 1)
        yield equal(tuple(block.fusion.conv.weight.shape), shape, f"fusion weight of block {i}")
        yield equal(block.fusion.conv.groups, 1, f"groups of the fusion of block {i}")


@statement(space=Space(), needs=(HANDLES, BATCH_NORM), documented=True, effort=1.5)
def a_batch_norm_per_convolution(subject, case):
    """Behind every convolution stands an affine batch norm with running statistics.

    Its epsilon is 1e-5 and its momentum 0.1, the documented defaults of BatchNorm1d.
    """
    for i, block in enumerate(subject.handles(subject.model(case), case)):
        for j, layer in enumerate(block.layers):
            norm, where = layer.norm, f"norm {j} of block {i}"
            yield equal(norm.num_features, layer.conv.weight.shape[0], f"features of {where}")
            yield equal(norm.affine, True, f"affine of {where}")
            yield equal(norm.track_running_stats, True, f"track_running_stats of {where}")
            yield equal(norm.eps, nn.BatchNorm1d(1).eps, f"eps of {where}")
            yield equal(norm.momentum, nn.BatchNorm1d(1).momentum, f"momentum of {where}")


@statement(space=Space(), needs=(HANDLES,), documented=True, effort=2)
def blocks_are_separate(subject, case):
    """There are num_blocks blocks, and no two layers share a parameter or a buffer."""
    model = subject.model(case)
    blocks = subject.handles(model, case)
    yield equal(len(blocks), case.num_blocks, "number of blocks")
    tensors = [
        tensor
        for block in blocks
        for layer in block.layers
        for module in (layer.conv, layer.norm)
        for tensor in _own(module)
    ]
    distinct = len({tensor.data_ptr() for tensor in tensors if tensor.numel()})
    yield equal(distinct, len(tensors), "distinct parameters and buffers among the blocks' layers")


def _own(module):
    """A layer's tensors, and those they are computed from, but not those of layers within it."""
    yield from (*module.parameters(recurse=False), *module.buffers(recurse=False))
    if is_parametrized(module):
        yield from module.parametrizations.parameters()


@statement(space=Space(), needs=(CONTRACT,), documented=True, effort=3)
def parameter_count_is_the_formula(subject, case):
    """Per block Σᵢ wᵢ(C·kᵢ + 2) + C(C + 2) parameters, and a bias for each convolution with one.

    A tensor that a layer computes from other parameters counts as itself.
    """
    model = subject.model(case)
    layers = [layer for block in subject.handles(model, case) for layer in block.layers]
    biases = sum(layer.conv.bias.numel() for layer in layers if layer.conv.bias is not None)
    counted = sum(parameter.numel() for parameter in model.parameters())
    for module in (module for layer in layers for module in (layer.conv, layer.norm)):
        shown = [t for t in (module.weight, module.bias) if t is not None]
        computed = [t for t in shown if not isinstance(t, nn.Parameter)]
        behind = [p for p in module.parameters() if not any(p is t for t in shown)]
        if computed and behind:  # else they are views of what others own
            counted += sum(t.numel() for t in computed) - sum(p.numel() for p in behind)
    c = case.channels
    branches = sum(w * (c * k + 2) for w, k in zip(case.widths, case.kernel_sizes, strict=True))
    yield equal(
        counted - biases,
        case.num_blocks * (branches + c * (c + 2)),
        "parameters beside the convolutions' biases",
    )


@statement(space=Space(), needs=(A_PARAMETER_CLAIM,))
def claimed_parameter_count(subject, case):
    """The documented parameter count is the number of parameters of the model."""
    model = subject.model(case)
    claim = subject.target.claims["parameter count"]
    claimed = attempt("claimed parameter count", lambda: claim(model, case.config))
    yield equal(sum(p.numel() for p in model.parameters()), claimed, "parameters of the model")


@statement(space=Space(seed=INPUTS.get("seed")), needs=(CONTRACT,), effort=0.2)
def constructor_defaults(subject, case):
    """The defaults are kernel_sizes (3, 5, 7), dropout 0.1 and, of a stack, 512 channels, 3 blocks.

    Arguments given by position, where the constructor takes them so, mean what they mean by name.
    """
    cls, channels = subject.target.constructor, max(3, case.channels)
    is_stack = subject.target.kind == "stack"
    spelled_out = {"kernel_sizes": (3, 5, 7), "dropout": 0.1} | (
        {"num_blocks": 3} if is_stack else {}
    )
    model = attempt("building with default arguments", lambda: cls(channels=channels))
    reference = attempt("building with the defaults", lambda: cls(channels=channels, **spelled_out))
    yield equal(_shapes(model), _shapes(reference), "state_dict shapes with default arguments")
    attempt("load_state_dict", lambda: model.load_state_dict(reference.state_dict()))
    x = torch.from_numpy(case.rng("input").standard_normal((4, channels, 5))).float()
    outputs = []
    for built in (model, reference):
        seed_torch(case.seed)
        outputs.append(subject(subject.set_mode(built, "train"), x))
    yield same_bits(outputs[0], outputs[1], "output in train mode with default arguments")
    parameters = inspect.signature(cls).parameters
    if is_stack and "channels" in parameters:
        yield equal(parameters["channels"].default, 512, "default of channels")
    names = ("channels", *(("num_blocks",) if is_stack else ()), "kernel_sizes", "dropout")
    order = tuple(p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD)
    if set(order) >= set(names):
        yield equal(order[: len(names)], names, "order of the positional arguments")


def _shapes(model):
    if not isinstance(model, nn.Module):
        raise Falsified("building", "an nn.Module", type(model).__name__)
    return {name: tuple(tensor.shape) for name, tensor in state_of(model).items()}
