"""What was asked of a model, what it answered and what that cost: one SQLite file, runs/judge.sqlite.

Every answer is there from the moment it came, with its tokens and dollars, under the model and a hash of the request;
what is there is not asked again.

The table of answers is the account as well. A request is entered at its worst price before it is sent, if the budget
has that much left, and at its true price when the answer is there. It is struck out when the server refused it, or a
page of a proxy came in its place, as nobody pays for that. A request whose answer was lost, by a timeout, a cut
connection or `kill -9`, stays in at its worst price, because it may have been billed. So the budget holds over restarts
and over processes that share the file.
"""

import fcntl
import hashlib
import json
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from roads.schema import LLMJudge, Spending
from roads.stage import UserError

CACHE = Path("runs/judge.sqlite")
SAMPLES = 3  # an answer that cannot be read is asked for twice more
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


@contextmanager
def opened(cache: Path) -> Iterator[None]:
    """Says in one line that the file of answers cannot be read or written."""
    try:
        yield
    except sqlite3.Error as error:
        raise UserError(f"{cache}: {error}; expected the SQLite file of answers, on a local disk with room") from None


def price(prompt_tokens: float, completion_tokens: float, spending: Spending, batch: bool) -> float:
    """Dollars of one request, by itself or in a batch."""
    full = (prompt_tokens * spending.input + completion_tokens * spending.output) / 1e6
    return full * spending.batch_discount if batch else full


def worst_price(message: str, judge: LLMJudge, spending: Spending) -> float:
    """Dollars at most: a token is 4 bytes of English or more; we count 3, and 1 byte of anything else."""
    plain = len(message.encode("ascii", "ignore"))
    tokens = plain / 3 + len(message.encode()) - plain + 16  # 16: what a chat wraps around a message
    return price(tokens, judge.max_tokens, spending, judge.kind == "batch")


def key_of(message: str, judge: LLMJudge, draw: int = 0) -> str:
    """What an answer depends on, the model aside; `draw` tells the answers to one message at a temperature apart."""
    text = json.dumps([message, float(judge.temperature), judge.max_tokens, draw])
    return hashlib.sha256(text.encode()).hexdigest()


class Ledger:
    """The SQLite file of one model's answers. Several processes may have it open."""

    def __init__(self, path: Path, judge: LLMJudge, spending: Spending, readable: Callable[[str], object] = str.strip):
        self.path, self.judge, self.spending, self.readable = Path(path), judge, spending, readable
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Autocommit: every statement outside `alone` is on disk when it returns, as far as a kill of the process goes.
        self.db = sqlite3.connect(self.path, timeout=60, isolation_level=None)
        with locked(self.path):  # SQLite does not wait for another process that makes the file
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

    def settle(self, row: int, body: dict, host: str) -> None:
        """Store the answer of a chat completion (endpoint.py), at its true price if it says how many tokens it took.

        Raises:
            UserError: another model than the dated one that was asked for has answered. It is paid for, and no answer.
        """
        model = body.get("model")
        wrong = _dated(self.judge.model) and model != self.judge.model
        self.close(row, None if wrong else _text(body), str(model), usage_of(body))
        if wrong:
            raise UserError(f"judge.model: asked for {self.judge.model}, but {host} answered as {model!r}; name "
                            "that one, or fix the endpoint")

    def close(self, row: int, answer: str | None, model: str | None, usage: dict | None) -> None:
        """Nothing more is to come: an answer, or none, and the tokens that it took where they are known."""
        tokens = [usage["prompt_tokens"], usage["completion_tokens"]] if usage else [None, None]
        batch = self.db.execute("SELECT batch FROM answers WHERE id = ?", [row]).fetchone()[0] is not None
        self.db.execute("UPDATE answers SET answer = ?, answered_by = ?, prompt_tokens = ?, completion_tokens = ?, "
                        "dollars = coalesce(?, dollars), until = 0 WHERE id = ?",
                        [_whole(answer), _whole(model), *tokens,
                         price(*tokens, self.spending, batch) if usage else None, row])

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


def _text(body: dict) -> str:
    """What a chat completion says; a refusal is no answer and comes as its own words; '' if there are none."""
    message = body["choices"][0]["message"]
    text = message.get("content") or message.get("refusal") or ""
    return text if isinstance(text, str) else ""


def _whole(text: str | None) -> str | None:
    """Text without half of a surrogate pair, as a server leaves it that cuts an emoji; no database takes it."""
    return text and text.encode("utf-8", "replace").decode("utf-8")


def usage_of(body: dict) -> dict | None:
    """The tokens that were read and written, if both are told and can be."""
    usage = body.get("usage")
    counts = [usage.get(f"{kind}_tokens") for kind in ("prompt", "completion")] if isinstance(usage, dict) else [None]
    return usage if all(type(count) is int and 0 <= count < 2**31 for count in counts) else None


def _dated(model: str) -> bool:
    """gpt-4o-2024-08-06 is; a local server may report a name of its own for what is not."""
    parts = model.rsplit("-", 3)[1:]
    return [len(part) for part in parts] == [4, 2, 2] and all(part.isdigit() for part in parts)


@contextmanager
def locked(path: Path, what: str = "open") -> Iterator[None]:
    """One process at a time; a lock of the operating system, which no killed process keeps."""
    with open(f"{path}.{what}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def estimate(messages: list[str], judge: LLMJudge, spending: Spending, cache: Path = CACHE) -> tuple[int, float]:
    """How many answers are not in the cache, and the dollars they cost at most; asks nothing."""
    todo = {key_of(message, judge): message for message in messages}
    if Path(cache).exists():
        book = Ledger(cache, judge, spending)
        with closing(book.db):
            todo = {key: message for key, message in todo.items() if not book.samples(key)}
    return len(todo), sum(worst_price(message, judge, spending) for message in todo.values())


def forget(batch: str, cache: Path = CACHE) -> int:
    """Wait no longer for a batch that the endpoint has lost; how many of its requests are unanswered. They count as
    paid at their worst price, and are asked anew.

    Raises:
        UserError: no such batch.
    """
    missing = UserError(f"{batch}: {cache} has no batch of that id that is not ended")
    if not Path(cache).exists():
        raise missing
    with closing(sqlite3.connect(cache, isolation_level=None)) as db:
        tag = db.execute("SELECT tag FROM batches WHERE id = ? AND NOT done", [batch]).fetchone()
        if not tag:
            raise missing
        db.execute("BEGIN IMMEDIATE")
        count = db.execute("UPDATE answers SET until = 0 WHERE batch = ? AND answer IS NULL", tag).rowcount
        db.execute("UPDATE batches SET done = 1 WHERE tag = ?", tag)
        db.execute("COMMIT")
    return count


def status(cache: Path = CACHE) -> str:
    """A line per model of what the cache holds."""
    if not Path(cache).exists():
        return f"{cache}: nothing was asked yet"
    with closing(sqlite3.connect(f"file:{cache}?mode=ro", uri=True)) as db:
        rows = db.execute("SELECT model, count(answer), total(prompt_tokens), total(completion_tokens), "
                          "total(answer IS NULL AND until > ?1), total(answer IS NULL AND until <= ?1), sum(dollars) "
                          "FROM answers GROUP BY model ORDER BY model", [time.time()]).fetchall()
    return "\n".join(f"{model}: ${dollars:.2f}, {n:,} answers, {read:,.0f} tokens read and {written:,.0f} written, "
                     f"{waiting:.0f} answers under way, {lost:.0f} lost"
                     for model, n, read, written, waiting, lost, dollars in rows)
