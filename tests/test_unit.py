"""Units: they and their outcomes travel as JSON, and a user's space confines their targets."""

import json
import math
from dataclasses import fields, replace

import pytest

from rescnn_verify import Case, Choice, Config, Integers, Space, Target
from rescnn_verify.engine import PROFILES, Search, search_property
from rescnn_verify.outcome import (
    BAD_TARGET,
    FALSIFIED,
    HELD,
    INTERNAL_ERROR,
    NOT_APPLICABLE,
    Outcome,
)
from rescnn_verify.space import SpaceError
from rescnn_verify.spacefile import SpaceFileError
from rescnn_verify.statement import all_properties, find_property
from rescnn_verify.target import TargetError, load
from rescnn_verify.unit import Unit, confined, run_unit, target_of

STACK, BLOCK = "rescnn:ResCNNStack", "rescnn:ResCNNBlock"
NAME = "split.widths_sum_to_channels"
EXHAUSTIVE = "split.split_and_field_of_every_configuration"
ODD = Case(
    channels=6,
    kernel_sizes=(5, 3),
    options=(("groups", 2), ("norm", "group")),
    dtype="bfloat16",
    mode="train",
    seed=2**32 - 1,
    extra=(("invalid", ("kernel_sizes", ())), ("value", -math.inf)),
)
CUSTOM = """
from torch import nn
from rescnn_verify import Choice, Integers, Space, Target

SPACE = Space(channels=Integers(2, 8), num_blocks=Choice(1), kernel_sizes=Choice((3,)))
PROMISE = Target(build=lambda config: nn.Identity(), space=SPACE)
"""


@pytest.fixture(scope="module")
def custom(tmp_path_factory):
    """A custom target of 2 to 8 channels, one block and a kernel of 3."""
    file = tmp_path_factory.mktemp("unit") / "custom.py"
    file.write_text(CUSTOM)
    return f"{file}:PROMISE"


# --- a unit as JSON ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "unit",
    [
        Unit(NAME, STACK, Search()),
        Unit(NAME, STACK, Search(trials=((ODD,), (Case(), ODD)))),
        Unit(NAME, STACK, Search(configs=(ODD.config, Config(channels=512, kernel_sizes=(3, 5))))),
        Unit(NAME, STACK, Search(last=((Case(), ODD),))),
        Unit(NAME, STACK, Search(seconds=math.inf)),
        Unit(NAME, STACK, Search(seconds=2.5, shrinking=0.125)),
        Unit(NAME, STACK, Search(known=("output dtype", "it is 'ü'\n (OSError)"))),
        Unit(NAME, STACK, Search(shard=(3, 8))),
        Unit(NAME, STACK, Search(seen=0)),
        Unit(NAME, STACK, Search(seen=2**1848 + 1)),
        Unit(NAME, STACK, Search(documented=True, exhaustive=True, slow=False)),
        Unit(NAME, STACK, Search(sampled=7, extreme=2, drawn=3), seed=2**64 - 1),
        Unit(NAME, STACK, Search(), space={"space": {"channels": [8, 512], "length": "1..9"}}),
        Unit(NAME, STACK, Search(), space={"near": {"kernel_sizes": [3, 5], "option": {"a": 1}}}),
        Unit(NAME, STACK, Search(), device="cuda", journal="/a/b", case_timeout=0.5, tag="x#7"),
    ],
    ids=lambda unit: f"{unit.search!r}"[:40],
)
def test_a_unit_is_the_same_after_its_journey(unit):
    assert Unit.loads(unit.dumps()) == unit


def test_no_field_of_a_search_is_lost_on_the_journey():
    """Each field is given a value other than its default."""
    search = Search(
        trials=((ODD,),),
        configs=(ODD.config,),
        documented=True,
        exhaustive=True,
        sampled=1,
        extreme=6,
        drawn=2,
        seconds=3.0,
        shrinking=4.0,
        slow=False,
        shard=(1, 2),
        known=("k",),
        seen=5,
        last=((Case(),), (ODD, ODD)),
    )
    assert [f.name for f in fields(Search) if getattr(search, f.name) == f.default] == []
    assert Unit.loads(Unit(NAME, STACK, search).dumps()).search == search


