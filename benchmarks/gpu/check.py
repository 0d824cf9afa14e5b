"""What this GPU does for the active scale, in three minutes: `make check-gpu`.

    PYTHONPATH=src python benchmarks/gpu/check.py                  # the active scale's model, on the GPU
    PYTHONPATH=src python benchmarks/gpu/check.py --tiny --out .   # a rehearsal on the CPU

Memory and driver, copy bandwidth, the rate of matrix products; then with the package's own code, at the shape of the
scale's model with random weights, on 128 real posts: steps of DPO, scores of 25 candidates, 25 completions a prompt, by
our sampler and by vLLM where it is installed. Writes benchmarks/gpu/<card>.json, which `make plan` uses from then on,
and ends with what the scale's figures would take on it.
"""

import argparse
import csv
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from roads import active, candidates, config, generate, model, schema, stage
from roads.runner import devices, preflight
from roads.runner.work import COLD, SHARED
from roads.stages import dpo
from roads.tldr import EOS, PAD

ROWS = Path(__file__).with_name("rows.npz")
# Width and layers of GPT-NeoX by parameters: Pythia's.
SHAPES = {7.04e7: (512, 6), 1.62e8: (768, 12), 4.05e8: (1024, 24), 1.01e9: (2048, 16), 1.415e9: (2048, 24),
          2.775e9: (2560, 32), 6.857e9: (4096, 32)}
VOCAB = 50304
PAIRS, STEPS, N, LENGTH = 128, 4, 25, 53


def shape(cfg: schema.Scale, tiny: bool) -> tuple[int, int]:
    """Width and layers of the scale's model, or of the Pythia nearest to it in size."""
    if cfg.model.kind == "new" and not tiny:
        return cfg.model.hidden_size, cfg.model.layers
    return (64, 2) if tiny else SHAPES[min(SHAPES, key=lambda size: abs(np.log(size / cfg.model.parameters)))]


