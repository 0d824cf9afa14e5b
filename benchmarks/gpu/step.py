"""What a DPO step costs on this GPU, one way after another: seconds, memory, share of the card's peak, agreement.

    PYTHONPATH=src python benchmarks/gpu/step.py --out step.jsonl --minutes 2.5
    PYTHONPATH=src python benchmarks/gpu/step.py --out step.jsonl --trl /opt/trl-site   # and TRL's, of a folder
    PYTHONPATH=src python benchmarks/gpu/step.py --out step.jsonl --tiny           # a rehearsal on the CPU

Random weights of Pythia-1.4B's shape, 128 pairs a step out of rows.npz: real TL;DR posts, Pythia's tokens. Gradients
are compared with those of the padded path in fp32. A line of JSON a way; a way that fails says why.
"""

import argparse
import contextlib
import gc
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import tokenizers
import torch
from torch import Tensor, nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from roads import model, packed
from roads.preference_losses import dpo_loss
from roads.tldr import EOS, PAD

PEAK = 989e12  # FLOP/s of an H100 SXM in bf16, dense, as NVIDIA's data sheet has it
BETA = 0.05

# name: how the pairs go through (rows: so many at once, padded; tokens: packed), and what else differs
WAYS = {
    "today": {"rows": 32, "checkpoint": True, "fused": False},
    "packed 11k": {"tokens": 11008, "compile": True},
    "packed 11k, bf16 residual": {"tokens": 11008, "compile": True, "residual": "bf16"},
    "packed 22k, checkpoint": {"tokens": 22016, "compile": True, "checkpoint": True},
    "packed 5.5k": {"tokens": 5504, "compile": True},
    "packed 11k, all bf16": {"tokens": 11008, "compile": True, "weights": "bf16"},
    "packed 11k, half recomputed": {"tokens": 11008, "compile": True, "budget": 0.5},
    "packed 22k": {"tokens": 22016, "compile": True},
    "today, fused AdamW": {"rows": 32, "checkpoint": True},
    "padded to 64, compiled": {"rows": 16, "compile": True, "pad": 64},
    "today, 16 unchecked": {"rows": 16, "fused": False},
}
# TRL's DPOTrainer: pairs at once, and fields of DPOConfig
TRL = {
    "TRL, checkpointing": {"at_once": 32, "options": {"gradient_checkpointing": True}},
    "TRL": {"at_once": 8, "options": {}},
    "TRL, liger": {"at_once": 16, "options": {"use_liger_kernel": True}},
    "TRL, padding-free": {"at_once": 16, "options": {"padding_free": True}},
    "TRL, compiled": {"at_once": 8, "options": {"torch_compile": True}},
}


def settings(tiny: bool) -> dict:
    if tiny:
        return dict(hidden=64, layers=2, heads=4, vocab=50304, pairs=8, steps=2, exact=4, shrink=16)
    return dict(hidden=2048, layers=24, heads=16, vocab=50304, pairs=128, steps=3, exact=16, shrink=1)


def new_policy(s: dict, device: str) -> GPTNeoXForCausalLM:
    """Random weights, the same every time, made where they are used."""
    torch.manual_seed(0)
    with torch.device(device):
        return GPTNeoXForCausalLM(GPTNeoXConfig(
            vocab_size=s["vocab"], hidden_size=s["hidden"], num_hidden_layers=s["layers"],
            num_attention_heads=s["heads"], intermediate_size=4 * s["hidden"], rotary_pct=0.25,
            max_position_embeddings=2048, bos_token_id=EOS, eos_token_id=EOS, pad_token_id=PAD)).train()


