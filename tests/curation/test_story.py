"""A dataset's whole life with real processes that are killed: extended twice, merged, a person taken out, exported, read back."""

import hashlib
import io
import json
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

import boto3
import pyarrow.parquet as pq
import pytest
from curation.command import command_server, start
from dataset.finished import ALONE, TOGETHER, finish_dataset
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "generation"))

from world import PROMPTS, World, save_prompts

from facediffuser.curation.curation_settings import ExportSettings, MergeSettings, RetractSettings
from facediffuser.dataset.manifest import read_manifest
from facediffuser.dataset.mentions import find_mentions
from facediffuser.dataset.reading import list_shards
from facediffuser.dataset.verify import verify
from facediffuser.storage import local_copy, open_store

PAIR = {"prompt": "{subject_1} and {subject_2}", "prompt_id": "pair"}
LANDMARKS = [[20.0, 24.0], [44.0, 24.0], [32.0, 36.0], [22.0, 46.0], [42.0, 46.0]]


def rows(url) -> dict[str, list[str]]:
    """Sample id -> the SHA-256 of all that each of its rows holds; one that is there twice has two."""
    store, found = open_store(url), {}
    for info in list_shards(store):
        for row in pq.read_table(io.BytesIO(store.get(info.key))).to_pylist():
            digest = hashlib.sha256(repr(sorted(row.items())).encode()).hexdigest()
            found.setdefault(row["sample_id"], []).append(digest)
    return found


class Story:
    """Runs commands as processes, kills them with SIGKILL as soon as they put another object, and counts what is lost."""

    def __init__(self, folder: Path, where: str, context):
        self.folder, self.where, self.context = folder, where, context
        self.kills, self.lines = 0, []
        self.lost = self.duplicated = self.corrupted = 0

    def run(self, name: str, settings, output: str, what: str = "", kills: int = 3, after: int = 1) -> None:
        """Run a command until it ends well; its first `kills` runs are killed, each a few objects later than the one before."""
        began, killed = time.monotonic(), 0
        for number in range(kills):
            before = self._state(output)
            process = start(self.context, name, settings, self.folder / f"{name}.log")
            while process.is_alive():
                if len(self._state(output) ^ before) > after + number:
                    process.kill()
                    break
                process.join(0.01)
            process.join()
            killed += process.exitcode == -9
        process = start(self.context, name, settings, self.folder / f"{name}.log")
        process.join()
        assert process.exitcode == 0, (self.folder / f"{name}.log").read_text()[-3000:]
        self.kills += killed
        self.lines.append(f"{self.where:<6}{name:<10}{what:<28}{killed:>2} kills{time.monotonic() - began:8.1f} s")

    def _state(self, output: str) -> set[tuple[str, str]]:
        return {(info.key, info.version) for info in open_store(output).list()}

    def compare(self, expected: dict[str, list[str]], url: str) -> dict[str, list[str]]:
        """Count what is lost, twice there or changed of the expected rows; return all that are there."""
        found = rows(url)
        self.lost += len(expected.keys() - found.keys())
        self.duplicated += sum(len(digests) - 1 for digests in found.values())
        self.corrupted += sum(found[name] != expected[name] for name in expected.keys() & found.keys())
        assert verify(url) == []
        return found

    def say(self, name: str, text: str) -> None:
        self.lines.append(f"{self.where:<6}{name:<10}{text}")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def context():
    return command_server()


