"""Gradients: they exist, are finite, linear, chained and accumulated, and are true derivatives."""

import math

import numpy as np
import torch
from torch.autograd import forward_ad

from rescnn_verify.bounds.gains import stack_gain
from rescnn_verify.bounds.roundoff import FORMATS, SIGNIFICAND_BITS, gamma
from rescnn_verify.compare import (
    Falsified,
    at_most,
    describe,
    equal,
    holds,
    same_bits,
    same_tensors,
    same_values,
    within,
)
from rescnn_verify.handles import fill, put
from rescnn_verify.needs import BATCH_NORM, DIRECT, HANDLES, POST_ACTIVATION, STACK
from rescnn_verify.networks import certify, make_balanced
from rescnn_verify.oracles.integer import exact_pass
from rescnn_verify.oracles.layers import read_network
from rescnn_verify.oracles.plain import filled, plain_call, two_derivatives
from rescnn_verify.oracles.real import Bounded, real_pass
from rescnn_verify.probes import (
    PARTS,
    Called,
    as_input,
    make_positive,
    normal_input,
    part_of,
    randomise,
    shrink_fusion,
)
from rescnn_verify.space import INPUTS, Choice, Constraint, Integers, Lists, at_least
from rescnn_verify.statement import statement
from rescnn_verify.subject import (
    AUTOCAST_IN_FLOAT32,
    NotApplicable,
    seed_torch,
    supported_under,
)

SMALL = INPUTS.narrow(batch=at_least(1))
NO_RANDOM_DROPOUT = Constraint(
    "no random dropout", lambda c: c.mode == "eval" or c.dropout in (0.0, 1.0)
)
TANGENTS_OF_EVAL = Constraint(
    "tangents have gradients in eval mode",
    lambda c: c.mode == "eval" or c["route"] != "reverse over forward",
)
WIDE = Choice("float32", "float64")


@statement(space=SMALL, effort=0.6)
def every_parameter_gets_a_gradient(subject, case):
    """Every parameter requires a gradient and gets one, finite and of its own shape and dtype.

    So does the input. The output requires a gradient even if the input does not, because the
    parameters do. (It may be zero: that of a bias before a training batch norm is.) Training on a
    nearly constant batch multiplies gradients by up to 1/√eps ≈ 316 per norm, which only float64
    is sure to hold; elsewhere being finite is claimed for eval mode.
    """
    model = subject.model(case)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    yield equal(frozen, [], "parameters that do not require a gradient")
    yield equal(subject(model, normal_input(case)).requires_grad, True, "output.requires_grad")
    model = subject.model(case)
    # A mean over all positions: their sum may be beyond what float16 holds.
    mean = 2.0 ** -math.ceil(math.log2(case.batch * case.length))
    _, gradient = subject.vjp(model, normal_input(case), torch.full((), mean, dtype=torch.float64))
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    yield equal(missing, [], "parameters without a gradient after backward")
    yield equal(tuple(gradient.shape), case.shape, "shape of the gradient at the input")
    if case.mode == "train" and case.dtype != "float64":
        return
    for name, values in [
        ("the input", gradient),
        *((n, p.grad) for n, p in model.named_parameters()),
    ]:
        bad = int((~torch.isfinite(values)).sum())
        yield equal(bad, 0, f"elements of the gradient of {name} that are NaN or infinite")


