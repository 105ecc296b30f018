"""The oracles agree with torch and with naive rational arithmetic, and their bounds are bounds."""

import functools
import itertools
import math
from dataclasses import replace
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from rescnn import ResCNNStack
from rescnn_verify.bounds.roundoff import FLOAT64, FORMATS, SIGNIFICAND_BITS, Format
from rescnn_verify.case import Case, Config
from rescnn_verify.compare import NotApplicable, within
from rescnn_verify.finding import contract_handles
from rescnn_verify.handles import BlockHandles, ConvNorm
from rescnn_verify.networks import certify, certify_prefixes, make_real, values_of
from rescnn_verify.oracles import real as reals
from rescnn_verify.oracles.integer import exact_pass, outputs_of_prefixes
from rescnn_verify.oracles.layers import (
    Block,
    Layer,
    UnsupportedLayerError,
    gradients_beside,
    read_network,
)
from rescnn_verify.oracles.real import Bounded, real_pass
from rescnn_verify.probes import as_input
from rescnn_verify.subject import DTYPES, environment


@pytest.fixture(autouse=True)
def quiet_environment():
    with environment():
        yield


def stack(case):
    """A model of the bundled implementation and its handles."""
    torch.manual_seed(case.seed)
    model = ResCNNStack(case.channels, case.num_blocks, case.kernel_sizes, case.dropout)
    model = model.to(DTYPES[case.dtype]).train(case.mode == "train")
    return model, contract_handles(model, case)


def layers_of(network):
    return [layer for block in network for layer in (*block.branches, block.fusion)]


def gradients_of(model_blocks):
    for block in model_blocks:
        for layer in block.layers:
            yield layer.conv.weight, layer.conv.bias, layer.norm.weight, layer.norm.bias


def parts(gradients):
    """A layer's gradients in the order weight, bias, scale, shift."""
    return gradients.weight, gradients.bias, gradients.scale, gradients.shift


# --- integer networks against autograd -----------------------------------------------------------

SHAPES = [
    {"channels": 1, "kernel_sizes": (1,), "length": 1},
    {"channels": 1, "kernel_sizes": (7,), "length": 3},
    {"channels": 4, "kernel_sizes": (3,), "length": 9, "batch": 3},
    {"channels": 7, "kernel_sizes": (3, 5, 7), "length": 20, "num_blocks": 2},
    {"channels": 5, "kernel_sizes": (11, 1), "length": 4, "num_blocks": 2, "batch": 2},
    {"channels": 8, "kernel_sizes": (3, 3, 5), "length": 33, "num_blocks": 3, "batch": 2},
    {"channels": 6, "kernel_sizes": (1, 13, 3, 5), "length": 40, "layout": "strided"},
    {"channels": 6, "kernel_sizes": (5, 3), "length": 10, "layout": "expanded", "batch": 3},
]
integer_cases = pytest.mark.parametrize(
    "case",
    [
        Case(**shape, dtype=dtype, seed=seed)
        for shape in SHAPES
        for dtype in ("float64", "float32")
        for seed in range(2)
    ],
    ids=str,
)


@integer_cases
def test_integer_passes_equal_autograd_bit_for_bit(case):
    model, blocks = stack(case)
    found = certify(blocks, case, bits="weight_bits", kinkless=True)
    if found is None:
        assert case.dtype == "float32"
        pytest.skip("needs more than 24 bits")
    assert not found.expected.kink
    x = as_input(case, found.x).detach().requires_grad_()
    out = model(x)
    out.backward(torch.from_numpy(found.v).to(out.dtype))
    assert np.array_equal(out.detach().double().numpy(), found.expected.out)
    assert np.array_equal(x.grad.double().numpy(), found.expected.input_gradient)
    expected = itertools.chain.from_iterable(found.expected.gradients)
    for parameters, gradients in zip(gradients_of(blocks), expected, strict=True):
        for parameter, values in zip(parameters, parts(gradients), strict=True):
            assert np.array_equal(parameter.grad.double().numpy(), values)


def test_most_integer_networks_are_certified():
    certified = 0
    for seed in range(20):
        case = Case(channels=6, kernel_sizes=(3, 5), length=20, num_blocks=2, seed=seed)
        _, blocks = stack(case)
        certified += certify(blocks, case, bits="forward_bits") is not None
    assert certified == 20


@pytest.mark.parametrize("dtype", SIGNIFICAND_BITS)
def test_a_certified_network_is_exact_in_its_dtype(dtype):
    certified = 0
    for seed in range(10):
        case = Case(channels=3, kernel_sizes=(3, 1), length=9, dtype=dtype, seed=seed)
        model, blocks = stack(case)
        if found := certify(blocks, case, bits="forward_bits"):
            certified += 1
            assert found.expected.forward_bits <= SIGNIFICAND_BITS[dtype]
            with torch.no_grad():
                out = model(as_input(case, found.x)).double().numpy()
            assert np.array_equal(out, found.expected.out)
    assert certified >= 5


@pytest.mark.parametrize("bits", ["forward_bits", "weight_bits"])
@pytest.mark.parametrize("dtype", SIGNIFICAND_BITS)
def test_a_network_certified_for_every_prefix_needs_no_more_bits_for_any(dtype, bits):
    backward = bits == "weight_bits"
    certified = large = 0
    for seed in range(20):
        case = Case(
            channels=2, num_blocks=1 + seed % 2, kernel_sizes=(5, 1), batch=1 + seed % 3, length=4,
            dtype=dtype, seed=seed,
        )  # fmt: skip
        _, blocks = stack(case)
        found = certify_prefixes(blocks, case, bits=bits, kinkless=backward)
        if found is None:
            continue
        certified += 1
        large += np.abs(found.x).max() > 1
        for rows, length in itertools.product(range(1, case.batch + 1), range(1, 5)):
            x, v = (data[:rows, :, :length] for data in (found.x, found.v))
            part = exact_pass(
                found.network, x, v if backward else None, fraction=0.5 if backward else 1.0
            )
            assert getattr(part, bits) <= SIGNIFICAND_BITS[dtype]
            assert not (backward and part.kink)
    assert certified >= (1 if backward and dtype == "bfloat16" else 5)
    assert large >= 1


@pytest.mark.parametrize("kernels", [(1,), (3, 1), (5, 9)])
@pytest.mark.parametrize("num_blocks", [1, 3])
def test_outputs_of_prefixes_are_those_of_one_prefix_after_the_other(kernels, num_blocks):
    case = Case(
        channels=3, num_blocks=num_blocks, kernel_sizes=kernels, batch=2, length=40,
        dtype="float64",
    )  # fmt: skip
    _, blocks = stack(case)
    found = certify(blocks, case, bits="forward_bits")
    assert found.expected.out.any()
    lengths = [40, 7, 1, 39, 2, 23]
    outputs = outputs_of_prefixes(found.network, found.x, found.expected.out, lengths)
    assert list(outputs) == lengths
    for length, out in outputs.items():
        alone = exact_pass(found.network, found.x[:, :, :length], None)
        np.testing.assert_array_equal(out, alone.out)


def test_the_documented_configuration_is_certified():
    case = Case(
        channels=512, num_blocks=3, kernel_sizes=(3, 5, 7), length=24, dtype="float64", seed=0
    )
    _, blocks = stack(case)
    assert certify(blocks, case, bits="backward_bits", kinkless=True) is not None


def test_the_network_is_the_one_in_the_model():
    case = Case(channels=5, kernel_sizes=(3, 5), num_blocks=2, dtype="float64")
    _, blocks = stack(case)
    found = certify(blocks, case, bits="weight_bits")
    for layer, again in zip(layers_of(found.network), layers_of(read_network(blocks)), strict=True):
        for name in ("weight", "bias", "scale", "shift", "mean", "variance"):
            assert np.array_equal(getattr(layer, name), getattr(again, name)), name
        assert layer.eps == again.eps == nn.BatchNorm1d(1).eps


# --- integer networks against rational arithmetic ------------------------------------------------


class Dual:
    """A rational number with its derivative by one variable."""

    def __init__(self, value, slope=0):
        self.value, self.slope = Fraction(value), Fraction(slope)

    def __add__(self, other):
        return Dual(self.value + other.value, self.slope + other.slope)

    def __sub__(self, other):
        return Dual(self.value - other.value, self.slope - other.slope)

    def __mul__(self, other):
        return Dual(self.value * other.value, self.slope * other.value + self.value * other.slope)

    def relu(self):
        return self if self.value > 0 else Dual(0)


TINY = [
    Case(channels=1, kernel_sizes=(3,), length=2, dtype="float64"),
    Case(channels=2, kernel_sizes=(3,), length=3, dtype="float64", batch=2),
    Case(channels=3, kernel_sizes=(1, 5), length=3, dtype="float64"),
    Case(channels=2, kernel_sizes=(3, 1), length=2, dtype="float64", num_blocks=2),
]
tiny_cases = pytest.mark.parametrize("case", TINY, ids=str)