def versioned(url: str):
    """Let a bucket keep every version of its objects; return a client for it."""
    client = boto3.session.Session().client("s3")
    client.put_bucket_versioning(Bucket=url.removeprefix("s3://"), VersioningConfiguration={"Status": "Enabled"})
    return client


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("s3", [False, True], ids=["local", "S3"])
def test_a_dataset_lives(tmp_path, request, world, context, s3, summary_line):
    url = request.getfixturevalue("s3_bucket").url if s3 else str(tmp_path / "datasets")
    client = versioned(url) if s3 else None
    story = Story(tmp_path, "S3" if s3 else "local", context)
    mine, theirs, both = f"{url}/mine", f"{url}/theirs", f"{url}/both"
    # Made, then extended twice: with a prompt and more images, then with another person.
    first = save_prompts(tmp_path / "first.jsonl", PROMPTS[:2])
    more = save_prompts(tmp_path / "more.jsonl", [*PROMPTS[:2], PAIR])
    people = tmp_path / "people"
    shutil.copytree(world.subjects, people)
    shutil.copytree(people / "bob", people / "cyd")
    kept: dict[str, list[str]] = {}
    for what, given in (
        ("made", {"prompts": str(first), "images_per_prompt": 1}),
        ("extended by a prompt", {"prompts": str(more), "images_per_prompt": 2}),
        ("extended by a person", {"prompts": str(more), "images_per_prompt": 2, "subjects": str(people)}),
    ):
        story.run("generate", world.settings(mine, extend=True, **given), mine, what)
        kept = story.compare(kept, mine)
    # Merged with other people's.
    size = read_manifest(open_store(mine)).run["schema"]["embedding_size"]
    finish_dataset(theirs, ("dan", "eve"), (*ALONE, TOGETHER), 1, 64, 3, faces_of(size), embedding_size=size)
    kept |= rows(theirs)
    story.run("merge", MergeSettings(urls=[mine, theirs], output=both), both)
    assert story.compare(kept, both) == kept
    before = {entry.key: open_store(both).get(entry.key) for entry in list_shards(open_store(both))}
    # One person is taken out; the bytes of the shards without them stay.
    mentions = len(find_mentions(open_store(both), "ada").mentions)
    story.run("retract", RetractSettings(url=both, subject="ada"), both)
    expected = {name: digests for name, digests in kept.items() if "ada" not in name.split("~")[0].split("+")}
    assert story.compare(expected, both) == expected and len(expected) < len(kept)
    without = {key for key, data in before.items() if not names_ada(data)}
    assert without and all(open_store(both).get(key) == before[key] for key in without)
    absence = find_mentions(open_store(both), "ada")
    if client:
        old = [line for line in absence.mentions if "(old version" in line]
        assert old == absence.mentions != []
        story.say("verify", f"names {len(old)} mentions in old versions of objects, and nothing else")
        for version in open_store(both).old_versions():
            client.delete_object(Bucket=url.removeprefix("s3://"), Key=f"both/{version.key}", VersionId=version.version)
        absence = find_mentions(open_store(both), "ada")
    assert absence.mentions == [] and mentions > 5
    story.say("verify", f"{mentions} mentions before, {len(absence.mentions)} in {absence.objects} objects after; "
              f"{len(kept) - len(expected)} of {len(kept)} rows out; {len(without)} of {len(before)} shards show others only: "
              "their bytes are equal")  # fmt: skip
    # Exported in four formats and read back by their own readers.
    for to in ("webdataset", "imagefolder", "lmdb", "faces"):
        output = f"{url}/{to}"
        settings = ExportSettings(url=both, to=to, output=output, where="status = 'ok'", rows_per_file=4)
        story.run("export", settings, output, to)
        found = read_back(to, local_copy(output, tmp_path / "cache"))
        assert len(found) == json.loads(open_store(output).get("manifest.json"))["counts"]["samples"]
        story.duplicated += sum(count - 1 for count in Counter(found).values())
        # The models of the made world draw no faces; the other dataset has one for each person.
        wanted = (
            expected
            if to != "faces"
            else {name for name in expected if name.split("~")[0] not in ("bob", "cyd", "bob+cyd")}
        )
        names = {name.partition("@")[0] for name in found}
        story.lost += len(wanted - names if to == "faces" else wanted.keys() - names)
        assert names == set(wanted)
        story.say("read", f"{len(found)} images by the reader of {to}")
    story.say(
        "", f"{story.kills} kills; rows lost {story.lost}, duplicated {story.duplicated}, corrupted {story.corrupted}"
    )
    for line in story.lines:
        summary_line(f"a dataset's life, {story.where}", line)
    assert (story.lost, story.duplicated, story.corrupted) == (0, 0, 0)
    assert story.kills >= 20


def faces_of(size):
    """Return what gives a row a face of each of its people, with an embedding of so many numbers."""

    def faces(row):
        measured = {name: 1.0 for name in ("probability", "yaw", "pitch", "roll", "size", "sharpness")}
        known = {"box": [8.0, 8.0, 56.0, 60.0], "landmarks": LANDMARKS, "similarity": 0.5, **measured}
        known["embedding"] = [1.0] * size
        return {"faces": [{"subject_id": one, **known} for one in row["subject_ids"]]}

    return faces


def names_ada(shard: bytes) -> bool:
    return any(
        "ada" in names for names in pq.read_table(io.BytesIO(shard), columns=["subject_ids"])["subject_ids"].to_pylist()
    )


def read_back(to: str, folder: Path) -> list[str]:
    """Return the sample ids that a format's own reader finds, in its order, each of its images decoded."""
    if to == "webdataset":
        import webdataset

        tars = sorted(str(path) for path in folder.glob("*.tar"))
        samples = list(webdataset.WebDataset(tars, shardshuffle=False).decode("pil"))
        assert all(sample["png"].size for sample in samples)
        return [sample["json"]["sample_id"] for sample in samples]
    if to == "lmdb":
        import lmdb

        found = []
        for path in sorted(folder.glob("*.lmdb")):
            with lmdb.open(str(path), readonly=True, lock=False) as database, database.begin() as values:
                for number in range(int(values.get(b"num-samples"))):
                    Image.open(io.BytesIO(values.get(f"image-{number:09d}".encode()))).load()
                    found.append(json.loads(values.get(f"meta-{number:09d}".encode()))["sample_id"])
        return found
    from torchvision.datasets import ImageFolder

    dataset = ImageFolder(folder / "train")
    assert all(
        dataset[place][0].size == ((112, 112) if to == "faces" else dataset[place][0].size)
        for place in range(len(dataset))
    )
    return [Path(path).stem for path, _ in dataset.samples]
