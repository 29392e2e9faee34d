import time

import pytest
import torch

from mmtp.nn import peaks
from mmtp.nn.peaks import SHEETS, peak_bandwidth, peak_flops

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(peaks, "SIZES", {"cpu": (256, 2**20), "cuda": (8192, 2**30)})


def test_a_cpu_is_measured(small):
    flops = peak_flops(CPU, torch.float32)
    matrix = torch.randn(256, 256)
    began = time.perf_counter()
    for _ in range(20):
        _ = matrix @ matrix
    mean = 20 * 2 * 256**3 / (time.perf_counter() - began)
    assert flops.rate > 0.5 * mean  # the quickest try is hardly slower than the mean of others
    assert flops.source == "a product of 256 × 256 in float32"
    assert peak_bandwidth(CPU).source == "a sum over 4 MiB"


@pytest.mark.parametrize(
    ("name", "sheet"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA A100-SXM4-40GB", "A100-SXM4-40GB"),
        ("NVIDIA L40S", "L40S"),
    ],
)
def test_known_devices_are_looked_up_by_the_name_that_fits_best(monkeypatch, name, sheet):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    device = torch.device("cuda")
    flops, bandwidth = peak_flops(device, torch.bfloat16), peak_bandwidth(device)
    assert (flops.rate, bandwidth.rate) == SHEETS[sheet]
    assert flops.source == bandwidth.source == f"data sheet of {name}"
