"""Bugs planted in keys, claims, their Redis scripts and the middleware, and the test that each one kills."""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest

from distsys._support.redis import Script
from distsys.idempotency import answers, claims, http, keys, redis_store
from distsys.idempotency.redis_store import RedisStore
from distsys.lab.testbed.servers import Server
from tests.idempotency import test_claims, test_http, test_keys
from tests.survival import lives, survived

Test = Callable[..., Any]


def on(test: Callable[..., Awaitable[None]]) -> Test:
    """A test of any store, on the Redis of a client."""

    async def run(redis: Any, *arguments: Any) -> None:
        await test(RedisStore(redis), *arguments)

    return run


def rewritten(function: Any, old: str, new: str) -> Any:
    """The code of a function with another text."""
    text = textwrap.dedent(inspect.getsource(function))
    assert text.count(old) == 1, f"{function.__qualname__} no longer has this line once: {old}"
    made: dict[str, Any] = {}
    source = "from __future__ import annotations\n" + text.replace(old, new).removeprefix("@property\n")
    exec(source, vars(sys.modules[function.__module__]), made)
    return made[function.__name__].__code__


LOOP = [test_keys.LOOP]
QUERY = ("POST", "/pay?a=1&b=3", b"x")

KEY_MUTANTS: list[tuple[str, Any, str, str, Test]] = [
    (
        "floats as they say themselves",
        keys.canonical,
        "float.__repr__(value)",
        "repr(value)",
        partial(test_keys.test_two_ways_to_say_one_thing_are_one_key, [1, test_keys.Real(1)]),
    ),
    (
        "zeros at the end count",
        keys._number,
        'text.rstrip("0")',
        "text",
        test_keys.test_numbers_of_any_size_are_exact_and_cheap,
    ),
    (
        "members in the order they came",
        keys.canonical,
        "in sorted(value)",
        "in value",
        test_keys.test_the_order_of_members_does_not_count,
    ),
    (
        "True is 1",
        keys.canonical,
        "isinstance(value, (bool, str))",
        "isinstance(value, str)",
        partial(test_keys.test_what_differs_has_another_key, [1, True]),
    ),
    (
        "nested without end",
        keys.canonical,
        "if depth > MAX_DEPTH:",
        "if False:",
        partial(
            test_keys.test_what_has_no_defined_form_is_refused_and_its_place_named,
            LOOP,
            ValueError,
            "does it hold itself",
        ),
    ),
    (
        "a uuid is a fact as any other",
        keys.idempotency_key,
        '_UUID.sub("", what)',
        "what",
        partial(test_keys.test_a_uuid_of_each_attempt_is_noticed_at_the_second, lambda: test_keys.uuid.uuid4().hex),
    ),
    (
        "a key of 256 characters",
        keys.parse_key,
        "> MAX_KEY",
        "> MAX_KEY + 1",
        partial(test_keys.test_a_key_has_at_most_255_characters_however_long_it_is_written, "k"),
    ),
    (
        "the backslashes of a string stay",
        keys.parse_key,
        're.sub(r"\\\\(.)", r"\\1", quoted[1])',
        "quoted[1]",
        test_keys.test_what_an_independent_writer_quotes_is_read_back,
    ),
]


@pytest.mark.parametrize(("name", "function", "old", "new", "killer"), KEY_MUTANTS, ids=[m[0] for m in KEY_MUTANTS])
def test_a_bug_in_keys_is_caught(
    monkeypatch: pytest.MonkeyPatch, name: str, function: Any, old: str, new: str, killer: Test
) -> None:
    """Each mutant by the test that is named beside it; without the mutant that test passes."""
    keys._known.clear()
    assert lives(killer)
    keys._known.clear()
    monkeypatch.setattr(function, "__code__", rewritten(function, old, new))
    assert not lives(killer)


