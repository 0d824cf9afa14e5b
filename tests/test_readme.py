"""The README keeps its word: its commands run, its numbers are those of the reports, its reports are dvc.lock's."""

import csv
import hashlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ENV, ROOT, make
from ruamel.yaml import YAML

from roads import active, config, schema
from roads.report import claim as claims
from roads.report import results

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = README + (ROOT / "docs/commands.md").read_text(encoding="utf-8")
COMMANDS = [line.split("#")[0].strip() for block in re.findall(r"```sh\n(.*?)```", PAGES, re.S)
            for line in block.splitlines() if line.strip()]
PARTS_OF_MORE = [*(f"scores/{policy}" for policy in schema.POLICIES),
                 *(f"likelihood/{kind}" for kind in ("reward", "local", "dpo", "base"))]
FIGURES = [name for name, scales in active.load(ROOT / "params.yaml").figures.items() if scales]  # mini's
# CI runs these from a clean checkout. The search and the benchmarks take too long, and clean would end the tests.
CI = {"make fig11", "make test", "make theory"}
ELSEWHERE = CI | {"make search", "make bench", "make clean", "make image", "make test-fast", "make test-gpu",
                  "make check-gpu", "make test-vllm", "make test-trackers"}
TESTED = {"make figures": "test_rehearsal.py runs this at scale rehearsal",
          "make results": "test_results.py runs its command: the checkout has no reports of mini",
          "make figures SCALE=rehearsal": "test_rehearsal.py runs this",
          "make fig11 SCALE=real-tiny": "test_real.py runs this where the packages are",
          "make publish RUN=runs/tiny/sft REPO=org/name": "test_export.py runs it against a stand-in for the hub",
          "make kit SCALE=real": "test_real.py tests its parts; the whole needs a package index",
          "make fig11 SCALE=real-cpu DATA=path/to/folder": "test_pipeline.py runs this one whole",
          "make fig3 SCALE=chat DATA=path/to/folder": "test_own_preferences.py runs this one, small"}


def test_the_first_two_commands_are_among_those_that_ci_runs():
    assert COMMANDS[:2] == ["make fig11", "make test"]
    ci = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert all(f"\n{command}" in ci for command in CI) and set(COMMANDS) >= CI


def test_the_readme_is_short_and_its_links_lead_somewhere():
    assert len(README.split()) <= 1000
    names = ("results", "commands", "code", "cloud", "data", "measured", "log")
    pages = ["README.md", "CONTRIBUTING.md", *(f"docs/{name}.md" for name in names)]
    for page in pages:
        path = ROOT / page
        for link in re.findall(r"\]\((?!http|#)([^)#]+)", path.read_text(encoding="utf-8")):
            assert (path.parent / link).exists(), (page, link)


def in_order(commands: set[str]) -> list:
    """As the README has them; those that draw every figure first, and slow."""
    first = [command for command in ("make extras",) if command in commands]
    return [pytest.param(command, marks=pytest.mark.slow) for command in first] + sorted(commands - set(first))


@pytest.mark.parametrize("command", in_order(set(COMMANDS) - ELSEWHERE))
def test_a_command_runs(checkout, command):
    """On the checkout, at scale tiny with one seed."""
    if command in TESTED:
        pytest.skip(TESTED[command])
    if command.startswith("docker "):
        pytest.skip("needs Docker and a GPU; test_image.py reads the Dockerfile")
    if command.startswith("make "):
        make(checkout, *shlex.split(command)[1:])
    else:
        here = command.replace(".venv", sys.prefix).replace("@mini", "@tiny")
        subprocess.run(["bash", "-ec", here], cwd=checkout, env=ENV, check=True)


def test_the_table_of_results_and_the_page_have_the_same_claims():
    shown = re.findall(r"<!--\$verdict;([\w-]+)-->", README[README.index("## What comes out"):].split("\n\n")[2])
    assert shown == claims.load(ROOT / "claims.yaml").headline and len(shown) == 8


