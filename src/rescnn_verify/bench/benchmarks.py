"""The benchmarks of a target: ``rescnn-verify bench``, or pytest on this file."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rescnn_verify.bench.devices import device_named
from rescnn_verify.bench.fixture import against_peaks
from rescnn_verify.bench.jobs import HOWS, Job, jobs, prepared
from rescnn_verify.bench.measure import Measurement
from rescnn_verify.bench.pairs import interleaved
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
        found = jobs(space, devices, option("--bench-how") or HOWS[:1])
    except (SpaceError, SpaceFileError) as error:
        raise pytest.UsageError(str(error)) from None
    metafunc.parametrize("job", found, ids=str)


@pytest.fixture(scope="module")
def target(request: pytest.FixtureRequest) -> Target:
    try:
        return load(request.config.getoption("--target"))
    except TargetError as error:
        raise pytest.UsageError(f"--target: {error}") from None


def test_pass(job: Job, target: Target, device_benchmark: Any, device_peaks: Any) -> None:
    """One pass of the target; with ``--against``, also in turn with the plain one."""
    case = job.case
    if case.device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")

    def placed(module: nn.Module) -> nn.Module:
        return module.to(device=case.device, dtype=DTYPES[case.dtype])

    seed_everything(case.seed)
    plain = placed(target.build(case.config))
    model = plain if target.twin is None else placed(target.twin(plain, case.config))
    with prepared(job, model, target.call) as ready, prepared(job, plain, target.call) as other:

        def info(found: Measurement) -> dict[str, Any]:
            peaks = device_peaks(case.device, case.dtype, job.tensor_floats)
            said = against_peaks(found, ready.flops, ready.bytes, *peaks)
            if target.twin is not None:
                pairs = interleaved(device_named(case.device), ready.work, other.work, ready.inputs)
                said["against"] = asdict(pairs) | {"text": str(pairs)}
            return said

        device_benchmark(ready.work, ready.inputs, device=case.device, info=info)
