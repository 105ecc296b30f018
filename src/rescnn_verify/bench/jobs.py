"""What is timed: passes of a model on random inputs, each with its cost."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rescnn_verify.bench.cost import flops_of, least_bytes
from rescnn_verify.bench.devices import tensor_floats_allowed
from rescnn_verify.case import Case
from rescnn_verify.enumeration import every_case
from rescnn_verify.probes import normal_input
from rescnn_verify.space import Space, SpaceError
from rescnn_verify.spacefile import DOCUMENTED
from rescnn_verify.subject import compiled

__all__ = ["HOWS", "MOST_JOBS", "Job", "Prepared", "jobs", "prepared"]

#: How a model is run: as it is, by `torch.compile`, or replayed from a CUDA graph.
HOWS = ("eager", "compiled", "graph")

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
        case = self.case
        parts = [case.device, "tf32" if self.tensor_floats else case.dtype, case.mode]
        parts.append("forward+backward" if self.backward else "forward")
        parts += [] if self.how == "eager" else [self.how]
        kernels = ",".join(map(str, case.kernel_sizes))
        shape = f"{case.batch}x{case.channels}x{case.length}"
        return "-".join([*parts, f"blocks={case.num_blocks}", f"kernels={kernels}", shape])


@dataclass(frozen=True)
class Prepared:
    """A job ready to run.

    Args:
        module: the model.
        work: the pass, called with an input.
        inputs: random ones.
        flops: operations of one pass.
        bytes: that one pass cannot avoid to move.
    """

    module: nn.Module
    work: Work
    inputs: Sequence[Tensor]
    flops: int
    bytes: int


def jobs(
    space: Space | None, devices: Sequence[str], hows: Sequence[str] = HOWS[:1]
) -> tuple[Job, ...]:
    """The grid to time: forward, and forward with backward, of every case in either mode.

    Args:
        space: the grid; what it leaves out is as in the default one: the documented stack on 960
            positions, a few batch sizes, and the usual dtypes of the device.
        devices: where.
        hows: some of `HOWS`.

    Raises:
        SpaceError: there are too many cases.
    """
    found: list[Job] = []
    for device, how, case in itertools.product(devices, hows, every_case(space or Space())):
        for one in _on(device, case, space):
            for job in _passes(one, how):
                found.append(job)
                if len(found) > MOST_JOBS:
                    raise SpaceError(
                        f"there are more than {MOST_JOBS} benchmarks; name fewer values"
                    )
    return tuple(found)


@contextmanager
def prepared(
    job: Job, module: nn.Module, call: Callable[[nn.Module, Tensor], Tensor]
) -> Iterator[Prepared]:
    """A job with its inputs on its device.

    Args:
        job: the job.
        module: the model, on the device and in the dtype.
        call: runs the model on an input.
    """
    case = job.case
    module.train(case.mode == "train")
    count = max(2, min(INPUTS, INPUT_BYTES // max(1, normal_input(case).nbytes)))
    inputs = [normal_input(replace(case, seed=case.seed + i)) for i in range(count)]
    with tensor_floats_allowed(job.tensor_floats):
        work = _pass(job, lambda x: call(module, x), module, inputs[0])
        out = call(module, inputs[0])
        cost = {
            "flops": flops_of(lambda: work(inputs[0])),
            "bytes": least_bytes((inputs[0], out), module, backward=job.backward),
        }
        with compiled(module) if job.how == "compiled" else nullcontext(module) as ready:
            run: Work = _pass(job, lambda x: call(ready, x), module, inputs[0])
            if job.how == "graph":
                run = _graphed(run, inputs[0])
            yield Prepared(module, run, inputs, **cost)


def _pass(job: Job, call: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> Work:
    if not job.backward:

        def forward(x: Tensor) -> Tensor:
            with torch.inference_mode():
                return call(x)

        return forward
    with torch.no_grad():
        v = torch.randn_like(call(x))

    def forward_and_backward(x: Tensor) -> None:
        torch.autograd.backward(call(x.detach().requires_grad_()), v)
        module.zero_grad(set_to_none=True)  # so that nothing is added to an earlier round's

    return forward_and_backward


def _graphed(run: Work, x: Tensor) -> Work:
    """A pass captured once, on an input of its own that each call first copies to."""
    own = x.clone()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # what is allocated on first use must not be captured
            run(own)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(own)

    def replay(x: Tensor) -> None:
        own.copy_(x)
        graph.replay()

    return replay


def _passes(case: Case, how: str) -> Iterator[Job]:
    """The passes of a case, in float32 on CUDA without and with TF32."""
    if how == "graph" and (case.device != "cuda" or case.mode == "train"):
        return  # a graph is replayed as it was captured: in train mode that is a fixed mask
    for backward in (False,) if how == "graph" else (False, True):
        yield Job(case, backward, how)
        if case.device == "cuda" and case.dtype == "float32":
            yield Job(case, backward, how, tensor_floats=True)


def _on(device: str, case: Case, space: Space | None) -> Iterator[Case]:
    """A case on a device, with the default grid's values for what the space leaves out."""
    named = {name for name, _ in space.factors} if space else set()
    grid: dict[str, tuple[Any, ...]] = {
        "batch": (1, 8, 64) if device == "cuda" else (1, 2, 4),
        "length": (960,),
        "dtype": ("float32", "bfloat16", "float16")
        if device == "cuda"
        else ("float32", "bfloat16"),
        "mode": ("eval", "train"),
        "channels": (DOCUMENTED.channels,),
        "num_blocks": (DOCUMENTED.num_blocks,),
        "kernel_sizes": (DOCUMENTED.kernel_sizes,),
        "dropout": (DOCUMENTED.dropout,),
    }
    free = {name: values for name, values in grid.items() if name not in named}
    for values in itertools.product(*free.values()):
        yield replace(case, device=device, **dict(zip(free, values, strict=True)))
