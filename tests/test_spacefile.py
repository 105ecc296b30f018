"""Space files: what may be written, what it means, and what somebody is told who wrote it wrong."""

import json
import math
import subprocess
import sys
import tomllib
from contextlib import suppress
from pathlib import Path

import pytest

from rescnn_verify.case import Case, Config
from rescnn_verify.drawing import NoCase, RandomDraw, draw_trial
from rescnn_verify.enumeration import every_case
from rescnn_verify.space import (
    A_CHANNEL_PER_BRANCH,
    ARCHITECTURES,
    INPUTS,
    MORE_THAN_ONE_VALUE_TO_TRAIN,
    Choice,
    Floats,
    Integers,
    Lists,
    Space,
)
from rescnn_verify.spacefile import (
    SpaceFileError,
    config_of,
    neighbourhood,
    read_config,
    read_space,
    read_table,
    space_of,
)

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "space.toml"
DOCUMENT = (ROOT / "docs" / "space.md").read_text(encoding="utf-8")

EVERY_KEY = """
channels = [16, 32]
num_blocks = "1..4"
kernel_sizes = {allowed = [3, 1, 5], branches = "1..3"}
dropout = "0.0..0.5"
batch = [1, 8]
length = "3..90"
dtype = ["float64", "float32"]
layout = "strided"
mode = ["eval", "train"]
seed = "0..99"

[option]
dilation = "1..4"
norm = ["group", "none"]
causal = true
"""
WRITTEN = {
    "every key": EVERY_KEY,
    "the example": EXAMPLE.read_text(encoding="utf-8"),
    "training on little": 'mode = "train"\nbatch = [0, 1, 2]\nlength = "1..2"\n',
    "few channels for many kernels": 'channels = "1..4"\nkernel_sizes = [[3], [3, 5, 7], [1, 1]]\n',
    "nothing": "",
}


def space(**data):
    return space_of(data, "space.toml")


def config(**data):
    return config_of(data, "config.toml")


def refusal(function, *arguments, **data):
    with pytest.raises(SpaceFileError) as caught:
        function(*arguments, **data)
    return str(caught.value)


# --- what is written and what it means -----------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "given", "factor"),
    [
        ("channels", 16, Choice(16)),
        ("channels", [32, 16, 64], Choice(32, 16, 64)),
        ("channels", "12..40", Integers(12, 40)),
        ("channels", " 12 .. 40 ", Integers(12, 40)),
        ("channels", "12..12", Integers(12, 12)),
        ("num_blocks", 3, Choice(3)),
        ("num_blocks", "1..5", Integers(1, 5)),
        ("kernel_sizes", [[3, 5, 7]], Choice((3, 5, 7))),
        ("kernel_sizes", [[3, 3], [3], [2, 4]], Choice((3, 3), (3,), (2, 4))),
        (
            "kernel_sizes",
            {"allowed": [3, 1, 5], "branches": "1..4"},
            Lists(Choice(3, 1, 5), 1, 4),
        ),
        ("kernel_sizes", {"branches": 2, "allowed": [7]}, Lists(Choice(7), 2, 2)),
        ("dropout", 0.25, Choice(0.25)),
        ("dropout", [0.1, 0.0, 1.0], Choice(0.1, 0.0, 1.0)),
        ("dropout", "0.1..0.5", Floats(0.1, 0.5)),
        ("batch", 0, Choice(0)),
        ("batch", "0..8", Integers(0, 8)),
        ("length", [960, 1], Choice(960, 1)),
        ("dtype", "float64", Choice("float64")),
        ("dtype", ["float16", "float32"], Choice("float16", "float32")),
        ("layout", ["expanded", "contiguous"], Choice("expanded", "contiguous")),
        ("mode", "train", Choice("train")),
        ("seed", [0, 2**32 - 1], Choice(0, 2**32 - 1)),
        ("seed", "5..9", Integers(5, 9)),
    ],
)
def test_a_key_gives_the_factor_that_it_describes(key, given, factor):
    assert space(**{key: given}).factors == ((key, factor),)