@pytest.mark.parametrize("name", PROFILES)
def test_the_search_of_every_profile_survives(name):
    for prop in all_properties():
        search = Search.of(PROFILES[name], prop)
        assert Unit.loads(Unit(prop.name, STACK, search).dumps()).search == search


def test_cases_that_travelled_are_of_the_same_types():
    unit = Unit(NAME, STACK, Search(trials=((ODD,),), configs=(ODD.config,)))
    again = Unit.loads(unit.dumps()).search
    assert repr(again.trials) == repr(unit.search.trials)
    assert repr(again.configs) == repr(unit.search.configs)
    hash(again)


def test_the_text_of_a_unit_is_strict_json():
    def refuse(constant):
        raise AssertionError(constant)

    text = Unit(NAME, STACK, Search(trials=((ODD,),))).dumps()
    assert json.loads(text, parse_constant=refuse)["search"]["seconds"] is None


# --- an outcome as JSON --------------------------------------------------------------------------

FULL = Outcome(
    NAME,
    FALSIFIED,
    "bounded",
    device="cuda",
    cases=1,
    assertions=2,
    architectures=3,
    seconds=4.5,
    reason="why",
    worst_ratio=0.75,
    trial=(Case(), ODD),
    what="what",
    expected="this",
    got="that",
    ended=True,
    sampled=5,
    discarded=6,
    known=7,
    signatures=("it", "it (OSError)"),
    pairs=2**1848 + 1,
    configs=frozenset({2**48 - 1, 0, 5}),
    remarkable=(("tight", (ODD,)), ("corner", (Case(), ODD))),
)


@pytest.mark.parametrize("outcome", [FULL, Outcome(NAME, HELD, "exact")], ids=["full", "empty"])
def test_an_outcome_is_the_same_after_its_journey(outcome):
    text = json.dumps(outcome.to_json(), allow_nan=False)
    assert Outcome.from_json(json.loads(text)) == outcome


def test_no_field_of_an_outcome_keeps_its_default_above():
    assert [f.name for f in fields(Outcome) if getattr(FULL, f.name) == f.default] == []


# --- running one ---------------------------------------------------------------------------------


def ran(unit):
    return Outcome.from_json(json.loads(run_unit(unit.dumps())))


def test_a_unit_that_travelled_comes_to_what_the_search_comes_to_here():
    search = Search(trials=((Case(),),), sampled=4, drawn=1, seen=0)
    here = search_property(find_property(NAME), load(STACK), search, seed=5)
    there = ran(Unit(NAME, STACK, search, seed=5))
    assert here.verdict == HELD
    assert replace(there, seconds=here.seconds) == here


def test_a_unit_stays_within_the_users_space():
    space = {"channels": [200, 300], "num_blocks": 2, "kernel_sizes": [[3, 5]], "dropout": 0.1}
    outcome = ran(Unit(NAME, STACK, Search(sampled=9), space={"space": space}))
    assert (outcome.verdict, outcome.cases, outcome.architectures) == (HELD, 9, 2)


def test_a_space_in_which_nothing_is_promised_is_not_applicable_with_the_reason(custom):
    outcome = ran(Unit(NAME, custom, Search(sampled=1), space={"space": {"channels": 9}}))
    assert outcome.verdict == NOT_APPLICABLE
    assert outcome.cases == 0
    assert outcome.reason.startswith("channels: no value is both in [9] and in ")


def test_the_journal_of_a_unit_is_gone_when_it_is_done(tmp_path):
    unit = Unit(NAME, STACK, Search(sampled=1), journal=str(tmp_path / "journal"))
    assert ran(unit).verdict == HELD
    assert list(tmp_path.iterdir()) == []


def test_a_unit_writes_its_cases_into_its_journal(tmp_path):
    """The target looks into the journal while it is called."""
    file, journal, seen = (tmp_path / name for name in ("spy.py", "journal", "seen"))
    file.write_text(
        "from pathlib import Path\n"
        "from rescnn import ResCNNStack\n"
        "class Spy(ResCNNStack):\n"
        "    def forward(self, x):\n"
        f"        Path({str(seen)!r}).write_text(Path({str(journal)!r}).read_text())\n"
        "        return super().forward(x)\n"
    )
    case = Case(length=3)
    search = Search(trials=((case,),))
    ran(Unit("shape.output_is_finite", f"{file}:Spy", search, journal=str(journal)))
    assert json.loads(seen.read_text()) == {"case": case.to_json(), "index": 0}


