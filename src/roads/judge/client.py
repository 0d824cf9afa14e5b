"""Asks a model behind an OpenAI-compatible endpoint, and pays for no answer twice.

    python -m roads.judge.client status                   # what the cache holds: answers and dollars by model
    python -m roads.judge.client estimate COMPLETIONS DATA --scale paper   # what judging these would cost; asks nothing

OPENAI_BASE_URL says where and OPENAI_API_KEY who asks. Every answer lies in runs/judge.sqlite from the moment it came,
with its tokens and dollars, under the model and a hash of the request; what lies there is not asked again.

The table of answers is the account as well. A request is entered at its worst price before it is sent, if the budget
has that much left, and at its true price when the answer is there. It is struck out when the server refused it, or a
page of a proxy came in its place, as nobody pays for that. A request whose answer was lost, by a timeout, a cut
connection or `kill -9`, stays in at its worst price, because it may have been billed. So the budget holds over restarts
and over processes that share the file.

We retry, not the SDK: it would ask an empty account again and not tell which answers were lost.
"""

import argparse
import asyncio
import fcntl
import hashlib
import ipaddress
import json
import os
import random
import sqlite3
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from tqdm import tqdm

from roads.stage import UserError, main

CACHE = Path("runs/judge.sqlite")
SAMPLES = 3  # an answer that cannot be read is asked for twice more
LONGEST_WAIT = 120.0  # seconds of Retry-After; what asks for more is left for another run
BATCH_REQUESTS, BATCH_BYTES = 50_000, 150 * 10**6
UNBILLED = ("content_filter", "content_policy_violation", "invalid_prompt")  # the endpoint will not read the prompt
TABLES = """
CREATE TABLE IF NOT EXISTS answers (
    id INTEGER PRIMARY KEY, model TEXT NOT NULL, key TEXT NOT NULL, sample INTEGER NOT NULL,
    answer TEXT,              -- NULL: on its way until `until`, or lost
    answered_by TEXT, prompt_tokens INTEGER, completion_tokens INTEGER,
    dollars REAL NOT NULL,    -- the worst price until it is known
    until REAL NOT NULL, batch TEXT);
CREATE INDEX IF NOT EXISTS answers_by_key ON answers (model, key, sample);
CREATE INDEX IF NOT EXISTS answers_by_batch ON answers (batch, key) WHERE batch IS NOT NULL;
CREATE TABLE IF NOT EXISTS batches (tag TEXT PRIMARY KEY, model TEXT NOT NULL, id TEXT, done INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS spent (model TEXT PRIMARY KEY, dollars REAL NOT NULL);
-- The sum over a model's answers, kept: to add up a table before every request is slow.
CREATE TRIGGER IF NOT EXISTS entered AFTER INSERT ON answers BEGIN
    INSERT INTO spent VALUES (new.model, new.dollars) ON CONFLICT (model) DO UPDATE SET dollars = dollars + new.dollars;
END;
CREATE TRIGGER IF NOT EXISTS settled AFTER UPDATE OF dollars ON answers BEGIN
    UPDATE spent SET dollars = dollars + new.dollars - old.dollars WHERE model = new.model;
END;
CREATE TRIGGER IF NOT EXISTS struck AFTER DELETE ON answers BEGIN
    UPDATE spent SET dollars = dollars - old.dollars WHERE model = old.model;
END;
"""


class Lost(Exception):
    """A request went out and no answer came back: it may have been billed, at what `usage` says if that is known."""

    def __init__(self, message: str, usage: dict | None = None):
        super().__init__(message)
        self.usage = usage


class Refused(Exception):
    """The server answered with an error that passes; nothing was billed."""

    def __init__(self, message: str, wait: float | None = None):
        super().__init__(message)
        self.wait = wait  # seconds that the server asks for


class Unanswerable(Exception):
    """The endpoint refuses this prompt, and will again."""


def price(prompt_tokens: float, completion_tokens: float, spending, batch: bool) -> float:
    """Dollars of one request, by itself or in a batch."""
    full = (prompt_tokens * spending.input + completion_tokens * spending.output) / 1e6
    return full * spending.batch_discount if batch else full


