"""Handles are found by type in models of any structure, and what is missing is named."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

from rescnn import ResCNNBlock, ResCNNStack
from rescnn_verify.case import Config
from rescnn_verify.compare import Falsified, NotApplicable
from rescnn_verify.drawing import NoCase, RandomDraw, draw_config
from rescnn_verify.finding import contract_handles
from rescnn_verify.handles import put
from rescnn_verify.oracles.layers import read_network, write_network
from rescnn_verify.space import ARCHITECTURES, Integers
from tests.zoo.right import ListsByRole

SMALL = ARCHITECTURES.narrow(channels=Integers(1, 24), num_blocks=Integers(1, 4))


def small_configs(count):
    draw, found = RandomDraw(3), []
    while len(found) < count:
        try:
            found.append(draw_config(draw, SMALL))
        except NoCase:
            continue
    return found


def names_of(model, handles):
    """For each block, the names of each layer's convolution and norm."""
    names = {module: name for name, module in model.named_modules()}
    return [[(names[layer.conv], names[layer.norm]) for layer in block.layers] for block in handles]


# --- the bundled model ---------------------------------------------------------------------------


@pytest.mark.parametrize("config", small_configs(10), ids=str)
def test_every_layer_of_a_stack_is_found_in_order(config):
    model = ResCNNStack(config.channels, config.num_blocks, config.kernel_sizes, config.dropout)
    found = contract_handles(model, config)
    assert [block.module for block in found] == list(model.blocks)
    assert names_of(model, found) == [
        [
            *(
                (f"blocks.{i}.branches.{j}.0", f"blocks.{i}.branches.{j}.1")
                for j in range(config.branches)
            ),
            (f"blocks.{i}.fusion.0", f"blocks.{i}.fusion.1"),
        ]
        for i in range(config.num_blocks)
    ]


@pytest.mark.parametrize("kernel_sizes", [(3,), (1,), (1, 1), (7, 3, 5), (3, 3, 1)], ids=str)
def test_every_layer_of_a_bare_block_is_found(kernel_sizes):
    model = ResCNNBlock(4, kernel_sizes)
    [block] = contract_handles(model, Config(4, 1, kernel_sizes))
    assert block.module is model
    assert [layer.conv for layer in block.branches] == [branch[0] for branch in model.branches]
    assert [layer.norm for layer in block.branches] == [branch[1] for branch in model.branches]
    assert (block.fusion.conv, block.fusion.norm) == (model.fusion[0], model.fusion[1])


def test_the_layers_are_the_branches_and_then_the_fusion():
    [block] = contract_handles(ResCNNBlock(4, (3, 5)), Config(4, 1, (3, 5)))
    assert block.layers == (*block.branches, block.fusion)


# --- other structures ----------------------------------------------------------------------------


