"""Idempotency over HTTP: ASGI middleware that carries out a request with an Idempotency-Key once.

Promise  the first 2xx that the app gives to a key is what every later request with it is answered: status, headers and
         body, byte for byte, with Idempotent-Replayed: true; the app is not asked again. Keys belong to a caller: who
         guesses another's gets nothing of it. An error frees the key, unless the effect may have happened.
Not      one effect by itself, see claims.py; Set-Cookie, Date and the like are not kept; a stream, and what is longer
         than `max_response`, passes with Idempotency-Stored: false, and later requests are told that it was done.
Units    seconds, bytes.
Errors   as application/problem+json: 400 no key or a malformed one, 401 no caller, 409 still running (Retry-After) or
         unknown or not kept, 413, 422 another request, 503 no store (on_failure="closed"; else its error passes).
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
# Ways to answer that this module could not read back.
UNREAD = frozenset({"http.response.pathsend", "http.response.zerocopysend", "http.response.trailers"})


class IdempotencyMiddleware:
    """`app.add_middleware(IdempotencyMiddleware, store=RedisStore(redis), scope=lambda scope: scope["user"].id)`

    scope        who calls, from the ASGI scope; may be async. Whoever authenticates comes before this middleware: a
                 dependency of the route is too late. Without it `public=True` has to say that every caller may be
                 given every answer
    methods      those that are looked at
    required     whether a key must be sent, for all of them or by the ASGI scope; without one a request passes
    fields       of a JSON body, that have to be the same in all attempts; None: the body, byte for byte
    dropped      headers of a response that are not kept, besides Set-Cookie, Date and what is of one exchange alone
    max_request, max_response  that are kept in memory
    options      ttl, lease, wait, on_unknown, on_failure, encrypt, decrypt: see Claims. A function on_unknown is given
                 the `claim.key` of the attempt, and says http_answer(status, headers, body)

    The app finds its claim in the scope, as "distsys.idempotency": `claim.effect_began = True` says that from now on a
    failure leaves the outcome unknown, and `await claim.fence()` is the number to write with.
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
            raise ValueError(
                f"scope={scope!r}, public={public!r}: say whose keys they are, by scope=a function of the ASGI scope, "
                "or public=True if everybody may be given everybody's answers"
            )
        for name, several in (("methods", methods), ("fields", fields), ("dropped", dropped)):
            if isinstance(several, str):
                raise TypeError(f"{name}={several!r} is a str: give a list of them")
        self.app, self.claims = app, Claims(store, **options)
        self._caller, self._required, self._fields = scope, required, fields
        self._methods = frozenset(map(str.upper, methods))
        self._dropped = DROPPED | {name.lower().encode() for name in dropped}
        self._max_request, self._max_response = max_request, max_response

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in self._methods:
            await self.app(scope, receive, send)
            return
        given = [value.decode("latin-1") for name, value in scope["headers"] if name == b"idempotency-key"]
        required = self._required(scope) if callable(self._required) else self._required
        if not given and not required:
            await self.app(scope, receive, send)
            return
        try:
            name = parse_key(",".join(given))
            key = hashlib.sha256(f"{await self._who(scope)}\0{name}".encode()).hexdigest()
            body = await self._body(receive)
            if body is None:
                return  # the client has gone, and nothing was begun
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
        scope["extensions"] = {name: each for name, each in extensions.items() if name not in UNREAD}
        async with claim:
            await self.app(scope, _again(body, receive), _Response(self, claim, send))

    async def _who(self, scope: Scope) -> str:
        if self._caller is None:
            return ""
        who = self._caller(scope)
        who = await who if inspect.isawaitable(who) else who
        if not who:
            raise CallerUnknown
        return str(who)

    async def _body(self, receive: Receive) -> bytes | None:
        chunks, size, more = list[bytes](), 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            chunks.append(message.get("body", b""))
            more, size = message.get("more_body", False), size + len(chunks[-1])
            if size > self._max_request:
                raise TooLarge(f"a request with an Idempotency-Key has at most {self._max_request:,} bytes")
        return b"".join(chunks)

    def _fingerprint(self, scope: Scope, body: bytes) -> bytes:
        content: Any = hashlib.sha256(body).hexdigest()
        if self._fields is not None:
            try:
                members: dict[str, Any] = json.loads(body, parse_float=Decimal)
                content = canonical({name: each for name, each in members.items() if name in self._fields}, "body")
            except (ValueError, AttributeError, ArithmeticError, RecursionError) as error:
                raise BadKey(f"the body of this request has to be a JSON object: {str(error)[:200]}") from error
        text = scope["query_string"].decode("latin-1")
        query = sorted(parse_qsl(text, keep_blank_values=True, encoding="latin-1"), key=itemgetter(0))
        return fingerprint_of(scope["method"], scope.get("root_path", "") + scope["path"], query, content)

    def answer(self, status: int, headers: Any, body: bytes) -> bytes:
        return http_answer(status, headers, body, self._dropped) if len(body) <= self._max_response else NOT_KEPT


