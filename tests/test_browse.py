"""What the policies wrote, on a page: the right completion beside the right prompt, with the judge's verdict."""

import html
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ENV, ROOT
from tokenizers import Tokenizer, models, pre_tokenizers

from roads import stage, tldr
from roads.report import browse

WORDS = [*tldr.SPECIAL, "TL;DR:", *(f"w{i}" for i in range(40)), "<b>"]


@pytest.fixture
def home(tmp_path):
    """Twenty prompts; DPO wins where the prompt's number is even, Online(SFT) ties throughout, and ROUGE-L is known."""
    home = tmp_path / "runs/tiny"
    tokenizer = Tokenizer(models.WordLevel(dict(zip(WORDS, range(len(WORDS)), strict=True)), unk_token="<|padding|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(tldr.SPECIAL)
    number, n = np.arange(20), 20
    for task, policies in (("human", {"dpo/s0": 1 - number % 2, "online_sft/s0": np.full(n, 0.5)}),
                           ("rouge", {"sft": np.linspace(0, 1, n)})):
        (home / "data").mkdir(parents=True, exist_ok=True)
        query = np.stack([np.full(n, tldr.PAD), 3 + number, np.full(n, 2)], 1)
        np.savez(home / f"data/test_{task}.npz", query=query, response=np.tile([30, tldr.EOS, tldr.PAD], (n, 1)))
        for k, (policy, score) in enumerate(policies.items()):
            for kind in ("completions", "scores"):
                (home / task / kind / policy).mkdir(parents=True)
            completions = np.stack([np.full(n, 24 + k), np.full(n, len(WORDS) - 1), np.full(n, tldr.EOS)], 1)
            np.savez(home / task / "completions" / policy / "completions.npz", query=query,
                     completions=completions[:, None])
            more = {"quality": number / 10} if task == "human" else {}
            np.savez(home / task / "scores" / policy / "scores.npz", score=score, tokens=np.full((n, 2), 3), **more)
    tldr.save_tokenizer(tokenizer, home / "data")
    return home


def test_every_line_is_of_its_prompt(home, tmp_path):
    page = browse.browse(home, tmp_path / "reports", prompts=8).read_text(encoding="utf-8")
    assert page == browse.browse(home, tmp_path / "again", prompts=8).read_text(encoding="utf-8")
    articles = re.findall(r"<article.*?</article>", page, re.S)
    assert len(articles) == 16 and '<option>Fig. 3</option><option>Fig. 11</option>' in page
    for article in articles:
        figure, i = re.search(r"<h2>(.*), prompt (\d+)</h2>", article).groups()
        assert f">w{i} TL;DR:</p>" in article and "<dd>w27</dd>" in article  # token 30
        lines = re.findall(r'<dd data-policy="(.*?)" data-kind="(.*?)">(.*?)<br>\n<small>(.*?)</small>', article)
        told = [(name, kind, text, html.unescape(re.sub("<.*?>", "", line))) for name, kind, text, line in lines]
        if figure == "Fig. 3":
            won = ("win", "won in both orders") if int(i) % 2 == 0 else ("loss", "lost in both orders")
            ends = f", 3 tokens, quality +{int(i) / 10:.2f}"
            assert told == [("DPO", won[0], "w21 &lt;b&gt;", won[1] + ends),
                            ("Online(SFT)", "tie", "w22 &lt;b&gt;", "a tie" + ends)]
        else:
            assert told == [("SFT", "", "w21 &lt;b&gt;", f"ROUGE-L {int(i) / 19:.3f}, 3 tokens")]


def test_what_does_not_fit_together_is_said(home, tmp_path):
    with pytest.raises(stage.UserError, match="no completions; `make fig3` or `make fig11` draws them"):
        browse.browse(tmp_path, tmp_path / "reports")
    np.savez(home / "human/scores/dpo/s0/scores.npz", score=np.ones(3), tokens=np.ones((3, 2)))
    done = subprocess.run([sys.executable, "-m", "roads.report.browse", str(home), str(tmp_path / "reports")], env=ENV,
                          cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 2 and "20 completions, 3 scores and 20 prompts" in done.stderr
    assert not (tmp_path / "reports/browse.html").exists()
