"""The curves of trainings, seeds together, on the page."""

import csv
import json

import pytest
from conftest import ROOT

from roads.report import curves, page
from roads.stage import UserError


def write(path, losses, **more) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    names = ["step", "lr", "loss", *more]
    rows = [[i, 0.1, loss, *(values[i - 1] for values in more.values())] for i, loss in enumerate(losses, 1)]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([names, *rows])


@pytest.fixture
def runs(tmp_path):
    where = tmp_path / "runs/mini"
    write(where / "sft/curves.csv", [3.0, 2.0])
    for seed in (0, 10):
        write(where / f"human/dpo/s{seed}/curves.csv", [1.0 + seed] * 60 + [0.0] * 60, accuracy=[0.5] * 120)
    write(where / ".scratch/abc/curves.csv", [9.0])
    return where


def test_a_run_is_means_over_its_parts(runs, tmp_path):
    found = curves.found(runs)
    assert {name: list(seeds) for name, seeds in found.items()} == {"human/dpo": ["0", "10"], "sft": ["0"]}
    assert found["sft"]["0"] == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}]
    dpo = found["human/dpo"]["10"]
    assert len(dpo) == curves.POINTS and dpo[0] == {"step": 2, "loss": 11.0, "accuracy": 0.5}
    assert [point["loss"] for point in dpo] == [11.0] * 30 + [0.0] * 30 and dpo[-1]["step"] == 120
    assert curves.write(runs, tmp_path / "reports") == 3
    with (tmp_path / "reports/curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 122 and rows[-1] == {"training": "sft", "seed": "0", "step": "2", "loss": "2", "accuracy": ""}
    before = {path.name: path.read_bytes() for path in (tmp_path / "reports").iterdir()}
    curves.write(runs, tmp_path / "reports")
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "reports").iterdir()}
    assert set(before) == {"curves.csv", "curves.png"}


def test_where_nothing_was_trained_the_page_keeps_what_it_has(runs, tmp_path):
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports/curves.png").write_bytes(b"kept")
    assert curves.write(tmp_path / "runs/none", tmp_path / "reports") == 0
    assert (tmp_path / "reports/curves.png").read_bytes() == b"kept"


@pytest.mark.parametrize("text", ["", "step,loss\n", "step,lr\n1,2\n", "step,loss\n1,x\n", "step,loss\n1\n"])
def test_a_file_that_is_none_is_told(runs, text):
    (runs / "sft/curves.csv").write_text(text)
    with pytest.raises(UserError, match="sft/curves.csv: .*; expected a training's step, loss"):
        curves.found(runs)


def test_the_page_shows_them(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    reports = tmp_path / "reports/mini"
    reports.mkdir(parents=True)
    for kind in ("json", "png", "csv"):
        (reports / f"fig3.{kind}").write_bytes((ROOT / f"reports/mini/fig3.{kind}").read_bytes())
    assert "curves" not in json.dumps(page.page(reports))
    curves.write(runs, reports)
    text = page.page(reports)
    assert '<section aria-labelledby="curves">' in text and '<a href="#curves">' in text and 'href="curves.csv"' in text
