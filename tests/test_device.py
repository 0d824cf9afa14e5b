"""Every stage on a device that is not the CPU: a tensor left behind there is an error, as on a GPU."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ENV, ROOT

from roads import stage

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    torch_, out = Path(torch.__file__).parent, tmp_path_factory.mktemp("device") / "other.so"
    subprocess.run(["g++", "-shared", "-fPIC", "-O0", "-std=c++20", f"-I{torch_}/include",
                    f"-I{torch_}/include/torch/csrc/api/include", ROOT / "tests/device.cpp", "-o", out,
                    f"-L{torch_}/lib", "-ltorch_cpu", "-lc10"], check=True)
    return out


@pytest.fixture(scope="module")
def stages(library):
    def run(device: str, precision: str) -> Path:
        out = library.parent / f"{device}-{precision}"
        out.mkdir()
        done = subprocess.run([sys.executable, ROOT / "tests/device.py", library, out, "--device", device,
                               "--precision", precision], cwd=out, capture_output=True, text=True,
                              env=ENV | {"PYTHONPATH": str(ROOT / "src")})
        assert done.returncode == 0, done.stderr
        return out

    return run


def test_every_stage_runs_on_another_device_as_on_the_cpu(stages):
    cpu, other = stages("cpu", "fp32"), stages("other", "fp32")
    names = sorted(path.parent.name for path in cpu.glob("*/metrics.json"))
    assert len(names) == 25
    for name in names:
        for number, (ours, theirs) in enumerate(zip(*(numbers(stage.read_json(out / name / "metrics.json"))
                                                      for out in (cpu, other)), strict=True)):
            assert theirs == pytest.approx(ours, rel=1e-4, abs=1e-6), (name, number)
    for name in ("candidates", "online_candidates", "best", "completions"):
        drawn = [np.load(out / name / "completions.npz")["completions"] for out in (cpu, other)]
        assert np.array_equal(*drawn)


def test_every_stage_runs_there_in_bf16(stages):
    """With gradient checkpointing, as at scale paper; bf16 moves numbers, but not far."""
    found = stages("other", "bf16")
    for name in ("sft", "reward", "dpo", "local", "online"):
        loss = stage.read_json(found / name / "metrics.json")["loss"]
        assert 0 < loss["first"] < 10 and 0 < loss["last"] < 10


def numbers(metrics) -> list[float]:
    """The numbers of a file of metrics in the order of their keys; not those of DPO's first step, where all margins are
    0 but for rounding."""
    if isinstance(metrics, dict):
        return [number for key in sorted(metrics) if key != "first" for number in numbers(metrics[key])]
    return [metrics] if isinstance(metrics, int | float) else []
