"""The one training loop: AdamW, a schedule, every row exactly once an epoch, resumable to the bit."""

import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from roads import config

SCRATCH = Path("runs/.scratch")
CHECKPOINT_EVERY = 200  # steps


def batches(n: int, batch_size: int, epochs: int, seed: int, shards: int = 1) -> list[Tensor]:
    """Row indices of every step; each epoch is one permutation, so a row appears exactly once in it.

    With shards > 1, as the authors' code on that many GPUs: every one of them shuffles for itself and takes its share,
    so that an epoch has 1 - (1 - 1/shards)^shards of the rows, 66% for 8, some of them several times.
    """
    generator = torch.Generator().manual_seed(seed)

    def epoch() -> Tensor:
        shares = [torch.randperm(n, generator=generator)[rank::shards] for rank in range(shards)]
        return torch.stack([share[: n // shards] for share in shares], dim=1).flatten()

    return [batch for _ in range(epochs) for batch in epoch().split(batch_size)]


def load_pairs(pairs: Path) -> tuple[Tensor, Tensor, Tensor]:
    """query [N, Q], chosen [N, R] and rejected [N, R] of a folder of pairs."""
    rows = np.load(pairs / "pairs.npz")
    return tuple(torch.from_numpy(rows[name]) for name in ("query", "chosen", "rejected"))


def learning_rate(step: int, steps: int, cfg: config.Train) -> float:
    """Linear or cosine decay from cfg.lr to 0, no warm-up."""
    left = 1 - step / steps
    return cfg.lr * (left if cfg.schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left)))


def key_of(config_: dict, inputs: list[Path], *more) -> str:
    """Hash of a stage's configuration and of the bytes it reads: the name of its scratch folder."""
    digest = hashlib.sha256(json.dumps([config_, *map(str, more)], sort_keys=True).encode())
    for path in inputs:
        for file in sorted(Path(path).rglob("*")) if Path(path).is_dir() else [Path(path)]:
            if file.is_file() and file.suffix in (".npz", ".safetensors"):
                digest.update(hashlib.file_digest(file.open("rb"), "sha256").digest())
    return digest.hexdigest()[:20]


def fit(model: nn.Module, loss_fn: Callable[[Tensor], tuple[Tensor, dict]], n: int, cfg: config.Train, seed: int,
        key: str, label: str, shards: int = 1) -> list[dict]:
    """Minimise `loss_fn(row indices) -> (mean loss, values to log)` over n rows; returns the log of every step.

    AdamW with the constants of Tables 2 to 4; gradients are clipped to norm 1. A checkpoint in runs/.scratch/<key>
    makes a killed run go on where it was and end with the same bits.
    """
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, eps=1e-5, weight_decay=0.01)
    plan = batches(n, cfg.batch_size, cfg.epochs, seed, shards)
    checkpoint = SCRATCH / key / "checkpoint.pt"
    log: list[dict] = []
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        log = state["log"]
        print(f"{label}: goes on at step {len(log)} of {len(plan)}", file=sys.stderr)
    progress = tqdm(plan[len(log):], initial=len(log), total=len(plan), desc=label, unit="step")
    for rows in progress:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(len(log), len(plan), cfg)
        loss, values = loss_fn(rows)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"{label}: loss is {loss.item()} at step {len(log)}; lower the learning rate")
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        log.append({"loss": loss.item(), **values})
        progress.set_postfix(loss=f"{log[-1]['loss']:.3f}", refresh=False)
        if len(log) % CHECKPOINT_EVERY == 0 and len(log) < len(plan):
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            scratch = checkpoint.with_suffix(".writing")
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "log": log}, scratch)
            os.replace(scratch, checkpoint)
    model.eval()
    return log


def forget(key: str) -> None:
    """Drop a finished run's checkpoint."""
    shutil.rmtree(SCRATCH / key, ignore_errors=True)


def summary(log: list[dict]) -> dict:
    """Steps, and the mean of every logged value over the first and the last tenth of them."""
    tenth = max(1, len(log) // 10)
    means = {name: {when: sum(entry[name] for entry in part) / tenth for when, part in
                    (("first", log[:tenth]), ("last", log[-tenth:]))} for name in log[0]}
    return {"steps": len(log), **means}
