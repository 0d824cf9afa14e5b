"""Stage arm: one seed of the whole comparison from the SFT checkpoint on, in one process.

    python -m roads.stages.arm DATA SFT OUT --scale mini.horizon.k4 --seed 0
    python -m roads.stages.arm DATA SFT OUT --scale mini --seed 3 --folders   # one more seed of the scale itself

The points of a dial are many and small: this calls the same stages as the graph in the same order, keeps scores and
metrics, and throws the models away. For a block that the graph runs as well both give the same bits. What a killed
run had finished is in runs/.scratch and is taken from there.
"""

import contextlib
import io
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from roads import arrays, config, schema, stage
from roads.stages import data, dpo, evaluate, kl, likelihood, rank, reward, sample, untrained


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


def arm(where: Path, sft: Path, out: Path, cfg: schema.Scale, seed: int, *, task: schema.Task = "human",
        folders: bool = False, judges: bool = False) -> None:
    """Write scores.npz: <policy> [N], a score per prompt of test_<task>, for SFT and every policy of the block, and
    <policy>.quality [N] where it is known; likelihood.<kind> [M], and .by_quality, of held-out pairs by every reward
    model. metrics.json: each policy's metrics and KL from SFT, those of the pairs, and how well the reward models tell
    held-out pairs apart.

    Args:
        folders: train the local RM too, and keep scores/<policy>, kl/<policy> and likelihood/<kind> as the graph does.
        judges: write untrained.<kind> [M] too, what judges held-out pairs without training (stage untrained).
    """
    if cfg.sizes:
        if folders or task != "human":
            raise stage.UserError("--task rouge, --folders: not for an arm that has sizes")
        return sweep(where, sft, out, cfg, seed)
    torch.set_num_threads(cfg.machine.threads)
    used = schema.used(cfg, "compute", "policies", "source", "data", "reward", "dpo", "samples", "judge",
                       *["local"] * folders)
    used |= {"dpo": cfg.dpo.told(), "seed": seed} | ({"rounds": cfg.rounds} if cfg.rounds > 1 else {})
    del used["samples"]["human" if task == "rouge" else "rouge"], used["samples"]["best_of_n"]
    key = stage.fingerprint(used, [where, sft], "arm", stage.code())
    with stage.output(out, used, [where, sft]) as folder:
        readers, has_online = task == "human", bool({"online", "online_sft"} & set(cfg.policies))
        total = 6 + 2 * has_online + (cfg.synthetic and readers) + 2 * folders + judges
        total += sum({"dpo": 5, "dpo_2x": 4}.get(name, 3 + 3 * cfg.rounds) for name in cfg.policies)
        run = Steps(stage.SCRATCH / key, total, out.as_posix())
        run.where.mkdir(parents=True, exist_ok=True)
        for name, rows in splits(where, cfg).items():
            np.savez(run.where / f"{name}.npz", **rows)
        pairs, reward_model, policies, metrics, scores = {}, None, {"sft": sft}, {}, {}

        def held_out(net: Path, kind: str) -> dict[str, float]:
            """Mean probability and accuracy on held-out pairs (Fig 7)."""
            done = run(f"likelihood/{kind}", likelihood.likelihood, net, pairs["valid"], sft, ..., cfg, kind)
            found = arrays.load(done / "scores.npz")
            scores[f"likelihood.{kind}"] = found.pop("score")
            scores.update({f"likelihood.{kind}.{name}": values for name, values in found.items()})
            found = stage.read_json(done / "metrics.json")
            return {"likelihood": found["mean_score"], "accuracy": found["accuracy"]}

        # A judge that is paid by the answer labels no pairs that nothing is trained on (Fig 6), unless they are kept.
        paid = readers and cfg.samples.human.labels == "judge" and cfg.judge.kind in schema.OUTSIDE and not folders
        labelled = {"preferences": run.where / "preferences.npz"} | ({} if paid else {"valid": where / "valid.npz"})
        for name, prompts in labelled.items():
            drawn = run(f"candidates/{name}", sample.sample, sft, prompts, ..., cfg, task, 0)
            pairs[name] = run(f"pairs/{name}", rank.rank, drawn, ..., cfg, task, data=where, split=name)
        metrics["pairs"] = stage.read_json(pairs["preferences"] / "metrics.json")
        if has_online:
            reward_model = run("reward", reward.reward, pairs["preferences"], sft, ..., cfg, seed)
            metrics |= {"global": held_out(reward_model, "reward")} if "valid" in pairs else {}
        for name in cfg.policies:
            if name in ("dpo", "dpo_2x"):
                times = 2 if name == "dpo_2x" else 1
                policies[name] = run(name, dpo.dpo, pairs["preferences"], sft, ..., cfg, seed, times=times)
            else:
                start = policies["dpo"] if name == "online" else sft
                for number in range(cfg.rounds):
                    of_round = name + f"_{number + 1}" * (number > 0)
                    drawn = run(f"{of_round}_candidates", sample.sample, start, run.where / "online.npz", ..., cfg,
                                "online", 0 if start == sft else seed)
                    ranked = run(f"{of_round}_pairs", rank.rank, drawn, ..., cfg, "reward", model=reward_model,
                                 rewards=cfg.dpo.online_loss == "rebel")
                    start = run(of_round, dpo.dpo, ranked, start, ..., cfg, seed, online=True)
                policies[name] = start
        if "dpo" in policies and "valid" in pairs:
            metrics["dpo_rm"] = held_out(policies["dpo"], "dpo")
        if cfg.synthetic and readers and "valid" in pairs:
            metrics["zero_shot"] = held_out(sft, "base")
        if folders:
            held_out(run("local", dpo.dpo, pairs["preferences"], sft, ..., cfg, seed, local=True), "local")
        if judges:
            done = run("untrained", untrained.untrained, sft, pairs["preferences"], pairs["valid"], ..., cfg)
            scores.update({f"untrained.{kind}": right for kind, right in arrays.load(done / "scores.npz").items()})
            metrics["untrained"] = stage.read_json(done / "metrics.json")
        for name, policy in policies.items():
            drawn = run(f"completions/{name}", sample.sample, policy, where / f"test_{task}.npz", ..., cfg, "evaluate",
                        seed if name != "sft" else 0)
            done = run(f"scores/{name}", evaluate.evaluate, drawn, where, ..., cfg, task)
            found = arrays.load(done / "scores.npz")
            scores |= {name: found["score"]} | ({f"{name}.quality": found["quality"]} if "quality" in found else {})
            metrics[name] = stage.read_json(done / "metrics.json")
            if name != "sft":
                done = run(f"kl/{name}", kl.kl, policy, sft, where, ..., cfg, seed)
                metrics[name] |= stage.read_json(done / "metrics.json")
        np.savez(folder / "scores.npz", **scores)
        for kept in ("scores", "kl", "likelihood") if folders else ():
            shutil.copytree(run.where / kept, folder / kept)
        stage.write_json(folder / "metrics.json", metrics)
    shutil.rmtree(run.where)


