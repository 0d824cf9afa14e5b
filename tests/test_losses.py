"""The losses against numbers computed by hand, and what must hold of them exactly."""

import math

import pytest
import torch

from roads import candidates, model, train
from roads.losses import language_model_loss
from roads.preference_losses import (
    chi_po_loss,
    dpo_kl_loss,
    dpo_loss,
    ipo_loss,
    loss_of,
    rebel_loss,
    simpo_loss,
)
from roads.stages.reward import reward_loss
from roads.stages.sft import sft_loss
from roads.tldr import PAD

LN2 = math.log(2)


def nll(x: float) -> float:
    """-log sigma(x)."""
    return math.log(1 + math.exp(-x))


def test_reward_loss_by_hand():
    losses = reward_loss(torch.tensor([2.0, 0.0, -1.0]), torch.tensor([1.0, 0.0, 1.0]))
    assert losses.tolist() == pytest.approx([0.3132617, LN2, 2.1269280])  # nll(1), nll(0), nll(-2)
    assert losses.tolist() == pytest.approx([nll(1), nll(0), nll(-2)])


def test_dpo_loss_by_hand():
    # chosen log-ratio -3 - -4 = 1, rejected -6 - -5 = -1: margin .5 * 2 = 1. Second pair: .5 * (-2 - 2) = -2.
    losses = dpo_loss(torch.tensor([-3.0, -5.0]), torch.tensor([-6.0, -1.0]),
                      torch.tensor([-4.0, -3.0]), torch.tensor([-5.0, -3.0]), beta=0.5)
    assert losses.tolist() == pytest.approx([0.3132617, 2.1269280])


def test_dpo_without_a_reference_is_the_local_reward_model():
    chosen, rejected, zero = torch.tensor([-3.0, -7.0]), torch.tensor([-5.0, -6.0]), torch.zeros(2)
    local = dpo_loss(chosen, rejected, zero, zero, beta=1 / 53)
    assert torch.equal(local, reward_loss(chosen / 53, rejected / 53))  # r_pi = beta log pi, Eq. 9


def test_dpo_gradient_by_hand():
    logps = torch.tensor([-3.0, -6.0], requires_grad=True)
    dpo_loss(logps[:1], logps[1:], torch.tensor([-4.0]), torch.tensor([-5.0]), beta=0.5).sum().backward()
    weight = 0.5 / (1 + math.exp(1))  # beta sigma(-margin)
    assert logps.grad.tolist() == pytest.approx([-weight, weight])


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_dpo_starts_at_ln_2(policy, rows, temperature):
    query, response = rows
    chosen, rejected = response[:2].repeat(2, 1), response[2:].repeat(2, 1)
    both = torch.stack([chosen, rejected], 1)
    reference = candidates.in_batches(candidates.logps, policy, query, both, temperature, label="", budget=30)
    losses = dpo_loss(*model.pair_logps(policy, query, chosen, rejected, temperature), *reference.T, beta=0.05)
    assert losses.tolist() == pytest.approx([LN2] * 4, abs=1e-6)


def test_online_logps_divide_the_logits(policy, rows):
    """log softmax(z / T), token by token, one row at a time, without padding."""
    query, response = rows
    for temperature in (1.0, 0.25):
        expected = []
        for q, r in zip(query, response, strict=True):
            q, r = q[q != PAD], r[r != PAD]
            logits = policy(torch.cat([q, r])[None]).logits[0, len(q) - 1 : -1].double() / temperature
            expected.append(sum(torch.log_softmax(z, 0)[t].item() for z, t in zip(logits, r, strict=True)))
        found = model.response_logps(policy, query, response, temperature)
        assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_sft_loss_is_a_mean_over_tokens():
    assert sft_loss(torch.tensor([-6.0, -2.0]), torch.tensor([3, 1])).item() == pytest.approx(2.0)


def test_language_model_loss_weighs_tokens(policy):
    tokens = torch.tensor([[5, 6, 7, PAD], [8, 9, 10, 11]])
    weights = torch.tensor([[0.0, 1.0, 8.0, 0.0], [0.0, 0.0, 1.0, 2.0]])
    logps = torch.log_softmax(policy(tokens).logits[:, :-1].double(), -1)
    losses = -logps.gather(2, tokens[:, 1:, None]).squeeze(2)
    expected = (losses[0, 0] + 8 * losses[0, 1] + losses[1, 1] + 2 * losses[1, 2]) / 12
    assert language_model_loss(policy, tokens, weights).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("n, batch_size", [(10, 3), (7, 7), (5, 8), (64, 1)])
