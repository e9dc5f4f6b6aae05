"""The loader: order, split over ranks, position, document borders, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.shard_schema import Manifest
from data_prep.shard_writer import ShardLayout, SplitState, SplitWriter, write_atomic, write_index
from pretrain.config_sections import ConfigError, DataConfig
from pretrain.data import TokenLoader, validation_batches
from pretrain.dataset_check import check_dataset
from pretrain.shard_store import SHM_DIR, DatasetError, RowStore, _release, _segments
from pretrain.stream import MicroBatches, RowOrder

VOCAB, EOS, ROW = 300, 0, 16
FROZEN_EPOCH_0 = [9, 3, 2, 11, 1, 5, 4, 7, 10, 0, 8, 6]


def write_dataset(folder: Path, *, n_train: int = 40 * ROW + 5, n_val: int = 9 * ROW, compression: str = "") -> Path:
    """A dataset whose train tokens are 1, 2, 3, ... modulo the vocabulary, an eos wherever that gives 0."""
    layout = ShardLayout(vocab_size=VOCAB, eos_id=EOS, row_tokens=ROW, shard_rows=8, compression=compression)
    counts = {"train": n_train, "val": n_val}
    for split, n in counts.items():
        writer = SplitWriter(folder / split, layout, SplitState(), np.empty(0, layout.dtype))
        writer.add((np.arange(1, n + 1) % VOCAB).astype(layout.dtype), n_documents=1)
        writer.finish()
        write_index(folder / split, writer.state.shards)
    manifest = Manifest(
        tokenizer_sha256="0" * 64,
        tokenizer_name="none",
        vocab_size=VOCAB,
        eos_id=EOS,
        row_tokens=ROW,
        n_tokens=counts,
        n_documents={"train": 1, "val": 1},
        extra={},
    )
    write_atomic(folder / "manifest.json", manifest.text().encode())
    return folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset"))


def config(path: Path, **changes: object) -> DataConfig:
    values = {"path": str(path), "seq_len": 8, "tokens_per_step": 96, "micro_batch": 2, "n_workers": 0} | changes
    return DataConfig(**values)  # type: ignore[arg-type]


def loader(cfg: DataConfig, *, dp_rank: int = 0, dp_size: int = 1, start: int = 0, per_step: int = 12) -> TokenLoader:
    return TokenLoader(
        cfg,
        split="train",
        vocab_size=VOCAB,
        seed=7,
        dp_rank=dp_rank,
        dp_size=dp_size,
        n_sequences_per_step=per_step,
        start_sequence=start,
    )


def take_steps(one: TokenLoader, n: int) -> None:
    for _ in range(n):
        one.next_step()


def step_tokens(one: TokenLoader) -> torch.Tensor:
    return torch.cat([batch.tokens_bt for batch in one.next_step()])


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.integers(1, 9), min_size=1, max_size=40),
    seed=st.integers(0, 2**31),
    epoch=st.integers(0, 5),
    window=st.integers(1, 8),
)
def test_every_epoch_is_a_permutation_of_the_rows(rows: list[int], seed: int, epoch: int, window: int) -> None:
    order = RowOrder(np.array(rows), seed, window)
    assert sorted(order.row(epoch, i) for i in range(order.n_rows)) == list(range(sum(rows)))


def test_the_order_is_frozen() -> None:
    """A change here reorders every run that is resumed: it needs a new seed rule, not a new expectation."""
    order = RowOrder(np.array([5, 3, 4]), seed=1)
    assert [order.row(0, i) for i in range(12)] == FROZEN_EPOCH_0
    assert [order.row(1, i) for i in range(12)] != FROZEN_EPOCH_0


def test_rows_of_a_window_come_from_its_shards_only() -> None:
    order = RowOrder(np.full(20, 10), seed=3, window_shards=4)
    for window in range(5):
        shards = {order.row(0, position) // 10 for position in range(window * 40, window * 40 + 40)}
        assert len(shards) == 4


@settings(max_examples=60, deadline=None)
@given(
    micro=st.integers(1, 3), accumulate=st.integers(1, 3), start=st.integers(0, 50), sizes=st.permutations([1, 2, 4])
)
def test_the_stream_is_the_same_for_every_data_parallel_size(
    micro: int, accumulate: int, start: int, sizes: list[int]
) -> None:
    """Stop after any step at one size and go on at another: the sequences of each step are the same."""
    per_step = 4 * micro * accumulate
    position = start
    for dp_size in sizes:
        seen: list[int] = []
        for dp_rank in range(dp_size):
            sampler = iter(
                MicroBatches(start=position, per_step=per_step, dp_rank=dp_rank, dp_size=dp_size, micro_batch=micro)
            )
            for _ in range(per_step // (dp_size * micro)):
                first, n = next(sampler)
                seen.extend(range(first, first + n))
        assert seen == list(range(position, position + per_step))
        position += per_step


def test_targets_follow_tokens_and_an_epoch_covers_every_token_once(dataset: Path) -> None:
    one = loader(config(dataset, micro_batch=1), per_step=1)
    firsts = []
    for _ in range(one.n_sequences_per_epoch):
        (batch,) = one.next_step()
        assert torch.equal(batch.tokens_bt[:, 1:], batch.targets_bt[:, :-1])
        assert batch.seq_idx_bt is None
        firsts.append(batch.tokens_bt[0, 0].item())
    assert one.n_sequences_per_epoch == 41 * ROW // 8
    expected = (1 + np.arange(one.n_sequences_per_epoch) * 8) % VOCAB
    expected[-1] = EOS  # the last row holds 5 ids (4 to predict from) and padding
    assert sorted(firsts) == sorted(expected.tolist())


@pytest.mark.parametrize("n_workers", [0, 1, 3])
def test_resume_is_exact_with_prefetch_across_sizes_and_epochs(dataset: Path, n_workers: int) -> None:
    whole = loader(config(dataset))
    steps = [step_tokens(whole) for _ in range(16)]  # 82 sequences an epoch, 12 a step: into the third epoch
    assert whole.state_dict() == {"sequence": 192}
    first = loader(config(dataset, n_workers=n_workers))
    for k in range(9):
        assert torch.equal(step_tokens(first), steps[k])
    state = first.state_dict()
    first.close()
    assert state == {"sequence": 108}
    ranks = [loader(config(dataset, n_workers=min(1, n_workers)), dp_rank=r, dp_size=2) for r in range(2)]
    for rank in ranks:
        rank.load_state_dict(state)
    for k in range(9, 16):
        assert torch.equal(torch.cat([step_tokens(rank) for rank in ranks]), steps[k])
    for rank in ranks:
        rank.close()


def test_documents_are_numbered_after_each_eos(dataset: Path) -> None:
    one = loader(config(dataset, reset_at_documents=True, micro_batch=82), per_step=82)
    (batch,) = one.next_step()
    assert batch.seq_idx_bt is not None
    assert batch.seq_idx_bt.dtype == torch.int32
    for tokens, numbers in zip(batch.tokens_bt.tolist(), batch.seq_idx_bt.tolist(), strict=True):
        document, expected = 0, []
        for token in tokens:
            expected.append(document)
            document += token == EOS
        assert numbers == expected


def test_validation_is_fixed_and_shared_out_once(dataset: Path) -> None:
    cfg = config(dataset)
    alone = torch.cat(
        [b.tokens_bt for b in validation_batches(cfg, vocab_size=VOCAB, dp_rank=0, dp_size=1, n_sequences=8)]
    )
    shared = [
        torch.cat([b.tokens_bt for b in validation_batches(cfg, vocab_size=VOCAB, dp_rank=r, dp_size=4, n_sequences=8)])
        for r in range(4)
    ]
    assert alone.shape == (8, 8)
    assert torch.equal(torch.cat(shared), alone)
    with pytest.raises(ConfigError, match="the val split holds 18"):
        validation_batches(cfg, vocab_size=VOCAB, dp_rank=0, dp_size=32, n_sequences=999)


def test_compressed_and_remote_shards_give_the_same_batches(dataset: Path, tmp_path: Path) -> None:
    expected = step_tokens(loader(config(dataset)))
    packed = write_dataset(tmp_path / "packed", compression="zstd:3")
    check_dataset(config(packed, cache_dir=str(tmp_path / "cache")), VOCAB)
    cached = loader(config(packed, cache_dir=str(tmp_path / "cache")))
    assert torch.equal(step_tokens(cached), expected)
    assert not list((tmp_path / "cache").glob(".fetched*"))
    other = write_dataset(tmp_path / "other", n_train=999)
    with pytest.raises(ConfigError, match="another dataset"):
        check_dataset(config(other, cache_dir=str(tmp_path / "cache")), VOCAB)


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    path = write_dataset(tmp_path)
    shard = path / "train" / "shard.00002.mds"
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(bytes(data))
    check_dataset(config(path), VOCAB)  # sizes alone do not show it
    for n_workers in (0, 2):
        one = loader(config(path, n_workers=n_workers))
        with pytest.raises(DatasetError, match=r"shard.00002.mds.*checksum"):
            take_steps(one, 8)
        one.close()
    shard.write_bytes(bytes(data[:-40]))
    with pytest.raises(DatasetError, match=r"shard.00002.mds has \d+ bytes"):
        check_dataset(config(path), VOCAB)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"shard.00002.mds is missing"):
        check_dataset(config(path), VOCAB)


@pytest.mark.parametrize("fetched", [False, True])
def test_only_a_fetched_copy_of_a_damaged_shard_is_to_be_deleted(fetched: bool, tmp_path: Path) -> None:
    """Where data.path is read in place, the damaged file is the only one there is."""
    path = write_dataset(tmp_path / "made")
    cache = tmp_path / "cache"
    one = loader(config(path, cache_dir=str(cache) if fetched else "", n_workers=0))
    shard = path / "train" / "shard.00002.mds"
    shard.write_bytes(shard.read_bytes()[:-3] + bytes(3))
    with pytest.raises(DatasetError, match=r"Delete it" if fetched else r"damaged\. Put back a whole copy") as error:
        take_steps(one, 8)
    assert ("Delete it" in str(error.value)) == fetched
    one.close()


def test_a_token_beyond_the_vocabulary_is_named(dataset: Path) -> None:
    one = TokenLoader(
        config(dataset), split="train", vocab_size=200, seed=7, dp_rank=0, dp_size=1, n_sequences_per_step=82
    )
    with pytest.raises(DatasetError, match=r"shard\.\d+\.mds, row \d+: token id 2\d\d is not below .*vocab_size=200"):
        one.next_step()


def test_check_dataset_refuses_what_cannot_train(dataset: Path, tmp_path: Path) -> None:
    assert check_dataset(config(dataset), VOCAB).row_tokens == ROW
    with pytest.raises(ConfigError, match=r"model.vocab_size=299"):
        check_dataset(config(dataset), VOCAB - 1)
    with pytest.raises(ConfigError, match="seq_len=6 does not divide"):
        check_dataset(config(dataset, seq_len=6), VOCAB)
    with pytest.raises(ConfigError, match="seq_len=32 does not divide"):
        check_dataset(config(dataset, seq_len=32), VOCAB)
    with pytest.raises(ConfigError, match="holds 82 sequences of 8 tokens, a step needs 1000"):
        check_dataset(config(dataset, tokens_per_step=8000), VOCAB)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="was tokenized with none"):
        check_dataset(config(dataset, tokenizer=str(tmp_path / "tokenizer.json")), VOCAB)
    with pytest.raises(FileNotFoundError, match="not a token dataset"):
        check_dataset(config(tmp_path), VOCAB)
    write_dataset(tmp_path / "d")
    (tmp_path / "d" / "val" / "index.json").write_text('{"version": 2, "shards": []}')
    with pytest.raises(ConfigError, match=r"split val is empty, .* larger --val-fraction, into a new --output"):
        check_dataset(config(tmp_path / "d"), VOCAB)
    (tmp_path / "d" / "train" / "index.json").write_text("{")
    with pytest.raises(DatasetError, match="not an MDS index"):
        check_dataset(config(tmp_path / "d"), VOCAB)
    manifest = json.loads((dataset / "manifest.json").read_text())
    (tmp_path / "d" / "manifest.json").write_text(json.dumps(manifest | {"schema_version": 99}))
    with pytest.raises(ValueError, match="schema version 99"):
        check_dataset(config(tmp_path / "d"), VOCAB)


def test_a_step_that_does_not_divide_is_refused(dataset: Path) -> None:
    with pytest.raises(ConfigError, match="12 sequences a step"):
        loader(config(dataset), dp_size=4)


def test_batches_move_whole(dataset: Path) -> None:
    (batch, *_) = loader(config(dataset, reset_at_documents=True)).next_step()
    moved = batch.to("meta")
    assert {f.name: getattr(moved, f.name).device.type for f in dataclasses.fields(moved)} == dict.fromkeys(
        ("tokens_bt", "targets_bt", "seq_idx_bt"), "meta"
    )


def test_shared_memory_goes_with_its_store(dataset: Path) -> None:
    """Else each new store would attach to all before it: sixty in one process had 20,000 files open."""
    store = RowStore(str(dataset), "train")
    segments = [segment.shm.name for segment in _segments(store._dataset)]
    assert len(segments) == 6
    assert all((SHM_DIR / name).exists() for name in segments)
    _release(_segments(store._dataset), os.getpid() + 1)  # as in a loader process, which leaves it alone
    assert store.sample(0)["tokens"].shape == (ROW + 1,)
    del store
    assert not any((SHM_DIR / name).exists() for name in segments)
