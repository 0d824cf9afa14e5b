"""Stage best_of_n: the winrate of the sample that a reward model ranks first among N (Figs 8 and 9).

    python -m roads.stages.best_of_n COMPLETIONS DATA MODEL SFT OUT --scale mini --kind reward|local|dpo|base
"""

from pathlib import Path

import numpy as np
import torch

from roads import arrays, candidates, config, model, schema, stage, zero_shot
from roads.judge import protocol
from roads.tldr import PAD


def best_of(rewards: np.ndarray, n: int) -> np.ndarray:
    """Index [B] of the best of the first n of rewards [B, >= n]; ties go to the first."""
    return rewards[:, :n].argmax(1)


def best_of_n(completions: Path, data: Path, path: Path, reference: Path, out: Path, cfg: schema.Scale,
              kind: str) -> None:
    """Write scores.npz: n<N> [B], the judge's score of the best of N against the reference summary, for each N."""
    torch.set_num_threads(cfg.machine.threads)
    used = {"kind": kind, "unfinished": cfg.samples.best_of_n.unfinished, **schema.used(cfg, "source", "judge")}
    with stage.output(out, used, [completions, data, path]) as folder:
        rows = arrays.tokens(completions / "completions.npz", model=path)
        query, sampled = map(torch.from_numpy, (rows["query"], rows["completions"]))
        if kind == "reward":
            rm = model.RewardModel.load(path, cfg.compute).eval()
            rewards = candidates.in_batches(candidates.rewards, rm, query, sampled, label=kind)
            if (unfinished := cfg.samples.best_of_n.unfinished) is not None:
                rewards[(sampled != PAD).sum(2) == sampled.shape[2]] = unfinished
        elif kind == "base":
            rewards = candidates.in_batches(candidates.rewards, zero_shot.load(path, cfg), query, sampled, label=kind)
        else:
            rewards = candidates.implicit_rewards(path, reference if kind == "dpo" else None, query, sampled,
                                                  cfg.compute)
        references = arrays.tokens(data / "test_human.npz")["response"][: len(query)]
        counts, every = [n for n in schema.BEST_OF if n <= sampled.shape[1]], np.arange(len(query))
        chosen = np.concatenate([rows["completions"][every, best_of(rewards.numpy(), n)] for n in counts])
        ask = protocol.of(cfg, np.tile(rows["query"], (len(counts), 1)), data)
        found = protocol.compare(ask, chosen, np.tile(references, (len(counts), 1)))  # all at once: a batch takes a day
        verdicts = {n: {name: part[i * len(query) : (i + 1) * len(query)] for name, part in found.items()}
                    for i, n in enumerate(counts)}
        np.savez(folder / "scores.npz", **{f"n{n}": found["score"] for n, found in verdicts.items()})
        stage.write_json(folder / "metrics.json",
                         {"training": stage.training(path)}
                         | {f"n{n}": protocol.summary(found) for n, found in verdicts.items()})


def _command() -> None:
    parser = stage.arguments(__doc__, "completions", "data", "model", "reference", "out")
    parser.add_argument("--kind", required=True, choices=["reward", "local", "dpo", "base"])
    a = parser.parse_args()
    best_of_n(a.completions, a.data, a.model, a.reference, a.out, config.load_scale(a.scale), a.kind)


if __name__ == "__main__":
    stage.main(_command)
