"""Scale real: posts of this repository, weights out of a GGUF file or a package, and the kit."""

import importlib.util
import json
import lzma
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ENV, ROOT, clone, run
from ruamel.yaml import YAML

from roads import config, hub, model, posts, tldr
from roads.stage import UserError
from roads.stages import base, data

sys.path.insert(0, str(ROOT / "scripts"))
import kit  # noqa: E402

POSTS = ROOT / "data/tldr"
ROWS = {"train": 4204, "valid": 1000, "test": 1000, "development": 600}
BLOCKS = config.load(ROOT / "params.yaml").scales


def packages_missing() -> str | None:
    try:
        hub.gguf("smollm2-135m")
    except UserError as error:
        return str(error)


needs_gguf = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="the package gguf is not installed: "
                                "`make setup SCALE=real`")
needs_weights = pytest.mark.skipif(bool(packages_missing()), reason=packages_missing() or "")


# Posts


def test_no_post_is_in_two_files():
    files = {name: tldr.read_rows(POSTS / f"{name}.jsonl.xz") for name in ROWS}
    assert {name: len(rows) for name, rows in files.items()} == ROWS
    assert len({row.id for rows in files.values() for row in rows}) == sum(ROWS.values())
    assert len({row.post for rows in files.values() for row in rows}) == sum(ROWS.values())


def test_numbers_are_chosen_on_posts_of_their_own():
    source = BLOCKS["real"].source
    report, _ = posts.in_folder(POSTS, source)
    chosen_on, _ = posts.in_folder(POSTS, source.model_copy(update={"held_out": "development"}))
    assert [len(report[name]) for name in ("train", "valid", "test")] == [4204, 1000, 1000]
    assert [len(chosen_on[name]) for name in ("train", "valid", "test")] == [4204, 300, 300]
    held_out = [{row.id for name in ("valid", "test") for row in posts[name]} for posts in (report, chosen_on)]
    assert len(held_out[0]) == 2000 and len(held_out[1]) == 600 and not held_out[0] & held_out[1]
    assert not any(row.id in held_out[1] for row in report["train"])


