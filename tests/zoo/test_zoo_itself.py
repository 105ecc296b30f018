"""The zoo is what it says: everything runs, names are unique, and the right ones agree."""

from __future__ import annotations

import copy
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

from rescnn_verify.subject import environment

from . import RIGHT, WRONG
from .base import Block, Stack

LEAST = (
    dict.fromkeys(
        ("split", "structure", "shape", "receptive_field", "residual", "side_effects", "rejection"),
        6,
    )
    | dict.fromkeys(("arithmetic", "locality", "gradients", "modes", "dropout", "state"), 7)
    | {"transforms": 3, "rounding": 1}
)
DTYPES = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}
KERNELS = [(3,), (5, 1), (3, 3, 7)]

right = pytest.mark.parametrize("entry", RIGHT, ids=lambda entry: entry.cls.__name__)


@pytest.fixture(autouse=True)
def alone():
    """What a wrong one seeds or sets for the whole process ends with its test."""
    with environment():
        torch.manual_seed(0)
        yield


def make(cls, channels=7, num_blocks=2, kernel_sizes=(3, 5), dropout=0.25):
    if issubclass(cls, Block):
        return cls(channels, kernel_sizes, dropout)
    return cls(channels, num_blocks, kernel_sizes, dropout)


def plain(model, kernels):
    """The base implementation of the same configuration."""
    cls = Block if isinstance(model, Block) else Stack
    convs = sum(isinstance(module, nn.Conv1d) for module in model.modules())
    channels = max(m.out_channels for m in model.modules() if isinstance(m, nn.Conv1d))
    return make(cls, channels, convs // (len(kernels) + 1), kernels, 0.0)


def layers(model, kind, per_block):
    """Modules of one kind, block by block, the fusion's last."""
    if hasattr(model, "in_order"):
        yield from (m for m in model.in_order() if isinstance(m, kind))
        return
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, kind)]
    for start in range(0, len(found), per_block):
        block = found[start : start + per_block]
        yield from (m for _, m in sorted(block, key=lambda pair: "fusion" in pair[0]))


def copy_layers(source, target, kernels):
    for kind in (nn.Conv1d, nn.BatchNorm1d):
        pairs = zip(
            layers(source, kind, len(kernels) + 1),
            layers(target, kind, len(kernels) + 1),
            strict=True,
        )
        for one, other in pairs:
            state = {name: getattr(one, name) for name in other.state_dict()}
            if kind is nn.Conv1d and one.bias is None:
                state["bias"] = torch.zeros(one.out_channels, dtype=one.weight.dtype)
            other.load_state_dict(state)
            if kind is nn.BatchNorm1d:
                other.eps = one.eps


def fill(model, rng, integers):
    """Draw every parameter and running statistic."""

    def draw(tensor, low, high):
        drawn = rng.integers if integers else rng.uniform
        values = drawn(low, high + integers, tensor.shape)
        if integers and tensor.dim() == 3:
            values = values * (rng.random(tensor.shape) < 0.3)
        tensor.copy_(torch.from_numpy(np.asarray(values)))

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv1d | nn.BatchNorm1d):
                for parameter in module.parameters():
                    draw(parameter, -1, 1)
            if isinstance(module, nn.BatchNorm1d):
                draw(module.running_mean, -1, 1)
                if integers:
                    module.running_var.fill_(1)
                    module.eps = 0.0
                else:
                    draw(module.running_var, 0.5, 2)


def magnitudes(model, x):
    """The output, and the largest value of any layer, when nothing can cancel."""
    model = copy.deepcopy(model).double()
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            tensor.copy_(-tensor.abs() if name.endswith("running_mean") else tensor.abs())
    seen = []
    for module in model.modules():
        module.register_forward_hook(lambda module, inputs, y: seen.append(y.abs().max().item()))
    with torch.no_grad():
        return model(x.double().abs()), max(seen)


def test_every_family_is_there_and_names_are_unique():
    counts = Counter(fault.family for fault in WRONG)
    assert set(counts) == set(LEAST)
    assert all(counts[family] >= least for family, least in LEAST.items()), counts
    assert len(WRONG) >= 95
    assert len(RIGHT) >= 18
    names = Counter(entry.cls.__name__ for entry in (*WRONG, *RIGHT))
    assert max(names.values()) == 1, names.most_common(1)
    mistakes = Counter(fault.mistake for fault in WRONG)
    assert max(mistakes.values()) == 1, mistakes.most_common(1)


@pytest.mark.parametrize("entry", (*WRONG, *RIGHT), ids=lambda entry: entry.cls.__name__)
def test_runs_in_both_modes(entry):
    model, x = make(entry.cls), torch.randn(2, 7, 9)
    for mode in (True, False):
        assert isinstance(model.train(mode)(x.clone()), torch.Tensor)
    assert isinstance(model.get_receptive_field(), int)


@right
@pytest.mark.parametrize("kernels", KERNELS, ids=str)
def test_right_ones_are_exact_on_integers(entry, kernels):
    rng = np.random.default_rng(len(kernels))
    model = make(entry.cls, 5, 2, kernels).eval()
    fill(model, rng, integers=True)
    x = torch.from_numpy(rng.integers(-2, 3, (2, 5, 8))).double()
    reference = plain(model, kernels).double().eval()
    copy_layers(model.double(), reference, kernels)
    expected, (_, largest) = reference(x), magnitudes(reference, x)
    assert expected.count_nonzero()
    for dtype, digits in DTYPES.items():
        if largest <= 2**digits:
            assert torch.equal(model.to(dtype)(x.to(dtype)).double(), expected), dtype


