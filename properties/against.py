"""Against: two implementations with the same weights agree within both their bounds."""

import torch

from rescnn_verify.bounds.roundoff import FORMATS
from rescnn_verify.compare import Falsified, attempt, within
from rescnn_verify.needs import ANOTHER, BATCH_NORM, DIRECT, HANDLES, POST_ACTIVATION
from rescnn_verify.oracles.layers import read_network
from rescnn_verify.oracles.real import Bounded, real_pass
from rescnn_verify.probes import as_input, normal_input, randomise, state_of
from rescnn_verify.space import INPUTS, Choice, Integers, at_least
from rescnn_verify.statement import statement
from rescnn_verify.subject import NotApplicable

PAIR = (ANOTHER, HANDLES, POST_ACTIVATION, BATCH_NORM, DIRECT)
SAME_MASKS = INPUTS.narrow(dropout=Choice(0.0), batch=at_least(1))


@statement(
    space=SAME_MASKS.narrow(mode=Choice("eval")), needs=PAIR, evidence="bounded", documented=True,
    work=2**18, effort=2,
)  # fmt: skip
def outputs_agree_within_both_bounds(subject, case):
    """In eval mode, in every dtype, the outputs differ by at most the sum of both error bounds.

    Both compute the function of the first one's weights, so both are within the bound of the
    reference for it, which holds for every order of evaluation and for folded weights.
    """
    model, other, network = _pair(subject, case)
    x = normal_input(case)
    exact = real_pass(network, x.cpu().double().numpy(), form=FORMATS[case.dtype])
    if not exact.in_range:
        return
    with torch.no_grad():
        out, other_out = subject(model, x), subject(other, x)
    yield within(other_out, _twice(out, exact.out), "output of the second, against the first")


@statement(
    space=SAME_MASKS.narrow(mode=Choice("eval"), length=Integers(1, 300)),
    needs=PAIR, evidence="bounded", work=2**16, effort=2,
)  # fmt: skip
def gradients_agree_within_both_bounds(subject, case):
    """In eval mode Jᵀv differs by at most the sum of both error bounds.

    So do the parameters' gradients, in float32 and float64, if both implementations have the same
    parameters. Cases in which round-off may switch a ReLU are left out: most in the narrow dtypes.
    """
    yield from _same_gradients(subject, case)


@statement(
    space=SAME_MASKS.narrow(
        mode=Choice("train"), dtype=Choice("float32", "float64"), length=Integers(1, 300)
    ),
    needs=PAIR, evidence="bounded", work=2**16,
)  # fmt: skip
def training_agrees_within_both_bounds(subject, case):
    """In train mode output, gradients and the statistics learned agree within both bounds.

    Without dropout, whose masks two implementations may draw differently. Not applicable to a
    second implementation that cannot be made of a model in train mode.
    """
    yield from _same_gradients(subject, case)


def _same_gradients(subject, case):
    model, other, network = _pair(subject, case)
    x, v = normal_input(case), as_input(case, case.rng("gradient").standard_normal(case.shape))
    training = case.mode == "train"
    exact = real_pass(
        network, x.cpu().double().numpy(), v=v.cpu().double().numpy(), train=training,
        form=FORMATS[case.dtype],
    )  # fmt: skip
    if exact.kink or not exact.in_range:
        return
    if not subject(subject.twin(model, case), x.detach().requires_grad_()).requires_grad:
        raise NotApplicable("the second implementation has no gradients")
    alike = attempt("state_dict", lambda: _equal(state_of(other), state_of(model)))
    out, gradient = subject.vjp(model, x, v)
    other_out, other_gradient = subject.vjp(other, x, v)
    yield within(other_out, _twice(out, exact.out), "output of the second, against the first")
    what = "gradient at the input of the second, against the first"
    yield within(other_gradient, _twice(gradient, exact.input_gradient), what)
    if not alike or case.dtype not in ("float32", "float64"):
        return  # what has another value is another parameter, whatever its name
    others = dict(other.named_parameters()) | (dict(other.named_buffers()) if training else {})
    for name, tensor, bounded in _learners(subject, model, case, exact):
        what = f"what {name} of the second learns, against the first"
        yield within(_learned(others[name]), _twice(_learned(tensor), bounded), what)


def _equal(state, other):
    return list(state) == list(other) and all(map(torch.equal, state.values(), other.values()))


def _learned(tensor):
    """A parameter's gradient, zeros if it has none, or a statistic itself."""
    if not tensor.requires_grad:
        return tensor
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def _learners(subject, model, case, exact):
    """Parameters and, in training, running statistics: name, tensor, bound on what it learns."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    names = {id(tensor): name for name, tensor in tensors}  # a parametrized one has none
    statistics = exact.statistics or [() for _ in exact.gradients]
    for block, gradients, learned in zip(
        subject.handles(model, case), exact.gradients, statistics, strict=True
    ):
        for layer, own in zip(block.layers, gradients, strict=True):
            for tensor, gradient in (
                (layer.conv.weight, own.weight), (layer.conv.bias, own.bias),
                (layer.norm.weight, own.scale), (layer.norm.bias, own.shift),
            ):  # fmt: skip
                if id(tensor) in names:
                    yield names[id(tensor)], tensor, gradient
        for layer, batch in zip(block.layers, learned, strict=bool(learned)):
            mean, variance = layer.norm.running_mean, layer.norm.running_var
            yield names[id(mean)], mean, _moved(batch.mean, layer.norm, case)
            yield names[id(variance)], variance, _moved(batch.variance, layer.norm, case)


def _moved(learned, norm, case):
    """What a running statistic, at most 2 before, is off by after it moved by the momentum."""
    unit = FORMATS[case.dtype].unit
    return Bounded(learned.value, norm.momentum * learned.error + 10 * unit * (2.0 + learned.most))


def _pair(subject, case):
    model = subject.model(case)
    blocks = subject.handles(model, case)
    randomise(model, case.rng("weights"))
    try:
        other = subject.twin(model, case)
    except Falsified as error:
        if case.mode == "eval":
            raise
        raise NotApplicable(f"no second implementation in train mode: {error.got}") from error
    return model, other, read_network(blocks)


def _twice(out, exact):
    """The first implementation's result with both bounds: its own and the second's."""
    return Bounded(out.detach().cpu().double().numpy(), 2 * exact.error)
