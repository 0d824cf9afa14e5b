"""The anatomy of the gap: its exact policies and pairs by hand, and one seed of it as the user runs it; what judges
without training; arms with several rounds, or several numbers of pairs."""

import json

import numpy as np
import pytest
import torch
from conftest import ROOT

from roads import arrays, config, model, optimum, schema
from roads.rouge import rouge_scores
from roads.stage import UserError
from roads.stages import anatomy, arm, base, data, dpo, limits, rank, reward, sample, sft, untrained
from roads.tldr import PAD, load_tokenizer
from roads.world import World


def test_the_best_policy_by_hand():
    """pi_ref (.75, .25), rewards (0, beta ln 3): both are as likely; without rewards pi_ref is normalised."""
    logps = np.log([[0.75, 0.25], [0.3, 0.1]])
    found = optimum.exact_policy(logps, np.array([[0.0, 0.5 * np.log(3)], [0.0, 0.0]]), beta=0.5)
    assert found == pytest.approx(np.array([[0.5, 0.5], [0.75, 0.25]]))


def test_it_is_the_best_of_all():
    """E[r] - beta KL of the exact policy is above that of policies near it."""
    rng = np.random.default_rng(0)
    logps, rewards, beta = np.log(rng.dirichlet(np.ones(8), 1)), rng.normal(size=(1, 8)), 0.2
    best = optimum.exact_policy(logps, rewards, beta)

    def value(policy):
        return (policy * (rewards - beta * (np.log(policy) - logps))).sum()

    near = [best * np.exp(0.1 * rng.normal(size=(1, 8))) for _ in range(20)]
    assert all(value(each / each.sum()) < value(best) for each in near)


def test_summaries_are_drawn_word_by_word():
    """At T = 1 as often as they are likely; at a low one the likeliest first word, whatever follows it."""
    chances = np.array([0.3, 0.3, 0.4, 0.0])
    drawn = optimum.draw(np.tile(chances, (20000, 1)), 2, 1.0, np.random.default_rng(0))
    assert np.bincount(drawn, minlength=4) / 20000 == pytest.approx(chances, abs=0.01)
    cold = optimum.draw(np.tile([0.3, 0.25, 0.4, 0.05], (200, 1)), 2, 0.01, np.random.default_rng(0))
    assert (cold == 0).mean() > 0.95  # .55 against .45, and then .3 against .25; the likeliest summary is another


def test_pairs_that_tie_stay_as_equal_sides(tmp_path):
    drawn = tmp_path / "drawn"
    drawn.mkdir()
    completions = np.array([[[5, 0], [6, 0], [7, 0]], [[5, 0], [5, 0], [6, 0]], [[5, 0], [6, 0], [5, 0]]])
    np.savez(drawn / "completions.npz", query=np.array([[3], [4], [5]]), completions=completions)
    anatomy.labelled(drawn, tmp_path / "pairs", np.array([[0.0, np.log(3)], [1.0, 1.0], [2.0, 2.0]]), soft=True)
    with np.load(tmp_path / "pairs/pairs.npz") as file:
        assert file["chosen"][:, 0].tolist() == [6, 5, 5] and file["rejected"][:, 0].tolist() == [5, 5, 5]
        assert file["probability"] == pytest.approx([0.75, 0.5, 0.5])
    assert json.loads((tmp_path / "pairs/metrics.json").read_text())["ties"] == 2


@pytest.fixture(scope="module")
def start(tiny, tmp_path_factory):
    """A folder with data and SFT checkpoint of the scale tiny."""
    where = tmp_path_factory.mktemp("start")
    tiny = tiny.model_copy(update={"data": tiny.data.model_copy(update={"valid": 90})})  # not as many as test prompts
    data.data(None, where / "data", tiny)
    base.base(where / "data", where / "base", tiny)
    sft.sft(where / "data", where / "base", where / "sft", tiny)
    return where


