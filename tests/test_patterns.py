"""Patterns of inputs: of the same shape, of the same numbers, and each what its name says."""

import numpy as np
import pytest

from rescnn_verify.patterns import PATTERNS, in_pattern, patterned

SHAPES = [(1, 1, 1), (4, 3, 7), (2, 5, 1), (1, 2, 40)]


def made(pattern, seed, shape=(6, 5, 9)):
    values = np.random.default_rng(seed).integers(-4, 5, shape).astype(np.float64)
    return values, in_pattern(values, pattern, np.random.default_rng(seed))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_has_the_same_shape_and_no_other_numbers(pattern, shape):
    for seed in range(20):
        values, found = made(pattern, seed, shape)
        assert found.shape == shape
        assert {*found.flat} <= {0.0, *values.flat, *np.abs(values).flat}
        assert not np.signbit(found[found == 0]).any()


def some(pattern, claim):
    return all(claim(*made(pattern, seed)) for seed in range(20))


def test_silence_is_where_its_name_says():
    def silent(axis, values, found):
        others = tuple({0, 1, 2} - {axis})
        gone = (found == 0).all(axis=others)
        return np.array_equal(np.compress(~gone, found, axis), np.compress(~gone, values, axis))

    for axis, pattern in enumerate(("silent rows", "silent channels")):
        assert some(pattern, lambda values, found, axis=axis: silent(axis, values, found))
        assert any(not np.array_equal(*made(pattern, seed)) for seed in range(20))
    for pattern, ordered in (("silent start", np.sort), ("silent end", lambda a: np.sort(a)[::-1])):
        kept = [(made(pattern, seed)[1] != 0).any(axis=(0, 1)) for seed in range(20)]
        assert all(np.array_equal(places, ordered(places)) for places in kept)
        assert any(not places.all() for places in kept)
        assert any(places.any() for places in kept)


def test_what_is_equal_or_periodic_repeats():
    assert some("equal rows", lambda _, found: len(np.unique(found, axis=0)) < len(found))
    assert some("equal positions", lambda values, found: (found == values[:, :, :1]).all())
    assert any(not np.array_equal(*made("periodic", seed)) for seed in range(20))
    assert some(
        "periodic",
        lambda values, found: any(
            np.array_equal(found[:, :, k:], found[:, :, : 9 - k])
            and np.array_equal(found[:, :, :k], values[:, :, :k])
            for k in range(1, 10)
        ),
    )


def test_one_sign_is_not_negative():
    assert some("one sign", lambda values, found: np.array_equal(found, np.abs(values)))


def test_half_of_all_inputs_stay_as_they_are():
    values = np.random.default_rng(0).standard_normal((3, 4, 5))
    same = [patterned(values, np.random.default_rng(seed)) is values for seed in range(400)]
    # Of 400 fair coins, fewer than 140 or more than 260 heads come with a chance below 1e-8.
    assert 140 <= sum(same) <= 260


def test_nothing_has_no_pattern():
    nothing = np.zeros((0, 3, 4))
    assert all(patterned(nothing, np.random.default_rng(seed)) is nothing for seed in range(9))
