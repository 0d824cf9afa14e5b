"""`make diff`: two folders of reports, bar by bar; and DVC's own verbs, which show what is in git without a run."""

import json
import shutil
import subprocess
import sys

import pytest
from conftest import ENV, ROOT, edit, make

from roads.report import diff
from roads.stage import UserError

MINI = ROOT / "reports/mini"


@pytest.fixture
def other(tmp_path):
    folder = tmp_path / "mini"
    folder.mkdir()
    for name in ("fig3.json", "fig7.json", "claims.json"):
        shutil.copy(MINI / name, folder)
    return folder


def change(path, edit):
    content = json.loads(path.read_text(encoding="utf-8"))
    edit(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def test_the_same_is_the_same(other):
    lines, differs = diff.diff(other, other)
    assert not differs and lines[0] == "fig3           5 of 5 bars the same" and lines[-1].endswith("verdicts the same")


def test_what_moved_is_named_the_farthest_first(other, tmp_path):
    theirs = shutil.copytree(other, tmp_path / "theirs")

    def edit(content):
        for bar, by in zip(content["bars"][1:3], (0.001, 0.2), strict=True):
            bar.update({key: bar[key] + by for key in ("mean", "low", "high")})

    change(theirs / "fig3.json", edit)
    change(theirs / "claims.json", lambda content: content["claims"][0].update(verdict="undecided"))
    (theirs / "fig7.json").unlink()
    lines, differs = diff.diff(other, theirs, every=True)
    mean = json.loads((other / "fig3.json").read_text())["bars"][2]["mean"]
    assert differs and lines[0] == (f"fig3           3 of 5 bars the same; farthest DPO 2x: {mean:.4f} and "
                                    f"{mean + 0.2:.4f}; intervals apart: 1")
    assert lines[1].endswith("(+0.2000), apart") and lines[2].strip().startswith("DPO: ") and "apart" not in lines[2]
    assert lines[3] == f"only in {other}: fig7" and lines[-1].strip() == "online-beats-offline: supported and undecided"


def test_a_bar_of_one_alone_is_a_difference(other, tmp_path):
    theirs = shutil.copytree(other, tmp_path / "theirs")
    change(theirs / "fig3.json", lambda content: content["bars"].pop())
    lines, differs = diff.diff(other, theirs)
    assert differs and lines[0] == "fig3           4 of 4 bars the same"
    assert "only in one of them: Online(DPO)" in lines[1]


def test_no_reports_are_one_line(tmp_path):
    with pytest.raises(UserError, match="no figures; expected a folder of reports, such as reports/mini"):
        diff.diff(tmp_path, MINI)


def test_the_target_says_what_it_needs_and_exits_like_diff(other, tmp_path):
    assert "verdicts the same" in make(ROOT, "-s", "diff", f"A={MINI}", f"B={MINI}")
    change(other / "fig3.json", lambda content: content["bars"][0].update(mean=0.0))
    assert "4 of 5 bars the same" in make(ROOT, "-s", "diff", f"A={other}", f"B={MINI}", code=2)
    assert "B=: expected a folder of reports" in make(ROOT, "-s", "diff", f"A={MINI}", code=2)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """A clone without any run, one number of whose params.yaml was changed."""
    where = tmp_path_factory.mktemp("fresh") / "clone"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(where)], check=True)
    edit(where, "dpo: {lr: 1.0e-4, schedule: linear, batch_size: 32, epochs: 2, beta: 0.1, shards: 1}",
         "dpo: {lr: 1.0e-4, schedule: linear, batch_size: 32, epochs: 2, beta: 0.3, shards: 1}")
    return where


@pytest.mark.parametrize("verb", ["metrics show", "params diff", "plots show"])
def test_the_verbs_of_dvc_say_something_in_a_fresh_clone(fresh, verb):
    options = ["-o", "pictures"] if verb == "plots show" else ["--json"]
    done = subprocess.run([sys.executable, "-m", "dvc", *verb.split(), *options], cwd=fresh, env=ENV, text=True,
                          capture_output=True, check=True)
    if verb == "params diff":
        ((key, found),) = json.loads(done.stdout)["params.yaml"].items()
        assert (key, found["old"], found["new"]) == ("mini.dpo.beta", 0.1, 0.3)
        return
    if verb == "plots show":
        page = (fresh / "pictures/index.html").read_text(encoding="utf-8")
        assert all(f'"fig{n}"' in page for n in range(3, 13))
        return
    (found,) = json.loads(done.stdout)[""]["data"].values()
    fig3 = json.loads((ROOT / "reports/mini/fig3.json").read_text(encoding="utf-8"))
    assert found["data"]["fig3"] == {bar["bar"]: round(bar["mean"], 4) for bar in fig3["bars"]}
    assert sum(found["data"]["claims"].values()) > 50
