"""The bounds hold, are tight where they say so, and wrong ones are caught."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rescnn import ResCNNStack
from rescnn_verify import error_bound, lipschitz_bound
from rescnn_verify.bounds import gains, norms, rounding
from rescnn_verify.bounds.gains import block_gain, stack_gain
from rescnn_verify.bounds.norms import conv_norm_bound
from rescnn_verify.bounds.rounding import (
    Approximation,
    UnknownOperationError,
    convolve,
    exactly,
    normalise,
)
from rescnn_verify.bounds.roundoff import FORMATS, TF32, Format, gamma
from rescnn_verify.case import Config
from rescnn_verify.finding import contract_handles
from rescnn_verify.oracles.layers import Block, Layer, UnsupportedLayerError
from rescnn_verify.oracles.real import Bounded, TrainStatistics, real_pass
from rescnn_verify.probes import randomise
from rescnn_verify.subject import DTYPES, environment
from tests import tightness
from tests.tightness import BOUNDS, dense, measure


@pytest.fixture(autouse=True)
def quiet_environment():
    with environment():
        yield


@pytest.mark.parametrize("name", BOUNDS)
def test_the_bound_holds(name):
    ratios = measure(name, 60, seed=1)
    assert ratios.max() <= 1


@pytest.mark.parametrize(
    ("name", "least"),
    [("norm, every length", 0.95), ("norm, one length", 0.97), ("gain, eval", 0.1)],
)
def test_the_bound_is_tight(name, least):
    assert np.median(measure(name, 100)) >= least


def test_a_known_norm():
    assert conv_norm_bound(np.array([[[1.0, 0.0, -1.0]]])) == pytest.approx(2, rel=0.02)
    # At length 2 the norm is 1, and the circulant of 3 points has √3 (that of 2 points has 0).
    found = conv_norm_bound(np.array([[[1.0, 0.0, -1.0]]]), length=2)
    assert found == pytest.approx(math.sqrt(3), rel=1e-6)
    assert conv_norm_bound(np.eye(3)[:, :, None]) == pytest.approx(1, rel=1e-6)
    assert conv_norm_bound(np.zeros((2, 3, 5))) == 0


@pytest.mark.parametrize("kernel", [2, 4])
def test_even_kernels_are_padded_on_either_side(kernel):
    weight = np.random.default_rng(0).standard_normal((3, 2, kernel))
    conv = nn.Conv1d(2, 3, kernel, padding="same", bias=False).double()
    with torch.no_grad():
        conv.weight.copy_(torch.from_numpy(weight))
    for length in (1, 2, 3, 9):
        x = torch.eye(2 * length, dtype=torch.float64).reshape(-1, 2, length)
        matrix = conv(x).detach().reshape(2 * length, -1).numpy()
        assert conv_norm_bound(weight, length=length) >= np.linalg.norm(matrix, 2)


def test_groups_are_independent():
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((6, 2, 3))
    whole = np.zeros((6, 4, 3))
    whole[:3, :2], whole[3:, 2:] = weight[:3], weight[3:]
    assert conv_norm_bound(weight, groups=2) >= np.linalg.norm(dense(whole, 12), 2)
    assert conv_norm_bound(weight, groups=2) == pytest.approx(conv_norm_bound(whole), rel=1e-6)


def test_a_matrix_of_zeros_has_a_largest_eigenvalue_of_almost_zero():
    zeros = torch.zeros(3, 4, 4, dtype=torch.complex128)
    assert 0 <= norms.largest_eigenvalue_bound([zeros]) < 1e-300


@pytest.mark.parametrize("size", [1e-150, 1e150, 1e307])
def test_norms_at_extreme_sizes(size):
    weight = np.random.default_rng(0).standard_normal((4, 3, 5))
    scaled = conv_norm_bound(weight * size) / size
    assert scaled == pytest.approx(conv_norm_bound(weight), rel=1e-12)


def test_power_iteration_stays_below_where_no_dense_matrix_fits():
    weight = np.random.default_rng(0).standard_normal((170, 512, 7))
    w = torch.from_numpy(weight)
    x = torch.randn(1, 512, 200, dtype=torch.float64)
    for _ in range(12):
        image = F.conv1d(x / x.norm(), w, padding=3)
        x = F.conv_transpose1d(image, w, padding=3)
    reached, bound = float(image.norm()), conv_norm_bound(weight)
    assert 0.9 * bound < reached <= bound


@pytest.mark.parametrize(
    ("weight", "options", "message"),
    [
        (np.ones((2, 3)), {}, r"shape \(out, in / groups, kernel\), got shape \(2, 3\)$"),
        (np.array([[[math.nan]]]), {}, r"got shape \(1, 1, 1\) with non-finite values$"),
        (np.ones((2, 3, 3)), {"groups": 3}, "^2 output channels are no multiple of 3 groups"),
        (np.ones((1, 1, 3)), {"groups": 0}, "groups must be at least 1, got 0"),
        (np.ones((1, 1, 3)), {"dilation": 0}, "dilation must be at least 1, got 0"),
        (np.ones((1, 1, 3)), {"length": 0}, "length must be at least 1, got 0"),
    ],
)
def test_what_is_no_convolution_is_refused(weight, options, message):
    with pytest.raises(ValueError, match=message):
        conv_norm_bound(weight, **options)


def small_stack(dtype=torch.float64, num_blocks=2):
    torch.manual_seed(0)
    model = ResCNNStack(6, num_blocks, (3, 5), 0.1).to(dtype)
    randomise(model, np.random.default_rng(0))
    return model.eval()


def test_the_lipschitz_bound_of_a_stack():
    model = small_stack()
    handles = contract_handles(model, Config(channels=6, num_blocks=2, kernel_sizes=(3, 5)))
    bound = lipschitz_bound(handles)
    x, y = torch.randn(2, 1, 6, 30, dtype=torch.float64)
    with torch.no_grad():
        assert float((model(x) - model(y)).norm() / (x - y).norm()) <= bound
    assert lipschitz_bound(handles, length=30) <= bound
    least = lipschitz_bound(handles, length=1)
    assert least == stack_gain(tightness.read_network(handles), length=1).norm < bound


@pytest.mark.parametrize(
    "change", [{"dilation": (2,)}, {"stride": (2,)}, {"padding_mode": "circular"}]
)
def test_layers_of_another_architecture_have_no_lipschitz_bound(change):
    handles = contract_handles(small_stack(), Config(channels=6, num_blocks=2, kernel_sizes=(3, 5)))
    for name, value in change.items():
        setattr(handles[0].branches[0].conv, name, value)
    with pytest.raises(UnsupportedLayerError, match="stride, dilation and groups 1"):
        lipschitz_bound(handles)


def test_a_stack_without_fusion_has_bound_one():
    model = small_stack()
    handles = contract_handles(model, Config(channels=6, num_blocks=2, kernel_sizes=(3, 5)))
    for block in handles:
        nn.init.zeros_(block.fusion.norm.weight)
    assert lipschitz_bound(handles) == pytest.approx(1, rel=1e-9)


# --- error_bound ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FORMATS)
def test_error_bound_of_a_stack(dtype):
    model = small_stack(DTYPES[dtype])
    x = torch.randn(2, 6, 20).to(DTYPES[dtype])
    found = error_bound(model, x)
    off = (model(x).double() - found.exact).abs()
    assert bool((off <= found.bound).all())
    assert bool((off > found.bound * 2**-20).any()), "the bound says nothing"
    assert found.exact.shape == found.bound.shape == x.shape


def test_error_bound_follows_sums_and_dilation():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv1d(4, 4, 3, dilation=2, padding=2, groups=2, bias=False)
            self.b = nn.Conv1d(4, 2, 5, stride=2, padding=1)
            self.norm = nn.BatchNorm1d(4, affine=False)

        def forward(self, x):
            y = self.norm(self.a(x)).relu_() + x
            return torch.cat([self.b(y), self.b(x)], dim=1)

    model, x = Other().eval(), torch.randn(2, 4, 21)
    found = error_bound(model, x)
    off = (model(x).double() - found.exact).abs()
    assert bool((off <= found.bound).all())
    assert float(found.bound.max()) < 1e-4


def test_error_bound_is_infinite_where_the_dtype_may_overflow():
    conv = nn.Conv1d(1, 1, 1, bias=False).half()
    nn.init.constant_(conv.weight, 300.0)
    assert bool(
        torch.isinf(error_bound(conv.eval(), torch.full((1, 1, 3), 300.0).half()).bound).all()
    )


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (nn.Tanh(), "tanh"),
        (nn.LayerNorm(5), "layer_norm"),
        (nn.Conv2d(1, 1, 1), "^error_bound knows one-dimensional"),
    ],
)
def test_an_unknown_operation_is_named(module, name):
    x = torch.randn(2, 1, 3, 5) if isinstance(module, nn.Conv2d) else torch.randn(2, 3, 5)
    with pytest.raises(UnknownOperationError, match=name):
        error_bound(module.eval(), x)


def test_error_bound_refuses_training_and_mixed_dtypes():
    model = small_stack()
    with pytest.raises(ValueError, match="eval"):
        error_bound(model.train(), torch.randn(1, 6, 9, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"x is torch.float32.*blocks.*torch.float64"):
        error_bound(model.eval(), torch.randn(1, 6, 9))
    with pytest.raises(ValueError, match="int64"):
        error_bound(model, torch.ones(1, 6, 9, dtype=torch.int64))


# --- wrong bounds are caught ---------------------------------------------------------------------


def violated(name, cases=200):
    return bool((measure(name, cases) > 1).any())


def test_the_circulant_of_the_same_length_is_no_bound(monkeypatch):
    largest_at = norms._largest_at

    def wrapped(weight, count, dilation):
        return largest_at(weight, max(1, count - dilation * (weight.shape[2] // 2)), dilation)

    monkeypatch.setattr(norms, "_largest_at", wrapped)
    assert violated("norm, one length")


def test_samples_without_the_factor_between_them_are_no_bound(monkeypatch):
    monkeypatch.setattr(norms, "OVERSAMPLING", 3)
    monkeypatch.setattr(math, "cos", lambda angle: 1.0)
    assert violated("norm, every length")


def test_the_product_of_norms_needs_its_one(monkeypatch):
    block_gain = gains.block_gain

    def wrapped(*arguments, **options):
        found = block_gain(*arguments, **options)
        return gains.Gain(found.departure, found.departure)

    monkeypatch.setattr(gains, "block_gain", wrapped)
    assert violated("gain, eval")


def test_running_statistics_are_not_those_of_training(monkeypatch):
    stack_gain = gains.stack_gain
    monkeypatch.setattr(
        tightness, "stack_gain", lambda network, trained=None, **rest: stack_gain(network, **rest)
    )
    assert violated("gain, train", 600)


@pytest.mark.parametrize("name", ["layer, float32", "layer, float64"])
def test_too_few_terms_are_seen(name, monkeypatch):
    monkeypatch.setattr(Format, "gamma", lambda self, terms, stored: gamma(1, self.unit))
    assert violated(name)


@pytest.mark.parametrize("name", ["layer, float16", "layer, bfloat16"])
def test_what_is_stored_counts(name, monkeypatch):
    monkeypatch.setattr(
        Format, "gamma", lambda self, terms, stored: gamma(terms, self.accumulation)
    )
    assert violated(name)


def test_tf32_left_on_is_seen(monkeypatch):
    monkeypatch.setattr(tightness, "TF32", FORMATS["float32"])
    assert violated("output, TF32")


def test_batch_statistics_in_eval_are_seen():
    model, x = small_stack(num_blocks=1), torch.randn(2, 6, 20, dtype=torch.float64)
    handles = contract_handles(model, Config(channels=6, num_blocks=1, kernel_sizes=(3, 5)))
    network = tightness.read_network(handles)
    wrong = real_pass(network, x.numpy(), train=True).out
    assert bool((np.abs(model(x).detach().numpy() - wrong.value) > wrong.error).any())


def test_formats_are_those_of_torch():
    for name, form in FORMATS.items():
        info = torch.finfo(DTYPES[name])
        assert form.unit == info.eps / 2
        assert form.largest <= info.max < 4 * form.largest
        assert form.smallest <= max(info.tiny, info.smallest_normal)
    assert TF32.unit == FORMATS["float16"].unit


# --- numbers worked out by hand ------------------------------------------------------------------


def test_gamma_is_that_of_lemma_3_1():
    assert gamma(3, 2.0**-4) == (3 / 16) / (13 / 16)
    assert gamma(15, 2.0**-4) == 15
    assert gamma(16, 2.0**-4) == gamma(17, 2.0**-4) == math.inf
    assert gamma(2) == 2.0**-52 / (1 - 2.0**-52)


def test_the_gamma_of_a_format_counts_what_it_stores_once_more():
    """With what it computes with on top, which is below 2^-10 of it."""
    same = Format("same", 2.0**-4, 2.0**-4, 0.0, 1.0, np.float32)
    assert same.gamma(8, 3) == 1 + 2.0**-10
    wider = Format("wider", 2.0**-4, 2.0**-5, 0.0, 1.0, np.float32)
    assert wider.gamma(16, 8) == (1 + 1 * (1 + 1)) * (1 + 2.0**-10)
    assert type(wider.gamma(16, 8)) is np.float32


def test_the_formats_are_these():
    for name, unit, accumulation, smallest, largest, exact in (
        ("float64", 2.0**-53, 2.0**-53, 2.0**-1074, 2.0**1023, np.longdouble),
        ("float32", 2.0**-24, 2.0**-24, 2.0**-126, 2.0**127, np.float64),
        ("float16", 2.0**-11, 2.0**-24, 2.0**-24, 2.0**15, np.float64),
        ("bfloat16", 2.0**-8, 2.0**-24, 2.0**-126, 2.0**127, np.float64),
    ):
        form = Format(name, unit, accumulation, smallest, largest, exact)
        assert FORMATS[name] == form
    assert replace(FORMATS["float32"], unit=2.0**-11) == TF32


#: What certifying a singular value may add to it: half of the 1e-9 by which its square is raised.
#: Nothing here takes more than four.
CERTIFIED = (1 + 1e-9) ** 2


def assert_bounds(found, exact):
    assert exact <= found <= exact * CERTIFIED


@pytest.mark.parametrize(
    ("taps", "dilation", "lengths"),
    [
        # |1 - exp(-2iω)| is 2 at π/2, one of 24 frequencies, and √3 at 2π/3, one of 3.
        ((1, 0, -1), 1, {None: 2 / math.cos(math.pi / 24), 2: math.sqrt(3), 1: 0}),
        # Dilated by 2, 4 points: those that are twice as far apart, so 0 and π.
        ((1, 0, -1), 2, {None: 2 / math.cos(math.pi / 24), 2: 0, 3: 2 * math.sin(2 * math.pi / 5)}),
        # As large as its sum; at length 5 the outer taps meet nothing when dilated by 5.
        ((1, 1, 1), 5, {None: 3 / math.cos(math.pi / 24), 5: 1, 6: 3}),
        ((1, 2, 4, 2, 1), 2, {None: 10 / math.cos(math.pi / 24), 2: 4, 3: 8, 4: 8, 5: 10}),
        ((3,), 1, {None: 3, 1: 3, 100: 3}),
        # 24 points are no fewer than 24.
        ((1, 1, 1), 1, {22: 3, 23: 3 / math.cos(math.pi / 24)}),
        ((0, 0, 0), 1, {None: 0, 1: 0}),
    ],
)
def test_norms_by_hand(taps, dilation, lengths):
    weight = np.array([[taps]], dtype=np.float64)
    for length, norm in lengths.items():
        assert_bounds(conv_norm_bound(weight, length=length, dilation=dilation), norm)


def test_a_norm_is_that_of_the_weights_in_float64():
    weight = np.random.default_rng(0).standard_normal((3, 2, 5)).astype(np.float32)
    assert conv_norm_bound(weight) == conv_norm_bound(weight.astype(np.float64))
    assert conv_norm_bound(np.ones((0, 2, 3))) == conv_norm_bound(np.ones((2, 0, 3))) == 0


def test_a_norm_between_every_other_sample_counts():
    """|Ŵ|² = 5 + b² + 2b cos ω − 4 cos 2ω is largest where cos ω = b/8: at the first of 24."""
    angle = math.pi / 12
    b = 8 * math.cos(angle)
    norm = math.sqrt(5 + b**2 + 2 * b * math.cos(angle) - 4 * math.cos(2 * angle))
    assert_bounds(conv_norm_bound(np.array([[[2, b, -1]]])), norm / math.cos(math.pi / 24))


@pytest.mark.parametrize(("error", "bound"), [(0.0, 5), (0.5, 5 + 2 * 0.5)])
def test_the_largest_eigenvalue_is_that_of_any_matrix_of_any_batch(error, bound):
    """What a matrix is off by counts twice: for the one that is tried, and for any other."""
    matrices = [np.diag(values) for values in ((1, 2), (3, 1), (2, 0), (5, 0), (0, 4), (4, 1))]
    tensors = torch.from_numpy(np.array(matrices, dtype=np.complex128))
    for batches in (tensors.split(6), tensors.split(2), tensors.split(1), tensors.flip(0).split(4)):
        assert_bounds(norms.largest_eigenvalue_bound(batches, error), bound)
    assert norms.largest_eigenvalue_bound([], error) == pytest.approx(error, rel=2.0**-40)


def test_a_norm_includes_its_own_round_off(monkeypatch):
    """As if a rounding were off by 2^-20 of the result, and without rounding: so to 2^-40."""
    unit = 2.0**-20
    monkeypatch.setattr(norms, "gamma", lambda terms: terms * unit)
    monkeypatch.setattr(norms, "UNIT", {"float64": unit})
    weight = np.zeros((2, 3, 3))
    weight[0, 0, 1], weight[1, 1, 1] = 1, 2
    # In units of 2, Ŵ is diagonal with 1/2 and 1, and ŴŴ* is off by 150 roundings of 5/4, a number
    # summed of 18.
    error = 2 * (3**2 * 3 + 48) * unit * (1 / 4 + 1) * (1 + (18 + 8) * unit)
    own = 4 * (2 + 2) * unit
    certified = (1 + error) * (1 + 1e-9 + 4 * own * 2) + error
    trace = 2 * (own / (1 - own) + unit)
    norm = math.sqrt(certified * (1 + trace) * (1 + 8 * unit)) / math.cos(math.pi / 24)
    assert conv_norm_bound(weight) == pytest.approx(2 * norm * (1 + 4 * unit), rel=2.0**-40)


def plain(weight, *, scale=1.0, variance=1.0, eps=0.0):
    """A layer without anything but weights and the factor of its norm."""
    weight = np.array(weight, dtype=np.float64)
    nothing = np.zeros(len(weight))
    return Layer(weight, nothing, nothing + scale, nothing, nothing, nothing + variance, eps)


def scalars(w, f):
    """A block y = relu(x + f relu(w x)) of one channel."""
    return Block((plain([[[w]]]),), plain([[[f]]]))


@pytest.mark.parametrize(
    ("w", "f", "norm", "departure"),
    [
        (2, 3, 7, 6),
        # |1 - 1/2| + 1/2 and |1 - 3| + 3: signs that shorten.
        (-1, 1, 1, 1),
        (2, -3, 5, 6),
        (0, 3, 1, 0),
        (3, 0, 1, 0),
    ],
)
def test_the_gain_of_a_block_of_one_channel(w, f, norm, departure):
    for length in (None, 1, 5):
        found = block_gain(scalars(w, f), length=length)
        assert_bounds(found.norm, norm)
        assert_bounds(found.departure, departure)


def test_the_gain_of_a_stack_is_a_product():
    found = stack_gain([scalars(1, 1), scalars(1, 2), scalars(-1, 1)])
    assert_bounds(found.norm, 2 * 3 * 1)
    assert_bounds(found.departure, 2 * 3 * 2 - 1)
    wide = Block((plain([[[1, 1, 1, 1, 1]]]),), plain([[[1]]]))
    assert_bounds(stack_gain([wide, wide], length=1).norm, 2 * 2)
    assert_bounds(stack_gain([]).norm, 1)
    assert stack_gain([]).departure < 1e-15


def test_the_gain_balances_what_goes_into_the_fusion_with_what_comes_out():
    """‖F‖‖W‖ is 17; with both channels brought to 2 and 2 it is √8 · √8, which is ‖FW‖, too."""
    block = Block((plain([[[1]]]), plain([[[4]]])), plain([[[4], [1]]]))
    assert_bounds(block_gain(block).departure, 8)
    # A channel that goes nowhere, or comes from nowhere, is left as it is: (4, 0) to (2, 0).
    block = Block((plain([[[1]]]), plain([[[4]]])), plain([[[4], [0]]]))
    assert_bounds(block_gain(block).departure, 2 * math.sqrt(2**2 + 4**2))
    block = Block((plain([[[4]]]), plain([[[0]]])), plain([[[1], [1]]]))
    assert_bounds(block_gain(block).departure, math.sqrt(2**2 + 1**2) * 2)


def test_small_channels_are_balanced_too_and_dropped_ones_go_nowhere():
    block = Block((plain([[[1 / 16]]]), plain([[[4 / 16]]])), plain([[[4 / 16], [1 / 16]]]))
    assert_bounds(block_gain(block).departure, 8 / 16**2)
    assert_bounds(block_gain(block, dropout=0.5).departure, 16 / 16**2)
    found = block_gain(block, dropout=1.0)
    assert_bounds(found.norm, 1)
    assert found.departure == 0


def test_branches_of_different_kernels_are_centred():
    """At length 1 only the taps in the middle count: ‖(3, 4)‖ · ‖(5, 12)‖, and 3 · 5 + 4 · 12.

    The fusion is balanced with all taps; here that shortens the second block only.
    """
    row = math.sqrt(7**2 + 12**2 + 8**2)
    balanced = math.sqrt((3 * 5 + 4 * row) * (3 * 5**2 / 5 + 4 * 12**2 / row))
    for branches, departure, norm in (
        (([[[7, 5, 8]]], [[[12]]]), 5 * 13, 1 + 63 / 2 + 65 / 2),
        (([[[5]]], [[[7, 12, 8]]]), balanced, 1 + balanced),
    ):
        block = Block(tuple(plain(weight) for weight in branches), plain([[[3], [4]]]))
        found = block_gain(block, length=1)
        assert_bounds(found.departure, departure)
        assert_bounds(found.norm, norm)


def test_a_norm_scales_the_gain():
    slow = Block((plain([[[1]]], scale=-6, variance=3.75, eps=0.25),), plain([[[1]]]))
    assert_bounds(block_gain(slow).departure, 3)
    assert_bounds(block_gain(replace(slow, fusion=slow.branches[0])).departure, 9)


def test_in_training_the_gain_is_that_of_the_least_variance_and_of_the_channels_that_stay():
    def learned(value, error):
        one = Bounded(np.array([value]), np.array([error]))
        return TrainStatistics(None, None, one)

    statistics = (learned(5.0, 1.0), learned(0.5, 1.0))
    block = Block((plain([[[6]]], eps=0.0),), plain([[[1]]], eps=0.25))
    # The slopes are 1/√4 and 1/√(0 + 1/4).
    for dropout, departure in ((0.0, 6), (0.75, 24), (1.0, 0)):
        found = block_gain(block, statistics=statistics, dropout=dropout)
        assert_bounds(found.departure, departure)
        assert_bounds(found.norm, 1 + departure)
        # A stack takes the statistics of each block's own layers.
        trained = SimpleNamespace(statistics=((), statistics))
        found = stack_gain([scalars(0, 0), block], trained=trained, dropout=dropout)
        assert_bounds(found.norm, 1 + departure)


def test_signs_shorten_nothing_in_training():
    """‖I + ½FW‖ + ½‖F‖‖W‖ is for a norm that multiplies; one of a batch also subtracts."""
    one = Bounded(np.array([1.0]), np.array([0.0]))
    statistics = (TrainStatistics(one, one, one),) * 2
    assert_bounds(block_gain(scalars(-1, 1)).norm, 1)
    assert_bounds(block_gain(scalars(-1, 1), statistics=statistics).norm, 2)


def test_the_gain_includes_its_own_round_off(monkeypatch):
    """As if a rounding were off by 2^-10 of the result: in slopes by 8, in products by 16."""
    monkeypatch.setattr(gains, "gamma", lambda terms: terms * 2.0**-10)
    slope, product = 1 + 8 * 2.0**-10, 1 + 16 * 2.0**-10
    a = slope**2
    found = block_gain(scalars(1, 1))
    assert_bounds(found.departure, a * product)
    assert_bounds(found.norm, (1 + a * product) * product)
    # Two channels and three between them: what is summed to I + FW/2 is off by 23 roundings of
    # |F||W| + 1, elementwise, the norm of that by as many as FW has elements, and 8.
    inside, fusion = np.zeros((3, 2, 3)), np.zeros((2, 3, 1))
    inside[[0, 1], [0, 1], 1], fusion[[0, 1], [0, 1], 0] = 1, -1
    found = block_gain(Block((plain(inside),), plain(fusion)), length=1)
    off = 23 * 2.0**-10 * math.sqrt(2 * (a + 1) ** 2 + 2) * (1 + (12 + 8) * 2.0**-10)
    assert_bounds(found.departure, a * product)
    assert_bounds(found.norm, (1 - a / 2 + off + a * product / 2) * product)
    blocks = [scalars(1, 1), scalars(1, 1)]
    own, through = 12 * 2.0**-10, (1 + a * product) ** 2
    assert_bounds(stack_gain(blocks).norm, through * product**2 * (1 + own))
    assert_bounds(stack_gain(blocks).departure, (through - 1) * (1 + own) + through * own)


# --- error_bound by hand -------------------------------------------------------------------------


def tensor(*values):
    """Of one sample and as many channels as there are rows."""
    return torch.tensor([values], dtype=torch.float64)


def approximation(exact, bound):
    return Approximation(tensor(*exact), tensor(*bound))


def assert_is(found, exact, bound):
    """Equal but for what float64 makes of a few sums and products: far less than 2^-40."""
    assert found.value[0].tolist() == [list(row) for row in exact]
    np.testing.assert_allclose(found.error[0], bound, 2.0**-40, 0)


def by_name(form):
    return form.dtype


@pytest.mark.parametrize("form", FORMATS.values(), ids=by_name)
def test_a_convolution_is_off_by_its_sum_and_two_roundings_of_what_is_stored(form):
    """In float64 by twice that: the reference is no wider."""
    x = approximation([(2, -4)], [(0.5, 0.25)])
    twice = 2 if form.dtype == "float64" else 1

    def own(terms):
        return twice * float(form.gamma(terms, 2))

    found = convolve(form, x, tensor((-3,)), torch.tensor([-1.0]).double())
    bound = [
        3 * b + own(2) * (3 * a + 1) + 2 * form.smallest for a, b in ((2.5, 0.5), (4.25, 0.25))
    ]
    assert_is(found, [(-7, 11)], [bound])
    found = convolve(form, x, tensor((1, 2, 3)), None, padding=1, stride=2)
    bound = 2 * 0.5 + 3 * 0.25 + own(4) * (2 * 2.5 + 3 * 4.25) + 4 * form.smallest
    assert_is(found, [(-8,)], [[bound]])
    # Of two groups, each sums over one channel.
    both = approximation([(2,), (-4,)], [(0.5,), (0.25,)])
    weight = torch.tensor([[[1.0]], [[2.0]]]).double()
    bound = [
        [0.5 + own(2) * 2.5 + 2 * form.smallest],
        [2 * 0.25 + own(2) * 2 * 4.25 + 2 * form.smallest],
    ]
    assert_is(convolve(form, both, weight, None, groups=2), [(2,), (-8,)], bound)


@pytest.mark.parametrize("form", FORMATS.values(), ids=by_name)
def test_a_norm_is_off_by_nine_roundings_of_what_cancels_in_it(form):
    numbers = ((6, 1), (-5, 4), (-1, 2), (3.75, 0.75))  # scale, shift, mean, variance
    given = [torch.tensor(pair, dtype=torch.float64) for pair in numbers]
    x = approximation([(2, 0), (1, 2)], [(0.5, 0), (0, 0.25)])
    found = normalise(form, x, *given, 0.25)
    own = (2 if form.dtype == "float64" else 1) * float(form.gamma(9, 9))
    lost = 4 * form.smallest
    # The slopes are 6/√4 and 1/√1.
    bound = [
        [3 * 0.5 + own * (3 * (2.5 + 1) + 5) + lost, own * (3 * 1 + 5) + lost],
        [own * (1 + 2 + 4) + lost, 0.25 + own * (2.25 + 2 + 4) + lost],
    ]
    assert_is(found, [(4, -2), (3, 4)], bound)


def test_what_may_overflow_has_no_bound():
    form = Format("narrow", 0.0, 0.0, 0.0, 8.0, np.float64)
    one = torch.ones(1, dtype=torch.float64)
    x = approximation([(7, 7.5, -7.5, -8)], [(0.5, 0.5, 0.5, 0)])
    bound = [[0.5, math.inf, math.inf, math.inf]]
    for found in (
        convolve(form, x, tensor((1,)), None),
        normalise(form, x, one, 0 * one, 0 * one, one, 0.0),
        rounding._add(form, x, approximation([(0,) * 4], [(0,) * 4])),
    ):
        assert_is(found, x.value[0].tolist(), bound)


SUMS = "^error_bound knows sums of two tensors without a factor"


@pytest.mark.parametrize("alpha", [2, -1])
def test_sums_with_a_factor_or_a_number_have_no_bound(alpha):
    x = approximation([(1,)], [(0,)])
    for b, factor in ((x, alpha), (1.0, 1), (1.0, alpha)):
        with pytest.raises(UnknownOperationError, match=SUMS):
            rounding._add(FORMATS["float64"], x, b, alpha=factor)


def test_a_relu_cuts_off_what_is_surely_negative():
    x = approximation([(2, -1, -1, 0)], [(0.5, 0.5, 3, 1)])
    assert_is(rounding._relu(FORMATS["float64"], x), [(2, 0, 0, 0)], [(0.5, 0, 2, 1)])


def test_a_concatenation_is_one_of_samples_unless_said():
    x = approximation([(1,)], [(0.5,)])
    found = rounding._cat(FORMATS["float64"], [x, x])
    assert found.exact.shape == found.bound.shape == (2, 1, 1)


class Joined(nn.Module):
    """All operations that there are bounds for."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Conv1d(1, 2, 1)
        self.plain = nn.BatchNorm1d(2, affine=False, eps=0.5)
        self.scaled = nn.BatchNorm1d(2, eps=0.75)
        randomise(self, np.random.default_rng(0))

    def forward(self, x):
        y = self.wide(x)
        z = torch.relu(self.scaled(y)) + y
        return torch.cat([self.plain(y), F.dropout(z, 0.5, self.training)], 2)


