"""Runs a notebook's code cells in order and stores what they print and draw, without Jupyter.

python examples/run_notebook.py examples/annotated_reformer.ipynb
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
from pathlib import Path
from typing import Any

from example import ROOT, run

from reformer_lm import InputError
from reformer_lm.command_line import CommandLineParser


def build_parser() -> CommandLineParser:
    """The command line."""
    parser = CommandLineParser(bare_argument_hint="give one notebook", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("notebook", type=Path)
    return parser


def execute(notebook: dict[str, Any], name: str, pictures: bool = True) -> None:
    """Runs all code cells in one namespace and puts their outputs into the notebook.

    Args:
        notebook: content of the file; changed in place.
        name: of the file, for messages.
        pictures: whether open matplotlib figures become outputs.

    Raises:
        InputError: If a cell fails; says which, and how.
    """
    if pictures:
        import matplotlib

        matplotlib.use("Agg")
    namespace: dict[str, Any] = {"__name__": "__main__"}
    code_cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(code_cells, start=1):
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                exec(compile("".join(cell["source"]), f"{name}, cell {number}", "exec"), namespace)
        except Exception as error:
            raise InputError(f"{name}, code cell {number}: {type(error).__name__}: {error}") from error
        cell["execution_count"], cell["outputs"] = number, []
        if printed.getvalue():
            lines = printed.getvalue().splitlines(keepends=True)
            cell["outputs"].append({"output_type": "stream", "name": "stdout", "text": lines})
        if pictures:
            cell["outputs"] += _figures()


def _figures() -> list[dict[str, Any]]:
    """All open figures as outputs; closes them."""
    from matplotlib import pyplot

    outputs = []
    for number in pyplot.get_fignums():
        file = io.BytesIO()
        pyplot.figure(number).savefig(file, dpi=80)
        data = {"image/png": base64.b64encode(file.getvalue()).decode(), "text/plain": ["<Figure>"]}
        outputs.append({"output_type": "display_data", "data": data, "metadata": {}})
    pyplot.close("all")
    return outputs


def main(argv: list[str] | None = None) -> None:
    """Runs the notebook and writes it back."""
    path: Path = build_parser().parse_strictly(argv).notebook
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give a .ipynb file") from None
    except ValueError:
        raise InputError(f"{path}: is no notebook; give a .ipynb file") from None
    execute(notebook, path.name)
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    shown = path.resolve()
    print(shown.relative_to(ROOT) if shown.is_relative_to(ROOT) else shown)


if __name__ == "__main__":
    run(main)
