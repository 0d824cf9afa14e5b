"""Stage anatomy: what the gap between online and offline is made of, one seed in one process.

    python -m roads.stages.anatomy DATA SFT OUT --scale mini --seed 0

Every policy starts from the SFT checkpoint and takes as many steps, with the same learning rate, beta and epochs: pairs
that tie are kept, as pairs of equal sides. They differ in one thing at a time.

    <samples>.<choice>.<labels>[.divided]
    offline.two     both samples of the SFT policy at T = 1 that readers were shown
    online.two      the first two of its 25 samples at the low temperature of online DPO
    online.ends     the best and the worst of those 25
    labels          readers (noisy), rm (the global RM's), soft (its probability), gold (the true quality's)
    divided         logits divided by that temperature, as online DPO has it, and not

    best.<labels>   best of 25 samples of the SFT policy on the test prompts, without training
    exact.<reward>  the policy that is best under a reward r at the same beta: pi_ref exp(r / beta), normalised over all
                    valid summaries, which can be listed in the synthetic world, and sampled as every policy is

Needs a world: gold, and the list of summaries.
"""

import shutil
from itertools import product
from pathlib import Path

import numpy as np
import torch

from roads import arrays, candidates, config, model, optimum, schema, stage
from roads.judge import protocol, quality
from roads.stages import dpo, kl, rank, reward, sample
from roads.stages.arm import Steps, splits
from roads.tldr import PAD
from roads.world import World

TRAINED = [f"{pairs}.{labels}{divided}" for pairs, labelled in
           (("offline.two", ("readers", "rm", "soft", "gold")), ("online.two", ("readers", "rm", "gold")),
            ("online.ends", ("rm", "gold"))) for labels, divided in product(labelled, ("", ".divided"))]

PENALTIES = (0.0, 1.0)  # for a summary of invalid words alone, in place of the world's 2K


def labelled(drawn: Path, out: Path, scores: np.ndarray, soft: bool = False) -> None:
    """Pairs of the best and the worst by scores [N, n] of the first n completions of a folder; those that tie stay, as
    a pair of equal sides. soft: with the probability that the chosen side is better."""
    with stage.output(out, {"soft": soft}, [drawn]) as folder:
        rows = arrays.tokens(drawn / "completions.npz")
        sampled, every = rows["completions"][:, : scores.shape[1]], np.arange(len(scores))
        best, worst, told = rank.best_and_worst(scores)
        chosen, rejected = sampled[every, best], sampled[every, worst]
        told &= (chosen != rejected).any(1)
        more = {"probability": 1 / (1 + np.exp(scores.min(1) - scores.max(1)))} if soft else {}
        np.savez(folder / "pairs.npz", query=rows["query"], chosen=chosen,
                 rejected=np.where(told[:, None], rejected, chosen), **more)
        stage.write_json(folder / "metrics.json", {"pairs": len(told), "ties": int((~told).sum()),
                                                   "dropped_as_ties": 0})


class Measures:
    """What is said of one summary for each test prompt."""

    def __init__(self, cfg: schema.Scale, data: Path):
        rows = arrays.tokens(data / "test_human.npz")
        self.query, self.references = rows["query"], rows["response"]
        self.cfg, self.world = cfg, World(cfg.source)
        self.ask = protocol.of(cfg, self.query, data)
        self.reference_quality = self.world.quality(self.query, self.references)

    def of(self, name: str, summaries: np.ndarray, rm: "model.RewardModel") -> dict[str, np.ndarray]:
        """Arrays [N]: the winrate's score; quality, validity and the RM's reward; the score if invalid words cost less;
        and the chance to win before a reader as noisy as those of the pairs."""
        found = protocol.compare(self.ask, summaries, self.references)
        true, valid = self.world.quality(self.query, summaries), self.world.validity(self.query, summaries)
        rewards = candidates.in_batches(candidates.rewards, rm, torch.from_numpy(self.query),
                                        torch.from_numpy(summaries)[:, None], label="rewards")[:, 0].numpy()
        more = {"quality": true, "validity": valid, "reward": rewards,
                "noisy": 1 / (1 + np.exp((self.reference_quality - true) / self.cfg.source.tau))}
        for penalty in PENALTIES:
            gap = true + (2 * self.cfg.source.slots - penalty) * (1 - valid) - self.reference_quality
            more[f"penalty{penalty:g}"] = (np.sign(gap) + 1) / 2
        return {name: found["score"]} | {f"{name}.{key}": values for key, values in more.items()}


