"""How far rewards in bf16 can be trusted: a prompt's best and worst of 25 against those of fp32.

    PYTHONPATH=src python benchmarks/gpu/scores.py --out scores.jsonl                     # 1.4B's shape on a GPU
    PYTHONPATH=src python benchmarks/gpu/scores.py --out scores.jsonl --shape 70m --prompts 24   # on a CPU
    PYTHONPATH=src python benchmarks/gpu/scores.py --out scores.jsonl --rm runs/.../rm --rows rows.npz   # trained

Random weights of Pythia's shape, or a trained reward model with rows of its own tokens. Every prompt's completions are
scored as a tree (`candidates.rewards`) or by a forward pass each (`RewardModel.forward`), in several precisions; the
reference is fp32, a forward pass each. Random weights tell completions apart less than trained ones do, so that their
rewards lie closer and rounding decides more often: read the differences beside the spread. A line of JSON each.
"""

import argparse
import contextlib
import copy
import json
import time
import traceback
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from roads import candidates, generate, model
from roads.tldr import EOS, PAD

ROWS = Path(__file__).with_name("rows.npz")
N, LENGTH = 25, 53
SHAPES = {"tiny": (64, 2, 2), "70m": (512, 6, 8), "1.4b": (2048, 24, 16)}  # hidden size, layers, heads


def new_policy(shape: str, device: str) -> GPTNeoXForCausalLM:
    """Random weights, fp32, that write as a trained policy does: benchmarks/bench.py's `sharpen`."""
    hidden, layers, heads = SHAPES[shape]
    torch.manual_seed(2)
    with torch.device(device):
        net = GPTNeoXForCausalLM(GPTNeoXConfig(
            vocab_size=50304, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
            intermediate_size=4 * hidden, rotary_pct=0.25, max_position_embeddings=2048, bos_token_id=EOS,
            eos_token_id=EOS, pad_token_id=PAD)).eval()
    with torch.no_grad():
        words = net.get_output_embeddings().weight
        words *= 20
        net.base_model.final_layer_norm.bias += 2.3 * words[EOS] / words[EOS].norm()
    net.set_attn_implementation("sdpa")
    return net


def in_bf16(rm: model.RewardModel, head: bool = False) -> model.RewardModel:
    """A copy with bf16 weights, so that its residual stream is bf16 as well; the head stays fp32 unless asked."""
    rm = copy.deepcopy(rm)
    rm.trunk.to(torch.bfloat16)
    if head:
        rm.head = _RoundedHead(rm.head)
    return rm


class _RoundedHead(nn.Module):
    """A head in bf16: what it is given is rounded, and so is what it says."""

    def __init__(self, head: nn.Linear):
        super().__init__()
        self.inner = head.to(torch.bfloat16)

    @property
    def weight(self) -> Tensor:
        return self.inner.weight

    def forward(self, hidden: Tensor) -> Tensor:
        return self.inner(hidden.bfloat16()).float()


def by_tree(rm, query: Tensor, completions: Tensor) -> Tensor:
    return candidates.in_batches(candidates.rewards, rm, query, completions, label="tree")


@torch.inference_mode()
def by_forward(rm, query: Tensor, completions: Tensor) -> Tensor:
    """A forward pass over every distinct completion with its prompt; rewards [B, n]."""
    device, found = rm.head.weight.device, []
    for prompt, rows in zip(query, completions, strict=True):
        rows, where = torch.unique(rows, dim=0, return_inverse=True)
        found.append(rm(prompt.expand(len(rows), -1).to(device), rows.to(device)).float().cpu()[where])
    return torch.stack(found)


def compare(found: Tensor, exact: Tensor, completions: Tensor) -> dict:
    """How rewards [B, n] differ from exact ones. Equal completions are one: which of them is best is no difference.

    `worse`: how much lower in exact reward the best by found is than the exact best, in standard deviations of a
    prompt's exact rewards, averaged over all prompts.
    """
    off, spread = (found - exact).abs(), exact.std(1)
    rows = torch.arange(len(found))

    def differs(ours: Tensor, theirs: Tensor) -> float:
        return (completions[rows, ours] != completions[rows, theirs]).any(1).float().mean().item()

    best, worst, exact_best, exact_worst = found.argmax(1), found.argmin(1), exact.argmax(1), exact.argmin(1)
    correlations = []
    for a, b, texts in zip(found, exact, completions, strict=True):
        first = np.unique(texts, axis=0, return_index=True)[1]
        if len(first) > 2:
            ranks = [values[first].argsort().argsort().double() for values in (a, b)]
            correlations.append(torch.corrcoef(torch.stack(ranks))[0, 1].item())
    return {
        "best_differs": differs(best, exact_best), "worst_differs": differs(worst, exact_worst),
        "pair_differs": float(((completions[rows, best] != completions[rows, exact_best]).any(1)
                               | (completions[rows, worst] != completions[rows, exact_worst]).any(1)).float().mean()),
        "worse": ((exact[rows, exact_best] - exact[rows, best]) / spread.clamp(min=1e-12)).mean().item(),
        "off_largest": off.max().item(), "off_median": off.median().item(),
        "off_common": (found - exact).mean(1).abs().mean().item(),  # what all of a prompt share moves no rank
        "spread": spread.mean().item(), "rank_correlation": float(np.mean(correlations)) if correlations else None,
        "rank_prompts": len(correlations)}


