"""Stage evaluate: completions of a policy -> a score per prompt.

    python -m roads.stages.evaluate COMPLETIONS DATA OUT --scale mini --task human

Task human: winrate against the reference summary, by the judge (protocol.py).
Task rouge: ROUGE-L F1 against the preferred completion (Fig 11).
"""

from pathlib import Path

import numpy as np

from roads import arrays, config, schema, stage
from roads.tldr import PAD


def evaluate(completions: Path, data: Path, out: Path, cfg: schema.Scale, task: str) -> None:
    """Write scores.npz: score [N], one per prompt of test_<task>, and tokens [N, 2], ours and the reference's.

    post [N] where prompts share posts. Task human has the judge's consistent [N] and failed [N] as well, and the
    quality [N] of ours where it is known.
    """
    used = schema.used(cfg, "source", "judge") if task == "human" else {}
    with stage.output(out, {"task": task, **used}, [completions, data]) as folder:
        rows = arrays.tokens(completions / "completions.npz")
        query, sampled = rows["query"], rows["completions"][:, :1]
        references = arrays.tokens(data / f"test_{task}.npz")["response"]
        tokens = np.stack([(sampled[:, 0] != PAD).sum(1), (references != PAD).sum(1)], 1)
        metrics = {"training": stage.read_json(completions / "metrics.json").get("training", {}),
                   "prompts": len(query), "mean_tokens": float(tokens[:, 0].mean()),
                   "mean_tokens_reference": float(tokens[:, 1].mean())}
        if task == "human":
            from roads.judge import protocol

            found = protocol.compare(protocol.of(cfg, query, data), sampled[:, 0], references)
            metrics |= protocol.summary(found)
            if cfg.judge.kind not in schema.OUTSIDE:
                from roads.judge import quality

                quality_of = quality.of(cfg, query, data)
                found["quality"] = quality_of(sampled[:, 0])
                metrics |= {"mean_quality": float(found["quality"].mean()),
                            "mean_quality_reference": float(quality_of(references).mean())}
            if cfg.synthetic:
                from roads.world import World

                metrics["validity"] = float(World(cfg.source).validity(query, sampled[:, 0]).mean())
        else:
            from roads.rouge import rouge_scores
            from roads.tldr import load_tokenizer

            found = {"score": rouge_scores(sampled, references, load_tokenizer(data / "tokenizer.json"))[:, 0]}
        np.savez(folder / "scores.npz", tokens=tokens, **found, **arrays.posts(query))
        stage.write_json(folder / "metrics.json", metrics | {"mean_score": float(found["score"].mean())})


def _command() -> None:
    parser = stage.arguments(__doc__, "completions", "data", "out")
    parser.add_argument("--task", required=True, choices=["human", "rouge"])
    a = parser.parse_args()
    evaluate(a.completions, a.data, a.out, config.load_scale(a.scale), a.task)


if __name__ == "__main__":
    stage.main(_command)
