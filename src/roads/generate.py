"""Completions of prompts by a policy in a folder: drawn by our sampler or by vLLM, resumable, and never drawn twice."""

import hashlib
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from roads import generate_tree, generate_vllm, kept, model, schema, stage, trees
from roads.tldr import PAD

ROWS = 1600  # completions of a batch: what is drawn from one generator, and kept at once
TOGETHER = 4096  # completions that are under way at once on a GPU; on a CPU, as many as a batch has
STEP = 256  # a GPU's memory is filled in steps of so many prompts
MEMORY = 2**29  # bytes of a CPU's that they may take; of a GPU three quarters of what is free


def complete(policy: PreTrainedModel, query: Tensor, n: int, length: int, temperature: float,
             generator: torch.Generator) -> Tensor:
    """n completions per query [B, Q], padded left: [B, n, length] int32, padded right, each with an EOS at its end.

    A completion without an EOS after length - 1 tokens is closed with one: the reward model reads there, and DPO learns
    to stop.
    """
    found = torch.empty(len(query), n, length, dtype=torch.int32)
    for i, completions in _grow(policy, query, [(range(len(query)), generator)], n, length, temperature):
        found[i] = completions
    return found


def _grow(policy: PreTrainedModel, query: Tensor, batches: Iterable[tuple[Any, torch.Generator]], n: int, length: int,
          temperature: float, stages: int = 1) -> Iterator[tuple[int, Tensor]]:
    """Completions of the rows of batches (rows, generator), those of a batch in the order of their lengths.

    `stages` share the memory of a GPU.
    """
    lengths = (query != PAD).sum(1)

    def prompts() -> Iterator[tuple[int, Tensor, Tensor]]:
        for rows, generator in batches:
            rows = torch.as_tensor(rows)
            # From 0 to 1, for every token that might be drawn: what a completion gets must not depend on where others
            # end.
            draws = torch.rand(length, len(rows), n, dtype=torch.double, generator=generator)
            for i in lengths[rows].argsort(descending=True, stable=True).tolist():
                row = int(rows[i])
                yield row, query[row][query[row] != PAD], draws[:, i]

    longest, gpu = int(lengths.max()), policy.device.type == "cuda"
    if gpu:
        torch.cuda.empty_cache()  # what an earlier call kept is free
        free, total = torch.cuda.mem_get_info(policy.device)
    memory = min(free * 3 // 4, total * 3 // 4 // stages) if gpu else MEMORY
    fit = generate_tree.places_for(policy, longest, n, length, memory)
    if gpu and fit > STEP:  # free memory is never the same twice, and every number of places is compiled anew
        fit -= fit % STEP
    places = min(fit, max(1, (TOGETHER if gpu else ROWS) // n), len(query))
    return generate_tree.grow(policy, prompts(), longest, n, length, temperature, places)


def completions(policy: Path, query: Tensor, length: int, settings: schema.Sampling, seed: int,
                cfg: schema.Scale) -> Tensor:
    """Completions [N, n, length] of every query [N, Q] by the policy in a folder, with the sampler of cfg.compute.

    A prompt's are the same whatever is sampled before or after. They are cached (kept.py) for a stage that asks for the
    same. Finished batches stay in runs/.scratch until then, so that a killed run resumes.
    """
    vllm = cfg.compute.sampler == "vllm"
    batches = torch.arange(len(query)).split(max(1, (generate_vllm.ROWS if vllm else ROWS) // settings.n))
    key = _key(policy, query, length, settings.n, settings.temperature, seed, cfg.compute.model_dump(), len(batches))
    if (known := kept.load(f"completions-{key}")) is not None:
        print(f"sample s{seed}: cached", file=sys.stderr)
        return torch.from_numpy(known)
    files = [stage.SCRATCH / f"sample-{key}-{number}.npy" for number in range(len(batches))]
    sampled = [None if part is None else torch.from_numpy(part) for part in map(kept.read, files)]
    missing = [number for number, part in enumerate(sampled) if part is None]
    if len(missing) < len(batches):
        print(f"sample s{seed}: continues, {len(batches) - len(missing)} of {len(batches)} batches are done",
              file=sys.stderr)
    with tqdm(initial=sum(part.shape[0] for part in sampled if part is not None), total=len(query),
              desc=f"sample s{seed}", unit="prompt") as progress:
        for number, part in (_by_vllm if vllm else _by_us)(policy, query, batches, missing, length, settings, seed, cfg,
                                                           progress):
            sampled[number] = part
            kept.write(files[number], part.numpy())
    found = torch.cat(sampled)
    kept.save(f"completions-{key}", found.numpy())
    for file in files:
        file.unlink(missing_ok=True)
    return found


def _by_us(policy: Path, query: Tensor, batches: list[Tensor], missing: list[int], length: int,
           settings: schema.Sampling, seed: int, cfg: schema.Scale, progress: tqdm) -> Iterator[tuple[int, Tensor]]:
    """The missing batches, each as soon as its last prompt is done."""
    number_of = torch.cat([torch.full((len(rows),), number) for number, rows in enumerate(batches)]).tolist()
    found = {number: torch.empty(len(batches[number]), settings.n, length, dtype=torch.int32) for number in missing}
    left = {number: len(batches[number]) for number in missing}
    net = model.load_to_sample(policy, cfg.compute)
    # What runs together decides how sums are rounded. On a CPU a batch runs by itself, so that a resumed run ends
    # with the same bits; a GPU, which promises none, is kept busy.
    for numbers in [missing] if net.device.type == "cuda" else [[number] for number in missing]:
        asked = ((batches[number], torch.Generator().manual_seed(seed * 1_000_003 + number)) for number in numbers)
        for row, completion in _grow(net, query, asked, settings.n, length, settings.temperature,
                                     int(os.environ.get(stage.STAGES_PER_GPU, 1))):
            progress.update()
            number = number_of[row]
            found[number][row - int(batches[number][0])] = completion
            left[number] -= 1
            if not left[number]:
                yield number, found.pop(number)


def _by_vllm(policy: Path, query: Tensor, batches: list[Tensor], missing: list[int], length: int,
             settings: schema.Sampling, seed: int, cfg: schema.Scale, progress: tqdm) -> Iterator[tuple[int, Tensor]]:
    """The missing batches, one after the other."""
    with generate_vllm.engine(policy, query.shape[1] + length, cfg) as net:
        for number in missing:
            rows = batches[number]
            yield number, generate_vllm.complete(net, query[rows], settings.n, length, settings.temperature,
                                                 seed * generate_vllm.SEEDS + int(rows[0]) * settings.n)
            progress.update(len(rows))


def _key(policy: Path, query: Tensor, *settings: object) -> str:
    """Hash of all that completions follow from: the weights, the prompts, the settings, and the code that draws."""
    code = stage.code(generate_tree, trees, generate_vllm, model, sys.modules[__name__])
    digest = hashlib.sha256(repr((settings, code, torch.__version__)).encode() + query.numpy().tobytes())
    for file in sorted(Path(policy).glob("*.safetensors")):
        digest.update(bytes.fromhex(stage.sha256(file)))
    return digest.hexdigest()[:20]

