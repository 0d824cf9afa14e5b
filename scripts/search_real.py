"""Choose a scale's numbers by the rules of docs/real.md, on its development posts and on seeds from 100 on.

    make search SCALE=real

The reward model's learning rate and then its epochs by log loss, offline DPO's learning rate and epochs by winrate,
then its β; online DPO takes what offline DPO has. A scale of a CPU has one seed and at most two epochs. All cells of
one seed come before those of the next, JOBS of them at once. A cell that is in runs/.search is not run again, so that
a killed search continues. Writes docs/search_<scale>.csv after every cell, and says what belongs into params.yaml.
"""

import argparse
import csv
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from math import sqrt
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from search import changed, metrics, once, settings
from tqdm import tqdm

from roads import active, config, schema, stage
from roads.process import end_with_parent
from roads.runner import preflight
from roads.stages import base, data, dpo, evaluate, likelihood, rank, reward, sample, sft

SEEDS = (100, 101)
DPO = {"lr": (1e-5, 3e-5, 1e-4, 3e-4), "beta": (0.05, 0.1, 0.3), "epochs": (1, 2, 4)}
BETA = 0.1  # at which learning rate and epochs are chosen; β then at these
DEVELOPMENT = 600  # posts of data/tldr
REWARD = {"lr": (3e-5, 1e-4, 3e-4, 1e-3), "epochs": (1, 2)}
COLUMNS = ["kind", "seed", *DPO, "winrate", "prompts", "log_loss"]


def of_development(cfg: schema.Scale) -> schema.Scale:
    """The scale with its development posts in the place of those of the report, half of them for each split."""
    if cfg.source.kind != "posts":
        return cfg
    fewer = {name: min(getattr(cfg.data, name), DEVELOPMENT // 2) for name in ("valid", "test", "best_of_n")}
    return changed(changed(cfg, "source", held_out="development"), "data", **fewer)


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
    """Train with these values from one seed, and score on development posts; the model is thrown away."""
    cfg = changed(cfg, kind, **values)
    out = runs / kind / "_".join(f"{key}{value:g}" for key, value in values.items()) / f"s{seed}"
    pairs, start, net, done = runs / "preferences/pairs", runs / "sft", out / "model", out / "scores"
    if not done.exists():
        if kind == "reward":
            once(net, reward.reward, pairs, start, net, cfg, seed)
            once(done, likelihood.likelihood, net, runs / "valid/pairs", start, done, cfg, "reward")
        else:
            once(net, dpo.dpo, pairs, start, net, cfg, seed)
            drawn = out / "completions"
            once(drawn, sample.sample, net, runs / "data/test_human.npz", drawn, cfg, "evaluate", seed)
            once(done, evaluate.evaluate, drawn, runs / "data", done, cfg, "human")
    shutil.rmtree(net, ignore_errors=True)
    if kind == "reward":
        found = {"log_loss": metrics(done)["log_loss"]}
    else:
        with np.load(done / "scores.npz") as file:
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

    A setting is as good as the best where its winrate is within one standard error, that of a share of all prompts
    judged. Of DPO's learning rates and epochs at BETA the fewest epochs that are as good, then the better one; of the
    βs at these the largest that is as good. The reward model has what gives the lowest log loss.
    """
    winrate = means(rows, "dpo", list(DPO), "winrate")
    judged = sum(row["prompts"] for row in rows if row["kind"] == "dpo") / len(winrate)

    def as_good(settings: list[tuple]) -> list[tuple]:
        best = max(winrate[values] for values in settings)
        return [values for values in settings if winrate[values] >= best - sqrt(best * (1 - best) / judged)]

    first = min(as_good([values for values in winrate if values[1] == BETA]),
                key=lambda values: (values[2], -winrate[values]))
    there = as_good([values for values in winrate if values[::2] == first[::2]])
    losses = means(rows, "reward", list(REWARD), "log_loss")
    return {"dpo": dict(zip(DPO, max(there, key=lambda values: values[1]))),
            "reward": dict(zip(REWARD, min(losses, key=losses.__getitem__)))}


def write(rows: list[dict], path: Path) -> None:
    path.parent.mkdir(exist_ok=True)  # a kit has no docs
    with stage.writing(path) as scratch, scratch.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()}
                         for row in rows)


def cells(runs: Path, cfg: schema.Scale, plan: list[tuple], jobs: int) -> Iterator[tuple[int, dict]]:
    """The number of every cell of a plan and what it found, as they are done."""
    if jobs == 1:
        yield from ((i, cell(runs, cfg, *it)) for i, it in enumerate(plan))
        return
    os.environ[stage.STAGES_PER_GPU] = str(jobs)
    # Not forks: this process may have used the GPU.
    with ProcessPoolExecutor(jobs, get_context("spawn"), end_with_parent, (os.getpid(),)) as pool:
        futures = {pool.submit(cell, runs, cfg, *it): i for i, it in enumerate(plan)}
        try:
            yield from ((futures[future], future.result()) for future in as_completed(futures))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def search(cfg: schema.Scale, runs: Path, out: Path, jobs: int = 1) -> dict[str, dict]:
    """Run the cells that are not there yet, `jobs` at once; what the rules choose."""
    cfg, rows = of_development(cfg), []
    on_cpu = cfg.compute.device == "cpu"  # where a cell takes up to half an hour
    seeds, grid = SEEDS[:1] if on_cpu else SEEDS, [it for it in settings(DPO) if it["epochs"] <= 2 or not on_cpu]
    prepare(runs, cfg)

    def run(label: str, **asked: list[dict]) -> None:
        plan = [(kind, values, seed) for seed in seeds for kind, several in asked.items() for values in several]
        found = {}
        for number, row in tqdm(cells(runs, cfg, plan, jobs), total=len(plan), desc=label, unit="cell"):
            found[number] = row
            write(rows + [found[i] for i in sorted(found)], out)
        rows.extend(found[i] for i in sorted(found))

    of_reward = settings(REWARD)
    run("learning rates and epochs", reward=[it for it in of_reward if it["epochs"] == 1],
        dpo=[it for it in grid if it["beta"] == BETA])
    first = chosen(rows)
    run("β, and the reward model's epochs",
        reward=[it for it in of_reward if it["lr"] == first["reward"]["lr"] and it["epochs"] > 1],
        dpo=[it for it in grid if it["beta"] != BETA and it == first["dpo"] | {"beta": it["beta"]}])
    return chosen(rows)


def _command() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", required=True, help="a block of params.yaml")
    parser.add_argument("--jobs", type=int, help="cells at once (default: as many as share the GPU, or one)")
    asked = parser.parse_args()
    cfg, out = config.load_scale(asked.scale), Path("docs") / f"search_{asked.scale}.csv"
    jobs = preflight.stages_per_gpu(cfg, [cfg], asked.jobs)
    jobs = jobs if cfg.compute.device == "gpu" else asked.jobs or 1
    for block, values in search(cfg, Path("runs/.search") / asked.scale, out, jobs).items():
        print(f"params.yaml: {asked.scale}.{block}: " + ", ".join(f"{key}: {value:g}" for key, value in values.items()))
    print(f"{out} has every cell.")


if __name__ == "__main__":
    stage.main(_command)
