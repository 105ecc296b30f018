"""Coverage: the classes of a case, the pairs that it meets, and how many a set of cases has met."""

import functools
import itertools
import math
import random
from contextlib import suppress
from dataclasses import replace

import pytest

from rescnn_verify.case import Case
from rescnn_verify.coverage import Coverage, classes_of, pairs_of
from rescnn_verify.drawing import NoCase, RandomDraw, draw_trial
from rescnn_verify.space import ARCHITECTURES, INPUTS, USUAL
from rescnn_verify.statement import all_properties
from rescnn_verify.target import load

#: How many classes each factor has.
SIZES = {
    "split": 3,
    "channels": 3,
    "branches": 4,
    "order": 3,
    "kernel": 4,
    "blocks": 4,
    "dropout": 3,
    "batch": 4,
    "length": 5,
    "dtype": 4,
    "layout": 4,
    "mode": 2,
}
FIRST = dict(zip(SIZES, itertools.accumulate(SIZES.values(), initial=0), strict=False))
EVERYTHING = ARCHITECTURES * INPUTS * USUAL
LEAST = Case(channels=1, kernel_sizes=(3,), length=1, batch=0)


@functools.cache
def cases(count, seed=0):
    """Cases drawn from the whole space."""
    draw, found = RandomDraw(seed), []
    while len(found) < count:
        with suppress(NoCase):
            found += draw_trial(draw, EVERYTHING, max_size=1)
    return tuple(found)


def class_of(factor, case):
    """The class of a case in one factor, from 0."""
    return classes_of(case)[list(SIZES).index(factor)] - FIRST[factor]


# --- classes -------------------------------------------------------------------------------------


def test_every_class_is_within_the_range_of_its_factor():
    for case in cases(200):
        classes = classes_of(case)
        assert len(classes) == len(SIZES)
        for factor, size in SIZES.items():
            assert 0 <= class_of(factor, case) < size, (factor, case)


def test_every_class_of_every_factor_is_drawn():
    drawn = {item for case in cases(2000) for item in classes_of(case)}
    assert drawn == set(range(sum(SIZES.values())))


BUNDLED = load("rescnn:ResCNNStack")


@pytest.mark.parametrize(
    "prop", [p for p in all_properties() if not p.missing(BUNDLED)], ids=lambda prop: prop.name
)
def test_every_case_of_a_property_has_a_class_in_each_factor(prop):
    draw, space, found = RandomDraw(0), prop.space_for(BUNDLED), []
    for _ in range(10):
        with suppress(NoCase):
            found += draw_trial(draw, space, work=prop.work)
    assert found
    for case in found:
        assert all(0 <= class_of(factor, case) < size for factor, size in SIZES.items()), case


@pytest.mark.parametrize(
    ("factor", "given", "expected"),
    [
        ("split", {"channels": 3, "kernel_sizes": (3, 5, 7)}, 0),
        ("split", {"channels": 6, "kernel_sizes": (3, 5, 7)}, 1),
        ("split", {"channels": 512, "kernel_sizes": (3, 5, 7)}, 2),
        ("split", {"channels": 1, "kernel_sizes": (3,)}, 0),
        ("split", {"channels": 7, "kernel_sizes": (3,)}, 1),
        ("channels", {"channels": 8}, 0),
        ("channels", {"channels": 9}, 1),
        ("channels", {"channels": 32}, 1),
        ("channels", {"channels": 33}, 2),
        ("branches", {"kernel_sizes": (3,)}, 0),
        ("branches", {"kernel_sizes": (3, 5)}, 1),
        ("branches", {"kernel_sizes": (3, 5, 7)}, 2),
        ("branches", {"kernel_sizes": (3, 5, 7, 9)}, 3),
        ("branches", {"channels": 6, "kernel_sizes": (3, 5, 7, 9, 11, 13)}, 3),
        ("order", {"kernel_sizes": (3,)}, 0),
        ("order", {"kernel_sizes": (3, 5, 7)}, 0),
        ("order", {"kernel_sizes": (5, 3, 7)}, 1),
        ("order", {"kernel_sizes": (7, 5, 3)}, 1),
        ("order", {"kernel_sizes": (3, 3, 7)}, 2),
        ("order", {"kernel_sizes": (7, 3, 7)}, 2),
        ("kernel", {"kernel_sizes": (1, 1)}, 0),
        ("kernel", {"kernel_sizes": (1, 3)}, 1),
        ("kernel", {"kernel_sizes": (5,)}, 2),
        ("kernel", {"kernel_sizes": (7, 3)}, 2),
        ("kernel", {"kernel_sizes": (9,)}, 3),
        ("kernel", {"kernel_sizes": (3, 31)}, 3),
        ("blocks", {"num_blocks": 1}, 0),
        ("blocks", {"num_blocks": 2}, 1),
        ("blocks", {"num_blocks": 3}, 2),
        ("blocks", {"num_blocks": 4}, 3),
        ("blocks", {"num_blocks": 7}, 3),
        ("dropout", {"dropout": 0.0}, 0),
        ("dropout", {"dropout": 0.001}, 1),
        ("dropout", {"dropout": 0.9}, 1),
        ("dropout", {"dropout": 1.0}, 2),
        ("batch", {"batch": 0}, 0),
        ("batch", {"batch": 1}, 1),
        ("batch", {"batch": 2}, 2),
        ("batch", {"batch": 8}, 2),
        ("batch", {"batch": 9}, 3),
        # Two blocks of kernel 5: a field of 9.
        ("length", {"kernel_sizes": (5,), "num_blocks": 2, "length": 1}, 0),
        ("length", {"kernel_sizes": (5,), "num_blocks": 2, "length": 2}, 1),
        ("length", {"kernel_sizes": (5,), "num_blocks": 2, "length": 4}, 1),
        ("length", {"kernel_sizes": (5,), "num_blocks": 2, "length": 5}, 2),
        ("length", {"kernel_sizes": (5,), "num_blocks": 2, "length": 8}, 2),
        ("length", {"kernel_sizes": (5,), "num_blocks": 2, "length": 9}, 3),
        ("length", {"kernel_sizes": (5,), "num_blocks": 2, "length": 208}, 3),
        ("length", {"kernel_sizes": (5,), "num_blocks": 2, "length": 209}, 4),
        ("dtype", {"dtype": "float32"}, 0),
        ("dtype", {"dtype": "float64"}, 1),
        ("dtype", {"dtype": "bfloat16"}, 2),
        ("dtype", {"dtype": "float16"}, 3),
        ("layout", {"layout": "contiguous"}, 0),
        ("layout", {"layout": "expanded"}, 3),
        ("mode", {"mode": "eval"}, 0),
        ("mode", {"mode": "train"}, 1),
    ],
)
def test_a_case_is_in_the_class_that_a_person_would_say(factor, given, expected):
    assert class_of(factor, Case(**given)) == expected


