"""Numbers by hand where a wrong sign, scale, seed or side would go unseen: each of these failed on such a mistake."""

import csv
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import test_train
import torch
from conftest import ROOT
from test_anatomy import start
from test_claims import claim, decide, draw, over, reports
from test_plan import work

from roads import candidates, config, generate, model, optimum, preferences, schema, stage, stats, train
from roads.figures import best_of_n as bon
from roads.figures import budget, dials, figure, rewards, worlds
from roads.figures import likelihood as lik
from roads.judge import quality
from roads.preference_losses import dpo_kl_loss
from roads.report import bars as report_bars
from roads.report import claims
from roads.stages import (
    anatomy,
    arm,
    best_of_n,
    data,
    dpo,
    evaluate,
    kl,
    likelihood,
    rank,
    reward,
    sft,
    untrained,
    value,
)
from roads.tldr import EOS, PAD
from roads.world import World

__all__ = ["reports", "start"]  # fixtures


# --- statistics
def test_cosine_at_a_quarter(tiny):
    cosine = tiny.dpo.model_copy(update={"lr": 1.0, "schedule": "cosine"})
    assert [train.learning_rate(s, 4, cosine) for s in range(4)] == pytest.approx(
        [1, 0.853553, 0.5, 0.146447], abs=1e-6
    )


def test_over_units_by_hand():
    # mean .01, error .01 / sqrt 3; t = 1.732, and with two degrees P(T > t) = 1/2 - t / (2 sqrt(2 + t^2)) = .1127
    assert stats.over_units([0.0, 0.01, 0.02])["p"] == pytest.approx(0.112702, abs=1e-6)
    for sign in (1, -1):  # the margin at the nearer side decides
        found = stats.over_units([sign * x for x in (0.0, 0.01, 0.02)], margin=0.02)
        assert found["p"] == pytest.approx(0.112702, abs=1e-6)


def test_regression_by_hand():
    # Sxx 5, Sxy 3, SSE .2: slope .6 with error sqrt(.2 / 2 / 5), t = 4.2426, P(T > t) = 1/2 - t / (2 sqrt(2 + t^2))
    found = stats.regression(np.array([0.0, 1, 2, 3]), np.array([0.0, 1, 1, 2]))
    assert found == pytest.approx(
        {
            "slope": 0.6,
            "low": 0.6 - 0.608487,
            "high": 0.6 + 0.608487,
            "intercept": 0.1,
            "r": 0.948683,
            "r_low": -0.140580,
            "r_high": 0.998955,
            "p": 0.025658,
        },
        abs=2e-6,
    )


def test_posts_of_unequal_rows_weigh_by_rows():
    # one row of score 1, three of 0: twice the first post is 1, both are 1/4, twice the second 0
    _, resampled = stats.total([np.array([[1.0, 0, 0, 0]])], post=np.array([0, 1, 1, 1]))
    assert sorted(set(resampled.round(9))) == [0, 0.25, 1]


def test_a_standardised_difference_is_in_the_controls_spread():
    found = stats.difference(
        np.array([[1.0, 4, 7]]), np.array([[0.0, 2, 4]])
    )  # deviations 3 and 2; differences 1, 2, 3
    assert found["standardised"]["mean"] == pytest.approx(1.0)
    assert found["standardised"]["low"] == pytest.approx(found["low"] / 2) != found["standardised"]["mean"]


def test_the_interval_of_a_correlation_is_of_95_percent():
    rng = np.random.default_rng(0)
    x, y = ([k + rng.normal(0, 3, size=(2, 30)) for k in range(4)] for _ in range(2))
    found, resampled = stats.correlation(x, y)
    assert [found["low"], found["high"]] == pytest.approx(np.quantile(resampled, [0.025, 0.975]))


@pytest.mark.parametrize(
    "low, high, verdict", [(0.01, 0.03, "supported"), (0.001, 0.02, "supported"), (-0.01, 0.03, "undecided")]
)
def test_verdict_boundary(low, high, verdict):
    assert stats.verdict("greater", {"low": low, "high": high}, 0.01, 0.02, 0.05)[0] == verdict


def judged(low=0.01, seeds=(0.03,), test="greater", mean=0.03, high=0.05):
    row = {
        "test": test,
        "margin": 0.02,
        "p_adjusted": 0.01,
        "over": "prompts",
        "estimate": {"mean": mean, "low": low, "high": high, "by_seed": list(seeds)},
    }
    claims._judge(row, 0.05)
    return row


def test_beyond_its_margin_is_the_lower_end():
    assert [judged(low)["beyond_margin"] for low in (0.01, 0.025)] == [False, True]
    assert judged(0.025, test="equivalent")["beyond_margin"] is False


def test_seeds_alone_are_said():
    # mean .04, sd .0265, half 4.303 * .0265 / sqrt 3 = .0657
    assert "over seeds alone the t interval [-0.0257, +0.1057] has 0 in it" in judged(seeds=(0.02, 0.03, 0.07))["why"]
    assert "over seeds" not in judged(seeds=(0.039, 0.04, 0.041))["why"]


