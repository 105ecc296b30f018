"""Relations: symmetries of the architecture, exact on certified integer networks."""

from dataclasses import replace

import numpy as np
import torch

from rescnn_verify.compare import same_values
from rescnn_verify.needs import BATCH_NORM, DIRECT, HANDLES, POST_ACTIVATION
from rescnn_verify.networks import certify
from rescnn_verify.oracles.layers import Block, write_network
from rescnn_verify.probes import as_input
from rescnn_verify.space import INPUTS, Choice, at_least
from rescnn_verify.statement import statement

RELATIONS = (
    "batch split", "batch permutation", "channel permutation", "time reversal", "translation",
    "cropping", "layout",
)  # fmt: skip


@statement(
    space=INPUTS.narrow(
        mode=Choice("eval"), layout=Choice("contiguous"), batch=at_least(2),
        length=at_least(2), relation=Choice(*RELATIONS),
    ),
    needs=(HANDLES, POST_ACTIVATION, BATCH_NORM, DIRECT),
    work=2**16,
)  # fmt: skip
def integer_networks_keep_symmetries(subject, case):
    """Batches split or permuted, channels permuted, time reversed, moved or cropped: all bitwise.

    For real weights none of these is bitwise, because another shape or order takes another kernel.
    On a certified integer network every order is exact. Reversal flips the taps, a permutation of
    channels is applied to the weights, too, and a translation is compared away from the ends.
    """
    model = subject.model(case)
    blocks = subject.handles(model, case)
    found = certify(blocks, case, bits="forward_bits")
    if found is None:
        return
    rng, relation = case.rng("relation"), case["relation"]

    def run(values, layout="contiguous"):
        with torch.no_grad():
            return subject(model, as_input(replace(case, layout=layout), values))

    out = run(found.x)
    what = f"output under {relation}"
    if relation == "batch split":
        at = int(rng.integers(1, case.batch))
        yield same_values(torch.cat([run(found.x[:at]), run(found.x[at:])]), out, what)
    elif relation == "batch permutation":
        order = rng.permutation(case.batch)
        yield same_values(run(found.x[order]), out[torch.from_numpy(order)], what)
    elif relation == "channel permutation":
        order = rng.permutation(case.channels)
        write_network(tuple(_permuted(block, order) for block in found.network), blocks)
        yield same_values(run(found.x[:, order]), out[:, torch.from_numpy(order)], what)
    elif relation == "time reversal":
        write_network(tuple(_reversed(block) for block in found.network), blocks)
        yield same_values(run(found.x[:, :, ::-1]), out.flip(2), what)
    elif relation in ("translation", "cropping"):
        side = case.field // 2
        by = int(rng.integers(1, case.length))
        zeros = np.zeros_like(found.x[:, :, :by])
        rest = found.x[:, :, : case.length - by]
        if case.length - by <= 2 * side:
            return  # nothing is away from the ends
        if relation == "cropping":
            inner = slice(0, max(0, case.length - by - side))
            yield same_values(run(rest)[:, :, inner], out[:, :, inner], what)
        else:
            inner = slice(side, max(side, case.length - by - side))
            moved = run(np.concatenate([zeros, rest], axis=2))[:, :, by:]
            yield same_values(moved[:, :, inner], out[:, :, inner], what)
    else:
        layouts = ("transposed", "strided")
        yield same_values(run(found.x, layouts[int(rng.integers(2))]), out, what)


def _permuted(block, order):
    f = block.fusion
    fusion = replace(
        f, weight=f.weight[order], bias=f.bias[order], scale=f.scale[order],
        shift=f.shift[order], mean=f.mean[order], variance=f.variance[order],
    )  # fmt: skip
    return Block(tuple(replace(b, weight=b.weight[:, order]) for b in block.branches), fusion)


def _reversed(block):
    branches = tuple(replace(b, weight=b.weight[:, :, ::-1].copy()) for b in block.branches)
    return Block(branches, block.fusion)
