"""Seconds per 10,000 rows and memory of merge, retract, verify, export and publish: `python -m benchmarks.dataset_life`.

Each command runs in a process of its own on made datasets of two sizes, without Ray; memory that is flat does not grow
with the rows. `publish` goes to the tests' hub on loopback, which keeps everything in the memory of the process that measures.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STEPS = ("make", "merge", "retract", "verify", "absent", "webdataset", "imagefolder", "lmdb", "faces", "publish")
LANDMARKS = [[20.0, 24.0], [44.0, 24.0], [32.0, 36.0], [22.0, 46.0], [42.0, 46.0]]


def one_step(name: str, folder: Path, rows: int) -> None:
    """Do one step in this process; print its seconds and its largest resident memory, MiB."""
    sys.path.insert(0, str(ROOT / "tests"))
    from dataset.finished import ALONE, finish_dataset

    from facediffuser.curation.curation_settings import ExportSettings, MergeSettings, PublishSettings, RetractSettings
    from facediffuser.curation.export import export_stage
    from facediffuser.curation.merge import merge_stage
    from facediffuser.curation.publish import publish_stage
    from facediffuser.curation.retract import retract_stage
    from facediffuser.dataset.mentions import find_mentions
    from facediffuser.dataset.verify import verify
    from facediffuser.storage import open_store
    from facediffuser.tasks.local_driver import LocalDriver

    people = [f"person-{number:03d}" for number in range(10)]
    mine, both = str(folder / "mine"), str(folder / "both")
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    if name == "make":
        for place, names in (("mine", people[:5]), ("theirs", people[5:])):
            finish_dataset(folder / place, names, ALONE[:1], rows // 10, side=64, shard_size=500, labels=one_face)
    elif name == "merge":
        LocalDriver().run(merge_stage(MergeSettings(urls=[mine, str(folder / "theirs")], output=both)))
    elif name == "retract":
        LocalDriver().run(retract_stage(RetractSettings(url=both, subject=people[0])))
    elif name == "verify":
        assert verify(both) == []
    elif name == "absent":
        assert find_mentions(open_store(both), people[0]).mentions == []
    elif name == "publish":
        LocalDriver().run(publish_stage(PublishSettings(places=[both, "hf://datasets/org/name"])))
    else:
        output = str(folder / name)
        LocalDriver().run(export_stage(ExportSettings(url=both, to=name, output=output, where="ip > 0.1")))
    seconds = time.monotonic() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"seconds": seconds, "before": before / 1024, "peak": peak / 1024}))


def one_face(row: Mapping[str, Any]) -> dict[str, Any]:
    face = {name: 1.0 for name in ("probability", "yaw", "pitch", "roll", "size", "sharpness")}
    face |= {"box": [8.0, 8.0, 56.0, 60.0], "landmarks": LANDMARKS, "similarity": 0.5}
    return {"faces": [face | {"subject_id": name} for name in row["subject_ids"]]}


def main() -> None:
    """Measure all commands on datasets of the sizes given, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[5_000, 20_000])
    parser.add_argument("--step", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.step:
        one_step(given.step[0], Path(given.step[1]), given.rows[0])
        return
    sys.path.insert(0, str(ROOT / "tests"))
    from curation.hub import Hub

    print(f"{'command':<14}{'rows':>8}{'s per 10,000 rows':>20}{'peak memory, MiB':>18}")
    for rows in given.rows:
        folder = Path(tempfile.mkdtemp(prefix="dataset-life-"))
        with Hub() as hub:
            there = {
                "HF_ENDPOINT": hub.endpoint,
                "HF_TOKEN": "hf_none",
                "HF_HUB_DISABLE_XET": "1",
                "HF_HUB_OFFLINE": "0",
            }
            try:
                for name in STEPS:
                    line = ["-m", "benchmarks.dataset_life", "--step", name, str(folder), "--rows", str(rows)]
                    done = subprocess.run(
                        [sys.executable, *line], cwd=ROOT, capture_output=True, text=True, env=os.environ | there
                    )
                    if done.returncode:
                        sys.exit(f"{name}: {done.stderr[-2000:]}")
                    found = json.loads(done.stdout.splitlines()[-1])
                    rate = found["seconds"] / rows * 10_000
                    if name != "make":
                        print(f"{name:<14}{rows:>8}{rate:>20.2f}{found['peak']:>18.0f}", flush=True)
            finally:
                shutil.rmtree(folder)


if __name__ == "__main__":
    main()