@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_the_bound_of_a_network_is_that_of_its_operations(dtype):
    form, model = FORMATS[dtype], Joined().eval().to(DTYPES[dtype])
    x = torch.tensor([[[3.0, -2.0]]]).to(DTYPES[dtype])
    found = error_bound(model, x)
    assert found.exact.dtype == found.bound.dtype == torch.float64

    def of(norm, *, scale, shift):
        given = (scale, shift, norm.running_mean, norm.running_var)
        return normalise(form, y, *(t.double() for t in given), norm.eps)

    y = convolve(form, exactly(x), model.wide.weight.double(), model.wide.bias.double())
    one = torch.ones(2)
    plain = of(model.plain, scale=one, shift=0 * one)
    z = rounding._relu(form, of(model.scaled, scale=model.scaled.weight, shift=model.scaled.bias))
    own = (2 if dtype == "float64" else 1) * float(form.gamma(1, 1))
    sums = z.exact + y.exact, z.bound + y.bound + own * (z.most + y.most)
    assert torch.equal(found.exact, torch.cat([plain.exact, sums[0]], 2))
    torch.testing.assert_close(
        found.bound, torch.cat([plain.bound, sums[1]], 2), rtol=2.0**-40, atol=0
    )


def test_tf32_counts_only_where_it_is_used(monkeypatch):
    class There:
        dtype, is_cuda = torch.float32, True

    class There64(There):
        dtype = torch.float64

    for allowed, there in ((True, TF32), (False, FORMATS["float32"])):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
        assert rounding._format_of(nn.Identity(), There()) is there
        assert rounding._format_of(nn.Identity(), There64()) is FORMATS["float64"]
        assert rounding._format_of(nn.Identity(), torch.ones(1)) is FORMATS["float32"]
