"""`make notebooks`: run each notebook with nbconvert, normalise it and write it, so that a second run changes little.

Normalising removes the state of widgets (it breaks GitHub's preview), execution times and papermill's metadata, and
numbers the code cells 1..n. A notebook whose outputs name a folder of this machine is refused, not edited.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import nbformat
from nbconvert.preprocessors import CellExecutionError, ExecutePreprocessor

MAX_BYTES = 300_000
CELL_TIMEOUT_SECONDS = 120
KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}


def normalise(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Remove from a notebook what differs between two runs or two machines, and return it. Idempotent."""
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNELSPEC, "language_info": {"name": "python"}})
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for cell in notebook.cells:
        for key in ("execution", "papermill", "ExecuteTime", "scrolled", "trusted"):
            cell.metadata.pop(key, None)
    for count, cell in enumerate((cell for cell in notebook.cells if cell.cell_type == "code"), 1):
        cell.execution_count = count
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = count
            if "data" in output:
                output.data.pop("application/vnd.jupyter.widget-view+json", None)
    return notebook


def faults(notebook: nbformat.NotebookNode, *, secrets: Sequence[str] = ()) -> Iterator[str]:
    """Yield each reason why an executed notebook must not be committed.

    secrets  strings of this machine that must not be in it
    """
    text = nbformat.writes(notebook)
    if len(text.encode()) > MAX_BYTES:
        yield f"{len(text.encode()):,} bytes, more than {MAX_BYTES:,}"
    for i, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                yield f"cell {i} raised {output.ename}: {output.evalue}"
            if " at 0x" in str(output.get("data", output.get("text", ""))):
                yield f"cell {i} shows the address of an object"
            if output.get("name") == "stderr":
                yield f"cell {i} wrote to stderr: {output.text[:200]}"
    for secret in secrets:
        if secret in text:
            yield f"names {secret}, a path of this machine"


def execute(path: Path) -> nbformat.NotebookNode:
    """Return the notebook after a run in a new kernel, from its own folder. Raises CellExecutionError."""
    notebook: nbformat.NotebookNode = nbformat.read(path, as_version=4)
    run = ExecutePreprocessor(timeout=CELL_TIMEOUT_SECONDS, kernel_name=KERNELSPEC["name"], coalesce_streams=True)  # type: ignore[no-untyped-call]
    run.preprocess(notebook, {"metadata": {"path": str(path.parent)}})
    return notebook


def main(arguments: Sequence[str]) -> int:
    """Run the notebooks named, or all of them. Return 1 if one must not be committed; that one is left unchanged."""
    root = Path.cwd()
    parser = argparse.ArgumentParser(prog="python -m tests.notebooks.execute", description=main.__doc__)
    parser.add_argument("paths", nargs="*", type=Path, metavar="NOTEBOOK")
    paths: list[Path] = parser.parse_args(arguments).paths or sorted((root / "notebooks").rglob("[!.]*.ipynb"))
    if missing := [str(path) for path in paths if not path.is_file()]:
        parser.error(f"no such notebook: {', '.join(missing)}")
    homes = {str(root), str(Path.home()), sys.prefix, tempfile.gettempdir() + "/"} - {"/"}
    failed = 0
    for path in paths:
        print(f"{path.relative_to(root) if path.is_absolute() else path} ...", flush=True)
        try:
            notebook = normalise(execute(path.resolve()))
            problems = [f"  {problem}" for problem in faults(notebook, secrets=sorted(homes))]
            if not problems:
                nbformat.write(notebook, path)
        except CellExecutionError as error:
            problems = [str(error)]
        if problems:
            print("\n".join(problems), file=sys.stderr)
            failed += 1
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