def sweep(where: Path, sft: Path, out: Path, cfg: schema.Scale, seed: int) -> None:
    """`arm` for every number of pairs of the block's `sizes`, with as many online prompts: one scores.npz, one
    metrics.json, whose names have n<N>. in front. In a world also n<N>.untrained.<kind>, what judges without training
    (stage untrained)."""
    used = schema.used(cfg, "compute", "policies", "source", "data", "reward", "dpo", "samples", "judge", "sizes")
    used["seed"] = seed
    key = stage.fingerprint(used, [where, sft], "sweep", stage.code())
    with stage.output(out, used, [where, sft]) as folder:
        kept, scores, metrics = stage.SCRATCH / key, {}, {}
        for n, epochs in cfg.sizes.items():
            part, place = of_size(cfg, n, epochs), kept / f"n{n}"
            if not place.exists():
                arm(where, sft, place, part, seed, judges=cfg.synthetic)
            with np.load(place / "scores.npz") as file:  # test prompts and held-out pairs are not as many
                scores |= {f"n{n}.{name}": file[name] for name in file.files if not name.endswith("post")}
            metrics |= {f"n{n}.{name}": values for name, values in stage.read_json(place / "metrics.json").items()}
        np.savez(folder / "scores.npz", **scores)
        stage.write_json(folder / "metrics.json", metrics)
    shutil.rmtree(kept)


def of_size(cfg: schema.Scale, n: int, epochs: schema.Epochs) -> schema.Scale:
    """The block with n pairs and online prompts, and the epochs that go with them."""
    changes = {"data": {"preferences": n, "online": n}}
    changes |= {"dpo": {"epochs": epochs.dpo}, "reward": {"epochs": epochs.reward}}
    return cfg.model_copy(update={"sizes": {}} | {block: getattr(cfg, block).model_copy(update=values)
                                                  for block, values in changes.items()})


def check_pairs(where: Path, cfg: schema.Scale, name: str) -> None:
    """Raises UserError where an arm asks for another number of pairs than its scale and there are too few for either:
    it would be the same training under another name."""
    rows, whole = arrays.load(where / "preferences.npz"), config.load_scale(name.partition(".")[0]).data.preferences
    there, asked = len(rows["query"]), cfg.data.preferences
    if "chosen" in rows and asked != whole and there <= min(asked, whole):
        raise stage.UserError(f"{name}: data.preferences: {asked}, and there are {there} pairs, all of which the scale "
                              "takes too; lower it in params.yaml")


def _command() -> None:
    parser = stage.arguments(__doc__, "data", "sft", "out")
    parser.add_argument("--seed", type=stage.seed, required=True)
    parser.add_argument("--task", default="human", choices=["human", "rouge"], help="whose preferences: %(default)s")
    parser.add_argument("--folders", action="store_true", help="keep what figures read of the graph's own seeds")
    a = parser.parse_args()
    cfg = config.load_scale(a.scale)
    check_pairs(a.data, cfg, a.scale)
    arm(a.data, a.sft, a.out, cfg, a.seed, task=a.task, folders=a.folders)


if __name__ == "__main__":
    stage.main(_command)
