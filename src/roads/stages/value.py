"""Stage value: a policy under Eq. 2, likelihood of the preferences less beta times the reverse KL (Fig 4).

    python -m roads.stages.value POLICY PAIRS SFT OUT --scale mini --seed 0
"""

from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import logsigmoid

from roads import candidates, config, generate, model, preferences, schema, stage


def value(policy: Path, pairs: Path, reference: Path, out: Path, cfg: schema.Scale, seed: int) -> None:
    """Write scores.npz, each [N], in nats per pair of the preference set:

    score           log_likelihood - beta * kl
    log_likelihood  log sigma(beta * [(log pi/pi_ref)(chosen) - (log pi/pi_ref)(rejected)]), as DPO has it (Thm 2.3)
    kl              log pi/pi_ref, mean over samples of pi at the pair's prompt: an unbiased estimate of the reverse KL
    chosen_logps    log pi(chosen), the other reading of Eq. 2's first term

    beta is DPO's, pi_ref the SFT policy for every policy, whatever it was trained from.
    """
    torch.set_num_threads(cfg.machine.threads)
    settings, beta = cfg.samples.value, cfg.dpo.beta
    used = {"samples": {"value": settings.model_dump()}, "beta": beta, "seed": seed}
    with stage.output(out, used, [policy, pairs, reference]) as folder:
        query, chosen, rejected = preferences.load(pairs, policy)
        sampled = generate.completions(policy, query, chosen.shape[1], settings, seed, cfg)
        # The pair's two completions and the policy's own share their prompt.
        both = torch.cat([torch.stack([chosen, rejected], 1), sampled], 1)
        ours, theirs = (candidates.in_batches(candidates.logps, model.load_policy(path, cfg.compute).eval(), query,
                                         both, label=name) for path, name in ((policy, "policy"),
                                                                              (reference, "reference")))
        ratios = (ours - theirs).double()
        log_likelihood, kl = logsigmoid(beta * (ratios[:, 0] - ratios[:, 1])), ratios[:, 2:].mean(1)
        scores = {"score": log_likelihood - beta * kl, "log_likelihood": log_likelihood, "kl": kl,
                  "chosen_logps": ours[:, 0].double()}
        np.savez(folder / "scores.npz", **{name: values.numpy() for name, values in scores.items()})
        metrics = {"training": stage.training(policy)}
        metrics |= {name: float(values.mean()) for name, values in scores.items()}
        # Two kinds of chance are in it, which prompts and which samples; this is of both together.
        stage.write_json(folder / "metrics.json", metrics | {"kl_standard_error": float(kl.std() / len(kl) ** 0.5)})


def _command() -> None:
    parser = stage.arguments(__doc__, "policy", "pairs", "reference", "out")
    parser.add_argument("--seed", type=stage.seed, required=True)
    a = parser.parse_args()
    value(a.policy, a.pairs, a.reference, a.out, config.load_scale(a.scale), a.seed)


if __name__ == "__main__":
    stage.main(_command)