def conv(channels, width, kernel, **arguments):
    return nn.Conv1d(channels, width, kernel, padding=kernel // 2, **arguments)


class Toy(nn.Module):
    """A block whose parts a subclass registers; ``layers`` gives them in order."""

    def __init__(self, config):
        super().__init__()
        self.register(config.channels, list(zip(config.widths, config.kernel_sizes, strict=True)))


class FusionFirst(Toy):
    def register(self, channels, branches):
        self.fusion = nn.Sequential(conv(channels, channels, 1), nn.BatchNorm1d(channels))
        self.branches = nn.ModuleList(
            nn.Sequential(conv(channels, w, k), nn.BatchNorm1d(w)) for w, k in branches
        )

    def layers(self):
        return [*((b[0], b[1]) for b in self.branches), (self.fusion[0], self.fusion[1])]


class NormsApart(Toy):
    def register(self, channels, branches):
        self.norms = nn.ModuleList(nn.BatchNorm1d(w) for w, _ in branches)
        self.convs = nn.ModuleList(conv(channels, w, k, bias=False) for w, k in branches)
        self.mix = conv(channels, channels, 1)
        self.mix_norm = nn.BatchNorm1d(channels)

    def layers(self):
        pairs = zip(self.convs, self.norms, strict=True)
        return [*pairs, (self.mix, self.mix_norm)]


class NormsApartFusionNormInside(Toy):
    def register(self, channels, branches):
        self.branches = nn.ModuleList(conv(channels, w, k) for w, k in branches)
        self.norms = nn.ModuleList(nn.BatchNorm1d(w) for w in [w for w, _ in branches] + [channels])
        self.fusion = conv(channels, channels, 1)

    def layers(self):
        return list(zip([*self.branches, self.fusion], self.norms, strict=True))


class Nested(Toy):
    def register(self, channels, branches):
        self.inner = nn.ModuleDict(
            {
                f"scale{i}": nn.Sequential(
                    nn.Sequential(conv(channels, w, k)), nn.Sequential(nn.BatchNorm1d(w))
                )
                for i, (w, k) in enumerate(branches)
            }
        )
        self.tail = nn.Sequential(
            nn.Dropout(0.0), nn.Sequential(conv(channels, channels, 1), nn.BatchNorm1d(channels))
        )

    def layers(self):
        inner = [(part[0][0], part[1][0]) for part in self.inner.values()]
        return [*inner, (self.tail[1][0], self.tail[1][1])]


class Flat(Toy):
    def register(self, channels, branches):
        self.count = len(branches)
        for i, (width, kernel) in enumerate([*branches, (channels, 1)]):
            self.add_module(f"c{i}", conv(channels, width, kernel))
            self.add_module(f"n{i}", nn.BatchNorm1d(width))

    def layers(self):
        return [(getattr(self, f"c{i}"), getattr(self, f"n{i}")) for i in range(self.count + 1)]


class FusionNamedBranchesNot(Toy):
    def register(self, channels, branches):
        self.fusion = nn.ModuleDict(
            {"norm": nn.BatchNorm1d(channels), "conv": conv(channels, channels, 1)}
        )
        self.paths = nn.ModuleList(
            nn.ModuleDict({"norm": nn.BatchNorm1d(w), "conv": conv(channels, w, k)})
            for w, k in branches
        )

    def layers(self):
        return [(part["conv"], part["norm"]) for part in [*self.paths, self.fusion]]


class BranchesNamedFusionNot(Toy):
    def register(self, channels, branches):
        self.mix = nn.Sequential(conv(channels, channels, 1), nn.BatchNorm1d(channels))
        self.branches = nn.ModuleList(
            nn.Sequential(conv(channels, w, k), nn.BatchNorm1d(w)) for w, k in branches
        )

    def layers(self):
        return [*((b[0], b[1]) for b in self.branches), (self.mix[0], self.mix[1])]


class NormsListedBackwards(Toy):
    def register(self, channels, branches):
        norms = [nn.BatchNorm1d(w) for w, _ in branches]
        self.norms = nn.ModuleList(reversed(norms))
        self.branches = nn.ModuleList(
            nn.Sequential(conv(channels, w, k), norm)
            for (w, k), norm in zip(branches, norms, strict=True)
        )
        self.fusion = nn.Sequential(conv(channels, channels, 1), nn.BatchNorm1d(channels))

    def layers(self):
        return [(part[0], part[1]) for part in [*self.branches, self.fusion]]


TOYS = (
    FusionFirst,
    NormsApart,
    NormsApartFusionNormInside,
    Nested,
    Flat,
    FusionNamedBranchesNot,
    BranchesNamedFusionNot,
    NormsListedBackwards,
)


class Holder(nn.Module):
    """A stack without the name ``blocks``."""

    def __init__(self, blocks):
        super().__init__()
        self.stem = nn.Identity()
        self.body = nn.ModuleList(blocks)


class InASequential(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.blocks = nn.Sequential(*blocks)


class Deep(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.net = nn.ModuleDict({"encoder": nn.Sequential(nn.Sequential(*blocks), nn.ReLU())})


class Numbered(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        for i, block in enumerate(blocks):
            self.add_module(f"block{i}", block)


def bare_sequential(blocks):
    return nn.Sequential(*blocks)


STACKS = (Holder, InASequential, Deep, Numbered, bare_sequential)
KERNELS = [(3,), (1,), (5, 3), (1, 1), (7, 3, 1)]


def expected(blocks):
    return [block.layers() for block in blocks]


def found(model, config):
    return [
        [(layer.conv, layer.norm) for layer in block.layers]
        for block in contract_handles(model, config)
    ]


@pytest.mark.parametrize("toy", TOYS)
@pytest.mark.parametrize("kernel_sizes", KERNELS, ids=str)
def test_layers_are_found_in_a_block_built_differently(toy, kernel_sizes):
    for channels in (3, 6, 7):
        config = Config(channels, 1, kernel_sizes)
        block = toy(config)
        assert found(block, config) == expected([block]), config


@pytest.mark.parametrize("toy", TOYS)
@pytest.mark.parametrize("stack", STACKS)
def test_blocks_are_found_in_a_stack_built_differently(toy, stack):
    for num_blocks, kernel_sizes in itertools.product((1, 2, 3), KERNELS):
        config = Config(6, num_blocks, kernel_sizes)
        blocks = [toy(config) for _ in range(num_blocks)]
        assert found(stack(blocks), config) == expected(blocks), config


@pytest.mark.parametrize("toy", TOYS)
def test_a_network_written_through_the_handles_is_read_back(toy):
    config = Config(6, 2, (5, 1, 3))
    source, target = (Holder([toy(config) for _ in range(2)]) for _ in range(2))
    for tensor in (*source.parameters(), *source.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 1, 2)
    network = read_network(contract_handles(source, config))
    write_network(network, contract_handles(target, config))
    for name, tensor in source.state_dict().items():
        assert torch.equal(tensor, target.state_dict()[name]), name


def test_a_single_branch_behind_a_fusion_without_a_container_is_found():
    class FusionFirstFlat(Toy):
        def register(self, channels, branches):
            [(width, kernel)] = branches
            self.mix = conv(channels, channels, 1)
            self.mix_norm = nn.BatchNorm1d(channels)
            self.scale = conv(channels, width, kernel)
            self.scale_norm = nn.BatchNorm1d(width)

        def layers(self):
            return [(self.scale, self.scale_norm), (self.mix, self.mix_norm)]

    config = Config(4, 1, (3,))
    block = FusionFirstFlat(config)
    assert found(block, config) == expected([block])


def test_a_dropout_between_the_named_blocks_is_no_block():
    config = Config(4, 2, (3,))
    blocks = [FusionFirst(config), FusionFirst(config)]
    model = InASequential([blocks[0], nn.Dropout(0.0), blocks[1]])
    assert found(model, config) == expected(blocks)


# --- refusals ------------------------------------------------------------------------------------


def refusal(model, config):
    with pytest.raises(Falsified) as error:
        contract_handles(model, config)
    return str(error.value)


def test_a_missing_norm_is_named():
    model = ResCNNBlock(6, (3, 5))
    model.branches[1][1] = nn.Identity()
    assert refusal(model, Config(6, 1, (3, 5))) == (
        "BatchNorm modules in a block: expected 3: one for each convolution, got 2"
    )


def test_another_kind_of_norm_does_not_count():
    model = ResCNNStack(6, 2, (3, 5))
    model.blocks[1].fusion[1] = nn.GroupNorm(1, 6)
    assert "BatchNorm modules in a block: expected 3" in refusal(model, Config(6, 2, (3, 5)))


def test_a_missing_convolution_is_named_with_the_kernels():
    model = ResCNNBlock(6, (3, 5))
    assert refusal(model, Config(6, 1, (3, 5, 7))) == (
        "Conv1d modules in a block: expected 4: one for each of kernel_sizes=[3, 5, 7] and the "
        "fusion, got 3"
    )


def test_a_shared_branch_is_a_missing_convolution():
    model = ResCNNBlock(6, (3, 3))
    model.branches[1] = model.branches[0]
    assert "Conv1d modules in a block: expected 3" in refusal(model, Config(6, 1, (3, 3)))


def test_too_few_blocks_are_counted():
    assert refusal(ResCNNStack(4, 2, (3,)), Config(4, 3, (3,))) == (
        "residual blocks in the model: expected num_blocks = 3, got 2"
    )


@pytest.mark.parametrize("stack", [Holder, Deep])
def test_a_shared_block_without_a_name_is_a_missing_block(stack):
    config = Config(4, 3, (3,))
    model = stack([FusionFirst(config)] * 3)
    assert refusal(model, config) == "residual blocks in the model: expected num_blocks = 3, got 1"


def test_a_shared_block_among_the_named_ones_appears_as_often_as_it_is_named():
    config = Config(4, 3, (3,))
    block = FusionFirst(config)
    assert found(InASequential([block] * 3), config) == expected([block] * 3)


def test_a_fusion_that_is_not_dense_is_named():
    config = Config(4, 1, (3,))
    block = Flat(config)
    block.c1 = conv(4, 4, 1, groups=2)
    text = refusal(block, config)
    assert text.startswith("fusion of a block: expected a dense")
    assert "with weight (4, 4, 1)" in text
    assert text.endswith("got convolutions with weights [(4, 4, 3), (4, 2, 1)]")


def test_a_norm_of_the_fusion_over_too_few_channels_is_named():
    config = Config(6, 1, (3, 5))
    block = Flat(config)
    block.n2 = nn.BatchNorm1d(3)
    assert refusal(block, config) == (
        "norm of the fusion: expected a BatchNorm over 6 channels, got norms over "
        "[3, 3, 3] channels"
    )


def test_a_model_without_any_convolution_is_refused():
    assert "Conv1d modules in a block: expected 2" in refusal(nn.Identity(), Config(4, 1, (3,)))
    assert "residual blocks in the model" in refusal(nn.Identity(), Config(4, 2, (3,)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"affine": False}, "one with weight"),
        ({"track_running_stats": False}, "one with running_mean"),
    ],
)
@pytest.mark.parametrize("place", ["branch", "fusion"])
def test_a_norm_without_what_the_state_dict_names_is_falsified(change, said, place):
    model = ResCNNStack(6, 1, (3, 5))
    block = model.blocks[0]
    part, width = (block.branches[0], 3) if place == "branch" else (block.fusion, 6)
    part[1] = nn.BatchNorm1d(width, **change)
    with pytest.raises(Falsified) as falsified:
        contract_handles(model, Config(channels=6, num_blocks=1, kernel_sizes=(3, 5)))
    assert falsified.value.expected == said


@pytest.mark.parametrize("place", ["branch", "fusion"])
def test_a_convolution_that_does_not_see_all_channels_is_falsified(place):
    model = ResCNNStack(6, 1, (3, 5))
    block = model.blocks[0]
    part = block.branches[0] if place == "branch" else block.fusion
    part[0] = nn.Conv1d(6, 3 if place == "branch" else 6, 3, padding=1, groups=3)
    with pytest.raises(Falsified) as falsified:
        contract_handles(model, Config(channels=6, num_blocks=1, kernel_sizes=(3, 5)))
    assert falsified.value.expected == "one that sees 6 channels"


# --- roles told by what layers do ----------------------------------------------------------------


class Chained(nn.Module):
    """Unnamed blocks, each within the one before, their branches registered back to front."""

    def __init__(self, channels, num_blocks, kernel_sizes):
        super().__init__()
        self.count = len(kernel_sizes)
        each = channels // self.count
        widths = [each] * (self.count - 1) + [channels - each * (self.count - 1)]
        self.next = Chained(channels, num_blocks - 1, kernel_sizes) if num_blocks > 1 else None
        self.mix, self.norm = nn.Conv1d(channels, channels, 1), nn.BatchNorm1d(channels)
        self.scales = nn.ModuleDict()
        for i in reversed(range(self.count)):
            conv = nn.Conv1d(channels, widths[i], kernel_sizes[i], padding=kernel_sizes[i] // 2)
            self.scales[f"s{i}"] = nn.Sequential(conv, nn.BatchNorm1d(widths[i]), nn.ReLU())

    def forward(self, x):
        parts = [self.scales[f"s{i}"](x) for i in range(self.count)]
        x = torch.relu(x + self.norm(self.mix(torch.cat(parts, 1))))
        return x if self.next is None else self.next(x)


@pytest.mark.parametrize("kernels", [(3,), (5, 3), (3, 3, 3), (1, 7, 1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_names_layers_are_ordered_by_what_they_do(kernels, dtype):
    model = Chained(9, 3, kernels).to(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    blocks = contract_handles(model, Config(9, 3, kernels))
    module = model
    for block in blocks:
        convs = [module.scales[f"s{i}"][0] for i in range(len(kernels))]
        assert [layer.conv for layer in block.branches] == convs
        assert (block.fusion.conv, block.fusion.norm) == (module.mix, module.norm)
        module = module.next
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kernels", [(3,), (1,), (5, 3), (1, 1), (1, 7, 1)], ids=str)
@pytest.mark.parametrize("num_blocks", [1, 2, 4])
def test_layers_in_lists_by_what_they_are_are_told_apart(kernels, num_blocks):
    model = ListsByRole(7, num_blocks, kernels)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    blocks = contract_handles(model, Config(7, num_blocks, kernels))
    assert [block.fusion.conv for block in blocks] == list(model.mixes)
    assert [block.fusion.norm for block in blocks] == list(model.mix_norms)
    found = [layer.conv for block in reversed(blocks) for layer in block.branches]
    assert found == list(model.scales)
    found = [layer.norm for block in reversed(blocks) for layer in block.branches]
    assert found == list(model.scale_norms)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_cannot_be_told_on_the_meta_device_is_not_applicable():
    with pytest.raises(NotApplicable, match="without data"):
        contract_handles(ListsByRole(7, 2, (5, 3)).to("meta"), Config(7, 2, (5, 3)))


def test_layers_that_do_nothing_of_the_kind_are_taken_by_place():
    model = Chained(9, 1, (5, 3))
    model.norm.forward = lambda x: torch.zeros_like(x)
    [block] = contract_handles(model, Config(9, 1, (5, 3)))
    assert (block.fusion.conv, block.fusion.norm) == (model.mix, model.norm)


def test_without_names_and_data_another_order_is_not_guessed():
    config = Config(9, 2, (5, 3))
    with pytest.raises(NotApplicable, match="without data"):
        contract_handles(Chained(9, 2, (5, 3)).to("meta"), config)


# --- writing -------------------------------------------------------------------------------------


class Negated(nn.Module):
    def forward(self, kept):
        return -kept

    def right_inverse(self, weight):
        return -weight


class Positive(nn.Module):
    def forward(self, kept):
        return kept.abs()

    def right_inverse(self, weight):
        return weight


class OneWay(nn.Module):
    def forward(self, kept):
        return kept * 3


@pytest.mark.parametrize("parametrization", [None, Negated()], ids=str)
def test_what_is_put_into_a_layer_is_what_it_reads(parametrization):
    conv = nn.Conv1d(2, 3, 5)
    if parametrization:
        register_parametrization(conv, "weight", parametrization)
    values = np.random.default_rng(0).integers(-3, 4, (3, 2, 5)).astype(float)
    put(conv, "weight", values)
    assert np.array_equal(conv.weight.detach().numpy(), values)


@pytest.mark.parametrize("parametrization", [Positive(), OneWay()], ids=str)
def test_what_cannot_be_put_is_not_applicable(parametrization):
    conv = register_parametrization(nn.Conv1d(2, 3, 5), "weight", parametrization)
    with pytest.raises(NotApplicable, match="weight cannot be set"):
        put(conv, "weight", np.full((3, 2, 5), -1.0))


def test_putting_into_what_a_layer_has_not_does_nothing():
    conv = nn.Conv1d(2, 3, 5, bias=False)
    put(conv, "bias", np.ones(3))
    assert conv.bias is None