@statement(space=SMALL.narrow(mode=Choice("eval"), dtype=WIDE), needs=(HANDLES,), effort=0.8)
def positive_networks_have_no_zero_gradient(subject, case):
    """With positive weights and inputs and no shifts no parameter's gradient has a zero.

    No ReLU is closed and no term cancels, except that a tap that only ever meets padding has
    nothing to weigh: the length covers the widest kernel.
    """
    model = subject.model(case)
    blocks = subject.handles(model, case)
    make_positive(blocks, case.rng("weights"))
    x = as_input(case, case.rng("input").uniform(0.5, 1.5, case.shape))
    _, gradient = subject.vjp(model, x, torch.ones(()))
    yield equal(int((gradient <= 0).sum()), 0, "elements of the input's gradient that are not > 0")
    for i, block in enumerate(blocks):
        for j, layer in enumerate(block.layers):
            parameters = {
                "weight": layer.conv.weight,
                "bias": layer.conv.bias,
                "scale": layer.norm.weight,
                "shift": layer.norm.bias,
            }
            for kind, parameter in parameters.items():
                if not isinstance(parameter, torch.nn.Parameter):
                    continue  # none, or parametrized
                if parameter.grad is None:
                    raise Falsified(f"gradient of {kind} {j} of block {i}", "a tensor", "None")
                seen = parameter.grad
                if kind == "weight":
                    taps = torch.arange(parameter.shape[2]) - parameter.shape[2] // 2
                    seen = seen[:, :, taps.abs() < case.length]
                zeros = int((seen == 0).sum())
                yield equal(zeros, 0, f"zero elements in the gradient of {kind} {j} of block {i}")


@statement(
    space=SMALL.narrow(NO_RANDOM_DROPOUT, scale=Choice(1, 6, -6, 12, -12), dtype=WIDE), effort=0.6
)
def gradients_are_linear(subject, case):
    """Scaling v by a power of two scales Jᵀv and every parameter's gradient, to the bit.

    Backward is linear in v, and a power of two rounds nothing off. Nothing may clip, normalise or
    flush.
    """
    factor = 2.0 ** case["scale"]
    first = _gradients(subject, case, 1.0)
    second = _gradients(subject, case, factor)
    scaled = {name: gradient * factor for name, gradient in first.items()}
    yield same_tensors(second, scaled, f"gradients for {factor} times v")


@statement(space=SMALL.narrow(wanted=Choice("all", "the input's", "the parameters'")), effort=0.5)
def gradients_are_returned_as_they_are_accumulated(subject, case):
    """`torch.autograd.grad` returns what a backward pass accumulates, and accumulates nothing.

    (Some graphs, as torch's own reentrant checkpoints, refuse it.)
    """

    def forward():
        model = subject.model(case)
        randomise(model, case.rng("weights"))
        seed_torch(case.seed)
        leaf = normal_input(case).requires_grad_()
        v = torch.from_numpy(case.rng("gradient").integers(-2, 3, subject.output_shape(case)))
        return {"the input": leaf, **dict(model.named_parameters())}, subject(model, leaf), v

    leaves, out, v = forward()
    subject.backward(out, v.to(out))
    accumulated = {name: leaf.grad for name, leaf in leaves.items()}
    leaves, out, v = forward()
    # There is something to accumulate to.
    for leaf in leaves.values():
        leaf.grad = torch.ones_like(leaf)
    wanted = {
        name: leaf
        for name, leaf in leaves.items()
        if case["wanted"] in ("all", "the input's" if name == "the input" else "the parameters'")
    }
    if not wanted:
        return
    try:
        found = torch.autograd.grad(out, tuple(wanted.values()), v.to(out))
    except Exception as error:
        raise NotApplicable(f"torch.autograd.grad is refused: {describe(error)}") from error
    returned = dict(zip(wanted, found, strict=True))
    expected = {name: accumulated[name] for name in wanted}
    missing = [name for name, gradient in expected.items() if gradient is None]
    yield equal(missing, [], "what torch.autograd.grad has a gradient for, and backward has not")
    yield same_tensors(returned, expected, "gradients returned, against those accumulated")
    ones = [leaf.grad is not None and bool((leaf.grad == 1).all()) for leaf in leaves.values()]
    yield equal(all(ones), True, "whether torch.autograd.grad leaves accumulated gradients alone")


