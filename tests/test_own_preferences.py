"""Preferences of your own: prompt, chosen, rejected, as texts or as chats, with a model of another family."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import ROOT, clone, make
from fake_openai import Fake
from pydantic import ValidationError
from ruamel.yaml import YAML
from test_data import qwen_tokenizer
from transformers import Qwen2Config, Qwen2ForCausalLM

from roads import config, own_preferences, stage, tldr
from roads.judge import protocol
from roads.judge_settings import LLMJudge
from roads.stages import data
from roads.tldr import EOS, PAD

TEMPLATE = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
THINGS = ("a kettle", "a ladder", "the moon", "an old coat", "a river", "bread", "a violin", "a map", "salt", "a lamp")
ASKED = [f"{verb} {thing}{end}" for verb in ("Tell me about", "Draw", "Where do I find", "Who needs")
         for thing in THINGS for end in ("?", ", please.", " today?")]


def said(role: str, text: str) -> dict:
    return {"role": role, "content": text}


def chat(i: int, asked: str) -> dict:
    good, bad = f"Here it is: {asked.lower()} It is number {i}, and there is more to say.", f"No. {i}"
    return {"chosen": [said("user", asked), said("assistant", good)],
            "rejected": [said("user", asked), said("assistant", bad)]}


ROWS = [chat(i, asked) for i, asked in enumerate(ASKED)]


def write(path, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny Qwen2 that chats: EOS ends a turn, and padding is another token, as in Qwen2.5's instruct models."""
    where = tmp_path_factory.mktemp("hub") / "qwen-chat"
    tokenizer, _ = qwen_tokenizer()
    torch.manual_seed(0)
    end, other = (tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>"))
    Qwen2ForCausalLM(Qwen2Config(
        vocab_size=tokenizer.get_vocab_size() + 8, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512, eos_token_id=end, bos_token_id=other,
        pad_token_id=other, tie_word_embeddings=True)).save_pretrained(where)
    tokenizer.save(str(where / "tokenizer.json"))
    (where / "tokenizer_config.json").write_text(json.dumps({
        "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": TEMPLATE,
        "tokenizer_class": "PreTrainedTokenizerFast"}))
    return where


@pytest.fixture
def cfg(model):
    whole = config.load_scale("chat", ROOT / "params.yaml")
    small = {"sft": 30, "preferences": 20, "more": 20, "online": 20, "valid": 10, "test": 10, "best_of_n": 5}
    change = {"source": {"max_query_tokens": 60, "max_response_tokens": 80, "max_preference_tokens": 80},
              "data": small, "model": {"name": str(model), "revision": None}}
    return whole.model_copy(update={block: getattr(whole, block).model_copy(update=keys)
                                    for block, keys in change.items()})


def arrays(folder):
    return {path.stem: dict(np.load(path)) for path in folder.glob("*.npz")}


def template(messages):
    return "|".join(f"{one['role']}: {one['content']}" for one in messages) + "|"


# Rows


A, B = [said("assistant", " Yes. ")], [said("assistant", "No.")]
BRIEF, USER = [said("system", "Be brief.")], [said("user", "Is it?")]


@pytest.mark.parametrize("row, prompt, is_chat", [
    ({"prompt": "Is it?", "chosen": " Yes.", "rejected": "No."}, "Is it?", False),
    ({"prompt": "Is it?", "chosen": A, "rejected": B}, "user: Is it?|", True),
    ({"prompt": USER, "chosen": A, "rejected": B}, "user: Is it?|", True),
    ({"prompt": USER, "chosen": "Yes.", "rejected": "No."}, "user: Is it?|", True),
    ({"chosen": USER + A, "rejected": USER + B}, "user: Is it?|", True),
    ({"prompt": "Is it?", "chosen": USER + A, "rejected": USER + B}, "user: Is it?|", True),
    ({"prompt": USER, "chosen": USER + A, "rejected": USER + B}, "user: Is it?|", True),
    ({"prompt": "Is it? ", "chosen": USER + A, "rejected": USER + B}, "user: Is it?|", True),
    ({"prompt": [said("user", "Is it? ")], "chosen": USER + A, "rejected": USER + B}, "user: Is it?|", True),
    *[({"prompt": prompt, "chosen": before + A, "rejected": before + B}, "system: Be brief.|user: Is it?|", True)
      for prompt, before in ((BRIEF, USER), (BRIEF + USER, USER), (USER, BRIEF + USER), ("Is it?", BRIEF))],
    ({"prompt": BRIEF, "chosen": USER + A, "rejected": USER + B, "reference": None},
     "system: Be brief.|user: Is it?|", True),
])
def test_a_row_of_any_shape_that_the_hub_has(row, prompt, is_chat):
    found = own_preferences.preference_of(row, "x", template)
    assert (found.prompt, found.is_chat) == (prompt, is_chat)
    assert (found.chosen.strip(), found.rejected, found.reference) == ("Yes.", "No.", found.chosen)
    told = own_preferences.preference_of(row | {"reference": [said("assistant", "Perhaps.")]}, "x", template)
    assert told.reference == "Perhaps." and told.chosen == found.chosen


@pytest.mark.parametrize("row, message", [
    ({"prompt": "a", "chosen": "b"}, "x: no field 'rejected'; expected prompt, chosen, rejected"),
    ({"chosen": "b", "rejected": "c"}, "x: no field 'prompt', and no message before the last; expected prompt"),
    ({"prompt": 3, "chosen": "b", "rejected": "c"}, "x: prompt: expected a text, or a list of messages"),
    ({"prompt": "a", "chosen": [], "rejected": "c"}, "x: chosen: expected a text, or a list of messages"),
    ({"prompt": "a", "chosen": [{"role": "user"}], "rejected": "c"}, "x: chosen: expected a text, or a list of mess"),
    ({"chosen": USER, "rejected": USER + B}, "x: chosen: the last message is of role 'user'; expected the assistant's"),
    ({"chosen": USER + A, "rejected": [said("user", "Was it?")] + B}, "x: chosen and rejected differ before their la"),
    ({"prompt": "a\ud800", "chosen": "b", "rejected": "c"}, "x: prompt: half a surrogate pair; expected Unicode"),
    ({"prompt": "a", "chosen": "b", "rejected": "c", "reference": 1}, "x: reference: expected a text, or a list"),
])
def test_a_row_that_is_none_is_told(row, message):
    with pytest.raises(stage.UserError) as error:
        own_preferences.preference_of(row, "x", template)
    assert str(error.value).startswith(message)


def test_a_model_without_a_template_takes_texts_alone(tmp_path, model, cfg):
    told = json.loads((model / "tokenizer_config.json").read_text())
    for path in model.iterdir():
        if path.name != "tokenizer_config.json":
            (tmp_path / "plain" / path.name).parent.mkdir(exist_ok=True)
            (tmp_path / "plain" / path.name).write_bytes(path.read_bytes())
    del told["chat_template"]
    (tmp_path / "plain/tokenizer_config.json").write_text(json.dumps(told))
    of = own_preferences.template_of(cfg.model.model_copy(update={"name": str(tmp_path / "plain")}))
    with pytest.raises(stage.UserError, match=r"x: model .*plain has no chat template, which messages need; expected"):
        own_preferences.preference_of(ROWS[0], "x", of)
    assert own_preferences.preference_of({"prompt": "a", "chosen": "b", "rejected": "c"}, "x", of).prompt == "a"
    refuses = own_preferences.template_of(cfg.model)
    broken = TEMPLATE.replace("{% for", "{{ raise_exception('roles must alternate') }}{% for")
    (tmp_path / "plain/tokenizer_config.json").write_text(json.dumps(told | {"chat_template": broken}))
    of = own_preferences.template_of(cfg.model.model_copy(update={"name": str(tmp_path / "plain")}))
    with pytest.raises(stage.UserError, match="x: the chat template of .* does not take it: roles must alternate"):
        own_preferences.preference_of(ROWS[0], "x", of)
    assert refuses(USER) == "<|im_start|>user\nIs it?<|im_end|>\n<|im_start|>assistant\n"


# Splits


def test_chats_become_tokens(tmp_path, cfg, capsys):
    write(tmp_path / "rows/train.jsonl", ROWS)
    data.data(tmp_path / "rows", tmp_path / "data", cfg)
    found, tokenizer = arrays(tmp_path / "data"), tldr.load_tokenizer(tmp_path / "data/tokenizer.json")
    assert {split: len(part["query"]) for split, part in found.items()} == {
        "sft": 30, "preferences": 20, "more": 20, "online": 20, "valid": 10, "test_human": 10, "test_rouge": 10,
        "test_best_of_n": 5}
    assert "rows  prompt too long  completion cut  sides alike  held out\nvalid" in capsys.readouterr().out
    pairs, end, start = found["preferences"], EOS, tokenizer.token_to_id("<|im_start|>")
    for query, *sides in zip(pairs["query"], pairs["chosen"], pairs["rejected"], pairs["response"]):
        ids = query[query != PAD].tolist()
        text = tokenizer.decode(ids, skip_special_tokens=False)
        asked = text.removeprefix("<|im_start|>user\n").removesuffix("<|im_end|>\n<|im_start|>assistant\n")
        assert asked in ASKED and ids.count(start) == 2 and ids.count(end) == 1
        row = ROWS[ASKED.index(asked)]
        texts = [row[name][1]["content"] for name in ("chosen", "rejected", "chosen")]
        assert [tokenizer.decode(side[side != PAD].tolist()) for side in sides] == texts  # nothing before, EOS after
        assert all(side[side != PAD][-1] == EOS for side in sides)
    queries = {split: {row.tobytes() for row in found[split]["query"]} for split in found}
    held_out = queries["valid"] | queries["test_human"]
    assert len(held_out) == 20 and not held_out & (queries["sft"] | queries["preferences"] | queries["more"])
    assert not queries["more"] & queries["preferences"] and queries["sft"] > queries["preferences"]
    shown = protocol.both_orders(cfg.judge, tokenizer, pairs["query"][:1], pairs["chosen"][:1], pairs["rejected"][:1])
    assert "### Prompt:\n<|im_start|>user\n" in shown[0] and "TL;DR" not in shown[0] and len(shown) == 2


def test_parquet_and_a_dataset_of_the_hub_give_the_same(tmp_path, cfg):
    rows = [row | {"score_chosen": 1.0} for row in ROWS]
    write(tmp_path / "rows/train.jsonl", rows[:90])
    write(tmp_path / "rows/test.jsonl", rows[90:])
    for split, part in (("train", rows[:90]), ("test", rows[90:])):
        path = tmp_path / f"org/data/{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(part), path)
        (tmp_path / "parquet").mkdir(exist_ok=True)
        (tmp_path / f"parquet/{split}.parquet").write_bytes(path.read_bytes())
    wanted = stage.read_json(ROOT / "data/ultrafeedback.json") | {"dataset": str(tmp_path / "org")}
    (tmp_path / "hub.json").write_text(json.dumps(wanted))
    data.data(tmp_path / "rows", tmp_path / "a", cfg)
    data.data(tmp_path / "parquet", tmp_path / "b", cfg)
    data.data(tmp_path / "hub.json", tmp_path / "c", cfg)
    for path in (tmp_path / "a").iterdir():
        for other in "bc":
            assert (tmp_path / other / path.name).read_bytes() == path.read_bytes(), path.name


def test_what_does_not_fit_is_counted_and_too_much_of_it_refused(tmp_path, cfg, capsys):
    odd = [chat(0, "why " * 80), {"prompt": "a", "chosen": "b", "rejected": "b"}, chat(1, "Say nothing.")]
    odd[2]["chosen"][1]["content"] = "word " * 200
    write(tmp_path / "rows/train.jsonl", ROWS[:60] + odd)
    write(tmp_path / "rows/valid.jsonl", ROWS[60:70])
    write(tmp_path / "rows/test.jsonl", ROWS[:10])
    wide = cfg.model_copy(update={"data": cfg.data.model_copy(update={"sft": 100})})
    data.data(tmp_path / "rows", tmp_path / "data", wide)
    assert stage.read_json(tmp_path / "data/metrics.json")["found"]["train"] == {
        "rows": 63, "prompt too long": 1, "completion cut": 1, "sides alike": 1, "held out": 10}
    found = arrays(tmp_path / "data")["sft"]
    assert len(found["query"]) == 51
    assert (found["response"] != PAD).all(1).sum() == 1 and (found["response"][:, -1] == EOS).sum() == 1
    short = cfg.model_copy(update={"source": cfg.source.model_copy(update={"max_response_tokens": 20})})
    with pytest.raises(stage.UserError, match=r"rows: \w+: \d+ of \d+ rows are too long, which is more than source.cut_"
                       "at_most, 0.3; raise source.max_query_tokens, max_response_tokens and max_preference_tokens"):
        data.data(tmp_path / "rows", tmp_path / "short", short)
    assert not (tmp_path / "short").exists() and "completion cut" in capsys.readouterr().out


@pytest.mark.parametrize("files, message", [
    ({}, "no rows to train on; expected train.jsonl or train.parquet"),
    ({"train.jsonl": b'{"prompt": "a"}\n'}, "train.jsonl:1: no field 'chosen'"),
    ({"train.jsonl": b"\n"}, "train.jsonl: empty; expected one row per line"),
    ({"train.jsonl": b"{}\n", "train.parquet": b"PAR1"}, "rows: train.jsonl and train.parquet; expected one of them"),
    ({"train.parquet": b"PAR1"}, "train.parquet: .*; expected a parquet file of rows"),
    ({"train.jsonl": b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 3}, "valid: none of 0 rows is left"),
])
def test_files_that_are_none_are_told(tmp_path, cfg, files, message):
    (tmp_path / "rows").mkdir()
    for name, text in files.items():
        (tmp_path / "rows" / name).write_bytes(text)
    with pytest.raises(stage.UserError, match=message):
        data.data(tmp_path / "rows", tmp_path / "data", cfg)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("text, message", [
    ('{"dataset": "rows",', "my.json: Expecting property name .*; expected JSON"),
    ('{"dataset": "rows", "revision": null, "splits": {"test": "*.jsonl"}}', "my.json: splits.train: missing"),
    ('{"dataset": "rows", "revision": null, "splits": {"train": "/rows/*.jsonl"}}', "my.json: splits.train: .*"),
])
def test_a_file_that_names_no_dataset_is_told(tmp_path, text, message, monkeypatch):
    monkeypatch.setattr(own_preferences.hub, "fetch", lambda *args: (tmp_path, None))
    (tmp_path / "my.json").write_text(text)
    with pytest.raises(stage.UserError, match=message) as error:
        own_preferences.read(tmp_path / "my.json")
    assert "\n" not in str(error.value)


# The judge's prompt


def test_a_judges_prompt_is_a_file_with_its_slots(monkeypatch, tmp_path):
    judge = {"kind": "openai", "model": "m", "temperature": 0.0, "max_tokens": 9}
    assert LLMJudge(prompt="summary", **judge).about == "post"
    assert LLMJudge(prompt="response", **judge).about == "prompt"
    with pytest.raises(ValidationError, match="one of response, summary, two_word; got 'mine'"):
        LLMJudge(prompt="mine", **judge)
    monkeypatch.setattr("roads.judge_settings.PROMPTS", tmp_path)
    (tmp_path / "mine.txt").write_text("{{prompt}} {{responsea}}")
    with pytest.raises(ValidationError, match=r"mine.txt: expected the slots {{post}}, {{summarya}}, {{summaryb}} or "):
        LLMJudge(prompt="mine", **judge)
    (tmp_path / "mine.txt").write_text("Kind? {{prompt}} {{responsea}} {{responseb}}")
    assert LLMJudge(prompt="mine", **judge).about == "prompt"


@pytest.mark.parametrize("scale, prompt, message", [
    ("chat", "summary", "judge.prompt: expected one about prompts, as response, for source.kind preferences"),
    ("paper", "response", "judge.prompt: expected one about posts, as summary, for source.kind openai"),
])
def test_a_judge_is_asked_about_what_there_is(tmp_path, scale, prompt, message):
    yaml = YAML()
    params = yaml.load((ROOT / "params.yaml").read_text())
    params[scale]["judge"]["prompt"] = prompt
    (tmp_path / "figures.yaml").write_bytes((ROOT / "figures.yaml").read_bytes())
    with open(tmp_path / "params.yaml", "w") as file:
        yaml.dump(params, file)
    with pytest.raises(stage.UserError, match=message):
        config.load_scale(scale, tmp_path / "params.yaml")


@pytest.mark.slow
def test_a_chat_dataset_gets_to_figure_3(tmp_path, model):
    """`make fig3 SCALE=chat DATA=FOLDER`, small, on a CPU, with a judge behind an endpoint."""
    where = clone(tmp_path)
    write(where / "mine/train.jsonl", ROWS)
    yaml = YAML()
    params = yaml.load((where / "params.yaml").read_text())
    block = params["chat"]
    block["compute"] |= {"device": "cpu", "precision": "fp32"}
    block["source"] |= {"max_query_tokens": 60, "max_response_tokens": 40, "max_preference_tokens": 40}
    block["source"]["cut_at_most"] = 1
    block["data"] |= {"sft": 30, "preferences": 16, "more": 16, "online": 16, "valid": 8, "test": 8, "best_of_n": 4}
    block["model"] |= {"name": str(model), "revision": None}
    del block["arms"]
    with open(where / "params.yaml", "w") as file:
        yaml.dump(params, file)
    with Fake() as judge:
        env = {"OPENAI_BASE_URL": judge.url, "OPENAI_API_KEY": "k"}
        make(where, "fig3", "SCALE=chat", "DATA=mine", env=env)
        assert judge.asked and all("### Prompt:\n<|im_start|>user" in json.dumps(asked).replace("\\n", "\n")
                                   for asked in judge.asked)
    content = json.loads((where / "reports/chat/fig3.json").read_text())
    assert {bar["n"] for bar in content["bars"]} == {8} and "DPO" in {bar["bar"] for bar in content["bars"]}


def test_a_column_that_is_not_utf_8_is_told(tmp_path, cfg):
    (tmp_path / "rows").mkdir()
    columns = {name: pyarrow.array([b"\xff"]).view(pyarrow.string()) for name in ("prompt", "chosen", "rejected")}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "rows/train.parquet")
    with pytest.raises(stage.UserError, match="train.parquet: .*; expected a parquet file of rows"):
        data.data(tmp_path / "rows", tmp_path / "data", cfg)
