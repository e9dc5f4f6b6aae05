"""The sections of a run's config, one frozen dataclass each, checked where each field lives. Loads without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


class ConfigError(ValueError):
    """A configuration that cannot run; the message states the rule, the value, and the way out."""


def require(ok: bool, message: str) -> None:
    """Raise ConfigError with `message` unless `ok`."""
    if not ok:
        raise ConfigError(message)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which tokens, in which order, how many a step."""

    path: str
    """Token dataset made by data_prep/tokenize_fineweb.py: a folder or a remote URI that holds train/ and val/."""
    cache_dir: str = ""
    """Local folder for shards of a remote `path`; empty where `path` is local."""
    tokenizer: str = ""
    """Tokenizer file, or tiktoken:NAME; where given, the file's hash or the name must be the one in the dataset's manifest.
    Tools that make text of the run take it from here."""
    seq_len: int = 1024
    """Tokens in a training sequence; must divide the dataset's row_tokens."""
    tokens_per_step: int = 524_288
    """Tokens the optimizer sees in a step, over all ranks; counted once however many widths see them."""
    micro_batch: int = 1
    """Sequences in one forward pass on one data-parallel rank."""
    reset_at_documents: bool = False
    """Start each document from an empty state and convolution, so that nothing leaks from the one before."""
    n_workers: int = 2
    """Loader processes a rank; 0 loads in the training process."""

    def __post_init__(self) -> None:
        require(bool(self.path), "data.path is empty: name a folder made by data_prep/tokenize_fineweb.py")
        for name in ("seq_len", "tokens_per_step", "micro_batch"):
            require(getattr(self, name) >= 1, f"data.{name}={getattr(self, name)}: must be at least 1")
        require(self.n_workers >= 0, f"data.n_workers={self.n_workers}: must not be negative")
        require(
            self.tokens_per_step % self.seq_len == 0,
            f"data.tokens_per_step={self.tokens_per_step} is not a multiple of data.seq_len={self.seq_len}",
        )
        remote = "://" in self.path
        require(not remote or bool(self.cache_dir), f"data.path={self.path} is remote: set data.cache_dir")

    @property
    def sequences_per_step(self) -> int:
        """Sequences of an optimizer step over all ranks."""
        return self.tokens_per_step // self.seq_len


