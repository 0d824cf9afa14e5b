"""Choose a scale's numbers by the rules of docs/real.md, on its development posts and on seeds from 100 on.

    make search SCALE=real

First the reward model's learning rate by log loss, then offline DPO's learning rate, β and epochs by winrate; online
DPO takes what offline DPO has. A cell that is in runs/.search is not run again, so that a killed search continues.
Writes docs/search_<scale>.csv after every cell, and says what belongs into params.yaml.
"""

import argparse
import csv
from collections import defaultdict
from math import sqrt
from pathlib import Path

import numpy as np
from search import changed, metrics, once, settings
from tqdm import tqdm

from roads import active, config, schema, stage
from roads.stages import base, data, dpo, evaluate, likelihood, rank, reward, sample, sft

SEEDS = (100, 101)
DPO = {"lr": (3e-6, 1e-5, 3e-5), "beta": (0.05, 0.1, 0.3), "epochs": (1, 2, 4)}
REWARD = {"lr": (3e-6, 1e-5, 3e-5)}
COLUMNS = ["kind", "seed", *DPO, "winrate", "prompts", "log_loss"]


def prepare(runs: Path, cfg: schema.Scale) -> None:
    """Data, SFT policy, and pairs to train on and held out."""
    source = None if cfg.synthetic else Path(active.DATA_FROM[cfg.source.kind])
    once(runs / "data", data.data, source, runs / "data", cfg)
    once(runs / "base", base.base if cfg.model.kind == "new" else base.fetch, runs / "data", runs / "base", cfg)
    once(runs / "sft", sft.sft, runs / "data", runs / "base", runs / "sft", cfg)
    for split in ("preferences", "valid"):
        drawn, pairs = runs / split / "candidates", runs / split / "pairs"
        once(drawn, sample.sample, runs / "sft", runs / f"data/{split}.npz", drawn, cfg, "human", 0)
        once(pairs, rank.rank, drawn, pairs, cfg, "human", data=runs / "data", split=split)


def cell(runs: Path, cfg: schema.Scale, kind: str, values: dict, seed: int) -> dict:
    """Train with these values from one seed, and score on development posts."""
    cfg = changed(cfg, kind, **values)
    out = runs / kind / "_".join(f"{key}{value:g}" for key, value in values.items()) / f"s{seed}"
    inputs = runs / "preferences/pairs", runs / "sft"
    if kind == "reward":
        once(out / "model", reward.reward, *inputs, out / "model", cfg, seed)
        once(out / "likelihood", likelihood.likelihood, out / "model", runs / "valid/pairs", runs / "sft",
             out / "likelihood", cfg, "reward")
        found = {"log_loss": metrics(out / "likelihood")["log_loss"]}
    else:
        once(out / "model", dpo.dpo, *inputs, out / "model", cfg, seed)
        once(out / "completions", sample.sample, out / "model", runs / "data/test_human.npz", out / "completions", cfg,
             "evaluate", seed)
        once(out / "scores", evaluate.evaluate, out / "completions", runs / "data", out / "scores", cfg, "human")
        with np.load(out / "scores/scores.npz") as file:
            found = {"winrate": float(file["score"].mean()), "prompts": len(file["score"])}
    return {"kind": kind, "seed": seed, **values, **found}


def means(rows: list[dict], kind: str, keys: list[str], measure: str) -> dict[tuple, float]:
    groups = defaultdict(list)
    for row in rows:
        if row["kind"] == kind:
            groups[tuple(row[key] for key in keys)].append(row[measure])
    return {values: float(np.mean(group)) for values, group in groups.items()}


def chosen(rows: list[dict]) -> dict[str, dict]:
    """What the rules make of the cells: for each block of params.yaml its values.

    Of DPO's settings within one standard error of the best winrate, that of a share of all prompts judged, the one with
    the fewest epochs, then the largest β, then the better one; the reward model's with the lowest log loss.
    """
    winrate = means(rows, "dpo", list(DPO), "winrate")
    best, judged = max(winrate.values()), sum(row["prompts"] for row in rows if row["kind"] == "dpo") / len(winrate)
    near = [values for values, mean in winrate.items() if mean >= best - sqrt(best * (1 - best) / judged)]
    first = min(near, key=lambda values: (values[2], -values[1], -winrate[values]))
    losses = means(rows, "reward", list(REWARD), "log_loss")
    return {"dpo": dict(zip(DPO, first)), "reward": dict(zip(REWARD, min(losses, key=losses.__getitem__)))}


def write(rows: list[dict], path: Path) -> None:
    with stage.writing(path) as scratch, scratch.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()}
                         for row in rows)


def search(cfg: schema.Scale, runs: Path, out: Path) -> dict[str, dict]:
    """Run the cells that are not there yet; what the rules choose."""
    if cfg.source.kind == "posts":
        cfg = changed(cfg, "source", held_out="development")
    prepare(runs, cfg)
    jobs = [(kind, values, seed) for kind, grid in (("reward", REWARD), ("dpo", DPO)) for values in settings(grid)
            for seed in SEEDS]
    rows = []
    for job in tqdm(jobs, desc="search", unit="cell"):
        rows.append(cell(runs, cfg, *job))
        write(rows, out)
    return chosen(rows)


def _command() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", required=True, help="a block of params.yaml")
    scale = parser.parse_args().scale
    out = Path("docs") / f"search_{scale}.csv"
    for block, values in search(config.load_scale(scale), Path("runs/.search") / scale, out).items():
        print(f"params.yaml: {scale}.{block}: " + ", ".join(f"{key}: {value:g}" for key, value in values.items()))
    print(f"{out} has every cell.")


if __name__ == "__main__":
    stage.main(_command)
