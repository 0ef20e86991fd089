"""An nginx with a `limit_req`: a rate limit that needs no Redis and no code. nginx has to be installed."""

from __future__ import annotations

from pathlib import Path

from distsys.lab.testbed.servers import Server, Servers, configure

FOLDERS = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


async def nginx(servers: Servers, limit: str, name: str = "nginx") -> Server:
    """Start an nginx that answers 204, or 429 when the query's `key` exceeds a limit such as "rate=1r/m burst=9".

    Raises ServerUnavailable if nginx is not installed.
    """
    rate, burst = limit.split()

    async def argv(program: str, home: Path, port: int) -> list[str]:
        (home / "sock").unlink(missing_ok=True)  # left by a killed nginx
        lines = ["daemon off; master_process off; pid nginx.pid; error_log stderr; events {}", "http {"]
        lines += ["access_log off;", *(f"{folder}_temp_path {folder};" for folder in FOLDERS)]
        lines += [f"limit_req_zone $arg_key zone=keys:1m {rate}; limit_req_status 429;", "server {"]
        lines += [f"listen 127.0.0.1:{port}; listen unix:{home}/sock; limit_req zone=keys {burst} nodelay;"]
        lines += ["location / { try_files /none =204; }", "}}"]  # `return` would run before the limit
        return [program, "-p", str(home), "-c", str(configure(home / "nginx.conf", lines)), "-e", "stderr"]

    return await servers.serve(name, "nginx", "http://127.0.0.1:{port}", argv)
