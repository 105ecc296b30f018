"""Comparisons hold, or say what was expected and what was got."""

import math
import pickle

import numpy as np
import pytest
import torch

from rescnn_verify.compare import (
    Comparison,
    Falsified,
    at_most,
    attempt,
    equal,
    holds,
    refuses,
    same_bits,
    same_tensors,
    same_values,
    within,
)
from rescnn_verify.oracles.real import Bounded

NAN, INF = math.nan, math.inf


def falsification(action):
    """The error of a comparison that must not hold."""
    with pytest.raises(Falsified) as found:
        action()
    return found.value


def test_a_true_condition_holds():
    assert holds(True, "the sum", "1", "2") == Comparison("the sum")


def test_a_false_condition_says_what_was_expected_and_got():
    error = falsification(lambda: holds(False, "the sum", "three", "four"))
    assert (error.what, error.expected, error.got) == ("the sum", "three", "four")
    assert str(error) == "the sum: expected three, got four"
    assert isinstance(error, AssertionError)


@pytest.mark.parametrize(
    ("got", "expected"), [(3, 3), ((1, 2), (1, 2)), ("a", "a"), (2.0, 2), (None, None)]
)
def test_equal_values_are_equal(got, expected):
    assert equal(got, expected, "the value") == Comparison("the value")


@pytest.mark.parametrize(
    ("got", "expected"), [(3, 4), ((1, 2), (1, 2, 3)), ("a", "b"), (NAN, NAN), (None, 0)]
)
def test_unequal_values_are_quoted(got, expected):
    error = falsification(lambda: equal(got, expected, "the value"))
    assert str(error) == f"the value: expected {expected!r}, got {got!r}"


# --- bitwise -------------------------------------------------------------------------------------


def tensor(*values, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("got", "expected"),
    [
        ((1.0, -2.5), (1.0, -2.5)),
        ((0.0, -0.0), (-0.0, 0.0)),
        ((NAN, 1.0), (NAN, 1.0)),
        ((NAN, -0.0, INF), (NAN, 0.0, INF)),
        ((-INF,), (-INF,)),
        ((), ()),
    ],
)
def test_same_bits_holds_for_equal_values(dtype, got, expected):
    there = tensor(*got, dtype=dtype)
    assert same_bits(there, tensor(*expected, dtype=dtype), "out") == Comparison("out")
    assert same_bits(there, np.array(expected, dtype=np.float64), "out") == Comparison("out")


@pytest.mark.parametrize(
    ("got", "expected"),
    [
        (1.0, 2.0),
        (NAN, 1.0),
        (1.0, NAN),
        (INF, -INF),
        (INF, NAN),
        (1.0, 1.0 + 2**-23),
        (0.0, 1e-45),
    ],
)
def test_same_bits_fails_for_any_difference(got, expected):
    error = falsification(lambda: same_bits(tensor(7, got), tensor(7, expected), "out"))
    assert error.what == "out at [1] (1 of 2 elements differ)"
    assert error.expected == repr(tensor(expected).item())
    assert error.got == repr(tensor(got).item())


def test_same_bits_names_the_first_place_and_counts_the_others():
    got, expected = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)
    got[1, 0, 2] = got[1, 2, 3] = 5
    error = falsification(lambda: same_bits(got, expected, "out"))
    assert str(error) == "out at [1, 0, 2] (2 of 24 elements differ): expected 0.0, got 5.0"


def test_same_bits_fails_for_another_shape():
    error = falsification(lambda: same_bits(torch.zeros(2, 1), torch.zeros(1, 2), "out"))
    assert str(error) == "out: expected float32 of shape (1, 2), got float32 of shape (2, 1)"
    falsification(lambda: same_bits(torch.zeros(3), torch.zeros(1), "out"))
    falsification(lambda: same_bits(torch.zeros(3), np.zeros((1, 3)), "out"))
    falsification(lambda: same_bits(torch.zeros(0, 3), torch.zeros(0, 4), "out"))


def test_same_bits_fails_for_another_dtype():
    error = falsification(lambda: same_bits(tensor(1), tensor(1, dtype=torch.float64), "out"))
    assert str(error) == "out: expected float64 of shape (1,), got float32 of shape (1,)"


def test_same_bits_compares_integers_and_truth_values():
    assert same_bits(torch.tensor([1, 2]), torch.tensor([1, 2]), "count")
    assert falsification(lambda: same_bits(torch.tensor(3), torch.tensor(4), "count")).got == "3"
    assert falsification(lambda: same_bits(torch.tensor(True), torch.tensor(False), "t")).got


