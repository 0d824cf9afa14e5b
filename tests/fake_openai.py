"""A small OpenAI: a real HTTP server that answers, bills, and fails as its script says.

    with Fake(faults=["429", "ok", "cut"]) as fake: ...      # OPENAI_BASE_URL=fake.url
    python tests/fake_openai.py 8000 --faults 429,500,garbage --delay 0.05

Of two summaries the longer wins, and A where both are as long. Asked to write, it says the next two words of the post.
A fault is used up by the next request; for a batch, by its next line. Timeouts and cut answers are billed, as they are
in real life; errors are not.
"""

import argparse
import json
import re
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ERRORS = {  # fault -> status, code
    "429": (429, "rate_limit_exceeded"), "500": (500, "server_error"), "503": (503, "overloaded"),
    "400": (400, "invalid_value"), "401": (401, "invalid_api_key"), "404": (404, "model_not_found"),
    "quota": (429, "insufficient_quota"), "filter": (400, "content_filter"), "expired": (408, "batch_expired")}

RENAMED = 400, {"error": {"code": "unsupported_parameter", "param": "max_tokens", "type": "invalid_request_error",
                          "message": "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
                                     "'max_completion_tokens' instead."}}
PAGE = "<html>a proxy is here</html>"
UNBILLED = {"html": PAGE, "said": {"error": {"message": "try again"}}}  # fault -> what comes with status 200


