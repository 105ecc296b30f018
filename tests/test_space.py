"""Spaces: what they contain, how they narrow and combine, and that drawing stays inside."""

import functools
from contextlib import suppress

import pytest

from rescnn_verify.case import Case
from rescnn_verify.drawing import WORK, NoCase, RandomDraw, draw_trial
from rescnn_verify.enumeration import every_case
from rescnn_verify.space import (
    A_CHANNEL_PER_BRANCH,
    ARCHITECTURES,
    INPUTS,
    USUAL,
    Choice,
    Constraint,
    Floats,
    Integers,
    Lists,
    Space,
    SpaceError,
    architectural,
    at_least,
    value,
)
from rescnn_verify.statement import all_properties
from rescnn_verify.target import load
from rescnn_verify.trial import run_trial

EVERYTHING = ARCHITECTURES * INPUTS * USUAL
SMALL_KERNELS = Lists(Choice(3, 5), 1, 2)
EVEN = Constraint("an even length", lambda case: case.length % 2 == 0)
SHORT = Constraint("shorter than 10", lambda case: case.length < 10)


# --- membership ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factor", "inside", "outside"),
    [
        (Integers(1, 3), (1, 2, 3), (0, 4, 2.0, True, "2", None)),
        (Floats(0.0, 1.0), (0.0, 0.5, 1.0, 1), (-1e-9, 1.1, float("nan"), "0.5", None)),
        (Choice("eval", "train"), ("eval", "train"), ("test", 0, None)),
        (SMALL_KERNELS, ((3,), (5, 3), (3, 3)), ((), (7,), (3, 5, 3), [3], 3)),
        (Lists(Integers(1, 9), 0, 1), ((), (4,)), ((0,), (4, 4), (True,))),
    ],
)
def test_factors_contain_their_values_and_no_others(factor, inside, outside):
    assert [v for v in inside if v not in factor] == []
    assert [v for v in outside if v in factor] == []


def test_a_space_contains_a_case_when_every_factor_does():
    space = Space(channels=Integers(1, 4), kernel_sizes=SMALL_KERNELS)
    assert Case(channels=4, kernel_sizes=(5, 3)) in space
    assert Case(channels=5, kernel_sizes=(5, 3)) not in space
    assert Case(channels=4, kernel_sizes=(7,)) not in space


def test_a_space_contains_nothing_but_cases():
    assert "a case" not in Space()
    assert Case().config not in Space()
    assert Case() in Space()


def test_a_factor_left_out_is_not_looked_at():
    assert Case(length=10**6, mode="train") in Space(channels=Integers(1, 4))


def test_constraints_tie_factors_together():
    space = Space(length=Integers(1, 20), where=(EVEN, SHORT))
    members = [n for n in range(30) if Case(length=n) in space]
    assert members == [2, 4, 6, 8]


@pytest.mark.parametrize(
    ("case", "member"),
    [
        (Case(channels=3, kernel_sizes=(3, 5, 7)), True),
        (Case(channels=2, kernel_sizes=(3, 5, 7)), False),
        (Case(mode="train", batch=1, length=1), False),
        (Case(mode="train", batch=0, length=5), False),
        (Case(mode="train", batch=1, length=2), True),
        (Case(mode="train", batch=2, length=1), True),
        (Case(mode="eval", batch=0, length=1), True),
        (Case(kernel_sizes=(2,)), False),
        (Case(channels=True), False),
    ],
)
def test_the_contract_promises_what_it_says(case, member):
    assert (case in EVERYTHING) is member


def test_further_factors_and_options_are_looked_up_by_name():
    space = Space({"option.dilation": Integers(1, 2)}, position=Choice(0, 9))
    member = Case(options=(("dilation", 2),), extra=(("position", 9),))
    assert member in space
    assert value(member, "option.dilation") == 2
    assert value(member, "position") == 9
    assert Case(options=(("dilation", 3),), extra=(("position", 9),)) not in space


