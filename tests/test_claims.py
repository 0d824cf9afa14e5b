"""Claims: claims.yaml itself, every verdict from made-up figures, and every mistake as one line."""

import csv
import hashlib
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from conftest import ROOT

from roads import active, config, stage
from roads.figures import anatomy, best_of_n, budget, dials, learnt, likelihood, worlds
from roads.figures import policies as policy_figures
from roads.report import claims
from roads.stage import UserError

SIZES, COUNTS = ("small", "medium", "large"), (1, 2, 5, 10, 25)
OFFLINE, ALL = ["SFT", "DPO", "DPO 2x"], ["SFT", "DPO", "DPO 2x", "Online(SFT)", "Online(DPO)"]


def _dial(name, values):
    return {f"{method} {name}={value}": value for value in values for method in ("DPO", "DPO 2x", "Online(DPO)")}


def _pairs(values):
    return {f"{method} n={value}": value for value in values for method in ("DPO", "Online(SFT)")}


# Every figure's bars, with their x.
BARS = {
    "fig3": ALL, "fig4": ["DPO", "Online(SFT)", "Online(DPO)"],
    "fig5": ["Online(SFT)", "Online(SFT) 3x prompts", "Online(SFT) 2x prompts, same steps"],
    "fig6": ["DPO", "Online(SFT)", "Online(DPO)", "DPO, noisy", "Online(DPO), noisy"],
    "fig7": ["Global RM", "Local RM", "DPO RM", "Base"],
    "fig8": {f"{rm} RM on {policy} N={n}": n for rm in ("Global", "Local", "DPO") for policy in ("SFT", "DPO")
             for n in COUNTS},
    "fig9": {f"Policy {p}, RM {r} N={n}": n for p in SIZES for r in SIZES for n in COUNTS},
    "fig10": [*OFFLINE, "Online(DPO)"], "fig11": [*OFFLINE, "Online(DPO)", "Online(DPO) 2x"],
    "rouge_warm": ["DPO", *(f"Online(DPO) T={warm}" for warm in (0.1, 0.25, 0.5))],
    "rouge_limits": ["DPO", "Online(DPO)", "RM's pick, warm", "Optimum, RM", "Optimum, DPO's reward"],
    "sizes": [f"{bar} width {width}" for width in (32, 64, 128) for bar in (*ALL, "Online(SFT) more prompts")],
    "sizes_judges": [f"{bar} width {width}" for width in (32, 64, 128) for bar in ("Global RM", "DPO RM", "Base")],
    "fig12": _pairs([750, 1500, 3000, 6000]),
    "horizon": _dial("K", [2, 4, 8, 12]), "branching": _dial("K", [2, 4, 8]),
    "complexity": _dial("interaction", [0, 0.5, 4]),
    "verifier": _dial("tag", [0, 2, 8]), "told": ALL, "told_judges": ["Global RM", "DPO RM", "Base"],
    "worlds": [f"{series} w{k:02}" for k in range(1, 13)
               for series in ("DPO", "DPO 2x", "Online(DPO)", "Global RM", "DPO RM")],
    "bases": [f"{series} b{k}" for k in range(1, 7) for series in ("DPO", "DPO 2x", "Online(DPO)", "Global RM")],
    "bases_readers": [f"{series} b{k}" for k in range(1, 7) for series in ("DPO 2x", "Online(DPO)")],
    "bases_rouge": [f"{series} b{k}" for k in range(1, 7) for series in ("DPO", "DPO 2x", "Online(DPO)")],
    "learnt": [f"{series} {kind} n={n}" for kind in ("two", "order", "counts") for n in (375, 6000, 24000)
               for series in ("DPO", "Online(SFT)", "Global RM", "DPO RM", "Probe")],
    "learnt_bases": [f"{series} {kind} n={n}" for series in ("DPO", "Online(SFT)")
                     for kind, n in (("four", 375), ("blind", 375), ("topical", 6000), ("alone", 6000))],
    "tuned": [f"{series} {kind} n=6000" for kind in ("coherence", "counts", "order")
              for series in ("DPO", "Online(SFT)")],
    "tuned_bases": [f"{series} {kind} n=6000" for kind in ("blind", "topical", "alone")
                    for series in ("DPO", "Online(SFT)")],
    "anatomy": [bar + world for world in ("", " (quality)") for bar in (
        "offline pairs, readers", "offline pairs, readers, divided", "offline pairs, RM", "offline pairs, RM soft",
        "own pairs, RM", "own pairs, RM, divided", "own best and worst, RM, divided", "exact, RM", "exact, DPO")],
    "methods": ["DPO paper", "Online(DPO) paper", "IPO ipo-02", "SimPO simpo-05", "chi-PO chi-po-05",
                "DPO + KL dpo-kl-001", "DPO + KL eq2", "Online(DPO), 3 rounds rounds3", "REBEL rebel"],
    "more_data": _pairs([6000, 12000, 24000]) | {"Online(SFT), 6000 prompts n=24000": 24000},
    "recipe": [f"{method} {switch}" for switch in ("paper", "schedule", "rm-batch", "loader", "logits", "author-code")
               for method in ("DPO", "Online(DPO)")],
    "budget": ["DPO bold", "Online(DPO) bold", "Online(DPO) bolder"],
}  # fmt: skip
ROLES = {"sizes": {bar: [re.sub("width.*", f"{end} model", bar)] for bar in BARS["sizes"]
                   for end, width in (("smallest", 32), ("largest", 128)) if bar.endswith(f" {width}")},
         "sizes_judges": {f"{bar} width 128": [f"{bar} largest model"] for bar in ("Global RM", "DPO RM")},
         "fig5": {"Online(SFT) 3x prompts": ["Online(SFT) more prompts"]},
         "fig9": {f"Policy {size}, RM {rm} N=25": [f"{policy} policy, {rank} RM"]
                  for policy, size in (("smallest", "small"), ("largest", "large"))
                  for rank, rm in (("own", size), ("largest" if size == "small" else "smallest",
                                                   "large" if size == "small" else "small"))},
         "fig12": {f"{method} n={n}": [f"{method} {role}"] for method in ("DPO", "Online(SFT)") for n, role in zip(
             (750, 1500, 3000, 6000), ("fewest pairs", "a quarter of the pairs", "half of the pairs", "all pairs"))}}
