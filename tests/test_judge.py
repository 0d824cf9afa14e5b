"""The judge's protocol, the value of Eq. 2 by hand, and best-of-N."""

import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT

from roads import config, model, schema, stage
from roads.judge import protocol
from roads.preference_losses import dpo_loss
from roads.stage import UserError
from roads.stages import best_of_n, rank, value
from roads.tldr import EOS, PAD
from roads.world import World


@pytest.mark.parametrize("answer, expected", [
    ("Comparison: A is shorter.\nPreferred: A", "A"),
    ('Comparison: B says more.\nPreferred: "B"', "B"),
    ("Preferred: <B>\n", "B"),
    ("Preferred: B.", "B"),
    ("**Comparison:** B.\n**Preferred:** \"B\"", "B"),
    ("Preferred: **A**", "A"),
    ("I prefer A", ""),
    *((said, "A") for said in (
        "preferred: a", "PREFERRED: A", "Preferred : A", "- Preferred: A", "## Preferred: A", "**Preferred**: A",
        "__Preferred:__ A", "Preferred: [A]", "Preferred: (A)", "Preferred: `A`", "Preferred: “A”",
        "Preferred: Summary A",
        "Preferred: **Summary A**", "Preferred Summary: A", "Preferred: A, because B leaves out the end.",
        "Preferred: A; it is shorter", "Preferred: A!", "A is shorter.\nA", "A is shorter.\n**A**", "Good.\nSummary A",
        "Good.\n> A", "Preferred: A\nPreferred: A")),
    *((said, "") for said in (
        "Preferred: A tie", "Preferred: A or B", "Preferred: A/B", "Preferred: A and B equally", "Preferred: A, B",
        "Preferred: A, or B", "Preferred: A close call", "Preferred: neither", "Preferred:", "A\nB", "A tie", "a cat",
        "Preferred: A\nPreferred: neither", "Preferred: A & B")),
    ("Preferred: both", ""),
    ("Preferred: Appealing", ""),
    ("Preferred: A\nPreferred: B", ""),
    ("", ""),
])  # fmt: skip
def test_an_answer_is_read(answer, expected):
    assert protocol.parse(answer) == expected


@pytest.mark.parametrize("answer, expected", [
    ("Summary: cat sleeps", "cat sleeps"),
    ("Summary: <Relationship advice>", "Relationship advice"),
    ('**Summary:** "Cat."', "Cat"),
    ("Summary: a cat sleeps", ""),
    ("Summary: one\nSummary: two", ""),
    ("Summary:", ""),
    ("A cat", ""),
    ("**summary** : _cat sleeps_.", "cat sleeps"),
    ("- Summary: (cat) sleeps", "cat sleeps"),
    ("Summary: **", ""),
])  # fmt: skip
def test_a_two_word_summary_is_read(answer, expected):
    assert protocol.two_words(answer) == expected


@pytest.mark.parametrize("name", ["summary", "two_word", "write_two_word"])
def test_a_prompt_has_its_slots_and_no_other(name):
    slots = ["post"] if name == "write_two_word" else ["post", "summarya", "summaryb"]
    text = protocol.fill(name, **{slot: "{{post}} " + slot for slot in slots})
    assert text.count("{{post}}") == len(slots) and all(f"{{{{post}}}} {slot}\n" in text for slot in slots)
    assert (name == "summary") == ("two-word" not in text)


def test_a_judge_is_that_of_its_scale(tiny, tmp_path):
    rng = np.random.default_rng(0)
    query = World(tiny.source).prompts(50, rng)
    ours, theirs = (World(tiny.source).summaries(query, rng) for _ in range(2))
    ask = protocol.of(SimpleNamespace(judge=SimpleNamespace(kind="gold"), source=tiny.source), query, tmp_path)
    assert ask(ours, theirs) == protocol.known(partial(World(tiny.source).quality, query))(ours, theirs)


def test_both_orders_a_tie_where_they_disagree_and_failures_counted():
    ours, theirs = np.arange(5)[:, None], np.arange(5)[:, None] + 10
    # Row: 0 ours wins in both orders; 1 theirs does; 2 always the first shown; 3 always the second; 4 garbage once.
    says = {True: ["A", "B", "A", "B", "A"], False: ["B", "A", "A", "B", ""]}
    found = protocol.compare(lambda first, second: [f"Preferred: {x}" for x in says[bool(first[0] < 10)]], ours, theirs)
    assert found["score"].tolist() == [1, 0, 0.5, 0.5, 0.5]
    assert found["consistent"].tolist() == [True, True, False, False, False]
    assert found["failed"].tolist() == [False] * 4 + [True]
    assert protocol.summary(found) == {"winrate": 0.5, "ties": 0.6, "position_consistency": 0.4, "parse_failures": 0.2}