def test_make_help_lists_every_target(checkout):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.search(r"^TARGETS := (.*)$", makefile, re.M)[1].split()
    extra = [name for name in config.load_figures(ROOT / "figures.yaml") if not name.startswith("fig")]
    listed = make(checkout, "help").split()
    assert len(FIGURES) == 33 and len(extra) == 25 and "fig3" in listed and "fig12" in listed
    assert {*targets, *extra} <= set(listed) and len(targets) > 30


@pytest.mark.parametrize("name", ["README.md", "docs/results.md"])
def test_numbers_and_verdicts_are_those_of_the_reports(name, monkeypatch):
    """Each stands in a slot, and `make results` would change none; no interval or verdict stands outside of one."""
    monkeypatch.chdir(ROOT)
    text = (ROOT / name).read_text(encoding="utf-8")
    assert results.fill(text, results.Reports(Path("reports/mini")), name) == text
    outside = results.SLOT.sub("", text)
    assert len(results.SLOT.findall(text)) > 20 and not re.search(r"\[[+-][\d.]+,", outside)
    assert not re.search(r": (supported|not supported|undecided)\b", outside)


def test_the_committed_reports_come_from_runs_in_the_lock():
    """dvc.lock names the very bytes of every report, and of the scores that each report says it was drawn from."""
    lock = YAML(typ="safe").load((ROOT / "dvc.lock").read_text(encoding="utf-8"))["stages"]
    params = config.load(ROOT / "params.yaml")
    for figure in FIGURES:
        stage = lock[f"{figure}@mini"]
        for out in stage["outs"]:
            assert hashlib.md5((ROOT / out["path"]).read_bytes()).hexdigest() == out["md5"], out["path"]
        content = json.loads((ROOT / f"reports/mini/{figure}.json").read_text(encoding="utf-8"))
        assert content["seeds"] == params.seeds_of(figure, "mini")
        made = {out["path"] for stage in lock.values() for out in stage["outs"]}
        made |= {f"{path}/{part}" for path in made if "/more/" in path or "/sizes/" in path for part in PARTS_OF_MORE}
        assert {path.removesuffix("/scores.npz") for path in content["provenance"]["files"]} <= made


def test_every_claim_is_decided_in_the_committed_report():
    """And by the claims.yaml and the figures that are committed with it."""
    found = json.loads((ROOT / "reports/mini/claims.json").read_text(encoding="utf-8"))["claims"]
    wanted = YAML(typ="safe").load((ROOT / "claims.yaml").read_text(encoding="utf-8"))["claims"]
    assert [claim["id"] for claim in found] == [claim["id"] for claim in wanted]
    summed = 0
    for claim, entry in zip(found, wanted, strict=True):
        content = json.loads((ROOT / f"reports/mini/{claim['figure']}.json").read_text(encoding="utf-8"))
        means = {name: bar["mean"] for bar in content["bars"] for name in (bar["bar"], *bar["roles"])}
        assert all(claim[key] == entry[key] for key in ("contrast", "test", "margin", "figure"))
        assert claim["verdict"] in ("supported", "not supported", "undecided")
        if set(claim["contrast"]) <= set(means) and not claim["measure"]:
            mean = sum(weight * means[bar] for bar, weight in claim["contrast"].items())
            assert claim["estimate"]["mean"] == pytest.approx(mean, abs=1e-9), claim["id"]
            summed += 1
    assert summed > 30


def test_report_seeds_are_not_development_seeds():
    search = (ROOT / "docs/search.csv").read_text(encoding="utf-8").splitlines()
    column = search[0].split(",").index("seed")
    developed = {int(line.split(",")[column]) for line in search[1:]}
    for figure in FIGURES:
        content = json.loads((ROOT / f"reports/mini/{figure}.json").read_text(encoding="utf-8"))
        assert developed and not developed & set(content["seeds"])


