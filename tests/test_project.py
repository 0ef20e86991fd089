"""The house rules that no type checker knows: who imports whom, what a notebook may hold, where each link leads."""

from __future__ import annotations

import ast
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import fastapi
import nbformat
import pydantic
import pytest
import yaml
from packaging.requirements import Requirement
from psycopg_pool import AsyncConnectionPool

import distsys
from distsys import decide
from distsys.cli import main as cli
from distsys.decide.matrix import Rule
from distsys.lab import experiments
from distsys.schema import ensure_schema
from tests.decide.readme import refresh
from tests.notebooks.execute import KERNELSPEC, MAX_BYTES
from tests.notebooks.execute import faults as faults_of_outputs

ROOT = Path(__file__).parents[1]
RULE_FOLDERS = ("locks", "resilience", "idempotency", "rate_limiting", "edge", "events")
CLIENTS = {"redis": "redis", "psycopg": "psycopg", "psycopg_pool": "psycopg"}
TWO_CLIENTS = {"distsys/idempotency/dedup.py"}  # its rule is a layer in each
OPTIONAL = {"distsys/resilience/listeners.py": {"opentelemetry"}}  # imported when asked for
MAX_LINES = 500  # of a module: past that it is two
MAX_CELL = 12  # of a code cell, blank lines not counted
MODULES = sorted((ROOT / "distsys").rglob("*.py"))
NOTEBOOKS = sorted(p for p in (ROOT / "notebooks").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


each_module = pytest.mark.parametrize("path", MODULES, ids=_name)
TEXTS = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("[cr]*/*.md")), *NOTEBOOKS]
INSTRUMENTS = ("distsys.events", "distsys.breaker.state", "distsys.retry.delay")  # of OpenTelemetry
FILE_ENDINGS = (".py", ".pyi", ".toml", ".sql")
each_text = pytest.mark.parametrize("path", TEXTS, ids=_name)
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=_name)


# ---- the package


@each_module
def test_a_rule_takes_one_client(path: Path) -> None:
    """A rule imports the standard library, one client, `errors` and `_support`. Directions: `lint-imports`."""
    here = path.relative_to(ROOT)
    others = {name.split(".")[0] for name in _imports(path)} - {"distsys"} - sys.stdlib_module_names
    others -= OPTIONAL.get(_name(path), set())
    room = here.parts[1]
    if room in RULE_FOLDERS or room == "_support":
        clients = {CLIENTS.get(name, f"{name}, which is no client") for name in others}
        assert len(clients) <= 1 + (str(here) in TWO_CLIENTS), clients
        assert clients <= {"redis", "psycopg"}
    elif room not in ("lab", "cli", "decide"):
        assert others == set()


@each_module
def test_no_module_outgrows_one_sitting(path: Path) -> None:
    """A reader takes a module in whole."""
    assert len(path.read_text("utf-8").splitlines()) <= MAX_LINES


def test_importing_the_package_imports_no_driver() -> None:
    """Names are loaded on first use: the import costs what the standard library costs."""
    code = "import distsys, sys; print(*sorted({m.split('.')[0] for m in sys.modules} & set(sys.argv[1:])))"
    heavy = ["redis", "psycopg", "psycopg_pool", "matplotlib", "ipywidgets", "asyncio", "cloudpickle"]
    loaded = subprocess.run([sys.executable, "-c", code, *heavy], capture_output=True, text=True, check=True, cwd=ROOT)
    assert loaded.stdout.strip() == ""


def test_every_lazy_name_is_there() -> None:
    """What `dir(distsys)` offers can be had; what it does not is an AttributeError."""
    for name in distsys.__all__:  # the class behind @circuit_breaker is CircuitBreaker
        assert getattr(distsys, name).__name__.lower() in (name.lower(), name.replace("_", ""))
    assert set(distsys.__all__) <= set(dir(distsys))
    with pytest.raises(AttributeError, match="Mutex"):
        distsys.Mutex  # noqa: B018


@pytest.mark.parametrize("rule", [r for r in decide.RULES if r.modules], ids=lambda r: r.name)
def test_a_rule_that_is_built_has_all_its_parts(rule: Rule) -> None:
    """Module with the five headed lines, notebook, checklist, references."""
    for path in (rule.notebook, rule.checklist, *rule.references):
        assert (ROOT / path).is_file(), path
    for module in rule.modules:
        lines = (ast.get_docstring(ast.parse((ROOT / module).read_text("utf-8"))) or "").splitlines()
        heads = [line.split()[0] for line in lines[1:] if line and not line.startswith(" ")]
        assert heads[:5] == ["Promise", "Not", "Units", "Errors", "Source"], module


