"""The client of an outside judge, against a real server that fails in every way of fake_openai.py."""

import os
import runpy
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ENV, ROOT
from fake_openai import Fake

from roads import tldr
from roads.judge import batches, client, endpoint, ledger, protocol
from roads.stage import UserError

KEY = "sk-a-secret-of-this-test"
JUDGE = SimpleNamespace(kind="openai", model="gpt-4o-2024-08-06", prompt="summary", about="post", temperature=0.0,
                        max_tokens=100, label_orders=2)
BATCH = SimpleNamespace(**vars(JUDGE) | {"kind": "batch"})
SPENDING = SimpleNamespace(budget=100.0, input=2.5, output=10.0, batch_discount=0.5, concurrency=8, timeout=20.0,
                           retries=4, batch_requests=50_000)


def spending(**changes):
    return SimpleNamespace(**vars(SPENDING) | changes)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(endpoint.random, "uniform", lambda low, high: 0.05)  # of the pauses between attempts


@pytest.fixture
def cache(tmp_path, monkeypatch):
    path = tmp_path / "judge.sqlite"
    monkeypatch.chdir(tmp_path)
    yield path
    assert KEY.encode() not in b"".join(file.read_bytes() for file in tmp_path.glob("judge.sqlite*"))


@pytest.fixture
def serve(monkeypatch):
    """serve(faults, ...): a server that OPENAI_BASE_URL names, gone after the test."""
    fakes = []

    def start(*args, **kwargs):
        fakes.append(Fake(*args, **kwargs))
        monkeypatch.setenv("OPENAI_BASE_URL", fakes[-1].url)
        return fakes[-1].__enter__()

    yield start
    for fake in fakes:
        fake.__exit__()


def rows(cache: Path, what: str = "*", where: str = "true") -> list[tuple]:
    with sqlite3.connect(cache) as db:
        return db.execute(f"SELECT {what} FROM answers WHERE {where}").fetchall()


def dollars(cache: Path) -> float:
    kept = sqlite3.connect(cache).execute("SELECT total(dollars) FROM spent").fetchone()[0]
    assert kept == pytest.approx(rows(cache, "total(dollars)")[0][0])
    return kept


def process(cache: Path, count: int, kind: str = "openai", **changes) -> subprocess.Popen:
    """Another process that asks `message 0`, `message 1`, ... and prints what it is told."""
    code = f"""
import sys
from pathlib import Path
from types import SimpleNamespace as N
from roads import stage
from roads.judge import client
judge, spending = N(**{vars(JUDGE) | {"kind": kind}!r}), N(**{vars(SPENDING) | changes!r})
messages = [f"message {{i}}" for i in range({count})]
stage.main(lambda: print("\\n".join(client.answers(messages, judge, spending, Path({str(cache)!r}), poll=0.05))))
"""
    env = ENV | {"PYTHONPATH": str(ROOT / "src"), "OPENAI_API_KEY": KEY, "OPENAI_LOG": "debug",
                 "OPENAI_BASE_URL": os.environ["OPENAI_BASE_URL"]}
    return subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True)


def finish(running: subprocess.Popen) -> list[str]:
    out, err = running.communicate(timeout=60)
    assert running.returncode == 0, err[-2000:]
    assert KEY not in out + err
    return out.splitlines()


def wait_for(condition) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


MESSAGES = [f"message {i}" for i in range(60)]
SAID = [f"You said: {message}" for message in MESSAGES]


def test_answers_come_in_order_through_every_fault_and_each_billed_one_is_a_row(cache, serve):
    fake = serve(["429", "ok", "500", "cut", "html", "empty", "503", "429", "ok", "hang", "cut", "half", "nothing"])
    twice = MESSAGES + MESSAGES[:5]  # equal messages are one question
    assert client.answers(twice, JUDGE, spending(timeout=1.0), cache) == SAID + SAID[:5]
    assert len(fake.billed) == len(rows(cache)) == 60 + 6  # cut, cut, hang, half, nothing and empty were paid in vain
    assert len(rows(cache, where="answer IS NULL")) == 5 and len(rows(cache, where="answer = ''")) == 1
    assert sum(fake.asked.values()) == 60 + 6 + 5 and fake.most_at_once <= 8
    assert fake.dollars(2.5, 10) < dollars(cache) + 1e-9
    before = sum(fake.asked.values())
    assert client.answers(MESSAGES[::-1], JUDGE, SPENDING, cache) == SAID[::-1]
    assert sum(fake.asked.values()) == before


@pytest.mark.parametrize("faults", [["html"] * 3, ["said"] * 3, ["nothing"] * 3])
def test_a_200_without_an_answer_is_none_and_the_account_is_the_bill(cache, serve, faults):
    fake = serve(faults)
    assert client.answers(MESSAGES[:9], JUDGE, SPENDING, cache) == SAID[:9]
    assert len(rows(cache, where="answer IS NOT NULL")) == 9 and not rows(cache, where="answer = ''")
    assert sum(fake.asked.values()) == 9 + 3 and dollars(cache) == pytest.approx(fake.dollars(2.5, 10))


