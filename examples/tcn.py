"""`pytorch_tcn.TCN` as targets: causal, not causal, and streamed chunk by chunk."""

from dataclasses import replace

import torch
from pytorch_tcn import TCN

from rescnn_verify import Choice, Integers, Lists, Space, Target, Traits


def build(config, causal=True, norm="weight_norm"):
    (kernel,) = config.kernel_sizes
    return TCN(
        config.channels,
        [config.channels] * config.num_blocks,
        kernel,
        dilations=[config.option("dilation_base") ** i for i in range(config.num_blocks)],
        dropout=config.dropout,
        causal=causal,
        use_norm=norm,
    )


def padding(config):
    """What each of a block's two convolutions pads, block by block."""
    base, kernel = config.option("dilation_base"), config.widest
    return [base**i * (kernel - 1) for i in range(config.num_blocks)]


def field_on_both_sides(config):
    left = sum(2 * (pad // 2) for pad in padding(config))
    return left, 2 * sum(padding(config)) - left


CAUSAL = Target(
    build=build,
    space=Space(
        {"option.dilation_base": Choice(2, 1, 3)},
        channels=Integers(1, 64),
        num_blocks=Integers(1, 5),
        kernel_sizes=Lists(Choice(3, 2, 4, 5, 7, 8, 1), 1, 1),
        dropout=Choice(0.0, 0.1, 0.5, 1.0),
    ),
    receptive_field=lambda config: (2 * sum(padding(config)), 0),
    traits=Traits(norm="weight", dropout="element", batch_independent=True, keeps_nonfinite=True),
)

CENTRED = replace(
    CAUSAL,
    build=lambda config: build(config, causal=False, norm="batch_norm"),
    receptive_field=field_on_both_sides,
    traits=replace(CAUSAL.traits, norm="batch"),
)


def stream(model, x, chunk=5):
    """Each row of the batch as a stream of its own, chunk by chunk."""
    rows = []
    for row in x.split(1):
        model.reset_buffers()
        rows.append(torch.cat([model(part, inference=True) for part in row.split(chunk, 2)], 2))
    return torch.cat(rows)


STREAMED = replace(
    CAUSAL,
    call=stream,
    space=CAUSAL.space.narrow(batch=Integers(1, 5), length=Integers(1, 100)),
)

STREAMED_FROM_KERNEL_2 = replace(
    STREAMED, space=STREAMED.space.narrow(kernel_sizes=Lists(Choice(3, 2, 4, 5, 7, 8), 1, 1))
)
