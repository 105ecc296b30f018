"""Shape: what goes in comes out in the same form, and is a tensor of its own."""

import torch

from rescnn_verify.compare import equal, holds, same_bits
from rescnn_verify.probes import normal_input
from rescnn_verify.space import INPUTS, Choice, Constraint, at_least
from rescnn_verify.statement import statement
from rescnn_verify.subject import CONTEXTS

EMPTY_BATCHES_ONLY_IN_EVAL = Constraint(
    "an empty batch only in eval mode", lambda c: c.batch > 0 or c.mode == "eval"
)
FORWARD = INPUTS.narrow(EMPTY_BATCHES_ONLY_IN_EVAL)


@statement(space=FORWARD, documented=True, inputs=16)
def shape_dtype_and_device_are_kept(subject, case):
    """The output has the promised shape and the input's dtype and device, whatever its layout.

    For the reference contract the shape is the input's own, (batch, channels, length). A batch of
    no sample works in eval mode.
    """
    model = subject.model(case)
    x = normal_input(case)
    with CONTEXTS[str(case.rng("context").choice(list(CONTEXTS)))]():
        out = subject(model, x)
    yield equal(
        tuple(out.shape),
        subject.output_shape(case),
        f"output shape for an input of shape {case.shape}",
    )
    yield equal(out.dtype, x.dtype, "output dtype")
    yield equal(out.device.type, x.device.type, "output device")


@statement(space=FORWARD, documented=True, effort=0.5, inputs=16)
def output_is_finite(subject, case):
    """A standard normal input and the initial weights give finite values, in every dtype."""
    model = subject.model(case)
    with torch.no_grad():
        out = subject(model, normal_input(case))
    bad = int((~torch.isfinite(out)).sum())
    yield holds(bad == 0, "elements that are NaN or infinite", "0", str(bad))


@statement(
    space=FORWARD.narrow(batch=at_least(1), context=Choice(*CONTEXTS)), effort=0.5, inputs=16
)
def output_shares_no_memory_with_the_input(subject, case):
    """Writing into the output changes neither the input nor a later output."""
    model = subject.model(case, mode="eval")
    x = normal_input(case)
    before = x.clone()
    with CONTEXTS[case["context"]]():
        out = subject(model, x)
        first = out.clone()
        out.detach().fill_(3)
        yield same_bits(x, before, "input after writing into the output")
        yield same_bits(subject(model, x), first, "second output after writing into the first")


@statement(
    space=FORWARD.narrow(
        batch=at_least(1), context=Choice(*CONTEXTS),
        then=Choice("another input", "the output", "a shorter input"), calls=Choice(1, 2, 4, 17),
    ),
    effort=0.6,
    inputs=16,
)  # fmt: skip
def earlier_outputs_stay(subject, case):
    """Later calls, on other inputs or on the output, change no output of an earlier one."""
    model = subject.model(case)
    outs, copies = [], []
    given = normal_input(case)
    with CONTEXTS[case["context"]]():
        for i in range(1 + case["calls"]):
            outs.append(subject(model, given))
            copies.append(outs[-1].clone())
            given = normal_input(case, f"input {i}")
            if case["then"] == "the output" and tuple(outs[-1].shape) == case.shape:
                given = outs[-1]
            elif case["then"] == "a shorter input" and case.length > 2:
                given = given[:, :, : case.length // 2 + 1]
    for i, (out, copied) in enumerate(zip(outs[:-1], copies, strict=False)):
        yield same_bits(out, copied, f"output {i} after {len(outs) - 1 - i} later calls")
