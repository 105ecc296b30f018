"""Shrinking reaches the smallest counterexample that a person would write, and ends."""

from dataclasses import replace

import pytest

from rescnn_verify.case import Case
from rescnn_verify.drawing import RandomDraw, draw_trial
from rescnn_verify.shrinking import shrink
from rescnn_verify.space import (
    ARCHITECTURES,
    INPUTS,
    USUAL,
    Choice,
    Constraint,
    Floats,
    Integers,
    Lists,
    Space,
)

EVERYTHING = ARCHITECTURES * INPUTS * USUAL
DOCUMENTED = Case(
    channels=512, num_blocks=3, kernel_sizes=(3, 5, 7), dropout=0.1, batch=1, length=960
)
BIG = Case(
    channels=97,
    num_blocks=6,
    kernel_sizes=(13, 9, 1, 7, 11),
    dropout=0.9,
    batch=33,
    length=1025,
    dtype="float16",
    device="cuda",
    layout="expanded",
    mode="train",
    seed=123456789,
)
SIMPLEST = Case(channels=1, length=1)


def minimal(fails, start=BIG, space=EVERYTHING):
    """The case that a falsification of one case shrinks to."""
    [case] = shrink((start,), space, lambda trial: fails(trial[-1]))
    return case


def simplest(**fields):
    return replace(SIMPLEST, **fields)


def test_everything_shrinks_to_the_simplest_case():
    assert minimal(lambda case: True) == SIMPLEST


def test_the_documented_case_shrinks_to_the_simplest_case():
    assert minimal(lambda case: True, DOCUMENTED) == SIMPLEST


def test_what_nothing_simpler_shows_is_left_alone():
    assert minimal(lambda case: case == BIG) == BIG
    assert shrink((BIG, DOCUMENTED), EVERYTHING, lambda trial: False) == (BIG, DOCUMENTED)


@pytest.mark.parametrize("least", [1, 2, 3, 7, 16, 50, 64, 97])
def test_channels_shrink_to_the_threshold(least):
    assert minimal(lambda case: case.channels >= least) == simplest(channels=least)


@pytest.mark.parametrize("least", [1, 2, 5, 100, 128])
def test_512_channels_shrink_to_the_threshold(least):
    assert minimal(lambda case: case.channels >= least, DOCUMENTED).channels == least


def test_channels_shrink_to_the_smallest_remainder():
    found = minimal(lambda case: case.channels % len(case.kernel_sizes), DOCUMENTED)
    assert (found.channels, found.kernel_sizes) == (3, (3, 3))


@pytest.mark.parametrize("least", range(1, 7))
def test_blocks_shrink_to_the_threshold(least):
    assert minimal(lambda case: case.num_blocks >= least) == simplest(num_blocks=least)


@pytest.mark.parametrize("least", [1, 2, 3, 19, 99, 256, 257, 1000, 1025])
def test_lengths_shrink_to_the_threshold(least):
    assert minimal(lambda case: case.length >= least) == simplest(length=least)


def test_a_length_shrinks_along_with_the_field():
    assert minimal(lambda case: case.length > case.field) == simplest(length=4)
    assert minimal(lambda case: case.length < case.widest // 2, replace(BIG, length=3)) == (
        simplest(kernel_sizes=(5,))
    )


@pytest.mark.parametrize("least", [2, 3, 9, 33])
def test_batches_shrink_to_the_threshold(least):
    assert minimal(lambda case: case.batch >= least) == simplest(batch=least)


def test_a_batch_of_one_is_simpler_than_an_empty_one():
    assert minimal(lambda case: True).batch == 1
    assert minimal(lambda case: case.batch < 5, replace(BIG, batch=4)).batch == 1


def test_a_batch_of_one_is_simpler_than_an_empty_one_where_there_is_no_other():
    space = EVERYTHING.narrow(batch=Integers(0, 1))
    assert shrink((replace(BIG, batch=0),), space, lambda trial: True)[-1].batch == 1


def test_an_empty_batch_that_matters_is_kept():
    assert minimal(lambda case: case.batch == 0, replace(BIG, batch=0, mode="eval")).batch == 0


def test_an_empty_batch_that_does_not_matter_becomes_one():
    assert minimal(lambda case: True, replace(BIG, batch=0, mode="eval")).batch == 1


