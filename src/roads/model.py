"""Policy and reward model, both on the trunk of a causal LM: make, load, save; response log-probs and rewards."""

import errno
import functools
import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedModel,
)
from transformers.utils.logging import disable_progress_bar

from roads import packed, schema, stage
from roads.tldr import EOS, PAD

LOGITS = 2**26  # at a time: 256 MiB
# The CPU, fp32, sdpa: what a model is loaded with unless a scale says otherwise.
PLAIN = schema.Compute(device="cpu", precision="fp32", attention="sdpa", sampler="tree")

disable_progress_bar()  # of loading and saving; the long work has bars of its own


def new_policy(cfg: schema.FromScratch, vocab_size: int, seed: int, compute: schema.Compute = PLAIN) -> PreTrainedModel:
    """A policy of Pythia's architecture with random weights, fp32; precision and device as `load_policy` has them."""
    torch.manual_seed(seed)
    policy = GPTNeoXForCausalLM(GPTNeoXConfig(
        vocab_size=vocab_size, hidden_size=cfg.hidden_size, num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads, intermediate_size=4 * cfg.hidden_size, rotary_pct=1.0,
        max_position_embeddings=cfg.max_positions, bos_token_id=EOS, eos_token_id=EOS, pad_token_id=PAD,
    ))
    return _placed(policy, compute)


def load_policy(path: Path, compute: schema.Compute = PLAIN, layers: int | None = None) -> PreTrainedModel:
    """The policy in a folder, whatever its architecture: fp32 weights, on the CPU or this process's GPU. `layers`: only
    so many, from the bottom.

    Attention is sdpa: scoring and sampling need masks of their own. `for_training` says when it is flash.
    """
    policy = _whole(AutoModelForCausalLM, path, torch.float32, layers)
    return _placed(policy, compute)


def load_to_sample(path: Path, compute: schema.Compute) -> PreTrainedModel:
    """The policy in a folder, with weights in compute's precision: nothing is cast while it draws."""
    dtype = torch.bfloat16 if compute.precision == "bf16" else torch.float32
    return _whole(AutoModelForCausalLM, path, dtype).to(device(compute)).eval()


def _whole(kind: type, path: Path, dtype: torch.dtype, layers: int | None = None) -> PreTrainedModel:
    """The model in a folder, or its first `layers` alone.

    Raises:
        UserError: its checkpoint lacks a tensor, which would be random then, or a weight of it is no number.
    """
    cut = {} if layers is None else {"num_hidden_layers": layers}
    options = {"dtype": dtype, "attn_implementation": "sdpa", "output_loading_info": True}
    try:
        net, found = kind.from_pretrained(path, **options, **cut)
    except Exception as error:  # cut, edited or of another tool: transformers and safetensors raise of every kind
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EMFILE, errno.ENOMEM):
            raise
        reason = " ".join(str(error).split("\n")[0].split()) or type(error).__name__
        raise stage.UserError(f"{path}: not a whole checkpoint that transformers loads ({reason})") from None
    for problem, names in (("is missing", found["missing_keys"]), ("has another shape", found["mismatched_keys"])):
        if names:
            name = sorted(map(str, names))[0]
            raise stage.UserError(f"{path}: not a whole checkpoint of {type(net).__name__}: tensor {name} {problem}")
    for name, weight in net.named_parameters():
        if not torch.isfinite(weight).all():
            raise stage.UserError(f"{path}: tensor {name} has weights that are no finite numbers")
    return net


def _placed(policy: PreTrainedModel, compute: schema.Compute) -> PreTrainedModel:
    policy.to(device(compute))
    if compute.precision == "bf16":
        _autocast(policy.base_model)
        _autocast(policy.get_output_embeddings())
    return policy


def device(compute: schema.Compute) -> torch.device:
    """The CPU, or a GPU: where several processes train together, each one's own. The process joins the others here.

    Raises:
        UserError: compute.device is gpu and torch sees none.
    """
    if compute.device == "gpu" and not torch.cuda.is_available():
        raise stage.UserError(f"compute.device: gpu, and torch {torch.__version__} sees none; run the image with"
                              " `--gpus all`, or take a scale that computes on the CPU")
    return PartialState(cpu=compute.device == "cpu").device


def _autocast(module: nn.Module) -> None:
    """Run the module's forward in bf16 from now on, its weights staying fp32, whoever calls it."""
    forward, kind = module.forward, next(module.parameters()).device.type

    @functools.wraps(forward)
    def in_bf16(*args: object, **kwargs: object) -> Any:
        with torch.autocast(kind, torch.bfloat16):
            return forward(*args, **kwargs)

    module.forward = in_bf16


