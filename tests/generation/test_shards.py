"""Shards: each planned row once, the same bytes made again, failures as rows, and what every reader finds in them."""

import io
import json
import pickle
from dataclasses import replace

import datasets
import duckdb
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import torch
from base_install import command_in_base_install
from PIL import Image
from world import PROMPTS, save_prompts

from facediffuser.cards.dataset_card import write_card
from facediffuser.dataset.image_files import encode_image
from facediffuser.dataset.manifest import build_manifest, build_part, object_entries, shard_entry, write_manifest
from facediffuser.dataset.plan import read_shard_rows
from facediffuser.dataset.schema import DIGITAL_SOURCE_TYPE, PROVENANCE_KEY, dataset_schema
from facediffuser.dataset.shards import finished_shards
from facediffuser.dataset.verify import verify
from facediffuser.errors import InputError
from facediffuser.generation.job import prepare
from facediffuser.generation.shard_generator import ShardGenerator, error_line


class Stumbling:
    """A pipeline or scorers that fail as `stumble(rows)` says, and otherwise do what the real ones do."""

    def __init__(self, real, method, stumble):
        self.real, self.method, self.stumble, self.sizes = real, method, stumble, []

    def __getattr__(self, name):
        return getattr(self.real, name)

    def __call__(self, **given):
        self._check("__call__", len(given["prompt_embeds"]))
        return self.real(**given)

    def score(self, images, references, prompts):
        self._check("score", len(images))
        return self.real.score(images, references, prompts)

    def _check(self, method, rows):
        if method == self.method:
            self.sizes.append(rows)
            error = self.stumble(rows, len(self.sizes))
            if error:
                raise error


def data_bytes(store) -> dict[str, bytes]:
    return {info.key: store.get(info.key) for info in store.list("data/")}


def again(made, world, tmp_path, **replaced):
    """The run of `made` at another place, with a generator of its own."""
    prepared = prepare(world.settings(tmp_path / "again"))
    assert prepared.job.fingerprint == made[0].fingerprint
    prepared.write()
    parts = {"pipeline": made[1].pipeline, "scorers": made[1].scorers} | replaced
    return prepared.job, ShardGenerator(prepared.job, **parts)


def test_every_planned_row_is_there_once_and_scored(made):
    job, _ = made
    table = pq.read_table(job.output + "/data")
    planned = [row for shard in range(job.layout.shards) for row in read_shard_rows(job.store(), job.layout, shard)]
    assert table.schema.equals(dataset_schema(embedding_size=16))
    assert table["sample_id"].to_pylist() == [row["sample_id"] for row in planned]
    assert len(set(table["sample_id"].to_pylist())) == 12
    assert set(table["status"].to_pylist()) == {"ok"}
    for name in ("ip", "pc", "face_count", "subject_fraction", "image_sha256"):
        assert table[name].null_count == 0
    assert all(0 <= share <= 1 for share in table["subject_fraction"].to_pylist())


def test_a_shard_made_again_elsewhere_in_another_order_is_the_same_bytes(made, world, tmp_path):
    job, generator = again(made, world, tmp_path)
    for shard in (3, 1, 0, 2):
        generator(shard)
    assert data_bytes(job.store()) == data_bytes(made[0].store())


def test_a_finished_shard_is_found_and_not_made_again(made):
    job, generator = made
    before = job.store().list("data/")
    assert generator(0) == {"shard": 0, "rows": 3, "found": True}
    assert job.store().list("data/") == before


@pytest.mark.parametrize("method", ["__call__", "score"])
def test_a_batch_that_fails_once_is_made_again_whole_and_leaves_no_trace_in_the_bytes(made, world, tmp_path, method):
    part = "pipeline" if method == "__call__" else "scorers"
    real = getattr(made[1], part)
    stumble = Stumbling(real, method, lambda rows, call: RuntimeError("once") if call == 1 else None)
    job, generator = again(made, world, tmp_path, **{part: stumble})
    stats = generator(0)
    assert stumble.sizes == [2, 2, 1]
    assert (stats["ok"], stats["failed"], sum(stats["retries"].values())) == (3, 0, 1)
    assert job.store().get(job.layout.shard_key(0)) == made[0].store().get(job.layout.shard_key(0))


