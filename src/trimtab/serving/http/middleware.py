"""What stands before vLLM's server: the key on every route, or the name of this machine where there is no key, and
limits on what is read. An ASGI middleware, given to vLLM as `--middleware`, which puts it outside of all of vLLM's own.

vLLM's key guards paths under /v1 and a few more; others, as /invocations and /tokenize, it leaves open.
"""

import asyncio
import hashlib
import ipaddress
import json
import secrets
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from trimtab.serving.http.defaults import LARGEST_BODY_MIB, MOST_REQUESTS, PROMPTS
from trimtab.serving.parse_bool import parse_bool
from trimtab.serving.requests import names_of_settings

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = frozenset({"/", "/health", "/ping"})  # the page holds nothing secret; the others say that it is alive
BATCH_PATH = "/v1/chat/completions/batch"
# Where vLLM hands a body's vllm_xargs on to the engine; elsewhere it reads bodies without a word about them.
STEERED_PATHS = frozenset(
    {
        "/v1/completions",
        "/v1/completions/render",
        "/v1/chat/completions",
        BATCH_PATH,
        "/v1/chat/completions/render",
        "/v1/messages",
        "/v1/messages/render",
        "/v1/responses",
        "/v1/responses/render",
        "/invocations",
    }
)
RESPONSES_PATHS = frozenset({"/v1/responses", "/v1/responses/render"})
MEBIBYTE = 2**20
READ_WITHIN = 30.0  # seconds for a whole body: who sends a byte now and then holds no place for ever
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
        keys = [key for key in args.api_key or [] if key]
        if not keys and not _is_for_here(scope, args):
            await _refuse(
                scope, send, 403, "without a key only this machine's own names are answered: see `--api-key`."
            )
            return
        if keys and not _is_open(scope) and not _has_key(scope, keys):
            await _refuse(scope, send, 401, "the key is missing or wrong: send it as `Authorization: Bearer KEY`.")
            return
        if scope["type"] == "websocket" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self.app(scope, receive, send)
            return
        if _is_open(scope):  # its body matters to nobody, and may come from anybody
            await self.app(scope, _replay(b"", receive), send)
            return
        most = getattr(args, "trimtab_max_requests", MOST_REQUESTS)
        if most and self.under_way >= most:
            await _refuse(scope, send, 503, f"{most} requests are under way; see `--max-requests`.", retry=True)
            return
        self.under_way += 1  # before the body is read: bodies take memory too
        try:
            await self._pass_on(scope, receive, send, args)
        finally:
            self.under_way -= 1

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send, args: Any) -> None:
        """Hands a request on once its body has come and nothing is wrong with it."""
        largest = int(getattr(args, "trimtab_max_body_mib", LARGEST_BODY_MIB) * MEBIBYTE)
        try:
            body = await asyncio.wait_for(_read(receive, largest), READ_WITHIN)
        except TimeoutError:
            await _refuse(scope, send, 408, f"the body had not come whole after {READ_WITHIN:g} seconds.")
            return
        if body is None:
            await _refuse(scope, send, 413, f"the body is larger than {largest} bytes; see `--max-body-mib`.")
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        trouble = _trouble(body, path, getattr(args, "trimtab_max_prompts", PROMPTS))
        if trouble:
            await _refuse(scope, send, 400, trouble)
            return
        await self.app(scope, _replay(body, receive), send)


def _is_open(scope: Scope) -> bool:
    """Whether a request is answered without a key: open paths to be read, and what browsers ask about origins.

    Such a question (a preflight) has both headers and gets no further than vLLM's own answer to it. Any other OPTIONS
    would reach the routes, past vLLM's key too.
    """
    method = scope.get("method")
    if method == "OPTIONS":
        return bool(_header(scope, b"origin") and _header(scope, b"access-control-request-method"))
    path = scope["path"]
    return (path in OPEN_PATHS and method in ("GET", "HEAD")) or (method, path) == ("POST", "/ping")


def _header(scope: Scope, name: bytes) -> bytes:
    return next((value for found, value in scope["headers"] if found.lower() == name), b"")


def _is_for_here(scope: Scope, args: Any) -> bool:
    """Whether a request names this machine, where nobody else can connect anyway.

    A page of another site may let its own name point to 127.0.0.1 once it is loaded (DNS rebinding): to the browser its
    requests then stay within one site, and reach this server. They still carry that name as `Host`.
    """
    if getattr(args, "uds", None) or not args.trimtab_is_local:
        return True
    name = _header(scope, b"host").decode("latin-1").strip().lower()
    name = name.rpartition("]")[0] + "]" if name.startswith("[") else name.partition(":")[0]
    return name == args.host.lower() or _is_loopback(name.strip("[]"))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _has_key(scope: Scope, keys: list[str]) -> bool:
    scheme, _, key = _header(scope, b"authorization").partition(b" ")
    digest = hashlib.sha256(key.strip()).digest()
    matches = [secrets.compare_digest(digest, hashlib.sha256(one.encode()).digest()) for one in keys]
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


def _trouble(body: bytes, path: str, most_prompts: int) -> str | None:
    """What in a body would be overlooked further in, or be answered with 500; None: nothing.

    vLLM's beam search makes requests of its own, without the settings of the one that asked for it. It limits how many
    prompts a completion has, but not how many conversations a batch of chats has.
    """
    is_batch = path == BATCH_PATH
    if not (is_batch or path in RESPONSES_PATHS or _may_name(body, ("vllm_xargs", *names_of_settings()))):
        return None
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return None  # the server says what is wrong with it
    if not isinstance(content, dict):
        return None
    conversations = content.get("messages")
    if is_batch and isinstance(conversations, list) and len(conversations) > most_prompts:
        return f"{len(conversations)} conversations, more than {most_prompts}; see VLLM_MAX_COMPLETION_PROMPTS."
    if path in RESPONSES_PATHS and any(map(_is_empty_answer, _listed(content.get("input")))):
        return "an assistant's message in `input` has an empty list as its content: leave the message out."
    misplaced = next((name for name in names_of_settings() if _is_set(name, content.get(name))), None)
    if path in STEERED_PATHS and misplaced:  # vLLM overlooks what it does not know
        return f"{misplaced} has no effect here: what steers goes into vllm_xargs, see GET /v1/steering."
    if not content.get("vllm_xargs"):
        return None
    if path not in STEERED_PATHS:
        return f"vllm_xargs have no effect at {path[:100]}; they have at {', '.join(sorted(STEERED_PATHS))}."
    if parse_bool(content.get("use_beam_search")):
        return "vllm_xargs do not reach beam search: leave one of them out."
    return None


def _is_empty_answer(item: Any) -> bool:
    """Whether an earlier answer has no part: vLLM takes the first one without looking whether it is there."""
    return isinstance(item, dict) and item.get("role") == "assistant" and item.get("content") == []


def _is_set(name: str, value: Any) -> bool:
    """Whether a setting asks for something: a trace that is not wanted does not."""
    return parse_bool(value) if name == "trace" else value is not None


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _may_name(body: bytes, names: Iterable[str]) -> bool:
    """Whether JSON may hold a name: as it is, escaped (\\u0076), or in UTF-16 or 32, full of zeros."""
    return any(f'"{name}"'.encode() in body for name in names) or b"\\u" in body or b"\0" in body


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
    headers += [(b"connection", b"close")] if status == 408 else []  # nobody waits for the rest
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(error).encode()})
