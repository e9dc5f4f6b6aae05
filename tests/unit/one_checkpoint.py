"""A run with one checkpoint, for the tests of what reads runs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from modeling.checkpoint_reader import Piece, RunState
from modeling.language import LanguageModel
from pretrain.checkpoint import begin, checkpoint_dir, commit, write_rank_file


def write_run(folder: Path, model: LanguageModel, tokenizer: str = "", **about_data: object) -> Path:
    """A run in `folder` whose checkpoint holds `model`, as a single rank writes it; `tokenizer` is its data.tokenizer, and
    `about_data` what else it says of its data."""
    root = checkpoint_dir(folder)
    flat = {name: p.detach().flatten() for name, p in model.named_parameters()}
    tensors = {
        Piece(name, 0, 0, t.numel()): {"master": t, "exp_avg": t * 0, "exp_avg_sq": t * 0} for name, t in flat.items()
    }
    entry = write_rank_file(begin(root, 3), 0, tensors)
    manifest = {
        "format_version": 2,
        "state": asdict(RunState(step=3)),
        "config": {
            "run_dir": str(folder),
            "model": asdict(model.cfg),
            "data": {"path": "absent", "tokenizer": tokenizer},
            "optim": {"lr": 1e-3, "steps": 3, "warmup_steps": 1},
        },
        "layout": {"tensor": 1},
        "shapes": {name: list(p.shape) for name, p in model.named_parameters()},
        "files": [entry],
        **about_data,
    }
    commit(root, 3, manifest)
    return folder
