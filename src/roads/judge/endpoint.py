"""An OpenAI-compatible endpoint: where it is, what its errors mean, and how long to wait after one.

OPENAI_BASE_URL says where and OPENAI_API_KEY who asks. We retry, not the SDK: it would ask an empty account again and
not tell which answers were lost.
"""

import asyncio
import ipaddress
import json
import os
import random
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from roads.judge.ledger import Ledger, usage_of
from roads.schema import LLMJudge, Spending
from roads.stage import UserError

if TYPE_CHECKING:
    from openai import AsyncOpenAI

CONNECT = 4.0  # seconds
LONGEST_WAIT = 120.0  # seconds of Retry-After; what asks for more is left for another run
UNBILLED = ("content_filter", "content_policy_violation", "invalid_prompt")  # the endpoint will not read the prompt


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


class Renamed(Refused):
    """The model wants max_completion_tokens in the place of max_tokens."""


class Unanswerable(Exception):
    """The endpoint refuses this prompt, and will again."""


def completion(content: bytes | dict) -> dict:
    """The JSON of a chat completion that came with status 200: an object with a message, which may say nothing.

    Raises:
        Refused: it is something else, a page of a proxy or an error in words, which nobody bills.
        Lost: it was cut, or has no message and says what it took.
    """
    try:
        body = json.loads(content) if isinstance(content, bytes) else content
    except (ValueError, RecursionError):
        if content.lstrip().startswith(b"{"):
            raise Lost("the answer was cut") from None
        body = content.decode(errors="replace")
    try:
        if isinstance(body["choices"][0]["message"], dict):
            return body
    except (KeyError, IndexError, TypeError):
        pass
    if isinstance(body, dict) and (usage := usage_of(body)):
        raise Lost("200 without an answer, and billed", usage)
    shown = body.get("error") or body if isinstance(body, dict) else body
    raise Refused(f"200 without an answer ({_without_key(' '.join(str(shown).split()))[:80]})")


def as_object(text: bytes | str) -> dict:
    """A JSON object; {}, which holds no answer, for anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # nested without end
        return {}
    return value if isinstance(value, dict) else {}


RENAMED: set[str] = set()  # models that said so: reasoning models, and those that came after gpt-4o


def renamed(error: dict) -> bool:
    return error.get("code") == "unsupported_parameter" and "max_completion_tokens" in str(error.get("message"))


def request(message: str, judge: LLMJudge) -> dict:
    limit = "max_completion_tokens" if judge.model in RENAMED else "max_tokens"
    return {"model": judge.model, "messages": [{"role": "user", "content": message}],
            "temperature": judge.temperature, limit: judge.max_tokens}


def _base_url() -> str:
    return os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"  # empty, as a line of an env file may be


def host_of() -> str:
    """Where OPENAI_BASE_URL points, without user or password."""
    url = _base_url()
    try:
        parts = urlsplit(url)
        host, port, scheme = parts.hostname, parts.port, parts.scheme
    except ValueError:  # a port that is no number, a bracket that is not closed
        host = port = scheme = None
    if not host or scheme not in ("http", "https") or not url.isprintable() or " " in url:
        raise UserError("OPENAI_BASE_URL: expected http://HOST:PORT/v1 or https://HOST/v1")
    host = f"[{host}]" if ":" in host else host
    return f"{host}:{port}" if port else host


def _key() -> str:
    return _header("OPENAI_API_KEY")


def _header(name: str) -> str:
    """A variable that becomes a line of every request; of custom headers, a line each."""
    text = os.environ.get(name, "").strip()
    lines = text.split("\n") if name == "OPENAI_CUSTOM_HEADERS" else [text]
    if not all(line.isascii() and line.isprintable() for line in lines):  # it may be a secret: the text is not shown
        raise UserError(f"{name}: expected letters, digits and signs of ASCII in one line")
    return text


def _without_key(text: str) -> str:
    return text.replace(_key(), "...") if _key() else text


def connect() -> "AsyncOpenAI":
    """An AsyncOpenAI of the environment's endpoint and key."""
    import httpx
    from openai import AsyncOpenAI, DefaultAsyncHttpxClient

    host = host_of()
    for variable in ("OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_CUSTOM_HEADERS"):  # the SDK takes them by itself
        _header(variable)
    key = _key() or ("none" if _local(host) else None)
    if not key:
        raise UserError(f"OPENAI_API_KEY is not set, and {host} needs it; export it, or let OPENAI_BASE_URL name a "
                        "server of your own")
    name = (urlsplit(f"//{host}").hostname or "").lower()
    try:  # what is on this machine is not asked for through a proxy
        web = DefaultAsyncHttpxClient(trust_env=not (name == "localhost" or _is_loopback(name)))
    except (ImportError, ValueError) as error:  # a SOCKS proxy without its package, or none that httpx knows
        raise UserError(f"the proxy of HTTPS_PROXY or ALL_PROXY: {str(error).splitlines()[0].rstrip('.')}; take an "
                        f"http:// proxy, or name {name} in NO_PROXY") from None
    except OSError as error:
        raise UserError(f"SSL_CERT_FILE: {error.strerror or error}; expected a file of certificates") from None
    return AsyncOpenAI(api_key=key, base_url=_base_url(), max_retries=0, http_client=web,
                       timeout=httpx.Timeout(600, connect=CONNECT),
                       _strict_response_validation=True)  # else a page of HTML is a batch


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _local(host: str) -> bool:
    """An endpoint of this machine or its network, which may ask for no key."""
    name = urlsplit(f"//{host}").hostname or ""
    try:
        return ipaddress.ip_address(name).is_private
    except ValueError:
        return "." not in name  # localhost, or a container's name


