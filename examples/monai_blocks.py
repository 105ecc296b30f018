"""`monai.networks.blocks.ResidualUnit` and `SimpleASPP` as targets."""

from dataclasses import replace

from monai.networks.blocks import ResidualUnit, SimpleASPP

from rescnn_verify import Choice, Integers, Lists, Space, Target, Traits

# NotImplementedError is how monai refuses a kernel for which no padding keeps the length.
ERRORS = (ValueError, TypeError, NotImplementedError)


def build_unit(config, norm="batch"):
    (kernel,) = config.kernel_sizes
    return ResidualUnit(
        1,
        config.channels,
        config.channels,
        kernel_size=kernel,
        subunits=config.option("subunits"),
        dropout=config.dropout,
        dilation=config.option("dilation"),
        norm=norm,
    )


def unit_field(config):
    side = config.option("subunits") * config.option("dilation") * (config.widest - 1) // 2
    return side, side


def unit_parameters(model, config):
    """Of each subunit: the convolution and its bias, the norm's scale and shift, one slope."""
    c = config.channels
    return config.option("subunits") * (c * c * config.widest + 3 * c + 1)


RESIDUAL_UNIT = Target(
    build=build_unit,
    space=Space(
        {"option.subunits": Choice(2, 1, 3, 4), "option.dilation": Choice(1, 2, 3)},
        channels=Integers(1, 64),
        kernel_sizes=Lists(Choice(3, 1, 5, 7, 9), 1, 1),
        dropout=Choice(0.0, 0.1, 0.5, 1.0),
    ),
    receptive_field=unit_field,
    traits=Traits(norm="batch", dropout="element", batch_independent=True, keeps_nonfinite=True),
    errors=ERRORS,
    claims={"parameter count": unit_parameters},
)

INSTANCE_NORM_UNIT = replace(
    RESIDUAL_UNIT,
    build=lambda config: build_unit(config, norm="instance"),
    space=RESIDUAL_UNIT.space.narrow(length=Integers(2, 4200)),
    receptive_field=None,  # it is the whole window
    traits=replace(RESIDUAL_UNIT.traits, norm="instance"),
    claims={},
)


def dilations(config):
    return [1 + config.option("step") * i for i in range(config.branches)]


def aspp_field(config):
    pairs = zip(config.kernel_sizes, dilations(config), strict=True)
    side = max((kernel - 1) * dilation // 2 for kernel, dilation in pairs)
    return side, side


ASPP = Target(
    build=lambda config: SimpleASPP(
        1, config.channels, config.option("width"), config.kernel_sizes, dilations(config)
    ),
    space=Space(
        {"option.width": Integers(1, 16), "option.step": Choice(1, 0, 2, 3)},
        channels=Integers(1, 64),
        kernel_sizes=Lists(Choice(3, 1, 5, 7, 9), 1, 5),
    ),
    output_shape=lambda config, shape: (
        shape[0],
        config.branches * config.option("width"),
        shape[2],
    ),
    receptive_field=aspp_field,
    traits=Traits(norm="batch", residual="none", dropout="none", batch_independent=True),
    errors=ERRORS,
)
