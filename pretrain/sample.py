"""Sample text from a checkpoint at any width: `python -m pretrain.sample RUN_DIR --width 1/4 --prompt "The"`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from modeling.checkpoint_reader import CheckpointError
from modeling.decode import generate
from modeling.nesting import parse_layer_widths
from modeling.open_model import open_model
from modeling.sampling import Sampling, seeded


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pretrain.sample", description="Sample text at any width.")
    parser.add_argument("checkpoint", type=Path, help="a checkpoint folder, or a run folder")
    parser.add_argument("--width", default="1", help="1, 1/2, a head count as 16h, or one for each layer: 1,1/2,...")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--tokenizer", default="", help="FILE.json, FILE.model or tiktoken:NAME; default: the run's")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        opened = open_model(args.checkpoint)
        model, text = opened.model, opened.text(args.tokenizer)
        widths = parse_layer_widths(args.width, model.cfg.n_heads, model.cfg.n_layers)
        ids = text.prompt_ids(args.prompt)
        if args.max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens {args.max_new_tokens}: must be at least 1")
        sampling = Sampling(temperature=args.temperature, top_p=args.top_p)
        generator = seeded(args.seed)
    except (CheckpointError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    steps = generate(
        model,
        [ids],
        widths,
        max_new_tokens=args.max_new_tokens,
        sampling=sampling,
        generator=generator,
    )
    new = []
    for token in steps:
        if token.item() == text.eos_id:
            break
        new.append(int(token))
    print(text.decode(ids + new))
    return 0


if __name__ == "__main__":
    sys.exit(main())