@dataclass(frozen=True, kw_only=True)
class NestingConfig:
    """Which widths train on what, and how their losses are added."""

    rule: Literal["all", "sandwich"] = "all"
    """all: every width at every step. sandwich: the widest, the narrowest, and one drawn between them."""
    draw: Literal["shared", "separate"] = "shared"
    """shared: all widths see the same tokens. separate: each draws its own, as the public reference does."""
    mix_rate: float = 0.0
    """Share of steps in which one width below the full one runs as a mix instead: each of its layers as wide as it is, or
    as the next wider width. For models whose per-layer mixes will be used; 0: uniform widths alone are trained."""
    loss_weights: tuple[float, ...] = ()
    """Weight of each of model.widths in the loss; empty means 1 / (number of widths) each."""
    distill_weight: float = 0.0
    """0: next-token loss alone. Else narrower widths add this times KL(full width || width) at `distill_temperature`."""
    distill_temperature: float = 1.0
    """Both distributions are softened by this before the KL, which is scaled by its square."""

    def __post_init__(self) -> None:
        require(all(w > 0 for w in self.loss_weights), f"nesting.loss_weights={self.loss_weights}: must be positive")
        require(0 <= self.mix_rate <= 1, f"nesting.mix_rate={self.mix_rate}: must lie in 0 to 1")
        require(self.distill_weight >= 0, f"nesting.distill_weight={self.distill_weight}: must not be negative")
        require(
            self.distill_temperature > 0, f"nesting.distill_temperature={self.distill_temperature}: must be positive"
        )
        require(
            self.distill_weight == 0 or self.draw == "shared",
            "nesting.distill_weight needs nesting.draw=shared: a teacher must see the tokens that its students see",
        )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its learning-rate curve."""

    lr: float
    """Peak learning rate."""
    steps: int
    """Optimizer steps of the whole run."""
    warmup_steps: int = 700
    """Steps of linear warm-up from 0."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """cosine: to min_lr_ratio over the run. wsd: constant, then linear over the last decay_steps."""
    decay_steps: int = 0
    """wsd only: steps of the final decay; 0 means a fifth of the run, or all that the warm-up leaves of it."""
    min_lr_ratio: float = 0.0
    """Learning rate at the end over the peak."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled decay of tensors of two or more dimensions."""
    clip_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0 turns it off."""
    ema_decay: float = 0.0
    """Keep an exponential moving average of the weights, beside the optimizer's state and sharded like it, and validate and
    export that: at update n the average moves 1 - min(this, (1 + n) / (10 + n)) of the way to the weights. 0: none is kept."""

    def __post_init__(self) -> None:
        require(self.lr > 0, f"optim.lr={self.lr}: must be positive")
        require(
            1 <= self.steps < 10**8,
            f"optim.steps={self.steps}: must be at least 1, and have at most the eight digits of a checkpoint's name",
        )
        require(
            0 <= self.warmup_steps < self.steps or self.warmup_steps == 0,
            f"optim.warmup_steps={self.warmup_steps}: must be below optim.steps={self.steps}",
        )
        require(0 <= self.min_lr_ratio <= 1, f"optim.min_lr_ratio={self.min_lr_ratio}: must lie in 0..1")
        require(all(0 <= b < 1 for b in self.betas), f"optim.betas={self.betas}: each must lie in [0, 1)")
        require(self.eps > 0, f"optim.eps={self.eps}: must be positive")
        require(self.weight_decay >= 0, f"optim.weight_decay={self.weight_decay}: must not be negative")
        require(self.clip_norm >= 0, f"optim.clip_norm={self.clip_norm}: must not be negative")
        require(0 <= self.ema_decay < 1, f"optim.ema_decay={self.ema_decay}: must lie in [0, 1)")
        require(
            0 <= self.decay_steps <= self.steps - self.warmup_steps,
            f"optim.decay_steps={self.decay_steps}: must fit in the steps after warm-up",
        )
        require(
            self.decay_steps == 0 or self.schedule == "wsd",
            f"optim.decay_steps={self.decay_steps}: set optim.schedule=wsd",
        )


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the run is laid over ranks; data parallelism takes what tensor parallelism leaves."""

    tensor: int = 1
    """Tensor-parallel ranks; must divide every trained width's head count and a language model's embedding rows."""
    sequence: bool = False
    """Between mixers, split the tokens over the tensor-parallel ranks instead of keeping all of them on each."""
    peer_copies: Literal["auto", "never"] = "auto"
    """How mixers send under sequence parallelism. auto: with copies from GPU to GPU where they are of one host, whose copy
    engines leave the multiprocessors to the products beside them; else, and with never: with collectives."""
    gathered_width: float = 0.5
    """Under sequence parallelism: each rank gathers the weights of the trained widths up to this share of the heads, once a
    step, and runs its own sequences through all of their heads; wider ones are split by heads. Their mixers then send
    nothing, and each of these weights takes 8 bytes more on every rank. Needs ZeRO 1 and a micro-batch of whole sequences
    for each rank; else, and with 0, all widths are split by heads."""
    zero_stage: int = 1
    """DeepSpeed ZeRO stage. 1 shards the optimizer's state over data-parallel ranks; 2 gradients too."""
    activation_checkpointing: Literal["none", "states", "selective", "block"] = "none"
    """none: keep every activation. states: all but the scan's states, a fifth of the memory for a fiftieth of the speed (where
    the fused kernels run; elsewhere nothing keeps them). selective: keep the projections, do convolution, scan and norm
    again in backward. block: keep each block's input alone and do all of it again."""
    check_replicas_every: int = 500
    """Steps between checks that ranks which must hold the same parameters do, bit for bit; 0: only before a save."""

    def __post_init__(self) -> None:
        require(self.tensor >= 1, f"parallel.tensor={self.tensor}: must be at least 1")
        require(
            0 <= self.gathered_width < 1,
            f"parallel.gathered_width={self.gathered_width}: must be at least 0 and below 1. The full width is split by heads: "
            "for whole models on each rank use data parallelism (parallel.tensor=1)",
        )
        every = self.check_replicas_every
        require(every >= 0, f"parallel.check_replicas_every={every}: must not be negative")
        require(
            self.zero_stage in (1, 2),
            f"parallel.zero_stage={self.zero_stage}: must be 1 or 2. Stage 0 has no sharded state to checkpoint; stage 3 "
            "takes parameters away after forward, and the loss still needs the embedding then",
        )

    @property
    def copies_between_peers(self) -> bool:
        """Whether mixers send with copies from GPU to GPU, where the machine can. Blocks that are done again in backward send
        before and after the mixer, with collectives."""
        asked = self.tensor > 1 and self.sequence and self.peer_copies == "auto"
        return asked and self.activation_checkpointing != "block"

    @property
    def keeps_gradients(self) -> bool:
        """Whether a rank's gradients stay whole, in one place, until the step's end; ZeRO 2 shards them before."""
        return self.zero_stage == 1


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is saved when, and what a start resumes from. Checkpoints live in run_dir/checkpoints."""

    every_steps: int = 1000
    """Steps between saves; the last step is always saved. 0 saves only there and on a signal."""
    keep_last: int = 2
    """Newest checkpoints kept."""
    keep_every_steps: int = 0
    """Checkpoints of steps that are a multiple of this are kept for good; 0: none are."""
    keep_best: bool = False
    """Also keep, for each width, the checkpoint of its lowest validation loss so far."""
    asynchronous: bool = True
    """Train on while a checkpoint is written, from a host copy of 12 bytes for each parameter this rank's ZeRO shard has."""
    stop_margin_s: float = 120.0
    """Save and stop this long before the job's time limit (SLURM_JOB_END_TIME), beside a step and a save; 0: never."""
    resume: str = "auto"
    """auto: the newest whole checkpoint of run_dir, if any. never: start anew. Else: a checkpoint folder, to begin at: once run_dir
    has checkpoints of a run that began there, the same command goes on from the newest of those."""
    init_from: str = ""
    """Where the run starts anew, weights come from here: a model folder (modeling.import_model), a run or a checkpoint of
    the same sizes, of which the moving average counts where it has one. The optimizer, the step and the data start at nothing. Empty: random weights."""

    def __post_init__(self) -> None:
        require(self.every_steps >= 0, f"checkpoint.every_steps={self.every_steps}: must not be negative")
        require(self.keep_last >= 1, f"checkpoint.keep_last={self.keep_last}: must be at least 1")
        require(
            self.keep_every_steps >= 0, f"checkpoint.keep_every_steps={self.keep_every_steps}: must not be negative"
        )
        every, keep = self.every_steps, self.keep_every_steps
        require(
            not keep or (every > 0 and keep % every == 0),
            f"checkpoint.keep_every_steps={keep}: must be a multiple of checkpoint.every_steps={every}",
        )
        resumes = self.resume not in ("auto", "never")
        require(
            not (self.init_from and resumes),
            f"checkpoint.init_from={self.init_from} with checkpoint.resume={self.resume}: weights can come from one of them",
        )
        require(self.stop_margin_s >= 0, f"checkpoint.stop_margin_s={self.stop_margin_s}: must not be negative")


