"""How fast devices are: assumed, fitted on this machine (benchmarks/scale.py), or measured (`make check-gpu`)."""

import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
FITTED = BENCHMARKS / "scale.json"  # of one core, on whatever machine ran it last
MEASURED = BENCHMARKS / "gpu"  # a file per card


@dataclass(frozen=True)
class Device:
    flops: float  # FLOP/s of training and forward passes: peak x utilisation
    decode: float  # sampled tokens/s with 1e9 parameters, all completions together; in inverse proportion to them
    step: float  # seconds on top of that for every optimiser step
    layer: float  # seconds on top for every layer that a batch goes through: a sampled token is a pass through all
    startup: float  # seconds: Python, DVC, torch, the model
    startup_light: float = 3.0  # the same without torch
    memory: float = 80e9  # bytes, of a GPU
    source: str = "assumed"


# GPUs that nobody has measured: NVIDIA's dense bf16 peak x 40%, usual for fine-tuning. Decoding on an H100: a third of
# what vLLM is reported to reach with 8B parameters (12,500 tokens/s), as completions are short; an A100 at half that,
# an H200 by its memory bandwidth. START: what stages of scale real took on an H200 beside their work, when each was a
# process of its own (docs/log.md); since then most stages find one that has begun.
START = 20
ASSUMED = {
    "cpu": Device(flops=60e9, decode=18, step=0.003, layer=0.0005, startup=5, startup_light=4),
    # A core of an AMD EPYC that multiplies bf16, and a model of a hundred million parameters: stages of real-short.
    "cpu-bf16": Device(flops=270e9, decode=38, step=0.08, layer=0, startup=15, startup_light=10),
    "A100": Device(flops=312e12 * 0.4, decode=16_000, step=0, layer=0, startup=START),
    "H100": Device(flops=989e12 * 0.4, decode=33_000, step=0, layer=0, startup=START),
    "H200": Device(flops=989e12 * 0.4, decode=46_000, step=0, layer=0, startup=START, memory=141e9),
}


def cpu_for(precision: str) -> str:
    """Which of the devices a CPU is that computes with a precision."""
    return "cpu-bf16" if precision == "bf16" else "cpu"


def cores() -> int:
    """How many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def known() -> dict[str, Device]:
    """Every device by its name: a card that was measured by its full one, and by its short one in place of what was
    assumed of its kind."""
    found = dict(ASSUMED)
    if FITTED.exists():
        found["cpu"] = replace(found["cpu"], **json.loads(FITTED.read_text(encoding="utf-8"))["fit"])
    for file in sorted(MEASURED.glob("*.json")):
        card = json.loads(file.read_text(encoding="utf-8"))
        measured = Device(**card["device"], source=f"measured, {file.name}")
        short = next((name for name in ASSUMED if name in card["card"]), card["card"])
        found |= {short: measured, card["card"]: measured}
    return found


def file_of(card: str) -> Path:
    """Where what was measured of a card is kept.

    >>> file_of("NVIDIA H100 80GB HBM3").name
    'nvidia-h100-80gb-hbm3.json'
    """
    return MEASURED / f"{re.sub('[^a-z0-9]+', '-', card.lower()).strip('-')}.json"


DEVICES = known()