@pytest.mark.parametrize(
    ("given", "factor"),
    [
        (2, Choice(2)),
        (-1.5, Choice(-1.5)),
        (True, Choice(True)),
        ("group", Choice("group")),
        ("../weights", Choice("../weights")),
        ([2, 1], Choice(2, 1)),
        ([0.5, "auto", False], Choice(0.5, "auto", False)),
        ("-3..4", Integers(-3, 4)),
        ("0.5..2", Floats(0.5, 2.0)),
    ],
)
def test_an_option_is_a_factor_of_its_own(given, factor):
    assert space(option={"width": given}).factors == (("option.width", factor),)


@pytest.mark.parametrize("given", [0, [1, 0], "0..1"])
def test_a_dropout_is_a_float_however_it_is_written(given):
    factor = space(dropout=given).get("dropout")
    ends = (factor.low, factor.high) if isinstance(factor, Floats) else factor.values
    assert {type(value) for value in ends} == {float}


def test_nothing_written_narrows_nothing():
    assert space() == Space()
    assert ARCHITECTURES * INPUTS * space() == ARCHITECTURES * INPUTS


def test_the_order_of_keys_has_no_meaning():
    table = tomllib.loads(EVERY_KEY)
    turned = {key: table[key] for key in reversed(table)}
    turned["option"] = {name: table["option"][name] for name in reversed(table["option"])}
    assert list(turned) != list(table)
    assert space(**turned) == space(**table)


@pytest.mark.parametrize("text", WRITTEN.values(), ids=WRITTEN)
def test_a_table_gives_the_same_space_after_a_journey_as_json(text):
    table = tomllib.loads(text)
    assert space(**json.loads(json.dumps(table, sort_keys=True))) == space(**table)


def test_a_file_gives_the_space_of_its_table(tmp_path):
    path = tmp_path / "space.toml"
    path.write_text(EVERY_KEY, encoding="utf-8")
    assert read_table(path) == tomllib.loads(EVERY_KEY)
    assert read_space(path) == space(**tomllib.loads(EVERY_KEY))
    assert len(read_space(path).factors) == 13


def test_a_byte_order_mark_and_windows_line_ends_are_read_over(tmp_path):
    path = tmp_path / "space.toml"
    path.write_bytes(b"\xef\xbb\xbfchannels = 4\r\nlength = 9\r\n")
    assert read_table(path) == {"channels": 4, "length": 9}


# --- constraints ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "where"),
    [
        ({"channels": 4}, (A_CHANNEL_PER_BRANCH,)),
        ({"kernel_sizes": [[3]]}, (A_CHANNEL_PER_BRANCH,)),
        ({"mode": ["eval", "train"]}, (MORE_THAN_ONE_VALUE_TO_TRAIN,)),
        ({"mode": "eval", "batch": 1, "length": 1}, ()),
        ({"num_blocks": 2, "dropout": 0.0}, ()),
        (
            {"channels": 4, "kernel_sizes": [[3]], "mode": "train"},
            (A_CHANNEL_PER_BRANCH, MORE_THAN_ONE_VALUE_TO_TRAIN),
        ),
    ],
)
def test_a_space_has_the_constraints_that_its_factors_need(data, where):
    assert space(**data).where == where


def test_fewer_channels_than_kernels_are_left_out():
    few = space(channels="1..3", kernel_sizes=[[3, 5, 7], [3]])
    assert [(case.channels, case.branches) for case in every_case(few)] == [
        (1, 1), (2, 1), (3, 3), (3, 1),
    ]  # fmt: skip


def test_one_value_per_channel_is_left_out_in_train_mode():
    cases = every_case(space(batch="0..2", length=[1, 2], mode=["eval", "train"]))
    assert {(case.batch, case.length) for case in cases if case.mode == "train"} == {
        (1, 2), (2, 1), (2, 2),
    }  # fmt: skip


@pytest.mark.parametrize("text", WRITTEN.values(), ids=WRITTEN)
def test_every_case_drawn_lies_in_the_space(text):
    written = space(**tomllib.loads(text))
    everything = written * ARCHITECTURES * INPUTS
    cases = []
    for seed in range(200):
        with suppress(NoCase):
            cases += draw_trial(RandomDraw(seed), everything)
    assert len(cases) > 200
    assert [case for case in cases if case not in written or case not in everything] == []


# --- refusals ------------------------------------------------------------------------------------

