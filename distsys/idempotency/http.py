"""Idempotency over HTTP: ASGI middleware that carries out a request with an Idempotency-Key once.

Promise  every later request with a key gets the first 2xx response of the app: status, headers and body, byte for byte,
         with Idempotent-Replayed: true; the app is not called again. Keys belong to a caller: guessing another
         caller's key gets nothing. An error frees the key, unless the effect may have happened.
Not      one effect by itself, see claims.py. Set-Cookie, Date and the like are not kept. A stream, or a response longer
         than `max_response`, passes with Idempotency-Stored: false; later requests learn that it was done (409).
Units    seconds, bytes.
Errors   as application/problem+json: 400 no key or a malformed one, 401 no caller, 409 still running (Retry-After),
         unknown or not kept, 413, 422 another request, 503 no store (on_failure="closed"; else the store's error
         passes).
Source   draft-ietf-httpapi-idempotency-key-header-07; Stripe's API, "Idempotent requests"; RFC 9457.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Awaitable, Callable, Collection
from decimal import Decimal
from operator import itemgetter
from typing import Annotated, Any
from urllib.parse import parse_qsl

from distsys._support.arguments import optional
from distsys._support.http import PROBLEM, App, Message, Receive, Scope, Send, respond, send_problem
from distsys.errors import BadKey, CallerUnknown, DistsysError, OutcomeUnknown
from distsys.idempotency.answers import DROPPED, http_answer, http_response
from distsys.idempotency.claims import NOT_KEPT, Claim, Claims, Store, logger
from distsys.idempotency.keys import canonical, fingerprint_of, parse_key

Caller = Callable[[Scope], str | Awaitable[str]]
MIB = 1_048_576
# ASGI extensions that send a response, or parts of it, past this middleware.
UNREADABLE_EXTENSIONS = frozenset({"http.response.pathsend", "http.response.zerocopysend", "http.response.trailers"})


class IdempotencyMiddleware:
    """ASGI middleware that carries out each request with an Idempotency-Key once.

    `app.add_middleware(IdempotencyMiddleware, store=RedisStore(redis), scope=lambda scope: scope["user"].id)`

    scope        who calls, from the ASGI scope; may be async. Authentication has to come before this middleware: a
                 dependency of the route is too late. Without it, `public=True` has to say that every caller may get
                 every answer
    methods      the HTTP methods whose keys count; other requests pass
    required     whether a key must be sent: for all requests, or as a function of the ASGI scope. Otherwise a request
                 without one passes
    fields       members of a JSON body that have to be equal in all attempts; None: the body, byte for byte
    dropped      headers of a response that are not kept, besides Set-Cookie, Date and others of a single exchange
    max_request, max_response  bytes that are kept in memory
    options      ttl, lease, wait, on_unknown, on_failure, encrypt, decrypt: see Claims. A function on_unknown gets the
                 `claim.key` of the attempt, and returns http_answer(status, headers, body)

    The app finds its claim in the scope, as "distsys.idempotency": after `claim.effect_began = True` a failure leaves
    the outcome unknown, and `await claim.fence()` is the number to write with.
    """

    def __init__(
        self,
        app: App,
        store: Store,
        *,
        scope: Caller | None = None,
        public: bool = False,
        methods: Collection[str] = ("POST", "PATCH"),
        required: bool | Callable[[Scope], bool] = False,
        fields: Collection[str] | None = None,
        dropped: Collection[str] = (),
        max_request: int = MIB,
        max_response: int = MIB,
        **options: Any,
    ) -> None:
        if (scope is None) is not public:
            advice = "scope=a function of the ASGI scope, or public=True if everybody may get everybody's answers"
            raise ValueError(f"scope={scope!r}, public={public!r}: say whose keys they are: {advice}")
        for name, listed in (("methods", methods), ("fields", fields), ("dropped", dropped)):
            if isinstance(listed, str):
                raise TypeError(f"{name}={listed!r} is a str: give a list of them")
        self.app, self.claims = app, Claims(store, **options)
        self._caller, self._required, self._fields = scope, required, fields
        self._methods = frozenset(map(str.upper, methods))
        self._dropped = DROPPED | {name.lower().encode() for name in dropped}
        self._max_request, self._max_response = max_request, max_response

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve an ASGI request."""
        given = None
        if scope["type"] == "http" and scope["method"] in self._methods:
            given = [value.decode("latin-1") for name, value in scope["headers"] if name == b"idempotency-key"]
        if given is None or not (given or (self._required(scope) if callable(self._required) else self._required)):
            await self.app(scope, receive, send)
            return
        try:
            name = parse_key(",".join(given))
            key = hashlib.sha256(f"{await self._caller_of(scope)}\0{name}".encode()).hexdigest()
            body = await self._body(receive)
            if body is None:
                return  # the client has disconnected, and nothing was begun
            claim = await self.claims.begin(key, self._fingerprint(scope, body), name=name)
        except DistsysError as refusal:
            await send_problem(send, refusal)
            return
        if claim.answer is not None:
            status, headers, body = http_response(claim.answer)
            await respond(send, status, [*headers, (b"idempotent-replayed", b"true")], body)
            return
        scope["distsys.idempotency"] = claim
        extensions = scope.get("extensions") or {}
        scope["extensions"] = {name: facts for name, facts in extensions.items() if name not in UNREADABLE_EXTENSIONS}
        async with claim:
            await self.app(scope, _replayed(body, receive), _HeldResponse(self, claim, send))

    async def _caller_of(self, scope: Scope) -> str:
        if self._caller is None:
            return ""
        caller = self._caller(scope)
        if inspect.isawaitable(caller):
            caller = await caller
        if not caller:
            raise CallerUnknown
        return str(caller)

    async def _body(self, receive: Receive) -> bytes | None:
        """Return the body of the request; None if the client disconnects before its end. TooLarge above max_request."""
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._max_request:
                raise TooLarge(f"a request with an Idempotency-Key has at most {self._max_request:,} bytes")
        return bytes(body)

    def _fingerprint(self, scope: Scope, body: bytes) -> bytes:
        content: Any = hashlib.sha256(body).hexdigest()
        if self._fields is not None:
            try:
                members: dict[str, Any] = json.loads(body, parse_float=Decimal)
                content = canonical({name: value for name, value in members.items() if name in self._fields}, "body")
            except (ValueError, AttributeError, ArithmeticError, RecursionError) as error:
                raise BadKey(f"the body of this request has to be a JSON object: {str(error)[:200]}") from error
        text = scope["query_string"].decode("latin-1")
        query = sorted(parse_qsl(text, keep_blank_values=True, encoding="latin-1"), key=itemgetter(0))
        return fingerprint_of(scope["method"], scope.get("root_path", "") + scope["path"], query, content)


