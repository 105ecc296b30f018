"""The engine's verdicts, and what it never does with a counterexample."""

import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from rescnn import ResCNNStack
from rescnn_verify import Case, Choice, Integers, Space, Target, Traits
from rescnn_verify.compare import Comparison, Falsified, equal
from rescnn_verify.drawing import NoCase, RandomDraw, draw_trial
from rescnn_verify.engine import (
    PROFILES,
    Search,
    check_property,
    documented_case,
    search_property,
)
from rescnn_verify.needs import HANDLES
from rescnn_verify.outcome import (
    BAD_TARGET,
    FALSIFIED,
    HELD,
    INTERNAL_ERROR,
    NOT_APPLICABLE,
    NOT_RUN,
    NOTHING_ASSERTED,
)
from rescnn_verify.space import ARCHITECTURES, EXTREMES, INPUTS, USUAL, value
from rescnn_verify.statement import all_properties, find_property, statement
from rescnn_verify.subject import NotApplicable, Subject
from rescnn_verify.target import TargetError, contract_target
from rescnn_verify.trial import run_trial
from tests.zoo.right import SharedWorkspace

QUICK, DEFAULT = PROFILES["quick"], PROFILES["default"]
SMALL = Space(length=Integers(1, 30), seed=Integers(0, 9))
STACK = contract_target(ResCNNStack, "stack")


def outcome_of(check, target=STACK, space=SMALL, needs=()):
    return check_property(statement(space=space, needs=needs)(check), target, profile=QUICK, seed=0)


def test_a_statement_that_holds_is_held():
    def check(subject, case):
        yield equal(1, 1, "one")

    outcome = outcome_of(check)
    assert outcome.verdict == HELD
    assert outcome.assertions == outcome.cases > 0


def test_a_false_statement_is_falsified_at_its_smallest_case():
    def check(subject, case):
        yield equal(case.length < 17, True, "short")

    outcome = outcome_of(check)
    assert outcome.verdict == FALSIFIED
    assert outcome.trial[-1].length == 17
    assert (outcome.expected, outcome.got) == ("True", "False")


def test_a_statement_that_compares_nothing_has_not_passed():
    def check(subject, case):
        yield from ()

    assert outcome_of(check).verdict == NOTHING_ASSERTED


def test_an_exception_of_the_suite_is_no_verdict_on_the_target():
    def check(subject, case):
        yield equal(1, 1, "one")
        raise ZeroDivisionError("in the suite")

    outcome = outcome_of(check)
    assert outcome.verdict == INTERNAL_ERROR
    assert "ZeroDivisionError: in the suite" in outcome.reason


class Raises(ResCNNStack):
    def forward(self, x):
        raise OSError("no such kernel")


class Exits(ResCNNStack):
    def forward(self, x):
        sys.exit(0)


class RefusesItsState(ResCNNStack):
    def state_dict(self, *args, **kwargs):
        raise RuntimeError("not today")


@pytest.mark.parametrize(
    ("cls", "name", "got"),
    [
        (Raises, "shape.output_is_finite", "OSError: no such kernel"),
        (Exits, "shape.output_is_finite", "SystemExit: 0"),
        (RefusesItsState, "state.copies_are_the_same_function", "RuntimeError: not today"),
    ],
)
def test_an_exception_of_the_target_falsifies(cls, name, got):
    outcome = check_property(find_property(name), contract_target(cls, "t"), profile=QUICK, seed=0)
    assert (outcome.verdict, outcome.got) == (FALSIFIED, got)


def test_what_the_target_does_not_promise_is_not_applicable_with_the_reason():
    def check(subject, case):
        yield equal(1, 2, "never run")

    outcome = outcome_of(check, target=Target(build=lambda c: nn.Identity()), needs=(HANDLES,))
    assert outcome.verdict == NOT_APPLICABLE
    assert "handles of the blocks" in outcome.reason


def test_a_case_that_is_not_applicable_does_not_hide_a_counterexample():
    def check(subject, case):
        if case.length < 10:
            raise NotApplicable("too short")
        yield equal(case.length, 0, "length")

    outcome = outcome_of(check)
    assert outcome.verdict == FALSIFIED
    assert outcome.trial[-1].length == 10


def test_an_exception_while_shrinking_does_not_lose_the_counterexample():
    def check(subject, case):
        if case.length < 10:
            raise ZeroDivisionError
        yield equal(case.length, 0, "length")

    space = SMALL.narrow(length=Choice(20, 19, 18))
    prop = statement(space=SMALL)(check)
    target = replace(STACK, space=STACK.space * space)
    assert check_property(prop, target, profile=QUICK, seed=0).verdict == FALSIFIED


def test_a_description_that_contradicts_itself_is_a_bad_target():
    target = Target(build=lambda c: nn.Identity(), receptive_field=lambda c: 3)
    name = "locality.a_changed_position_stays_in_its_window"
    outcome = check_property(find_property(name), target, profile=QUICK, seed=0)
    assert outcome.verdict == BAD_TARGET
    assert "must return (left, right)" in outcome.reason


