"""Modes: eval remembers nothing and changes nothing; train learns statistics and no more."""

from contextlib import suppress
from dataclasses import replace

import numpy as np
import torch

from rescnn_verify.compare import (
    Falsified,
    attempt,
    equal,
    holds,
    refuses,
    same_bits,
    same_tensors,
    same_values,
)
from rescnn_verify.histories import CALLS, EDITS, EVENTS, WAYS, edit, live
from rescnn_verify.needs import BATCH_NORM, DIRECT, HANDLES, POST_ACTIVATION, REENTRANT
from rescnn_verify.networks import certify
from rescnn_verify.probes import (
    as_input,
    called_within,
    freeze,
    normal_input,
    randomise,
    state_of,
    whole_state,
)
from rescnn_verify.space import INPUTS, LARGE, Choice, Constraint, Integers, Lists, Space, at_least
from rescnn_verify.statement import statement
from rescnn_verify.subject import (
    AUTOCAST_IN_FLOAT32,
    CONTEXTS,
    DTYPES,
    NotApplicable,
    seed_torch,
    supported_under,
)

FORWARD = INPUTS.narrow(batch=at_least(1))
EVAL = FORWARD.narrow(mode=Choice("eval"))
A_CHANNEL_PER_OTHER_BRANCH = Constraint(
    "at least one channel for each branch of the other model",
    lambda c: c.channels >= len(c["beside"]),
)


@statement(
    space=EVAL.narrow(context=Choice(*CONTEXTS), autocast=Choice(False, True)), effort=0.7, inputs=8
)
def eval_is_deterministic(subject, case):
    """In eval mode two calls give the same bits, draw no random number and change no buffer."""
    model = subject.model(case)
    randomise(model, case.rng("weights"))
    x = normal_input(case)
    buffers = state_of(model)

    seed_torch(case.seed)
    states = _generators(case)
    first = _called(subject, case, model, x)
    for after, before in zip(_generators(case), states, strict=True):
        yield same_bits(after, before, "torch's generator after a call in eval mode")
    seed_torch(case.seed + 1)
    yield same_bits(_called(subject, case, model, x), first, "second output in eval mode")
    yield _same_state(model, buffers, "after two calls in eval mode")


def _called(subject, case, model, x):
    """The output in a case's context, under autocast to bfloat16 or not."""
    with (
        supported_under(autocast=case["autocast"]),
        torch.autocast(case.device, torch.bfloat16, enabled=case["autocast"]),
        CONTEXTS[case["context"]](),
    ):
        return subject(model, x)


