"""Two implementations against each other: faster ones that agree, and ones with a mistake."""

from dataclasses import replace
from pathlib import Path

import pytest

from rescnn_verify.engine import PROFILES, check_property
from rescnn_verify.outcome import FALSIFIED, HELD, NOT_APPLICABLE
from rescnn_verify.statement import find_property
from rescnn_verify.target import TargetError, load

FAST = Path(__file__).resolve().parents[1] / "examples" / "fast.py"
PROFILE = replace(PROFILES["quick"], sampled=16, shrinking=0.0)
OUTPUTS = "against.outputs_agree_within_both_bounds"
GRADIENTS = "against.gradients_agree_within_both_bounds"
TRAINING = "against.training_agrees_within_both_bounds"

MISTAKES = """
import torch
from torch import nn
from rescnn import ResCNNStack

class NoBias(ResCNNStack):
    def load_state_dict(self, state, *rest, **more):
        zeroed = {k: v * 0 if k.endswith("0.0.bias") else v for k, v in state.items()}
        return super().load_state_dict(zeroed, *rest, **more)

class Detached(ResCNNStack):
    def forward(self, x):
        out = super().forward(x)
        return out - 0.01 * x.detach() + 0.01 * x if torch.is_grad_enabled() else out

class HalfStatistics(ResCNNStack):
    def forward(self, x):
        for norm in (m for m in self.modules() if isinstance(m, nn.BatchNorm1d)):
            norm.momentum = 0.05
        return super().forward(x)

class Rounded(ResCNNStack):
    def forward(self, x):
        return super().forward(x).float().to(x.dtype)

def without_gradients(model):
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model
        def forward(self, x):
            with torch.no_grad():
                return self.inner(x)
    return Frozen()

def fails(model):
    raise NotImplementedError("no kernel for this")
"""


def verdict(fast, name, plain="rescnn:ResCNNStack"):
    target = load(f"{fast} against {plain}")
    return check_property(find_property(name), target, profile=PROFILE, seed=0)


@pytest.mark.parametrize("name", [OUTPUTS, GRADIENTS])
@pytest.mark.parametrize("fast", ["fold", "Merged"])
def test_a_right_fast_form_agrees(fast, name):
    assert verdict(f"{FAST}:{fast}", name).verdict == HELD


def test_a_class_is_compared_in_training_and_a_folded_model_is_not():
    assert verdict(f"{FAST}:Merged", TRAINING).verdict == HELD
    folded = verdict(f"{FAST}:fold", TRAINING)
    assert (folded.verdict, "train mode" in folded.reason) == (NOT_APPLICABLE, True)


def test_a_forgotten_eps_is_seen():
    assert verdict(f"{FAST}:fold_without_eps", OUTPUTS).verdict == FALSIFIED


@pytest.fixture
def mistakes(tmp_path):
    path = tmp_path / "mistakes.py"
    path.write_text(MISTAKES)
    return path


@pytest.mark.parametrize(
    ("fast", "name", "expected"),
    [
        ("NoBias", OUTPUTS, FALSIFIED),
        ("Detached", OUTPUTS, HELD),
        ("Detached", GRADIENTS, FALSIFIED),
        ("HalfStatistics", OUTPUTS, HELD),
        ("HalfStatistics", TRAINING, FALSIFIED),
        ("Rounded", OUTPUTS, FALSIFIED),
        ("without_gradients", OUTPUTS, HELD),
        ("without_gradients", GRADIENTS, NOT_APPLICABLE),
        ("fails", OUTPUTS, FALSIFIED),
    ],
)
def test_a_mistake_is_seen_by_the_property_it_concerns(mistakes, fast, name, expected):
    assert verdict(f"{mistakes}:{fast}", name).verdict == expected


def test_the_statements_do_not_apply_to_one_implementation():
    prop = find_property(OUTPUTS)
    outcome = check_property(prop, load("rescnn:ResCNNStack"), profile=PROFILE, seed=0)
    assert outcome.verdict == NOT_APPLICABLE


def test_both_names_must_be_found():
    with pytest.raises(TargetError, match="has no 'Nothing'"):
        load(f"{FAST}:Nothing against rescnn:ResCNNStack")
    with pytest.raises(TargetError, match="has no 'Nothing'"):
        load(f"{FAST}:fold against rescnn:Nothing")