@statement(space=SMALL.narrow(again=Choice("both passes", "backward alone")), effort=0.7)
def accumulating_twice_doubles(subject, case):
    """Two backward passes without clearing give twice the gradient of one, to the bit.

    Each behind a forward pass of its own, whose generator starts in the same state, so that the
    masks are the same; or both through the graph of one, unless it cannot be kept.
    """
    once = _gradients(subject, case, 1.0)
    if case["again"] == "both passes":
        twice = _gradients(subject, case, 1.0, passes=2)
    else:
        try:
            twice = _gradients(subject, case, 1.0, through=2)
        except Falsified as error:
            raise NotApplicable(f"the graph is not kept: {error}") from error
    doubled = {name: gradient + gradient for name, gradient in once.items()}
    yield same_tensors(twice, doubled, "gradients after two passes")


@statement(
    space=SMALL.narrow(mode=Choice("eval")),
    needs=(HANDLES, POST_ACTIVATION, BATCH_NORM, DIRECT),
    work=2**17,
    effort=0.6,
)
def gradients_do_not_change_the_output(subject, case):
    """The output is the same with gradients, without, and in inference mode.

    To the bit on a certified integer network; for real weights another path may round otherwise.
    """
    model = subject.model(case)
    found = certify(subject.handles(model, case), case, bits="forward_bits")
    if found is None:
        return
    x = as_input(case, found.x)
    out = subject(model, x).detach()
    with torch.no_grad():
        yield same_values(
            subject(model, x), out, "output under no_grad, against that with gradients"
        )
    with torch.inference_mode():
        yield same_values(subject(model, x).clone(), out, "output in inference mode")
    leaf = x.detach().requires_grad_()
    yield same_values(subject(model, leaf), out, "output for an input that requires a gradient")


@statement(
    space=SMALL.narrow(
        mode=Choice("eval"), frozen=Choice(*PARTS), input=Choice("wanted", "unwanted"),
    ),
    needs=(HANDLES, POST_ACTIVATION, BATCH_NORM, DIRECT),
    work=2**16, effort=0.7)  # fmt: skip
def freezing_parameters_changes_no_other_gradient(subject, case):
    """With some or all parameters frozen the other gradients are what they were.

    Exactly on a certified integer network, whether or not the input's gradient is wanted.
    Fine-tuning, attribution and adversarial inputs all depend on it.
    """
    model = subject.model(case)
    blocks = subject.handles(model, case)
    found = certify(blocks, case, bits="weight_bits", kinkless=True)
    if found is None:
        return
    x, v = as_input(case, found.x), torch.from_numpy(found.v)
    _, expected = subject.vjp(model, x, v)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    frozen = part_of(model, blocks, case["frozen"], case.rng("frozen"))
    for p in model.parameters():
        p.grad = None
        p.requires_grad_(p not in frozen)
    if case["input"] == "wanted":
        _, gradient = subject.vjp(model, x, v)
        yield same_values(gradient, expected, "gradient at the input with parameters frozen")
    elif any(p.requires_grad for p in model.parameters()):
        out = subject(model, x)
        subject.backward(out, v.to(out))
    else:
        return
    for name, p in model.named_parameters():
        if not p.requires_grad:
            yield equal(p.grad, None, f"gradient of the frozen {name}")
        elif gradients[name] is not None:
            got = torch.full_like(p, torch.nan) if p.grad is None else p.grad
            yield same_values(got, gradients[name], f"gradient of {name} with others frozen")


@statement(
    space=SMALL.narrow(mode=Choice("eval"), num_blocks=at_least(2)),
    needs=(STACK, HANDLES, POST_ACTIVATION, BATCH_NORM, DIRECT),
    work=2**16,
    effort=0.5,
)
def the_chain_rule_holds_over_blocks(subject, case):
    """The gradient of a stack is that of its blocks one after the other.

    To the bit on a certified integer network without a ReLU at 0.
    """
    model = subject.model(case)
    blocks = subject.lone_blocks(model, case)
    found = certify(blocks, case, bits="backward_bits", kinkless=True)
    if found is None:
        return
    x, gradient = as_input(case, found.x), torch.from_numpy(found.v)
    _, whole = subject.vjp(model, x, gradient)
    leaves, outs, value = [], [], x
    for block in blocks:
        leaves.append(value.detach().clone().requires_grad_())
        outs.append(subject.run_block(block, leaves[-1]))
        value = outs[-1]
    gradient = gradient.to(whole)
    for leaf, out in zip(reversed(leaves), reversed(outs), strict=True):
        subject.backward(out, gradient)
        gradient = leaf.grad
    yield same_values(whole, gradient, "gradient of the stack, against its blocks' chain")


