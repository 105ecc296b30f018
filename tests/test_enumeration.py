"""Enumeration: every case of a space once, the smallest first, and no more of it than is asked."""

import itertools
from collections import Counter
from dataclasses import replace

import pytest

from rescnn_verify.enumeration import (
    architectures,
    batched,
    every_case,
    every_input,
    smallest_first,
    values_of,
)
from rescnn_verify.space import (
    A_CHANNEL_PER_BRANCH,
    ARCHITECTURES,
    INPUTS,
    MORE_THAN_ONE_VALUE_TO_TRAIN,
    Choice,
    Constraint,
    Floats,
    Integers,
    Lists,
    Space,
    SpaceError,
    architectural,
    value,
)
from rescnn_verify.statement import find_property
from rescnn_verify.unit import target_of
from tests.test_unit import STACK

EVERYTHING = ARCHITECTURES * INPUTS
SMALL = Space(
    {"option.groups": Choice(1, 2)},
    kernel_sizes=Lists(Choice(3, 5), 1, 2),
    num_blocks=Integers(1, 2),
    channels=Integers(1, 3),
    batch=Integers(0, 2),
    mode=Choice("eval", "train"),
    length=Integers(1, 3),
    position=Choice("first", "last"),
    where=(A_CHANNEL_PER_BRANCH, MORE_THAN_ONE_VALUE_TO_TRAIN),
)
FREE = Space(dict(SMALL.factors))  # without constraints
NEVER = Constraint("never", lambda case: False)


def flat(trials):
    return [case for trial in trials for case in trial]


def rank(case, space, wanted):
    """The sum of the ranks of a case's values, the simplest of a factor being 0."""
    return sum(
        list(values_of(name, factor)).index(value(case, name))
        for name, factor in space.factors
        if wanted(name)
    )


def of_the_input(name):
    return not architectural(name)


# --- every case ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 4, 1000])
def test_smallest_first_gives_every_case_once_apart_from_the_seed(size):
    space = SMALL.narrow(seed=Integers(0, 999))
    given = Counter(replace(case, seed=0) for case in flat(smallest_first(space, size=size)))
    assert set(given) == set(every_case(SMALL))
    assert set(given.values()) == {1}


@pytest.mark.parametrize("space", [SMALL, FREE], ids=["tied", "free"])
def test_the_inputs_of_every_architecture_are_every_case(space):
    given = Counter(case for config in architectures(space) for case in every_input(space, config))
    assert given == Counter(every_case(space))
    assert set(given.values()) == {1}


def test_every_input_has_the_configuration():
    for config in architectures(SMALL):
        assert {case.config for case in every_input(SMALL, config)} <= {config}


def test_every_architecture_comes_once_whether_it_has_a_case_or_not():
    given = Counter(architectures(SMALL))
    assert len(given) == 2 * 6 * 2 * 3
    assert set(given.values()) == {1}


def test_a_space_without_inputs_has_a_trial_for_each_architecture():
    space = Space(channels=Integers(1, 5), num_blocks=Integers(1, 2))
    trials = list(smallest_first(space))
    assert {len(trial) for trial in trials} == {1}
    assert [case.config for case in flat(trials)] == list(architectures(space))


def test_a_space_without_architectures_has_the_default_one():
    space = Space(length=Integers(1, 6))
    assert [[case.length for case in trial] for trial in smallest_first(space)] == [
        [1, 2, 3, 4], [5, 6],
    ]  # fmt: skip
    assert list(architectures(space)) == [flat(smallest_first(space))[0].config]


def test_options_and_further_factors_are_where_a_property_looks_for_them():
    assert {case.option("groups") for case in flat(smallest_first(SMALL))} == {1, 2}
    assert {case["position"] for case in flat(smallest_first(SMALL))} == {"first", "last"}


# --- constraints ---------------------------------------------------------------------------------


