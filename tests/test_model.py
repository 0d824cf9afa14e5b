"""Policy and reward model: padding never changes a number, and the reward is read at EOS."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from roads import candidates, generate, generate_tree, model
from roads.stage import UserError
from roads.stages.rank import reward_scores
from roads.tldr import EOS, PAD


@pytest.fixture
def reward_model(policy):
    torch.manual_seed(0)
    return model.RewardModel(policy.base_model).eval()


def alone(query, response):
    """The same row without padding, as a batch of one."""
    return query[query != PAD][None], response[response != PAD][None]


def test_padding_changes_no_logp_and_no_reward(policy, reward_model, rows):
    for function in (lambda q, r: model.response_logps(policy, q, r), reward_model):
        together = function(*rows)
        one_by_one = torch.cat([function(*alone(q, r)) for q, r in zip(*rows, strict=True)])
        assert torch.allclose(together, one_by_one, rtol=1e-5, atol=1e-6)
        more = torch.nn.functional.pad(rows[0], (3, 0), value=PAD), torch.nn.functional.pad(rows[1], (0, 4), value=PAD)
        assert torch.equal(function(*more), together)


def test_the_reward_is_read_at_eos(reward_model, rows):
    query, response = (part[:1] for part in rows)  # the response is 10 11 EOS PAD PAD
    hidden = reward_model.trunk(torch.cat(alone(query[0], response[0]), 1)).last_hidden_state
    assert torch.allclose(reward_model(query, response), reward_model.head(hidden[:, -1])[:, 0], rtol=1e-5, atol=1e-6)
    assert int(torch.cat(alone(query[0], response[0]), 1)[0, -1]) == EOS
    assert not torch.allclose(reward_model.head(hidden[:, -2])[:, 0], reward_model(query, response))


def test_the_head_starts_small(policy):
    """Head ~ N(0, 1 / sqrt(d + 1)): rewards start of order one (Table 2)."""
    weights = torch.cat([model.RewardModel(policy.base_model).head.weight.flatten() for _ in range(200)])
    assert weights.std().item() == pytest.approx(33**-0.5, rel=0.05)


@pytest.mark.parametrize("damage", ["gone", "cut", "other", "nan"])
def test_a_head_that_is_none_is_one_line(tmp_path, reward_model, damage):
    reward_model.save_pretrained(tmp_path)
    file = tmp_path / "head.safetensors"
    if damage == "gone":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-4])
    else:
        weight = torch.full((1, 32), torch.nan) if damage == "nan" else torch.zeros(1, 31)
        save_file({"weight": weight, "bias": torch.zeros(1)}, file)
    with pytest.raises(UserError) as error:
        model.RewardModel.load(tmp_path)
    assert str(error.value).startswith(f"{file}: ") and "\n" not in str(error.value)


def test_a_cut_reward_model_has_the_policys_first_layers(tmp_path, policy, rows):
    """Its reward is the head's of the trunk's hidden state after that many layers, and the final norm."""
    policy.save_pretrained(tmp_path / "sft")
    rm = model.RewardModel.from_policy(tmp_path / "sft", 0, layers=1).eval()
    trunk = policy.base_model
    trunk.layers, whole = trunk.layers[:1], trunk.layers
    expected = model.RewardModel(trunk).eval()
    expected.head = rm.head
    assert len(rm.trunk.layers) == 1 < len(whole) and torch.equal(rm(*rows), expected(*rows))
    trunk.layers = whole
    assert not torch.allclose(rm(*rows), expected(*rows))
    rm.save_pretrained(tmp_path / "rm")
    assert torch.equal(model.RewardModel.load(tmp_path / "rm")(*rows), rm(*rows))
    with pytest.raises(UserError, match="sft: not a whole checkpoint .*layers.2.* is missing"):
        model.RewardModel.from_policy(tmp_path / "sft", 0, layers=3)


def test_save_and_load(tmp_path, policy, reward_model, rows):
    policy.save_pretrained(tmp_path / "policy")
    reward_model.save_pretrained(tmp_path / "rm")
    again = model.load_policy(tmp_path / "policy").eval()
    assert torch.equal(model.response_logps(again, *rows), model.response_logps(policy, *rows))
    assert torch.equal(model.RewardModel.load(tmp_path / "rm").eval()(*rows), reward_model(*rows))


@pytest.mark.parametrize("fault, message", [
    ("missing", r"not a whole checkpoint of GPTNeoX\w+: tensor \S*layers\.1\.mlp\.dense_4h_to_h\.weight is missing"),
    ("renamed", r"tensor \S*layers\.1\.mlp\.dense_4h_to_h\.weight is missing"),
    ("nan", r"tensor \S*layers\.1\.mlp\.dense_4h_to_h\.weight has weights that are no finite numbers"),
])
@pytest.mark.parametrize("kind", ["policy", "reward"])
def test_a_checkpoint_that_is_not_whole_is_refused(tmp_path, policy, reward_model, fault, message, kind):
    """Instead of random weights with a warning, or rewards that are NaN."""
    (policy if kind == "policy" else reward_model).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in weights if name.endswith("layers.1.mlp.dense_4h_to_h.weight"))
    tensor = weights.pop(name)
    if fault == "renamed":
        weights[name.replace("dense", "danse")] = tensor
    if fault == "nan":
        tensor[0, 0] = torch.nan
        weights[name] = tensor
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"^{re.escape(str(tmp_path))}: .*{message}$"):
        model.load_policy(tmp_path) if kind == "policy" else model.RewardModel.load(tmp_path)


def test_candidate_scores_equal_one_forward_each(tmp_path, reward_model, rows):
    reward_model.save_pretrained(tmp_path)
    query = rows[0].int().numpy()
    order = torch.tensor([[0, 1, 0], [2, 2, 3], [1, 3, 2], [3, 0, 3]])
    completions = rows[1][order].int().numpy()  # [4, 3, 5], some twice under one prompt
    scores = reward_scores(query, completions, tmp_path, model.PLAIN)
    for i in range(4):
        for j in range(3):
            single = reward_model(*alone(rows[0][i], rows[1][order[i, j]])).item()
            assert scores[i, j] == pytest.approx(single, rel=1e-5, abs=1e-6)


def llama(kind: str):
    """A tiny Llama or Qwen2: grouped keys, and Qwen2's biases."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    config_of, net = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}[kind]
    torch.manual_seed(4)
    return net(config_of(vocab_size=20, hidden_size=32, intermediate_size=64, num_hidden_layers=2, pad_token_id=PAD,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, bos_token_id=EOS,
                         eos_token_id=EOS)).eval()


