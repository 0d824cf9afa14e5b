"""Stage limits: how far the reward model of Fig 11 could take a policy, one seed.

    python -m roads.stages.limits DATA SFT REWARD DPO OUT --scale mini --seed 0

ROUGE-L of summaries that the reward model chooses without further training, for the prompts of test_rouge:

    cold.rm         its pick of 25 samples of the SFT policy, at the temperature of samples.best_of_n
    warm.rm         and at that of samples.rouge, from which its pairs came
    warm.consensus  of the same 25 the one with the most ROUGE-L against the others, which needs no preference pairs
    warm.gold       and with the most against the reference summary, which nobody can see: the ceiling of these samples
    exact.dpo       a sample of the policy that is best under DPO's own reward (optimum.py)
    exact.rm        and under the reward model

Needs a world, whose summaries can be listed.
"""

from pathlib import Path

import numpy as np
import torch

from roads import arrays, candidates, config, generate, model, optimum, schema, stage
from roads.rouge import rouge_l, rouge_scores
from roads.tldr import load_tokenizer
from roads.world import World


def consensus(texts: list[str]) -> np.ndarray:
    """Mean ROUGE-L F1 [n] of every text against all n, itself among them (minimum Bayes risk, Kumar and Byrne 2004).

    >>> consensus(["a b", "a b", "c d"]).round(2).tolist()
    [0.67, 0.67, 0.33]
    """
    every, times = np.unique(texts, return_counts=True)
    against = np.stack([rouge_l(other, texts)[:, 2] for other in every.tolist()])
    return (times @ against / len(texts)).round(9)  # equal ones tie, whatever the order of the sum


def limits(data: Path, sft: Path, reward: Path, dpo: Path, out: Path, cfg: schema.Scale, seed: int) -> None:
    """Write scores.npz: <way> [N], ROUGE-L F1 per prompt of test_rouge, for every way above. metrics.json: their means;
    for exact policies the KL from SFT and the reference's mass on invalid summaries, outside."""
    torch.set_num_threads(cfg.machine.threads)
    used = schema.used(cfg, "compute", "source", "samples") | {"dpo": {"beta": cfg.dpo.beta}, "seed": seed}
    del used["samples"]["human"], used["samples"]["online"], used["samples"]["value"]
    with stage.output(out, used, [data, sft, reward, dpo]) as folder:
        rows, tokenizer = arrays.tokens(data / "test_rouge.npz", model=sft), load_tokenizer(data / "tokenizer.json")
        query, references = rows["query"], rows["response"]
        rm, every = model.RewardModel.load(reward, cfg.compute).eval(), np.arange(len(query))
        chosen, metrics = {}, {}
        for name, settings in (("cold", cfg.samples.best_of_n), ("warm", cfg.samples.rouge)):
            drawn = generate.completions(sft, torch.from_numpy(query), references.shape[1], settings, 0, cfg)
            sampled = drawn.numpy()
            by = {"rm": candidates.in_batches(candidates.rewards, rm, torch.from_numpy(query), drawn,
                                              label="rewards").numpy()}
            if name == "warm":
                by["consensus"] = np.stack([consensus(tokenizer.decode_batch(row.tolist(), skip_special_tokens=True))
                                            for row in sampled])
                by["gold"] = rouge_scores(sampled, references, tokenizer)
            chosen |= {f"{name}.{way}": sampled[every, values.argmax(1)] for way, values in by.items()}
        listed = World(cfg.source).every_summary(query)
        for name, summaries, found in optimum.optima(query, listed, {"sft": sft, "dpo": dpo}, rm, cfg, seed, {}):
            chosen[name], metrics[name] = summaries, found
        scores = {name: rouge_scores(summaries[:, None], references, tokenizer)[:, 0]
                  for name, summaries in chosen.items()}
        np.savez(folder / "scores.npz", **scores)
        stage.write_json(folder / "metrics.json", {name: metrics.get(name, {}) | {"score": float(values.mean())}
                                                   for name, values in scores.items()})


def _command() -> None:
    parser = stage.arguments(__doc__, "data", "sft", "reward", "dpo", "out")
    parser.add_argument("--seed", type=stage.seed, required=True)
    a = parser.parse_args()
    limits(a.data, a.sft, a.reward, a.dpo, a.out, config.load_scale(a.scale), a.seed)


if __name__ == "__main__":
    stage.main(_command)