def for_training(net: "PreTrainedModel | RewardModel", cfg: schema.Scale, *, pack: bool = True) -> None:
    """Set what training alone has: flash attention or, on a GPU, packed rows; activations that are computed again.

    Args:
        pack: False where the loss calls the model itself. A packed model runs under a mask of packed rows alone.
    Raises:
        UserError: compute.attention is flash and the package flash_attn is not there.
    """
    trunk = net.trunk if isinstance(net, RewardModel) else net
    if cfg.compute.attention == "flash":
        if importlib.util.find_spec("flash_attn") is None:
            raise stage.UserError("compute.attention: flash needs the package flash_attn (the image has it);"
                                  " install it or set sdpa")
        trunk.set_attn_implementation("flash_attention_2")
    elif pack and trunk.device.type == "cuda" and os.environ.get("ACCELERATE_USE_FSDP") != "true":
        if packed.supports(trunk):
            packed.prepare(trunk)
    if cfg.machine.gradient_checkpointing:
        trunk.gradient_checkpointing_enable({"use_reentrant": False})


class RewardModel(nn.Module):
    """Trunk + one linear layer, read at the EOS of the response (Eq. 6); head ~ N(0, 1 / (d + 1))."""

    def __init__(self, trunk: PreTrainedModel):
        super().__init__()
        self.trunk = trunk
        self._no_split_modules = trunk._no_split_modules
        width = trunk.config.hidden_size
        self.head = nn.Linear(width, 1)
        nn.init.normal_(self.head.weight, std=(width + 1) ** -0.5)
        nn.init.zeros_(self.head.bias)

    @classmethod
    def from_policy(cls, path: Path, seed: int, compute: schema.Compute = PLAIN,
                    layers: int | None = None) -> "RewardModel":
        """On the trunk of the policy in a folder, or on its first `layers`; the head's weights follow from the seed, on
        any device."""
        policy = load_policy(path, compute, layers)
        torch.manual_seed(seed)
        return cls(policy.base_model).to(policy.device)

    @classmethod
    def load(cls, path: Path, compute: schema.Compute = PLAIN) -> "RewardModel":
        """What `save_pretrained` wrote; precision and device as `load_policy` has them."""
        model = cls(_whole(AutoModel, path, torch.float32))
        file = Path(path) / "head.safetensors"
        try:
            model.head.load_state_dict(load_file(file))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise stage.UserError(f"{file}: not a reward model's head ({str(error).splitlines()[0][:120]})") from None
        if not all(torch.isfinite(weight).all() for weight in model.head.parameters()):
            raise stage.UserError(f"{file}: weights that are no finite numbers")
        model.to(device(compute))
        if compute.precision == "bf16":
            _autocast(model.trunk)  # the head, one number wide, stays fp32
        return model

    def save_pretrained(self, path: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write the trunk and the head; from `state_dict` where this process has only a shard of the weights."""
        weights = state_dict or self.state_dict()
        trunk, head = ({name.removeprefix(part): value.contiguous() for name, value in weights.items()
                        if name.startswith(part)} for part in ("trunk.", "head."))
        self.trunk.save_pretrained(path, state_dict=trunk)
        save_file(head, Path(path) / "head.safetensors")

    def forward(self, query: Tensor, response: Tensor) -> Tensor:
        """Rewards [B] of responses [B, R] (padded right) to queries [B, Q] (padded left)."""
        query, response = trim(query, response)
        hidden = self.trunk(**_inputs(query, response, self.head.weight.device)).last_hidden_state.float()
        last = query.shape[1] + (response != PAD).sum(1) - 1
        return self.head(hidden[torch.arange(len(last)), last]).squeeze(1)


def copy_tokenizer(source: Path, out: Path) -> None:
    """What a folder has of a tokenizer, so that what is saved in `out` opens with AutoTokenizer as it is."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (source / name).exists():
            shutil.copyfile(source / name, out / name)


def trim(query: Tensor, response: Tensor) -> tuple[Tensor, Tensor]:
    """Drop the columns that are padding in every row."""
    longest_query = int((query != PAD).sum(1).max())
    longest_response = int((response != PAD).sum(1).max())
    return query[:, query.shape[1] - longest_query :], response[:, :longest_response]


def _positions(real: Tensor) -> Tensor:
    """Positions [B, L] that count from the first real token."""
    return (real.long().cumsum(1) - 1).clamp(min=0)


def _inputs(query: Tensor, response: Tensor, where: torch.device) -> dict[str, Tensor]:
    """The trunk's inputs for query + response, on its device."""
    tokens = torch.cat([query, response], dim=1).long()
    real = tokens != PAD
    # Padding on the right is never attended to by what comes before it: only the left needs a mask.
    inputs = {"input_ids": tokens}
    if not bool(real[:, 0].all()):
        inputs |= {"attention_mask": real.long(), "position_ids": _positions(real)}
    return {name: value.to(where) for name, value in inputs.items()} | {"use_cache": False}


def prefill(trunk: PreTrainedModel, query: Tensor) -> tuple[Tensor, DynamicCache]:
    """Run the prompts [B, Q], padded left, once: the last hidden states [B, d], and a cache of keys and values."""
    real = query != PAD
    cache = DynamicCache(config=trunk.config)
    out = trunk(query.long(), attention_mask=real.long(), position_ids=_positions(real), past_key_values=cache)
    return out.last_hidden_state[:, -1], cache


def response_logps(policy: PreTrainedModel, query: Tensor, response: Tensor, temperature: float = 1.0) -> Tensor:
    """Sum over the response of log softmax(logits / temperature): r_pi of Eq. 1.

    Args:
        query: [B, Q], padded left. response: [B, R], padded right, EOS included.
        temperature: online DPO divides the logits by the sampling temperature.
    Returns:
        Log-probabilities [B] in nats, fp32. Logits are computed at response positions only.
    """
    if is_packed(policy):
        return _packed_logps(policy, query, [response], temperature)[0]
    query, response = trim(query, response)
    hidden = policy.base_model(**_inputs(query, response, policy.device)).last_hidden_state
    return _sum_logps(policy, hidden[:, query.shape[1] - 1 : -1], response.to(policy.device), temperature)


def _sum_logps(policy: PreTrainedModel, hidden: Tensor, response: Tensor, temperature: float) -> Tensor:
    """Log-probs [B] of responses [B, R] from the hidden states [B, R, d] that predict each of their tokens."""
    logits = policy.get_output_embeddings()(hidden).float() / temperature
    token_logps = torch.log_softmax(logits, dim=-1).gather(2, response.long().unsqueeze(2)).squeeze(2)
    return (token_logps * (response != PAD)).sum(1)


def _run_pair(trunk: PreTrainedModel, query: Tensor, chosen: Tensor, rejected: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Run prompt + chosen + rejected as one sequence in which neither completion sees the other.

    Returns, for each of the two: its tokens [B, R], and the hidden states [B, 1 + R, d] of the prompt's last token and
    of its own. Gradients reach the prompt from both sides.
    """
    query, chosen = trim(query, chosen)
    rejected = trim(query, rejected)[1]
    tokens = torch.cat([query, chosen, rejected], dim=1).long()
    real = tokens != PAD
    part = torch.tensor([0] * query.shape[1] + [1] * chosen.shape[1] + [2] * rejected.shape[1])
    sees = torch.ones(len(part), len(part), dtype=torch.bool).tril() & ((part == 0) | (part[:, None] == part))
    mask = sees & real[:, None] | torch.eye(len(part), dtype=torch.bool)  # a softmax over nothing would be nan
    positions = _positions(real) - (part == 2) * (chosen != PAD).sum(1, keepdim=True)
    where = trunk.device
    hidden = trunk(input_ids=tokens.to(where), attention_mask=mask[:, None].to(where),
                   position_ids=positions.clamp(min=0).to(where), use_cache=False).last_hidden_state
    before, *states = hidden.split([query.shape[1], chosen.shape[1], rejected.shape[1]], dim=1)
    return [(side.to(where), torch.cat([before[:, -1:], own], 1))
            for side, own in zip((chosen, rejected), states, strict=True)]


def is_packed(net: "PreTrainedModel | RewardModel") -> bool:
    """Whether `for_training` made it run rows packed."""
    trunk = net.trunk if isinstance(net, RewardModel) else net
    return trunk.config._attn_implementation == packed.ATTENTION


def _packed_logps(policy: PreTrainedModel, query: Tensor, sides: list[Tensor], temperature: float) -> list[Tensor]:
    """`response_logps` [B] of each completion [B, R] of prompts [B, Q], which run as one sequence."""
    rows = packed.pack(query, *sides)
    return list(packed.logps(policy, rows, temperature, LOGITS // policy.config.vocab_size))


def _flash(trunk: PreTrainedModel) -> bool:
    """Flash attention takes no mask of ours: the two sides then run one after the other."""
    return trunk.config._attn_implementation == "flash_attention_2"


def pair_logps(policy: PreTrainedModel, query: Tensor, chosen: Tensor, rejected: Tensor,
               temperature: float = 1.0) -> list[Tensor]:
    """`response_logps` [B] of chosen and of rejected; their prompt [B, Q] is run once for both."""
    if is_packed(policy):
        return _packed_logps(policy, query, [chosen, rejected], temperature)
    if _flash(policy):
        return [response_logps(policy, query, side, temperature) for side in (chosen, rejected)]
    sides = _run_pair(policy.base_model, query, chosen, rejected)
    return [_sum_logps(policy, hidden[:, :-1], side, temperature) for side, hidden in sides]


def pair_rewards(rm: RewardModel, query: Tensor, chosen: Tensor, rejected: Tensor) -> list[Tensor]:
    """Rewards [B] of chosen and of rejected; their prompt [B, Q] is run once for both."""
    if is_packed(rm):
        rows = packed.pack(query, chosen, rejected)
        hidden = packed.run(rm.trunk, rows)
        return [rm.head(hidden[last].float()).squeeze(1) for last in rows.last.to(hidden.device)]
    if _flash(rm.trunk):
        return [rm(query, side) for side in (chosen, rejected)]
    sides = _run_pair(rm.trunk, query, chosen, rejected)
    rows = torch.arange(len(query))
    return [rm.head(hidden[rows, (side != PAD).sum(1)].float()).squeeze(1) for side, hidden in sides]
