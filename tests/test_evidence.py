"""Evidence: what several runs of one property come to, and what no failure in n trials says."""

import itertools
import math
import random
from dataclasses import replace
from fractions import Fraction

import pytest

from rescnn_verify import outcome as outcomes
from rescnn_verify.case import Case
from rescnn_verify.evidence import failure_rate_bound, merged
from rescnn_verify.outcome import (
    BAD_TARGET,
    FALSIFIED,
    HELD,
    INTERNAL_ERROR,
    KNOWN,
    NOT_APPLICABLE,
    NOT_RUN,
    NOTHING_ASSERTED,
    PROCESS,
    UNFINISHED,
    Outcome,
)

#: Each tells more than those before it.
ORDER = (
    NOTHING_ASSERTED,
    NOT_RUN,
    NOT_APPLICABLE,
    HELD,
    KNOWN,
    UNFINISHED,
    BAD_TARGET,
    INTERNAL_ERROR,
    FALSIFIED,
)
COUNTS = ("cases", "assertions", "sampled", "discarded", "known")


def outcome(verdict=HELD, **fields):
    return Outcome("a.property", verdict, "exact", **fields)


def some(count, seed=0):
    """Outcomes of one property with everything in them."""
    generator = random.Random(seed)
    return [
        outcome(
            generator.choice(ORDER),
            **{name: generator.randrange(100) for name in COUNTS},
            architectures=len(configs := frozenset(generator.sample(range(9), 4))),
            seconds=float(generator.randrange(10)),
            reason=f"reason {i}",
            worst_ratio=generator.choice([None, 0.25, 0.5]),
            trial=(Case(seed=i),),
            what=f"what {i}",
            ended=generator.random() < 0.5,
            signatures=tuple(sorted(generator.sample("abcdef", 2))),
            pairs=generator.getrandbits(20),
            configs=configs,
        )
        for i in range(count)
    ]


# --- merging -------------------------------------------------------------------------------------


def test_every_verdict_has_its_place():
    names = {name: item for name, item in vars(outcomes).items() if name.isupper()}
    assert {item for item in names.values() if isinstance(item, str)} - {PROCESS} == set(ORDER)
    for verdict in ORDER:
        assert merged([outcome(verdict), outcome(verdict)]).verdict == verdict


@pytest.mark.parametrize(("less", "more"), list(itertools.combinations(ORDER, 2)))
def test_the_verdict_that_tells_more_counts_whichever_came_first(less, more):
    assert merged([outcome(less), outcome(more)]).verdict == more
    assert merged([outcome(more), outcome(less)]).verdict == more


def test_the_counterexample_comes_with_its_verdict():
    held = outcome(cases=3, reason="no")
    found = outcome(
        FALSIFIED,
        reason=None,
        trial=(Case(length=5),),
        what="w",
        expected="e",
        got="g",
        ended=True,
    )
    for both in (merged([held, found]), merged([found, held])):
        assert (both.reason, both.trial, both.ended) == (None, found.trial, True)
        assert (both.what, both.expected, both.got) == ("w", "e", "g")


def test_of_two_counterexamples_the_first_is_kept():
    first, second = (outcome(FALSIFIED, trial=(Case(length=n),), what=str(n)) for n in (9, 5))
    assert merged([first, outcome(), second]).trial == first.trial
    assert merged([second, outcome(), first]).what == "5"


def test_why_nothing_was_asserted_is_known_best_at_the_end():
    parts = [outcome(NOTHING_ASSERTED, reason=reason) for reason in ("not begun", "ran for 9 s")]
    assert merged(parts).reason == "ran for 9 s"


def test_one_outcome_stays_as_it_is():
    for one in some(5):
        assert merged([one]) == one


def test_counts_are_sums():
    parts = some(8)
    total = merged(parts)
    for name in (*COUNTS, "seconds"):
        assert getattr(total, name) == sum(getattr(part, name) for part in parts), name


def test_a_configuration_that_was_met_twice_counts_once():
    parts = [outcome(architectures=3, configs=frozenset(c)) for c in ({1, 2, 3}, {3, 4, 5}, {1, 5})]
    total = merged(parts)
    assert total.configs == {1, 2, 3, 4, 5}
    assert total.architectures == 5


def test_a_pair_of_classes_that_was_met_twice_counts_once():
    assert merged([outcome(pairs=0b0011), outcome(pairs=0b0110)]).pairs == 0b0111


def test_a_kind_of_failure_that_was_seen_twice_is_named_once():
    parts = [outcome(signatures=names) for names in (("b", "c"), (), ("a", "b"))]
    assert merged(parts).signatures == ("a", "b", "c")


@pytest.mark.parametrize(
    ("ratios", "worst"),
    [((None, None), None), ((0.5, None), 0.5), ((None, 0.5), 0.5), ((0.25, 0.5, 0.0), 0.5)],
)
def test_the_worst_ratio_is_the_worst_of_those_there_are(ratios, worst):
    assert merged([outcome(worst_ratio=ratio) for ratio in ratios]).worst_ratio == worst


def test_trials_worth_keeping_are_the_single_runs_business():
    kept = outcome(remarkable=(("tight", (Case(),)),))
    assert merged([kept, kept]).remarkable == ()


def test_it_does_not_matter_in_which_groups_outcomes_are_merged():
    parts = some(7)
    total = merged(parts)
    for cut in range(2, 6):
        assert merged([merged(parts[:cut]), merged(parts[cut:])]) == total


def test_the_order_of_outcomes_matters_only_among_equal_verdicts():
    parts = [
        replace(part, verdict=verdict)
        for part, verdict in zip(some(len(ORDER)), ORDER, strict=True)
    ]
    total = merged(parts)
    for seed in range(5):
        assert merged(random.Random(seed).sample(parts, len(parts))) == total


# --- the bound on the failure rate ---------------------------------------------------------------


def test_without_a_trial_nothing_is_known():
    assert failure_rate_bound(0) is None


def test_one_trial_bounds_the_rate_by_95_percent():
    assert failure_rate_bound(1) == pytest.approx(0.95, rel=1e-14)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 10, 59, 100, 1000, 4000])
def test_the_bound_is_clopper_and_pearsons(n):
    """The rate at which n trials without a failure have a probability of exactly 5 %."""
    bound = Fraction(failure_rate_bound(n))
    margin = Fraction(1, 10**10)
    assert (1 - bound * (1 + margin)) ** n < Fraction(1, 20) < (1 - bound * (1 - margin)) ** n


@pytest.mark.parametrize("n", [1, 2, 10, 100, 10**4, 10**6, 10**8])
def test_the_bound_is_below_three_over_n(n):
    assert 0 < failure_rate_bound(n) < 3 / n


def test_the_bound_approaches_three_over_n_from_below():
    """The limit of n times the bound is ln 20 = 2.9957."""
    products = [n * failure_rate_bound(n) for n in (1, 2, 5, 10, 100, 10**4, 10**6)]
    assert products == sorted(products)
    assert products[-1] == pytest.approx(math.log(20), rel=1e-5)
    assert products[-1] == pytest.approx(3, rel=0.002)


def test_more_trials_bound_the_rate_more_tightly():
    bounds = [failure_rate_bound(n) for n in range(1, 500)]
    assert all(b < a for a, b in itertools.pairwise(bounds))
