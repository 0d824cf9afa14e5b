"""Files that people write, with a mistake made by a machine: each is read, or refused in one line that names it."""

import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

from roads import active, arrays, config, model, schema, tldr
from roads.report import claims
from roads.stage import UserError

FILES = {name: (ROOT / name).read_text(encoding="utf-8") for name in
         ("params.yaml", "figures.yaml", "active.yaml", "claims.yaml")}
TOKENS = ["null", "true", "[]", "{}", "-1", "0", "1e400", ".nan", '"x"', "[1, [2]]", "{a: {b: c}}", "? x", "&a", "*a",
          "!!python/object:os.system x", "<<: *x", "2020-01-01", "0x1F", "1_000", '"\\u0000"', "'$(x)'", "~", "- 1",
          ":", "|", "é", "\t", "\x00", "9" * 24]
VALUE = re.compile(r"(?<=: )[^,{}\[\]]+|(?<=[\[ ])\w+(?=[,\]])|^ *[\w-]+(?=:)")


def mutated(text: str, rng: random.Random) -> str:
    """The text with a line gone, doubled, cut or moved, or with something odd in place of a value or a key."""
    lines = text.split("\n")
    at = rng.randrange(len(lines))
    line, other = lines[at], lines[rng.randrange(len(lines))]
    found = [part.span() for part in VALUE.finditer(line)] or [(len(line), len(line))]
    start, end = rng.choice(found)
    place = rng.randrange(len(line) + 1)
    lines[at : at + 1] = rng.choice([
        [], [line, other], [line[:place]], [" " * rng.randrange(6) + line.strip()],
        *[[line[:start] + rng.choice(TOKENS) + line[end:]] for _ in range(3)],
        [line[:place] + rng.choice(TOKENS) + line[place:]]])
    return "\n".join(lines)


def read(folder: Path) -> dict[str, Callable[[], object]]:
    """What reads the files."""
    params = folder / "params.yaml"
    return {"load": lambda: config.load(params), "an arm": lambda: config.load_scale("mini.horizon.k4", params),
            "active": lambda: active.load(params), "claims": lambda: claims.load(folder / "claims.yaml"),
            "set": lambda: active.write("tiny", None, params)}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_mistake_in_a_file_is_one_line(tmp_path, seed):
    rng, refused = random.Random(seed), 0
    for _ in range(20):
        name = rng.choice(list(FILES))
        text = mutated(FILES[name], rng)
        for other, whole in FILES.items():
            (tmp_path / other).write_text(text if other == name else whole, encoding="utf-8")
        for what, reads in read(tmp_path).items():
            try:
                reads()
            except UserError as error:
                said, refused = str(error), refused + 1
                assert re.fullmatch(rf"{re.escape(str(tmp_path))}/\w+\.yaml[:\d]*: .*", said), (what, said)
            assert not list(tmp_path.glob(".*"))  # nothing half-written
    assert refused > 10


# Files that other programs write, with bytes that are gone, doubled, cut or others


def damaged(whole: bytes, rng: random.Random) -> bytes:
    at, end = sorted(rng.randrange(len(whole) + 1) for _ in range(2))
    end = min(end, at + rng.choice([1, 4, 64, 10**6]))
    return rng.choice([whole[:at], whole[:at] + whole[end:], whole[:end] + whole[at:],
                       whole[:at] + rng.randbytes(max(1, min(8, end - at))) + whole[at + min(8, end - at):],
                       whole[:at] + bytes([whole[min(at, len(whole) - 1)] ^ 1 << rng.randrange(8)]) + whole[at + 1:]])


def rows_of(path: Path) -> list:
    return tldr.read_rows(path)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return model.load_policy(folder).state_dict()


def same(found: object, whole: object) -> bool:
    if isinstance(whole, dict):
        return found.keys() == whole.keys() and all(same(found[name], whole[name]) for name in whole)
    if isinstance(whole, torch.Tensor):
        return found.dtype == whole.dtype and torch.equal(found, whole)
    return np.array_equal(found, whole)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A small checkpoint, arrays, rows and a tokenizer, as stages and people leave them."""
    folder = tmp_path_factory.mktemp("written")
    size = schema.FromScratch(kind="new", hidden_size=8, layers=1, heads=1, max_positions=16)
    model.new_policy(size, 12, seed=0).save_pretrained(folder / "policy")
    np.savez(folder / "rows.npz", query=np.arange(24, dtype=np.int32).reshape(4, 6))
    lines = (ROOT / "data/tldr_sample/valid.jsonl").read_bytes().splitlines(keepends=True)[:4]
    (folder / "rows.jsonl").write_bytes(b"".join(lines))
    tldr.save_tokenizer(tldr.train_bpe(["the cat sat on the mat"], 270), folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_file_is_one_line_or_reads_as_it_was(tmp_path, written, seed):
    """Arrays and weights have checksums or shapes: what is read of them is what was written. Of texts every field is
    still one, and a tokenizer has EOS and padding where they belong."""
    rng, refused = random.Random(100 + seed), 0
    whole = {"arrays": arrays.load(written / "rows.npz"), "weights": weights_of(written / "policy")}
    for number in range(30):
        place = tmp_path / str(number)
        shutil.copytree(written, place)
        name = rng.choice(["rows.npz", "policy/model.safetensors", "policy/config.json", "rows.jsonl",
                           "tokenizer.json"])
        text = damaged((place / name).read_bytes(), rng)
        (place / name).write_bytes(text)
        try:
            if name == "rows.npz":
                assert same(arrays.load(place / name), whole["arrays"])
            elif name == "rows.jsonl":
                assert all(isinstance(field, str) for row in rows_of(place / name) for field in vars(row).values())
            elif name == "tokenizer.json":
                tokenizer = tldr.load_tokenizer(place / name)
                assert tokenizer.encode("the cat").ids
            else:
                found = weights_of(place / "policy")
                assert found.keys() == whole["weights"].keys()
        except UserError as error:
            refused += 1
            assert str(error).startswith(str(place)) and "\n" not in str(error), (name, str(error))
    assert refused > 5
