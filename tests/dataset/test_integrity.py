"""Verify names every change of a dataset; what is added is listed, also after a crash between two writes."""

import io
import json
import random
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dataset.finished import finish_dataset

from facediffuser.cards.dataset_card import rewrite_card
from facediffuser.dataset.added_columns import write_added_columns
from facediffuser.dataset.manifest import EARLIER_FIELDS, read_manifest, read_sound_manifest
from facediffuser.dataset.verify import inspect, verify
from facediffuser.errors import InputError
from facediffuser.evaluation.evaluate_check import check_copies, check_score
from facediffuser.evaluation.score_settings import CopySettings, ScoreSettings
from facediffuser.flows.cli import main
from facediffuser.storage import open_store
from facediffuser.storage.local import LocalStore

pytestmark = pytest.mark.usefixtures("plain_plots")

MANIFEST = "manifest.json"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return finish_dataset(tmp_path_factory.mktemp("finished") / "dataset")


@pytest.fixture
def store(original, tmp_path):
    shutil.copytree(original.root, tmp_path / "dataset")
    return open_store(tmp_path / "dataset")


def contents(store) -> dict[str, bytes]:
    return {info.key: store.get(info.key) for info in store.list()}


def add_scores(store, value: float = 1.0) -> str:
    ids = [name for info in store.list("plan/") for name in ("ada~p0~0", "ada~p1~0", "bob~p0~0", "bob~p1~0")]
    return write_added_columns(store, "sharpness", pa.table({"sample_id": ids, "sharpness": [value] * len(ids)}), {})


def as_earlier_version(store) -> dict:
    """Take from the manifest what earlier versions did not write; return its document."""
    document = json.loads(store.get(MANIFEST))
    document = {name: value for name, value in document.items() if name in EARLIER_FIELDS}
    for shard in document["shards"]:
        del shard["computed_with"]
    document["objects"] = [
        entry for entry in document["objects"] if entry["key"].startswith(("plan/", "subjects.parquet"))
    ]
    put(store, document)
    return document


