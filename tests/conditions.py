"""The zoo under conditions: faults that show only in some architectures, inputs or circumstances.

``python -m tests.conditions --seconds 600 --seed 1`` takes random pairs of a fault of the zoo and a
condition, lets the fault act only where the condition holds, and prints the pairs that the default
profile does not falsify. Such a pair is a question: is a statement too narrow, or does that fault
change nothing under that condition? Another seed takes other pairs.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch

from rescnn_verify.campaign import select
from rescnn_verify.engine import PROFILES, check_property
from rescnn_verify.outcome import FALSIFIED
from rescnn_verify.statement import Property, find_property
from rescnn_verify.target import Target, contract_target
from tests.zoo import WRONG
from tests.zoo.base import Block, Stack

Condition = Callable[[Block, torch.Tensor], bool]

#: What a call runs, so that it can be switched from one call to the next.
CALLED = {
    *("forward", "check_input", "run_branches", "run_branch", "convolve", "normalise"),
    *("rectify", "join", "fuse", "drop", "add", "activate"),
}

CONDITIONS: dict[str, Condition] = {
    # Architectures
    "1 channel": lambda b, x: b.channels == 1,
    "65 channels": lambda b, x: b.channels >= 65,
    "an odd number of channels": lambda b, x: b.channels % 2 == 1,
    "a channel per branch": lambda b, x: b.channels == len(b.kernel_sizes),
    "a remainder of channels": lambda b, x: b.channels % len(b.kernel_sizes) > 0,
    "1 branch": lambda b, x: len(b.kernel_sizes) == 1,
    "4 branches": lambda b, x: len(b.kernel_sizes) >= 4,
    "the documented kernels": lambda b, x: b.kernel_sizes == (3, 5, 7),
    "repeated kernels": lambda b, x: len({*b.kernel_sizes}) < len(b.kernel_sizes),
    "unsorted kernels": lambda b, x: [*b.kernel_sizes] != sorted(b.kernel_sizes),
    "a 1-tap kernel": lambda b, x: 1 in b.kernel_sizes,
    "a 9-tap kernel": lambda b, x: max(b.kernel_sizes) >= 9,
    "1 block": lambda b, x: b.total == 1,
    "5 blocks": lambda b, x: b.total >= 5,
    "the first of several blocks": lambda b, x: b.total > 1 and b.index == 0,
    "an inner block": lambda b, x: 0 < b.index < b.total - 1,
    "no dropout": lambda b, x: b.p == 0,
    "little dropout": lambda b, x: 0 < b.p < 0.2,
    "much dropout": lambda b, x: 0.5 <= b.p < 1,
    "nothing but dropout": lambda b, x: b.p == 1,
    # Inputs
    "1 row": lambda b, x: x.shape[0] == 1,
    "an odd number of rows": lambda b, x: x.shape[0] % 2 == 1 and x.shape[0] > 1,
    "33 rows": lambda b, x: x.shape[0] >= 33,
    "1 position": lambda b, x: x.shape[2] == 1,
    "fewer positions than taps": lambda b, x: x.shape[2] < max(b.kernel_sizes),
    "an odd number of positions": lambda b, x: x.shape[2] % 2 == 1,
    "65 positions": lambda b, x: x.shape[2] >= 65,
    "1,025 positions": lambda b, x: x.shape[2] >= 1025,
    "65,536 values": lambda b, x: x.numel() >= 2**16,
    "float64": lambda b, x: x.dtype == torch.float64,
    "float32": lambda b, x: x.dtype == torch.float32,
    "float16": lambda b, x: x.dtype == torch.float16,
    "bfloat16": lambda b, x: x.dtype == torch.bfloat16,
    "another layout": lambda b, x: not x.is_contiguous(),
    "channels last": lambda b, x: min(x.shape[1:]) > 1 and x.stride(1) == 1,
    # Circumstances
    "no gradients": lambda b, x: not torch.is_grad_enabled(),
    "gradients": lambda b, x: torch.is_grad_enabled(),
    "inference mode": lambda b, x: torch.is_inference_mode_enabled(),
    "a gradient at the input": lambda b, x: x.requires_grad,
    "no gradient at the input": lambda b, x: torch.is_grad_enabled() and not x.requires_grad,
    "train mode": lambda b, x: b.training,
    "eval mode": lambda b, x: not b.training,
    "frozen weights": lambda b, x: not all(p.requires_grad for p in b.parameters()),
    "a frozen norm": lambda b, x: b.training and not all(m.training for m in b.modules()),
    "autocast": lambda b, x: torch.is_autocast_enabled("cpu"),
    "no batch counted": lambda b, x: int(b.fusion[1].num_batches_tracked) == 0,
    "batches counted": lambda b, x: int(b.fusion[1].num_batches_tracked) > 0,
    "a later call": lambda b, x: b.calls > 1,
    "the same shape again": lambda b, x: b.shapes[-2:-1] == [x.shape],
    "another shape than before": lambda b, x: bool(b.shapes[:-1]) and b.shapes[-2] != x.shape,
}


def overridden(cls: type, base: type) -> frozenset[str]:
    """Which of a class's names a subclass defines anew."""
    anew = (name for own in cls.__mro__ if issubclass(own, base) and own is not base
            for name in vars(own))  # fmt: skip
    return frozenset(name for name in anew if name in vars(base) and not name.startswith("__"))


