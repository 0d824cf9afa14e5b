"""Stage arm: one seed of the whole comparison from the SFT checkpoint on, in one process.

    python -m roads.stages.arm DATA SFT OUT --scale mini-k4 --seed 0

The points of a dial are many and small: this calls the same stages as the graph in the same order, keeps scores and
metrics, and throws the models away. For a block that the graph runs as well both give the same bits. What a killed
run had finished lies in runs/.scratch and is taken from there.
"""

import contextlib
import io
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from roads import arrays, config, distributed, schema, stage
from roads.stages import data, dpo, evaluate, kl, likelihood, rank, reward, sample


class Steps:
    """Runs stages into folders under `where`, each once."""

    def __init__(self, where: Path, total: int, label: str):
        self.where, self.bar = where, tqdm(total=total, desc=label, unit="stage")

    def __call__(self, out: str, function: Callable, *args: object, **options: object) -> Path:
        """function(*args, **options) with the argument `...` standing for the folder that it writes; that folder."""
        path = self.where / out
        self.bar.set_postfix_str(out)
        if not path.exists():
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                function(*(path if arg is ... else arg for arg in args), **options)
        self.bar.update()
        return path


def splits(where: Path, cfg: schema.Scale) -> dict[str, dict[str, np.ndarray]]:
    """Rows of `preferences` and `online`, as many as the block asks for, of the data in a folder."""
    preferences, more = (arrays.tokens(where / f"{split}.npz", empty=split == "more")
                         for split in ("preferences", "more"))
    of_pairs = {name: preferences[name] for name in preferences if name not in more}  # where rows come with pairs
    n = min(cfg.data.preferences, len(preferences["query"])) if of_pairs else cfg.data.preferences
    return {"preferences": data.first(n, preferences, more) | {name: rows[:n] for name, rows in of_pairs.items()},
            "online": data.first(cfg.data.online, preferences, more)}


def arm(where: Path, sft: Path, out: Path, cfg: schema.Scale, seed: int) -> None:
    """Write scores.npz: <policy> [N], a score per prompt of test_human, for SFT and every policy of the block, and
    <policy>.quality [N] where it is known; metrics.json: each one's metrics and KL from SFT, those of the pairs, and
    how well the reward models tell held-out pairs apart."""
    torch.set_num_threads(cfg.machine.threads)
    used = schema.used(cfg, "compute", "policies", "source", "data", "reward", "dpo", "samples", "judge")
    used["seed"] = seed
    del used["samples"]["rouge"], used["samples"]["best_of_n"]
    key = stage.fingerprint(used, [where, sft], "arm")
    with stage.output(out, used, [where, sft]) as folder:
        run = Steps(distributed.SCRATCH / key, 6 + 2 * bool({"online", "online_sft"} & set(cfg.policies)) + sum(
            {"dpo": 4, "dpo_2x": 3, "online_sft": 5, "online": 5}[name] for name in cfg.policies), out.as_posix())
        run.where.mkdir(parents=True, exist_ok=True)
        for name, rows in splits(where, cfg).items():
            np.savez(run.where / f"{name}.npz", **rows)
        pairs, reward_model, policies, metrics = {}, None, {"sft": sft}, {}

        def held_out(net: Path, kind: str) -> dict[str, float]:
            """Mean probability and accuracy on held-out pairs (Fig 7)."""
            done = run(f"likelihood/{kind}", likelihood.likelihood, net, pairs["valid"], sft, ..., cfg, kind)
            found = stage.read_json(done / "metrics.json")
            return {"likelihood": found["mean_score"], "accuracy": found["accuracy"]}

        # A judge that is paid by the answer labels no pairs that nothing is trained on (Fig 6).
        paid = cfg.samples.human.labels == "judge" and cfg.judge.kind in schema.OUTSIDE
        labelled = {"preferences": run.where / "preferences.npz"} | ({} if paid else {"valid": where / "valid.npz"})
        for name, prompts in labelled.items():
            drawn = run(f"candidates/{name}", sample.sample, sft, prompts, ..., cfg, "human", 0)
            pairs[name] = run(f"pairs/{name}", rank.rank, drawn, ..., cfg, "human", data=where)
        metrics["pairs"] = stage.read_json(pairs["preferences"] / "metrics.json")
        if {"online", "online_sft"} & set(cfg.policies):
            reward_model = run("reward", reward.reward, pairs["preferences"], sft, ..., cfg, seed)
            metrics |= {"global": held_out(reward_model, "reward")} if "valid" in pairs else {}
        for name in cfg.policies:
            if name in ("dpo", "dpo_2x"):
                times = 2 if name == "dpo_2x" else 1
                policies[name] = run(name, dpo.dpo, pairs["preferences"], sft, ..., cfg, seed, times=times)
            else:
                start = policies["dpo"] if name == "online" else sft
                drawn = run(f"{name}_candidates", sample.sample, start, run.where / "online.npz", ..., cfg, "online",
                            seed if name == "online" else 0)
                ranked = run(f"{name}_pairs", rank.rank, drawn, ..., cfg, "reward", model=reward_model)
                policies[name] = run(name, dpo.dpo, ranked, start, ..., cfg, seed, online=True)
        if "dpo" in policies and "valid" in pairs:
            metrics["dpo_rm"] = held_out(policies["dpo"], "dpo")
        scores = {}
        for name, policy in policies.items():
            drawn = run(f"completions/{name}", sample.sample, policy, where / "test_human.npz", ..., cfg, "evaluate",
                        seed if name != "sft" else 0)
            done = run(f"scores/{name}", evaluate.evaluate, drawn, where, ..., cfg, "human")
            found = arrays.load(done / "scores.npz")
            scores |= {name: found["score"]} | ({f"{name}.quality": found["quality"]} if "quality" in found else {})
            metrics[name] = stage.read_json(done / "metrics.json")
            if name != "sft":
                with contextlib.redirect_stderr(io.StringIO()):
                    metrics[name] |= kl.mean_kl(policy, sft, where / kl.PROMPTS, cfg, seed)
        np.savez(folder / "scores.npz", **scores)
        stage.write_json(folder / "metrics.json", metrics)
    shutil.rmtree(run.where)


def _command() -> None:
    parser = stage.arguments(__doc__, "data", "sft", "out")
    parser.add_argument("--seed", type=stage.seed, required=True)
    a = parser.parse_args()
    arm(a.data, a.sft, a.out, config.load_scale(a.scale), a.seed)


if __name__ == "__main__":
    stage.main(_command)