def test_an_unknown_trait_is_refused_with_what_is_allowed():
    with pytest.raises(TargetError, match=r"norm='Batch'. is not known; allowed: batch, inst"):
        Traits(norm="Batch")


def test_only_who_promises_overlapping_calls_is_held_to_them():
    prop = find_property("modes.a_call_within_a_call_leaves_it_alone")
    shared = contract_target(SharedWorkspace, "shared")
    promising = replace(shared, traits=replace(shared.traits, reentrant=True))
    assert check_property(prop, shared, profile=QUICK, seed=0).verdict == NOT_APPLICABLE
    assert check_property(prop, promising, profile=DEFAULT, seed=0).verdict == FALSIFIED


def cases_run(profile, seed):
    """The cases that a statement which always holds is run on."""
    seen = []

    def check(subject, case):
        seen.append(case)
        yield equal(1, 1, "one")

    check_property(statement(space=SMALL)(check), STACK, profile=profile, seed=seed)
    return seen


def cases_searched(target, search, space=INPUTS):
    """The cases that a search tries on a statement which always holds."""
    seen = []

    def check(subject, case):
        seen.append(case)
        yield equal(1, 1, "one")

    search_property(statement(space=space)(check), target, search, seed=0)
    return seen


def inside(region, case):
    return all(value(case, name) in factor for name, factor in region.factors)


def test_a_statement_sees_every_extreme_once_in_its_turn():
    cases = cases_searched(STACK, Search(extreme=2 * len(EXTREMES)))
    for region in EXTREMES.values():
        modes = [case.mode for case in cases if inside(region, case)]
        assert sorted(modes) == ["eval", "train"]


def test_extremes_that_a_statement_does_not_have_leave_their_turns_to_others():
    space = INPUTS.narrow(length=Integers(1, 100), batch=Integers(1, 4), mode=Choice("eval"))
    cases = cases_searched(STACK, Search(extreme=4), space)
    names = ("many channels", "deep", "wide kernels", "many branches")
    assert [sum(inside(EXTREMES[name], case) for case in cases) for name in names] == [1] * 4


def test_sampled_cases_are_usual_but_for_what_the_target_names():
    named = replace(STACK, kind="custom", space=ARCHITECTURES.narrow(num_blocks=Choice(1, 20)))
    cases = cases_searched(named, Search(sampled=40))
    assert {case.num_blocks for case in cases} == {1, 20}
    assert all(replace(case, num_blocks=1) in ARCHITECTURES * INPUTS * USUAL for case in cases)


def test_one_seed_gives_the_same_cases_and_another_seed_others():
    assert cases_run(QUICK, seed=0) == cases_run(QUICK, seed=0)
    assert cases_run(QUICK, seed=0) != cases_run(QUICK, seed=1)


def test_the_quick_samples_are_the_first_of_the_default_ones():
    quick = cases_run(replace(QUICK, drawn=1), seed=0)
    default = cases_run(replace(PROFILES["default"], drawn=1), seed=0)
    most_of_a_trial = 4
    sampled = quick[:-most_of_a_trial]
    assert sampled
    assert default[: len(sampled)] == sampled


@pytest.mark.parametrize("prop", all_properties(), ids=lambda prop: prop.name)
def test_every_choice_of_a_property_is_drawn(prop):
    if prop.missing(STACK):
        pytest.skip("not claimed of the bundled model")
    space = prop.space_for(STACK)
    draw = RandomDraw(0)
    cases: list[Case] = []
    for _ in range(400):
        try:
            cases += draw_trial(draw, space, work=prop.work)
        except NoCase:
            continue
    for name, factor in prop.space.factors:
        if isinstance(factor, Choice):
            drawn = {repr(value(case, name)) for case in cases}
            assert drawn == {repr(item) for item in factor.values}, name


def test_a_falsified_comparison_counts_as_an_assertion():
    def check(subject, case):
        raise Falsified("it", "this", "that")
        yield

    assert outcome_of(check).assertions == 1


def test_a_slow_statement_runs_in_the_thorough_profile_only():
    def check(subject, case):
        yield equal(1, 1, "one")

    prop = statement(space=SMALL, slow=True, effort=0.001)(check)
    assert check_property(prop, STACK, profile=QUICK, seed=0).verdict == NOT_RUN
    assert check_property(prop, STACK, profile=PROFILES["thorough"], seed=0).verdict == HELD


def exhaustive(check):
    space = Space(num_blocks=Integers(1, 3), channels=Integers(1, 40), kernel_sizes=Choice((3,)))
    return statement(space=space, exhaustive=True)(check)


def test_an_exhaustive_statement_sees_every_case_in_the_thorough_profile():
    seen = set()

    def check(subject, case):
        seen.add((case.num_blocks, case.channels))
        yield equal(1, 1, "one")

    outcome = check_property(exhaustive(check), STACK, profile=PROFILES["thorough"], seed=0)
    assert outcome.evidence == "exhausted over 120 cases"
    assert len(seen) == outcome.cases == 120


