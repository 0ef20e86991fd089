"""Idempotency keys: the same intent has the same key, in every attempt and in every process.

Promise  equal intents get equal keys, and different intents get different keys: the key is the SHA-256 of canonical
         JSON. Numbers count by value: 1, 1.0 and Decimal("1.00") are equal. A value without a canonical form is
         refused, never turned into a str.
Not      a secret: anyone who knows the intent knows its key, so stores keep the keys of each caller apart. A key made
         of a fresh time or a fresh uuid recognises nothing, because it differs in each attempt; nothing checks this at
         run time. To do the same thing twice on purpose, pass `intent`: an id made once, before the first attempt, and
         stored.
Units    64 hexadecimal digits; a client's own key has 1 to 255 characters.
Errors   TypeError and ValueError, which name the place in the intent; BadKey.
Source   RFC 8785 (canonical JSON); draft-ietf-httpapi-idempotency-key-header-07; RFC 9651, 3.3.3 (strings).
"""

from __future__ import annotations

import hashlib
import json
import re
import reprlib
from collections.abc import Mapping
from datetime import UTC, date, datetime
from decimal import Decimal
from enum import Enum
from types import NoneType
from typing import Any
from uuid import UUID

from distsys.errors import BadKey

MAX_KEY_CHARACTERS = 255
MAX_DEPTH = 100  # of dicts and lists inside one another
_QUOTED = re.compile(r'"((?:[ !#-\[\]-~]|\\["\\])*)"')
_BARE = re.compile(r"[!#-+\--~]+")  # printable, without space, quote and comma
_encode = json.JSONEncoder(ensure_ascii=False).encode  # made once: json.dumps makes an encoder for each call


def idempotency_key(*, entity_id: Any, action: str, params: Any = None, intent: str | UUID = "") -> str:
    """Return the key of an intent: `action` on the entity, with these parameters.

    intent   an id made once for this intent and stored before the first attempt; it tells two equal wishes apart

    TypeError or ValueError if a part has no canonical form.
    """
    parts = {"entity_id": entity_id, "action": action, "intent": intent, "params": params}
    return _sha256(*(canonical(value, name) for name, value in parts.items()))


def canonical(value: Any, place: str = "value", depth: int = 0) -> str:
    """Return one text for equal values: JSON with sorted members and one form for each number.

    place   what errors call the value
    depth   how many dicts and lists the value stands inside of

    TypeError for a type without a canonical form; ValueError for NaN, infinity, a datetime without a time zone, half of
    a character, and what is nested more than MAX_DEPTH deep.
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"{place[:60]}... is nested more than {MAX_DEPTH} deep: does it contain itself?")
    if isinstance(value, Enum):
        return canonical(value.value, place, depth + 1)
    if value is None or isinstance(value, (bool, str)):
        if isinstance(value, str) and not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
            raise ValueError(f"{place}={value!r} holds half of a character, a lone surrogate")
        return _encode(value)
    if isinstance(value, (int, float, Decimal)):
        return _number(Decimal(float.__repr__(value)) if isinstance(value, float) else Decimal(value), place)
    if isinstance(value, datetime):
        if value.utcoffset() is None:
            raise ValueError(f"{place}={value!r} has no time zone, so it means another moment elsewhere: add one")
        try:
            return canonical(value.astimezone(UTC).isoformat())
        except OverflowError as error:
            raise ValueError(f"{place}={value!r} is outside of the years 1 to 9999 in UTC") from error
    if isinstance(value, (date, UUID)):
        return canonical(str(value))
    below = depth + 1
    if isinstance(value, Mapping):
        if odd := [key for key in value if not isinstance(key, str)]:
            raise TypeError(f"{place} has the key {odd[0]!r}, a {type(odd[0]).__name__}: member names must be str")
        named = [(canonical(key, place), canonical(value[key], f"{place}[{key!r}]", below)) for key in sorted(value)]
        return f"{{{','.join(map(':'.join, named))}}}"
    if isinstance(value, (list, tuple)):
        return f"[{','.join(canonical(item, f'{place}[{index}]', below) for index, item in enumerate(value))}]"
    advice = "give str, numbers, bool, None, datetime, date, UUID, Enum, dict or list"
    raise TypeError(f"{place}={reprlib.repr(value)} is a {type(value).__name__}, which has no canonical form: {advice}")


def fingerprint_of(*facts: Any) -> bytes:
    """Return the 32 bytes that tell one request from another; compare them with hmac.compare_digest."""
    if len(facts) == 1 and facts[0] is None:
        return _FINGERPRINT_OF_NONE
    return bytes.fromhex(_sha256(canonical(facts, "request")))


def parse_key(text: str | None) -> str:
    """Return the key in an Idempotency-Key header: a quoted string of RFC 9651, or the bare word, which are equal.

    BadKey if it is missing, empty, malformed or too long; TypeError if it is no str.
    """
    if not isinstance(text, (str, NoneType)):
        raise TypeError(f"the idempotency key {text!r} is a {type(text).__name__}; a key is a str")
    text = (text or "").strip(" \t")
    if not text:
        raise BadKey("the Idempotency-Key is missing or empty: send one per intent, the same in all its attempts")
    quoted = _QUOTED.fullmatch(text)
    key = re.sub(r"\\(.)", r"\1", quoted[1]) if quoted else text
    if not key or not (quoted or _BARE.fullmatch(text)):
        shown = text if len(text) <= 40 else text[:40] + "..."
        raise BadKey(f"Idempotency-Key {shown!r} is malformed: send one word of printable ASCII, or a string in quotes")
    if len(key) > MAX_KEY_CHARACTERS:
        raise BadKey(f"the Idempotency-Key has {len(key)} characters: send at most {MAX_KEY_CHARACTERS}")
    return key


def _sha256(*texts: str) -> str:
    return hashlib.sha256(",".join(texts).encode()).hexdigest()


def _number(number: Decimal, place: str) -> str:
    """Return the one form of a number: its digits without zeros at the end, and the power of ten."""
    if not number.is_finite():
        raise ValueError(f"{place}={number} is not a number: give an amount, or None")
    sign, digits, exponent = number.as_tuple()
    text = "".join(map(str, digits)).lstrip("0")
    short = text.rstrip("0")
    return f"{'-' * sign}{short}e{int(exponent) + len(text) - len(short)}" if short else "0"


_FINGERPRINT_OF_NONE = bytes.fromhex(_sha256(canonical((None,), "request")))  # most calls have no request
