"""Runs the notebooks of examples/ and stores what they print and draw in them, so that they can be read where they lie.

python scripts/run_notebooks.py                           # all of them
python scripts/run_notebooks.py examples/merging.ipynb    # some
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
Cell = dict[str, Any]


def executed(notebook: Cell, name: str) -> Cell:
    """The notebook with the outputs of its cells: their text, and each figure as a small PNG."""
    matplotlib.use("Agg")
    namespace: dict[str, Any] = {"__name__": "__main__"}
    cells, count = [], 0
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            count += 1
            outputs = _run("".join(cell["source"]), f"{name}, cell {number}", namespace, count)
            cell = {**cell, "execution_count": count, "outputs": outputs}
        cells.append(cell)
    return {**notebook, "cells": cells}


def _run(source: str, name: str, namespace: dict[str, Any], count: int) -> list[Cell]:
    """Runs a cell as Jupyter does, which shows the value of its last line too, unless a semicolon ends it."""
    parsed = ast.parse(source, name)
    last = parsed.body[-1]
    shown = None
    if isinstance(last, ast.Expr) and not source.rstrip().endswith(";"):
        shown = compile(ast.Expression(last.value), name, "eval")
        parsed.body.pop()
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(parsed, name, "exec"), namespace)
        if shown is not None:
            value = eval(shown, namespace)
    outputs: list[Cell] = []
    if printed.getvalue():
        outputs.append(
            {"name": "stdout", "output_type": "stream", "text": printed.getvalue().splitlines(keepends=True)}
        )
    if value is not None:
        data = {"text/plain": repr(value).splitlines(keepends=True)}
        outputs.append({"data": data, "execution_count": count, "metadata": {}, "output_type": "execute_result"})
    for figure in plt.get_fignums():
        outputs.append(_drawn(plt.figure(figure)))
    plt.close("all")
    return outputs


def _drawn(figure: Any) -> Cell:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=72, bbox_inches="tight", metadata={"Software": None})
    data = {"image/png": base64.b64encode(file.getvalue()).decode(), "text/plain": ["<Figure>"]}
    return {"data": data, "metadata": {}, "output_type": "display_data"}


def main(files: list[Path]) -> None:
    for file in files:
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            notebook = executed(json.loads(file.read_text(encoding="utf-8")), file.name)
        file.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{file.name}: {os.path.getsize(file) // 1024} KiB")


if __name__ == "__main__":
    main([Path(file).resolve() for file in sys.argv[1:]] or sorted((ROOT / "examples").glob("*.ipynb")))
