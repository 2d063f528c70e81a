"""Every shipped kernel compiled for GPUs that are not there: registers, shared memory and the
matrix unit.
"""

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")

from bench import aot  # noqa: E402

# Triton 3.6 spills 12 registers of the mining pass around the rare masked branch; the pinned
# version none at all.
SPILLS = 0 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9) else 32


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_shipped_kernels(arch):
    reports = list(aot.compile_all(arch))
    assert len(reports) == 9, "2 families of 4 kernels, and the marks"
    for report in reports:
        is_for_speed = "fp32" not in report.name
        assert report.spills <= (SPILLS if is_for_speed else 8), report
        assert report.shared <= aot.SHARED_LIMIT[arch], report
        if report.name.startswith(("forward", "backward")):
            unit = report.name.split()[1] != "fp32"
            assert (report.tensor_cores > 0) == unit, report
