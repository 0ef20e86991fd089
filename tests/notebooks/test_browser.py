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

import nbformat
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
expect.set_options(timeout=20 * SECONDS)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: on Debian run  apt install chromium")


@pytest.fixture
def lab(tmp_path: Path, jupyter: dict[str, str]) -> Iterator[str]:
    """The address of `distsys lab`, with its token, on a copy of the notebooks without their outputs."""
    folder = tmp_path / "project/notebooks"
    folder.mkdir(parents=True)
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:  # what is seen below was run here
            cell.update({"outputs": [], "execution_count": None} if cell.cell_type == "code" else {})
        nbformat.write(notebook, folder / path.name)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "distsys", "lab", "--no-browser", "--port", str(port)]
    with subprocess.Popen(
        command, cwd=folder.parent, env=jupyter, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's `&` ignores it
    ) as server:  # fmt: skip
        assert server.stderr
        try:
            yield next(line.strip() for line in server.stderr if line.strip().startswith("http://127.0.0.1"))
        finally:
            server.send_signal(signal.SIGINT)
            server.stderr.read()
            assert server.wait(30) == 0, "Ctrl-C is how one stops JupyterLab"


@pytest.fixture
def page(request: pytest.FixtureRequest, lab: str, jupyter: dict[str, str]) -> Iterator[Page]:
    """A browser window with the notebook and in the theme of the test's parameter."""
    notebook, theme = request.param
    settings = Path(jupyter["JUPYTERLAB_SETTINGS_DIR"])
    _write(settings / "@jupyterlab/apputils-extension/themes.jupyterlab-settings", theme=f"JupyterLab {theme}")
    _write(settings / "@jupyterlab/notebook-extension/tracker.jupyterlab-settings", windowingMode="none")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET.split(), timeout=60 * SECONDS)
        page = browser.new_page(viewport={"width": 1300, "height": 1000})
        page.goto(f"{lab.replace('00_start_here', notebook)}&reset", timeout=60 * SECONDS)
        yield page
        browser.close()


@pytest.mark.parametrize(
    "page", [("00_start_here", "Light"), ("00_start_here", "Dark")], indirect=True, ids=lambda p: p[1]
)
def test_the_start_notebook_answers_a_reader(page: Page) -> None:
    """Run all: one lock breaks, one holds; then another stage, another number, another pattern are other answers."""
    run_all(page, "00_start_here")
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
    no_errors(page)


@pytest.mark.parametrize(
    "page",
    [("01_locks", "Dark"), ("02_resilience", "Dark"), ("03_idempotency", "Dark"), ("04_rate_limiting", "Light")],
    indirect=True,
    ids=lambda p: p[0],
)
def test_a_category_notebook_comes_to_its_verdicts(page: Page, request: pytest.FixtureRequest) -> None:
    """Run all: a picture that also says VIOLATED in text, HELD at least in a table, and nothing raised."""
    run_all(page, request.node.callspec.params["page"][0])
    expect(page.locator(f'{OUTPUT} img[alt*="VIOLATED"]').first).to_be_visible()
    expect(page.locator(f"{OUTPUT} td", has_text="✓ HELD").first).to_be_visible()


def run_all(page: Page, notebook: str) -> None:
    """Run > Run All Cells, once the kernel is there, until the last cell has its number."""
    cells = nbformat.read(ROOT / f"notebooks/{notebook}.ipynb", as_version=4).cells
    last = sum(cell.cell_type == "code" for cell in cells)
    expect(page.locator("#jp-main-statusbar")).to_contain_text("| Idle", timeout=60 * SECONDS)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    done = page.locator(".jp-CodeCell .jp-InputPrompt").last.filter(has_text=f"[{last}]:")
    expect(done.or_(page.locator(ERROR)).first).to_be_visible(timeout=120 * SECONDS)
    no_errors(page)


def no_errors(page: Page) -> None:
    assert page.locator(ERROR).all_inner_texts() == []


def _write(path: Path, **settings: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings))
