"""Completions that grow as trees, against the plain way: the whole sequence anew for every token, one by one."""

import pytest
import torch
import transformers

from roads import generate_tree
from roads.stage import UserError
from roads.tldr import EOS, PAD

VOCAB, LONGEST, N, LENGTH, T = 300, 20, 5, 12, 0.9
IDS = {"vocab_size": VOCAB, "bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": PAD}
SIZE = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 128,
        "max_position_embeddings": 256} | IDS
CONFIGS = {
    "GPTNeoX": SIZE, "Llama": SIZE | {"num_key_value_heads": 2}, "Qwen2": SIZE | {"num_key_value_heads": 3},
    "Qwen3": SIZE | {"num_key_value_heads": 2, "head_dim": 32}, "Olmo2": SIZE, "Phi": SIZE,
    "Mistral": SIZE | {"num_key_value_heads": 2, "sliding_window": None},
    "GPT2": {"n_embd": 96, "n_layer": 2, "n_head": 2, "n_positions": 256} | IDS,
    "OPT": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 128,
            "max_position_embeddings": 256, "word_embed_proj_dim": 64} | IDS,
}  # fmt: skip


def new(name: str, **more):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**CONFIGS.get(name, SIZE), **more)
    net = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for weight in net.get_output_embeddings().parameters():
            weight *= 1 if net.get_input_embeddings().weight is weight else 8  # spread the logits
    return net


@pytest.fixture(scope="module")
def asked():
    """Prompts of many lengths, and the draws of each."""
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(2, VOCAB, (length,), generator=generator) for length in (20, 11, 6, 3, 20, 9, 1)]
    return prompts, torch.rand(len(prompts), LENGTH, N, dtype=torch.double, generator=generator)


def grow(net, asked, places: int = 3) -> torch.Tensor:
    prompts, draws = asked
    found = torch.full((len(prompts), N, LENGTH), -1, dtype=torch.int32)
    requests = ((i, prompt, draws[i]) for i, prompt in enumerate(prompts))
    for i, completions in generate_tree.grow(net, requests, LONGEST, N, LENGTH, T, places):
        assert (found[i] == -1).all()  # every prompt once
        found[i] = completions
    return found


@torch.inference_mode()
def plain(net, asked) -> torch.Tensor:
    prompts, draws = asked
    found = torch.full((len(prompts), N, LENGTH), PAD, dtype=torch.int32)
    for i, prompt in enumerate(prompts):
        for which in range(N):
            text = prompt
            for step in range(LENGTH):
                logits = net(text[None]).logits[0, -1] / T
                logits[PAD] = -torch.inf
                below = logits.softmax(0).double().cumsum(0)
                token = int((below <= draws[i, step, which] * below[-1]).sum()) if step < LENGTH - 1 else EOS
                found[i, which, step] = token
                if token == EOS:
                    break
                text = torch.cat([text, torch.tensor([token])])
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_an_architecture_draws_what_the_plain_way_draws(asked, name, monkeypatch):
    """Also in the fixed shapes that a GPU's steps have, where flex attention sees the blocks that are used."""
    net = new(name)
    expected = plain(net, asked)
    assert torch.equal(grow(net, asked), expected)
    monkeypatch.setattr(generate_tree, "FIXED", True)
    assert torch.equal(grow(net, asked), expected)
    assert net.config._attn_implementation == "sdpa"


def test_what_is_beside_a_prompt_changes_none_of_its_tokens(asked, monkeypatch):
    net = new("GPTNeoX")
    together = grow(net, asked, places=7)
    assert all(torch.equal(grow(net, asked, places), together) for places in (1, 2, 5, 7))
    monkeypatch.setattr(generate_tree, "TOKENS", 25)  # of prompts that are run together
    assert torch.equal(grow(net, asked, places=7), together)


