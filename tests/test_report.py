"""The report: what it says, that nothing gets out of its place, and how a real browser shows it."""

import json
import os
import re
import shutil

import matplotlib.pyplot as plt
import numpy as np
import pytest
from conftest import ROOT, run

from roads import stage
from roads.report import page, schema

COMMIT = "c0ffee" * 6 + "beef"
HOSTILE = "<script>window.hacked = 1</script>\"'><img src=x onerror=alert(1)> & {{ 7 * 7 }}"


def estimate(mean: float, half: float = 0.01) -> dict:
    return {"mean": mean, "low": mean - half, "high": mean + half, "by_seed": [mean - 0.004, mean, mean + 0.004]}


def figure_json(name: str, title: str, **changes) -> dict:
    bars = {"SFT": 0.505, "DPO": 0.737, "Online(DPO)": 0.762}
    return {
        "figure": name, "title": title, "caption": f"What {name} shows.", "measure": "winrate against the reference",
        "note": "synthetic world: evidence about the mechanism, not about TL;DR", "seeds": [0, 1, 2],
        "bars": [{"bar": bar, "series": bar, "x": None, "n": 5000, "key": "score", "scores": [], **estimate(mean),
                  "judge": {"position_consistency": 0.987, "parse_failures": 0.001, "mean_tokens": 9.25,
                            "mean_tokens_reference": 9.5}}
                 for bar, mean in bars.items()],
        "gaps": {"Online(DPO) - DPO": estimate(0.025) | {"standardised": {"mean": 0.058, "low": 0.02, "high": 0.1}}},
        "also": {"accuracy": {"bars": {bar: estimate(mean) for bar, mean in bars.items()}, "gaps": {}}},
        "paper": None, "provenance": {"files": {"runs/x.npz": "0" * 64}, "commit": COMMIT, "lock": "1" * 64,
                                      "params": {"mini": {"dpo": {"lr": 1e-4, "beta": 0.05}}}},
    } | changes


def claim(name: str, figure: str, verdict: str, found: dict | None, **changes) -> dict:
    return {"id": name, "sentence": f"Claim {name}.", "source": "Sec. 3", "figure": figure,
            "contrast": {"DPO": -1, "Online(DPO)": 1}, "test": "greater", "margin": 0.02, "verdict": verdict,
            "estimate": found, "p": 0.0002, "p_adjusted": 0.0004, "n": 5000, "seeds": [0, 1, 2],
            "why": "adjusted p 0.0004"} | changes


@pytest.fixture
def folder(tmp_path):
    """reports/mini with three figures, claims, hypotheses, and reports/theory beside it."""
    mini, theory = tmp_path / "reports/mini", tmp_path / "reports/theory"
    mini.mkdir(parents=True)
    shutil.copytree(ROOT / "reports/theory", theory)
    paper = {"source": "Fig. 3", "unit": "winrate, %", "series": [
        {"name": "Pythia 1.4B", "values": {"DPO": 49.7, "DPO 2x": 52.2}},
        {"name": "Pythia 2.8B", "values": {"DPO": 54.9}}]}
    many = [{"bar": f"Global RM on SFT N={n}", "series": "Global RM on SFT", "x": n, "n": 4000, "key": f"n{n}",
             "scores": [], **estimate(0.5 + n / 100)} for n in range(12)]
    for content in (figure_json("fig11", "Fig. 11: the same with ROUGE-L"),
                    figure_json("fig3", "Fig. 3: online against offline", paper=paper),
                    figure_json("horizon", "The gap as the horizon grows", bars=many,
                                paper={"source": "no numbers to compare with", "unit": "", "series": []})):
        name = content["figure"]
        stage.write_json(mini / f"{name}.json", content)
        (mini / f"{name}.csv").write_text("bar,seed,mean\n")
        plt.imsave(mini / f"{name}.png", np.ones((40, 60, 3)))
    stage.write_json(mini / "claims.json", {
        "scale": "mini", "alpha": 0.05,
        "claims": [claim("wins", "fig3", "supported", estimate(0.025)),
                   claim("null", "fig11", "not supported", estimate(0.03), test="equivalent", p_adjusted=0.7),
                   claim("2x", "fig3", "undecided", estimate(-0.004)),
                   claim("later", "fig12", "not run", None, p=None, p_adjusted=None, n=None, seeds=[],
                         why="fig12.json is not there; `make fig12` makes it")],
        "hypotheses": [{"id": "H1", "says": "On-policy samples.", "predicts": "A gain.", "claims": ["wins", "later"]},
                       {"id": "H2", "says": "Regularisation.", "predicts": "No gain.", "claims": []}]})
    return mini


