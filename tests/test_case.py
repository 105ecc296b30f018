"""Cases and configurations: their JSON form, their data, and the contract's formulas."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest

from rescnn_verify.case import Case, CaseError, Config

VALID = {
    "defaults": Case(),
    "every field": Case(
        channels=512,
        num_blocks=3,
        kernel_sizes=(3, 5, 7),
        dropout=0.1,
        options=(("dilation", 2), ("norm", "group")),
        batch=0,
        length=960,
        dtype="bfloat16",
        device="cuda",
        layout="strided",
        mode="train",
        seed=2**32 - 1,
        extra=(("order", (2, 0, 1)), ("scale", 1e-12)),
    ),
}
INVALID = {
    "channels true": Case(channels=True),
    "channels a float": Case(channels=8.0),
    "channels negative": Case(channels=-4),
    "channels text": Case(channels="8"),
    "channels missing": Case(channels=None),
    "blocks false": Case(num_blocks=False),
    "blocks a fraction": Case(num_blocks=1.5),
    "no kernel": Case(kernel_sizes=()),
    "kernels of every kind": Case(kernel_sizes=(True, 3.0, -1, 2.5, "3", None)),
    "kernel NaN": Case(kernel_sizes=(3, math.nan)),
    "dropout NaN": Case(dropout=math.nan),
    "dropout infinite": Case(dropout=math.inf),
    "dropout negative infinite": Case(dropout=-math.inf),
    "dropout just above one": Case(dropout=1.0000001),
    "nested": Case(extra=(("invalid", ("kernel_sizes", (1, (math.nan, 2)))),)),
}
EVERY = VALID | INVALID


def alike(a, b):
    """Equal in type and value, NaN equal to NaN."""
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(alike, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return repr(a) == repr(b)
    return type(a) is type(b) and a == b


def through_text(case):
    return Case.from_json(json.loads(case.dumps()))


@pytest.mark.parametrize("case", EVERY.values(), ids=EVERY)
def test_json_round_trip_keeps_every_value_and_its_type(case):
    back = through_text(case)
    for name in Case.__dataclass_fields__:
        assert alike(getattr(back, name), getattr(case, name)), name


@pytest.mark.parametrize("case", EVERY.values(), ids=EVERY)
def test_json_text_is_a_fixed_point(case):
    assert through_text(case).dumps() == case.dumps()


@pytest.mark.parametrize("case", EVERY.values(), ids=EVERY)
def test_json_text_is_standard_json(case):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    json.loads(case.dumps(), parse_constant=refuse)


def test_different_cases_have_different_text():
    assert len({case.dumps() for case in EVERY.values()}) == len(EVERY)


def test_nan_and_infinities_are_tagged():
    data = Case(dropout=math.nan, extra=(("bound", -math.inf),)).to_json()
    assert data["dropout"] == {"float": "nan"}
    assert data["extra"] == {"bound": {"float": "-inf"}}


def test_json_names_every_field_and_the_version():
    assert set(Case().to_json()) == {"version", *Case.__dataclass_fields__}
    assert Case().to_json()["version"] == 1


def test_key_order_is_irrelevant():
    data = Case(kernel_sizes=(3, 5), extra=(("a", 1), ("b", 2))).to_json()
    turned = dict(reversed(data.items())) | {"extra": {"b": 2, "a": 1}}
    assert Case.from_json(turned) == Case.from_json(data)
    assert Case.from_json(turned).dumps() == Case.from_json(data).dumps()


def test_text_names_the_fields_in_alphabetical_order():
    names = list(json.loads(VALID["every field"].dumps()))
    assert names == sorted(names)


def test_text_keeps_the_order_of_kernels():
    assert Case(kernel_sizes=(3, 5)).dumps() != Case(kernel_sizes=(5, 3)).dumps()


def test_fields_left_out_take_their_defaults():
    assert Case.from_json({"version": 1}) == Case()
    assert Case.from_json({"version": 1, "length": 3}) == Case(length=3)


@pytest.mark.parametrize("name", ["extra", "options"])
def test_a_factor_may_have_any_name(name):
    case = Case(**{name: (("float", 2),)})
    assert through_text(case) == case


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([], "object.*list"),
        ("{}", "object.*str"),
        (None, "object.*NoneType"),
        ({}, "version None.*allowed: 1"),
        ({"version": 2}, "version 2.*allowed: 1"),
        ({"version": "1"}, "version '1'.*allowed: 1"),
        ({"version": 1, "chanels": 4}, "no field 'chanels'.*'channels'"),
        ({"version": 1, "batch": -1}, "batch.*at least 0.*-1"),
        ({"version": 1, "batch": True}, "batch.*integer.*True"),
        ({"version": 1, "length": 8.0}, r"length.*integer.*8\.0"),
        ({"version": 1, "length": "8"}, "length.*integer.*'8'"),
        ({"version": 1, "seed": None}, "seed.*integer.*None"),
        ({"version": 1, "seed": {"float": "inf"}}, "seed.*integer.*inf"),
        ({"version": 1, "dtype": 32}, "dtype.*string.*32"),
        ({"version": 1, "device": None}, "device.*string.*None"),
        ({"version": 1, "layout": ["strided"]}, "layout.*string.*strided"),
        ({"version": 1, "mode": True}, "mode.*string.*True"),
        ({"version": 1, "kernel_sizes": 3}, "kernel_sizes.*list.*3"),
        ({"version": 1, "kernel_sizes": "357"}, "kernel_sizes.*list.*'357'"),
        ({"version": 1, "extra": [1]}, r"extra.*object.*\[1\]"),
        ({"version": 1, "options": "x"}, "options.*object.*'x'"),
        ({"version": 1, "dropout": {"float": "many"}}, "tagged float.*many"),
    ],
)
def test_errors_name_the_field_and_quote_the_value(data, words):
    with pytest.raises(CaseError, match=words):
        Case.from_json(data)


def test_the_generator_is_a_function_of_seed_and_purpose_alone():
    one = Case(seed=7, channels=4, length=3, dtype="float64", extra=(("a", 1),))
    other = Case(seed=7, channels=64, length=900, mode="train", kernel_sizes=(5, 7), batch=9)
    assert (one.rng("input").random(20) == other.rng("input").random(20)).all()


def test_the_generator_starts_afresh_each_time():
    case = Case(seed=7)
    case.rng("input").random(1000)
    first = case.rng("input").random(20)
    case.rng("weights").random(1000)
    assert (case.rng("input").random(20) == first).all()


def test_other_seeds_and_purposes_give_other_numbers():
    draws = {
        tuple(Case(seed=seed).rng(purpose).random(4))
        for seed in (0, 1, 11, 2**32 - 1)
        for purpose in ("", "input", "inputs", "1/input")
    }
    assert len(draws) == 16


def test_the_generator_leaves_the_global_one_alone():
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    Case().rng("input").random(10)
    assert (np.random.get_state()[1] == before).all()


def test_the_generator_is_the_same_in_another_process():
    script = "from rescnn_verify import Case; print(Case(seed=7).rng('input').integers(2**32))"
    found = subprocess.run(
        [sys.executable, "-c", script],
        env={"PYTHONHASHSEED": "1", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        check=True,
        text=True,
    )
    assert int(found.stdout) == Case(seed=7).rng("input").integers(2**32)


@pytest.mark.parametrize(
    ("num_blocks", "kernel_sizes", "field"),
    [
        (3, (3, 5, 7), 19),
        (1, (3, 5, 7), 7),
        (1, (3,), 3),
        (7, (1,), 1),
        (2, (11, 1, 3), 21),
        (7, (13, 13), 85),
    ],
)
def test_receptive_field_by_hand(num_blocks, kernel_sizes, field):
    assert Config(num_blocks=num_blocks, kernel_sizes=kernel_sizes).field == field


@pytest.mark.parametrize(
    ("channels", "branches", "widths"),
    [
        (512, 3, (170, 170, 172)),
        (4, 1, (4,)),
        (6, 3, (2, 2, 2)),
        (7, 3, (2, 2, 3)),
        (5, 5, (1, 1, 1, 1, 1)),
        (11, 6, (1, 1, 1, 1, 1, 6)),
        (127, 2, (63, 64)),
    ],
)
def test_branch_widths_by_hand(channels, branches, widths):
    assert Config(channels=channels, kernel_sizes=(3,) * branches).widths == widths


def test_widest_and_branches_count_every_kernel():
    config = Config(kernel_sizes=(3, 9, 9, 1))
    assert (config.widest, config.branches) == (9, 4)


def test_a_case_knows_its_configuration_and_shape():
    case = VALID["every field"]
    options = (("dilation", 2), ("norm", "group"))
    assert case.config == Config(512, 3, (3, 5, 7), 0.1, options)
    assert type(case.config) is Config
    assert case.shape == (0, 512, 960)


def test_factors_and_options_are_read_by_name():
    case = VALID["every field"]
    assert case["scale"] == 1e-12
    assert case.option("norm") == "group"
    with pytest.raises(KeyError):
        case["norm"]


def test_a_case_reads_as_a_person_would_say_it():
    assert str(Case(channels=8, kernel_sizes=(3, 5), seed=4)) == (
        "channels=8, kernel_sizes=[3, 5], num_blocks=1, dropout=0.0, batch=1, length=8, "
        "float32, eval, seed=4"
    )
    text = str(VALID["every field"])
    for part in ("strided", "cuda", "norm='group'", "order=(2, 0, 1)", "scale=1e-12"):
        assert part in text


def test_a_case_is_a_value():
    assert Case(kernel_sizes=(3, 5)) == Case(kernel_sizes=(3, 5))
    assert hash(Case(extra=(("a", 1),))) == hash(Case(extra=(("a", 1),)))
    with pytest.raises(AttributeError):
        Case().channels = 5