@statement(
    space=INPUTS.narrow(
        mode=Choice("eval"), dtype=WIDE, batch=Integers(1, 5), length=Integers(1, 80),
    ),
    needs=(HANDLES, POST_ACTIVATION, BATCH_NORM, DIRECT),
    work=2**15, effort=1.0)  # fmt: skip
def finite_differences_are_exact(subject, case):
    """On an integer network f(x + d) − f(x) = J·d exactly while no ReLU switches, and so ⟨Jᵀv, d⟩.

    Between two points with the same ReLU masks the network is affine, and on integers nothing is
    rounded, so the difference quotient is the derivative. In a single block the same is checked for
    the shift of its fusion.
    """
    model = subject.model(case)
    blocks = subject.handles(model, case)
    found = certify(blocks, case, bits="weight_bits", kinkless=True)
    if found is None:
        return
    step = 2.0 ** (-2 * case.num_blocks - 4)
    x = found.x.copy()
    place = tuple(int(case.rng("place").integers(n)) for n in case.shape)
    x[place] += step
    inputs = as_input(case, found.x)
    out, gradient = subject.vjp(model, inputs, torch.from_numpy(found.v))
    shift = blocks[0].fusion.norm.bias
    if shift.grad is None:
        raise Falsified("gradient of the fusion's shift in block 0", "a tensor", "None")
    shift_gradient = shift.grad.clone()
    moved = exact_pass(found.network, x, found.v, fraction=0.5)
    # If every ReLU is open at both ends for the same elements, so it is between them: the first
    # layer's are linear there, hence the second's, and so on.
    same_masks = all(map(np.array_equal, moved.masks, found.expected.masks))
    # The step is a finer unit than the oracle counts bits in, by 2n + 4 of them.
    fits = moved.weight_bits + 2 * case.num_blocks + 4 <= SIGNIFICAND_BITS[case.dtype]
    if case.layout == "expanded" or not (same_masks and fits):
        return
    with torch.no_grad():
        after = subject(model, as_input(case, x))
        change = (after - out).double().cpu().numpy() / step
        expected = float((change * found.v).sum())
        yield equal(float(gradient[place]), expected, f"gradient at input {list(place)}")
        channel = int(case.rng("channel").integers(case.channels))
        shifts = shift.detach().cpu().double().numpy().copy()
        shifts[channel] += step
        put(blocks[0].fusion.norm, "bias", shifts)
        after = subject(model, inputs)
    change = (after - out).double().cpu().numpy() / step
    if np.array_equal((after > 0).cpu().numpy(), (out > 0).cpu().numpy()) and case.num_blocks == 1:
        expected = float((change * found.v).sum())
        yield equal(float(shift_gradient[channel]), expected, f"gradient of shift {channel}")


@statement(space=SMALL, effort=0.5)
def passes_under_way_keep_apart(subject, case):
    """Two forward passes before the first backward have the gradients that each has alone.

    That is how siamese losses and gradient penalties are computed. What a pass leaves for its
    backward belongs to that pass, and the gradient it is given to the caller. Bitwise, because
    shapes and generator states are the same.
    """
    inputs = [normal_input(case, f"input {i}") for i in range(2)]
    v = torch.from_numpy(case.rng("gradient").standard_normal(subject.output_shape(case)))
    v = v.to(inputs[0])
    before = v.clone()

    def forward(model, i):
        leaf = inputs[i].detach().requires_grad_()
        seed_torch(case.seed + i)
        return leaf, subject(model, leaf)

    def prepared():
        model = subject.model(case)
        randomise(model, case.rng("weights"))
        return model

    alone = []
    for i in range(2):
        leaf, out = forward(prepared(), i)
        subject.backward(out, v)
        yield same_bits(v, before, "the gradient that backward is given, after it")
        alone.append(leaf.grad)
    model = prepared()
    passes = [forward(model, i) for i in range(2)]
    for i in case.rng("order").permutation(2).tolist():
        leaf, out = passes[i]
        subject.backward(out, v)
        if leaf.grad is None or alone[i] is None:
            raise Falsified("gradient at the input", "a tensor", "None")
        yield same_bits(leaf.grad, alone[i], f"gradient of pass {i}, against that pass alone")


