"""The explorer reads the client's commands and the server's replies by itself: whole ones, however they are cut."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distsys.lab.explore import network
from distsys.lab.explore.network import _commands, _packed, _replies, _shown, timeout_of
from tests.bugs import edited, kills

words = st.lists(st.text(min_size=0, max_size=30), min_size=1, max_size=5)


def encoded(value: Any) -> bytes:
    """A reply as RESP3 has it."""
    if value is None:
        return b"_\r\n"
    if isinstance(value, bool):
        return b"#t\r\n" if value else b"#f\r\n"
    if isinstance(value, int):
        return b":%d\r\n" % value
    if isinstance(value, bytes):
        return b"$%d\r\n%s\r\n" % (len(value), value)
    if isinstance(value, dict):
        return b"%%%d\r\n" % len(value) + b"".join(encoded(part) for item in value.items() for part in item)
    return b"*%d\r\n" % len(value) + b"".join(map(encoded, value))


replies = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.binary(max_size=20)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.integers(), inner, max_size=3),
    max_leaves=8,
)


@kills(
    "a packet that is cut is taken for whole", edited(network, "_commands", "len(data) < end + 2 + size + 2", "False")
)
@given(st.lists(words, max_size=4), st.data())
def test_commands_are_read_however_they_are_cut(commands: list[list[str]], data: st.DataObject) -> None:
    """What is whole comes out; the rest waits for more."""
    whole = b"".join(_packed(tuple(command)) for command in commands)
    cut = data.draw(st.integers(0, len(whole)))
    first, rest = _commands(whole[:cut])
    second, nothing = _commands(rest + whole[cut:])
    assert nothing == b""
    assert [[word.decode() for word in command] for command in first + second] == commands


@kills("maps have half their parts", edited(network, "_reply_end", '(2 if kind in b"%|" else 1)', "1"))
@given(st.lists(replies, max_size=5), st.data())
def test_replies_are_counted_however_they_are_cut(values: list[Any], data: st.DataObject) -> None:
    """Nested ones count once."""
    whole = b"".join(map(encoded, values))
    cut = data.draw(st.integers(0, len(whole)))
    first, rest = _replies(whole[:cut])
    second, nothing = _replies(rest + whole[cut:])
    assert (first + second, nothing) == (len(values), b"")


@kills("a pushed message is an answer", edited(network, "_replies", 'count += data[at : at + 1] != b">"', "count += 1"))
def test_a_pushed_message_is_no_reply() -> None:
    """A client that waits for its answer is not given a message of another channel instead."""
    assert _replies(b">2\r\n$7\r\nmessage\r\n$1\r\nx\r\n+OK\r\n") == (1, b"")


@pytest.mark.parametrize(
    ("command", "seconds"),
    [
        ([b"BLPOP", b"a", b"b", b"0.5"], 0.5),
        ([b"blmpop", b"2", b"1", b"a", b"LEFT"], 2.0),
        ([b"WAIT", b"1", b"100"], 0.1),
        ([b"GET", b"a"], 0.0),
    ],
)
def test_how_long_a_blocking_command_may_wait(command: list[bytes], seconds: float) -> None:
    """In seconds, whatever unit the command has."""
    assert timeout_of(command) == seconds


def test_a_command_is_shown_as_a_reader_knows_it() -> None:
    """Scripts and long values are cut."""
    assert _shown([b"set", b"lock", b"x" * 40, b"NX"]) == "SET lock xxxxxxxxxxxx… NX"
    assert _shown([b"EVAL", b"return  redis.call('GET', KEYS[1])", b"1", b"lock"]) == "EVAL return redis… lock"
