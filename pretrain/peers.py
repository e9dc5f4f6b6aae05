"""What tensor-parallel ranks share out, whether they write into each other's memory, and the trays that they do it with."""

from __future__ import annotations

import logging
import socket
from dataclasses import replace

import torch.distributed as dist

from modeling.nesting import width_name
from modeling.peer_exchange import PeerExchange
from modeling.symmetric_mail import SymmetricMail
from pretrain.config import RunConfig
from pretrain.config_sections import ParallelConfig
from pretrain.distributed import Ranks

logger = logging.getLogger(__name__)


def with_peer_copies(ranks: Ranks, cfg: ParallelConfig) -> Ranks:
    """`ranks` with copies between the GPUs of each replica, where cfg asks for them and all ranks can; one logged line says
    which it is. Every rank must call."""
    if ranks.tp.size == 1 or not ranks.tp.sequence:
        return ranks  # nothing that copies could send
    why = _why_collectives(ranks, cfg)
    peers = None
    if why is None:
        try:
            peers = PeerExchange(SymmetricMail(ranks.tp.group))
        except RuntimeError as error:  # no way from GPU to GPU, or a container that forbids it
            why = str(error).partition("\n")[0]
        why = next(filter(None, ranks.gather_objects(why)), None)
    logger.info("tensor parallelism sends: %s", "copies between GPUs" if why is None else f"collectives ({why})")
    return ranks if why else replace(ranks, tp=replace(ranks.tp, peers=peers))


def shared_out(cfg: RunConfig) -> str:
    """What each tensor-parallel rank takes of a pass, for the log."""
    if cfg.why_none_gathered is not None:
        return f"heads, of every width ({cfg.why_none_gathered})"
    widest = width_name(cfg.gathered_heads, cfg.model.n_heads)
    return f"sequences, up to width {widest}, whose weights every rank gathers; heads, of wider ones"


def _why_collectives(ranks: Ranks, cfg: ParallelConfig) -> str | None:
    """Why no copies can be tried, the same on all ranks, or None."""
    if not cfg.copies_between_peers:
        return "peer_copies=never" if cfg.peer_copies == "never" else "activation_checkpointing=block"
    hosts = ranks.gather_objects(socket.gethostname())
    apart = len({hosts[rank] for rank in dist.get_process_group_ranks(ranks.tp.group)}) > 1
    if ranks.agree_any(ranks.device.type != "cuda"):
        return "no GPUs"
    return "a replica's ranks are on several hosts" if ranks.agree_any(apart) else None
