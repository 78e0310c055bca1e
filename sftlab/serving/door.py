"""The door of a server: which hosts and which web pages may ask it, in what form, and how much at once.

A page of any website can send requests to 127.0.0.1 from the browser of whoever visits it, and with a DNS name that it
lets point there it could read the answers. So the name that was asked must be one of this machine's, and the page that
asks, if a page does, must be the server's own. Plain ASGI and nothing but the standard library: it stands before vLLM
too, in whose environment there is no sftlab.
"""

import ipaddress
import json
import os
import socket
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

MAX_BODY_BYTES = 4 << 20
SETTINGS = "SFTLAB_DOOR"  # for vLLM, which constructs its middleware without arguments

Asgi = Callable[..., Awaitable[None]]


class TooLarge(Exception):
    """A body that is larger than its header said, or that came in pieces."""


class Door:
    """Refuse a request before the application sees it. `hosts` and `origins` are allowed beside this machine's own."""

    def __init__(self, app: Asgi, hosts: Iterable[str] | None = None, origins: Iterable[str] | None = None) -> None:
        given = json.loads(os.environ.get(SETTINGS, "{}"))
        self.app = app
        self.hosts = {h.lower() for h in (given.get("hosts", ()) if hosts is None else hosts)}
        self.origins = {o.lower().rstrip("/") for o in (given.get("origins", ()) if origins is None else origins)}
        self.hosts |= {"localhost", socket.gethostname().lower(), socket.gethostname().lower().partition(".")[0]}

    async def __call__(self, scope: Mapping[str, Any], receive: Any, send: Any) -> None:
        """Answer a request that is refused, and pass on the others."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refused = self.refusal(scope, headers)
        if refused is None:
            refused = await self.pass_on(scope, receive, send)
        if refused is None:
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        status, message = refused
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
        body = json.dumps({"error": error}).encode()
        length = (b"content-length", str(len(body)).encode())
        await send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [(b"content-type", b"application/json"), length],
            }
        )
        await send({"type": "http.response.body", "body": body})

    async def pass_on(self, scope: Mapping[str, Any], receive: Any, send: Any) -> tuple[int, str] | None:
        """Let the application answer; return how the request is refused if its body turns out to be too large."""
        num_bytes, begun = 0, False

        async def counted() -> Any:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b"")) if message["type"] == "http.request" else 0
            if num_bytes > MAX_BODY_BYTES:
                raise TooLarge(too_large())
            return message

        async def noted(message: Any) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self.app(scope, counted, noted)
        except TooLarge as error:
            return None if begun else (413, str(error))
        return None

    def refusal(self, scope: Mapping[str, Any], headers: Mapping[str, str]) -> tuple[int, str] | None:
        """Return the status and the words with which a request is refused, None if it may pass."""
        host = headers.get("host", "")
        if not self.knows(host):
            return 403, f"Host {host[:100]!r} is no name of this machine: allow it with allowed_hosts=[NAME]"
        origin = headers.get("origin", "").lower()
        own = origin in (f"http://{host.lower()}", f"https://{host.lower()}")
        if origin and not own and origin not in self.origins:
            return 403, f"pages of {origin[:100]!r} may not ask this server: allow them with allowed_origins=[ORIGIN]"
        if not origin and headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            return 403, "pages of other sites may not ask this server"
        if scope.get("method") == "POST":
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                return 415, f"Content-Type is {kind[:100] or 'missing'}: send JSON, -H 'Content-Type: application/json'"
            length = headers.get("content-length", "0")
            if not length.isascii() or not length.isdigit() or len(length) > 18:
                return 400, "Content-Length is no number"
            if int(length) > MAX_BODY_BYTES:
                return 413, too_large()
        return None

    def knows(self, host: str) -> bool:
        """Return whether a Host header names this machine; a bare address cannot be a rebound name."""
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        name = name.lower().rstrip(".")
        try:
            ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
        except ValueError:
            return name in self.hosts
        return True


def too_large() -> str:
    """Return the words for a body over the limit."""
    return f"the body is larger than {MAX_BODY_BYTES >> 20} MiB"
