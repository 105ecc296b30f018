"""How fast the suite checks, as ratios within one run.

``python -m tests.speed`` prints checks per second, one input being one check, of the usual test
(one Hypothesis example, one model, one input) and of the engine on the same statement and space;
then the default check with one process and with two, and the time to the first verdict; and what
a comparison of a model with itself says, again and again.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence

import torch
from hypothesis import given, settings, strategies

from rescnn import ResCNNStack
from rescnn_verify.bench.devices import Cpu
from rescnn_verify.bench.pairs import interleaved
from rescnn_verify.compare import equal
from rescnn_verify.engine import Search, search_property
from rescnn_verify.outcome import HELD
from rescnn_verify.probes import normal_input
from rescnn_verify.space import ARCHITECTURES, INPUTS, Choice, Floats, Integers, Lists
from rescnn_verify.statement import statement
from rescnn_verify.target import load

KERNELS = (1, 3, 5, 7, 9)
SMALL = ARCHITECTURES * INPUTS.narrow(
    channels=Integers(4, 32), num_blocks=Integers(1, 3), kernel_sizes=Lists(Choice(*KERNELS), 1, 4),
    dropout=Floats(0.0, 0.5), batch=Integers(1, 4), length=Integers(2, 64),
    dtype=Choice("float32"), layout=Choice("contiguous"),
)  # fmt: skip


def same_shape_and_finite(subject, case):
    """The output is finite and has the input's shape."""
    x = normal_input(case)
    with torch.no_grad():
        out = subject(subject.model(case), x)
    yield equal(tuple(out.shape), tuple(x.shape), "shape of the output")
    yield equal(bool(out.isfinite().all()), True, "whether the output is finite")


def naive(mode: str, examples: int) -> float:
    """Checks per second of the test that one would write."""

    @settings(max_examples=examples, deadline=None, database=None)
    @given(
        channels=strategies.integers(4, 32),
        blocks=strategies.integers(1, 3),
        kernels=strategies.lists(strategies.sampled_from(KERNELS), min_size=1, max_size=4),
        dropout=strategies.floats(0.0, 0.5),
        batch=strategies.integers(1, 4),
        length=strategies.integers(2, 64),
        seed=strategies.integers(0, 2**32 - 1),
    )
    def test(channels, blocks, kernels, dropout, batch, length, seed):
        torch.manual_seed(seed)
        model = ResCNNStack(channels, blocks, kernels, dropout).train(mode == "train")
        x = torch.randn(batch, channels, length)
        with torch.no_grad():
            out = model(x)
        assert out.shape == x.shape
        assert out.isfinite().all()

    start = time.perf_counter()
    test()
    return examples / (time.perf_counter() - start)


def suite(mode: str, trials: int) -> float:
    """Checks per second of the engine."""
    space = SMALL.narrow(mode=Choice(mode))
    prop = statement(space=space, inputs=64)(same_shape_and_finite)
    start = time.perf_counter()
    outcome = search_property(prop, load("rescnn:ResCNNStack"), Search(sampled=trials), seed=0)
    assert outcome.verdict == HELD, outcome
    return outcome.cases / (time.perf_counter() - start)


def default_check(*arguments: str) -> float:
    start = time.perf_counter()
    command = [sys.executable, "-m", "rescnn_verify", "check", *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def against_itself(runs: int) -> Counter[str]:
    """The verdicts of comparing a model with itself on the CPU."""
    model = ResCNNStack(64).eval()
    inputs = [torch.randn(4, 64, 480) for _ in range(4)]

    def work(x):
        with torch.inference_mode():
            return model(x)

    found = [interleaved(Cpu(), work, work, inputs) for _ in range(runs)]
    print(", ".join(f"{pairs.low:.3f} to {pairs.high:.3f}" for pairs in found))
    return Counter(pairs.verdict for pairs in found)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds")
    parser.add_argument("--examples", type=int, default=300, help="of the usual test in a round")
    parser.add_argument("--processes", action="store_true", help="time whole checks, too")
    parser.add_argument("--itself", type=int, metavar="RUNS", help="compare a model with itself")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for mode in ("eval", "train"):
        rates = [
            (naive(mode, options.examples), suite(mode, options.examples // 3))
            for _ in range(options.rounds)
        ]
        usual, own = (statistics.median(side) for side in zip(*rates, strict=True))
        ratio = statistics.median(b / a for a, b in rates)
        print(f"{mode}: usual {usual:.0f}, suite {own:.0f} checks per second, ratio {ratio:.1f}")
    if options.itself:
        print(dict(against_itself(options.itself)))
    if options.processes:
        first = default_check("-k", "widths_sum", "--profile", "quick")
        one, two = default_check("-n", "1"), default_check("-n", "2")
        print(f"first verdict {first:.1f} s; -n 1 {one:.1f} s, -n 2 {two:.1f} s, {one / two:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
