"""Arrays that stages read: what is cut, edited or made elsewhere is one line that names file and array."""

import re
from pathlib import Path

import numpy as np
import pytest

from roads import arrays, stage
from roads.stage import UserError
from roads.stages import rank, sample

GOOD = {"query": np.ones((3, 4), np.int32), "response": np.full((3, 2), 5, np.int32)}


def write(path: Path, **changes: object) -> Path:
    np.savez(path, **{name: array for name, array in (GOOD | changes).items() if array is not None})
    return path


def test_what_is_whole_is_read_as_it_is(tmp_path):
    flags = arrays.load(write(tmp_path / "flags.npz", consistent=np.array([True, False, True])))["consistent"]
    assert flags.tolist() == [True, False, True]
    found = arrays.tokens(write(tmp_path / "rows.npz"))
    assert found.keys() == GOOD.keys() and all(np.array_equal(found[name], GOOD[name]) for name in GOOD)
    assert arrays.tokens(write(tmp_path / "none.npz", **{name: array[:0] for name, array in GOOD.items()}), empty=True)


@pytest.mark.parametrize("changes, said", [
    ({"query": np.ones((3, 4))}, "array 'query': expected token ids .* got float64"),
    ({"query": np.full((3, 4), np.nan)}, "array 'query': expected finite numbers"),
    ({"query": np.ones((0, 4), np.int32)}, "array 'query': no rows"),
    ({"query": np.ones((2, 4), np.int32)}, "as many rows in each array, got 2 of query, 3 of response"),
    ({"query": np.array(["a", "b", "c"])}, "array 'query': expected finite numbers, got <U1"),
    ({"query": np.array([None, 1, 2])}, "not a whole .npz file .*allow_pickle"),
    ({"query": np.full((3, 4), -1, np.int32)}, "array 'query': expected token ids from 0 .* got -1 to -1"),
    ({"response": np.full((3, 2), 9, np.int32)}, "array 'response': .* from 0 to 8, which the model of .* got 9 to 9"),
    ({"response": None}, "no array 'response'; it has query"),
    ({"query": np.int32(3)}, "array 'query': no rows"),
])  # fmt: skip
def test_what_is_none_is_named(tmp_path, changes, said):
    stage.write_json(tmp_path / "config.json", {"vocab_size": 9})
    path = write(tmp_path / "rows.npz", **changes)
    with pytest.raises(UserError) as error:
        arrays.tokens(path, "query", "response", model=tmp_path)
    assert re.match(f"{re.escape(str(path))}: ", str(error.value)) and re.search(said, str(error.value))
    assert "\n" not in str(error.value)


def test_a_file_that_is_cut_anywhere_is_named(tmp_path):
    whole = write(tmp_path / "rows.npz").read_bytes()
    for cut in range(0, len(whole), 7):
        (tmp_path / "cut.npz").write_bytes(whole[:cut])
        with pytest.raises(UserError, match="cut.npz: "):
            arrays.tokens(tmp_path / "cut.npz")


def test_stages_refuse_ids_that_their_model_does_not_have(tmp_path, policy, tiny):
    """Else an index error, or on a GPU an assertion in a kernel."""
    policy.save_pretrained(tmp_path / "policy")
    write(tmp_path / "prompts.npz", query=np.full((3, 4), 20, np.int32))  # it has 20, the last is 19
    with pytest.raises(UserError, match=r"prompts.npz: array 'query': .* from 0 to 19, .*got 20 to 20"):
        sample.sample(tmp_path / "policy", tmp_path / "prompts.npz", tmp_path / "out", tiny, "online", 0)
    (tmp_path / "drawn").mkdir()
    np.savez(tmp_path / "drawn/completions.npz", query=GOOD["query"], completions=np.full((3, 2, 4), 1.5))
    with pytest.raises(UserError, match=r"completions.npz: array 'completions': expected token ids"):
        rank.rank(tmp_path / "drawn", tmp_path / "out", tiny, "human", data=tmp_path)
    assert not (tmp_path / "out").exists()