class Fake:
    """The server, and what it remembers.

    Args:
        faults: for each request in the order they come "ok" or a fault: one of ERRORS, "hang", "cut", "empty",
            "garbage", "refusal", "model", "drop" (a batch's line that is in no file); or with status 200 and no answer
            "html", "said" (an error in words), "half" (of the JSON, billed), "nothing" (no choices, billed).
        outage: seconds from the first request on in which all that is asked gets a page of HTML.
        delay: seconds an answer takes. polls: how often a batch is looked at before it is done.
        key: what OPENAI_API_KEY must be, if anything. retry_after: seconds, a header of 429.
        tokens: of a prompt and an answer, what is billed: tokens read and written. models: what it says it has.
        renamed: it wants max_completion_tokens, as newer models do. enqueued: requests of a batch at most, as the limit
            on an account's enqueued tokens has it.
    """

    def __init__(self, faults=(), delay=0.0, polls=2, key=None, retry_after="0.2", port=0,
                 tokens=lambda prompt, text: (len(prompt) // 4, len(text) // 4 + 1), models=("gpt-4o-2024-08-06",),
                 outage=0.0, renamed=False, enqueued=None):
        self.faults, self.delay, self.polls, self.key = list(faults), delay, polls, key
        self.retry_after, self.tokens, self.models = retry_after, tokens, models
        self.renamed, self.enqueued = renamed, enqueued
        self.lock = threading.Lock()
        self.asked = Counter()  # prompt -> how often, errors included
        self.times = []  # (prompt, seconds) of each request
        self.billed = []  # (prompt, tokens read, tokens written) of each answer
        self.files, self.batches = {}, {}
        self.outage, self.start = outage, None
        self.pages = Counter()  # the start of a path -> how often it answers with a page of HTML
        self.at_once = self.most_at_once = 0
        fake = self

        class Bound(Handler):
            server_openai = fake

        self.http = Server(("127.0.0.1", port), Bound)
        self.port = self.http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()

    def dollars(self, read: float, written: float) -> float:
        """What it billed, at dollars per million tokens."""
        with self.lock:
            return sum(r * read + w * written for _, r, w in self.billed) / 1e6

    def next_fault(self, prompt: str) -> str:
        with self.lock:
            self.asked[prompt] += 1
            self.times.append((prompt, time.monotonic()))
            return self.faults.pop(0) if self.faults else "ok"

    def page(self, path: str) -> bool:
        """Whether this request gets a page in place of an answer."""
        with self.lock:
            self.start = self.start or time.monotonic()
            if here := next((start for start, times in self.pages.items() if times and path.startswith(start)), None):
                self.pages[here] -= 1
            return here is not None or time.monotonic() < self.start + self.outage

    def completion(self, body: dict, fault: str) -> dict:
        """The answer to a request, billed."""
        prompt = body["messages"][-1]["content"]
        text = say(prompt, self.asked[prompt])
        text = {"garbage": "They are both fine summaries.", "empty": "", "refusal": None}.get(fault, text)
        message = {"role": "assistant", "content": text, "refusal": "I can't help with that." if text is None else None}
        tokens = self.tokens(prompt, text or "")
        with self.lock:
            self.billed.append((prompt, *tokens))
        return {"id": "chatcmpl-1", "object": "chat.completion", "created": 0,
                "model": "another-model-2020-01-01" if fault == "model" else body["model"],
                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}] * (fault != "nothing"),
                "usage": {"prompt_tokens": tokens[0], "completion_tokens": tokens[1], "total_tokens": sum(tokens)}}

    def error(self, fault: str, body: dict, key: str = "") -> tuple[int, dict]:
        status, code = ERRORS[fault]
        said = f"{code} (fake), model {body.get('model')}, key {key}"  # a server that tells the key it was given
        return status, {"error": {"message": said, "type": code, "param": None, "code": code}}

    def run_batch(self, batch: dict) -> None:
        """Answer the lines of a batch's file into an output and an error file."""
        out, err, count = [], [], len(self.files[batch["input_file_id"]].splitlines())
        if self.enqueued and count > self.enqueued:
            message = f"Enqueued token limit reached for {batch['id']}."
            batch |= {"status": "failed", "errors": {"object": "list", "data": [
                {"code": "token_limit_exceeded", "message": message, "line": None, "param": None}]}}
            return
        for line in self.files[batch["input_file_id"]].splitlines():
            request = json.loads(line)
            fault = self.next_fault(request["body"]["messages"][-1]["content"])
            if self.renamed and "max_tokens" in request["body"]:
                status, body = RENAMED
                err.append({"custom_id": request["custom_id"], "response": {"status_code": status, "body": body},
                            "error": None})
            elif fault in ERRORS:
                status, body = self.error(fault, request["body"])
                err.append({"custom_id": request["custom_id"], "response": {"status_code": status, "body": body},
                            "error": body["error"] if fault == "expired" else None})
            elif fault in UNBILLED:
                out.append({"custom_id": request["custom_id"], "error": None,
                            "response": {"status_code": 200, "body": UNBILLED[fault]}})
            elif fault != "drop":
                out.append({"custom_id": request["custom_id"], "error": None,
                            "response": {"status_code": 200, "body": self.completion(request["body"], fault)}})
        for name, lines in (("output_file_id", out), ("error_file_id", err)):
            if lines:
                batch[name] = f"file-{name}-{batch['id']}"
                self.files[batch[name]] = "".join(json.dumps(line) + "\n" for line in lines).encode()
        batch["status"] = "completed"


