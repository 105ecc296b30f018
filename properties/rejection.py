"""Rejection: what cannot be honoured is refused clearly, never computed wrongly in silence."""

import math
import re
from dataclasses import replace

import numpy as np
import torch

from rescnn_verify.compare import attempt, describe, equal, holds, refuses, same_bits
from rescnn_verify.invalid import IMPOSSIBLE, UNUSUAL, legal_equal, spoilable, spoiled
from rescnn_verify.needs import CHECKED_INPUT, CONTRACT, DIRECT, NONFINITE, REFUSALS
from rescnn_verify.probes import as_input, positions, randomise
from rescnn_verify.space import INPUTS, Choice, Constraint, Integers, Lists, Space, at_least
from rescnn_verify.statement import statement
from rescnn_verify.subject import CONTEXTS, NotApplicable


def _has_argument(target, invalid):
    """Whether the target's space names the argument (a block has no number of blocks)."""
    kind, value = invalid
    if kind == "num_blocks":
        return target.space.get(kind) not in (None, Choice(1))
    if kind in ("kernel_sizes", "one kernel", "two kernels"):
        kernels = target.space.get("kernel_sizes")
        return isinstance(kernels, Lists) and (value != () or kernels.high > 1)
    return target.space.get(kind) is not None


@statement(
    space=Space(invalid=Choice(*IMPOSSIBLE), more=Integers(0, 9), seed=INPUTS.get("seed")),
    needs=(REFUSALS,),
    effort=6,
)
def impossible_arguments_are_refused(subject, case):
    """What has no meaning is refused at construction, naming the argument and its value.

    That is: a non-positive or non-integer count or kernel (a bool is not an integer), no kernel, a
    dropout outside [0, 1] or NaN. The error is one of the target's declared types. That a model of
    equal arguments that are legal was built before (``True == 1``) makes no difference.
    """
    how = case["invalid"]
    if not (_has_argument(subject.target, how) and spoilable(case.config, how)):
        return
    config, names, value = spoiled(_with_more_kernels(subject, case), case["invalid"], case.seed)
    if subject.target.follows_contract and (legal := legal_equal(config)):
        subject.build_with(legal)
    what = f"building {config.describe()}"
    error = refuses(lambda: subject.target.build(config), subject.target.errors, what)
    yield holds(error is not None, what, "a refusal", "a model")
    yield from _names_its_reason(error, names, value, what)


@statement(
    space=INPUTS.narrow(
        Constraint("enough kernels", lambda c: spoilable(c.config, c["invalid"])),
        invalid=Choice(*UNUSUAL), more=Integers(0, 9), mode=Choice("eval"), dtype=Choice("float64"),
        batch=Choice(2), layout=Choice("contiguous"), length=Integers(1, 40),
    ),
    needs=(REFUSALS, CONTRACT), effort=6)  # fmt: skip
