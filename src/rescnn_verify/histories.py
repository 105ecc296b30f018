"""Histories: what may have happened to a model before it is called again.

Every event takes a model in whatever state it is and leaves it in eval mode, in the case's dtype,
with as many parameters that require a gradient as before.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from rescnn_verify.case import Case
from rescnn_verify.compare import attempt
from rescnn_verify.probes import normal_input, randomise, whole_state
from rescnn_verify.subject import CONTEXTS, DTYPES, Subject

__all__ = ["CALLS", "EDITS", "EVENTS", "WAYS", "edit", "interrupting", "kept_tensors", "live"]

Event = Callable[[Subject, nn.Module, Case, np.random.Generator], nn.Module]


def live(
    subject: Subject,
    model: nn.Module,
    case: Case,
    events: Iterable[str],
    context: str | None = None,
) -> nn.Module:
    """The model after it was called on the case's input and an event happened, for each event.

    Args:
        subject, model, case: the model is in eval mode.
        events: names of `EVENTS`, in order.
        context: one of `CONTEXTS`, how it is called between the events; None: it is not.

    Returns:
        The model, or what came in its place.
    """
    rng = case.rng("history")
    for event in events:
        if context:
            with CONTEXTS[context]():
                subject(model, normal_input(case))
        model = EVENTS[event](subject, model, case, rng)
        if any(module.training for module in model.modules()):
            subject.set_mode(model, "eval")  # else not, as it is a chance to forget something
    return model


def _other_shape(subject: Subject, case: Case, rng: np.random.Generator) -> Case:
    """The case on an input of another shape, where the target promises one."""
    other = replace(case, batch=int(rng.integers(2, 5)), length=int(rng.integers(1, 40)))
    return other if subject.target.promises(other) else case


def _can(subject: Subject, case: Case) -> bool:
    """Whether the target promises a case, which must have a variance to train on."""
    trains = case.mode == "eval" or case.batch * case.length > 1
    return trains and subject.target.promises(case)


def _on_another_shape(mode: str, act: Callable[..., None]) -> Event:
    """The event that something is done in a mode, on an input of another shape.

    Args:
        act: takes the subject, the model, the case of that shape and mode, and the generator.
    """

    def event(
        subject: Subject, model: nn.Module, case: Case, rng: np.random.Generator
    ) -> nn.Module:
        other = replace(_other_shape(subject, case, rng), mode=mode)
        if _can(subject, other):
            subject.set_mode(model, mode)
            act(subject, model, other, rng)
        return model

    return event


def _called(context: str) -> Callable[..., None]:
    def act(subject: Subject, model: nn.Module, case: Case, rng: np.random.Generator) -> None:
        with CONTEXTS[context]():
            subject(model, normal_input(case, "another input"))
        _leave_inference_mode(model)

    return act


def _leave_inference_mode(model: nn.Module) -> None:
    """Puts usual tensors in place of buffers that a call in inference mode has assigned.

    Whether statistics are assigned or changed in place is left to an implementation.
    """
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_inference():
                module._buffers[name] = buffer.clone()


def _autocast(context: str) -> Callable[..., None]:
    def act(subject: Subject, model: nn.Module, case: Case, rng: np.random.Generator) -> None:
        autocast = torch.autocast(case.device, torch.bfloat16)
        # What a target does not support leaves its mark, too.
        with suppress(Exception), CONTEXTS[context](), autocast:
            subject.target.call(model, normal_input(case, "another input"))

    return act


def _differentiated(*, step: bool) -> Callable[..., None]:
    def act(subject: Subject, model: nn.Module, case: Case, rng: np.random.Generator) -> None:
        subject.vjp(model, normal_input(case, "another input"), torch.ones(()))
        with torch.no_grad():
            for parameter in model.parameters():
                if step and parameter.grad is not None:
                    # The sign alone, because gradients in train mode know no limit.
                    parameter.sub_(parameter.grad.nan_to_num().sign(), alpha=2.0**-6)
                parameter.grad = None

    return act


def _refused(subject: Subject, model: nn.Module, case: Case, rng: np.random.Generator) -> nn.Module:
    x = normal_input(case)
    with suppress(Exception), torch.no_grad():
        subject.target.call(model, torch.cat([x, x[:, :1]], dim=1))
    return model


def _interrupted(subject: Subject, model: nn.Module, case: Case, rng: np.random.Generator) -> None:
    parts = list(model.modules())
    with suppress(Exception), interrupting(parts[rng.integers(len(parts))]):
        subject.target.call(model, normal_input(case, "another input"))


@contextmanager
def interrupting(module: nn.Module) -> Iterator[None]:
    """Ends calls of a module by an exception, as a hook of the user's may."""

    def interrupt(*_: object) -> None:
        raise KeyError("interrupted")

    hook = module.register_forward_hook(interrupt)
    try:
        yield
    finally:
        hook.remove()


