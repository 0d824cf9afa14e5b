"""The theory: both sides of every statement agree on seeds of the tests' own, and a broken side does not."""

import csv
import json

import numpy as np
import pytest
import torch
from conftest import ROOT

from roads.theory import broken, complexity, figures, run, statements
from roads.theory import tree as t

REPORTS = ROOT / "reports/theory"
SEEDS = range(1000, 1004)  # one for each shape of tree; neither the report's nor development seeds
CASES = [(name, kind) for name, (_, kinds) in run.STATEMENTS.items() for kind in kinds]


@pytest.mark.parametrize("name, kind", CASES, ids=[f"{name}-{'-'.join(kind) or 'all'}" for name, kind in CASES])
def test_a_statement_holds(name, kind):
    function, _ = run.STATEMENTS[name]
    assert max(function(statements.problem(seed, **kind)) for seed in SEEDS) < run.TOLERANCE


@pytest.mark.parametrize("row", broken.PARTING, ids=lambda row: f"{row[0]}: {row[1]}")
def test_the_sides_part_without_an_assumption(row):
    assert np.mean([row[2](seed) for seed in SEEDS]) > 1e-3


@pytest.mark.parametrize("row", broken.UNNEEDED, ids=lambda row: f"{row[0]}: {row[1]}")
def test_the_sides_agree_without_what_they_do_not_need(row):
    assert max(row[2](seed) for seed in SEEDS) < run.TOLERANCE


@pytest.mark.parametrize("name", ["Lemma 2.1", "Lemma A.1", "Theorem 2.2", "Theorem 2.3", "Theorem 3.1", "Eq. 11",
                                  "Eq. 12", "Eq. 13", "Eq. 14"])
def test_an_error_in_one_side_shows(name, monkeypatch):
    """Soft RL that gives 1% more entropy than Eq. 10 is another side of every statement that has soft RL in it."""
    exact = t.soft_return

    def off(tree, rho, reward, logits, ref=None):
        return exact(tree, rho, reward / 1.01, logits, ref)

    monkeypatch.setattr(t, "soft_return", off)
    function, _ = run.STATEMENTS[name]
    assert function(statements.problem(SEEDS[0])) > 1e-4


def test_trees_enumerate_every_trajectory_once():
    tree = t.make(2, 3, 2)
    assert t.n_states(tree) == 2 * (1 + 3)
    assert tree.prompt.tolist() == [0] * 9 + [1] * 9
    assert tree.action[:9].tolist() == [[a, b] for a in range(3) for b in range(3)]
    assert tree.state[9:12].tolist() == [[1, 5], [1, 5], [1, 5]] and tree.state[17].tolist() == [1, 7]


def test_soft_return_and_reverse_kl_add_up_to_log_z_for_any_policy():
    """The identity behind Lemma 2.1, which needs no optimum: E[r] + H = E log Z - KL(pi || P*_r)."""
    p = statements.problem(1001)
    for scale in (0.0, 1.0, 5.0):
        logits = scale * p.ref
        log_p = t.trajectory_log_prob(p.tree, logits)
        target = p.rho.log()[p.tree.prompt] + t.normalise(p.tree, p.reward)
        log_z = p.rho @ p.reward.view(p.tree.prompts, -1).logsumexp(1)
        total = t.soft_return(p.tree, p.rho, p.reward, logits) + t.reverse_kl(p.tree, p.rho, log_p, target)
        assert float((total - log_z).abs()) < 1e-12
        assert float((p.rho[p.tree.prompt] * log_p.exp()).sum()) == pytest.approx(1, abs=1e-12)


def test_values_computed_by_hand():
    """One prompt, two tokens, one step, r = (ln 3, 0): pi* = (3/4, 1/4), Bradley-Terry P(first wins) = 3/4."""
    tree, reward = t.make(1, 2, 1), torch.tensor([np.log(3.0), 0.0])
    assert t.normalise(tree, reward).exp().tolist() == pytest.approx([0.75, 0.25])
    pairs = t.population_pairs(tree, reward)
    assert pairs.weight.tolist() == pytest.approx([0.75, 0.25])
    assert float(t.bradley_terry(pairs, 0 * reward)) == pytest.approx(np.log(2))
    best = t.soft_return(tree, torch.ones(1).double(), reward, t.soft_q(tree, reward))
    assert float(best) == pytest.approx(np.log(4))


def test_no_minimiser_is_an_error():
    with pytest.raises(RuntimeError, match="no minimiser"):
        t.minimise(lambda x: (-x).exp().sum() + 1e-3 * x.sum().sin(), torch.full((1,), 800.0).double(), tolerance=0)