def completions_of(n: int, longest: int = 5) -> torch.Tensor:
    """[4, n, longest + 1] of three words: equal ones, shared beginnings, one that is just EOS, one cut nowhere."""
    drawn = torch.Generator().manual_seed(n)
    found = torch.randint(5, 8, (4, n, longest + 1), generator=drawn)
    lengths = torch.randint(0, longest + 1, (4, n, 1), generator=drawn)
    place = torch.arange(longest + 1)
    found = found.where(place < lengths, EOS).where(place <= lengths, PAD)
    found[0, 0], found[1, -1] = torch.tensor([EOS] + longest * [PAD]), torch.tensor(longest * [6] + [EOS])
    if n > 2:
        found[:, 1] = found[:, 0]  # equal
        found[2, 0] = torch.tensor([5, 6, EOS, PAD, PAD, PAD])
        found[2, 2] = torch.tensor([5, 6, 7, EOS, PAD, PAD])  # continues where the other ends
    return found


@pytest.mark.parametrize("kind", ["neox", "llama", "qwen2"])
@pytest.mark.parametrize("n", [1, 2, 25])
def test_a_tree_of_candidates_equals_one_forward_each(policy, rows, kind, n):
    net = policy if kind == "neox" else llama(kind)
    rm = model.RewardModel(net.base_model).eval()
    query, completions = rows[0], completions_of(n)
    together = (candidates.in_batches(candidates.rewards, rm, query, completions, label=""),
                candidates.in_batches(candidates.logps, net, query, completions, 0.7, label="", budget=60))
    assert torch.equal(together[0], candidates.rewards(rm, query, completions))
    for i in range(len(query)):
        for j in range(n):
            row = alone(query[i], completions[i, j])
            assert together[0][i, j].item() == pytest.approx(rm(*row).item(), rel=1e-5, abs=1e-6)
            assert together[1][i, j].item() == pytest.approx(model.response_logps(net, *row, 0.7).item(), rel=1e-5)