@statement(space=SMALL.narrow(autocast=Choice(False, True)), effort=0.5)
def an_input_changed_meanwhile_is_noticed(subject, case):
    """An input changed between forward and backward gives an exception, or the gradients it had.

    A buffer that is filled again before the backward pass is an everyday mistake. Autograd notices
    it for tensors that it keeps itself. Another input's gradients would be silently wrong.
    Autocast keeps copies, so that the gradients are then the ones there were.
    """
    x = normal_input(case)

    def forward():
        model = subject.model(case)
        randomise(model, case.rng("weights"))
        seed_torch(case.seed)
        with torch.autocast(case.device, torch.bfloat16, enabled=case["autocast"]):
            return model, subject(model, x)

    def gradients_of(model):
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    with supported_under(autocast=case["autocast"]):
        model, out = forward()
        subject.backward(out, torch.ones_like(out))
    alone = gradients_of(model)
    model, out = forward()
    fill(x[:1, :, :1] if case.layout == "expanded" else x, np.full((), 3.0))
    try:
        out.backward(torch.ones_like(out))
    except Exception as error:
        yield holds(True, "backward", "an exception or the right gradients", describe(error))
        return
    gradients = gradients_of(model)
    yield same_tensors(gradients, alone, "gradients of an input that was changed meanwhile")


@statement(
    space=INPUTS.narrow(
        dtype=WIDE, batch=Integers(1, 5), length=Integers(1, 80), channels=Integers(1, 24),
        dropout=Choice(0.0),
    ),
    needs=(HANDLES, POST_ACTIVATION, BATCH_NORM, DIRECT),
    evidence="bounded",
    work=2**14, effort=0.6)  # fmt: skip
def no_gradient_exceeds_the_lipschitz_bound(subject, case):
    """‖Jᵀv‖ ≤ K ‖v‖ for every input and v, K a product of bounds on operator norms.

    See `bounds.gains`. In train mode the norms' factors are those of the batch's own variance.
    Round-off in Jᵀv is allowed for by its running error bound.
    """
    model = subject.model(case)
    blocks = subject.handles(model, case)
    randomise(model, case.rng("weights"))
    x, v, exact = _with_reference(subject, case, blocks)
    if exact is None:
        return
    training = case.mode == "train"
    gain = stack_gain(read_network(blocks), length=case.length, trained=exact if training else None)
    _, gradient = subject.vjp(model, x, v)
    bound = gain.norm * _norm(v) + _norm(exact.input_gradient.error)
    yield at_most(_norm(gradient) / (1 + gamma(gradient.numel() + 8)), bound, "‖Jᵀv‖")


@statement(
    space=INPUTS.narrow(
        mode=Choice("eval"), dtype=WIDE, batch=Integers(1, 9), length=Integers(1, 300),
        channels=Integers(1, 48), layout=Choice("contiguous", "transposed", "strided"),
    ),
    needs=(HANDLES, POST_ACTIVATION, BATCH_NORM, DIRECT),
    evidence="bounded",
    work=2**15, effort=0.4)  # fmt: skip
