"""The one training loop: AdamW, a schedule, every row exactly once an epoch, resumable to the bit.

It serves one process and several, which `accelerate launch` starts (stage.main): each takes its share of every batch.
Where the weights fit a GPU every process has all of them and gradients are summed after the last micro-batch; under
FSDP each has its shard (distributed.py). Neither changes which rows a step sees, nor what it minimises.
"""

import csv
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn
from tqdm import tqdm

from roads import model, schema, stage, tracking
from roads.distributed import (
    delete_checkpoint,
    load_checkpoint,
    rank_and_world_size,
    save,
    save_checkpoint,
    shard,
    sharded,
    sum_over,
)
from roads.stage import UserError
from roads.tldr import PAD

CHECKPOINT_EVERY = 200  # steps


def batches(n: int, batch_size: int, epochs: int, seed: int, shards: int = 1) -> list[Tensor]:
    """Row indices of every step; each epoch is one permutation, so a row appears exactly once in it.

    With shards > 1, as the authors' code on that many GPUs: every one of them shuffles for itself and takes its share,
    so that an epoch has 1 - (1 - 1/shards)^shards of the rows, 66% for 8, some of them several times.

    Raises:
        UserError: fewer rows than shards.
    """
    if n < shards:
        raise UserError(f"shards: {shards}, and there are {n} pairs; lower it in params.yaml, or take more pairs")
    generator = torch.Generator().manual_seed(seed)

    def epoch() -> Tensor:
        shares = [torch.randperm(n, generator=generator)[rank::shards] for rank in range(shards)]
        return torch.stack([share[: n // shards] for share in shares], dim=1).flatten()

    return [batch for _ in range(epochs) for batch in epoch().split(batch_size)]


def tokens(*parts: Tensor) -> Tensor:
    """How many tokens each row [N] has, padding left out, in arrays [N, L] of whatever widths."""
    return sum((part != PAD).sum(1) for part in parts)


@dataclass
class Job:
    """What a training stage minimises: its model, a loss, and the rows it is over."""

    net: nn.Module
    loss: Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]  # row indices -> mean loss, means to log
    lengths: Tensor  # [n], tokens of every row: those of about the same length go together where a batch is cut
    weights: Tensor | None = None  # [n], what each row counts in the mean; None: all the same
    shards: int = 1  # `batches`
    pack: bool = True  # whether the loss takes rows packed, on a GPU: those of model.py do
    also: dict | None = None  # for metrics.json
    start: bool = False  # whether another training begins at what this one leaves


def learning_rate(step: int, steps: int, cfg: schema.Train) -> float:
    """Linear or cosine decay from cfg.lr to 0, no warm-up."""
    left = 1 - step / steps
    return cfg.lr * (left if cfg.schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left)))


