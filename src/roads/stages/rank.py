"""Stage rank: completions -> chosen / rejected pairs.

    python -m roads.stages.rank COMPLETIONS OUT --scale mini --by human --data DATA   # annotators, judge, the rows' own
    python -m roads.stages.rank COMPLETIONS OUT --scale mini --by rouge --data DATA --split preferences
    python -m roads.stages.rank COMPLETIONS OUT --scale mini --by reward --model RM   # online DPO

Writes pairs.npz: query [N, Q], chosen [N, R], rejected [N, R]; for a loss that asks for them also rewards [N, 2]. A
prompt whose completions all tie is dropped or, with `ties: keep`, a pair of equal sides.
"""

from pathlib import Path

import numpy as np

from roads import arrays, config, schema, stage
from roads.tldr import PAD


def best_and_worst(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices of the best and the worst of scores [N, n], and which rows tell them apart; ties go to the first."""
    best, worst = scores.argmax(1), scores.argmin(1)
    return best, worst, scores.max(1) > scores.min(1)


def human_scores(query: np.ndarray, completions: np.ndarray, cfg: schema.Scale,
                 data: Path) -> tuple[np.ndarray, dict[str, float]]:
    """Scores [N, 2] of two completions each: by annotators, by the judge that winrates have (Fig 6), or as the rows
    have it, preferred first. And what metrics.json says of them."""
    settings = cfg.samples.human
    if settings.labels == "rows":
        return np.tile([1.0, 0.0], (len(query), 1)), {}
    first, second = completions[:, 0], completions[:, 1]
    if settings.labels == "judge":
        from roads.judge import protocol

        orders = getattr(cfg.judge, "label_orders", 2)
        found = protocol.compare(protocol.of(cfg, query, data, orders), first, second, orders)
        told = protocol.summary(found)
        return np.stack([found["score"], 1 - found["score"]], axis=1), {"judge": {
            name: told[name] for name in ("ties", "position_consistency", "parse_failures")}}
    from roads.judge import quality

    quality_of = quality.of(cfg, query, data)
    gold = np.stack([quality_of(first), quality_of(second)], axis=1)
    unit = quality.spread(gold)
    if not cfg.synthetic and not unit:
        raise stage.UserError(f"judge.kind: {cfg.judge.kind} finds the two samples of every prompt equally good; raise"
                              " samples.human.temperature, or take more prompts")
    tau = cfg.source.tau if cfg.synthetic else settings.tau * unit
    seed = [cfg.source.seed if cfg.synthetic else 0, 20, len(query)]
    lengths = (completions != PAD).sum(2)
    scores = quality.annotate(gold, lengths, tau, settings, np.random.default_rng(seed))
    same = (first == second).all(1)
    scores[same] = 0.0  # nothing to compare
    agree = ((scores[:, 0] > scores[:, 1]) == (gold[:, 0] > gold[:, 1]))[gold[:, 0] != gold[:, 1]]
    return scores, {"tau": tau, "spread": unit, "labels_agree_with_quality": float(agree.mean()) if len(agree) else 1.0}


def reward_scores(query: np.ndarray, completions: np.ndarray, path: Path, compute: schema.Compute) -> np.ndarray:
    """Rewards [N, n]."""
    import torch

    from roads import candidates, model

    rm = model.RewardModel.load(path, compute).eval()
    both = map(torch.from_numpy, (query, completions))
    return candidates.in_batches(candidates.rewards, rm, *both, label="rewards").numpy()


def rank(completions: Path, out: Path, cfg: schema.Scale, by: str, *, data: Path | None = None,
         split: str = "preferences", model: Path | None = None, rewards: bool = False) -> None:
    """Score the completions and write the best and the worst of each prompt as a pair; rewards: with both scores."""
    name = "online" if by == "reward" else by
    settings = getattr(cfg.samples, name)
    blocks = {"human": ("source", "judge"), "rouge": (), "reward": ("compute",)}[by]
    used = schema.used(cfg, *blocks) | {"by": by, "samples": {name: settings.model_dump()}}
    reads = [completions, *(path for path in (data, model) if path)]
    with stage.output(out, used, reads) as folder:
        rows, told = arrays.tokens(completions / "completions.npz", model=model), {}
        query, sampled = rows["query"], rows["completions"]
        if by == "human":
            scores, told = human_scores(query, sampled, cfg, data)
        elif by == "rouge":
            from roads.rouge import rouge_scores
            from roads.tldr import load_tokenizer

            references = arrays.tokens(data / f"{split}.npz")["response"]
            scores = rouge_scores(sampled, references, load_tokenizer(data / "tokenizer.json"))
        else:
            import torch

            torch.set_num_threads(cfg.machine.threads)
            scores = reward_scores(query, sampled, model, cfg.compute)
        best, worst, decided = best_and_worst(scores)
        every = np.arange(len(query))
        chosen, rejected = sampled[every, best], sampled[every, worst]
        decided &= (chosen != rejected).any(1)  # cut to their length, two sides may be one
        is_row = by == "human" and cfg.samples.human.labels == "rows"
        if is_row:  # of a policy's own, one that ends at once is told apart like any other
            decided &= (np.minimum((chosen != PAD).sum(1), (rejected != PAD).sum(1)) > 1)
        tied = int((~decided).sum())
        if settings.ties == "keep":
            rejected = np.where(decided[:, None], rejected, chosen)  # two equal sides: a pair without a gradient
            decided[:] = True
        if not decided.any():
            fix = "raise source.max_preference_tokens" if is_row else "raise the temperature"
            raise stage.UserError(f"{completions}: no prompt has two sides that differ; {fix}")
        more = {"rewards": np.stack([scores.max(1), scores.min(1)], 1)[decided]} if rewards else {}
        np.savez(folder / "pairs.npz", query=query[decided], chosen=chosen[decided], rejected=rejected[decided], **more)
        stage.write_json(folder / "metrics.json", told | {
            "pairs": int(decided.sum()), "dropped_as_ties": int((~decided).sum()), "ties": tied,
            "mean_score": {"all": float(scores.mean()), "chosen": float(scores.max(1)[decided].mean()),
                           "rejected": float(scores.min(1)[decided].mean())}})


def _command() -> None:
    parser = stage.arguments(__doc__, "completions", "out")
    parser.add_argument("--by", required=True, choices=["human", "rouge", "reward"])
    parser.add_argument("--data", type=Path, help="the data folder, with references and tokenizer (human, rouge)")
    parser.add_argument("--split", default="preferences", help="the split the completions are of (rouge)")
    parser.add_argument("--model", type=Path, help="the reward model (reward)")
    a = parser.parse_args()
    rank(a.completions, a.out, config.load_scale(a.scale), a.by, data=a.data, split=a.split,
         model=a.model)


if __name__ == "__main__":
    stage.main(_command)
