"""What frozen parts make is computed once, shared out among workers, and changes nothing of what is learnt."""

import io
import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from training.prepared_rows import read_prepared, write_prepared
from training.test_loop import weights

from facediffuser.errors import InputError
from facediffuser.storage import open_store
from facediffuser.tasks.latents import fill_latents_cache
from facediffuser.training import latent_cache
from facediffuser.training.data_loading import split_batches
from facediffuser.training.denoisers import load_parts
from facediffuser.training.loop import train_model
from facediffuser.training.records import split_digest

pytestmark = pytest.mark.usefixtures("local_driver")


def test_latents_and_text_embeddings_are_computed_once_and_kept_as_parquet(settings, tmp_path, monkeypatch):
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel

    cache = tmp_path / "cache"
    train_model(settings("tdm", steps=1, cache=str(cache)), lambda numbers: None)
    assert {path.parent.name.split("-")[0] for path in cache.rglob("*.parquet")} == {"moments", "captions"}

    def run(*args, **kwargs):
        raise AssertionError("a frozen part ran again")

    monkeypatch.setattr(AutoencoderKL, "encode", run)
    monkeypatch.setattr(CLIPTextModel, "forward", run)
    other = str(tmp_path / "other")
    train_model(settings("sdm", steps=1, cache=str(cache), output=other), lambda numbers: None)


def test_the_stage_fills_the_cache_of_every_split_and_training_computes_nothing_more(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(latent_cache, "PART_ROWS", 5)
    given = {"steps": 1, "validate_every": 1, "validation_images": 2}
    filled = settings("sdm", cache=str(tmp_path / "filled"), **given)
    fill_latents_cache.fn(filled)
    train_model(settings("sdm", cache=str(tmp_path / "trained"), output=str(tmp_path / "b"), **given), lambda n: None)
    parts, others = ({path.relative_to(root): path.read_bytes() for path in root.rglob("*.parquet")}
                     for root in (tmp_path / "filled", tmp_path / "trained"))  # fmt: skip
    assert len(parts) >= 5 and parts == others
    [first, *_] = sorted((tmp_path / "filled").rglob("*.parquet"))
    first.unlink()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "filled").rglob("*.parquet")}
    fill_latents_cache.fn(filled)
    assert first.exists() and {path: path.stat().st_mtime_ns for path in before} == before
    train_model(filled, lambda numbers: None)
    assert {path for path in (tmp_path / "filled").rglob("*.parquet")} == before.keys() | {first}


def test_without_the_cache_the_same_is_learnt(settings, tmp_path):
    """The cache rounds to float16; a first step of AdamW moves a weight by its gradient's sign, so most agree."""
    given = dict(steps=1, warmup_steps=0)
    train_model(settings("sdm", output=str(tmp_path / "a"), **given), lambda numbers: None)
    train_model(settings("sdm", output=str(tmp_path / "b"), precompute=False, **given), lambda numbers: None)
    ours, theirs = weights(tmp_path / "a"), weights(tmp_path / "b")
    close = torch.cat([torch.isclose(ours[name], theirs[name], atol=1e-5).flatten().float() for name in ours])
    assert close.mean() > 0.98


def test_a_batch_from_the_cache_has_the_latents_and_embeddings_of_one_without(settings):
    made = []
    for precompute in (True, False):
        chosen = settings("sdm", precompute=precompute)
        parts = load_parts(chosen)
        batch = split_batches(chosen, parts, "train")[4]
        made.append((parts.latents(batch), parts.text(batch)))
    for kept, anew in zip(*made, strict=True):
        torch.testing.assert_close(kept, anew, atol=5e-3, rtol=5e-3)


def _make(some: range) -> np.ndarray:
    return np.array([[row, row + 0.5] for row in some], np.float16)


def test_parts_that_are_there_are_kept_and_missing_ones_made(tmp_path, monkeypatch):
    monkeypatch.setattr(latent_cache, "PART_ROWS", 4)
    store, asked = open_store(tmp_path), []

    def make(some: range) -> np.ndarray:
        asked.append(some)
        return _make(some)

    latent_cache.write_missing_parts(store, "rows", 10, make)
    store.delete("rows/part-00001.parquet")
    latent_cache.write_missing_parts(store, "rows", 10, make)
    assert asked == [range(0, 4), range(4, 8), range(8, 10), range(4, 8)]
    assert np.array_equal(latent_cache.read_array(store, "rows", 10), _make(range(10)))


def test_a_large_array_is_copied_once_and_mapped(tmp_path, monkeypatch):
    monkeypatch.setattr(latent_cache, "PART_ROWS", 4)
    monkeypatch.setattr(latent_cache, "HELD_BYTES", 8)
    store = open_store(tmp_path / "store")
    latent_cache.write_missing_parts(store, "rows", 10, _make)
    found = latent_cache.read_array(store, "rows", 10, tmp_path / "local")
    assert isinstance(found, np.memmap) and np.array_equal(found, _make(range(10)))
    for part in range(1, 3):
        store.delete(f"rows/part-{part:05d}.parquet")
    assert np.array_equal(latent_cache.read_array(store, "rows", 10, tmp_path / "local"), _make(range(10)))
    with pytest.raises(ValueError, match="read-only"):
        found[0] = 0


