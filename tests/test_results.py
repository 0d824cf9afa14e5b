"""Slots: what each kind is filled with, and every mistake in one as one line."""

import json
from pathlib import Path

import pytest
from conftest import ROOT

from roads.report import results
from roads.stage import UserError


@pytest.fixture
def reports(tmp_path):
    estimate = {"mean": 0.0251, "low": 0.006, "high": 0.0461, "by_seed": [0.01, -0.02, 0.05],
                "over_seeds": [-0.07, 0.1]}
    bars = [{"bar": "DPO", "series": "DPO", "x": None, "n": 9, "scores": [], "key": "score", **estimate, "mean": 0.7}]
    also = {"accuracy": {"bars": {"DPO": {**estimate, "mean": 0.6}}, "gaps": {"Online - DPO": estimate}}}
    figure = {"figure": "fig3", "title": "", "caption": "", "note": "", "measure": "", "seeds": [0], "bars": bars,
              "gaps": {"Online - DPO": estimate}, "also": also, "paper": None,
              "provenance": {"files": {}, "commit": None, "lock": None, "params": {}}}
    claim = {"id": "a", "sentence": "S.", "source": "Sec. 3", "figure": "fig3", "contrast": {"DPO": 1},
             "test": "greater", "margin": 0.02, "family": "the paper's", "verdict": "undecided", "estimate": estimate}
    not_run = claim | {"id": "b", "verdict": "not run", "estimate": None, "family": "ours"}
    (tmp_path / "fig3.json").write_text(json.dumps(figure))
    (tmp_path / "claims.json").write_text(json.dumps({"alpha": 0.05, "claims": [claim, not_run], "hypotheses": []}))
    return results.Reports(tmp_path)


@pytest.mark.parametrize("slot, value", [
    ("gap ; fig3 ; Online - DPO", "+0.025 [+0.006, +0.046]"),
    ("gap ; fig3 ; accuracy ; Online - DPO", "+0.025 [+0.006, +0.046]"),
    ("bar ; fig3 ; DPO", "0.700"), ("bar ; fig3 ; accuracy ; DPO", "0.600"),
    ("effect ; a", "+0.025 [+0.006, +0.046]"), ("verdict ; a", "undecided"),
    ("seeds ; a", "-0.020 to +0.050, 2 of 3 above 0"), ("say ; a ; yes ; no ; perhaps", "perhaps"),
    ("count ; undecided", "1"), ("count", "2"),
])
def test_a_slot_is_filled(reports, slot, value):
    text = f"before <!-- $ {slot} -->stale<!-- $ --> after"
    filled = results.fill(text, reports, "x.md")
    assert filled == f"before <!-- $ {slot} -->{value}<!-- $ --> after" == results.fill(filled, reports, "x.md")


def test_a_table_has_a_row_for_every_claim_of_a_family(reports):
    filled = results.fill("<!-- $ table ; the paper's --><!-- $ -->", reports, "x.md")
    assert "| S. | fig3 | +0.025 [+0.006, +0.046] | [-0.070, +0.100] | undecided |" in filled
    assert "| S. | fig3 | – | – | not run |" in results.fill("<!-- $ table ; ours --><!-- $ -->", reports, "x.md")


def test_what_came_out_otherwise_elsewhere(reports):
    """Claims of the same scores there and here are not counted, nor one that asks something else since (e): a, which
    moved, and d, which did not, are."""
    found = json.loads((reports.folder / "claims.json").read_text())
    (a, _), here = found["claims"], []
    for name, made_from, verdict in (("a", "x", "undecided"), ("c", "x", "supported"), ("d", "x", "supported"),
                                     ("e", "x", "supported")):
        here.append(a | {"id": name, "sentence": f"{name}.", "made_from": made_from, "verdict": verdict})
    there = [here[0] | {"made_from": "y", "verdict": "supported"}, here[1], here[2] | {"made_from": "y"},
             here[3] | {"made_from": "y", "over": "worlds", "verdict": "undecided"}]
    for folder, claims in ((reports.folder, here), (reports.folder.parent / "epyc", there)):
        folder.mkdir(exist_ok=True)
        (folder / "claims.json").write_text(json.dumps(found | {"claims": claims}))
    reports = results.Reports(reports.folder)
    assert "1 of 2" in results.fill("<!-- $ again ; epyc -->?<!-- $ -->", reports, "x.md")
    effect = "+0.025 [+0.006, +0.046]"
    assert results.fill("<!-- $ moved ; epyc -->?<!-- $ -->", reports, "x.md").splitlines()[1:-1] == [
        "| claim | figure | there | | here | |", "|---|---|---|---|---|---|",
        f"| a. | fig3 | {effect} | supported | {effect} | undecided |"]


def test_a_slot_of_another_scale(reports):
    other = reports.folder.parent / "real-short"
    other.mkdir(exist_ok=True)
    found = json.loads((reports.folder / "claims.json").read_text())
    found["claims"][0]["verdict"] = "supported"
    (other / "claims.json").write_text(json.dumps(found))
    text = "<!-- $ verdict@real-short ; a -->?<!-- $ --> and <!-- $ verdict ; a -->?<!-- $ -->"
    assert results.SLOT.findall(results.fill(text, reports, "x.md")) == [
        ("<!-- $ verdict@real-short ; a -->", "verdict@real-short ; a", "supported", "<!-- $ -->"),
        ("<!-- $ verdict ; a -->", "verdict ; a", "undecided", "<!-- $ -->")]


@pytest.mark.parametrize("slot, said", [
    ("gap ; fig3 ; Online - DP", "no 'Online - DP'; did you mean 'Online - DPO'?"),
    ("gap ; fig4 ; x", "no figure 'fig4' in"), ("bar ; fig3 ; accurcy ; DPO", "did you mean 'accuracy'?"),
    ("verdict ; c", "no claim 'c'"), ("effect ; b", "claim b was not run; `make fig3 claims` decides it"),
    ("verdct ; a", "no kind of slot 'verdct'; did you mean 'verdict'?"), ("table ; theirs", "no family 'theirs'"),
    ("say ; a ; yes", "missing 2 required positional arguments"),
    ("effect@real-shrt ; a", "no folder 'real-shrt' in"),
])
def test_a_mistake_is_named_with_its_line(reports, slot, said):
    with pytest.raises(UserError) as error:
        results.fill(f"one\ntwo <!-- $ {slot} -->?<!-- $ -->", reports, "x.md")
    assert str(error.value).startswith(f"x.md:2: {slot}: ") and said in str(error.value)


def test_the_command_changes_what_is_stale_and_nothing_else(tmp_path, monkeypatch, capsys):
    text = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    stale = results.SLOT.sub(lambda slot: slot[1] + "?" + slot[4], text)
    path = tmp_path / "results.md"
    path.write_text(stale, encoding="utf-8")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["results", "reports/mini", str(path)])
    results._command()
    assert path.read_text(encoding="utf-8") == text and "some of them changed" in capsys.readouterr().out
    results._command()
    assert "changed" not in capsys.readouterr().out and Path(path).stat().st_size > 1000