def unusual_arguments_are_refused_or_honoured(subject, case):
    """Even kernels and fewer channels than kernels are refused clearly or honoured fully.

    Honoured means: every length, 1 included, comes out as it went in; the claimed receptive field
    is the formula's and the measured one; and with all parameters zero the output is relu(x).
    """
    config, names, value = spoiled(_with_more_kernels(subject, case), case["invalid"], case.seed)
    what = f"building {config.describe()}"
    error = refuses(lambda: subject.target.build(config), subject.target.errors, what)
    if error is not None:
        yield from _names_its_reason(error, names, value, what)
        return
    model = subject.set_mode(subject.build_with(config).double(), "eval")
    randomise(model, case.rng("weights"))
    n, widest = config.num_blocks, max(config.kernel_sizes)
    for length in sorted({1, 2, 3, widest, widest + 1, 2 * widest - 3, case.length} - {0, -1}):
        x = torch.from_numpy(case.rng("input").standard_normal((2, config.channels, length)))
        with torch.no_grad():
            out = subject(model, x)
        yield equal(tuple(out.shape), tuple(x.shape), f"output shape for {config.describe()}")
    if (claim := subject.target.claims.get("receptive field")) is not None:
        claimed = attempt("claimed receptive field", lambda: claim(model, config))
        yield equal(
            claimed, 1 + n * (widest - 1), f"claimed receptive field for {config.describe()}"
        )
    length = 4 * n * widest + 1
    x = torch.from_numpy(case.rng("input").standard_normal((1, config.channels, length)))
    x[0, 0, length // 2] = math.nan
    with torch.no_grad():
        seen = torch.isnan(subject(model, x)).any(dim=1)[0]
    yield equal(int(seen.sum()), 1 + n * (widest - 1), f"measured field for {config.describe()}")
    for length in (1, 2, case.length, 4 * widest):
        x = torch.from_numpy(case.rng("input").standard_normal((2, config.channels, length)))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
            out = subject(model, x)
        yield same_bits(
            out, torch.relu(x), f"output of {config.describe()} with all parameters zero"
        )


def _with_more_kernels(subject, case):
    """The case's configuration with ``more`` kernels, where all lists of kernels are promised."""
    if not subject.target.follows_contract:
        return case.config
    kernels = (*case.kernel_sizes, *case.rng("more").choice([3, 5, 7], case["more"]).tolist())
    return replace(case.config, kernel_sizes=kernels, channels=max(case.channels, len(kernels)))


def _names_its_reason(error, names, value, what):
    text = str(error)
    for name in names:
        yield holds(name in text.lower(), f"{what}: message", f"it names the {name}s", repr(text))
    if value is not None:
        spelled = {repr(value), str(value)}
        if isinstance(value, float) and (math.isnan(value) or float(f"{value:g}") == value):
            spelled.add(f"{value:g}")
        named = any(
            re.search(rf"(?<![\w.]){re.escape(form)}(?![\w.]*\w)", text) for form in spelled
        )
        yield holds(named, f"{what}: message", f"it gives the value {value!r}", repr(text))


@statement(
    space=Space(
        kind=Choice("int", "int64", "uint8", "int8"),
        kernels=Choice("list", "array", "tensor", "generator"), seed=INPUTS.get("seed"),
        kernel_sizes=Lists(Choice(31, 3, 15, 5, 7), 1, 3),
    ),
    needs=(CONTRACT,), effort=6,
)  # fmt: skip
def integers_of_other_kinds_are_refused_or_honoured(subject, case):
    """NumPy's integers, and kernels in an array, a tensor or a generator, mean what Python's mean.

    Or they are refused, in whatever way. Narrow ones overflow where 127 or 255 is exceeded on the
    way, in the receptive field first, and what the caller changes later changes nothing.
    """
    most = 2**63 - 1 if case["kind"] == "int" else np.iinfo(case["kind"]).max
    if max(case.channels, *case.kernel_sizes) > most:
        return
    number = int if case["kind"] == "int" else getattr(np, case["kind"])
    sizes = [number(size) for size in case.kernel_sizes]
    dtype = None if case["kind"] == "int" else case["kind"]
    kernels = {
        "list": sizes,
        "array": np.array(case.kernel_sizes, dtype),
        "tensor": torch.from_numpy(np.array(case.kernel_sizes, dtype)),
        "generator": iter(sizes),
    }[case["kernels"]]
    arguments = {"channels": number(case.channels), "kernel_sizes": kernels, "dropout": 0.0}
    if subject.target.kind == "stack":
        arguments["num_blocks"] = number(case.num_blocks)
    models = []

    def build():
        with np.errstate(over="ignore"):
            models.append(subject.target.constructor(**arguments))

    what = f"building with {case['kind']} and kernels in a {case['kernels']}"
    error = refuses(build, (Exception,), what)
    usual = (case["kind"], case["kernels"]) == ("int", "list")
    if error is not None:
        yield holds(not usual, what, "a model", describe(error))
        return
    model = subject.set_mode(models[0].double(), "eval")
    plain = subject.set_mode(subject.build(replace(case, dropout=0.0)).double(), "eval")
    attempt("load_state_dict", lambda: model.load_state_dict(plain.state_dict()))
    if case["kernels"] in ("array", "tensor"):
        kernels[:] = 1
    x = torch.from_numpy(case.rng("input").standard_normal((2, case.channels, 9)))
    with torch.no_grad():
        yield same_bits(subject(model, x), subject(plain, x), f"output after {what}")
    if (claim := subject.target.claims.get("receptive field")) is not None:
        with np.errstate(over="ignore"):
            claimed = attempt("claimed receptive field", lambda: int(claim(model, case.config)))
        yield equal(claimed, case.field, f"claimed receptive field after {what}")


WRONG_SHAPES = (
    "(channels, length)", "(channels, channels)", "(batch, channels, length, 1)",
    "(1, batch, channels, length)", "(length,)", "()", "one channel fewer", "one channel more",
    "one channel", "twice the channels", "channels last",
)  # fmt: skip


@statement(
    space=INPUTS.narrow(
        shape=Choice(*WRONG_SHAPES), batch=Integers(0, 8), length=Integers(1, 64),
        dtype=Choice("float32", "float64"), layout=Choice("contiguous"),
        context=Choice(*CONTEXTS),
    ),
    needs=(CHECKED_INPUT,), inputs=16)  # fmt: skip
def wrong_rank_or_channels_raise(subject, case):
    """An input of the wrong rank or channel count raises; it never broadcasts.

    That includes the unbatched (channels, length), which Conv1d alone accepts, also when it is
    square and a batch norm would take it for (batch, channels), and it includes empty batches.
    """
    batch, channels, length = case.shape
    shape = {
        "(channels, length)": (channels, length),
        "(channels, channels)": (channels, channels),
        "(batch, channels, length, 1)": (batch, channels, length, 1),
        "(1, batch, channels, length)": (1, batch, channels, length),
        "(length,)": (length,),
        "()": (),
        "one channel fewer": (batch, channels - 1, length),
        "one channel more": (batch, channels + 1, length),
        "one channel": (batch, 1, length),
        "twice the channels": (batch, 2 * channels, length),
        "channels last": (batch, length, channels),
    }[case["shape"]]
    if len(shape) == 3 and shape[1] == channels:
        shape = (batch, channels + 2, length)
    model = subject.model(case)
    x = as_input(replace(case, layout="contiguous"), np.ones((2, 2, 2))).new_ones(shape)
    with CONTEXTS[case["context"]]():
        error = refuses(lambda: subject.target.call(model, x), (Exception,), "forward")
    yield holds(
        error is not None,
        f"forward of shape {shape} on a model of {channels} channels",
        "an exception",
        "a result",
    )


@statement(
    space=INPUTS.narrow(
        value=Choice(math.nan, math.inf), mode=Choice("eval"), batch=at_least(1),
        layout=Choice("contiguous"), context=Choice(*CONTEXTS),
    ),
    needs=(NONFINITE, DIRECT),
)  # fmt: skip
def nan_and_infinity_come_out(subject, case):
    """NaN or +inf at (b, c, t) leaves the output at (b, c, t) non-finite in eval mode.

    The residual carries the value there, and whatever the fusion adds, inf − inf included, stays
    non-finite. (−inf may vanish: its ReLU is 0.)
    """
    if subject.output_shape(case) != case.shape:
        raise NotApplicable("the output has another shape than the input")
    model = subject.model(case)
    randomise(model, case.rng("weights"))
    values = case.rng("input").standard_normal(case.shape)
    rng = case.rng("place")
    places = [
        (int(rng.integers(case.batch)), int(rng.integers(case.channels)), t)
        for t in positions(case)
    ]
    for place in places:
        values[place] = case["value"]
    with CONTEXTS[case["context"]]():
        out = subject(model, as_input(case, values))
    for place in places:
        got = out[place].item()
        yield holds(
            not math.isfinite(got), f"output at {list(place)}, where the input is {case['value']}",
            "a non-finite value", repr(got),
        )  # fmt: skip
