from types import SimpleNamespace

import pytest
import torch

from mmtp.nn import peaks
from mmtp.nn.peaks import SHEETS, peak_bandwidth, peak_flops

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(peaks, "SIZES", {"cpu": (256, 2**20), "cuda": (8192, 2**30)})


def test_a_cpu_is_measured_by_its_quickest_try_the_first_left_out(small, monkeypatch):
    tries = [1.0, 9.0, 4.0, 5.0, 8.0, 7.0] * 2
    told = iter([moment for n, seconds in enumerate(tries) for moment in (100.0 * n, 100.0 * n + seconds)])
    monkeypatch.setattr(peaks, "time", SimpleNamespace(perf_counter=lambda: next(told)))
    flops, bandwidth = peak_flops(CPU, torch.float32), peak_bandwidth(CPU)
    assert flops == (2 * 256**3 / 4.0, "a product of 256 × 256 in float32")
    assert bandwidth == (2**22 / 4.0, "a sum over 4 MiB")


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