@contextlib.contextmanager
def products(precision: str):
    """fp32 matrix products: "highest", or "high", which is TF32 on a GPU."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def sets(policy, query: Tensor, rows, n: int, temperatures: list[float]):
    """Names and completions [B, n, R]: by our sampler where there is a policy, and responses to other posts."""
    for temperature in temperatures if policy is not None else []:
        generator = torch.Generator().manual_seed(1)
        yield f"T {temperature:g}", generate.complete(policy, query, n, LENGTH, temperature, generator)
    response = torch.from_numpy(rows["chosen"])
    others = (torch.arange(len(query))[:, None] + torch.arange(1, n + 1)) % len(response)
    yield "responses of other posts", response[others]


def say(out: Path, **found) -> None:
    print(json.dumps(found), flush=True)
    with out.open("a") as file:
        file.write(json.dumps(found) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="1.4b", help="of random weights; tiny is a rehearsal")
    parser.add_argument("--rm", type=Path, help="a trained reward model instead of random weights")
    parser.add_argument("--rows", type=Path, default=ROWS, help="query and chosen, in the reward model's tokens")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--temperatures", type=float, nargs="*", default=[1.0, 0.1])
    parser.add_argument("--minutes", type=float, default=2.0, help="no set of completions is begun after this")
    a = parser.parse_args()
    begin, rows = time.perf_counter(), np.load(a.rows)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    query = torch.from_numpy(rows["query"][: a.prompts]).long()
    policy = None if a.rm else new_policy(a.shape, device)
    if a.rm:
        exact_rm = model.RewardModel.load(a.rm).to(device).eval()
    else:
        torch.manual_seed(3)
        exact_rm = model.RewardModel(copy.deepcopy(policy.base_model)).to(device).eval()
        policy.to(torch.bfloat16)
    autocast = copy.deepcopy(exact_rm)
    model._autocast(autocast.trunk)  # as RewardModel.load has it: fp32 weights and residual stream, bf16 products
    half, half_head = in_bf16(exact_rm), in_bf16(exact_rm, head=True)
    ways = [
        ("fp32, tree", exact_rm, by_tree, "highest"),
        ("autocast, tree", autocast, by_tree, "highest"), ("autocast, a forward each", autocast, by_forward, "highest"),
        ("bf16 weights, tree", half, by_tree, "highest"), ("bf16 weights, a forward each", half, by_forward, "highest"),
        ("bf16 weights and head, tree", half_head, by_tree, "highest"),
    ] + ([("TF32, tree", exact_rm, by_tree, "high")] if device == "cuda" else [])
    say(a.out, card=torch.cuda.get_device_name() if device == "cuda" else "none", torch=torch.__version__,
        shape=str(a.rm or a.shape), prompts=len(query), n=N)
    made = sets(policy, query, rows, N, a.temperatures)
    while time.perf_counter() - begin < 60 * a.minutes:
        try:
            name, completions = next(made)
        except StopIteration:
            break
        distinct = sum(len(torch.unique(part, dim=0)) for part in completions) / len(completions)
        start = time.perf_counter()
        exact = by_forward(exact_rm, query, completions)
        say(a.out, completions=name, way="fp32, a forward each", seconds=time.perf_counter() - start, distinct=distinct,
            tokens=(completions != PAD).sum(2).double().mean().item())
        for way, rm, run, precision in ways:
            try:
                start = time.perf_counter()
                with products(precision):
                    found = run(rm, query, completions)
                seconds = time.perf_counter() - start
                say(a.out, completions=name, way=way, seconds=seconds, **compare(found, exact, completions))
            except Exception as error:  # the other ways still run
                traceback.print_exc()
                say(a.out, completions=name, way=way, error=f"{type(error).__name__}: {error}"[:500])


if __name__ == "__main__":
    main()
