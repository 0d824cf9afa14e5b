"""Choose mini's hyperparameters on development seeds, and record what was tried: `make search`.

All of it runs in two worlds of its own, 100 and 101, with a training seed of the same number each; the figures use
other worlds and seeds 0 to 9. First offline DPO alone is brought to its best; online DPO then takes the same values and
adds only its sampling temperature, shown for both tasks. The reward models are chosen by their log loss on held-out
pairs. Then the epochs for other numbers of pairs, other losses, and both methods anew for each kind of reward of the
figures `learnt` and `learnt_bases` where the reward model fell behind; for points with short summaries first the epochs
of their base; and both methods for each point of a dial. Cells already in runs/.search are not run again.
Writes docs/search.csv and the tables of docs/search.md.
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

from roads import config, schema, stage
from roads.stages import arm, base, data, dpo, evaluate, kl, likelihood, rank, reward, sample, sft

RUNS, DOCS = Path("runs/.search"), Path("docs")
WORLDS = (100, 101)  # a world's training seed is its own number
DPO = {"lr": (1e-4, 3e-4, 1e-3), "beta": (0.02, 0.05, 0.1, 0.2), "epochs": (1, 2, 4)}
DPO_ROUGE = {"lr": (1e-4, 3e-4), "beta": (0.05, 0.2), "epochs": (1, 2)}
LOCAL = {"lr": (1e-4, 3e-4, 1e-3), "beta": (0.05, 0.1, 0.2, 0.5), "epochs": (1,)}
REWARD = {"lr": (3e-4, 5e-4, 1e-3, 2e-3), "epochs": (1,)}
TEMPERATURES = {"temperature": (0.1, 0.25, 0.5)}
# Epochs where there are fewer pairs, or more, than params.yaml has: fair to both methods, for the figure `learnt`.
PAIRS = {375: (1, 2, 4, 8, 16, 32), 1500: (1, 2, 4, 8, 16), 24000: (1, 2)}
# Other values at which offline DPO is about as good: does the gap hang on the choice?
ALIKE = [{"lr": 1e-4, "beta": 0.02, "epochs": 2}, {"lr": 1e-4, "beta": 0.05, "epochs": 4},
         {"lr": 3e-4, "beta": 0.1, "epochs": 2}, {"lr": 3e-4, "beta": 0.1, "epochs": 1}]
# Other losses, at offline DPO's learning rate and epochs: at which beta is each at its best (figure `methods`)?
METHODS = {"dpo": (0.02, 0.05, 0.1, 0.2, 0.5), "ipo": (0.02, 0.05, 0.1, 0.2, 0.5), "simpo": (0.05, 0.1, 0.2, 0.5),
           "chi_po": (0.02, 0.05, 0.1, 0.2, 0.5)}
KL = (0.001, 0.01, 0.1)  # the weight in dpo_kl, at DPO's beta
# What readers may like instead (arms of `learnt` and `learnt_bases`), and what is tried for each (figure `tuned`).
LIKED = {"learnt": ("coherence", "counts", "order"), "learnt_bases": ("blind", "topical", "alone")}
LIKED_DPO = {"lr": (1e-4, 3e-4), "epochs": (1, 2, 4)}
LIKED_REWARD = {"lr": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3), "epochs": (1, 2, 4)}
# The points of the dials whose world, documents or model are not mini's: both methods for each of them.
DIALS = {"verifier": ("tag2",), "complexity": ("additive", "complex"), "sizes": ("small", "large"), "fig10": ("k2",),
         "horizon": ("k4", "k12"), "branching": ("k2", "k4")}
VALID, MOST = 0.999, 16  # share of SFT's words that are the prompt's, and epochs of a base at most
DIALS_REWARD = {"lr": (5e-4, 1e-3, 2e-3, 4e-3), "epochs": (1, 2, 4)}


def changed(cfg: schema.Scale, block: str, **values) -> schema.Scale:
    return cfg.model_copy(update={block: getattr(cfg, block).model_copy(update=values)})


def once(out: Path, function, *args, **options) -> Path:
    """Run a stage quietly unless its output is there."""
    if not out.exists():
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            function(*args, **options)
    return out


def home(cfg: schema.Scale) -> Path:
    """Where a world's cells are; one whose readers like something else, or another base, has a place of its own."""
    name = f"world{cfg.source.seed}"
    own, mini = (schema.used(each, "source", "model", "base") for each in (cfg, plain(cfg)))
    return RUNS / (name if own == mini else f"{name}-{stage.fingerprint(own, [])}")


def plain(cfg: schema.Scale) -> schema.Scale:
    """mini's own kind of reward in the same world."""
    return changed(config.load_scale("mini"), "source", seed=cfg.source.seed)


