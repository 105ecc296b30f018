"""Devices: CUDA computes what the CPU computes, exactly on integers, within bounds on reals."""

from contextlib import nullcontext
from dataclasses import replace

import torch

from rescnn_verify.bounds.roundoff import FORMATS, TF32
from rescnn_verify.compare import same_values, within
from rescnn_verify.needs import BATCH_NORM, DIRECT, HANDLES, POST_ACTIVATION
from rescnn_verify.networks import certify
from rescnn_verify.oracles.layers import read_network, write_network
from rescnn_verify.oracles.real import Bounded, real_pass
from rescnn_verify.probes import as_input, normal_input, randomise
from rescnn_verify.space import INPUTS, Choice, Integers
from rescnn_verify.statement import statement
from rescnn_verify.subject import tf32

REFERENCE = (HANDLES, POST_ACTIVATION, BATCH_NORM, DIRECT)
ON_CUDA = INPUTS.narrow(
    device=Choice("cuda"), mode=Choice("eval"), batch=Integers(1, 17), length=Integers(1, 600),
)  # fmt: skip


@statement(space=ON_CUDA, needs=REFERENCE, work=2**16)
def integer_networks_are_the_same_on_both(subject, case):
    """On a certified integer network CUDA gives the CPU's output and gradient, by ``==``."""
    results = []
    for device in ("cpu", "cuda"):
        there = replace(case, device=device)
        model = subject.model(there)
        blocks = subject.handles(model, there)
        found = certify(blocks, there, bits="backward_bits", kinkless=True)
        if found is None:
            return
        v = torch.from_numpy(found.v)
        results.append(subject.vjp(model, as_input(there, found.x), v))
    (out, gradient), (cuda_out, cuda_gradient) = results
    yield same_values(cuda_out, out, "output of an integer network on CUDA, against the CPU")
    yield same_values(cuda_gradient, gradient, "gradient on CUDA, against the CPU")


@statement(
    space=ON_CUDA.narrow(tf32=Choice(False, True)), needs=REFERENCE, evidence="bounded", work=2**16
)
def real_networks_agree_within_both_bounds(subject, case):
    """The outputs on CUDA and on the CPU differ by at most the sum of both error bounds.

    TF32 is off, and for float32 once on: the operands then have 11 significant bits.
    """
    there = replace(case, device="cpu")
    model, cuda_model = subject.model(there), subject.model(case)
    randomise(model, case.rng("weights"))
    network = read_network(subject.handles(model, there))
    write_network(network, subject.handles(cuda_model, case))
    form = FORMATS[case.dtype]
    rounded = case["tf32"] and case.dtype == "float32"
    x = normal_input(there)
    values = x.double().numpy()
    exact = real_pass(network, values, form=form)
    loose = real_pass(network, values, form=TF32) if rounded else exact
    if not (exact.in_range and loose.in_range):
        return
    with torch.no_grad(), tf32() if rounded else nullcontext():
        out, cuda_out = subject(model, x), subject(cuda_model, normal_input(case))
    expected = Bounded(out.double().numpy().astype(form.exact), exact.out.error + loose.out.error)
    yield within(cuda_out, expected, "output on CUDA, against the CPU")
