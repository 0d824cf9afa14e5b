"""A run of the sampler that is killed continues with the same bits."""

import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from conftest import ENV, ROOT

from roads import config, generate, kept, model, schema
from roads.stage import UserError

RUN = """
import sys, torch
from pathlib import Path
from roads import config, generate, schema
torch.set_num_threads(1)
generate.ROWS = 4
scale = config.load(Path(sys.argv[1]) / "params.yaml").scales["tiny"]
query = torch.arange(2, 18).repeat(300, 1)
found = generate.completions(Path("policy"), query, 12, schema.Sampling(n=4, temperature=1.0), 5, scale)
torch.save(found, "found.pt")
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_bits(tmp_path, monkeypatch, tiny):
    net = model.new_policy(schema.FromScratch(kind="new", hidden_size=64, layers=2, heads=2, max_positions=64), 20, 3)
    net.save_pretrained(tmp_path / "policy")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generate, "ROWS", 4)
    query = torch.arange(2, 18).repeat(300, 1)
    whole = generate.completions(tmp_path / "policy", query, 12, schema.Sampling(n=4, temperature=1.0), 5, tiny)
    scratch = tmp_path / "runs/.scratch"
    assert not list(scratch.iterdir())
    shutil.rmtree(kept.FOLDER)

    command = [sys.executable, "-c", RUN, ROOT]
    env = ENV | {"PYTHONPATH": str(ROOT / "src")}
    process = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL)
    while len(list(scratch.glob("sample-*.npy"))) < 20:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (tmp_path / "found.pt").exists()
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert "continues, " in done.stderr and " of 300 batches are done" in done.stderr
    assert torch.equal(torch.load(tmp_path / "found.pt"), whole) and not list(scratch.glob("sample-*-*[0-9].npy"))


def test_what_was_drawn_once_is_not_drawn_again(tmp_path, monkeypatch, tiny, policy, capsys):
    policy.save_pretrained(tmp_path / "policy")
    monkeypatch.chdir(tmp_path)
    passes, run = [], type(policy.base_model).forward
    monkeypatch.setattr(type(policy.base_model), "forward", lambda *args, **kw: passes.append(1) or run(*args, **kw))
    query, twice = torch.arange(2, 10).repeat(6, 1), []
    for folder in ("policy", "copy"):  # the weights count, not where they are
        twice.append(generate.completions(Path(folder), query, 6, schema.Sampling(n=3, temperature=1.0), 5, tiny))
        if folder == "policy":
            shutil.copytree("policy", "copy")
            first = len(passes)
    assert first > 0 and len(passes) == first and torch.equal(*twice)
    assert "sample s5: cached" in capsys.readouterr().err
    generate.completions(Path("copy"), query, 6, schema.Sampling(n=3, temperature=0.9), 5, tiny)
    assert len(passes) > first and len(list(kept.FOLDER.iterdir())) == 2

    monkeypatch.setattr(kept, "ROOM", 2 * next(kept.FOLDER.iterdir()).stat().st_size)
    generate.completions(Path("copy"), query, 6, schema.Sampling(n=3, temperature=1.0), 5, tiny)  # used last
    generate.completions(Path("copy"), query, 6, schema.Sampling(n=3, temperature=0.8), 5, tiny)
    assert len(list(kept.FOLDER.iterdir())) == 2
    before = len(passes)
    generate.completions(Path("copy"), query, 6, schema.Sampling(n=3, temperature=1.0), 5, tiny)
    assert len(passes) == before
    generate.completions(Path("copy"), query, 6, schema.Sampling(n=3, temperature=0.9), 5, tiny)
    assert len(passes) > before


def test_other_settings_weights_or_code_share_no_batch(tmp_path, policy, monkeypatch):
    query = torch.arange(2, 8)[None]
    policy.save_pretrained(tmp_path)
    keys = [generate._key(tmp_path, query, 5, 1.0), generate._key(tmp_path, query, 5, 0.9),
            generate._key(tmp_path, query + 1, 5, 1.0)]
    with torch.no_grad():
        policy.get_output_embeddings().weight[3] += 1
    policy.save_pretrained(tmp_path)
    keys.append(generate._key(tmp_path, query, 5, 1.0))
    (tmp_path / "other.py").write_text("a sampler that was changed")
    monkeypatch.setattr(generate, "generate_tree", types.SimpleNamespace(__file__=tmp_path / "other.py"))
    keys.append(generate._key(tmp_path, query, 5, 1.0))
    assert len(set(keys)) == 5


def test_samples_that_a_scale_lacks_are_one_line(tmp_path):
    from roads.stages import sample

    real = config.load_scale("real-cpu", ROOT / "params.yaml")
    with pytest.raises(UserError, match="^samples.best_of_n: the scale has none in params.yaml$"):
        sample.sample(tmp_path, tmp_path, tmp_path / "out", real, "best_of_n", 0)