def test_every_distinct_prefix_is_run_once(policy, rows):
    """[5, 6, EOS] and [5, 7, EOS] are five nodes, two of which nothing follows: log-probs do without those."""
    a, b = [5, 6, EOS], [5, 7, EOS]
    prompt, token, depth, end, node = candidates.prefix_trees(torch.tensor([[a, b, a], [b, b, [EOS, PAD, PAD]]]))
    assert prompt.tolist() == [0] * 5 + [1] * 4
    assert token.tolist() == [5, 6, EOS, 7, EOS, EOS, 5, 7, EOS] and depth.tolist() == [0, 1, 2, 1, 2, 0, 0, 1, 2]
    assert end.tolist() == [5, 3, 3, 5, 5, 6, 9, 9, 9]
    assert node[0].tolist() == [[0, 1, 2], [0, 3, 4], [0, 1, 2]] and node[1, 2, 0] == 5

    shapes = []
    hook = policy.base_model.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    candidates.logps(policy, rows[0][:1], torch.tensor([[a, b, a]]))
    candidates.rewards(model.RewardModel(policy.base_model), rows[0][:1], torch.tensor([[a, b, a]]))
    hook.remove()
    assert shapes == [(1, 4), (1, 3), (1, 4), (1, 5)]


def test_logits_of_few_states_at_a_time_change_no_number(policy, rows, monkeypatch):
    whole = candidates.logps(policy, rows[0], completions_of(25))
    monkeypatch.setattr(model, "LOGITS", 3 * 20)
    assert torch.allclose(candidates.logps(policy, rows[0], completions_of(25)), whole, rtol=1e-6)


