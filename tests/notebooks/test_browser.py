"""What a reader sees: JupyterLab in a real browser, in both themes, with mouse and keyboard."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect, sync_playwright

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
SECONDS = 1000
OUTPUT = ".jp-OutputArea-output"
ERROR = f'{OUTPUT}[data-mime-type="application/vnd.jupyter.error"]'
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: on Debian run  apt install chromium")


@pytest.fixture
def lab(tmp_path: Path, jupyter: dict[str, str]) -> Iterator[str]:
    """The address of `distsys lab` on a copy of the notebooks, with its token."""
    shutil.copytree(
        ROOT / "notebooks", tmp_path / "project/notebooks", ignore=shutil.ignore_patterns(".ipynb_checkpoints")
    )
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "distsys", "lab", "--no-browser", "--port", str(port)]
    with subprocess.Popen(command, cwd=tmp_path / "project", env=jupyter, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr
        try:
            yield next(line.strip() for line in server.stderr if line.strip().startswith("http://127.0.0.1"))
        finally:
            server.send_signal(signal.SIGINT)
            server.stderr.read()
            assert server.wait(30) == 0, "Ctrl-C is how one stops JupyterLab"


@pytest.fixture(params=["JupyterLab Light", "JupyterLab Dark"])
def page(request: pytest.FixtureRequest, lab: str, jupyter: dict[str, str]) -> Iterator[Page]:
    """A browser window, the theme set, the start notebook open and its kernel idle."""
    settings = Path(jupyter["JUPYTERLAB_SETTINGS_DIR"])
    _write(settings / "@jupyterlab/apputils-extension/themes.jupyterlab-settings", theme=request.param)
    _write(settings / "@jupyterlab/notebook-extension/tracker.jupyterlab-settings", windowingMode="none")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET.split(), timeout=60 * SECONDS)
        page = browser.new_page(viewport={"width": 1300, "height": 1000})
        page.goto(f"{lab}&reset", timeout=60 * SECONDS)
        yield page
        browser.close()


def test_the_start_notebook_answers_a_reader(page: Page, request: pytest.FixtureRequest) -> None:
    """Run all: one lock breaks, one holds; then another stage, another number, another pattern are other answers."""
    run_all(page, cells=10)
    expect(page.locator(f'{OUTPUT} img[alt*="VIOLATED"]')).to_be_visible()
    expect(page.locator(f'{OUTPUT} img[alt*="HELD"]')).to_be_visible()
    answer = page.locator(f"{OUTPUT} .widget-html [role=status]")
    expect(answer).to_contain_text("BORDERLINE")
    enterprise = page.locator(".widget-toggle-button", has_text="Enterprise")
    enterprise.focus()
    page.keyboard.press("Enter")
    expect(answer).to_contain_text("REQUIRED")
    expect(answer).not_to_contain_text("BORDERLINE")
    instances = page.get_by_label("Instances")
    instances.fill("1")
    instances.press("Tab")
    expect(answer).to_contain_text("IN-PROCESS")
    page.locator(".widget-dropdown select").select_option("Rate limiting")
    expect(answer).to_contain_text("a counter in memory")
    assert "Dark" in page.locator("body").get_attribute("data-jp-theme-name") or "Light" in request.node.name
    no_errors(page)


def run_all(page: Page, *, cells: int) -> None:
    """Run > Run All Cells, once the kernel is there, until the last cell has its number."""
    expect(page.locator("#jp-main-statusbar")).to_contain_text("| Idle", timeout=60 * SECONDS)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    done = page.locator(".jp-CodeCell .jp-InputPrompt").last.filter(has_text=f"[{cells}]:")
    expect(done.or_(page.locator(ERROR)).first).to_be_visible(timeout=120 * SECONDS)
    no_errors(page)


def no_errors(page: Page) -> None:
    assert page.locator(ERROR).all_inner_texts() == []


def _write(path: Path, **settings: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings))
