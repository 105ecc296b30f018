"""Locality: a changed position or row changes nothing outside its window or row, to the bit."""

import torch

from rescnn_verify.compare import same_bits
from rescnn_verify.needs import DIRECT, FIELD, INDEPENDENT_ROWS
from rescnn_verify.probes import as_input, positions, randomise, reach
from rescnn_verify.space import INPUTS, Choice, at_least
from rescnn_verify.statement import statement

EVAL = INPUTS.narrow(mode=Choice("eval"), layout=Choice("contiguous", "transposed", "strided"))


@statement(space=EVAL.narrow(batch=at_least(1)), needs=(FIELD, DIRECT), effort=1.5)
def a_changed_position_stays_in_its_window(subject, case):
    """In eval mode changing the input at s leaves every output that does not see s as it was.

    Bitwise for any weights, since the shape and with it the kernel chosen is the same. Positions
    are changed at both ends and between them, by a little and by a lot.
    """
    subject.same_length(case)
    left, right = subject.field(case)
    x = case.rng("input").standard_normal(case.shape)
    model, out = _run(subject, case, x)
    place = int(case.rng("place").choice(positions(case)))
    window = reach(place, left, right, case.length)
    if window.all():
        return
    # What overflows in float16 would spread as 0 · inf.
    size = float(case.rng("size").choice([1.0, 1e-3, 10.0 if case.dtype == "float16" else 1e3]))
    changed = x.copy()
    changed[:, :, place] += size * case.rng("change").standard_normal(case.shape[:2])
    with torch.no_grad():
        after = subject(model, as_input(case, changed))
    kept = torch.from_numpy(~window).to(out.device)
    yield same_bits(after[:, :, kept], out[:, :, kept], f"outputs outside the window of {place}")


@statement(space=EVAL.narrow(batch=at_least(2)), needs=(INDEPENDENT_ROWS,), effort=1.5)
def a_changed_row_stays_in_its_row(subject, case):
    """In eval mode changing one sample of a batch leaves the output of every other as it was."""
    x = case.rng("input").standard_normal(case.shape)
    model, out = _run(subject, case, x)
    row = int(case.rng("row").choice([0, case.batch - 1, case.rng("any").integers(case.batch)]))
    changed = x.copy()
    changed[row] = case.rng("change").standard_normal(case.shape[1:]) * 10
    with torch.no_grad():
        after = subject(model, as_input(case, changed))
    others = torch.arange(case.batch) != row
    yield same_bits(after[others], out[others], f"outputs of the other rows when row {row} changes")


def _run(subject, case, x):
    model = subject.model(case)
    randomise(model, case.rng("weights"))
    with torch.no_grad():
        return model, subject(model, as_input(case, x))
