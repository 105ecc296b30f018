"""The benchmarks of a target: ``rescnn-verify bench``, or pytest on this file."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from rescnn_verify.bench import HOWS
from rescnn_verify.bench.fixture import against_peaks, usable
from rescnn_verify.bench.jobs import Job, jobs, prepared
from rescnn_verify.bench.measure import Measurement
from rescnn_verify.bench.pairs import interleaved
from rescnn_verify.case import Case
from rescnn_verify.compare import describe
from rescnn_verify.space import SpaceError
from rescnn_verify.spacefile import SpaceFileError, read_space
from rescnn_verify.subject import DTYPES, seed_everything
from rescnn_verify.target import Target, TargetError, load


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "job" not in metafunc.fixturenames:
        return
    option = metafunc.config.getoption
    chosen = option("--verify-device")
    devices = ("cpu", "cuda") if chosen == "all" else (chosen,)
    try:
        space = read_space(Path(option("--bench-space"))) if option("--bench-space") else None
        found = jobs(load(option("--target")), space, devices, option("--bench-how") or HOWS[:1])
    except (SpaceError, SpaceFileError, TargetError) as error:
        raise pytest.UsageError(str(error)) from None
    metafunc.parametrize("job", found, ids=str)


@pytest.fixture(scope="module")
def target(request: pytest.FixtureRequest) -> Target:
    return load(request.config.getoption("--target"))


def test_pass(
    job: Job, target: Target, device_benchmark: Any, device_peaks: Any, request: Any
) -> None:
    """One pass of the target; with ``--against``, also in turn with the plain one.

    Operations and bytes are then the plain one's for both: what the function needs, whatever an
    implementation adds or hides.
    """
    case = job.case
    device = usable(case.device)

    def placed(module: nn.Module) -> nn.Module:
        module = module.to(device=case.device, dtype=DTYPES[case.dtype])
        return module.train(case.mode == "train")

    seed_everything(case.seed)
    plain = placed(target.build(case.config))
    with ExitStack() as stack:
        other = ready = stack.enter_context(prepared(job, plain, target.call))
        if target.twin is not None:
            ready = stack.enter_context(
                prepared(job, placed(_twin(target, plain, case)), target.call)
            )

        def info(found: Measurement) -> dict[str, Any]:
            peaks = device_peaks(case.device, case.dtype, job.tensor_floats)
            said = against_peaks(found, other.flops, other.bytes, *peaks)
            if other is not ready:
                seconds = 4 * float(request.config.getoption("benchmark_max_time"))
                works = ready.work, other.work
                pairs = interleaved(device, *works, ready.inputs, seconds=seconds)
                said["against"] = asdict(pairs) | {"text": str(pairs)}
            return said | {"job": job.described}

        device_benchmark(ready.work, ready.inputs, device=case.device, info=info)


def _twin(target: Target, plain: nn.Module, case: Case) -> nn.Module:
    """The second implementation; skips the test if it is made for eval mode only.

    In eval mode a second implementation that cannot be made fails the test in one line.
    """
    assert target.twin is not None
    try:
        return target.twin(plain, case.config)
    except Exception as error:
        reason = describe(error)
    # Out of the handler: no traceback of the target's is printed.
    if case.mode == "eval":
        pytest.fail(f"no second implementation: {reason}", pytrace=False)
    pytest.skip(f"no second implementation in train mode: {reason}")