CHANNELS = 'an integer of at least 1, a list such as [16, 32], or a range such as "12..40"'
BLOCKS = 'an integer of at least 1, a list such as [1, 3], or a range such as "1..5"'
BATCHES = 'an integer of at least 0, a list such as [1, 8], or a range such as "0..16"'
LENGTHS = 'an integer of at least 1, a list such as [64, 960], or a range such as "1..100"'
SEEDS = 'an integer from 0 to 4294967295, a list such as [0, 1], or a range such as "0..99"'
DROPOUTS = 'a number from 0 to 1, a list such as [0.0, 0.1], or a range such as "0.1..0.5"'
DTYPES = '"float32", "float64", "bfloat16", "float16", or a list of these'
LAYOUTS = '"contiguous", "transposed", "strided", "expanded", or a list of these'
MODES = '"eval", "train", or a list of these'
SIZES = "a list of integers of at least 1 such as [3, 5, 7]"
TABLE = 'or a table such as {allowed = [1, 3, 5], branches = "1..4"}'
LISTS = f"a list of kernel lists such as [[3, 5, 7], [3, 3]], {TABLE}"
OPTIONS = "the line [option], and below it the target's further arguments as name = value"
SCALAR = "a finite number, a string, true or false"
VALUES = f'{SCALAR}, a list of them such as [1, 2], or a range such as "1..4"'