def exact_root(variance):
    root = math.isqrt(int(variance))
    assert root * root == variance
    return root


class Network:
    """The variables of an integer network as nested lists; one of them may vary."""

    def __init__(self, network, x):
        self.blocks = [
            [
                {name: as_lists(getattr(layer, name)) for name in NAMES}
                | {"root": [exact_root(v) for v in layer.variance]}
                for layer in (*block.branches, block.fusion)
            ]
            for block in network
        ]
        self.x = as_lists(x)

    def forward(self):
        x = self.x
        for *branches, fusion in self.blocks:
            inside = [naive_layer(branch, x, Dual) for branch in branches]
            joined = [
                [[v.relu() for v in row] for part in inside for row in part[b]]
                for b in range(len(x))
            ]
            fused = naive_layer(fusion, joined, Dual)
            x = [
                [
                    [(p + q).relu() for p, q in zip(*rows, strict=True)]
                    for rows in zip(*pair, strict=True)
                ]
                for pair in zip(x, fused, strict=True)
            ]
        return x


NAMES = ("weight", "bias", "scale", "shift", "mean")


def as_lists(array, number=Dual):
    if array.ndim == 0:
        return number(float(array))
    return [as_lists(part, number) for part in array]


def naive_layer(layer, x, number):
    """A convolution and its norm by the textbook, one term after the other."""
    out = []
    for rows in x:
        out.append([])
        for o, taps in enumerate(layer["weight"]):
            row = []
            for t in range(len(rows[0])):
                total = layer["bias"][o]
                for channel, values in enumerate(taps):
                    for k, weight in enumerate(values):
                        place = t + k - len(values) // 2
                        if 0 <= place < len(rows[0]):
                            total = total + weight * rows[channel][place]
                inverse = number(Fraction(1, layer["root"][o]))
                normal = (total - layer["mean"][o]) * inverse
                row.append(normal * layer["scale"][o] + layer["shift"][o])
            out[-1].append(row)
    return out


def leaves(nested):
    if isinstance(nested, list):
        for part in nested:
            yield from leaves(part)
    else:
        yield nested


def certified(case, seed):
    case = replace(case, seed=seed)
    _, blocks = stack(case)
    found = certify(blocks, case, bits="weight_bits", kinkless=True)
    assert found is not None
    return found


@tiny_cases
@pytest.mark.parametrize("seed", range(3))
def test_integer_outputs_equal_rational_arithmetic(case, seed):
    found = certified(case, seed)
    naive = Network(found.network, found.x).forward()
    assert [v.value for v in leaves(naive)] == [Fraction(v) for v in found.expected.out.flat]


@tiny_cases
@pytest.mark.parametrize("seed", range(2))
def test_integer_gradients_equal_rational_arithmetic(case, seed):
    found = certified(case, seed)
    variables = Network(found.network, found.x)
    cotangent = [Fraction(v) for v in found.v.flat]

    def derivatives(nested):
        for variable in leaves(nested):
            variable.slope = Fraction(1)
            out = leaves(variables.forward())
            yield sum(o.slope * v for o, v in zip(out, cotangent, strict=True))
            variable.slope = Fraction(0)

    expected = [Fraction(v) for v in found.expected.input_gradient.flat]
    assert list(derivatives(variables.x)) == expected
    for layers, gradients in zip(variables.blocks, found.expected.gradients, strict=True):
        for layer, own in zip(layers, gradients, strict=True):
            for name in ("weight", "bias", "scale", "shift"):
                expected = [Fraction(v) for v in getattr(own, name).flat]
                assert list(derivatives(layer[name])) == expected, name


# --- the certificate -----------------------------------------------------------------------------


def needed_bits(value):
    """log2 of the least power-of-two multiple's integer: what a significand must hold."""
    numerator = abs(Fraction(value).numerator)
    if numerator == 0:
        return 0.0
    while numerator % 2 == 0:
        numerator //= 2
    return math.log2(numerator)


def partial_sums(terms):
    """The sums of all subsets: whatever a summation in any order can come across."""
    sums = {Fraction(0)}
    for term in terms:
        sums |= {s + term for s in sums}
    return sums


