"""How fast a plan is written and how much memory it takes: `python benchmarks/plan.py [ROWS] [--output DIR]`.

Prints rows, rows per second, bytes per row and the highest resident memory. 10,000,000 rows show whether memory grows
with their number: compare with a run of 1,000,000.
"""

import argparse
import resource
import tempfile
import time

from facediffuser.dataset.inputs import Prompt, Subject, parse_template
from facediffuser.dataset.plan import Layout, Plan, RowSettings, write_plan
from facediffuser.dataset.schema import PLAN_SCHEMA, with_marks
from facediffuser.storage import open_store

SUBJECTS = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=int, nargs="?", default=1_000_000)
    parser.add_argument("--output", help="folder or s3:// prefix to write to (default: a temporary folder)")
    parser.add_argument("--shard-size", type=int, default=500)
    args = parser.parse_args()
    template = parse_template("a photo of a {subject} reading a book in the park", 1, "template")
    plan = Plan(
        tuple(Subject(f"person{n:05d}", "man" if n % 2 else "woman", ("1.png",)) for n in range(SUBJECTS)),
        tuple(Prompt(f"p{n:05d}", "action", *template) for n in range(max(1, args.rows // SUBJECTS))),
        1, 0,
        RowSettings(method="face-diffuser", num_inference_steps=50, guidance_scale=5.0, fusion_start=16, fusion_end=31,
                    scheduler="PNDMScheduler", height=512, width=512),
    )  # fmt: skip
    layout = Layout(len(plan), args.shard_size)
    before = _peak_mib()
    with tempfile.TemporaryDirectory(prefix="facediffuser-plan-") as folder:
        store = open_store(args.output or folder)
        started = time.perf_counter()
        write_plan(store, plan, layout, with_marks(PLAN_SCHEMA, "0" * 64, {}, False))
        seconds = time.perf_counter() - started
        size = sum(info.size for info in store.list("plan/"))
    print(f"rows {len(plan):,}  seconds {seconds:.1f}  rows/s {len(plan) / seconds:,.0f}  "
          f"bytes/row {size / len(plan):.1f}  memory MiB before {before:.0f}  highest {_peak_mib():.0f}")  # fmt: skip


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
