"""Idempotency keys: the same intent has the same key, in every attempt and every process.

Promise  equal intents give equal keys, unequal ones different keys: canonical JSON, then SHA-256. Numbers count by
         value: 1, 1.0 and Decimal("1.00") are equal. What has no defined form is refused, never turned into a str.
Not      a secret: who knows the intent knows its key, so stores keep keys apart by caller. Who means to do the same
         twice has to say so: `intent`, an id that is made once, before the first attempt, and stored.
Units    64 hexadecimal digits; a client's own key has 1 to 255 characters.
Errors   TypeError and ValueError, naming the place; BadKey; VolatileKey, a warning.
Source   RFC 8785 (canonical JSON); draft-ietf-httpapi-idempotency-key-header-07; RFC 9651, 3.3.3 (strings).
"""

from __future__ import annotations

import hashlib
import json
import re
import reprlib
import time
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from datetime import UTC, date, datetime
from decimal import Decimal
from enum import Enum
from types import NoneType
from typing import Any
from uuid import UUID

from distsys.errors import BadKey

MAX_KEY = 255
JUST_NOW = 1.0  # seconds: a time or a uuid as fresh as this was made for this attempt
MAX_DEPTH = 100  # of dicts and lists in one another
REMEMBERED = 1_000  # intents, to notice one that comes again with another uuid
_HEX = "[0-9a-f]"
_UUID = re.compile(
    rf"(?i)(?<!{_HEX}){_HEX}{{8}}-?{_HEX}{{4}}-?[147]{_HEX}{{3}}-?[89ab]{_HEX}{{3}}-?{_HEX}{{12}}(?!{_HEX})"
)
_QUOTED = re.compile(r'"((?:[ !#-\[\]-~]|\\["\\])*)"')
_BARE = re.compile(r"[!#-+\--~]+")  # printable, without space, quote and comma
_encode = json.JSONEncoder(ensure_ascii=False).encode  # made once: json.dumps makes one for each call
_known: OrderedDict[str, str] = OrderedDict()  # intents without their uuids -> their newest key


class VolatileKey(UserWarning):
    """What was hashed is different in each attempt, and so is the key: it will recognise nothing."""


def idempotency_key(*, entity_id: Any, action: str, params: Any = None, intent: str | UUID = "") -> str:
    """The key of an intent: `action` on the entity, with these parameters.

    intent   an id made once for this intent and stored before the first attempt; it tells two equal wishes apart
    """
    named = {"entity_id": entity_id, "action": action, "intent": intent, "params": params}
    *who, what = (canonical(value, name) for name, value in named.items())
    key = _sha256(*who, what)
    for place, made in _made_just_now(params, "params"):
        _warn(f"{place}={made!r} was made just now, so a second attempt has another key")
    shape = _sha256(*who, _UUID.sub("", what))
    if _known.setdefault(shape, key) != key:
        _warn(f"{action!r} on {entity_id!r} came before, and nothing but a uuid in params differs")
    _known[shape] = key
    if len(_known) > REMEMBERED:
        _known.popitem(last=False)
    return key


def canonical(value: Any, at: str = "value", depth: int = 0) -> str:
    """One text for equal values: JSON with sorted members and one form for each number; `at` names it in errors."""
    if depth > MAX_DEPTH:
        raise ValueError(f"{at[:60]}... is nested more than {MAX_DEPTH} deep: does it hold itself?")
    if isinstance(value, Enum):
        return canonical(value.value, at, depth + 1)
    if value is None or isinstance(value, (bool, str)):
        if isinstance(value, str) and not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
            raise ValueError(f"{at}={value!r} holds half of a character, a lone surrogate")
        return _encode(value)
    if isinstance(value, (int, float, Decimal)):
        return _number(Decimal(float.__repr__(value)) if isinstance(value, float) else Decimal(value), at)
    if isinstance(value, datetime):
        if value.utcoffset() is None:
            raise ValueError(f"{at}={value!r} has no time zone, so it is another moment elsewhere: give it one")
        try:
            return canonical(value.astimezone(UTC).isoformat())
        except OverflowError as error:
            raise ValueError(f"{at}={value!r} is outside of the years 1 to 9999 in UTC") from error
    if isinstance(value, date):
        return canonical(value.isoformat())
    if isinstance(value, UUID):
        return canonical(str(value))
    if isinstance(value, Mapping):
        if odd := [key for key in value if not isinstance(key, str)]:
            raise TypeError(f"{at} has the key {odd[0]!r}, a {type(odd[0]).__name__}; members are named by str")
        below = depth + 1
        members = (f"{canonical(key, at)}:{canonical(value[key], f'{at}[{key!r}]', below)}" for key in sorted(value))
        return f"{{{','.join(members)}}}"
    if isinstance(value, (list, tuple)):
        return f"[{','.join(canonical(each, f'{at}[{number}]', depth + 1) for number, each in enumerate(value))}]"
    raise TypeError(
        f"{at}={reprlib.repr(value)} is a {type(value).__name__}, for which no canonical form is defined: give "
        "str, numbers, bool, None, datetime, date, UUID, Enum, dict or list"
    )


