"""Stage sample: prompts -> completions, token ids kept.

    python -m roads.stages.sample POLICY DATA/preferences.npz OUT --scale mini --samples online --seed 0

Writes completions.npz: query [N, Q] and completions [N, n, R], padded right; every completion ends in EOS.
"""

from pathlib import Path

import numpy as np
import torch

from roads import arrays, config, generate, schema, stage
from roads.tldr import PAD


def sample(policy: Path, prompts: Path, out: Path, cfg: schema.Scale, samples: str, seed: int) -> None:
    """Sample every prompt of a split with the settings `samples.<name>` of params.yaml."""
    torch.set_num_threads(cfg.machine.threads)
    settings = getattr(cfg.samples, samples)
    if settings is None:
        raise stage.UserError(f"samples.{samples}: the scale has none in params.yaml")
    used = schema.used(cfg, "compute") | {"samples": {samples: settings.model_dump()}, "seed": seed}
    with stage.output(out, used, [policy, prompts]) as folder:
        rows = arrays.tokens(prompts, model=policy)
        query, length = torch.from_numpy(rows["query"]), rows["response"].shape[1]
        if getattr(settings, "labels", None) == "rows":  # people's pairs, preferred first: nothing to sample
            sampled = np.stack([rows["chosen"], rows["rejected"]], 1)
        else:
            sampled = generate.completions(policy, query, length, settings, seed, cfg).numpy()
        np.savez(folder / "completions.npz", query=rows["query"], completions=sampled)
        lengths = (sampled != PAD).sum(2)
        stage.write_json(folder / "metrics.json", {
            "training": stage.training(policy), "prompts": len(query),
            "n": settings.n, "mean_tokens": float(lengths.mean()),
            "truncated": float((lengths == length).mean())})


def _command() -> None:
    parser = stage.arguments(__doc__, "policy", "prompts", "out")
    parser.add_argument("--samples", required=True, choices=list(schema.Samples.model_fields))
    parser.add_argument("--seed", type=stage.seed, required=True)
    a = parser.parse_args()
    sample(a.policy, a.prompts, a.out, config.load_scale(a.scale), a.samples, a.seed)


if __name__ == "__main__":
    stage.main(_command)