def test_an_outage_of_a_second_loses_no_answer(cache, serve, monkeypatch):
    monkeypatch.setattr(endpoint.random, "uniform", lambda low, high: 0.5)
    fake = serve(outage=1.0)
    assert client.answers(MESSAGES, JUDGE, SPENDING, cache) == SAID
    assert len(fake.billed) == len(rows(cache)) == 60 and dollars(cache) == pytest.approx(fake.dollars(2.5, 10))


@pytest.mark.parametrize("fault, said", [
    ("html", r"failed 5 times in a row: 200 without an answer \(<html>a proxy is here</html>\); what was answered"),
    ("said", r"failed 5 times in a row: 200 without an answer \(\{'message': 'try again'\}\)"),
    ("nothing", "failed 5 times in a row: 200 without an answer, and billed"),
    ("half", "failed 5 times in a row: the answer was cut"),
])  # fmt: skip
def test_an_outage_that_lasts_stops_the_run(cache, serve, fault, said):
    fake = serve([fault] * 99)
    with pytest.raises(UserError, match=said) as error:
        client.answers(MESSAGES, JUDGE, spending(concurrency=1), cache)
    assert "\n" not in str(error.value) and sum(fake.asked.values()) == 5  # 4 retries
    assert not rows(cache, where="answer IS NOT NULL") and len(rows(cache)) == len(fake.billed)
    if fault != "half":  # what that took is not told
        assert dollars(cache) == pytest.approx(fake.dollars(2.5, 10))


def test_the_price_is_that_of_the_tokens_and_another_request_is_another_answer(cache, serve):
    fake = serve()
    client.answers(MESSAGES, JUDGE, SPENDING, cache)
    assert dollars(cache) == pytest.approx(fake.dollars(2.5, 10))
    for other in ({"temperature": 1.0}, {"max_tokens": 7}, {"model": "mine"}):
        client.answers(MESSAGES[:1], SimpleNamespace(**vars(JUDGE) | other), SPENDING, cache)
    client.answers(MESSAGES[:1], JUDGE, SPENDING, cache, draw=1)
    assert fake.asked[MESSAGES[0]] == 5
    assert "gpt-4o-2024-08-06: $0.00, 63 answers" in ledger.status(cache) and "mine: " in ledger.status(cache)


def test_all_answers_need_neither_server_nor_key(cache, serve, monkeypatch):
    serve()
    client.answers(MESSAGES, JUDGE, SPENDING, cache)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://nowhere.invalid/v1")
    monkeypatch.delenv("OPENAI_API_KEY")
    assert client.answers(MESSAGES, BATCH, SPENDING, cache) == SAID


def test_retry_after_is_waited_for(cache, serve):
    fake = serve(["429"], retry_after="0.7")
    client.answers(MESSAGES[:1], JUDGE, SPENDING, cache)
    (_, first), (_, second) = fake.times
    assert 0.7 <= second - first < 2


def test_what_cannot_be_read_is_asked_twice_more_and_then_kept(cache, serve):
    fake = serve(["garbage", "refusal", "empty", "filter", "filter", "filter", "garbage", "ok"])
    one = spending(concurrency=1)
    messages = [protocol.fill("summary", post=f"post {i}", summarya="long one", summaryb="short") for i in range(3)]
    said = client.answers(messages, JUDGE, one, cache, readable=protocol.parse)
    assert [protocol.parse(answer) for answer in said] == ["", "", "A"]
    assert [fake.asked[message] for message in messages] == [3, 3, 2]
    stored = rows(cache, "sample, answer", f"key = '{ledger.key_of(messages[0], JUDGE)}'")
    assert stored == [(0, "They are both fine summaries."), (1, "I can't help with that."), (2, "")]
    assert rows(cache, "total(dollars)", f"key = '{ledger.key_of(messages[1], JUDGE)}'") == [(0.0,)]  # not billed
    assert client.answers(messages, JUDGE, one, cache, readable=protocol.parse) == said
    assert sum(fake.asked.values()) == 8