def micro_batches(rows: Tensor, rank: int, world: int, micro_batch: int | None, lengths: Tensor, *,
                  packed: bool = False) -> tuple[Tensor, ...]:
    """What one of `world` processes takes of a batch of row indices, at most `micro_batch` of them at once.

    All processes get as many micro-batches, of which some may be empty, and together every row once. A batch that is
    cut is sorted by length, so that little of a micro-batch is padding: rows 4, 7, 1, 3 of lengths 9, 2, 8, 3 go to two
    processes as 7, 1 and 3, 4. Packed rows have no padding, and their micro-batches get as many tokens each: short and
    long in turn.
    """
    share = -(-len(rows) // world)
    count = -(-share // (micro_batch or share))
    if world * count > 1:
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


@dataclass
class _Gradients:
    """Gradients of a batch's mean loss, over micro-batches and processes."""

    objective: _Objective
    weights: Tensor
    lengths: Tensor
    micro_batch: int | None  # rows that a process takes at once; halved where they do not fit
    packed: bool
    label: str

    def accumulate(self, rows: Tensor) -> dict[str, float]:
        """Add them up in the parameters; the batch's mean loss and logged values.

        Raises:
            UserError: not one row fits the memory or, with sharded weights, not the share.
        """
        rank, world = rank_and_world_size()
        while True:
            means = self._try(rows, rank, world)
            most = min(-(-len(rows) // world), self.micro_batch or len(rows))
            if means is None and (most == 1 or sharded()):  # the others may be waiting for this one's shard
                raise UserError(f"{self.label}: {most} rows do not fit the memory of a GPU; in params.yaml set "
                                "machine.micro_batch lower or gradient_checkpointing, or spread the weights with "
                                "LAUNCH=8-gpu-fsdp; the same command continues from the last checkpoint")
            if sharded() or not sum_over(torch.tensor(float(means is None), device=self._where)):
                break
            self.zero()
            clear_device_cache(garbage_collection=True)
            self.micro_batch = -(-most // 2)
            if rank == 0:
                tqdm.write(f"{self.label}: {most} rows do not fit; retrying with {self.micro_batch} at once",
                           file=sys.stderr)
        if not sharded():
            for parameter in self.objective.model.parameters():
                if parameter.grad is not None:
                    sum_over(parameter.grad)
        return dict(zip(means, sum_over(torch.stack(list(means.values()))).tolist(), strict=True))

    def _try(self, rows: Tensor, rank: int, world: int) -> dict[str, Tensor] | None:
        """This process's part of the means, or None where its memory did not do."""
        try:
            return self._run(rows, rank, world)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            return None

    def _run(self, rows: Tensor, rank: int, world: int) -> dict[str, Tensor]:
        means, of_batch = {}, self.weights[rows].sum()
        for part in micro_batches(rows, rank, world, self.micro_batch, self.lengths, packed=self.packed):
            # With no row left it runs one that counts nothing: the others may wait for its shard.
            loss, values = self.objective(part if len(part) else rows[:1])
            share = float(self.weights[part].sum() / of_batch)
            (loss * (share * world if sharded() else share)).backward()  # FSDP takes the processes' mean
            values = {name: value.detach().to(self._where) * (len(part) / len(rows)) for name, value in values.items()}
            for name, value in {"loss": loss.detach() * share, **values}.items():
                means[name] = means.get(name, 0) + value.float()
        return means

    @property
    def _where(self) -> torch.device:
        return next(self.objective.model.parameters()).device

    def zero(self) -> None:
        """Set gradients to zero, for packed rows in buffers that stay. Compiled layers may return one buffer for two
        equal gradients, as those of two biases: if both weights took it, the next micro-batch would count twice."""
        for parameter in self.objective.model.parameters():
            if not self.packed:
                parameter.grad = None
            elif parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            else:
                parameter.grad.zero_()


def fit(job: Job, recipe: schema.Train, *, seed: int, key: str, label: str,
        micro_batch: int | None = None) -> list[dict[str, float]]:
    """Minimise a job's loss over its n rows; returns the log of every step: learning rate, loss, gradient norm before
    clipping, and what the loss has logged.

    AdamW with eps 1e-5 (Tables 2 and 3) and weight decay .01 (the authors' code). A checkpoint in runs/.scratch/<key>
    makes a killed run continue where it was and end with the same bits.

    Args:
        micro_batch: rows that a process takes at once; None: its whole share, halved where that does not fit.
    Raises:
        UserError: not one row fits the memory or, with sharded weights, not the share.
        UserError: a loss that is no number.
    """
    net, n = job.net, len(job.lengths)
    rank, _ = rank_and_world_size()
    net.train()
    objective = _Objective(net, job.loss)
    if sharded():
        shard(objective, net)
    on_gpu = next(net.parameters()).device.type == "cuda"
    optimizer = torch.optim.AdamW(net.parameters(), lr=recipe.lr, eps=1e-5, weight_decay=0.01,
                                  fused=on_gpu and not sharded())
    plan = batches(n, recipe.batch_size, recipe.epochs, seed, job.shards)
    progress = load_checkpoint(key, objective, optimizer)
    log = progress["log"]
    gradients = _Gradients(objective, torch.ones(n) if job.weights is None else job.weights, job.lengths,
                           micro_batch or progress["micro_batch"], model.is_packed(net), label)
    gradients.zero()
    if log and rank == 0:
        print(f"{label}: resuming at step {len(log)} of {len(plan)}", file=sys.stderr)
    bar = tqdm(plan[len(log):], initial=len(log), total=len(plan), desc=label, unit="step", disable=rank > 0)
    watch = tracking.Watch(label, key, recipe.model_dump(), len(plan), job.lengths, quiet=rank > 0)
    for rows in bar:
        lr = learning_rate(len(log), len(plan), recipe)
        set_learning_rate(optimizer, lr)
        means = gradients.accumulate(rows)
        check_finite("the loss", means["loss"], label, len(log))
        norm = clip(net, recipe.clip or math.inf)
        check_finite("the gradient", norm, label, len(log))
        optimizer.step()
        gradients.zero()
        log.append({"lr": lr, "loss": means.pop("loss"), "grad_norm": norm, **means})
        bar.set_postfix(loss=f"{log[-1]['loss']:.3f}", refresh=False)
        watch.note(len(log), rows, log[-1])
        if len(log) % CHECKPOINT_EVERY == 0 and len(log) < len(plan):
            save_checkpoint(key, objective, optimizer, {"log": log, "micro_batch": gradients.micro_batch})
    watch.close()
    net.eval()
    return log


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def check_finite(what: str, value: float, label: str, step: int) -> None:
    if not math.isfinite(value):
        raise UserError(f"{label}: {what} is {value} at step {step}; lower the learning rate in params.yaml")


def clip(net: nn.Module, norm: float) -> float:
    """Scale the gradients down to a norm, all of them together; the norm that they had."""
    found = nn.utils.clip_grad_norm_(net.parameters(), norm)
    return float(found.full_tensor() if hasattr(found, "full_tensor") else found)


def run(out: Path, make: Callable[[], Job], recipe: schema.Train, cfg: schema.Scale, *, used: dict, reads: list[Path],
        seed: int, name: str, read: str | None = None) -> None:
    """What every training stage does: fit the model that `make` makes, and write it with its tokenizer, metrics.json
    and curves.csv, a line a step.

    Args:
        used: the parameters that the result follows from, beside `compute`. reads: the folders; the tokenizer is that
            of the last one.
        name: of the progress bar. read: the fingerprint of `reads`, where it is known.
    """
    torch.set_num_threads(cfg.machine.threads)
    used = schema.used(cfg, "compute") | used
    # With the place: arms that run side by side may repeat a training, and each has a checkpoint of its own.
    key = stage.fingerprint(used, [], read or stage.fingerprint({}, reads), name, out.as_posix(), stage.code())
    with stage.output(out, used, reads) as folder:
        job = make()
        model.for_training(job.net, cfg, pack=job.pack)
        log = fit(job, recipe, seed=seed, key=key, label=f"{name} s{seed}", micro_batch=cfg.machine.micro_batch)
        # Rounded to bf16, a start would lose every step of the next training that is less than half of bf16's.
        save(job.net, folder, "fp32" if job.start else cfg.compute.precision)
        model.copy_tokenizer(reads[-1], folder)
        write_curves(folder / "curves.csv", log)
        stage.write_json(folder / "metrics.json", summary(log) | {"rows": len(job.lengths)} | (job.also or {}))
    delete_checkpoint(key)


def write_curves(path: Path, log: list[dict[str, float]]) -> None:
    """A line for every step, as exact as floats are: the same run gives the same bytes."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["step", *log[0]])
        writer.writerows([step, *map(repr, entry.values())] for step, entry in enumerate(log, 1))


def summary(log: list[dict[str, float]]) -> dict:
    """Steps taken, and the mean of every logged value over the first and the last tenth of them."""
    tenth = max(1, len(log) // 10)
    means = {name: {when: sum(entry[name] for entry in part) / tenth for when, part in
                    (("first", log[:tenth]), ("last", log[-tenth:]))} for name in log[0] if name != "lr"}
    return {"steps": len(log), **means}
