"""Residual: without its fusion a block is relu(x), and a stack is its blocks in order."""

import torch

from rescnn_verify.compare import same_bits, same_values
from rescnn_verify.needs import DIRECT, HANDLES, POST_ACTIVATION, STACK
from rescnn_verify.networks import certify
from rescnn_verify.probes import as_input, normal_input, zero_fusion
from rescnn_verify.space import INPUTS, Choice, Constraint, at_least
from rescnn_verify.statement import statement
from rescnn_verify.subject import CONTEXTS

# float16 has a smallest positive value of 6e-8 and a largest of 65504. A training norm squares its
# input, and no algorithm need have a variance that float32 and bfloat16 cannot hold (3e38).
MAGNITUDE_IN_RANGE = Constraint(
    "magnitudes that the dtype holds, and in train mode their squares",
    lambda c: (
        (c.dtype != "float16" or 1e-4 <= c["magnitude"] <= 1e2)
        and (c.mode == "eval" or c.dtype == "float64" or c["magnitude"] <= 1e12)
    ),
)
ZEROED = INPUTS.narrow(
    MAGNITUDE_IN_RANGE,
    batch=at_least(1),
    magnitude=Choice(1.0, 1e-30, 1e30, 1e-4, 1e2, 1e-12, 1e12, 1e5, 1e-8),
    zeroed=Choice("norm", "convolution"),
)


@statement(space=ZEROED.narrow(context=Choice(*CONTEXTS)), needs=(HANDLES, POST_ACTIVATION))
def zeroed_fusion_gives_relu(subject, case):
    """With every fusion zeroed the output is relu(x), bitwise, at any depth and in either mode."""
    model, x = _zeroed(subject, case)
    with CONTEXTS[case["context"]]():
        out = subject(model, x)
    yield same_bits(out, torch.relu(x), "output with zeroed fusion, against relu(x)")


@statement(
    space=ZEROED,
    needs=(HANDLES, POST_ACTIVATION),
    effort=0.8,
)
def zeroed_fusion_passes_the_gradient(subject, case):
    """With every fusion zeroed Jᵀv = v ⊙ 1[x > 0], bitwise, at any depth and in either mode.

    The input has no zeros, where any subgradient would be right.
    """
    model, x = _zeroed(subject, case)
    v = normal_input(case, "gradient")
    _, gradient = subject.vjp(model, x, v)
    yield same_bits(gradient, torch.where(x > 0, v, torch.zeros_like(v)), "gradient at the input")


def _zeroed(subject, case):
    model = subject.model(case)
    blocks = subject.handles(model, case)
    zero_fusion(blocks, case["zeroed"])
    values = case.rng("input").uniform(0.25, 1, case.shape)
    signs = case.rng("signs").choice([-1.0, 1.0], case.shape)
    return model, as_input(case, values * signs * case["magnitude"])


@statement(
    space=INPUTS.narrow(
        mode=Choice("eval"), batch=at_least(1),
    ),
    needs=(STACK, HANDLES, DIRECT),
    work=2**17, effort=0.7)  # fmt: skip
def a_stack_is_the_composition_of_its_blocks(subject, case):
    """stack(x) = block_n(… block_1(x)), bitwise, on certified integer networks.

    There every order of evaluation is exact, so a stack may well be computed otherwise than block
    by block, but not come out otherwise.
    """
    model = subject.model(case)
    blocks = subject.lone_blocks(model, case)
    found = certify(blocks, case, bits="forward_bits")
    if found is None:
        return
    x = as_input(case, found.x)
    with torch.no_grad():
        whole, step = subject(model, x), x
        for block in blocks:
            step = subject.run_block(block, step)
    yield same_values(whole, step, "output of the stack, against its blocks in order")