def edit(path, **changes) -> None:
    stage.write_json(path, stage.read_json(path) | changes)


def test_a_claim_shows_its_seeds_what_was_changed_and_what_another_scale_says(folder):
    content = stage.read_json(folder / "claims.json")
    content["claims"][0] |= {"changed": "2026-11-27: had been left out", "beyond_margin": True, "family": "ours"}
    content["claims"][0]["estimate"] |= {"over_seeds": [0.0151, 0.0349]}
    stage.write_json(folder / "claims.json", content)
    text = page.write(folder).read_text(encoding="utf-8")
    assert "Added or changed 2026-11-27: had been left out" in text and "beyond its margin</small>" in text
    assert "t interval" in text and "+0.015" in text and "At scale real" not in text
    other = folder.with_name("real")
    other.mkdir()
    content["claims"][0] |= {"verdict": "undecided", "estimate": estimate(0.111)}
    stage.write_json(other / "claims.json", content | {"scale": "real"})
    text = page.write(folder).read_text(encoding="utf-8")
    assert text.count("At scale real") == 3 and "+0.111" in text  # one was not run there


def test_the_page_opens_with_the_headline_claims_and_the_papers_values(folder):
    """2x: 52.2 - 49.7 points of the paper's 1.4B; 2.8B has no bar for DPO 2x, and is left out."""
    assert 'id="answer"' not in page.write(folder).read_text(encoding="utf-8")  # no claim is called one
    content = stage.read_json(folder / "claims.json")
    content["claims"][2]["contrast"] = {"DPO 2x": 1, "DPO": -1}
    stage.write_json(folder / "claims.json", content | {"headline": ["2x", "later", "wins"]})
    text = page.write(folder).read_text(encoding="utf-8")
    answer = text[text.index('<h2 id="answer"'):text.index('<h2 id="run"')]
    assert re.findall(r"Claim \w+\.", answer) == ["Claim 2x.", "Claim wins."]  # one was not run
    assert answer.count("the paper, Pythia 1.4B: ") == 1 and "2.8B" not in answer and "+0.025" in answer
    far = max(0.025, *(abs(end) for at in (-0.004, 0.025) for end in (estimate(at)["low"], estimate(at)["high"])))
    assert f'class="hollow" cx="{50 + 48 * 0.025 / far:.2f}%"' in answer


