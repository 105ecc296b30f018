"""Receptive field: claimed = formula = measured, window by window."""

import numpy as np
import torch

from rescnn_verify.bounds.roundoff import SIGNIFICAND_BITS
from rescnn_verify.compare import attempt, equal, same_bits
from rescnn_verify.needs import A_FIELD_CLAIM, CONTRACT, DIRECT, FIELD, HANDLES, STACK
from rescnn_verify.probes import (
    as_input,
    impulse_rows,
    make_end_taps,
    make_positive,
    positions,
    randomise,
    reach,
)
from rescnn_verify.space import INPUTS, Choice, Constraint, Space, at_least
from rescnn_verify.statement import statement

EVAL_ROW = INPUTS.narrow(mode=Choice("eval"), batch=Choice(1), layout=Choice("contiguous"))
# In bfloat16 a correct oneDNN convolution of an odd channel count spreads NaN by one position, and
# in float16 the end of a deep impulse response underflows.
NAN_SAFE = EVAL_ROW.narrow(dtype=Choice("float32", "float64"))
UNDERFLOW_SAFE = EVAL_ROW.narrow(dtype=Choice("float32", "float64", "bfloat16"))
COEFFICIENTS_FIT = Constraint(
    "3^num_blocks within the dtype's significand",
    lambda c: 3**c.num_blocks <= 2 ** SIGNIFICAND_BITS[c.dtype],
)


@statement(space=Space(), needs=(A_FIELD_CLAIM, FIELD), documented=True, effort=4)
def claimed_field_is_the_formula(subject, case):
    """The claimed receptive field is left + right + 1; 1 + num_blocks·(widest kernel − 1) here."""
    model = subject.model(case)
    claim = subject.target.claims["receptive field"]
    claimed = attempt("claimed receptive field", lambda: claim(model, case.config))
    left, right = subject.field(case)
    yield equal(claimed, left + right + 1, "claimed receptive field")
    yield equal(isinstance(claimed, int), True, "claimed receptive field is an int")


@statement(space=NAN_SAFE, needs=(FIELD, DIRECT))
def a_nan_reaches_exactly_its_window(subject, case):
    """In eval mode NaN at position s makes exactly the outputs whose window holds s NaN.

    NaN survives multiplication by 0, so this sees every term, also one that is multiplied by zero
    or averaged over all positions. Both ends are always among the positions: padding other than
    by zeros shows only there. Row i holds one NaN, and the other rows do not see it. Of a field
    that is not dense only the two ends must see it, besides nothing outside.
    """
    subject.same_length(case)
    left, right = subject.field(case)
    model = subject.model(case)
    randomise(model, case.rng("weights"))
    places = positions(case)
    values = case.rng("input").standard_normal((len(places), case.channels, case.length))
    values[impulse_rows(case, places, 1.0) != 0] = np.nan
    with torch.no_grad():
        out = subject(model, as_input(case, values))
    for row, place in enumerate(places):
        window = torch.from_numpy(reach(place, left, right, case.length))
        seen = torch.isnan(out[row]).any(dim=0).cpu()
        if not subject.target.traits.dense_field:
            ends = [t for t in (place - right, place + left) if 0 <= t < case.length]
            blind = [t for t in ends if not seen[t]]
            yield equal(blind, [], f"ends of the window that do not see NaN at position {place}")
            seen = seen | window
        yield same_bits(seen, window, f"outputs that see NaN at position {place}")
        everywhere = torch.isnan(out[row]).all(dim=0)
        if subject.target.follows_contract:
            yield same_bits(everywhere, window, f"outputs NaN in all channels for {place}")


@statement(space=UNDERFLOW_SAFE, needs=(FIELD, HANDLES, DIRECT))
def an_impulse_reaches_exactly_its_window(subject, case):
    """With positive weights an impulse at s gives a positive output exactly where s is seen.

    No term cancels and no ReLU cuts, so this sees every tap that is missing.
    """
    left, right = subject.field(case)
    model = subject.model(case)
    make_positive(subject.handles(model, case), case.rng("weights"))
    places = positions(case)
    with torch.no_grad():
        out = subject(model, as_input(case, impulse_rows(case, places, 1.0)))
    for row, place in enumerate(places):
        window = torch.from_numpy(reach(place, left, right, case.length))
        seen = (out[row] > 0).all(dim=0)
        yield same_bits(seen, window, f"outputs that see an impulse at position {place}")
        quiet = (out[row] == 0).all(dim=0)
        yield same_bits(quiet, ~window, f"outputs that do not see position {place}")


@statement(space=NAN_SAFE.narrow(num_blocks=at_least(2)), needs=(STACK, HANDLES, DIRECT))
def each_block_has_the_field_of_its_widest_kernel(subject, case):
    """Every block of a stack, called alone, sees (widest kernel − 1)/2 positions to either side."""
    model = subject.model(case)
    side = case.widest // 2
    places = positions(case)
    x = as_input(case, impulse_rows(case, places, 1.0))
    blocks = subject.lone_blocks(model, case)
    make_positive(blocks, case.rng("weights"))
    for i, block in enumerate(blocks):
        with torch.no_grad():
            out = subject.run_block(block, x)
        for row, place in enumerate(places):
            window = torch.from_numpy(reach(place, side, side, case.length))
            seen = (out[row] > 0).all(dim=0)
            yield same_bits(seen, window, f"outputs of block {i} that see position {place}")


@statement(space=NAN_SAFE.narrow(COEFFICIENTS_FIT), needs=(CONTRACT, DIRECT))
def impulse_response_is_a_polynomial_power(subject, case):
    """With taps 1 at both ends of the widest kernel the response is (1 + z^r + z^−r)^n, exactly.

    One block adds to its input the sum of its two end taps, so n blocks convolve the impulse n
    times with (1, 0, …, 0, 1, 0, …, 0, 1): a polynomial power, cut off at the ends of the signal
    after every block as zero padding does. Its coefficients are at most 3^n, which is
    within the dtype's significand.
    """
    side = case.widest // 2
    one_block = np.zeros(2 * side + 1, dtype=np.int64)
    one_block[[0, side, 2 * side]] = 1 if side else 2
    model = subject.model(case)
    make_end_taps(subject.handles(model, case), case.dtype)
    places = positions(case)
    values = np.zeros((len(places), case.channels, case.length))
    expected = np.zeros_like(values)
    for row, place in enumerate(places):
        values[row, 0, place] = 1
        response = values[row, 0].astype(np.int64)
        for _ in range(case.num_blocks):
            response = np.convolve(response, one_block)[side : side + case.length]
        expected[row, 0] = response
    with torch.no_grad():
        out = subject(model, as_input(case, values))
    yield same_bits(out, expected, f"impulse responses at positions {places}")