def test_different_is_two_sided(reports):
    draw(reports, "fig3", {"DPO": np.zeros((1, 50)), "DPO 2x": np.ones((1, 50))})
    row, other = decide(reports, claim(test="different"), claim("b", contrast="{DPO 2x: -1, DPO: 1}", test="different"))
    assert row["p"] == other["p"] == pytest.approx(2 / 4001)


@pytest.mark.parametrize("sign", [1, -1])
def test_different_over_worlds_is_two_sided(reports, sign):
    row = over(reports, [sign * x for x in (0.1, 0.2, 0.3)], [0, 0, 0], "different")
    assert row["p"] == pytest.approx(2 * 0.037090, abs=2e-6)  # t = .2 / (.1 / sqrt 3) with 2 degrees


def test_equivalent_over_worlds_has_its_margin(reports):
    assert over(reports, [0.1, 0.2, 0.3], [0, 0, 0], "equivalent", margin="0.3")["p"] == pytest.approx(
        0.112702, abs=2e-6
    )


def test_a_correlation_over_worlds_has_one_sided_p(reports):
    # x = 0, 1, 2, 3 and y = 0, 1, 1, 2, as of stats.regression
    row = over(
        reports, [0.0, 1, 1, 2], [0.0, 1, 2, 3], "correlated", "    against: {Global RM: 1, DPO RM: -1}\n", "0.5"
    )
    assert row["p"] == pytest.approx(0.025658, abs=2e-6)
    assert row["estimate"]["low"] == pytest.approx(-0.140580, abs=2e-6)


def test_a_probability_of_one_half_is_not_right():
    assert report_bars.MEASURES["accuracy"](np.array([0.4, 0.5, 0.6])).tolist() == [0, 0, 1]


def test_dpo_kl_far_from_the_reference():
    one, zero = torch.tensor([3.0]), torch.tensor([0.0])
    loss = dpo_kl_loss(one, zero, zero, zero, beta=0.5, kl=0.3)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1.5)) + 0.3 * (2 * math.exp(3) + 1) / 2, rel=1e-5)


# --- stages
def test_right_counts_ties_as_half():
    assert preferences.right(np.array([1.0, -1, 0, 1, -1]), np.array([2.0, 2, 2, 0, -3])).tolist() == [
        1,
        0,
        0.5,
        0.5,
        1,
    ]


@pytest.fixture
def two(tmp_path, policy, rows):
    """A reference, another policy, and pairs."""
    policy.save_pretrained(tmp_path / "reference")
    other = model.new_policy(
        schema.FromScratch(kind="new", hidden_size=32, layers=2, heads=2, max_positions=64), 20, seed=4
    ).eval()
    other.save_pretrained(tmp_path / "other")
    query, response = rows
    (tmp_path / "pairs").mkdir()
    np.savez(tmp_path / "pairs/pairs.npz", query=query, chosen=response, rejected=response[[1, 2, 3, 0]])

    def logps(net, side):
        return model.response_logps(net, query, side).detach()

    return SimpleNamespace(
        other=other, reference=policy, chosen=response, rejected=response[[1, 2, 3, 0]], logps=logps, query=query
    )


def test_margins_of_every_kind(two, tmp_path, tiny):
    t = two
    raw = t.logps(t.other, t.chosen) - t.logps(t.other, t.rejected)
    ref = t.logps(t.reference, t.chosen) - t.logps(t.reference, t.rejected)

    def ask(kind):
        return likelihood.margins(tmp_path / "other", tmp_path / "pairs", tmp_path / "reference", tiny, kind)

    assert ask("local").tolist() == pytest.approx((tiny.local.beta * raw).tolist(), abs=1e-4)
    assert ask("dpo").tolist() == pytest.approx((tiny.dpo.beta * (raw - ref)).tolist(), abs=1e-4)
    rm = model.RewardModel(t.other.base_model).eval()
    rm.save_pretrained(tmp_path / "rm")
    found = likelihood.margins(tmp_path / "rm", tmp_path / "pairs", tmp_path / "reference", tiny, "reward")
    assert found.tolist() == pytest.approx((rm(t.query, t.chosen) - rm(t.query, t.rejected)).tolist(), abs=1e-4)


def test_log_loss_and_accuracy_by_hand(two, tmp_path, tiny, monkeypatch):
    real = config.load_scale("real-cpu", ROOT / "params.yaml")
    monkeypatch.setattr(likelihood, "margins", lambda *_: torch.tensor([math.log(3), math.log(3), -math.log(3), 0.0]))
    likelihood.likelihood(tmp_path / "other", tmp_path / "pairs", tmp_path / "reference", tmp_path / "out", real, "dpo")
    found = stage.read_json(tmp_path / "out/metrics.json")
    assert found["mean_score"] == pytest.approx((0.75 + 0.75 + 0.25 + 0.5) / 4) and found["accuracy"] == 0.5
    assert found["log_loss"] == pytest.approx((2 * math.log(4 / 3) + math.log(4) + math.log(2)) / 4)


