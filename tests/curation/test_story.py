"""A dataset's whole life with real processes that are killed: extended twice, merged, a person taken out, exported, read back."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "generation"))

from world import PROMPTS, World, save_prompts

from facediffuser.curation.curation_settings import ExportSettings, MergeSettings, RetractSettings
from facediffuser.dataset.mentions import find_mentions
from facediffuser.dataset.reading import list_shards
from facediffuser.dataset.verify import verify
from facediffuser.storage import local_copy, open_store

ROOT = Path(__file__).resolve().parents[2]
COMMAND = Path(__file__).with_name("command.py")
WAIT_S = 600.0


def rows(url) -> dict[str, str]:
    """Sample id -> SHA-256 of all that a row holds; fails for a row that is there twice."""
    store, found, names = open_store(url), {}, []
    for info in list_shards(store):
        for row in pq.read_table(io.BytesIO(store.get(info.key))).to_pylist():
            names.append(row["sample_id"])
            found[row["sample_id"]] = hashlib.sha256(repr(sorted(row.items())).encode()).hexdigest()
    assert [name for name, count in Counter(names).items() if count > 1] == []
    return found


class Story:
    """Runs commands as processes and kills them with SIGKILL as soon as they have put another object."""

    def __init__(self, folder: Path, url: str, s3: bool):
        self.folder, self.url, self.where = folder, url, "S3" if s3 else "local"
        self.kills, self.lines = 0, []

    def run(self, name: str, settings, output: str, kills: int = 2, after: int = 1) -> None:
        path = self.folder / f"{name}.json"
        path.write_text(settings.model_dump_json())
        started = time.monotonic()
        killed = 0
        for number in range(kills):
            process, before = self._start(name, path), self._state(output)
            deadline = time.monotonic() + WAIT_S
            while process.poll() is None and time.monotonic() < deadline:
                if len(self._state(output) ^ before) > after + number:
                    process.kill()
                    killed += 1
                    break
                time.sleep(0.01)
            process.wait()
        process = self._start(name, path)
        said, _ = process.communicate(timeout=WAIT_S)
        assert process.returncode == 0, said[-3000:]
        self.kills += killed
        seconds = time.monotonic() - started
        self.lines.append(
            f"{self.where:<6}{name:<10}{killed:>2} kills {seconds:7.1f} s   {settings.__class__.__name__}"
        )

    def _start(self, name: str, path: Path) -> subprocess.Popen:
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        return subprocess.Popen([sys.executable, COMMAND, name, path], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                text=True, env=environment)  # fmt: skip

    def _state(self, output: str) -> set[tuple[str, str]]:
        try:
            return {(info.key, info.version) for info in open_store(output).list()}
        except OSError:
            return set()

    def say(self, text: str) -> None:
        self.lines.append(f"{self.where:<6}{text}")


@pytest.mark.slow
@pytest.mark.parametrize("s3", [False, True], ids=["local", "S3"])
def test_a_dataset_lives(tmp_path, request, s3, capsys):
    url = request.getfixturevalue("s3_bucket").url if s3 else str(tmp_path / "datasets")
    story, world = Story(tmp_path, url, s3), World(tmp_path / "world")
    mine, theirs, both = f"{url}/mine", f"{url}/theirs", f"{url}/both"
    first = save_prompts(tmp_path / "first.jsonl", PROMPTS[:2])
    given = {"prompts": str(first), "images_per_prompt": 1, "extend": True}
    story.run("generate", world.settings(mine, **given), mine, kills=1)
    lost = duplicated = 0
    corrupted = 0
    kept = rows(mine)
    # Extended twice: more prompts and images, then another person.
    more = save_prompts(
        tmp_path / "more.jsonl", [*PROMPTS[:2], {"prompt": "{subject_1} and {subject_2}", "prompt_id": "pair"}]
    )
    given = {"prompts": str(more), "images_per_prompt": 2, "extend": True}
    people = tmp_path / "more-people"
    shutil.copytree(world.subjects, people)
    shutil.copytree(people / "bob", people / "cyd")
    for others in ({}, {"subjects": str(people)}):
        story.run("generate", world.settings(mine, **(given | others)), mine)
        now = rows(mine)
        lost += len(kept.keys() - now.keys())
        corrupted += sum(now[name] != kept[name] for name in kept.keys() & now.keys())
        kept = now
        assert verify(mine) == []
    # Merged with another dataset, of somebody else.
    strangers = tmp_path / "strangers"
    shutil.copytree(people / "bob", strangers / "dan")
    story.run(
        "generate",
        world.settings(theirs, subjects=str(strangers), prompts=str(first), images_per_prompt=3),
        theirs,
        kills=1,
    )
    kept |= rows(theirs)
    story.run("merge", MergeSettings(urls=[mine, theirs], output=both), both)
    now = rows(both)
    lost, corrupted = lost + len(kept.keys() - now.keys()), corrupted + sum(now[name] != kept[name] for name in now)
    assert verify(both) == []
    untouched = {entry.key: open_store(both).get(entry.key) for entry in open_store(both).list("data/")}
    # A person is taken out.
    mentions = len(find_mentions(open_store(both), "ada").mentions)
    assert mentions > 5
    story.run("retract", RetractSettings(url=both, subject="ada"), both, kills=3)
    expected = {name: digest for name, digest in kept.items() if "ada" not in name.split("~")[0].split("+")}
    now = rows(both)
    lost, corrupted = (
        lost + len(expected.keys() - now.keys()),
        corrupted + sum(now[name] != expected[name] for name in now),
    )
    absence = find_mentions(open_store(both), "ada")
    assert verify(both) == [] and absence.mentions == []
    same = sum(open_store(both).get(key) == data for key, data in untouched.items())
    story.say(f"retract   {len(kept) - len(now)} rows out, {same} of {len(untouched)} shards byte for byte as before, "
              f"mentions {mentions} -> {len(absence.mentions)} in {absence.objects} objects")  # fmt: skip
    # Exported in four formats and read back.
    for to in ("webdataset", "imagefolder", "lmdb", "faces"):
        output = f"{url}/{to}"
        settings = ExportSettings(url=both, to=to, output=output, where="status = 'ok'", rows_per_file=4,
                                  scorers=str(world.scorers))  # fmt: skip
        story.run("export", settings, output)
        manifest = json.loads(open_store(output).get("manifest.json"))
        seen = read_back(to, local_copy(output, tmp_path / "cache"))
        assert len(seen) == len(set(seen)) == manifest["counts"]["samples"]
        if to != "faces":
            lost += len(now.keys() - set(seen))
            assert set(seen) == now.keys()
        story.say(
            f"export    {to}: {len(seen)} images read back, {manifest['counts']['without_face']} rows without a face"
        )
    story.say(f"{story.kills} kills; rows lost {lost}, duplicated {duplicated}, corrupted {corrupted}")
    with capsys.disabled():
        print("", *story.lines, sep="\n")
    assert (lost, duplicated, corrupted) == (0, 0, 0) and story.kills >= 8


def read_back(to: str, folder: Path) -> list[str]:
    """Return the sample ids that a format's own reader finds, in its order."""
    if to == "webdataset":
        import webdataset

        tars = sorted(str(path) for path in folder.glob("*.tar"))
        return [one["json"]["sample_id"] for one in webdataset.WebDataset(tars, shardshuffle=False).decode("pil")]
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

    if to == "faces" and not (folder / "train").exists():
        return []  # the random models of the made world draw no faces
    dataset = ImageFolder(folder / "train")
    assert all(dataset[place][0].size for place in range(len(dataset)))
    return [Path(path).stem for path, _ in dataset.samples]