# --- a target within a user's space --------------------------------------------------------------


def test_without_a_space_a_target_is_as_it_is(custom):
    for spec in (STACK, BLOCK):
        assert target_of(spec).space == load(spec).space
        assert target_of(spec).promises_everything
    assert target_of(custom).space == load(custom).space


def test_a_stack_may_be_given_what_is_not_explored_by_default():
    space = target_of(STACK, {"space": {"channels": 512, "num_blocks": "8..9"}}).space
    assert space.get("channels") == Choice(512)
    assert space.get("num_blocks") == Integers(8, 9)


def test_what_a_users_space_does_not_name_stays_as_explored_by_default():
    narrow, promised = target_of(STACK, {"space": {"num_blocks": 9}}).space, load(STACK).space
    for name in ("kernel_sizes", "channels", "dropout"):
        assert narrow.get(name) == promised.get(name)
    assert narrow.where == promised.where


def test_a_users_space_keeps_what_ties_its_factors_together():
    space = target_of(STACK, {"space": {"channels": "1..3", "kernel_sizes": [[3, 5], [3]]}}).space
    assert Case(channels=1, kernel_sizes=(3,), dropout=0.0) in space
    assert Case(channels=1, kernel_sizes=(3, 5), dropout=0.0) not in space


def test_a_stack_may_be_given_the_neighbourhood_of_a_configuration():
    space = target_of(STACK, {"near": {"channels": 512, "num_blocks": 3}}).space
    assert space.get("channels") == Choice(512, 511, 513)
    assert space.get("num_blocks") == Choice(3, 2, 4)
    assert space.get("kernel_sizes").values[0] == (3, 5, 7)  # the documented stack's


def test_a_block_may_be_given_what_is_not_explored_by_default_but_stays_one():
    space = target_of(BLOCK, {"space": {"channels": "100..500", "num_blocks": "1..4"}}).space
    assert space.get("channels") == Integers(100, 500)
    assert space.get("num_blocks") == Choice(1)


@pytest.mark.parametrize(
    "space",
    [{"num_blocks": 2}, {"num_blocks": "2..5"}, {"num_blocks": [3, 2]}],
    ids=str,
)
def test_a_block_cannot_be_given_two_blocks(space):
    with pytest.raises(SpaceError, match=r"^num_blocks: no value is both in"):
        target_of(BLOCK, {"space": space})


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_the_neighbourhood_of_a_configuration_of_a_block_is_one_of_blocks(blocks):
    space = target_of(BLOCK, {"near": {"channels": 64, "num_blocks": blocks}}).space
    assert space.get("num_blocks") == Choice(1)
    assert space.get("channels") == Choice(64, 63, 65)


@pytest.mark.parametrize("given", ["space", "near"])
def test_an_option_that_a_target_does_not_have_is_refused(custom, given):
    for spec in (STACK, custom):
        with pytest.raises(SpaceError, match=r"^option.dilation: the target's own space names no"):
            target_of(spec, {given: {"option": {"dilation": 2}}})


def test_an_option_that_a_target_has_may_be_chosen():
    own = Space({"option.dilation": Integers(1, 4)})
    target = Target(build=load(STACK).build, space=own)
    narrow = confined(target, Space({"option.dilation": Choice(2)}))
    assert narrow.space.get("option.dilation") == Choice(2)


def test_a_custom_target_keeps_to_its_own_space(custom):
    space = target_of(custom, {"space": {"channels": "5..20", "batch": 3}}).space
    assert space.get("channels") == Integers(5, 8)
    assert space.get("num_blocks") == Choice(1)
    assert space.get("batch") == Choice(3)
    near = target_of(custom, {"near": {"channels": 8, "num_blocks": 1, "kernel_sizes": [3]}}).space
    assert near.get("channels") == Choice(8, 7)


@pytest.mark.parametrize(
    ("space", "name"),
    [
        ({"space": {"channels": 512}}, "channels"),
        ({"space": {"channels": "9..20"}}, "channels"),
        ({"space": {"kernel_sizes": [[3, 5, 7]]}}, "kernel_sizes"),
        ({"near": {"channels": 8, "num_blocks": 3, "kernel_sizes": [3]}}, "num_blocks"),
    ],
    ids=str,
)
def test_a_custom_target_that_promises_nothing_there_says_so(custom, space, name):
    with pytest.raises(SpaceError, match=rf"^{name}: no value is both in"):
        target_of(custom, space)


