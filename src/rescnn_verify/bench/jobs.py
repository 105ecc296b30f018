"""What is timed: passes of a model on random inputs, each with its cost."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rescnn_verify.bench import HOWS
from rescnn_verify.bench.cost import flops_of, least_bytes
from rescnn_verify.bench.devices import tensor_floats_allowed
from rescnn_verify.case import Case
from rescnn_verify.enumeration import every_case
from rescnn_verify.probes import normal_input
from rescnn_verify.space import (
    A_CHANNEL_PER_BRANCH,
    MORE_THAN_ONE_VALUE_TO_TRAIN,
    Space,
    SpaceError,
)
from rescnn_verify.spacefile import DOCUMENTED
from rescnn_verify.subject import DTYPES, compiled
from rescnn_verify.target import Target

__all__ = ["MOST_JOBS", "Job", "Prepared", "jobs", "prepared"]

#: A space with more cases than this is not a grid to time.
MOST_JOBS = 500

#: Inputs that take turns, and bytes of them at most.
INPUTS, INPUT_BYTES = 8, 2**28

Work = Callable[[Tensor], object]


@dataclass(frozen=True)
class Job:
    """One pass of one model.

    Args:
        case: configuration, input, dtype, device and mode.
        backward: whether gradients of the input and the parameters are calculated, too.
        how: one of `HOWS`.
        tensor_floats: whether float32 products may be rounded to TF32, on CUDA.
    """

    case: Case
    backward: bool
    how: str = "eager"
    tensor_floats: bool = False

    def __str__(self) -> str:
        """A name that `pytest -k` can take apart."""
        case = self.case
        parts = [case.device, "tf32" if self.tensor_floats else case.dtype, case.mode]
        parts += ["forward+backward" if self.backward else "forward"]
        parts += [self.how] if self.how != "eager" else []
        parts += [f"{case.num_blocks}blocks", "k" + ".".join(map(str, case.kernel_sizes))]
        parts += [f"p{case.dropout}"] if case.dropout != DOCUMENTED.dropout else []
        parts += [case.layout] if case.layout != "contiguous" else []
        parts += [f"{name}:{value}" for name, value in case.options]
        return "-".join([*parts, f"{case.batch}x{case.channels}x{case.length}"])

    @property
    def described(self) -> dict[str, Any]:
        """The job as JSON."""
        more = {"backward": self.backward, "how": self.how, "tf32": self.tensor_floats}
        return self.case.to_json() | more


@dataclass(frozen=True)
class Prepared:
    """A job ready to run.

    Args:
        work: the pass, called with an input.
        inputs: random ones.
        flops: operations of one pass, None if it has none that are known.
        bytes: that one pass cannot avoid to move.
    """

    work: Work
    inputs: Sequence[Tensor]
    flops: int | None
    bytes: int


def jobs(
    target: Target,
    space: Space | None,
    devices: Sequence[str],
    hows: Sequence[str] = HOWS[:1],
) -> tuple[Job, ...]:
    """The grid to time: forward, and forward with backward, of every case in either mode.

    Args:
        target: whose model is timed; cases that it does not promise are left out.
        space: the grid; what it leaves out is as in the default one: the documented stack on 960
            positions, a few batch sizes, and the usual dtypes of the device.
        devices: where.
        hows: some of `HOWS`.

    Raises:
        SpaceError: there are no cases, or too many.
    """
    found: list[Job] = []
    for device, how, case in itertools.product(devices, hows, every_case(space or Space())):
        for one in _on(device, case, space, target):
            for job in _passes(one, how):
                found.append(job)
                if len(found) > MOST_JOBS:
                    raise SpaceError(
                        f"there are more than {MOST_JOBS} benchmarks; name fewer values"
                    )
    options = [name for name, _ in target.space.factors if name.startswith("option.")]
    if not found and (unnamed := [n for n in options if (space or Space()).get(n) is None]):
        raise SpaceError(
            f"the target's own option {unnamed[0].removeprefix('option.')} has no value; name one "
            "under [option] in a space file"
        )
    if not found:
        raise SpaceError(
            "there is nothing to time: the target promises none of these cases, or a graph was "
            "asked for without CUDA"
        )
    return tuple(found)


@contextmanager
def prepared(
    job: Job, module: nn.Module, call: Callable[[nn.Module, Tensor], Tensor]
) -> Iterator[Prepared]:
    """A job with its inputs on its device.

    Args:
        job: the job.
        module: the model, on the device, in the dtype and in the mode.
        call: runs the model on an input.
    """
    case = job.case
    size = DTYPES[case.dtype].itemsize * case.batch * int(case.channels) * case.length
    count = max(2, min(INPUTS, INPUT_BYTES // max(1, size)))
    inputs = [normal_input(replace(case, seed=case.seed + i)) for i in range(count)]
    with tensor_floats_allowed(job.tensor_floats):
        with torch.no_grad():
            v = torch.randn_like(call(module, inputs[0]))
        plain = _pass(job, lambda x: call(module, x), module, v)
        flops = flops_of(lambda: plain(inputs[0])) or None
        moved = least_bytes((inputs[0], v), module, backward=job.backward)
        with compiled(module) if job.how == "compiled" else nullcontext(module) as ready:
            work = _pass(job, lambda x: call(ready, x), module, v)
            yield Prepared(
                _graphed(work, inputs) if job.how == "graph" else work, inputs, flops, moved
            )


def _pass(job: Job, call: Callable[[Tensor], Tensor], module: nn.Module, v: Tensor) -> Work:
    """The pass of a job; ``v`` is the vector of its vector-Jacobian product."""
    if not job.backward:

        def forward(x: Tensor) -> Tensor:
            with torch.inference_mode():
                return call(x)

        return forward

    def forward_and_backward(x: Tensor) -> None:
        torch.autograd.backward(call(x.detach().requires_grad_()), v)
        module.zero_grad(set_to_none=True)  # so that nothing is added to an earlier round's

    return forward_and_backward


def _graphed(work: Work, inputs: Sequence[Tensor]) -> Work:
    """A pass captured once for each input, so that a replay copies nothing."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # what is allocated on first use must not be captured
            work(inputs[0])
    torch.cuda.current_stream().wait_stream(stream)
    graphs = {}
    pool = None
    for x in inputs:
        graphs[x.data_ptr()] = graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            work(x)
        pool = graph.pool()  # outputs are dropped, so graphs may share their memory
    return lambda x: graphs[x.data_ptr()].replay()


