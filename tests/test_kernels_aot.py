"""Every shipped kernel compiled for GPUs that are not there: registers, shared memory and the
matrix unit. And the session that waits for a GPU.
"""

import json
import subprocess
import sys

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")

from bench import aot  # noqa: E402

# Triton 3.6 spills 4 registers in the exact float32 slab, which is for checking, not for speed
FP32_SPILLS = 0 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9) else 4


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_shipped_kernels(arch):
    reports = list(aot.compile_all(arch))
    assert len(reports) == 10, "2 families of 4 kernels, the marks, the warm-up"
    for report in reports:
        assert report.spills <= (FP32_SPILLS if "fp32" in report.name else 0), report
        assert report.shared <= aot.SHARED_LIMIT[arch], report
        if report.name.startswith(("forward", "backward")):
            unit = report.name.split()[1] != "fp32"
            assert (report.tensor_cores > 0) == unit, report
        # on Hopper each tile's products run in a row, and only the last one waits
        if arch == 90 and report.tensor_cores:
            assert report.waits <= report.tensor_cores / 4, report


def test_the_gpu_session_runs_what_a_cpu_can(tmp_path):
    """Records and a page; what is there is not run again; what needs a GPU says so."""
    flags = ["--device", "cpu", "--small", "--only", "check,profile", "--out", str(tmp_path)]
    command = [sys.executable, "-m", "bench.gpu", *flags]
    pipes = dict(capture_output=True, text=True, check=True)
    first, second = (subprocess.run(command, **pipes).stdout for _ in range(2))
    assert "check: status 0" in first and "profile: needs a GPU" in first
    assert "check: is there" in second

    record = json.loads((tmp_path / "check.json").read_text())
    assert len(record["rows"]) == 3 and all(row["right"] for row in record["rows"])
    assert {"device", "versions", "commit", "date", "command"} <= set(record)
    page = (tmp_path / "page.md").read_text()
    assert "| a rank's share |" in page and "## profile\n\nNot run." in page
