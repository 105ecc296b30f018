"""Dropout: whole channels of the fusion's output, independently, at the given rate, in train mode.

A fusion norm with scale 0 and shift s returns s for any input, so on a zero input the output of a
model is the sum over its blocks of what dropout made of s. With s a power of a base for each
block, the sum tells which blocks dropped which channels of which samples.
"""

from dataclasses import replace
from itertools import combinations_with_replacement

import numpy as np
import torch
from torch import nn

from rescnn_verify.bounds.roundoff import SIGNIFICAND_BITS, UNIT, gamma
from rescnn_verify.compare import Falsified, equal, holds, same_bits, same_values, within
from rescnn_verify.handles import put
from rescnn_verify.needs import CHANNEL_DROPOUT, HANDLES, POST_ACTIVATION
from rescnn_verify.oracles.real import Bounded
from rescnn_verify.probes import (
    FROZEN,
    PARTS,
    as_input,
    exact_norm,
    freeze_norms,
    normal_input,
    part_of,
    randomise,
    set_norm,
)
from rescnn_verify.space import INPUTS, Choice, Constraint, Integers, Lists, at_least
from rescnn_verify.statement import statement
from rescnn_verify.subject import CONTEXTS, NotApplicable, seed_torch

NEEDS = (HANDLES, CHANNEL_DROPOUT, POST_ACTIVATION)
TRAIN = INPUTS.narrow(mode=Choice("train"), batch=at_least(2))
MASKS_FIT = Constraint(
    "two bits for each block within the dtype's significand",
    lambda c: 2 * c.num_blocks <= SIGNIFICAND_BITS[c.dtype],
)
#: False alarms of one statistical comparison; a run makes fewer than 1e6 of them.
ALPHA = 1e-16
#: At a dropout of 0.1 or 0.9, 189 independent pairs all agree with a probability of ALPHA / 2.
ENOUGH = 256


@statement(
    space=TRAIN.narrow(
        frozen=Choice(*FROZEN), constant=Choice("nothing", *PARTS), context=Choice(*CONTEXTS)
    ),
    needs=NEEDS,
    documented=True,
    extreme=21,
)
def survivors_are_scaled(subject, case):
    """Every fusion returns 0 or s/(1 − p) for a shift s, constant along a channel.

    Shown by a shift of 1 in one block and 0 in the others. At p = 0 all of it survives, at p = 1
    none. It is so whether or not parameters are held constant and other norms are in eval mode.
    Behind a norm in eval mode, which here returns 1 besides, dropout may be in eval mode, too.
    """
    index = case.seed % case.num_blocks
    model = subject.model(case)
    blocks = subject.handles(model, case)
    frozen = freeze_norms(blocks, case["frozen"], case.rng("frozen"))[index][-1]
    for parameter in part_of(model, blocks, case["constant"], case.rng("constant")):
        parameter.requires_grad_(False)
    for i, block in enumerate(blocks):
        set_norm(block.fusion.norm, scale=0.0, shift=1.0 if i == index else 0.0)
    if frozen:
        put(blocks[index].fusion.conv, "weight", np.zeros(()))
        put(blocks[index].fusion.conv, "bias", np.zeros(()))
        exact_norm(blocks[index].fusion.norm, case.dtype, shift=1.0, mean=-1.0)
    height = 2.0 if frozen else 1.0
    x = as_input(case, np.zeros(case.shape))
    with CONTEXTS[case["context"]]():
        seed_torch(case.seed)
        out = subject(model, x)
    constant = bool((out == out[:, :, :1]).all())
    yield holds(constant, "dropout along a channel", "one value per channel", "several values")
    values = sorted(set(out.flatten().tolist()))
    p = case.dropout
    if frozen and values == [height]:
        return
    if p in (0.0, 1.0):
        yield equal(values, [height * (1 - p)], f"values that survive dropout {p}")
        return
    scale = height / (1 - p)
    unit = UNIT[case.dtype]
    # Roundings: of p, of 1 − p, of its inverse (or of a mask divided by it) and of the product.
    slack = 4 * unit * scale * (1 + p / (1 - p))
    off = [v for v in values if v != 0 and abs(v - scale) > slack]
    yield equal(off, [], f"values other than 0 and {height}/(1 - {p})")


