"""The most that a device was seen to do, in the run whose figures are compared with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rescnn_verify.bench.cost import flops_of
from rescnn_verify.bench.devices import Device, tensor_floats_allowed
from rescnn_verify.bench.measure import HEAD_START, in_turn, timed, warm_up
from rescnn_verify.subject import DTYPES

__all__ = ["Peak", "bandwidth", "peak_flops"]


@dataclass(frozen=True)
class Peak:
    """The best rate of several routes.

    Args:
        rate: per second.
        route: what reached it.
    """

    rate: float
    route: str


def peak_flops(device: Device, dtype: str, tensor_floats: bool = False) -> Peak:
    """Operations per second in a dtype: the best of matrix products and convolutions.

    No single one is the peak everywhere: on some CPUs a convolution does twice what a matrix
    product does.

    Args:
        device: where.
        dtype: its name.
        tensor_floats: whether float32 may be rounded to TF32, on CUDA.
    """
    with tensor_floats_allowed(tensor_floats):
        return _best(device, _products(device.name, DTYPES[dtype]))


def bandwidth(device: Device) -> Peak:
    """Bytes per second between the device's main memory and itself, reads and writes added."""
    count = 2**28 if device.name == "cuda" else 2**25
    a, b = (torch.randn(count, device=device.name) for _ in range(2))
    out = torch.empty_like(a)
    moves = 2 * a.nbytes
    return _best(
        device,
        iter(
            [
                ("copy", moves, lambda: out.copy_(a)),
                ("sum of two", moves + b.nbytes, lambda: torch.add(a, b, out=out)),
            ]
        ),
    )


def _products(device: str, dtype: torch.dtype) -> Iterator[tuple[str, int, Callable[[], Tensor]]]:
    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    large = device == "cuda"
    for size in (4096, 8192) if large else (1024,):
        a, b = random(size, size), random(size, size)
        yield f"matrix product {size}", 2 * size**3, lambda a=a, b=b: a @ b  # type: ignore[misc]
    for batch, kernel in ((64, 7), (256, 3), (256, 7)) if large else ((1, 7), (4, 3), (4, 7)):
        x, weight = random(batch, 512, 960), random(512, 512, kernel)

        def convolve(x: Tensor = x, weight: Tensor = weight) -> Tensor:
            return F.conv1d(x, weight, padding=weight.shape[2] // 2)

        yield f"convolution {kernel} of batch {batch}", flops_of(convolve), convolve


def _best(device: Device, routes: Iterator[tuple[str, int, Callable[[], Tensor]]]) -> Peak:
    best = Peak(0.0, "nothing")
    with torch.no_grad():
        for name, amount, run in routes:
            best = max(best, Peak(amount / _quickest(device, run), name), key=lambda p: p.rate)
    return best


def _quickest(device: Device, run: Callable[[], Tensor]) -> float:
    """The shortest device time of a few runs: a peak is not an average."""
    before = warm_up(device, lambda _: run(), in_turn([None]), seconds=0.1)
    hold = HEAD_START * max(single.enqueue for single in before[-3:])
    return min(timed(device, lambda _: run(), [None] * 5, hold=hold))