def test_moving_a_reward_moves_every_prefix_on_its_way_and_moving_q_one():
    for seed in SEEDS:
        p = statements.problem(seed)
        assert statements.reach(p) == (p.tree.horizon, 1)


@pytest.mark.parametrize("name", complexity.estimators(3))
def test_the_derivatives_of_an_estimator(name):
    model, relative = complexity.estimators(3)[name]
    theta = np.random.default_rng(0).normal(size=(1, len(relative)))
    _, slope = model(theta)
    step = 1e-6 * np.eye(len(relative))
    ahead, behind = (np.concatenate([model(theta + sign * row)[0] for row in step]) for sign in (1, -1))
    assert np.allclose((ahead - behind).T / 2e-6, slope[0], atol=1e-7)


def test_a_policy_s_local_reward_is_a_distribution_over_completions():
    for name in ("MLE over Π", "MLE over Π(R_sim)", "MLE over policies of prefix features"):
        model, relative = complexity.estimators(3)[name]
        log_p, _ = model(np.random.default_rng(1).normal(size=(2, len(relative))))
        assert np.allclose(np.exp(log_p).sum(1), 1)


def test_h_1_has_no_gap_and_h_3_has_one(monkeypatch):
    monkeypatch.setattr(complexity, "SEEDS", range(1000, 1012))
    monkeypatch.setattr(complexity, "DEVELOPMENT", range(1012, 1020))
    bandit, tree = (complexity.errors(h, 256, 0.0) for h in (1, 3))
    assert np.allclose(bandit["MLE over Π"][0], bandit["two-stage, R_sim"][0], rtol=1e-2, atol=1e-5)
    assert tree["MLE over Π"][0].mean() > 3 * tree["two-stage, R_sim"][0].mean()
    assert np.allclose(tree["MLE over Π(R_sim)"][0], tree["two-stage, R_sim"][0], rtol=1e-2, atol=1e-5)


def test_errors_of_many_pairs_are_those_of_the_delta_method(monkeypatch):
    monkeypatch.setattr(complexity, "SEEDS", range(1000, 1040))
    pairs = 100_000
    found = pairs * complexity.errors(2, pairs, 0.0)["two-stage, R_sim"][0]
    limit = complexity.asymptote(2, 0.0, complexity.occurs(2), complexity.SEEDS)
    assert abs(found.mean() - limit.mean()) < 3 * found.std(ddof=1) / len(found) ** 0.5


def test_the_committed_report_holds_to_the_tolerance():
    rows = list(csv.DictReader((REPORTS / "statements.csv").open(encoding="utf-8")))
    assert {row["statement"] for row in rows} == set(run.STATEMENTS)
    for row in rows:
        assert int(row["n"]) >= 100 and float(row["max_error"]) < 1e-6 and row["status"] == "holds"


def test_report_seeds_are_not_development_seeds():
    content = json.loads((REPORTS / "complexity.json").read_text(encoding="utf-8"))
    assert content["seeds"] == list(complexity.SEEDS) and not set(content["seeds"]) & set(content["development_seeds"])
    for name in ("fig2", "finite_pairs", "complexity"):
        assert all((REPORTS / f"{name}.{kind}").exists() for kind in ("png", "csv", "json"))


def test_the_committed_report_is_written_from_the_committed_numbers():
    read = {name: json.loads((REPORTS / f"{name}.json").read_text(encoding="utf-8"))
            for name in ("statements", "broken", "finite_pairs", "fig2", "complexity")}
    curves = read["complexity"]
    text = run.report(read["statements"]["rows"], read["broken"]["rows"], read["finite_pairs"]["rows"], curves["rows"],
                      curves["gains"], curves["limits"], read["fig2"]["distance"])
    assert text == (REPORTS / "theory.md").read_text(encoding="utf-8")


def test_figure_2_is_drawn_from_projections(tmp_path):
    """Over unequal classes the two routes end at two points, over isomorphic ones at one; the same as committed."""
    unequal, isomorphic = figures.figure_2(tmp_path).values()
    assert unequal > 0.05 and isomorphic < run.TOLERANCE
    new, old = (json.loads((where / "fig2.json").read_text(encoding="utf-8"))["rows"] for where in (tmp_path, REPORTS))
    for a, b in zip(new, old, strict=True):
        assert [a[f"P({k})"] for k in ("00", "01", "10", "11")] == pytest.approx(
            [b[f"P({k})"] for k in ("00", "01", "10", "11")], abs=1e-5)