def switchable(fault: type) -> bool:
    """Whether a fault is one of what a call does, so that it can be switched on and off."""
    return (
        issubclass(fault, Stack)
        and overridden(fault, Stack) <= {"Block", "forward"}
        and overridden(fault.Block, Block) <= CALLED
    )


def under(fault: type[Stack], condition: Condition) -> type[Stack]:
    """A stack that has the fault only where a condition holds."""

    def switched(name: str, faulty: type, plain: type):
        def method(self, *args):
            cls = faulty if self.holds else plain
            return getattr(cls, name)(self, *args)

        return method

    class ConditionalBlock(fault.Block):
        holds, calls, index, total = False, 0, 0, 1

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.shapes = []

        def forward(self, x):
            self.note(x)
            return (fault.Block if self.holds else Block).forward(self, x)

        def note(self, x):
            self.calls, self.shapes = self.calls + 1, [*self.shapes[-1:], x.shape]
            self.holds = x.dim() == 3 and condition(self, x)

    for name in overridden(fault.Block, Block) - {"forward"}:
        setattr(ConditionalBlock, name, switched(name, fault.Block, Block))

    class Conditional(fault):
        Block = ConditionalBlock

        def build(self):
            super().build()
            for index, block in enumerate(self.blocks):
                block.index, block.total = index, len(self.blocks)

        def forward(self, x):
            first = self.blocks[0]  # which has not seen this call yet: "later" is one call later
            holds = x.dim() == 3 and condition(first, x)
            return (fault if holds else Stack).forward(self, x)

    Conditional.__name__ = Conditional.__qualname__ = f"{fault.__name__}Conditional"
    return Conditional


def verdict(
    target: Target, likely: Counter[str], family: str, properties: Iterable[Property]
) -> str | None:
    """The property that falsifies a target, None if none does; the likeliest go first."""
    order = sorted(
        properties,
        key=lambda p: (-likely[p.name], p.family != family, p.family != "arithmetic"),
    )
    first = [p for p in order if likely[p.name]]
    for profile, some in (
        ("quick", first),
        ("default", first),
        ("quick", order),
        ("default", order),
    ):
        search = replace(PROFILES[profile], shrinking=0.0)
        for prop in some:
            if check_property(prop, target, profile=search, seed=0).verdict == FALSIFIED:
                return prop.name
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=600, help="no pair is begun after so many")
    parser.add_argument("--seed", type=int, default=0, help="which pairs are taken")
    parser.add_argument("--only", nargs="*", metavar="FAULT", help="names of faults")
    parser.add_argument("--condition", nargs="*", choices=CONDITIONS, metavar="CONDITION")
    options = parser.parse_args()
    faults = {fault.cls.__name__: fault for fault in WRONG if switchable(fault.cls)}
    names = options.only or list(faults)
    pairs = [(name, c) for name in names for c in options.condition or CONDITIONS]
    random.Random(options.seed).shuffle(pairs)
    properties = [find_property(p.name) for p in select(None, pairs=False) if not p.slow]
    likely: dict[str, Counter[str]] = defaultdict(Counter)
    end, tried, survivors = time.monotonic() + options.seconds, 0, 0
    for name, condition in pairs:
        if time.monotonic() > end:
            break
        fault, start = faults[name], time.monotonic()
        target = contract_target(under(fault.cls, CONDITIONS[condition]), name)
        found = verdict(target, likely[name], fault.family, properties)
        tried += 1
        if found:
            likely[name][found] += 1
        else:
            survivors += 1
        seconds = time.monotonic() - start
        print(f"{seconds:6.1f} s  {name} under {condition!r}: {found or 'SURVIVES'}", flush=True)
    print(f"{tried} pairs, {survivors} survive")


if __name__ == "__main__":
    main()
