"""Cut a submodel out of a trained run and fit its norms' weights to its widths on a little text; all else stays frozen.

    python -m pretrain.calibrate RUN --width 1,1/2,1/4,... -o DIR [--steps 100]

A mix that was never trained has each layer fed by others than it was trained with, so the scales that its norms learnt are
off. They are a thousandth of the parameters: a fit takes minutes, and cannot undo what the model knows. What is written is a
model folder of the cut-out submodel alone, the run's tokenizer beside it, with its loss on held-out sequences before and after;
the run is left as it was, and its other widths know nothing of the fit.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

from modeling.checkpoint_reader import CheckpointError, Reader
from modeling.convert import cut_mix
from modeling.language import LanguageModel
from modeling.loss import next_token_loss
from modeling.model_folder import EOS_ID, check_new, checked_eos_id, put_tokenizer, save_model, written_whole
from modeling.nesting import LayerWidths
from modeling.search import read_widths
from pretrain.checkpoint_model import data_at, find_checkpoint, load_language_model
from pretrain.config_sections import ConfigError, DataConfig
from pretrain.data import Batch, TokenLoader, validation_batches
from pretrain.dataset_check import check_dataset
from pretrain.distributed import Ranks, close_ranks, init_ranks
from pretrain.language_task import submodel_losses

FITTED = ("norm", "gated_norm", "final_norm")
"""Last parts of the names of what is fitted."""


def cut_out(model: LanguageModel, widths: LayerWidths) -> LanguageModel:
    """The submodel `widths` of a whole model as a model of its own. Raises ValueError where they do not fit."""
    state = {name: p.detach() for name, p in model.named_parameters()}
    part = LanguageModel(model.cfg, held=widths)
    part.load_state_dict(cut_mix(state, model.cfg, widths))
    return part


def fit(model: LanguageModel, loader: TokenLoader, device: torch.device, *, steps: int, lr: float) -> list[float]:
    """Train the norms' weights of a cut-out model for `steps` steps, at a rate that falls linearly to 0; the loss of each."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.rpartition(".")[2] in FITTED)
    fitted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(fitted, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    losses = []
    for _ in range(steps):
        batches = loader.next_step()
        total = 0.0
        for batch in batches:
            moved = batch.to(device)
            hidden_btd = model(moved.tokens_bt, model.held, seq_idx_bt=moved.seq_idx_bt)
            loss = next_token_loss(model, hidden_btd, moved.targets_bt)
            (loss.total / len(batches)).backward()
            total += float(loss.cross_entropy) / len(batches)
        torch.nn.utils.clip_grad_norm_(fitted, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(total)
    return losses


def calibrate(
    model: LanguageModel,
    data: DataConfig,
    ranks: Ranks,
    held_out: list[Batch],
    *,
    start_sequence: int,
    batch: int,
    steps: int,
    lr: float,
    seed: int,
) -> tuple[float, float]:
    """Fit a cut-out model in place on the training text from `start_sequence` on; held-out losses before and after."""
    loader = TokenLoader(
        data,
        split="train",
        vocab_size=model.cfg.vocab_size,
        seed=seed,
        dp_rank=0,
        dp_size=1,
        n_sequences_per_step=batch,
        start_sequence=start_sequence,
    )
    try:
        before = submodel_losses(model, held_out, [model.held], ranks)[0]
        fit(model, loader, ranks.device, steps=steps, lr=lr)
        return before, submodel_losses(model, held_out, [model.held], ranks)[0]
    finally:
        loader.close()


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code. One process."""
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.calibrate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="a checkpoint folder, or a run folder")
    parser.add_argument("--width", required=True, help="1/4, one for each layer, or @presets.json:NAME")
    parser.add_argument("--data", help="token shards; default: the run's, from where the run stopped reading them")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=16, help="sequences a step")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak; falls linearly to 0")
    parser.add_argument("--sequences", type=int, default=256, help="validation sequences for the losses")
    parser.add_argument("-o", "--output", type=Path, required=True, help="new folder")
    args = parser.parse_args(argv)
    ranks = None
    try:
        if min(args.steps, args.batch, args.sequences) < 1 or not 0 < args.lr < 1:
            raise ValueError(
                f"--steps {args.steps} --batch {args.batch} --sequences {args.sequences} --lr {args.lr:g}: out of range"
            )
        check_new(args.output)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        whole, cfg = load_language_model(args.checkpoint)
        widths = read_widths(args.width, cfg.model.n_heads, cfg.model.n_layers)
        data = replace(
            cfg.data,
            micro_batch=min(args.batch, cfg.data.micro_batch),
            tokens_per_step=args.batch * cfg.data.seq_len,
            n_workers=0,
        )
        if args.batch % data.micro_batch:
            raise ValueError(
                f"--batch {args.batch}: must be a multiple of the run's data.micro_batch={data.micro_batch}"
            )
        reader = Reader(find_checkpoint(args.checkpoint))
        start = reader.state.sequence
        eos_id = checked_eos_id(reader.manifest.get(EOS_ID), reader.folder / "manifest.json")
        if args.data is not None:
            data, start = data_at(data, args.data), 0
        check_dataset(data, cfg.model.vocab_size)
        ranks = init_ranks(1)
        if ranks.world_size > 1:
            raise ConfigError(f"{ranks.world_size} ranks: this fit is small, start one process")
        model = cut_out(whole, widths).to(ranks.device)
        held_out = validation_batches(
            data, vocab_size=cfg.model.vocab_size, dp_rank=0, dp_size=1, n_sequences=args.sequences
        )
        before, after = calibrate(
            model,
            data,
            ranks,
            held_out,
            start_sequence=start,
            batch=args.batch,
            steps=args.steps,
            lr=args.lr,
            seed=cfg.seed,
        )
        state = {name: p.detach().cpu() for name, p in model.named_parameters()}
        # Whole or not at all: what is left of a kill would be refused by the next try.
        with written_whole(args.output) as work:
            save_model(work, state, cfg.model, widths, eos_id=eos_id)
            if Path(data.tokenizer).is_file():
                put_tokenizer(work, Path(data.tokenizer))
    except (CheckpointError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        if ranks is not None:
            close_ranks()
    print(
        f"{args.output}: held-out loss {before:.4f} before, {after:.4f} after {args.steps} steps ({after - before:+.4f})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
