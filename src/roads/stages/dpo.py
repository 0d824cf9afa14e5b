"""Stage dpo: direct preference optimisation; offline, online and local RM differ only in what they read.

    python -m roads.stages.dpo PAIRS REFERENCE OUT --scale mini --seed 0             # offline DPO
    python -m roads.stages.dpo PAIRS REFERENCE OUT --scale mini --seed 0 --times 2   # DPO 2x
    python -m roads.stages.dpo PAIRS REFERENCE OUT --scale mini --seed 0 --online    # logits / sampling temperature
    python -m roads.stages.dpo PAIRS REFERENCE OUT --scale mini --seed 0 --local     # local RM: no reference
"""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from roads import candidates, config, model, preferences, schema, stage, train


def dpo_loss(policy_chosen_logps: Tensor, policy_rejected_logps: Tensor, reference_chosen_logps: Tensor,
             reference_rejected_logps: Tensor, beta: float) -> Tensor:
    """-log sigma(beta * [(log pi/pi_ref)(chosen) - (log pi/pi_ref)(rejected)]) per pair (Thm 2.3).

    All log-probs are sums over response tokens, shape [B]; the result is [B]. Without a reference (both its
    log-probs 0) this is the local RM's loss, Eq. 9. At step 0 policy = reference, so the loss is ln 2.
    """
    chosen = policy_chosen_logps - reference_chosen_logps
    rejected = policy_rejected_logps - reference_rejected_logps
    return -logsigmoid(beta * (chosen - rejected))


def dpo(pairs: Path, reference: Path, out: Path, cfg: schema.Scale, seed: int, *, times: int = 1, online: bool = False,
        local: bool = False) -> None:
    """Train from `reference` on the pairs.npz in `pairs`.

    Online DPO uses all the hyperparameters of offline DPO; only the data differ, and the logits of policy and
    reference are divided by the temperature that the pairs were sampled at (samples.online.logits_divided_by).
    """
    recipe = cfg.local if local else cfg.dpo
    recipe = recipe.model_copy(update={"epochs": times * recipe.epochs})
    temperature = cfg.samples.online.logits_divided_by if online else 1.0
    read = stage.fingerprint({}, [pairs, reference])  # gigabytes at the paper's scale: once for both keys

    def job() -> train.Job:
        query, chosen, rejected = preferences.load(pairs, reference)
        policy = model.load_policy(reference, cfg.compute)
        if local:
            reference_logps = torch.zeros(len(query), 2, device=policy.device)
        else:  # once for all epochs, and for every seed of the same pairs
            key = stage.fingerprint(schema.used(cfg, "compute"), [], read, temperature, stage.code(candidates, model),
                                    torch.__version__)
            reference_logps = preferences.reference_logps(policy, query, torch.stack([chosen, rejected], 1),
                                                          temperature, key).to(policy.device)

        def loss(i: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            logps = model.pair_logps(policy, query[i], chosen[i], rejected[i], temperature)
            references = reference_logps[i].T
            rewards = [recipe.beta * (ours - theirs).detach() for ours, theirs in zip(logps, references, strict=True)]
            told = preferences.told_apart(*rewards) | {"chosen_logp": logps[0].mean(), "rejected_logp": logps[1].mean()}
            return dpo_loss(*logps, *references, recipe.beta).mean(), told

        return train.Job(policy, loss, len(query), lengths=train.tokens(query, chosen, rejected), shards=recipe.shards,
                         also=stage.metrics_of(pairs, "dropped_as_ties"))

    used = {"local" if local else "dpo": recipe.model_dump(), "temperature": temperature, "seed": seed}
    train.run(out, job, recipe, cfg, used=used, reads=[pairs, reference], read=read, seed=seed,
              name="local" if local else "online" if online else "dpo")


def _command() -> None:
    parser = stage.arguments(__doc__, "pairs", "reference", "out")
    parser.add_argument("--seed", type=stage.seed, required=True)
    parser.add_argument("--times", type=int, default=1, help="this many times the epochs of params.yaml")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--online", action="store_true", help="divide logits by the online sampling temperature")
    kind.add_argument("--local", action="store_true", help="train the local RM: no reference (Eq. 9)")
    a = parser.parse_args()
    dpo(a.pairs, a.reference, a.out, config.load_scale(a.scale), a.seed, times=a.times, online=a.online,
        local=a.local)


if __name__ == "__main__":
    stage.main(_command, launch=True)