@pytest.mark.parametrize(
    ("written", "complaint", "allowed"),
    [
        ('channels = "12-40"', "is not understood", CHANNELS),
        ('channels = "12.."', "is not understood", CHANNELS),
        ('channels = "12..40..50"', "is not understood", CHANNELS),
        ('channels = "12"', "is not understood", CHANNELS),
        ("channels = true", "is not understood", CHANNELS),
        ("channels = 16.0", "is not understood", CHANNELS),
        ("channels = {from = 1, to = 9}", "is not understood", CHANNELS),
        ("channels = 1979-05-27", "is not understood", CHANNELS),
        ("channels = 0", "is out of range", CHANNELS),
        ("channels = -4", "is out of range", CHANNELS),
        ("channels = 9223372036854775808", "is out of range", CHANNELS),
        ("channels = []", "is empty", CHANNELS),
        ("channels = [16, 0]", "has 0, which is out of range", CHANNELS),
        ("channels = [16, true]", "has true, which is not understood", CHANNELS),
        ('channels = [16, "2..3"]', 'has "2..3", which is not understood', CHANNELS),
        ("channels = [[16]]", "has [16], which is not understood", CHANNELS),
        ("channels = [16, 32, 16]", "has 16 and 16, which are equal", CHANNELS),
        ('channels = "40..12"', "goes down from 40 to 12", CHANNELS),
        ('channels = "0..12"', "has 0, which is out of range", CHANNELS),
        ('channels = "0.5..3"', "has 0.5, which is not understood", CHANNELS),
        ("num_blocks = 0", "is out of range", BLOCKS),
        ('num_blocks = "5..1"', "goes down from 5 to 1", BLOCKS),
        ("batch = -1", "is out of range", BATCHES),
        ('length = "0..9"', "has 0, which is out of range", LENGTHS),
        ("seed = 4294967296", "is out of range", SEEDS),
        ("seed = -1", "is out of range", SEEDS),
        ("dropout = 1.5", "is out of range", DROPOUTS),
        ("dropout = -0.1", "is out of range", DROPOUTS),
        ("dropout = nan", "is out of range", DROPOUTS),
        ("dropout = inf", "is out of range", DROPOUTS),
        ("dropout = true", "is not understood", DROPOUTS),
        ('dropout = "0.5"', "is not understood", DROPOUTS),
        ("dropout = [0.1, nan]", "has nan, which is out of range", DROPOUTS),
        ("dropout = [0, 0.5, 0.0]", "has 0 and 0.0, which are equal", DROPOUTS),
        ('dropout = "nan..0.5"', "has nan, which is out of range", DROPOUTS),
        ('dropout = "0.1..1.5"', "has 1.5, which is out of range", DROPOUTS),
        ('dropout = "0.5..0.1"', "goes down from 0.5 to 0.1", DROPOUTS),
        ('dtype = "float23"', "is not understood", DTYPES),
        ("dtype = 32", "is not understood", DTYPES),
        ('dtype = "16..32"', "has 16, which is not understood", DTYPES),
        ('dtype = ["float32", "int8"]', 'has "int8", which is not understood', DTYPES),
        ('dtype = ["float32", "float32"]', 'has "float32" and "float32", which are', DTYPES),
        ("layout = []", "is empty", LAYOUTS),
        ('mode = "evaluate"', "is not understood", MODES),
        ("kernel_sizes = 3", "is not understood", LISTS),
        ('kernel_sizes = "1..5"', "is not understood", LISTS),
        ("kernel_sizes = [3, 5, 7]", "is one kernel list", f"[[3, 5, 7]], or {LISTS}"),
        ("kernel_sizes = []", "is empty", LISTS),
        ("kernel_sizes = [[3], []]", "has [], which is empty", LISTS),
        ("kernel_sizes = [[3], 5]", "has 5, which is not a list", LISTS),
        ("kernel_sizes = [[3, 0]]", "has 0, which is out of range", LISTS),
        ("kernel_sizes = [[3, true]]", "has true, which is not understood", LISTS),
        ("kernel_sizes = [[3, 5.0]]", "has 5.0, which is not understood", LISTS),
        ("kernel_sizes = [[3, 5], [3, 5]]", "has [3, 5] and [3, 5], which are equal", LISTS),
        ("kernel_sizes = {allowed = [3]}", "must name allowed and branches and nothing", LISTS),
        ("kernel_sizes = {sizes = [3], branches = 1}", "must name allowed and branches", LISTS),
        ("option = 3", "is not a table", OPTIONS),
        ("option = [{dilation = 1}]", "is not a table", OPTIONS),
    ],
)
def test_a_wrong_value_is_refused_with_file_key_value_and_what_is_allowed(
    written, complaint, allowed
):
    message = refusal(space, **tomllib.loads(written))
    assert message.startswith(f"space.toml: {written} {complaint}")
    assert message.endswith(f"; write {allowed}")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"allowed": 3, "branches": 1}, f"allowed = 3 is not understood; write {SIZES}"),
        ({"allowed": [], "branches": 1}, f"allowed = [] is empty; write {SIZES}"),
        (
            {"allowed": [3, -1], "branches": 1},
            f"allowed = [3, -1] has -1, which is out of range; write {SIZES}",
        ),
        (
            {"allowed": [3, 5, 3], "branches": 1},
            f"allowed = [3, 5, 3] has 3 and 3, which are equal; write {SIZES}",
        ),
        ({"allowed": [3], "branches": 0}, "branches = 0 is out of range"),
        ({"allowed": [3], "branches": [1, 2]}, "branches = [1, 2] is not understood"),
        ({"allowed": [3], "branches": "1-4"}, 'branches = "1-4" is not understood'),
        ({"allowed": [3], "branches": "4..1"}, 'branches = "4..1" goes down from 4 to 1'),
        ({"allowed": [3], "branches": "0..1"}, 'branches = "0..1" has 0, which is out of range'),
        (
            {"allowed": [3], "branches": True},
            "branches = true is not understood; write an integer of at least 1, or a range such "
            'as "1..4"',
        ),
    ],
)
def test_a_wrong_table_of_kernels_is_refused_with_the_key_inside_it(table, message):
    assert refusal(space, kernel_sizes=table).startswith(f"space.toml: kernel_sizes.{message}")


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (math.nan, "nan is out of range"),
        (-math.inf, "-inf is out of range"),
        ([1.0, math.inf], "[1.0, inf] has inf, which is out of range"),
        (None, "None is not understood"),
        ({"deeper": 1}, "{deeper = 1} is not understood"),
        ([], "[] is empty"),
        ([[1, 2], [3]], "[[1, 2], [3]] has [1, 2], which is not understood"),
        (["1..4", "auto"], '["1..4", "auto"] has "1..4", which is not understood'),
        ([2, 1, 2], "[2, 1, 2] has 2 and 2, which are equal"),
        ([1, True], "[1, true] has 1 and true, which are equal"),
        ("4..1", '"4..1" goes down from 4 to 1'),
        ("0.5..inf", '"0.5..inf" has inf, which is out of range'),
    ],
)
def test_a_wrong_option_is_refused_with_its_name_and_what_is_allowed(given, complaint):
    message = refusal(space, option={"width": given})
    assert message == f"space.toml: option.width = {complaint}; write {VALUES}"


