"""Stage sft: one epoch of maximum likelihood on reference summaries.

    python -m roads.stages.sft DATA BASE OUT --scale mini
"""

from pathlib import Path

import torch

from roads import arrays, config, losses, model, schema, stage, train
from roads.tldr import PAD


def sft_loss(logps: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood per response token; logps [B] sums over responses of lengths [B]."""
    return -logps.sum() / lengths.sum().to(logps.device)


def sft(data: Path, base: Path, out: Path, cfg: schema.Scale) -> None:
    """Fine-tune the base on sft.npz; a single SFT seed, as in the paper. The loss counts the response, or all."""

    def job() -> train.Job:
        rows = arrays.tokens(data / "sft.npz", model=base)
        query, response = torch.from_numpy(rows["query"]), torch.from_numpy(rows["response"])
        policy, lengths = model.load_policy(base, cfg.compute), (response != PAD).sum(1)
        if cfg.sft.on == "query and response":
            whole = [torch.cat([q[q != PAD], r[r != PAD]]) for q, r in zip(query, response, strict=True)]
            tokens = torch.nn.utils.rnn.pad_sequence(whole, batch_first=True, padding_value=PAD)
            real = (tokens != PAD).float()

            def of_all(i: torch.Tensor) -> tuple[torch.Tensor, dict]:
                return losses.language_model_loss(policy, tokens[i], real[i]), {}

            return train.Job(policy, of_all, train.tokens(tokens), weights=real[:, 1:].sum(1), pack=False, start=True)

        def loss(i: torch.Tensor) -> tuple[torch.Tensor, dict]:
            return sft_loss(model.response_logps(policy, query[i], response[i]), lengths[i]), {}

        return train.Job(policy, loss, train.tokens(query, response), weights=lengths, start=True)

    train.run(out, job, cfg.sft, cfg, used=schema.used(cfg, "sft"), reads=[data, base], seed=0, name="sft")


def _command() -> None:
    parser = stage.arguments(__doc__, "data", "base", "out")
    a = parser.parse_args()
    sft(a.data, a.base, a.out, config.load_scale(a.scale))


if __name__ == "__main__":
    stage.main(_command, launch=True)
