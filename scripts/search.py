"""Choose mini's hyperparameters on development seeds, and record what was tried: `make search`.

Everything here runs in a world of its own (world seed 100) with training seeds 100 and 101; the figures use world
seed 0 and seeds 0, 1, 2. First offline DPO alone is brought to its best; online DPO then takes the same values and
adds only its sampling temperature, shown for both tasks. The reward models are chosen by their log loss on held-out
pairs. Cells already in runs/.search are not run again. Writes docs/search.csv and the tables of docs/search.md.
"""

import contextlib
import csv
import io
import itertools
import os
import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from roads import base, config, data, dpo, evaluate, likelihood, rank, reward, sample, sft, stage

RUNS, DOCS = Path("runs/.search"), Path("docs")
WORLD_SEED, SEEDS, TASKS = 100, (100, 101), ("human", "rouge")
DPO = {"lr": (1e-4, 3e-4, 1e-3), "beta": (0.05, 0.1, 0.2), "epochs": (1, 2)}
LOCAL = {"lr": (1e-4, 3e-4, 1e-3), "beta": (0.1, 0.2, 0.5), "epochs": (1,)}
REWARD = {"lr": (3e-4, 5e-4, 1e-3), "epochs": (1, 2)}
TEMPERATURES = (0.1, 0.25, 0.5)


def changed(cfg: config.Scale, block: str, **values) -> config.Scale:
    return cfg.model_copy(update={block: getattr(cfg, block).model_copy(update=values)})


def once(out: Path, function, *args) -> Path:
    """Run a stage quietly unless its output is there."""
    if not out.exists():
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            function(*args)
    return out


def prepare(cfg: config.Scale) -> None:
    once(RUNS / "data", data.data, Path(config.WORLD_FILE), RUNS / "data", cfg)
    once(RUNS / "base", base.base, RUNS / "data", RUNS / "base", cfg)
    once(RUNS / "sft", sft.sft, RUNS / "data", RUNS / "base", RUNS / "sft", cfg)
    for task, split in itertools.product(TASKS, ("preferences", "valid")):
        where = RUNS / task / split
        once(where / "candidates", sample.sample, RUNS / "sft", RUNS / f"data/{split}.npz", where / "candidates", cfg, task, 0)
        once(where / "pairs", rank.rank, where / "candidates", where / "pairs", cfg, task, RUNS / "data", split)


def score(policy: Path, task: str, cfg: config.Scale, seed: int) -> dict:
    """Mean score of a policy on the task's test prompts."""
    done = once(policy / "completions", sample.sample, policy, RUNS / f"data/test_{task}.npz", policy / "completions", cfg,
                "evaluate", seed)
    found = stage.read_json(once(policy / "scores", evaluate.evaluate, done, RUNS / "data", policy / "scores", cfg, task)
                            / "metrics.json")
    return {"score": found["mean_score"], **({"validity": found["validity"]} if "validity" in found else {})}


def likely(path: Path, task: str, cfg: config.Scale, kind: str) -> dict:
    found = stage.read_json(once(path / "likelihood", likelihood.likelihood, path, RUNS / task / "valid/pairs", RUNS / "sft",
                                 path / "likelihood", cfg, kind) / "metrics.json")
    return {"likelihood": found["mean_score"], "log_loss": found["log_loss"], "accuracy": found["accuracy"]}


