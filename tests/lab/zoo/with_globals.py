"""A retry whose module holds what can't be copied."""

from __future__ import annotations

import threading
from typing import Any

from distsys.resilience.retry import retry

GUARD = threading.Lock()


def counted(call: Any) -> Any:
    """Right: it counts its calls under a lock of the module."""
    guarded = retry()(call)

    async def one(path: str) -> Any:
        with GUARD:
            pass
        return await guarded(path)

    return one