def test_a_case_without_a_factor_of_the_space_is_not_in_it():
    assert Case() not in Space(position=Choice(0, 9))
    assert Case() not in Space({"option.dilation": Integers(1, 2)})


def test_options_belong_to_the_architecture_and_inputs_do_not():
    names = ("channels", "kernel_sizes", "dropout", "option.dilation")
    assert all(architectural(name) for name in names)
    assert not any(architectural(name) for name in ("batch", "dtype", "seed", "position"))


# --- combination ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "common"),
    [
        (Integers(1, 5), Integers(3, 9), Integers(3, 5)),
        (Integers(1, 5), Integers(5, 5), Integers(5, 5)),
        (Integers(1, 5), Choice(9, 4, 2), Choice(4, 2)),
        (Floats(0.0, 0.5), Floats(0.25, 1.0), Floats(0.25, 0.5)),
        (Floats(0.0, 0.5), Choice(0.1, 0.9), Choice(0.1)),
        (Choice("b", "a", "c"), Choice("a", "b"), Choice("b", "a")),
        (Lists(Choice(3, 5, 7), 1, 6), Lists(Choice(7, 3), 2, 9), Lists(Choice(3, 7), 2, 6)),
        (Lists(Integers(1, 9), 1, 2), Lists(Integers(5, 20), 1, 1), Lists(Integers(5, 9), 1, 1)),
        (Lists(Choice(3, 5), 1, 2), Choice((5, 3), (7,)), Choice((5, 3))),
    ],
)
def test_multiplication_intersects_factors_of_one_name(a, b, common):
    for x, y in ((a, b), (b, a)):
        both = (Space(f=x) * Space(f=y)).get("f")
        if isinstance(common, Choice):
            assert set(both.values) == set(common.values)
        elif isinstance(common, Lists) and isinstance(common.element, Choice):
            assert set(both.element.values) == set(common.element.values)
            assert (both.low, both.high) == (common.low, common.high)
        else:
            assert both == common


def test_the_left_factor_says_what_is_simplest():
    assert (Space(f=Choice(2, 1)) * Space(f=Choice(1, 2))).get("f") == Choice(2, 1)
    assert Space(f=Choice(1, 2)).narrow(f=Choice(2, 1)).get("f") == Choice(1, 2)


def test_multiplication_keeps_the_factors_of_both():
    both = Space(a=Integers(1, 2)) * Space(b=Integers(3, 4))
    assert both.factors == (("a", Integers(1, 2)), ("b", Integers(3, 4)))
    assert both.get("c") is None


def test_multiplication_collects_constraints_once():
    a, b = Space(where=(EVEN,)), Space(where=(SHORT, EVEN))
    assert (a * b).where == (EVEN, SHORT)


def test_a_product_contains_what_both_contain():
    a = Space(length=Integers(1, 8), where=(EVEN,))
    b = Space(length=Integers(3, 20), mode=Choice("eval"))
    cases = [Case(length=n, mode=mode) for n in range(25) for mode in ("eval", "train")]
    assert [c in a * b for c in cases] == [c in a and c in b for c in cases]
    assert any(c in a * b for c in cases)