def test_a_file_that_is_cut_off_is_named(tmp_path):
    whole = lzma.compress(b'{"id": "1"}\n')
    (tmp_path / "train.jsonl.xz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="train.jsonl.xz: .*expected a jsonl file"):
        tldr.read_rows(tmp_path / "train.jsonl.xz")


# Weights


def write_gguf(path: Path) -> None:
    """A Llama of random weights with a byte-level BPE, as llama.cpp's converter writes it: the matrices in Q4_1."""
    import gguf
    from tokenizers import pre_tokenizers

    rng, width, layers, heads, kv_heads, inner = np.random.default_rng(0), 64, 2, 4, 2, 96
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "Ġth"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(2048)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))  # control tokens, and plain ones
    writer.add_token_merges(["t h", "Ġ th"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)  # as the packaged model has it: not what ends its texts
    writer.add_pad_token_id(2)

    def add(name: str, *shape: int) -> None:
        weights = rng.normal(0, 0.2, shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, 1 + weights)
        else:
            kind = gguf.GGMLQuantizationType.Q4_1
            writer.add_tensor(name, gguf.quants.quantize(weights, kind), raw_dtype=kind)

    add("token_embd.weight", len(tokens), width)
    add("output_norm.weight", width)
    for i in range(layers):
        size = width // heads * kv_heads
        for part, shape in {"attn_norm": (width,), "ffn_norm": (width,), "attn_q": (width, width),
                            "attn_k": (size, width), "attn_v": (size, width), "attn_output": (width, width),
                            "ffn_gate": (inner, width), "ffn_up": (inner, width), "ffn_down": (width, inner)}.items():
            add(f"blk.{i}.{part}.weight", *shape)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """A GGUF file, the data folder and the checkpoint that the stages make with it."""
    folder = tmp_path_factory.mktemp("gguf")
    write_gguf(folder / "small.gguf")
    tiny = BLOCKS["real-tiny"]
    wanted = tiny.model.model_copy(update={"name": str(folder / "small.gguf")})
    source = tiny.source.model_copy(update={"max_query_tokens": 1500})
    cfg = tiny.model_copy(update={"model": wanted, "source": source})
    data.data(POSTS, folder / "data", cfg)
    base.fetch(folder / "data", folder / "base", cfg)
    return folder


@needs_gguf
def test_a_gguf_file_becomes_a_checkpoint_as_any_other(opened):
    """What the file's model says of a text, ours does, with EOS and padding at 0 and 1."""
    from transformers import AutoModelForCausalLM

    text = "So that is the end of my text: 25 times, no \u2581 and no <|im_end|>."
    tokenizer = tldr.load_tokenizer(opened / "data/tokenizer.json")
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == text and not {0, 1} & set(ids)
    theirs = AutoModelForCausalLM.from_pretrained(opened, gguf_file="small.gguf", dtype=torch.float32)
    ours = model.load_policy(opened / "base")
    place = torch.arange(theirs.config.vocab_size)
    place[:3] = torch.tensor([2, 0, 1])  # EOS was 2, padding 0
    with torch.no_grad():
        expected = theirs(place[torch.tensor([ids])]).logits[..., place]
        assert torch.allclose(ours(torch.tensor([ids])).logits, expected, atol=1e-5)
    assert expected.std() > 0.1
    metrics = json.loads((opened / "base/metrics.json").read_text(encoding="utf-8"))
    assert len(metrics["sha256"]) == 64 and metrics["parameters"] == theirs.num_parameters()
    saved = json.loads((opened / "base/config.json").read_text(encoding="utf-8"))
    assert "quantization_config" not in saved and (saved["eos_token_id"], saved["pad_token_id"]) == (0, 1)


def test_what_is_not_there_is_named(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="model llama: no such .gguf file here; packaged are: smollm2-135m"):
        hub.gguf("llama")
    monkeypatch.setitem(hub.PACKAGES, "other", ("no_such_package", "x.gguf"))
    with pytest.raises(UserError, match="no_such_package is not installed; `make setup SCALE=real`"):
        hub.gguf("other")


@pytest.mark.slow
@needs_weights
def test_real_tiny_goes_from_packages_to_the_figure(tmp_path):
    where = clone(tmp_path / "real")
    run(where, "roads.active", "set", "--scale", "real-tiny")
    run(where, "roads.runner.repro", "fig11", "--jobs", "2")
    content = json.loads((where / "reports/real-tiny/fig11.json").read_text(encoding="utf-8"))
    assert content["bars"] and all(bar["n"] >= 3 for bar in content["bars"])


# The kit


def test_a_closure_follows_extras():
    there = kit.closure(["torch", "ruamel.yaml[oldlibyaml]"])
    assert {"torch", "sympy", "ruamel-yaml", "ruamel-yaml-clib"} <= there and "ruff" not in there
    assert "ruamel-yaml-clib" not in kit.closure(["ruamel.yaml"])


def test_parts_join_to_what_was_split(tmp_path, monkeypatch):
    monkeypatch.setattr(kit, "PART", 20_000)
    (tmp_path / "kit").mkdir()
    (tmp_path / "kit/weights").write_bytes(np.random.default_rng(0).bytes(50_000))
    parts = kit.split(tmp_path / "kit", "kit", tmp_path)
    assert len(parts) > 2 and all(part.stat().st_size <= 20_000 for part in parts)
    kit.write_join(tmp_path, parts)
    (tmp_path / "there").mkdir()
    subprocess.run([tmp_path / "join.sh"], cwd=tmp_path / "there", check=True)
    joined = tmp_path / "there/roads-kit/weights"
    assert joined.read_bytes() == (tmp_path / "kit/weights").read_bytes()
    parts[0].write_bytes(b"damaged")
    done = subprocess.run([tmp_path / "join.sh"], cwd=tmp_path / "there", capture_output=True, text=True)
    assert done.returncode and "kit.tar.00: FAILED" in done.stdout


def test_what_comes_home_is_small_and_finds_its_place(tmp_path):
    """Scores and metrics of one scale, its entries of dvc.lock, and no model."""
    there, home = clone(tmp_path / "there"), clone(tmp_path / "home")
    score = there / "runs/real/rouge/scores/sft"
    score.mkdir(parents=True)
    np.savez(score / "scores.npz", score=np.arange(3))
    arm = there / "runs/real/fig12/n375/s0"
    arm.mkdir(parents=True)
    np.savez(arm / "scores.npz", dpo=np.arange(2))
    dpo = there / "runs/real/rouge/dpo/s0"
    dpo.mkdir(parents=True)
    (dpo / "model.safetensors").write_bytes(b"0" * 1000)
    (dpo / "metrics.json").write_text("{}")
    (there / "reports/real").mkdir(parents=True)
    (there / "reports/real/fig11.json").write_text("{}")
    (there / "docs/search_real.csv").write_text("kind,seed\n")
    outs = {"sft@real": "runs/real/sft", "fig11@real": "reports/real/fig11.json", "sft@mini": "runs/mini/sft",
            "sft@real-tiny": "runs/real-tiny/sft"}
    entries = (f"  {name}:\n    cmd: there\n    outs:\n    - path: {out}\n" for name, out in outs.items())
    (there / "dvc.lock").write_text("schema: '2.0'\nstages:\n" + "".join(entries))
    (home / "dvc.lock").write_text("schema: '2.0'\nstages:\n  sft@mini:\n    cmd: here\n")
    command = [sys.executable, "scripts/kit.py"]
    subprocess.run([*command, "pack", "--scale", "real", tmp_path / "home.tar.xz"], cwd=there, env=ENV, check=True)
    with tarfile.open(tmp_path / "home.tar.xz") as tar:
        assert not [name for name in tar.getnames() if name.endswith("safetensors")]
    subprocess.run([*command, "unpack", tmp_path / "home.tar.xz"], cwd=home, env=ENV, check=True)
    assert np.load(home / "runs/real/rouge/scores/sft/scores.npz")["score"].tolist() == [0, 1, 2]
    assert np.load(home / "runs/real/fig12/n375/s0/scores.npz")["dpo"].tolist() == [0, 1]
    assert (home / "docs/search_real.csv").read_text(encoding="utf-8") == "kind,seed\n"
    assert (home / "reports/real/fig11.json").exists() and (home / "runs/real/rouge/dpo/s0/metrics.json").exists()
    assert "torch: 2." in (home / "reports/real/machine.txt").read_text(encoding="utf-8")
    stages = YAML(typ="safe").load((home / "dvc.lock").read_text(encoding="utf-8"))["stages"]
    assert {name: entry["cmd"] for name, entry in stages.items()} == {
        "sft@mini": "here", "sft@real": "there", "fig11@real": "there"}


def test_a_kit_takes_no_folder_of_others_and_no_model_of_a_hub(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/one.jpg").write_bytes(b"1")
    for args, said in ((["build", "--out", tmp_path / "photos"], "photos: it is there, and no kit"),
                       (["build", "--scale", "paper"], "paper: its model comes from a hub"),
                       (["build", "--scale", "reel"], "no block named 'reel'"),
                       (["unpack", ""], "ARCHIVE=.: expected the home.tar.xz"),
                       (["unpack", tmp_path / "no.tar.xz"], "no.tar.xz: expected the home.tar.xz")):
        command = [sys.executable, "scripts/kit.py", *args]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=ENV)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert (tmp_path / "photos/one.jpg").exists()


def test_an_archive_of_something_else_is_refused(tmp_path):
    with tarfile.open(tmp_path / "other.tar.xz", "w:xz") as tar:
        tar.add(__file__, "elsewhere/file")
    whole = (tmp_path / "other.tar.xz").read_bytes()
    (tmp_path / "cut.tar.xz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.tar.xz").write_bytes(b"no archive at all")
    for name, said in {"other": "no archive of a kit's run", "cut": "expected the whole home.tar.xz",
                       "text": "expected the whole home.tar.xz"}.items():
        done = subprocess.run([sys.executable, ROOT / "scripts/kit.py", "unpack", tmp_path / f"{name}.tar.xz"],
                              capture_output=True, text=True, env=ENV)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1


def test_a_gguf_file_is_parsed_once_until_it_changes(tmp_path, monkeypatch):
    parsed, file = [], tmp_path / "model.gguf"
    package = SimpleNamespace(GGUFReader=lambda path: parsed.append(path) or len(parsed),
                              get_tensor_name_map=lambda arch, layers: [arch, layers])
    monkeypatch.setitem(sys.modules, "gguf", package)
    hub._read_once.__wrapped__()
    file.write_text("one")
    assert [package.GGUFReader(file), package.GGUFReader(str(file))] == [1, 1]
    os.utime(file, ns=(0, 1))
    assert package.GGUFReader(file) == 2 and parsed == [str(file)] * 2
    names = package.get_tensor_name_map("llama", 30)
    assert names == ["llama", 30] and package.get_tensor_name_map("llama", 30) is names