@pytest.mark.parametrize("device", [
    "cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))])
def test_candidates_on_a_device_and_in_bf16(policy, rows, device):
    completions = completions_of(25)
    expected = candidates.in_batches(candidates.logps, policy, rows[0], completions, label="")
    policy.to(device)
    found = candidates.in_batches(candidates.logps, policy, rows[0], completions, label="")
    assert found.device.type == "cpu" and torch.allclose(found, expected, rtol=1e-4)
    with torch.autocast(device, torch.bfloat16):
        half = candidates.in_batches(candidates.logps, policy, rows[0], completions, label="")
        candidates.in_batches(candidates.rewards, model.RewardModel(policy.base_model).to(device), rows[0], completions,
                         label="")
    assert half.dtype == torch.float32 and not torch.equal(half, expected)
    assert torch.allclose(half, expected, rtol=0.03)


def test_a_prompt_run_once_for_a_pair_changes_no_number_and_no_gradient(policy, reward_model, rows):
    """Against chosen and rejected run one by one; gradients too, through the shared prompt."""
    query, chosen = rows
    rejected = chosen[[2, 3, 0, 1]]

    def gradients(net, values):
        net.zero_grad()
        (values[0] - 0.5 * values[1]).sum().backward()
        return {name: part.grad.clone() for name, part in net.named_parameters() if part.grad is not None}

    for net, fast, plain in (
        (policy, lambda: model.pair_logps(policy, query, chosen, rejected, 0.7),
         lambda: [model.response_logps(policy, query, side, 0.7) for side in (chosen, rejected)]),
        (reward_model, lambda: model.pair_rewards(reward_model, query, chosen, rejected),
         lambda: [reward_model(query, side) for side in (chosen, rejected)]),
    ):
        for a, b in zip(fast(), plain(), strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
        ours, theirs = gradients(net, fast()), gradients(net, plain())
        assert set(ours) == set(theirs)
        for name in ours:
            assert torch.allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-5 * theirs[name].abs().max()), name


# Sampling


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_sampling_is_bit_identical_at_a_seed(policy, rows):
    one, two, other = (generate.complete(policy, rows[0], 6, 8, 1.0, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_completions_end_in_one_eos(policy, rows):
    for row in generate.complete(policy, rows[0], 50, 6, 1.5, generator()).view(-1, 6):
        end = row.tolist().index(EOS)
        assert (row[end + 1 :] == PAD).all() and not (row[:end] == PAD).any()


def test_cold_samples_are_greedy_and_ignore_the_cache(policy, rows):
    found = generate.complete(policy, rows[0], 2, 6, 1e-6, generator())
    for query, completions in zip(rows[0], found, strict=True):
        tokens = query[query != PAD]
        for step in range(5):
            logits = policy(tokens[None]).logits[0, -1]
            logits[PAD] = -torch.inf
            token = logits.argmax()
            assert completions[:, step].tolist() == [token, token]
            if token == EOS:
                break
            tokens = torch.cat([tokens, token[None]])


def test_cache_and_leaving_rows_change_no_token(policy, rows):
    """Against the plain way: every row to the end, the whole sequence at every step, without padding or a cache."""
    with torch.no_grad():
        policy.get_output_embeddings().weight[EOS] *= 3  # rows that end at different steps
    n, length = 40, 8
    found = generate.complete(policy, rows[0], n, length, 1.3, generator(5)).view(-1, length)
    drawn = torch.Generator().manual_seed(5)
    texts = [query[query != PAD] for query in rows[0] for _ in range(n)]
    for step in range(length):
        uniform = torch.rand(len(texts), 1, dtype=torch.double, generator=drawn)
        for i, text in enumerate(texts):
            if step and found[i, step - 1] in (EOS, PAD):
                assert found[i, step] == PAD
                continue
            logits = policy(text[None]).logits[0, -1] / 1.3
            logits[PAD] = -torch.inf
            below = logits.softmax(0).double().cumsum(0)
            token = EOS if step == length - 1 else int((below <= uniform[i] * below[-1]).sum())
            assert found[i, step] == token
            texts[i] = torch.cat([text, torch.tensor([token])])
    lengths = (found != PAD).sum(1)
    assert lengths.min() < 4 and lengths.max() == length


def test_how_many_prompts_run_together_changes_no_token(policy, rows, monkeypatch):
    asked, grow = [], generate_tree.grow
    monkeypatch.setattr(generate_tree, "grow", lambda *args: asked.append(args[-1]) or grow(*args))
    together = generate.complete(policy, rows[0], 5, 8, 1.3, generator(5))
    one = -(-generate.MEMORY // generate_tree.places_for(policy, 6, 5, 8, generate.MEMORY))
    for memory in (3 * one, 2 * one, 1):  # one prompt always runs
        monkeypatch.setattr(generate, "MEMORY", memory)
        assert torch.equal(generate.complete(policy, rows[0], 5, 8, 1.3, generator(5)), together)
    assert asked == [4, 3, 2, 1]


def test_first_tokens_follow_softmax_of_logits_over_temperature(policy, rows):
    logits = policy(rows[0][1:2]).logits[0, -1].detach().double() / 0.5
    logits[PAD] = -torch.inf
    first = generate.complete(policy, rows[0][1:2], 20_000, 2, 0.5, generator())[0, :, 0]
    frequency = torch.bincount(first.long(), minlength=20) / 20_000
    assert torch.allclose(frequency.double(), logits.softmax(0), atol=0.012)  # 3 sd of a frequency of .5