def say(prompt: str, times: int) -> str:
    """The answer to a prompt that is asked for the n-th time."""
    if found := re.search(r"### \w+ A:\n(.*)\n\n### \w+ B:\n(.*)\n\n### Instr", prompt, re.DOTALL):
        a, b = found.groups()
        return f"Comparison: one is longer.\nPreferred: {'A' if len(a) >= len(b) else 'B'}"
    if "two-word summary" in prompt:
        words = prompt.split("### Post:\n")[1].split("\n\n### Instructions")[0].split()
        return f"Summary: {' '.join(words[2 * times - 2:2 * times] or words[:2])}"
    return f"You said: {prompt}"


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256  # 5 by default: more connections at once would be reset

    def handle_error(self, request, client_address):
        """Clients that are gone are part of the play."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_openai: Fake

    def log_message(self, *_):
        pass

    def reply(self, status: int, value, **headers) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, content in {"Content_Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), content)
        self.end_headers()
        self.wfile.write(data)

    def refused(self, fake: Fake) -> bool:
        given = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if fake.key and given != fake.key:
            self.reply(*fake.error("401", {}, given))
            return True
        return False

    def is_page(self, fake: Fake) -> bool:
        """HTML, half of the times under the name of JSON."""
        if not fake.page(self.path):
            return False
        kind = ("text/html", "application/json")[len(fake.times) % 2]
        self.reply(200, PAGE.encode(), Content_Type=kind)
        return True

    def do_POST(self):
        fake = self.server_openai
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if self.refused(fake) or self.is_page(fake):
            return
        if self.path == "/v1/chat/completions":
            with fake.lock:
                fake.at_once += 1
                fake.most_at_once = max(fake.most_at_once, fake.at_once)
            try:
                self.chat(fake, json.loads(data))
            finally:
                with fake.lock:
                    fake.at_once -= 1
        elif self.path == "/v1/files":
            boundary = self.headers["Content-Type"].split("boundary=")[1].encode()
            part = next(part for part in data.split(b"--" + boundary) if b'filename="' in part)
            with fake.lock:
                name = f"file-{len(fake.files)}"
                fake.files[name] = part.split(b"\r\n\r\n", 1)[1].removesuffix(b"\r\n")
            self.reply(200, {"id": name, "object": "file", "bytes": len(data), "created_at": 0, "filename": "x.jsonl",
                             "purpose": "batch", "status": "processed"})
        elif self.path == "/v1/batches":
            with fake.lock:
                name = f"batch_{len(fake.batches)}"
                fake.batches[name] = {"id": name, "object": "batch", "status": "in_progress", "created_at": 0,
                                      "polls": fake.polls} | json.loads(data)
            if fake.faults and fake.faults[0] == "cut":  # made, and the answer to that is lost
                fake.faults.pop(0)
                self.close_connection = True
                return
            self.reply(200, fake.batches[name])
        else:
            self.reply(*fake.error("404", {}))

    def do_GET(self):
        fake = self.server_openai
        path = self.path.split("?")[0]
        if self.refused(fake) or self.is_page(fake):
            return
        if path == "/v1/batches":
            self.reply(200, {"object": "list", "data": list(fake.batches.values()), "has_more": False})
        elif batch := fake.batches.get(path.removeprefix("/v1/batches/")):
            with fake.lock:
                batch["polls"] -= 1
                ready = batch["polls"] == 0
            if ready:
                fake.run_batch(batch)
            self.reply(200, batch)
        elif path.startswith("/v1/files/") and path.endswith("/content"):
            self.reply(200, fake.files[path.split("/")[3]])
        elif path == "/v1/models":
            models = [{"id": name, "object": "model", "created": 0, "owned_by": "us"} for name in fake.models]
            self.reply(200, {"object": "list", "data": models})
        else:
            self.reply(*fake.error("404", {}))

    def chat(self, fake: Fake, body: dict) -> None:
        fault = fake.next_fault(body["messages"][-1]["content"])
        if fake.renamed and "max_tokens" in body:
            self.reply(*RENAMED)
            return
        if fault in ERRORS:
            given = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            headers = {"Retry_After": fake.retry_after} if fault == "429" else {}
            self.reply(*fake.error(fault, body, given), **headers)
            return
        if fault in UNBILLED:
            value = UNBILLED[fault]
            self.reply(200, value.encode() if fault == "html" else value)
            return
        value = json.dumps(fake.completion(body, fault)).encode()
        time.sleep(fake.delay)
        if fault == "hang":
            time.sleep(2)
        if fault in ("cut", "hang"):
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(value)))
            self.end_headers()
            self.wfile.write(value[:len(value) // 2])
            self.close_connection = True
        elif fault == "half":
            self.reply(200, value[:len(value) // 2])
        else:
            self.reply(200, value)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("port", type=int)
    parser.add_argument("--faults", default="", help="429,ok,cut,...")
    parser.add_argument("--delay", type=float, default=0.0)
    a = parser.parse_args()
    fake = Fake([fault for fault in a.faults.split(",") if fault], delay=a.delay, port=a.port)
    print(f"export OPENAI_BASE_URL={fake.url}", flush=True)
    fake.http.serve_forever()
