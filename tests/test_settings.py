"""Settings of torch's that statements are tried under: in force within, as they were afterwards."""

import pytest
import torch

from rescnn_verify.compare import Falsified, NotApplicable
from rescnn_verify.subject import SETTINGS


def settings():
    return (
        torch.get_default_dtype(),
        torch.get_deterministic_debug_mode(),
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.compiler.is_compiling(),
    )


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_is_in_force_and_then_as_it_was(name):
    before = settings()
    with SETTINGS[name]():
        assert settings() != before
    assert settings() == before
    with pytest.raises(ZeroDivisionError), SETTINGS[name]():
        raise ZeroDivisionError
    assert settings() == before


def test_unwritten_memory_holds_nan_in_deterministic_mode():
    with SETTINGS["deterministic mode"]():
        assert torch.empty(5).isnan().all()


def test_what_fails_as_if_compiling_does_not_apply():
    with pytest.raises(NotApplicable, match="does not run: forward"), SETTINGS["as if compiling"]():
        raise Falsified("forward", "no exception", "RuntimeError")
