"""OpenAI's Batch API: half the price, within a day. A batch runs without us, and is found again after a kill."""

import asyncio
import json
import uuid
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tqdm import tqdm

from roads.judge.endpoint import (
    RENAMED,
    UNBILLED,
    Lost,
    Refused,
    as_object,
    completion,
    errors,
    host_of,
    patiently,
    renamed,
    request,
)
from roads.judge.ledger import Ledger, locked
from roads.stage import UserError

if TYPE_CHECKING:
    from openai import AsyncOpenAI
    from openai.types import Batch

BATCH_BYTES = 150 * 10**6
TOO_MUCH = "token_limit_exceeded"  # more is enqueued than the account may have: smaller batches, one after another


async def submit(client: "AsyncOpenAI", book: Ledger, missing: dict[str, str], most: int, alone: bool) -> int:
    """Put what the budget allows into batches of `most` requests, as few as hold it, or into one `alone`; how many.

    A batch's tag is in the book before the batch is submitted and goes along as metadata, so that a run that is killed
    before it learns the id finds the batch again.
    """
    rest, sent = deque(missing.items()), 0
    with locked(book.path, "submit"):
        while rest and not (alone and sent):
            tag, lines, size = uuid.uuid4().hex, [], 0
            with book.alone():
                book.db.execute("INSERT INTO batches VALUES (?, ?, NULL, 0)", [tag, book.judge.model])
                while rest and len(lines) < most and size < BATCH_BYTES:
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
                                             "body": request(message, book.judge)}) + "\n")
                    size += len(lines[-1])
                if not lines:
                    book.db.execute("DELETE FROM batches WHERE tag = ?", [tag])
                    continue
            content = "requests.jsonl", "".join(lines).encode()
            file = await patiently(book, lambda it=content: client.files.create(file=it, purpose="batch"))
            with _of_batches():
                batch = await client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions",
                                                    completion_window="24h", metadata={"roads": tag})
            book.db.execute("UPDATE batches SET id = ? WHERE tag = ?", [batch.id, tag])
            sent += 1
    return sent


@contextmanager
def _of_batches() -> Iterator[None]:
    try:
        with errors():
            yield
    except (Lost, Refused) as error:
        raise UserError(f"{host_of()}: {error}; batches run without us: run again to fetch them") from None


async def _adopt(client: "AsyncOpenAI", book: Ledger) -> None:
    """Find the batches whose id a killed run did not write down; strike out those that were never submitted."""
    with locked(book.path, "submit"):
        tags = {tag for (tag,) in book.db.execute("SELECT tag FROM batches WHERE model = ? AND id IS NULL",
                                                  [book.judge.model])}
        if not tags:
            return
        for batch in await patiently(book, lambda: _batches(client)):
            if (tag := (batch.metadata or {}).get("roads")) in tags:
                book.db.execute("UPDATE batches SET id = ? WHERE tag = ?", [batch.id, tag])
                tags.remove(tag)
        with book.alone():
            for tag in tags:
                book.db.execute("DELETE FROM answers WHERE batch = ? AND answer IS NULL", [tag])
                book.db.execute("DELETE FROM batches WHERE tag = ?", [tag])


async def collect(client: "AsyncOpenAI", book: Ledger, keys: set[str], bar: tqdm, poll: float) -> tuple[str, bool]:
    """Wait for the batches that hold one of keys and store what they bring.

    Returns:
        The first error that they name, or ''; and whether one was more than the account may have enqueued.
    """
    await _adopt(client, book)
    problem, too_much, waiting = "", False, book.open_batches(keys)
    while waiting:
        for tag, name in waiting.items():
            batch = await patiently(book, lambda name=name: _retrieve(client, name))
            if batch.status not in ("completed", "failed", "expired", "cancelled"):
                continue
            lines = []
            for file in filter(None, (batch.output_file_id, batch.error_file_id)):
                lines += await patiently(book, lambda file=file, name=name: _lines(client, file, name))
            errors = batch.errors.data if batch.errors and batch.errors.data else []
            found = _store(book, tag, lines)
            problem = problem or found or "; ".join(str(error.message) for error in errors)
            too_much |= any(error.code == TOO_MUCH for error in errors)
        waiting = book.open_batches(keys)
        bar.set_postfix_str(f"{len(waiting)} batches open, ${book.spent:.2f} of ${book.spending.budget:g}")
        if waiting:
            await asyncio.sleep(poll)
            poll = min(60.0, poll * 1.5)
    return problem, too_much


async def _batches(client: "AsyncOpenAI") -> list:
    return [batch async for batch in client.batches.list(limit=100)]


@contextmanager
def _known(name: str) -> Iterator[None]:
    """For a batch that the endpoint has not: an error that says what to do about it."""
    import openai

    try:
        yield
    except openai.NotFoundError:
        raise UserError(f"{host_of()}: no batch {name}, or its answers have expired; go back to the OPENAI_API_KEY and "
                        "OPENAI_BASE_URL that it was sent with, or count it as paid and ask anew: `python -m "
                        f"roads.judge forget {name}`") from None


async def _retrieve(client: "AsyncOpenAI", name: str) -> "Batch":
    with _known(name):
        return await client.batches.retrieve(name)


async def _lines(client: "AsyncOpenAI", file: str, name: str) -> list[dict]:
    """What a file of a batch's answers says, a dict with the custom_id of a request for each line.

    Raises:
        Refused: it is something else, or cut: what was answered is still there to be fetched.
    """
    with _known(name):
        content = (await client.files.content(file)).content
    lines = [as_object(line) for line in content.splitlines() if line.strip()]
    if not all("custom_id" in line for line in lines):
        raise Refused(f"{file} is not lines of JSON")
    return lines


def _store(book: Ledger, tag: str, lines: list[dict]) -> str:
    """Store the lines of an ended batch and strike out what failed or expired; the first error, or ''."""
    problem, told = "", None
    with book.alone():
        rows = dict(book.db.execute("SELECT key, id FROM answers WHERE batch = ? AND answer IS NULL", [tag]))
        for line in lines:
            row = rows.pop(line["custom_id"], None) if isinstance(line["custom_id"], str) else None
            if row is None:
                continue
            response = line.get("response") if isinstance(line.get("response"), dict) else {}
            body = response.get("body") or {}
            try:
                if response.get("status_code") == 200:
                    book.settle(row, completion(body), host_of())
                    continue
                error = (body.get("error") if isinstance(body, dict) else None) or line.get("error") or {}
                error = error if isinstance(error, dict) else {"message": error}
                if error.get("code") in UNBILLED:
                    book.unreadable(row)
                    continue
                if renamed(error):
                    RENAMED.add(book.judge.model)
                raise Refused(f"{error.get('code')}: {error.get('message')}")
            except Lost as lost:
                book.close(row, None, None, lost.usage)
                problem = problem or str(lost)
            except Refused as refused:
                book.strike(row)
                problem = problem or str(refused)
            except UserError as wrong:  # the row is closed; what others have answered is kept
                told = told or wrong
        for row in rows.values():
            book.strike(row)
        book.db.execute("UPDATE batches SET done = 1 WHERE tag = ?", [tag])
    if told:
        raise told
    return problem
