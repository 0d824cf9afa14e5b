"""What would stop a run hours later, looked for before it starts: GPUs, their driver and memory, disk, judge, hub.

repro.py calls `check` for the stages that it is about to run. Every problem is one line that says what to do.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from ruamel.yaml import YAML

from roads import config, hub, schema, tracking
from roads.runner import cost
from roads.runner.devices import DEVICES, cores
from roads.runner.work import parameters
from roads.stage import LAUNCH, UserError

DRIVER = 580  # the first that CUDA 13 runs on
TRAINED_BYTES = 16  # a parameter in training: its weight, gradient and two moments, in fp32
ACTIVATIONS = 1.25  # times that, with gradient checkpointing
LISTS = re.compile(r"-m roads\.stages\.(anatomy|limits) ")  # stages that list all summaries of a world's prompt
CPUINFO = Path("/proc/cpuinfo")
MULTIPLY_BF16 = {"avx512_bf16", "amx_bf16", "bf16"}  # flags there of CPUs that do; the last is ARM's
SHARED = 4  # stages on a GPU, unless more are asked for
JUDGES = {"relevance": hub.ENCODER, "calibrated": hub.ENCODER, "sentiment": hub.LEXICON}  # what they read texts with


class Card(NamedTuple):
    """A GPU: how CUDA_VISIBLE_DEVICES calls it, its name, its memory in bytes and its driver."""
    visible: str
    name: str
    memory: float
    driver: int


def cards() -> list[Card]:
    """Every GPU that this process may use, in the order of CUDA_VISIBLE_DEVICES."""
    command = ["nvidia-smi", "--query-gpu=index,uuid,name,memory.total,driver_version",
               "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = done.stdout.splitlines() if done.returncode == 0 else []
    rows = [[word.strip() for word in line.split(",")] for line in lines]
    found = {uuid: Card(index, name, _bytes(memory), int(driver.split(".")[0]))
             for index, uuid, name, memory, driver in rows}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return list(found.values())
    chosen = []
    for wanted in map(str.strip, visible.split(",")):  # CUDA too stops at the first that is not there
        card = next((card for uuid, card in found.items()
                     if wanted == card.visible or wanted.startswith("GPU-") and uuid.startswith(wanted)
                     or wanted.startswith("MIG-")), None)  # a part of a card that this list does not name
        if card is None:
            break
        chosen.append(card._replace(visible=wanted))
    return chosen


def _bytes(mebibytes: str) -> float:
    """Of a GPU's memory; where it shares the system's, nvidia-smi says [N/A]."""
    try:
        return float(mebibytes) * 2**20
    except ValueError:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def launched() -> tuple[int, int]:
    """GPUs of this machine that a training stage takes, and over how many, of all machines, its weights are spread."""
    path = os.environ.get(LAUNCH)
    if not path:
        return 1, 1
    if not Path(path).exists():
        known = ", ".join(sorted(file.stem for file in Path(path).parent.glob("*.yaml")))
        raise UserError(f"{path}: not found; LAUNCH is one of: {known}")
    plan = YAML(typ="safe").load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(plan, dict) or not isinstance(plan.get("num_processes"), int):
        raise UserError(f"{path}: num_processes: expected how many processes train together")
    processes = plan["num_processes"]
    return processes // plan.get("num_machines", 1), processes if plan.get("distributed_type") == "FSDP" else 1


def check(commands: dict[str, str | list[str]], params: config.Params, scale: str) -> None:
    """Look at the machine for stages that will run at a scale: their names and commands.

    Raises:
        UserError: the first thing that is missing.
    """
    raw = {name: block.model_dump(exclude_none=True) for name, block in params.blocks.items()}
    _check_folders()
    _check_elsewhere(scale)
    tracking.wanted()
    works = [(scale_of(command), cost.work(command, raw)) for command in commands.values()]
    blocks = {name: params.blocks[name] for name, _ in works if name in params.blocks}
    _check_sampler(blocks)
    _check_cpu(blocks)
    _check_lists({scale_of(command) for command in commands.values() if LISTS.search(str(command))}, blocks)
    _check_gpu(blocks, *launched(), sum(work.seconds(DEVICES["cpu"]) for _, work in works if work))
    _check_disk(sum(work.size for _, work in works if work))
    for name, block in blocks.items():
        if block.judge and block.judge.kind in JUDGES:
            hub.installed(JUDGES[block.judge.kind], f"{name}: judge {block.judge.kind}")
    _check_judge([params.blocks[name] for name, work in works if work and work.judged])
    fetching = {scale_of(command) for name, command in commands.items() if name.split("@")[0] in ("base", "arm_base")}
    _check_hub([blocks[name].model for name in sorted(fetching)])


def trained_bytes(block: dict) -> float:
    """Memory of a GPU that training a block's model takes."""
    return parameters(block) * TRAINED_BYTES * ACTIVATIONS


