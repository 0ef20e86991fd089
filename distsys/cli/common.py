"""What the commands share: usage errors, JSON output, and opening a lab."""

from __future__ import annotations

import json
from typing import Any


class Usage(Exception):
    """A usage error. Its message is one line that says what to do, and all that the program prints."""


class NothingTested(Exception):
    """Nothing could be tested. Its message is one line that says why, and all that the program prints."""


def print_json(document: Any) -> None:
    """Print one JSON document on stdout."""
    print(json.dumps(document, indent=2, ensure_ascii=False, default=str))


async def open_lab(seed: int) -> Any:
    """Open a lab. Raises Usage with the command that installs a missing server."""
    from distsys.lab.session import Lab
    from distsys.lab.testbed.servers import ServerUnavailable

    try:
        return await Lab.open(seed=seed)
    except ServerUnavailable as missing:
        raise Usage(str(missing)) from missing