def test_params_hold_what_the_rules_of_the_search_give():
    """docs/search.md: for DPO the one-standard-error rule on winrate; for the reward models the least log loss."""
    mini = YAML(typ="safe").load((ROOT / "params.yaml").read_text(encoding="utf-8"))["mini"]

    def means(kind: str, measure: str) -> dict[tuple, float]:
        groups: dict[tuple, list[float]] = {}
        for row in csv.DictReader((ROOT / "docs/search.csv").open(encoding="utf-8")):
            if row["kind"] == kind and row["task"] == "human":
                setting = tuple(float(row[key]) for key in ("lr", "beta", "epochs") if row[key])
                groups.setdefault(setting, []).append(float(row[measure]))
        return {setting: sum(values) / len(values) for setting, values in groups.items()}

    winrates = means("dpo", "score")
    best = max(winrates.values())
    enough = best - (best * (1 - best) / 5000) ** 0.5
    lr, beta, epochs = min((s for s in winrates if winrates[s] >= enough), key=lambda s: (s[2], -s[1], s[0]))
    assert (mini["dpo"]["lr"], mini["dpo"]["beta"], mini["dpo"]["epochs"]) == (lr, beta, epochs)
    for kind in ("local", "reward"):
        losses = means(kind, "log_loss")
        assert min(losses, key=losses.get) == tuple(mini[kind][k] for k in ("lr", "beta", "epochs") if k in mini[kind])
    assert mini["samples"]["online"]["temperature"] == 0.1


def searched(kind: str, measure: str, *by: str, **others: str) -> dict:
    """Mean over worlds of a measure in docs/search.csv, by a column's values, or by those of several together."""
    groups: dict = {}
    for row in csv.DictReader((ROOT / "docs/search.csv").open(encoding="utf-8")):
        if row["kind"] == kind and all(row[key] == value for key, value in others.items()):
            values = tuple(float(row[name]) for name in by)
            groups.setdefault(values if len(by) > 1 else values[0], []).append(float(row[measure]))
    return {value: sum(found) / len(found) for value, found in groups.items()}


def test_epochs_at_other_numbers_of_pairs_are_what_the_rules_give():
    """docs/search.md, rule 4."""
    params = config.load(ROOT / "params.yaml")
    mini = params.scales["mini"]
    expected = {6000: (mini.dpo.epochs, mini.reward.epochs)}
    for n in (375, 1500, 24000):
        winrates, losses = (searched(kind, measure, "epochs", task=f"human{n}")
                            for kind, measure in (("dpo", "score"), ("reward", "log_loss")))
        enough = max(winrates.values()) - (max(winrates.values()) * (1 - max(winrates.values())) / 5000) ** 0.5
        expected[n] = min(e for e in winrates if winrates[e] >= enough), min(losses, key=losses.get)
    arms = params.arms_of("mini", "learnt") | params.arms_of("mini", "learnt_bases")
    for arm in arms.values():
        assert {n: (e.dpo, e.reward) for n, e in arm.sizes.items()} == {n: expected[n] for n in arm.sizes}
    assert len(arms) == 9 and set(arms["two"].sizes) == set(expected)


def chosen(task: str) -> tuple[tuple[float, float], tuple[float, float]]:
    """Learning rate and epochs of offline DPO and of the reward model, by rules 6 and 7, from docs/search.csv."""
    winrates, losses = (searched(kind, measure, "lr", "epochs", task=task)
                        for kind, measure in (("dpo", "score"), ("reward", "log_loss")))
    assert len(winrates) == 6 and len(losses) >= 12
    best = max(winrates.values())
    enough = best - (best * (1 - best) / 5000) ** 0.5
    dpo = min((found for found, winrate in winrates.items() if winrate >= enough), key=lambda found: found[::-1])
    return dpo, min(losses, key=losses.get)