def test_an_exhaustive_statement_names_the_one_case_where_it_is_false():
    def check(subject, case):
        yield equal((case.num_blocks, case.channels) == (2, 37), False, "it")

    outcome = check_property(exhaustive(check), STACK, profile=PROFILES["thorough"], seed=0)
    assert (outcome.trial[-1].num_blocks, outcome.trial[-1].channels) == (2, 37)


def test_hypothesis_is_steered_towards_the_bound():
    """A drawn search with feedback comes closer to the bound than one without."""

    def closest(report):
        best = 0.0

        def check(subject, case):
            nonlocal best
            ratio = 1 - abs(case["level"] - 77_777) / 100_000
            best = max(best, ratio)
            yield Comparison("level", ratio if report else None)

        space = Space(level=Integers(0, 100_000))
        profile = replace(QUICK, sampled=0, drawn=150)
        check_property(statement(space=space)(check), STACK, profile=profile, seed=0)
        return best

    assert closest(report=True) > closest(report=False)


def test_the_documented_case_is_on_the_device_that_is_checked():
    space = INPUTS.narrow(device=Choice("cuda"))
    assert documented_case(STACK, space).device == "cuda"
    assert documented_case(STACK, Space()).device == "cpu"


def test_a_step_that_crosses_kinks_is_no_finite_difference():
    """Here the gradients at both ends agree, and yet masks between them do not."""
    case = Case(
        channels=5, num_blocks=3, kernel_sizes=(9, 11, 31, 5, 3), length=30, dtype="float64",
        seed=91961419,
    )  # fmt: skip
    run_trial(find_property("gradients.finite_differences_are_exact"), STACK, (case,))


@pytest.mark.parametrize(
    "name",
    [
        "arithmetic.integer_networks_are_exact",
        "arithmetic.integer_gradients_are_exact",
        "arithmetic.integer_weight_gradients_are_exact",
        "rounding.outputs_are_within_the_bound",
        "rounding.gradients_are_within_the_bound",
    ],
)
@pytest.mark.parametrize("wrong_with", [True, False])
def test_every_case_runs_with_and_without_onednn(name, wrong_with):
    class Wrong(nn.Conv1d):
        def forward(self, x):
            wrong = torch.backends.mkldnn.enabled == wrong_with
            return super().forward(2 * x if wrong else x)

    class Stack(ResCNNStack):
        def __init__(self, **arguments):
            super().__init__(**arguments)
            for block in self.blocks:
                block.branches[0][0].__class__ = Wrong

    case = Case(channels=4, num_blocks=1, kernel_sizes=(3,), length=8, dropout=0.0)
    target = contract_target(Stack, "Stack")
    run_trial(find_property(name), STACK, (case,))
    with pytest.raises(Falsified):
        run_trial(find_property(name), target, (case,))


class Squeezed(ResCNNStack):
    def forward(self, x):
        return super().forward(x).squeeze()


class Longer(ResCNNStack):
    def forward(self, x):
        return torch.cat([super().forward(x), x[:, :, :1]], dim=2)


@pytest.mark.parametrize("wrong", [Squeezed, Longer])
@pytest.mark.parametrize(
    "name",
    [
        "arithmetic.integer_gradients_are_exact",
        "gradients.gradients_are_linear",
        "gradients.finite_differences_are_exact",
        "locality.a_changed_position_stays_in_its_window",
        "rejection.nan_and_infinity_come_out",
        "dropout.survivors_are_scaled",
    ],
)
def test_no_statement_is_true_of_an_output_of_another_shape(wrong, name):
    """And none takes it for a mistake of the suite."""
    prop = find_property(name)
    outcome = check_property(prop, contract_target(wrong, "w"), profile=QUICK, seed=0)
    assert (outcome.verdict, outcome.what.partition(" for an")[0]) == (FALSIFIED, "output shape")


def test_a_case_from_before_a_property_had_a_factor_gets_its_first_value():
    seen = []

    def check(subject, case):
        seen.append((case["how"], case["much"]))
        yield equal(1, 1, "one")

    prop = statement(space=SMALL.narrow(how=Choice("a", "b"), much=Choice(2, 1)))(check)
    run_trial(prop, STACK, (Case(), Case(extra=(("much", 1),))))
    assert seen == [("a", 2), ("a", 1)]


def test_blocks_are_called_alone_unless_they_take_another_layout():
    case = Case(channels=2, length=5)
    subject = Subject(STACK)
    model = subject.model(case)
    block = model.blocks[0]
    model.forward = lambda x: block(x * 0.5)  # wrong, and to be compared with its block
    assert subject.lone_blocks(model, case) == subject.handles(model, case)
    block.forward = lambda x: x
    model.forward = lambda x: block(x.transpose(1, 2)).transpose(1, 2)
    with pytest.raises(NotApplicable, match="not made for the model's own input"):
        subject.lone_blocks(model, case)
