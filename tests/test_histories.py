"""Histories: every event leaves a model that can be called, in eval mode, in the case's dtype."""

import pytest
import torch

from rescnn_verify.case import Case
from rescnn_verify.histories import EVENTS, live
from rescnn_verify.probes import normal_input
from rescnn_verify.space import ARCHITECTURES, INPUTS, USUAL, Choice
from rescnn_verify.subject import CONTEXTS, DTYPES, Subject
from rescnn_verify.target import Target, load

CASE = Case(channels=4, num_blocks=2, kernel_sizes=(3, 1), dropout=0.5, batch=2, length=5, seed=3)


def after(event, case=CASE, target=None, context="no_grad"):
    subject = Subject(target or load("rescnn:ResCNNStack"))
    model = subject.model(case, mode="eval")
    return subject, model, live(subject, model, case, [event], context)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("event", EVENTS)
def test_an_event_leaves_a_model_that_can_be_called(event, context):
    subject, _, model = after(event, context=context)
    assert not any(module.training for module in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {DTYPES[CASE.dtype]}
    assert subject(model, normal_input(CASE)).isfinite().all()


# What a call does to the state, and what is no event at all for another implementation.
CHANGES = {
    "a training call", "a training call in inference mode", "a training call under autocast",
    "a training step", "an edit", "an edit through .data",
    "an edit of one parameter", "an edit of the statistics", "load_state_dict",
    "load_state_dict with assign", "a refused load_state_dict", "a deep copy",
    "an interrupted training call",
}  # fmt: skip


@pytest.mark.parametrize("event", EVENTS)
def test_an_event_changes_the_state_only_if_it_is_made_for_that(event):
    subject = Subject(load("rescnn:ResCNNStack"))
    model = subject.model(CASE, mode="eval")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model = live(subject, model, CASE, [event], "no_grad")
    same = all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert same is (event not in CHANGES)


@pytest.mark.parametrize("event", EVENTS)
def test_nothing_happens_that_the_target_does_not_promise(event):
    seen = set()

    class Narrow(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv1d(4, 4, 1)

        def forward(self, x):
            seen.add((x.dtype, self.training))
            return self.conv(x)

    space = ARCHITECTURES * USUAL * INPUTS.narrow(dtype=Choice("float32"), mode=Choice("eval"))
    after(event, target=Target(lambda config: Narrow(), space=space))
    assert seen == {(torch.float32, False)}
