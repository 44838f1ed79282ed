"""Seconds per 10,000 rows and memory of merge, retract, verify --absent and export: `python -m benchmarks.dataset_life`.

Each command runs in a process of its own on made datasets of two sizes, without Ray; memory that is flat does not grow
with the rows.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def one_step(name: str, folder: Path, rows: int) -> None:
    """Do one step in this process; print its seconds and its largest resident memory, MiB."""
    sys.path.insert(0, str(ROOT / "tests"))
    from dataset.finished import ALONE, finish_dataset

    from facediffuser.curation.curation_settings import ExportSettings, MergeSettings, RetractSettings
    from facediffuser.curation.export import export_stage
    from facediffuser.curation.merge import merge_stage
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
            finish_dataset(folder / place, names, ALONE[:1], rows // 10, side=64, shard_size=500)
    elif name == "merge":
        LocalDriver().run(merge_stage(MergeSettings(urls=[mine, str(folder / "theirs")], output=both)))
    elif name == "retract":
        LocalDriver().run(retract_stage(RetractSettings(url=both, subject=people[0])))
    elif name == "verify":
        assert verify(both) == []
    elif name == "absent":
        assert find_mentions(open_store(both), people[0]).mentions == []
    else:
        output = str(folder / name)
        LocalDriver().run(export_stage(ExportSettings(url=both, to=name, output=output, where="ip > 0.1")))
    seconds = time.monotonic() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"seconds": seconds, "before": before / 1024, "peak": peak / 1024}))


def main() -> None:
    """Measure all commands on datasets of the sizes given, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[5_000, 20_000])
    parser.add_argument("--step", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.step:
        one_step(given.step[0], Path(given.step[1]), given.rows[0])
        return
    print(f"{'command':<14}{'rows':>8}{'s per 10,000 rows':>20}{'peak memory, MiB':>18}")
    for rows in given.rows:
        folder = Path(tempfile.mkdtemp(prefix="dataset-life-"))
        try:
            for name in ("make", "merge", "retract", "verify", "absent", "webdataset", "imagefolder", "lmdb"):
                line = [
                    sys.executable,
                    "-m",
                    "benchmarks.dataset_life",
                    "--step",
                    name,
                    str(folder),
                    "--rows",
                    str(rows),
                ]
                done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True)
                found = json.loads(done.stdout.splitlines()[-1])
                if name != "make":
                    print(
                        f"{name:<14}{rows:>8}{found['seconds'] / rows * 10_000:>20.2f}{found['peak']:>18.0f}",
                        flush=True,
                    )
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