def test_a_seed_that_does_not_matter_becomes_0():
    assert minimal(lambda case: True).seed == 0


@pytest.mark.parametrize(
    ("fails", "kernels"),
    [
        (lambda k: True, (3,)),
        (lambda k: len(k) >= 2, (3, 3)),
        (lambda k: len(k) >= 4, (3, 3, 3, 3)),
        (lambda k: max(k) > 7, (9,)),
        (lambda k: max(k) == 13, (13,)),
        (lambda k: 1 in k, (1,)),
        (lambda k: 11 in k and 9 in k, (9, 11)),
        (lambda k: list(k) != sorted(k), (5, 3)),
        (lambda k: k[-1] != max(k), (5, 3)),
        (lambda k: sum(k) >= 20, (9, 11)),
    ],
)
def test_kernel_lists_shrink_to_shorter_and_then_simpler_ones(fails, kernels):
    assert minimal(lambda case: fails(case.kernel_sizes)).kernel_sizes == kernels


def test_every_kernel_of_the_documented_case_is_tried():
    for kernel in (3, 5, 7):
        found = minimal(lambda case, kernel=kernel: kernel in case.kernel_sizes, DOCUMENTED)
        assert found.kernel_sizes == (kernel,)


def test_names_shrink_to_the_first_that_fails():
    assert minimal(lambda case: case.dtype != "float32").dtype == "float64"
    assert minimal(lambda case: case.dtype.endswith("16")).dtype == "bfloat16"
    assert minimal(lambda case: case.dtype == "float16").dtype == "float16"
    assert minimal(lambda case: case.layout != "contiguous").layout == "transposed"
    assert minimal(lambda case: case.device == "cuda").device == "cuda"
    assert minimal(lambda case: case.mode == "train") == simplest(mode="train", batch=2)
    assert minimal(lambda case: case.dropout > 0).dropout == 0.1


def test_floats_shrink_to_the_least_or_to_few_digits():
    space = Space(dropout=Floats(0.0, 1.0))
    start = Case(dropout=0.42413)
    assert minimal(lambda case: True, start, space).dropout == 0.0
    assert minimal(lambda case: case.dropout > 0.3, start, space).dropout == 0.4
    assert minimal(lambda case: 0.41 < case.dropout < 0.43, start, space).dropout == 0.42


def test_floats_that_round_up_shrink_to_few_digits():
    space = Space(dropout=Floats(0.0, 1.0))
    start = Case(dropout=0.37713)
    assert minimal(lambda case: case.dropout > 0.3, start, space).dropout in (0.37, 0.38, 0.4)


def test_a_least_float_of_two_digits_is_the_end():
    budget = iter([True] * 1000)
    space = Space(dropout=Floats(0.17, 1.0))
    assert minimal(lambda case: next(budget, False), Case(dropout=0.5), space).dropout == 0.17
    assert next(budget, False)


def test_several_factors_shrink_together():
    def fails(case):
        return case.channels >= 6 and case.num_blocks >= 2 and case.length > case.widest >= 5

    assert minimal(fails) == simplest(channels=6, num_blocks=2, kernel_sizes=(5,), length=6)


def test_options_and_further_factors_shrink():
    space = EVERYTHING * Space({"option.growth": Integers(1, 40)}, scale=Choice(1, 6, -6))
    start = replace(BIG, options=(("growth", 32),), extra=(("scale", -6),))
    assert minimal(lambda case: True, start, space) == simplest(
        options=(("growth", 1),), extra=(("scale", 1),)
    )
    found = minimal(lambda c: c.option("growth") >= 9 and c["scale"] != 1, start, space)
    assert (found.option("growth"), found["scale"]) == (9, 6)


def test_a_value_outside_the_space_moves_into_it():
    space = EVERYTHING.narrow(
        num_blocks=Integers(2, 4), kernel_sizes=Lists(Choice(5), 1, 2), dropout=Choice(0.5)
    )
    found = minimal(lambda case: True, DOCUMENTED, space)
    assert (found.num_blocks, found.dropout) == (2, 0.5)


def test_constraints_hold_all_the_way():
    odd = Constraint("an odd length", lambda case: case.length % 2 == 1)
    seen = []

    def fails(case):
        seen.append(case)
        return case.length >= 10

    space = EVERYTHING.narrow(odd)
    assert minimal(fails, space=space).length == 11
    assert all(space.meets_constraints(case) for case in seen)


