"""What a DPO step, reference log-probs, scoring and sampling cost against N, prompt length, pairs and model size.

    python benchmarks/scale.py            # two or three minutes on a quiet core: what `make bench` does after bench.py
    python benchmarks/scale.py --quick    # a corner of the grid, printed and not written

Every point runs the package's own code on one core and is predicted by runner/cost.py, the model behind `make plan`.
Four numbers of its device are fitted to two thirds of the points, by least squares of the relative error; the others
are predicted. Writes benchmarks/scale.json and the section of docs/measured.md between <!-- scale --> and <!-- end -->.
"""

import argparse
import itertools
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from bench import ROOT, machine, rewrite
from tqdm import tqdm

from roads import candidates, generate, model, schema, stage
from roads.preference_losses import dpo_loss
from roads.runner import cost, devices
from roads.tldr import EOS

RESULTS = Path(__file__).resolve().parent / "scale.json"
VOCAB, RESPONSE = 2048, 24
SHAPES = [(64, 2), (128, 3), (192, 4)]  # width and layers
PROMPTS = [64, 128, 256, 512]  # tokens
N = [1, 2, 5, 10, 25]
PAIRS = [4, 16]
TOKENS = 1024  # of the prompts that are sampled, or scored, at once
SECONDS = 0.2  # a point is measured until that has passed, twice at least
QUICK = {"shapes": SHAPES[:1], "prompts": [64, 128], "n": [1, 5], "pairs": [4]}