def _passes(case: Case, how: str) -> Iterator[Job]:
    """The passes of a case, in float32 on CUDA without and with TF32."""
    if how == "graph" and case.device != "cuda":
        return
    for backward in (False,) if how == "graph" else (False, True):  # only forward is captured
        yield Job(case, backward, how)
        if case.device == "cuda" and case.dtype == "float32":
            yield Job(case, backward, how, tensor_floats=True)


def _on(device: str, case: Case, space: Space | None, target: Target) -> Iterator[Case]:
    """A case on a device, with the default grid's values for what the space leaves out."""
    cuda = device == "cuda"
    named = {name for name, _ in space.factors} if space else set()
    grid: dict[str, tuple[Any, ...]] = {
        "batch": (1, 8, 64) if cuda else (1, 2, 4),
        "length": (960,),
        "dtype": ("float32", "bfloat16", "float16") if cuda else ("float32", "bfloat16"),
        "mode": ("eval", "train"),
        "channels": (DOCUMENTED.channels,),
        "num_blocks": (1 if target.kind == "block" else DOCUMENTED.num_blocks,),
        "kernel_sizes": (DOCUMENTED.kernel_sizes,),
        "dropout": (DOCUMENTED.dropout,),
    }
    free = {name: values for name, values in grid.items() if name not in named}
    always = Space(where=(A_CHANNEL_PER_BRANCH, MORE_THAN_ONE_VALUE_TO_TRAIN))
    for values in itertools.product(*free.values()):
        one = replace(case, device=device, **dict(zip(free, values, strict=True)))
        if one in always and target.promises(one):
            yield one
