"""The sampler: completions of prompts by a policy, drawn by the model's own distribution, equal prefixes once."""

import hashlib
import os
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from roads import config, generate_vllm, model
from roads.tldr import EOS, PAD

ROWS = 1600  # completions of a batch: what is drawn from one generator, and kept at once
MEMORY = 2**26  # bytes of a CPU's that completions grow in together; a GPU has a sixteenth of its own
SCRATCH = Path("runs/.scratch")


@torch.inference_mode()
def complete(policy, query: torch.Tensor, n: int, length: int, temperature: float, generator) -> torch.Tensor:
    """n completions per query, [B, n, length] int32.

    As many prompts run together as `MEMORY` holds, those about as long: keys and values are copied at every step, and
    on a CPU hundreds of MB of them take longer than the model does. What a completion draws does not depend on it.
    """
    # From 0 to 1, for every token that might be drawn: what a completion gets must not depend on where others end.
    draws = torch.rand(length, len(query), n, dtype=torch.double, generator=generator)
    found = torch.empty(len(query), n, length, dtype=torch.int32)
    lengths = (query != PAD).sum(1)
    order = lengths.argsort(descending=True, stable=True)
    while len(order):
        i = order[: batch_size_for(policy.config, int(lengths[order[0]]) + length, n, policy.device)]
        order = order[len(i) :]
        found[i] = _grow(policy, query[i], draws[:, i].flatten(1), temperature).view(len(i), n, length)
    return found


def batch_size_for(shape, width: int, n: int, device: torch.device) -> int:
    """How many prompts with n completions each, `width` tokens together, run at once."""
    memory = torch.cuda.get_device_properties(device).total_memory // 16 if device.type == "cuda" else MEMORY
    # Keys and values of every token in fp32; of the last one logits, probabilities and their sums, twice.
    row = 8 * shape.num_hidden_layers * shape.hidden_size * width + 24 * shape.vocab_size
    return max(1, memory // (row * n))


def _grow(policy, query: torch.Tensor, draws: torch.Tensor, temperature: float) -> torch.Tensor:
    """Completions [B * n, R] int32 of queries [B, Q], by draws [R, B * n] between 0 and 1.

    The prompt is run once and its cache serves its n completions, and so is every prefix that some of them share.
    A completion without an EOS after R - 1 tokens is closed with one: the reward model reads there, and DPO learns to
    stop.
    """
    where, (length, count) = policy.device, draws.shape
    query, draws = model.trim(query, query)[0].to(where), draws.to(where)
    hidden, cache = model.prefill(policy.base_model, query)
    mask = (query != PAD).long()
    start = mask.sum(1, keepdim=True)
    tokens = torch.full((count, length), PAD, device=where)
    rows = torch.arange(count, device=where)  # completions that go on, and the prefix each of them is at
    prefix = torch.arange(len(query), device=where).repeat_interleave(count // len(query))
    for step in range(length):
        logits = policy.get_output_embeddings()(hidden).float() / temperature
        logits[:, PAD] = -torch.inf
        below = torch.softmax(logits, dim=-1).double().cumsum(1)[prefix]  # the distribution function, to be inverted
        token = torch.searchsorted(below, draws[step, rows, None] * below[:, -1:], right=True).squeeze(1)
        if step == length - 1:
            token = torch.full_like(rows, EOS)
        tokens[rows, step] = token
        going = token != EOS
        if not going.any():
            break
        # Finished rows leave; those that agree so far go on as one.
        width = logits.shape[1]
        grown, prefix = torch.unique(prefix[going] * width + token[going], return_inverse=True)
        rows, parent = rows[going], grown // width
        if len(parent) != len(mask) or (parent[1:] == parent[:-1]).any():
            cache.batch_select_indices(parent)
            mask, start = mask[parent], start[parent]
        mask = torch.cat([mask, mask.new_ones(len(parent), 1)], 1)
        hidden = policy.base_model((grown % width)[:, None], attention_mask=mask, position_ids=start + step,
                                   past_key_values=cache).last_hidden_state[:, -1]
    return tokens.int().cpu()


def completions(policy: Path, query: torch.Tensor, length: int, settings: config.Sampling, seed: int,
                cfg: config.Scale) -> torch.Tensor:
    """Completions [N, n, length] of every query [N, Q] by the policy in a folder, with the sampler of cfg.compute.

    A prompt's are the same whatever is sampled before or after. Batches that are done wait in runs/.scratch for the
    last one: a killed run goes on where it was.
    """
    vllm = cfg.compute.sampler == "vllm"
    batches = torch.arange(len(query)).split(max(1, (generate_vllm.ROWS if vllm else ROWS) // settings.n))
    key = _key(policy, query, length, settings.n, settings.temperature, seed, cfg.compute.model_dump(), len(batches))
    files = [SCRATCH / f"sample-{key}-{number}.npy" for number in range(len(batches))]
    sampled = [_load(file) for file in files]
    if done := sum(part is not None for part in sampled):
        print(f"sample s{seed}: goes on, {done} of {len(files)} batches are done", file=sys.stderr)
    with (generate_vllm.engine(policy, query.shape[1] + length, cfg) if vllm else
          nullcontext(model.load_policy(policy, cfg.compute).eval())) as net:
        for number, i in enumerate(tqdm(batches, desc=f"sample s{seed}", unit="batch")):
            if sampled[number] is not None:
                continue
            args = net, query[i], settings.n, length, settings.temperature
            if vllm:
                sampled[number] = generate_vllm.complete(*args, seed * generate_vllm.SEEDS + int(i[0]) * settings.n)
            else:
                sampled[number] = complete(*args, torch.Generator().manual_seed(seed * 1_000_003 + number))
            if number < len(batches) - 1:
                _save(files[number], sampled[number])
    for file in files:
        file.unlink(missing_ok=True)
    return torch.cat(sampled)


def _key(policy: Path, query: torch.Tensor, *settings) -> str:
    """Hash of the weights, the prompts and the settings that completions follow from."""
    digest = hashlib.sha256(repr(settings).encode() + query.numpy().tobytes())
    for file in sorted(Path(policy).glob("*.safetensors")):
        digest.update(hashlib.file_digest(file.open("rb"), "sha256").digest())
    return digest.hexdigest()[:20]


def _load(file: Path) -> torch.Tensor | None:
    try:
        return torch.from_numpy(np.load(file))
    except FileNotFoundError:
        return None


def _save(file: Path, part: torch.Tensor) -> None:
    """Write a batch; it is whole or not there, also where another run is at the same one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_suffix(f".{os.getpid()}.npy")
    np.save(scratch, part.numpy())
    os.replace(scratch, file)
