"""The miniature's two worlds on a GPU machine, in two calls on machines that share nothing but what is carried.

    python -m tools.miniature_weights.gpu base OUT [--work DIR] [--seconds 400] [--wall 400] [--small]
    python -m tools.miniature_weights.gpu models OUT --base base.tar [--faces faces.tar] [the same]

`base`: the shipped base goes on with the world `broad` for so much time; the faces of the world `ffhq` are found; TDM and SDM
train for seconds, from the shipped base, so that their rates are known. `models`: TDM and SDM are trained beside each other
on `ffhq` from that base, their steps 250 : 450, and measured: forgetting, the choice of guidance and window on other people and
prompts, the claim, people's own words.

`--seconds` counts the time in which this process was running: it may be stopped (SIGSTOP, the whole process group) and continued
at any time. `--wall` ends it in any case. OUT gets at most five files, each below 16 MiB, which grow as results come. Needed:
torch, diffusers, transformers, facenet-pytorch, pydantic, pyarrow, scipy and matplotlib; neither Ray nor Prefect. --small does all of
it in minutes on a CPU, with numbers that mean nothing.
"""

import argparse
import logging
import math
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

from tools.miniature_weights.gpu_base import base_call
from tools.miniature_weights.gpu_call import Call, say
from tools.miniature_weights.gpu_models import models_call

CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")


def usable_cores() -> int:
    """Return how many cores this process may use: in a container often fewer than the machine has."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = CPU_LIMIT.read_text().split()
        return max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # there is no limit, or it is "max"
        return cores


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.miniature_weights.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=["base", "models"])
    parser.add_argument("out", type=Path, help="where what is to be taken home goes")
    parser.add_argument("--work", type=Path, help="new folder for all that is made (default: a temporary one)")
    parser.add_argument(
        "--base", type=Path, help="models: mini1-base.tar of the first call (default: the shipped base)"
    )
    parser.add_argument("--faces", type=Path, help="models: mini1-faces.tar.xz of the first call")
    parser.add_argument("--seconds", type=float, default=400.0, help="running time")
    parser.add_argument("--wall", type=float, default=400.0, help="wall time, in seconds")
    parser.add_argument("--cores", type=int, default=usable_cores())
    parser.add_argument("--device", help="default: cuda where there is a GPU")
    parser.add_argument("--small", action="store_true", help="a try on a CPU, in minutes")
    options = parser.parse_args()
    options.started = time.time()
    # Tasks that an earlier call closed, or its half of a training, would be taken for this one's.
    if options.work and options.work.exists() and any(options.work.iterdir()):
        parser.error(f"--work {options.work}: not empty; give a new folder")
    for archive in (options.base, options.faces):
        if archive and not archive.is_file():
            parser.error(f"{archive}: no such file")
    import torch

    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options.work = options.work or Path(tempfile.mkdtemp())
    for folder in (options.work, options.out):
        folder.mkdir(parents=True, exist_ok=True)
    log = options.out / f"mini{1 if options.what == 'base' else 2}.log"
    handlers = [logging.StreamHandler(sys.stdout), logging.FileHandler(log)]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", handlers=handlers)
    # What is there is packed also when somebody ends this.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(f"ended by signal {number}"))
    call = Call(options)
    try:
        if options.what == "base":
            base_call(call)
        else:
            models_call(call, options.base, options.faces)
        say(f"done, {call.clock.left():.0f} s left")
    finally:
        call.end()


if __name__ == "__main__":
    main()