def test_a_space_confines_a_target_that_was_made_in_python():
    target = Target(build=load(STACK).build, space=Space(channels=Integers(1, 9)))
    narrow = confined(target, Space(channels=Integers(5, 20), length=Integers(1, 3)))
    assert narrow.space.get("channels") == Integers(5, 9)
    assert narrow.space.get("length") == Integers(1, 3)
    assert target.space == Space(channels=Integers(1, 9))


def test_only_a_space_of_its_own_keeps_an_exhaustive_property_from_all_of_its_cases():
    prop = find_property(EXHAUSTIVE)
    narrow = target_of(STACK, {"space": {"channels": "3..5", "num_blocks": 2}})
    assert prop.space_for(target_of(STACK)) == prop.space
    assert prop.space_for(narrow).get("channels") == Integers(3, 5)
    assert prop.space_for(narrow).get("num_blocks") == Choice(2)


def test_an_exhaustive_property_runs_over_the_users_space_and_nothing_else():
    space = {"channels": "3..5", "num_blocks": 2, "kernel_sizes": [[3], [3, 5, 7]]}
    outcome = ran(Unit(EXHAUSTIVE, STACK, Search(exhaustive=True), space={"space": space}))
    assert (outcome.verdict, outcome.evidence) == (HELD, "exhausted over 6 cases")


@pytest.mark.parametrize("spec", [STACK, BLOCK])
@pytest.mark.parametrize(
    "kernels", [[[3], [4, 3]], {"allowed": [1, 4], "branches": "1..2"}], ids=["lists", "table"]
)
def test_a_contract_class_cannot_be_given_even_kernels(spec, kernels):
    with pytest.raises(SpaceError, match=r"^kernel_sizes: 4 is even, which the contract lets"):
        target_of(spec, {"space": {"kernel_sizes": kernels}})


def test_a_custom_target_may_promise_even_kernels():
    even = Target(build=load(STACK).build, space=Space(kernel_sizes=Choice((4,), (3,))))
    assert confined(even, Space(kernel_sizes=Choice((4,)))).space.get("kernel_sizes") == Choice(
        (4,)
    )


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"space": {"chanels": 3}}, "--space: chanels = 3 is not a key of a space"),
        ({"near": {"channels": 0}}, "--config: channels = 0 is out of range"),
    ],
)
def test_a_space_that_cannot_be_read_is_an_error_and_no_verdict(space, message):
    with pytest.raises(SpaceFileError, match=f"^{message}"):
        target_of(STACK, space)
    outcome = ran(Unit(NAME, STACK, Search(sampled=1), space=space))
    assert (outcome.verdict, outcome.cases) == (INTERNAL_ERROR, 0)
    assert message in outcome.reason


def test_a_target_that_is_not_there_is_a_bad_target():
    outcome = ran(Unit(NAME, "nowhere.py:Stack", Search(sampled=1), device="cuda"))
    assert (outcome.verdict, outcome.cases, outcome.device) == (BAD_TARGET, 0, "cuda")
    assert outcome.reason == "there is no file nowhere.py"
    with pytest.raises(TargetError, match=r"^there is no file nowhere.py"):
        target_of("nowhere.py:Stack")


def test_endless_shrinking_survives():
    unit = Unit(NAME, STACK, Search(shrinking=math.inf))
    assert Unit.loads(unit.dumps()) == unit


def test_a_property_that_is_not_there_is_an_error_and_no_exception():
    assert json.loads(run_unit(Unit("no.such", STACK, Search()).dumps()))["verdict"]


def test_hypothesis_is_not_asked_where_no_case_can_be_drawn(monkeypatch):
    def given(strategy):
        raise AssertionError("it takes long to find out")

    monkeypatch.setattr("hypothesis.given", given)
    name, space = "modes.one_value_per_channel_cannot_train", {"space": {"mode": "train"}}
    outcome = json.loads(run_unit(Unit(name, STACK, Search(drawn=2), space=space).dumps()))
    assert outcome["verdict"] == "nothing asserted"
    assert outcome["reason"] == "no case of its space could be drawn"
