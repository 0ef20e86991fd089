"""Keys: equal intents have equal keys, others have others; a value without a canonical form is refused by place."""

from __future__ import annotations

import hashlib
import math
import string
import subprocess
import sys
import uuid
from contextlib import suppress
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from enum import Enum, IntEnum, StrEnum
from fractions import Fraction
from types import MappingProxyType
from typing import Any

import http_sfv
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from distsys.errors import BadKey
from distsys.idempotency import keys
from distsys.idempotency.keys import canonical, fingerprint_of, idempotency_key, parse_key
from tests.bugs import edited, kills

# ---- what is equal

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
numbers = st.one_of(
    st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.decimals(allow_nan=False, allow_infinity=False)
)
plain = st.one_of(st.none(), st.booleans(), texts, numbers)
values = st.recursive(plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3))


def reordered(value: Any) -> Any:
    """Return an equal value, with members in reverse order, tuples for lists and proxies for dicts."""
    if isinstance(value, dict):
        return MappingProxyType({key: reordered(each) for key, each in reversed(value.items())})
    return tuple(map(reordered, value)) if isinstance(value, list) else value


def meaning(value: Any) -> Any:
    """Return what a value means, computed in another way than canonical(): types apart, numbers exact."""
    if value is None or isinstance(value, bool | str):
        return (type(value).__name__, value)
    if isinstance(value, dict):
        return ("members", frozenset((key, meaning(each)) for key, each in value.items()))
    if isinstance(value, list):
        return ("items", *map(meaning, value))
    return ("number", Fraction(Decimal(repr(value)) if isinstance(value, float) else value))


@kills("members in the order they came", edited(keys, "canonical", "in sorted(value)", "in value"))
@given(values)
def test_the_order_of_members_does_not_count(value: Any) -> None:
    assert canonical(reordered(value)) == canonical(value)


@given(values, values)
def test_texts_are_equal_if_and_only_if_the_values_are(one: Any, other: Any) -> None:
    assert (canonical(one) == canonical(other)) == (meaning(one) == meaning(other))


@given(numbers)
def test_a_number_counts_by_its_value_however_it_is_written(number: Any) -> None:
    exact = Decimal(repr(number)) if isinstance(number, float) else Decimal(number)
    sign, digits, exponent = exact.as_tuple()
    longer = Decimal((sign, (0, *digits, 0, 0), int(exponent) - 2))
    assert canonical(number) == canonical(exact) == canonical(longer)
    if isinstance(number, float) and number.is_integer() and abs(number) < 2**53:
        assert canonical(number) == canonical(int(number))


@kills("zeros at the end count", edited(keys, "_number", 'text.rstrip("0")', "text"))
def test_numbers_of_any_size_are_exact_and_cheap() -> None:
    assert canonical(10**5000) == canonical(Decimal("1e5000")) == "1e5000"
    assert canonical(10**5000 + 1) != canonical(10**5000)
    assert canonical(Decimal("1e999999999999999999")) == "1e999999999999999999"
    assert canonical(Decimal("0.1")) != canonical(Decimal("0.1000000000000000000000000000001"))
    assert canonical(2**53) != canonical(2**53 + 1)
    assert canonical(5e-324) != canonical(0)
    assert {canonical(zero) for zero in (0, -0.0, Decimal("-0.00"), Decimal("0e9"))} == {"0"}
    assert canonical(-1.50) == canonical(Decimal("-1.5")) == "-15e-1"


class Colour(StrEnum):
    RED = "red"


class Size(IntEnum):
    SMALL = 1


class Kind(Enum):
    CARD = ("card", 1)


class Real(float):
    """A float with another repr, like those of numpy."""

    def __repr__(self) -> str:
        return f"Real({float(self)})"


MOMENT = datetime(2026, 3, 1, 12, tzinfo=UTC)
ID = uuid.UUID("00000000-0000-4000-8000-000000000001")


