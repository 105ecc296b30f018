"""Published implementations, described by the targets in `examples/`: what they keep and what not.

Every verdict here was observed with pytorch-tcn 1.2.3 and monai 1.6.1.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from rescnn_verify import Config, Space
from rescnn_verify.engine import PROFILES, check_property
from rescnn_verify.outcome import FALSIFIED, HELD, NOT_APPLICABLE, Outcome
from rescnn_verify.space import Choice, Integers, Lists
from rescnn_verify.statement import find_property
from rescnn_verify.target import Target, load

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
PACKAGE = {"tcn": "pytorch_tcn", "monai_blocks": "monai"}
# Shrinking goes on to its end: what a shrunk case shows must not depend on the time it took.
QUICK = replace(PROFILES["quick"], shrinking=math.inf)


@functools.cache
def target(name: str) -> Target:
    """The target ``file:attribute`` of the examples; skips when its package is not installed."""
    file, _, attribute = name.partition(":")
    pytest.importorskip(PACKAGE[file])
    return load(f"{EXAMPLES / file}.py:{attribute}")


def promising(name: str, **traits: bool) -> Target:
    """A target that is said to promise more than its package does."""
    described = target(name)
    return replace(described, traits=replace(described.traits, **traits))


def check(described: Target, name: str) -> Outcome:
    return check_property(find_property(name), described, profile=QUICK, seed=0)


def assert_falsified(described: Target, name: str, message: str) -> Outcome:
    outcome = check(described, name)
    assert outcome.verdict == FALSIFIED, outcome
    assert re.search(message, f"{outcome.what}: {outcome.got}"), outcome
    return outcome


KEPT = {
    "tcn:CAUSAL": (
        "shape.shape_dtype_and_device_are_kept",
        "receptive_field.a_nan_reaches_exactly_its_window",
        "locality.a_changed_position_stays_in_its_window",
        "rejection.nan_and_infinity_come_out",
        "gradients.gradients_are_linear",
        "state.copies_are_the_same_function",
    ),
    "tcn:CENTRED": (
        "shape.shape_dtype_and_device_are_kept",
        "locality.a_changed_position_stays_in_its_window",
        "locality.a_changed_row_stays_in_its_row",
        "modes.one_value_per_channel_cannot_train",
    ),
    "tcn:STREAMED_FROM_KERNEL_2": (
        "shape.shape_dtype_and_device_are_kept",
        "receptive_field.a_nan_reaches_exactly_its_window",
        "modes.training_is_a_function_of_the_generator",
    ),
    "monai_blocks:RESIDUAL_UNIT": (
        "shape.shape_dtype_and_device_are_kept",
        "structure.claimed_parameter_count",
        "locality.a_changed_position_stays_in_its_window",
        "rejection.nan_and_infinity_come_out",
        "modes.only_the_state_counts",
    ),
    "monai_blocks:INSTANCE_NORM_UNIT": (
        "shape.shape_dtype_and_device_are_kept",
        "locality.a_changed_row_stays_in_its_row",
        "state.a_pickled_model_is_the_same_function",
    ),
    "monai_blocks:ASPP": (
        "shape.shape_dtype_and_device_are_kept",
        "shape.output_shares_no_memory_with_the_input",
        "locality.a_changed_position_stays_in_its_window",
        "gradients.every_parameter_gets_a_gradient",
    ),
}


@pytest.mark.parametrize(("name", "prop"), [(n, p) for n, props in KEPT.items() for p in props])
def test_keeps(name: str, prop: str) -> None:
    outcome = check(target(name), prop)
    assert outcome.verdict == HELD, outcome
    assert outcome.assertions > 0


# Right behaviour that a careless property takes for wrong.
HOLES = "a dilated field need not be seen position by position, nor up to the ends of the input"
SHAPE = "the output's shape is that of output_shape"
EASILY_ACCUSED = {
    ("tcn:CENTRED", "receptive_field.a_nan_reaches_exactly_its_window"): HOLES,
    ("monai_blocks:RESIDUAL_UNIT", "receptive_field.a_nan_reaches_exactly_its_window"): HOLES,
    ("monai_blocks:ASPP", "receptive_field.a_nan_reaches_exactly_its_window"): HOLES,
    ("monai_blocks:ASPP", "gradients.gradients_are_linear"): SHAPE,
    ("monai_blocks:ASPP", "gradients.accumulating_twice_doubles"): SHAPE,
    ("monai_blocks:ASPP", "modes.one_value_per_channel_cannot_train"): SHAPE,
    ("monai_blocks:ASPP", "state.everything_moves_with_the_model"): SHAPE,
    ("monai_blocks:INSTANCE_NORM_UNIT", "modes.only_the_state_counts"): (
        "a length of 1 is not promised"
    ),
}


@pytest.mark.parametrize(
    ("name", "prop"), list(EASILY_ACCUSED), ids=[f"{n}-{p}" for n, p in EASILY_ACCUSED]
)
def test_right_behaviour_is_not_accused(name: str, prop: str) -> None:
    outcome = check(target(name), prop)
    assert outcome.verdict in (HELD, NOT_APPLICABLE), EASILY_ACCUSED[name, prop]


NOT_PROMISED = {
    ("tcn:CAUSAL", "split.widths_sum_to_channels"): "handles of the blocks",
    ("tcn:CAUSAL", "modes.one_value_per_channel_cannot_train"): "batch norm",
    ("tcn:CAUSAL", "receptive_field.claimed_field_is_the_formula"): "a claimed receptive field",
    ("tcn:CAUSAL", "rejection.impossible_arguments_are_refused"): "refusal of invalid arguments",
    ("tcn:CAUSAL", "state.a_pickled_model_is_the_same_function"): "the model refuses to be pickled",
    ("monai_blocks:RESIDUAL_UNIT", "residual.a_stack_is_the_composition_of_its_blocks"): (
        "a stack of blocks"
    ),
    ("monai_blocks:INSTANCE_NORM_UNIT", "receptive_field.a_nan_reaches_exactly_its_window"): (
        "a known, bounded receptive field"
    ),
    ("monai_blocks:INSTANCE_NORM_UNIT", "structure.claimed_parameter_count"): (
        "a claimed parameter count"
    ),
    ("monai_blocks:ASPP", "rejection.nan_and_infinity_come_out"): "non-finite values kept",
    ("monai_blocks:ASPP", "residual.zeroed_fusion_gives_relu"): (
        "a residual before the last activation"
    ),
}


@pytest.mark.parametrize(
    ("name", "prop"), list(NOT_PROMISED), ids=[f"{n}-{p}" for n, p in NOT_PROMISED]
)
def test_what_is_not_promised_is_not_applicable(name: str, prop: str) -> None:
    outcome = check(target(name), prop)
    assert outcome.verdict == NOT_APPLICABLE
    assert NOT_PROMISED[name, prop] in (outcome.reason or "")


@pytest.mark.parametrize(
    ("prop", "message"),
    [
        ("shape.output_shares_no_memory_with_the_input", "no attribute 'in_channels'"),
        ("modes.modes_switch_and_return", "no attribute 'in_channels'"),
    ],
)
def test_streaming_fails_for_a_kernel_of_one(prop: str, message: str) -> None:
    # The buffer should be empty; it keeps the whole chunk instead, and resetting it then raises.
    outcome = assert_falsified(target("tcn:STREAMED"), prop, message)
    assert outcome.trial[-1].kernel_sizes == (1,)


@pytest.mark.parametrize(
    ("prop", "message"),
    [
        ("modes.eval_is_deterministic", r"after two calls in eval mode: .*padder\.buffer"),
        ("gradients.every_parameter_gets_a_gradient", "inplace operation|a second time"),
    ],
)
def test_streaming_keeps_its_history_in_registered_buffers(prop: str, message: str) -> None:
    assert_falsified(target("tcn:STREAMED_FROM_KERNEL_2"), prop, message)


def test_the_field_of_one_convolution_per_block_is_too_small() -> None:
    def field(config: Config) -> tuple[int, int]:
        left, right = target("tcn:CAUSAL").receptive_field(config)
        return left // 2, right

    halved = replace(target("tcn:CAUSAL"), receptive_field=field)
    assert_falsified(halved, "locality.a_changed_position_stays_in_its_window", "outside")
    assert_falsified(halved, "receptive_field.a_nan_reaches_exactly_its_window", "NaN")


def test_instance_norm_sees_the_whole_window() -> None:
    field = target("monai_blocks:RESIDUAL_UNIT").receptive_field
    bounded = replace(target("monai_blocks:INSTANCE_NORM_UNIT"), receptive_field=field)
    assert_falsified(bounded, "locality.a_changed_position_stays_in_its_window", "outside")


def test_instance_norm_refuses_a_length_of_one_in_eval_mode() -> None:
    space = target("monai_blocks:RESIDUAL_UNIT").space.narrow(length=Integers(1, 40))
    outcome = assert_falsified(
        replace(target("monai_blocks:INSTANCE_NORM_UNIT"), space=space),
        "shape.earlier_outputs_stay",
        "ValueError: Expected more than 1 spatial element",
    )
    assert (outcome.trial[-1].length, outcome.trial[-1].mode) == (1, "eval")


@pytest.mark.parametrize("name", ["monai_blocks:RESIDUAL_UNIT", "monai_blocks:ASPP"])
def test_monai_refuses_even_kernels_by_name(name: str) -> None:
    described = target(name)
    factors = dict(described.space.factors) | {"kernel_sizes": Lists(Choice(2, 4), 1, 1)}
    even = replace(described, space=Space(factors))
    assert_falsified(
        even,
        "shape.earlier_outputs_stay",
        r"NotImplementedError: Same padding not available for kernel_size=\[\d\]",
    )


@pytest.mark.parametrize(
    "name", ["tcn:CAUSAL", "tcn:CENTRED", "monai_blocks:RESIDUAL_UNIT", "monai_blocks:ASPP"]
)
def test_an_unbatched_input_is_taken(name: str) -> None:
    described = promising(name, checks_input=True)
    described = replace(described, space=described.space.narrow(shape=Choice("(channels, length)")))
    assert_falsified(described, "rejection.wrong_rank_or_channels_raise", "a result$")


@pytest.mark.parametrize(
    ("name", "invalid", "refused"),
    [
        ("tcn:CAUSAL", ("dropout", 1.5), True),
        ("tcn:CAUSAL", ("dropout", math.nan), False),
        ("tcn:CAUSAL", ("num_blocks", 0), False),
        ("tcn:CAUSAL", ("one kernel", True), False),
        ("monai_blocks:RESIDUAL_UNIT", ("dropout", 1.5), True),
        ("monai_blocks:RESIDUAL_UNIT", ("dropout", math.nan), False),
        ("monai_blocks:RESIDUAL_UNIT", ("one kernel", 0), False),
        ("monai_blocks:RESIDUAL_UNIT", ("channels", 0), False),
        ("monai_blocks:ASPP", ("kernel_sizes", ()), False),
    ],
)
def test_invalid_arguments(name: str, invalid: tuple, refused: bool) -> None:
    described = promising(name, refuses_invalid=True)
    described = replace(described, space=described.space.narrow(invalid=Choice(invalid)))
    outcome = check(described, "rejection.impossible_arguments_are_refused")
    assert (outcome.verdict, outcome.got) == ((HELD, "") if refused else (FALSIFIED, "a model"))
