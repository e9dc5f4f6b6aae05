"""Text from any submodel, as it comes.

    python -m modeling.generate MODEL --width 1/8 --prompt "The" [--prompt "Another"] [--speculate 1/8]

MODEL is a run, a checkpoint, or a model folder in our format. Each --width after the first continues the text as another
turn at that width (modeling.decode.Conversation).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from modeling.checkpoint_reader import CheckpointError
from modeling.decode import Conversation, check_prompts, generate
from modeling.open_model import DTYPES, open_model
from modeling.sampling import Sampling, seeded
from modeling.search import read_widths
from modeling.speculative import DRAFT_TOKENS, Speculation, speculate
from modeling.text import Text, TextStream


def _shown(rounds: Iterator[Speculation], prompt: list[int], text: Text) -> Iterator[Speculation]:
    """The rounds, of one sequence, its text printed as they come; they end where the text does."""
    stream, n_shown = TextStream(text), 0
    for spoken in rounds:
        new = spoken.ids[0][n_shown:]
        # The prompt is not shown before the first round: an error comes before any text.
        before = "" if n_shown else stream.push(prompt)
        n_shown += len(new)
        print(before + stream.push(text.until_end(new)), end="", flush=True)
        yield spoken
        if text.eos_id in new:
            break
    print(stream.rest())


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m modeling.generate", description="Text at any width, as it comes.")
    parser.add_argument("model", type=Path, help="a run, a checkpoint, or a model folder")
    parser.add_argument(
        "--width",
        action="append",
        help="1 (default: all that the model holds), 1/2, a head count as 16h, or one for each layer: 1,1/2,...; given again: another turn",
    )
    parser.add_argument("--prompt", action="append", required=True, help="given again: a batch, printed one by one")
    parser.add_argument("--tokenizer", default="", help="FILE.json, FILE.model or tiktoken:NAME; default: the model's")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="of each turn")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--speculate", metavar="WIDTH", help="this narrower width drafts, --width verifies")
    parser.add_argument("--draft-tokens", type=int, help=f"tokens that the draft is ahead; default: {DRAFT_TOKENS}")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16 on a GPU, fp32 elsewhere")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    try:
        if len(args.width or []) > 1 and (len(args.prompt) > 1 or args.speculate is not None):
            raise ValueError("several turns need one prompt and no --speculate")
        if args.draft_tokens is not None and args.speculate is None:
            raise ValueError(f"--draft-tokens {args.draft_tokens}: nothing drafts without --speculate WIDTH")
        if args.max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens {args.max_new_tokens}: must be at least 1")
        sampling = Sampling(temperature=args.temperature, top_p=args.top_p)
        opened = open_model(args.model, dtype=args.dtype, device=args.device)
        model = opened.model
        text = opened.text(args.tokenizer)
        turns = args.width or [model.own_width]
        widths = [read_widths(turn, model.cfg.n_heads, model.cfg.n_layers) for turn in turns]
        prompts = [text.prompt_ids(prompt) for prompt in args.prompt]
        check_prompts(prompts, model.cfg.vocab_size)
        for one in widths:
            model.check_widths(one)
        draft = None
        if args.speculate is not None:
            draft = read_widths(args.speculate, model.cfg.n_heads, model.cfg.n_layers)
        generator = seeded(args.seed, model.device)
        common = {"max_new_tokens": args.max_new_tokens, "sampling": sampling, "generator": generator}
        start = time.perf_counter()
        note, n_new = "", 0
        if draft is not None:
            ahead = DRAFT_TOKENS if args.draft_tokens is None else args.draft_tokens
            rounds = speculate(model, prompts, widths[0], draft, draft_tokens=ahead, **common)
            if len(prompts) == 1:
                rounds = _shown(rounds, prompts[0], text)
            *_, spoken = rounds
            if len(prompts) > 1:
                for prompt, ids in zip(prompts, spoken.ids, strict=True):
                    print(text.decode(prompt + text.until_end(ids)))
            note = f", {spoken.acceptance:.0%} of the draft's tokens accepted in {spoken.rounds} rounds"
            n_new = sum(len(ids) for ids in spoken.ids)
        elif len(prompts) > 1:
            columns = list(generate(model, prompts, widths[0], **common))
            for prompt, ids in zip(prompts, torch.stack(columns, dim=1).tolist(), strict=True):
                print(text.decode(prompt + text.until_end(ids)))
            n_new = len(columns) * len(prompts)
        else:
            conversation = Conversation(model, [])
            stream = TextStream(text)
            print(stream.push(prompts[0]), end="", flush=True)
            for i, one in enumerate(widths):
                for token in conversation.turn(prompts[0] if i == 0 else [], one, **common):
                    n_new += 1
                    if token == text.eos_id:
                        break
                    print(stream.push([token]), end="", flush=True)
            print(stream.rest())
    except (CheckpointError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    seconds = time.perf_counter() - start
    print(f"{n_new} tokens in {seconds:.2f} s, {n_new / seconds:.1f} tokens/s{note}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