KEYS = {"fig4": ["held_out"], "fig7": ["by_quality"], "told_judges": ["by_quality"],
        "anatomy": ["noisy", "penalty0"]}  # arrays beside the score
# Words at the end of a bar's name that say which world, base or cell it is of.
CELL = {"worlds": 1, "bases": 1, "bases_readers": 1, "bases_rouge": 1, "learnt": 2}


@pytest.fixture
def reports(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "reports/mini"
    folder.mkdir(parents=True)
    return folder


def draw(reports, name, bars, x=None):
    """A figure's json and the scores [seeds, prompts] of its bars, as the figures write them."""
    entries, files = [], {}
    for bar, scores in bars.items():
        paths = [f"runs/mini/{name}/{bar}/s{seed}/scores.npz" for seed in range(len(scores))]
        for path, row in zip(paths, scores, strict=True):
            target = reports.parents[1] / path
            target.parent.mkdir(parents=True)
            np.savez(target, score=row, **dict.fromkeys(KEYS.get(name, ()), row))
            files[path] = hashlib.sha256(target.read_bytes()).hexdigest()
        series = bar.rsplit(" ", CELL[name])[0] if name in CELL else bar
        entries.append({"bar": bar, "series": series, "x": (x or {}).get(bar),
                        "roles": ROLES.get(name, {}).get(bar, []), "mean": float(np.mean(scores)),
                        "by_seed": np.mean(scores, 1).tolist(), "low": 0.0, "high": 1.0, "n": len(scores[0]),
                        "scores": paths, "key": "score"})
    stage.write_json(reports / f"{name}.json", {
        "figure": name, "title": "", "caption": "", "note": "", "measure": "winrate",
        "seeds": list(range(len(scores))), "bars": entries,
        "paper": None, "gaps": {},
        "provenance": {"files": files, "commit": None, "lock": None, "params": {}}})


def claim(id="a", contrast="{DPO 2x: 1, DPO: -1}", test="greater", margin="0.02", figure="fig3", more=""):
    return (f"  - id: {id}\n    sentence: S.\n    source: ours\n    figure: {figure}\n    contrast: {contrast}\n"
            f"    test: {test}\n    margin: {margin}\n{more}")


def document(*entries, hypotheses="[]", alpha="0.05"):
    return f"alpha: {alpha}\nhypotheses: {hypotheses}\nclaims:\n" + "".join(entries or [claim()])


def decide(reports, *entries):
    path = reports.parents[1] / "claims.yaml"
    path.write_text(document(*entries), encoding="utf-8")
    return claims.decide(claims.load(path), reports)


def policies(shift=0.0, noise=0.5, seeds=(0.0, 0.0, 0.0), n=400):
    """DPO, and DPO 2x that is ahead by `shift`, with noise per prompt and an offset per seed."""
    rng = np.random.default_rng(0)
    control = rng.normal(size=(3, n))
    return {"DPO": control, "DPO 2x": control + shift + rng.normal(0, noise, size=(3, n)) + np.array(seeds)[:, None]}


# claims.yaml itself


def test_the_claims_of_the_repository_name_bars_that_the_figures_have():
    loaded = claims.load(ROOT / "claims.yaml")
    for each in loaded.claims:
        for name in [*each.contrast, *each.against]:
            figure, _, bar = name.rpartition("/")
            figure = figure or each.figure
            roles = [role for found in ROLES.get(figure, {}).values() for role in found]
            series = [bar.rsplit(" ", CELL[figure])[0] for bar in BARS[figure]] if each.over != "prompts" else []
            assert bar in {*BARS[figure], *roles, *series}, each.id
        assert each.source.startswith("ours") or re.search(r"^Sec\. 3.*, Fig\. \d+$", each.source), each.id
    assert {each.figure for each in loaded.claims} == set(BARS)
    assert [each.id for each in loaded.hypotheses] == ["H1", "H2", "H3", "H4", "H5", "H6"]
    assert all(each.claims for each in loaded.hypotheses)
    # One margin for each unit, but for the one claim that says why not.
    units = {"fig4": 0.01, "fig7": 0.005, "sizes_judges": 0.005} | dict.fromkeys(
        ("fig11", "rouge_warm", "rouge_limits", "bases_rouge"), 0.01)
    others = {"accuracy": 0.01, "log-likelihood": 0.01, "by quality": 0.01, "noisy judge": 0.01}
    odd = [each.id for each in loaded.claims if each.test != "correlated"
           and each.margin != others.get(each.measure, units.get(each.figure, 0.02))]
    assert odd == ["rouge-second-epoch-adds", "learnt-trunk"]


def test_the_bars_of_our_own_figures_are_those_that_claims_name(monkeypatch):
    monkeypatch.chdir(ROOT)
    bars = {name: module.bars_of("mini", name) for name, module in
            (("anatomy", anatomy), ("worlds", worlds), ("bases", worlds), ("bases_readers", worlds),
             ("bases_rouge", worlds), ("learnt", learnt),
             ("learnt_bases", learnt), ("tuned", learnt), ("tuned_bases", learnt))}
    bars["methods"] = budget.bars_of("mini", "methods")
    named = {name: {label for bar in found for label in (bar.name, bar.series)} for name, found in bars.items()}
    checked = [each for each in claims.load(ROOT / "claims.yaml").claims if each.figure in named]
    for each in checked:
        assert {*each.contrast, *each.against} <= named[each.figure], each.id
    assert len(checked) == 39
    for found in bars.values():
        assert len({bar.name for bar in found}) == len(found) > 10


@pytest.mark.parametrize("scale", ["mini", "real", "lite", "paper"])
def test_every_claim_of_the_paper_can_be_decided_at_every_scale_that_has_its_figure(scale, monkeypatch):
    """Its bars or roles are among those that the figures' own code names for the scale's arms."""
    monkeypatch.chdir(ROOT)
    params = config.load()
    shown = [name for name, scales in active.follow(scale, None, params).figures.items() if scales]
    bars = {}
    for name in shown:
        module = {"policies": policy_figures, "best_of_n": best_of_n, "likelihood": likelihood, "dials": dials}.get(
            params.figures[name].module)
        bars[name] = module.bars_of(scale, name) if module else []
    known = {name: {label for bar in found for label in (bar.name, *bar.roles)} for name, found in bars.items()}
    checked = 0
    for each in claims.load(ROOT / "claims.yaml").claims:
        if each.family == "ours" or each.figure not in shown:
            continue
        for name in [*each.contrast, *each.against]:
            figure, _, bar = name.rpartition("/")
            assert bar in known[figure or each.figure], (each.id, name)
        checked += 1
    assert checked == sum(each.family != "ours" for each in claims.load(ROOT / "claims.yaml").claims) > 25
    # At scale real every reward model is at most as large as the policy: one claim is about none.
    (large,) = [each for each in claims.load(ROOT / "claims.yaml").claims if each.id == "bon-large-reward-model"]
    ends = [bar.name for bar in bars["fig9"] for role in bar.roles if role in large.contrast]
    assert len(set(ends)) == (1 if scale == "real" else 2)


def test_the_claims_of_the_repository_run_on_figures_of_their_kind(reports, capsys, monkeypatch):
    rng = np.random.default_rng(0)
    for name, bars in BARS.items():
        draw(reports, name, {bar: rng.uniform(0.1, 1, size=(3, 40)) for bar in bars},
             bars if isinstance(bars, dict) else None)
    monkeypatch.setattr("sys.argv", ["claims", str(ROOT / "claims.yaml"), "reports/mini"])
    claims._command()
    printed = capsys.readouterr().out.splitlines()
    assert max(map(len, printed)) <= 120 and printed[-1].endswith(" 0 not run")
    first = {path.name: path.read_bytes() for path in reports.glob("claims.*")}
    claims._command()
    assert first == {path.name: path.read_bytes() for path in reports.glob("claims.*")} and len(first) == 2
    saved = json.loads(first["claims.json"])
    assert saved["scale"] == "mini" and saved["alpha"] == 0.05 and len(saved["hypotheses"]) == 6
    assert {"id", "sentence", "source", "figure", "contrast", "test", "margin", "verdict", "estimate", "p",
            "p_adjusted", "n", "seeds", "why"} <= set(saved["claims"][0])
    rows = list(csv.DictReader(first["claims.csv"].decode().splitlines()))
    assert [row["id"] for row in rows] == [row["id"] for row in saved["claims"]]
    assert [float(row["mean"]) for row in rows] == [row["estimate"]["mean"] for row in saved["claims"]]


# Verdicts


@pytest.mark.parametrize("test, margin, figure, verdict, why", [
    ("greater", 0.02, policies(0.5), "supported", "the interval is above 0"),
    ("greater", 0.02, policies(0.0, noise=2), "undecided", "the interval has 0 in it"),
    ("greater", 0.2, policies(0.0), "not supported", "is below the margin 0.2"),
    ("greater", 0.02, policies(-0.5), "not supported", "the interval is below 0"),
    ("equivalent", 0.2, policies(0.0), "supported", "within +-0.2"),
    ("equivalent", 0.2, policies(0.2), "undecided", "not shown to be within +-0.2"),
    ("equivalent", 0.2, policies(0.5), "not supported", "the interval is above 0.2"),
    ("equivalent", 0.2, policies(-0.5), "not supported", "the interval is below -0.2"),
])
def test_every_verdict(reports, test, margin, figure, verdict, why):
    draw(reports, "fig3", figure)
    (row,) = decide(reports, claim(test=test, margin=margin))
    assert row["verdict"] == verdict and why in row["why"]
    assert row["estimate"]["mean"] == pytest.approx((figure["DPO 2x"] - figure["DPO"]).mean())
    assert row["n"] == 400 and row["seeds"] == [0, 1, 2] and row["p"] == row["p_adjusted"]


def test_a_figure_that_was_not_made_is_not_run_and_does_not_count_for_holm(reports):
    draw(reports, "fig3", policies(0.15, noise=1))
    (alone,) = decide(reports, claim())
    first, missing, twin = decide(reports, claim(), claim("b", figure="fig4"), claim("c"))
    assert missing["verdict"] == "not run" and "`make fig4`" in missing["why"]
    assert missing["estimate"] is None and missing["p"] is None and missing["seeds"] == []
    assert 0 < first["p"] == alone["p"] == alone["p_adjusted"] < 0.05
    assert first["p_adjusted"] == twin["p_adjusted"] == pytest.approx(2 * first["p"])


def test_a_mean_that_few_prompts_carry_is_undecided(reports):
    """Nine prompts in ten lose a little, one wins a lot: the mean is above 0, the sign test says that most lose."""
    moves = np.where(np.arange(400) % 10, -0.1, 5.0)
    draw(reports, "fig3", {"DPO": np.zeros((3, 400)), "DPO 2x": np.tile(moves, (3, 1))})
    (row,) = decide(reports, claim())
    assert row["estimate"]["low"] > 0 and row["p"] == pytest.approx(1) and row["verdict"] == "undecided"


def test_seeds_of_both_signs_are_said(reports):
    draw(reports, "fig3", policies(0.3, noise=0.1, seeds=(0.5, 0.5, -0.4)))
    (row,) = decide(reports, claim())
    assert re.search(r"; seeds of both signs: \+0\.\d+, \+0\.\d+, -0\.\d+$", row["why"])


def test_a_difference_of_two_gaps(reports):
    base = np.random.default_rng(0).normal(size=(3, 300))
    gaps = {"DPO n=1": base, "Online n=1": base + 0.3, "DPO n=2": 2 * base, "Online n=2": 2 * base + 0.1}
    draw(reports, "fig12", gaps)
    contrast = "{Online n=1: 1, DPO n=1: -1, Online n=2: -1, DPO n=2: 1}"
    (row,) = decide(reports, claim(figure="fig12", contrast=contrast))
    assert row["estimate"]["mean"] == pytest.approx(0.2) and row["estimate"]["by_seed"] == pytest.approx([0.2] * 3)
    assert row["estimate"]["high"] - row["estimate"]["low"] < 1e-9  # what prompts have in common cancels


def test_worlds_with_prompts_of_their_own_are_not_paired(reports):
    rng = np.random.default_rng(0)
    sizes = {"DPO K=2": 300, "Online K=2": 300, "DPO K=8": 200, "Online K=8": 200}
    bars = {bar: rng.normal(size=(3, n)) + 5 * (bar == "Online K=8") for bar, n in sizes.items()}
    draw(reports, "horizon", bars, {bar: int(bar[-1]) for bar in bars})
    contrast = "{Online K=8: 1, DPO K=8: -1, Online K=2: -1, DPO K=2: 1}"
    (row,) = decide(reports, claim(figure="horizon", contrast=contrast, more="    paired: false\n"))
    assert row["verdict"] == "supported" and row["n"] == 200 and row["paired"] is False
    assert row["p"] == pytest.approx(1 / 4001)  # no sign test: the bootstrap alone
    with pytest.raises(UserError, match="claim a: .*has 300 prompts, expected 200; `paired: false` is for bars of"):
        decide(reports, claim(figure="horizon", contrast=contrast))


def test_one_seed_will_do(reports):
    draw(reports, "fig3", {"DPO": np.zeros((1, 50)), "DPO 2x": np.ones((1, 50))})
    (row,) = decide(reports, claim())
    assert row["verdict"] == "supported" and row["estimate"]["by_seed"] == [1.0]


def test_families_are_corrected_each_for_itself(reports):
    draw(reports, "fig3", policies(0.15, noise=1))
    paper = claim("b").replace("source: ours", "source: Sec. 3, Fig. 3")
    ours, theirs, twin = decide(reports, claim(), paper, claim("c"))
    assert ours["family"] == twin["family"] == "ours" and theirs["family"] == "the paper's"
    assert theirs["p_adjusted"] == theirs["p"] and ours["p_adjusted"] == pytest.approx(2 * ours["p"])


def test_a_bar_may_be_named_by_its_role_and_be_of_another_figure_with_more_seeds(reports):
    rng = np.random.default_rng(0)
    base = rng.normal(size=(5, 60))
    draw(reports, "fig3", {"DPO": base, "Online(DPO)": base + 0.25})
    draw(reports, "fig12", {"DPO n=750": base[:3], "Online(SFT) n=750": base[:3] + 0.5})
    contrast = "{Online(SFT) fewest pairs: 1, DPO fewest pairs: -1, fig3/Online(DPO): -1, fig3/DPO: 1}"
    (row,) = decide(reports, claim(figure="fig12", contrast=contrast))
    assert row["estimate"]["by_seed"] == pytest.approx([0.25] * 3) and row["seeds"] == [0, 1, 2]
    missing = claim(figure="fig12", contrast="{Online(SFT) fewest pairs: 1, fig4/DPO: -1}")
    (row,) = decide(reports, missing, claim("b", figure="fig4"))[:1]
    assert row["verdict"] == "not run" and "`make fig4`" in row["why"]


def test_figures_without_a_seed_in_common_are_no_claim(reports):
    draw(reports, "fig3", {"DPO": np.zeros((2, 9))})
    draw(reports, "fig12", {"DPO n=750": np.ones((2, 9))})
    content = json.loads((reports / "fig12.json").read_text())
    stage.write_json(reports / "fig12.json", content | {"seeds": [7, 8]})
    (row,) = decide(reports, claim(figure="fig12", contrast="{DPO n=750: 1, fig3/DPO: -1}"))
    assert row["verdict"] == "not run" and row["why"] == "fig12.json and fig3.json have no seed in common"


def test_two_roles_of_one_bar_are_no_claim(reports):
    draw(reports, "fig9", {"Policy small, RM small N=25": np.ones((1, 4))})
    path = reports / "fig9.json"
    content = json.loads(path.read_text())
    content["bars"][0]["roles"] = ["largest policy, smallest RM", "largest policy, own RM"]
    stage.write_json(path, content)
    contrast = '{"largest policy, smallest RM": 1, "largest policy, own RM": -1}'
    (row,) = decide(reports, claim(figure="fig9", contrast=contrast))
    assert row["verdict"] == "not run" and "are one bar" in row["why"]


def test_what_is_compared_may_be_another_measure(reports):
    better, worse = np.array([[0.9, 0.6, 0.4, 0.8]] * 3), np.array([[0.51, 0.52, 0.3, 0.4]] * 3)
    draw(reports, "fig7", {"Global RM": better, "Local RM": worse})
    both = "{Global RM: 1, Local RM: -1}"
    right, nats = decide(reports, claim(figure="fig7", contrast=both, more="    measure: accuracy\n"),
                         claim("b", figure="fig7", contrast=both, more="    measure: log-likelihood\n"))
    assert right["estimate"]["mean"] == pytest.approx(3 / 4 - 2 / 4)
    assert nats["estimate"]["mean"] == pytest.approx(np.mean(np.log(better) - np.log(worse)))


def test_a_correlation_of_models(reports):
    noise = np.random.default_rng(1).normal(0, 0.01, size=(6, 3, 50))
    draw(reports, "fig7", {f"m{k}": k + noise[k] for k in range(3)})
    draw(reports, "fig8", {f"n{k}": [1, 2, 4][k] + noise[3 + k] for k in range(3)})
    more = "    against: [n0, n1, n2]\n"
    text = claim(figure="fig8", contrast="{fig7/m0: 1, fig7/m1: 1, fig7/m2: 1}", test="correlated", margin="0.5",
                 more=more)
    (row,) = decide(reports, text)
    assert row["estimate"]["mean"] == pytest.approx(np.corrcoef([0, 1, 2], [1, 2, 4])[0, 1], abs=0.01)
    assert row["verdict"] == "supported" and row["beyond_margin"] and len(row["estimate"]["by_seed"]) == 3


@pytest.mark.parametrize("shift, verdict, why", [(0.5, "supported", "above 0"), (-0.5, "supported", "below 0"),
                                                (0.0, "undecided", "not shown to differ from 0")])
def test_a_difference_of_either_sign(reports, shift, verdict, why):
    draw(reports, "fig3", policies(shift))
    (row,) = decide(reports, claim(test="different"))
    assert row["verdict"] == verdict and row["why"].startswith(why)


def over(reports, gaps, leads, test="greater", more="", margin="0.02"):
    """A claim over worlds whose gaps and leads of the reward model are given, each the same for both seeds."""
    bars = {}
    for k, (gap, lead) in enumerate(zip(gaps, leads, strict=True), 1):
        rng = np.random.default_rng(k)
        noise = rng.normal(size=(2, 50))
        bars |= {f"DPO 2x w{k:02}": noise, f"Online(DPO) w{k:02}": noise + gap}
        bars |= {f"DPO RM w{k:02}": noise[:, :30], f"Global RM w{k:02}": noise[:, :30] + lead}
    draw(reports, "worlds", bars)
    return decide(reports, claim(contrast="{Online(DPO): 1, DPO 2x: -1}", figure="worlds", test=test, margin=margin,
                                 more=f"    over: worlds\n{more}"))[0]


def test_over_worlds_each_is_one_observation(reports):
    """Gaps .1, .2, .3: mean .2, sd .1, t interval of +-4.303 * .1 / sqrt 3, t = .2 / (.1 / sqrt 3) with 2 degrees."""
    row = over(reports, [0.1, 0.2, 0.3], [0, 0, 0])
    assert row["estimate"]["mean"] == pytest.approx(0.2) and row["n"] == 3 and row["seeds"] == [0, 1]
    assert row["estimate"]["high"] - 0.2 == pytest.approx(4.30265 * 0.1 / 3**0.5, rel=1e-4)
    assert row["p"] == pytest.approx(0.037, abs=5e-4) and row["estimate"]["by_seed"] == pytest.approx([0.1, 0.2, 0.3])
    assert row["verdict"] == "undecided"  # its interval has 0 in it, one-sided p or not


def test_over_worlds_a_series_may_begin_as_another_does(reports):
    """DPO and DPO 2x; equal gaps everywhere leave nothing to test; equal leads nothing to correlate with."""
    bars = {f"{series} w{k:02}": np.full((2, 5), value) for k in range(1, 5)
            for series, value in (("DPO", 0.5), ("DPO 2x", 0.75), ("Global RM", 0.5), ("DPO RM", 0.25))}
    draw(reports, "worlds", bars)
    text = claim(figure="worlds", contrast="{DPO: -1, DPO 2x: 1}", more="    over: worlds\n")
    leads = "    over: worlds\n    against: {Global RM: 1, DPO RM: -1}\n"
    row, none = decide(reports, text, claim("b", "{DPO: -1, DPO 2x: 1}", "correlated", "0.5", "worlds", leads))
    assert row["n"] == 4 and row["estimate"]["mean"] == row["estimate"]["low"] == 0.25 and row["p"] == 0
    assert row["verdict"] == "supported"
    assert none["verdict"] == "not run" and none["why"] == "Global RM - DPO RM is the same in all 4 worlds"


def test_over_worlds_signs_are_those_of_worlds(reports):
    row = over(reports, [0.1, -0.2, 0.3], [0, 0, 0])
    assert "worlds of both signs: +0.1000, -0.2000, +0.3000" in row["why"]


def test_over_worlds_a_gap_may_go_with_a_lead(reports):
    row = over(reports, [0.1, 0.21, 0.29, 0.4], [0.1, 0.2, 0.3, 0.4], "correlated",
               "    against: {Global RM: 1, DPO RM: -1}\n", "0.5")
    r = np.corrcoef([0.1, 0.21, 0.29, 0.4], [0.1, 0.2, 0.3, 0.4])[0, 1]
    assert row["estimate"]["mean"] == pytest.approx(r) and row["verdict"] == "supported"
    assert row["estimate"]["by_seed"] == pytest.approx([r, r])


def test_over_kinds_the_cells_of_a_kind_are_one_observation(reports):
    """Kind a has gaps .1 and .3, b .2 and 0, c .6: means .2, .1, .6, decided without a score, as in a fresh clone."""
    gaps, leads = ({"a n=1": x, "a n=12": y, "b n=1": z, "b n=12": 0.0, "c n=1": w}
                   for x, y, z, w in ((0.1, 0.3, 0.2, 0.6), (0.0, 0.4, 0.5, 0.7)))
    bars = {f"{series} {cell}": np.full((2, 40), value) for cell in gaps for series, value in (
        ("DPO", 0.1), ("Online(SFT)", 0.1 + gaps[cell]), ("DPO RM", 0.2), ("Global RM", 0.2 + leads[cell]))}
    draw(reports, "learnt", bars)
    shutil.rmtree(reports.parents[1] / "runs")
    gap, kinds = "{Online(SFT): 1, DPO: -1}", "    over: kinds\n"
    mean, along = decide(
        reports, claim("m", gap, figure="learnt", more=kinds),
        claim("c", gap, "correlated", "0.5", "learnt", f"{kinds}    against: {{Global RM: 1, DPO RM: -1}}\n"))
    assert mean["n"] == along["n"] == 3 and mean["estimate"]["by_seed"] == pytest.approx([0.2, 0.1, 0.6])
    assert along["estimate"]["mean"] == pytest.approx(np.corrcoef([0.2, 0.1, 0.6], [0.2, 0.25, 0.7])[0, 1])
    assert "kinds" not in along["why"] and "seeds" not in along["why"]
    with pytest.raises(UserError, match="claims.a.measure: over kinds, expected none"):
        decide(reports, claim(figure="learnt", more=f"{kinds}    measure: accuracy\n"))


def test_a_claim_whose_scores_are_elsewhere_keeps_its_estimate(reports):
    """As in a fresh clone, whose reports came with it and whose runs did not; but not once its figure is another's."""
    draw(reports, "fig3", policies(0.5))
    path = reports.parents[1] / "claims.yaml"
    first = decide(reports, claim())
    claims.save(claims.load(path), first, reports)
    shutil.rmtree(reports.parents[1] / "runs")
    assert decide(reports, claim()) == first
    (row,) = decide(reports, claim(contrast="{DPO 2x: 2, DPO: -2}"))  # another question
    assert row["verdict"] == "not run" and "not found; claims need every prompt's score" in row["why"]
    draw(reports, "fig3", policies(0.4))
    shutil.rmtree(reports.parents[1] / "runs")
    (row,) = decide(reports, claim())  # another figure
    assert row["verdict"] == "not run" and "not found; claims need every prompt's score" in row["why"]


def test_rows_of_a_post_are_resampled_together(reports):
    """Ten posts of ten equal rows are ten observations: the interval is that of their means."""
    posts = np.random.default_rng(0).normal(0.3, 1, size=10)
    draw(reports, "fig3", {"DPO": np.zeros((1, 100)), "DPO 2x": np.repeat(posts, 10)[None]})
    path = reports / "fig3.json"
    content = json.loads(path.read_text())
    for entry in content["bars"]:
        target = reports.parents[1] / entry["scores"][0]
        np.savez(target, score=np.load(target)["score"], post=np.repeat(np.arange(10), 10))
        content["provenance"]["files"][entry["scores"][0]] = hashlib.sha256(target.read_bytes()).hexdigest()
    stage.write_json(path, content)
    (row,) = decide(reports, claim())
    draw(reports, "fig4", {"DPO": np.zeros((1, 10)), "DPO 2x": posts[None]})
    few, many = decide(reports, claim(figure="fig4"), claim("b"))
    assert row["estimate"]["mean"] == pytest.approx(posts.mean())
    assert many["estimate"]["low"] == pytest.approx(few["estimate"]["low"]) and many["p"] == few["p"]


def test_margins_were_committed_before_the_results_that_they_judge():
    """The commit of each claim's margin is an ancestor of the last one of its figure, and another."""
    def git(*words):
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout

    if git("rev-parse", "--is-shallow-repository").strip() != "false":
        pytest.skip("the history is not here")
    figure, checked = None, 0
    for line in git("blame", "-s", "--abbrev=39", "claims.yaml").splitlines():
        commit, _, text = line.partition(" ")
        figure = text.split("figure: ")[1].strip() if " figure: " in text else figure
        drawn = git("log", "-1", "--format=%H", "--", f"reports/mini/{figure}.json").strip()
        if " margin: " in text and drawn:
            assert commit.strip("^") != drawn[:len(commit.strip("^"))], f"{figure}: margin and result in one commit"
            done = subprocess.run(["git", "merge-base", "--is-ancestor", commit.strip("^"), drawn], cwd=ROOT)
            assert done.returncode == 0, f"{figure}: a margin is younger than the result"
            checked += 1
    assert checked > 30


# Mistakes in claims.yaml


@pytest.mark.parametrize("text, message", [
    (document(claim(more="    margn: 1\n")), "claims.a.margn: unknown key; did you mean 'margin'?"),
    (document(claim().replace("margin", "margn")), "claims.a.margn: unknown key; did you mean 'margin'?"),
    (document() + "alhpa: 1\n", "alhpa: unknown key; did you mean 'alpha'?"),
    (document(claim().replace("    source: ours\n", "")), "claims.a.source: missing"),
    (document(claim(test="grater")), "claims.a.test: input should be 'greater', 'equivalent', 'different' or"),
    (document(claim(margin="0")), "claims.a.margin: input should be greater than 0, got 0"),
    (document(claim(margin="'1'")), "claims.a.margin: input should be a valid number, got '1'"),
    (document(claim(contrast="{DPO: 1}")), "claims.a.contrast: expected weights other than 0 that sum to 0, got {"),
    (document(claim(contrast="{DPO: 0, SFT: 0}")), "claims.a.contrast: expected weights other than 0, got {"),
    (document(claim(contrast="{}")), "claims.a.contrast: expected weights other than 0, got {}"),
    (document(claim(contrast="{DPO: .nan}")), "claims.a.contrast.DPO: input should be a finite number, got nan"),
    (document(claim(contrast="{DPO: 1, DPO: -1}")), "not YAML"),
    (document(claim(id="A b")), "claims.A b.id: string should match pattern"),
    (document(claim(), claim()), "claims: expected distinct ids, got 'a' twice"),
    (document(alpha="1.5"), "alpha: input should be less than 1, got 1.5"),
    (document(hypotheses="[{id: H1, says: s, predicts: p, claims: [aa]}]"),
     "hypotheses.H1.claims: no claim 'aa'; did you mean 'a'?"),
    (document() + "headline: [aa]\n", "headline: no claim 'aa'; did you mean 'a'?"),
    (document(hypotheses="[{id: H1, says: s, predict: p, claims: [a]}]"),
     "hypotheses.H1.predict: unknown key; did you mean 'predicts'?"),
    (document(hypotheses="[{id: H, says: s, predicts: p, claims: []}, {id: H, says: s, predicts: p, claims: []}]"),
     "hypotheses: expected distinct ids, got 'H' twice"),
    ("alpha: 0.05\nhypotheses: []\nclaims: []\n", "claims: list should have at least 1 item"),
    ("alpha: 0.05\nhypotheses: []\nclaims: [7]\n", "claims.0: input should be a valid dictionary"),
    ("[1]", "expected a mapping with the keys alpha, headline, hypotheses, claims"),
    ("alpha: [", "not YAML"),
    ("", "expected a mapping"),
])  # fmt: skip
def test_a_mistake_is_named(tmp_path, text, message):
    path = tmp_path / "claims.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        claims.load(path)
    assert str(error.value).startswith(str(path)) and message in str(error.value)
    assert "\n" not in str(error.value)


def test_no_file_of_claims(tmp_path):
    with pytest.raises(UserError, match="claims.yaml: not found"):
        claims.load(tmp_path / "claims.yaml")


# Figures and scores that are not as they should be


def change(reports, **fields):
    path = reports / "fig3.json"
    stage.write_json(path, stage.read_json(path) | fields)


@pytest.mark.parametrize("mini", [True, False])
def test_a_bar_that_the_figure_lacks_here_is_named_with_those_it_has(reports, mini):
    """Mini has the bar, or is not there to be asked: the claim was not run at this scale."""
    draw(reports, "fig3", policies() | {"SFT": policies()["DPO"]})
    here = reports.with_name("other")
    (shutil.copytree if mini else shutil.move)(reports, here)
    change(here, bars=[bar for bar in stage.read_json(here / "fig3.json")["bars"] if bar["bar"] != "DPO 2x"])
    row, other = decide(here, claim(), claim("b", contrast="{SFT: 1, DPO: -1}"))
    assert row["verdict"] == "not run" and other["verdict"] != "not run"
    assert row["why"].endswith("fig3.json has no bar 'DPO 2x'; it has: DPO, SFT")
    assert claims.table([row, other]).splitlines()[-1].startswith("not run: a: ")


def test_a_bar_that_mini_does_not_have_is_a_mistake(reports):
    draw(reports, "fig3", policies())
    with pytest.raises(UserError, match=r"^claims.a.contrast: fig3 has no bar 'DPO2'; did you mean 'DPO'\?"):
        decide(reports, claim(contrast="{DPO2: 1, DPO: -1}"), claim("b"))


def test_a_figure_that_there_is_not_is_a_mistake(tmp_path):
    shutil.copyfile(ROOT / "figures.yaml", tmp_path / "figures.yaml")
    for wrong, key in ((claim(figure="fig33"), "figure"), (claim(contrast="{fig33/DPO: 1, DPO: -1}"), "contrast")):
        (tmp_path / "claims.yaml").write_text(document(wrong), encoding="utf-8")
        with pytest.raises(UserError, match=rf"claims.yaml: claims.a.{key}: no figure 'fig33' in figures.yaml; did"):
            claims.load(tmp_path / "claims.yaml")


def test_a_clone_without_runs_is_told_how_to_get_them(reports):
    draw(reports, "fig3", policies())
    draw(reports, "fig4", policies(0.5))
    (reports.parents[1] / "runs/mini/fig3/DPO/s1/scores.npz").unlink()
    rows = decide(reports, claim(), claim("b", figure="fig4"), claim("c", contrast="{fig4/DPO 2x: 1, DPO: -1}"))
    assert [row["verdict"] for row in rows] == ["not run", "supported", "not run"]  # the others are decided
    assert rows[2]["why"] == ("runs/mini/fig3/DPO/s1/scores.npz: not found; claims need every prompt's score: "
                              "`make fig3` makes it")
    assert claims.table(rows).splitlines()[-2:] == [f"not run: {row['id']}: {row['why']}" for row in rows[::2]]


def test_scores_that_changed_since_the_figure_decide_nothing(reports):
    draw(reports, "fig3", policies())
    np.savez(reports.parents[1] / "runs/mini/fig3/DPO/s1/scores.npz", score=np.zeros(400))
    (row,) = decide(reports, claim())
    assert row["verdict"] == "not run"
    assert re.match("runs/mini/fig3/DPO/s1/scores.npz: not the file that .*fig3.json was made from", row["why"])


def test_the_figures_to_make_are_those_that_are_not_there(reports):
    """Of a claim over two figures, the one that is missing."""
    draw(reports, "fig3", policies())
    rows = decide(reports, claim(contrast="{fig4/DPO 2x: 1, DPO: -1}"))
    assert claims.table(rows).splitlines()[-1] == "not run: `make fig4` makes the figures"


def test_a_bar_of_an_arm_that_came_later_is_not_run(reports):
    """params.yaml has the arm, and mini's report is older; a bar of no arm is a mistake there too."""
    shutil.copyfile(ROOT / "params.yaml", reports.parents[1] / "params.yaml")
    shutil.copyfile(ROOT / "figures.yaml", reports.parents[1] / "figures.yaml")
    draw(reports, "bases_rouge", {f"{series} b1": np.ones((2, 5)) for series in ("DPO", "DPO 2x")})
    newer = claim(figure="bases_rouge", contrast="{DPO b2: 1, DPO b1: -1}")
    (row,) = decide(reports, newer)
    assert row["verdict"] == "not run" and row["why"].endswith("before it had 'DPO b2'; `make bases_rouge` makes it")
    with pytest.raises(UserError, match="bases_rouge has no bar 'DPO b9'; did you mean 'DPO b1'"):
        decide(reports, newer.replace("b2", "b9"))


def test_scores_that_are_not_numbers_are_refused(reports):
    draw(reports, "fig3", {"DPO": np.full((3, 9), np.nan), "DPO 2x": np.ones((3, 9))})
    with pytest.raises(UserError, match="fig3.json: DPO: a score is not a finite number"):
        decide(reports, claim())


def test_an_array_that_a_file_lacks_is_named(reports):
    draw(reports, "fig3", policies())
    bars = stage.read_json(reports / "fig3.json")["bars"]
    change(reports, bars=[bar | {"key": "scores"} for bar in bars])
    with pytest.raises(UserError, match="scores.npz: no array 'scores'; did you mean 'score'?"):
        decide(reports, claim())


def test_as_many_files_as_seeds(reports):
    draw(reports, "fig3", policies())
    change(reports, seeds=[0, 1])
    with pytest.raises(UserError, match=r"fig3.json: DPO 2x: expected as many prompts for each of the seeds \[0, 1\]"):
        decide(reports, claim())


def test_worlds_are_told_apart_by_x(reports):
    draw(reports, "fig3", policies())
    with pytest.raises(UserError, match="claim a: .*DPO 2x has no x; `paired: false` tells worlds apart by it"):
        decide(reports, claim(more="    paired: false\n"))


@pytest.mark.parametrize("text, message", [
    ("{", "fig3.json: not JSON"), ("[]", "fig3.json: top level: input should be"),
    ('{"figure": "fig3", "title": "", "caption": "", "note": "", "measure": "", "seeds": [], "bars": [{"bar": "DPO"}]}',
     "fig3.json: bars.0.mean: field required"),
])  # fmt: skip
def test_a_json_that_no_figure_wrote_is_refused(reports, text, message):
    (reports / "fig3.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        decide(reports, claim())
    assert message in str(error.value) and "`make fig3` writes it again" in str(error.value)
    assert "\n" not in str(error.value)


def test_the_command_line_stops_in_one_line_and_leaves_nothing(reports, capsys, monkeypatch):
    (reports.parents[1] / "claims.yaml").write_text(document(), encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["claims", "claims.yaml", "reports/mni"])
    with pytest.raises(SystemExit, match="2"):
        stage.main(claims._command)
    assert capsys.readouterr().err == ("error: reports/mni: no such folder; expected the figures of a scale, "
                                       "such as reports/mini\n")
    draw(reports, "fig3", policies())
    change(reports, seeds=[0])
    monkeypatch.setattr("sys.argv", ["claims", "claims.yaml", "reports/mini"])
    with pytest.raises(SystemExit, match="2"):
        stage.main(claims._command)
    assert sorted(path.name for path in reports.iterdir()) == ["fig3.json"]


def test_without_figures_the_table_says_what_to_make(reports):
    assert claims.table(decide(reports, claim(), claim("b", figure="fig4"))).splitlines()[-2:] == [
        "2 claims: 0 supported, 0 not supported, 0 undecided, 2 not run", "not run: `make fig3 fig4` makes the figures"]