def share(memory: float, needed: float) -> int:
    """How many stages a GPU takes by itself: a small model leaves most of a large one idle, and each is left three
    times as much again for its batches; four at most."""
    return min(SHARED, max(1, int(memory // (4 * needed))))


def stages_per_gpu(scale: schema.Scale, blocks: list[schema.Scale], jobs: int | None) -> int:
    """How many stages of these blocks share a GPU: what machine.stages_per_gpu or JOBS ask for, or else `share`.

    Raises:
        UserError: more are asked for than fit.
    """
    found = cards()
    if scale.compute.device != "gpu" or not found or os.environ.get(LAUNCH):
        return 1
    memory = min(card.memory for card in found)
    needed = max((trained_bytes(block.model_dump()) for block in blocks), default=1.0)
    fit, asked = max(1, int(memory // needed)), scale.machine.stages_per_gpu
    what = "machine.stages_per_gpu"
    if asked is None and jobs:
        asked, what = -(-jobs // max(1, len(found) // scale.machine.tensor_parallel)), f"JOBS={jobs}"
    if asked and asked > fit:
        raise UserError(f"{what}: {asked} stages on a GPU take {needed * asked / 2**30:.0f} GiB of it and the smallest "
                        f"here has {memory / 2**30:.0f}; {fit} of them fit")
    return asked or share(memory, needed)


def scale_of(command: str | list[str]) -> str:
    """The block that a stage's command names; '' for none."""
    words = (command if isinstance(command, str) else command[0]).split()
    return words[words.index("--scale") + 1] if "--scale" in words else ""


def _check_folders() -> None:
    for name in ("runs", "reports", ".dvc/cache"):
        if Path(name).exists() and not Path(name).is_dir():
            raise UserError(f"{name}: expected a folder; move that file away")
    for name in ("runs", "reports"):
        if not os.access(name if Path(name).exists() else ".", os.W_OK):
            raise UserError(f"{name}: expected a folder that may be written to")
        there = Path(name).resolve()
        if not there.is_relative_to(Path.cwd()):
            raise UserError(f"{name}: a link to {there}, and DVC keeps no results outside the checkout; clone the "
                            f"project to that disk, or mount it on {name} (mount --bind)")


def _check_elsewhere(scale: str) -> None:
    """Results that came home from a kit's run (scripts/kit.py) lack their models: nothing begins anew unasked."""
    came = Path("reports", scale, "machine.txt")
    if came.exists() and not list(Path("runs", scale, "sft").glob("*.safetensors")):
        raise UserError(f"scale {scale}: its models are on the machine that {came} names; `make report SCALE={scale}` "
                        f"and `make claims SCALE={scale}` work with what came home; delete {came} to train them here")


def _check_sampler(blocks: dict[str, schema.Scale]) -> None:
    for name, block in blocks.items():
        if block.compute.sampler == "vllm" and importlib.util.find_spec("vllm") is None:
            raise UserError(f"{name}: compute.sampler: vllm, and the package vllm is not there; run the image, which "
                            "has it, or set tree")


def _check_cpu(blocks: dict[str, schema.Scale]) -> None:
    """Say so where bf16 gains nothing."""
    asked = [name for name, block in blocks.items()
             if (block.compute.device, block.compute.precision) == ("cpu", "bf16")]
    if asked and CPUINFO.exists() and not MULTIPLY_BF16 & set(CPUINFO.read_text(encoding="utf-8").split()):
        print(f"{asked[0]}: compute.precision: bf16, and this CPU does not multiply it (no AVX-512 BF16, no AMX): "
              "nothing is gained over fp32 here", file=sys.stderr)


def _check_lists(names: set[str], blocks: dict[str, schema.Scale]) -> None:
    """What lists every summary of every test prompt has to hold them."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for name in sorted(names & set(blocks)):
        source, n = blocks[name].source, blocks[name].data.test
        size = 8 * n * (source.slots + 1) * source.candidates**source.slots
        if size > memory:
            raise UserError(f"{name}.source: {source.candidates}^{source.slots} summaries of {n} prompts cannot be "
                            f"listed in {memory / 2**30:.0f} GiB; lower slots or candidates, or leave out the figures "
                            "anatomy and rouge_limits")


def _check_gpu(blocks: dict[str, schema.Scale], processes: int, shards: int, core_seconds: float) -> None:
    wanting = {name: block for name, block in blocks.items() if block.compute.device == "gpu"}
    if not wanting:
        return
    name, found = next(iter(wanting)), cards()
    if not found:
        slowly = ""
        if wanting[name].compute.sampler == "tree":
            slowly = (f"; with compute: {{device: cpu, precision: fp32, …}} these stages would take about "
                      f"{core_seconds / cores() / 3600:,.0f} hours on {cores()} cores")
        raise UserError(f"scale {name} needs an NVIDIA GPU and nvidia-smi shows none; run the image with `--gpus all`, "
                        f"or take SCALE=mini, which needs none{slowly}")
    driver = min(card.driver for card in found)
    if driver < DRIVER:
        raise UserError(f"NVIDIA driver {driver}: CUDA 13 needs {DRIVER} or newer; update the driver of the host")
    if processes > len(found):
        raise UserError(f"LAUNCH asks for {processes} GPUs and there are {len(found)}; take another file of "
                        "configs/accelerate")
    for name, block in wanting.items():
        if block.machine.tensor_parallel > len(found):
            raise UserError(f"{name}: machine.tensor_parallel: {block.machine.tensor_parallel}, and there are "
                            f"{len(found)} GPUs; lower it")
        memory = min(card.memory for card in found)
        weights = parameters(block.model_dump())
        needed = trained_bytes(block.model_dump()) / shards
        if needed > memory:
            raise UserError(f"{name}: training {weights / 1e9:.1f}e9 parameters takes {needed / 2**30:.0f} GiB of "
                            f"a GPU and the smallest here has {memory / 2**30:.0f}; spread them with "
                            "LAUNCH=8-gpu-fsdp, or take a larger GPU")


def _check_disk(size: float) -> None:
    """Room for what stages write, in runs/ and, where DVC copies it, once more in its cache."""
    wanted = defaultdict(float)  # a folder on each disk -> bytes
    disks = {}
    for folder in ("runs", *[".dvc/cache"] * (not _links())):
        place = folder if Path(folder).exists() else "."
        wanted[disks.setdefault(os.stat(place).st_dev, place)] += size
    for place, needed in wanted.items():
        free = shutil.disk_usage(place).free
        if needed > free:
            raise UserError(f"these stages write about {amount(needed)}, DVC's cache included, and {amount(free)} are "
                            "free; make room, or put runs/ and .dvc/cache on a larger disk")


def _links() -> bool:
    """Whether outputs take no room of their own in DVC's cache: `cache.type` of .dvc/config.local names links (scale
    real), or the file system shares blocks, which DVC tries first."""
    from dvc_objects.fs import system

    local = Path(".dvc/config.local")
    if local.exists() and "link" in local.read_text(encoding="utf-8"):
        return True
    with tempfile.TemporaryDirectory(dir=".") as scratch:
        file = Path(scratch, "block")
        file.write_bytes(b"x" * 4096)
        try:
            system.reflink(str(file), str(file.with_name("shared")))
        except OSError:
            return False
        return True


def amount(size: float) -> str:
    """Bytes in words.

    >>> [amount(size) for size in (800, 2.46e6, 123e6, 6e9)]
    ['0.8 kB', '2.5 MB', '123 MB', '6 GB']
    """
    power = next(p for p in (3, 2, 1) if size >= 1000**p or p == 1)
    return f"{round(size / 1000**power, 0 if size >= 10 * 1000**power else 1):g} {' kMG'[power]}B"


def _check_judge(blocks: list[schema.Scale]) -> None:
    for block in {block.judge.model: block for block in blocks}.values():
        from roads.judge import endpoint

        endpoint.reachable(block.judge)


def _check_hub(models: list) -> None:
    for model in models:
        if model.kind == "packaged" or model.kind == "pretrained" and not Path(model.name).is_dir():
            hub.reachable(model)