def worst_price(message: str, judge, spending) -> float:
    """Dollars at most: a token is 4 bytes of English or more; we count 3, and 1 byte of anything else."""
    plain = len(message.encode("ascii", "ignore"))
    tokens = plain / 3 + len(message.encode()) - plain + 16  # 16: what a chat wraps around a message
    return price(tokens, judge.max_tokens, spending, judge.kind == "batch")


def key_of(message: str, judge, draw: int = 0) -> str:
    """What an answer depends on, the model aside; `draw` tells the answers to one message at a temperature apart."""
    text = json.dumps([message, float(judge.temperature), judge.max_tokens, draw])
    return hashlib.sha256(text.encode()).hexdigest()


class Cache:
    """The SQLite file of one model's answers. Several processes may have it open."""

    def __init__(self, path: Path, judge, spending, readable: Callable[[str], object] = str.strip):
        self.path, self.judge, self.spending, self.readable = Path(path), judge, spending, readable
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Autocommit: every statement outside `alone` is on disk when it returns, as far as a kill of the process goes.
        self.db = sqlite3.connect(self.path, timeout=60, isolation_level=None)
        with _locked(self.path):  # SQLite does not wait for another process that makes the file
            self.db.execute("PRAGMA journal_mode = WAL")
            if not self.db.execute("SELECT 1 FROM sqlite_master WHERE name = 'struck'").fetchone():
                self.db.executescript(TABLES)
        self.db.execute("PRAGMA synchronous = NORMAL")

    @contextmanager
    def alone(self) -> Iterator[None]:
        """One transaction that no other process writes beside."""
        self.db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self.db.execute("ROLLBACK")
            raise
        self.db.execute("COMMIT")

    @property
    def spent(self) -> float:
        found = self.db.execute("SELECT dollars FROM spent WHERE model = ?", [self.judge.model]).fetchone()
        return found[0] if found else 0.0

    def samples(self, key: str) -> list[str]:
        """The answers so far, in the order they were asked for."""
        return [answer for (answer,) in self.db.execute(
            "SELECT answer FROM answers WHERE model = ? AND key = ? AND answer IS NOT NULL ORDER BY sample, id",
            [self.judge.model, key])]

    def answer(self, key: str) -> str | None:
        """The first answer that can be read, the last one if SAMPLES cannot, None if there is more to ask."""
        found = self.samples(key)
        readable = (answer for answer in found if self.readable(answer))
        return next(readable, found[-1] if len(found) >= SAMPLES else None)

    def under_way(self, key: str) -> bool:
        return bool(self.db.execute(
            "SELECT 1 FROM answers WHERE model = ? AND key = ? AND answer IS NULL AND until > ?",
            [self.judge.model, key, time.time()]).fetchone())

    def enter(self, key: str, message: str, until: float, batch: str | None = None) -> int:
        """Enter a request at its worst price; the row's id.

        Raises:
            UserError: the budget does not have that much left.
        """
        worst = worst_price(message, self.judge, self.spending)
        if self.spent + worst > self.spending.budget:
            raise UserError(f"spent ${self.spent:.4f} of ${self.spending.budget:g} on {self.judge.model}, and the next "
                            f"answer may cost ${worst:.4f}; raise spending.budget and run the same command again")
        return self.db.execute("INSERT INTO answers (model, key, sample, dollars, until, batch) "
                               "VALUES (?, ?, ?, ?, ?, ?)",
                               [self.judge.model, key, len(self.samples(key)), worst, until, batch]).lastrowid

    def settle(self, row: int, body: dict) -> None:
        """Store the answer of a chat completion (`_completion`), at its true price if it says how many tokens it took.

        Raises:
            UserError: another model than the dated one that was asked for has answered. It is paid for, and no answer.
        """
        model = body.get("model")
        wrong = _dated(self.judge.model) and model != self.judge.model
        self.close(row, None if wrong else _text(body), str(model), _usage(body))
        if wrong:
            raise UserError(f"judge.model: asked for {self.judge.model}, but {_host()} answered as {model!r}; name the "
                            "model that is there")

    def close(self, row: int, answer: str | None, model: str | None, usage: dict | None) -> None:
        """Nothing more is to come: an answer, or none, and the tokens that it took where they are known."""
        tokens = [usage["prompt_tokens"], usage["completion_tokens"]] if usage else [None, None]
        batch = self.db.execute("SELECT batch FROM answers WHERE id = ?", [row]).fetchone()[0] is not None
        self.db.execute("UPDATE answers SET answer = ?, answered_by = ?, prompt_tokens = ?, completion_tokens = ?, "
                        "dollars = coalesce(?, dollars), until = 0 WHERE id = ?",
                        [answer, model, *tokens, price(*tokens, self.spending, batch) if usage else None, row])

    def open_batches(self, keys: set[str]) -> dict[str, str]:
        """Tag -> id of the batches under way that hold one of keys."""
        found = self.db.execute("SELECT key, tag, batches.id FROM answers JOIN batches ON batch = tag WHERE "
                                "batches.model = ? AND NOT done AND batches.id IS NOT NULL AND answer IS NULL",
                                [self.judge.model])
        return {tag: name for key, tag, name in found if key in keys}

    def unreadable(self, row: int) -> None:
        """The endpoint will not answer this, and bills nothing."""
        self.db.execute("UPDATE answers SET answer = '', dollars = 0, until = 0 WHERE id = ?", [row])

    def strike(self, row: int) -> None:
        self.db.execute("DELETE FROM answers WHERE id = ? AND answer IS NULL", [row])


