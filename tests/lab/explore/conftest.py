"""One lab for the searches of a module."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from distsys.lab import Lab


@pytest.fixture(scope="module")
async def lab() -> AsyncIterator[Lab]:
    async with await Lab.open() as lab:
        yield lab
