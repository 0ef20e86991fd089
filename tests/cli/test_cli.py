"""The command line as a stranger meets it: what it says, what it returns, and that nothing outlives it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import psutil
import pytest

from distsys.cli import main as cli

BAD_LOCK = '''\
import asyncio

class MyLock:
    """SET NX with a TTL that nobody extends."""
    def __init__(self, redis, name, ttl):
        self.redis, self.name, self.ttl = redis, name, ttl
    async def __aenter__(self):
        while not await self.redis.set(self.name, "mine", nx=True, px=int(self.ttl * 1000)):
            await asyncio.sleep(0.01)
    async def __aexit__(self, *error):
        await self.redis.delete(self.name)
'''


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "distsys", *arguments], capture_output=True, text=True, cwd=cwd, check=False
    )


def test_help_shows_every_command_an_example_of_each_and_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    """A stranger needs no other page."""
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    text = capsys.readouterr().out
    for command in ("lab", "run", "prove", "decide"):
        assert f"  distsys {command}" in text
    assert "130 interrupted" in text
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required"),
        (["decide", "locks"], "the following arguments are required: --stage, --instances"),
        (["decide", "locks", "--stage", "Seed", "--instances", "2"], "'Seed' is none of Interview"),
        (["decide", "mutex", "--stage", "mvp", "--instances", "2"], "'mutex' is none of Event sourcing"),
        (["decide", "locks", "--stage", "mvp", "--instances", "0"], "instances must be at least 1 (got 0)"),
        (["run", "no-such"], "no experiment 'no-such': run  distsys run --list"),
        (["run", "no-lock", "--runs", "0"], "--runs must be at least 1 (got 0)"),
        (["prove", "MyLock", "--as", "lock"], "'MyLock' is not MODULE:NAME"),
        (["lab", "99_missing"], "no 99_missing.ipynb: there are 00_start_here"),
    ],
)
def test_wrong_use_is_exit_code_2_and_one_line_that_says_what_would_be_right(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is started, nothing is printed on stdout, there is no traceback."""
    try:
        code = cli.main(arguments)
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr()
    assert code == 2
    assert message in said.err.splitlines()[-1]
    assert said.out == ""


def test_decide_answers_for_one_pattern_or_all_in_words_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    """The command gives the answer of recommend()."""
    assert cli.main(["decide", "locks", "--stage", "enterprise", "--instances", "3"]) == 0
    assert "Distributed locks at Enterprise, 3 instances: REQUIRED" in capsys.readouterr().out
    assert cli.main(["decide", "--stage", "mvp", "--instances", "1", "--json"]) == 0
    assert {a["verdict"] for a in json.loads(capsys.readouterr().out)} == {"IN-PROCESS"}


def test_run_lists_every_experiment_with_its_claim() -> None:
    """No name means the list."""
    listed = run("run")
    assert listed.returncode == 0
    assert "no-lock" in listed.stdout
    assert listed.stdout == run("run", "--list").stdout