@statement(
    space=INPUTS.narrow(
        mode=Choice("train"), batch=Choice(256), length=Choice(2),
        channels=Integers(16, 32), num_blocks=Choice(1, 2, 3, 4, 6),
        kernel_sizes=Lists(Choice(3, 1, 5, 7), 1, 3),
        dropout=Choice(0.3, 0.1, 0.001, 0.9),
    ),
    needs=NEEDS,
    evidence="statistical",
    work=2**23,
    effort=0.4,
)  # fmt: skip
def rate_and_independence(subject, case):
    """Channels are dropped at rate p, independently over samples, channels, blocks and calls.

    The number dropped, and the agreement of any two masks however shifted, stay within limits that
    a correct model fails with probability 1e-16 each. Blocks, samples, channels and calls must all
    be independent, also of each other's neighbours. A rate of 0.001 shows random numbers of too
    few bits.
    """
    p = case.dropout
    model = subject.model(case)
    with torch.no_grad():
        seen, kept = _masks(subject, model, case, calls=4 if case.num_blocks <= 2 else 2)
    yield _binomial(int((~kept).sum()), kept.size, p, f"channels dropped at dropout {p}")
    planes = kept.reshape(-1, *kept.shape[2:])
    names = [f"block {i} in call {j}" for i in seen for j in range(kept.shape[1])]
    for axis, along in ((1, "samples"), (2, "channels")):
        yield _dispersed((~planes).sum(axis=axis), planes.shape[axis], p, along)
    for a, b in combinations_with_replacement(range(len(planes)), 2):
        yield _independent(planes[a], planes[b], p, f"masks of {names[a]} and {names[b]}", a == b)


