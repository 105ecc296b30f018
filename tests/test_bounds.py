"""The bounds hold, are tight where they say so, and wrong ones are caught."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rescnn import ResCNNStack
from rescnn_verify import error_bound, lipschitz_bound
from rescnn_verify.bounds import gains, norms
from rescnn_verify.bounds.norms import conv_norm_bound
from rescnn_verify.bounds.rounding import UnknownOperationError
from rescnn_verify.bounds.roundoff import FORMATS, TF32, Format, gamma
from rescnn_verify.case import Config
from rescnn_verify.handles import contract_handles
from rescnn_verify.oracles.layers import UnsupportedLayerError
from rescnn_verify.oracles.real import real_pass
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
        (np.ones((2, 3)), {}, r"shape \(out, in / groups, kernel\)"),
        (np.array([[[math.nan]]]), {}, "non-finite"),
        (np.ones((2, 1, 3)), {"groups": 3}, "no multiple of 3 groups"),
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
    [(nn.Tanh(), "tanh"), (nn.LayerNorm(5), "layer_norm"), (nn.Conv2d(1, 1, 1), "one-dim")],
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