def test_what_is_on_the_page(folder):
    text = page.write(folder).read_text(encoding="utf-8")
    where = [text.index(f'<h3 id="figure-{name}"') for name in ("fig3", "fig11", "horizon")]
    assert where == sorted(where), "the paper's figures in their order, the others behind"
    assert "Synthetic world: evidence about the mechanism, not about TL;DR" in text
    for found in ("4,000 to 5,000", "c0ffeec0ffee", "mini.dpo.beta", "+0.025", "&lt; 0.001", "0.700",
                  "Online(DPO) − DPO &gt;\u00a00", "|Online(DPO) − DPO| &lt;\u00a00.02", "· adjusted p 0.0004",
                  "On-policy samples.", "<code>make fig12</code> makes it", "22 of 22 checks", "1, 3.1, 12, 33, 87"):
        assert found in text, found
    for verdict in ("supported", "not supported", "undecided", "not run"):
        assert f"<li class=\"chip {verdict.replace(' ', '-')}\">1 {verdict}</li>" in text
    # Figures that are there are not named as missing; the others come with their command.
    assert "make fig12 SCALE=mini" in text and "make fig3 SCALE=mini" not in text
    assert "0.987" in text and "0.001" in text and "9.250 (9.500)" in text  # position consistency, failures, length
    assert re.search(r"paper's own numbers</strong>, not from this run: Fig. 3; winrate, %", text)
    assert text.count('src="data:image/png;base64,') == 6 and 'src="http' not in text
    assert ">52.2<" in text and "SFT 0.505; DPO 0.737" in text
    assert "12 points, from Global RM on SFT N=0 0.500 to Global RM on SFT N=11 0.610" in text


def test_what_a_killed_run_left_is_no_figure(folder):
    (folder / ".fig3.writing.json").write_text('{"figure": "fi')
    assert ".fig3.writing" not in schema.figures(folder) and schema.figures(folder)


def test_without_claims_theory_picture_or_csv(folder):
    (folder / "claims.json").unlink()
    (folder / "fig3.png").unlink()
    (folder / "fig3.csv").unlink()
    shutil.rmtree(folder.parent / "theory")
    text = page.page(folder)
    for command in ("make claims SCALE=mini", "make fig3 SCALE=mini", "make theory"):
        assert command in text
    assert 'href="fig3.csv"' not in text and 'href="fig11.csv"' in text


def hostile(folder) -> None:
    """The hostile string wherever a file has a string or a key of its own."""
    content = stage.read_json(folder / "fig3.json")
    content |= {"title": HOSTILE, "caption": HOSTILE, "note": HOSTILE, "measure": HOSTILE,
                "gaps": {HOSTILE: content["gaps"]["Online(DPO) - DPO"]}, "also": {HOSTILE: content["also"]["accuracy"]},
                "paper": {"source": HOSTILE, "unit": HOSTILE, "series": [{"name": HOSTILE, "values": {HOSTILE: 1.0}}]}}
    content["bars"][0]["bar"] = HOSTILE
    content["provenance"] |= {"commit": HOSTILE, "lock": HOSTILE, "params": {HOSTILE: {HOSTILE: HOSTILE}}}
    stage.write_json(folder / "fig3.json", content)
    strange = figure_json("x", "A title")
    stage.write_json(folder / "a \"b\" <i>&#?.json", strange)
    found = stage.read_json(folder / "claims.json")
    for key in ("id", "sentence", "source", "figure", "why"):
        found["claims"][0][key] = HOSTILE
    found["claims"][0]["contrast"] = {HOSTILE: 1}
    found["hypotheses"][0] = {"id": HOSTILE, "says": HOSTILE, "predicts": HOSTILE, "claims": [HOSTILE]}
    stage.write_json(folder / "claims.json", found)


def test_nothing_from_a_file_becomes_markup(folder):
    hostile(folder)
    text = page.page(folder)
    assert text.count("&lt;script&gt;window.hacked") > 20
    assert "<script" not in text and "<img src=x" not in text and "<i>" not in text
    assert "{{ 7 * 7 }}" in text and 'href="a%20%22b%22%20%3Ci%3E%26%23%3F.csv"' not in text
    assert 'href="a%20%22b%22%20%3Ci%3E%26%23%3F.json"' in text


def test_same_inputs_same_bytes(folder, tmp_path):
    first = page.write(folder).read_bytes()
    assert page.write(folder).read_bytes() == first
    shutil.copytree(folder.parent, tmp_path / "elsewhere/reports")
    assert page.write(tmp_path / "elsewhere/reports/mini").read_bytes() == first
    assert str(tmp_path).encode() not in first


