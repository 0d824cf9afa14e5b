"""Stage base: pretrain the small base model on documents, the stand-in for a downloaded Pythia.

    python -m roads.base DATA OUT --scale mini
"""

from pathlib import Path

import numpy as np
import torch

from roads import config, model, stage, train
from roads.tldr import PAD


def language_model_loss(policy, tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted mean cross-entropy of tokens [B, L]; weights [B, L] >= 0, 0 at padding."""
    length = int((tokens != PAD).sum(1).max())
    tokens, weights = (part.to(policy.device) for part in (tokens[:, :length].long(), weights[:, 1:length]))
    logits = policy(tokens, use_cache=False).logits[:, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    return (losses * weights).sum() / weights.sum()


def base(data: Path, out: Path, cfg: config.Scale) -> None:
    """Train a random model on base.npz; seed 0 always, as one base serves every seed of the study."""
    torch.set_num_threads(cfg.machine.threads)
    used = config.used(cfg, "model", "base")
    with stage.output(out, used, [data]) as folder:
        rows = np.load(data / "base.npz")
        tokens, weights = torch.from_numpy(rows["tokens"]), torch.from_numpy(rows["weights"])
        vocab_size = stage.read_json(data / "metrics.json")["vocab_size"]
        policy = model.new_policy(cfg.model, vocab_size, seed=0, compute=cfg.compute)
        model.for_training(policy, cfg)
        key = train.key_of(used, [data / "base.npz"], "base")
        log = train.fit(policy, lambda i: (language_model_loss(policy, tokens[i], weights[i]), {}),
                        len(tokens), cfg.base, seed=0, key=key, label="base", weights=weights[:, 1:].sum(1),
                        lengths=train.tokens(tokens), micro_batch=cfg.machine.micro_batch)
        train.save(policy, folder)
        stage.write_json(folder / "metrics.json", train.summary(log))
    train.forget(key)


def _command() -> None:
    parser = stage.arguments(__doc__, "data", "out")
    a = parser.parse_args()
    base(a.data, a.out, config.load_scale(a.scale))


if __name__ == "__main__":
    stage.main(_command)
