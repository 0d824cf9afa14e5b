"""vLLM as the sampler: compute.sampler: vllm. Token ids go in and come out; no tokenizer is loaded.

A process takes the GPUs it sees: one, or as many as machine.tensor_parallel spreads a model over. To use more, run more
stages at once, each with a GPU of its own in CUDA_VISIBLE_DEVICES.
"""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from roads import config, stage
from roads.stage import UserError
from roads.tldr import EOS, PAD

ROWS = 2**14  # completions sampled at once
SEEDS = 10_000_019  # of completions, for one seed of a run; on the CPU torch tells 2**32 apart
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
# vLLM reads these: one line if something goes wrong and no more, nothing reported to its makers; on the CPU room for
# 4 GiB of keys and values, and the threads of OMP_NUM_THREADS wherever the system puts them.
ENVIRONMENT = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "4",
               "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def check(compute: config.Compute, policy: Path | None = None) -> None:
    """Whether vLLM is there and runs on this device, and, given a folder, that policy.

    Raises:
        UserError: what is missing and what to set instead.
    """
    if importlib.util.find_spec("vllm") is None:
        raise UserError("compute.sampler: vllm needs the package vllm, which the image has; run there, or set hf")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from vllm.platforms import current_platform

    found = "cpu" if current_platform.is_cpu() else "gpu" if current_platform.is_cuda_alike() else "no device"
    if found != compute.device:
        raise UserError(f"compute.sampler: vllm finds {found} here and compute.device is {compute.device}; vLLM needs"
                        " a GPU, or on the CPU its build vllm-cpu (requirements/vllm-cpu.txt); or set hf")
    if policy is not None:
        shape = stage.read_json(Path(policy) / "config.json")
        head = shape.get("head_dim") or shape["hidden_size"] // shape["num_attention_heads"]
        if head < 32:
            raise UserError(f"{policy}: attention heads are {head} wide and vLLM takes 32 or more; set compute.sampler:"
                            " hf, or fewer model.heads")


@contextmanager
def engine(policy: Path, width: int, cfg: config.Scale) -> Iterator:
    """vLLM with the policy in a folder, for prompts and completions of `width` tokens together.

    It runs in a process of its own, which ends with the block and gives back the GPU's memory.
    """
    check(cfg.compute, policy)
    from vllm import LLM

    llm = LLM(str(policy), skip_tokenizer_init=True, dtype=DTYPES[cfg.compute.precision], max_model_len=width,
              tensor_parallel_size=cfg.machine.tensor_parallel, enable_prefix_caching=True,
              enforce_eager=cfg.compute.device == "cpu")
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown(timeout=30)


def generate(llm, query: torch.Tensor, n: int, length: int, temperature: float, seed: int) -> torch.Tensor:
    """n completions per query [B, Q], [B, n, length] int32: `sample.generate` by vLLM, other draws.

    Completion k of query i is drawn with the seed `seed + i * n + k`, so that it depends on no other; on a GPU its
    rounding may, as it does on which rows run together.
    """
    from vllm import SamplingParams

    settings = [SamplingParams(
        n=n, seed=seed + i * n,  # vLLM adds k
        temperature=max(temperature, 0.01),  # the least that it takes without becoming greedy
        max_tokens=length - 1, stop_token_ids=[EOS], ignore_eos=True, logit_bias={PAD: -torch.inf}, detokenize=False,
    ) for i in range(len(query))]
    prompts = [{"prompt_token_ids": row[row != PAD].tolist()} for row in query]
    tokens = torch.full((len(query), n, length), PAD, dtype=torch.int)
    for i, done in enumerate(llm.generate(prompts, settings, use_tqdm=False)):
        for k, completion in enumerate(done.outputs):
            ids = list(completion.token_ids)
            if ids[-1] != EOS:
                ids.append(EOS)
            tokens[i, k, : len(ids)] = torch.tensor(ids, dtype=torch.int)
    return tokens
