"""Sixteen rules for distributed systems, each shown breaking and holding on real servers.

Names are loaded when first used: `import distsys` imports no driver.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distsys.errors import AnswerNotKept as AnswerNotKept
    from distsys.errors import BadKey as BadKey
    from distsys.errors import BulkheadFull as BulkheadFull
    from distsys.errors import CircuitOpen as CircuitOpen
    from distsys.errors import Indeterminate as Indeterminate
    from distsys.errors import KeyInProgress as KeyInProgress
    from distsys.errors import KeyReused as KeyReused
    from distsys.errors import LockDeadlock as LockDeadlock
    from distsys.errors import LockLost as LockLost
    from distsys.errors import LockNotAcquired as LockNotAcquired
    from distsys.errors import OutcomeUnknown as OutcomeUnknown
    from distsys.errors import PatternOrderError as PatternOrderError
    from distsys.errors import RateLimited as RateLimited
    from distsys.errors import Rejected as Rejected
    from distsys.errors import SharedSession as SharedSession
    from distsys.errors import StaleToken as StaleToken
    from distsys.errors import StoreUnavailable as StoreUnavailable
    from distsys.idempotency.claims import Claims as Claims
    from distsys.idempotency.database import PostgresStore as PostgresStore
    from distsys.idempotency.database import delete_expired as delete_expired
    from distsys.idempotency.database import idempotent_execute as idempotent_execute
    from distsys.idempotency.dedup import Dedup as Dedup
    from distsys.idempotency.dedup import redelivery_horizon as redelivery_horizon
    from distsys.idempotency.keys import idempotency_key as idempotency_key
    from distsys.idempotency.redis_store import RedisStore as RedisStore
    from distsys.idempotency.steps import complete_orphans as complete_orphans
    from distsys.idempotency.steps import execute_steps as execute_steps
    from distsys.locks.advisory_keys import held_advisory_locks as held_advisory_locks
    from distsys.locks.advisory_keys import lock_id as lock_id
    from distsys.locks.advisory_lock import AdvisoryLock as AdvisoryLock
    from distsys.locks.advisory_lock import advisory_locks as advisory_locks
    from distsys.locks.fencing import current_token as current_token
    from distsys.locks.fencing import fence as fence
    from distsys.locks.fencing import fenced_get as fenced_get
    from distsys.locks.fencing import fenced_set as fenced_set
    from distsys.locks.fencing import fenced_update as fenced_update
    from distsys.locks.fencing import postgres_tokens as postgres_tokens
    from distsys.locks.fencing import ttl_advice as ttl_advice
    from distsys.locks.redis_lock import RedisLock as RedisLock
    from distsys.locks.redlock import Redlock as Redlock
    from distsys.ratelimit.decision import Decision as Decision
    from distsys.ratelimit.decision import OnFailure as OnFailure
    from distsys.ratelimit.distributed import Quota as Quota
    from distsys.ratelimit.distributed import TieredLimiter as TieredLimiter
    from distsys.ratelimit.sliding_window import SlidingWindowLimiter as SlidingWindowLimiter
    from distsys.ratelimit.token_bucket import Lease as Lease
    from distsys.ratelimit.token_bucket import TokenBucketLimiter as TokenBucketLimiter
    from distsys.resilience.bulkhead import OnFull as OnFull
    from distsys.resilience.bulkhead import SharedCapacity as SharedCapacity
    from distsys.resilience.bulkhead import Tier as Tier
    from distsys.resilience.bulkhead import bulkhead as bulkhead
    from distsys.resilience.circuit_breaker import CircuitBreakers as CircuitBreakers
    from distsys.resilience.circuit_breaker import circuit_breaker as circuit_breaker
    from distsys.resilience.circuit_breaker import seconds as seconds
    from distsys.resilience.composed import resilient as resilient
    from distsys.resilience.listeners import listen as listen
    from distsys.resilience.retry import RetryBudget as RetryBudget
    from distsys.resilience.retry import retry as retry

_HOME = {
    "errors": (
        "AnswerNotKept",
        "BadKey",
        "BulkheadFull",
        "CircuitOpen",
        "Indeterminate",
        "KeyInProgress",
        "KeyReused",
        "LockDeadlock",
        "LockLost",
        "LockNotAcquired",
        "OutcomeUnknown",
        "PatternOrderError",
        "RateLimited",
        "Rejected",
        "SharedSession",
        "StaleToken",
        "StoreUnavailable",
    ),
    "idempotency.claims": ("Claims",),
    "idempotency.database": ("PostgresStore", "delete_expired", "idempotent_execute"),
    "idempotency.dedup": ("Dedup", "redelivery_horizon"),
    "idempotency.keys": ("idempotency_key",),
    "idempotency.redis_store": ("RedisStore",),
    "idempotency.steps": ("complete_orphans", "execute_steps"),
    "locks.advisory_keys": ("held_advisory_locks", "lock_id"),
    "locks.advisory_lock": ("AdvisoryLock", "advisory_locks"),
    "locks.fencing": (
        "current_token",
        "fence",
        "fenced_get",
        "fenced_set",
        "fenced_update",
        "postgres_tokens",
        "ttl_advice",
    ),
    "locks.redis_lock": ("RedisLock",),
    "locks.redlock": ("Redlock",),
    "ratelimit.decision": ("Decision", "OnFailure"),
    "ratelimit.distributed": ("Quota", "TieredLimiter"),
    "ratelimit.sliding_window": ("SlidingWindowLimiter",),
    "ratelimit.token_bucket": ("Lease", "TokenBucketLimiter"),
    "resilience.bulkhead": ("OnFull", "SharedCapacity", "Tier", "bulkhead"),
    "resilience.circuit_breaker": ("CircuitBreakers", "circuit_breaker", "seconds"),
    "resilience.composed": ("resilient",),
    "resilience.listeners": ("listen",),
    "resilience.retry": ("RetryBudget", "retry"),
}
__version__ = "0.1.0"
__all__ = sorted(name for names in _HOME.values() for name in names)  # computed: one list, not two


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
