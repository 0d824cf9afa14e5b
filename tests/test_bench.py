"""`make bench`: every comparison but TRL's on a tiny model, cost against scale, and the sections that they write."""

import json
import re
import statistics
import subprocess
import sys

import pytest
from conftest import ENV, ROOT

from roads.stage import UserError

sys.path.insert(0, str(ROOT / "benchmarks"))
import bench  # noqa: E402
import scale  # noqa: E402

from roads.runner import devices  # noqa: E402

DATA = ROOT / "data/tldr_sample"
TINY = bench.Settings(hidden_size=32, layers=2, heads=2, vocab_size=1100, bpe=1000, query=160, response=24, repeats=2,
                      sampled=2, batch_size=3, n=4, posts=5)


@pytest.fixture(scope="module")
def found():
    saved = []
    done = bench.bench(DATA, None, 1, TINY, lambda found: saved.append(json.loads(json.dumps(found))))  # JSON takes it
    assert saved[0]["missing"] == ["reference log-probs", "ROUGE-L", "candidates", "sampling"]
    assert "Not measured yet: reference log-probs, ROUGE-L" in bench.section(saved[0])
    assert saved[-1] == json.loads(json.dumps(done)) and "Not measured" not in bench.section(saved[-1])
    return saved[-1]


def test_results_are_well_formed(found):
    kinds = [(r["what"], r["against"]) for r in found["results"]]
    assert len(kinds) == len(set(kinds)) == 8
    assert {against for _, against in kinds} == {
        "chosen, then rejected", "rouge-score", "a forward pass over each", "transformers"}
    for r in found["results"]:
        assert len(r["ours"]) == len(r["theirs"]) == len(r["ratios"]) == (2 if r["unit"] == "s" else 1)
        assert min(r["ours"] + r["theirs"]) > 0 and r["median"] == statistics.median(r["ratios"])
        assert r["low"] <= r["median"] <= r["high"]
        faster = [theirs / ours for ours, theirs in zip(r["ours"], r["theirs"], strict=True)]
        assert r["ratios"] == pytest.approx(faster if r["unit"] == "s" else [1 / ratio for ratio in faster])
        if r["goal"]:
            assert r["met"] == (r["median"] >= r["goal"])
    assert found["machine"]["threads"] == 1 and found["machine"]["versions"]["torch"]


def test_both_sides_train_alike_and_away_from_the_start(found):
    losses = found["results"][0]["losses"]
    assert len(losses["ours"]) == TINY.warm_up + TINY.repeats
    assert losses["ours"] == pytest.approx(losses["plain"], abs=1e-5)
    assert losses["ours"][0] == pytest.approx(0.6931472, abs=1e-6) and abs(losses["ours"][1] - losses["ours"][0]) > 1e-4


def test_responses_are_distinct_and_of_other_rows():
    _, _, _, response = bench.load(DATA, TINY)
    found = bench.distinct_responses(response, 3, 4)
    assert len(found.unique(dim=0)) == 4 and not (found == response[3]).all(1).any()


def test_the_section_is_rewritten_in_place(tmp_path, found):
    doc = tmp_path / "doc.md"
    doc.write_text("before\n<!-- bench -->\nold\n<!-- end -->\nafter\n", encoding="utf-8")
    bench.rewrite(doc, bench.section(found))
    once = doc.read_text(encoding="utf-8")
    assert once.startswith("before\n<!-- bench -->\n| ") and once.endswith(".\n<!-- end -->\nafter\n")
    assert "old" not in once and once.count("\n| ") == 1 + len(found["results"])
    bench.rewrite(doc, bench.section(found))
    assert doc.read_text(encoding="utf-8") == once


def test_a_missed_goal_is_said(found):
    missed = found["results"][0] | {"goal": 2.0, "median": 1.9, "met": False}
    assert "at least 2: missed" in bench.section(found | {"results": [missed]})
    memory = bench.result("m", "x", [1.0], [2.0], 0.7, "GiB")
    assert memory["met"] and memory["ratios"] == [0.5]
    assert "at most 0.7: met" in bench.section(found | {"results": [memory]})


