"""Arithmetic: the function computed is the stated one, exactly on integers, bounded on reals."""

from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from torch import nn

from rescnn_verify.bounds.roundoff import FORMATS
from rescnn_verify.compare import equal, same_values, within
from rescnn_verify.drawing import SEAMS
from rescnn_verify.learning import batches_counted, learned_by, learns_as_the_reference
from rescnn_verify.needs import BATCH_NORM, CHANNEL_DROPOUT, DIRECT, HANDLES, POST_ACTIVATION
from rescnn_verify.networks import (
    certify,
    certify_prefixes,
    make_alternating,
    make_real,
    values_of,
)
from rescnn_verify.oracles.integer import exact_pass, outputs_of_prefixes
from rescnn_verify.oracles.layers import gradients_beside, read_network
from rescnn_verify.oracles.real import real_pass
from rescnn_verify.patterns import PATTERNS, patterned
from rescnn_verify.probes import (
    FROZEN,
    PARTS,
    as_input,
    freeze_norms,
    part_of,
    randomise,
    zero_fusion,
)
from rescnn_verify.space import INPUTS, LARGE, Choice, Constraint, Integers, Lists, at_least
from rescnn_verify.statement import statement
from rescnn_verify.subject import (
    AUTOCAST_IN_FLOAT32,
    CONTEXTS,
    SETTINGS,
    kernel_sets,
    onednn,
    seed_torch,
    supported_under,
)

REFERENCE = (HANDLES, POST_ACTIVATION, BATCH_NORM)
EVAL = INPUTS.narrow(mode=Choice("eval"), batch=at_least(1))
PASSES = ("forward", "backward")
BACKWARD_IN_WIDE_DTYPES = Constraint(
    "a backward pass in float32 or float64",
    lambda c: c["passes"] == "forward" or c.dtype in ("float32", "float64"),
)
#: Fusion norms of which blocks have scale and shift 0, as many training recipes begin.
ZERO = ("no block", "some blocks")


@statement(
    space=EVAL,
    needs=(*REFERENCE, DIRECT),
    work=2**16,
    effort=2,
)
def integer_networks_are_exact(subject, case):
    """On a certified integer network the output equals NumPy's, in every dtype, by ``==``.

    A network of small integers needs so few bits that every order of evaluation in the dtype is
    exact: the largest intermediate over the finest unit is at most 2^53, 2^24, 2^11 or 2^8. The
    norms' variance is a power of four so large that eps is rounded off. Inputs reach as far as
    the certificate allows.
    """
    yield from _same_as_numpy(subject, case)


@statement(
    space=EVAL.narrow(
        length=at_least(257), batch=Choice(1), channels=Integers(1, 8),
        num_blocks=Integers(1, 5),
    ),
    needs=(*REFERENCE, DIRECT),
    work=2**20,
    effort=0.6,
)  # fmt: skip
def long_integer_signals_are_exact(subject, case):
    """The same for signals of several hundred to several thousand positions.

    That is where an implementation that works in chunks has seams, and every position counts.
    """
    yield from _same_as_numpy(subject, case)


@statement(
    space=INPUTS.narrow(
        mode=Choice("eval"), length=Integers(1, 24), batch=at_least(9),
        channels=Integers(1, 6),
    ),
    needs=(*REFERENCE, DIRECT),
    work=2**19,
    effort=0.6,
)  # fmt: skip
def large_integer_batches_are_exact(subject, case):
    """The same for batches of more than 8 samples."""
    yield from _same_as_numpy(subject, case)


@statement(
    space=EVAL.narrow(
        length=Integers(20, 600), batch=Integers(1, 9), channels=Integers(1, 8),
        num_blocks=Integers(1, 5), kernel_sizes=Lists(Choice(3, 1, 5, 7), 1, 4),
        pattern=Choice(*PATTERNS),
    ),
    needs=(*REFERENCE, DIRECT),
    work=2**19,
    effort=1.5,
)  # fmt: skip
def patterned_integer_signals_are_exact(subject, case):
    """The same for signals that are silent in part, repeat themselves or have one sign.

    Recordings are padded with zeros, electrodes fall off, and batches hold a sample twice: there
    an implementation may skip, share or cut short what it takes for empty or known.
    """
    yield from _same_as_numpy(subject, case, case["pattern"])