def _not_finite(
    subject: Subject, model: nn.Module, case: Case, rng: np.random.Generator
) -> nn.Module:
    if subject.target.traits.keeps_nonfinite:
        # Of the same shape, as what is kept for a shape is then used again.
        with torch.no_grad():
            subject(model, torch.full_like(normal_input(case), torch.nan))
    return model


def _empty(subject: Subject, model: nn.Module, case: Case, rng: np.random.Generator) -> nn.Module:
    if _can(subject, empty := replace(case, batch=0)):
        with torch.no_grad():
            subject(model, normal_input(empty))
    return model


def _load_refused(
    subject: Subject, model: nn.Module, case: Case, rng: np.random.Generator
) -> nn.Module:
    randomise(other := subject.build(case), rng)
    state = dict(whole_state(other))
    names = [name for name, value in state.items() if isinstance(value, Tensor) and value.dim()]
    if names:
        name = names[rng.integers(len(names))]
        state[name] = torch.cat([state[name], state[name][:1]])
    with suppress(Exception):
        model.load_state_dict(state)
    return model


def _elsewhere(
    subject: Subject, model: nn.Module, case: Case, rng: np.random.Generator
) -> nn.Module:
    # To a wider dtype and back nothing is rounded, neither the state nor a constant beside it.
    other = replace(case, dtype="float64" if case.dtype == "float32" else "float32")
    if case.dtype == "float64" or not subject.target.promises(other):
        return model
    attempt(f"moving the model to {other.dtype}", lambda: model.to(DTYPES[other.dtype]))
    with torch.no_grad():
        subject(model, normal_input(other))
    attempt(f"moving the model back to {case.dtype}", lambda: model.to(DTYPES[case.dtype]))
    return model


