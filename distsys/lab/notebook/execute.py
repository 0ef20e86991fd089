"""`make notebooks`: execute, normalise, write. What a reader sees on GitHub was run, and a second run changes little.

Stripped are the widgets' state (it breaks GitHub's preview), execution times, and papermill's metadata; code cells are
numbered 1..n; outputs that name this machine's folders are refused rather than edited.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

MAX_BYTES = 300_000
CELL_TIMEOUT = 120  # seconds; nbclient's own default is for ever
KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}


def normalise(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The same notebook without what differs between two runs or two machines. Idempotent."""
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
    """Why an executed notebook must not be committed; `secrets` are strings of this machine that must not be in it."""
    text = nbformat.writes(notebook)
    if len(text.encode()) > MAX_BYTES:
        yield f"{len(text.encode()):,} bytes, more than {MAX_BYTES:,}"
    for i, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                yield f"cell {i} raised {output.ename}: {output.evalue}"
            if " at 0x" in str(output.get("data", output.get("text", ""))):
                yield f"cell {i} shows an object's address"
            if output.get("name") == "stderr":
                yield f"cell {i} wrote to stderr: {output.text[:200]}"
    for secret in secrets:
        if secret in text:
            yield f"names {secret}, a path of this machine"


async def execute(path: Path, **environment: str) -> nbformat.NotebookNode:
    """The notebook, run from its own folder in a new kernel."""
    notebook: nbformat.NotebookNode = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(path.parent)}}
    client = NotebookClient(
        notebook, timeout=CELL_TIMEOUT, kernel_name="python3", coalesce_streams=True, resources=where
    )
    await client.async_execute(env={**os.environ, **environment})
    return notebook


def main(arguments: Sequence[str]) -> int:
    """Run the notebooks named, or all of them. 1 when one must not be committed; that one is left as it was."""
    root = Path.cwd()
    parser = argparse.ArgumentParser(prog="python -m distsys.lab.notebook.execute", description=main.__doc__)
    parser.add_argument("paths", nargs="*", type=Path, metavar="NOTEBOOK")
    paths: list[Path] = parser.parse_args(arguments).paths or sorted((root / "notebooks").rglob("[!.]*.ipynb"))
    if missing := [str(path) for path in paths if not path.is_file()]:
        parser.error(f"no such notebook: {', '.join(missing)}")
    homes = {str(root), str(Path.home()), sys.prefix, tempfile.gettempdir() + "/"} - {"/"}
    bad = 0
    for path in paths:
        print(f"{path.relative_to(root) if path.is_absolute() else path} ...", flush=True)
        try:
            notebook = normalise(asyncio.run(execute(path.resolve())))
            problems = [f"  {problem}" for problem in faults(notebook, secrets=sorted(homes))]
            if not problems:
                nbformat.write(notebook, path)
        except CellExecutionError as error:
            problems = [str(error)]
        if problems:
            print("\n".join(problems), file=sys.stderr)
            bad += 1
    return min(bad, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