def test_every_case_given_is_in_the_space():
    assert [case for case in flat(smallest_first(SMALL)) if case not in SMALL] == []
    assert [case for case in flat(smallest_first(FREE)) if case not in SMALL] != []


def test_no_trial_is_empty():
    assert all(smallest_first(SMALL))


@pytest.mark.parametrize("cases", [every_case, smallest_first])
def test_a_bounded_space_without_a_case_gives_none(cases):
    assert list(cases(SMALL.narrow(NEVER))) == []


def test_a_large_space_without_a_case_is_given_up():
    assert list(smallest_first(EVERYTHING.narrow(NEVER))) == []


def test_many_combinations_that_are_forbidden_do_not_hide_those_behind_them():
    """The first 1499 groups of four lengths have no case."""
    long = Constraint("at least 6000", lambda case: case.length >= 6000)
    space = Space(length=Integers(1, 10**6)).narrow(long)
    assert [case.length for case in next(smallest_first(space))] == [6000]


# --- order ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", [SMALL, FREE], ids=["tied", "free"])
def test_architectures_that_are_simple_in_every_factor_come_first(space):
    ranks = [
        rank(next(every_input(FREE, config)), space, architectural)
        for config in architectures(space)
    ]
    assert ranks == sorted(ranks)
    assert (ranks[0], ranks[-1]) == (0, 1 + 5 + 1 + 2)


def test_inputs_that_are_simple_in_every_factor_come_first():
    space = FREE.narrow(kernel_sizes=Choice((3,)), num_blocks=Choice(1), channels=Choice(1))
    space = Space({name: f for name, f in space.factors if name != "option.groups"})
    ranks = [rank(case, space, of_the_input) for case in flat(smallest_first(space))]
    assert ranks == sorted(ranks)
    assert (ranks[0], ranks[-1]) == (0, 2 + 1 + 2 + 1)


def test_trials_come_by_the_rank_of_their_architecture_and_of_their_inputs():
    """Neither waits for the other: an architecture's trial and the next one's inputs alternate."""
    trials = list(smallest_first(FREE))
    configs = list(architectures(FREE))
    inputs = [trial for trial in trials if trial[0].config == configs[0]]
    ranks = []
    for trial in trials:
        chunk = tuple(replace(case, **vars(configs[0])) for case in trial)
        ranks.append(configs.index(trial[0].config) + inputs.index(chunk))
    assert ranks == sorted(ranks)
    assert ranks[-1] == len(configs) - 1 + len(inputs) - 1
    assert len(configs) > 1
    assert len(inputs) > 1


def test_the_first_case_is_the_simplest():
    first = next(smallest_first(EVERYTHING))[0]
    simplest = {name: next(iter(values_of(name, f))) for name, f in ARCHITECTURES.factors}
    assert {name: value(first, name) for name in simplest} == simplest
    assert (first.batch, first.length, first.seed) == (0, 1, 0)


# --- trials --------------------------------------------------------------------------------------


def test_a_trial_has_one_architecture_and_at_most_the_size():
    for size in (1, 2, 5):
        trials = list(smallest_first(SMALL, size=size))
        assert all(len({case.config for case in trial}) == 1 for trial in trials)
        assert max(len(trial) for trial in trials) == size


def test_every_trial_has_a_seed_of_its_own():
    trials = list(itertools.islice(smallest_first(FREE.narrow(seed=Integers(3, 10**6))), 100))
    assert [{case.seed for case in trial} for trial in trials] == [{n} for n in range(3, 103)]


def test_the_first_seed_may_be_given():
    space = Space(length=Integers(1, 5), seed=Integers(5, 10))
    trials = itertools.islice(smallest_first(space, size=1, seed=4), 4)
    assert [case.seed for case in flat(trials)] == [9, 10, 5, 6]


@pytest.mark.parametrize(
    ("seeds", "expected"),
    [(Integers(5, 7), [5, 6, 7, 5, 6]), (Choice(9, 2), [9, 2, 9, 2, 9]), (Choice(4), [4] * 5)],
)
def test_seeds_begin_anew_when_there_are_no_more(seeds, expected):
    space = Space(length=Integers(1, 5), seed=seeds)
    assert [case.seed for case in flat(smallest_first(space, size=1))] == expected