@statement(
    space=EVAL.narrow(length=Integers(1, 40), batch=Integers(1, 9)),
    needs=(*REFERENCE, DIRECT),
    work=2**14,
    effort=0.5,
    inputs=1,
)
def integer_networks_are_exact_at_every_length(subject, case):
    """One network's output is NumPy's by ``==`` at every length up to the case's, in random order.

    Nothing is restored in between. oneDNN, which builds kernels for each shape, is on for the last
    length.
    """
    yield from _same_at(subject, case, "length", range(1, case.length + 1), "forward")


@statement(
    space=EVAL.narrow(
        length=Integers(1, 40), batch=Integers(1, 9), dtype=Choice("float32", "float64")
    ),
    needs=(*REFERENCE, DIRECT),
    work=2**14,
    effort=0.4,
    inputs=1,
)
def integer_gradients_are_exact_at_every_length(subject, case):
    """One network's gradients are NumPy's by ``==`` at every length up to the case's.

    That at the input, and those of all parameters.
    """
    yield from _same_at(subject, case, "length", range(1, case.length + 1), "backward")


@statement(
    space=EVAL.narrow(
        BACKWARD_IN_WIDE_DTYPES, length=Integers(300, 4200), batch=Choice(1),
        channels=Integers(1, 6), num_blocks=Integers(1, 8), passes=Choice(*PASSES),
    ),
    needs=(*REFERENCE, DIRECT),
    work=2**21,
    effort=0.4,
    inputs=1,
)  # fmt: skip
def integer_networks_are_exact_at_the_ends_of_chunks(subject, case):
    """The same for lengths around multiples of usual chunk sizes, with and without gradients.

    There a last chunk may be smaller than what its neighbours overlap.
    """
    sizes = _around_seams(case, case.length, case.field)
    yield from _same_at(subject, case, "length", sizes, case["passes"])


@statement(
    space=INPUTS.narrow(
        BACKWARD_IN_WIDE_DTYPES, mode=Choice("eval"), batch=Integers(100, 260),
        length=Integers(1, 9), channels=Integers(1, 6), num_blocks=Integers(1, 8),
        passes=Choice(*PASSES),
    ),
    needs=(*REFERENCE, DIRECT),
    work=2**21,
    effort=0.3,
    inputs=1,
)  # fmt: skip
def integer_networks_are_exact_at_the_ends_of_batches(subject, case):
    """The same for batches around multiples of usual sizes of smaller ones."""
    sizes = _around_seams(case, case.batch, 8)
    yield from _same_at(subject, case, "batch", sizes, case["passes"])


