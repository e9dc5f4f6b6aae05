"""`python -m pretrain CONFIG [section.field=value ...]`: train; with --dry-run, say what would run.

With --plan, rank the layouts for a cluster. `python -m pretrain status FOLDER` says where the runs in a folder stand.
"""

from __future__ import annotations

import argparse
import os
import sys

from pretrain.config import language_run
from pretrain.config_io import load_config
from pretrain.config_sections import ConfigError


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, do what it asks, return the exit code: 0 done, 75 please start again, 1 broken, 2 misused."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["status"]:
        from pretrain.status import main as status

        return status(argv[1:])
    parser = argparse.ArgumentParser(
        prog="python -m pretrain",
        description="Pretrain a nested MatMamba2 model.",
        epilog="python -m pretrain status FOLDER says where the runs in a folder stand.",
    )
    parser.add_argument("config", nargs="?", help="YAML file of the run, e.g. configs/lm_130m.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="e.g. optim.lr=3e-4")
    parser.add_argument("--dry-run", action="store_true", help="print sizes, FLOPs, bytes and steps; train nothing")
    parser.add_argument("--world-size", type=int, default=1, help="ranks that --dry-run assumes")
    parser.add_argument(
        "--plan", action="store_true", help="rank the layouts that fit so many GPUs by estimated step time"
    )
    parser.add_argument("--nodes", type=int, default=1, help="nodes that --plan assumes")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="GPUs of each of them")
    parser.add_argument("--gpu", default="H200", help="their kind: H200, H100, A100, B200")
    parser.add_argument("--nvlink-gb-s", type=float, help="GB/s one way, a GPU, inside a node (default: as measured)")
    parser.add_argument("--network-gb-s", type=float, default=45.0, help="GB/s one way, a GPU, between nodes")
    parser.add_argument("--doctor", action="store_true", help="print versions and devices, and what is missing")
    args = parser.parse_intermixed_args(argv)  # overrides may follow options
    if args.doctor:
        from pretrain.doctor import main as doctor

        return doctor()
    if args.config is None:
        parser.error("name a config file, e.g. configs/lm_130m.yaml")
    try:
        cfg = load_config(args.config, args.overrides)
        if args.plan:
            from pretrain.plan import NVLINK_GB_S, Cluster, print_plan

            cluster = Cluster(
                nodes=args.nodes,
                gpus_per_node=args.gpus_per_node,
                gpu=args.gpu,
                nvlink_gb_s=NVLINK_GB_S if args.nvlink_gb_s is None else args.nvlink_gb_s,
                network_gb_s=args.network_gb_s,
            )
            print_plan(language_run(cfg, "--plan, whose rates were measured on them,"), cluster)
            return 0
        if args.dry_run:
            from pretrain.dry_run import print_dry_run

            print_dry_run(cfg, args.world_size)
            return 0
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    # What is heavy to import comes after what can fail quickly: a mistyped key is reported at once.
    from modeling.checkpoint_reader import CheckpointError
    from pretrain.distributed import RankError
    from pretrain.shard_store import DatasetError
    from pretrain.stability import NonFiniteError
    from pretrain.train import main as train

    try:
        return train(cfg)
    except (ConfigError, CheckpointError, DatasetError, NonFiniteError, RankError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        misused = isinstance(error, ConfigError) or (isinstance(error, RankError) and error.misused)
        # Other ranks may wait in a collective for this one; leaving without clean-up lets the launcher end them.
        os._exit(2 if misused else 1)


if __name__ == "__main__":
    sys.exit(main())