def reachable(judge: LLMJudge) -> None:
    """Raises UserError where the endpoint, the key or the judge's model is missing; asks nothing and costs nothing."""

    import httpx

    async def models() -> list[str]:
        async with connect() as client:
            patient = client.with_options(timeout=httpx.Timeout(20.0, connect=CONNECT))
            reply = await patient.models.with_raw_response.list()
        try:  # local servers leave out some of what the SDK would insist on
            return [str(model["id"]) for model in as_object(reply.http_response.content)["data"]]
        except (KeyError, TypeError):
            raise Refused("200 without a list of models") from None

    try:
        with errors():
            there = asyncio.run(models())
    except (Lost, Refused) as error:
        raise UserError(f"{host_of()}: the judge does not answer ({error}); check OPENAI_BASE_URL") from None
    if judge.model not in there:
        some = ", ".join(there[:3]) or "none"
        raise UserError(f"judge.model: {host_of()} has no {judge.model!r}; it has {some}{', ...' * (len(there) > 3)}")


@contextmanager
def errors() -> Iterator[None]:
    """The SDK's errors as ours: Lost, Refused, or a UserError for what no retry mends. The key is in none of them."""
    import openai

    try:
        yield
    except openai.APIStatusError as error:
        body = error.body if isinstance(error.body, dict) else {}
        code, status, where = str(body.get("code") or body.get("type") or ""), error.status_code, host_of()
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
        if renamed(body):
            raise Renamed(f"{status} {said}") from None
        if status == 404:
            raise UserError(f"{where}: 404, no such model or path ({said}); check judge.model and OPENAI_BASE_URL, "
                            "which ends in /v1") from None
        raise UserError(f"{where}: {status} {code} {said}; the request cannot be answered as it is") from None
    except (openai.APIResponseValidationError, json.JSONDecodeError):
        raise Refused("200 without an answer") from None
    except openai.APIConnectionError as error:
        if "Connect" in type(error.__cause__).__name__:  # ConnectError, ConnectTimeout: nothing was sent
            if any(isinstance(cause, ssl.SSLError) or isinstance(cause, socket.gaierror)
                   and cause.errno != socket.EAI_AGAIN for cause in _causes(error)):
                raise UserError(f"{host_of()}: no connection ({error.__cause__}); check OPENAI_BASE_URL: its host, and "
                                "whether it is http or https") from None
            raise Refused(f"no connection ({error.__cause__ or 'none in time'})") from None
        raise Lost("the connection was cut or timed out") from None
    except TimeoutError:
        raise Lost("no answer in time") from None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _retry_after(headers: Any) -> float | None:
    for name, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
        try:
            return max(0.0, float(headers[name]) / unit)
        except (KeyError, ValueError):  # the header may be a date: we wait as if it were not there
            pass
    return None


async def pause(attempt: int, error: Exception, spending: Spending) -> None:
    """Wait before another attempt: what the server asks for and some more, so that not all come back at once.

    Raises:
        UserError: it was the last attempt, or the server asks for too long a wait.
    """
    asked = getattr(error, "wait", None) or 0.0
    if attempt >= spending.retries or asked > LONGEST_WAIT:
        what = f"asks to wait {asked:.0f} s" if asked > LONGEST_WAIT else f"failed {attempt + 1} times in a row"
        raise UserError(f"{host_of()} {what}: {error}; what was answered is stored: run again, or check "
                        "OPENAI_BASE_URL, spending.timeout and spending.concurrency") from None
    await asyncio.sleep(asked + 0.5 * 2 ** min(attempt, 4) * random.uniform(0.5, 1))


async def patiently(book: Ledger, call: Callable) -> Any:
    """What a call that may be repeated returns, tried again as a request is."""
    for attempt in range(book.spending.retries + 1):
        try:
            with errors():
                return await call()
        except (Lost, Refused) as error:
            await pause(attempt, error, book.spending)