class TooLarge(BadKey):
    """The request is too large to be compared with later ones."""

    status = 413


class _Response:
    """What the app sends, held back until it is complete and kept; a stream is let through."""

    def __init__(self, middleware: IdempotencyMiddleware, claim: Claim, send: Send) -> None:
        self._middleware, self._claim, self._send = middleware, claim, send
        self._start: Message = {}
        self._chunks: list[bytes] = []
        self._size = 0
        self._passing = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = {**message, "headers": list(message.get("headers", ()))}
            self._claim.effect_began |= self._succeeded  # whatever becomes of the rest of it
            return
        if message["type"] != "http.response.body":
            await self._send(message)
            return
        more = message.get("more_body", False)
        if not self._passing:
            self._chunks.append(message.get("body", b""))
            self._size += len(self._chunks[-1])
            complete = any(name.lower() == b"content-length" for name, _ in self._start["headers"])
            if more and (self._size > self._middleware._max_response or not complete):
                await self._pass()
        elif more:
            await self._send(message)
        if not more:
            await self._end(message)

    async def _pass(self) -> None:
        """What begins to leave can't be kept."""
        self._passing = True
        await self._send_start([(b"idempotency-stored", b"false")])
        await self._send({"type": "http.response.body", "body": b"".join(self._chunks), "more_body": True})

    @property
    def _succeeded(self) -> bool:
        return 200 <= int(self._start["status"]) < 300

    async def _end(self, last: Message) -> None:
        body, headers, more = b"".join(self._chunks), self._start["headers"], list[tuple[bytes, bytes]]()
        if self._succeeded:
            answer = NOT_KEPT if self._passing else self._middleware.answer(self._start["status"], headers, body)
            try:
                await self._claim.done(answer)
            except OutcomeUnknown as error:
                if not self._passing:
                    await send_problem(self._send, error)
                    return
            except Exception as error:
                if not self._middleware.claims.store.unavailable(error):
                    raise
                logger.warning("an answer could not be kept: %r", error)
                answer = NOT_KEPT
            if answer == NOT_KEPT or not self._claim.owner:
                more = [(b"idempotency-stored", b"false")]
        else:
            await self._claim.__aexit__(None, None, None)  # before the client hears of it, and tries again
        if self._passing:
            await self._send(last)
            return
        await self._send_start(more)
        await self._send({"type": "http.response.body", "body": body})

    async def _send_start(self, more: list[tuple[bytes, bytes]]) -> None:
        await self._send({**self._start, "headers": [*self._start["headers"], *more]})


def idempotency_key_header(*, required: bool = True) -> Callable[..., Awaitable[str | None]]:
    """FastAPI: `key: str = Depends(idempotency_key_header())`, the header without quotes; 400 if it is malformed."""
    fastapi: Any = optional("fastapi", "web")
    text = f"One for each intent, the same in all its attempts; {'required' if required else 'optional'}."

    async def read(request: Any, in_openapi: Any) -> str | None:
        given = request.headers.getlist("idempotency-key")
        if not given and not required:
            return None
        try:
            return parse_key(",".join(given))
        except BadKey as error:
            raise fastapi.HTTPException(error.status, str(error), {"content-type": PROBLEM}) from error

    # To FastAPI the header is optional: what it finds missing by itself would be a 422.
    header = Annotated[str | None, fastapi.Header(alias="Idempotency-Key", description=text)]
    read.__annotations__ |= {"request": fastapi.Request, "in_openapi": header}
    read.__defaults__ = (None,)
    return read


def _again(body: bytes, receive: Receive) -> Receive:
    """The body that was read, then what else comes."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def read() -> Message:
        return first.pop() if first else await receive()

    return read
