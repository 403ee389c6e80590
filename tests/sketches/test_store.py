"""The store of sketches: whole shards or none, refusals by name, growth, and answers from it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from taught.errors import UserError
from taught.sketches.store import Row, SketchStore, digest

IDENTITY = {"model.weights": "abc", "sae.block": 3, "projection.dim": 8, "projection.seed": 0}
ROWS = [Row("b", "1"), Row("a", "2"), Row("a", "2", 7)]


def values(seed: int = 0, n: int = 3) -> np.ndarray:
    scale = np.array([1e-6, 1.0, 3e4])[:n, None]
    return (np.random.default_rng(seed).normal(size=(n, 8)) * scale).astype(np.float32)


@pytest.fixture
def store(tmp_path: Path) -> SketchStore:
    made = SketchStore(tmp_path / "store", IDENTITY)
    made.save("prompts", ROWS, values(), prompts=[("a", "2"), ("b", "1")], features=[7, 9])
    return made


def test_rows_come_back_by_id_whatever_their_scale(store: SketchStore) -> None:
    (shard,) = SketchStore(store.folder).shards("prompts")
    found = dict(zip(shard.rows, store.values(shard), strict=True))
    for row, wanted in zip(ROWS, values(), strict=True):
        np.testing.assert_allclose(found[row], wanted, atol=6e-4 * np.abs(wanted).max())
    assert shard.features == (7, 9) and shard.prompts == (("a", "2"), ("b", "1"))


def test_the_same_rows_make_the_same_files(store: SketchStore, tmp_path: Path) -> None:
    other = SketchStore(tmp_path / "other", IDENTITY)
    order = [2, 0, 1]
    other.save("prompts", [ROWS[i] for i in order], values()[order], prompts=[("a", "2"), ("b", "1")], features=[7, 9])
    names = [sorted(p.name for p in s.folder.iterdir()) for s in (store, other)]
    assert names[0] == names[1]
    for name in names[0]:
        assert (store.folder / name).read_bytes() == (other.folder / name).read_bytes()


def test_a_store_is_opened_by_the_values_that_it_was_made_with(tmp_path: Path) -> None:
    given = {**IDENTITY, "behavior": {"kind": "prefixes", "prefixes": ("I can't", "I cannot")}}
    SketchStore(tmp_path / "store", given).save("examples", ROWS[:1], values(n=1))
    again = SketchStore(tmp_path / "store", given)
    assert again.identity == SketchStore(tmp_path / "store").identity


def test_a_store_of_other_conditions_is_refused_with_what_differs(store: SketchStore) -> None:
    changed = {**IDENTITY, "model.weights": "xyz", "projection.seed": 1}
    with pytest.raises(UserError) as error:
        SketchStore(store.folder, changed)
    text = str(error.value)
    assert "model.weights: was 'abc', now 'xyz'" in text and "projection.seed" in text
    assert "sae.block" not in text


def test_a_damaged_shard_is_refused_by_name_and_can_be_made_anew(store: SketchStore) -> None:
    (shard,) = store.shards("prompts")
    content = shard.path.read_bytes()
    for damaged in (content[:-1], content[:-1] + bytes([content[-1] ^ 1]), b""):
        shard.path.write_bytes(damaged)
        with pytest.raises(UserError, match=shard.path.name):
            store.values(shard)
    assert store.drop_damaged() == [shard.path.stem]
    assert store.shards("prompts") == [] and store.drop_damaged() == []


def test_a_cut_list_of_rows_is_refused_by_name(store: SketchStore) -> None:
    (shard,) = store.shards("prompts")
    file = shard.path.with_suffix(".json")
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match=file.name):
        store.shards("prompts")
    assert store.drop_damaged() == [shard.path.stem]


def test_tensors_without_their_list_do_not_count(store: SketchStore) -> None:
    """A process that was killed between the two files leaves this."""
    (shard,) = store.shards("prompts")
    shard.path.with_suffix(".json").unlink()
    assert store.shards("prompts") == []


def test_a_full_disk_names_the_bytes_and_leaves_finished_shards(
    store: SketchStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(UserError, match="bytes needed"):
            store.save("examples", [Row("p", "1")], values(n=1), losses=[1.0])
    assert len(store.shards("prompts")) == 1 and store.shards("examples") == []
    assert not list(store.folder.glob(".*"))


def test_a_folder_that_is_no_store_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a store"):
        SketchStore(tmp_path)
    (tmp_path / "store.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        SketchStore(tmp_path, IDENTITY)


def test_a_newer_format_is_refused(store: SketchStore) -> None:
    file = store.folder / "store.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps({**record, "format": 99}))
    with pytest.raises(UserError, match="newer"):
        SketchStore(store.folder)


def test_a_store_can_be_moved(store: SketchStore, tmp_path: Path) -> None:
    moved = shutil.move(store.folder, tmp_path / "elsewhere")
    assert len(SketchStore(moved, IDENTITY).rows("prompts")) == 3


def test_other_tokens_are_another_row() -> None:
    assert digest([1, 2], 3) != digest([1, 2], 4) != digest([1, 2, 4])