def balanced(lengths: Tensor, most: int) -> list[Tensor]:
    """Which rows go together: as few groups as `most` tokens each allow, about equally many tokens in each."""
    count = -(-int(lengths.sum()) // most)
    while True:
        groups, size = [[] for _ in range(count)], [0] * count
        for row in lengths.argsort(descending=True, stable=True).tolist():
            to = size.index(min(size))
            groups[to].append(row)
            size[to] += int(lengths[row])
        if max(size) <= most:
            return [torch.tensor(group) for group in groups]
        count += 1


class Way:
    """One way to run pairs: a policy that is set up for it, and the gradients of a batch."""

    def __init__(self, s: dict, device: str, rows=None, tokens=None, checkpoint=False, compile=False, fused=True,  # noqa: A002
                 residual="fp32", weights="autocast", budget=1.0, pad=1):
        self.rows, self.pad = rows, pad
        self.tokens = tokens and tokens // s["shrink"] // packed.BLOCK * packed.BLOCK
        self.device, self.policy = device, new_policy(s, device)
        if weights == "autocast":
            model._autocast(self.policy.base_model)
            model._autocast(self.policy.get_output_embeddings())
        elif weights == "bf16":
            self.policy.bfloat16()
        if residual == "bf16":
            self.policy.get_input_embeddings().register_forward_hook(lambda *given: given[-1].bfloat16())
        if tokens:
            self.policy.set_attn_implementation(packed.ATTENTION)
        if checkpoint:
            self.policy.gradient_checkpointing_enable({"use_reentrant": False})
        if compile and device == "cuda":
            torch._functorch.config.activation_memory_budget = budget
            for layer in self.policy.base_model.layers:
                layer.compile()
        elif compile:
            for layer in self.policy.base_model.layers:
                layer.compile(backend="eager")
        options = {"fused": True} if fused and device == "cuda" else {}
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=3e-6, eps=1e-5, weight_decay=0.01, **options)

    def parts(self, lengths: Tensor) -> list[Tensor]:
        if self.tokens:
            return balanced(lengths, self.tokens)
        return lengths.argsort(stable=True).tensor_split(-(-len(lengths) // self.rows))

    def logps(self, sides: list[Tensor]) -> Tensor:
        """[2, B] of chosen and of rejected."""
        if self.tokens:
            rows = packed.pack(*sides)
            return packed.logps(self.policy, rows, 1.0, model.LOGITS // self.policy.config.vocab_size)
        if self.pad > 1:
            width = [-(-int((side != PAD).sum(1).max()) // self.pad) * self.pad for side in sides]
            sides = [sides[0][:, -width[0]:], *(nn.functional.pad(side, (0, self.pad - side.shape[1]), value=PAD)
                                                for side in sides[1:])]
        return torch.stack(model.pair_logps(self.policy, *sides))

    def gradients(self, sides: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Mean loss of a batch, its gradients being left in the weights; and the log-probs [2, B]."""
        lengths = sum((side != PAD).sum(1) for side in sides)
        total, found = torch.zeros((), device=self.device), torch.zeros(2, len(lengths), device=self.device)
        for part in self.parts(lengths):
            logps = self.logps([side[part] for side in sides])
            loss = dpo_loss(*logps, torch.zeros_like(logps[0]), torch.zeros_like(logps[1]), BETA).sum() / len(lengths)
            loss.backward()
            total += loss.detach()
            found[:, part.to(self.device)] = logps.detach().float()
        return total, found

    def step(self, sides: list[Tensor]) -> tuple[Tensor, Tensor]:
        loss, _ = self.gradients(sides)
        norm = nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss, norm

    def weights_to_compare(self) -> dict[str, Tensor]:
        """Gradients of the first, a middle and the last matrices, in fp32 on the CPU."""
        names = [name for name, part in self.policy.named_parameters() if part.grad is not None]
        chosen = [name for i, name in enumerate(names) if i < 4 or i >= len(names) - 4
                  or len(names) // 2 <= i < len(names) // 2 + 12]
        return {name: self.policy.get_parameter(name).grad.float().cpu() for name in chosen}


def kernels(seen, device: str, most: int = 18) -> str:
    """Where a profiled step's time went: milliseconds, calls, name."""
    name = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    events = sorted(seen.key_averages(), key=lambda event: -getattr(event, name))
    whole = sum(getattr(event, name) for event in events)
    lines = [f"{getattr(event, name) / 1e3:9.1f} ms {100 * getattr(event, name) / whole:5.1f} % {event.count:6d}  "
             f"{event.key[:110]}" for event in events]
    return "\n".join([f"{whole / 1e3:9.1f} ms in all", *lines[:most]])


def wait(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def clear(device: str) -> None:
    gc.collect()
    torch._dynamo.reset()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def measure(options: dict, s: dict, device: str, batches: list, exact: dict | None, profile: Path | None) -> dict:
    """One way: its first pass with compilation, its agreement with fp32, its steps."""
    way = Way(s, device, **options)
    few = [side[: s["exact"]] for side in batches[0]]
    begin = wait(device)
    loss, logps = way.gradients(few)
    found = {"first_seconds": round(wait(device) - begin, 2)}
    grads = way.weights_to_compare()
    if exact is not None:
        known = exact["grads"]
        off = {name: float((grads[name] - known[name]).norm() / known[name].norm()) for name in known}
        found |= {"loss": float(loss), "loss_fp32": exact["loss"],
                  "logps_off": float((logps.cpu() - exact["logps"]).abs().max()),
                  "gradients_off": max(off.values()), "worst": max(off, key=off.get),
                  "gradients_off_median": statistics.median(off.values())}
    way.optimizer.zero_grad()
    del grads
    if exact is None:
        return found
    begin = wait(device)
    loss, norm = way.step(batches[0])
    found |= {"first_step_seconds": round(wait(device) - begin, 2), "step_loss": float(loss), "norm": float(norm)}
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for sides in batches[1:]:
        begin = wait(device)
        way.step(sides)
        seconds.append(wait(device) - begin)
    tokens = [int(sum((side != PAD).sum() for side in sides)) for sides in batches[1:]]
    flop = 6 * sum(part.numel() for part in way.policy.parameters()) * statistics.mean(tokens)
    found |= {"seconds": round(statistics.median(seconds), 4), "all_seconds": [round(value, 4) for value in seconds],
              "tokens": statistics.mean(tokens), "micro_batches": len(way.parts(
                  sum((side != PAD).sum(1) for side in batches[1]))),
              "peak": round(100 * flop / statistics.median(seconds) / PEAK, 1)}
    if device == "cuda":
        found["gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        found["reserved_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 2)
    begin = wait(device)
    way.gradients(batches[-1])
    found["gradients_seconds"] = round(wait(device) - begin, 4)
    way.optimizer.zero_grad()
    if profile:
        activities = [torch.profiler.ProfilerActivity.CPU] + (
            [torch.profiler.ProfilerActivity.CUDA] if device == "cuda" else [])
        with torch.profiler.profile(activities=activities) as seen:
            way.step(batches[-1])
            wait(device)
        profile.write_text(kernels(seen, device))
    return found


def by_trl(options: dict, s: dict, device: str, batches: list, place: str, folder: Path) -> dict:
    """Steps of TRL's DPOTrainer on the same pairs, in a process of its own (benchmarks/step.py) with the packages of
    `place`, or as they are installed where that is "-"."""
    if not (folder / "policy").exists():
        folder.mkdir(parents=True, exist_ok=True)
        new_policy(s, device).save_pretrained(folder / "policy")
        words = {"<|endoftext|>": EOS, "<|padding|>": PAD} | {f"w{i}": i for i in range(2, s["vocab"])}
        tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<|padding|>")).save(
            str(folder / "tokenizer.json"))
        clear(device)
    query, chosen, rejected = (torch.cat(sides).numpy() for sides in zip(*batches))
    np.savez(folder / "pairs.npz", query=query, chosen=chosen, rejected=rejected, order=np.arange(len(query)))
    options = options | {"at_once": max(1, options["at_once"] // s["shrink"])}
    (folder / "settings.json").write_text(json.dumps({"gpu": options, "batch_size": s["pairs"], "beta": BETA,
                                                      "lr": 3e-6, "pad": PAD}))
    path = os.environ.get("PYTHONPATH", "") + ("" if place == "-" else f":{place}")
    command = [sys.executable, Path(__file__).parents[1] / "step.py", "trl", folder]
    with (folder / "trl.log").open("w") as log, subprocess.Popen(
            command, text=True, env=os.environ | {"PYTHONPATH": path}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=log) as process:
        answers = [process.stdout.readline()]
        for _ in batches if answers[0] else []:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write("\n")
                process.stdin.flush()
            answers.append(process.stdout.readline())
        process.kill()
    if not answers[-1]:
        raise RuntimeError(f"TRL stopped: {(folder / 'trl.log').read_text()[-600:]}")
    answers = [json.loads(answer) for answer in answers]
    seconds = [answer["seconds"] for answer in answers[2:]]  # the first step warms up
    tokens = statistics.mean(int(sum((side != PAD).sum() for side in sides)) for sides in batches[1:])
    with torch.device("meta"):
        weights = sum(part.numel() for part in new_policy(s, "meta").parameters())
    return {"loss": answers[1]["loss"], "seconds": round(statistics.median(seconds), 4),
            "all_seconds": [round(value, 4) for value in seconds], "tokens": tokens,
            "peak": round(100 * 6 * weights * tokens / statistics.median(seconds) / PEAK, 1),
            **({"gib": round(answers[-1]["gib"], 2)} if "gib" in answers[-1] else {})}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=2.5, help="no way is begun after these")
    parser.add_argument("--ways", nargs="*", help=f"of: {', '.join([*WAYS, *TRL])}")
    parser.add_argument("--trl", help="a folder of packages that only TRL's process sees; - where it is installed")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--profile", action="store_true", help="the best way's kernels, into OUT.profile.txt")
    a = parser.parse_args()
    device, s = "cuda" if torch.cuda.is_available() else "cpu", settings(a.tiny)
    rows = np.load(Path(__file__).with_name("rows.npz"))
    sides = [torch.from_numpy(rows[name]) for name in ("query", "chosen", "rejected")]
    if a.tiny:
        sides[0] = sides[0][:, -40:]
    batches = [[side[i:i + s["pairs"]] for side in sides] for i in range(0, s["pairs"] * s["steps"], s["pairs"])]
    batches.append(batches[-1])
    started = time.perf_counter()
    best = (float("inf"), "")

    def say(**line) -> None:
        line |= {"at": round(time.perf_counter() - started, 1)}
        print(json.dumps(line), flush=True)
        with a.out.open("a") as file:
            file.write(json.dumps(line) + "\n")

    say(device=torch.cuda.get_device_name() if device == "cuda" else "cpu", torch=torch.__version__)
    way = Way(s, device, rows=s["exact"] // 2, weights="fp32")
    loss, logps = way.gradients([side[: s["exact"]] for side in batches[0]])
    exact = {"loss": float(loss), "logps": logps.cpu(), "grads": way.weights_to_compare()}
    del way, loss, logps
    say(way="fp32, padded", loss=exact["loss"])
    ours = list(WAYS)
    ways = a.ways or [*ours[:4], *(list(TRL) if a.trl else []), *ours[4:]]
    scratch = Path("/dev/shm/trl") if device == "cuda" else a.out.parent / "trl"
    for name in ways:
        clear(device)
        if time.perf_counter() - started > 60 * a.minutes:
            say(way=name, left_out="no time")
            continue
        try:
            if name in TRL:
                say(way=name, **by_trl(TRL[name], s, device, batches, a.trl or "-", scratch))
                continue
            found = measure(WAYS[name], s, device, batches, exact, None)
            say(way=name, **found)
            best = min(best, (found["seconds"], name)) if "all bf16" not in name else best
        except Exception as error:
            say(way=name, error=f"{type(error).__name__}: {error}"[:1500])
            traceback.print_exc(limit=8)
    if a.profile and best[1]:
        clear(device)
        with contextlib.suppress(Exception):
            found = measure(WAYS[best[1]], s, device, batches, exact, a.out.with_suffix(".profile.txt"))
            say(way=f"{best[1]}, again", **found)
            print(a.out.with_suffix(".profile.txt").read_text())


if __name__ == "__main__":
    main()