def prepare(cfg: schema.Scale, tasks: tuple[str, ...] = ("human", "rouge")) -> None:
    """A world's data, base, SFT policy and pairs. Where documents are those of mini's own reward, so are the models."""
    runs = home(cfg)
    start = home(plain(cfg)) if cfg.made_from() == plain(cfg).made_from() else runs
    once(runs / "data", data.data, None, runs / "data", cfg)
    once(start / "data", data.data, None, start / "data", plain(cfg))
    once(start / "base", base.base, start / "data", start / "base", cfg)
    once(start / "sft", sft.sft, start / "data", start / "base", start / "sft", cfg)
    if not (runs / "sft").exists():
        (runs / "sft").symlink_to((start / "sft").absolute())
    for task, split in itertools.product(tasks, ("preferences", "valid")):
        where = runs / task / split
        drawn, pairs = where / "candidates", where / "pairs"
        once(drawn, sample.sample, runs / "sft", runs / f"data/{split}.npz", drawn, cfg, task, 0)
        once(pairs, rank.rank, drawn, pairs, cfg, task, data=runs / "data", split=split)


def prepare_pairs(cfg: schema.Scale, n: int) -> None:
    """Pairs of the first n prompts, labelled as an arm of that many has them."""
    where = home(cfg) / f"human{n}/preferences"
    rows = arm.splits(home(cfg) / "data", changed(cfg, "data", preferences=n, online=n))["preferences"]
    where.mkdir(parents=True, exist_ok=True)
    if not (where / "prompts.npz").exists():
        np.savez(where / "prompts.npz", **rows)
    drawn = where / "candidates"
    once(drawn, sample.sample, home(cfg) / "sft", where / "prompts.npz", drawn, cfg, "human", 0)
    once(where / "pairs", rank.rank, drawn, where / "pairs", cfg, "human", data=home(cfg) / "data")


def metrics(folder: Path) -> dict:
    return stage.read_json(folder / "metrics.json")


def score(policy: Path, task: str, cfg: schema.Scale) -> dict:
    """Mean score of a policy on the task's test prompts."""
    done, out = policy / "completions", policy / "scores"
    once(done, sample.sample, policy, home(cfg) / f"data/test_{task}.npz", done, cfg, "evaluate", cfg.source.seed)
    found = metrics(once(out, evaluate.evaluate, done, home(cfg) / "data", out, cfg, task))
    return {"score": found["mean_score"]} | ({"validity": found["validity"]} if task == "human" else {})


def likely(path: Path, task: str, cfg: schema.Scale, kind: str) -> dict:
    out, valid = path / "likelihood", home(cfg) / task / "valid/pairs"
    found = metrics(once(out, likelihood.likelihood, path, valid, home(cfg) / "sft", out, cfg, kind))
    return {"likelihood": found["mean_score"], "log_loss": found["log_loss"], "accuracy": found["accuracy"]}


def place(cfg: schema.Scale, task: str, kind: str, values: dict) -> Path:
    return home(cfg) / task / kind / "_".join(value if isinstance(value, str) else f"{key}{value:g}"
                                              for key, value in values.items())


def train(cfg: schema.Scale, kind: str, task: str, values: dict) -> Path:
    """A reward model or policy trained from SFT with these values, on the pairs of a task, or on `human375`'s 375."""
    cfg, out = changed(cfg, kind, **values), place(cfg, task, kind, values)
    inputs = home(cfg) / task / "preferences/pairs", home(cfg) / "sft", out, cfg, cfg.source.seed
    if kind == "reward":
        return once(out, reward.reward, *inputs)
    return once(out, dpo.dpo, *inputs, local=kind == "local")


def cell(cfg: schema.Scale, kind: str, task: str, values: dict) -> dict:
    """Train and score one setting in one world."""
    if kind in ("online", "methods"):
        found = online(cfg, task, values) if kind == "online" else method(cfg, values)
    else:
        out, used = train(cfg, kind, task, values), changed(cfg, kind, **values)
        task_of = task.rstrip("0123456789")
        found = likely(out, task_of, used, kind) | (score(out, task_of, used) if kind == "dpo" else {})
    return {"kind": kind, "task": task, "world": cfg.source.seed, "seed": cfg.source.seed, **values, **found}


