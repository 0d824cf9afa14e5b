"""Which families of language models give here the numbers that they give themselves; stage base refuses the others.

Tiny ones with random weights; those of the head are scaled up, so that a softcap or a scale that were left out show.
"""

import pytest
import torch
import transformers
from conftest import ROOT

from roads import config, trees
from roads.stage import UserError
from roads.stages import base

SHAPE = dict(vocab_size=300, bos_token_id=0, eos_token_id=0, pad_token_id=1)
SIZE = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
            max_position_embeddings=256, **SHAPE)
SHARED = {**SIZE, "num_key_value_heads": 1}
FAMILIES = {  # the class of its configuration, and its settings
    "Pythia": ("GPTNeoX", SIZE), "Llama": ("Llama", SHARED), "Qwen2": ("Qwen2", SHARED),
    "Qwen3": ("Qwen3", {**SHARED, "head_dim": 32}), "Mistral": ("Mistral", {**SHARED, "sliding_window": None}),
    "OLMo2": ("Olmo2", SHARED), "Phi": ("Phi", SIZE), "StableLM": ("StableLm", SHARED),
    "GPT-2": ("GPT2", dict(n_embd=64, n_layer=2, n_head=2, n_positions=256, **SHAPE)),
    "OPT": ("OPT", dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, ffn_dim=128,
                        max_position_embeddings=256, word_embed_proj_dim=64, **SHAPE)),
    "Falcon": ("Falcon", dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, **SHAPE)),
    "Gemma3": ("Gemma3Text", {**SHARED, "head_dim": 32, "query_pre_attn_scalar": 32}),
}
REFUSED = {
    "a softcap: Gemma2": ("Gemma2", {**SHARED, "head_dim": 32, "query_pre_attn_scalar": 32,
                                     "final_logit_softcapping": 1.0}),
    "a scale: Cohere": ("Cohere", {**SIZE, "logit_scale": 0.0625}),
    "a scale: Granite": ("Granite", {**SIZE, "logits_scaling": 8.0}),
    "a window: Mistral": ("Mistral", {**SHARED, "sliding_window": 8}),
}


def model_of(family: str, settings: dict):
    torch.manual_seed(0)
    wanted = getattr(transformers, f"{family}Config")(**settings)
    policy = transformers.AutoModelForCausalLM.from_config(wanted, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for weight in policy.get_output_embeddings().parameters():
            weight *= 20
    return policy


@pytest.fixture
def scale():
    cfg = config.load_scale("rehearsal", ROOT / "params.yaml")
    return cfg.model_copy(update={"source": cfg.source.model_copy(update={"max_query_tokens": 40,
                                                                          "max_response_tokens": 12})})


@pytest.mark.parametrize("family, settings", FAMILIES.values(), ids=FAMILIES)
def test_a_family_gives_its_own_numbers(family, settings, scale):
    net = model_of(family, settings)
    if family in ("StableLm", "Falcon"):  # our sampler cannot change their attention: vLLM draws
        with pytest.raises(UserError, match="transformers lets nobody change its attention.*set compute.sampler: vllm"):
            base.check_against_itself(net, scale, "model x")
        scale = scale.model_copy(update={"compute": scale.compute.model_copy(update={"sampler": "vllm"})})
    base.check_against_itself(net, scale, "model x")


@pytest.mark.parametrize("family, settings", REFUSED.values(), ids=REFUSED)
def test_a_family_that_we_compute_otherwise_is_refused(family, settings, scale):
    said = r"^model x: (\S+ of \w+ is [\d.e+]+ nats from transformers' own forward: .*|\w+ does not run here \(.*\))$"
    with pytest.raises(UserError, match=said):
        base.check_against_itself(model_of(family, settings), scale, "model x")


def test_a_sampler_that_runs_a_model_in_another_way_is_refused(scale, monkeypatch):
    """As one would that forgets what completions have written."""
    net = model_of(*FAMILIES["Llama"])
    base.check_against_itself(net, scale, "model x")
    update = trees.Trees.update
    monkeypatch.setattr(trees.Trees, "update", lambda self, key, value, layer, *rest, **more: update(
        self, key * 0, value * 0, layer, *rest, **more))
    with pytest.raises(UserError, match="^model x: the sampler draws other tokens of LlamaForCausalLM than its own"):
        base.check_against_itself(net, scale, "model x")
    elsewhere = scale.model_copy(update={"compute": scale.compute.model_copy(update={"sampler": "vllm"})})
    base.check_against_itself(net, elsewhere, "model x")  # it draws by other means


def test_too_few_positions_are_refused(scale):
    few = model_of("Llama", {**SHARED, "max_position_embeddings": 50})
    with pytest.raises(UserError, match="^model x: 50 positions, and the scale's queries and responses take 52; lower"):
        base.check_against_itself(few, scale, "model x")


def test_nothing_is_dropped_in_training():
    policy = model_of(*FAMILIES["GPT-2"])
    assert policy.config.attn_pdrop == 0.1
    base.without_dropout(policy.config)
    assert {policy.config.attn_pdrop, policy.config.embd_pdrop, policy.config.resid_pdrop} == {0.0}
