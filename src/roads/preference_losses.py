"""What a policy is trained on pairs with: each a pure function of log-probabilities, with its equation and source.

Log-probs are sums over a completion's tokens, in nats, of shape [B], and so is a loss. Below, rho(y) is pi(y) /
pi_ref(y), and the margin ln rho(chosen) - ln rho(rejected).
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

LARGEST = 20.0  # of ln rho where a loss has rho itself
REWARDS = 5.0  # chi-PO's R_max: no reward is larger


def dpo_loss(policy_chosen_logps: Tensor, policy_rejected_logps: Tensor, reference_chosen_logps: Tensor,
             reference_rejected_logps: Tensor, beta: float) -> Tensor:
    """-log sigma(beta * margin) (Thm 2.3).

    Without a reference (both its log-probs 0) this is the local RM's loss, Eq. 9. At step 0 policy = reference, so the
    loss is ln 2.
    """
    chosen = policy_chosen_logps - reference_chosen_logps
    rejected = policy_rejected_logps - reference_rejected_logps
    return -logsigmoid(beta * (chosen - rejected))


def ipo_loss(policy_chosen_logps: Tensor, policy_rejected_logps: Tensor, reference_chosen_logps: Tensor,
             reference_rejected_logps: Tensor, beta: float) -> Tensor:
    """(margin - 1 / (2 beta))^2: a square in place of the log sigmoid, which never asks for an infinite margin (Azar et
    al. 2024, A General Theoretical Paradigm to Understand Learning from Human Preferences, Eq. 17)."""
    margin = policy_chosen_logps - reference_chosen_logps - (policy_rejected_logps - reference_rejected_logps)
    return (margin - 1 / (2 * beta)) ** 2


def simpo_loss(policy_chosen_logps: Tensor, policy_rejected_logps: Tensor, chosen_lengths: Tensor,
               rejected_lengths: Tensor, beta: float) -> Tensor:
    """-log sigma(b * (ln pi(chosen) / |chosen| - ln pi(rejected) / |rejected|) - b / 2), b = beta * mean length.

    Log-probs per token, a target margin, and no reference (Meng et al. 2024, SimPO, Eq. 6, with its ratio gamma / beta
    of one half). b makes beta weigh a whole completion, as it does in the other losses. Lengths are tokens, [B].
    """
    scale = beta * (chosen_lengths + rejected_lengths) / 2
    per_token = policy_chosen_logps / chosen_lengths - policy_rejected_logps / rejected_lengths
    return -logsigmoid(scale * per_token - scale / 2)


def chi_po_loss(policy_chosen_logps: Tensor, policy_rejected_logps: Tensor, reference_chosen_logps: Tensor,
                reference_rejected_logps: Tensor, beta: float) -> Tensor:
    """-log sigma(clip(beta * (phi(chosen) - phi(rejected)))), phi = rho + ln rho, clipped to +-2 R_max.

    Chi-squared regularisation beside KL's: it holds the policy where the reference hardly ever goes (Huang et al. 2025,
    Correcting the Mythos of KL-Regularization, Alg. 1).
    """
    ratios = policy_chosen_logps - reference_chosen_logps, policy_rejected_logps - reference_rejected_logps
    chosen, rejected = (ratio.clamp(max=LARGEST).exp() + ratio for ratio in ratios)
    return -logsigmoid((beta * (chosen - rejected)).clamp(-2 * REWARDS, 2 * REWARDS))


def dpo_kl_loss(policy_chosen_logps: Tensor, policy_rejected_logps: Tensor, reference_chosen_logps: Tensor,
                reference_rejected_logps: Tensor, beta: float, kl: float) -> Tensor:
    """DPO's loss + kl * (mean over both sides of rho ln rho - rho + 1): DPO with the reverse KL in the loss (H2).

    Song et al. (2024, The Importance of Online Data) estimate KL(pi || pi_ref) from samples of the policy. Here it is
    estimated from the pair: E_ref[rho ln rho - rho + 1] is that KL, unbiased where the reference wrote the pairs, as it
    did in the synthetic world. With kl = beta it is Eq. 2 itself, with its sign changed.
    """
    ratios = policy_chosen_logps - reference_chosen_logps, policy_rejected_logps - reference_rejected_logps
    parts = [ratio.clamp(max=LARGEST) for ratio in ratios]
    distance = sum(part.exp() * (part - 1) + 1 for part in parts) / 2
    return -logsigmoid(beta * (ratios[0] - ratios[1])) + kl * distance


def rebel_loss(policy_chosen_logps: Tensor, policy_rejected_logps: Tensor, reference_chosen_logps: Tensor,
               reference_rejected_logps: Tensor, chosen_rewards: Tensor, rejected_rewards: Tensor,
               beta: float) -> Tensor:
    """(beta * margin - (r(chosen) - r(rejected)))^2: the margin is regressed on the difference of rewards [B].

    Gao et al. 2024, REBEL, Eq. 3, with eta = 1 / beta: the algorithm whose code the paper builds on.
    """
    margin = policy_chosen_logps - reference_chosen_logps - (policy_rejected_logps - reference_rejected_logps)
    return (beta * margin - (chosen_rewards - rejected_rewards)) ** 2


LOSSES = {"dpo": dpo_loss, "ipo": ipo_loss, "chi_po": chi_po_loss}


def loss_of(name: str, policy: Tensor, reference: Tensor, beta: float, *, lengths: Tensor, kl: float = 0.0,
            rewards: Tensor | None = None, probability: Tensor | None = None) -> Tensor:
    """The loss [B] of a name that params.yaml gives.

    Args:
        policy, reference: log-probs [2, B], the chosen side first. lengths: tokens [2, B] (simpo).
        kl: weight of the KL (dpo_kl). rewards: [2, B] (rebel).
        probability: [B], that the chosen side is the better one, where labels are soft: the loss is its mean over what
            the label may be. None: they are hard.
    """
    if name == "simpo":
        loss = simpo_loss(*policy, *lengths, beta)
    elif name == "rebel":
        loss = rebel_loss(*policy, *reference, *rewards, beta)
    elif name == "dpo_kl":
        loss = dpo_kl_loss(*policy, *reference, beta, kl)
    else:
        loss = LOSSES[name](*policy, *reference, beta)
    if probability is None:
        return loss
    other = loss_of(name, policy.flip(0), reference.flip(0), beta, lengths=lengths.flip(0), kl=kl,
                    rewards=None if rewards is None else rewards.flip(0))
    return torch.lerp(other, loss, probability)
