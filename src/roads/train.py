"""The one training loop: AdamW, a schedule, every row exactly once an epoch, resumable to the bit.

It serves one process and several, which `accelerate launch` starts (stage.main): each takes its share of every batch.
Where the weights fit a GPU every process has all of them and gradients are summed after the last piece of a batch;
under FSDP each has its shard. Neither changes which rows a step sees, nor what it minimises.
"""

import hashlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, distributed, nn
from tqdm import tqdm

from roads import config
from roads.stage import UserError
from roads.tldr import PAD

REFERENCES = Path("runs/.reference")
SCRATCH = Path("runs/.scratch")
CHECKPOINT_EVERY = 200  # steps
KEPT = 20  # reference log-probs of so many policies and sets of pairs


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


def tokens(*parts: Tensor) -> Tensor:
    """How many tokens each row [N] has, padding left out, in arrays [N, L] of whatever widths."""
    return sum((part != PAD).sum(1) for part in parts)


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


def processes() -> tuple[int, int]:
    """This process's number, and how many train together, which model.device has joined: 0 and 1 without a launch."""
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


def sharded() -> bool:
    """Whether every process has a shard of the weights (FSDP) and not all of them."""
    return os.environ.get("ACCELERATE_USE_FSDP") == "true"


def pieces(rows: Tensor, rank: int, world: int, micro_batch: int | None, lengths: Tensor | None,
           packed: bool = False) -> tuple[Tensor, ...]:
    """What one of `world` processes takes of a batch of row indices, at most `micro_batch` of them at once.

    All processes get as many pieces, of which some may be empty, and together every row once. A batch that is cut is
    sorted by length, so that little of a piece is padding: rows 4, 7, 1, 3 of lengths 9, 2, 8, 3 go to two processes
    as 7, 1 and 3, 4. Packed rows have no padding, and their pieces get as many tokens each: short and long in turn.
    """
    share = -(-len(rows) // world)
    count = -(-share // (micro_batch or share))
    if world * count > 1 and lengths is not None:
        rows = rows[lengths[rows].argsort(stable=True)]
    rows = rows[rank::world]
    return tuple(rows[i::count] for i in range(count)) if packed else rows.tensor_split(count)


class _Objective(nn.Module):
    """A loss as a module around its model: FSDP gathers shards where a module is called."""

    def __init__(self, model: nn.Module, loss_fn: Callable):
        super().__init__()
        self.model, self.loss_fn = model, loss_fn

    def forward(self, rows: Tensor) -> tuple[Tensor, dict]:
        return self.loss_fn(rows)


def _shard(objective: _Objective) -> None:
    """Spread the weights over the processes, layer by layer (FSDP2); they are gathered when their layer runs."""
    from torch.distributed.fsdp import fully_shard

    for module in objective.model.modules():
        if type(module).__name__ in (objective.model._no_split_modules or ()):
            fully_shard(module)
    fully_shard(objective)


def fit(model: nn.Module, loss_fn: Callable[[Tensor], tuple[Tensor, dict]], n: int, cfg: config.Train, seed: int,
        key: str, label: str, shards: int = 1, weights: Tensor | None = None, lengths: Tensor | None = None,
        micro_batch: int | None = None, packed: bool = False) -> list[dict]:
    """Minimise `loss_fn(row indices) -> (mean loss, means to log)` over n rows; returns the log of every step.

    AdamW with the constants of Tables 2 to 4; gradients are clipped to norm 1. A checkpoint in runs/.scratch/<key>
    makes a killed run go on where it was and end with the same bits.

    Args:
        weights: [n], what each row counts in the mean of `loss_fn`; None: all the same.
        lengths: [n], tokens: rows of about the same length go together where a batch is cut.
        micro_batch: rows that a process takes at once; None: its whole share, halved where that does not fit.
        packed: whether `loss_fn` runs rows without padding.
    Raises:
        UserError: not one row fits the memory or, with sharded weights, not the share.
    """
    rank, world = processes()
    weights = torch.ones(n) if weights is None else weights
    model.train()
    objective = _Objective(model, loss_fn)
    if sharded():
        _shard(objective)
    where = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, eps=1e-5, weight_decay=0.01,
                                  fused=where.type == "cuda" and not sharded())
    plan = batches(n, cfg.batch_size, cfg.epochs, seed, shards)
    log, fitted = _resume(SCRATCH / key, objective, optimizer)
    micro_batch = micro_batch or fitted
    if packed:
        # Compiled layers hand over one buffer for two gradients that are equal, as those of two biases are; without
        # buffers of their own to be added to, both weights would keep it, and the next piece be counted twice.
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
    names: list[str] = []

    def run(rows: Tensor) -> Tensor:
        """Gradients of this process's share of a batch; its part of the batch's mean loss and logged values."""
        logged, of_batch = torch.zeros((), device=where), weights[rows].sum()
        for piece in pieces(rows, rank, world, micro_batch, lengths, packed):
            # With no row left it runs one that counts nothing: the others may wait for its shard.
            loss, values = objective(piece if len(piece) else rows[:1])
            share = float(weights[piece].sum() / of_batch)
            (loss * (share * world if sharded() else share)).backward()  # FSDP takes the processes' mean
            parts = [loss.detach() * share, *(value.to(where) * (len(piece) / len(rows)) for value in values.values())]
            logged, names[:] = logged + torch.stack(parts).float(), values
        return logged

    if log and rank == 0:
        print(f"{label}: goes on at step {len(log)} of {len(plan)}", file=sys.stderr)
    progress = tqdm(plan[len(log):], initial=len(log), total=len(plan), desc=label, unit="step", disable=rank > 0)
    for rows in progress:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(len(log), len(plan), cfg)
        while True:
            logged = None
            try:
                logged = run(rows)
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
            most = min(-(-len(rows) // world), micro_batch or len(rows))
            if logged is None and (most == 1 or sharded()):  # the others may be waiting for this one's shard
                raise UserError(f"{label}: {most} rows do not fit the memory of a GPU; in params.yaml set "
                                "machine.micro_batch lower or gradient_checkpointing, or spread the weights with "
                                "LAUNCH=8-gpu-fsdp; the same command goes on from the last checkpoint")
            if sharded() or not _sum(torch.tensor(float(logged is None), device=where)):
                break
            optimizer.zero_grad(set_to_none=not packed)
            clear_device_cache(garbage_collection=True)
            micro_batch = -(-most // 2)
            if rank == 0:
                tqdm.write(f"{label}: {most} rows do not fit; goes on with {micro_batch} at once", file=sys.stderr)
        loss, *values = _sum(logged).tolist()
        if not math.isfinite(loss):
            raise FloatingPointError(f"{label}: loss is {loss} at step {len(log)}; lower the learning rate")
        if not sharded():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    _sum(parameter.grad)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=not packed)
        log.append({"loss": loss, **dict(zip(names, values, strict=True))})
        progress.set_postfix(loss=f"{loss:.3f}", refresh=False)
        if len(log) % CHECKPOINT_EVERY == 0 and len(log) < len(plan):
            _checkpoint(SCRATCH / key, objective, optimizer, {"log": log, "micro_batch": micro_batch})
    model.eval()
    return log


def _sum(values: Tensor) -> Tensor:
    """The sum over the processes, in place."""
    if distributed.is_initialized():
        distributed.all_reduce(values)
    return values


def _checkpoint(folder: Path, objective: _Objective, optimizer: torch.optim.Optimizer, progress: dict) -> None:
    """Write all that a run needs to go on: a file, or a folder of the processes' shards. It is whole or not there."""
    rank, _ = processes()
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / "checkpoint.writing"
    if not sharded():
        if rank == 0:
            state = {"model": objective.model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state | progress, scratch)
            os.replace(scratch, folder / "checkpoint.pt")
        return
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict

    if rank == 0:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        torch.save(progress, scratch / "progress.pt")
    distributed.barrier()
    checkpoint.save(dict(zip(("model", "optimizer"), get_state_dict(objective, optimizer))), checkpoint_id=scratch)
    distributed.barrier()
    if rank == 0:
        before = list(folder.glob("shards-*"))
        os.replace(scratch, folder / f"shards-{len(progress['log']):08d}")
        for old in before:
            shutil.rmtree(old)


def _resume(folder: Path, objective: _Objective, optimizer: torch.optim.Optimizer) -> tuple[list[dict], int | None]:
    """Take up a checkpoint, if there is one: the log so far, and the rows that fitted at once."""
    if not sharded():
        if not (folder / "checkpoint.pt").exists():
            return [], None
        state = torch.load(folder / "checkpoint.pt", weights_only=True, map_location="cpu")
        objective.model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        return state["log"], state["micro_batch"]
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    found = max(folder.glob("shards-*"), default=None)
    if found is None:
        return [], None
    state = dict(zip(("model", "optimizer"), get_state_dict(objective, optimizer)))
    checkpoint.load(state, checkpoint_id=found)
    set_state_dict(objective, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    progress = torch.load(found / "progress.pt", weights_only=True)
    return progress["log"], progress["micro_batch"]


def save(model: nn.Module, folder: Path) -> None:
    """`model.save_pretrained(folder)` by the first process, once all of them have handed in their shards."""
    rank, _ = processes()
    if not sharded():
        if rank == 0:
            model.save_pretrained(folder)
        return
    whole, tied = {}, set()
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) in tied:  # embeddings of input and output may be one: written once
            continue
        tied.add(id(value))
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        if rank == 0:
            whole[name] = value.detach().cpu()
    if rank == 0:
        model.save_pretrained(folder, state_dict=whole)


def reference_logps(policy: nn.Module, query: Tensor, completions: Tensor, temperature: float, key: str) -> Tensor:
    """`candidates.logps` [N, n] of a stage's reference, computed once: each process takes a part of the rows.

    They are kept in runs/.reference/<key>, for other seeds, more epochs and a run that was killed: the key must follow
    from the policy's weights, the rows, the temperature, `compute` and the code.
    """
    from roads import candidates

    rank, world = processes()
    file = REFERENCES / f"{key}.npy"
    try:
        known = torch.from_numpy(np.load(file))
    except FileNotFoundError:
        known = None
    if not _sum(torch.tensor(float(known is None), device=policy.device)):  # all of them have it, or none uses it
        return known
    found = torch.zeros(completions.shape[:2], device=policy.device)
    mine = torch.arange(len(query)).tensor_split(world)[rank]
    if len(mine):
        found[mine] = candidates.in_batches(candidates.logps, policy, query[mine], completions[mine], temperature,
                                            label="reference").to(policy.device)
    found = _sum(found).cpu()
    if rank == 0:
        REFERENCES.mkdir(parents=True, exist_ok=True)
        scratch = file.with_suffix(f".{os.getpid()}.npy")
        np.save(scratch, found.numpy())
        os.replace(scratch, file)
        for old in sorted(REFERENCES.glob("*.npy"), key=_age)[KEPT:]:
            old.unlink(missing_ok=True)
    return found


def _age(file: Path) -> float:
    """Seconds since a file was written; another run may just have dropped it."""
    try:
        return time.time() - file.stat().st_mtime
    except FileNotFoundError:
        return math.inf


def forget(key: str) -> None:
    """Drop a finished run's checkpoint."""
    if processes()[0] == 0:  # whose result it is: the others may be done before it is written
        shutil.rmtree(SCRATCH / key, ignore_errors=True)


def summary(log: list[dict]) -> dict:
    """Steps, and the mean of every logged value over the first and the last tenth of them."""
    tenth = max(1, len(log) // 10)
    means = {name: {when: sum(entry[name] for entry in part) / tenth for when, part in
                    (("first", log[:tenth]), ("last", log[-tenth:]))} for name in log[0]}
    return {"steps": len(log), **means}