@dataclass(frozen=True, kw_only=True)
class StabilityConfig:
    """What happens at a step that is not fit to train on: a loss or gradient that is not finite, or a loss spike.

    Such a step updates nothing and is counted. After `max_skips` of them in a row the run goes back to its newest
    checkpoint from before them and on with the data after them; it ends after `max_rollbacks` of those.
    """

    max_skips: int = 5
    """Bad steps in a row before the run goes back; 0: the first one ends the run."""
    max_rollbacks: int = 2
    """Times that the run goes back before it ends."""
    spike_factor: float = 0.0
    """A loss above this times the median of the last `spike_window` good ones is a spike; 0: spikes are trained on."""
    spike_window: int = 50
    """Good steps that a spike is measured against; until there are as many, nothing counts as one."""

    def __post_init__(self) -> None:
        for name in ("max_skips", "max_rollbacks"):
            require(getattr(self, name) >= 0, f"stability.{name}={getattr(self, name)}: must not be negative")
        require(
            self.spike_factor == 0 or self.spike_factor > 1,
            f"stability.spike_factor={self.spike_factor}: must be above 1, or 0 for none",
        )
        require(self.spike_window >= 1, f"stability.spike_window={self.spike_window}: must be at least 1")


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What is reported when."""

    every_steps: int = 10
    """Steps between log lines and records in metrics.jsonl."""
    eval_every_steps: int = 500
    """Steps between validations of every width; 0 validates only after the last step."""
    eval_sequences: int = 0
    """Validation samples over all ranks, the same ones every time; 0: 256 sequences of text, or every image."""
    wandb: Literal["online", "offline", "disabled"] = "disabled"
    """Where Weights & Biases records go; metrics.jsonl is always written."""
    wandb_project: str = "matmamba"
    """Project of the Weights & Biases run."""
    peak_tflops: float = 0.0
    """Dense bf16 peak of one device for MFU; 0 takes it from the table of known GPUs."""

    def __post_init__(self) -> None:
        require(self.every_steps >= 1, f"logging.every_steps={self.every_steps}: must be at least 1")
        require(self.eval_every_steps >= 0, f"logging.eval_every_steps={self.eval_every_steps}: must not be negative")
        require(self.eval_sequences >= 0, f"logging.eval_sequences={self.eval_sequences}: must not be negative")
        require(self.peak_tflops >= 0, f"logging.peak_tflops={self.peak_tflops}: must not be negative")