def test_figures_that_disagree_are_told_apart(folder):
    other = stage.read_json(folder / "fig11.json")["provenance"] | {
        "commit": None, "params": {"mini": {"dpo": {"lr": 0.5, "beta": 0.05}}}}
    edit(folder / "fig11.json", provenance=other, seeds=[7])
    run_ = page.provenance({name: page.read(folder / f"{name}.json", page.Figure, "make")
                              for name in ("fig3", "fig11")})
    assert run_["commit"] == [(COMMIT, "fig3"), (None, "fig11")]
    assert run_["seeds"] == [("0, 1, 2", "fig3"), ("7", "fig11")]
    assert run_["params"] == {"mini.dpo.beta": [("0.05", None)], "mini.dpo.lr": [("0.0001", "fig3"), ("0.5", "fig11")]}
    assert "not recorded" in page.page(folder)


@pytest.mark.parametrize("name, content, told", [
    ("fig3.json", "{", r"fig3.json: not JSON .*`make fig3 SCALE=mini`"),
    ("fig3.json", json.dumps(figure_json("fig3", "t", bars=[{"bar": "DPO"}])), r"fig3.json: bars.0.mean: field req"),
    ("claims.json", '{"alpha": 0.05, "claims": []}', r"claims.json: hypotheses: .*`make claims SCALE=mini`"),
    ("fig3.png", "no picture", r"fig3.png: expected a PNG"),
    ("../theory/statements.json", "[]", r"statements.json: top level: .*`make theory`"),
])
def test_bad_input_names_file_and_key_and_leaves_the_old_page(folder, name, content, told):
    page.write(folder)
    before = (folder / "index.html").read_bytes()
    (folder / name).write_text(content)
    with pytest.raises(stage.UserError, match=told):
        page.write(folder)
    assert (folder / "index.html").read_bytes() == before
    assert not list(folder.glob(".*"))


def test_command(folder, tmp_path):
    assert "index.html (" in run(ROOT, "roads.report.page", str(folder))
    (tmp_path / "reports/empty").mkdir()
    assert run(ROOT, "roads.report.page", str(tmp_path / "reports/empty"), code=2).startswith("error: ")


def test_numbers():
    assert [page.number(x, True) for x in (0.0254, -0.0004, -12.34, None, float("nan"))] == [
        "+0.025", "−0.000", "−12.3", "–", "–"]
    middle = page.forest(page.Estimate(mean=0, low=-1, high=1), far=2, margin=1)
    assert middle == {"low": "26.00%", "mean": "50.00%", "high": "74.00%", "from": "26.00%", "width": "48.00%"}
    assert page.reach([]) == 1.0 and page.reach([page.Estimate(mean=0, low=-3, high=1)], [2.0]) == 3.0
    with_weights = page.Claim.model_validate(
        claim("a", "fig3", "undecided", None, contrast={"A K=2": -1, "A K=8": 1, "B K=2": 1, "B K=8": -1, "C": -0.5}))
    assert page.contrast(with_weights) == "− 0.5 × C + B K=2 − A K=2 + A K=8 − B K=8 >\u00a00"


CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, (
    "chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]


def violations(tab) -> list[tuple[str, list[str]]]:
    """What axe finds serious or critical in a page (contrast below AA, names that are missing, ...), and where."""
    found = pytest.importorskip("axe_playwright_python.sync_playwright").Axe().run(tab).response["violations"]
    return [(rule["id"], [node["html"][:120] for node in rule["nodes"][:3]]) for rule in found
            if rule["impact"] in ("serious", "critical")]


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM:
        pytest.skip("no Chromium: install Debian's package chromium, or name one in $CHROMIUM")
    with pytest.importorskip("playwright.sync_api").sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


def test_claims_filter_by_verdict_and_family(browser):
    tab = browser.new_page()
    tab.goto((ROOT / "reports/mini/index.html").as_uri())
    found = json.loads((ROOT / "reports/mini/claims.json").read_text(encoding="utf-8"))["claims"]

    def rows() -> set[str]:
        return set(tab.evaluate("[...document.querySelectorAll('.claims tr[data-verdict]')]"
                                ".filter(row => row.checkVisibility()).map(row => row.id)"))

    def wanted(**keys) -> set[str]:
        return {f"claim-{row['id']}" for row in found if all(row[name] == value for name, value in keys.items())}

    assert rows() == wanted() and len(found) > 80
    tab.get_by_role("radio", name="undecided").check()
    assert rows() == wanted(verdict="undecided")
    tab.get_by_role("radio", name="ours").check()
    assert rows() == wanted(verdict="undecided", family="ours") < wanted(family="ours")
    tab.locator("fieldset", has_text="Verdict").get_by_role("radio", name="all").check()
    assert rows() == wanted(family="ours")
    tab.close()


@pytest.mark.parametrize("name, scheme", [("index", "light"), ("browse", "light"), ("browse", "dark")])
def test_axe_finds_nothing_serious_in_the_committed_pages(browser, name, scheme):
    tab = browser.new_page(viewport={"width": 380, "height": 800}, color_scheme=scheme)
    tab.goto((ROOT / f"reports/mini/{name}.html").as_uri())
    tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert violations(tab) == []
    tab.close()


def test_axe_finds_what_is_wrong(browser):
    tab = browser.new_page()
    tab.set_content("<html lang=en><title>t</title><main><h1>A</h1><p style='color:#ccc'>pale</p><img src='x'></main>")
    assert {rule for rule, _ in violations(tab)} == {"color-contrast", "image-alt"}
    tab.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width, height", [(380, 800), (1280, 900)])
@pytest.mark.parametrize("kind", ["plain", "hostile"])
def test_in_a_browser(folder, browser, scheme, width, height, kind):
    if kind == "hostile":
        hostile(folder)
    path = page.write(folder)
    tab = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    said, asked, failed = [], [], []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("requestfailed", lambda request: failed.append(request.url))
    tab.goto(path.as_uri())
    assert tab.evaluate("[...document.images].map(i => i.naturalWidth > 0 && i.alt.length > 20)") == [True] * 6
    for opened in (False, True):
        tab.evaluate("open => document.querySelectorAll('details').forEach(d => d.open = open)", opened)
        assert tab.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
    assert violations(tab) == []
    background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(251, 250, 247)", "dark": "rgb(21, 23, 26)"}[scheme]
    anchors, ids = tab.evaluate("""[[...document.querySelectorAll('a[href^="#"]')].map(a => a.hash.slice(1)),
                                     [...document.querySelectorAll('[id]')].map(e => e.id)]""")
    assert set(anchors) <= set(ids) and len(set(ids)) == len(ids)
    links = tab.evaluate("""[...document.querySelectorAll('a:not([href^="#"])')].map(a => a.getAttribute('href'))""")
    assert len(links) > 12
    for link in links:
        assert (folder / re.sub(r"%(..)", lambda m: chr(int(m[1], 16)), link)).exists(), link
    tab.keyboard.press("Tab")
    tab.keyboard.press("Enter")
    assert tab.evaluate("location.hash") == "#main", "the first thing that the keyboard reaches skips to the report"
    assert tab.evaluate("window.hacked") is None
    assert said == [] and failed == [] and asked[0] == path.as_uri()
    assert all(url.startswith("data:") for url in asked[1:]), "nothing from outside"
    tab.close()


@pytest.mark.parametrize("name", ["claims", *schema.figures(ROOT / "reports/mini")])
def test_every_report_of_the_repository_is_what_the_schema_says(name):
    path = ROOT / f"reports/mini/{name}.json"
    model = schema.Claims if path.stem == "claims" else schema.Figure
    content = schema.read(path, model, "make figures")
    assert content.claims if path.stem == "claims" else content.figure == path.stem and content.bars
