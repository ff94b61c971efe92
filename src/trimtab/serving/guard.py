"""What stands before vLLM's server: the key on every route, and limits on what is read. An ASGI middleware, given to
vLLM as `--middleware`, which puts it outside of all of vLLM's own.

vLLM's key guards paths under /v1 and a few more; others, as /invocations and /tokenize, it leaves open.
"""

import hashlib
import json
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = frozenset({"/", "/health", "/ping"})  # the page holds nothing secret; the others say that it is alive
MEBIBYTE = 2**20
LARGEST_BODY_MIB = 8.0  # by default: far beyond any prompt that fits a context
DRAINED = 16  # times the largest body: what is read and thrown away, so that a client hears the answer


class Guard:
    """The key, the size of bodies, and how many requests may be under way."""

    def __init__(self, app: App) -> None:
        self.app = app
        self.under_way = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        args = scope["app"].state.args
        # Browsers ask which origins are allowed (OPTIONS) without a key; nothing else is answered to that.
        is_open = scope["path"] in OPEN_PATHS or scope.get("method") == "OPTIONS"
        if not is_open and not _has_key(scope, args.api_key):
            await _refuse(scope, send, 401, "the key is missing or wrong: send it as `Authorization: Bearer KEY`.")
            return
        if scope["type"] == "websocket" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self.app(scope, receive, send)
            return
        largest = int(getattr(args, "trimtab_max_body_mib", LARGEST_BODY_MIB) * MEBIBYTE)
        body = await _read(receive, largest)
        if body is None:
            await _refuse(scope, send, 413, f"the body is larger than {largest} bytes; see `--max-body-mib`.")
            return
        trouble = _trouble(body)
        if trouble:
            await _refuse(scope, send, 400, trouble)
            return
        most = getattr(args, "trimtab_max_requests", 0)
        if most and self.under_way >= most:
            await _refuse(scope, send, 503, f"{most} requests are under way; see `--max-requests`.", retry=True)
            return
        self.under_way += 1
        try:
            await self.app(scope, _replay(body, receive), send)
        finally:
            self.under_way -= 1


def _has_key(scope: Scope, keys: list[str] | None) -> bool:
    known = [key for key in keys or [] if key]
    if not known:
        return True
    sent = next((value for name, value in scope["headers"] if name.lower() == b"authorization"), b"")
    scheme, _, key = sent.partition(b" ")
    digest = hashlib.sha256(key.strip()).digest()
    matches = [secrets.compare_digest(digest, hashlib.sha256(one.encode()).digest()) for one in known]
    return scheme.lower() == b"bearer" and any(matches)


async def _read(receive: Receive, largest: int) -> bytes | None:
    """The whole body; None where it is larger."""
    parts: list[bytes] = []
    size = 0
    while size <= DRAINED * largest:
        message = await receive()
        if message["type"] != "http.request":
            return b"".join(parts)  # the client has gone: the server will notice
        size += len(message.get("body", b""))
        if size <= largest:
            parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            break
    return b"".join(parts) if size <= largest else None


def _trouble(body: bytes) -> str | None:
    """What in a body would be taken for something else further in; None: nothing.

    vLLM's beam search makes requests of its own, without the settings of the one that asked for it.
    """
    if b"use_beam_search" not in body or b"vllm_xargs" not in body:
        return None
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return None  # the server says what is wrong with it
    if isinstance(content, dict) and content.get("use_beam_search") and content.get("vllm_xargs"):
        return "vllm_xargs do not reach beam search: leave one of them out."
    return None


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body once more; then what really comes, which is how a client that leaves is noticed."""
    is_sent = False

    async def replay() -> Message:
        nonlocal is_sent
        if is_sent:
            return await receive()
        is_sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def _refuse(scope: Scope, send: Send, status: int, message: str, retry: bool = False) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": message[:120]})
        return
    error = {"error": {"message": message, "type": "Refused", "param": None, "code": status}}
    headers = [(b"content-type", b"application/json")]
    headers += [(b"www-authenticate", b"Bearer")] if status == 401 else []
    headers += [(b"retry-after", b"1")] if retry else []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(error).encode()})