def test_a_space_without_seeds_keeps_the_default():
    assert {case.seed for case in flat(smallest_first(SMALL))} == {0}


# --- real numbers --------------------------------------------------------------------------------


def test_real_numbers_are_tried_at_both_ends():
    space = Space(dropout=Floats(0.25, 0.75), magnitude=Floats(-1.0, 2.0))
    given = {(case.dropout, case["magnitude"]) for case in flat(smallest_first(space))}
    assert given == {(0.25, -1.0), (0.25, 2.0), (0.75, -1.0), (0.75, 2.0)}


@pytest.mark.parametrize("cases", [every_case, architectures])
def test_real_numbers_of_an_architecture_cannot_all_be_tried(cases):
    with pytest.raises(SpaceError, match=r"^dropout: the reals from 0.0 to 0.5 cannot all be trie"):
        list(cases(SMALL.narrow(dropout=Floats(0.0, 0.5))))


def test_real_numbers_of_an_input_cannot_all_be_tried():
    space = SMALL.narrow(magnitude=Floats(0.0, 0.5))
    with pytest.raises(SpaceError, match=r"^magnitude: the reals from 0.0 to 0.5"):
        list(every_input(space, next(architectures(space))))


# --- large spaces --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "space",
    [
        EVERYTHING,
        EVERYTHING.narrow(level=Integers(0, 2**62)),
        Space(length=Integers(1, 2**62), channels=Integers(1, 2**62), seed=Integers(0, 2**62)),
        Space(num_blocks=Integers(1, 2**62)),
    ],
    ids=["the contract's", "with a further factor", "endless in both", "endless architectures"],
)
def test_a_large_space_is_gone_through_no_further_than_asked(space):
    trials = list(itertools.islice(smallest_first(space), 50))
    assert len(set(trials)) == 50
    assert [case for case in flat(trials) if case not in space] == []


def test_both_directions_of_an_endless_space_are_gone_into():
    space = Space(length=Integers(1, 2**62), channels=Integers(1, 2**62))
    cases = flat(itertools.islice(smallest_first(space), 55))
    assert max(case.channels for case in cases) == 10
    assert max(case.length for case in cases) == 4 * 10


# --- shards --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 7])
def test_shards_are_disjoint_and_complete(count):
    space = SMALL.narrow(seed=Integers(0, 10**6))
    shards = [list(itertools.islice(smallest_first(space), i, None, count)) for i in range(count)]
    assert Counter(flat(flat(shards))) == Counter(flat(smallest_first(space)))
    assert max(Counter(flat(flat(shards))).values()) == 1
    assert all(shards)


# --- groups --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "size", "sizes"), [(0, 3, []), (6, 3, [3, 3]), (7, 3, [3, 3, 1]), (2, 3, [2])]
)
def test_groups_have_the_size_and_the_last_one_what_is_left(count, size, sizes):
    groups = list(batched(range(count), size))
    assert [len(group) for group in groups] == sizes
    assert [item for group in groups for item in group] == list(range(count))


def test_groups_are_taken_no_further_than_asked():
    items = itertools.count()
    assert next(batched(items, 5)) == (0, 1, 2, 3, 4)
    assert next(items) == 5


def test_real_numbers_with_one_end_are_tried_once():
    trials = list(smallest_first(Space(dropout=Floats(0.5, 0.5))))
    assert [case.dropout for trial in trials for case in trial] == [0.5]


def test_as_many_branches_as_channels_are_found():
    space = {"channels": "1..6", "kernel_sizes": {"allowed": [1, 3, 5], "branches": 6}}
    space = find_property("shape.output_is_finite").space_for(target_of(STACK, {"space": space}))
    assert next(smallest_first(space))[0].channels == 6