def test_a_copy_that_was_cut_off_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(latent_cache, "HELD_BYTES", 8)
    store = open_store(tmp_path / "store")
    latent_cache.write_missing_parts(store, "rows", 3, _make)
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "rows-3.unfinished").write_bytes(b"half")
    assert np.array_equal(latent_cache.read_array(store, "rows", 3, tmp_path / "local"), _make(range(3)))


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_make_each_part_once_between_them(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(latent_cache, "PART_ROWS", 4)
    store, asked = open_store(tmp_path), []
    for worker in range(workers):
        latent_cache.write_missing_parts(
            store, "rows", 10, lambda some: asked.append(some.start) or _make(some), (worker, workers)
        )
    assert sorted(asked) == [0, 4, 8]
    assert np.array_equal(latent_cache.read_array(store, "rows", 10), _make(range(10)))


def test_pictures_prepared_anew_in_the_same_place_have_latents_of_their_own(settings, prepared, tmp_path):
    """Another size of the same source files: ids and digests of the sources are as they were."""
    data, parts = tmp_path / "data", load_parts(settings("tdm"))
    rows = read_prepared(prepared)

    def moments(cache: str) -> np.ndarray:
        chosen = settings("tdm", data=str(data), cache=str(tmp_path / cache))
        fill_latents_cache.fn(chosen)
        return split_batches(chosen, parts, "train").moments

    write_prepared(data, [row | {"image": {"bytes": _blurred(row["image"]["bytes"]), "path": "0.png"}} for row in rows])
    blurred = moments("cache")
    write_prepared(data, rows)
    again = moments("cache")
    assert np.array_equal(again, moments("another")) and not np.array_equal(again, blurred)


def test_the_digest_of_a_split_follows_from_its_files_whether_the_manifest_says_their_digests_or_not(
    prepared, tmp_path
):
    data = shutil.copytree(prepared, tmp_path / "data")
    store = open_store(data)
    train, test = (split_digest(store, split) for split in ("train", "test"))
    assert train != test
    files = json.loads((data / "manifest.json").read_text())["files"]
    bare = {key: {"bytes": entry["bytes"]} for key, entry in files.items()}
    (data / "manifest.json").write_text(json.dumps({"files": bare}))
    assert (train, test) == (split_digest(store, "train"), split_digest(store, "test"))


def _blurred(data: bytes) -> bytes:
    image, file = Image.open(io.BytesIO(data)), io.BytesIO()
    image.resize((image.width // 4, image.height // 4)).resize(image.size).save(file, format="PNG")
    return file.getvalue()


@pytest.mark.parametrize("name", ["rows/part-00000.parquet", "rows/part-00001.parquet"])
@pytest.mark.parametrize("damage", ["cut", "noise", "fewer rows", "other columns"])
def test_a_damaged_part_is_named_with_what_to_do(tmp_path, monkeypatch, name, damage):
    monkeypatch.setattr(latent_cache, "PART_ROWS", 4)
    latent_cache.write_missing_parts(open_store(tmp_path), "rows", 8, _make)
    path = tmp_path / name
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    elif damage == "noise":
        path.write_bytes(b"noise")
    else:
        table = pq.read_table(path)
        pq.write_table(table.slice(1) if damage == "fewer rows" else table.rename_columns(["other"]), path)
    with pytest.raises(InputError, match=f"{name}: .*remove it") as refused:
        latent_cache.read_array(open_store(tmp_path), "rows", 8)
    assert "\n" not in str(refused.value)


def test_a_damaged_local_copy_is_named_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(latent_cache, "HELD_BYTES", 8)
    latent_cache.write_missing_parts(open_store(tmp_path / "store"), "rows", 3, _make)
    copy = tmp_path / "local" / "rows-3.npy"
    for content in (b"", b"noise"):
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(content)
        with pytest.raises(InputError, match="rows-3.npy: .*remove it"):
            latent_cache.read_array(open_store(tmp_path / "store"), "rows", 3, tmp_path / "local")


def test_a_part_opens_in_any_parquet_reader(tmp_path):
    latent_cache.write_missing_parts(open_store(tmp_path), "rows", 3, _make)
    table = pq.read_table(tmp_path / "rows" / "part-00000.parquet")
    assert np.frombuffer(table["array"][2].as_py(), np.float16).tolist() == [2.0, 2.5]


def test_the_cache_lies_beside_the_data_or_in_the_output_where_that_cannot_be_written(settings, prepared, tmp_path):
    beside = settings("tdm", cache=None)
    assert latent_cache.open_cache(beside).url == f"{prepared}-latents"
    (tmp_path / "data-latents").write_text("a file where the folder would be")
    elsewhere = settings("tdm", cache=None, data=str(tmp_path / "data"))
    assert latent_cache.open_cache(elsewhere).url == f"{elsewhere.output}/cache"