def test_each_kind_of_reward_has_what_the_rules_give():
    """docs/search.md, rule 6."""
    params = config.load(ROOT / "params.yaml")
    figures = {"tuned": "learnt", "tuned_bases": "learnt_bases"}
    arms = {name: (arm, params.arms_of("mini", figures[figure])[name]) for figure in figures
            for name, arm in params.arms_of("mini", figure).items()}
    assert set(arms) == {"coherence", "counts", "order", "blind", "topical", "alone"}
    for name, (arm, before) in arms.items():
        assert len(searched("reward", "log_loss", "lr", "epochs", task=name)) == 15
        (lr, epochs), (rm_lr, rm_epochs) = chosen(name)
        assert (arm.dpo.lr, arm.reward.lr) == (lr, rm_lr), name
        assert {n: (e.dpo, e.reward) for n, e in arm.sizes.items()} == {6000: (epochs, rm_epochs)}, name
        assert arm.source == before.source and arm.dpo.beta == before.dpo.beta


def test_each_point_of_a_dial_has_what_the_rules_give():
    """docs/search.md, rule 7."""
    params, searches, seen = config.load(ROOT / "params.yaml"), {"verifier.tag0": "blind"}, set()
    for figure in ("fig10", "horizon", "branching", "complexity", "verifier", "sizes", "fig9"):
        for name, arm in params.arms_of("mini", figure).items():
            point = f"{figure.replace('fig9', 'sizes')}.{name.removesuffix('-prompts')}"
            dpo, (lr, epochs) = chosen(searches.get(point, point))
            tried = set(searched("reward", "log_loss", "lr", "epochs", task=searches.get(point, point)))
            assert (arm.reward.lr, arm.reward.epochs) == (lr, epochs), point
            assert figure == "fig9" or (arm.dpo.lr, arm.dpo.epochs) == dpo, point
            assert arm.dpo.beta == params.scales["mini"].dpo.beta and not arm.sizes
            if point not in searches:  # an edge of the grid was followed
                assert lr > min(lr for lr, _ in tried) or lr == 2.5e-4
                assert epochs < max(epochs for _, epochs in tried) or epochs == 8
            seen.add(point)
    assert len(seen) == 11


def test_a_base_of_short_summaries_is_trained_until_its_words_are_the_prompts():
    """docs/search.md, rule 8."""
    params = config.load(ROOT / "params.yaml")
    for figure, name in (("fig10", "k2"), ("horizon", "k4"), ("branching", "k2"), ("branching", "k4")):
        valid = searched("sft", "validity", "epochs", task=f"{figure}.{name}")
        last = max(valid)
        assert sorted(valid) == [4 * 2**k for k in range(len(valid))]
        assert all(share < 0.999 for epochs, share in valid.items() if epochs < last)
        assert valid[last] >= 0.999 or last == 16
        assert params.arms_of("mini", figure)[name].base.epochs == last, (figure, name)
    assert params.arms_of("mini", "horizon")["k12"].base.epochs == params.scales["mini"].base.epochs == 4


def test_claims_take_every_loss_at_its_best():
    """docs/search.md, rule 5."""
    params, found = config.load(ROOT / "params.yaml"), claims.load(ROOT / "claims.yaml")
    (own,) = {(arm.dpo.lr, arm.dpo.epochs) for arm in params.arms_of("mini", "methods").values()}
    assert own == (params.scales["mini"].dpo.lr, params.scales["mini"].dpo.epochs)
    for loss, by in (("ipo", "beta"), ("simpo", "beta"), ("chi_po", "beta"), ("dpo_kl", "kl_weight")):
        winrates = searched("methods", "score", by, loss=loss)
        (claim,) = [each for each in found.claims if each.id == f"methods-{loss.replace('_', '-')}"]
        (name,) = [bar.rsplit(" ", 1)[1] for bar, weight in claim.contrast.items() if weight < 0]
        recipe = params.arms["mini.methods." + name].dpo
        assert recipe.loss == loss
        assert (recipe.kl if loss == "dpo_kl" else recipe.beta) == max(winrates, key=winrates.get)