def test_a_key_below_the_options_is_not_taken_for_one():
    misplaced = tomllib.loads("[option]\ndilation = 2\nchannels = 4\n")
    assert refusal(space, **misplaced) == (
        "space.toml: option.channels = 4 is below [option]; write channels above the line [option]"
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"chanels": 4}, "chanels = 4 is not a key of a space; did you mean channels? allowed: "),
        ({"kernel_size": [3]}, "kernel_size = [3] is not a key of a space; did you mean kernel_s"),
        ({"options": {"a": 1}}, "options = {a = 1} is not a key of a space; did you mean option?"),
        ({"zzz": "x"}, 'zzz = "x" is not a key of a space; allowed: channels, num_blocks, '),
    ],
)
def test_an_unknown_key_is_refused_with_the_closest_and_those_allowed(data, message):
    refused = refusal(space, channels=4, **data)
    assert refused.startswith(f"space.toml: {message}")
    assert refused.endswith(
        "allowed: channels, num_blocks, kernel_sizes, dropout, option, batch, length, dtype, "
        "layout, mode, seed"
    )


@pytest.mark.parametrize(("read", "what"), [(space, "a space"), (config, "a configuration")])
def test_a_device_is_left_to_the_command_line(read, what):
    assert refusal(read, device="cuda").endswith(
        f'.toml: device = "cuda" is not a key of {what}; the command line gives it: --device'
    )


@pytest.mark.parametrize(
    ("written", "longest", "most"),
    [
        ("channels = 2\nkernel_sizes = [[3], [3, 5, 7]]", 3, 2),
        ('channels = "1..3"\nkernel_sizes = {allowed = [3, 5], branches = "1..4"}', 4, 3),
        ("channels = [2, 1]\nkernel_sizes = {allowed = [3, 5], branches = 3}", 3, 2),
    ],
)
def test_kernels_for_which_no_channels_suffice_are_refused(written, longest, most):
    channels, kernels = written.splitlines()
    assert refusal(space, **tomllib.loads(written)) == (
        f"space.toml: {kernels} has a list of {longest} kernels, which needs at least {longest} "
        f"channels, and {channels}; write at most {most} kernels in a list or allow at least "
        f"{longest} channels"
    )


def test_as_many_channels_as_kernels_suffice():
    assert list(every_case(space(channels=[1, 3], kernel_sizes=[[3, 5, 7]])))


@pytest.mark.parametrize(
    "sizes", [{"batch": 1, "length": 1}, {"batch": 0}, {"batch": "0..1", "length": [1]}]
)
def test_nothing_but_training_on_one_value_is_refused(sizes):
    message = refusal(space, mode=["train"], **sizes)
    assert message.startswith('space.toml: mode = ["train"] needs more than one value per channel')
    assert all(f"{key} = " in message for key in sizes)
    assert message.endswith('; write "eval", or allow a larger batch or length')


@pytest.mark.parametrize("sizes", [{"batch": 1}, {"length": 1}, {"batch": "0..2", "length": 1}])
def test_training_on_more_than_one_value_is_not_refused(sizes):
    assert space(mode="train", **sizes).get("mode") == Choice("train")


def test_a_long_value_is_cut_off():
    message = refusal(space, channels=[*range(1, 500), 0])
    assert message.startswith("space.toml: channels = [1, 2, 3, ")
    assert "... has 0, which is out of range; write" in message
    assert len(message) < 300


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("read", [read_table, read_space, read_config])
def test_a_missing_file_is_refused_by_name(read, tmp_path):
    path = tmp_path / "none.toml"
    assert refusal(read, path) == f"there is no file {path}"


@pytest.mark.parametrize("read", [read_table, read_space, read_config])
def test_a_directory_is_refused_by_name(read, tmp_path):
    assert refusal(read, tmp_path) == f"{tmp_path} is a directory; name a TOML file"