# --- pairs ---------------------------------------------------------------------------------------


def test_a_case_meets_one_pair_of_classes_for_each_pair_of_factors():
    assert {pairs_of(case).bit_count() for case in cases(200)} == {math.comb(len(SIZES), 2)}


def test_cases_meet_the_same_pairs_exactly_when_their_classes_are_the_same():
    by_classes = {classes_of(case): pairs_of(case) for case in cases(2000)}
    assert all(pairs_of(case) == by_classes[classes_of(case)] for case in cases(2000))
    assert len(set(by_classes.values())) == len(by_classes) > 1


def test_a_class_that_changes_changes_the_pairs_of_its_factor_only():
    other = replace(LEAST, dtype="float64")
    assert (pairs_of(LEAST) & pairs_of(other)).bit_count() == math.comb(len(SIZES) - 1, 2)


def test_what_coverage_does_not_look_at_changes_no_pair():
    other = replace(LEAST, seed=7, extra=(("position", 3),), options=(("groups", 2),))
    assert pairs_of(other) == pairs_of(LEAST)


# --- coverage ------------------------------------------------------------------------------------


def joined(found):
    return functools.reduce(int.__or__, map(pairs_of, found), 0)


def counted(found):
    """The coverage of cases by its definition."""
    named = [tuple(zip(SIZES, classes_of(case), strict=True)) for case in found]
    met = {pair for classes in named for pair in itertools.combinations(classes, 2)}
    classes = {item for classes in named for item in classes}
    possible = sum(a[0] != b[0] for a, b in itertools.combinations(sorted(classes), 2))
    return Coverage(len(met), possible)


def test_nothing_covers_nothing():
    assert Coverage.of(0) == Coverage(0, 0)


def test_one_case_covers_all_that_its_classes_can_form():
    assert Coverage.of(pairs_of(LEAST)) == Coverage(66, 66)


def test_two_cases_apart_in_two_factors_miss_the_pairs_across():
    """Of the 11 + 10 pairs that each has for itself, none is of one's class and the other's."""
    other = replace(LEAST, dtype="float64", layout="strided")
    assert Coverage.of(joined([LEAST, other])) == Coverage(66 + 21, 4 + 40 + 45)


@pytest.mark.parametrize("count", [1, 2, 3, 10, 50, 200])
def test_the_counts_are_those_of_the_definition(count):
    generator = random.Random(count)
    for _ in range(5):
        found = generator.sample(cases(200), count)
        assert Coverage.of(joined(found)) == counted(found)


def test_cases_that_were_met_before_add_nothing():
    found = cases(50)
    assert joined([*found, *found[::-1]]) == joined(found)


def test_the_coverage_of_a_union_is_that_of_all_cases():
    found = cases(200)
    parts = [joined(found[i::7]) for i in range(7)]
    assert Coverage.of(functools.reduce(int.__or__, parts)) == counted(found)
    assert max(Coverage.of(part).met for part in parts) < counted(found).met