def a_small_fusion_hardly_changes_the_gradient(subject, case):
    """‖Jᵀv − D v‖ ≤ (Π(1 + ρ_i) − 1) ‖v‖, D the product of the masks behind the residuals.

    Block i is D_i(I + F D W) with ‖F D W‖ ≤ ρ_i. Gradients may well vanish behind a ReLU, but with
    a small fusion nowhere else. Here |x| lies between 1 and 2, no norm shifts, and no block adds
    more than 1/1000 of the largest value, so that D is 1 where x > 0. A residual that is missing,
    scaled, doubled or detached is outside.
    """
    model = subject.model(case)
    blocks = subject.handles(model, case)
    shrink_fusion(blocks, case.rng("weights"), 1e-3)
    x, v, exact = _with_reference(subject, case, blocks)
    if exact is None:
        return
    gain = stack_gain(read_network(blocks), length=case.length)
    _, gradient = subject.vjp(model, x, v)
    off = gradient - torch.where(x > 0, v.to(x), torch.zeros_like(x))
    bound = gain.departure * _norm(v) + _norm(exact.input_gradient.error)
    rounding = 1 + gamma(off.numel() + 8) + FORMATS[case.dtype].unit
    yield at_most(_norm(off) / rounding, bound, "‖Jᵀv - D v‖")


@statement(
    space=INPUTS.narrow(
        TANGENTS_OF_EVAL, dtype=Choice("float64", "float32"), num_blocks=Choice(1),
        channels=Integers(1, 16), batch=Choice(1, 2, 4), length=Choice(4, 2), dropout=Choice(0.0),
        layout=Choice("contiguous", "transposed", "strided"),
        route=Choice("reverse over reverse", "forward over reverse", "reverse over forward"),
    ),
    needs=(HANDLES, POST_ACTIVATION, BATCH_NORM, DIRECT),
    evidence="bounded", effort=0.5)  # fmt: skip
def second_derivatives_are_the_reference_s(subject, case):
    """Gradients with a graph of their own, and their derivatives, are those of plain operations.

    Where there are any. Gradient penalties and Hessian-vector products need them, by whichever
    route. (Not that of the tangents' gradients while training, where torch's own batch norm holds
    the statistics constant.) On a balanced network (see `make_balanced`) all sums and means are
    multiples of a power of two, so that plain operations round nothing; other ways to take a mean
    may, a few thousand operations of 2^-53, or of 2^-24. A forgotten term is at least the inverse
    of a power of the number of values, at most 16. In between is half of the significand: 2^-26,
    or 2^-12, of the largest entry, in units in which all are alike.
    """
    yield from _second_derivatives(subject, case)


@statement(
    space=INPUTS.narrow(
        dtype=Choice("float64"), num_blocks=Choice(1), channels=Integers(2, 6),
        batch=Choice(32, 16, 64), length=Choice(1024, 256, 512), dropout=Choice(0.0),
        kernel_sizes=Lists(Choice(3, 1, 5, 7), 1, 3), layout=Choice("contiguous", "transposed"),
        route=Choice("reverse over reverse", "forward over reverse"),
    ),
    needs=(HANDLES, POST_ACTIVATION, BATCH_NORM, DIRECT),
    evidence="bounded", work=2**25, inputs=1, effort=0.2)  # fmt: skip
def second_derivatives_at_large_inputs_are_the_reference_s(subject, case):
    """The same for inputs of thousands of values for each channel.

    A forgotten term is at least 2^-16 of the largest entry, and sums of so many are exact as well.
    """
    yield from _second_derivatives(subject, case)