def test_same_bits_looks_at_values_whatever_the_memory():
    x = torch.arange(6.0).reshape(2, 3)
    assert same_bits(x.T.contiguous().T, x, "out")
    assert same_bits(x.clone().requires_grad_(), x.numpy().astype(float), "out")
    assert same_bits(torch.ones(1).expand(4), np.ones(8)[::2], "out")


# --- bounded -------------------------------------------------------------------------------------


def bounded(value, error):
    return Bounded(np.array(value, dtype=np.longdouble), np.array(error, dtype=np.longdouble))


def test_within_returns_the_worst_ratio():
    got = tensor(1.0, 2.5, -1.0, dtype=torch.float64)
    found = within(got, bounded((1, 2, -1.25), (1, 1, 1)), "out")
    assert found == Comparison("out", 0.5)


def test_within_allows_the_bound_itself_and_no_more():
    got = tensor(1.25, 1.5, dtype=torch.float64)
    assert within(got, bounded((1, 1), (1, 0.5)), "out").ratio == 1
    falsification(lambda: within(got, bounded((1, 1), (1, 0.4999)), "out"))


def test_within_of_nothing_has_ratio_0():
    assert within(torch.zeros(0, 2), Bounded(np.zeros((0, 2)), np.zeros((0, 2))), "out").ratio == 0


def test_within_of_an_exact_result_has_ratio_0():
    assert within(tensor(1.0), bounded([1], [0]), "out").ratio == 0


@pytest.mark.filterwarnings("error")
def test_within_fails_without_a_warning():
    falsification(lambda: within(tensor(1.0, 2.0), bounded((1, 1), (0, 0.5)), "out"))


def test_within_sees_less_than_a_unit_in_the_last_place():
    got, exact = tensor(1.0, dtype=torch.float64), 1 + np.longdouble(2) ** -60
    assert within(got, bounded([exact], [2**-59]), "out").ratio == 0.5
    falsification(lambda: within(got, bounded([exact], [2**-61]), "out"))


def test_within_quotes_the_worst_place():
    got = tensor(1.0, 2.0, 9.0, 4.25, dtype=torch.float64)
    error = falsification(lambda: within(got, bounded((1, 2, 3, 4), (1, 1, 1, 0.125)), "out"))
    assert str(error) == (
        "out at [2] (2 of 4 elements are off): expected 3.0 ± 1, got 9.0 (error 6)"
    )


@pytest.mark.parametrize(
    ("got", "expected", "bound"),
    [(NAN, 1.0, 1.0), (INF, 1.0, 1.0), (1.0, 1.0, NAN), (1.0, NAN, 1.0), (1.0, 1.0, -1.0)],
)
def test_within_fails_for_what_cannot_be_compared(got, expected, bound):
    with np.errstate(invalid="ignore"):
        error = falsification(lambda: within(tensor(got), bounded([expected], [bound]), "out"))
    assert repr(float(got)) in error.got
    assert repr(float(expected)) in error.expected


def test_within_fails_for_another_shape():
    error = falsification(lambda: within(torch.zeros(3), bounded([0], [1]), "out"))
    assert str(error) == "out: expected shape (1,), got shape (3,)"


# --- the target's code ---------------------------------------------------------------------------


def raiser(error):
    def action():
        raise error

    return action


def test_within_quotes_the_place_of_a_nan():
    got = torch.tensor([1.0, NAN, 1.0], dtype=torch.float64)
    error = falsification(lambda: within(got, Bounded(np.ones(3), np.full(3, 0.5)), "out"))
    assert "at [1] (1 of 3" in error.what


def test_within_takes_every_dtype():
    got = torch.tensor([1.0, 2.0], dtype=torch.bfloat16)
    assert within(got, Bounded(np.array([1.0, 2.0]), np.zeros(2)), "out").ratio == 0.0


@pytest.mark.filterwarnings("error")
def test_within_fails_without_a_warning_where_the_bound_is_0():
    got = torch.tensor([1.0, 2.0], dtype=torch.float64)
    falsification(lambda: within(got, Bounded(np.array([1.0, 3.0]), np.zeros(2)), "out"))


def test_at_most_returns_the_ratio():
    assert at_most(1.0, 4.0, "norm") == Comparison("norm", 0.25)
    assert at_most(4.0, 4.0, "norm") == Comparison("norm", 1.0)
    assert at_most(0.0, 0.0, "norm") == Comparison("norm", 0.0)


@pytest.mark.parametrize("got", [4.5, INF, NAN])
def test_at_most_fails_above_the_bound(got):
    error = falsification(lambda: at_most(got, 4.0, "norm"))
    assert (error.what, error.expected, error.got) == ("norm", "at most 4.0", repr(got))