def test_out_of_memory_halves_the_batch(made, world, tmp_path):
    def short_of_memory(rows, call):
        return torch.OutOfMemoryError("out of memory") if rows > 1 else None

    pipeline = Stumbling(made[1].pipeline, "__call__", short_of_memory)
    job, generator = again(made, world, tmp_path, pipeline=pipeline)
    stats = generator(0)
    assert pipeline.sizes == [2, 1, 1, 1]
    assert (stats["failed"], stats["retries"]) == (0, {"out_of_memory": 1})


@pytest.mark.parametrize("method", ["__call__", "score"])
def test_a_row_that_always_fails_ends_as_a_row_with_its_error(made, world, tmp_path, method):
    # The first batch fails whole, twice, then its second row alone.
    stumble = Stumbling(
        made[1].pipeline if method == "__call__" else made[1].scorers, method,
        lambda rows, call: ValueError("bad row\nsecond line") if call in (1, 2, 4) else None,
    )  # fmt: skip
    job, generator = again(made, world, tmp_path, **{"pipeline" if method == "__call__" else "scorers": stumble})
    stats = generator(0)
    rows = pq.read_table(job.output + "/data").to_pylist()
    assert (stats["ok"], stats["failed"]) == (2, 1)
    assert [row["status"] for row in rows] == ["ok", "failed", "ok"]
    assert rows[1]["error"] == "ValueError: bad row"
    assert rows[1]["image"] is None and rows[1]["ip"] is None and rows[1]["seed"] is not None


class Spoiling(Stumbling):
    """A pipeline or scorers that put NaN into what they get or give of the second row of the first batch."""

    def __init__(self, real, method):
        super().__init__(real, method, lambda rows, call: None)

    def __call__(self, **given):
        embeds = given["prompt_embeds"].clone()
        if self.method == "__call__" and not self.sizes:
            embeds[1] = float("nan")
        return super().__call__(**given | {"prompt_embeds": embeds})

    def score(self, images, references, prompts):
        scores = super().score(images, references, prompts)
        spoilt = self.method == "score" and (len(self.sizes) in (1, 2) or len(self.sizes) == 4)
        return [*scores[:-1], replace(scores[-1], pc=float("nan"))] if spoilt else scores


@pytest.mark.parametrize(
    ("method", "error"),
    [
        ("__call__", "latents are not finite at step 0 of 3"),
        ("score", "the score pc is nan; check the scorer's weights"),
    ],
)
def test_a_row_whose_numbers_are_not_finite_fails_and_its_neighbours_do_not(made, world, tmp_path, method, error):
    part = "pipeline" if method == "__call__" else "scorers"
    job, generator = again(made, world, tmp_path, **{part: Spoiling(getattr(made[1], part), method)})
    stats = generator(0)
    assert (stats["ok"], stats["failed"]) == (2, 1)
    rows = pq.read_table(job.output + "/data").to_pylist()
    assert [row["error"] for row in rows] == [None, f"NotFiniteError: {error}", None]
    assert rows[1]["image"] is None and rows[1]["pc"] is None
    undisturbed = pq.read_table(made[0].output + "/data").to_pylist()
    assert [row["image_sha256"] for row in rows[::2]] == [row["image_sha256"] for row in undisturbed[:3:2]]


@pytest.mark.parametrize("error", [OSError("disk"), RuntimeError("CUDA error: misaligned address")])
def test_an_error_that_is_not_the_rows_ends_the_worker_and_writes_nothing(made, world, tmp_path, error):
    pipeline = Stumbling(made[1].pipeline, "__call__", lambda rows, call: error)
    job, generator = again(made, world, tmp_path, pipeline=pipeline)
    with pytest.raises(type(error)):
        generator(0)
    assert job.store().list("data/") == []


def test_errors_of_rows_do_not_show_credentials(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "marked-secret")
    assert "marked-secret" not in error_line(RuntimeError("sent marked-secret to the server"))


def test_datasets_decodes_the_images_by_itself(made, tmp_path):
    files = made[0].output + "/data/*.parquet"
    rows = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path))
    assert rows.num_rows == 12 and rows[0]["image"].size == (32, 32)
    assert rows[0]["subject_ids"] == ["ada"] and isinstance(rows[0]["seed"], int)


def test_pyarrow_and_duckdb_count_the_same_rows(made):
    output = made[0].output
    assert ds.dataset(output + "/data", format="parquet").count_rows() == 12
    assert duckdb.sql(f"select count(*) from '{output}/data/*.parquet' where status = 'ok'").fetchall() == [(12,)]


