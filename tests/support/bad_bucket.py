"""A front of an S3 server that answers as stores under load, or with less than S3, do."""

import http.client
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from tests.support.servers import QuietHandler, listening

# What S3 answers, by its error code: https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html
_STATUS = {"SlowDown": 503, "NotImplemented": 501}
_HOP_BY_HOP = {"connection", "transfer-encoding", "content-length"}


@dataclass
class Front:
    """`url` is the front's. `fault(method, path, headers)` gives "", an error code, or "cut" for half of an answer.

    `hidden` are parts of keys that listings leave out. `asked` counts the requests by method and path.
    """

    url: str = ""
    fault: Callable[[str, str, dict[str, str]], str] = lambda *_: ""
    hidden: set[str] = field(default_factory=set)
    asked: Counter[tuple[str, str]] = field(default_factory=Counter)


@contextmanager
def bad_bucket(server: str) -> Iterator[Front]:
    """A front of the S3 server at this URL, on a free loopback port."""
    front, target = Front(), urlsplit(server)

    class Handler(QuietHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            headers = dict(self.headers.items())
            front.asked[self.command, self.path] += 1
            fault = front.fault(self.command, self.path, headers)
            if fault in _STATUS:
                self.send(_STATUS[fault], {"Content-Type": "application/xml"}, error_text(fault))
                return
            there = http.client.HTTPConnection(target.hostname or "", target.port)
            there.request(self.command, self.path, body, headers)
            got = there.getresponse()
            content = got.read()
            if "list-type=2" in self.path:
                content = without(content, front.hidden)
            size = got.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
            kept = {name: value for name, value in got.getheaders() if name.lower() not in _HOP_BY_HOP}
            there.close()
            if fault == "cut":
                content, self.close_connection = content[: len(content) // 2], True
            self.send(got.status, kept, content, size)

        def send(self, status: int, headers: dict[str, str], content: bytes, size: str | None = None) -> None:
            self.send_response_only(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", size or str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def __getattr__(self, name: str) -> Any:
            if name.startswith("do_"):
                return self.answer
            raise AttributeError(name)

    with listening(Handler) as front.url:
        yield front


def error_text(code: str) -> bytes:
    """The body of an error."""
    return f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>as asked</Message></Error>'.encode()


def without(listing: bytes, hidden: set[str]) -> bytes:
    """A listing without the objects whose key contains one of these."""
    first, *objects = listing.split(b"<Contents>")
    kept, end = [first], b""
    for each in objects:
        content, _, rest = each.partition(b"</Contents>")
        if not any(part.encode() in content for part in hidden):
            kept.append(b"<Contents>" + content + b"</Contents>")
        end = rest
    return b"".join(kept) + end
