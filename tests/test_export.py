"""Models that others open: the ids that they had, the rewards that we give, in a process without our package."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ENV, ROOT
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer

from roads import model, schema, stage, tldr
from roads.report import export
from roads.stages import base

ROWS = [json.loads(line) for line in (ROOT / "data/tldr_sample/train.jsonl").read_text("utf-8").splitlines()[:100]]
TEXTS = [row["post"][:700] for row in ROWS]
ELSEWHERE = """
import json, sys, torch
sys.modules["roads"] = None  # an import of ours is an error
from transformers import AutoModelForSequenceClassification, AutoTokenizer
model, tokenizer = (kind.from_pretrained(sys.argv[1]) for kind in (AutoModelForSequenceClassification, AutoTokenizer))
texts, found = json.load(open(sys.argv[2])), {}
assert model.config.num_labels == 1
for side in ("right", "left"):
    tokenizer.padding_side = side
    rows = tokenizer([text + tokenizer.eos_token for text in texts], padding=True, return_tensors="pt")
    rows = {name: rows[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        found[side] = [model(**{name: values[i : i + 20] for name, values in rows.items()}).logits[:, 0].tolist()
                       for i in range(0, len(texts), 20)]
print(json.dumps({side: sum(parts, []) for side, parts in found.items()}))
"""


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A tokenizer whose text ends with its token 7, and has no padding; and a policy of that vocabulary."""
    folder = tmp_path_factory.mktemp("original")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = [*(f"<unused{i}>" for i in range(7)), "</s>"]
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=500, special_tokens=special,
                                                             initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.save(str(folder / "tokenizer.json"))
    size = schema.FromScratch(kind="new", hidden_size=32, layers=2, heads=2, max_positions=1024)
    model.new_policy(size, 500, seed=1).save_pretrained(folder)
    return folder


@pytest.fixture
def runs(original, tmp_path):
    """The same as a run of ours, with EOS and padding as 0 and 1, and a reward model on it."""
    tokenizer, eos_id, pad_id = tldr.renumber_tokenizer(original / "tokenizer.json", "</s>", None)
    assert (eos_id, pad_id) == (7, 500)
    policy = model.load_policy(original)
    base.renumber(policy, eos_id, pad_id, 501)
    for name in ("data", "sft", "human/reward/s0"):
        (tmp_path / name).mkdir(parents=True)
        tldr.save_tokenizer(tokenizer, tmp_path / name)
    stage.write_json(tmp_path / "data/metrics.json", {"eos_id": eos_id, "pad_id": pad_id})
    policy.save_pretrained(tmp_path / "sft")
    rm = model.RewardModel.from_policy(tmp_path / "sft", seed=4)
    rm.head.bias.data.fill_(0.25)  # which the export leaves out
    rm.save_pretrained(tmp_path / "human/reward/s0")
    stage.write_json(tmp_path / "human/reward/s0/metrics.json", {"steps": 12})
    return tmp_path


def test_a_policy_has_the_ids_and_the_numbers_that_it_had(original, runs):
    export.export(runs / "sft", runs / "out")
    before, after = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (original, runs / "out"))
    plain, back = Tokenizer.from_file(str(original / "tokenizer.json")), AutoTokenizer.from_pretrained(runs / "out")
    for text in TEXTS[:20]:
        ids = plain.encode(text).ids
        assert back(text)["input_ids"] == ids
        with torch.no_grad():
            rows = torch.tensor([[*ids[:200], 7]])
            assert torch.equal(before(rows).logits, after(rows).logits[..., :500])
    assert (back.eos_token_id, back.pad_token_id) == (7, 500) == (after.config.eos_token_id, after.config.pad_token_id)


def test_a_reward_model_gives_its_rewards_in_a_process_without_our_package(runs):
    export.export(runs / "human/reward/s0", runs / "out")
    rm = model.RewardModel.load(runs / "human/reward/s0").eval()
    tokenizer = tldr.load_tokenizer(runs / "sft/tokenizer.json")
    ids = [tokenizer.encode(text).ids for text in TEXTS]
    assert len(set(map(len, ids))) > 50
    with torch.no_grad():
        ours = [float(rm(torch.tensor([row[:-3]]), torch.tensor([[*row[-3:], tldr.EOS]]))) - 0.25 for row in ids]
    (runs / "texts.json").write_text(json.dumps(TEXTS), encoding="utf-8")
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", ELSEWHERE, "out", "texts.json"], cwd=runs, env=env, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = json.loads(done.stdout)
    assert np.std(ours) > 0.01
    for side in ("right", "left"):
        assert theirs[side] == pytest.approx(ours, abs=1e-5)
    page = (runs / "out/README.md").read_text(encoding="utf-8")
    assert "reward-model" in page and '"steps": 12' in page and "AutoModelForSequenceClassification" in page


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_every_kind_of_tokenizer_goes_there_and_back(kind, tmp_path):
    """Tokens at other places than 0 and 1, one of which is the other's: all ids are those of before."""
    if kind == "bpe":
        path = ROOT.parent / "shared/data/neox_tokenizer.json"
        if not path.exists():
            pytest.skip("shared/data has Pythia's tokenizer")
        ends = "<|endoftext|>"
    else:
        tokenizer, ends, path = Tokenizer(models.Unigram()), "</s>", tmp_path / "tokenizer.json"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.train_from_iterator(TEXTS, trainers.UnigramTrainer(
            vocab_size=200, special_tokens=["<pad>", "<unk>", ends], unk_token="<unk>"))
        tokenizer.save(str(path))
    ours, eos_id, pad_id = tldr.renumber_tokenizer(path, ends, "<pad>")
    back = Tokenizer.from_str(json.dumps(export.put_back(json.loads(ours.to_str()), eos_id, pad_id)))
    before = Tokenizer.from_file(str(path))
    assert before.get_vocab().items() <= back.get_vocab().items()
    for text in TEXTS[:10]:
        assert back.encode(text, add_special_tokens=False).ids == before.encode(text, add_special_tokens=False).ids


class Hub:
    """What stands in for the hub: it keeps what it is given, or refuses."""

    def __init__(self, error: Exception | None = None):
        self.error, self.repos, self.files = error, [], []

    def create_repo(self, repo, private, exist_ok):
        if self.error:
            raise self.error
        self.repos.append((repo, private))

    def upload_folder(self, repo_id, folder_path, commit_message):
        self.files = sorted(path.name for path in folder_path.iterdir())
        return f"{repo_id}@1"


def test_what_is_published_is_the_folder_and_private(runs):
    export.export(runs / "sft", runs / "out")
    hub = Hub()
    assert export.publish(runs / "out", "us/sft", hub) == "us/sft@1" and hub.repos == [("us/sft", True)]
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(hub.files)
    with pytest.raises(stage.UserError, match=r"us/sft: not pushed \(no route\); what would have been is in .*out"):
        export.publish(runs / "out", "us/sft", Hub(OSError("no route")))


def test_what_is_no_model_is_said_in_one_line(tmp_path):
    for extra, message in (([], "no config.json; expected the folder of a policy or of a reward model"),
                           (["config.json"], "no folder `data` beside it or above it")):
        for name in extra:
            (tmp_path / name).write_text("{}", encoding="utf-8")
        done = subprocess.run([sys.executable, "-m", "roads.report.export", str(tmp_path), str(tmp_path / "out")],
                              env=ENV, cwd=ROOT, text=True, capture_output=True)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_what_another_folder_holds_stays(runs):
    (runs / "mine").mkdir()
    (runs / "mine/weights.bin").write_text("x")
    (runs / "project").mkdir()
    (runs / "project/README.md").write_text("# Of my own")
    (runs / "project/chapter.tex").write_text("x")
    for out in ("mine", "sft", "project"):
        before = sorted(path.name for path in (runs / out).iterdir())
        with pytest.raises(stage.UserError, match=f"{out}: expected a new folder, or one that this command wrote"):
            export.export(runs / "sft", runs / out)
        assert sorted(path.name for path in (runs / out).iterdir()) == before
    for _ in range(2):  # its own is written again
        export.export(runs / "sft", runs / "out")
    (runs / "out/notes.txt").write_text("mine")
    with pytest.raises(stage.UserError, match="out: expected a new folder, or one that this command wrote"):
        export.export(runs / "sft", runs / "out")
    assert (runs / "out/README.md").exists() and (runs / "out/notes.txt").exists()


@pytest.mark.parametrize("repo", ["../../docs2/x", "a/b/c", "name"])
def test_a_name_that_no_hub_has_is_refused_first(tmp_path, repo):
    command = [sys.executable, "-m", "roads.report.export", "sft", str(tmp_path / "out"), "--publish", repo]
    done = subprocess.run(command, env=ENV, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 2 and f"error: REPO={repo}: expected a name on the hub" in done.stderr
    assert not (tmp_path / "out").exists()
