"""Files that people write, with a mistake made by a machine: each is read, or refused in one line that names it."""

import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT

from roads import active, config
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
