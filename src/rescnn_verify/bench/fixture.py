"""The pytest side of timing: the fixture ``device_benchmark`` and what a run says at its end.

Durations are measured in batches first and handed to pytest-benchmark one by one, so that its
storage, JSON, comparison and histograms work as for any other benchmark.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import pytest

if TYPE_CHECKING:
    from rescnn_verify.bench.devices import Device
    from rescnn_verify.bench.measure import Measurement
    from rescnn_verify.bench.peaks import Peak

_LINES = pytest.StashKey[list[str]]()


class DeviceBenchmark(Protocol):
    """What the fixture ``device_benchmark`` is."""

    def __call__(
        self,
        work: Callable[[Any], object],
        inputs: Sequence[Any],
        *,
        device: str | None = None,
        info: Callable[[Measurement], dict[str, Any]] = lambda _: {},
    ) -> Measurement:
        """Measures work on a device and hands every round to pytest-benchmark.

        Args:
            work: called with one of the inputs.
            inputs: taken in turn; random data of one shape.
            device: ``"cpu"`` or ``"cuda"``; without the latter the test is skipped. Default: where
                the inputs are, which must be tensors then.
            info: what else goes into the JSON's ``extra_info``, given what was measured; not asked
                for with ``--benchmark-disable``.

        Raises:
            ValueError: another device, or not the one on which the inputs are.
        """


class Recorded:
    """A timer for pytest-benchmark that gives durations measured before: 0 and d₁, 0 and d₂, …"""

    __name__ = "Recorded"  # what pytest-benchmark calls it

    def __init__(self) -> None:
        self._times: Iterator[float] = iter(())

    def feed(self, durations: Sequence[float]) -> None:
        self._times = iter([time for duration in durations for time in (0.0, duration)])

    def __call__(self) -> float:
        return next(self._times)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "device_benchmark" in getattr(item, "fixturenames", ()):
            own = item.get_closest_marker("benchmark")
            options = dict(own.kwargs) if own else {}
            item.add_marker(pytest.mark.benchmark(**options | {"timer": Recorded()}), append=False)


@pytest.fixture
def device_benchmark(benchmark: Any, request: pytest.FixtureRequest) -> DeviceBenchmark:
    """Times work on a device: see `DeviceBenchmark`."""
    marker = request.node.get_closest_marker("benchmark")
    timer = marker.kwargs.get("timer") if marker else None
    if not isinstance(timer, Recorded):
        pytest.fail("device_benchmark must be an argument of the test, or of a fixture it names")
    seconds = float(request.config.getoption("benchmark_max_time"))
    least = int(request.config.getoption("benchmark_min_rounds"))

    def run(
        work: Callable[[Any], object],
        inputs: Sequence[Any],
        *,
        device: str | None = None,
        info: Callable[[Measurement], dict[str, Any]] = lambda _: {},
    ) -> Measurement:
        from rescnn_verify.bench.measure import measure

        where = usable(_place(device, inputs))
        if benchmark.disabled:
            benchmark.pedantic(lambda: None)
            return measure(where, work, inputs, seconds=0.0, least=1)
        found = measure(where, work, inputs, seconds=seconds, least=least)
        timer.feed(found.seconds)
        benchmark.pedantic(lambda: None, rounds=len(found.seconds))
        benchmark.extra_info.update(described(where, found) | info(found))
        _note(request, benchmark.extra_info)
        return found

    return run


@pytest.fixture(scope="session")
def device_peaks() -> Callable[[str, str, bool], tuple[Peak, Peak]]:
    """The most operations and bytes per second of a device, each measured once in a run."""

    @functools.cache
    def moved(device: str) -> Peak:
        from rescnn_verify.bench.peaks import bandwidth

        return bandwidth(usable(device))

    @functools.cache
    def peaks(device: str, dtype: str, tensor_floats: bool = False) -> tuple[Peak, Peak]:
        from rescnn_verify.bench.peaks import peak_flops

        return peak_flops(usable(device), dtype, tensor_floats), moved(device)

    return peaks


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if lines := config.stash.get(_LINES, None):
        terminalreporter.section("devices")
        for line in lines:
            terminalreporter.write_line(line)


def described(device: Device, found: Measurement) -> dict[str, Any]:
    """A measurement as the JSON has it; times in seconds, memory in bytes."""
    import torch

    return {
        "device": found.device,
        "device_name": device.describe(),
        "timer": found.timer,
        "torch": torch.__version__,
        "median": found.median,
        "noise": found.noise,
        "enqueue": statistics.median(found.enqueue),
        "latency": statistics.median(found.latency),
        "peak_memory": found.peak_memory,
        "warm_up": found.warm_up,
        "own_cores": found.load and found.load.own,
        "other_cores": found.load and found.load.others,
        "host_contended": found.load and found.load.contended,
    }


def against_peaks(
    found: Measurement, flops: int | None, moved: int, peak: Peak, memory: Peak
) -> dict[str, Any]:
    """What a pass costs, and how near it comes to what its device was seen to do.

    The floor is the larger of operations over their peak rate and bytes over theirs. Where no
    operation is known, nothing is said about the peak.
    """
    floor = max((flops or 0) / peak.rate, moved / memory.rate)
    return {
        "flops": flops,
        "bytes": moved,
        "peak": peak.rate,
        "peak_route": peak.route,
        "percent_of_peak": None if flops is None else 100 * flops / found.median / peak.rate,
        "bandwidth": memory.rate,
        "bandwidth_route": memory.route,
        "floor": floor,
        "percent_of_floor": 100 * floor / found.median,
    }


def usable(name: str) -> Device:
    """The device of that name; skips the test if this machine has none.

    Raises:
        ValueError: as `device_named`.
    """
    import torch

    from rescnn_verify.bench.devices import device_named

    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return device_named(name)


def _place(device: str | None, inputs: Sequence[Any]) -> str:
    """The device that is given or on which the inputs are."""
    import torch

    places = {x.device.type for x in inputs if isinstance(x, torch.Tensor)}
    if device is None and len(places) != 1:
        raise ValueError("name the device: the inputs are not tensors on one")
    if device is not None and places - {device}:
        raise ValueError(f"device {device!r} is given, and inputs are on {', '.join(places)}")
    return device or places.pop()


def _note(request: pytest.FixtureRequest, info: dict[str, Any]) -> None:
    lines = request.config.stash.setdefault(_LINES, [])
    parts = [
        f"{_seconds(info['median'])}, IQR {info['noise']:.1%} "
        f"({info['timer']} on {info['device']})",
        f"enqueue {_seconds(info['enqueue'])}",
        f"latency {_seconds(info['latency'])}",
        f"memory {info['peak_memory'] / 2**20:.1f} MiB",
    ]
    if info.get("percent_of_peak") is not None:
        parts.append(f"{info['percent_of_peak']:.0f} % of peak {info['peak'] / 1e9:.0f} GFLOP/s")
    if info.get("host_contended"):
        parts.append(f"CONTENDED: others used {info['other_cores']:.1f} cores")
    if "against" in info:
        parts.append(str(info["against"]["text"]))
    lines.append(f"{request.node.name}: {', '.join(parts)}")


def _seconds(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"
