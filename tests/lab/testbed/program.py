"""What a notebook's kernel is to the lab: a program that opens one and ends in one way or another. The tests run it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time

from distsys.lab.testbed.processes import Processes
from distsys.lab.testbed.servers import Servers


async def main(how: str) -> None:
    interrupted = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, interrupted.set)
    processes = await Processes.start()
    servers = Servers(processes, redis_url="", pg_dsn="", backend=os.environ.get("DISTSYS_BACKEND", ""))
    started = await asyncio.gather(
        servers.redis(), servers.redis("paused-redis"), servers.postgres(), servers.postgres("paused-postgres")
    )
    sleeper = await processes.fork("jobs:sleep", b"!", name="sleeper")
    stopper = await processes.fork("jobs:stop", b"", name="stopper")
    assert sleeper.sock
    await asyncio.get_running_loop().sock_recv(sleeper.sock, 1)
    await stopper.stopped()
    await started[1].pause()
    await started[3].pause()
    print(json.dumps({"folder": str(processes.folder), "servers": [str(s) for s in started]}), flush=True)
    await asyncio.to_thread(sys.stdin.readline)  # the test looks at what is there, before anything ends
    if how == "forks" and not os.fork():
        time.sleep(60)  # noqa: ASYNC251 (in the fork, where no loop runs)
        os._exit(0)
    if how == "is interrupted":
        await interrupted.wait()
        await asyncio.gather(started[1].resume(), started[3].resume())
        await started[0].restart()
        print("interrupted", flush=True)
    if how == "closes":
        await processes.aclose()
    elif how == "returns":
        return
    elif how == "raises":
        raise SystemExit(3)
    await asyncio.sleep(60)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