def terms_of(weights, rows, t):
    return [
        weight * rows[channel][t + k - len(taps) // 2]
        for channel, taps in enumerate(weights)
        for k, weight in enumerate(taps)
        if 0 <= t + k - len(taps) // 2 < len(rows[0])
    ]


def fractions_of(network):
    blocks = []
    for block in network:
        blocks.append([])
        for layer in (*block.branches, block.fusion):
            own = {name: as_lists(getattr(layer, name), Fraction) for name in NAMES}
            own["root"] = [exact_root(v) for v in layer.variance]
            blocks[-1].append(own)
    return blocks


def layer_intermediates(layer, x):
    """All that a layer's forward pass can come across, with its norm apart or folded in."""
    for o, weights in enumerate(layer["weight"]):
        bias, mean, shift = (layer[name][o] for name in ("bias", "mean", "shift"))
        slope = layer["scale"][o] / layer["root"][o]
        yield from (bias - mean, slope * (bias - mean), slope * (bias - mean) + shift)
        yield shift - slope * mean
        for rows in x:
            for t in range(len(rows[0])):
                terms = terms_of(weights, rows, t)
                for z in partial_sums([*terms, bias]):
                    yield z
                    yield slope * z
                whole = sum(terms, bias)
                yield from (whole - mean, slope * (whole - mean), slope * (whole - mean) + shift)
                folded = [slope * term for term in terms]
                yield from partial_sums([*folded, slope * (bias - mean) + shift])
                yield from partial_sums([*folded, slope * bias, -slope * mean, shift])


def forward_intermediates(network, x):
    x = as_lists(x, Fraction)
    for *branches, fusion in fractions_of(network):
        for branch in branches:
            yield from layer_intermediates(branch, x)
        inside = [naive_layer(branch, x, Fraction) for branch in branches]
        joined = [
            [[max(v, Fraction(0)) for v in row] for part in inside for row in part[b]]
            for b in range(len(x))
        ]
        yield from layer_intermediates(fusion, joined)
        fused = naive_layer(fusion, joined, Fraction)
        sums = [
            [[p + q for p, q in zip(*rows, strict=True)] for rows in zip(*pair, strict=True)]
            for pair in zip(x, fused, strict=True)
        ]
        yield from leaves(sums)
        x = [[[max(v, Fraction(0)) for v in row] for row in rows] for rows in sums]


SMALLEST = [
    Case(channels=1, kernel_sizes=(3,), length=4, dtype="float64"),
    Case(channels=2, kernel_sizes=(3,), length=2, dtype="float64"),
    Case(channels=2, kernel_sizes=(1, 3), length=3, dtype="float64", num_blocks=2),
]


@pytest.mark.parametrize("case", SMALLEST, ids=str)
@pytest.mark.parametrize("kinkless", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_forward_bits_are_never_below_what_the_pass_needs(case, kinkless, seed):
    case = replace(case, seed=seed)
    _, blocks = stack(case)
    found = certify(blocks, case, bits="forward_bits", kinkless=kinkless)
    needed = max(needed_bits(v) for v in forward_intermediates(found.network, found.x))
    assert needed <= found.expected.forward_bits
    assert found.expected.forward_bits <= needed + 12


ODD = "^only convolutions of an odd kernel with stride, dilation and groups 1 and zero padding are"


@pytest.mark.parametrize(
    ("layer", "conv", "message"),
    [
        ("branch", nn.Conv1d(6, 3, 2), ODD),
        ("branch", nn.Conv1d(6, 3, 3, groups=3), ODD),
        ("branch", nn.Conv1d(6, 3, 3, padding_mode="circular"), ODD),
        ("branch", nn.Conv1d(5, 3, 3), r"^Conv1d\(5, 3, .* stands where 6 channels come in"),
        ("branch", nn.Conv1d(6, 2, 3), r"^Conv1d\(6, 6, .* stands where 5 channels come in"),
        ("branch", nn.Conv1d(6, 0, 3), r"^Conv1d\(6, 0, .* stands where 6 channels come in"),
        ("fusion", nn.Conv1d(6, 6, 1, groups=2), ODD),
        ("fusion", nn.Conv1d(6, 5, 1), r"^Conv1d\(6, 3, .* stands where 5 channels come in"),
    ],
)
def test_layers_of_another_architecture_have_no_oracle(layer, conv, message):
    """They are for other properties to falsify; here they are not a mistake of the suite."""
    config = Config(channels=6, num_blocks=2, kernel_sizes=(3, 3))
    first, second = contract_handles(ResCNNStack(6, 2, (3, 3)), config)
    changed = ConvNorm(conv, nn.BatchNorm1d(conv.out_channels))
    if layer == "branch":
        first = replace(first, branches=(changed, first.branches[1]))
    else:
        first = replace(first, fusion=changed)
    with pytest.raises(UnsupportedLayerError, match=message):
        read_network((first,))
    with pytest.raises(UnsupportedLayerError, match=message):
        read_network((first, second))
    with pytest.raises(UnsupportedLayerError, match=message):
        certify((first, second), Case(**vars(config), length=4), bits="forward_bits")


def test_blocks_of_different_channels_have_no_oracle():
    (wide,), (narrow,) = (
        contract_handles(
            ResCNNStack(channels, 1, (3,)),
            Config(channels=channels, num_blocks=1, kernel_sizes=(3,)),
        )
        for channels in (6, 4)
    )
    with pytest.raises(
        UnsupportedLayerError, match=r"^the blocks have different numbers of channels$"
    ):
        read_network((wide, narrow))
    assert len(read_network((narrow, narrow))) == 2


def test_branches_may_be_narrower_than_the_block_and_without_bias():
    pair = [
        ConvNorm(conv, nn.BatchNorm1d(conv.out_channels).double())
        for conv in (
            nn.Conv1d(6, 2, 3, bias=False).double(),
            nn.Conv1d(2, 6, 1, bias=False).double(),
        )
    ]
    (block,) = read_network([BlockHandles(None, (pair[0],), pair[1])])
    assert block.branches[0].bias.tolist() == [0, 0]
    assert block.fusion.bias.tolist() == [0] * 6
    for layer, own in zip((block.branches[0], block.fusion), pair, strict=True):
        assert np.array_equal(layer.weight, own.conv.weight.detach().numpy())


def backward_intermediates(network, x, v):
    """All that the backward pass of one block can come across: for inputs, and for weights."""
    [(*branches, fusion)] = fractions_of(network)
    x, v = as_lists(x, Fraction), as_lists(v, Fraction)
    for_inputs, for_weights = [], []

    def back(layer, rows, gradient):
        slopes = [s / r for s, r in zip(layer["scale"], layer["root"], strict=True)]
        length, taps = len(rows[0]), len(layer["weight"][0][0])
        terms = [[[] for _ in range(length)] for _ in rows]
        before = [[s * g for g in row] for s, row in zip(slopes, gradient, strict=True)]
        for o, c, k, t in itertools.product(
            range(len(before)), range(len(rows)), range(taps), range(length)
        ):
            place = t + k - taps // 2
            if 0 <= place < length:
                terms[c][place].append(layer["weight"][o][c][k] * before[o][t])
        for o, c, k in itertools.product(range(len(before)), range(len(rows)), range(taps)):
            products = [
                before[o][t] * rows[c][t + k - taps // 2]
                for t in range(length)
                if 0 <= t + k - taps // 2 < length
            ]
            for_weights.extend(partial_sums(products))
        for o, row in enumerate(gradient):
            for_weights.extend(partial_sums(row))
            for_weights.extend(partial_sums(before[o]))
            convolved = [
                sum(terms_of(layer["weight"][o], rows, t), layer["bias"][o]) for t in range(length)
            ]
            mean = layer["mean"][o]
            for_weights.extend(
                partial_sums(g * (z - mean) for g, z in zip(row, convolved, strict=True))
            )
            apart = [g * z for g, z in zip(row, convolved, strict=True)]
            for_weights.extend(partial_sums([*apart, *(-g * mean for g in row)]))
        for_inputs.extend(s for row in terms for at in row for s in partial_sums(at))
        return [[sum(at, Fraction(0)) for at in row] for row in terms]

    inside = [naive_layer(branch, x, Fraction)[0] for branch in branches]
    joined = [[max(value, Fraction(0)) for value in row] for part in inside for row in part]
    fused = naive_layer(fusion, [joined], Fraction)[0]
    through = [
        [g if p + q > 0 else Fraction(0) for g, p, q in zip(*rows, strict=True)]
        for rows in zip(v[0], x[0], fused, strict=True)
    ]
    behind = back(fusion, joined, through)
    collected = [[[g] for g in row] for row in through]
    for branch, part in zip(branches, inside, strict=True):
        own, behind = behind[: len(part)], behind[len(part) :]
        masked = [
            [g if p > 0 else Fraction(0) for g, p in zip(*rows, strict=True)]
            for rows in zip(own, part, strict=True)
        ]
        for sums, row in zip(collected, back(branch, x[0], masked), strict=True):
            for at, value in zip(sums, row, strict=True):
                at.append(value)
    for_inputs.extend(s for row in collected for at in row for s in partial_sums(at))
    return for_inputs, for_weights


@pytest.mark.parametrize("case", [SMALLEST[0], SMALLEST[1], TINY[2]], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_backward_bits_are_never_below_what_the_pass_needs(case, seed):
    found = certified(case, seed)
    for_inputs, for_weights = backward_intermediates(found.network, found.x, found.v)
    expected = found.expected
    assert max(map(needed_bits, for_inputs)) <= expected.backward_bits
    assert max(map(needed_bits, (*for_inputs, *for_weights))) <= expected.weight_bits
    assert expected.forward_bits <= expected.backward_bits <= expected.weight_bits
    assert expected.weight_bits <= max(
        expected.backward_bits, max(map(needed_bits, for_weights)) + 12
    )


def test_a_relu_at_exactly_0_is_a_kink():
    case = Case(channels=2, kernel_sizes=(3,), length=3, dtype="float64")
    found = certified(case, 0)
    assert not found.expected.kink
    nothing = np.zeros(case.shape)
    silent = [
        Block(tuple(silenced(branch) for branch in block.branches), silenced(block.fusion))
        for block in found.network
    ]
    assert exact_pass(tuple(silent), nothing, found.v).kink


def silenced(layer):
    zeros = {name: np.zeros_like(getattr(layer, name)) for name in ("weight", "bias", "shift")}
    return replace(layer, **zeros, mean=zeros["bias"])


def test_larger_inputs_need_more_bits():
    found = certified(TINY[1], 0)
    x = np.sign(found.x) + (found.x == 0)
    small = exact_pass(found.network, x, found.v, fraction=0.5)
    large = exact_pass(found.network, x * 2**12, found.v, fraction=0.5)
    assert large.forward_bits > small.forward_bits + 4
    assert large.weight_bits > small.weight_bits + 4


def one_tap(weight, shift):
    """A layer of one channel and one tap that multiplies and shifts."""
    numbers = {"weight": [[[weight]]], "bias": [0], "scale": [4], "shift": [shift], "mean": [0]}
    arrays = {name: np.array(values, dtype=np.float64) for name, values in numbers.items()}
    return Layer(**arrays, variance=np.array([16.0]), eps=0.0)


def row(*values):
    return np.array(values, dtype=np.float64)[None, None]


def test_the_gradients_that_meet_at_the_input_count():
    network = (Block((one_tap(1, 0),), one_tap(1, 0)),)
    found = exact_pass(network, row(1), row(2**20))
    assert found.input_gradient == 2**21
    assert found.backward_bits == 21


def test_the_sums_of_a_weight_gradient_count():
    network = (Block((one_tap(0, 1),), one_tap(1, 0)),)
    large = 2**20 - 1
    found = exact_pass(network, row(large, large, large, large), row(3, 3, 3, 3))
    assert found.gradients[0][0].weight == 12 * large
    assert found.weight_bits >= needed_bits(3 * large) + 2


def test_gradients_that_no_branch_passes_on_count():
    dead = one_tap(1, -5)
    found = exact_pass((Block((dead,), one_tap(8, 0)),), row(1), row(2**20))
    assert found.input_gradient == 2**20
    assert found.backward_bits == 23


def two_channels(weight, shift, mean=0):
    """Two channels that do not see each other, with one tap."""
    one = {"bias": 0, "scale": 4, "shift": shift, "mean": mean}
    arrays = {name: np.full(2, float(number)) for name, number in one.items()}
    return Layer(weight=weight * np.eye(2)[..., None], **arrays, variance=np.full(2, 16.0), eps=0.0)


def test_the_sum_of_a_shift_gradient_counts_channel_by_channel():
    network = (Block((two_channels(0, -1),), two_channels(0, 1)),)
    found = exact_pass(network, np.zeros((1, 2, 4)), np.full((1, 2, 4), 2.0**10))
    assert (found.gradients[0][1].shift == 2**12).all()
    assert found.weight_bits == 12


def test_the_sum_of_a_scale_gradient_counts_channel_by_channel():
    network = (Block((two_channels(0, -1),), two_channels(0, 2**11, mean=2**10)),)
    found = exact_pass(network, np.ones((1, 2, 1)), np.full((1, 2, 1), 2.0**12))
    assert (found.gradients[0][1].scale == -(2.0**20)).all()
    assert found.weight_bits == 22


def test_without_a_vector_there_is_no_backward_pass():
    found = certified(TINY[1], 0)
    forward = exact_pass(found.network, found.x, None, fraction=0.5)
    assert np.array_equal(forward.out, found.expected.out)
    assert forward.forward_bits == found.expected.forward_bits
    assert forward.backward_bits == forward.weight_bits == np.inf
    assert forward.gradients == ()


def two_blocks(first, second):
    """Blocks of one branch, given the shifts of branch and fusion; all else passes the input on."""
    return tuple(Block((one_tap(1, a),), one_tap(1, b)) for a, b in (first, second))


def test_the_bits_of_two_blocks_are_those_of_their_largest_sum():
    found = exact_pass(two_blocks((0.5, 0.25), (0.125, 0.0625)), row(1), None, fraction=0.5)
    assert found.out == 5.6875
    assert found.forward_bits == np.log2(5.6875 / 0.0625)


def test_nothing_needs_no_bits():
    x = row(0, 0)
    found = exact_pass((Block((one_tap(1, 0),), one_tap(1, 0)),), x, x, fraction=0.5)
    assert found.forward_bits == found.backward_bits == found.weight_bits == 0


@pytest.mark.filterwarnings("error")
def test_one_over_a_unit_of_a_half_needs_a_bit():
    found = exact_pass((Block((one_tap(0, 1),), one_tap(0, 0)),), row(0), None, fraction=0.5)
    assert found.forward_bits == 1


@pytest.mark.parametrize(
    ("first", "second", "kink"),
    [
        ((1, 1), (1, 1), False),
        ((-1, 1), (1, 1), True),  # the first block's branch
        ((-2, -1), (1, 1), True),  # its sum
        ((1, 1), (-4, 1), True),  # the second block's branch
        ((1, 1), (-9, -4), True),  # its sum
        ((-2, 1), (-3, 1), False),
    ],
)
@pytest.mark.parametrize("v", [None, row(1)])
def test_a_kink_anywhere_counts(first, second, kink, v):
    assert exact_pass(two_blocks(first, second), row(1), v).kink is kink


@pytest.mark.parametrize("v", [None, row(1)])
def test_the_masks_of_every_relu_come_in_order(v):
    found = exact_pass(two_blocks((-2, 0.5), (-1.25, -2)), row(1), v, fraction=0.5)
    assert [bool(mask) for mask in found.masks] == [False, True, True, False]
    silent = exact_pass(two_blocks((-1, -1), (0, 0)), row(1), v)
    assert [bool(mask) for mask in silent.masks] == [False] * 4


@pytest.mark.parametrize(("shifts", "gradient"), [((0, 1), 1), ((1, -1), 0), ((1, 1), 2)])
def test_no_gradient_passes_a_relu_at_exactly_0(shifts, gradient):
    network = (Block((one_tap(1, shifts[0]),), one_tap(1, shifts[1])),)
    assert exact_pass(network, row(0), row(1)).input_gradient == gradient
    found = real_pass(network, row(0), v=row(1), form=replace(ROUGH, smallest=0.0))
    assert found.input_gradient.value == gradient
    own = found.gradients[0]
    for layer, shut in zip(own, (gradient < 2, gradient < 1), strict=True):
        assert bool(layer.shift.error == 0) is shut


def test_the_unit_of_a_later_block_counts():
    fractions = [Fraction(1, 2**i) for i in range(1, 5)]
    network = tuple(
        Block((one_tap(1, float(a)),), one_tap(1, float(b)))
        for a, b in (fractions[:2], fractions[2:])
    )
    found = exact_pass(network, row(1), row(2**20 - 1), fraction=0.5)
    [gradient] = found.gradients[1][1].weight.flat
    assert gradient == Fraction(23, 8) * (2**20 - 1)
    assert found.weight_bits >= needed_bits(gradient) > 24


# --- real-valued networks ------------------------------------------------------------------------

DIGITS = 60
REAL = [
    Case(channels=1, kernel_sizes=(3,), length=5),
    Case(channels=2, kernel_sizes=(3, 1), length=4, batch=2),
    Case(channels=3, kernel_sizes=(5,), length=6, num_blocks=2),
    Case(channels=4, kernel_sizes=(3, 1, 3), length=5, num_blocks=3, batch=2),
]


def real(case, *, seed, mode, magnitude=1.0):
    case = replace(case, seed=seed, mode=mode, dtype="float64")
    model, blocks = stack(case)
    network = make_real(blocks, case, magnitude)
    x = values_of(case, case.rng("input").standard_normal(case.shape) * magnitude)
    return case, model, blocks, network, x


real_cases = pytest.mark.parametrize("case", REAL, ids=str)
both_modes = pytest.mark.parametrize("mode", ["eval", "train"])
magnitudes = pytest.mark.parametrize("magnitude", [1.0, 1e-9, 1e6])


class Precise:
    """A real-valued network and its input in decimals of 60 digits, as lists that may be changed.

    Args:
        network, x, train: as for `real_pass`.
        unbiased: normalise with the unbiased variance.
    """

    def __init__(self, network, x, *, train, unbiased=False):
        self.train, self.unbiased = train, unbiased
        self.blocks = [
            [
                {name: decimals(getattr(layer, name)) for name in (*NAMES, "variance", "eps")}
                for layer in (*block.branches, block.fusion)
            ]
            for block in network
        ]
        self.x = decimals(x)

    def forward(self):
        """The output, and each norm's mean and unbiased variance."""
        statistics = []
        with localcontext() as context:
            context.prec = DIGITS
            x = self.x
            for *branches, fusion in self.blocks:
                inside = [self.layer(branch, x, statistics) for branch in branches]
                joined = [
                    [[max(v, Decimal(0)) for v in row] for part in inside for row in part[b]]
                    for b in range(len(x))
                ]
                fused = self.layer(fusion, joined, statistics)
                x = [
                    [
                        [max(p + q, Decimal(0)) for p, q in zip(*rows, strict=True)]
                        for rows in zip(*pair, strict=True)
                    ]
                    for pair in zip(x, fused, strict=True)
                ]
        return x, statistics

    def layer(self, layer, x, statistics):
        out = [[] for _ in x]
        for o, weights in enumerate(layer["weight"]):
            rows = [
                [sum(terms_of(weights, sample, t), layer["bias"][o]) for t in range(len(sample[0]))]
                for sample in x
            ]
            mean, variance = layer["mean"][o], layer["variance"][o]
            if self.train:
                values = [v for row in rows for v in row]
                mean = sum(values) / len(values)
                squares = sum((v - mean) ** 2 for v in values)
                statistics.append((mean, squares / (len(values) - 1)))
                variance = squares / (len(values) - self.unbiased)
            slope = layer["scale"][o] / (variance + layer["eps"]).sqrt()
            for sample, row in zip(out, rows, strict=True):
                sample.append([(v - mean) * slope + layer["shift"][o] for v in row])
        return out

    def derivatives(self, variables, v):
        """Central differences of ⟨v, output⟩ by each number in nested lists, in their order."""
        v = list(leaves(decimals(v)))
        found = []
        with localcontext() as context:
            context.prec = DIGITS
            for values, i in places(variables):
                kept = values[i]
                step = max(abs(kept), Decimal("1e-6")) * Decimal("1e-20")
                ends = []
                for moved in (kept + step, kept - step):
                    values[i] = moved
                    out = leaves(self.forward()[0])
                    ends.append(sum(a * b for a, b in zip(out, v, strict=True)))
                values[i] = kept
                found.append((ends[0] - ends[1]) / (2 * step))
        return found


def decimals(array):
    return as_lists(np.asarray(array, dtype=np.float64), lambda v: Decimal(v))


def places(nested):
    """Where the numbers in nested lists are: lists and indices."""
    for i, part in enumerate(nested):
        if isinstance(part, list):
            yield from places(part)
        else:
            yield nested, i


def exact_decimal(value):
    """A number in extended precision without any rounding."""
    high = float(value)
    with localcontext() as context:
        context.prec = DIGITS
        return Decimal(high) + Decimal(float(value - np.longdouble(high)))


def errors(values, reference):
    with localcontext() as context:
        context.prec = DIGITS
        pairs = zip(np.asarray(values).flat, leaves(reference), strict=True)
        return np.array([float(abs(exact_decimal(v) - r)) for v, r in pairs])


def masked(blocks, masks, x):
    """A training pass of torch's own layers in which dropout keeps what masks say."""
    for block, mask in zip(blocks, masks, strict=True):
        parts = [torch.relu(branch.norm(branch.conv(x))) for branch in block.branches]
        fused = block.fusion.norm(block.fusion.conv(torch.cat(parts, dim=1)))
        x = torch.relu(x + torch.from_numpy(mask)[:, :, None] * fused)
    return x


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
def test_a_pass_with_masks_is_what_dropout_makes_of_the_network(p):
    compared = 0
    for seed in range(6):
        case, model, blocks, x = ordinary("train", seed, 1)
        kept = case.rng("masks").random((1, *x.shape[:2])) >= p
        masks = kept / (1 - p)
        plain = read_network(blocks)
        network = tuple(replace(b, mask=m) for b, m in zip(plain, masks, strict=True))
        v = cotangent(case)
        found = real_pass(network, x, v=v, train=True)
        leaf = torch.from_numpy(x).requires_grad_()
        model.zero_grad()
        out = masked(blocks, masks, leaf)
        out.backward(torch.from_numpy(v))
        within(out, found.out, "output")
        if found.kink:
            continue
        compared += 1
        within(leaf.grad, found.input_gradient, "gradient at the input")
        for what, got, bounded in gradients_beside(blocks, found.gradients):
            within(got, bounded, what)
    assert compared


@real_cases
@both_modes
@magnitudes
@pytest.mark.parametrize("seed", range(2))
def test_real_passes_agree_with_60_digits_and_the_bound_contains_torch(case, mode, magnitude, seed):
    case, model, _, network, x = real(case, seed=seed, mode=mode, magnitude=magnitude)
    found = real_pass(network, x, train=mode == "train").out
    reference, _ = Precise(network, x, train=mode == "train").forward()
    bound = found.error.ravel()
    finite = np.isfinite(bound)
    assert finite.all() or mode == "train"
    assert (errors(found.value, reference)[finite] <= bound[finite] / 200).all()
    with torch.no_grad():
        out = model(torch.from_numpy(x)).numpy()
    assert (errors(out, reference)[finite] <= bound[finite]).all()


@real_cases
@pytest.mark.parametrize("seed", range(2))
def test_training_leaves_the_statistics_within_their_bounds(case, seed):
    case, model, blocks, network, x = real(case, seed=seed, mode="train")
    found = real_pass(network, x, train=True)
    _, reference = Precise(network, x, train=True).forward()
    learned = [s for layers in found.statistics for s in layers]
    assert len(learned) == len(layers_of(network))
    means = np.concatenate([s.mean.value for s in learned])
    variances = np.concatenate([s.variance.value for s in learned])
    mean_errors = np.concatenate([s.mean.error for s in learned])
    variance_errors = np.concatenate([s.variance.error for s in learned])
    assert (errors(means, [mean for mean, _ in reference]) <= mean_errors / 200).all()
    assert (errors(variances, [var for _, var in reference]) <= variance_errors / 200).all()
    for block in blocks:
        for layer in block.layers:
            layer.norm.momentum = 1.0
    model(torch.from_numpy(x))
    norms = [layer.norm for block in blocks for layer in block.layers]
    own_means = torch.cat([norm.running_mean for norm in norms]).numpy()
    own_variances = torch.cat([norm.running_var for norm in norms]).numpy()
    assert (errors(own_means, [mean for mean, _ in reference]) <= mean_errors).all()
    slack = 2 * np.abs(own_variances) * 2.0**-53
    assert (errors(own_variances, [v for _, v in reference]) <= variance_errors + slack).all()


def test_most_training_passes_have_a_bound():
    bounded = 0
    for seed in range(20):
        _, _, _, network, x = real(REAL[1], seed=seed, mode="train")
        bounded += np.isfinite(real_pass(network, x, train=True).out.error).all()
    assert bounded >= 15


def ordinary(mode, seed=0, num_blocks=3):
    """A network as one is initialised, on standard normal data."""
    case = Case(channels=8, kernel_sizes=(3, 5, 7), length=60, batch=4, seed=seed)
    case = replace(case, num_blocks=num_blocks, mode=mode, dtype="float64")
    model, blocks = stack(case)
    return case, model, blocks, case.rng("input").standard_normal(case.shape)


@pytest.mark.parametrize(
    ("mode", "num_blocks", "least"), [("eval", 3, 1e-9), ("train", 1, 1e-8), ("train", 3, 1e-4)]
)
@pytest.mark.parametrize("seed", range(2))
def test_the_bound_says_something(mode, num_blocks, least, seed):
    _, _, blocks, x = ordinary(mode, seed, num_blocks)
    found = real_pass(read_network(blocks), x, train=mode == "train").out
    assert np.isfinite(found.error).all()
    alive = found.value > 0.01
    assert alive.mean() > 0.2
    assert (found.error[alive] < least * found.value[alive]).all()


def share_outside(got, found):
    off = np.abs(got.detach().double().numpy().astype(np.longdouble) - found.value)
    return float((off > found.error).mean())


@both_modes
def test_the_model_itself_is_inside_of_the_bound(mode):
    _, model, blocks, x = ordinary(mode)
    found = real_pass(read_network(blocks), x, train=mode == "train")
    assert share_outside(model(torch.from_numpy(x)), found.out) == 0


@both_modes
@pytest.mark.parametrize("eps", [1e-9, 0.9e-5, 1.001e-5, 1e-3])
def test_another_eps_is_outside_of_the_bound(mode, eps):
    _, model, blocks, x = ordinary(mode, num_blocks=2)
    found = real_pass(read_network(blocks), x, train=mode == "train")
    for block in blocks:
        for layer in block.layers:
            layer.norm.eps = eps
    assert share_outside(model(torch.from_numpy(x)), found.out) > 0.3


@both_modes
def test_a_cast_to_float32_is_outside_of_the_bound(mode):
    _, model, blocks, x = ordinary(mode, num_blocks=2)
    found = real_pass(read_network(blocks), x, train=mode == "train")
    rounded = torch.from_numpy(x).float().double()
    assert share_outside(model(rounded), found.out) > 0.3
    assert share_outside(model.float()(rounded.float()), found.out) > 0.3


def test_the_unbiased_variance_is_outside_of_the_bound():
    _, _, _, network, x = real(REAL[1], seed=0, mode="train")
    found = real_pass(network, x, train=True).out
    biased, _ = Precise(network, x, train=True).forward()
    other, _ = Precise(network, x, train=True, unbiased=True).forward()
    assert (errors(found.value, biased) <= found.error.ravel()).all()
    assert (errors(found.value, other) > found.error.ravel()).mean() > 0.3


@both_modes
def test_the_other_mode_is_outside_of_the_bound(mode):
    _, model, blocks, x = ordinary(mode)
    found = real_pass(read_network(blocks), x, train=mode == "train")
    model.train(mode == "eval")
    assert share_outside(model(torch.from_numpy(x)), found.out) > 0.3


def test_an_eval_pass_learns_nothing():
    _, _, blocks, x = ordinary("eval")
    assert all(layers == () for layers in real_pass(read_network(blocks), x).statistics)


def test_a_constant_channel_in_train_mode_has_no_bound():
    _, _, blocks, x = ordinary("train")
    with torch.no_grad():
        for block in blocks:
            for layer in block.layers:
                layer.norm.eps = 1e-40
                layer.conv.weight.zero_()
                layer.conv.bias.fill_(0.1)
    found = real_pass(read_network(blocks), x, train=True)
    assert not np.isfinite(found.out.error).all()
    assert found.kink


# --- gradients of real-valued networks -----------------------------------------------------------


def autograd(model, blocks, x, v):
    """Gradients at the input and at each parameter, in the dtype of the model."""
    dtype = next(model.parameters()).dtype
    x = torch.from_numpy(x).to(dtype).requires_grad_()
    model.zero_grad()
    model(x).backward(torch.from_numpy(v).to(dtype))
    return [x.grad, *(p.grad for p in itertools.chain.from_iterable(gradients_of(blocks)))]


def bounds_of(found):
    """Bounds in the order of `autograd`."""
    layers = itertools.chain.from_iterable(found.gradients)
    return [found.input_gradient, *itertools.chain.from_iterable(map(parts, layers))]


def cotangent(case):
    return case.rng("gradient").standard_normal(case.shape)


@functools.cache
def ordinary_pass(mode, seed=0, num_blocks=2):
    """The backward pass of an ordinary network; its model must be left as it is."""
    case, model, blocks, x = ordinary(mode, seed, num_blocks)
    v = cotangent(case)
    return model, blocks, x, v, real_pass(read_network(blocks), x, v=v, train=mode == "train")


@both_modes
@magnitudes
@pytest.mark.parametrize("case", [*REAL, Case(channels=7, kernel_sizes=(3, 5), length=40)], ids=str)
def test_gradients_of_torch_are_within_their_bounds(case, mode, magnitude):
    compared = 0
    for seed in range(4):
        case, model, blocks, network, x = real(case, seed=seed, mode=mode, magnitude=magnitude)
        v = cotangent(case)
        found = real_pass(network, x, v=v, train=mode == "train")
        if found.kink:
            continue
        compared += 1
        for i, pair in enumerate(zip(autograd(model, blocks, x, v), bounds_of(found), strict=True)):
            within(*pair, f"gradient {i} with seed {seed}")
    assert compared >= (4 if mode == "eval" else 1)


# Worst cases multiply: each norm of a batch's own statistics costs a digit or two, there and back.
@pytest.mark.parametrize(
    ("mode", "num_blocks", "least"),
    [("eval", 1, 1e-10), ("eval", 2, 1e-10), ("train", 1, 1e-7), ("train", 2, 1e-3)],
)
@pytest.mark.parametrize("seed", range(2))
def test_the_bounds_of_gradients_contain_torch_and_say_something(mode, num_blocks, least, seed):
    model, blocks, x, v, found = ordinary_pass(mode, seed, num_blocks)
    assert not found.kink
    kinds = ["x", *("weight", "bias", "scale", "shift") * (4 * num_blocks)]
    got = autograd(model, blocks, x, v)
    for kind, gradient, bounds in zip(kinds, got, bounds_of(found), strict=True):
        within(gradient, bounds, kind)
        size = np.abs(bounds.value)
        if kind == "bias" and mode == "train":
            # The batch's mean takes the bias away again.
            assert (bounds.error < 20 * least).all() and (size <= bounds.error).all()
        else:
            seen = size > 0
            assert np.median(bounds.error[seen] / size[seen]) < least, kind


TINY_REAL = [
    Case(channels=1, kernel_sizes=(3,), length=4),
    Case(channels=2, kernel_sizes=(3, 1), length=3, batch=2),
    Case(channels=2, kernel_sizes=(3,), length=4, num_blocks=2),
]


@pytest.mark.parametrize("case", TINY_REAL, ids=str)
@both_modes
@pytest.mark.parametrize("seed", range(2))
def test_gradients_agree_with_differences_of_60_digits(case, mode, seed):
    case, _, _, network, x = real(case, seed=seed, mode=mode)
    v = cotangent(case)
    found = real_pass(network, x, v=v, train=mode == "train")
    assert not found.kink
    precise = Precise(network, x, train=mode == "train")
    variables = [precise.x] + [
        layer[name]
        for block in precise.blocks
        for layer in block
        for name in ("weight", "bias", "scale", "shift")
    ]
    nonzero = 0
    for own, bounds in zip(variables, bounds_of(found), strict=True):
        reference = precise.derivatives(own, v)
        assert (errors(bounds.value, reference) <= bounds.error.ravel() / 200).all()
        nonzero += sum(abs(r) > 1e-10 for r in reference)
    assert nonzero >= 4


def test_a_pass_without_a_vector_has_no_gradients():
    _, _, blocks, x = ordinary("eval")
    found = real_pass(read_network(blocks), x)
    assert found.input_gradient is None
    assert found.gradients == ()


class Detached(nn.Module):
    """A norm in train mode through whose statistics no gradient flows."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        mean, variance = x.detach().mean((0, 2)), x.detach().var((0, 2), correction=0)
        weight, bias, eps = self.norm.weight, self.norm.bias, self.norm.eps
        return nn.functional.batch_norm(x, mean, variance, weight, bias, eps=eps)


def test_gradients_with_detached_statistics_are_outside_of_the_bounds():
    _, model, blocks, x = ordinary("train", num_blocks=2)
    _, _, _, v, found = ordinary_pass("train")
    for block in model.blocks:
        for part in (*block.branches, block.fusion):
            part[1] = Detached(part[1])
    with torch.no_grad():
        assert share_outside(model(torch.from_numpy(x)), found.out) == 0
    got, bounds = autograd(model, blocks, x, v), bounds_of(found)
    assert share_outside(got[0], bounds[0]) > 0.9
    for i in range(1, len(got), 4):
        weight, bias = i, i + 1
        assert share_outside(got[weight], bounds[weight]) > 0.9
        assert share_outside(got[bias], bounds[bias]) > 0.9
    # What the last norm multiplies by and adds comes after its statistics.
    assert share_outside(got[-2], bounds[-2]) == share_outside(got[-1], bounds[-1]) == 0


@pytest.mark.parametrize(("mode", "num_blocks"), [("eval", 2), ("train", 1)])
def test_gradients_through_float32_are_outside_of_the_bounds(mode, num_blocks):
    _, _, x, v, found = ordinary_pass(mode, num_blocks=num_blocks)
    _, model, blocks, _ = ordinary(mode, num_blocks=num_blocks)
    exact = [gradient.clone() for gradient in autograd(model, blocks, x, v)]
    single = autograd(model.float(), blocks, x, v)
    for i, bounds in enumerate(bounds_of(found)):
        if mode == "eval" or i % 4 != 2:
            alive = float((bounds.value != 0).mean())
            assert share_outside(exact[i].float(), bounds) > 0.3 * alive
            assert share_outside(single[i], bounds) > 0.8 * alive


@both_modes
def test_gradients_off_by_a_percent_are_outside_of_the_bounds(mode):
    model, blocks, x, v, found = ordinary_pass(mode)
    for i, pair in enumerate(zip(autograd(model, blocks, x, v), bounds_of(found), strict=True)):
        gradient, bounds = pair
        if mode == "eval" or i % 4 != 2:
            alive = float((bounds.value != 0).mean())
            assert share_outside(1.01 * gradient, bounds) == share_outside(0.99 * gradient, bounds)
            assert share_outside(1.01 * gradient, bounds) > 0.99 * alive > 0


# --- kinks ---------------------------------------------------------------------------------------

LAST_PLACE = 2.0**-56
near_zero = pytest.mark.parametrize(
    ("off", "kink"),
    [(0.0, True), (LAST_PLACE, True), (-LAST_PLACE, True), (1e-13, False), (-1e-13, False)],
)


@near_zero
@pytest.mark.parametrize("v", [None, row(1)])
def test_a_branch_within_its_error_of_0_is_a_kink(off, kink, v):
    network = (Block((one_tap(1, -0.1 + off),), one_tap(1, 0)),)
    assert real_pass(network, row(0.1), v=v).kink == kink


@near_zero
def test_a_sum_within_its_error_of_0_is_a_kink(off, kink):
    network = (Block((one_tap(1, -1),), one_tap(1, -0.1 + off)),)
    assert real_pass(network, row(0.1), v=row(1)).kink == kink


def test_one_kink_of_many_values_counts():
    network = (Block((one_tap(1, 0.5),), one_tap(1, 0.5)),)
    assert not real_pass(network, row(1, 2, -0.1, 3, 4)).kink
    assert real_pass(network, row(1, 2, -0.5, 3, 4)).kink
    first = (Block((one_tap(1, 0.5),), one_tap(1, 0.5)), *network)
    assert real_pass(first, row(1, 2, -0.5, 3, 4)).kink


# --- the running bounds, one number at a time -----------------------------------------------------


class Off:
    """A number and how far an evaluation may be from it."""

    def __init__(self, value, error=0.0):
        self.value, self.error = float(value), float(error)

    @property
    def most(self):
        return abs(self.value) + self.error

    def relu(self):
        error = self.error if self.value > 0 else max(0.0, self.value + self.error)
        return Off(max(self.value, 0.0), error)

    def masked(self, by):
        return self if by.value > 0 else Off(0.0)


class ByHand:
    """The running bounds of a network as `real_pass` documents them, in loops over single numbers.

    Rows are lists (sample, channel, place) of `Off`.
    """

    def __init__(self, network, x, *, train, form, v=None):
        self.train, self.form, self.statistics = train, form, []
        rows, tape = as_lists(x, Off), []
        for block in network:
            inside = [self.layer(branch, rows, 1) for branch in block.branches]
            joined = [
                [[a.relu() for a in row] for step in inside for row in step["out"][b]]
                for b in range(len(rows))
            ]
            fused = self.layer(block.fusion, joined, len(block.branches))
            terms = block.fusion.weight[0].size
            total = self.met(rows, fused["out"], terms, len(inside))
            tape.append((block, inside, fused, total))
            rows = mapped(Off.relu, total)
        self.out, self.gradients = rows, []
        if v is None:
            return
        gradient = as_lists(v, Off)
        for block, inside, fused, total in reversed(tape):
            gradient = zipped(Off.masked, gradient, total)
            back, fusion_gradients = self.back(block.fusion, fused, gradient)
            kernels = sum(branch.weight.shape[2] for branch in block.branches)
            own, at = [], 0
            for branch, step in zip(block.branches, inside, strict=True):
                end = at + branch.weight.shape[0]
                share = [sample[at:end] for sample in back]
                at = end
                part, grads = self.back(branch, step, zipped(Off.masked, share, step["out"]))
                # What comes through one branch is a sum over the fusion's outputs and all taps.
                terms = block.fusion.weight.shape[0] * kernels
                gradient = self.met(gradient, part, terms, kernels)
                own.append(grads)
            self.gradients.insert(0, [*own, fusion_gradients])
        self.input_gradient = gradient

    def met(self, first, second, terms, stored):
        """The sum of two sums: eight roundings more than either has terms."""
        own = self.form.gamma(terms + 8, stored + 8)

        def add(a, b):
            return Off(a.value + b.value, a.error + b.error + own * (a.most + b.most))

        return zipped(add, first, second)

    def layer(self, layer, rows, parts):
        """A sum of ``terms`` products and a bias; a norm of up to nine roundings more."""
        form, kernel = self.form, layer.weight.shape[2]
        terms, stored = layer.weight[0].size, kernel + parts + 2
        places = range(len(rows[0][0]))
        step = {"rows": rows, "statistics": None, "terms": terms}
        step |= {name: [[] for _ in rows] for name in ("out", "normal", "size")}
        step |= {"root": [], "relative": []}
        for o, weights in enumerate(layer.weight.tolist()):
            bias, scale, shift = (float(getattr(layer, n)[o]) for n in ("bias", "scale", "shift"))
            z, sizes = [], []
            for sample in rows:
                for t in places:
                    pairs = [
                        (w, sample[c][t + k - kernel // 2])
                        for c, taps in enumerate(weights)
                        for k, w in enumerate(taps)
                        if 0 <= t + k - kernel // 2 < len(places)
                    ]
                    size = sum(abs(w) * a.most for w, a in pairs) + abs(bias)
                    error = sum(abs(w) * a.error for w, a in pairs)
                    error += form.gamma(terms + 1, stored) * size + (terms + 1) * form.smallest
                    z.append(Off(sum(w * a.value for w, a in pairs) + bias, error))
                    sizes.append(size)
            if self.train:
                mean, variance = self.batch_statistics(z, sizes)
            else:
                mean, variance = Off(layer.mean[o]), Off(layer.variance[o])
            total = variance.value + layer.eps
            ratio = variance.error / (total - variance.error)
            relative = ratio / (math.sqrt(1 + ratio) + 1)  # √(1 + ratio) − 1 without cancellation
            root = 1 / math.sqrt(total)
            step["root"].append(root)
            step["relative"].append(relative)
            for at, (a, size) in enumerate(zip(z, sizes, strict=True)):
                size = root * (size + mean.most)
                normal = root * (a.value - mean.value)
                rounded = form.gamma(terms + 10, stored + 6)
                error = root * (1 + relative) * (a.error + mean.error) + relative * abs(normal)
                error += rounded * size * (1 + relative) + form.smallest
                out = abs(scale) * error + form.gamma(4, 4) * abs(scale) * (size + error)
                out += rounded * abs(shift) + form.smallest
                if at % len(places) == 0:
                    for name in ("out", "normal", "size"):
                        step[name][at // len(places)].append([])
                sample = at // len(places)
                step["out"][sample][-1].append(Off(scale * normal + shift, out))
                step["normal"][sample][-1].append(Off(normal, error))
                step["size"][sample][-1].append(size)
        return step

    def batch_statistics(self, z, sizes):
        form, m = self.form, len(z)
        sizes = [size + a.error for size, a in zip(sizes, z, strict=True)]
        mean = Off(
            sum(a.value for a in z) / m,
            sum(a.error + form.gamma(2 * m + 8, 8) * s for a, s in zip(z, sizes, strict=True)) / m,
        )
        squares = spread = 0.0
        for a in z:
            deviation = a.value - mean.value
            delta = a.error + mean.error + form.unit * abs(deviation)
            squares += deviation**2 / m
            spread += (2 * abs(deviation) * delta + delta**2) / m
        spread += form.gamma(3 * m + 8, 8) * sum(s**2 for s in sizes) / m
        variance = Off(squares, spread)
        learned = Off(squares * m / (m - 1), spread * m / (m - 1))
        self.statistics.append({"mean": mean, "variance": learned, "biased": variance})
        return mean, variance

    def back(self, layer, step, gradient):
        """Gradients at a layer's input and of its parameters."""
        form, kernel = self.form, layer.weight.shape[2]
        places = range(len(gradient[0][0]))
        spots = [(b, t) for b in range(len(gradient)) for t in places]
        m, before = len(spots), [[] for _ in gradient]
        grads = {name: [] for name in ("weight", "bias", "scale", "shift")}
        for o in range(len(layer.weight)):
            g = [gradient[b][o][t] for b, t in spots]
            n = [step["normal"][b][o][t] for b, t in spots]
            sizes = [step["size"][b][o][t] + step["normal"][b][o][t].error for b, t in spots]
            along_size = sum(a.most * s for a, s in zip(g, sizes, strict=True))
            along = Off(
                sum(a.value * b.value for a, b in zip(g, n, strict=True)),
                sum(abs(a.value) * b.error + a.error * b.most for a, b in zip(g, n, strict=True))
                + form.gamma(m + layer.weight[0].size + 10, len(gradient) + 10) * along_size,
            )
            total = summed(form, g, len(gradient))
            root, relative = step["root"][o], step["relative"][o]
            slope = abs(float(layer.scale[o])) * root
            dz = []
            for a, b, size in zip(g, n, sizes, strict=True):
                core, reach = Off(a.value, a.error), a.most
                if self.train:
                    core.value += -total.value / m - b.value * along.value / m
                    core.error += total.error / m + abs(b.value) * along.error / m
                    core.error += b.error * along.most / m
                    reach += sum(a.most for a in g) / m + size * along_size / m
                    core.error += form.gamma(6, 6) * reach
                error = slope * (1 + relative) * core.error
                error += slope * (relative + form.gamma(8, 8)) * reach + form.smallest
                dz.append(Off(float(layer.scale[o]) * root * core.value, error))
            for b in range(len(gradient)):
                before[b].append(dz[b * len(places) : (b + 1) * len(places)])
            grads["scale"].append(along)
            grads["shift"].append(total)
            grads["bias"].append(summed(form, dz, len(gradient)))
            taps = []
            for c in range(layer.weight.shape[1]):
                for k in range(kernel):
                    at = [(i, b, t + k - kernel // 2) for i, (b, t) in enumerate(spots)]
                    pairs = [
                        (dz[i], step["rows"][b][c][t]) for i, b, t in at if 0 <= t < len(places)
                    ]
                    value = sum(a.value * b.value for a, b in pairs)
                    error = sum(a.error * b.most + abs(a.value) * b.error for a, b in pairs)
                    error += form.gamma(m + 10, len(gradient) + 10) * sum(
                        a.most * b.most for a, b in pairs
                    )
                    taps.append(Off(value, error))
            grads["weight"].extend(taps)
        terms, out = len(layer.weight) * kernel, []
        for sample in before:
            out.append([])
            for c in range(layer.weight.shape[1]):
                out[-1].append([])
                for t in places:
                    pairs = [
                        (float(layer.weight[o, c, k]), row[t - k + kernel // 2])
                        for o, row in enumerate(sample)
                        for k in range(kernel)
                        if 0 <= t - k + kernel // 2 < len(places)
                    ]
                    error = sum(abs(w) * a.error for w, a in pairs)
                    size = sum(abs(w) * a.most for w, a in pairs)
                    error += form.gamma(terms + 2, kernel + 2) * size
                    out[-1][-1].append(Off(sum(w * a.value for w, a in pairs), error))
        return out, grads


def summed(form, numbers, batch):
    """A sum of m numbers: m roundings, some of what is stored: one for each sample, two more."""
    sizes = sum(a.most for a in numbers)
    error = sum(a.error for a in numbers) + form.gamma(len(numbers), batch + 2) * sizes
    return Off(sum(a.value for a in numbers), error)


def mapped(change, nested):
    if isinstance(nested, list):
        return [mapped(change, part) for part in nested]
    return change(nested)


def zipped(join, a, b):
    if isinstance(a, list):
        return [zipped(join, *pair) for pair in zip(a, b, strict=True)]
    return join(a, b)


# Sums and products of numbers that are not negative, each off by 2^-53 of its result at most, and
# fewer than 2^13 of them on the way to any; values cancel by a few bits, errors do not.
AGREE = 2.0**-38


def assert_agree(errors, numbers):
    np.testing.assert_allclose(errors.ravel(), [a.error for a in leaves(numbers)], AGREE, 0)


#: Neither what is stored nor what underflows vanishes beside the rest.
ROUGH = Format("rough", 2.0**-24, 2.0**-30, 2.0**-32, 2.0**127, np.float64)


def drawn_layer(rng, *shape):
    out = shape[0]
    return Layer(
        weight=rng.standard_normal(shape),
        bias=rng.standard_normal(out),
        scale=rng.standard_normal(out),
        shift=rng.standard_normal(out),
        mean=rng.standard_normal(out),
        variance=rng.uniform(0.5, 2, out),
        eps=0.25,
    )


def drawn_network(seed):
    """Two blocks of four channels, with branches of two and three channels, of three taps and one.

    No number of inputs, outputs, terms, branches or taps is another one's.
    """
    rng = np.random.default_rng(seed)
    network = tuple(
        Block(
            (drawn_layer(rng, 2, 4, 3), drawn_layer(rng, 3, 4, 1)),
            drawn_layer(rng, 4, 5, 1),
        )
        for _ in range(2)
    )
    return network, rng.standard_normal((2, 4, 5)), rng.standard_normal((2, 4, 5))


@both_modes
@pytest.mark.parametrize("seed", range(2))
def test_the_bounds_are_those_documented(mode, seed):
    network, x, v = drawn_network(seed)
    train = mode == "train"
    found = real_pass(network, x, v=v, train=train, form=ROUGH)
    expected = ByHand(network, x, v=v, train=train, form=ROUGH)
    assert_agree(found.out.error, expected.out)
    assert_agree(found.input_gradient.error, expected.input_gradient)
    learned = [s for layers in found.statistics for s in layers]
    assert len(learned) == (6 if train else 0)
    for name in ("mean", "variance", "biased"):
        bounds = [bound for s in learned for bound in getattr(s, name).error]
        assert_agree(np.array(bounds), [numbers[name] for numbers in expected.statistics])
    for layers, by_hand in zip(found.gradients, expected.gradients, strict=True):
        for layer, own in zip(layers, by_hand, strict=True):
            for name in ("weight", "bias", "scale", "shift"):
                assert_agree(getattr(layer, name).error, own[name])


# --- what a pass reaches --------------------------------------------------------------------------

#: Nothing is rounded, so that bounds are numbers to be worked out in the head.
UNROUNDED = Format("unrounded", 0.0, 0.0, 0.0, 8.0, np.float64)


def tap(weight, *, scale=1.0, shift=0.0, mean=0.0):
    """A layer of one channel and one tap, whose norm multiplies with the scale."""
    numbers = {"bias": 0.0, "scale": scale, "shift": shift, "mean": mean, "variance": 1.0}
    arrays = {name: np.array([value]) for name, value in numbers.items()}
    return Layer(weight=np.array([[[weight]]]), **arrays, eps=0.0)


IDENTITY = tap(1.0)
#: Name: branch, fusion, input and vector. In each the value named is 8 and all others are smaller.
EIGHT = {
    "a convolution": (tap(8.0, scale=1 / 8), IDENTITY, row(1), None),
    "a norm": (tap(1.0, scale=8.0), tap(1 / 8), row(1), None),
    "a norm before its shift": (tap(1.0, shift=-7.0), IDENTITY, row(1), None),
    "a norm before its mean": (tap(1.0, mean=7.0), IDENTITY, row(1), None),
    "the fusion's convolution": (IDENTITY, tap(8.0, scale=1 / 8), row(1), None),
    "the fusion's norm": (IDENTITY, tap(1.0, shift=-7.0), row(1), None),
    "a sum": (IDENTITY, IDENTITY, row(-1, 4), None),
    "a gradient before a norm": (tap(1 / 8, scale=8.0), IDENTITY, row(1 / 8), row(1)),
    "a gradient behind a branch": (tap(1 / 2), tap(8.0), row(1 / 2), row(1)),
    "a gradient before a branch": (tap(-8.0, shift=4.0), IDENTITY, row(1 / 8), row(1)),
    "a sum of gradients": (IDENTITY, IDENTITY, row(1 / 8), row(4)),
    "a weight's": (tap(1 / 2, scale=2.0), IDENTITY, row(2, 2), row(1, 1)),
    "a bias's": (tap(1 / 2, scale=2.0), IDENTITY, np.full((1, 1, 4), 1 / 2), np.ones((1, 1, 4))),
    "a scale's": (tap(2.0, scale=1 / 2), IDENTITY, row(2, 2), row(1, 1)),
    "a shift's": (tap(1 / 2), IDENTITY, np.full((1, 1, 4), 1 / 2), np.full((1, 1, 4), 2)),
    "the fusion's weight's": (IDENTITY, tap(1 / 2, scale=2.0), row(2, 2), row(1, 1)),
    "the fusion's scale's": (IDENTITY, tap(2.0, scale=1 / 2), row(2, 2), row(1, 1)),
}


@pytest.mark.parametrize("name", EIGHT)
def test_a_pass_is_in_range_if_all_it_comes_across_is_below_the_largest(name):
    branch, fusion, x, v = EIGHT[name]
    network = (Block((branch,), fusion),)
    for largest, in_range in ((8.0, False), (math.nextafter(8.0, 9.0), True)):
        found = real_pass(network, x, v=v, form=replace(UNROUNDED, largest=largest))
        assert found.in_range is in_range


@pytest.mark.parametrize(("v", "in_range"), [(None, True), (row(1, 0), False)])
def test_what_cancels_in_a_training_gradient_counts(v, in_range):
    """The fusion's norm gets 1 and 3: with their mean, 2, subtracted apart, 3 and 5 go into it.

    The gradients 1 and 0 are then 0 both, by 1 + 1/2 + 3 · 3/2 and 1/2 + 5 · 3/2 taken apart.
    """
    network = (Block((tap(1.0, shift=2.0),), tap(1.0, scale=1 / 8, shift=2.0)),)
    for largest in (8.0, math.nextafter(8.0, 9.0)):
        form = replace(UNROUNDED, largest=largest)
        found = real_pass(network, row(-1, 1), v=v, train=True, form=form)
        assert found.in_range is (in_range or largest > 8)


@pytest.mark.parametrize("v", [None, row(0)])
def test_a_pass_over_nothing_reaches_nothing(v):
    network = (Block((IDENTITY,), IDENTITY),)
    assert real_pass(network, row(0), v=v, form=replace(UNROUNDED, largest=5e-324)).in_range


@pytest.mark.parametrize(
    ("branch", "largest"), [(tap(7.5, scale=1 / 8), 8.0), (tap(1.0, scale=8.0), 14.0)]
)
def test_what_a_value_may_be_off_by_counts(branch, largest):
    """A product and its bias lose 2/4, so 7.5 may be 8; behind the norm 1 is off by 3/4."""
    network = (Block((branch,), tap(1 / 8)),)
    for most, in_range in ((largest, False), (math.nextafter(largest, 16.0), True)):
        form = replace(UNROUNDED, smallest=1 / 4, largest=most)
        assert real_pass(network, row(1), form=form).in_range is in_range


def test_a_variance_that_may_just_be_as_far_off_as_it_is_large_has_no_bound():
    """Values off by 2/4 have a mean off by as much: deviations off by 1, and so is the variance."""
    for eps, bounded in ((1.0, False), (2.0, True)):
        network = (Block((replace(IDENTITY, eps=eps),), replace(IDENTITY, eps=2.0**20)),)
        found = real_pass(network, row(1, 1), train=True, form=replace(UNROUNDED, smallest=1 / 4))
        assert np.isfinite(found.out.error).all() == bounded


def test_a_relu_cuts_off_what_is_surely_negative():
    cut = reals._relu(Bounded(np.array([2.0, -1.0, -1.0, 0.0]), np.array([0.5, 0.5, 3.0, 1.0])))
    assert cut.value.tolist() == [2, 0, 0, 0]
    assert cut.error.tolist() == [0.5, 0, 2, 1]


@pytest.mark.parametrize(("x", "kink"), [(0, True), (1, False), (-1, False)])
def test_a_relu_at_exactly_0_is_a_kink_even_without_round_off(x, kink):
    network = (Block((IDENTITY,), IDENTITY),)
    assert real_pass(network, row(x), form=UNROUNDED).kink is kink


def test_what_an_earlier_block_reaches_counts():
    large, small = Block((tap(8.0, scale=1 / 8),), tap(0.0)), Block((IDENTITY,), tap(0.0))
    for network in ((large, small), (small, large)):
        assert not real_pass(network, row(1), form=UNROUNDED).in_range
        assert not real_pass(network, row(1), v=row(1), form=UNROUNDED).in_range
    assert real_pass((small, small), row(1), v=row(1), form=UNROUNDED).in_range


def test_a_pass_somewhere_without_a_bound_is_not_in_range():
    """A batch that is the same everywhere, up to round-off, has no certain variance."""
    silent = replace(tap(0.0), eps=1.0)
    uncertain = Block((replace(tap(0.1), eps=1e-30),), silent)
    network = (uncertain, Block((silent,), silent))
    for v in (None, row(1, 1)):
        found = real_pass(network, row(1, 1), v=v, train=True, form=FORMATS["float32"])
        assert np.isnan(found.out.error).all()
        assert not found.in_range


def test_where_long_double_is_no_wider_float64_has_no_reference(monkeypatch):
    network = (Block((IDENTITY,), IDENTITY),)
    narrow = replace(FLOAT64, exact=np.float64)
    monkeypatch.setattr(reals, "FLOAT64", narrow)
    with pytest.raises(NotApplicable, match=r"^long double is no wider than float64 on this mac"):
        real_pass(network, row(1), form=narrow)
    assert real_pass(network, row(1), form=FORMATS["float32"]).out.value == 2