def test_the_committed_section_is_that_of_the_committed_results():
    results = ROOT / "benchmarks/results.json"
    if not results.exists():
        pytest.skip("make bench writes it")
    found = json.loads(results.read_text(encoding="utf-8"))
    assert f"<!-- bench -->\n{bench.section(found)}\n<!-- end -->" in (ROOT / "docs/measured.md").read_text("utf-8")
    assert any(r["against"] == "TRL" for r in found["results"])


# Cost against scale


def test_scale_measures_fits_and_predicts(tmp_path):
    points = [p for p in scale.grid(**scale.QUICK | {"pairs": [2]}) if p["prompt"] == 64]
    found = json.loads(json.dumps(scale.scale(points)))
    assert {p["what"] for p in found["points"]} == {"DPO step", "reference", "scoring", "sampling"}
    assert all(p["measured"] > 0 and p["modelled"] > 0 for p in found["points"])
    assert found["held_out"]["points"] == sum(p["held_out"] for p in found["points"]) == 2
    doc = tmp_path / "doc.md"
    doc.write_text("<!-- bench -->\nkept\n<!-- end -->\n<!-- scale -->\nold\n<!-- end -->\n", encoding="utf-8")
    bench.rewrite(doc, scale.section(found), "scale")
    text = doc.read_text(encoding="utf-8")
    assert "kept" in text and "old" not in text and "| scoring, N = 5 | 64, 2 |" in text


def test_the_fit_finds_the_numbers_that_made_the_points():
    device = devices.Device(flops=4e10, decode=20, step=0.01, layer=0.002, startup=0)
    points = scale.grid()
    for point in points:
        point["measured"] = scale.work(point).seconds(device)
    fitted = scale.fit(points[::2])
    assert fitted == pytest.approx({"flops": 4e10, "decode": 20, "step": 0.01, "layer": 0.002}, rel=1e-3)
    assert [scale.predicted(p, fitted) for p in points] == pytest.approx([p["measured"] for p in points], rel=1e-3)


def test_the_committed_fit_predicts_what_it_did_not_see():
    """Within 30% a point in nine of ten, and all of them together; docs/measured.md has the file's table."""
    if not scale.RESULTS.exists():
        pytest.skip("make bench writes it")
    found = json.loads(scale.RESULTS.read_text(encoding="utf-8"))
    held = [p for p in found["points"] if p["held_out"]]
    assert len(held) >= len(found["points"]) / 4
    modelled = [scale.predicted(p, found["fit"]) for p in held]
    assert modelled == pytest.approx([p["modelled"] for p in held])
    measured = [p["measured"] for p in held]
    assert sum(abs(m / t - 1) <= 0.3 for m, t in zip(modelled, measured, strict=True)) >= 0.9 * len(held)
    assert sum(modelled) == pytest.approx(sum(measured), rel=0.3)
    assert f"<!-- scale -->\n{scale.section(found)}\n<!-- end -->" in (ROOT / "docs/measured.md").read_text("utf-8")


def test_bad_input_is_one_line(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(b"".join((DATA / "train.jsonl").read_bytes().splitlines(True)[:5]))
    with pytest.raises(UserError, match=r"train.jsonl: 5 rows; expected \d+"):
        bench.load(tmp_path, TINY)
    (tmp_path / "doc.md").write_text("no section\n", encoding="utf-8")
    with pytest.raises(UserError, match="0 sections"):
        bench.rewrite(tmp_path / "doc.md", "text")


@pytest.mark.slow
def test_what_a_card_does_is_measured_and_planned_with(tmp_path, monkeypatch):
    """make check-gpu, as it can be rehearsed without a GPU: every part runs, and its file is one that a plan reads."""
    command = [sys.executable, "benchmarks/gpu/check.py", "--tiny", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=ENV, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "cpu.json").read_text(encoding="utf-8"))
    assert not [name for name in found if name.endswith("_error")] and found["step_seconds"] > 0
    assert found["device"]["flops"] == found["step_flops"] > 0 and found["scored_per_second"] > 0
    monkeypatch.setattr(devices, "MEASURED", tmp_path)
    known = devices.known()
    assert known["CPU"].decode == found["device"]["decode"] > 0 and known["CPU"].source == "measured, cpu.json"
    (tmp_path / "h100.json").write_text(json.dumps(found | {"card": "NVIDIA H100 PCIe"}))
    assert devices.known()["H100"] == devices.known()["NVIDIA H100 PCIe"] != devices.ASSUMED["H100"]