def _around_seams(case, most, overlap):
    """For each usual chunk size two sizes: a multiple + 1, and one + d for −1 ≤ d ≤ overlap."""
    rng = case.rng("seams")
    return {
        min(most, size * int(rng.integers(1, most // size + 1)) + more)
        for size in SEAMS
        if size < most
        for more in (1, int(rng.integers(-1, overlap + 1)))
    }


def _same_at(subject, case, axis, sizes, passes):
    model = subject.model(case)
    blocks = subject.handles(model, case)
    backward = passes == "backward"
    bits = "weight_bits" if backward else "forward_bits"
    found = certify_prefixes(blocks, case, bits=bits, kinkless=backward)
    if found is None:
        return
    rng = case.rng("sizes")
    sizes = rng.permutation(sorted(sizes)).tolist()
    contexts = rng.choice(list(CONTEXTS), len(sizes)).tolist()
    if not backward:
        outputs = _outputs_at(found, axis, sizes)
    for i, (size, context) in enumerate(zip(sizes, contexts, strict=True), 1):
        part = replace(case, **{axis: size})
        x, v = (
            data[:size] if axis == "batch" else data[:, :, :size] for data in (found.x, found.v)
        )
        what = f"of an integer network at {axis} {size}"
        with onednn(i == len(sizes)):
            if not backward:
                with CONTEXTS[context]():
                    out = subject(model, as_input(part, x))
                yield same_values(out, outputs[size], f"output {what} under {context}")
                continue
            for parameter in model.parameters():
                parameter.grad = None
            out, gradient = subject.vjp(model, as_input(part, x), as_input(part, v))
        expected = exact_pass(found.network, x, v, fraction=0.5)
        yield same_values(out, expected.out, f"output {what} with gradients on")
        yield same_values(gradient, expected.input_gradient, f"gradient at the input {what}")
        for name, own, exact in gradients_beside(blocks, expected.gradients):
            yield same_values(own, exact, f"{name} {what}")


def _outputs_at(found, axis, sizes):
    """NumPy's outputs for the first so many rows, or positions."""
    if axis == "batch":
        return {size: found.expected.out[:size] for size in sizes}
    return outputs_of_prefixes(found.network, found.x, found.expected.out, sizes)


def _same_as_numpy(subject, case, pattern=None):
    model = subject.model(case)
    found = certify(subject.handles(model, case), case, bits="forward_bits", pattern=pattern)
    if found is None:
        return
    context = str(case.rng("context").choice(list(CONTEXTS)))
    for enabled in kernel_sets(case):
        with onednn(enabled), CONTEXTS[context]():
            out = subject(model, as_input(case, found.x))
        what = f"output of an integer network under {context}, against NumPy"
        yield same_values(out, found.expected.out, what)


@statement(
    space=EVAL,
    needs=(*REFERENCE, DIRECT),
    work=2**16,
    effort=1.2,
)
def integer_gradients_are_exact(subject, case):
    """On a certified integer network Jᵀv equals NumPy's, in every dtype, by ``==``.

    Shifts are fractions chosen so that no ReLU has an input of 0, where any subgradient would be
    right.
    """
    model = subject.model(case)
    found = certify(subject.handles(model, case), case, bits="backward_bits", kinkless=True)
    if found is None:
        return
    for enabled in kernel_sets(case):
        with onednn(enabled):
            out, gradient = subject.vjp(model, as_input(case, found.x), as_input(case, found.v))
        yield same_values(out, found.expected.out, "output of an integer network with gradients on")
        yield same_values(gradient, found.expected.input_gradient, "gradient at the input")


@statement(
    space=EVAL.narrow(setting=Choice(*SETTINGS)),
    needs=(*REFERENCE, DIRECT),
    work=2**15,
    effort=0.3,
)
def settings_of_torch_change_nothing(subject, case):
    """Outputs and gradients are as exact in torch's deterministic mode or of another default dtype.

    In that mode memory that nobody has written to holds NaN, so that a use of it shows for sure.
    So are they while `torch.compiler.is_compiling`, when many models take another path.
    """
    model = subject.model(case)
    blocks = subject.handles(model, case)
    found = certify(blocks, case, bits="weight_bits", kinkless=True)
    if found is None:
        return
    x, v = as_input(case, found.x), as_input(case, found.v)
    with SETTINGS[case["setting"]]():
        out, gradient = subject.vjp(model, x, v)
    yield equal((out.dtype, gradient.dtype), (x.dtype, x.dtype), "dtypes of output and gradient")
    yield same_values(out, found.expected.out, "output of an integer network with gradients on")
    yield same_values(gradient, found.expected.input_gradient, "gradient at the input")
    for what, own, exact in gradients_beside(blocks, found.expected.gradients):
        yield same_values(own, exact, what)


@statement(
    space=LARGE.narrow(
        mode=Choice("eval"), dtype=Choice("float32", "float64"), context=Choice(*CONTEXTS)
    ),
    needs=(*REFERENCE, DIRECT),
    work=2**25,
    effort=0.05,
    inputs=1,
    extreme=0,
)
def large_integer_inputs_are_exact(subject, case):
    """The same for inputs of a hundred thousand values and more.

    Implementations that save memory, or work in parallel, begin to do so somewhere.
    """
    yield from _same_under(subject, case)


@statement(
    space=EVAL.narrow(
        channels=at_least(64),
        length=Integers(1, 24),
        dtype=Choice("float64"),
        context=Choice("grad", "no_grad"),
    ),
    needs=(*REFERENCE, DIRECT),
    documented=True,
    work=2**22,
    effort=0.05,
    inputs=1,
)
def wide_integer_networks_are_exact(subject, case):
    """The same for many channels, among them the documented 512."""
    yield from _same_under(subject, case)


def _same_under(subject, case):
    model = subject.model(case)
    blocks = subject.handles(model, case)
    found = certify(blocks, case, bits="backward_bits", kinkless=True)
    if found is None:
        return
    if case["context"] != "grad":
        with onednn(False), CONTEXTS[case["context"]]():
            out = subject(model, as_input(case, found.x))
        yield same_values(out, found.expected.out, f"output under {case['context']}")
        return
    with onednn(False):
        out, gradient = subject.vjp(model, as_input(case, found.x), as_input(case, found.v))
    yield same_values(out, found.expected.out, "output with gradients on")
    yield same_values(gradient, found.expected.input_gradient, "gradient at the input")


@statement(
    space=EVAL,
    needs=(*REFERENCE, DIRECT),
    work=2**16,
)
def integer_weight_gradients_are_exact(subject, case):
    """On a certified integer network the gradient of every parameter equals NumPy's, by ``==``.

    In float16 and bfloat16 that is for few positions: sums over batch and length soon need more
    than their bits.
    """
    model = subject.model(case)
    blocks = subject.handles(model, case)
    found = certify(blocks, case, bits="weight_bits", kinkless=True)
    if found is None:
        return
    for enabled in kernel_sets(case):
        for parameter in model.parameters():
            parameter.grad = None
        with onednn(enabled):
            subject.vjp(model, as_input(case, found.x), as_input(case, found.v))
        for what, gradient, own in gradients_beside(blocks, found.expected.gradients):
            yield same_values(gradient, own, what)


@statement(
    space=EVAL.narrow(
        dtype=Choice("float64"),
        magnitude=Choice(1.0, 1e-12, 1e6, 1e-9, 1e3, 1e-6, 1e-3), spread=Choice(False, True),
    ),
    needs=(*REFERENCE, DIRECT),
    evidence="bounded",
    work=2**16, effort=1.2)  # fmt: skip
def real_networks_are_within_their_bound(subject, case):
    """In float64 the output is within the running error bound of an extended-precision reference.

    The bound is derived from the operations alone (see `oracles.real_pass`) and holds for every
    order of evaluation, so what is outside of it is another function: a float32 cast, a clamp, a
    flush of small values, another eps. Inputs and weights range over 1e-12 … 1e6, with
    ``spread`` also within one input.
    """
    model = subject.model(case)
    network = make_real(subject.handles(model, case), case, case["magnitude"])
    x = _real_input(case)
    with torch.no_grad():
        out = subject(model, as_input(case, x))
    expected = real_pass(network, values_of(case, x))
    yield within(out, expected.out, "output, against extended precision")


@statement(
    space=INPUTS.narrow(
        dtype=Choice("float64"), mode=Choice("train"), batch=at_least(1),
        magnitude=Choice(1.0, 1e-6, 1e3, 1e-3), spread=Choice(False),
        dropout=Choice(0.0), context=Choice(*CONTEXTS),
        frozen=Choice(*FROZEN), zero=Choice(*ZERO), constant=Choice("nothing", *PARTS),
    ),
    needs=(*REFERENCE, DIRECT),
    evidence="bounded",
    work=2**16, extreme=14,
)  # fmt: skip
def training_normalises_with_the_biased_batch_variance(subject, case):
    """In train mode each norm uses the batch's own mean and biased variance, within the bound.

    It also moves the running statistics by the documented law: 0.9 times the old plus 0.1 times the
    batch's mean and unbiased variance, one more batch counted, however many there were before and
    whether or not gradients are recorded, and whatever is held constant. Norms that are in eval
    mode keep theirs. Checked without dropout.
    """
    yield from _trains_as_the_reference(subject, case)


@statement(
    space=INPUTS.narrow(
        dtype=Choice("float64"), mode=Choice("train"), length=at_least(257),
        batch=Integers(1, 3), channels=Integers(1, 6), num_blocks=Integers(1, 3),
        magnitude=Choice(1.0), spread=Choice(False), dropout=Choice(0.0),
        context=Choice(*CONTEXTS), frozen=Choice(*FROZEN), zero=Choice(*ZERO),
        constant=Choice("nothing", *PARTS),
    ),
    needs=(*REFERENCE, DIRECT),
    evidence="bounded",
    work=2**18,
    effort=0.4,
)  # fmt: skip
def long_signals_train_within_the_bound(subject, case):
    """The same for signals of several hundred to several thousand positions.

    That is where an implementation that works in chunks has statistics to put together.
    """
    yield from _trains_as_the_reference(subject, case)


def _trains_as_the_reference(subject, case):
    model = subject.model(case)
    blocks = subject.handles(model, case)
    network = _frozen(_real_network(blocks, case), blocks, case)
    for parameter in part_of(model, blocks, case["constant"], case.rng("constant")):
        parameter.requires_grad_(False)
    x = as_input(case, _real_input(case))
    yield from _learns(subject, case, model, network, x)


def _learns(subject, case, model, network, x, finite=False):
    def forward():
        with CONTEXTS[case["context"]]():
            return subject(model, x)

    form = FORMATS[case.dtype]
    yield from learns_as_the_reference(
        subject, case, model, network, x, form, forward, finite=finite
    )


def _real_network(blocks, case):
    make_real(blocks, case, case["magnitude"])
    rng = case.rng("zero")
    zero_fusion([b for b in blocks if case["zero"] == "some blocks" and rng.integers(2)], "norm")
    return read_network(blocks)


def _frozen(network, blocks, case):
    """The network, some of its norms put into eval mode as the case says."""
    chosen = freeze_norms(blocks, case["frozen"], case.rng("frozen"))
    frozen = []
    for block, flags in zip(network, chosen, strict=True):
        layers = (*block.branches, block.fusion)
        layers = [replace(layer, frozen=f) for layer, f in zip(layers, flags, strict=True)]
        frozen.append(replace(block, branches=tuple(layers[:-1]), fusion=layers[-1]))
    return tuple(frozen)


@statement(
    space=INPUTS.narrow(
        mode=Choice("train"), dtype=Choice("float32", "bfloat16", "float16"),
        channels=Integers(1, 3), num_blocks=Choice(1), kernel_sizes=Lists(Choice(3, 1, 5, 7), 1, 3),
        dropout=Choice(0.0, 0.5, 0.1), batch=Choice(5, 130), length=Choice(9, 512),
        context=Choice(*CONTEXTS), magnitude=Choice(1.0, 64.0),
    ),
    needs=(*REFERENCE, DIRECT),
    evidence="bounded",
    work=2**23,
    effort=0.4,
)  # fmt: skip
def training_on_many_values_is_within_the_bound(subject, case):
    """The same in the other dtypes, on batches of up to 66,560 values per channel.

    So many are more than float16 can count, and more than bfloat16 can add up, and of large values
    float16 can hold no sum of squares. Where the bound on
    the output is lost, as it mostly is in bfloat16, the output is finite, and the norms behind the
    branches have learned what the reference has.
    """
    model = subject.model(case)
    blocks = subject.handles(model, case)
    randomise(model, case.rng("weights"))
    network = read_network(blocks)
    x = as_input(case, case.rng("input").standard_normal(case.shape) * case["magnitude"])
    yield from _learns(subject, case, model, network, x, finite=True)


@statement(
    space=INPUTS.narrow(
        AUTOCAST_IN_FLOAT32, mode=Choice("train"), dtype=Choice("float32", "bfloat16", "float16"),
        setting=Choice("usual", *SETTINGS), num_blocks=Choice(1), channels=Integers(1, 12),
        kernel_sizes=Lists(Choice(3, 1, 5, 7), 1, 6), dropout=Choice(0.0, 0.5),
        batch=Choice(1, 2, 3), length=Choice(1, 2, 4), autocast=Choice(False, True),
        context=Choice(*CONTEXTS),
    ),
    needs=(*REFERENCE, DIRECT),
    evidence="bounded",
    work=2**15,
    effort=1.0,
)  # fmt: skip
def training_on_few_values_is_within_the_bound(subject, case):
    """The same on batches of two to twelve values per channel, also under autocast and `SETTINGS`.

    There the biased and the unbiased variance are far apart: farther than the bounds behind the
    branches, in bfloat16 and under autocast, too, if not behind the fusion.
    """
    model = subject.model(case)
    blocks = subject.handles(model, case)
    x = as_input(case, make_alternating(blocks[0], case))
    cast = case["autocast"]

    def forward():
        with (
            SETTINGS.get(case["setting"], nullcontext)(),
            CONTEXTS[case["context"]](),
            supported_under(autocast=cast),
            torch.autocast(case.device, torch.bfloat16, enabled=cast),
        ):
            return subject(model, x)

    form = FORMATS["bfloat16" if cast else case.dtype]
    network = read_network(blocks)
    yield from learns_as_the_reference(
        subject, case, model, network, x, form, forward, autocast=cast
    )


@statement(
    space=INPUTS.narrow(
        dtype=Choice("float64"), batch=at_least(1),
        magnitude=Choice(1.0, 1e-6, 1e3, 1e-3), spread=Choice(False, True), dropout=Choice(0.0),
        frozen=Choice(*FROZEN), constant=Choice("nothing", *PARTS),
        input=Choice("wanted", "unwanted"), zero=Choice(*ZERO),
    ),
    needs=(*REFERENCE, DIRECT),
    evidence="bounded",
    work=2**15,
    effort=1.0,
)  # fmt: skip
def real_gradients_are_within_their_bound(subject, case):
    """In float64 Jᵀv and every parameter's gradient are within the bound of the reference.

    In either mode: training, the batch's statistics depend on the input, and the gradient goes
    through them, but for norms in eval mode. Neither parameters that are held constant nor an input
    whose gradient is not wanted change that of others. Cases in which round-off may switch a ReLU,
    as silence does behind a fusion that returns 0, are left out, and so is dropout.
    """
    model = subject.model(case)
    blocks = subject.handles(model, case)
    network = _frozen(_real_network(blocks, case), blocks, case)
    x, v = _real_input(case), case.rng("gradient").standard_normal(case.shape)
    v = patterned(v, case.rng("gradient pattern"))
    expected = real_pass(network, values_of(case, x), v=v, train=case.mode == "train")
    if expected.kink or not np.isfinite(expected.input_gradient.error).all():
        return
    constant = part_of(model, blocks, case["constant"], case.rng("constant"))
    for parameter in constant:
        parameter.requires_grad_(False)
    x, v = as_input(case, x), as_input(replace(case, layout="contiguous"), v)
    if case["input"] == "wanted":
        _, gradient = subject.vjp(model, x, v)
        yield within(gradient, expected.input_gradient, "gradient at the input")
    elif len(constant) < len(list(model.parameters())):
        subject.backward(subject(model, x), v)
    else:
        return
    for what, gradient, bounded in gradients_beside(blocks, expected.gradients, constant):
        yield within(gradient, bounded, what)


@statement(
    space=INPUTS.narrow(
        dtype=Choice("float64"), mode=Choice("train"), batch=at_least(1),
        dropout=Choice(0.5, 0.1, 0.3, 0.9, 1.0, 0.001), magnitude=Choice(1.0, 1e-3, 1e3),
        passes=Choice(*PASSES), context=Choice(*CONTEXTS), constant=Choice("nothing", *PARTS),
        frozen=Choice(*FROZEN),
    ),
    needs=(*REFERENCE, CHANNEL_DROPOUT, DIRECT),
    evidence="bounded",
    work=2**15,
)  # fmt: skip
def training_with_dropout_is_within_the_bound(subject, case):
    """With dropout, too, a training call returns, learns and passes back what the reference does.

    All fusions but one return zero, and the input is positive, so that the output tells which
    channels were dropped. Those parameters whose gradients depend on other masks are held constant.
    Behind a fusion whose norm is in eval mode dropout may be, too.
    """
    model = subject.model(case)
    blocks = subject.handles(model, case)
    make_real(blocks, case, case["magnitude"])
    place = int(case.rng("block").integers(len(blocks)))
    others = tuple(block for i, block in enumerate(blocks) if i != place)
    zero_fusion(others, "norm")
    constant = part_of(model, blocks, case["constant"], case.rng("constant"))
    for norm in (block.fusion.norm for block in others):
        constant |= {p for p in (norm.weight, norm.bias) if isinstance(p, nn.Parameter)}
    for parameter in constant:
        parameter.requires_grad_(False)
    network, counted = _frozen(read_network(blocks), blocks, case), batches_counted(blocks)
    x = as_input(case, np.abs(case.rng("input").standard_normal(case.shape)) * case["magnitude"])
    v = as_input(
        replace(case, layout="contiguous"), case.rng("gradient").standard_normal(case.shape)
    )
    backward, gradient = case["passes"] == "backward", None
    seed_torch(case.seed)
    if backward:
        out, gradient = subject.vjp(model, x, v)
    else:
        with CONTEXTS[case["context"]]():
            out = subject(model, x)
    survived = (out != x).any(dim=2).cpu().numpy()
    values = x.cpu().numpy()
    scale = 0.0 if case.dropout == 1 else 1 / (1 - np.longdouble(case.dropout))
    masks = [survived * scale]
    if survived.all() and network[place].fusion.frozen:
        masks.append(np.ones_like(masks[0]))
    v = v.cpu().numpy() if backward else None
    networks = [tuple(replace(block, mask=mask) for block in network) for mask in masks]
    passes = [real_pass(masked, values, v=v, train=True) for masked in networks]
    if len(passes) > 1 and not all(np.isfinite(found.out.error).all() for found in passes):
        return  # nothing tells which mask it was
    found = out.detach().cpu().numpy()
    fits = [(abs(found - one.out.value) <= one.out.error).all() for one in passes]
    which = fits.index(True) if any(fits) else 0
    network, expected = networks[which], passes[which]
    if np.isfinite(expected.out.error).all():
        yield within(out, expected.out, "output in train mode, against the reference")
    yield from learned_by(blocks, counted, network, expected, FORMATS[case.dtype])
    if not backward or expected.kink or not np.isfinite(expected.input_gradient.error).all():
        return
    yield within(gradient, expected.input_gradient, "gradient at the input")
    for what, own, bounded in gradients_beside(blocks, expected.gradients, constant):
        yield within(own, bounded, what)


@statement(
    space=INPUTS.narrow(
        dtype=Choice("float64"), mode=Choice("train"), length=Integers(2, 64),
        batch=Integers(1, 9), steps=Integers(1, 13),
    ),
    needs=(*REFERENCE, DIRECT),
    evidence="bounded",
    work=2**14,
)  # fmt: skip
def eval_uses_what_training_learned(subject, case):
    """After any number of training steps, eval mode normalises with the running statistics.

    The statistics are read from the norms after training; the output is then within the bound of
    the reference for them.
    """
    model = subject.model(case)
    blocks = subject.handles(model, case)
    make_real(blocks, case, 1.0)
    rng = case.rng("training")
    seen = [read_network(blocks)]
    for _ in range(case["steps"]):
        subject(model, as_input(case, rng.standard_normal(case.shape)))
        seen.append(read_network(blocks))
    for step, (before, after) in enumerate(pairwise(seen)):
        moved = all(
            (a.mean != b.mean).any() or (a.variance != b.variance).any()
            for old, new in zip(before, after, strict=True)
            for a, b in zip((*old.branches, old.fusion), (*new.branches, new.fusion), strict=True)
        )
        yield equal(moved, True, f"whether statistics move in step {step}")
    subject.set_mode(model, "eval")
    x = case.rng("input").standard_normal(case.shape)
    with torch.no_grad():
        out = subject(model, as_input(case, x))
    expected = real_pass(seen[-1], values_of(case, x))
    yield within(out, expected.out, "output in eval mode after training")


def _real_input(case):
    values = case.rng("input").standard_normal(case.shape) * case["magnitude"]
    if case["spread"]:
        values = values * 10.0 ** case.rng("spread").uniform(-6, 6, case.shape)
    return patterned(values, case.rng("input pattern"))