def _second_derivatives(subject, case):
    model, blocks, x, v, units = _balanced(subject, case, case.dtype)
    rng = case.rng("directions")
    directions = [
        torch.from_numpy(rng.integers(-1, 2, tuple(leaf.shape)) * unit).to(leaf)
        for leaf, unit in units.items()
    ]
    out = subject(model, x)
    try:
        got = two_derivatives(out, list(units), v, directions)
        if case["route"] != "reverse over reverse":
            # What says that it can be differentiated once only has no other way to say it here.
            tangents = dict(zip(units, directions, strict=True))
            got = _through_tangents(subject, case, model, x, v, tangents)
    except Exception as error:
        raise NotApplicable(f"no second derivatives: {describe(error)}") from error
    copies = {leaf: leaf.detach().clone().requires_grad_() for leaf in units}
    own = plain_call(blocks, copies, copies[x], train=case.mode == "train")
    expected = two_derivatives(own, list(copies.values()), v, directions)
    for (leaf, unit), part, exact in zip(units.items(), got[0], expected[0], strict=True):
        terms = 1 if leaf is x else case.batch * case.length
        bounded = _right_to_half(exact, case.dtype, terms, unit)
        yield within(part, bounded, f"gradient at {_named(leaf, x)} with a graph of its own")
    second = [part.double().cpu().numpy() for part in expected[1]]
    # Where all terms cancel, they are still of about one unit.
    largest = max(
        1.0,
        *(
            float(np.abs(part).max()) * unit
            for part, unit in zip(second, units.values(), strict=True)
        ),
    )
    half = _half_of_the_significand(case.dtype)
    for (leaf, unit), part, exact in zip(units.items(), got[1], second, strict=True):
        error = np.full(exact.shape, half * largest / unit)
        yield within(part, Bounded(exact, error), f"second derivative at {_named(leaf, x)}")


def _right_to_half(exact, dtype, terms, unit):
    """A gradient, right up to half of the significand of its largest entry, or of all its terms.

    Args:
        exact: the gradient.
        dtype: what it is computed in.
        terms: how many there are.
        unit: what it is taken in, so that a term is about 1/unit.
    """
    exact = exact.double().cpu().numpy()
    largest = max(float(np.abs(exact).max()), terms / unit)
    return Bounded(exact, np.full(exact.shape, _half_of_the_significand(dtype) * largest))


@statement(
    space=INPUTS.narrow(
        AUTOCAST_IN_FLOAT32, num_blocks=Choice(1), channels=Integers(1, 16), batch=Choice(1, 2),
        length=Choice(2, 4),
        dropout=Choice(0.0), layout=Choice("contiguous", "transposed", "strided"),
        autocast=Choice(False, True), constant=Choice("nothing", *PARTS),
        input=Choice("wanted", "unwanted"),
    ),
    needs=(HANDLES, POST_ACTIVATION, BATCH_NORM, DIRECT),
    evidence="bounded", effort=1.2)  # fmt: skip
def gradients_of_a_balanced_block_are_the_reference_s(subject, case):
    """In every dtype and either mode the gradients of a balanced block are those in float64.

    In float32 under autocast to bfloat16, too, and whatever else is held constant. There a
    gradient is a multiple of an eighth of a power of two, which even bfloat16 can hold, and
    training, what the statistics contribute is no small part of it. It is right up to half of the
    significand of the largest entry, or of what one value in units of its own contributes: 16
    roundings in bfloat16, where about ten lie between a gradient and v, of values none of which is
    larger than a few times that.
    """
    cast = case["autocast"]
    dtype = "bfloat16" if cast else case.dtype
    model, blocks, x, v, units = _balanced(subject, case, dtype)
    constant = part_of(model, blocks, case["constant"], case.rng("constant"))
    for leaf in (*constant, *((x,) if case["input"] == "unwanted" else ())):
        leaf.requires_grad_(False)
    if not any(leaf.requires_grad for leaf in units):
        return
    with supported_under(autocast=cast):
        with torch.autocast(case.device, torch.bfloat16, enabled=cast):
            out = subject(model, x)
        subject.backward(out, v.to(out))
    copies = {leaf: leaf.detach().double().requires_grad_() for leaf in units}
    own = plain_call(blocks, copies, copies[x], train=case.mode == "train")
    expected = torch.autograd.grad(own, list(copies.values()), v.double())
    for (leaf, unit), exact in zip(units.items(), expected, strict=True):
        if not leaf.requires_grad:
            continue
        if leaf.grad is None:
            raise Falsified(f"gradient at {_named(leaf, x)}", "a tensor", "None")
        terms = 1 if leaf is x else case.batch * case.length
        bounded = _right_to_half(exact, dtype, terms, unit)
        yield within(leaf.grad, bounded, f"gradient at {_named(leaf, x)}")