def _completion(content: bytes | dict) -> dict:
    """The JSON of a chat completion that came with status 200: an object with a message, which may say nothing.

    Raises:
        Refused: it is something else, a page of a proxy or an error in words, which nobody bills.
        Lost: it was cut, or has no message and says what it took.
    """
    try:
        body = json.loads(content) if isinstance(content, bytes) else content
    except ValueError:
        if content.lstrip().startswith(b"{"):
            raise Lost("the answer was cut") from None
        body = content.decode(errors="replace")
    try:
        if isinstance(body["choices"][0]["message"], dict):
            return body
    except (KeyError, IndexError, TypeError):
        pass
    if isinstance(body, dict) and (usage := _usage(body)):
        raise Lost("200 without an answer, and billed", usage)
    shown = body.get("error") or body if isinstance(body, dict) else body
    raise Refused(f"200 without an answer ({_without_key(' '.join(str(shown).split()))[:80]})")


def _text(body: dict) -> str:
    """What a chat completion says; a refusal is no answer and comes as its own words; '' if there are none."""
    message = body["choices"][0]["message"]
    text = message.get("content") or message.get("refusal") or ""
    return text if isinstance(text, str) else ""


def _usage(body: dict) -> dict | None:
    """The tokens that were read and written, if both are told."""
    usage = body.get("usage")
    told = (isinstance(usage, dict)
            and all(type(usage.get(f"{kind}_tokens")) is int for kind in ("prompt", "completion")))
    return usage if told else None


def _dated(model: str) -> bool:
    """gpt-4o-2024-08-06 is; a local server may report a name of its own for what is not."""
    parts = model.rsplit("-", 3)[1:]
    return [len(part) for part in parts] == [4, 2, 2] and all(part.isdigit() for part in parts)


def answers(messages: list[str], judge, spending, cache: Path = CACHE,
            readable: Callable[[str], object] = str.strip, draw: int = 0, poll: float = 5.0) -> list[str]:
    """The judge's answer to each message, in order; equal messages are asked once.

    Args:
        judge: kind ("openai": one request an answer; "batch": OpenAI's Batch API), model, temperature, max_tokens.
        spending: budget, input, output, batch_discount, concurrency, timeout, retries.
        readable: whether an answer says what was asked for. If not, it is asked for again, twice at most; then the
            unreadable answer is what comes back.
        draw: another number is another answer to the same message.
        poll: seconds between the first two looks at a batch; grows to 60.

    Raises:
        UserError: the budget is spent, or the endpoint will not answer. What came is stored; run again to go on.
    """
    try:
        book = Cache(cache, judge, spending, readable)
        keys = [key_of(message, judge, draw) for message in messages]
        found = {key: book.answer(key) for key in dict.fromkeys(keys)}
        todo = {key: message for key, message in zip(keys, messages) if found[key] is None}
        if todo:
            with tqdm(total=len(found), initial=len(found) - len(todo), desc=judge.model, unit="answer") as bar:
                asyncio.run(_fetch(book, todo, bar, poll))
            found |= {key: book.answer(key) for key in todo}
        book.db.close()
    except sqlite3.Error as error:
        raise UserError(f"{cache}: {error}; expected the SQLite file of answers, on a local disk with room") from None
    return [found[key] for key in keys]


