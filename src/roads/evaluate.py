"""Stage evaluate: completions -> a score per prompt; reward models -> likelihood of held-out pairs.

    python -m roads.evaluate policy COMPLETIONS DATA OUT --scale mini --task human
    python -m roads.evaluate likelihood MODEL PAIRS OUT --scale mini --kind global|local|dpo [--reference SFT]

Task human: winrate against the reference summary, judged by the world's gold quality (a tie counts 1/2).
Task rouge: ROUGE-L F1 against the preferred completion (Fig 11).
"""

import argparse
from pathlib import Path

import numpy as np

from roads import config, stage
from roads.tldr import PAD

SPLIT = {"human": "test", "rouge": "valid"}


def policy(completions: Path, data: Path, out: Path, cfg: config.Scale, task: str) -> None:
    """Write scores.npz: score [N], one per prompt of the task's split."""
    used = config.used(cfg, "world") if task == "human" else {}
    with stage.output(out, {"task": task, **used}, [completions, data]) as folder:
        rows = np.load(completions / "completions.npz")
        query, sampled = rows["query"], rows["completions"][:, :1]
        references = np.load(data / f"{SPLIT[task]}.npz")["response"]
        metrics = {"prompts": len(query), "mean_tokens": float((sampled != PAD).sum(2).mean()),
                   "mean_tokens_reference": float((references != PAD).sum(1).mean())}
        if task == "human":
            from roads.world import World

            world = World(cfg.world)
            ours, theirs = world.quality(query, sampled[:, 0]), world.quality(query, references)
            score = np.where(ours == theirs, 0.5, (ours > theirs).astype(float))
            metrics |= {"validity": float(world.validity(query, sampled[:, 0]).mean()),
                        "mean_quality": float(ours.mean()), "ties": float((ours == theirs).mean())}
        else:
            from roads.rank import rouge_scores
            from roads.tldr import load_tokenizer

            score = rouge_scores(sampled, references, load_tokenizer(data / "tokenizer.json"))[:, 0]
        np.savez(folder / "scores.npz", score=score)
        stage.write_json(folder / "metrics.json", metrics | {"mean_score": float(score.mean())})


def likelihood(model_path: Path, pairs: Path, out: Path, cfg: config.Scale, kind: str, reference: Path | None) -> None:
    """Write scores.npz: score [N], the Bradley-Terry probability of the chosen completion of each held-out pair.

    global: sigma of the reward difference. local: sigma of beta times the log-prob difference. dpo: the same with
    log-ratios to the reference. The report's "validation likelihood" is the mean; log loss and accuracy go with it.
    """
    import torch

    from roads.dpo import all_logps
    from roads.model import RewardModel, load_policy
    from roads.reward import load_pairs

    torch.set_num_threads(cfg.threads)
    blocks = {"global": (), "local": ("local",), "dpo": ("dpo",)}[kind]
    reads = [model_path, pairs, *([reference] if reference else [])]
    with stage.output(out, {"kind": kind, **config.used(cfg, *blocks)}, reads) as folder:
        query, chosen, rejected = load_pairs(pairs)
        if kind == "global":
            rm = RewardModel.load(model_path).eval()
            with torch.inference_mode():
                sides = [torch.cat([rm(query[i], side[i]) for i in torch.arange(len(query)).split(512)])
                         for side in (chosen, rejected)]
            margin = sides[0] - sides[1]
        else:
            net = load_policy(model_path).eval()
            margin = all_logps(net, query, chosen) - all_logps(net, query, rejected)
            if kind == "dpo":
                ref = load_policy(reference).eval()
                margin -= all_logps(ref, query, chosen) - all_logps(ref, query, rejected)
            margin *= getattr(cfg, kind).beta
        score = torch.sigmoid(margin.double()).numpy()
        np.savez(folder / "scores.npz", score=score)
        stage.write_json(folder / "metrics.json", {
            "pairs": len(score), "mean_score": float(score.mean()), "accuracy": float((score > 0.5).mean()),
            "log_loss": float(-np.log(score).mean())})


def _command() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("policy", help="winrate or ROUGE-L of a policy's completions")
    one.add_argument("completions", type=Path)
    one.add_argument("data", type=Path)
    one.add_argument("--task", required=True, choices=list(SPLIT))
    two = commands.add_parser("likelihood", help="probability that a reward model gives to held-out choices")
    two.add_argument("model", type=Path)
    two.add_argument("pairs", type=Path)
    two.add_argument("--kind", required=True, choices=["global", "local", "dpo"])
    two.add_argument("--reference", type=Path, help="the SFT policy (dpo)")
    for sub in (one, two):
        sub.add_argument("out", type=Path)
        sub.add_argument("--scale", required=True)
    a = parser.parse_args()
    cfg = config.load_scale(a.scale)
    if a.command == "policy":
        policy(a.completions, a.data, a.out, cfg, a.task)
    else:
        if a.kind == "dpo" and not a.reference:
            parser.error("--kind dpo needs --reference")
        likelihood(a.model, a.pairs, a.out, cfg, a.kind, a.reference)


if __name__ == "__main__":
    stage.main(_command)