# ---- the environment


def test_conda_users_get_the_environment_of_pyproject() -> None:
    """Same Python, the package itself with every extra by pip, and besides that only servers and tools."""
    environment = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))
    plain = [d for d in environment["dependencies"] if isinstance(d, str)]
    pip = next(d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    assert pip == [f"-e .[{','.join(PROJECT['optional-dependencies'])}]"]
    assert plain[0].startswith(f"python{PROJECT['requires-python']}")
    assert plain[1:] == ["pip", "make", "postgresql", "valkey-server"]
    assert environment["variables"] == {"DISTSYS_BACKEND": "system"}


def test_the_lock_holds_every_dependency_with_hashes_and_no_address() -> None:
    """requirements.lock satisfies pyproject.toml and says nothing about where packages come from."""
    text = (ROOT / "requirements.lock").read_text("utf-8")
    locked = re.findall(r"^([a-z0-9.-]+)(?:\[[a-z,]+\])?==([^ ;\\]+)", text, re.MULTILINE)
    wanted = [*PROJECT["dependencies"], *chain.from_iterable(PROJECT["optional-dependencies"].values())]
    for requirement in map(Requirement, wanted):
        versions = [version for name, version in locked if name == requirement.name]
        assert versions, requirement
        assert all(requirement.specifier.contains(v, prereleases=True) for v in versions), requirement
    assert text.count("--hash=sha256:") >= len(locked) > 100
    assert not re.search(r"//|--(extra-)?index|find-links", text)


def test_no_file_names_a_machine_or_a_registry() -> None:
    """Neither somebody's folders nor the address of a package index."""
    private = re.compile(r"/(?:w[o]rk|r[o]ot|h[o]me)/[a-z]|p[y]thonhosted|p[y]pi\S*/simple|index-url[= ]+\S*:/")
    found = [
        f"{path.relative_to(ROOT)}: {hit.group()}"
        for path in _files()
        if path != Path(__file__)
        for hit in private.finditer(path.read_text("utf-8", errors="replace"))
    ]
    assert found == []


OLD_PYTHON = '#!/bin/sh\n[ "$1" = -V ] && echo Python 3.9.1\nexit 1\n'


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"PYTHON": "no-such-python"}, "no no-such-python: install Python >= 3.11, or say PYTHON="),
        ({"PYTHON": "{tmp}/old"}, "Python 3.9.1 is too old: say PYTHON=python3.13 make lab"),
        ({"VENV": "/proc/nowhere"}, "/proc/nowhere cannot be written here: copy this folder"),
    ],
    ids=["no python", "old python", "read-only"],
)
def test_make_names_the_remedy_in_one_line(settings: dict[str, str], message: str, tmp_path: Path) -> None:
    """What is missing on a fresh machine is said before anything is installed."""
    (tmp_path / "old").write_text(OLD_PYTHON)
    (tmp_path / "old").chmod(0o755)
    for tool in ("sh", "mkdir", "cat", "make"):
        (tmp_path / tool).symlink_to(str(shutil.which(tool)))
    variables = {"VENV": str(tmp_path / "venv"), **{k: v.format(tmp=tmp_path) for k, v in settings.items()}}
    arguments = [f"{name}={value}" for name, value in variables.items()]
    environment = {"PATH": str(tmp_path)}  # without uv
    done = subprocess.run(
        ["make", "lab", *arguments], capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[0].startswith(f"distsys: {message}"), done.stderr


# ---- the texts


def test_the_table_of_the_readme_is_fresh() -> None:
    """`make readme` writes it from the matrix and the docstrings of the modules."""
    text = (ROOT / "README.md").read_text("utf-8")
    assert refresh(text) == text


@each_text
def test_every_link_leads_somewhere(path: Path) -> None:
    """Files exist, and headings too, where the link names one."""
    for text, anchors in _texts(path):
        for target, anchor in re.findall(r"\]\((?!https?:|mailto:)([^)#\s]*)#?([^)\s]*)\)", text):
            goal = (path.parent / target).resolve() if target else path
            assert goal.exists(), target
            assert ROOT in goal.parents, f"{target} leaves the project"
            if anchor:
                known = anchors if goal == path else {a for _, found in _texts(goal) for a in found}
                assert anchor in known, f"{target}#{anchor}"


@each_text
def test_every_name_of_ours_in_the_texts_exists(path: Path) -> None:
    """What a text imports from distsys, or calls distsys.something, can be had."""
    for dotted in re.findall(r"(?<![/\w.-])distsys((?:\.[A-Za-z_]\w*)+)", _prose_and_code(path)):
        if not dotted.endswith(FILE_ENDINGS) and f"distsys{dotted}" not in INSTRUMENTS:
            pkgutil.resolve_name(f"distsys{dotted}")
    for module, names in _imported(path):
        for name in names:
            assert hasattr(import_module(module), name) or find_spec(f"{module}.{name}"), f"{module} has no {name}"


@each_text
def test_the_texts_import_public_names_from_the_package_itself(path: Path) -> None:
    """`from distsys import X`: modules may move, the package's own names stay."""
    for module, names in _imported(path):
        if module != "distsys":
            assert not set(names) & set(distsys.__all__), f"{module}: import {', '.join(names)} from distsys"


def test_the_architecture_names_every_room() -> None:
    """A new folder is described, or it is not found."""
    text = (ROOT / "ARCHITECTURE.md").read_text("utf-8")
    rooms = [path.parent for path in MODULES if path.name == "__init__.py"]
    for room in (room for room in rooms if room.parent in (ROOT / "distsys", ROOT / "distsys/lab")):
        assert re.search(rf"^  ?.*\b{room.name}/", text, re.MULTILINE), room.name


@pytest.mark.parametrize("path", sorted(ROOT.glob("checklists/*.md")), ids=_name)
def test_the_commands_of_a_checklist_are_understood(path: Path) -> None:
    """Each `distsys` line names a pattern, an experiment or options that there are."""
    for command in re.findall(r"python -m distsys ([^`\n#]+)", path.read_text("utf-8")):
        word, *arguments = shlex.split(command)
        options = cli.parser().parse_args([word, *arguments])
        if word == "decide" and options.pattern:
            assert decide.find(options.pattern)
        elif word == "run":
            assert set(options.experiments) <= set(experiments.every())


async def test_the_code_of_the_readme_runs_as_written(redis: object, pg_pool: AsyncConnectionPool) -> None:
    """The quick start, with nothing changed: only the names that it leaves to the reader are given."""
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    done = []

    async def process_payment(order_id: str) -> None:
        done.append(order_id)

    async def handle_request() -> None:
        done.append("handled")

    class PaymentCreate(pydantic.BaseModel):
        amount: int

    async def process() -> str:
        done.append("paid")
        return "paid"

    await ensure_schema(pg_pool)
    scope = {"redis_client": redis, "process_payment": process_payment, "order_id": "order-123"}
    scope |= {"user_id": 42, "handle_request": handle_request, "router": fastapi.APIRouter(), "Header": fastapi.Header}
    scope |= {"PaymentCreate": PaymentCreate, "db": pg_pool, "process": process}
    code = compile(block, "README.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    await eval(code, scope)
    create_payment: Any = scope["create_payment"]
    assert [await create_payment(PaymentCreate(amount=1), "one-intent") for _ in range(2)] == ["paid", "paid"]
    assert done == ["order-123", "handled", "paid"]


# ---- the notebooks


@each_notebook
def test_a_notebook_is_as_it_would_be_run_again(path: Path) -> None:
    """Executed from top to bottom, normalised, small, without errors, addresses or another machine's traces."""
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert notebook.metadata.kernelspec == KERNELSPEC
    assert "widgets" not in notebook.metadata
    assert path.stat().st_size <= MAX_BYTES
    assert list(faults_of_outputs(notebook)) == []
    assert any(cell.outputs for cell in code), "run `make notebooks`"


@each_notebook
def test_a_notebook_keeps_the_form(path: Path) -> None:
    """Title first, literal parameters, at most two cells without text, a checked line, the lab closed at the end."""
    cells = nbformat.read(path, as_version=4).cells
    assert cells[0].source.startswith("# ")
    code = [cell for cell in cells if cell.cell_type == "code"]
    tagged = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    for statement in ast.parse(tagged[0].source).body:
        assert isinstance(statement, ast.Assign)
        assert isinstance(statement.value, ast.Constant)
    assert any(cell.source.startswith("# NBVAL_CHECK_OUTPUT") for cell in code)
    assert code[-1].source.strip() == "await lab.close()"
    for three in zip(cells, cells[1:], cells[2:], strict=False):
        assert [cell.cell_type for cell in three] != ["code"] * 3, f"no text around: {three[1].source[:60]}"


@each_notebook
def test_no_cell_holds_what_hides_an_error(path: Path) -> None:
    """No magics, no Output widget, no tag that expects an exception; at most 12 lines a cell, 5 a helper."""
    for cell in nbformat.read(path, as_version=4).cells:
        assert "raises-exception" not in cell.metadata.get("tags", [])
        if cell.cell_type != "code":
            continue
        lines = [line for line in cell.source.splitlines() if line.strip()]
        assert len(lines) <= MAX_CELL, cell.source
        assert not any(line.lstrip().startswith(("%", "!")) for line in lines), cell.source
        tree = ast.parse(cell.source)  # a magic is a syntax error
        names = {getattr(node, "attr", getattr(node, "id", "")) for node in ast.walk(tree)}
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
        assert not (names | imported) & {"Output", "interact", "interactive", "interactive_output"}
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno - node.lineno <= 5, f"{node.name} belongs in the lab"


@pytest.mark.parametrize(
    "path", [p for p in NOTEBOOKS if p.parent.name == "notebooks" and p.stem[:2] != "00"], ids=_name
)
def test_a_category_shows_its_row_of_the_matrix_in_its_title(path: Path) -> None:
    """Five chips: whether to read on at all."""
    title = nbformat.read(path, as_version=4).cells[0].source
    assert any(decide.stage_strip(pattern.name) in title for pattern in decide.PATTERNS)


def test_each_notebook_leads_to_the_next_and_back() -> None:
    """By number, in their titles: one that comes between two others has to be linked by both."""
    chain = [p for p in NOTEBOOKS if p.parent.name == "notebooks"]
    titles = [nbformat.read(path, as_version=4).cells[0].source for path in chain]
    leads = [re.findall(r"(previous|next): \[(\d\d) [^]]+\]\((\2_\w+\.ipynb)\)", title) for title in titles]
    before, after = [None, *chain[:-1]], [*chain[1:], None]
    for found, *wanted in zip(leads, before, after, strict=True):
        assert found == [
            (word, path.name[:2], path.name) for word, path in zip(("previous", "next"), wanted, strict=True) if path
        ]


def test_the_start_notebook_shows_the_tables_of_today() -> None:
    """Its committed outputs are what distsys.decide says now; `make notebooks` renews them."""
    cells = nbformat.read(ROOT / "notebooks/00_start_here.ipynb", as_version=4).cells
    shown = [output.get("data", {}).get("text/markdown") for cell in cells for output in cell.get("outputs", [])]
    for table in (decide.matrix_markdown(), decide.decisions_markdown(), decide.rules_markdown("../")):
        assert table in shown


def _imports(path: Path) -> Iterator[str]:
    """Every module imported at run time, wherever in the file."""
    tree = ast.parse(path.read_text("utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports here name the package"
            yield from (f"{node.module}.{a.name}" if node.module == "distsys" else str(node.module) for a in node.names)


def _files() -> Iterator[Path]:
    """What is or would be committed; every file, where this is no checkout."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        cwd=ROOT,
        check=False,
    )
    if listed.returncode == 0:
        yield from (ROOT / name for name in listed.stdout.decode().split("\0") if name and (ROOT / name).is_file())
    else:
        hidden = re.compile(r"/(\.[^/]+|__pycache__|[^/]+\.egg-info)/")
        yield from (p for p in ROOT.rglob("*") if p.is_file() and not hidden.search(f"/{p.relative_to(ROOT)}"))


def _prose_and_code(path: Path) -> str:
    """All of a Markdown file, or the cells of a notebook without their outputs."""
    if path.suffix == ".ipynb":
        return "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells)
    return path.read_text("utf-8")


def _imported(path: Path) -> Iterator[tuple[str, list[str]]]:
    """(module, names) of each import from distsys in a text."""
    for module, several, one_line in re.findall(
        r"from (distsys[\w.]*) import (?:\(([^)]*)\)|([^\n`#(;]+))", _prose_and_code(path)
    ):
        yield module, re.findall(r"(\w+)(?: as \w+)?\s*(?:,|$)", (several or one_line).strip())


def _texts(path: Path) -> list[tuple[str, set[str]]]:
    """(text, all anchors of the file) of a Markdown file, or of each text cell of a notebook."""
    if path.suffix == ".ipynb":
        cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown"]
        anchors = {h.strip().replace(" ", "-") for c in cells for h in re.findall(r"^#+ (.*)$", c, re.MULTILINE)}
        return [(cell, anchors) for cell in cells]
    if path.suffix != ".md":
        return []
    text = re.sub(r"```.*?```", "", path.read_text("utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return [(text, {re.sub(r"[^\w -]", "", h.lower()).strip().replace(" ", "-") for h in headings})]