def test_odd_lengths_shrink_to_the_threshold():
    assert minimal(lambda case: case.length >= 10 and case.length % 2).length == 11


# --- trials --------------------------------------------------------------------------------------


def trial_of(*lengths):
    return tuple(replace(BIG, length=length) for length in lengths)


def test_earlier_cases_that_do_not_matter_are_dropped():
    assert shrink(trial_of(30, 20, 10), EVERYTHING, lambda trial: True) == (SIMPLEST,)
    found = shrink(trial_of(30, 20, 10), EVERYTHING, lambda trial: trial[-1].length >= 10)
    assert found == (simplest(length=10),)


def test_the_only_earlier_case_is_dropped_if_it_does_not_matter():
    assert shrink(trial_of(30, 10), EVERYTHING, lambda trial: True) == (SIMPLEST,)


def test_a_case_in_the_middle_is_dropped_if_it_does_not_matter():
    def fails(trial):
        return len(trial) > 1 and trial[0].length == 40

    assert shrink(trial_of(40, 5, 10), EVERYTHING, fails) == (simplest(length=40), SIMPLEST)


def test_an_earlier_case_that_matters_is_kept():
    def fails(trial):
        return any(case.length > trial[-1].length for case in trial[:-1])

    found = shrink(trial_of(30, 5, 40, 10), EVERYTHING, fails)
    assert found == (simplest(length=2), SIMPLEST)


def test_as_many_cases_are_kept_as_matter():
    found = shrink(trial_of(30, 5, 40, 10), EVERYTHING, lambda trial: len(trial) >= 3)
    assert found == (SIMPLEST,) * 3


def test_the_last_case_is_never_dropped():
    seen = []

    def fails(trial):
        seen.append(trial)
        return trial[-1].length >= 100

    shrink(trial_of(30, 5, 400), EVERYTHING, fails)
    assert shrink(trial_of(30, 5, 400), EVERYTHING, fails)[-1].length == 100
    assert [trial for trial in seen if trial[-1].length < 100 and trial[-1].length == 5] == []


def test_the_cases_of_a_trial_keep_sharing_one_model():
    seen = []

    def fails(trial):
        seen.append(trial)
        return len(trial) == 2 and trial[0].channels >= 5

    found = shrink(trial_of(30, 10), EVERYTHING, fails)
    assert found == (simplest(channels=5), simplest(channels=5))
    assert all(len({(c.config, c.dtype, c.device) for c in trial}) == 1 for trial in seen)


# --- the search itself ---------------------------------------------------------------------------

PREDICATES = (
    lambda trial: True,
    lambda trial: trial[-1].channels % 2 == 0,
    lambda trial: trial[-1].length % 7 == 3 or trial[-1].batch > 2,
    lambda trial: sum(case.length * case.batch for case in trial) % 5 != 1,
    lambda trial: hash(tuple(case.dumps().count("1") for case in trial)) % 3 != 0,
    lambda trial: max(trial[-1].kernel_sizes) * trial[-1].num_blocks > 8,
)


@pytest.mark.parametrize("fails", PREDICATES)
def test_the_result_fails_lies_in_the_space_and_cannot_be_improved(fails):
    draw = RandomDraw(1)
    trials = [draw_trial(draw, EVERYTHING) for _ in range(60)]
    failing = [trial for trial in trials if fails(trial)]
    assert len(failing) >= 10
    for trial in failing:
        found = shrink(trial, EVERYTHING, fails)
        assert fails(found)
        assert all(case in EVERYTHING for case in found)
        assert len(found) <= len(trial)
        assert shrink(found, EVERYTHING, fails) == found


def test_few_runs_are_needed():
    runs = 0

    def fails(case):
        nonlocal runs
        runs += 1
        return case.length >= 700 and 11 in case.kernel_sizes and case.channels >= 40

    assert minimal(fails) == simplest(length=700, kernel_sizes=(11,), channels=40)
    assert runs < 1000


def test_an_answer_of_false_ends_the_search():
    budget = iter([True] * 3)
    runs = 0

    def fails(trial):
        nonlocal runs
        runs += 1
        return next(budget, False)

    found = shrink((BIG,), EVERYTHING, fails)
    assert found != (BIG,)
    assert runs < 200