def test_narrowing_changes_only_what_it_names():
    narrow = EVERYTHING.narrow(EVEN, length=Integers(4, 9), mode=Choice("eval"))
    assert narrow.get("length") == Integers(4, 9)
    assert narrow.get("mode") == Choice("eval")
    assert narrow.get("channels") == EVERYTHING.get("channels")
    assert narrow.where == (*EVERYTHING.where, EVEN)
    assert EVERYTHING.get("length") == Integers(1, 4200)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (Integers(1, 2), Integers(3, 4)),
        (Integers(1, 2), Choice(3, 4)),
        (Choice("eval"), Choice("train")),
        (Floats(0.0, 0.1), Floats(0.2, 0.3)),
        (Lists(Choice(3), 1, 1), Lists(Choice(3), 2, 3)),
        (Lists(Choice(3), 1, 2), Lists(Choice(5), 1, 2)),
    ],
)
def test_an_empty_intersection_is_refused_with_the_name(a, b):
    with pytest.raises(SpaceError, match=r"^length: no value is both in .* and in "):
        Space(length=a) * Space(length=b)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (Integers(1, 2), Floats(1.0, 2.0)),
        (Integers(1, 2), Lists(Choice(1), 1, 2)),
        (Floats(0.0, 1.0), Lists(Choice(1), 1, 2)),
        (Lists(Integers(1, 2), 1, 2), Integers(1, 2)),
    ],
)
def test_factors_of_different_kinds_are_refused_with_the_name(a, b):
    with pytest.raises(SpaceError) as refusal:
        Space(dropout=a) * Space(dropout=b)
    assert str(refusal.value) == f"dropout: {a} and {b} cannot be combined"


def test_the_message_quotes_both_factors():
    with pytest.raises(SpaceError) as refusal:
        USUAL.narrow(channels=Integers(200, 300))
    assert str(refusal.value) == ("channels: no value is both in 1..128 and in 200..300")


def test_a_region_narrows_only_the_factors_there_are():
    region = Space(channels=Integers(3, 9), length=Integers(5, 6))
    space = Space(channels=at_least(4), dtype=Choice("float32"))
    assert space.within(region) == Space(channels=Integers(4, 9), dtype=Choice("float32"))
    assert space.within(region, besides=("channels",)) == space
    with pytest.raises(SpaceError, match="channels: no value"):
        space.within(Space(channels=Choice(1, 2)))


# --- drawing -------------------------------------------------------------------------------------


def drawn(space, trials, *, seed=0, **arguments):
    """Trials of a space; those that met no case in a fixed number of draws are left out."""
    draw, found = RandomDraw(seed), []
    for _ in range(trials):
        with suppress(NoCase):
            found.append(draw_trial(draw, space, **arguments))
    assert len(found) >= 0.9 * trials
    return found


