"""Stage value: a policy under Eq. 2, likelihood of the preferences less beta times the reverse KL (Fig 4).

    python -m roads.stages.value POLICY PAIRS HELD_OUT SFT OUT --scale mini --seed 0
"""

from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import logsigmoid

from roads import arrays, candidates, config, generate, model, preferences, schema, stage


def value(policy: Path, pairs: Path, held_out: Path, reference: Path, out: Path, cfg: schema.Scale,
          seed: int) -> None:
    """Write scores.npz, each [N], in nats per pair of the preference set:

    score           log_likelihood - beta * kl
    log_likelihood  log sigma(beta * [(log pi/pi_ref)(chosen) - (log pi/pi_ref)(rejected)]), as DPO has it (Thm 2.3)
    kl              log pi/pi_ref, mean over samples of pi at the pair's prompt: an unbiased estimate of the reverse KL
    chosen_logps    log pi(chosen), the other reading of Eq. 2's first term

    and held_out [M], the score of the first held-out pairs: offline DPO was fitted to those of the preference set.
    Where pairs share posts also post [N] and held_out.post [M].

    beta is DPO's, pi_ref the SFT policy for every policy, whatever it was trained from.
    """
    torch.set_num_threads(cfg.machine.threads)
    used = schema.used(cfg, "compute") | {"samples": {"value": cfg.samples.value.model_dump()}, "beta": cfg.dpo.beta,
                                          "seed": seed}
    with stage.output(out, used, [policy, pairs, held_out, reference]) as folder:
        scores = of_pairs(policy, pairs, reference, cfg, seed)
        scores["held_out"] = of_pairs(policy, held_out, reference, cfg, seed, schema.HELD_OUT)["score"]
        shared = [arrays.posts(preferences.load(folder_of, policy)[0].numpy()[:limit], name)
                  for folder_of, name, limit in ((pairs, "post", None), (held_out, "held_out.post", schema.HELD_OUT))]
        np.savez(folder / "scores.npz", **{name: values.numpy() for name, values in scores.items()},
                 **shared[0], **shared[1])
        metrics = {"training": stage.training(policy)}
        metrics |= {name: float(values.mean()) for name, values in scores.items()}
        # Two kinds of chance are in it, which prompts and which samples; this is of both together.
        error = float(scores["kl"].std() / len(scores["kl"]) ** 0.5)
        stage.write_json(folder / "metrics.json", metrics | {"kl_standard_error": error})


def of_pairs(policy: Path, pairs: Path, reference: Path, cfg: schema.Scale, seed: int,
             limit: int | None = None) -> dict[str, torch.Tensor]:
    """Eq. 2 of a policy on a folder of pairs, or the first of them: score, log_likelihood, kl and chosen_logps, [N]."""
    beta = cfg.dpo.beta
    query, chosen, rejected = (side[:limit] for side in preferences.load(pairs, policy))
    sampled = generate.completions(policy, query, chosen.shape[1], cfg.samples.value, seed, cfg)
    # The pair's two completions and the policy's own share their prompt.
    both = torch.cat([torch.stack([chosen, rejected], 1), sampled], 1)
    ours, theirs = (candidates.in_batches(candidates.logps, model.load_policy(path, cfg.compute).eval(), query, both,
                                          label=name) for path, name in ((policy, "policy"), (reference, "reference")))
    ratios = (ours - theirs).double()
    log_likelihood, kl = logsigmoid(beta * (ratios[:, 0] - ratios[:, 1])), ratios[:, 2:].mean(1)
    return {"score": log_likelihood - beta * kl, "log_likelihood": log_likelihood, "kl": kl,
            "chosen_logps": ours[:, 0].double()}


def _command() -> None:
    parser = stage.arguments(__doc__, "policy", "pairs", "held_out", "reference", "out")
    parser.add_argument("--seed", type=stage.seed, required=True)
    a = parser.parse_args()
    value(a.policy, a.pairs, a.held_out, a.reference, a.out, config.load_scale(a.scale), a.seed)


if __name__ == "__main__":
    stage.main(_command)