def online(cfg: schema.Scale, task: str, values: dict) -> dict:
    """Online DPO with the very values of offline DPO, and the reward model of params.yaml."""
    same = {key: values[key] for key in DPO}
    offline = train(cfg, "dpo", task, same)
    twice = train(cfg, "dpo", task, same | {"epochs": 2 * same["epochs"]})
    rm = train(cfg, "reward", task, {key: getattr(cfg.reward, key) for key in REWARD})
    cfg = changed(cfg, "dpo", **same)
    cfg = cfg.model_copy(update={"samples": changed(
        cfg.samples, "online", temperature=values["temperature"], logits_divided_by=values["temperature"])})
    # What its samples are ranked by is part of the place: another learning rate in params.yaml is another cell.
    out, seed = place(cfg, task, f"online/{rm.name}", values), cfg.source.seed
    drawn, pairs, policy = out / "candidates", out / "pairs", out / "policy"
    once(drawn, sample.sample, offline, home(cfg) / "data/preferences.npz", drawn, cfg, "online", seed)
    once(pairs, rank.rank, drawn, pairs, cfg, "reward", model=rm)
    once(policy, dpo.dpo, pairs, offline, policy, cfg, seed, online=True)
    return {"dpo": score(offline, task, cfg)["score"], "dpo_2x": score(twice, task, cfg)["score"],
            **score(policy, task, cfg), "dropped_ties": metrics(pairs)["dropped_as_ties"]}


def method(cfg: schema.Scale, values: dict) -> dict:
    """Offline training with another loss: winrate, validity, and KL from SFT."""
    out, weight = train(cfg, "dpo", "human", values), {"kl_weight": values["kl"]} if "kl" in values else {}
    return weight | score(out, "human", cfg) | kl.mean_kl(out, home(cfg) / "sft", home(cfg) / "data" / kl.PROMPTS, cfg,
                                                 cfg.source.seed)


def settings(grid: dict) -> list[dict]:
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def methods() -> list[dict]:
    """Every loss at its betas, and dpo_kl at DPO's own beta with several weights of the KL."""
    return [{"loss": loss, "beta": beta} for loss, betas in METHODS.items() for beta in betas] + [
        {"loss": "dpo_kl", "kl": weight} for weight in KL]


def run(jobs: list[tuple], label: str) -> list[dict]:
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        futures = [pool.submit(cell, *job) for job in jobs]
        return [future.result() for future in tqdm(futures, desc=label, unit="cell")]


def in_worlds(figure: str, arm: str) -> list[tuple[str, schema.Scale]]:
    """An arm's name, its figure before it where that is a dial, and its block, for every world."""
    name, cfg = arm if figure.startswith("learnt") else f"{figure}.{arm}", config.load().arms_of("mini", figure)[arm]
    return [(name, changed(cfg, "source", seed=seed)) for seed in WORLDS]


def cells_of(kind: str, cells: list[tuple[str, schema.Scale, dict]]) -> list[dict]:
    rows = run([(cfg, kind, "human", values) for _, cfg, values in cells], kind)
    return [row | {"task": name} for (name, *_), row in zip(cells, rows, strict=True)]


def best(rows: list[dict]) -> tuple[float, int]:
    """Learning rate and epochs of the lowest mean log loss."""
    losses: dict[tuple, list[float]] = {}
    for row in rows:
        losses.setdefault((row["lr"], row["epochs"]), []).append(row["log_loss"])
    return min(losses, key=lambda setting: np.mean(losses[setting]))


def lower(rows: list[dict]) -> list[dict]:
    """Half of a grid's lowest learning rate, where the best is there."""
    lr, lrs, epochs = best(rows)[0], *({row[key] for row in rows} for key in ("lr", "epochs"))
    return settings({"lr": (lr / 2,), "epochs": sorted(epochs)}) if lr == min(lrs) else []


def longer(rows: list[dict]) -> list[dict]:
    """Twice a grid's most epochs, where the best is there: at its learning rate and at half of it."""
    lr, epochs = best(rows)
    return settings({"lr": (lr / 2, lr), "epochs": (2 * epochs,)}) if epochs == max(r["epochs"] for r in rows) else []


def search_each(group: str, names: list[tuple[str, str]], grid: dict, grows: bool) -> dict[str, list[dict]]:
    """Offline DPO and the reward model, each by itself, for every one of these arms, at 6,000 pairs."""
    found: dict[str, list[dict]] = {f"{group}_dpo": [], f"{group}_reward": []}
    for each in names:
        blocks = in_worlds(*each)
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            list(tqdm(pool.map(prepare, *zip(*[(cfg, ("human",)) for _, cfg in blocks])), total=len(blocks),
                      desc=".".join(each)))
        found[f"{group}_dpo"] += cells_of("dpo", [(*at, values) for at in blocks for values in settings(LIKED_DPO)])
        rows = cells_of("reward", [(*at, values) for at in blocks for values in settings(grid)])
        for past in (lower, longer) if grows else ():
            if more := [(*at, values) for at in blocks for values in past(rows)]:
                rows += cells_of("reward", more)
        found[f"{group}_reward"] += rows
    return found