def put(store, document) -> None:
    store.put(MANIFEST, (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())


def named(url) -> list[str]:
    """What verify finds, or the one line with which the manifest is refused."""
    try:
        return verify(url)
    except InputError as error:
        return [str(error)]


def leaves(value, path=()):
    """Yield (path, value) of everything in a JSON document, containers too."""
    yield path, value
    for name, one in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from leaves(one, (*path, name))


def changed(document, path, value):
    copy = json.loads(json.dumps(document))
    place = copy
    for name in path[:-1]:
        place = place[name]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return copy


def other(value):
    if isinstance(value, str):
        return value[:-1] + ("x" if not value.endswith("x") else "y")
    if isinstance(value, int | float):
        return value + 1
    return {} if isinstance(value, list) else []


def test_every_object_is_listed_or_named_as_unlisted(store):
    add_scores(store)
    rewrite_card(store, ["scores/sharpness.parquet"])
    manifest = read_sound_manifest(store)
    listed = {entry.key for entry in (*manifest.objects, *manifest.shards)} | {MANIFEST}
    assert {key for key in contents(store) if key not in listed} == {"stats/shard-00000.json", "stats/shard-00001.json"}
    assert manifest.unlisted == ["stats/"] and {"README.md", "card/index.html", "scores/sharpness.parquet"} <= listed
    found = inspect(store.url)
    assert (found.problems, found.notes) == ([], [])


def test_every_field_of_the_manifest_changed_or_left_out_is_noticed(store):
    document = json.loads(store.get(MANIFEST))
    tried = 0
    for path, value in leaves(document):
        for instead in (other(value), None) if path else ():
            put(store, changed(document, path, instead))
            assert named(store.url), (path, instead)
            tried += 1
    assert tried > 140


def test_every_bit_of_the_manifest_that_is_flipped_is_noticed(store):
    data = store.get(MANIFEST)
    at = random.Random(0)
    for place in at.sample(range(len(data)), 200):
        flipped = bytearray(data)
        flipped[place] ^= 1 << at.randrange(8)
        store.put(MANIFEST, bytes(flipped))
        with pytest.raises(InputError):
            read_sound_manifest(store)
    for other_bytes in (data + b"\n", data.replace(b"\n", b""), data[:-1], b"", b"[]", b"null", b"\xff"):
        store.put(MANIFEST, other_bytes)
        with pytest.raises(InputError):
            read_sound_manifest(store)


def test_every_object_flipped_cut_emptied_or_missing_is_noticed(store):
    add_scores(store)
    rewrite_card(store, ["scores/sharpness.parquet"])
    whole = contents(store)
    for key, data in whole.items():
        if key.startswith("stats/") or key == MANIFEST:
            continue
        flips = [bytearray(data) for _ in range(3)]
        for flipped, place in zip(flips, (0, len(data) // 2, len(data) - 1), strict=True):
            flipped[place] ^= 1
        for bad in (*map(bytes, flips), data[:-1], data + b"\0", b""):
            store.put(key, bad)
            assert any(line.startswith(f"{key}: sha256 differs") for line in verify(store.url)), key
        store.delete(key)
        assert f"{key}: missing" in verify(store.url)
        store.put(key, data)
    assert verify(store.url) == []


@pytest.mark.parametrize("key", ["scores/else.parquet", "card/else.png", "plan/else.parquet", "notes.txt", "data"])
def test_an_object_that_is_not_listed_is_named(store, key):
    if key == "data":
        shutil.rmtree(store.root / "data")
    store.put(key, b"x")
    assert any(line.startswith(f"{key}: not listed in the manifest") for line in verify(store.url))
    assert any("missing" in line or "cannot be read" in line for line in verify(store.url)) == (key == "data")


def test_hidden_files_of_other_programs_are_no_problem(store):
    for key in (".gitattributes", ".cache/huggingface/x.lock", "card/.DS_Store"):
        store.put(key, b"x")
    assert verify(store.url) == []


def test_stats_that_say_other_than_the_manifest_are_named_and_timings_are_not_compared(store):
    stats = json.loads(store.get("stats/shard-00001.json"))
    store.put("stats/shard-00001.json", json.dumps(stats | {"seconds": {"total": 9}}).encode())
    assert verify(store.url) == []
    for bad in (b"[]", b"{", json.dumps(stats | {"ok": 1}).encode(), json.dumps(stats | {"sha256": "0"}).encode()):
        store.put("stats/shard-00001.json", bad)
        assert [line.split(":")[0] for line in verify(store.url)] == ["stats/shard-00001.json"]
    store.delete("stats/shard-00001.json")
    assert verify(store.url) == []


# --- earlier versions -------------------------------------------------------------------------------------------------


def test_a_manifest_of_an_earlier_version_verifies_with_a_note_and_the_card_command_seals_it(store, capsys):
    as_earlier_version(store)
    assert main(["verify", store.url, "--quiet"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and "of an earlier version" in said[0] and said[1].endswith("as the manifest says")
    rewrite_card(store)
    assert inspect(store.url).notes == []
    store.put("README.md", b"other")
    assert [line.split(":")[0] for line in verify(store.url)] == ["README.md"]


def test_changes_of_an_earlier_manifest_are_noticed_wherever_something_else_says_the_same(store):
    document = as_earlier_version(store)
    for path, value in leaves(document):
        if path and path[0] != "made_from" and path[-1] != "objects":
            put(store, changed(document, path, other(value)))
            assert named(store.url), path
    for path in [(name,) for name in document if name not in ("made_from", "objects", "schema_version")]:
        put(store, changed(document, path, None))
        assert named(store.url), path


# --- what is added, and a crash in between ----------------------------------------------------------------------------


class Crash(BaseException):
    """A process that ends at once."""


def test_a_crash_between_any_two_writes_leaves_what_verify_names_and_card_repairs(original, tmp_path, monkeypatch):
    reference = open_store(tmp_path / "undisturbed" / "dataset")
    shutil.copytree(original.root, reference.root)
    rewrite_card(reference, [add_scores(reference)])
    undisturbed = contents(reference)
    real, crashed = LocalStore.put, 0
    for limit in (0, 1, 3, 6, 9):
        store = open_store(tmp_path / str(limit) / "dataset")
        shutil.copytree(original.root, store.root)
        left = [limit]

        def put_until(self, key, data, if_absent=False, left=left):
            if not left[0]:
                raise Crash
            left[0] -= 1
            real(self, key, data, if_absent)

        monkeypatch.setattr(LocalStore, "put", put_until)
        try:
            rewrite_card(store, [add_scores(store)])
        except Crash:
            crashed += 1
        monkeypatch.setattr(LocalStore, "put", real)
        before = verify(store.url)
        assert bool(before) == (contents(store) not in (contents(original), undisturbed)), before
        if limit in (1, 3, 6):
            rewrite_card(store)
            assert verify(store.url) == [] and contents(store) == undisturbed
    # Seven writes: the scores, five of the card, the manifest.
    assert crashed == 4 and left[0] == 2 and contents(store) == undisturbed


def test_the_card_command_does_not_hide_damage_to_what_was_listed(store):
    rewrite_card(store, [add_scores(store)])
    add_scores(store, 2.0)  # replaced, and the process ended
    rewrite_card(store)
    assert [line.split(":")[0] for line in verify(store.url)] == ["scores/sharpness.parquet"]
    rewrite_card(store, [add_scores(store, 2.0)])
    assert verify(store.url) == []
    store.delete("scores/sharpness.parquet")
    assert verify(store.url) == ["scores/sharpness.parquet: missing"]
    rewrite_card(store)
    assert verify(store.url) == []


def test_a_damaged_manifest_is_not_sealed_again(store, capsys):
    document = json.loads(store.get(MANIFEST))
    put(store, changed(document, ("made_from", "models"), "elsewhere"))
    before = contents(store)
    remake = ["remake", "ada~p0~0", "--dataset"]
    for words in (["card"], ["score"], ["copies"], ["retry-failed"], ["repair"], remake):
        capsys.readouterr()
        assert main([*words, store.url, "--quiet"]) == 2
        assert "manifest.json: changed since it was written" in capsys.readouterr().err
        assert contents(store) == before


# --- hostile manifests and datasets -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"rows": 10**18},
        {"rows": 10**400},
        {"rows": -1},
        {"shard_size": 0},
        {"shard_size": -1},
        {"shard_size": 10**18, "rows": 10**36},
        {"shard_size": 24.5},
        {"shards": []},
        {"shards": {}},
        {"run": None},
        {"run": {"a": json.loads("[" * 150 + "]" * 150)}},
        {"counts": {"rows": 10**18, "ok": 10**18, "failed": 0, "shards": 10**18}},
        {"objects": [{"key": "../secret", "bytes": 1, "sha256": "x"}]},
        {"objects": [{"key": "/etc/passwd", "bytes": 1, "sha256": "x"}]},
        {"fingerprint": float("nan")},
        {"run": {"x": float("nan")}},
    ],
    ids=str,
)
def test_hostile_manifests_are_refused_in_one_line_at_once_and_nothing_is_written(store, change, capsys):
    document = json.loads(store.get(MANIFEST))
    put(store, document | change)
    before = contents(store)
    for words in (["verify", store.url], ["card", store.url], ["remake", "ada~p0~0", "--dataset", store.url]):
        capsys.readouterr()
        code = main([*words, "--quiet"])
        said = capsys.readouterr()
        assert code == 2 or (code == 1 and words[0] == "verify"), (words, said)
        assert len((said.err or said.out).splitlines()[0]) < 900
        assert code != 2 or len(said.err.splitlines()) == 1
    assert contents(store) == before


def test_a_manifest_of_a_terabyte_is_refused_unread(store):
    with open(store.root / MANIFEST, "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(InputError, match="more than 536870912; not a manifest"):
        read_manifest(store)


def spoil_shard(store):
    key = "data/shard-00001-of-00002.parquet"
    store.put(key, store.get(key)[:-40])
    return key


def spoil_shard_inside(store):
    key = "data/shard-00001-of-00002.parquet"
    data = store.get(key)
    store.put(key, data[:4] + b"\xff" * (len(data) // 2) + data[4 + len(data) // 2 :])
    return key


def spoil_subjects(store):
    store.put("subjects.parquet", b"rubbish")
    return "subjects.parquet"


def other_subjects(store):
    sink = io.BytesIO()
    pq.write_table(pa.table({"x": [1]}), sink)
    store.put("subjects.parquet", sink.getvalue())
    return "subjects.parquet"


def spoil_plan(store):
    store.put("plan/part-00000-of-00001.parquet", b"PAR1 rubbish PAR1")
    return "plan/part-00000-of-00001.parquet"


def spoil_scores(store):
    store.put("scores/x.parquet", b"rubbish")
    return "scores/x.parquet"


def folder_for_shard(store):
    key = "data/shard-00001-of-00002.parquet"
    store.delete(key)
    (store.root / key / "inside").mkdir(parents=True)
    return key


SPOILS = [spoil_shard, spoil_shard_inside, spoil_subjects, other_subjects, spoil_plan, spoil_scores, folder_for_shard]


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_damaged_dataset_is_one_line_and_nothing_is_written(store, spoil, capsys):
    key = spoil(store)
    before = contents(store)
    assert any(line.startswith(key) for line in verify(store.url))
    assert main(["remake", "bob~p1~0", "--dataset", store.url, "--quiet"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    if spoil is not folder_for_shard:  # the card is of the shards there are; verify names the one that is not
        assert main(["card", store.url, "--quiet"]) == 2
        said = capsys.readouterr().err
        assert key in said and len(said.splitlines()) == 1
    if spoil not in (spoil_shard, spoil_shard_inside, folder_for_shard):
        for check, settings in ((check_score, ScoreSettings), (check_copies, CopySettings)):
            with pytest.raises(InputError, match=key):
                check(settings(url=store.url))
    assert contents(store) == before


@pytest.mark.parametrize("command", [["score"], ["copies", "--scorers", "miniature"]])
def test_a_shard_cut_short_is_one_line_of_the_flows_that_read_it(store, command, capsys, prefect_harness):
    key = spoil_shard(store)
    before = contents(store)
    assert main([*command, store.url, "--quiet"]) == 2
    assert key in capsys.readouterr().err.splitlines()[-1] and contents(store) == before
