"""Stage kl: how far a policy is from the SFT policy, reverse KL by samples of the policy at T = 1.

    python -m roads.stages.kl POLICY SFT DATA OUT --scale mini --seed 0

Writes metrics.json: kl, in nats of a whole completion, and its standard error.
"""

from pathlib import Path

import torch

from roads import arrays, candidates, config, generate, schema, stage

PROMPTS = "test_best_of_n.npz"


def mean_kl(policy: Path, sft: Path, prompts: Path, cfg: schema.Scale, seed: int) -> dict[str, float]:
    """Reverse KL from the SFT policy in nats, and its standard error: the mean of log pi/pi_sft over samples of pi."""
    rows = arrays.tokens(prompts, model=policy)
    query = torch.from_numpy(rows["query"])
    sampled = generate.completions(policy, query, rows["response"].shape[1], cfg.samples.value, seed, cfg)
    ratios = candidates.implicit_rewards(policy, sft, query, sampled, cfg.compute).double().mean(1)
    return {"kl": float(ratios.mean()), "kl_standard_error": float(ratios.std() / len(ratios) ** 0.5)}


def kl(policy: Path, sft: Path, data: Path, out: Path, cfg: schema.Scale, seed: int) -> None:
    """Write the policy's distance on the prompts of best-of-N."""
    torch.set_num_threads(cfg.machine.threads)
    used = schema.used(cfg, "compute") | {"samples": {"value": cfg.samples.value.model_dump()}, "seed": seed}
    with stage.output(out, used, [policy, sft, data]) as folder:
        stage.write_json(folder / "metrics.json", mean_kl(policy, sft, data / PROMPTS, cfg, seed))


def _command() -> None:
    parser = stage.arguments(__doc__, "policy", "sft", "data", "out")
    parser.add_argument("--seed", type=stage.seed, required=True)
    a = parser.parse_args()
    kl(a.policy, a.sft, a.data, a.out, config.load_scale(a.scale), a.seed)


if __name__ == "__main__":
    stage.main(_command)
