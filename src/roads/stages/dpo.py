"""Stage dpo: direct preference optimisation; offline, online and local RM differ only in what they read.

    python -m roads.stages.dpo PAIRS REFERENCE OUT --scale mini --seed 0             # offline DPO
    python -m roads.stages.dpo PAIRS REFERENCE OUT --scale mini --seed 0 --times 2   # DPO 2x
    python -m roads.stages.dpo PAIRS REFERENCE OUT --scale mini --seed 0 --online    # logits / sampling temperature
    python -m roads.stages.dpo PAIRS REFERENCE OUT --scale mini --seed 0 --local     # local RM: no reference
"""

from pathlib import Path

import torch
from torch import Tensor

from roads import candidates, config, model, preferences, schema, stage, train
from roads.preference_losses import loss_of
from roads.tldr import PAD


def dpo(pairs: Path, reference: Path, out: Path, cfg: schema.Scale, seed: int, *, times: int = 1, online: bool = False,
        local: bool = False) -> None:
    """Train from `reference` on the pairs.npz in `pairs`.

    Online DPO uses all the hyperparameters of offline DPO; only the data differ, and the logits of policy and
    reference are divided by the temperature that the pairs were sampled at (samples.online.logits_divided_by).
    Its loss is dpo.online_loss, that of offline training dpo.loss (preference_losses.py).
    """
    recipe = cfg.local if local else cfg.dpo
    recipe = recipe.model_copy(update={"epochs": times * recipe.epochs})
    temperature = cfg.samples.online.logits_divided_by if online else 1.0
    name, kl = ("dpo", 0.0) if local else (recipe.online_loss if online else recipe.loss, recipe.kl)
    read = stage.fingerprint({}, [pairs, reference])  # gigabytes at the paper's scale: once for both keys

    def job() -> train.Job:
        query, chosen, rejected = preferences.load(pairs, reference)
        policy = model.load_policy(reference, cfg.compute)
        sides = torch.stack([chosen, rejected], 1)
        more = preferences.beside(pairs, rewards=name == "rebel") | {"lengths": (sides != PAD).sum(2)}
        more = {key: values.to(policy.device) for key, values in more.items()}
        if local:
            reference_logps = torch.zeros(len(query), 2, device=policy.device)
        else:  # once for all epochs, and for every seed of the same pairs
            key = stage.fingerprint(schema.used(cfg, "compute"), [], read, temperature, stage.code(candidates, model),
                                    torch.__version__)
            reference_logps = preferences.reference_logps(policy, query, sides, temperature, key).to(policy.device)

        def loss(i: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            logps = model.pair_logps(policy, query[i], chosen[i], rejected[i], temperature)
            references = reference_logps[i].T
            rewards = [recipe.beta * (ours - theirs).detach() for ours, theirs in zip(logps, references, strict=True)]
            told = preferences.told_apart(*rewards) | {"chosen_logp": logps[0].mean(), "rejected_logp": logps[1].mean()}
            beside = {key: values[i].t() for key, values in more.items()}
            return loss_of(name, torch.stack(logps), references, recipe.beta, kl=kl, **beside).mean(), told

        start = cfg.rounds > 1 if online else not local and times == 1
        return train.Job(policy, loss, train.tokens(query, chosen, rejected), shards=recipe.shards, start=start,
                         also=stage.metrics_of(pairs, "dropped_as_ties"))

    used = {"local": recipe.model_dump()} if local else {"dpo": recipe.told()}
    used |= {"temperature": temperature, "seed": seed}
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
