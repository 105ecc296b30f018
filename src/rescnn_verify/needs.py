"""What properties may need of a target."""

from __future__ import annotations

from rescnn_verify.statement import Need

__all__ = [
    "ANOTHER",
    "A_FIELD_CLAIM",
    "A_PARAMETER_CLAIM",
    "BATCH_NORM",
    "CHANNEL_DROPOUT",
    "CHECKED_INPUT",
    "CONTRACT",
    "DIRECT",
    "FIELD",
    "HANDLES",
    "INDEPENDENT_ROWS",
    "NONFINITE",
    "POST_ACTIVATION",
    "REENTRANT",
    "REFUSALS",
    "STACK",
]

ANOTHER = Need("another implementation (--against)", lambda t: t.twin is not None)
HANDLES = Need("handles of the blocks (Target.handles)", lambda t: t.handles is not None)
CONTRACT = Need("the whole reference contract (a bare class)", lambda t: t.follows_contract)
STACK = Need("a stack of blocks (a bare class with num_blocks)", lambda t: t.kind == "stack")
FIELD = Need(
    "a known, bounded receptive field (Target.receptive_field)",
    lambda t: t.receptive_field is not None,
)
A_FIELD_CLAIM = Need(
    "a claimed receptive field (Target.claims['receptive field'])",
    lambda t: "receptive field" in t.claims,
)
A_PARAMETER_CLAIM = Need(
    "a claimed parameter count (Target.claims['parameter count'])",
    lambda t: "parameter count" in t.claims,
)
POST_ACTIVATION = Need(
    "a residual before the last activation (trait residual='post-activation')",
    lambda t: t.traits.residual == "post-activation",
)
BATCH_NORM = Need("batch norm (trait norm='batch')", lambda t: t.traits.norm == "batch")
CHANNEL_DROPOUT = Need(
    "channel dropout (trait dropout='channel')", lambda t: t.traits.dropout == "channel"
)
INDEPENDENT_ROWS = Need(
    "independent batch rows in eval (trait batch_independent)", lambda t: t.traits.batch_independent
)
CHECKED_INPUT = Need("a checked input shape (trait checks_input)", lambda t: t.traits.checks_input)
REFUSALS = Need(
    "refusal of invalid arguments (trait refuses_invalid)", lambda t: t.traits.refuses_invalid
)
NONFINITE = Need(
    "non-finite values kept (trait keeps_nonfinite)", lambda t: t.traits.keeps_nonfinite
)
DIRECT = Need(
    "direct convolution (trait direct_convolution)", lambda t: t.traits.direct_convolution
)
REENTRANT = Need("calls that may overlap (trait reentrant)", lambda t: t.traits.reentrant)