class TooLarge(BadKey):
    """The request is too large to be compared with later ones."""

    status = 413


class _HeldResponse:
    """The app's response, held until it is complete and kept; a stream, or what is too long, passes at once."""

    def __init__(self, middleware: IdempotencyMiddleware, claim: Claim, send: Send) -> None:
        self._middleware, self._claim, self._send = middleware, claim, send
        self._start: Message = {}
        self._body = bytearray()
        self._succeeded = self._passing = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = {**message, "headers": list(message.get("headers", ()))}
            self._succeeded = 200 <= int(message["status"]) < 300
            self._claim.effect_began |= self._succeeded  # whatever becomes of the rest of the response
        elif message["type"] != "http.response.body":
            await self._send(message)
        elif not message.get("more_body", False):
            await self._finish(message)
        elif self._passing:
            await self._send(message)
        else:
            self._body += message.get("body", b"")
            has_length = any(name.lower() == b"content-length" for name, _ in self._start["headers"])
            if not has_length or len(self._body) > self._middleware._max_response:
                self._passing = True
                await self._send_held(stored=False, more_body=True)

    async def _finish(self, last: Message) -> None:
        """Keep the response, or free the key, before the client gets the end of it and may try again."""
        if not self._passing:
            self._body += last.get("body", b"")
        stored = True
        if not self._succeeded:
            await self._claim.give_up()
        else:
            try:
                stored = await self._keep()
            except OutcomeUnknown as error:
                if not self._passing:
                    await send_problem(self._send, error)
                    return
        if self._passing:
            await self._send(last)
        else:
            await self._send_held(stored=stored, more_body=False)

    async def _keep(self) -> bool:
        """Return whether the response is in the store."""
        start, body, answer = self._start, bytes(self._body), NOT_KEPT
        if not self._passing and len(body) <= self._middleware._max_response:
            answer = http_answer(start["status"], start["headers"], body, self._middleware._dropped)
        try:
            await self._claim.done(answer)
        except Exception as error:
            if not self._middleware.claims.store.unavailable(error):
                raise
            logger.warning("an answer could not be kept: %r", error)
            return False
        return answer != NOT_KEPT and self._claim.owner > 0

    async def _send_held(self, *, stored: bool, more_body: bool) -> None:
        headers = self._start["headers"] if stored else [*self._start["headers"], (b"idempotency-stored", b"false")]
        await self._send({**self._start, "headers": headers})
        await self._send({"type": "http.response.body", "body": bytes(self._body), "more_body": more_body})


def idempotency_key_header(*, required: bool = True) -> Callable[..., Awaitable[str | None]]:
    """Return a FastAPI dependency that gives the header without quotes: `key: str = Depends(idempotency_key_header())`.

    A malformed header is a 400; a missing one too, unless required=False: then the key is None.
    """
    fastapi: Any = optional("fastapi", "web")
    text = f"One key per intent, the same in all its attempts; {'required' if required else 'optional'}."

    async def read(request: Any, in_openapi: Any) -> str | None:
        given = request.headers.getlist("idempotency-key")
        if not given and not required:
            return None
        try:
            return parse_key(",".join(given))
        except BadKey as error:
            raise fastapi.HTTPException(error.status, str(error), {"content-type": PROBLEM}) from error

    # FastAPI itself would answer a missing required header with 422: to it the header is optional.
    header = Annotated[str | None, fastapi.Header(alias="Idempotency-Key", description=text)]
    read.__annotations__ |= {"request": fastapi.Request, "in_openapi": header}
    read.__defaults__ = (None,)
    return read


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body which was read, then what `receive` gives."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def read() -> Message:
        return first.pop() if first else await receive()

    return read
