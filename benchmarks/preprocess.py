"""How fast pictures are prepared, stage by stage, and how much memory it takes as the set grows.

    python -m benchmarks.preprocess [--count 2000] [--compare N] [--cheap] [--distinct N] [-- PREPROCESS OPTIONS]

Renders `--count` pictures of the miniature and prepares them in a process of its own; tells the highest memory of that
process, which drives, and of its largest worker. `--compare N` prepares the first N of them before, so that memory can
be seen to be flat. `--cheap` looks for no faces: what is left (listing, reading, checking, maps, writing, Ray, the
manifest) can be run on a large set in a short time; `--distinct N` renders N pictures only and repeats them. The
rendered set brings captions and segments; to have them made, name the models: `-- --format folder --captioner MODEL
--segmenter MODEL --matcher MODEL`.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from facediffuser.preprocess.preprocess_stage import PartWorker

STAGES = ("read", "check", "faces", "captions", "segments", "subjects", "write")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--compare", type=int, help="prepare so many of them first, to see whether memory grows")
    parser.add_argument("--cheap", action="store_true", help="look for no faces")
    parser.add_argument("--distinct", type=int, help="render so many and repeat them under other ids")
    parser.add_argument("--in-this-process", action="store_true", help=argparse.SUPPRESS)
    own, options = parser.parse_args(_before_dashes()), _after_dashes()
    if own.in_this_process:
        print(json.dumps(_prepare(options, own.cheap)))
        return
    with tempfile.TemporaryDirectory(prefix="facediffuser-preprocess-") as folder:
        source = _render(min(own.distinct or own.count, own.count), Path(folder))
        _repeat(source, own.count)
        for count in sorted({own.compare or own.count, own.count}):
            _list_first(source, count)
            given = ["--source", str(source), "--output", f"{folder}/out-{count}", *options]
            _tell(count, _in_a_process(given, own.cheap))


def _before_dashes() -> list[str]:
    return sys.argv[1 : sys.argv.index("--")] if "--" in sys.argv else sys.argv[1:]


def _after_dashes() -> list[str]:
    return sys.argv[sys.argv.index("--") + 1 :] if "--" in sys.argv else []


def _render(count: int, folder: Path) -> Path:
    from facediffuser.miniature.render import render_set

    started = time.perf_counter()
    render_set(count, 0, folder / "photos", subjects=0)
    print(f"rendered {count:,} pictures in {time.perf_counter() - started:.0f} s", flush=True)
    return folder / "photos"


def _repeat(source: Path, count: int) -> None:
    ids = sorted(path.stem for path in source.glob("*/*.npy"))
    for number in range(len(ids), count):
        original, copy = ids[number % len(ids)], f"{number:08d}"
        (source / copy[:5]).mkdir(exist_ok=True)
        for ending in (".jpg", ".json", ".npy"):
            os.link(source / original[:5] / f"{original}{ending}", source / copy[:5] / f"{copy}{ending}")


def _list_first(source: Path, count: int) -> None:
    """Have the source's lists name its first pictures only: the set is as large as its lists say."""
    ids = sorted(path.stem for path in source.glob("*/*.npy"))[:count]
    for name, listed in (("", ids), ("_train", ids[: -max(1, count // 7)]), ("_test", ids[-max(1, count // 7) :])):
        (source / f"image_ids{name}.txt").write_text("\n".join(listed))


def _in_a_process(options: list[str], cheap: bool) -> dict:
    own = ["--in-this-process", *(["--cheap"] if cheap else [])]
    command = [sys.executable, "-m", "benchmarks.preprocess", *own, "--", *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _prepare(options: list[str], cheap: bool) -> dict:
    from facediffuser.flows.cli import app
    from facediffuser.tasks.preprocess import prepare_photographs

    settings = app.parse_args(["preprocess", *options])[1].arguments["settings"]
    result = prepare_photographs.fn(settings, worker=_Cheap if cheap else _Watched)
    workers = [float(path.read_text()) for path in Path(f"{settings.output}-memory").iterdir()]
    return {**result, "driver_mib": _peak_mib(), "worker_mib": max(workers)}


class _Watched(PartWorker):
    """The stage's worker, which also notes its highest memory."""

    def __init__(self, job):
        super().__init__(job)
        self.folder = Path(f"{job.settings.output}-memory")
        self.folder.mkdir(exist_ok=True)

    def __call__(self, unit) -> dict:
        result = super().__call__(unit)
        (self.folder / str(os.getpid())).write_text(str(_peak_mib()))
        return result


class _Cheap(_Watched):
    """The same without the search for faces."""

    def __init__(self, job):
        super().__init__(job)
        self.preparer.stages[0].run = lambda items: None


def _tell(count: int, result: dict) -> None:
    spent = result["worker_seconds"]
    made = result["train"] + result["test"]
    print(f"{count:,} pictures: {made:,} prepared, {result['rejected']:,} rejected, {result['seconds']:.0f} s, "
          f"{count / result['seconds']:.1f} images/s in all")  # fmt: skip
    for stage in STAGES:
        if spent.get(stage):
            print(f"    {stage:<10}{count / spent[stage]:>10.1f} images/s of one worker{spent[stage]:>10.1f} s")
    print(
        f"    highest memory: driver {result['driver_mib']:.0f} MiB, worker {result['worker_mib']:.0f} MiB", flush=True
    )


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