def test_a_file_that_cannot_be_read_is_refused_with_the_reason(tmp_path):
    path = tmp_path / "space.toml" / "within"
    path.parent.write_text("channels = 4")
    assert refusal(read_table, path) == f"{path} cannot be read: Not a directory"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"channels = 4\nlength = 1..9\n", "(at line 2, column 11)"),
        (b"channels = 4\nchannels = 5\n", "Cannot overwrite a value"),
        (b"channels = \xff\n", "it is not UTF-8 text"),
        (b"channels = " + b"9" * 5000, "integer"),
    ],
)
def test_what_is_not_toml_is_refused_with_the_place_or_the_reason(content, reason, tmp_path):
    path = tmp_path / "space.toml"
    path.write_bytes(content)
    message = refusal(read_table, path)
    assert message.startswith(f"{path} is not TOML: ")
    assert reason in message


@pytest.mark.parametrize("read", [read_space, read_config])
def test_a_wrong_value_in_a_file_is_refused_with_its_path(read, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("channels = 0\n", encoding="utf-8")
    assert refusal(read, path).startswith(f"{path}: channels = 0 is out of range; write an integer")


# --- configurations ------------------------------------------------------------------------------


def test_a_configuration_left_out_is_that_of_the_documented_stack():
    assert config() == Config(channels=512, num_blocks=3, kernel_sizes=(3, 5, 7), dropout=0.1)


def test_a_configuration_is_read_as_written(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(
        "channels = 48\nkernel_sizes = [9, 2, 9]\nnum_blocks = 2\ndropout = 0\n"
        '[option]\nnorm = "group"\ndilation = 2\n',
        encoding="utf-8",
    )
    assert read_config(path) == Config(
        channels=48,
        num_blocks=2,
        kernel_sizes=(9, 2, 9),
        dropout=0.0,
        options=(("dilation", 2), ("norm", "group")),
    )
    assert isinstance(read_config(path).dropout, float)


@pytest.mark.parametrize(
    ("written", "complaint"),
    [
        ("channels = [16, 32]", "is not understood; write an integer of at least 1"),
        ('channels = "12..40"', "is not understood; write an integer of at least 1"),
        ("channels = 0", "is out of range; write an integer of at least 1"),
        ("num_blocks = 1.0", "is not understood; write an integer of at least 1"),
        ("dropout = 1.01", "is out of range; write a number from 0 to 1"),
        ("dropout = [0.1]", "is not understood; write a number from 0 to 1"),
        ("kernel_sizes = 3", f"is not a list; write {SIZES}"),
        ("kernel_sizes = []", f"is empty; write {SIZES}"),
        ("kernel_sizes = [[3, 5]]", f"has [3, 5], which is not understood; write {SIZES}"),
        ("kernel_sizes = [3, 0]", f"has 0, which is out of range; write {SIZES}"),
        ("option = 1", f"is not a table; write {OPTIONS}"),
        ("option.width = [1, 2]", f"is not understood; write {SCALAR}"),
        ('option.width = "1..2"', f"is not understood; write {SCALAR}"),
        ("option.channels = 2", "is below [option]; write channels above the line [option]"),
        (
            "batch = 4",
            "is not a key of a configuration; allowed: channels, num_blocks, kernel_sizes, "
            "dropout, option",
        ),
    ],
)
def test_a_wrong_configuration_is_refused_with_file_key_value_and_what_is_allowed(
    written, complaint
):
    message = refusal(config, **tomllib.loads(written))
    assert message == f"config.toml: {written} {complaint}"


def test_fewer_channels_than_kernels_are_refused_in_a_configuration():
    assert refusal(config, channels=2) == (
        "config.toml: kernel_sizes = [3, 5, 7] has a list of 3 kernels, which needs at least 3 "
        "channels, and channels = 2; write at most 2 kernels in a list or allow at least 3 channels"
    )
    assert config(channels=3).channels == 3


# --- neighbourhoods ------------------------------------------------------------------------------

CONFIGS = {
    "documented": config(),
    "smallest": Config(channels=1, num_blocks=1, kernel_sizes=(3,), dropout=0.0),
    "a channel for each kernel": Config(channels=3, kernel_sizes=(3, 3, 5), dropout=1.0),
    "with options": Config(channels=9, options=(("dilation", 2), ("norm", "group"))),
}


def test_a_neighbourhood_is_one_step_away_in_each_factor():
    assert neighbourhood(config()) == Space(
        channels=Choice(512, 511, 513),
        num_blocks=Choice(3, 2, 4),
        kernel_sizes=Choice(
            (3, 5, 7),
            (7, 5, 3),
            (5, 7),
            (3, 7),
            (3, 5),
            (3, 3, 5, 7),
            (3, 5, 5, 7),
            (3, 5, 7, 7),
        ),
        dropout=Choice(0.1, 0.0, 1.0),
        where=(A_CHANNEL_PER_BRANCH,),
    )


def test_a_neighbourhood_names_nothing_twice_and_nothing_impossible():
    assert neighbourhood(CONFIGS["smallest"]) == Space(
        channels=Choice(1, 2),
        num_blocks=Choice(1, 2),
        kernel_sizes=Choice((3,), (3, 3)),
        dropout=Choice(0.0, 1.0),
        where=(A_CHANNEL_PER_BRANCH,),
    )
    tight = neighbourhood(CONFIGS["a channel for each kernel"])
    assert tight.get("channels") == Choice(3, 4)
    assert tight.get("kernel_sizes") == Choice(
        (3, 3, 5), (5, 3, 3), (3, 5), (3, 3), (3, 3, 3, 5), (3, 3, 5, 5)
    )
    assert tight.get("dropout") == Choice(1.0, 0.0)


def test_the_options_of_a_neighbourhood_stay_as_they_are():
    around = neighbourhood(CONFIGS["with options"])
    assert around.get("option.dilation") == Choice(2)
    assert around.get("option.norm") == Choice("group")


@pytest.mark.parametrize("centre", CONFIGS.values(), ids=CONFIGS)
def test_a_neighbourhood_begins_with_its_configuration(centre):
    first = next(every_case(neighbourhood(centre)))
    assert first.config == centre
    assert Case(**vars(centre), batch=7, length=1) in neighbourhood(centre)


def test_the_left_of_a_product_says_that_a_configuration_is_the_simplest():
    around = neighbourhood(Config(channels=8, num_blocks=2, kernel_sizes=(5, 3), dropout=0.1))
    both = around * ARCHITECTURES
    assert next(every_case(both)).config == next(every_case(around)).config
    assert [both.get(name) for name, _ in around.factors] == [f for _, f in around.factors]


@pytest.mark.parametrize("centre", CONFIGS.values(), ids=CONFIGS)
def test_every_neighbour_has_a_channel_for_each_kernel_and_comes_once(centre):
    around = neighbourhood(centre)
    cases = list(every_case(around))
    assert len(set(cases)) == len(cases)
    assert {case.kernel_sizes for case in cases} == set(around.get("kernel_sizes").values)
    assert all(case.channels >= case.branches for case in cases)


# --- the documentation ---------------------------------------------------------------------------


def test_the_document_shows_the_example_as_it_is():
    assert f"```toml\n{WRITTEN['the example']}```\n" in DOCUMENT


def test_the_example_lies_within_the_contract():
    example = read_space(EXAMPLE)
    within = example * ARCHITECTURES * INPUTS
    assert len(example.factors) == 8
    assert [name for name, factor in example.factors if within.get(name) != factor] == []


def test_the_commented_option_of_the_example_can_be_used():
    text = WRITTEN["the example"]
    used = text.replace("# [option]", "[option]").replace("# dilation", "dilation")
    assert space(**tomllib.loads(used)).get("option.dilation") == Choice(1, 2)


def test_the_document_names_every_key():
    keys = refusal(space, zzz=1).partition("allowed: ")[2].split(", ")
    rows = [line.split("`")[1] for line in DOCUMENT.splitlines() if line.startswith("| `")]
    assert sorted(row.strip("[]") for row in rows) == sorted(keys)


def cells():
    """What the document's table says may be written: key and TOML value."""
    for line in DOCUMENT.splitlines():
        if line.startswith("| `"):
            key, *rest = line.split("`")[1::2]
            yield from ((key, text) for text in rest if "=" not in text or text.startswith("{"))


def test_what_the_document_allows_is_allowed():
    found = list(cells())
    assert len(found) > 20
    for key, text in found:
        value = tomllib.loads(f"value = {text}")["value"]
        assert space(**({"option": {"x": value}} if key == "[option]" else {key: value})).factors


def test_reading_needs_neither_torch_nor_hypothesis():
    code = "import sys, rescnn_verify.spacefile; print({'torch', 'hypothesis'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"
