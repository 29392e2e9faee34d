"""What a device can at most, arithmetic and reading memory: of data sheets or measured. Benchmarks tell what share of it is reached."""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

SHEETS = {
    "B200": (2250e12, 8000e9),
    "H200": (989e12, 4800e9),
    "H100 PCIe": (756e12, 2000e9),
    "H100 NVL": (835e12, 3900e9),
    "H100": (989e12, 3350e9),
    "A100-SXM4-40GB": (312e12, 1555e9),
    "A100-PCIE-40GB": (312e12, 1555e9),
    "A100": (312e12, 2039e9),
    "L40S": (362e12, 864e9),
    "L4": (121e12, 300e9),
}
"""NVIDIA's data sheets, by what the name of a device contains, the first that fits: FLOPs per second in bfloat16, dense, with sums in
float32; bytes per second of its memory."""
SIZES = {"cpu": (1536, 2**26), "cuda": (8192, 2**30)}
"""Rows of the product and numbers of the sum by which a device is measured: what fits no cache, and takes no time worth mentioning."""
TRIES = 5


class Peak(NamedTuple):
    """A bound.

    Attributes:
        rate: per second.
        source: where it is from.
    """

    rate: float
    source: str


def peak_flops(device: torch.device, dtype: torch.dtype) -> Peak:
    """Floating-point operations per second: of a known device's data sheet in bfloat16, else what one large product reaches."""
    if dtype == torch.bfloat16 and (sheet := _sheet(device)):
        return Peak(sheet[0], f"data sheet of {torch.cuda.get_device_name(device)}")
    rows, _ = SIZES[device.type]
    return Peak(product_flops(device, dtype, rows), f"a product of {rows} × {rows} in {_name(dtype)}")


def product_flops(device: torch.device, dtype: torch.dtype, rows: int) -> float:
    """Floating-point operations per second that a product of two square matrices of so many rows reaches."""
    matrix = torch.randn(rows, rows, device=device).to(dtype)
    return 2 * rows**3 / _least(lambda: matrix @ matrix, device)


def peak_bandwidth(device: torch.device) -> Peak:
    """Bytes per second that memory is read with: of a known device's data sheet, else what one large sum reaches."""
    if sheet := _sheet(device):
        return Peak(sheet[1], f"data sheet of {torch.cuda.get_device_name(device)}")
    _, numbers = SIZES[device.type]
    values = torch.ones(numbers, device=device)
    return Peak(4 * numbers / _least(values.sum, device), f"a sum over {4 * numbers >> 20} MiB")


def synchronize(device: torch.device) -> None:
    """Waits until a device has done what it was told; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _sheet(device: torch.device) -> tuple[float, float] | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((sheet for part, sheet in SHEETS.items() if part in name), None)


def _least(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of the quickest try; the first, which prepares kernels, does not count."""
    seconds = []
    for _ in range(1 + TRIES):
        synchronize(device)
        began = time.perf_counter()
        call()
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