def _through_tangents(subject, case, model, x, v, tangents):
    """The gradients at x and parameters, and their derivative along tangents, by forward mode."""
    names = {parameter: f"model.{name}" for name, parameter in model.named_parameters()}
    with forward_ad.dual_level():
        duals = {leaf: forward_ad.make_dual(leaf, tangent) for leaf, tangent in tangents.items()}
        given = {names[leaf]: dual for leaf, dual in duals.items() if leaf is not x}
        whole = Called(subject.target.call, model)
        out = torch.func.functional_call(whole, given, (duals[x],))
        gradients = torch.autograd.grad(out, list(duals), v, retain_graph=True, allow_unused=True)
        both = [(None, None) if g is None else forward_ad.unpack_dual(g) for g in gradients]
        first, second = zip(*both, strict=True)
        if case["route"] == "reverse over forward":
            tangent = forward_ad.unpack_dual(out).tangent
            second = torch.autograd.grad(tangent, list(duals), v, allow_unused=True)
    return filled(list(duals), first), filled(list(duals), second)


def _balanced(subject, case, dtype):
    """A balanced block, its input, a vector, and in which units it and each parameter are."""
    model = subject.model(case)
    blocks = subject.handles(model, case)
    values, size = make_balanced(blocks[0], case, dtype)
    x = as_input(case, values).requires_grad_()
    v = torch.from_numpy(case.rng("gradient").integers(-3, 4, case.shape)).to(x)
    units = {x: size}
    for layer in blocks[0].layers:
        units[layer.conv.weight] = 2 * size if layer is blocks[0].fusion else 1.0
        units[layer.conv.bias] = size
        units[layer.norm.weight] = units[layer.norm.bias] = 1.0
    units.pop(None, None)
    if not all(leaf.is_leaf for leaf in units):
        raise NotApplicable("some parameters are parametrized")
    return model, blocks, x, v, units


def _half_of_the_significand(dtype):
    return 2.0 ** -(SIGNIFICAND_BITS[dtype] // 2)


def _named(leaf, x):
    return "the input" if leaf is x else f"a parameter of shape {tuple(leaf.shape)}"


def _with_reference(subject, case, blocks):
    """An input with magnitudes from 1 to 2, a v, and the reference's pass; None if it has none."""
    values = case.rng("input").uniform(1, 2, case.shape)
    x = as_input(case, values * case.rng("signs").choice([-1.0, 1.0], case.shape))
    v = torch.from_numpy(case.rng("gradient").standard_normal(case.shape)).to(x)
    form = FORMATS[case.dtype]
    exact = real_pass(
        read_network(blocks), x.cpu().double().numpy(), v=v.cpu().double().numpy(),
        train=case.mode == "train", form=form,
    )  # fmt: skip
    if exact.kink or not exact.in_range:
        return x, v, None
    return x, v, exact


def _norm(values):
    if torch.is_tensor(values):
        values = values.detach().cpu().double().numpy()
    return float(np.linalg.norm(values.astype(np.float64).ravel()))


def _gradients(subject, case, factor, passes=1, through=1):
    """Gradients of the input and every parameter for one v times a factor.

    Args:
        passes: how many forward passes.
        through: how often backward goes through the graph of each.
    """
    model = subject.model(case)
    randomise(model, case.rng("weights"))
    leaf = normal_input(case).requires_grad_()
    v = case.rng("gradient").standard_normal(subject.output_shape(case))
    v = torch.from_numpy(v).to(leaf) * factor
    for _ in range(passes):
        seed_torch(case.seed)
        out = subject(model, leaf)
        for time in range(through):
            subject.backward(out, v, keep=time < through - 1)
    named = [("the input", leaf), *model.named_parameters()]
    for name, tensor in named:
        if tensor.grad is None:
            raise Falsified(f"gradient of {name}", "a tensor", "None")
    return {name: tensor.grad for name, tensor in named}