def test_the_gold_judge_is_the_worlds_quality(tiny):
    world, rng = World(tiny.source), np.random.default_rng(0)
    query = world.prompts(300, rng)
    ours, theirs = world.summaries(query, rng), world.summaries(query, rng)
    theirs[:20] = ours[:20]
    found = protocol.compare(protocol.known(partial(world.quality, query)), ours, theirs)
    a, b = world.quality(query, ours), world.quality(query, theirs)
    assert (found["score"] == np.where(a == b, 0.5, a > b)).all() and (found["consistent"] == (a != b)).all()
    assert (found["score"][:20] == 0.5).all() and not found["failed"].any()


def test_judges_labels_are_the_judges_and_annotators_are_noisy(tiny):
    world, rng = World(tiny.source), np.random.default_rng(0)
    query = world.prompts(2000, rng)
    both = np.stack([world.summaries(query, rng) for _ in range(2)], 1)
    better = np.sign(world.quality(query, both[:, 0]) - world.quality(query, both[:, 1]))
    def labelled(labels: str):
        human = tiny.samples.human.model_copy(update={"labels": labels})
        scale = tiny.model_copy(update={"samples": tiny.samples.model_copy(update={"human": human})})
        return rank.human_scores(query, both, scale, None)[0]

    scores = {labels: labelled(labels) for labels in ("judge", "annotators")}
    assert (labelled("rows") == [1, 0]).all()  # a row's first is the preferred one
    chosen = {labels: np.sign(found[:, 0] - found[:, 1]) for labels, found in scores.items()}
    assert (chosen["judge"] == better).all()
    apart = better != 0
    assert 0.55 < (chosen["annotators"] == better)[apart].mean() < 0.95


def test_the_value_of_eq_2_by_hand(tmp_path, policy, rows, tiny):
    """log sigma(beta * margin) - beta * KL, with the KL of a policy from itself 0 and of another above it."""
    query, response = rows
    torch.manual_seed(1)
    shape = schema.FromScratch(kind="new", hidden_size=32, layers=2, heads=2, max_positions=64)
    other = model.new_policy(shape, 20, seed=4)
    with torch.no_grad():
        other.get_output_embeddings().weight[EOS] *= 3  # so that samples end
    policy.save_pretrained(tmp_path / "reference")
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "pairs").mkdir()
    chosen, rejected = response, response[[1, 2, 3, 0]]
    np.savez(tmp_path / "pairs/pairs.npz", query=query, chosen=chosen, rejected=rejected)
    (tmp_path / "held-out").mkdir()  # the same pairs the other way round, two of them of one post
    np.savez(tmp_path / "held-out/pairs.npz", query=query[[0, 1, 2, 2]], chosen=rejected, rejected=chosen)
    tiny = tiny.model_copy(update={"samples": tiny.samples.model_copy(update={
        "value": tiny.samples.value.model_copy(update={"n": 400})})})
    for name in ("reference", "other"):
        value.value(tmp_path / name, tmp_path / "pairs", tmp_path / "held-out", tmp_path / "reference",
                    tmp_path / f"out-{name}", tiny, 0)
    same, found = (dict(np.load(tmp_path / f"out-{name}/scores.npz")) for name in ("reference", "other"))
    assert same["kl"] == pytest.approx(0, abs=1e-5) and same["log_likelihood"] == pytest.approx(np.log(0.5), abs=1e-5)

    def logps(net, side):
        return model.response_logps(net, query, side).detach().double()

    margin = logps(other, chosen) - logps(policy, chosen) - logps(other, rejected) + logps(policy, rejected)
    loss = dpo_loss(*(logps(net, side) for net in (other, policy) for side in (chosen, rejected)), tiny.dpo.beta)
    by_hand = 1 / (1 + torch.exp(-tiny.dpo.beta * margin))
    assert found["log_likelihood"] == pytest.approx(-loss.numpy(), abs=1e-5)
    assert found["log_likelihood"] == pytest.approx(by_hand.log().numpy(), abs=1e-5)
    assert found["chosen_logps"] == pytest.approx(logps(other, chosen).numpy(), rel=1e-5)
    assert found["score"] == pytest.approx(found["log_likelihood"] - tiny.dpo.beta * found["kl"])
    assert same["held_out"] == pytest.approx(np.log(0.5), abs=1e-5) and not np.allclose(found["held_out"], np.log(0.5))
    post = same["held_out.post"]
    assert post[2] == post[3] and sorted(post[:3]) == [0, 1, 2]
    assert "post" not in same
    # KL of the first token alone, exactly, is at most that of the whole completion.
    first = [torch.log_softmax(net(query[1:2]).logits[0, -1].double(), -1).detach() for net in (other, policy)]
    exact = (first[0].exp() * (first[0] - first[1])).sum().item()
    metrics = json.loads((tmp_path / "out-other/metrics.json").read_text())
    assert found["kl"][1] > exact - 0.1 and found["kl"].min() > 0 and metrics["kl_standard_error"] > 0