MUTANTS: list[tuple[str, Any, str, str, Test, tuple[Any, ...]]] = [
    (
        "a stale owner ends what is another's",
        "END",
        "string.sub(record, 3, 18) ~= ARGV[1]",
        "false",
        on(test_claims.test_a_stale_owner_can_end_nothing),
        (),
    ),
    (
        "what is done can be freed",
        "END",
        "if string.sub(record, 1, 1) == 'd' then return ARGV[2] == 'd' and 1 or 0 end",
        "",
        on(test_claims.test_a_stale_owner_can_end_nothing),
        (),
    ),
    (
        "numbers begin anew with the record",
        "END",
        "number = time[1] * 1000000 + time[2]",
        "number = 1",
        on(test_claims.test_numbers_grow_also_where_the_record_in_between_was_deleted),
        (),
    ),
    (
        "a number is the time, whatever it was before",
        "CLAIM_OR_WAIT",
        "math.max(time[1] * 1000000 + time[2], string.sub(record, 19, 34) + 1)",
        "time[1] * 1000000 + time[2]",
        test_claims.test_a_number_grows_also_where_the_clock_of_redis_was_set_back,
        (),
    ),
    (
        "a stale owner draws a number",
        "END",
        "if not record or string.sub(record, 3, 18) ~= ARGV[1] then return 0 end",
        "if not record or ARGV[2] ~= 'n' and string.sub(record, 3, 18) ~= ARGV[1] then return 0 end",
        on(test_claims.test_an_overtaken_attempt_is_told_that_its_outcome_is_on_no_record),
        (),
    ),
    (
        "who waits is not woken",
        "END",
        "if string.sub(record, 2, 2) == '1' then",
        "if false then",
        test_http.test_who_waits_is_woken_and_does_not_ask_again_and_again,
        (),
    ),
    (
        "held up by a claim of its own",
        "CLAIM_OR_WAIT",
        "state == 'r' and owner == string.sub(ARGV[1], 3, 18)",
        "false",
        test_claims.test_whichever_reply_of_redis_is_lost_there_is_one_effect,
        (Server, "a reply"),
    ),
    (
        "whoever asks takes over",
        "CLAIM_OR_WAIT",
        "or owner ~= ARGV[3]",
        "",
        on(test_claims.test_an_owner_that_fell_silent_leaves_it_to_the_policy),
        (),
    ),
    (
        "no time to live",
        "CLAIM_OR_WAIT",
        "redis.call('SET', KEYS[1], record, 'PX', ARGV[2])",
        "redis.call('SET', KEYS[1], record)",
        test_claims.test_every_record_in_redis_has_a_time_to_live,
        (),
    ),
    (
        "a heartbeat forgets that the record outlives the lease",
        "END",
        "ARGV[4] + string.sub(record, 99, 111)",
        "ARGV[4]",
        on(test_claims.test_the_heartbeat_keeps_a_claim_longer_than_its_lease),
        (),
    ),
    (
        "a cancelled attempt keeps its claim",
        redis_store.RedisStore.claim,
        "except BaseException as error:",
        "except Exception as error:",
        on(test_claims.test_cancelled_at_any_await_an_attempt_leaves_no_claim_behind),
        (),
    ),
    (
        "taken over, cancelled and free",
        redis_store.RedisStore.claim,
        '"unknown" if over else "free"',
        '"free"',
        on(test_claims.test_cancelled_while_it_takes_over_an_attempt_leaves_the_outcome_unknown),
        (),
    ),
    (
        "an error of the bank is one of Redis",
        claims.Claims._may_take_over,
        "except Exception as error",
        "except ValueError as error",
        on(test_claims.test_who_cannot_find_out_leaves_the_outcome_unknown),
        (),
    ),
    (
        "unprotected beside one that runs",
        claims.Claims.begin,
        'self.on_failure == "closed" or found',
        'self.on_failure == "closed"',
        test_claims.test_what_is_known_to_run_is_not_carried_out_unprotected,
        (Server,),
    ),
    (
        "what may have happened is free",
        claims.Claim.__aexit__,
        "self.effect_began or ",
        "",
        on(test_claims.test_where_the_effect_may_have_happened_the_outcome_is_unknown),
        (RuntimeError,),
    ),
    (
        "what was done but is no JSON is free",
        claims.Claims.run,
        "claim.effect_began = True",
        "pass",
        on(test_claims.test_what_answers_no_json_may_have_happened_all_the_same),
        (),
    ),
    (
        "no heart beats",
        claims.Claims._beat,
        "enumerate(claims)",
        "enumerate(())",
        on(test_claims.test_the_heartbeat_keeps_a_claim_longer_than_its_lease),
        (),
    ),
    (
        "a claim that nobody can prolong is not lost",
        claims.Claim.lost.fget,  # type: ignore[attr-defined]
        "time.monotonic() > self._until",
        "False",
        test_claims.test_heartbeats_that_fail_are_tried_again_and_meanwhile_the_claim_counts_as_lost,
        (Server, None),
    ),
    (
        "any request is the same",
        claims.check_same,
        "if not hmac.compare_digest(found.fingerprint, fingerprint):",
        "if False:",
        test_http.test_another_request_with_the_same_key_is_422,
        QUERY,
    ),
    (
        "a key is everybody's",
        http.IdempotencyMiddleware.__call__,
        "{await self._who(scope)}\\0",
        "",
        test_http.test_a_callers_key_is_nobody_elses,
        (),
    ),
    (
        "the query does not count",
        http.IdempotencyMiddleware._fingerprint,
        'scope["query_string"].decode("latin-1")',
        '""',
        test_http.test_another_request_with_the_same_key_is_422,
        QUERY,
    ),
    (
        "errors are kept",
        http._Response._succeeded.fget,  # type: ignore[attr-defined]
        'return 200 <= int(self._start["status"]) < 300',
        "return True",
        test_http.test_only_2xx_are_kept,
        (500,),
    ),
    (
        "what began to answer 2xx is free",
        http._Response.__call__,
        "self._claim.effect_began |= self._succeeded",
        "pass",
        test_http.test_an_app_that_fails_after_it_said_2xx_may_have_done_it,
        (False,),
    ),
    (
        "a stream is waited for",
        http._Response.__call__,
        " or not complete)",
        ")",
        test_http.test_a_stream_passes_as_it_comes_and_is_remembered_as_done,
        (0,),
    ),
    (
        "headers are dropped by their small letters only",
        answers.http_answer,
        "name.lower() not in dropped",
        "name not in dropped",
        test_http.test_the_first_answer_is_replayed_byte_for_byte,
        (),
    ),
]


@pytest.mark.parametrize(
    ("name", "where", "old", "new", "killer", "arguments"), MUTANTS, ids=[mutant[0] for mutant in MUTANTS]
)
async def test_a_bug_in_claims_or_http_is_caught(
    redis_server: Server,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
    where: Any,
    old: str,
    new: str,
    killer: Test,
    arguments: tuple[Any, ...],
) -> None:
    """The same on a real Redis; `where` is a function or the name of a script."""
    given = [{Server: redis_server, None: caplog}.get(each, each) for each in arguments]
    assert await survived(killer, redis_server, *given)
    if isinstance(where, str):
        text = getattr(redis_store, where).text
        assert text.count(old) == 1, f"{where} no longer has this line once: {old}"
        monkeypatch.setattr(redis_store, where, Script(text.replace(old, new)))
    else:
        monkeypatch.setattr(where, "__code__", rewritten(where, old, new))
    assert not await survived(killer, redis_server, *given)
