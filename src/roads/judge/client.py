"""Asks a model behind an OpenAI-compatible endpoint, and pays for no answer twice (ledger.py)."""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from roads.judge import batches
from roads.judge.endpoint import (
    RENAMED,
    Lost,
    Refused,
    Renamed,
    Unanswerable,
    completion,
    connect,
    errors,
    host_of,
    pause,
    request,
)
from roads.judge.ledger import CACHE, Ledger, key_of, opened
from roads.schema import LLMJudge, Spending
from roads.stage import UserError

if TYPE_CHECKING:
    from openai import AsyncOpenAI


def answers(messages: list[str], judge: LLMJudge, spending: Spending, cache: Path = CACHE,
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
    with opened(cache):
        book = Ledger(cache, judge, spending, readable)
        with closing(book.db):
            keys = [key_of(message, judge, draw) for message in messages]
            found = {key: book.answer(key) for key in dict.fromkeys(keys)}
            todo = {key: message for key, message in zip(keys, messages) if found[key] is None}
            if todo:
                with tqdm(total=len(found), initial=len(found) - len(todo), desc=judge.model, unit="answer") as bar:
                    asyncio.run(_fetch(book, todo, bar, poll))
                found |= {key: book.answer(key) for key in todo}
    return [found[key] for key in keys]


async def _fetch(book: Ledger, todo: dict[str, str], bar: tqdm, poll: float) -> None:
    """Ask until every key of todo has its answer."""
    async with connect() as client:
        # What is in a batch already, of another process or one that was killed, is not asked again: wait for it.
        await batches.collect(client, book, set(todo), bar, poll)
        most, alone = book.spending.batch_requests, False
        while missing := {key: message for key, message in todo.items() if book.answer(key) is None}:
            bar.update(bar.total - len(missing) - bar.n)
            if book.judge.kind == "openai":
                await _ask(client, book, missing, bar)
                continue
            before, known = sum(len(book.samples(key)) for key in missing), book.judge.model in RENAMED
            sent = await batches.submit(client, book, missing, most, alone)
            problem, too_much = await batches.collect(client, book, set(todo), bar, poll)
            if known != (book.judge.model in RENAMED):  # asked the other way, it may answer
                continue
            if sent and too_much and (tried := min(most, len(missing))) > 1:
                most, alone = tried // 2, True
                bar.write(f"{host_of()}: {problem} Batches of {most} requests from here on, one after another.")
                continue
            if sent and sum(len(book.samples(key)) for key in missing) == before:
                raise UserError(f"{host_of()}: a batch ended without an answer ({problem or 'it does not say why'}); "
                                "what was answered is stored: run again to ask for the rest")
            if not sent:  # another process has them
                await asyncio.sleep(poll)
        bar.update(bar.total - bar.n)


async def _ask(client: "AsyncOpenAI", book: Ledger, todo: dict[str, str], bar: tqdm) -> None:
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


async def _attempts(client: "AsyncOpenAI", book: Ledger, key: str, message: str, failed: list) -> None:
    """One more answer to a message into the book, unless another process has it, or the run ends for another error."""
    for attempt in range(book.spending.retries + 1):
        with book.alone():
            if book.answer(key) is not None or book.under_way(key):
                return
            row = book.enter(key, message, until=time.time() + book.spending.timeout + 1)
        try:
            with errors():
                async with asyncio.timeout(book.spending.timeout):
                    reply = await client.chat.completions.with_raw_response.create(**request(message, book.judge))
            body = completion(reply.http_response.content)
        except Unanswerable:
            return book.unreadable(row)
        except Renamed as error:
            book.strike(row)
            RENAMED.add(book.judge.model)
            reason = error
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
            return book.settle(row, body, host_of())
        if not failed:
            await pause(attempt, reason, book.spending)
        if failed:
            return