def test_best_of_n_takes_the_first_of_the_best_among_the_first_n():
    rewards = np.array([[0.0, 2.0, 1.0, 2.0], [3.0, 1.0, 5.0, 9.0]])
    assert [best_of_n.best_of(rewards, n).tolist() for n in (1, 2, 3, 4)] == [[0, 0], [1, 0], [1, 2], [1, 3]]


def test_a_judge_that_cannot_be_read_stops_the_stage():
    ours, theirs = np.full((10, 3), 5), np.full((10, 3), 6)

    def asks(read: int):
        return lambda first, second: ["Preferred: A"] * read + ["It depends."] * (10 - read)

    found = protocol.compare(asks(8), ours, theirs)  # 4 of 20: they count as ties, and are told
    assert found["failed"].sum() == 2
    with pytest.raises(UserError, match=r"^the judge: 6 of 20 answers cannot be read; expected a line `Preferred: A` "
                                        r"or `Preferred: B`, got for example 'It depends.', 'It depends.', "):
        protocol.compare(asks(7), ours, theirs)


def test_sides_that_are_one_after_cutting_and_empty_ones_make_no_pair(tmp_path):
    """Of rows that come with pairs: they are dropped and counted, as labelled ties are."""
    cfg = config.load_scale("rehearsal", ROOT / "params.yaml")
    sides = np.array([[[5, 6, EOS], [5, 7, EOS]], [[5, 6, EOS], [5, 6, EOS]], [[EOS, PAD, PAD], [8, EOS, PAD]],
                      [[8, EOS, PAD], [EOS, PAD, PAD]], [[9, EOS, PAD], [5, EOS, PAD]]])
    (tmp_path / "drawn").mkdir()
    np.savez(tmp_path / "drawn/completions.npz", query=np.arange(10).reshape(5, 2) + 2, completions=sides)
    rank.rank(tmp_path / "drawn", tmp_path / "pairs", cfg, "human")
    pairs = np.load(tmp_path / "pairs/pairs.npz")
    assert pairs["query"].tolist() == [[2, 3], [10, 11]]
    assert pairs["chosen"].tolist() == [[5, 6, EOS], [9, EOS, PAD]]
    found = stage.read_json(tmp_path / "pairs/metrics.json")
    assert (found["pairs"], found["dropped_as_ties"]) == (2, 3)
    np.savez(tmp_path / "drawn/completions.npz", query=np.array([[2, 3]]), completions=sides[1:2])
    with pytest.raises(UserError, match="no prompt has two sides that differ; raise source.max_preference_tokens"):
        rank.rank(tmp_path / "drawn", tmp_path / "none", cfg, "human")
    assert not (tmp_path / "none").exists()


def test_samples_that_were_cut_may_lose_every_best_of_n(tmp_path, tiny, monkeypatch):
    """The authors' code gives them -1e6; here the reward of their text with an EOS, unless it is said."""
    world, rng = World(tiny.source), np.random.default_rng(0)
    query = world.prompts(4, rng)
    whole = world.summaries(query, rng)  # K words and EOS
    short = np.pad(whole[:, 1:], ((0, 0), (0, 1)), constant_values=PAD)  # ends before the last column
    (tmp_path / "drawn").mkdir()
    np.savez(tmp_path / "drawn/completions.npz", query=query, completions=np.stack([short, whole], 1))
    np.savez(tmp_path / "test_human.npz", query=query, response=world.summaries(query, rng))
    net = model.new_policy(tiny.model, world.vocab_size, 0)
    model.RewardModel(net.base_model).save_pretrained(tmp_path / "rm")
    rewards = torch.tensor([[0.0, 1.0]]).repeat(4, 1)  # the one that was cut is the better one
    monkeypatch.setattr(best_of_n.candidates, "in_batches", lambda *_, **__: rewards.clone())
    asked = []
    compare = protocol.compare
    monkeypatch.setattr(protocol, "compare", lambda ask, ours, *rest: asked.append(ours) or compare(ask, ours, *rest))
    for unfinished in (None, -1e6):
        sampling = tiny.samples.best_of_n.model_copy(update={"n": 2, "unfinished": unfinished})
        cfg = tiny.model_copy(update={"samples": tiny.samples.model_copy(update={"best_of_n": sampling})})
        best_of_n.best_of_n(tmp_path / "drawn", tmp_path, tmp_path / "rm", tmp_path, tmp_path / str(unfinished), cfg,
                            "reward")
    best = [shown[-4:] for shown in asked]  # of N = 2
    assert np.array_equal(best[0], whole) and np.array_equal(best[1], short)