def _frozen(subject: Subject, model: nn.Module, case: Case, rng: np.random.Generator) -> nn.Module:
    before = [parameter.requires_grad for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    subject(model, normal_input(case))
    for parameter, flag in zip(model.parameters(), before, strict=True):
        parameter.requires_grad_(flag)
    return model


def _norms_frozen(
    subject: Subject, model: nn.Module, case: Case, rng: np.random.Generator
) -> nn.Module:
    if not subject.target.promises(replace(case, mode="train")):
        return model
    subject.set_mode(model, "train")
    for module in model.modules():
        if isinstance(module, _NormBase):
            module.eval()
    with torch.no_grad():
        subject(model, normal_input(case))
    return model


def _edited(subject: Subject, model: nn.Module, case: Case, rng: np.random.Generator) -> nn.Module:
    randomise(model, rng)
    return model


def _edited_unseen(
    subject: Subject, model: nn.Module, case: Case, rng: np.random.Generator
) -> nn.Module:
    edit(model, str(rng.choice(list(EDITS))), "through .data", rng, every=True)
    return model


#: New values for a tensor, by name: some keep its sum, or all of its values but the last. Running
#: variances stay positive.
EDITS: dict[str, Callable[[Tensor], Tensor]] = {
    "scaled": lambda old: old * 1.5,
    "rolled": lambda old: old.roll(1, 0),
    "reversed": lambda old: old.flip(-1),
    "constant": lambda old: torch.full_like(old, 0.5),
    "last one doubled": lambda old: torch.cat([old[:-1], 2 * old[-1:]]),
}
#: How values are written. Through .data a tensor's version counter does not tell.
WAYS = ("in place", "through .data", "as new .data", "as a new tensor")


def kept_tensors(model: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    """Module, name and tensor of every floating-point parameter and buffer of the state_dict."""
    return [
        (module, name, tensor)
        for module in model.modules()
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None
        and tensor.is_floating_point()
        and name not in module._non_persistent_buffers_set
    ]


def edit(model: nn.Module, how: str, way: str, rng: np.random.Generator, *, every: bool) -> None:
    """Edits parameters and floating-point buffers.

    Args:
        how: one of `EDITS`.
        way: one of `WAYS`.
        rng: chooses one of them.
        every: all of them are edited, not one.
    """
    places = [place for place in kept_tensors(model) if place[2].dim()]
    tensors = list({id(tensor): tensor for _, _, tensor in places}.values())  # some may be tied
    chosen = tensors if every or not tensors else [tensors[rng.integers(len(tensors))]]
    for tensor in chosen:
        with torch.no_grad():
            # Laid out alike: for other strides, if only of one element, torch may round otherwise.
            new = torch.empty_like(tensor).copy_(EDITS[how](tensor.detach()))
            if way == "in place":
                tensor.copy_(new)
            elif way == "through .data":
                tensor.data.copy_(new)
            elif way == "as new .data":
                tensor.data = new
            else:
                if isinstance(tensor, nn.Parameter):
                    new = nn.Parameter(new, tensor.requires_grad)
                for module, name, own in places:
                    if own is tensor:
                        setattr(module, name, new)


def _one_parameter_edited(
    subject: Subject, model: nn.Module, case: Case, rng: np.random.Generator
) -> nn.Module:
    if parameters := list(model.parameters()):
        with torch.no_grad():
            parameters[rng.integers(len(parameters))].mul_(1.5)
    return model


def _statistics_edited(
    subject: Subject, model: nn.Module, case: Case, rng: np.random.Generator
) -> nn.Module:
    with torch.no_grad():
        for module, name, tensor in kept_tensors(model):
            if name in module._buffers:
                tensor.mul_(1.5)
    return model


def _loaded(*, assign: bool) -> Event:
    def event(
        subject: Subject, model: nn.Module, case: Case, rng: np.random.Generator
    ) -> nn.Module:
        randomise(other := subject.build(case), rng)
        state = whole_state(other)
        attempt("load_state_dict", lambda: model.load_state_dict(state, assign=assign))
        return model

    return event


def _copied(subject: Subject, model: nn.Module, case: Case, rng: np.random.Generator) -> nn.Module:
    other = attempt("copy.deepcopy", lambda: copy.deepcopy(model))
    randomise(other, rng)
    return other  # type: ignore[no-any-return]


#: By name, the simplest first.
EVENTS: dict[str, Event] = {
    "another call": _on_another_shape("eval", _called("no_grad")),
    "a recorded call": _on_another_shape("eval", _called("grad")),
    "a call in inference mode": _on_another_shape("eval", _called("inference_mode")),
    "a training call": _on_another_shape("train", _called("no_grad")),
    "a training call in inference mode": _on_another_shape("train", _called("inference_mode")),
    "a call under autocast": _on_another_shape("eval", _autocast("no_grad")),
    "a training call under autocast": _on_another_shape("train", _autocast("grad")),
    "a backward pass": _on_another_shape("eval", _differentiated(step=False)),
    "a training step": _on_another_shape("train", _differentiated(step=True)),
    "a refused call": _refused,
    "an interrupted call": _on_another_shape("eval", _interrupted),
    "an interrupted training call": _on_another_shape("train", _interrupted),
    "a call on NaN": _not_finite,
    "a call on an empty batch": _empty,
    "a call in another dtype": _elsewhere,
    "a call with frozen parameters": _frozen,
    "a training call with frozen norms": _norms_frozen,
    "an edit": _edited,
    "an edit through .data": _edited_unseen,
    "an edit of one parameter": _one_parameter_edited,
    "an edit of the statistics": _statistics_edited,
    "load_state_dict": _loaded(assign=False),
    "load_state_dict with assign": _loaded(assign=True),
    "a refused load_state_dict": _load_refused,
    "a deep copy": _copied,
}

#: The events that are calls.
CALLS = tuple(name for name in EVENTS if "call" in name)