def test_best_of_n_has_dpos_reference_and_not_the_local_rms(tmp_path, tiny, monkeypatch):
    world, rng = World(tiny.source), np.random.default_rng(0)
    query = world.prompts(4, rng)
    sides = np.stack([world.summaries(query, rng) for _ in range(2)], 1)
    (tmp_path / "drawn").mkdir()
    np.savez(tmp_path / "drawn/completions.npz", query=query, completions=sides)
    np.savez(tmp_path / "test_human.npz", query=query, response=sides[:, 0])
    model.new_policy(tiny.model, world.vocab_size, 0).save_pretrained(tmp_path / "net")
    asked = []
    monkeypatch.setattr(candidates, "implicit_rewards", lambda path, ref, *_: asked.append(ref) or torch.zeros(4, 2))
    for kind in ("dpo", "local"):
        best_of_n.best_of_n(
            tmp_path / "drawn", tmp_path, tmp_path / "net", tmp_path / "sft", tmp_path / kind, tiny, kind
        )
    assert asked == [tmp_path / "sft", None]


def test_kl_is_the_mean_log_ratio_of_the_policys_own_samples(two, tmp_path, tiny, monkeypatch):
    t = two
    np.savez(tmp_path / "prompts.npz", query=t.query, response=t.chosen)
    both = torch.stack([t.chosen, t.rejected], 1)
    monkeypatch.setattr(generate, "completions", lambda *_: both)
    found = kl.mean_kl(tmp_path / "other", tmp_path / "reference", tmp_path / "prompts.npz", tiny, 0)
    ratios = np.mean(
        [(t.logps(t.other, side) - t.logps(t.reference, side)).double().numpy() for side in (t.chosen, t.rejected)], 0
    )
    assert found["kl"] == pytest.approx(ratios.mean(), abs=1e-4)
    assert found["kl_standard_error"] == pytest.approx(ratios.std(ddof=1) / 2, abs=1e-4)  # of four prompts


def test_batches_and_seeds_draw_for_themselves(tmp_path, monkeypatch, tiny, policy):
    policy.save_pretrained(tmp_path / "policy")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generate, "ROWS", 40)
    query = torch.arange(2, 10).repeat(4, 1)  # one prompt, two of it in a batch
    drawn = [
        generate.completions(Path("policy"), query, 8, schema.Sampling(n=20, temperature=1.0), seed, tiny)
        for seed in (0, 1)
    ]
    parts = [part for found in drawn for part in found.split(2)]
    for i, one in enumerate(parts):
        for other in parts[:i]:
            assert not torch.equal(one, other)