@statement(space=EVAL.narrow(recording=Choice(False, True)), needs=(REENTRANT,), effort=0.5)
def a_call_within_a_call_leaves_it_alone(subject, case):
    """In eval mode a call that is made while another one is under way changes neither.

    So threads can share a model, as they do when it is served. The inner call comes from a hook on
    some submodule, so it comes at the same place every time; a model that calls none of its
    submodules is out of reach.
    """
    model = subject.model(case)
    randomise(model, case.rng("weights"))
    x, y = normal_input(case), normal_input(case, "another input")
    with torch.set_grad_enabled(case["recording"]):
        with called_within(model, lambda: None, after=-1) as noted:
            alone = subject(model, x), subject(model, y)  # with hooks it may take another path
        if not noted:
            raise NotApplicable("the model calls none of its submodules")
        place = int(case.rng("place").integers(len(noted) // 2))
        with called_within(model, lambda: subject(model, y), after=place) as noted:
            outer = subject(model, x)
    yield same_bits(outer, alone[0], "output of a call with another one within")
    yield same_bits(noted[place], alone[1], "output of a call within another one")


@statement(
    space=EVAL.narrow(
        history=Lists(Choice(*EVENTS), 1, 12),
        context=Choice("no_grad", "grad", "inference_mode"),
        frozen=Choice(False, True),
    ),
    work=2**18,
    effort=0.55,
)
def only_the_state_counts(subject, case):
    """A model is a function of its state: whatever came before, it is as a new one with that state.

    Before: calls on other shapes, in either mode and another dtype, refused ones, backward passes,
    training, edits and loading of weights, each after a call on the same input. Outputs, gradients
    and what a training call learns are the same to the bit, and so is what the model claims. Caches
    of weights, shapes, masks or results all show. Parameters are frozen all the while or not.
    """
    used = subject.model(case)
    randomise(used, case.rng("weights"))
    if case["frozen"]:
        used.requires_grad_(False)
    used = live(subject, used, case, case["history"], case["context"])
    yield from _as_new(subject, used, case, frozen=case["frozen"])


@statement(
    space=EVAL.narrow(
        event=Choice(*CALLS), dtype=Choice("float32", "float64"), batch=Integers(1, 4),
        length=Integers(1, 32),
    ),
    inputs=16,
    effort=0.4,
)  # fmt: skip
def the_first_call_may_be_of_any_kind(subject, case):
    """The same where the first call on these weights is an unusual one, and the only one.

    What is made of the weights for later calls is made of the weights alone.
    """
    used = subject.model(case)
    randomise(used, case.rng("weights"))
    used = live(subject, used, case, [case["event"]])
    yield from _as_new(subject, used, case)


def _as_new(subject, used, case, *, frozen=False):
    new = subject.set_mode(subject.build(case), "eval")
    if frozen:  # weights that were loaded by assignment, too
        used.requires_grad_(False)
        new.requires_grad_(False)
    state = whole_state(used)
    attempt("load_state_dict", lambda: new.load_state_dict(state))
    yield equal(_claims(subject, used, case), _claims(subject, new, case), "what the model claims")
    expected = _behaviour(subject, new, case)
    yield same_tensors(
        _behaviour(subject, used, case), expected, "of a used model, against a new one"
    )


@statement(
    space=EVAL.narrow(
        AUTOCAST_IN_FLOAT32, edit=Choice(*EDITS), way=Choice(*WAYS),
        every=Choice(True, False), batch=Integers(1, 4), length=Integers(1, 64),
        context=Choice("no_grad", "grad", "inference_mode"),
        autocast=Choice(False, True), frozen=Choice(False, True),
    ),
    inputs=8,
    effort=0.6,
)  # fmt: skip
def an_edit_is_seen(subject, case):
    """After an edit of its parameters and buffers a model called before is as a new one with them.

    Whatever the edit leaves as it was: the version counters, the sum of all values, all but one.
    Under autocast, too, and with parameters frozen.
    """
    model = subject.model(case)
    randomise(model, case.rng("weights"))
    x = normal_input(case)
    model.requires_grad_(not case["frozen"])
    _called(subject, case, model, x)
    edit(model, case["edit"], case["way"], case.rng("edit"), every=case["every"])
    out = _called(subject, case, model, x)
    new = subject.set_mode(subject.build(case), "eval").requires_grad_(not case["frozen"])
    state = whole_state(model)
    attempt("load_state_dict", lambda: new.load_state_dict(state))
    yield same_bits(
        out, _called(subject, case, new, x), "output of an edited model, against a new one"
    )


@statement(
    space=EVAL.narrow(
        to=Choice("float32", "float64"), dtype=Choice("bfloat16", "float16", "float32"),
        batch=Integers(1, 4), length=Integers(1, 64), context=Choice("no_grad", "inference_mode"),
    ),
    inputs=8,
    effort=0.3,
)  # fmt: skip
def a_cast_is_seen(subject, case):
    """A model that was called before it is moved to a wider dtype is then as one that was not.

    To the bit: both have the same state, and move it in the same way.
    """
    wider = replace(case, dtype=case["to"])
    if case.dtype == case["to"] or not subject.target.promises(wider):
        return
    used, new = subject.model(case), subject.set_mode(subject.build(case), "eval")
    randomise(used, case.rng("weights"))
    state = whole_state(used)
    attempt("load_state_dict", lambda: new.load_state_dict(state))
    outputs = []
    with CONTEXTS[case["context"]]():
        subject(used, normal_input(case))
    for model in (new, used):
        attempt(f"moving to {wider.dtype}", lambda model=model: model.to(DTYPES[wider.dtype]))
        with CONTEXTS[case["context"]]():
            outputs.append(subject(model, normal_input(wider)))
    attempt(f"moving back to {case.dtype}", lambda: used.to(DTYPES[case.dtype]))
    yield same_bits(outputs[1], outputs[0], f"output in {wider.dtype} of a model that was called")


def _claims(subject, model, case):
    return {
        what: attempt(f"claimed {what}", lambda claim=claim: claim(model, case.config))
        for what, claim in subject.target.claims.items()
    }


def _behaviour(subject, model, case):
    """Outputs and gradients in eval mode, then in train mode, and what was learned there.

    And the output under autocast, where there is one.
    """
    x, found = normal_input(case), {}
    v = torch.from_numpy(case.rng("gradient").standard_normal(subject.output_shape(case)))
    with torch.no_grad():
        found["output without gradients"] = subject(model, x)
    with suppress(Exception), torch.no_grad(), torch.autocast(case.device, torch.bfloat16):
        found["output under autocast"] = subject.target.call(model, x)
    trainable = case.batch * case.length > 1 and subject.target.promises(
        replace(case, mode="train")
    )
    for mode in ("eval", "train") if trainable else ("eval",):
        for parameter in model.parameters():
            parameter.grad = None
        subject.set_mode(model, mode)
        seed_torch(case.seed)
        found[f"output in {mode} mode"], gradient = subject.vjp(model, x, v)
        found[f"gradient at the input in {mode} mode"] = gradient
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                found[f"gradient of {name} in {mode} mode"] = parameter.grad
    return found | state_of(model)


@statement(
    space=FORWARD.narrow(
        A_CHANNEL_PER_OTHER_BRANCH, mode=Choice("eval"), dtype=Choice("float32", "float64"),
        batch=Integers(1, 9),
        length=Integers(1, 80), beside=Lists(Choice(3, 5, 7, 1, 9, 11, 15), 1, 3),
        blocks=Choice(1, 2, 3), longer=Choice("as padded", "not"), context=Choice(*CONTEXTS),
    ),
    needs=(HANDLES, POST_ACTIVATION, BATCH_NORM, DIRECT), inputs=8, effort=0.3,
)  # fmt: skip
def other_models_leave_no_trace(subject, case):
    """After a call of another model the output, and the gradient at the input, are NumPy's.

    To the bit on a certified integer network. The other one has other kernels and blocks, and gets
    an input of the same shape, or of one that is the same when it is padded: memory that models
    share has to be cleaned.
    """
    other = replace(case, kernel_sizes=case["beside"], num_blocks=case["blocks"])
    if case["longer"] == "as padded":
        other = replace(other, length=max(1, case.length + case.widest - other.widest))
    if not subject.target.promises(other):
        return
    model = subject.model(case)
    found = certify(subject.handles(model, case), case, bits="backward_bits", kinkless=True)
    if found is None:
        return
    beside = subject.set_mode(subject.build(other), "eval")
    with CONTEXTS[case["context"]]():
        subject(beside, normal_input(other))
        if case["context"] != "grad":
            out = subject(model, as_input(case, found.x))
    if case["context"] == "grad":
        out, gradient = subject.vjp(model, as_input(case, found.x), as_input(case, found.v))
        expected = found.expected.input_gradient
        yield same_values(gradient, expected, "gradient after a call of another model")
    yield same_values(out, found.expected.out, "output after a call of another model")


@statement(space=FORWARD.narrow(context=Choice("grad", "no_grad")), effort=0.8)
def only_a_training_call_changes_the_state(subject, case):
    """A call changes no parameter, nor in eval mode a buffer; a backward pass changes neither.

    What a training call learns it learns once, also where backward runs the forward pass again.
    """
    yield from _changes_no_other_state(subject, case)


@statement(
    space=LARGE.narrow(mode=Choice("train"), context=Choice("grad")),
    work=2**26,
    effort=0.08,
    inputs=1,
    extreme=0,
)
def only_a_large_training_call_changes_the_state(subject, case):
    """The same for inputs of a hundred thousand values and more, where many save memory."""
    yield from _changes_no_other_state(subject, case)


def _changes_no_other_state(subject, case):
    model = subject.model(case)
    randomise(model, case.rng("weights"))
    before = state_of(model)
    with CONTEXTS[case["context"]]():
        out = subject(model, normal_input(case))
    learned = {name for name, _ in model.named_buffers()} if case.mode == "train" else set()
    yield _same_state(model, before, "after a forward pass", besides=learned)
    if case["context"] == "no_grad":
        return
    after = state_of(model)
    subject.backward(out, torch.ones_like(out))
    yield _same_state(model, after, "after a backward pass")
    out = subject(model, normal_input(case))
    after = state_of(model)
    try:
        subject.backward(out, torch.ones_like(out), keep=True)
        subject.backward(out, torch.ones_like(out))
    except Falsified:
        return  # a graph that cannot be kept
    yield _same_state(model, after, "after two backward passes through one graph")


@statement(space=FORWARD, effort=0.6)
def modes_switch_and_return(subject, case):
    """train() and eval() reach every submodule, and a round trip without calls changes nothing.

    They do so whatever mode each of them was in.
    """
    model = subject.model(case, mode="eval")
    randomise(model, case.rng("weights"))
    x = normal_input(case)
    with torch.no_grad():
        before = subject(model, x)
    rng = case.rng("modes")
    for mode, training in (("train", True), ("eval", False)):
        for module in model.modules():
            module.training = bool(rng.integers(2))
        subject.set_mode(model, mode)
        wrong = [name for name, m in model.named_modules() if m.training is not training]
        yield equal(wrong, [], f"submodules not in {mode} mode")
    with torch.no_grad():
        yield same_bits(subject(model, x), before, "output after train() and eval()")
        after_call = subject(subject.set_mode(model, case.mode), x)
    yield equal(model.training, case.mode == "train", f"training flag after a call in {case.mode}")
    yield equal(tuple(after_call.shape), tuple(before.shape), f"output shape in {case.mode} mode")


# `INPUTS` leaves out just what is claimed here, so the factors are named one by one.
@statement(
    space=Space(
        {name: INPUTS.get(name) for name in ("mode", "dtype", "device", "seed")},
        batch=Choice(1),
        length=Choice(1),
    ),
    needs=(BATCH_NORM,),
    effort=0.5,
)
def one_value_per_channel_cannot_train(subject, case):
    """In train mode a batch of one sample of length one raises: it has no variance.

    In eval mode it is an input like any other.
    """
    model = subject.model(case)
    x = normal_input(case)
    if case.mode == "eval":
        with torch.no_grad():
            out = subject(model, x)
        yield equal(tuple(out.shape), subject.output_shape(case), "output shape in eval mode")
        return
    error = refuses(lambda: subject.target.call(model, x), (Exception,), "forward")
    yield holds(
        error is not None, "train mode on one value per channel", "an exception", "a result"
    )


@statement(space=FORWARD.narrow(mode=Choice("train")), effort=0.6)
def training_is_a_function_of_the_generator(subject, case):
    """In train mode the same generator state gives the same output and statistics, to the bit."""
    outputs, states = [], []
    for _ in range(2):
        model = subject.model(case)
        randomise(model, np.random.default_rng(case.seed))
        seed_torch(case.seed)
        with torch.no_grad():
            outputs.append(subject(model, normal_input(case)))
        states.append(state_of(model))
    yield same_bits(outputs[1], outputs[0], "second output in train mode from the same generator")
    yield same_tensors(states[1], states[0], "state after training from the same generator")


@statement(
    space=INPUTS.narrow(
        mode=Choice("train"), dropout=Choice(0.0), batch=at_least(1),
    ),
    needs=(HANDLES, POST_ACTIVATION, BATCH_NORM, DIRECT),
    work=2**16, effort=0.6)  # fmt: skip
def frozen_norms_use_their_statistics(subject, case):
    """A norm in eval mode normalises with its running statistics, whatever the model's mode.

    Setting every norm of a training model to eval mode is how one fine-tunes on small batches. On a
    certified integer network the output is then NumPy's of eval mode, and no statistic changes.
    """
    model = subject.model(case)
    blocks = subject.handles(model, case)
    found = certify(blocks, case, bits="forward_bits")
    if found is None:
        return
    for layer in (layer for block in blocks for layer in block.layers):
        freeze(layer.norm)
    before = state_of(model)
    out = subject(model, as_input(case, found.x))
    yield same_values(out, found.expected.out, "output of a training model with frozen norms")
    yield _same_state(model, before, "after a training call with frozen norms")


def _generators(case):
    """The states of torch's generators that a call might draw from."""
    cuda = [torch.cuda.get_rng_state()] if case.device == "cuda" else []
    return [torch.get_rng_state(), *cuda]


def _same_state(model, before, when, besides=frozenset()):
    kept = {name: value for name, value in state_of(model).items() if name not in besides}
    return same_tensors(kept, {name: before[name] for name in kept}, f"state {when}")
