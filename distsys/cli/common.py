"""What the commands share: errors that tell the caller what to do, JSON, and an open lab."""

from __future__ import annotations

import json
from typing import Any


class Usage(Exception):
    """What the caller can do about it, in one line: the whole answer of the program."""


def print_json(document: Any) -> None:
    """Print one JSON document on stdout."""
    print(json.dumps(document, indent=2, ensure_ascii=False, default=str))


async def open_lab(seed: int) -> Any:
    """Open a lab, or raise Usage with the command that brings the missing server."""
    from distsys.lab.session import Lab
    from distsys.lab.testbed.servers import ServerUnavailable

    try:
        return await Lab.open(seed=seed)
    except ServerUnavailable as missing:
        raise Usage(str(missing)) from missing