@right
@pytest.mark.parametrize("kernels", KERNELS, ids=str)
def test_right_ones_agree_within_roundoff(entry, kernels):
    """Both sides differ from the true value by at most m roundings of what cannot cancel."""
    rng = np.random.default_rng(len(kernels))
    model = make(entry.cls, 7, 3, kernels).double().eval()
    fill(model, rng, integers=False)
    x = torch.from_numpy(rng.normal(size=(2, 7, 11)))
    reference = plain(model, kernels).double().eval()
    copy_layers(model, reference, kernels)
    bound, _ = magnitudes(reference, x)
    roundings = 3 * (7 * max(kernels) + 7 + 2 * 9 + 3)
    assert ((model(x) - reference(x)).abs() <= 2 * roundings * 2**-53 * bound).all()


@right
def test_right_ones_train_alike(entry):
    """Two normalisations enlarge an error by no more than 1/eps together."""
    kernels = (3, 5)
    model = make(entry.cls, 7, 1, kernels, dropout=0.0).double()
    reference = plain(model, kernels).double()
    fill(model, np.random.default_rng(0), integers=False)
    copy_layers(model, reference, kernels)
    x = torch.from_numpy(np.random.default_rng(1).normal(size=(3, 7, 11)))
    bound = 2 * (7 * 5 + 7 + 2 * 9 + 3) * 2**-53 * magnitudes(reference, x)[1] / 1e-5
    assert ((model(x) - reference(x)).abs() <= bound).all()
    pairs = zip(layers(model, nn.BatchNorm1d, 3), layers(reference, nn.BatchNorm1d, 3), strict=True)
    for one, other in pairs:
        assert one.num_batches_tracked == other.num_batches_tracked == 1
        assert ((one.running_mean - other.running_mean).abs() <= bound).all()
        assert ((one.running_var - other.running_var).abs() <= bound).all()


@right
def test_right_ones_pass_gradients_and_nan(entry):
    model = make(entry.cls, 6, 2, (3, 3, 5)).eval()
    x = torch.randn(2, 6, 9).transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    model(x).sum().backward()
    assert x.grad.isfinite().all()
    assert all(parameter.grad is not None for parameter in model.parameters())
    for dtype in DTYPES:
        y = x.detach().to(dtype)
        y[0, 1, 4] = torch.nan
        y = model.to(dtype)(y)
        assert y[0, :, 4].isnan().all()
        assert y[1].isfinite().all()


@right
def test_right_ones_without_fusion_are_relu(entry):
    model = make(entry.cls, 6, 2, (3, 5))
    convs = list(layers(model, nn.Conv1d, 3))
    norms = list(layers(model, nn.BatchNorm1d, 3))
    with torch.no_grad():
        for conv, norm in zip(convs[2::3], norms[2::3], strict=True):
            for tensor in (*conv.parameters(), *norm.parameters()):
                tensor.zero_()
    for dtype in DTYPES:
        x = torch.randn(2, 6, 9).to(dtype)
        x[0, 0] = 0
        x.requires_grad_()
        v = torch.randn(2, 6, 9).to(dtype)
        y = model.to(dtype).eval()(x)
        assert torch.equal(y, x.relu())
        assert y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
        assert torch.equal(torch.autograd.grad(y, x, v)[0], v * (x > 0))


@right
def test_right_ones_can_be_copied_stored_and_moved(entry):
    model, x = make(entry.cls).eval(), torch.randn(2, 7, 9)
    expected = model(x)
    pickled = [pickle.loads(pickle.dumps(model))] if getattr(entry.cls, "pickles", True) else []
    for twin in (copy.deepcopy(model), *pickled):
        assert torch.equal(twin(x), expected)
        assert not {p.data_ptr() for p in twin.parameters()} & {
            p.data_ptr() for p in model.parameters()
        }
    other = make(entry.cls).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), expected)
    assert model(x[:0]).shape == (0, 7, 9)
    if getattr(entry.cls, "runs_on_meta", True):
        assert model.to("meta")(x.to("meta")).is_meta


@right
def test_right_ones_refuse_by_name(entry):
    block = {"channels": 4, "kernel_sizes": [3, 5], "dropout": 0.5}
    stack = block if issubclass(entry.cls, Block) else block | {"num_blocks": 2}
    wrong = [
        ("channels", 1),
        ("channels", 4.5),
        ("channels", True),
        ("channels", -3),
        ("kernel_sizes", []),
        ("kernel_sizes", [3, 0]),
        ("kernel_sizes", [3, 2.5]),
        ("kernel_sizes", [3, True]),
        ("kernel_sizes", [-3]),
        ("kernel_sizes", 5),
        ("dropout", -0.5),
        ("dropout", 1.5),
        ("dropout", float("nan")),
        ("dropout", "0.5"),
    ]
    if stack is not block:
        wrong += [("num_blocks", 0), ("num_blocks", -1), ("num_blocks", 1.5), ("num_blocks", True)]
    for name, value in wrong:
        with pytest.raises((TypeError, ValueError)) as refusal:
            entry.cls(**stack | {name: value})
        assert name in str(refusal.value)
        assert str(value) in str(refusal.value)
    kernels = [3, 5]
    model = entry.cls(**stack | {"kernel_sizes": kernels})
    claimed = model.get_receptive_field()
    kernels.append(99)
    assert model.get_receptive_field() == claimed
    assert claimed == (5 if stack is block else 9)
    for shape in ((4, 4), (4,), (2, 3, 8), (2, 1, 8), (2, 4, 8, 1)):
        with pytest.raises((ValueError, RuntimeError)):
            model(torch.zeros(shape))