def test_one_seed_of_it(start, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = tmp_path / "out"
    anatomy.anatomy(start / "data", start / "sft", told, tiny, 0)
    metrics = json.loads((told / "metrics.json").read_text())
    names = ["sft", *anatomy.TRAINED, *(f"best.{name}" for name in ("rm", "gold")),
             *(f"exact.{name}" for name in ("rm", "dpo", "local", "gold"))]
    assert sorted(metrics) == sorted(names) and len(names) == 25
    with np.load(told / "scores.npz") as file:
        scores = {name: file[name] for name in file.files}
    assert {name.split(".penalty")[0] for name in scores if ".penalty" in name} == set(names)
    assert all(len(values) == tiny.data.test for values in scores.values())
    assert len({metrics[name]["training"]["steps"] for name in anatomy.TRAINED}) == 1  # as many for each
    # What is best under the truth is, and lists valid summaries alone; with an invalid word free, none does worse.
    assert metrics["exact.gold"]["score"] == max(each["score"] for each in metrics.values())
    assert metrics["exact.gold"]["validity"] == 1 and 0 < metrics["exact.gold"]["outside"] < 1
    assert all((scores[f"{name}.penalty0"] >= scores[f"{name}.penalty1"]).all() for name in names)
    assert (metrics["best.gold"]["quality"] > metrics["best.rm"]["quality"]) and (
        metrics["best.rm"]["reward"] > metrics["best.gold"]["reward"])
    world, rows = World(tiny.source), arrays.load(start / "data/test_human.npz")
    gap = scores["exact.rm.quality"] - world.quality(rows["query"], rows["response"])
    assert scores["exact.rm.noisy"] == pytest.approx(1 / (1 + np.exp(-gap / tiny.source.tau)))
    assert np.array_equal(scores["exact.rm.penalty0"], (np.sign(gap) + 1) / 2)


def test_the_limits_of_rouge(start, tiny, tmp_path, monkeypatch):
    """Each way's summary, picked the plain way."""
    monkeypatch.chdir(tmp_path)
    folder = start / "data"
    sample.sample(start / "sft", folder / "preferences.npz", tmp_path / "drawn", tiny, "rouge", 0)
    rank.rank(tmp_path / "drawn", tmp_path / "pairs", tiny, "rouge", data=folder, split="preferences")
    reward.reward(tmp_path / "pairs", start / "sft", tmp_path / "rm", tiny, 0)
    dpo.dpo(tmp_path / "pairs", start / "sft", tmp_path / "dpo", tiny, 0)
    limits.limits(folder, start / "sft", tmp_path / "rm", tmp_path / "dpo", tmp_path / "out", tiny, 0)
    scores, metrics = arrays.load(tmp_path / "out/scores.npz"), json.loads((tmp_path / "out/metrics.json").read_text())
    assert set(scores) == {"cold.rm", "warm.rm", "warm.consensus", "warm.gold", "exact.dpo", "exact.rm"}
    assert {name: values.mean() for name, values in scores.items()} == pytest.approx(
        {name: found["score"] for name, found in metrics.items()})
    sample.sample(start / "sft", folder / "test_rouge.npz", tmp_path / "warm", tiny, "rouge", 0)
    rows = arrays.tokens(tmp_path / "warm/completions.npz")
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    by_reference = rouge_scores(rows["completions"], arrays.tokens(folder / "test_rouge.npz")["response"], tokenizer)
    assert np.array_equal(scores["warm.gold"], by_reference.max(1))
    rm = model.RewardModel.load(tmp_path / "rm", tiny.compute).eval()
    query = torch.from_numpy(rows["query"])
    for k in range(5):
        told = [rm(query[k : k + 1], torch.from_numpy(one)[None]).item() for one in rows["completions"][k]]
        assert scores["warm.rm"][k] == by_reference[k, int(np.argmax(told))]
        against = [rouge_scores(rows["completions"][k : k + 1], one[None], tokenizer)[0]
                   for one in rows["completions"][k]]
        assert scores["warm.consensus"][k] == by_reference[k, int(np.argmax(np.mean(against, axis=0).round(9)))]
    assert metrics["exact.rm"]["kl"] > 0 and 0 < metrics["exact.rm"]["outside"] < 1


def test_the_probe_finds_a_direction():
    """Labels of a noisy linear function of five features, of which two are of other sizes: found but for the scale."""
    rng = np.random.default_rng(0)
    truth = np.array([1.0, -2.0, 0.0, 0.5, 0.02])
    features = rng.normal(size=(4000, 5)) * [1, 1, 1, 2, 50]
    better = rng.random(4000) < 1 / (1 + np.exp(-features @ truth))
    found = untrained.fit_probe(np.where(better[:, None], features, -features))
    assert found == pytest.approx(truth, abs=0.15)
    assert np.corrcoef(found, truth)[0, 1] > 0.99


def test_features_are_the_last_states_at_eos(tiny, tmp_path):
    world = World(tiny.source)
    shape = schema.FromScratch(kind="new", hidden_size=32, layers=1, heads=2, max_positions=32)
    policy = model.new_policy(shape, world.vocab_size, seed=3).eval()
    policy.save_pretrained(tmp_path / "sft")
    query = world.prompts(4, np.random.default_rng(0))
    sides = [np.pad(world.summaries(query, np.random.default_rng(i)), ((0, 0), (0, 1)), constant_values=PAD)
             for i in (1, 2)]
    both = torch.from_numpy(np.stack(sides, 1))
    found = untrained.features(tmp_path / "sft", torch.from_numpy(query), both, tiny.compute)
    with torch.no_grad():
        for i in (0, 1):
            plain = policy.base_model(torch.cat([torch.from_numpy(query), both[:, i, :-1]], 1).long())
            assert found[:, i] == pytest.approx(plain.last_hidden_state[:, -1].double().numpy(), abs=1e-5)


def stages_of(cfg, start, out, monkeypatch):
    """Run an arm in this process; the folders that its stages wrote, in order, each with those that it read."""
    folders, call = [], arm.Steps.__call__

    def noted(self, name, function, *args, **options):
        folders.append((name, [arg for arg in args if hasattr(arg, "name")]))
        return call(self, name, function, *args, **options)

    monkeypatch.chdir(out.parent)
    monkeypatch.setattr(arm.Steps, "__call__", noted)
    arm.arm(start / "data", start / "sft", out, cfg, 0)
    return folders


def test_rounds_go_on_from_the_round_before(start, tiny, tmp_path, monkeypatch):
    cfg = tiny.model_copy(update={"policies": ["dpo", "online"], "rounds": 2})
    folders = stages_of(cfg, start, tmp_path / "out", monkeypatch)
    read = {name: [path.name for path in paths] for name, paths in folders}
    assert read["online_candidates"][0] == "dpo" and read["online_2_candidates"][0] == "online"
    assert read["online"][1] == "dpo" and read["online_2"] == ["online_2_pairs", "online"]
    assert read["completions/online"][0] == "online_2"  # what is evaluated is the last round's
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    one = tiny.model_copy(update={"policies": ["dpo", "online"]})
    arm.arm(start / "data", start / "sft", tmp_path / "one", one, 0)
    first = json.loads((tmp_path / "one/metrics.json").read_text())
    assert metrics["dpo"] == first["dpo"] and metrics["online"]["kl"] != first["online"]["kl"]


def test_rebel_is_trained_on_rewards_of_the_rm(start, tiny, tmp_path, monkeypatch):
    cfg = tiny.model_copy(update={"policies": ["dpo", "online"],
                                  "dpo": tiny.dpo.model_copy(update={"online_loss": "rebel"})})
    call = arm.dpo.dpo

    def noted(pairs, *args, **options):
        call(pairs, *args, **options)
        if options.get("online"):
            found.update(arrays.load(pairs / "pairs.npz"), told=json.loads((args[1] / "params.json").read_text()))

    found = {}
    monkeypatch.setattr(arm.dpo, "dpo", noted)
    stages_of(cfg, start, tmp_path / "out", monkeypatch)
    assert found["rewards"].shape == (len(found["chosen"]), 2)
    assert (found["rewards"][:, 0] > found["rewards"][:, 1]).all()
    told = found["told"]
    assert told["dpo"]["online_loss"] == "rebel" and "loss" not in told["dpo"]


def test_sizes_are_arms_of_as_many_pairs(start, tiny, tmp_path, monkeypatch):
    sizes = {60: schema.Epochs(dpo=2, reward=1), 120: schema.Epochs(dpo=1, reward=1)}
    cfg = tiny.model_copy(update={"policies": ["dpo", "online_sft"], "sizes": sizes})
    stages_of(cfg, start, tmp_path / "out", monkeypatch)
    for options in ({"task": "rouge"}, {"folders": True}):
        with pytest.raises(UserError, match="not for an arm that has sizes"):
            arm.arm(start / "data", start / "sft", tmp_path / "none", cfg, 0, **options)
    small = arm.of_size(cfg, 60, sizes[60])
    assert (small.data.preferences, small.data.online, small.dpo.epochs, small.sizes) == (60, 60, 2, {})
    arm.arm(start / "data", start / "sft", tmp_path / "alone", small, 0)
    with np.load(tmp_path / "out/scores.npz") as whole, np.load(tmp_path / "alone/scores.npz") as alone:
        for name in ("dpo", "online_sft", "likelihood.reward.by_quality"):
            assert np.array_equal(whole[f"n60.{name}"], alone[name]), name
        assert not np.array_equal(whole["n60.dpo"], whole["n120.dpo"])
        assert {f"n{n}.untrained.{kind}" for n in sizes for kind in
                ("tag", "tag0", "tag1", "likelihood", "per_token", "probe")} <= set(whole.files)


@pytest.mark.parametrize("line, message", [
    ("rounds: 2", "tiny.rounds: unknown key; an arm has rounds, a scale has one"),
    ("sizes: {60: {dpo: 1, reward: 1}}", "tiny.sizes: unknown key; an arm has sizes, a scale has one"),
])
def test_what_a_scale_cannot_say(tmp_path, line, message):
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    (tmp_path / "params.yaml").write_text(text.replace("\ntiny:\n", f"\ntiny:\n  {line}\n", 1), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        config.load_scale("tiny", tmp_path / "params.yaml")


@pytest.mark.parametrize("old, new, message", [
    ("sizes: {60:", "sizes: {600:", "expected from 1 to preferences . more pairs, got 600"),
    ("ipo: {dpo: {loss: ipo}}", "ipo: {dpo: {loss: dpo_kl}}", "kl: expected a weight above 0 for loss dpo_kl"),
    ("ipo: {dpo: {loss: ipo}}", "ipo: {dpo: {loss: ipo, kl: 0.1}}", "kl: expected a weight above 0 for loss dpo_kl"),
    ("ipo: {dpo: {loss: ipo}}", "ipo: {dpo: {loss: kto}}", "loss"),
    ("{attributes: 0.0, order: 1.0}", "{attributes: 0.0}", "interaction: expected a weight other than 0"),
])
def test_what_an_arm_cannot_say(tmp_path, old, new, message):
    head, text = (ROOT / "params.yaml").read_text(encoding="utf-8").split("\ntiny:\n")
    assert old in text
    (tmp_path / "params.yaml").write_text(f"{head}\ntiny:\n{text.replace(old, new, 1)}", encoding="utf-8")
    (tmp_path / "figures.yaml").write_bytes((ROOT / "figures.yaml").read_bytes())
    with pytest.raises(UserError, match=message):
        config.load(tmp_path / "params.yaml")


def test_arms_that_differ_in_what_readers_like_share_a_base(tiny, tmp_path):
    """Base, SFT rows and test prompts are the same bytes; not so with another number of attributes, or other tags."""
    def made(**source):
        cfg = tiny.model_copy(update={"source": tiny.source.model_copy(update=source)})
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        data.data(None, out, cfg)
        return cfg.made_from(), [(out / f"{name}.npz").read_bytes() for name in ("base", "sft", "test_human")]

    own, bytes_of = made()
    for source in ({"taste": [0.0, 3.0]}, {"interaction": 2.0}, {"tau": 9.0}):
        assert made(**source) == (own, bytes_of)
    for source in ({"taste": [1.0, 2.0, 3.0]}, {"tags": "quality"}, {"seed": 5}):
        other, others = made(**source)
        assert other != own and others != bytes_of
    told, first = made(tags="quality")
    again, second = made(tags="quality", interaction=2.0)
    assert told != again and first != second  # there the base's documents tell it