def cost(case):
    """Multiply-adds of a forward pass by the architecture's definition."""
    widths = [case.channels // case.branches] * (case.branches - 1)
    widths.append(case.channels - sum(widths))
    branches = sum(w * case.channels * k for w, k in zip(widths, case.kernel_sizes, strict=True))
    fusion = case.channels**2
    return case.batch * case.length * case.num_blocks * (branches + fusion)


@functools.cache
def trials_everywhere():
    return drawn(EVERYTHING, 1500)


def test_every_case_drawn_is_in_the_space():
    assert [c for trial in trials_everywhere() for c in trial if c not in EVERYTHING] == []


def test_the_cases_of_a_trial_can_run_on_one_model():
    for trial in trials_everywhere():
        assert len({(case.config, case.dtype, case.device) for case in trial}) == 1


def test_trials_have_one_to_four_cases():
    assert {len(trial) for trial in trials_everywhere()} == {1, 2, 3, 4}
    assert {len(trial) for trial in drawn(EVERYTHING, 100, max_size=2)} == {1, 2}


def test_the_cases_of_a_trial_differ_in_everything_else():
    for name in ("batch", "length", "layout", "mode", "seed"):
        assert any(len({value(c, name) for c in trial}) > 1 for trial in trials_everywhere()), name


@pytest.mark.parametrize("work", [2**14, 2**16, WORK])
def test_no_case_costs_more_than_the_limit(work):
    trials = trials_everywhere() if work == WORK else drawn(EVERYTHING, 300, work=work)
    costs = [cost(case) for trial in trials for case in trial]
    assert max(costs) <= work
    assert max(costs) > work / 4


def test_drawing_is_a_function_of_the_seed():
    assert drawn(EVERYTHING, 20, seed=5) == drawn(EVERYTHING, 20, seed=5)
    assert drawn(EVERYTHING, 20, seed=5) != drawn(EVERYTHING, 20, seed=6)


def test_a_space_without_a_length_has_one_case_for_an_architecture():
    assert {len(trial) for trial in drawn(ARCHITECTURES, 50)} == {1}


def test_options_and_further_factors_are_drawn_and_sorted():
    space = Space({"option.b": Choice(1), "option.a": Choice(2)}, z=Choice(3), y=Integers(4, 4))
    [case] = drawn(space, 1)[0]
    assert case.options == (("a", 2), ("b", 1))
    assert case.extra == (("y", 4), ("z", 3))


def test_listed_channels_are_drawn_with_one_for_each_branch():
    space = ARCHITECTURES.narrow(channels=Choice(2, 6))
    assert [case for [case] in drawn(space, 200) if case not in space] == []


def test_a_space_without_a_case_is_given_up():
    with pytest.raises(NoCase):
        draw_trial(RandomDraw(0), Space(where=(Constraint("never", lambda case: False),)))


BUNDLED = load("rescnn:ResCNNStack")
PROPERTIES = [p for p in all_properties() if not p.missing(BUNDLED)]


@functools.cache
def trials_of(prop):
    return drawn(prop.space_for(BUNDLED), 80, work=prop.work)


@pytest.mark.parametrize("prop", PROPERTIES, ids=lambda prop: prop.name)
def test_every_case_drawn_for_a_property_is_in_its_space(prop):
    space = prop.space_for(BUNDLED)
    for trial in trials_of(prop):
        assert len({(case.config, case.dtype, case.device) for case in trial}) == 1
        assert [case for case in trial if case not in space] == []


@pytest.mark.parametrize("prop", PROPERTIES, ids=lambda prop: prop.name)
def test_every_case_drawn_for_a_property_survives_its_json_form(prop):
    for trial in trials_of(prop):
        for case in trial:
            assert Case.from_json(case.to_json()).dumps() == case.dumps()


@pytest.mark.parametrize(
    "prop", [p for p in PROPERTIES if not p.space.get("seed")], ids=lambda p: p.name
)
def test_a_property_without_a_seed_draws_nothing(prop, monkeypatch):
    drawn_for, rng = [], Case.rng
    monkeypatch.setattr(Case, "rng", lambda case, what: drawn_for.append(what) or rng(case, what))
    run_trial(prop, BUNDLED, trials_of(prop)[0])
    assert drawn_for == []


def test_no_case_of_a_property_costs_more_than_its_limit():
    worst = {
        prop.name: max(cost(case) for trial in trials_of(prop) for case in trial) / prop.work
        for prop in PROPERTIES
        if prop.space_for(BUNDLED).get("length")
    }
    assert {name: ratio for name, ratio in worst.items() if ratio > 1} == {}


def test_every_case_of_a_bounded_space_comes_once_and_the_simplest_first():
    space = Space(
        kernel_sizes=Lists(Choice(3, 5), 1, 2),
        channels=Integers(1, 2),
        where=(A_CHANNEL_PER_BRANCH,),
    )
    cases = list(every_case(space))
    assert [(c.kernel_sizes, c.channels) for c in cases] == [
        ((3,), 1), ((3,), 2), ((5,), 1), ((5,), 2),
        ((3, 3), 2), ((3, 5), 2), ((5, 3), 2), ((5, 5), 2),
    ]  # fmt: skip
    assert all(case in space for case in cases)


def test_options_and_extra_factors_are_gone_through():
    cases = list(every_case(Space({"option.groups": Integers(1, 2), "place": Choice("a", "b")})))
    assert [(c.option("groups"), c["place"]) for c in cases] == [
        (1, "a"), (1, "b"), (2, "a"), (2, "b"),
    ]  # fmt: skip


def test_real_numbers_cannot_be_gone_through():
    with pytest.raises(SpaceError, match=r"dropout: the reals from 0.0 to 1.0"):
        list(every_case(Space(dropout=Floats(0.0, 1.0))))