@kills(
    "floats as they say themselves",
    edited(keys, "canonical", "float.__repr__(value)", "repr(value)"),
    same=[1, 1.0, Decimal("1.00"), Size.SMALL, Real(1)],
)
@pytest.mark.parametrize(
    "same",
    [
        [1, 1.0, Decimal("1.00"), Size.SMALL, Real(1)],
        ["red", Colour.RED],
        [("card", 1), ["card", 1.0], Kind.CARD],
        [{"red": 1}, {Colour.RED: 1}],
        [MOMENT, MOMENT.astimezone(timezone(timedelta(hours=5, minutes=30))), MOMENT.isoformat()],
        [date(2026, 3, 1), "2026-03-01"],
        [ID, str(ID)],
    ],
)
def test_two_ways_to_say_one_thing_are_one_key(same: list[Any]) -> None:
    assert len({idempotency_key(entity_id=1, action="pay", params={"a": each}) for each in same}) == 1


@kills("True is 1", edited(keys, "canonical", "isinstance(value, (bool, str))", "isinstance(value, str)"))
@pytest.mark.parametrize(
    "apart",
    [
        [1, True, "1", "1e0", [1], {"1": 1}],
        [0, False, None, "", [], {}, "null", "false"],
        [[1, 2], [12], [[1], 2], [2, 1], "[1,2]", {"1": 2}],
        ["a,b", "a", 'a"', 'a\\"', "a\\", "a\0", "a "],
        [{"a": None}, {}, {"a": {}}, {"a": []}, {"a": ""}],
        ["é", "e\u0301", "É"],
        [MOMENT, MOMENT + timedelta(microseconds=1), MOMENT.date()],
    ],
)
def test_what_differs_has_another_key(apart: list[Any]) -> None:
    assert len({idempotency_key(entity_id=1, action="pay", params=each) for each in apart}) == len(apart)


def test_the_parts_of_an_intent_do_not_run_into_each_other() -> None:
    intents: list[dict[str, Any]] = [
        {"entity_id": "1", "action": "2", "params": "3"},
        {"entity_id": "12", "action": "", "params": "3"},
        {"entity_id": "1,2", "action": "3"},
        {"entity_id": "1", "action": "2", "intent": "3"},
        {"entity_id": ["1", "2"], "action": "3"},
        {"entity_id": 1, "action": "2", "params": "3"},
    ]
    assert len({idempotency_key(**intent) for intent in intents}) == len(intents)


def test_another_process_makes_the_same_key() -> None:
    """Whatever its hash seed and time zone: this value must never change, for stored keys depend on it."""
    code = """
from datetime import UTC, datetime
from distsys.idempotency.keys import idempotency_key
params = {"b": {"y": 1, "x": 2.5}, "a": [datetime(2026, 3, 1, tzinfo=UTC)]}
print(idempotency_key(entity_id=42, action="pay", params=params))
"""
    for seed, zone in (("1", "Asia/Tokyo"), ("2", "UTC")):
        run = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed, "TZ": zone},
        )
        text = '42e0,"pay","",{"a":["2026-03-01T00:00:00+00:00"],"b":{"x":25e-1,"y":1e0}}'
        assert run.stdout.strip() == hashlib.sha256(text.encode()).hexdigest()


@given(values, values)
def test_fingerprints_are_32_bytes_and_differ_with_the_request(one: Any, other: Any) -> None:
    assume(meaning(one) != meaning(other))
    assert len(fingerprint_of(one)) == 32
    assert fingerprint_of(one) != fingerprint_of(other) != fingerprint_of(other, None)


# ---- what is refused

LOOP: list[Any] = []
LOOP.append({"me": LOOP})
DEEP: Any = 0
for _ in range(200):
    DEEP = [DEEP]