@statement(
    space=TRAIN.narrow(dropout=Choice(0.5, 0.1, 0.3, 0.9), context=Choice(*CONTEXTS)),
    needs=NEEDS,
    evidence="statistical",
    effort=0.7,
    inputs=2,
)
def neighbours_have_masks_of_their_own(subject, case):
    """At any size of input neighbouring blocks, calls, samples and channels drop apart.

    The number dropped, and how often neighbours agree, stay within limits that a correct model
    fails with probability 1e-16 each. Small masks are looked at in more calls, up to 24.
    """
    p = case.dropout
    model = subject.model(case)
    with CONTEXTS[case["context"]]():
        calls = int(np.clip(2 * ENOUGH // (case.batch * case.channels), 2, 24))
        _, kept = _masks(subject, model, case, calls=calls)
    yield _binomial(int((~kept).sum()), kept.size, p, f"channels dropped at dropout {p}")
    for axis, name in enumerate(("blocks", "calls", "samples", "channels")):
        lines = np.moveaxis(kept, axis, 0)
        for first in (0, 1):  # disjoint pairs, so that they are independent
            a, b = lines[first::2], lines[first + 1 :: 2]
            alike = a[: len(b)] == b
            if alike.size:
                expected = p * p + (1 - p) * (1 - p)
                where = f"masks alike of neighbouring {name}, from the {('first', 'second')[first]}"
                yield _binomial(int(alike.sum()), alike.size, expected, where)


def _masks(subject, model, case, calls):
    """Blocks, and which channels each kept: axes block, call, sample, channel."""
    p, blocks = case.dropout, subject.handles(model, case)
    # Survivors contribute 4^i, i counting blocks: base-4 digits say which blocks kept a channel.
    room = min(case.num_blocks, 8 if case.dtype in ("float32", "float64") else 2)
    first = int(case.rng("blocks").integers(case.num_blocks - room + 1))
    seen = range(first, first + room)
    for i, block in enumerate(blocks):
        shift = 4.0 ** seen.index(i) * (1 - p) if i in seen else 0.0
        set_norm(block.fusion.norm, scale=0.0, shift=shift)
    x = as_input(case, np.zeros(case.shape))
    seed_torch(case.seed)
    outs = [subject(model, x)[:, :, 0].detach().double().cpu().numpy() for _ in range(calls)]
    codes = np.rint(np.stack(outs)).astype(np.int64)
    return seen, np.stack([(codes // 4**i) % 4 for i in range(room)]).astype(bool)


@statement(
    space=INPUTS.narrow(
        mode=Choice("train"), batch=Choice(2), length=Choice(1), channels=Integers(64, 100),
        num_blocks=Choice(1), kernel_sizes=Lists(Choice(1, 3, 5, 7), 1, 3),
        dropout=Choice(0.5, 0.3),
        dtype=Choice("float32", "float64"),
    ),
    needs=NEEDS,
    evidence="statistical",
    effort=0.05,
    inputs=1,
)  # fmt: skip
def no_two_calls_draw_the_same_mask(subject, case):
    """Of 700 calls on two samples no two drop the same channels.

    Two masks of n ≥ 128 channels, those of both samples, are the same with probability
    (p² + (1 − p)²)^n, so that a correct model fails with probability below 2e-25. One that draws a
    seed of 16 bits for each call shows it in 97 of 100 cases.
    """
    model = subject.model(case)
    (block,) = subject.handles(model, case)
    set_norm(block.fusion.norm, scale=0.0, shift=1.0)
    x = as_input(case, np.zeros(case.shape))
    seed_torch(case.seed)
    with torch.no_grad():
        masks = [(subject(model, x) > 0).cpu().numpy().tobytes() for _ in range(700)]
    yield equal(len(set(masks)), len(masks), "different masks among those of 700 calls")


def _binomial(successes, trials, probability, what):
    """The exact two-sided binomial test at level `ALPHA`, by the Chernoff–Hoeffding bound.

    P(X ≥ k) ≤ exp(−n·KL(k/n ‖ q)) for k ≥ nq, and likewise below (Hoeffding 1963, theorem 1), so
    rejecting where the bound is below α/2 rejects a correct model with probability below α.
    """
    likely = trials * _divergence(successes / trials, probability) <= np.log(2 / ALPHA)
    return holds(
        bool(likely), what, f"about {probability:.3g} of {trials}", f"{successes} of {trials}"
    )


def _dispersed(counts, trials, p, along):
    """Independent counts are not all closer to their mean than chance allows.

    That all of K are within d of np has exactly the probability P(|X − np| ≤ d)^K, X binomial.
    """
    k = np.arange(trials + 1)
    factorials = np.concatenate([[0.0], np.cumsum(np.log(k[1:]))])
    log_masses = factorials[-1] - factorials - factorials[::-1]
    masses = np.exp(log_masses + k * np.log(p) + k[::-1] * np.log(1 - p))
    off = np.abs(k - trials * p)
    most = off[counts].max()
    within = min(1.0, float(masses[off <= most].sum()))
    return holds(
        counts.size * np.log(within) >= np.log(ALPHA),
        f"numbers dropped over {along}",
        f"spread about {trials * p:.3g} of {trials} as independent ones are",
        f"none of {counts.size} off by more than {most:.3g}",
    )


def _independent(a, b, p, what, same):
    """Two masks agree as often as independent ones do, however one is shifted against the other.

    All cyclic shifts over samples and channels are compared at once by a Fourier transform, which
    for these counts is exact after rounding. A mask against its own shift has pairs that overlap in
    cycles, of which three sets of disjoint pairs are a cover, so there the exponent is a third
    (Janson 2004, large deviations for sums of partly dependent variables).
    """
    spectrum = np.conj(np.fft.rfft2(a)) * np.fft.rfft2(b)
    both = np.rint(np.fft.irfft2(spectrum, s=a.shape))
    alike = (a.size - a.sum() - b.sum() + 2 * both) / a.size
    evidence = a.size / (3 if same else 1) * _divergence(alike, p * p + (1 - p) * (1 - p))
    if same:
        evidence[0, 0] = 0  # a mask agrees with itself
    shift = np.unravel_index(np.argmax(evidence), evidence.shape)
    likely = evidence[shift] <= np.log(2 * evidence.size / ALPHA)
    expected = f"alike in about {p * p + (1 - p) * (1 - p):.3g} of all places"
    return holds(bool(likely), f"{what} shifted by {tuple(int(s) for s in shift)}", expected,
                 f"in {float(alike[shift]):.3g} of them")  # fmt: skip


def _divergence(rate, probability):
    """Kullback–Leibler divergence of two Bernoulli distributions."""
    rate = np.asarray(rate, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = rate * np.log(rate / probability) + (1 - rate) * np.log(
            (1 - rate) / (1 - probability)
        )
    ends = np.where(rate <= 0, -np.log(1 - probability), -np.log(probability))
    return np.where((rate > 0) & (rate < 1), terms, ends)


@statement(
    space=TRAIN.narrow(MASKS_FIT, dtype=Choice("float64", "float32"), dropout=Choice(0.5, 0.0)),
    needs=NEEDS,
    evidence="bounded",
    effort=0.7,
)
def gradients_pass_the_mask_of_the_output(subject, case):
    """What dropout did to the output it does to the gradient: Jᵀv is masked and scaled alike.

    Block i's fusion returns 4^i times its mask, 0 or 2 at p = ½, whatever it is given, so the
    output on a positive input tells every mask, and the gradient of block i's shift in a channel
    must be the sum of v there times that mask, up to the roundings of a mean that is multiplied by
    the number of values.
    """
    model = subject.model(case)
    blocks = subject.handles(model, case)
    for i, block in enumerate(blocks):
        set_norm(block.fusion.norm, scale=0.0, shift=4.0**i)
    x = as_input(case, np.ones(case.shape))
    v = torch.from_numpy(case.rng("gradient").integers(-3, 4, case.shape)).to(x)
    seed_torch(case.seed)
    out, gradient = subject.vjp(model, x, v)
    codes = ((out - x) / 2 if case.dropout else out - x).round().to(torch.int64)
    yield same_bits(gradient, v, "gradient at the input")
    for i, block in enumerate(blocks):
        mask = (codes // 4**i) % 4 * (2 if case.dropout else 1)
        terms = (v * mask.to(v.dtype)).double().cpu().numpy()
        got = _shift_gradient(block, i)
        rounded = gamma(case.batch * case.length + 4, UNIT[case.dtype])
        bounded = Bounded(terms.sum(axis=(0, 2)), rounded * np.abs(terms).sum(axis=(0, 2)))
        yield within(got, bounded, f"gradient of the shift of block {i}")


@statement(
    space=TRAIN.narrow(
        dtype=Choice("float64", "float32"), dropout=Choice(0.5), batch=Integers(8, 10),
        channels=Integers(8, 24), length=Integers(1, 16),
    ),
    needs=NEEDS,
    evidence="statistical",
    effort=0.3,
)  # fmt: skip
def zeroed_fusions_learn_at_the_rate(subject, case):
    """Where every fusion returns 0, half of the gradient of its shifts passes at p = ½, doubled.

    So residual branches that start at zero begin to learn. The gradient of sample b is 2^b at one
    position and 0 elsewhere, so that the sum over the samples tells every mask. The number dropped
    stays within limits that a correct model fails with probability 1e-16.
    """
    model = subject.model(case)
    blocks = subject.handles(model, case)
    for block in blocks:
        set_norm(block.fusion.norm, scale=0.0, shift=0.0)
    place = int(case.rng("position").integers(case.length))
    v = np.zeros(case.shape)
    v[:, :, place] = 2.0 ** np.arange(case.batch)[:, None]
    seed_torch(case.seed)
    x = as_input(case, np.ones(case.shape))
    _, gradient = subject.vjp(model, x, as_input(replace(case, layout="contiguous"), v))
    yield same_values(gradient, v, "gradient at the input")
    dropped = 0
    for i, block in enumerate(blocks):
        got = _shift_gradient(block, i)
        code = np.clip((got.double().cpu().numpy() / 2).round(), 0, 2**case.batch - 1)
        # A mean times the number of values is the sum but for its roundings.
        rounded = gamma(case.batch * case.length + 4, UNIT[case.dtype]) * 2 * 2.0**case.batch
        bounded = Bounded(2 * code, np.full(code.shape, rounded))
        yield within(got, bounded, f"gradient of the shift of block {i}, twice some of the 2^b")
        bits = code.astype(np.int64)[:, None] >> np.arange(case.batch) & 1
        dropped += int((bits == 0).sum())
    count = len(blocks) * case.batch * case.channels
    yield _binomial(dropped, count, 0.5, "gradients of samples and channels dropped at dropout 0.5")


def _shift_gradient(block, place):
    shift = block.fusion.norm.bias
    if not isinstance(shift, nn.Parameter):
        raise NotApplicable("a fusion's shift is computed from something else")
    if shift.grad is None:
        raise Falsified(f"gradient of the shift of block {place}", "a tensor", "None")
    return shift.grad


@statement(space=TRAIN, needs=NEEDS, documented=True, extreme=14)
def the_residual_is_never_dropped(subject, case):
    """With every fusion returning 0 the output in train mode is relu(x), whatever p is.

    At p = 1 it is so for any fusion.
    """
    model = subject.model(case)
    randomise(model, case.rng("weights"))
    if case.dropout < 1:
        for block in subject.handles(model, case):
            set_norm(block.fusion.norm, scale=0.0, shift=0.0)
    x = normal_input(case)
    seed_torch(case.seed)
    with torch.no_grad():
        out = subject(model, x)
    yield same_bits(out, torch.relu(x), "output in train mode without its fusions")


@statement(
    space=TRAIN.narrow(dtype=Choice("float64", "float32"), context=Choice(*CONTEXTS)),
    needs=NEEDS,
    effort=0.5,
)
def eval_ignores_dropout(subject, case):
    """In eval mode the output does not depend on p, to the bit, and nothing is dropped."""
    x = as_input(case, case.rng("input").standard_normal(case.shape))
    outputs = []
    for p in (case.dropout, 0.0):
        model = subject.model(replace(case, dropout=p), mode="eval")
        randomise(model, np.random.default_rng(case.seed))
        with CONTEXTS[case["context"]]():
            outputs.append(subject(model, x))
    yield same_bits(outputs[0], outputs[1], f"output at dropout {case.dropout}, against dropout 0")
