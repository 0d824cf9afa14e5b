"""The vLLM sampler, and the judge's client against vLLM's own server. `make test-vllm` runs all of it on the CPU."""

import importlib.util
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from conftest import ENV, ROOT

from roads import config, generate, generate_vllm, model, schema, stage
from roads.judge import client
from roads.stage import UserError
from roads.stages import sample
from roads.tldr import EOS, PAD

VLLM = importlib.util.find_spec("vllm") is not None
needs_vllm = pytest.mark.skipif(not VLLM, reason="vLLM has an environment of its own: make test-vllm")
HERE, ELSEWHERE = ("gpu", "cpu") if torch.cuda.is_available() else ("cpu", "gpu")
COMPUTE = schema.Compute(device=HERE, precision="fp32", attention="sdpa", sampler="vllm")
VOCAB, LENGTH = 20, 6
WARM = 2.0  # the highest temperature that vLLM takes; the policy's logits have a standard deviation of some 4


def saved(path, heads=2):
    """A policy of random weights in a folder, so sharp that T = 0.01 leaves one token."""
    size = schema.FromScratch(kind="new", hidden_size=64, layers=2, heads=heads, max_positions=64)
    net = model.new_policy(size, VOCAB, 3)
    with torch.no_grad():
        net.get_output_embeddings().weight *= 24
    net.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("policy") / "policy")


@pytest.fixture(scope="module")
def prompts():
    """[8, 9], padded left, of unequal lengths."""
    found = torch.randint(2, VOCAB, (8, 9), generator=torch.Generator().manual_seed(1))
    for i, padding in enumerate((0, 3, 8, 1, 0, 5, 2, 7)):
        found[i, :padding] = PAD
    return found.int()


@pytest.fixture(scope="module")
def scale():
    block = config.load(ROOT / "params.yaml").scales["tiny"]
    return block.model_copy(update={"compute": COMPUTE})


@pytest.fixture(scope="module")
def llm(policy, scale):
    with generate_vllm.engine(policy, 50 + LENGTH, scale) as llm:
        yield llm


@pytest.fixture
def loaded(llm, monkeypatch):
    """Stages take the engine that is up already: a second one would take half a minute."""
    monkeypatch.setattr(generate_vllm, "engine", lambda *_: nullcontext(llm))


@pytest.mark.skipif(VLLM, reason="vLLM is here")
def test_without_vllm_one_line_says_so(policy, prompts, scale):
    with pytest.raises(UserError, match="needs the package vllm, which the image has; run there, or set tree"):
        generate.completions(policy, prompts, LENGTH, schema.Sampling(n=2, temperature=1.0), 0, scale)


@needs_vllm
def test_what_vllm_cannot_do_is_said_before_it_loads(tmp_path, policy, scale):
    for folder, width, block, message in (
            (saved(tmp_path / "narrow", heads=4), 15, scale, "heads are 16 wide and vLLM takes 32 or more"),
            (policy, 65, scale, "take 65 tokens and the model has positions for 64"),
            (policy, 15, scale.model_copy(update={"compute": COMPUTE.model_copy(update={"device": ELSEWHERE})}),
             f"vllm finds {HERE} here and compute.device is {ELSEWHERE}")):
        with pytest.raises(UserError, match=message), generate_vllm.engine(folder, width, block):
            pass


@needs_vllm
def test_cold_tokens_are_those_of_transformers(llm, policy, prompts):
    found, net = generate_vllm.complete(llm, prompts, 3, LENGTH, 0.01, 0), model.load_policy(policy).eval()
    assert torch.equal(found, generate.complete(net, prompts, 3, LENGTH, 0.01, torch.Generator().manual_seed(0)))
    for query, completion in zip(prompts, found[:, 0], strict=True):  # and of transformers' own loop
        query = query[query != PAD][None].long()
        greedy = net.generate(query, attention_mask=torch.ones_like(query), do_sample=False, max_new_tokens=LENGTH - 1,
                              bad_words_ids=[[PAD]])[0, query.shape[1] :]
        tokens = completion[completion != PAD].tolist()
        assert greedy.tolist() == (tokens if len(greedy) == len(tokens) else tokens[:-1])


@needs_vllm
@pytest.mark.parametrize("temperature", [0.1, WARM])
def test_completions_end_in_one_eos(llm, prompts, temperature):
    found = generate_vllm.complete(llm, prompts, 25, LENGTH, temperature, 7)
    assert found.shape == (8, 25, LENGTH) and found.dtype == torch.int32
    lengths = (found != PAD).sum(2)
    for row in found.view(-1, LENGTH):
        end = row.tolist().index(EOS)
        assert (row[end + 1 :] == PAD).all() and not (row[:end] == PAD).any()
    assert lengths.max() == LENGTH and (temperature < WARM or lengths.min() < 3)


@needs_vllm
def test_a_completion_follows_from_its_seed_alone(llm, prompts):
    found = generate_vllm.complete(llm, prompts, 25, LENGTH, WARM, 100)
    assert torch.equal(found[3:], generate_vllm.complete(llm, prompts[3:], 25, LENGTH, WARM, 100 + 3 * 25))
    assert torch.equal(found[0, 20:], generate_vllm.complete(llm, prompts[:1], 5, LENGTH, WARM, 120)[0])
    assert not torch.equal(found, generate_vllm.complete(llm, prompts, 25, LENGTH, WARM, 100 + 8 * 25))
    # vLLM gives completion k of a prompt its seed + k: prompts whose seeds are neighbours would share their draws.
    twice = generate_vllm.complete(llm, prompts[:1].repeat(2, 1), 25, LENGTH, WARM, 0)
    assert (twice[0, 1:] == twice[1, :-1]).all(1).float().mean() < 0.5


