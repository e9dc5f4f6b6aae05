"""The command line of `python -m pretrain.checkpoint`; needs neither DeepSpeed nor ranks.

    python -m pretrain.checkpoint inspect DIR                            a table of what is in it
    python -m pretrain.checkpoint verify DIR                             re-read every byte of every checkpoint
    python -m pretrain.checkpoint consolidate DIR -o OUT [--width 1/4]   one safetensors file for each chosen width

DIR is a checkpoint or a run's folder. Exit codes: 0, 1 where a checkpoint is damaged, 2 misused.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from modeling import nesting
from modeling.checkpoint_reader import WEIGHTS, WEIGHTS_HELP, CheckpointError, Reader
from modeling.convert import cut
from pretrain.checkpoint import candidates, checkpoint_dir
from pretrain.checkpoint_model import find_checkpoint
from pretrain.config_io import config_from_dict
from pretrain.retention import read_best, step_of


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, do what it asks, return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.checkpoint", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("inspect", "a table of what is in it"), ("verify", "re-read every byte")):
        commands.add_parser(name, help=text).add_argument("folder", type=Path)
    one_file = commands.add_parser("consolidate", help="one safetensors file for each chosen width")
    one_file.add_argument("folder", type=Path)
    one_file.add_argument("-o", "--output", type=Path, required=True, help="folder of the files")
    one_file.add_argument("--weights", choices=WEIGHTS, default="auto", help=WEIGHTS_HELP)
    one_file.add_argument("--width", action="append", help="e.g. 1/4; may be given again; default: every trained one")
    args = parser.parse_args(argv)
    try:
        if args.command == "inspect":
            return _inspect(args.folder)
        if args.command == "verify":
            return _verify(args.folder)
        return _consolidate(args.folder, args.output, args.width, args.weights)
    except (CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _inspect(folder: Path) -> int:
    console = Console()
    newest = find_checkpoint(folder)
    if newest != folder:
        console.print(_list_checkpoints(folder))
    reader = Reader(newest)
    state, layout = reader.state, reader.manifest["layout"]
    files = Table(title=f"{newest.name}: {len(reader.files)} files")
    for column in ("file", "MiB", "pieces", "SHA-256"):
        files.add_column(column, justify="right" if column in ("MiB", "pieces") else "left")
    for entry in reader.files:
        files.add_row(
            entry["file"], f"{entry['bytes'] / 2**20:,.1f}", str(len(entry["pieces"])), f"{entry['sha256'][:12]}…"
        )
    shapes = Table(title=f"{len(reader.shapes)} logical parameters, each as float32 {', '.join(reader.kinds)}")
    for column in ("parameter", "shape", "entries"):
        shapes.add_column(column, justify="right" if column == "entries" else "left")
    for name, shape in reader.shapes.items():
        shapes.add_row(name, " x ".join(map(str, shape)), f"{math.prod(shape):,}")
    console.print(shapes)
    console.print(files)
    console.print(
        f"step {state.step:,} · {state.tokens:,} tokens · {state.sequence:,} sequences drawn · {state.n_updates:,} updates"
        f" · {state.bad_steps} bad steps · {state.rollbacks} roll-backs"
    )
    console.print(
        f"written at tp {layout['tensor']} x dp {layout['data']}, ZeRO {layout['zero_stage']}, commit "
        f"{reader.manifest['git_commit']}; resumes at any layout"
    )
    return 0


def _list_checkpoints(run_dir: Path) -> Table:
    root = checkpoint_dir(run_dir)
    best: dict[int, list[str]] = {}
    for width, entry in read_best(root).items():
        best.setdefault(int(entry["step"]), []).append(f"{width} ({entry['loss']:.4f})")
    table = Table(title=str(root))
    for column in ("checkpoint", "GiB", "best validation of width"):
        table.add_column(column, justify="right" if column == "GiB" else "left")
    for folder in candidates(root):
        size = sum(path.stat().st_size for path in folder.iterdir())
        table.add_row(folder.name, f"{size / 2**30:.2f}", ", ".join(best.get(step_of(folder), [])))
    return table


def _verify(folder: Path) -> int:
    """Every checkpoint of a run, or the one named: hashes, and that every entry of every parameter is there and finite."""
    folders = [folder] if (folder / "manifest.json").exists() else candidates(checkpoint_dir(folder))
    if not folders:
        raise CheckpointError(f"{folder} is neither a checkpoint nor a run that has one")
    damaged = 0
    for one in folders:
        try:
            reader = Reader(one)
            reader.verify()
            cfg = config_from_dict(reader.manifest["config"])
            reader.check_model(cfg.model)
            for name in reader.shapes:
                for kind in reader.kinds:
                    if not bool(reader.full(name, kind, cfg.model.n_heads).isfinite().all()):
                        raise CheckpointError(f"{one}: {kind} of {name} is not finite")
        except CheckpointError as error:
            damaged += 1
            print(f"{one.name}: damaged: {error}")
        else:
            print(f"{one.name}: whole, {sum(entry['bytes'] for entry in reader.files) / 2**20:,.1f} MiB read")
    return 1 if damaged else 0


def _consolidate(folder: Path, output: Path, chosen: list[str] | None, weights: str) -> int:
    reader = Reader(find_checkpoint(folder))
    reader.verify()
    cfg = config_from_dict(reader.manifest["config"]).model
    reader.check_model(cfg)
    widths = [nesting.parse_width(text, cfg.n_heads) for text in chosen] if chosen else list(cfg.widths)
    state = dict(reader.weights(cfg.n_heads, weights))
    output.mkdir(parents=True, exist_ok=True)
    for n_heads in widths:
        part, small = cut(state, cfg, n_heads)
        name = nesting.width_name(n_heads, cfg.n_heads).replace("/", "of")
        path = output / f"width_{name}.safetensors"
        about = {"config": json.dumps(asdict(small)), "step": str(reader.state.step), "width": name}
        temporary = path.with_suffix(".writing")
        save_file(part, temporary, metadata=about)
        temporary.rename(path)
        print(f"{path}: {sum(tensor.numel() for tensor in part.values()):,} parameters, {n_heads} heads a layer")
    return 0