def test_without_a_gpu_there_is_nothing_to_check(tmp_path):
    done = subprocess.run([sys.executable, "benchmarks/gpu/check.py", "--out", str(tmp_path)], cwd=ROOT, text=True,
                          env=ENV | {"PATH": str(tmp_path)}, capture_output=True)
    assert done.returncode == 2 and done.stderr == ("error: check-gpu: nvidia-smi shows no GPU; --tiny rehearses it on "
                                                    "the CPU\n")


@pytest.mark.slow
def test_the_parts_for_a_bare_gpu_write_what_they_find(tmp_path):
    """scripts/device.sh, as it can be rehearsed without a GPU."""
    env = ENV | {"TINY": "1", "PYTHON": sys.executable}
    command = ["bash", str(ROOT / "scripts/device.sh"), str(tmp_path / "out")]
    done = subprocess.run([*command, "scores"], env=env, text=True, capture_output=True)
    assert done.returncode == 0 and re.match(r"scores: \d+ s, exit code 0: \{", done.stdout), done.stdout + done.stderr
    assert len((tmp_path / "out/scores.jsonl").read_text().splitlines()) > 4
    stopped = subprocess.run([*command, "scores"], env=env | {"SECONDS_EACH": "0.2"}, text=True, capture_output=True)
    assert stopped.returncode == 1 and re.match(r"scores: \d+ s, exit code 124: ", stopped.stdout)
    wrong = subprocess.run([*command, "speed"], env=env, text=True, capture_output=True)
    assert wrong.returncode == 2 and wrong.stderr == "error: speed: expected one of: tests check sampler step scores\n"


def test_the_gpu_half_of_the_table_follows_from_what_a_card_said(tmp_path):
    """Ratios by hand: ours at T 1 is 300 tokens a second, generate at its best 20; our step .5 s, TRL's best 2 s."""
    sys.path.insert(0, str(ROOT / "benchmarks/gpu"))
    import table

    def write(name: str, *found: dict, cut: str = "") -> None:
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in found) + cut)

    def drew(side: str, temperature: float, pace: float) -> dict:
        return {"side": side, "temperature": temperature, "tokens_per_second": pace}

    write("sampler", {"card": "A card", "torch": "2.13.0", "transformers": "5.17.0"}, drew("ours, first", 1.0, 900.0),
          drew("ours", 1.0, 300.0), drew("ours", 0.1, 400.0), drew("generate", 1.0, 10.0), drew("generate", 1.0, 20.0),
          {"side": "generate", "temperature": 0.1, "error": "out of memory"}, cut='{"side": "vll')
    write("step", {"device": "A card", "torch": "2.13.0"}, {"way": "packed", "seconds": 0.5, "peak": 50.0, "gib": 20.0},
          {"way": "all bf16", "seconds": 0.4, "peak": 60.0, "gib": 9.0},
          {"way": "TRL", "seconds": 4.0, "peak": 6.0, "gib": 30.0},
          {"way": "TRL, liger", "seconds": 2.0, "peak": 12.0, "gib": 40.0}, {"way": "TRL, compiled", "error": "no"})
    (tmp_path / "page.md").write_text("before\n<!-- gpu -->\nold\n<!-- end gpu -->\nafter\n")
    table.write(tmp_path, tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert page.startswith("before\n<!-- gpu -->") and page.endswith("<!-- end gpu -->\nafter\n") and "old" not in page
    assert "A card, torch 2.13.0, transformers 5.17.0" in page
    assert "| ours over generate | 15.00 | not measured |" in page and "| ours over vllm | not measured |" in page
    assert "packed takes a step in 1/4.00 of the time of TRL, liger, in 0.50 of its memory." in page
    assert "| TRL, compiled | failed |" in page
    assert page.count("Not measured yet by `make bench-gpu`.") == 1  # the scores
    with pytest.raises(ValueError, match="expected <!-- gpu -->"):
        table.write(tmp_path, tmp_path / "step.jsonl")
    (tmp_path / "empty").mkdir()
    done = subprocess.run([sys.executable, "benchmarks/gpu/table.py", str(tmp_path / "empty")], cwd=ROOT, env=ENV,
                          text=True, capture_output=True)
    assert done.returncode == 2 and "scripts/device.sh writes them" in done.stderr