@needs_vllm
def test_more_prompts_than_run_at_once(llm):
    """10,000 tokens of prompts: vLLM takes some 4,000 in a step, and must not cut one in two."""
    query = torch.randint(2, VOCAB, (200, 50), generator=torch.Generator().manual_seed(2)).int()
    found = generate_vllm.complete(llm, query, 1, LENGTH, WARM, 0)
    assert torch.equal(found[150:], generate_vllm.complete(llm, query[150:], 1, LENGTH, WARM, 150))


@needs_vllm
def test_tokens_follow_the_softmax(llm, policy, prompts):
    """Of 10,000 completions the first two tokens, against their exact probabilities."""
    from scipy.stats import chisquare

    temperature, n = 0.8 * WARM, 2500
    net, query = model.load_policy(policy).eval(), prompts[4].long()
    drawn = generate_vllm.complete(llm, prompts[4:5].repeat(4, 1), n, 4, temperature, 0).view(-1, 4).long()
    with torch.no_grad():
        texts = torch.cat([query.repeat(VOCAB, 1), torch.arange(VOCAB)[:, None]], 1)
        logits = net(texts).logits[:, -2:].double() / temperature
    logits[..., PAD] = -torch.inf
    first, second = logits.softmax(2).unbind(1)
    joint = first[0][:, None] * second
    joint[EOS], joint[EOS, PAD] = 0, first[0, EOS]
    seen = torch.bincount(drawn[:, 0] * VOCAB + drawn[:, 1], minlength=VOCAB**2).double()
    expected = joint.flatten() * len(drawn)
    rare = expected < 5
    assert not seen[expected == 0].any()
    seen, expected = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (seen, expected))
    assert len(seen) > 50 and chisquare(seen, expected).pvalue > 0.001


@needs_vllm
def test_a_stage_that_was_stopped_goes_on_with_the_same_tokens(loaded, tmp_path, monkeypatch, policy, prompts, scale):
    monkeypatch.setattr(stage, "SCRATCH", tmp_path / "scratch")
    np.savez(tmp_path / "prompts.npz", query=prompts, response=np.zeros((8, LENGTH), np.int32))
    settings = scale.samples.online

    def run(out):
        sample.sample(policy, tmp_path / "prompts.npz", tmp_path / out, scale, "online", 2)
        return np.load(tmp_path / out / "completions.npz")["completions"]

    whole, calls, complete = run("whole"), [], generate_vllm.complete

    def stopped(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return complete(*args)

    monkeypatch.setattr(generate_vllm, "ROWS", 2 * settings.n)
    monkeypatch.setattr(generate_vllm, "complete", stopped)
    with pytest.raises(KeyboardInterrupt):
        run("parts")
    assert not (tmp_path / "parts").exists() and len(list((tmp_path / "scratch").iterdir())) == 2
    assert np.array_equal(run("parts"), whole) and len(calls) == 3 + 2
    assert whole.shape == (8, settings.n, LENGTH) and not list((tmp_path / "scratch").iterdir())


# The judge's side: vLLM's server in front of a policy with a tokenizer and a chat template


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """URL and model of vLLM's OpenAI-compatible server."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("served") / "tiny"
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(["Which summary is better? A or B."] * 9, 280, special_tokens=["<|endoftext|>", "<|pad|>"],
                            show_progress=False)
    net = model.new_policy(schema.FromScratch(kind="new", hidden_size=64, layers=2, heads=2, max_positions=256), 280, 3)
    net.save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>", pad_token="<|pad|>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    tokenizer.save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--served-model-name",
               "tiny", "--dtype", "float32", "--enforce-eager", "--host", "127.0.0.1", "--port", str(port)]
    log = folder.with_name("server.log")
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=ENV | generate_vllm.ENVIRONMENT, stdout=out, stderr=out,
                                   start_new_session=True)
    try:
        deadline = time.monotonic() + 300
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@needs_vllm
def test_a_real_server_answers_the_openai_client(server):
    from openai import OpenAI

    plain = OpenAI(base_url=server, api_key="none", max_retries=0)
    assert [served.id for served in plain.models.list()] == ["tiny"]
    ask = {"model": "tiny", "messages": [{"role": "user", "content": "Which is better?"}], "max_tokens": 8,
           "temperature": 0.0}
    one, two = (plain.chat.completions.create(**ask) for _ in range(2))
    assert one.choices[0].message.content == two.choices[0].message.content
    assert one.usage.prompt_tokens > 5 and 1 <= one.usage.completion_tokens <= 8


@needs_vllm
def test_a_real_server_answers_the_judges_client_once(server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", server)
    judge = schema.LLMJudge(kind="openai", model="tiny", prompt="summary", temperature=0.0, max_tokens=8)
    spending = schema.Spending(budget=1.0, input=1.0, output=1.0, batch_discount=1.0, concurrency=2, timeout=60.0,
                               retries=2)
    messages = ["Which is better?", "A or B?", "Which is better?"]
    first, again = (client.answers(messages, judge, spending, cache=tmp_path / "judge.sqlite", readable=str)
                    for _ in range(2))
    assert first == again and first[0] == first[2]
    book = sqlite3.connect(tmp_path / "judge.sqlite")
    assert book.execute("SELECT count(*), min(prompt_tokens) > 5, min(answered_by) FROM answers").fetchone() == (
        2, 1, "tiny")