def taught(tmp_path, monkeypatch, n=64):
    """Pairs whose chosen side says 10 and whose rejected one says 11."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    query = rng.integers(2, 9, (n, 4)).astype(np.int32)
    sides = [np.tile(np.array([[word, EOS, PAD]], np.int32), (n, 1)) for word in (10, 11)]
    Path("pairs").mkdir()
    np.savez("pairs/pairs.npz", query=query, chosen=sides[0], rejected=sides[1])
    return tuple(map(torch.from_numpy, (query, *sides)))


def test_the_reward_model_learns_the_chosen_side(tiny, tmp_path, monkeypatch, policy):
    query, chosen, rejected = taught(tmp_path, monkeypatch)
    policy.save_pretrained("sft")
    cfg = tiny.model_copy(update={"reward": tiny.reward.model_copy(update={"lr": 3e-3, "epochs": 10})})
    reward.reward(Path("pairs"), Path("sft"), Path("rm"), cfg, 0)
    rm = model.RewardModel.load(Path("rm")).eval()
    assert (rm(query, chosen) > rm(query, rejected)).all()


@pytest.mark.parametrize("local", [False, True])
def test_a_policy_learns_the_chosen_side(tiny, tmp_path, monkeypatch, policy, local):
    query, chosen, rejected = taught(tmp_path, monkeypatch)
    policy.save_pretrained("sft")
    block = "local" if local else "dpo"
    cfg = tiny.model_copy(update={block: getattr(tiny, block).model_copy(update={"lr": 1e-3, "epochs": 5})})
    dpo.dpo(Path("pairs"), Path("sft"), Path("out"), cfg, 0, local=local)
    after = model.load_policy(Path("out")).eval()

    def gap(net):
        return model.response_logps(net, query, chosen) - model.response_logps(net, query, rejected)

    assert (gap(after) > gap(policy) + 0.1).all()


@pytest.mark.parametrize("kind", ["dpo", "online", "local"])
def test_the_curve_of_one_pair_at_a_time_by_hand(tiny, tmp_path, monkeypatch, policy, kind):
    """loss = -log sigma(margin), margin = beta times the difference of log-ratios; first ln 2 but for the local RM."""
    query, chosen, rejected = taught(tmp_path, monkeypatch, n=6)
    policy.save_pretrained("sft")
    block = "local" if kind == "local" else "dpo"
    cfg = tiny.model_copy(
        update={block: getattr(tiny, block).model_copy(update={"lr": 3e-3, "epochs": 3, "batch_size": 1})}
    )
    dpo.dpo(Path("pairs"), Path("sft"), Path("out"), cfg, 0, local=kind == "local", online=kind == "online")
    rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(open("out/curves.csv"))]
    for row in rows:
        assert row["loss"] == pytest.approx(math.log(1 + math.exp(-row["margin"])), abs=1e-5)
    assert abs(rows[-1]["margin"]) > 0.05
    if kind == "local":
        for row in rows:
            assert row["chosen_reward"] == pytest.approx(cfg.local.beta * row["chosen_logp"], rel=1e-4)
    else:
        assert rows[0]["margin"] == pytest.approx(0, abs=1e-5)


def test_first_and_last_tenth():
    log = [{"lr": 1.0, "loss": float(i)} for i in range(20)]
    assert train.summary(log)["loss"] == {"first": 0.5, "last": 18.5}


# --- exact optimum and anatomy
def test_the_optima_of_three_rewards_by_hand(monkeypatch, tiny):
    sft, own, local = np.log([[0.4, 0.3, 0.2, 0.1]]), np.log([[0.1, 0.2, 0.3, 0.4]]), np.log([[0.1, 0.1, 0.4, 0.4]])
    given = {"sft": sft, "dpo": own, "local": local, "rm": tiny.dpo.beta * -sft}  # the RM's optimum is uniform
    monkeypatch.setattr(model, "load_policy", lambda *_: SimpleNamespace(eval=lambda: None))
    monkeypatch.setattr(candidates, "in_batches", lambda *_, label: torch.from_numpy(given[label]))
    cfg = tiny.model_copy(update={"local": tiny.local.model_copy(update={"beta": 2 * tiny.dpo.beta})})
    every = np.zeros((1, 4, 3), np.int32)
    found = {
        name: more
        for name, _, more in optimum.optima(
            np.zeros((1, 2), np.int32), every, dict.fromkeys(("sft", "dpo", "local")), None, cfg, 0, {}
        )
    }
    assert found["exact.dpo"]["kl"] == pytest.approx(
        0.1 * math.log(1 / 4) + 0.2 * math.log(2 / 3) + 0.3 * math.log(3 / 2) + 0.4 * math.log(4), abs=1e-6
    )
    assert found["exact.rm"]["kl"] == pytest.approx(-0.25 * math.log(4**4 * 0.4 * 0.3 * 0.2 * 0.1), abs=1e-6)
    weights = np.array([0.4 * 0.01, 0.3 * 0.01, 0.2 * 0.16, 0.1 * 0.16])  # pi_ref local^2
    best = weights / weights.sum()
    assert found["exact.local"]["kl"] == pytest.approx((best * np.log(best / [0.4, 0.3, 0.2, 0.1])).sum(), abs=1e-6)
    assert found["exact.dpo"]["outside"] == pytest.approx(0, abs=1e-9)


def test_who_labels_what_and_what_is_divided(start, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told, label, train_dpo, more = {}, anatomy.labelled, anatomy.dpo.dpo, {}

    def labelled(drawn, out, scores, soft=False):
        rows = np.load(drawn / "completions.npz")
        told[out.name] = scores, rows["query"], rows["completions"], soft
        label(drawn, out, scores, soft)

    divided, tiny = {}, tiny.model_copy(update={"source": tiny.source.model_copy(update={"tau": 2.5})})

    def noted(pairs, reference, out, *args, **options):
        divided[out.name] = options.get("online", False)
        train_dpo(pairs, reference, out, *args, **options)

    optima = anatomy.optimum.optima
    monkeypatch.setattr(anatomy, "labelled", labelled)
    monkeypatch.setattr(anatomy.dpo, "dpo", noted)
    monkeypatch.setattr(anatomy.optimum, "optima", lambda *args: more.update(args[-1]) or optima(*args))
    anatomy.anatomy(start / "data", start / "sft", tmp_path / "out", tiny, 0)
    assert {name: divided[name] for name in anatomy.TRAINED} == {
        name: name.endswith(".divided") for name in anatomy.TRAINED
    }
    world = World(tiny.source)
    assert {name.rsplit(".", 1)[-1] for name in told} == {"readers", "rm", "soft", "gold"}
    for name, (scores, query, sampled, soft) in told.items():
        gold = np.stack([world.quality(query, sampled[:, i]) for i in range(scores.shape[1])], 1)
        assert np.allclose(scores, gold) == name.endswith(".gold") and soft == name.endswith(".soft"), name
        assert scores.shape[1] == (tiny.samples.online.n if ".ends." in name else 2)
    test = np.load(start / "data/test_human.npz")["query"]
    first = world.quality(test, world.every_summary(test)[:, 0])
    assert more["gold"][:, 0] == pytest.approx(first / tiny.source.tau)


def test_per_token_is_over_length(tmp_path, tiny, monkeypatch):
    """-6 over three tokens is better than -4 over one."""
    world = World(tiny.source)
    monkeypatch.chdir(tmp_path)
    shape = schema.FromScratch(kind="new", hidden_size=32, layers=1, heads=2, max_positions=32)
    model.new_policy(shape, world.vocab_size, seed=3).save_pretrained(tmp_path / "sft")
    query = world.prompts(30, np.random.default_rng(0))
    long = world.summaries(query, np.random.default_rng(1))
    short = np.full_like(long, PAD)
    short[:, 0] = EOS  # one token, all positions bad
    Path("pairs").mkdir()
    np.savez("pairs/pairs.npz", query=query, chosen=long, rejected=short)
    monkeypatch.setattr(candidates, "implicit_rewards", lambda *_: torch.tensor([[-6.0, -4.0]]).repeat(30, 1))
    untrained.untrained(Path("sft"), Path("pairs"), Path("pairs"), Path("out"), tiny)
    found = np.load("out/scores.npz")
    better = world.quality(query, long) > world.quality(query, short)
    assert found["likelihood"].tolist() == (~better).tolist() and found["per_token"].tolist() == better.tolist()


# --- data
def test_every_split_of_a_world_has_prompts_of_its_own(tiny):
    """The first twenty prompts of no two splits offer the same words."""
    _, splits = data.from_world(tiny)
    world, width = World(tiny.source), splits["sft"]["query"].shape[1]
    query = {name: part["tokens"][:, :width] if name == "base" else part["query"] for name, part in splits.items()}
    offered = {np.sort(world._parse(rows[:20])[1], axis=2).tobytes() for rows in query.values()}
    assert len(offered) == len(data.STREAMS) == len(set(data.STREAMS.values())) == 6


def test_the_base_predicts_summaries_and_the_tag(tiny):
    _, splits = data.from_world(tiny)
    width, weights = splits["sft"]["query"].shape[1], splits["base"]["weights"]
    assert (weights[:, :width] == 0).all() and (weights[:, width:-1] == 1).all() and (weights[:, -1] == 8).all()


def test_references_of_pairs_are_liked_and_those_of_sft_are_not(tiny):
    _, splits = data.from_world(tiny)
    world = World(tiny.source)
    mean = {
        name: world.quality(splits[name]["query"], splits[name]["response"]).mean()
        for name in ("sft", "test", "preferences", "valid", "more")
    }
    assert min(mean[name] for name in ("preferences", "valid", "more")) > max(mean["sft"], mean["test"]) + 0.3


def test_labels_are_at_the_worlds_own_tau(tiny, monkeypatch):
    world, rng = World(tiny.source), np.random.default_rng(0)
    query = world.prompts(50, rng)
    both = np.stack([world.summaries(query, rng) for _ in range(2)], 1)
    asked = []
    annotate = quality.annotate
    monkeypatch.setattr(quality, "annotate", lambda *args: asked.append((args[2], args[4].random())) or annotate(*args))
    for seed in (0, 1):
        cfg = tiny.model_copy(update={"source": tiny.source.model_copy(update={"seed": seed, "tau": 2.5})})
        rank.human_scores(query, both, cfg, None)
    assert [tau for tau, _ in asked] == [2.5, 2.5] and asked[0][1] != asked[1][1]


# --- figures
def test_gaps_are_weighted_differences_of_what_is_first(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(figure, "provenance", lambda files: {})
    seeds = config.load().seeds_of("fig3", "mini")
    values = {"a": [2.0, 4.0], "b": [0.0, 0.0], "c": [1.0, 0.0]}
    for seed in range(100):
        for place in (f"mini/x/s{seed}",):
            (tmp_path / place).mkdir(parents=True)
            np.savez(tmp_path / place / "scores.npz", **values)
            (tmp_path / place / "metrics.json").write_text("{}")
    bars = [figure.Bar(name, "mini/x/s{seed}", name, unit=2.0 if name == "a" else 1.0) for name in values]
    figure.save(
        tmp_path / "out",
        "fig3",
        tmp_path,
        bars,
        {"a - b": {"a": 1, "b": -1}, "2 a - 2 c": {"c": -2, "a": 2}},
        "mini",
        "",
        "winrate",
        lambda content: figure.bar_chart(content, 0),
    )
    found = json.loads((tmp_path / "out/fig3.json").read_text())
    assert found["gaps"]["a - b"]["mean"] == pytest.approx(1.5)  # (2 + 4) / 2, in units of 2
    assert found["gaps"]["2 a - 2 c"]["mean"] == pytest.approx(2 * (1.5 - 0.5))
    assert seeds


def test_a_figures_gap_is_resampled_by_post(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(figure, "provenance", lambda files: {})
    posts = np.random.default_rng(0).normal(size=10)
    for seed in range(100):
        (tmp_path / f"mini/x/s{seed}").mkdir(parents=True)
        np.savez(
            tmp_path / f"mini/x/s{seed}/scores.npz",
            a=np.repeat(posts, 10),
            b=np.zeros(100),
            post=np.repeat(np.arange(10), 10),
        )
        (tmp_path / f"mini/x/s{seed}/metrics.json").write_text("{}")
    bars = [figure.Bar(name, "mini/x/s{seed}", name) for name in "ab"]
    figure.save(
        tmp_path / "out",
        "fig3",
        tmp_path,
        bars,
        {"a - b": {"a": 1, "b": -1}},
        "mini",
        "",
        "winrate",
        lambda content: figure.bar_chart(content, 0),
    )
    found = json.loads((tmp_path / "out/fig3.json").read_text())
    assert found["gaps"]["a - b"]["low"] == pytest.approx(found["bars"][0]["low"])  # b is 0: the bar's own interval


def test_matched_kl_by_hand():
    bars = [budget.Bar("DPO one", "", series="DPO", x=1.0), budget.Bar("DPO two", "", series="DPO", x=3.0)]
    online = budget.Bar("Online(DPO) paper", "", series="Online(DPO)", x=1.5)
    assert budget.matched(bars, online) == pytest.approx({online.name: 1, "DPO one": -0.75, "DPO two": -0.25})
    far = budget.Bar("far", "", series="Online(DPO)", x=9.0)
    assert budget.matched(bars, far) == {"far": 1.0, "DPO two": -1.0}


@pytest.mark.parametrize("name", ["best_of_n", "worlds", "likelihood"])
def test_a_gap_is_its_first_name_less_its_second(name):
    if name == "best_of_n":
        found = bon.gaps("fig8", [], [], "mini", 25)
        assert found["Local RM - DPO RM, on DPO, N=25"] == {"Local RM on DPO N=25": 1, "DPO RM on DPO N=25": -1}
        assert bon.gaps("fig9", ["mini"], ["mini.fig9.small", "mini"], "mini", 25) == {
            "RM small - medium, policy medium, N=25": {
                "Policy medium, RM small N=25": 1,
                "Policy medium, RM medium N=25": -1,
            }
        }
    elif name == "worlds":
        bars = [
            worlds.Bar(f"{series} w01", "", series=series)
            for series in ("DPO", "DPO 2x", "Online(DPO)", "Global RM", "DPO RM")
        ]
        assert worlds.contrasts(bars) == {
            "Online(DPO) - DPO 2x, w01": {"Online(DPO) w01": 1, "DPO 2x w01": -1},
            "Online(DPO) - DPO, w01": {"Online(DPO) w01": 1, "DPO w01": -1},
            "RM's lead, w01": {"Global RM w01": 1, "DPO RM w01": -1},
        }
    else:
        assert lik.ALSO["log loss"](np.array([0.25])) == pytest.approx(math.log(4))
        assert lik.GAPS["Global - Local"] == {"Global RM": 1, "Local RM": -1}


def test_the_lead_of_the_reward_model(tmp_path):
    for kind, accuracy in (("reward", 0.7), ("dpo", 0.6)):
        (tmp_path / f"real/human/likelihood/{kind}/s0").mkdir(parents=True)
        (tmp_path / f"real/human/likelihood/{kind}/s0/metrics.json").write_text(json.dumps({"accuracy": accuracy}))
    (tmp_path / "real/rewards/x/s0").mkdir(parents=True)
    (tmp_path / "real/rewards/x/s0/metrics.json").write_text(
        json.dumps({"global": {"accuracy": 0.8}, "dpo_rm": {"accuracy": 0.5}})
    )
    assert rewards.accuracy(tmp_path, "real", "", [0]) == pytest.approx(0.1)
    assert rewards.accuracy(tmp_path, "real", "x", [0]) == pytest.approx(0.3)


# --- search and cost
def test_a_longer_reward_training_is_of_the_best_rate_and_half_of_it(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import search

    def rows(*cells):
        return [{"lr": lr, "epochs": epochs, "log_loss": loss} for lr, epochs, loss in cells]

    assert search.longer(rows((1e-3, 4, 0.5), (2e-3, 4, 0.4), (2e-3, 4, 0.5), (2e-3, 1, 0.6))) == [
        {"lr": 1e-3, "epochs": 8},
        {"lr": 2e-3, "epochs": 8},
    ]
    assert search.longer(rows((1e-3, 4, 0.5), (2e-3, 1, 0.4))) == []


def test_scores_are_run_under_both_policies():
    """2 FLOPs for each of 1.4e9 parameters and each of 512 + 2 * 53 tokens."""
    once = 2 * 1.4e9 * (512 + 2 * 53)
    places = "N runs/pairs/valid O --reference S"
    assert work(f"likelihood {places} --kind local").flops == pytest.approx(83802 * once)
    assert work(f"likelihood {places} --kind dpo").flops == pytest.approx(2 * 83802 * once)
    divergence = work("kl P S D O --seed 0")
    assert divergence.flops == pytest.approx(
        600 * 2 * 1.4e9 * 512 + 2 * 600 * once
    )  # the prompts of the samples, and two of each scored twice
    of_eq_2 = work("value P runs/pairs/preferences runs/pairs/valid S O --seed 0")
    n = 92858 + 5000
    assert of_eq_2.flops == pytest.approx(n * 2 * 1.4e9 * 512 + 2 * n * 2 * 1.4e9 * (512 + 4 * 53))
    assert work("best_of_n C D M S O --kind reward").judged == 2 * 5 * 600


def test_a_tie_that_is_kept_has_equal_sides(tmp_path, monkeypatch, tiny):
    """Two different completions with one score: kept as a pair without a gradient."""
    monkeypatch.setattr(rank, "reward_scores", lambda *_: np.array([[1.0, 1.0], [0.0, 2.0]]))
    (tmp_path / "drawn").mkdir()
    (tmp_path / "rm").mkdir()
    stage.write_json(tmp_path / "rm/config.json", {"vocab_size": 9})
    np.savez(
        tmp_path / "drawn/completions.npz",
        query=np.array([[3], [4]]),
        completions=np.array([[[5, 0], [6, 0]], [[7, 0], [8, 0]]]),
    )
    keep = tiny.model_copy(
        update={
            "samples": tiny.samples.model_copy(
                update={"online": tiny.samples.online.model_copy(update={"ties": "keep"})}
            )
        }
    )
    rank.rank(tmp_path / "drawn", tmp_path / "pairs", keep, "reward", model=tmp_path / "rm")
    pairs = np.load(tmp_path / "pairs/pairs.npz")
    assert pairs["chosen"].tolist() == [[5, 0], [8, 0]] and pairs["rejected"].tolist() == [[5, 0], [7, 0]]


def test_the_kl_of_eq_2_is_of_the_policys_samples_alone(two, tmp_path, tiny, monkeypatch):
    t = two
    both = torch.stack([t.rejected, t.chosen], 1)[:, :, :]
    monkeypatch.setattr(generate, "completions", lambda *_: both[[1, 2, 3, 0]])
    found = value.of_pairs(tmp_path / "other", tmp_path / "pairs", tmp_path / "reference", tiny, 0)
    sides = both[[1, 2, 3, 0]]
    ratios = np.mean(
        [(t.logps(t.other, sides[:, i]) - t.logps(t.reference, sides[:, i])).double().numpy() for i in (0, 1)], 0
    )
    assert found["kl"].numpy() == pytest.approx(ratios, abs=1e-4)


def test_held_out_is_of_the_held_out_pairs(two, tmp_path, tiny, monkeypatch):
    asked = []
    of_pairs = value.of_pairs
    monkeypatch.setattr(
        value, "of_pairs", lambda policy, pairs, *rest: asked.append(pairs.name) or of_pairs(policy, pairs, *rest)
    )
    (tmp_path / "held").mkdir()
    np.savez(tmp_path / "held/pairs.npz", query=two.query, chosen=two.rejected, rejected=two.chosen)
    value.value(
        tmp_path / "other", tmp_path / "pairs", tmp_path / "held", tmp_path / "reference", tmp_path / "out", tiny, 0
    )
    assert asked == ["pairs", "held"]


def test_a_training_that_is_stopped_continues_with_the_same_weights(tmp_path, monkeypatch):
    """As tests/device.py does, in seconds: the optimiser's moments too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "CHECKPOINT_EVERY", 2)
    rate = train.learning_rate

    def fit(stop):
        net, loss, told = test_train.problem("reward", 23)

        def stopping(step, *args):
            if step == stop:
                raise KeyboardInterrupt
            return rate(step, *args)

        monkeypatch.setattr(train, "learning_rate", stopping)
        try:
            train.fit(train.Job(net, loss, **told), schema.Train(**test_train.RECIPE), seed=0, key="stopped", label="x")
        except KeyboardInterrupt:
            assert stop is not None
        return net.state_dict()

    fit(3)
    again = fit(None)
    shutil.rmtree(tmp_path / "runs")
    whole = fit(None)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_sft_weighs_rows_by_their_tokens(tiny, tmp_path, monkeypatch, policy):
    """Cut into pieces a batch has the loss of the whole: the mean over its tokens."""
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    query = np.full((4, 3), 5, np.int32)
    response = np.array([[6, EOS, PAD, PAD], [7, 8, 9, EOS], [6, EOS, PAD, PAD], [9, 9, 9, EOS]], np.int32)
    np.savez("data/sft.npz", query=query, response=response)
    policy.save_pretrained("base")
    cut = tiny.model_copy(update={"machine": tiny.machine.model_copy(update={"micro_batch": 1})})
    losses = []
    for out, cfg in (("whole", tiny), ("cut", cut)):
        sft.sft(Path("data"), Path("base"), Path(out), cfg)
        losses.append(float(next(csv.DictReader(open(f"{out}/curves.csv")))["loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_tokens_are_ours_and_the_references(tmp_path, tiny):
    world, rng = World(tiny.source), np.random.default_rng(0)
    query = world.prompts(4, rng)
    ours, theirs = world.summaries(query, rng), world.summaries(query, rng)
    ours[:, 2:] = [EOS, PAD]
    (tmp_path / "drawn").mkdir()
    np.savez(tmp_path / "drawn/completions.npz", query=query, completions=ours[:, None])
    (tmp_path / "drawn/metrics.json").write_text("{}")
    np.savez(tmp_path / "test_human.npz", query=query, response=theirs)
    evaluate.evaluate(tmp_path / "drawn", tmp_path, tmp_path / "out", tiny, "human")
    assert np.load(tmp_path / "out/scores.npz")["tokens"].tolist() == [[3, 4]] * 4
    metrics = stage.read_json(tmp_path / "out/metrics.json")
    assert (metrics["mean_tokens"], metrics["mean_tokens_reference"]) == (3, 4)


def test_what_curves_say_of_unlike_pairs():
    found = preferences.told_apart(torch.tensor([1.0, 2.0, 0.0]), torch.tensor([0.0, 0.5, 0.5]))
    assert {k: float(v) for k, v in found.items()} == pytest.approx(
        {"accuracy": 2 / 3, "margin": 2 / 3, "chosen_reward": 1.0, "rejected_reward": 1 / 3}
    )


def test_what_invalid_words_cost(monkeypatch, tiny):
    """One of three words is invalid: the world takes 6 / 3 for it, `penalty1` 1 / 3, `penalty0` nothing."""
    world = World(tiny.source)
    query = world.prompts(1, np.random.default_rng(0))
    reference = world.summaries(query, np.random.default_rng(1))
    measures = object.__new__(anatomy.Measures)
    measures.cfg, measures.world, measures.query, measures.references = tiny, world, query, reference
    measures.ask = lambda first, second: ["Preferred: A"]
    monkeypatch.setattr(candidates, "in_batches", lambda *_, **__: torch.zeros(1, 1))
    ours = reference.copy()
    ours[0, 0] = world.first_word + tiny.source.words  # of another slot
    true = world.quality(query, ours)[0]
    assert world.validity(query, ours)[0] == pytest.approx(2 / 3)
    for ahead, expected in ((2.1, (0.0, 0.0)), (1.8, (1.0, 0.0)), (1.5, (1.0, 1.0))):  # reference = ours + ahead
        measures.reference_quality = np.array([true + ahead])
        found = measures.of("x", ours, None)
        assert (found["x.penalty0"][0], found["x.penalty1"][0]) == expected, ahead


def test_an_arm_of_seeds_beyond_the_first_draws_with_its_own(start, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    drawn, call = {}, arm.sample.sample
    monkeypatch.setattr(
        arm.sample,
        "sample",
        lambda policy, prompts, out, cfg, samples, seed: (
            drawn.update({"/".join(out.parts[-2:]) if samples == "evaluate" else out.name: seed})
            or call(policy, prompts, out, cfg, samples, seed)
        ),
    )
    cfg = tiny.model_copy(update={"policies": ["dpo", "online_sft", "online"]})
    arm.arm(start / "data", start / "sft", tmp_path / "out", cfg, 3)
    assert (
        drawn["online_candidates"],
        drawn["online_sft_candidates"],
        drawn["completions/sft"],
        drawn["completions/dpo"],
    ) == (3, 0, 0, 3)


def test_worlds_that_are_not_paired_are_all_in_the_estimate(reports):
    rng = np.random.default_rng(0)
    bars = {
        bar: rng.normal(size=(3, n))
        for bar, n in {"DPO K=2": 300, "Online K=2": 300, "DPO K=8": 200, "Online K=8": 200}.items()
    }
    bars["Online K=8"] += 5
    bars["Online K=2"] += 2
    draw(reports, "horizon", bars, {bar: int(bar[-1]) for bar in bars})
    (row,) = decide(
        reports,
        claim(
            figure="horizon",
            contrast="{Online K=8: 1, DPO K=8: -1, Online K=2: -1, DPO K=2: 1}",
            more="    paired: false\n",
        ),
    )
    mean = {bar: scores.mean() for bar, scores in bars.items()}
    assert row["estimate"]["mean"] == pytest.approx(
        mean["Online K=8"] - mean["DPO K=8"] - mean["Online K=2"] + mean["DPO K=2"]
    )


def test_roles_by_hand(tiny):
    points = [
        tiny.model_copy(update={"data": tiny.data.model_copy(update={"preferences": n})})
        for n in (750, 1500, 3000, 6000)
    ]
    assert [dials.roles(each, points) for each in points] == [
        ["fewest pairs"],
        ["a quarter of the pairs"],
        ["half of the pairs"],
        ["all pairs"],
    ]


def test_a_point_whose_sft_policy_cannot_write_is_said(tmp_path):
    """Of two arms one's SFT leaves the prompt; the scale's own bar, whose key is another, is not asked."""
    for name, share in (("k2", 0.803), ("k4", 0.9999)):
        (tmp_path / f"mini/branching/{name}/s1").mkdir(parents=True)
        stage.write_json(tmp_path / f"mini/branching/{name}/s1/metrics.json", {"sft": {"validity": share}})
    bars = [figure.Bar(f"{policy} K={x}", *figure.policy("mini", policy, "branching", f"k{x}"), x=x)
            for x in (2, 4) for policy in ("dpo", "online")]
    own = figure.Bar("DPO K=8", *figure.policy("mini", "dpo"), x=8)
    assert dials.cannot_write(tmp_path, [*bars, own], "K", 1) == (
        " At K=2 only 80% of the SFT policy's words are the prompt's: it has not learnt to write here, and the point "
        "says little.")
    assert dials.cannot_write(tmp_path, bars[2:], "K", 1) == ""