def test_every_distinct_prefix_is_run_once(asked, monkeypatch):
    net, count = new("GPTNeoX"), []
    run = generate_tree._Pass._run

    def counted(self, nodes):
        count.append(nodes.shape[1])
        return run(self, nodes)

    monkeypatch.setattr(generate_tree._Pass, "_run", counted)
    found = grow(net, asked)
    prefixes = {(i, *row[:end].tolist()) for i, rows in enumerate(found) for row in rows
                for end in range(1, LENGTH) if (row[:end] > EOS).all() and (row[:end] != PAD).all()}
    # What has one token left needs no model: it is EOS.
    assert sum(count) == sum(len(prefix) - 1 < LENGTH - 1 for prefix in prefixes)


def test_the_distribution_of_two_tokens_is_exact():
    """Frequencies of all pairs against the product of the model's probabilities, by a chi-squared statistic."""
    from scipy import stats

    torch.manual_seed(1)
    net = transformers.AutoModelForCausalLM.from_config(transformers.GPTNeoXConfig(**SIZE | {"vocab_size": 7})).eval()
    with torch.no_grad():
        net.get_output_embeddings().weight *= 8
    prompt, n = torch.tensor([3, 4, 6]), 20_000
    draws = torch.rand(n // 25, 3, 25, dtype=torch.double, generator=torch.Generator().manual_seed(2))
    requests = ((i, prompt, uniform) for i, uniform in enumerate(draws))
    found = torch.cat([rows for _, rows in generate_tree.grow(net, requests, 3, 25, 3, 1.0, 100)])

    def probabilities(text):
        logits = net(text[None]).logits[0, -1].detach().double()
        logits[PAD] = -torch.inf
        return logits.softmax(0)

    first, expected = probabilities(prompt), {}
    for token in range(7):
        if token == EOS:
            expected[EOS, PAD] = float(first[EOS])
        elif token != PAD:
            second = probabilities(torch.cat([prompt, torch.tensor([token])]))
            expected |= {(token, after): float(first[token] * second[after]) for after in range(7) if after != PAD}
    seen = {pair: 0 for pair in expected}
    for pair in found[:, :2].tolist():
        seen[tuple(pair)] += 1
    enough = [pair for pair in expected if n * expected[pair] >= 5]
    assert len(enough) > 15 and n * (1 - sum(expected[pair] for pair in enough)) < 20
    counts = torch.tensor([seen[pair] for pair in enough], dtype=torch.double)
    wanted = torch.tensor([expected[pair] for pair in enough], dtype=torch.double)
    assert stats.chisquare(counts, wanted / wanted.sum() * counts.sum()).pvalue > 1e-4


def test_draws_at_the_edges_find_tokens_that_can_be_drawn():
    logits = torch.full((1, 300), -torch.inf)
    logits[0, [5, 130, 299]] = torch.tensor([0.0, 0.0, 0.0])
    uniform = torch.tensor([0.0, 1 / 3 - 1e-9, 1 / 3 + 1e-9, 2 / 3 + 1e-9, 1 - 2**-53], dtype=torch.double)
    row = torch.zeros(len(uniform), dtype=torch.long)
    assert generate_tree.draw(logits, row, uniform, 1.0).tolist() == [5, 5, 130, 299, 299]


@pytest.mark.parametrize("name, more, message", [
    ("Falcon", {}, "falcon: transformers lets nobody change its attention"),
    ("Gemma2", {"num_key_value_heads": 2, "head_dim": 16}, "Gemma2Attention: softcap is not in this sampler"),
    ("Mistral", {"num_key_value_heads": 2, "sliding_window": 8}, "a window of 8 tokens is less than a prompt"),
])  # fmt: skip
def test_what_it_cannot_do_is_said(asked, name, more, message):
    size = {key: value for key, value in CONFIGS.get(name, SIZE).items() if key not in more}
    if name == "Falcon":
        size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2} | IDS
    torch.manual_seed(0)
    net = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")(**size, **more)).eval()
    with pytest.raises(UserError, match=message):
        grow(net, asked)