def cell(cfg: config.Scale, kind: str, task: str, seed: int, values: dict) -> dict:
    """Train and score one setting with one seed."""
    pairs, start = RUNS / task / "preferences/pairs", RUNS / "sft"
    out = RUNS / task / kind / "_".join(f"{k}{v:g}" for k, v in values.items()) / f"s{seed}"
    if kind == "online":
        cfg = cfg.model_copy(update={"samples": changed(cfg.samples, "online", **values)})
        offline, rm = RUNS / task / "chosen_dpo" / f"s{seed}", RUNS / task / "chosen_reward" / f"s{seed}"
        twice = RUNS / task / "chosen_dpo_2x" / f"s{seed}"
        once(offline, dpo.dpo, pairs, start, offline, cfg, seed)
        once(twice, dpo.dpo, pairs, start, twice, cfg, seed, 2)
        once(rm, reward.reward, pairs, start, rm, cfg, seed)
        drawn = once(out / "candidates", sample.sample, offline, RUNS / "data/preferences.npz", out / "candidates", cfg, "online", seed)
        best = once(out / "pairs", rank.rank, drawn, out / "pairs", cfg, "reward", None, "preferences", rm)
        policy = once(out / "policy", dpo.dpo, best, offline, out / "policy", cfg, seed, 1, True)
        found = {"dpo": score(offline, task, cfg, seed)["score"], "dpo_2x": score(twice, task, cfg, seed)["score"],
                 **score(policy, task, cfg, seed), "dropped_ties": stage.read_json(best / "metrics.json")["dropped_ties"]}
    elif kind == "reward":
        cfg = changed(cfg, "reward", **values)
        found = likely(once(out, reward.reward, pairs, start, out, cfg, seed), task, cfg, "reward")
    else:
        cfg = changed(cfg, kind, **values)
        policy = once(out, dpo.dpo, pairs, start, out, cfg, seed, 1, False, kind == "local")
        found = likely(policy, task, cfg, kind) | (score(policy, task, cfg, seed) if kind == "dpo" else {})
    return {"kind": kind, "task": task, "seed": seed, **values, **found}


def settings(grid: dict) -> list[dict]:
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def run(jobs: list[tuple], label: str) -> list[dict]:
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        futures = [pool.submit(cell, *job) for job in jobs]
        return [future.result() for future in tqdm(futures, desc=label, unit="cell")]


def table(rows: list[dict], columns: list[str], by: list[str]) -> list[str]:
    """Markdown: one line a setting, the mean over seeds of every column."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in by), []).append(row)
    lines = ["| " + " | ".join([*by, *columns]) + " |", "|" + "---|" * (len(by) + len(columns))]
    for key, group in groups.items():
        means = [f"{np.mean([r[c] for r in group]):.4f}" if c in group[0] else "" for c in columns]
        lines.append("| " + " | ".join([*(f"{k:g}" if isinstance(k, float | int) else k for k in key), *means]) + " |")
    return lines


def write(results: dict[str, list[dict]]) -> None:
    """All cells as csv; the tables between the markers of docs/search.md."""
    rows = [row for group in results.values() for row in group]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with (DOCS / "search.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    shown = {
        "dpo": (["score", "validity", "likelihood", "accuracy"], ["task", *DPO]),
        "local": (["likelihood", "log_loss", "accuracy"], ["task", *LOCAL]),
        "reward": (["likelihood", "log_loss", "accuracy"], ["task", *REWARD]),
        "online": (["dpo", "dpo_2x", "score", "validity", "dropped_ties"], ["task", "temperature"]),
    }
    text = (DOCS / "search.md").read_text(encoding="utf-8")
    for kind, group in results.items():
        block = "\n".join(table(group, *shown[kind]))
        text = re.sub(f"(<!-- {kind} -->\n).*?(<!-- end -->)", lambda m, b=block: f"{m[1]}{b}\n{m[2]}", text, flags=re.S)
    (DOCS / "search.md").write_text(text, encoding="utf-8")


def main() -> None:
    mini = config.load_scale("mini")
    cfg = changed(mini, "source", seed=WORLD_SEED)
    prepare(cfg)
    results = {}
    for kind, grid, tasks in (("dpo", DPO, TASKS), ("local", LOCAL, ("human",)), ("reward", REWARD, TASKS),
                              ("online", {"temperature": TEMPERATURES}, TASKS)):
        jobs = [(cfg, kind, task, seed, values) for task in tasks for values in settings(grid) for seed in SEEDS]
        results[kind] = run(jobs, kind)
    write(results)


if __name__ == "__main__":
    stage.main(main)