async def _fetch(book: Cache, todo: dict[str, str], bar: tqdm, poll: float) -> None:
    """Ask until every key of todo has its answer."""
    async with _connect() as client:
        # What is in a batch already, of another process or one that was killed, is not asked again: wait for it.
        await _collect(client, book, set(todo), bar, poll)
        while missing := {key: message for key, message in todo.items() if book.answer(key) is None}:
            bar.update(bar.total - len(missing) - bar.n)
            if book.judge.kind == "openai":
                await _ask(client, book, missing, bar)
                continue
            before = sum(len(book.samples(key)) for key in missing)
            sent = await _submit(client, book, missing)
            problem = await _collect(client, book, set(todo), bar, poll)
            if sent and sum(len(book.samples(key)) for key in missing) == before:
                raise UserError(f"{_host()}: a batch ended without an answer ({problem or 'it does not say why'}); "
                                "what was answered is stored: run again to ask for the rest")
            if not sent:  # another process has them
                await asyncio.sleep(poll)
        bar.update(bar.total - bar.n)


def _host() -> str:
    """Where OPENAI_BASE_URL points, without user or password."""
    parts = urlsplit(os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1")
    try:
        host, port = parts.hostname, parts.port
    except ValueError:  # a port that is no number
        host = None
    if not host or parts.scheme not in ("http", "https"):
        raise UserError("OPENAI_BASE_URL: expected http://HOST:PORT/v1 or https://HOST/v1")
    return f"{host}:{port}" if port else host


def _key() -> str:
    return os.environ.get("OPENAI_API_KEY", "").strip()


def _without_key(text: str) -> str:
    return text.replace(_key(), "...") if _key() else text


def _connect():
    """An AsyncOpenAI of the environment's endpoint and key."""
    from openai import AsyncOpenAI

    host = _host()
    key = _key() or ("none" if _local(host) else None)
    if not key:
        raise UserError(f"OPENAI_API_KEY is not set, and {host} needs it; export it, or let OPENAI_BASE_URL name a "
                        "server of your own")
    return AsyncOpenAI(api_key=key, max_retries=0, _strict_response_validation=True)  # else a page of HTML is a batch


def _local(host: str) -> bool:
    """An endpoint of this machine or its network, which may ask for no key."""
    name = host.rsplit(":", 1)[0]
    try:
        return ipaddress.ip_address(name).is_private
    except ValueError:
        return "." not in name  # localhost, or a container's name


def reachable(judge, timeout: float = 20.0) -> None:
    """Raises UserError where the endpoint, the key or the judge's model is not to be had; asks and costs nothing."""

    async def models() -> list[str]:
        async with _connect() as client:
            reply = await client.with_options(timeout=timeout).models.with_raw_response.list()
        try:  # local servers leave out some of what the SDK would insist on
            return [model["id"] for model in _object(reply.http_response.content)["data"]]
        except (KeyError, TypeError):
            raise Refused("200 without a list of models") from None

    try:
        with _errors():
            there = asyncio.run(models())
    except (Lost, Refused) as error:
        raise UserError(f"{_host()}: the judge does not answer ({error}); check OPENAI_BASE_URL") from None
    if judge.model not in there:
        some = ", ".join(there[:3]) or "none"
        raise UserError(f"judge.model: {_host()} has no {judge.model!r}; it has {some}{', ...' * (len(there) > 3)}")


@contextmanager
def _errors() -> Iterator[None]:
    """The SDK's errors as ours: Lost, Refused, or a UserError for what no retry mends. The key is in none of them."""
    import openai

    try:
        yield
    except openai.APIStatusError as error:
        body = error.body if isinstance(error.body, dict) else {}
        code, status, where = str(body.get("code") or body.get("type") or ""), error.status_code, _host()
        said = " ".join(str(body.get("message") or "").split())
        said = _without_key(said)[:200]
        if "insufficient_quota" in (code, body.get("type")):
            raise UserError(f"{where}: insufficient_quota; add money to the account and run again") from None
        if status in (401, 403):
            raise UserError(f"{where}: {status}, OPENAI_API_KEY may not do this; check key and judge.model") from None
        if status in (408, 409, 429) or status >= 500:
            raise Refused(f"{status} {said}".strip(), _retry_after(error.response.headers)) from None
        if code in UNBILLED:
            raise Unanswerable from None
        if status == 404:
            raise UserError(f"{where}: 404, no such model or path ({said}); check judge.model and OPENAI_BASE_URL, "
                            "which ends in /v1") from None
        raise UserError(f"{where}: {status} {code} {said}; the request cannot be answered as it is") from None
    except (openai.APIResponseValidationError, json.JSONDecodeError):
        raise Refused("200 without an answer") from None
    except openai.APIConnectionError as error:
        if "Connect" in type(error.__cause__).__name__:  # ConnectError, ConnectTimeout: nothing was sent
            raise Refused(f"no connection ({error.__cause__})") from None
        raise Lost("the connection was cut or timed out") from None
    except TimeoutError:
        raise Lost("no answer in time") from None


def _retry_after(headers) -> float | None:
    for name, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
        try:
            return max(0.0, float(headers[name]) / unit)
        except (KeyError, ValueError):  # the header may be a date: we wait as if it were not there
            pass
    return None


async def _pause(attempt: int, error: Exception, spending) -> None:
    """Wait before another attempt: what the server asks for and some more, so that not all come back at once.

    Raises:
        UserError: it was the last attempt, or the server asks for too long a wait.
    """
    asked = getattr(error, "wait", None) or 0.0
    if attempt >= spending.retries or asked > LONGEST_WAIT:
        what = f"asks to wait {asked:.0f} s" if asked > LONGEST_WAIT else f"failed {attempt + 1} times in a row"
        raise UserError(f"{_host()} {what}: {error}; what was answered is stored: run again, or check OPENAI_BASE_URL, "
                        "spending.timeout and spending.concurrency") from None
    await asyncio.sleep(asked + min(8.0, 0.5 * 2**attempt) * random.uniform(0.5, 1))


async def _ask(client, book: Cache, todo: dict[str, str], bar: tqdm) -> None:
    """One request an answer, `concurrency` at once. After an error those under way end, and are stored."""
    queue, failed = deque(todo.items()), []

    async def work() -> None:
        while queue and not failed:
            key, message = queue.popleft()
            while book.answer(key) is None and not failed:
                if book.under_way(key):  # another process asks this, or one that was killed did: do something else
                    queue.append((key, message))
                    await asyncio.sleep(0.1)
                    break
                await _attempts(client, book, key, message, failed)
                bar.set_postfix_str(f"${book.spent:.2f} of ${book.spending.budget:g}", refresh=False)
            else:
                bar.update(not failed)

    async def until_error() -> None:
        try:
            await work()
        except Exception as error:
            failed.append(error)

    await asyncio.gather(*(until_error() for _ in range(min(book.spending.concurrency, len(queue)))))
    if failed:
        raise failed[0]


async def _attempts(client, book: Cache, key: str, message: str, failed: list) -> None:
    """One more answer to a message into the book, unless another process has it, or the run ends for another error."""
    for attempt in range(book.spending.retries + 1):
        with book.alone():
            if book.answer(key) is not None or book.under_way(key):
                return
            row = book.enter(key, message, until=time.time() + book.spending.timeout + 1)
        try:
            with _errors():
                async with asyncio.timeout(book.spending.timeout):
                    reply = await client.chat.completions.with_raw_response.create(**_request(message, book.judge))
            body = _completion(reply.http_response.content)
        except Unanswerable:
            return book.unreadable(row)
        except Lost as error:
            book.close(row, None, None, error.usage)
            reason = error
        except Refused as error:
            book.strike(row)
            reason = error
        except UserError:
            book.strike(row)
            raise
        else:
            return book.settle(row, body)
        if not failed:
            await _pause(attempt, reason, book.spending)
        if failed:
            return


def _object(text: bytes | str) -> dict:
    """A JSON object; {}, which holds no answer, for anything else."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _request(message: str, judge) -> dict:
    return {"model": judge.model, "messages": [{"role": "user", "content": message}],
            "temperature": judge.temperature, "max_tokens": judge.max_tokens}


@contextmanager
def _locked(path: Path, what: str = "open") -> Iterator[None]:
    """One process at a time; a lock of the operating system, which no killed process keeps."""
    with open(f"{path}.{what}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


async def _submit(client, book: Cache, missing: dict[str, str]) -> int:
    """Put what the budget allows into batches, as few as hold it; how many.

    A batch's tag is in the book before the batch is submitted and goes along as metadata, so that a run that is killed
    before it learns the id finds the batch again.
    """
    rest, sent = deque(missing.items()), 0
    with _locked(book.path, "submit"):
        while rest:
            tag, lines, size = uuid.uuid4().hex, [], 0
            with book.alone():
                book.db.execute("INSERT INTO batches VALUES (?, ?, NULL, 0)", [tag, book.judge.model])
                while rest and len(lines) < BATCH_REQUESTS and size < BATCH_BYTES:
                    key, message = rest.popleft()
                    if book.answer(key) is not None or book.under_way(key):
                        continue
                    try:
                        book.enter(key, message, until=float("inf"), batch=tag)
                    except UserError:
                        rest.clear()
                        if not lines and not book.open_batches(set(missing)):
                            raise
                        break
                    lines.append(json.dumps({"custom_id": key, "method": "POST", "url": "/v1/chat/completions",
                                             "body": _request(message, book.judge)}) + "\n")
                    size += len(lines[-1])
                if not lines:
                    book.db.execute("DELETE FROM batches WHERE tag = ?", [tag])
                    continue
            content = "requests.jsonl", "".join(lines).encode()
            file = await _patiently(book, lambda it=content: client.files.create(file=it, purpose="batch"))
            with _of_batches():
                batch = await client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions",
                                                    completion_window="24h", metadata={"roads": tag})
            book.db.execute("UPDATE batches SET id = ? WHERE tag = ?", [batch.id, tag])
            sent += 1
    return sent


@contextmanager
def _of_batches() -> Iterator[None]:
    try:
        with _errors():
            yield
    except (Lost, Refused) as error:
        raise UserError(f"{_host()}: {error}; batches go on without us: run again to fetch them") from None


async def _adopt(client, book: Cache) -> None:
    """Find the batches whose id a killed run did not write down; strike out those that were never submitted."""
    with _locked(book.path, "submit"):
        tags = {tag for (tag,) in book.db.execute("SELECT tag FROM batches WHERE model = ? AND id IS NULL",
                                                  [book.judge.model])}
        if not tags:
            return
        for batch in await _patiently(book, lambda: _batches(client)):
            if (tag := (batch.metadata or {}).get("roads")) in tags:
                book.db.execute("UPDATE batches SET id = ? WHERE tag = ?", [batch.id, tag])
                tags.remove(tag)
        with book.alone():
            for tag in tags:
                book.db.execute("DELETE FROM answers WHERE batch = ? AND answer IS NULL", [tag])
                book.db.execute("DELETE FROM batches WHERE tag = ?", [tag])


async def _collect(client, book: Cache, keys: set[str], bar: tqdm, poll: float) -> str:
    """Wait for the batches that hold one of keys and store what they bring; the first error that they name, or ''."""
    await _adopt(client, book)
    problem, waiting = "", book.open_batches(keys)
    while waiting:
        for tag, name in waiting.items():
            batch = await _patiently(book, lambda name=name: client.batches.retrieve(name))
            if batch.status not in ("completed", "failed", "expired", "cancelled"):
                continue
            lines = []
            for file in filter(None, (batch.output_file_id, batch.error_file_id)):
                lines += await _patiently(book, lambda file=file: _lines(client, file))
            errors = batch.errors.data if batch.errors and batch.errors.data else []
            found = _store(book, tag, lines)
            problem = problem or found or "; ".join(str(error.message) for error in errors)
        waiting = book.open_batches(keys)
        bar.set_postfix_str(f"{len(waiting)} batches open, ${book.spent:.2f} of ${book.spending.budget:g}")
        if waiting:
            await asyncio.sleep(poll)
            poll = min(60.0, poll * 1.5)
    return problem


async def _batches(client) -> list:
    return [batch async for batch in client.batches.list(limit=100)]


async def _lines(client, file: str) -> list[dict]:
    """What a file of answers says, a dict with the custom_id of a request for each line.

    Raises:
        Refused: it is something else, or cut: what was answered is still there to be fetched.
    """
    lines = [_object(line) for line in (await client.files.content(file)).content.splitlines() if line.strip()]
    if not all("custom_id" in line for line in lines):
        raise Refused(f"{file} is not lines of JSON")
    return lines


async def _patiently(book: Cache, call: Callable):
    """What a call that may be repeated returns, tried again as a request is."""
    for attempt in range(book.spending.retries + 1):
        try:
            with _errors():
                return await call()
        except (Lost, Refused) as error:
            await _pause(attempt, error, book.spending)


def _store(book: Cache, tag: str, lines: list[dict]) -> str:
    """Store the lines of an ended batch and strike out what failed or expired; the first error, or ''."""
    problem = ""
    with book.alone():
        rows = dict(book.db.execute("SELECT key, id FROM answers WHERE batch = ? AND answer IS NULL", [tag]))
        for line in lines:
            row = rows.pop(line.get("custom_id"), None)
            if row is None:
                continue
            response = line.get("response") or {}
            body = response.get("body") or {}
            try:
                if response.get("status_code") == 200:
                    book.settle(row, _completion(body))
                    continue
                error = (body.get("error") if isinstance(body, dict) else None) or line.get("error") or {}
                if error.get("code") in UNBILLED:
                    book.unreadable(row)
                    continue
                raise Refused(f"{error.get('code')}: {error.get('message')}")
            except Lost as lost:
                book.close(row, None, None, lost.usage)
                problem = problem or str(lost)
            except Refused as refused:
                book.strike(row)
                problem = problem or str(refused)
        for row in rows.values():
            book.strike(row)
        book.db.execute("UPDATE batches SET done = 1 WHERE tag = ?", [tag])
    return problem


def estimate(messages: list[str], judge, spending, cache: Path = CACHE) -> tuple[int, float]:
    """How many answers are not in the cache, and the dollars they cost at most; asks nothing."""
    todo = {key_of(message, judge): message for message in messages}
    if Path(cache).exists():
        book = Cache(cache, judge, spending)
        todo = {key: message for key, message in todo.items() if not book.samples(key)}
    return len(todo), sum(worst_price(message, judge, spending) for message in todo.values())


def status(cache: Path = CACHE) -> str:
    """A line per model of what the cache holds."""
    if not Path(cache).exists():
        return f"{cache}: nothing was asked yet"
    db = sqlite3.connect(f"file:{cache}?mode=ro", uri=True)
    rows = db.execute("SELECT model, count(answer), total(prompt_tokens), total(completion_tokens), "
                      "total(answer IS NULL AND until > ?1), total(answer IS NULL AND until <= ?1), sum(dollars) "
                      "FROM answers GROUP BY model ORDER BY model", [time.time()])
    return "\n".join(f"{model}: ${dollars:.2f}, {n:,} answers, {read:,.0f} tokens read and {written:,.0f} written, "
                     f"{waiting:.0f} answers under way, {lost:.0f} lost"
                     for model, n, read, written, waiting, lost, dollars in rows)


def _command() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("status", help="what the cache holds, and what it cost")
    judging = commands.add_parser("estimate", help="what it costs at most to judge completions against the references")
    judging.add_argument("completions", type=Path)
    judging.add_argument("data", type=Path)
    judging.add_argument("--scale", required=True, help="a block of params.yaml")
    a = parser.parse_args()
    if a.command == "status":
        return print(status())
    import numpy as np

    from roads import config
    from roads.judge.protocol import both_orders
    from roads.tldr import load_tokenizer

    cfg = config.load_scale(a.scale)
    if cfg.judge is None or cfg.judge.kind == "gold":
        raise UserError(f"{a.scale}: judge.kind: expected openai or batch; its judge is not asked over a network")
    rows, references = np.load(a.completions / "completions.npz"), np.load(a.data / "test_human.npz")["response"]
    messages = both_orders(cfg.judge, load_tokenizer(a.data / "tokenizer.json"), rows["query"],
                           rows["completions"][:, 0], references)
    count, dollars = estimate(messages, cfg.judge, cfg.spending)
    print(f"{len(messages):,} answers of {cfg.judge.model}, both orders; {count:,} are not in the cache and cost "
          f"${dollars:.2f} at most, ${dollars * SAMPLES:.2f} if none could be read")


if __name__ == "__main__":
    main(_command)
