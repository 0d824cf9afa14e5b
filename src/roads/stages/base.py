"""Stage base: where every policy begins. A small model pretrained here, or one of the hub or of a package.

    python -m roads.stages.base DATA OUT --scale mini       # pretrain on base.npz, the stand-in for Pythia
    python -m roads.stages.base DATA OUT --scale paper      # fetch the model that params.yaml names
    python -m roads.stages.base DATA OUT --scale real       # dequantise the one that a package holds

From here on EOS is token 0 and padding token 1, whatever the tokenizer: see `renumber`.
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel

from roads import arrays, candidates, config, generate, hub, losses, model, schema, stage, tldr, train
from roads.tldr import EOS, PAD

TOLERANCE = 0.01  # nats of a whole response, in fp32
ROUNDING = 0.02  # of the distribution function of a token; a model that is run in another way is far beyond it
SINK = 10  # times as long as the states of other tokens; where a token is no sink of attention they are about as long


def base(data: Path, out: Path, cfg: schema.Scale) -> None:
    """Train a random model on base.npz; one base serves every seed of the study."""

    def job() -> train.Job:
        rows = arrays.load(data / "base.npz", "tokens", "weights")
        tokens, weights = torch.from_numpy(rows["tokens"]), torch.from_numpy(rows["weights"])
        vocab_size = stage.read_json(data / "metrics.json")["vocab_size"]
        policy = model.new_policy(cfg.model, vocab_size, seed=cfg.base.seed, compute=cfg.compute)

        def loss(i: torch.Tensor) -> tuple[torch.Tensor, dict]:
            return losses.language_model_loss(policy, tokens[i], weights[i]), {}

        return train.Job(policy, loss, train.tokens(tokens), weights=weights[:, 1:].sum(1), start=True,
                         pack=False)  # language_model_loss calls the model itself

    train.run(out, job, cfg.base, cfg, used=schema.used(cfg, "model") | {"base": cfg.base.told()},
              reads=[data], seed=cfg.base.seed, name="base")


@torch.no_grad()
def swap_rows(policy: PreTrainedModel, places: list[tuple[int, int]]) -> None:
    """Two rows change places, one pair after the other, in the embeddings and in the output head where there is one."""
    head = policy.get_output_embeddings()
    tensors = [policy.get_input_embeddings().weight, getattr(head, "weight", None), getattr(head, "bias", None)]
    if tensors[1] is tensors[0]:  # tied
        del tensors[0]
    for tensor in tensors:
        for a, b in places if tensor is not None else ():
            tensor[[a, b]] = tensor[[b, a]]


@torch.no_grad()
def renumber(policy: PreTrainedModel, eos_id: int, pad_id: int, vocab_size: int) -> None:
    """Permute the rows of embeddings and output head so that EOS is 0 and padding 1, as data.py does in the tokenizer.
    Where the model has no padding token a row is appended first, the mean of the others."""
    if policy.get_input_embeddings().weight.shape[0] < vocab_size:
        policy.resize_token_embeddings(vocab_size, mean_resizing=False)
        head = policy.get_output_embeddings()
        for tensor in (policy.get_input_embeddings().weight, head.weight, getattr(head, "bias", None)):
            if tensor is not None:
                tensor[-1] = tensor[:-1].mean(0)
    swap_rows(policy, tldr.swaps(eos_id, pad_id))
    from transformers import GenerationConfig

    ids = {"bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": PAD}
    policy.config.update(ids)
    policy.generation_config = GenerationConfig(**ids)  # its own may ask for other sampling than ours


def without_dropout(config: PretrainedConfig) -> None:
    """GPT-2 and others drop a tenth of their activations in training: every run would give other bits."""
    for name, value in config.get_text_config().to_dict().items():
        if ("dropout" in name or "pdrop" in name) and isinstance(value, float) and value:
            setattr(config.get_text_config(), name, 0.0)


@torch.no_grad()
def check_against_itself(policy: PreTrainedModel, cfg: schema.Scale, where: str) -> None:
    """Check that our three ways to log-probs, and the sampler, agree with the model's own forward pass, on rows as long
    as the scale's, one of them padded.

    Raises:
        UserError: too few positions, or other numbers: a softcap, a scale or a window that our ways leave out.
    """
    length, width = cfg.source.max_query_tokens, cfg.source.max_response_tokens
    room = getattr(policy.config.get_text_config(), "max_position_embeddings", None) or math.inf
    if length + width > room:
        raise stage.UserError(f"{where}: {room} positions, and the scale's queries and responses take {length + width};"
                              " lower source.max_query_tokens")
    generator, size = torch.Generator().manual_seed(0), policy.get_input_embeddings().weight.shape[0]
    query = torch.randint(2, size, (2, length), generator=generator)
    response = torch.randint(2, size, (2, 2, width), generator=generator)
    query[1, : length // 3], response[1, 0, width // 2 :] = PAD, PAD

    def logits(row: torch.Tensor) -> torch.Tensor:
        return policy(row[row != PAD][None].to(policy.device)).logits[0].float().cpu()

    def own(prompt: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
        words = answer[answer != PAD]
        scores = torch.log_softmax(logits(torch.cat([prompt, answer]))[-len(words) - 1 : -1], 1)
        return scores.gather(1, words[:, None]).sum()

    there = [tokens.to(policy.device) for tokens in (query, response)]
    expected = torch.stack([torch.stack([own(q, answer) for answer in answers]) for q, answers in zip(query, response)])
    try:
        ways = {"response_logps": torch.stack([model.response_logps(policy, query, response[:, i]) for i in (0, 1)], 1),
                "pair_logps": torch.stack(list(model.pair_logps(policy, query, response[:, 0], response[:, 1])), 1),
                "candidates.logps": candidates.logps(policy, *there)}
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise stage.UserError(f"{where}: {type(policy).__name__} does not run here ({error})") from None
    far = {name: float((found.cpu() - expected).abs().max()) for name, found in ways.items()}
    worst = max(far, key=far.__getitem__)
    if not far[worst] <= TOLERANCE:
        raise stage.UserError(f"{where}: {worst} of {type(policy).__name__} is {far[worst]:.2g} nats from transformers'"
                              " own forward: a softcap, a scale or a window is left out here; take another model")
    if cfg.compute.sampler == "tree":
        check_sampler(policy, query, min(width, 8), where)


@torch.no_grad()
def check_sampler(policy: PreTrainedModel, query: torch.Tensor, length: int, where: str) -> None:
    """Whether tokens that the sampler draws for queries [B, Q] are those that the model's own forward gives at the same
    numbers from 0 to 1, to within ROUNDING of its distribution function.

    Raises:
        UserError: they are not.
    """
    n = 3
    draws = torch.rand(length, len(query), n, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    drawn = generate.complete(policy, query, n, length, 1.0, torch.Generator().manual_seed(1)).long()
    furthest = 0.0
    for i, prompt in enumerate(query):
        prompt = prompt[prompt != PAD]
        for j, answer in enumerate(drawn[i]):
            words = answer[answer != PAD][: length - 1]  # the last one is EOS, whatever the model says
            logits = policy(torch.cat([prompt, words])[None].to(policy.device)).logits[0, len(prompt) - 1 : -1]
            logits[:, PAD] = -torch.inf
            below = logits.double().softmax(1).cumsum(1).cpu()
            high = below.gather(1, words[:, None])[:, 0]
            low = torch.where(words > 0, below.gather(1, (words - 1).clamp(min=0)[:, None])[:, 0], 0.0)
            uniform = draws[: len(words), i, j]
            furthest = max(furthest, float(torch.maximum(low - uniform, uniform - high).max()))
    if furthest > ROUNDING:
        raise stage.UserError(f"{where}: the sampler draws other tokens of {type(policy).__name__} than its own "
                              f"forward ({furthest:.2g} of its distribution away); set compute.sampler: vllm")


@torch.no_grad()
def end_over_others(policy: PreTrainedModel, texts: list[torch.Tensor]) -> float:
    """How long the state of a text's last token is against those of the tokens before it: the median over tokens, as
    attention rests on the first one in many models, the mean over texts, the largest over layers."""
    ratios = []
    for text in texts:
        states = policy.base_model(text[None].to(policy.device), output_hidden_states=True).hidden_states
        sizes = torch.stack([state[0].float().norm(dim=1) for state in states])
        ratios.append(sizes[:, -1] / sizes[:, :-1].median(1).values)
    return float(torch.stack(ratios).mean(0).max())


def fetch(data: Path, out: Path, cfg: schema.Scale) -> None:
    """Write the pretrained model that the scale names, fp32, and which commit or GGUF file of it this is.

    It says so where the token that ends a text is a sink of attention: its states are then nearly the same huge numbers
    whatever the text, and a reward model, which reads there (Eq. 6), learns more slowly.

    Raises:
        UserError: no such model or revision, one that cannot be fetched, or one with fewer tokens than its tokenizer.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    with stage.output(out, schema.used(cfg, "model", "base"), [data]) as folder:
        tokens = stage.read_json(data / "metrics.json")
        if cfg.model.kind == "packaged":
            file = hub.gguf(cfg.model.name)
            source, version, options = file.parent, {"sha256": stage.sha256(file)}, {"gguf_file": file.name}
        else:
            source, commit = hub.fetch(cfg.model.name, cfg.model.revision, ["config.json"])
            source = source if commit is None else cfg.model.name
            version, options = {"commit": commit}, {"revision": commit}
        where = f"model {cfg.model.name}"
        try:
            rows = AutoConfig.from_pretrained(source, **options).get_text_config().vocab_size
            is_new = tokens["pad_id"] == tokens["vocab_size"] - 1  # data.py puts a new padding token last
            if rows < tokens["vocab_size"] - is_new:
                raise stage.UserError(f"{where}: {rows} embeddings for {tokens['vocab_size']} tokens of its tokenizer")
            policy = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options)
        except (OSError, ValueError) as error:
            reason = str(error).strip().split("\n")[0]
            raise stage.UserError(f"{where}: not a causal language model that transformers loads ({reason})") from None
        if getattr(policy, "hf_quantizer", None):  # it is dequantised, and saved as any other model
            policy.hf_quantizer.remove_quantization_config(policy)
        renumber(policy, tokens["eos_id"], tokens["pad_id"], tokens["vocab_size"])
        without_dropout(policy.config)
        check_against_itself(policy.eval().to(model.device(cfg.compute)), cfg, where)
        rows = arrays.tokens(data / "sft.npz")
        whole = torch.from_numpy(np.hstack([rows["query"], rows["response"]])[:8]).long()
        if (times := end_over_others(policy, [row[row != PAD] for row in whole])) > SINK:
            token = tldr.load_tokenizer(data / "tokenizer.json").id_to_token(EOS)
            print(f"{where}: at {token}, which ends a text, its states are {times:.0f} times as long as elsewhere and "
                  "much the same after any text, so that a reward model, which reads there, learns slowly; let another "
                  "token end texts: model.eos of a packaged model, eos_token in others' tokenizer_config.json",
                  file=sys.stderr)
        policy.save_pretrained(folder)
        model.copy_tokenizer(data, folder)
        stage.write_json(folder / "metrics.json", version | {"parameters": policy.num_parameters()})


def _command() -> None:
    parser = stage.arguments(__doc__, "data", "out")
    a = parser.parse_args()
    cfg = config.load_scale(a.scale)
    (base if cfg.model.kind == "new" else fetch)(a.data, a.out, cfg)


if __name__ == "__main__":
    stage.main(_command)
