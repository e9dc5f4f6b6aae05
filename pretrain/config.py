"""What a run is: sections, what holds between them, and what follows from them. Loads without torch.

Derived numbers are properties, never stored, so that no two places can disagree. `pretrain.config_io` reads and writes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, Protocol

from modeling.config import VOCAB_MULTIPLE, BackboneConfig, LanguageConfig
from modeling.flops import training_flops_per_token
from modeling.nesting import LayerWidths, allowed_tp
from pretrain.config_sections import (
    CheckpointConfig,
    ConfigError,
    DataConfig,
    LoggingConfig,
    NestingConfig,
    OptimConfig,
    ParallelConfig,
    StabilityConfig,
    require,
)

FLOAT8_STEP = 16
"""Sizes of a float8 product are multiples of this many numbers (modeling.ops.float8, which loads torch)."""


class SampleData(Protocol):
    """What the trainer asks of any data section."""

    @property
    def path(self) -> str:
        """A folder or a remote URI that holds train/ and val/."""

    @property
    def cache_dir(self) -> str:
        """Local folder for shards of a remote `path`; empty where `path` is local."""

    @property
    def micro_batch(self) -> int:
        """Samples in one forward pass on one data-parallel rank."""

    @property
    def sequences_per_step(self) -> int:
        """Samples of an optimizer step over all ranks, each counted once however many widths see it."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A complete run: what all kinds of runs have in common. LanguageRunConfig is one, pretrain.vision_config has another."""

    task: str
    """What is trained, and with it what `model` and `data` hold: language or vision."""
    run_dir: str
    """Folder of everything the run writes: config, metrics, checkpoints."""
    model: BackboneConfig
    data: SampleData
    optim: OptimConfig
    nesting: NestingConfig = field(default_factory=NestingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    stability: StabilityConfig = field(default_factory=StabilityConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    precision: Literal["auto", "bf16", "fp8", "fp32"] = "auto"
    """Compute dtype; parameters, gradients and moments are float32 in any case. auto: bf16 on a GPU, else fp32. fp8: bf16, but
    training multiplies the mixers' projections in float8, each row scaled, but for the gradients of weights; validation is
    bf16's. For Hopper GPUs and later."""
    cuda_graphs: Literal["auto", "never"] = "auto"
    """auto: replay each width's forward and backward as a CUDA graph where that can be (pretrain.passes says why not).
    never: launch every kernel. (Not `off`: YAML reads that as false.)"""
    seed: int = 1337
    """Seeds initial weights, data order, augmentation, dropout, the sandwich draw and mixes; 0 to 2^32 - 1."""
    deterministic: bool = False
    """Ask torch for deterministic algorithms: two runs are bitwise equal, at some cost on a GPU."""

    def __post_init__(self) -> None:
        require(bool(self.run_dir), "run_dir is empty: name a folder for what the run writes")
        # Weights are drawn from generators whose 64 bits are the seed and a hash of the parameter's name.
        require(0 <= self.seed < 2**32, f"seed={self.seed}: must lie in 0 to {2**32 - 1}")
        n_widths = len(self.model.widths)
        weights = self.nesting.loss_weights
        require(
            not weights or len(weights) == n_widths,
            f"nesting.loss_weights has {len(weights)} values for {n_widths} widths: give one for each of model.widths",
        )
        if self.nesting.rule == "sandwich":
            require(n_widths >= 3, f"nesting.rule=sandwich needs 3 or more widths, model.widths={self.model.widths}")
        if self.nesting.distill_weight:
            require(n_widths >= 2, "nesting.distill_weight needs a narrower width to teach; model.widths has one")
        if self.nesting.mix_rate:
            require(n_widths >= 2, "nesting.mix_rate needs two widths to mix; model.widths has one")
        require(
            self.parallel.tensor in allowed_tp(self.model.widths),
            f"parallel.tensor={self.parallel.tensor} does not divide every width of {list(self.model.widths)} heads: "
            f"use one of {self.allowed_tensor} or drop a width",
        )
        require(
            not self.parallel.sequence or self.tokens_per_pass % self.parallel.tensor == 0,
            f"parallel.sequence: parallel.tensor={self.parallel.tensor} does not divide the {self.tokens_per_pass} tokens of "
            "a micro-batch: choose another data.micro_batch",
        )
        if self.float8:
            self._check_float8()

    def _check_float8(self) -> None:
        model, tp = self.model, self.parallel.tensor
        require(
            model.d_model % FLOAT8_STEP == 0,
            f"precision=fp8: model.d_model={model.d_model} is not a multiple of {FLOAT8_STEP}: use precision=bf16",
        )
        for width in model.widths:
            # All ranks run all heads of a gathered width.
            channels = (width if width <= self.gathered_heads else width // tp) * model.headdim
            require(
                channels % FLOAT8_STEP == 0,
                f"precision=fp8: {width} heads of {model.headdim} are {channels} channels on each of parallel.tensor={tp} ranks, "
                f"which is not a multiple of {FLOAT8_STEP}: use precision=bf16, a smaller parallel.tensor, or other widths",
            )

    @property
    def float8(self) -> bool:
        """Whether training multiplies the mixers' projections in float8."""
        return self.precision == "fp8"

    @property
    def allowed_tensor(self) -> list[int]:
        """Every parallel.tensor that the model can be split by."""
        return allowed_tp(self.model.widths)

    @property
    def tokens_per_sequence(self) -> int:
        """Tokens of one sample of the data: of a sequence of text, or of an image."""
        raise NotImplementedError

    @property
    def step_size(self) -> str:
        """The setting that says how many samples a step has, for messages."""
        raise NotImplementedError

    def training_flops(self, widths: LayerWidths) -> int:
        """Forward and backward FLOPs of a sample, of the submodel `widths`."""
        raise NotImplementedError

    @property
    def n_eval_sequences(self) -> int:
        """Validation samples over all ranks; 0: all of them."""
        raise NotImplementedError

    @property
    def tokens_per_pass(self) -> int:
        """Tokens of a micro-batch."""
        return self.data.micro_batch * self.tokens_per_sequence

    @property
    def gathered_heads(self) -> int:
        """Heads whose weights every tensor-parallel rank gathers (parallel.gathered_width); 0: none."""
        if self.why_none_gathered is not None:
            return 0
        return max(n_heads for n_heads in self.model.widths if n_heads <= self._most_gathered)

    @property
    def why_none_gathered(self) -> str | None:
        """Why the heads of every width are split over the tensor-parallel ranks, or None where they gather some widths'."""
        parallel, micro_batch = self.parallel, self.data.micro_batch
        if parallel.tensor == 1:
            return "parallel.tensor=1"
        if not parallel.sequence:
            return "parallel.sequence=false"
        if not parallel.keeps_gradients:
            return "ZeRO 2 takes gradients away in each backward"
        if micro_batch % parallel.tensor:
            return f"data.micro_batch={micro_batch} does not give {parallel.tensor} ranks whole sequences"
        if min(self.model.widths) > self._most_gathered:
            return f"parallel.gathered_width={parallel.gathered_width:g}"
        return None

    @property
    def _most_gathered(self) -> float:
        return self.parallel.gathered_width * self.model.n_heads

    @property
    def loss_weights(self) -> tuple[float, ...]:
        """Weight of each of model.widths in the loss."""
        n = len(self.model.widths)
        return self.nesting.loss_weights or (1.0 / n,) * n

    @property
    def draws_per_micro_batch(self) -> int:
        """Micro-batches that the widths of a step take from the data for each one they train on: 1 where they share it."""
        if self.nesting.draw == "shared":
            return 1
        return 3 if self.nesting.rule == "sandwich" else len(self.model.widths)

    @property
    def shares_embedding(self) -> bool:
        """Whether the widths of a micro-batch share its embedded tokens, made once for all (pretrain.shared_embedding)."""
        return False

    @property
    def samples_per_step(self) -> int:
        """Samples that a step takes from the data over all ranks, whichever widths see them."""
        return self.data.sequences_per_step * self.draws_per_micro_batch

    def checkpoint_bytes(self, n_parameters: int) -> int:
        """Bytes of a checkpoint: float32 master, two moments, and the moving average where one is kept."""
        return n_parameters * 4 * (4 if self.optim.ema_decay else 3)

    def data_parallel(self, world_size: int) -> int:
        """Data-parallel replicas of `world_size` ranks. Raises ConfigError where the layout does not fit."""
        tp = self.parallel.tensor
        require(world_size >= 1, f"{world_size} ranks: there must be at least one")
        require(
            world_size % tp == 0, f"{world_size} ranks are not a multiple of parallel.tensor={tp}: change one of them"
        )
        return world_size // tp

    def grad_accum_steps(self, world_size: int) -> int:
        """Micro-batches of a step on one rank. Raises ConfigError where they do not come out whole."""
        dp = self.data_parallel(world_size)
        sequences, micro = self.data.sequences_per_step, self.data.micro_batch
        share, left_over = divmod(sequences, dp)
        if left_over:
            way_out = f"{dp} replicas cannot share the step evenly: change it or the number of ranks"
        else:
            way_out = f"use data.micro_batch={max(n for n in range(1, micro + 1) if share % n == 0)}"
        require(
            sequences % (dp * micro) == 0,
            f"{self.step_size}: not a multiple of data-parallel size {dp} x data.micro_batch={micro}: {way_out}",
        )
        return sequences // (dp * micro)


@dataclass(frozen=True, kw_only=True)
class LanguageRunConfig(RunConfig):
    """A run that trains a language model on token shards."""

    task: Literal["language"] = "language"
    model: LanguageConfig
    data: DataConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        rows, tp = self.model.n_vocab_rows, self.parallel.tensor
        enough = math.lcm(tp, VOCAB_MULTIPLE)
        require(
            rows % tp == 0,
            f"parallel.tensor={tp} does not divide the embedding's {rows} rows (model.vocab_size={self.model.vocab_size}, "
            f"rounded up to a multiple of {VOCAB_MULTIPLE}): use one of {self.allowed_tensor}, or "
            f"model.vocab_size={-(-rows // enough) * enough}",
        )

    @property
    def allowed_tensor(self) -> list[int]:
        """See RunConfig: the embedding's rows are split as well."""
        return allowed_tp([*self.model.widths, self.model.n_vocab_rows])

    @property
    def tokens_per_sequence(self) -> int:
        """See RunConfig."""
        return self.data.seq_len

    @property
    def step_size(self) -> str:
        """See RunConfig."""
        tokens, length = self.data.tokens_per_step, self.data.seq_len
        return f"data.tokens_per_step={tokens} is {self.data.sequences_per_step} sequences of {length}"

    @property
    def shares_embedding(self) -> bool:
        """See RunConfig."""
        return self.parallel.keeps_gradients and self.draws_per_micro_batch == 1

    def training_flops(self, widths: LayerWidths) -> int:
        """See RunConfig."""
        return training_flops_per_token(self.model, widths) * self.data.seq_len

    @property
    def n_eval_sequences(self) -> int:
        """See RunConfig."""
        return self.logging.eval_sequences or 256


def language_run(cfg: RunConfig, what: str) -> LanguageRunConfig:
    """`cfg`, for `what` only language models have. Raises ConfigError where it is another kind of run."""
    if not isinstance(cfg, LanguageRunConfig):
        raise ConfigError(f"{what} is for language models alone, and this run has task={cfg.task}")
    return cfg
