"""GPU memory of one rank, estimated from the config: what a layout needs, before anybody waits for a GPU. Pure integers.

The estimate is the peak of what torch's allocator hands out and CUDA graphs keep, with the fused Triton mixers in bfloat16 or
float8; the CUDA context, NCCL and fragmentation take one to three GiB more. tests/perf/layout.py measures it.

Letters: m tokens of a micro-batch, d model, i inner channels and h heads of the full width on this rank, n state, v rows of the
vocabulary on this rank. One width's activations are alive at a time, and the full width's are the largest.
"""

from __future__ import annotations

from dataclasses import dataclass

from modeling.config import BackboneConfig, LanguageConfig, VisionConfig
from modeling.flops import local_parameters, mixer_parameters
from modeling.loss import TOKENS_PER_PIECE
from modeling.nesting import local_heads
from pretrain.config import RunConfig

FLOAT, BF16, FLOAT8 = 4, 2, 1
SCAN_CHUNK = 64
"""Steps between the states that the scan keeps (modeling.ops.kernels.tiles)."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at the peak of a step, by what they are for."""

    parameters: int
    """float32, of this rank's tensor-parallel part."""
    gradients: int
    """float32, whole until ZeRO reduces them."""
    gathered: int
    """float32 weights and gradients of the widths whose heads every tensor-parallel rank has (modeling.gathered_widths), and
    room for what travels of them, on a stream of its own: nothing else takes that place."""
    optimizer: int
    """Two moments and where it is kept the moving average of this rank's ZeRO shard; under ZeRO 2 a master copy too."""
    activations: int
    """Kept from forward for backward."""
    transient: int
    """Alive for a moment at the peak: the loss's logits, a block's gradients, or under ZeRO 2 the update's flat gradients."""
    trays: int
    """What tensor-parallel peers write into, outside torch's allocator (modeling.symmetric_mail)."""

    @property
    def total(self) -> int:
        """The peak."""
        kept = self.parameters + self.gradients + self.gathered + self.optimizer
        return kept + self.activations + self.transient + self.trays


def estimate(cfg: RunConfig, world_size: int) -> Memory:
    """Memory of a rank of this run on `world_size` GPUs. Raises ConfigError where the layout does not fit the run."""
    dp, tp = cfg.data_parallel(world_size), cfg.parallel.tensor
    parameters = local_parameters(cfg.model, tp)
    shard = -(-parameters // dp)
    tokens = cfg.tokens_per_pass
    between = tokens // tp if cfg.parallel.sequence else tokens
    layer = _Layer.of(cfg.model, tp, tokens, between, FLOAT8 if cfg.float8 else BF16)
    all_of = layer.projections + layer.inside
    kept, again = {
        "none": (all_of, 0),
        "states": (all_of - layer.states, layer.states),
        "selective": (layer.projections, layer.inside),
        "block": (layer.inputs, all_of),
    }[cfg.parallel.activation_checkpointing]
    # The embedded tokens, and their gradient where widths share them.
    embedded = 2 if cfg.shares_embedding else 1
    activations = cfg.model.n_layers * kept + embedded * between * cfg.model.d_model * FLOAT
    weight_gradients = 0 if cfg.parallel.keeps_gradients else layer.weight_gradients
    in_backward = max(_ends_bytes(cfg, tp), layer.backward + again + weight_gradients)
    copies = 0 if cfg.parallel.keeps_gradients else 1
    return Memory(
        parameters=parameters * FLOAT,
        gradients=parameters * FLOAT,
        gathered=_gathered_bytes(cfg),
        optimizer=(2 + copies + bool(cfg.optim.ema_decay)) * shard * FLOAT,
        activations=activations,
        transient=max(in_backward, copies * shard * FLOAT - activations),
        # One for each of three kinds of letters and each rank, of that rank's tokens.
        trays=3 * tokens * cfg.model.d_model * BF16 if cfg.parallel.copies_between_peers else 0,
    )


@dataclass(frozen=True)
class _Layer:
    """Bytes of one block at the full width."""

    inputs: int
    """What enters it: the residual stream and the branch to add."""
    projections: int
    """Input and output of the input projection, and both projections' weights as backward multiplies by them."""
    inside: int
    """What lies between the projections."""
    states: int
    """The scan's part of that."""
    backward: int
    """Gradients of activations while it runs backward."""
    weight_gradients: int
    """Where they are not added in place."""

    @classmethod
    def of(cls, cfg: BackboneConfig, tp: int, tokens: int, between: int, weight_bytes: int) -> _Layer:
        heads = local_heads(cfg.n_heads, tp)
        inner, bc, d = heads * cfg.headdim, 2 * cfg.d_state, cfg.d_model
        projected = tokens * (2 * inner + bc + heads) * BF16
        mixed = tokens * (inner + bc) * BF16
        channels = tokens * inner * BF16
        states = tokens // SCAN_CHUNK * inner * cfg.d_state * BF16
        steps = 4 * tokens * heads * FLOAT
        weights = (2 * inner + bc + heads + inner) * d * weight_bytes
        inputs = between * d * (FLOAT + BF16)
        normed = tokens * d * BF16
        inside = mixed + 2 * channels + states
        return cls(
            inputs=inputs,
            projections=normed + projected + steps + weights,
            inside=inside,
            states=states,
            backward=projected + mixed + 2 * channels + states + 2 * between * d * FLOAT,
            weight_gradients=(2 * inner + bc + heads + inner) * d * FLOAT,
        )


def _gathered_bytes(cfg: RunConfig) -> int:
    model = cfg.model
    weights = model.n_layers * (mixer_parameters(model, cfg.gathered_heads) - mixer_parameters(model, 0))
    # The largest parameter of all layers, as it comes from the ranks or goes back, and this rank's part of it.
    largest = model.n_layers * cfg.gathered_heads * model.headdim * model.d_model
    return (2 * weights + largest + largest // cfg.parallel.tensor) * FLOAT


def _ends_bytes(cfg: RunConfig, tp: int) -> int:
    """What stands at the peak outside the blocks: a language model's loss, or a classifier's images and patches."""
    model = cfg.model
    if isinstance(model, LanguageConfig):
        return _loss_bytes(model, tp, cfg.tokens_per_pass)
    assert isinstance(model, VisionConfig)
    pixels = cfg.tokens_per_pass * 3 * model.patch_size**2
    # Images as they were drawn and mixed, and as patches; logits, softmax and targets; token embeddings before positions.
    images = pixels * (2 * FLOAT + 2 * BF16)
    return images + cfg.data.micro_batch * model.n_classes * 4 * FLOAT + cfg.tokens_per_pass * model.d_model * 2 * FLOAT


def _loss_bytes(cfg: LanguageConfig, tp: int, tokens: int) -> int:
    rows, d = cfg.n_vocab_rows // tp, cfg.d_model
    logits = min(tokens, TOKENS_PER_PIECE) * rows * BF16
    return logits + rows * d * (2 * FLOAT + 2 * BF16) + 2 * tokens * d * BF16