def fingerprint_of(*facts: Any) -> bytes:
    """32 bytes that tell one request from another; compare them with hmac.compare_digest."""
    if len(facts) == 1 and facts[0] is None:
        return _OF_NOTHING
    return bytes.fromhex(_sha256(canonical(facts, "request")))


def parse_key(text: str | None) -> str:
    """The key in an Idempotency-Key header: a quoted string of RFC 9651 or the bare word, which are equal."""
    if not isinstance(text, (str, NoneType)):
        raise TypeError(f"the idempotency key {text!r} is a {type(text).__name__}; a key is a str")
    text = (text or "").strip(" \t")
    if not text:
        raise BadKey("the Idempotency-Key is missing or empty: send one per intent, the same in all its attempts")
    quoted = _QUOTED.fullmatch(text)
    key = re.sub(r"\\(.)", r"\1", quoted[1]) if quoted else text
    if not key or not (quoted or _BARE.fullmatch(text)):
        shown = text if len(text) <= 40 else text[:40] + "..."
        raise BadKey(f"Idempotency-Key {shown!r} is malformed: one word of printable ASCII, or a string in quotes")
    if len(key) > MAX_KEY:
        raise BadKey(f"the Idempotency-Key has {len(key)} characters: at most {MAX_KEY}")
    return key


def _sha256(*canonicals: str) -> str:
    return hashlib.sha256(",".join(canonicals).encode()).hexdigest()


def _number(number: Decimal, at: str) -> str:
    if not number.is_finite():
        raise ValueError(f"{at}={number} is no number: an intent has an amount or has none")
    sign, digits, exponent = number.as_tuple()
    text = "".join(map(str, digits)).lstrip("0")
    short = text.rstrip("0")
    return f"{'-' * sign}{short}e{int(exponent) + len(text) - len(short)}" if short else "0"


def _made_just_now(value: Any, at: str) -> Iterator[tuple[str, Any]]:
    """Times, and uuids with a time in them, that are no older than this attempt."""
    if isinstance(value, Mapping):
        for key in value:
            yield from _made_just_now(value[key], f"{at}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for number, each in enumerate(value):
            yield from _made_just_now(each, f"{at}[{number}]")
    elif any(abs(time.time() - made) < JUST_NOW for made in _times(value)):
        yield at, value


def _times(value: Any) -> list[float]:
    """What moments a value could stand for, in seconds since 1970."""
    if isinstance(value, str) and _UUID.fullmatch(value):
        value = UUID(value)
    if isinstance(value, UUID):
        clocks = {1: value.time / 1e7 - 12_219_292_800, 7: (value.int >> 80) / 1e3}
        return [clocks[value.version]] if value.version in clocks else []
    try:
        if isinstance(value, str) and re.match(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d", value):
            value = datetime.fromisoformat(value)
        if isinstance(value, datetime):
            return [value.timestamp()]
    except (ValueError, OverflowError):  # no date, or one that local time does not have
        return []
    if isinstance(value, str) and re.fullmatch(r"\d{10,19}(\.\d{1,9})?", value):
        value = float(value)
    if isinstance(value, (int, float, Decimal)) and 1e9 < value < 1e19:
        return [float(value) / unit for unit in (1, 1e3, 1e6, 1e9)]
    return []


def _warn(what: str) -> None:
    message = f"{what}: leave it out, or make it once per intent, store it, and give it as intent="
    warnings.warn(message, VolatileKey, stacklevel=3)


_OF_NOTHING = bytes.fromhex(_sha256(canonical((None,), "request")))  # as most calls are
