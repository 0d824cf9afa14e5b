"""Stage rank: completions -> chosen / rejected pairs.

    python -m roads.stages.rank COMPLETIONS OUT --scale mini --by human --data DATA   # annotators, judge, the rows' own
    python -m roads.stages.rank COMPLETIONS OUT --scale mini --by rouge --data DATA --split preferences
    python -m roads.stages.rank COMPLETIONS OUT --scale mini --by reward --model RM   # online DPO

Writes pairs.npz: query [N, Q], chosen [N, R], rejected [N, R]. A prompt whose completions all tie is dropped.
"""

from pathlib import Path

import numpy as np

from roads import config, schema, stage
from roads.tldr import PAD


def best_and_worst(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices of the best and the worst of scores [N, n], and which rows tell them apart; ties go to the first."""
    best, worst = scores.argmax(1), scores.argmin(1)
    return best, worst, scores.max(1) > scores.min(1)


def annotate(quality: np.ndarray, tau: float, rng: np.random.Generator) -> np.ndarray:
    """Scores [N, 2], 1 for the winner, of noisy Bradley-Terry labels on gold quality [N, 2] (Eq. 4)."""
    p_first = 1 / (1 + np.exp(-(quality[:, 0] - quality[:, 1]) / tau))
    first = rng.random(len(quality)) < p_first
    return np.stack([first, ~first], axis=1).astype(float)


def human_scores(query: np.ndarray, completions: np.ndarray, cfg: schema.Scale, data: Path) -> np.ndarray:
    """Scores [N, 2] of two completions each: by the world's annotators, by the judge that winrates have (Fig 6), or as
    the rows have it, preferred first."""
    labels = cfg.samples.human.labels
    if labels == "rows":
        return np.tile([1.0, 0.0], (len(query), 1))
    if labels == "judge":
        from roads.judge import protocol

        first = protocol.compare(protocol.of(cfg, query, data), completions[:, 0], completions[:, 1])["score"]
        return np.stack([first, 1 - first], axis=1)
    from roads.world import World

    world = World(cfg.source)
    quality = np.stack([world.quality(query, completions[:, i]) for i in range(completions.shape[1])], axis=1)
    scores = annotate(quality, cfg.source.tau, np.random.default_rng([cfg.source.seed, 20, len(query)]))
    same = (completions[:, 0] == completions[:, 1]).all(1)
    scores[same] = 0.0  # nothing to compare
    return scores


def reward_scores(query: np.ndarray, completions: np.ndarray, path: Path, compute: schema.Compute) -> np.ndarray:
    """Rewards [N, n]."""
    import torch

    from roads import candidates, model

    rm = model.RewardModel.load(path, compute).eval()
    both = map(torch.from_numpy, (query, completions))
    return candidates.in_batches(candidates.rewards, rm, *both, label="rewards").numpy()


def rank(completions: Path, out: Path, cfg: schema.Scale, by: str, *, data: Path | None = None,
         split: str = "preferences", model: Path | None = None) -> None:
    """Score the completions and write the best and the worst of each prompt as a pair."""
    used = schema.used(cfg, "source", "judge") | {"labels": cfg.samples.human.labels} if by == "human" else {}
    reads = [completions, *(path for path in (data, model) if path)]
    with stage.output(out, {"by": by, **used}, reads) as folder:
        rows = np.load(completions / "completions.npz")
        query, sampled = rows["query"], rows["completions"]
        if by == "human":
            scores = human_scores(query, sampled, cfg, data)
        elif by == "rouge":
            from roads.rouge import rouge_scores
            from roads.tldr import load_tokenizer

            references = np.load(data / f"{split}.npz")["response"]
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
        if not decided.any():
            fix = "raise source.max_preference_tokens" if is_row else "raise the temperature"
            raise stage.UserError(f"{completions}: no prompt has two sides that differ; {fix}")
        np.savez(folder / "pairs.npz", query=query[decided], chosen=chosen[decided], rejected=rejected[decided])
        stage.write_json(folder / "metrics.json", {
            "pairs": int(decided.sum()), "dropped_as_ties": int((~decided).sum()),
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