def test_same_tensors_compares_every_name():
    one = {"a": torch.ones(2), "b": torch.zeros(2)}
    assert same_tensors(one, dict(one), "state") == Comparison("state")
    error = falsification(lambda: same_tensors(one | {"b": torch.ones(2)}, one, "state"))
    assert error.what.startswith("state: b at [0] (2 of 2")
    assert (error.expected, error.got) == ("0.0", "1.0")


@pytest.mark.parametrize("names", [["a"], ["b", "a"], ["a", "b", "c"]])
def test_same_tensors_compares_names_and_their_order(names):
    expected = {"a": torch.ones(1), "b": torch.ones(1)}
    got = {name: torch.ones(1) for name in names}
    error = falsification(lambda: same_tensors(got, expected, "state"))
    assert error.what == "state: names"
    assert (error.expected, error.got) == ("['a', 'b']", repr(names))


def test_a_falsification_travels_between_processes():
    sent = Falsified("the sum", "three", "four")
    came = pickle.loads(pickle.dumps(sent))
    assert (came.what, came.expected, came.got) == ("the sum", "three", "four")


def test_attempt_returns_the_result():
    assert attempt("forward", lambda: 5) == 5


@pytest.mark.parametrize(
    ("error", "got"),
    [
        (RuntimeError("bad  shape\n [2, 3]"), "RuntimeError: bad shape [2, 3]"),
        (NotImplementedError(), "NotImplementedError"),
        (KeyError("blocks"), "KeyError: 'blocks'"),
        (AssertionError("odd"), "AssertionError: odd"),
    ],
)
def test_attempt_turns_an_exception_into_a_falsification(error, got):
    found = falsification(lambda: attempt("forward", raiser(error)))
    assert str(found) == f"forward: expected no exception, got {got}"
    assert found.__cause__ is error


def test_attempt_leaves_a_falsification_as_it_is():
    error = Falsified("inner", "a", "b")
    assert falsification(lambda: attempt("forward", raiser(error))) is error


def test_attempt_lets_an_interrupt_pass():
    with pytest.raises(KeyboardInterrupt):
        attempt("forward", raiser(KeyboardInterrupt()))


def test_a_long_exception_is_cut():
    error = falsification(lambda: attempt("f", raiser(ValueError("x" * 9999))))
    assert error.got == f"ValueError: {'x' * 300}"


def test_refuses_returns_the_refusal():
    error = ValueError("no")
    assert refuses(raiser(error), (ValueError, TypeError), "building") is error
    sub = UnicodeError("no")
    assert refuses(raiser(sub), (ValueError,), "building") is sub


def test_refuses_returns_none_when_nothing_is_refused():
    assert refuses(lambda: 5, (ValueError,), "building") is None


def test_refuses_fails_for_another_kind_of_error():
    error = IndexError("tuple index")
    found = falsification(lambda: refuses(raiser(error), (ValueError, TypeError), "building"))
    assert str(found) == (
        "building: expected ValueError or TypeError, or no exception, got IndexError: tuple index"
    )
    assert found.__cause__ is error


def test_a_tensor_without_values_equals_nothing():
    with pytest.raises(Falsified, match="on the device meta"):
        same_bits(torch.empty(2, device="meta"), torch.zeros(2), "values")


# --- values of integer networks ------------------------------------------------------------------


def test_in_float16_what_is_next_to_nothing_counts_as_zero():
    got = torch.tensor([1.0, 2.0**-15, -(2.0**-20)], dtype=torch.float16)
    same_values(got, np.array([1.0, 0.0, 0.0]), "x")
    same_values(got, torch.tensor([1.0, 0.0, 0.0], dtype=torch.float16), "x")


@pytest.mark.parametrize(
    ("dtype", "off"),
    [
        (torch.float16, 2.0**-14),
        (torch.bfloat16, 2.0**-30),
        (torch.float32, 2.0**-100),
        (torch.float64, 2.0**-200),
    ],
)
def test_anything_else_is_compared_to_the_bit(dtype, off):
    with pytest.raises(Falsified):
        same_values(torch.tensor([1.0, off], dtype=dtype), np.array([1.0, 0.0]), "x")


def test_only_what_is_zero_exactly_may_be_next_to_nothing():
    got = torch.tensor([0.0, 2.0**-16], dtype=torch.float16)
    with pytest.raises(Falsified):
        same_values(got, np.array([2.0**-16, 2.0**-16]), "x")


def test_nan_is_not_next_to_nothing():
    with pytest.raises(Falsified):
        same_values(torch.tensor([float("nan")], dtype=torch.float16), np.zeros(1), "x")