def test_images_are_stored_as_they_are_beside_compressed_columns(made):
    file = pq.ParquetFile(made[0].output + "/" + made[0].layout.shard_key(0))
    group = file.metadata.row_group(0)
    codecs = {group.column(n).path_in_schema: group.column(n).compression for n in range(group.num_columns)}
    assert codecs.pop("image.bytes") == "UNCOMPRESSED"
    assert set(codecs.values()) == {"ZSTD"}
    assert group.column(0).has_column_index and group.column(0).has_offset_index


def test_shards_and_images_say_that_they_are_synthetic(made):
    table = pq.read_table(made[0].output + "/data")
    assert json.loads(pq.read_schema(made[0].output + "/" + made[0].layout.shard_key(0)).metadata[PROVENANCE_KEY])[
        "synthetic"
    ]
    image = Image.open(io.BytesIO(table["image"][0].as_py()["bytes"]))
    assert DIGITAL_SOURCE_TYPE in image.info["XML:com.adobe.xmp"] and "synthetic" in image.info["Source"]


@pytest.mark.parametrize(("kind", "decoded"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_every_kind_of_file_carries_its_provenance(kind, decoded):
    data = encode_image(Image.new("RGB", (16, 16), "red"), kind, "ada~p0~<0>")
    assert DIGITAL_SOURCE_TYPE.encode() in data and b"ada~p0~&lt;0&gt;" in data
    assert Image.open(io.BytesIO(data)).format == decoded


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_a_file_made_without_provenance_says_nothing_of_it(kind):
    data = encode_image(Image.new("RGB", (16, 16), "red"), kind, "ada~p0~0", synthetic=False)
    assert DIGITAL_SOURCE_TYPE.encode() not in data and b"ynthetic" not in data


def test_a_job_travels_to_workers_without_secrets(made, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "marked-secret")
    data = pickle.dumps(made[0])
    assert len(data) < 20_000 and b"marked-secret" not in data
    assert pickle.loads(data).shard_schema.equals(made[0].shard_schema, check_metadata=True)


def test_a_negative_prompt_takes_the_place_of_the_null_text(made, world, tmp_path):
    prepared = prepare(world.settings(tmp_path / "negative", negative_prompt="a hat"))
    prepared.write()
    stored = read_shard_rows(prepared.job.store(), prepared.job.layout, 0)
    plain = made[1].rows(stored[:1])[0]
    generator = ShardGenerator(prepared.job, made[1].pipeline, made[1].scorers)
    without = generator.rows(stored[:1])[0]
    assert torch.equal(generator.conditions.embeddings(stored[:1])[2], made[1].pipeline.encode_prompt("a hat"))
    assert plain["image_sha256"] != without["image_sha256"]
    row, fused = stored[0], generator.conditions.embeddings(stored[:1])[1]
    images = made[1].pipeline(
        prompt_embeds=made[1].pipeline.encode_prompt(row["prompt"]), subject_prompt_embeds=fused,
        negative_prompt="a hat", num_inference_steps=row["num_inference_steps"], guidance_scale=row["guidance_scale"],
        fusion_start=row["fusion_start"], fusion_end=row["fusion_end"], generator=[torch.Generator().manual_seed(row["seed"])],
    ).images  # fmt: skip
    assert Image.open(io.BytesIO(without["image"]["bytes"])).tobytes() == images[0].tobytes()


def test_one_file_of_prompts_makes_images_of_one_and_of_two_scored_per_subject(world, tmp_path):
    rows = [{"prompt": "{subject_2} and {subject_1} in the park"}, {"prompt": "{subject} reading"}]
    prompts = save_prompts(tmp_path / "mixed.jsonl", rows)
    settings = world.settings(tmp_path / "out", prompts=str(prompts), images_per_prompt=1, batch_size=3)
    prepared = prepare(settings)
    prepared.write()
    ShardGenerator(prepared.job)(0)
    rows = pq.read_table(tmp_path / "out" / "data").to_pylist()
    assert [row["subject_ids"] for row in rows] == [["ada"], ["bob"], ["bob", "ada"]]
    assert rows[2]["prompt"] == "person <|image|> and woman <|image|> in the park"
    assert [len(row["ip_per_subject"]) for row in rows] == [1, 1, 2]
    assert {row["status"] for row in rows} == {"ok"}
    table = write_card(prepared.job.store())
    assert {(row.subjects, row.metric) for row in table} >= {(1, "ip"), (2, "ip")}
    assert prepare(settings).write() == 0


def test_a_shard_of_another_run_or_cut_short_is_not_taken_for_finished(made, world, tmp_path):
    job, generator = again(made, world, tmp_path)
    store, key = job.store(), job.layout.shard_key(0)
    assert generator(0)["failed"] == 0
    whole = store.get(key)
    assert set(finished_shards(store, job.layout, job.fingerprint)) == {0}
    assert finished_shards(store, job.layout, "another") == {}
    store.put(key, whole[: len(whole) // 2])
    assert finished_shards(store, job.layout, job.fingerprint) == {}
    assert generator(0)["ok"] == 3
    assert store.get(key) == whole


# --- verify -----------------------------------------------------------------------------------------------------------


def manifest_of(store, job, entries):
    """Return the manifest of a dataset with these shards."""
    part = build_part(job.fingerprint, job.run, job.layout, entries)
    return build_manifest([part], object_entries(store, [*job.layout.part_keys(), "subjects.parquet"]))


@pytest.fixture
def finished(made, tmp_path):
    """A copy of the finished dataset with its manifest."""
    job, source = made[0], made[0].store()
    from facediffuser.storage import open_store

    store = open_store(tmp_path / "copy")
    for info in source.list():
        store.put(info.key, source.get(info.key))
    infos = finished_shards(store, job.layout, job.fingerprint)
    entries = [shard_entry(store, job.layout, shard, infos[shard].info) for shard in sorted(infos)]
    write_manifest(
        store,
        manifest_of(store, job, entries),
    )
    return job, store


def test_a_finished_dataset_verifies(finished):
    assert verify(finished[1].url) == []


def test_the_base_install_verifies_and_cards_a_dataset(finished, tmp_path):
    url = finished[1].url
    verified = command_in_base_install("verify", url, folder=tmp_path)
    assert (verified.returncode, verified.stdout) == (0, f"{url}: every object is as the manifest says\n")
    carded = command_in_base_install("card", url, folder=tmp_path)
    assert carded.returncode == 0, carded.stderr
    assert {"README.md", "card/index.html"} <= {info.key for info in finished[1].list("")}


def test_the_manifest_is_the_same_when_stats_are_missing(finished):
    job, store = finished
    infos = finished_shards(store, job.layout, job.fingerprint)
    with_stats = [shard_entry(store, job.layout, shard, infos[shard].info) for shard in range(4)]
    for info in store.list("stats/"):
        store.delete(info.key)
    assert [shard_entry(store, job.layout, shard, infos[shard].info) for shard in range(4)] == with_stats


def test_verify_finds_what_is_missing_changed_swapped_or_foreign(finished):
    job, store = finished
    keys = [job.layout.shard_key(shard) for shard in range(4)]
    store.delete(keys[0])
    damaged = bytearray(store.get(keys[1]))
    damaged[len(damaged) // 2] ^= 1
    store.put(keys[1], bytes(damaged))
    store.put(keys[2], store.get(keys[3]))
    store.put("data/extra.parquet", b"x")
    problems = verify(store.url)
    for word in (f"{keys[0]}: missing", f"{keys[1]}: sha256", f"{keys[2]}: sha256", "data/extra.parquet"):
        assert any(problem.startswith(word) for problem in problems)
    assert len(problems) == 4


def test_verify_finds_rows_that_are_not_those_planned(finished):
    # The manifest itself was rewritten to match: only the plan can tell.
    job, store = finished
    store.put(job.layout.shard_key(0), store.get(job.layout.shard_key(1)))
    infos = finished_shards(store, job.layout, job.fingerprint)
    store.delete(job.layout.stats_key(0))
    entries = [shard_entry(store, job.layout, shard, infos[shard].info) for shard in range(4)]
    store.delete("manifest.json")
    write_manifest(
        store,
        manifest_of(store, job, entries),
    )
    assert verify(store.url) == [f"{job.layout.shard_key(0)}: its rows are not those planned"]


def test_verify_of_an_unfinished_dataset_is_reported(finished):
    finished[1].delete("manifest.json")
    with pytest.raises(InputError, match="no manifest.json"):
        verify(finished[1].url)


def test_prompts_are_as_the_file_says(made):
    table = pq.read_table(made[0].output + "/plan")
    assert set(table["prompt_id"].to_pylist()) == {"book", "p00001", "p00002"}
    assert {row["category"] for row in table.to_pylist()} == {row.get("category") for row in PROMPTS}