def policy(width: int, layers: int, vocab: int) -> GPTNeoXForCausalLM:
    """Random weights whose logits spread as a trained policy's do."""
    torch.manual_seed(0)
    net = GPTNeoXForCausalLM(GPTNeoXConfig(
        vocab_size=vocab, hidden_size=width, num_hidden_layers=layers, num_attention_heads=max(2, width // 128),
        intermediate_size=4 * width, rotary_pct=0.25, max_position_embeddings=2048, bos_token_id=EOS, eos_token_id=EOS,
        pad_token_id=PAD))
    with torch.no_grad():
        net.get_output_embeddings().weight *= 20
    return net


def seconds(work: Callable[[], object], times: int = 3) -> float:
    """The best of some times, after one that does not count."""
    found = []
    for _ in range(times + 1):
        wait()
        begin = time.perf_counter()
        work()
        wait()
        found.append(time.perf_counter() - begin)
    return min(found[1:])


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def card(where: str, tiny: bool) -> dict:
    """What the card is, how fast it copies (bytes/s) and multiplies (FLOP/s, bf16)."""
    cells, side = (2**20, 128) if tiny else (2**29, 8192)
    a, b = torch.zeros(cells, device=where), torch.empty(cells, device=where)
    copied = 2 * 4 * cells / seconds(lambda: b.copy_(a))
    x = torch.randn(side, side, device=where, dtype=torch.bfloat16)
    _, name, memory, driver = (preflight.cards() or [("", "CPU", 0.0, 0)])[0]
    return {"card": name, "driver": driver, "memory_bytes": memory, "copy_bytes_per_second": copied,
            "matmul_flops": 2 * side**3 / seconds(lambda: x @ x)}


def start_up() -> float:
    """Seconds until a process has torch, transformers and a GPU."""
    code = "import torch, transformers; torch.cuda.is_available() and torch.zeros(1).cuda()"
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - begin


def step(cfg: schema.Scale, parameters: float) -> dict:
    """DPO as the stage does it: seconds of a step, model FLOP/s (6 a weight and token)."""
    recipe = cfg.dpo.model_copy(update={"batch_size": min(PAIRS, cfg.dpo.batch_size), "epochs": 1})
    dpo.dpo(Path("pairs"), Path("policy"), Path("trained"), cfg.model_copy(update={"dpo": recipe}), 0)
    log = next(Path("runs/.log").glob("dpo-*.csv"))
    rows = list(csv.DictReader(log.open(encoding="utf-8")))[1:]  # the first step compiles
    best = max(rows, key=lambda row: float(row["tokens_per_second"]))
    return {"step_seconds": float(best["seconds"]), "step_pairs": recipe.batch_size,
            "step_flops": 6 * parameters * float(best["tokens_per_second"]), "step_gpu_bytes": int(best["gpu_bytes"])}


def score(cfg: schema.Scale, query: torch.Tensor) -> dict:
    """Log-probs of 25 candidates: completions a second."""
    net = model.load_policy(Path("policy"), cfg.compute).eval()
    generator, size = torch.Generator().manual_seed(0), (len(query), N, LENGTH - 1)
    words = torch.randint(2, net.config.vocab_size, size, generator=generator)
    drawn = torch.cat([words, torch.full((len(query), N, 1), EOS)], 2)
    took = seconds(lambda: candidates.in_batches(candidates.logps, net, query, drawn, label="scores"), times=1)
    return {"scored_per_second": len(query) * N / took}


def sampled(cfg: schema.Scale, query: torch.Tensor, sampler: str) -> dict:
    """25 completions a prompt at the temperature of online DPO: tokens a second, the second time."""
    cfg = cfg.model_copy(update={"compute": cfg.compute.model_copy(update={"sampler": sampler})})
    settings, rates = schema.Sampling(n=N, temperature=cfg.samples.online.temperature), []
    for seed in (0, 1):
        begin = time.perf_counter()
        found = generate.completions(Path("policy"), query, LENGTH, settings, seed, cfg)
        rates.append(float((found != PAD).sum()) / (time.perf_counter() - begin))
    return {f"{sampler}_tokens_per_second": rates[-1]}


def check(cfg: schema.Scale, tiny: bool) -> dict:
    """All of it; what fails is said, and the rest is measured."""
    where = "cuda" if cfg.compute.device == "gpu" else "cpu"
    found: dict = {"torch": torch.__version__, "when": date.today().isoformat(), **card(where, tiny)}
    print(json.dumps(found), flush=True)
    vocab = 512 if tiny else VOCAB
    net = policy(*shape(cfg, tiny), vocab)
    parameters = sum(part.numel() for part in net.parameters())
    net.save_pretrained("policy")
    del net
    rows = np.load(ROWS)
    n = 8 if tiny else PAIRS
    pairs = {name: rows[name][: n * STEPS] for name in ("query", "chosen", "rejected")}
    if tiny:
        pairs["query"] = pairs["query"][:, -40:]
        pairs = {name: np.where(part > PAD, part % (vocab - 2) + 2, part) for name, part in pairs.items()}
    Path("pairs").mkdir()
    np.savez("pairs/pairs.npz", **pairs)
    query = torch.from_numpy(pairs["query"]).long()[: 4 if tiny else PAIRS]
    samplers = ["tree", *["vllm"] * (where == "cuda" and importlib.util.find_spec("vllm") is not None)]
    work = {"start_up": lambda: {"start_up_seconds": start_up()}, "step": lambda: step(cfg, parameters),
            "scores": lambda: score(cfg, query),
            **{name: lambda name=name: sampled(cfg, query, name) for name in samplers}}
    for name, part in work.items():
        begin = time.perf_counter()
        try:
            new = part()
        except Exception as error:  # the other parts still run
            new = {f"{name}_error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
        found |= new
        print(f"{name} ({time.perf_counter() - begin:.0f} s): {json.dumps(new)}", flush=True)
    rate = found.get(f"{cfg.compute.sampler}_tokens_per_second", found.get("tree_tokens_per_second"))
    if "step_flops" in found and rate:
        if cfg.compute.sampler == "tree" and cfg.samples.online.temperature <= COLD:
            rate *= SHARED  # the plan counts so many of a cold prompt's completions
        found |= {"parameters": parameters, "device": {
            "flops": found["step_flops"], "decode": rate * parameters / 1e9, "step": 0, "layer": 0,
            "startup": found["start_up_seconds"] + 5, "memory": found["memory_bytes"]}}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the card's file (default: where `make plan` looks)")
    parser.add_argument("--scale", help="whose model and lengths (default: the active one's)")
    parser.add_argument("--tiny", action="store_true")
    a = parser.parse_args()
    scale = a.scale or active.scale_name()
    cfg = config.load_scale(scale)
    compute = {"device": "cpu", "precision": "fp32", "attention": "sdpa", "sampler": "tree"} if a.tiny else {
        "device": "gpu", "precision": "bf16", "attention": "sdpa", "sampler": cfg.compute.sampler}
    if not a.tiny and not preflight.cards():
        raise stage.UserError("check-gpu: nvidia-smi shows no GPU; --tiny rehearses it on the CPU")
    batch = cfg.dpo.model_copy(update={"batch_size": 8 if a.tiny else PAIRS})
    cfg = cfg.model_copy(update={"compute": schema.Compute(**compute), "dpo": batch})
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            found = check(cfg, a.tiny)
        finally:
            os.chdir(here)
    out = (a.out or devices.MEASURED) / devices.file_of(found["card"]).name
    if "device" not in found:
        raise stage.UserError(f"{out}: not written: a step or the sampler failed, as said above")
    with stage.writing(out) as scratch:
        stage.write_json(scratch, found)
    print(f"{out}: a step {found['step_seconds']:.2f} s, {found['step_flops'] / 1e12:.0f} TFLOP/s of "
          f"{found['matmul_flops'] / 1e12:.0f}; {found['tree_tokens_per_second']:,.0f} tokens/s")
    if not a.tiny and not a.out:  # the plan looks for the card's file in its own place
        subprocess.run([sys.executable, "-m", "roads.runner.plan", "--device", found["card"]], check=False)


if __name__ == "__main__":
    stage.main(main)
