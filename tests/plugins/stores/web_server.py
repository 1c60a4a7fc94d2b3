"""A small HTTP server that lists or not, knows ranges or not, and cuts connections."""

from __future__ import annotations

import base64
import html
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote, unquote, urlsplit


@dataclass
class Site:
    """What the server serves, how it behaves, and what it saw.

    Attributes:
        files: path without the leading slash -> content.
        listing: whether directories are pages of links.
        ranges: whether ranges are served.
        lengths: whether lengths are told.
        stamps: whether ETags are.
        cut_after: bytes of a body after which the connection is cut, for the next `cuts` bodies.
        status: what every request gets, if not 0.
        password: what has to be given with the user "me", if anything.
        links: extra links of every page.
        sent: path -> bytes of bodies sent.
        ranges_seen: the Range headers of GET requests.
    """

    files: dict[str, bytes]
    listing: bool = True
    ranges: bool = True
    lengths: bool = True
    stamps: bool = True
    cut_after: int = 0
    cuts: int = 0
    status: int = 0
    password: str = ""
    links: tuple[str, ...] = ()
    url: str = ""
    sent: Counter[str] = field(default_factory=Counter)
    ranges_seen: list[str] = field(default_factory=list)


@contextmanager
def serving(site: Site) -> Iterator[Site]:
    """Serve on a free port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(head=True)

        def do_GET(self) -> None:
            self.answer(head=False)

        def answer(self, head: bool) -> None:
            path = unquote(urlsplit(self.path).path).lstrip("/")
            if site.status:
                return self.refuse(site.status)
            if site.password:
                login = base64.b64encode(f"me:{site.password}".encode()).decode()
                if self.headers.get("Authorization") != f"Basic {login}":
                    return self.refuse(401)
            if path in site.files:
                return self.give(path, site.files[path], head)
            inside = f"{path.rstrip('/')}/" if path.strip("/") else ""
            below = [name[len(inside) :] for name in site.files if name.startswith(inside)]
            if not below or not site.listing:
                return self.refuse(404)
            return self.give(path, page(below), head, "text/html")

        def give(
            self, path: str, body: bytes, head: bool, kind: str = "application/octet-stream"
        ) -> None:
            begin, end = 0, len(body)
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if not head and asked:
                site.ranges_seen.append(asked[0])
            if asked and site.ranges and not head:
                begin, end = int(asked[1]), min(int(asked[2] or end - 1) + 1, end)
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(body)}")
            else:
                self.send_response(200)
            self.send_header("Content-Type", kind)
            if site.lengths:
                self.send_header("Content-Length", str(end - begin))
            if site.stamps and kind != "text/html":
                self.send_header("ETag", f'"{hash(body):x}"')
            self.end_headers()
            if head:
                return
            data = body[begin:end]
            if site.cuts and kind != "text/html" and len(data) > site.cut_after:
                site.cuts -= 1
                data = data[: site.cut_after]
                self.close_connection = True
            try:
                self.wfile.write(data)
                site.sent[path] += len(data)
            except OSError:
                pass  # the client has read what it wanted

        def refuse(self, status: int) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    def page(names: list[str]) -> bytes:
        links = {name.partition("/")[0] + ("/" if "/" in name else "") for name in names}
        hrefs = [quote(link) for link in sorted(links)] + list(site.links)
        rows = "".join(f'<li><a href="{html.escape(href)}">x</a></li>' for href in hrefs)
        return f'<html><a href="../">up</a><a href="?C=M;O=A">date</a>{rows}</html>'.encode()

    class Server(ThreadingHTTPServer):
        request_queue_size = 64  # or a connection in eight waits a second

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        site.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield site
        finally:
            server.shutdown()
