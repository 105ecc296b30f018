"""What a training call makes of a model, against the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from rescnn_verify.bounds.roundoff import FORMATS, Format
from rescnn_verify.case import Case
from rescnn_verify.compare import Comparison, equal, same_bits, same_tensors, within
from rescnn_verify.handles import BlockHandles
from rescnn_verify.oracles.layers import Block
from rescnn_verify.oracles.real import RealPass, real_pass, running_statistics
from rescnn_verify.subject import Subject, supported_under

__all__ = ["batches_counted", "learned_by", "learns_as_the_reference"]


def learns_as_the_reference(
    subject: Subject,
    case: Case,
    model: nn.Module,
    network: tuple[Block, ...],
    x: Tensor,
    form: Format,
    forward: Callable[[], Tensor],
    *,
    finite: bool = False,
    autocast: bool = False,
) -> Iterator[Comparison]:
    """A training call's output, and what each norm has learned, are within their bounds.

    A backward pass then changes nothing of it. A bound is lost where a channel is constant over the
    batch but for round-off.

    Args:
        subject, case: what is tried.
        model: in train mode. With dropout it is one block, and its output is not looked at.
        network: what it computes.
        x: the input, shape (batch, channels, length).
        form: the format that the model computes in.
        forward: makes the call.
        finite: whether the output has to be finite where it has no bound.
        autocast: whether ``forward`` calls under autocast, which need not be supported.
    """
    blocks = subject.handles(model, case)
    before = batches_counted(blocks)
    out = forward()
    expected = real_pass(network, x.cpu().double().numpy(), train=True, form=form)
    judged = case.dropout == 0 and expected.in_range and np.isfinite(expected.out.error).all()
    if finite:
        bad = int((~torch.isfinite(out)).sum())
        yield equal(bad, 0, "elements of the output that are NaN or infinite")
    if judged:
        yield within(out, expected.out, "output in train mode, against the reference")
    yield from learned_by(blocks, before, network, expected, form)
    if out.requires_grad:
        learned = {name: buffer.clone() for name, buffer in model.named_buffers()}
        with supported_under(autocast=autocast):
            subject.backward(out, torch.ones_like(out))
        yield same_tensors(dict(model.named_buffers()), learned, "buffers after a backward pass")


def batches_counted(blocks: Sequence[BlockHandles]) -> list[list[int]]:
    """How many batches each norm of each block has counted."""
    return [[_count(layer.norm) for layer in block.layers] for block in blocks]


def learned_by(
    blocks: Sequence[BlockHandles],
    counted: Sequence[Sequence[int]],
    network: tuple[Block, ...],
    expected: RealPass,
    form: Format,
) -> Iterator[Comparison]:
    """The norms of a model have learned from one batch what the reference has.

    Args:
        blocks: of the model, after the batch.
        counted: `batches_counted` before it.
        network: what the model was before it.
        expected: what the reference makes of the batch.
        form: the format that the model computes in.
    """
    for i, (block, before, batch) in enumerate(
        zip(blocks, network, expected.statistics, strict=True)
    ):
        layers = (*before.branches, before.fusion)
        for j, (handle, old, new) in enumerate(zip(block.layers, layers, batch, strict=True)):
            norm, where = handle.norm, f"of norm {j} of block {i}"
            assert norm.running_mean is not None and norm.running_var is not None
            after = _count(norm)
            yield equal(after, counted[i][j] + (new is not None), f"num_batches_tracked {where}")
            if new is None:
                yield same_bits(norm.running_mean, old.mean, f"frozen mean {where}")
                yield same_bits(norm.running_var, old.variance, f"frozen variance {where}")
                continue
            stored = FORMATS[str(norm.running_mean.dtype).removeprefix("torch.")]
            mean, variance = running_statistics(old, new, form, stored)
            for name, bounded, learned in (
                ("mean", mean, norm.running_mean),
                ("variance", variance, norm.running_var),
            ):
                if np.isfinite(bounded.error).all():
                    yield within(learned, bounded, f"running {name} {where}")


def _count(norm: _NormBase) -> int:
    return int(norm.num_batches_tracked or 0)
