"""Packed rows against the padded path: log-probs, gradients, masks."""

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from roads import model, packed
from roads.tldr import EOS, PAD


def some_rows(seed: int = 0, count: int = 5):
    draw = torch.Generator().manual_seed(seed)

    def side(width, left):
        rows = torch.full((count, width), PAD)
        for i, n in enumerate(torch.randint(1, width + 1, (count,), generator=draw).tolist()):
            own = torch.randint(2, 90, (n,), generator=draw)
            if not left:
                own[-1] = EOS
            rows[i, width - n if left else 0 : width if left else n] = own
        return rows

    return side(40, True), side(9, False), side(9, False)


def neox():
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                                            intermediate_size=128, rotary_pct=0.25, max_position_embeddings=128))


def llama():
    return LlamaForCausalLM(LlamaConfig(vocab_size=96, hidden_size=96, num_hidden_layers=2, num_attention_heads=6,
                                        num_key_value_heads=2, intermediate_size=128, max_position_embeddings=128,
                                        pad_token_id=PAD, bos_token_id=EOS, eos_token_id=EOS))


@pytest.mark.parametrize("make", [neox, llama])
def test_packed_pairs_have_the_log_probs_and_gradients_of_padded_ones(make):
    torch.manual_seed(0)
    policy, rows = make(), some_rows()

    def gradients(logps):
        policy.zero_grad()
        (logps[0] - 0.5 * logps[1]).sum().backward()
        return {name: part.grad.clone() for name, part in policy.named_parameters()}

    expected = torch.stack(model.pair_logps(policy, *rows))
    theirs = gradients(expected)
    policy.set_attn_implementation(packed.ATTENTION)
    found = packed.logps(policy, packed.pack(*rows), 1.0, 7)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    ours = gradients(found)
    for name in theirs:
        assert torch.allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-5 * theirs[name].abs().max()), name


@pytest.mark.parametrize("seed", range(4))
def test_the_block_mask_is_the_dense_mask(seed):
    end = packed.pack(*some_rows(seed, 14)).end
    dense, blocks, n = packed.dense_mask(end)[0, 0], packed.block_mask(end), len(end) // 128
    keys = torch.arange(len(end))
    assert n > 1 and torch.equal(blocks.mask_mod(0, 0, keys[:, None], keys), dense)
    tiles = dense.view(n, 128, n, 128).transpose(1, 2).flatten(2)
    some, every = tiles.any(2), tiles.all(2)
    full = torch.zeros(n, n, dtype=torch.bool)
    for q in range(n):
        full[q, blocks.full_kv_indices[0, 0, q, : blocks.full_kv_num_blocks[0, 0, q]].long()] = True
    assert not (full & ~every).any()
    assert not (some & ~(blocks.to_dense()[0, 0] > 0)).any()


@pytest.mark.parametrize("make", [neox, llama])
def test_flex_attention_sees_what_the_dense_mask_shows(make):
    torch.manual_seed(0)
    policy, rows = make().eval(), packed.pack(*some_rows(0, 14))
    policy.set_attn_implementation(packed.ATTENTION)
    with torch.no_grad():
        dense = packed.run(policy.base_model, rows)
        flex = policy.base_model(input_ids=rows.token[None], position_ids=rows.position[None], use_cache=False,
                                 attention_mask=packed.block_mask(rows.end)).last_hidden_state[0]
    assert torch.allclose(flex, dense, atol=1e-5)


def test_a_packed_reward_model_and_a_packed_sft_are_the_padded_ones():
    torch.manual_seed(0)
    rows = some_rows()
    policy, rm = neox(), model.RewardModel(neox().base_model)
    expected = [model.response_logps(policy, *rows[:2], 0.7), *model.pair_rewards(rm, *rows)]
    for net in (policy, rm.trunk):
        net.set_attn_implementation(packed.ATTENTION)
    assert model.is_packed(policy) and model.is_packed(rm)
    found = [model.response_logps(policy, *rows[:2], 0.7), *model.pair_rewards(rm, *rows)]
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_what_packed_rows_cannot_do_is_left_to_the_padded_path():
    assert packed.supports(neox()) and packed.supports(llama())
    for more in ({"attention_dropout": 0.1}, {"hidden_dropout": 0.1}):
        net = neox()
        net.config.update(more)
        assert not packed.supports(net)
    net = llama()
    net.config.sliding_window = 64
    assert not packed.supports(net)


def test_a_prepared_model_refuses_rows_that_are_not_packed(policy, rows):
    """Without a mask every token would see those after it: a language model would learn to copy."""
    policy.base_model.set_attn_implementation(packed.ATTENTION)
    with pytest.raises(ValueError, match="without their mask"):
        policy(rows[0])