@kills("nested without end", edited(keys, "canonical", "if depth > MAX_DEPTH:", "if False:"), value=LOOP)
@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (math.nan, ValueError, "is not a number"),
        (-math.inf, ValueError, "is not a number"),
        (Decimal("sNaN"), ValueError, "is not a number"),
        (datetime(2026, 3, 1), ValueError, "has no time zone"),  # noqa: DTZ001  which is what is refused
        (datetime.max.replace(tzinfo=timezone(-timedelta(hours=5))), ValueError, "outside of the years"),
        ({1, 2}, TypeError, "is a set"),
        (b"x" * 1_000_000, TypeError, "is a bytes"),
        (timedelta(1), TypeError, "is a timedelta"),
        (object(), TypeError, "is a object"),
        (1j, TypeError, "is a complex"),
        ({1: 2}, TypeError, "has the key 1, a int"),
        ({None: 2}, TypeError, "has the key None, a NoneType"),
        ("half \ud83d", ValueError, "half of a character"),
        ({"\udc00": 1}, ValueError, "half of a character"),
        (LOOP, ValueError, "does it contain itself"),
        (DEEP, ValueError, "does it contain itself"),
    ],
    ids=range(16),
)
def test_what_has_no_defined_form_is_refused_and_its_place_named(value: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text) as refused:
        idempotency_key(entity_id=1, action="pay", params={"order": [0, value]})
    assert str(refused.value).startswith("params['order'][1]")
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize("name", ["entity_id", "action", "intent"])
def test_each_part_is_named(name: str) -> None:
    with pytest.raises(TypeError, match=f"^{name}="):
        idempotency_key(**{"entity_id": 1, "action": "pay", name: object()})


# ---- the header

words = st.text("".join(chr(n) for n in range(0x21, 0x7F) if chr(n) not in '",'), min_size=1, max_size=255)
strings = st.text("".join(map(chr, range(0x20, 0x7F))), min_size=1, max_size=255)


@kills(
    "the backslashes of a string stay", edited(keys, "parse_key", 're.sub(r"\\\\(.)", r"\\1", quoted[1])', "quoted[1]")
)
@given(strings)
def test_what_an_independent_writer_quotes_is_read_back(text: str) -> None:
    assert parse_key(str(http_sfv.Item(text))) == text


@given(words)
def test_quoted_and_bare_are_the_same_key(word: str) -> None:
    assert parse_key(word) == parse_key(f" {word}\t") == parse_key(str(http_sfv.Item(word))) == word


@given(st.text(max_size=20))
def test_whatever_is_sent_is_a_key_of_printable_ascii_or_refused(text: str) -> None:
    key: str | None = None
    with suppress(BadKey):
        key = parse_key(text)
    assert key is None or (1 <= len(key) <= 255 and set(key) <= set(string.printable[:95]))


@pytest.mark.parametrize(
    "text",
    [
        *("a b", "a,b", '"a","b"', '"a" "b"', '"a"b', 'a"b', '"a', 'a"', '"a"b"', '"a\\"', '"\\a"', '"a";x=1'),
        *("a\r\nSet-Cookie: x=1", "a\nb", "a\0", '"a\nb"', "a\x7f", "größe", '"größe"', "🦆", "a\u00a0b", "\ud800"),
    ],
)
def test_what_is_no_single_string_is_malformed(text: str) -> None:
    """Two header lines, parameters, line ends and other characters: two parsers could read them differently."""
    with pytest.raises(BadKey, match="malformed") as refused:
        parse_key(text)
    assert "\n" not in str(refused.value)
    assert "\r" not in str(refused.value)


@pytest.mark.parametrize("text", [None, "", " ", "\t", '""'])
def test_an_empty_key_is_none(text: str | None) -> None:
    with pytest.raises(BadKey, match=r"malformed|missing or empty"):
        parse_key(text)


@kills("a key of 256 characters", edited(keys, "parse_key", "> MAX_KEY_CHARACTERS", "> MAX_KEY_CHARACTERS + 1"))
@pytest.mark.parametrize("letter", ["k", '"', "\\"])
def test_a_key_has_at_most_255_characters_however_long_it_is_written(letter: str) -> None:
    assert parse_key(str(http_sfv.Item(letter * 255))) == letter * 255
    with pytest.raises(BadKey, match="256 characters"):
        parse_key(str(http_sfv.Item(letter * 256)))


def test_a_huge_key_is_refused_in_few_words() -> None:
    for text in ("k" * 1_000_000, '"' + "k" * 1_000_000, '"' + "\\" * 1_000_001):
        with pytest.raises(BadKey) as refused:
            parse_key(text)
        assert len(str(refused.value)) < 300


def test_a_key_that_is_not_a_str_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="is a UUID"):
        parse_key(ID)  # type: ignore[arg-type]