def test_the_budget_is_never_passed_and_a_larger_one_goes_on(cache, serve):
    short = SimpleNamespace(**vars(JUDGE) | {"max_tokens": 10})
    # Every answer costs what it may cost at most, but for fractions of a token.
    fake = serve(["ok", "cut", "ok", "429"], delay=0.01, tokens=lambda prompt, _: (len(prompt) // 3 + 16, 10))
    worst = ledger.worst_price(MESSAGES[0], short, SPENDING)
    for budget in (12.9 * worst, 12.9 * worst, 25.9 * worst):  # a restart is no new budget
        with pytest.raises(UserError, match=r"^spent \$0.0\d+ of \$0.0\d+ on gpt-4o.*raise spending.budget"):
            client.answers(MESSAGES, short, spending(budget=budget), cache)
        assert budget - 2 * worst < fake.dollars(2.5, 10) < dollars(cache) + 1e-9 < budget
        assert not rows(cache, where=f"answer IS NULL AND until > {time.time()}")  # none was left under way
    assert len(fake.billed) == len(rows(cache)) == 25
    assert client.answers(MESSAGES, short, SPENDING, cache) == SAID
    assert len(fake.billed) == len(rows(cache)) == 61


@pytest.mark.slow
def test_kill_9_loses_no_answer_and_pays_for_none_twice(cache, serve):
    fake = serve(delay=0.02)
    running = process(cache, 60, concurrency=4, timeout=2.0)
    wait_for(lambda: len(fake.billed) > 20)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    stored = rows(cache, "key", "answer IS NOT NULL")
    fake.delay = 0
    assert client.answers(MESSAGES, JUDGE, spending(timeout=2.0), cache) == SAID
    lost = rows(cache, "key", "answer IS NULL")  # they were under way; the server may have billed them
    again = {ledger.key_of(prompt, JUDGE) for prompt, n in fake.asked.items() if n > 1}
    assert len(stored) >= 15 and len(lost) <= 4 and again <= {key for key, in lost} and not again & set(stored)
    assert len(rows(cache, where="answer IS NOT NULL")) == 60 and len(fake.billed) <= len(rows(cache)) == 60 + len(lost)
    assert fake.dollars(2.5, 10) < dollars(cache) + 1e-9


def test_two_processes_share_the_answers_and_the_budget(cache, serve):
    fake = serve(delay=0.02)
    both = [process(cache, 60, concurrency=3) for _ in range(2)]
    assert [finish(running) for running in both] == [SAID, SAID]
    assert len(fake.billed) == len(rows(cache)) == 60 and set(fake.asked.values()) == {1}
    assert dollars(cache) == pytest.approx(fake.dollars(2.5, 10))


@pytest.mark.parametrize("faults, changes, said, asked", [
    (["401"], {}, r"401, OPENAI_API_KEY may not do this", 1),
    (["404"], {}, r"404, no such model or path \(model_not_found .fake., model gpt-4o-2024-08-06, key \.\.\.\)", 1),
    (["quota"], {}, r"insufficient_quota; add money", 1),
    (["400"], {}, r"400 invalid_value", 1),
    (["model"], {}, r"asked for gpt-4o-2024-08-06, but 127.* answered as 'another-model-2020-01-01'", 1),
    (["500"] * 9, {}, r"failed 5 times in a row: 500 server_error", 5),
    (["cut"] * 9, {"retries": 1}, r"failed 2 times in a row: the connection was cut", 2),
    (["hang"] * 9, {"retries": 0, "timeout": 0.3}, r"failed 1 times in a row: no answer in time.*spending.timeout", 1),
    (["429"], {}, r"asks to wait 1000 s", 1),
])  # fmt: skip
def test_what_no_retry_mends_is_one_line(cache, serve, faults, changes, said, asked):
    fake = serve(faults, retry_after="1000")
    with pytest.raises(UserError, match=said) as error:
        client.answers(MESSAGES, JUDGE, spending(concurrency=1, **changes), cache)
    assert KEY not in str(error.value) and "\n" not in str(error.value) and f":{fake.port}" in str(error.value)
    assert sum(fake.asked.values()) == asked and len(rows(cache)) == len(fake.billed)


def test_an_error_lets_the_others_under_way_end(cache, serve):
    fake = serve(["ok", "ok", "ok", "401"], delay=0.2)
    with pytest.raises(UserError, match="401"):
        client.answers(MESSAGES, JUDGE, spending(concurrency=4), cache)
    assert len(fake.billed) == len(rows(cache, where="answer IS NOT NULL")) == 3


def test_no_key_no_endpoint_and_a_wrong_key(cache, serve, monkeypatch):
    serve(key="sk-another")
    with pytest.raises(UserError, match="401, OPENAI_API_KEY") as error:
        client.answers(MESSAGES, JUDGE, SPENDING, cache)
    assert KEY not in str(error.value)
    with socket.socket() as taken:  # bound, not listening
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://user:{KEY}@127.0.0.1:{taken.getsockname()[1]}/v1")
        with pytest.raises(UserError, match=r"^127\.0\.0\.1:\d+ failed 2 times in a row: no connection") as error:
            client.answers(MESSAGES, JUDGE, spending(retries=1), cache)
    assert KEY not in str(error.value) and not rows(cache)
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.delenv("OPENAI_BASE_URL")
    with pytest.raises(UserError, match="OPENAI_API_KEY is not set, and api.openai.com needs it"):
        client.answers(MESSAGES, JUDGE, SPENDING, cache)
    serve()  # one of this machine needs none
    assert client.answers(MESSAGES[:3], JUDGE, SPENDING, cache) == SAID[:3]


@pytest.mark.parametrize("url", ["127.0.0.1:8000/v1", "http://127.0.0.1:port/v1", "file:///v1", "http://[::1/v1",
                                 "http://127.0.0.1:80\n/v1", "http://a host/v1"])
def test_an_endpoint_that_is_no_url(cache, monkeypatch, url):
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    with pytest.raises(UserError, match="^OPENAI_BASE_URL: expected http"):
        client.answers(MESSAGES, JUDGE, SPENDING, cache)


@pytest.mark.parametrize("key", ["sk-a\nX-Header: b", "sk-ключ", "sk-a\x00"])
def test_a_key_that_no_request_can_carry(cache, serve, monkeypatch, key):
    fake = serve()
    with monkeypatch.context() as patched:
        patched.setattr(endpoint.os, "environ", endpoint.os.environ | {"OPENAI_API_KEY": key})
        with pytest.raises(UserError, match="^OPENAI_API_KEY: expected .* in one line") as error:
            client.answers(MESSAGES, JUDGE, SPENDING, cache)
    assert key not in str(error.value) and not fake.asked and not rows(cache)


@pytest.mark.parametrize("name", ["OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_CUSTOM_HEADERS"])
def test_other_headers_of_the_environment_too(cache, serve, monkeypatch, name):
    fake = serve()
    monkeypatch.setenv(name, "a\nb: ключ")
    with pytest.raises(UserError, match=f"^{name}: expected .* in one line"):
        client.answers(MESSAGES, JUDGE, SPENDING, cache)
    assert not fake.asked and not rows(cache)
    if name == "OPENAI_CUSTOM_HEADERS":  # a line each
        monkeypatch.setenv(name, "X-One: a\nX-Two: b")
        assert client.answers(MESSAGES[:2], JUDGE, SPENDING, cache) == SAID[:2]


def test_certificates_that_are_not_there_are_one_line(cache, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "https://judge.example/v1")
    monkeypatch.setenv("SSL_CERT_FILE", "/no/such/file")
    with pytest.raises(UserError, match="^SSL_CERT_FILE: .*; expected a file of certificates"):
        client.answers(MESSAGES, JUDGE, SPENDING, cache)
    assert not rows(cache)


@pytest.mark.parametrize("wrong, said", [
    ("https://127.0.0.1:{port}/v1", "whether it is http or https"),
    ("http://no-such-host.invalid/v1", "no connection"),
    ("http://127.0.0.1:1/v1", "no connection"),
])  # fmt: skip
def test_a_wrong_endpoint_is_one_line_within_five_seconds(cache, serve, monkeypatch, wrong, said):
    fake = serve()
    monkeypatch.setenv("OPENAI_BASE_URL", wrong.format(port=fake.port))
    start = time.monotonic()
    with pytest.raises(UserError, match=said) as error:
        endpoint.reachable(JUDGE)
    assert time.monotonic() - start < 5 and "\n" not in str(error.value) and not fake.asked
    if "https" in wrong:  # no retry mends it
        with pytest.raises(UserError, match=said):
            client.answers(MESSAGES, JUDGE, SPENDING, cache)
        assert not rows(cache) and time.monotonic() - start < 5


def test_a_proxy_is_for_others_than_this_machine(cache, serve, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1")
    serve()
    assert client.answers(MESSAGES[:3], JUDGE, SPENDING, cache) == SAID[:3]
    monkeypatch.setenv("OPENAI_BASE_URL", "http://judge.example/v1")
    monkeypatch.delenv("HTTP_PROXY")
    with pytest.raises(UserError, match="^the proxy of HTTPS_PROXY or ALL_PROXY: .*; take an http:// proxy, or name"):
        client.answers(MESSAGES[3:], JUDGE, SPENDING, cache)


@pytest.mark.parametrize("host, local", [
    ("localhost:80", True), ("judge", True), ("10.1.2.3:8000", True), ("[::1]", True),
    ("[::1]:8000", True), ("[2606:4700::1]", False),
    ("api.openai.com", False), ("8.8.8.8:80", False)])  # fmt: skip
def test_a_local_endpoint(host, local):
    assert endpoint._local(host) == local


def test_an_unusable_cache_is_named(tmp_path):
    (tmp_path / "x").write_text("no database " * 100)
    with pytest.raises(UserError, match=r"x: file is not a database; expected the SQLite file"):
        client.answers(MESSAGES, JUDGE, SPENDING, tmp_path / "x")


def test_a_batch_asks_again_what_failed_at_the_discount(cache, serve):
    fake = serve(["500", "ok", "expired", "drop", "garbage", "filter"])
    messages = [protocol.fill("summary", post=f"post {i}", summarya="long one", summaryb="short") for i in range(20)]
    said = client.answers(messages, BATCH, SPENDING, cache, readable=protocol.parse, poll=0.02)
    assert [protocol.parse(answer) for answer in said] == ["A"] * 20  # the filtered one was asked for twice more
    assert [len(file.splitlines()) for name, file in fake.files.items() if name[5:].isdigit()] == [20, 5]
    assert len(fake.billed) == 21 == len(rows(cache, where="answer != ''"))  # the garbage is paid for as well
    assert dollars(cache) == pytest.approx(fake.dollars(2.5, 10) / 2)
    batches = len(fake.batches)
    assert client.answers(messages, JUDGE, SPENDING, cache, readable=protocol.parse) == said
    assert len(fake.batches) == batches and len(fake.billed) == 21


def test_a_line_of_a_batch_without_an_answer_is_asked_again(cache, serve):
    fake = serve(["html", "said", "nothing"])
    assert client.answers(MESSAGES, BATCH, SPENDING, cache, poll=0.02) == SAID
    assert [len(file.splitlines()) for name, file in fake.files.items() if name[5:].isdigit()] == [60, 3]
    assert not rows(cache, where="answer = ''") and len(fake.billed) == len(rows(cache)) == 61
    assert dollars(cache) == pytest.approx(fake.dollars(2.5, 10) / 2)


@pytest.mark.parametrize("path, times", [("/v1/batches/", 2), ("/v1/files/", 1), ("/v1/files/", 4)])
def test_pages_in_place_of_a_batch_and_its_answers_are_waited_out(cache, serve, path, times):
    fake = serve()
    fake.pages[path] = times
    assert client.answers(MESSAGES, BATCH, SPENDING, cache, poll=0.02) == SAID
    assert len(fake.batches) == 1 and set(fake.asked.values()) == {1} and len(rows(cache)) == 60


@pytest.mark.parametrize("path", ["/v1/files", "/v1/batches", "/v1/batches/", "/v1/files/"])
def test_a_batch_behind_pages_is_one_line_and_no_answer_is_lost(cache, serve, path):
    fake = serve()
    fake.pages[path] = 99
    with pytest.raises(UserError, match="200 without an answer|is not lines of JSON") as error:
        client.answers(MESSAGES, BATCH, SPENDING, cache, poll=0.02)
    assert "\n" not in str(error.value) and not rows(cache, where="answer IS NOT NULL")
    fake.pages.clear()
    assert client.answers(MESSAGES, BATCH, SPENDING, cache, poll=0.02) == SAID
    assert len(fake.batches) == 1 and set(fake.asked.values()) == {1} and len(rows(cache)) == 60


def test_a_page_in_place_of_the_models_is_one_line(serve):
    fake = serve()
    endpoint.reachable(JUDGE)
    for _ in range(2):  # by either type of content
        fake.times.append(("", 0.0))
        fake.pages["/v1/models"] = 1
        with pytest.raises(UserError, match=r"the judge does not answer \(200 without a list of models\)"):
            endpoint.reachable(JUDGE)


def test_a_batch_is_waited_for_after_kill_9_and_never_submitted_twice(cache, serve):
    fake = serve(polls=10**9)
    running = process(cache, 60, kind="batch")
    wait_for(lambda: fake.batches and fake.batches["batch_0"]["polls"] < 10**9)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    assert len(rows(cache, where="answer IS NULL")) == 60 and not fake.billed
    assert ledger.Ledger(cache, JUDGE, SPENDING).under_way(ledger.key_of(MESSAGES[0], JUDGE))
    fake.batches["batch_0"]["polls"] = 2
    # One request an answer, for a change: what is in a batch is not asked beside it.
    assert client.answers(MESSAGES, JUDGE, SPENDING, cache, poll=0.02) == SAID
    assert len(fake.batches) == 1 and len(fake.billed) == len(rows(cache)) == 60
    assert dollars(cache) == pytest.approx(fake.dollars(2.5, 10) / 2)


def test_two_at_once_submit_one_batch(cache, serve):
    fake = serve(polls=12)
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(client.answers, MESSAGES, BATCH, SPENDING, cache, poll=0.02) for _ in range(2)]
        assert [one.result() for one in both] == [SAID, SAID]
    assert len(fake.batches) == 1 and set(fake.asked.values()) == {1} and len(rows(cache)) == 60


def test_a_batch_whose_id_was_lost_is_found_by_its_tag(cache, serve):
    fake = serve(["cut"])  # the batch is made, and we are not told
    with pytest.raises(UserError, match="batches run without us"):
        client.answers(MESSAGES, BATCH, SPENDING, cache, poll=0.02)
    assert len(fake.batches) == 1
    assert client.answers(MESSAGES, BATCH, SPENDING, cache, poll=0.02) == SAID
    assert len(fake.batches) == 1 and set(fake.asked.values()) == {1}


def test_a_line_of_another_model_costs_no_other_answer(cache, serve):
    """All others are kept, the odd one is paid for, and asked again once the endpoint answers as it should."""
    fake = serve(["model"])
    with pytest.raises(UserError, match="asked for gpt-4o-2024-08-06, but .* answered as"):
        client.answers(MESSAGES, BATCH, SPENDING, cache, poll=0.02)
    assert len(rows(cache, where="answer IS NOT NULL")) == 59
    assert client.answers(MESSAGES, BATCH, SPENDING, cache, poll=0.02) == SAID
    assert len(fake.batches) == 2 and sum(fake.asked.values()) == 61


def test_an_error_of_a_batchs_line_may_be_a_text(cache, serve):
    fake = serve(polls=10**9)
    book = ledger.Ledger(cache, BATCH, SPENDING)
    book.db.execute("INSERT INTO batches VALUES ('t', ?, 'batch_9', 0)", [BATCH.model])
    for message in MESSAGES[:2]:
        book.enter(ledger.key_of(message, BATCH), message, until=float("inf"), batch="t")
    lines = [{"custom_id": ledger.key_of(MESSAGES[0], BATCH), "error": "it broke"}]
    assert batches._store(book, "t", lines) == "None: it broke"
    assert not rows(cache) and not fake.batches  # both are asked anew


def test_an_odd_line_of_a_batch_costs_no_other_answer(cache):
    """A response that is a text, an id that is a list, an emoji that was cut in two."""
    book = ledger.Ledger(cache, BATCH, SPENDING)
    book.db.execute("INSERT INTO batches VALUES ('t', ?, 'batch_9', 0)", [BATCH.model])
    keys = [ledger.key_of(message, BATCH) for message in MESSAGES[:3]]
    for key, message in zip(keys, MESSAGES):
        book.enter(key, message, until=float("inf"), batch="t")

    def answer(text: str, **usage: int) -> dict:
        return {"status_code": 200, "body": {"model": BATCH.model, "choices": [{"message": {"content": text}}],
                                             "usage": {f"{kind}_tokens": n for kind, n in usage.items()}}}

    lines = [{"custom_id": keys[0], "response": "none"}, {"custom_id": [1], "response": {}},
             {"custom_id": keys[1], "response": answer("Preferred: A \ud83d", prompt=-10**6, completion=1)},
             {"custom_id": keys[2], "response": answer("B", prompt=10**30, completion=1)}]
    assert batches._store(book, "t", lines) == "None: None"
    assert [book.answer(key) for key in keys] == [None, "Preferred: A ?", "B"]
    assert 0 < dollars(cache) < 0.01  # as much as they cost at most, where the endpoint says what cannot be


def test_a_body_that_is_nested_without_end_is_no_answer():
    deep = b"[" * 100_000
    assert endpoint.as_object(deep) == {}
    with pytest.raises(endpoint.Refused, match="200 without an answer"):
        endpoint.completion(deep)


@pytest.mark.parametrize("content", [b"", b"junk" * 500])
def test_a_file_of_answers_that_is_none_is_one_line(tmp_path, content):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/judge.sqlite").write_bytes(content)
    for command in (["status"], ["forget", "batch_1"]):
        done = subprocess.run([sys.executable, "-m", "roads.judge", *command], cwd=tmp_path, text=True,
                              capture_output=True, env=ENV | {"PYTHONPATH": str(ROOT / "src")})
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert "judge.sqlite: " in done.stderr and "expected the SQLite file of answers" in done.stderr


def test_a_batch_that_the_endpoint_lost_is_named_and_may_be_forgotten(cache, serve, monkeypatch):
    fake = serve(polls=10**9)
    running = process(cache, 60, kind="batch")
    wait_for(lambda: fake.batches and fake.batches["batch_0"]["polls"] < 10**9)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    fake = serve()  # another account: it has no such batch
    fake.batches["batch_7"] = {"id": "batch_7"}
    with pytest.raises(UserError, match="no batch batch_0, .*or count it as paid and ask anew: `python -m roads.judge "
                       "forget batch_0`"):
        client.answers(MESSAGES, BATCH, SPENDING, cache, poll=0.02)
    paid = dollars(cache)
    with pytest.raises(UserError, match="batch_1: .* has no batch of that id that is not ended"):
        ledger.forget("batch_1", cache)
    assert ledger.forget("batch_0", cache) == 60 and dollars(cache) == paid > 0
    fake.batches.clear()
    assert client.answers(MESSAGES, BATCH, SPENDING, cache, poll=0.02) == SAID
    assert dollars(cache) == pytest.approx(paid + fake.dollars(2.5, 10) / 2)


def test_an_empty_base_url_is_openais(monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "")
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    assert str(endpoint.connect().base_url) == "https://api.openai.com/v1/" and endpoint.host_of() == "api.openai.com"


def test_a_batch_that_was_never_submitted_is_struck_out(cache, serve):
    serve(key="sk-another")
    with pytest.raises(UserError, match="401"):
        client.answers(MESSAGES, BATCH, SPENDING, cache, poll=0.02)
    fake = serve()
    assert client.answers(MESSAGES, BATCH, SPENDING, cache, poll=0.02) == SAID
    assert len(fake.batches) == 1 and len(rows(cache)) == 60
    assert dollars(cache) == pytest.approx(fake.dollars(2.5, 10) / 2)


def test_batches_keep_to_their_size_and_to_the_budget(cache, serve):
    fake = serve()
    short = SimpleNamespace(**vars(BATCH) | {"max_tokens": 10})
    budget = 10.5 * ledger.worst_price(MESSAGES[0], short, SPENDING)
    with pytest.raises(UserError, match="raise spending.budget"):
        client.answers(MESSAGES, short, spending(budget=budget, batch_requests=7), cache, poll=0.02)
    assert [len(file.splitlines()) for name, file in fake.files.items() if name[5:].isdigit()][:2] == [7, 3]
    assert fake.dollars(2.5, 10) / 2 == pytest.approx(dollars(cache)) and dollars(cache) <= budget
    assert 10 <= len(fake.billed) < 60
    assert client.answers(MESSAGES, short, spending(batch_requests=7), cache, poll=0.02) == SAID
    assert len(fake.billed) == 60 and set(fake.asked.values()) == {1}


def test_batches_of_more_than_an_account_may_enqueue_are_halved(cache, serve):
    """60 requests where 10 are allowed: 60, 30, 15 and 7 at a time, then one batch of 7 after another."""
    fake = serve(enqueued=10)
    assert client.answers(MESSAGES, BATCH, SPENDING, cache, poll=0.01) == SAID
    sizes = [len(fake.files[batch["input_file_id"]].splitlines()) for batch in fake.batches.values()]
    assert sizes == [60, 30, 15, *[7] * 8, 4] and len(fake.billed) == 60
    ends = [batch["status"] for batch in fake.batches.values()]
    assert ends == ["failed"] * 3 + ["completed"] * 9
    assert dollars(cache) == pytest.approx(fake.dollars(2.5, 10) / 2)


def test_an_account_that_may_enqueue_nothing_is_one_line(cache, serve):
    fake = serve(enqueued=10)
    fake.enqueued = 0.5
    with pytest.raises(UserError, match="a batch ended without an answer .Enqueued token limit reached"):
        client.answers(MESSAGES[:4], BATCH, SPENDING, cache, poll=0.01)
    assert len(fake.batches) == 3 and not rows(cache)


@pytest.mark.parametrize("judge", [JUDGE, BATCH])
def test_a_model_that_names_its_limit_another_way_is_asked_that_way(cache, serve, monkeypatch, judge):
    monkeypatch.setattr(endpoint, "RENAMED", set())
    for module in (client, batches):
        monkeypatch.setattr(module, "RENAMED", endpoint.RENAMED)
    fake = serve(renamed=True)
    assert client.answers(MESSAGES, judge, spending(concurrency=1), cache, poll=0.01) == SAID
    assert len(fake.billed) == 60 and endpoint.RENAMED == {judge.model}
    assert sum(fake.asked.values()) == (61 if judge is JUDGE else 120)


def test_a_batch_without_any_answer_is_an_error(cache, serve):
    fake = serve(["500"] * 60)
    with pytest.raises(UserError, match=r"a batch ended without an answer \(server_error: "):
        client.answers(MESSAGES, BATCH, SPENDING, cache, poll=0.02)
    assert not rows(cache) and len(fake.batches) == 1


def tokenized():
    """A tokenizer, queries and two summaries of each, of rows whose posts hold what the prompts hold."""
    made = [tldr.Row(str(i), "cats", f"Tom {i}", f"He eats {{{{summarya}}}} {i}.\n\nPOST: and sleeps", "s")
            for i in range(6)]
    task = tldr.Task(128, 24)
    tokenizer = tldr.train_bpe([row.post + row.title for row in made], 300)
    query = tldr.pad([task.query_ids(row, tokenizer) for row in made], 128, "left")
    ours, theirs = (tldr.pad([task.response_ids(text, tokenizer) for text in texts], 24, "right") for texts in (
        ["a longer one"] * 5 + ["the same"], ["short", "a longer one, much"] * 2 + ["short", "the same"]))
    return tokenizer, query, ours, theirs


def test_the_outside_judge_reads_texts_and_answers_in_both_orders(tmp_path, cache, serve):
    tokenizer, query, ours, theirs = tokenized()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    fake = serve()
    cfg = SimpleNamespace(judge=JUDGE, spending=SPENDING)
    ask = protocol.of(cfg, query, tmp_path)
    found = protocol.compare(ask, ours, theirs)
    assert found["score"].tolist() == [1, 0, 1, 0, 1, 0.5] and not found["failed"].any()
    assert len(fake.billed) == 11  # the same summaries are one question in both orders
    prompt = protocol.both_orders(JUDGE, tokenizer, query, ours, theirs)[0]
    assert prompt.startswith("Which of the following summaries does a better job") and prompt in fake.asked
    assert prompt.endswith('Preferred: <"A" or "B">')
    assert ("### Post:\nTom 0\n\nHe eats {{summarya}} 0.\n\nPOST: and sleeps\n\n### Summary A:\na longer one\n\n"
            "### Summary B:\nshort\n\n### Instructions:") in prompt
    with pytest.raises(UserError, match=r"expected SUBREDDIT"):
        protocol.posts_of(ours, tokenizer)


def test_answers_that_cannot_be_read_are_ties_and_counted(tmp_path, cache, serve):
    tokenizer, query, ours, theirs = tokenized()
    serve(["garbage"] * 3)
    found = protocol.compare(protocol.outside(JUDGE, spending(concurrency=1), tokenizer, query), ours, theirs)
    assert found["failed"].tolist() == [True] + [False] * 5 and found["score"][0] == 0.5
    assert protocol.summary(found)["parse_failures"] == pytest.approx(1 / 6)


def test_two_word_pairs_are_distinct_and_labelled_in_both_orders(cache, serve):
    posts = ["one two three four", "aa bb aaa bb", "same same same same", "x yy z ww", ""]
    fake = serve(["ok"] * 4 + ["garbage"] * 3)
    cfg = SimpleNamespace(**vars(JUDGE) | {"prompt": "two_word"})
    found = protocol.two_word_rows(posts, cfg, spending(concurrency=1), cache=cache)
    assert found == [
        {"reference": "one two", "chosen": "three four", "rejected": "one two"},
        {"reference": "aa bb", "chosen": "aaa bb", "rejected": "aa bb"},
        {"reference": "same same", "chosen": None, "rejected": None},  # no two
        {"reference": "x yy", "chosen": None, "rejected": None},  # as long: a tie
        {"reference": "", "chosen": None, "rejected": None}]
    assert any(prompt.startswith("Which of the following two-word summaries") for prompt in fake.asked)
    billed = len(fake.billed)
    assert protocol.two_word_rows(posts, cfg, SPENDING, cache=cache) == found and len(fake.billed) == billed


def test_estimate_asks_nothing(tmp_path, cache, serve, monkeypatch, capsys):
    tokenizer, query, ours, theirs = tokenized()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    np.savez(tmp_path / "completions.npz", query=query, completions=ours[:, None])
    np.savez(tmp_path / "test_human.npz", query=query, response=theirs)
    fake = serve()
    messages = protocol.both_orders(JUDGE, tokenizer, query, ours, theirs)
    count, dear = ledger.estimate(messages, JUDGE, SPENDING, cache)
    assert count == 11 and not fake.asked and not cache.exists()
    client.answers(messages[:6], JUDGE, SPENDING, cache)
    assert fake.dollars(2.5, 10) < dear and ledger.estimate(messages, JUDGE, SPENDING, cache)[0] == 5
    from roads import config
    monkeypatch.setattr(config, "load_scale", lambda name: SimpleNamespace(judge=JUDGE, spending=SPENDING))
    monkeypatch.setattr(sys, "argv", ["client", "estimate", str(tmp_path), str(tmp_path), "--scale", "paper"])
    asked = sum(fake.asked.values())
    runpy.run_module("roads.judge", run_name="judge")["_command"]()
    assert f"11 are not in the cache and cost ${dear:.2f} at most" in capsys.readouterr().out
    assert sum(fake.asked.values()) == asked


def test_the_worst_price_is_above_the_true_one():
    for text in ("Plain English words, as in a post about a cat.", "\N{CAT FACE}" * 40, "猫はとても可愛い" * 9):
        assert ledger.worst_price(text, JUDGE, SPENDING) > ledger.price(len(text) / 4, 100, SPENDING, False)
    assert ledger.worst_price("猫" * 40, JUDGE, SPENDING) > ledger.price(120, 100, SPENDING, False)


def test_pairs_may_be_labelled_in_one_order(cache, serve):
    """The paper does not say whether "pick a winner" was asked twice (Figs 6 and 10)."""
    fake, one = serve(), SimpleNamespace(**vars(JUDGE) | {"label_orders": 1})
    tokenizer, query, ours, theirs = tokenized()
    cfg = SimpleNamespace(judge=one, spending=SPENDING)
    ask = protocol.outside(one, SPENDING, tokenizer, query, 1)
    found = protocol.compare(ask, ours, theirs, 1)
    assert sum(fake.asked.values()) == 6 and found["consistent"].all()
    assert found["score"].tolist() == [1, 0, 1, 0, 1, 1]  # the longer one; A where both are as long
    both = protocol.compare(protocol.outside(cfg.judge, SPENDING, tokenizer, query), ours, theirs)
    assert both["score"].tolist() == [1, 0, 1, 0, 1, 0.5]
    rows = protocol.two_word_rows(["one two three four"], one, SPENDING)
    assert (rows[0]["chosen"], rows[0]["rejected"]) == ("three four", "one two")  # the longer one
