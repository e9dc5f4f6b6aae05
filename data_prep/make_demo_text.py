"""A small English corpus from what Python's own installation carries: for the demo and for tests, without a network.

Each document is the documentation of one standard-library module, taken from its source without importing it, under
FineWeb's column names. The same Python version gives the same bytes.

    python data_prep/make_demo_text.py demo/text
"""

from __future__ import annotations

import argparse
import ast
import sys
import sysconfig
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

MIN_CHARACTERS = 200
N_FILES = 2


def documents(limit_bytes: int) -> list[dict[str, str]]:
    """Documents (text, id, url, language) of at least MIN_CHARACTERS, by module name, up to `limit_bytes` of text."""
    root = Path(sysconfig.get_path("stdlib"))
    found: list[dict[str, str]] = []
    size = 0
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if name.startswith(("site-packages/", "test/", "idlelib/", "lib2to3/tests")) or "/test" in name:
            continue
        text = _documentation(path)
        if len(text) < MIN_CHARACTERS:
            continue
        found.append({"text": text, "id": f"stdlib:{name}", "url": f"file:{name}", "language": "en"})
        size += len(text.encode())
        if size > limit_bytes:
            break
    return found


def _documentation(path: Path) -> str:
    """The module's, classes' and functions' docstrings and its comments, in order; empty where it does not parse."""
    try:
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    parts = [(getattr(node, "lineno", 0), ast.get_docstring(node)) for node in nodes]
    comments = [
        (number, line.strip().lstrip("# "))
        for number, line in enumerate(source.splitlines(), 1)
        if line.strip().startswith("# ") and len(line.strip()) > 30
    ]
    return "\n".join(text for _, text in sorted([(n, t) for n, t in parts if t] + comments))


def write(folder: Path, limit_bytes: int) -> int:
    """Write N_FILES parquet files into `folder`; returns the number of documents."""
    folder.mkdir(parents=True, exist_ok=True)
    found = documents(limit_bytes)
    for i in range(N_FILES):
        pq.write_table(pa.Table.from_pylist(found[i::N_FILES]), folder / f"{i:03d}_00000.parquet")
    return len(found)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write a small English corpus without a network.")
    parser.add_argument("output", type=Path, help="folder for the parquet files")
    parser.add_argument("--megabytes", type=float, default=4.0, help="about how much text")
    args = parser.parse_args()
    count = write(args.output, int(args.megabytes * 1e6))
    print(f"{count} documents in {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
