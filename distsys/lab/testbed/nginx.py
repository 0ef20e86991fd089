"""An nginx with a `limit_req`, where nginx is installed: the limit that needs no Redis and no code."""

from __future__ import annotations

from pathlib import Path

from distsys.lab.testbed.servers import Server, Servers, configure

FOLDERS = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


async def nginx(servers: Servers, limit: str, name: str = "nginx") -> Server:
    """Answers 204, or 429 beyond "rate=1r/m burst=9" for the query's `key`. ServerUnavailable when not installed."""
    rate, burst = limit.split()

    async def argv(program: str, home: Path, port: int) -> list[str]:
        (home / "sock").unlink(missing_ok=True)  # one that was killed leaves it
        lines = ["daemon off; master_process off; pid nginx.pid; error_log stderr; events {}", "http {"]
        lines += ["access_log off;", *(f"{folder}_temp_path {folder};" for folder in FOLDERS)]
        lines += [f"limit_req_zone $arg_key zone=keys:1m {rate}; limit_req_status 429;", "server {"]
        lines += [f"listen 127.0.0.1:{port}; listen unix:{home}/sock; limit_req zone=keys {burst} nodelay;"]
        lines += ["location / { try_files /none =204; }", "}}"]  # a plain `return` would come before the limit
        return [program, "-p", str(home), "-c", str(configure(home / "nginx.conf", lines)), "-e", "stderr"]

    return await servers.serve(name, "nginx", "http://127.0.0.1:{port}", argv)