def anatomy(data: Path, sft: Path, out: Path, cfg: schema.Scale, seed: int) -> None:
    """Write scores.npz: for SFT and every policy above <policy> [N], a score per test prompt, and what Measures says
    beside it. metrics.json: its training, KL from SFT and means; for exact policies the reference's mass on invalid
    summaries, outside."""
    torch.set_num_threads(cfg.machine.threads)
    used = schema.used(cfg, "compute", "source", "data", "reward", "local", "samples", "judge")
    used |= {"dpo": cfg.dpo.told(), "seed": seed}
    key = stage.fingerprint(used, [data, sft], "anatomy", stage.code())
    with stage.output(out, used, [data, sft]) as folder:
        run = Steps(stage.SCRATCH / key, 8 + 4 * len(TRAINED), out.as_posix())
        run.where.mkdir(parents=True, exist_ok=True)
        for name, rows in splits(data, cfg).items():
            np.savez(run.where / f"{name}.npz", **rows)
        drawn = {"offline.two": run("two", sample.sample, sft, run.where / "preferences.npz", ..., cfg, "human", 0),
                 "online.ends": run("many", sample.sample, sft, run.where / "online.npz", ..., cfg, "online", 0)}
        readers = run("readers", rank.rank, drawn["offline.two"], ..., cfg, "human", data=data)
        rm_path = run("rm", reward.reward, readers, sft, ..., cfg, seed)
        nets = {"dpo": run("dpo", dpo.dpo, readers, sft, ..., cfg, seed),
                "local": run("local", dpo.dpo, readers, sft, ..., cfg, seed, local=True)}
        rm = model.RewardModel.load(rm_path, cfg.compute).eval()
        measures, scores, metrics = Measures(cfg, data), {}, {}

        def measured(name: str, summaries: np.ndarray, **more: object) -> None:
            found = measures.of(name, summaries, rm)
            scores.update(found)
            metrics[name] = more | {part.removeprefix(name).lstrip(".") or "score": float(values.mean())
                                    for part, values in found.items()}

        labels, policies, ties = _labels(drawn, rm, cfg, data), {"sft": sft}, {}
        for name in TRAINED:
            samples, choice, by, *divided = name.split(".")
            pairs = run(f"pairs/{samples}.{choice}.{by}", labelled, drawn[samples + ".ends" if samples == "online" else
                        "offline.two"], ..., labels[f"{samples}.{choice}"]["rm" if by == "soft" else by], by == "soft")
            ties[name] = stage.read_json(pairs / "metrics.json")["ties"]
            policies[name] = run(name, dpo.dpo, pairs, sft, ..., cfg, seed, online=bool(divided))
        for name, policy in policies.items():
            done = run(f"completions/{name}", sample.sample, policy, data / "test_human.npz", ..., cfg, "evaluate",
                       seed if name != "sft" else 0)
            summaries = arrays.tokens(done / "completions.npz")["completions"][:, 0]
            distance = run(f"kl/{name}", kl.kl, policy, sft, data, ..., cfg, seed) if name != "sft" else None
            measured(name, summaries, training=stage.training(policy) | ({"ties": ties[name]} if name in ties else {}),
                     **(stage.read_json(distance / "metrics.json") if distance else {}))
        many = run("test", sample.sample, sft, data / "test_human.npz", ..., cfg, "best_of_n", 0)
        sampled = arrays.tokens(many / "completions.npz")["completions"]
        every, query = np.arange(len(sampled)), torch.from_numpy(measures.query)
        by_rm = candidates.in_batches(candidates.rewards, rm, query, torch.from_numpy(sampled), label="rewards").numpy()
        by_gold = _gold(measures.world, measures.query, sampled)
        for by, values in (("rm", by_rm), ("gold", by_gold)):
            measured(f"best.{by}", sampled[every, values.argmax(1)])
        listed = measures.world.every_summary(measures.query)
        true = {"gold": _gold(measures.world, measures.query, listed) / cfg.source.tau}  # in logits, as the RM's
        for name, summaries, more in optimum.optima(measures.query, listed, nets | {"sft": sft}, rm, cfg, seed, true):
            measured(name, summaries, **more)
        np.savez(folder / "scores.npz", **scores)
        stage.write_json(folder / "metrics.json", metrics)
    shutil.rmtree(run.where)


def _gold(world: World, query: np.ndarray, completions: np.ndarray) -> np.ndarray:
    """True quality [N, n] of completions [N, n, R]."""
    return np.stack([world.quality(query, completions[:, i]) for i in range(completions.shape[1])], 1)


def _labels(drawn: dict[str, Path], rm: "model.RewardModel", cfg: schema.Scale,
            data: Path) -> dict[str, dict[str, np.ndarray]]:
    """Scores of the samples [N, n] by each who labels them; of online.two those of the first two."""
    found = {}
    for name, folder in drawn.items():
        rows = arrays.tokens(folder / "completions.npz")
        gold = _gold(World(cfg.source), rows["query"], rows["completions"])
        by_rm = candidates.in_batches(candidates.rewards, rm, torch.from_numpy(rows["query"]),
                                      torch.from_numpy(rows["completions"]), label="rewards").numpy()
        two, lengths = gold[:, :2], (rows["completions"][:, :2] != PAD).sum(2)
        if name == "offline.two":
            readers = rank.human_scores(rows["query"], rows["completions"], cfg, data)[0]
        else:
            rng = np.random.default_rng([cfg.source.seed, 21, len(two)])
            readers = quality.annotate(two, lengths, cfg.source.tau, cfg.samples.human, rng)
        found[name.replace("ends", "two")] = {"readers": readers, "rm": by_rm[:, :2], "gold": two}
        if name == "online.ends":
            found[name] = {"rm": by_rm, "gold": gold}
    return found


def _command() -> None:
    parser = stage.arguments(__doc__, "data", "sft", "out")
    parser.add_argument("--seed", type=stage.seed, required=True)
    a = parser.parse_args()
    anatomy(a.data, a.sft, a.out, config.load_scale(a.scale), a.seed)


if __name__ == "__main__":
    stage.main(_command)
