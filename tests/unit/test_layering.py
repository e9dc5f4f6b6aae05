"""Imports go one way, and heavy libraries have one home (CONTRIBUTING.md, Layering)."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("modeling", "pretrain", "data_prep")
FILES = sorted(path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
FORBIDDEN = {  # A path prefix, and the modules of ours that files under it must not import.
    "modeling/ops/": ("modeling", "pretrain", "data_prep"),
    "modeling/remote_code/": ("modeling", "pretrain", "data_prep"),
    "modeling/": ("pretrain", "data_prep"),
    "data_prep/": ("pretrain", "modeling"),
}
HOMES = {  # A heavy library, and the path prefixes that may import it.
    "deepspeed": ("pretrain/engine.py",),
    # remote_code/ is copied out and runs where nothing else of ours is.
    "mamba_ssm": ("modeling/ops/", "modeling/remote_code/"),
    "triton": ("modeling/ops/",),
    "megatron": ("modeling/tensor_parallel.py", "pretrain/distributed.py"),
}


def imported(source: str) -> set[str]:
    """Full dotted names that the source imports anywhere, `from a import b` as a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" if not node.level else "." for alias in node.names}
    return names


def violations(path: str, source: str) -> list[str]:
    found = []
    for name in sorted(imported(source)):
        top = name.split(".")[0]
        if name == ".":
            found.append(f"{path}: relative import")
        for prefix, modules in FORBIDDEN.items():
            sibling = prefix == "modeling/ops/" and name.startswith("modeling.ops")
            if path.startswith(prefix) and top in modules and not sibling:
                found.append(f"{path} imports {name}")
        if top in HOMES and not path.startswith(HOMES[top]):
            found.append(f"{path} imports {name}, whose home is {', '.join(HOMES[top])}")
    return found


@pytest.mark.parametrize("path", FILES)
def test_imports_go_one_way(path: str) -> None:
    assert violations(path, (ROOT / path).read_text()) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("modeling/ops/norm.py", "from modeling import nesting"),
        ("modeling/mixer.py", "def f():\n    import pretrain.config"),
        ("data_prep/shard_schema.py", "from modeling.config import LanguageConfig"),
        ("pretrain/train.py", "import deepspeed"),
        ("pretrain/train.py", "from mamba_ssm.ops import triton"),
        ("modeling/mixer.py", "from megatron.core import parallel_state"),
        ("pretrain/train.py", "from . import data"),
        ("modeling/remote_code/modeling_matmamba.py", "from modeling.nesting import parse_width"),
    ],
)
def test_the_rule_notices(path: str, source: str) -> None:
    assert violations(path, source)


def test_no_script_hides_an_installed_module() -> None:
    """A script run by its path puts its folder first on sys.path."""
    import importlib.util

    names = [path.stem for path in (ROOT / "data_prep").glob("*.py") if path.stem != "__init__"]
    assert [name for name in names if importlib.util.find_spec(name) is not None] == []
