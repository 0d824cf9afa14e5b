"""Stage sft: one epoch of maximum likelihood on reference summaries.

    python -m roads.stages.sft DATA BASE OUT --scale mini
"""

from pathlib import Path

import numpy as np
import torch

from roads import config, model, stage, train
from roads.tldr import PAD


def sft_loss(logps: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood per response token; logps [B] sums over responses of lengths [B]."""
    return -logps.sum() / lengths.sum().to(logps.device)


def sft(data: Path, base: Path, out: Path, cfg: config.Scale) -> None:
    """Fine-tune the base on sft.npz; a single SFT seed, as in the paper."""
    torch.set_num_threads(cfg.machine.threads)
    used = config.used(cfg, "sft")
    with stage.output(out, used, [data, base]) as folder:
        rows = np.load(data / "sft.npz")
        query, response = torch.from_numpy(rows["query"]), torch.from_numpy(rows["response"])
        policy = model.load_policy(base, cfg.compute)
        model.for_training(policy, cfg)
        lengths = (response != PAD).sum(1)

        def loss(i):
            return sft_loss(model.response_logps(policy, query[i], response[i]), lengths[i]), {}

        key = train.key_of(used, [data / "sft.npz", base], "sft")
        log = train.fit(policy, loss, len(query), cfg.sft, seed=0, key=key, label="sft", weights=lengths,
                        lengths=train.tokens(query, response), micro_batch=cfg.machine.micro_batch,
                        packed=model.is_packed(policy))
        train.save(policy, folder)
        stage.write_json(folder / "metrics.json", train.summary(log))
    train.forget(key)


def _command() -> None:
    parser = stage.arguments(__doc__, "data", "base", "out")
    a = parser.parse_args()
    sft(a.data, a.base, a.out, config.load_scale(a.scale))


if __name__ == "__main__":
    stage.main(_command, launch=True)