def test_an_epoch_sees_every_row_exactly_once(n, batch_size):
    plan = train.batches(n, batch_size, epochs=3, seed=1)
    steps = math.ceil(n / batch_size)
    assert len(plan) == 3 * steps
    epochs = [torch.cat(plan[e * steps : (e + 1) * steps]).tolist() for e in range(3)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    if n == 64:
        assert epochs[0] != epochs[1] and epochs[0] != torch.cat(train.batches(n, 1, 1, seed=2)).tolist()


def test_the_authors_loader_misses_a_third_of_the_rows():
    """8 GPUs that shuffle for themselves: 1 - (7/8)^8 = 66% of the rows in an epoch, as many steps as otherwise."""
    plan = train.batches(8000, 40, 1, seed=0, shards=8)
    seen = torch.cat(plan)
    assert len(plan) == 200 and len(seen) == 8000
    assert len(seen.unique()) / 8000 == pytest.approx(1 - (7 / 8) ** 8, abs=0.01)


def test_learning_rates(tiny):
    linear = tiny.dpo.model_copy(update={"lr": 1.0, "schedule": "linear"})
    cosine = linear.model_copy(update={"schedule": "cosine"})
    assert [train.learning_rate(s, 4, linear) for s in range(4)] == [1.0, 0.75, 0.5, 0.25]
    assert [train.learning_rate(s, 4, cosine) for s in (0, 2)] == pytest.approx([1.0, 0.5])


# Two pairs: log-ratios 1 and -1 (margin 2), and -2 and 2 (margin -4).
PAIRS = (torch.tensor([-3.0, -5.0]), torch.tensor([-6.0, -1.0]), torch.tensor([-4.0, -3.0]), torch.tensor([-5.0, -3.0]))


def test_ipo_loss_by_hand():
    assert ipo_loss(*PAIRS, beta=0.25).tolist() == pytest.approx([0, 36])  # (2 - 2)^2, (-4 - 2)^2


def test_simpo_loss_by_hand():
    # scale .5 * (4 + 6) / 2 = 2.5; per token -3/4 + 6/6 = .25 and -5/4 + 1/6; less half the scale
    losses = simpo_loss(*PAIRS[:2], torch.tensor([4.0, 4.0]), torch.tensor([6.0, 6.0]), beta=0.5)
    assert losses.tolist() == pytest.approx([nll(2.5 * 0.25 - 1.25), nll(2.5 * (-5 / 4 + 1 / 6) - 1.25)])


def test_chi_po_loss_by_hand():
    first = math.e + 1 - (math.exp(-1) - 1)
    second = math.exp(-2) - 2 - (math.exp(2) + 2)
    assert chi_po_loss(*PAIRS, beta=0.5).tolist() == pytest.approx([nll(0.5 * first), nll(0.5 * second)])
    far = chi_po_loss(torch.tensor([0.0]), torch.tensor([-90.0]), torch.tensor([-80.0]), torch.tensor([-1.0]), beta=1.0)
    assert far.item() == pytest.approx(nll(10), rel=1e-4)  # clipped to 2 R_max, and finite


def test_dpo_kl_loss_by_hand():
    # rho ln rho - rho + 1 at ln rho 1 is 1, at -1 it is 1 - 2/e
    loss = dpo_kl_loss(*(part[:1] for part in PAIRS), beta=0.5, kl=0.3)
    assert loss.item() == pytest.approx(nll(1) + 0.3 * (1 + 1 - 2 / math.e) / 2)


def test_the_kl_of_a_pair_is_unbiased():
    """Over all pairs that a reference of three summaries may write, weighed by their chance, it is the reverse KL."""
    reference, policy = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    chosen, rejected = torch.meshgrid(torch.arange(3), torch.arange(3), indexing="ij")
    sides = [logs[side.flatten()] for logs in (policy.log(), reference.log()) for side in (chosen, rejected)]
    parts = dpo_kl_loss(*sides, beta=0.1, kl=1.0) - dpo_loss(*sides, beta=0.1)
    mean = (parts * torch.outer(reference, reference).flatten()).sum()
    assert mean.item() == pytest.approx((policy * (policy / reference).log()).sum().item(), rel=1e-5)


def test_rebel_loss_by_hand():
    losses = rebel_loss(*PAIRS, torch.tensor([3.0, 1.0]), torch.tensor([1.0, 2.0]), beta=0.5)
    assert losses.tolist() == pytest.approx([1, 1])  # (1 - 2)^2, (-2 + 1)^2


@pytest.mark.parametrize("name", ["dpo", "ipo", "simpo", "chi_po", "dpo_kl", "rebel"])
def test_soft_labels_are_the_mean_over_both(name):
    policy, reference = torch.stack(PAIRS[:2]), torch.stack(PAIRS[2:])
    lengths, rewards = torch.tensor([[4.0, 4.0], [6.0, 6.0]]), torch.tensor([[3.0, 1.0], [1.0, 2.0]])

    def loss(*sides, probability=None):
        policy, reference, lengths, rewards = sides
        return loss_of(name, policy, reference, 0.5, lengths=lengths, kl=0.3, rewards=rewards, probability=probability)

    hard, turned = (loss(*sides) for sides in ((policy, reference, lengths, rewards),
                                               (policy.flip(0), reference.flip(0), lengths.flip(0), rewards.flip(0))))
    soft = loss(policy, reference, lengths, rewards, probability=torch.tensor([0.75, 0.5]))
    mean = torch.tensor([0.75, 0.5]) * hard + torch.tensor([0.25, 0.5]) * turned
    assert soft.tolist() == pytest.approx(mean.tolist())
    assert torch.equal(loss(policy, reference, lengths, rewards, probability=torch.ones(2)), hard)