def writes(cfg: schema.Scale) -> dict:
    """How well a world's SFT policy writes."""
    prepare(cfg, ())
    return {"kind": "sft", "world": cfg.source.seed, "seed": cfg.source.seed, "epochs": cfg.base.epochs,
            **score(home(cfg) / "sft", "human", cfg)}


def search_bases(names: list[tuple[str, str]]) -> list[dict]:
    """SFT of each of these arms whose summaries are shorter than mini's, with as many epochs of its base as mini's,
    twice as many and so on, until its words are the prompt's."""
    mini, rows = config.load_scale("mini"), []
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for each in names:
            worlds, epochs, valid = in_worlds(*each), mini.base.epochs, 0.0
            if worlds[0][1].source.slots >= mini.source.slots:
                continue
            while valid < VALID and epochs <= MOST:
                blocks = [changed(cfg, "base", epochs=epochs) for _, cfg in worlds]
                found = list(tqdm(pool.map(writes, blocks), total=len(blocks), desc=f"{'.'.join(each)}, base {epochs}"))
                rows += [row | {"task": name} for (name, _), row in zip(worlds, found, strict=True)]
                epochs, valid = 2 * epochs, np.mean([row["validity"] for row in found])
    return rows


def points(arms: dict[str, tuple[str, ...]]) -> list[tuple[str, str]]:
    return [(figure, arm) for figure, those in arms.items() for arm in those]


def table(rows: list[dict], columns: list[str], by: list[str]) -> list[str]:
    """Markdown: one line a setting, the mean over seeds of every column."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(key, "") for key in by), []).append(row)
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
        "online": (["dpo", "dpo_2x", "score", "validity", "dropped_ties"], ["task", *DPO, "temperature"]),
        "epochs": (["score", "validity", "accuracy", "log_loss"], ["kind", "task", "epochs"]),
        "methods": (["score", "validity", "kl"], ["loss", "beta", "kl_weight"]),
        "liked_dpo": (["score", "validity", "accuracy"], ["task", *LIKED_DPO]),
        "liked_reward": (["likelihood", "log_loss", "accuracy"], ["task", *LIKED_REWARD]),
        "bases": (["score", "validity"], ["task", "epochs"]),
        "dials_dpo": (["score", "validity", "accuracy"], ["task", *LIKED_DPO]),
        "dials_reward": (["likelihood", "log_loss", "accuracy"], ["task", *DIALS_REWARD]),
    }
    text = (DOCS / "search.md").read_text(encoding="utf-8")
    for kind, group in results.items():
        block = "\n".join(table(group, *shown[kind]))
        between = re.compile(f"(?<=<!-- {kind} -->\n).*?(?=<!-- end -->)", re.S)
        text = between.sub(lambda _, block=block: block + "\n", text, count=1)  # of an empty match and the next
    (DOCS / "search.md").write_text(text, encoding="utf-8")


def main() -> None:
    mini = config.load_scale("mini")
    worlds = [changed(mini, "source", seed=seed) for seed in WORLDS]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        list(tqdm(pool.map(prepare, worlds), total=len(worlds), desc="worlds", unit="world"))
    chosen = {key: getattr(mini.dpo, key) for key in DPO}
    swept = [chosen | warm for warm in settings(TEMPERATURES)]
    plan = {
        "dpo": {"human": settings(DPO), "rouge": settings(DPO_ROUGE)},
        "local": {"human": settings(LOCAL)},
        "reward": {"human": settings(REWARD), "rouge": settings(REWARD)},
        "online": {"human": swept + [other | {"temperature": 0.1} for other in ALIKE], "rouge": swept},
        "methods": {"human": [chosen | other for other in methods()]},
    }
    pairs = [(cfg, n) for cfg in worlds for n in PAIRS]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        list(tqdm(pool.map(prepare_pairs, *zip(*pairs)), total=len(pairs), desc="pairs", unit="set"))
    results = {kind: run([(cfg, kind, task, values) for task, cells in tasks.items() for values in cells
                          for cfg in worlds], kind) for kind, tasks in plan.items()}
    results["epochs"] = run([(cfg, kind, f"human{n}", {key: getattr(getattr(mini, kind), key) for key in keys} |
                              {"epochs": epochs}) for kind, keys in (("dpo", ("lr", "beta")), ("reward", ("lr",)))
                             for n, many in PAIRS.items() for epochs in many for cfg in worlds], "epochs")
    results["bases"] = search_bases(points(DIALS))
    for group, arms, grid in (("liked", LIKED, LIKED_REWARD), ("dials", DIALS, DIALS_REWARD)):
        results |= search_each(group, points(arms), grid, grows=group == "dials")
    write(results)


if __name__ == "__main__":
    stage.main(main)