def grid(shapes=SHAPES, prompts=PROMPTS, n=N, pairs=PAIRS) -> list[dict]:
    """The points: what is done, and how much of it."""
    points = []
    for (width, layers), prompt in itertools.product(shapes, prompts):
        at = {"hidden_size": width, "layers": layers, "prompt": prompt}
        points += [at | {"what": what, "n": 2, "rows": rows} for what in ("DPO step", "reference") for rows in pairs]
        points += [at | {"what": what, "n": count, "rows": max(4, TOKENS // prompt)}
                   for what in ("scoring", "sampling") for count in n]
    return points


def block(point: dict) -> dict:
    """A point as a block of params.yaml, as far as the cost model reads it."""
    return {"source": {"kind": "jsonl", "vocab_size": VOCAB, "max_query_tokens": point["prompt"],
                       "max_response_tokens": RESPONSE},
            "model": {"kind": "new", "hidden_size": point["hidden_size"], "layers": point["layers"]}}


def work(point: dict) -> cost.Work:
    """What the cost model thinks that a point does."""
    c, rows = cost.Command("", [], {}, block(point)), point["rows"]
    if point["what"] == "DPO step":
        return cost.train(c, rows, {"batch_size": rows, "epochs": 1}, sides=2, words=2 * RESPONSE)
    if point["what"] == "sampling":
        return cost.sample(c, rows, {"n": point["n"], "temperature": 1.0})
    return cost.score(c, rows, point["n"], policies=int(point["what"] == "reference"))


def runs(point: dict):
    """A function that does a point once. No two completions share a prefix, as the cost model has it."""
    torch.manual_seed(0)
    size = {name: point[name] for name in ("hidden_size", "layers")}
    policy = model.new_policy(schema.FromScratch(kind="new", heads=2, max_positions=1024, **size), VOCAB, seed=0).eval()
    rows, n = point["rows"], point["n"]
    query = torch.randint(2, VOCAB, (rows, point["prompt"]))
    completions = torch.randint(2, VOCAB, (rows, n, RESPONSE))
    completions[..., -1] = EOS
    if point["what"] == "DPO step":
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6)

        def step():
            logps = model.pair_logps(policy, query, completions[:, 0], completions[:, 1])
            dpo_loss(*logps, *[part.detach() for part in logps], beta=0.05).mean().backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return step
    if point["what"] == "sampling":
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            policy.get_output_embeddings().weight[EOS] = 0  # nearly all of them run to the end
        return lambda: generate.complete(policy, query, n, RESPONSE, 1.0, generator)
    if point["what"] == "reference":
        return lambda: candidates.in_batches(candidates.logps, policy, query, completions, label="")
    rm = model.RewardModel(policy.base_model).eval()
    return lambda: candidates.in_batches(candidates.rewards, rm, query, completions, label="")


def seconds(run) -> float:
    """The median of at least two runs, after a warm-up."""
    run()
    taken = []
    while len(taken) < 2 or sum(taken) < SECONDS and len(taken) < 20:
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def fit(points: list[dict]) -> dict[str, float]:
    """flops, decode, step and layer of devices.Device, by least squares of the relative error; no term below 0."""
    from scipy.optimize import nnls

    works = [work(point) for point in points]
    terms = np.array([[w.flops, w.decoded / 1e9, w.steps, w.layers] for w in works])
    measured = np.array([point["measured"] for point in points])
    per_flop, per_decoded, step, layer = map(float, nnls(terms / measured[:, None], np.ones(len(points)))[0])
    return {"flops": 1 / max(per_flop, 1e-15), "decode": 1 / max(per_decoded, 1e-6), "step": step, "layer": layer}


def predicted(point: dict, fitted: dict) -> float:
    return work(point).seconds(devices.Device(**fitted, startup=0))


def scale(points: list[dict]) -> dict:
    """Measure every point, fit two thirds of them and predict all."""
    torch.set_num_threads(1)
    for point in tqdm(points, desc="scale", unit="point"):
        point["measured"] = seconds(runs(point))
    order = np.random.default_rng(0).permutation(len(points))
    for i, point in zip(order, points, strict=True):
        point["held_out"] = bool(i % 3 == 0)
    fitted = fit([point for point in points if not point["held_out"]])
    for point in points:
        point["modelled"] = predicted(point, fitted)
    held = [abs(point["modelled"] / point["measured"] - 1) for point in points if point["held_out"]]
    return {"machine": machine(1, None), "vocab_size": VOCAB, "response": RESPONSE, "fit": fitted,
            "held_out": {"points": len(held), "median": statistics.median(held), "largest": max(held),
                         "within_30": sum(away <= 0.3 for away in held) / len(held)}, "points": points}


def section(found: dict) -> str:
    """The table: measured seconds of a prompt, a pair for training, and what the model says."""
    cells = {}
    for p in found["points"]:
        shape = f"{p['hidden_size']}, {p['layers']}"
        what = p["what"] + {"DPO step": f", {p['rows']} pairs", "reference": f", {p['rows']} pairs"}.get(
            p["what"], f", N = {p['n']}")
        cells.setdefault((what, shape), {})[p["prompt"]] = p
    prompts = sorted({p["prompt"] for p in found["points"]})
    lines = ["| milliseconds a prompt, or pair: measured (modelled) | width, layers | " +
             " | ".join(f"prompt of {prompt}" for prompt in prompts) + " |", "|---" * (2 + len(prompts)) + "|"]
    for (what, shape), row in cells.items():
        said = [f"{1e3 * p['measured'] / p['rows']:.3g} ({1e3 * p['modelled'] / p['rows']:.3g})" if p else ""
                for p in map(row.get, prompts)]
        lines.append(f"| {what} | {shape} | {' | '.join(said)} |")
    fitted, held, on = found["fit"], found["held_out"], found["machine"]
    return "\n".join([
        *lines, "", f"{on['cpu']}, one core; responses of {found['response']} tokens, none of which share a prefix.",
        f"Fitted: {fitted['flops']:.3g} FLOP/s; {fitted['decode']:.3g} tokens/s of a model of 1e9 parameters; on top "
        f"{1e3 * fitted['step']:.2g} ms an optimiser step and {1e3 * fitted['layer']:.2g} ms a layer of a batch.",
        f"{held['points']} points were not fitted: the model is off by {held['median']:.0%} in the median and by "
        f"{held['largest']:.0%} at most; {held['within_30']:.0%} of them are within 30%."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a corner of the grid; writes nothing")
    a = parser.parse_args()
    found = scale(grid(**QUICK) if a.quick else grid())
    print(section(found))
    if not a.quick:
        stage.write_json(RESULTS, found)
        rewrite(ROOT / "docs/measured.md", section(stage.read_json(RESULTS)), "scale")


if __name__ == "__main__":
    stage.main(main)