def test_run_prints_a_verdict_per_arm_and_is_0_when_all_are_as_expected() -> None:
    """The anti-pattern breaks, the rule holds: that is success."""
    done = run("run", "no-lock", "--runs", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "VIOLATED" in done.stdout
    assert "HELD" in done.stdout
    assert done.stdout.splitlines()[-1] == "2 of 2 verdicts as expected"


def test_run_with_json_is_one_document() -> None:
    """Nothing else on stdout, so that it can be piped."""
    verdicts = json.loads(run("run", "no-lock", "--json").stdout)
    assert [v["status"] for v in verdicts] == ["VIOLATED", "HELD"]


def test_prove_is_1_for_a_lock_that_breaks_and_says_where(tmp_path: Path) -> None:
    """A module in the current folder is enough."""
    (tmp_path / "mine.py").write_text(BAD_LOCK)
    done = run("prove", "mine:MyLock", "--as", "lock", cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "MyLock: VIOLATED" in done.stdout
    assert "✗" in done.stdout


CAREFUL_LOCK = '''\
import asyncio, uuid

class MyLock:
    """Everything right but the release: GET, then DEL."""
    OWN = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('PEXPIRE', KEYS[1], ARGV[2]) end return 0"

    def __init__(self, redis, name, ttl):
        self.redis, self.name, self.ms, self.me = redis, name, int(ttl * 1000), uuid.uuid4().hex
    async def renew(self):
        while True:
            await asyncio.sleep(self.ms / 3000)
            if not await self.redis.eval(self.OWN, 1, self.name, self.me, self.ms):
                return self.task.cancel()
    async def __aenter__(self):
        while not await self.redis.set(self.name, self.me, nx=True, px=self.ms):
            await asyncio.sleep(0.01)
        self.task = asyncio.current_task()
        self.renewal = asyncio.create_task(self.renew())
    async def __aexit__(self, *error):
        self.renewal.cancel()
        if await self.redis.get(self.name) == self.me.encode():
            await self.redis.delete(self.name)
'''


def test_prove_replays_one_schedule_of_a_lock(tmp_path: Path) -> None:
    """With its story, in real time; the undisturbed one holds."""
    (tmp_path / "mine.py").write_text(CAREFUL_LOCK)
    broken = run("prove", "mine:MyLock", "--as", "lock", "--schedule", "w1#4 hold", cwd=tmp_path)
    assert (broken.returncode, broken.stderr) == (1, "")
    assert "were inside at once, and neither had been disturbed" in broken.stdout
    assert run("prove", "mine:MyLock", "--as", "lock", "--schedule", "", cwd=tmp_path).returncode == 0
    none = run("prove", "mine:MyLock", "--as", "retry", "--schedule", "x", cwd=tmp_path)
    assert (none.returncode, none.stderr) == (2, "distsys: schedule='x': a retry has scenes, and no schedules\n")


def test_prove_is_0_for_a_lock_that_holds() -> None:
    """Our own, by the name anybody would use."""
    done = run("prove", "distsys.locks.redis_lock:RedisLock", "--as", "lock", "--only", "1", "2", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)


def test_prove_writes_a_page_and_a_report(tmp_path: Path) -> None:
    """For a colleague, and for a CI."""
    (tmp_path / "mine.py").write_text(CAREFUL_LOCK)
    page, report = tmp_path / "found.html", tmp_path / "found.xml"
    done = run("prove", "mine:MyLock", "--as", "lock", "--html", str(page), "--junit", str(report), cwd=tmp_path)
    assert done.returncode == 1
    assert "data:image/svg+xml" in page.read_text()
    suite = ElementTree.parse(report).getroot()
    assert [case.get("name") for case in suite if case.find("failure") is not None] == [
        "a command is held back until another worker is inside"
    ]


WRONG = {
    "syntax": ("def f(:\n", "mine.py:1: invalid syntax"),
    "raises": ("raise RuntimeError('at import')\n", "mine.py:1: RuntimeError: at import"),
    "shape": ("class MyLock:\n    def __init__(self, redis, config): ...\n", "MyLock asks for 'config'"),
    "no lock": ("class MyLock:\n    def __init__(self, redis): ...\n", "is no lock"),
    "nothing of this name": ("", "module 'mine' has no attribute 'MyLock'"),
    "missing": ("import no_such_module\n", "cannot import 'no_such_module'"),
}


@pytest.mark.parametrize(("text", "message"), WRONG.values(), ids=WRONG)
def test_what_could_not_be_tested_is_3_and_one_line(text: str, message: str, tmp_path: Path) -> None:
    """No verdict, no hint, no traceback of ours."""
    (tmp_path / "mine.py").write_text(text)
    done = run("prove", "mine:MyLock", "--as", "lock", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (3, "")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(("candidate", "kind"), [("circuit_breaker", "breaker"), ("retry", "retry")])
def test_prove_takes_guards_too(candidate: str, kind: str) -> None:
    """A decorator is a candidate as it is."""
    done = run("prove", f"distsys.resilience.{candidate}:{candidate}", "--as", kind)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda s: s.name)
def test_a_command_cut_short_leaves_nothing_running(sig: signal.Signals, tmp_path: Path) -> None:
    """Ctrl-C is exit code 130; after a kill -9 the supervisor cleans up by itself."""
    command = subprocess.Popen(
        [sys.executable, "-m", "distsys", "run", "contention", "--runs", "500"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(tmp_path)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's `&` ignores it
    )  # fmt: skip
    with command:
        assert command.stdout
        assert "contention" in command.stdout.readline()
        started = psutil.Process(command.pid).children(recursive=True)
        assert started
        command.send_signal(sig)
        assert command.wait(30) == (130 if sig == signal.SIGINT else -sig)
        _, alive = psutil.wait_procs(started, timeout=10)
        assert alive == []
        if sig == signal.SIGINT:
            assert command.stderr
            assert command.stderr.read() == "distsys: interrupted; everything it started has ended\n"


def test_an_occupied_port_is_one_line_that_names_a_free_one(capsys: pytest.CaptureFixture[str]) -> None:
    """The remedy can be pasted."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["lab", "--port", str(port)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"distsys: port {port} is taken: run  PORT=")
    assert said.count("\n") == 1


def test_a_home_that_cannot_be_written_is_one_line_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many containers have such a home."""
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", "/proc/nowhere")
    assert cli.main(["lab"]) == 2
    assert capsys.readouterr().err.startswith("distsys: Jupyter cannot write to /proc/nowhere: run  HOME=")
