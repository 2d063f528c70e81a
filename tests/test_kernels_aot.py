"""Every shipped kernel compiled for GPUs that are not there: registers, shared memory and the
matrix unit.
"""

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from bench import aot  # noqa: E402


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_shipped_kernels(arch):
    reports = list(aot.compile_all(arch))
    assert len(reports) == 10, "2 families of 4 kernels, the marks and the warm-up"
    for report in reports:
        assert report.spills == 0, report
        assert report.shared <= aot.SHARED_LIMIT[arch], report
        if report.name.startswith(("forward", "backward")):
            unit = report.name.split()[1] != "fp32"
            assert (report.tensor_cores > 0) == unit, report
        # on Hopper each tile's products run in a row, and only the last one waits
        if arch == 90 and report.tensor_cores:
            assert report.waits <= report.tensor_cores / 4, report
