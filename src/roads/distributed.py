"""Several processes that train together, and what they leave on disk: checkpoints and the finished model."""

import os
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn
from torch import distributed as dist

from roads import stage


def rank_and_world_size() -> tuple[int, int]:
    """This process's number, and how many train together, which model.device has joined: 0 and 1 without a launch."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def sharded() -> bool:
    """Whether every process has a shard of the weights (FSDP) and not all of them."""
    return os.environ.get("ACCELERATE_USE_FSDP") == "true"


def sum_over(values: Tensor) -> Tensor:
    """The sum over the processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def shard(objective: nn.Module, model: nn.Module) -> None:
    """Spread the weights over the processes, layer by layer (FSDP2); they are gathered when their layer runs."""
    from torch.distributed.fsdp import fully_shard

    for module in model.modules():
        if type(module).__name__ in list(getattr(model, "_no_split_modules", None) or ()):
            fully_shard(module)
    fully_shard(objective)


def save_checkpoint(key: str, objective: nn.Module, optimizer: torch.optim.Optimizer, progress: dict) -> None:
    """Write all that a run needs to go on: a file, or a folder of the processes' shards. It is whole or not there.

    Args:
        objective: it has the model as `objective.model`.
        progress: "log", an entry for each step so far, and whatever else the loop needs.
    """
    rank, _ = rank_and_world_size()
    folder = stage.SCRATCH / key
    folder.mkdir(parents=True, exist_ok=True)
    if not sharded():
        if rank == 0:
            state = {"model": objective.model.state_dict(), "optimizer": optimizer.state_dict()}
            with stage.writing(folder / "checkpoint.pt") as file:
                torch.save(state | progress, file)
        return
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict

    scratch = folder / "checkpoint.writing"
    if rank == 0:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        torch.save(progress, scratch / "progress.pt")
    dist.barrier()
    checkpoint.save(dict(zip(("model", "optimizer"), get_state_dict(objective, optimizer))), checkpoint_id=scratch)
    dist.barrier()
    if rank == 0:
        before = list(folder.glob("shards-*"))
        os.replace(scratch, folder / f"shards-{len(progress['log']):08d}")
        for old in before:
            shutil.rmtree(old)


def load_checkpoint(key: str, objective: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """Take up a checkpoint, if there is one: its progress, or an empty one."""
    folder, empty = stage.SCRATCH / key, {"log": [], "micro_batch": None}
    if not sharded():
        if not (folder / "checkpoint.pt").exists():
            return empty
        state = torch.load(folder / "checkpoint.pt", weights_only=True, map_location="cpu")
        objective.model.load_state_dict(state.pop("model"))
        optimizer.load_state_dict(state.pop("optimizer"))
        return state
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    found = max(folder.glob("shards-*"), default=None)
    if found is None:
        return empty
    state = dict(zip(("model", "optimizer"), get_state_dict(objective, optimizer)))
    checkpoint.load(state, checkpoint_id=found)
    set_state_dict(objective, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return torch.load(found / "progress.pt", weights_only=True)


def delete_checkpoint(key: str) -> None:
    """Drop a finished run's checkpoint."""
    if rank_and_world_size()[0] == 0:  # whose result it is: the others may be done before it is written
        shutil.rmtree(stage.SCRATCH / key, ignore_errors=True)


def save(model: nn.Module, folder: Path, precision: str = "fp32") -> None:
    """`model.save_pretrained(folder)` by the first process, once all of them have handed in their shards.

    Matrices saved in bf16 take half the space, and whatever draws or scores with them in bf16 rounds them to that first
    (model.py). A reward model's head stays fp32, and so do norms and biases.
    """
    rank, _ = rank_and_world_size()
    if not sharded() and precision == "fp32":
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
            rounded = precision == "bf16" and value.dim() > 1 and not name.startswith("head.")
            whole[name] = value.detach().cpu().to(torch.bfloat16 if rounded else value.dtype)
    if rank == 0:
        model.save_pretrained(folder, state_dict=whole)
