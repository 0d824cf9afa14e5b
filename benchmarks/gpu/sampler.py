"""25 completions of each of many posts at Pythia-1.4B's shape: our sampler, transformers' generate, vLLM.

    PYTHONPATH=src python benchmarks/gpu/sampler.py --out sampler.jsonl
    PYTHONPATH=src python benchmarks/gpu/sampler.py --out sampler.jsonl --vllm /opt/vllm-site   # packages of its own
    PYTHONPATH=src python benchmarks/gpu/sampler.py --out sampler.jsonl --tiny                  # a rehearsal on the CPU

Random weights that never stop: all completions have 53 tokens, on every side. bf16. A line of JSON a measurement.
generate gets as many prompts at once as suit it best, and is timed on few of them: its pace does not change.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import torch
import transformers

from roads import generate, model
from roads.tldr import EOS, PAD

ROWS = Path(__file__).with_name("rows.npz")
N, LENGTH, TEMPERATURES = 25, 53, (1.0, 0.1)
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1",
               "VLLM_USE_FLASHINFER_SAMPLER": "0", "HF_HUB_OFFLINE": "1"}


def new_policy(device: str, tiny: bool):
    """Random weights, bf16; logits that spread as a trained policy's do, and never an EOS."""
    size = (64, 2, 2) if tiny else (2048, 24, 16)
    torch.manual_seed(0)
    with torch.device(device):
        net = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(
            vocab_size=50304, hidden_size=size[0], num_hidden_layers=size[1], num_attention_heads=size[2],
            intermediate_size=4 * size[0], rotary_pct=0.25, max_position_embeddings=2048, bos_token_id=EOS,
            eos_token_id=EOS, pad_token_id=PAD)).eval()
    with torch.no_grad():
        net.get_output_embeddings().weight *= 20
        net.base_model.final_layer_norm.bias -= 40 * torch.nn.functional.normalize(
            net.get_output_embeddings().weight[EOS], dim=0)
    net.set_attn_implementation("sdpa")
    return net.to(torch.bfloat16)


def wait(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def ours(net, query, temperature: float):
    return generate.complete(net, query, N, LENGTH, temperature, torch.Generator().manual_seed(1))


def theirs(net, query, temperature: float, at_once: int):
    """transformers' generate with the same rules."""
    found = []
    for part in query.split(at_once):
        prompts = model.trim(part, part)[0].to(net.device)
        rows = net.generate(
            prompts, attention_mask=(prompts != PAD).long(), do_sample=True, temperature=temperature, top_k=0,
            top_p=1.0, num_return_sequences=N, max_new_tokens=LENGTH, eos_token_id=EOS, pad_token_id=PAD,
            suppress_tokens=[PAD], forced_eos_token_id=EOS)
        found.append(rows[:, prompts.shape[1] :].view(len(part), N, -1).cpu())
    return torch.cat(found)


def by_vllm(folder: str, out: Path, prompts: int) -> None:
    """In a process of its own."""
    start = time.perf_counter()
    import vllm

    llm = vllm.LLM(model=folder, skip_tokenizer_init=True, dtype="bfloat16", enable_prefix_caching=True,
                   max_model_len=640, gpu_memory_utilization=0.88, max_num_seqs=1024, max_num_batched_tokens=16384,
                   disable_log_stats=True)
    started = time.perf_counter() - start
    query = [[int(token) for token in row if token != PAD] for row in np.load(ROWS)["query"][:prompts]]

    def go(rows, temperature: float):
        settings = vllm.SamplingParams(n=N, temperature=temperature, top_p=1.0, max_tokens=LENGTH, ignore_eos=True,
                                       detokenize=False)
        begin = time.perf_counter()
        answers = llm.generate([{"prompt_token_ids": row} for row in rows], settings, use_tqdm=False)
        return time.perf_counter() - begin, sum(len(part.token_ids) for row in answers for part in row.outputs)

    go(query[:8], 1.0)
    for temperature in TEMPERATURES:
        llm.reset_prefix_cache()
        seconds, tokens = go(query, temperature)
        say(out, side="vllm", version=vllm.__version__, start_seconds=started, temperature=temperature,
            prompts=len(query), seconds=seconds, tokens=tokens, tokens_per_second=tokens / seconds)


def say(out: Path, **found) -> None:
    print(json.dumps(found), flush=True)
    with out.open("a") as file:
        file.write(json.dumps(found) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--vllm", help="a folder of packages that only vLLM's process sees; - where it is installed")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true")
    a = parser.parse_args()
    if a.side:
        by_vllm(a.side, a.out, a.prompts)
        return
    device = "cpu" if a.tiny else "cuda"
    query = torch.from_numpy(np.load(ROWS)["query"]).long()[: 3 if a.tiny else a.prompts]
    net = new_policy(device, a.tiny)
    say(a.out, card=torch.cuda.get_device_name() if device == "cuda" else "none", torch=torch.__version__,
        transformers=transformers.__version__)

    def timed(side: str, run, rows, temperature: float, **more) -> None:
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            begin = wait(device)
            found = run(net, rows, temperature, **more)
            seconds = wait(device) - begin
        except Exception as error:  # the other sides still run
            traceback.print_exc(file=sys.stdout)
            say(a.out, side=side, temperature=temperature, error=f"{type(error).__name__}: {error}"[:1000], **more)
            return
        tokens = int((found != PAD).sum())
        distinct = sum(len(torch.unique(row, dim=0)) for row in found) / len(found)
        say(a.out, side=side, temperature=temperature, prompts=len(rows), seconds=seconds, tokens=tokens,
            tokens_per_second=tokens / seconds, distinct=distinct,
            gib=torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None, **more)

    timed("ours, first", ours, query[:16], 1.0)
    for temperature in TEMPERATURES:
        timed("ours", ours, query, temperature)
    for at_once in (1, 2) if a.tiny else (16, 8):
        timed("generate", theirs, query[:16], 1.0, at_once=at_once)
    timed("generate", theirs, query[:16], 0.1, at_once=1 if a.tiny else 16)
    if a.vllm:
        folder = a.out.parent / "policy" if a.tiny else Path("/dev/shm/policy")
        net.save_pretrained(folder)
        del net
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
        path = os.environ["PYTHONPATH"] if a.vllm == "-" else f"{os.environ['PYTHONPATH']}:{a.vllm}"
        command = [sys.executable, __file__, "--out", a.out, "--prompts", str(a.prompts), "--side", folder]
        subprocess.run(command, env=os.environ | ENVIRONMENT | {"PYTHONPATH": path})


if __name__ == "__main__":
    main()
