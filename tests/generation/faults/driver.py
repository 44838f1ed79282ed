"""A driver as a process of its own: `python driver.py SETTINGS.json [WORKER]` makes a dataset with Ray, without Prefect.

The exit codes are those of the command line; WORKER names a worker of this file that stumbles.
"""

import logging
import os
import resource
import signal
import sys
from pathlib import Path

from facediffuser.flows.cli import exit_code
from facediffuser.generation.generate_settings import GenerateSettings
from facediffuser.generation.generate_stage import ShardWorker
from facediffuser.tasks.generate import finish_dataset, generate_shards, plan_dataset

POISON = "FACEDIFFUSER_TEST_POISON"


class Poisoned(ShardWorker):
    """A worker whose model fails on one row, known by its seed, each time."""

    def load(self, job):
        generator = super().load(job)
        real, seed = generator.pipeline, int(os.environ[POISON])

        class Failing:
            def __getattr__(self, name):
                return getattr(real, name)

            def __call__(self, **given):
                if any(noise.initial_seed() == seed for noise in given["generator"]):
                    raise ValueError("this row cannot be made")
                return real(**given)

        generator.pipeline = Failing()
        return generator


class Cramped(ShardWorker):
    """A worker that cannot write files of more than a few KiB: what a full disk does, where none can be mounted."""

    def load(self, job):
        generator = super().load(job)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return generator


def main() -> int:
    logging.basicConfig(level=logging.INFO)
    settings = GenerateSettings.model_validate_json(Path(sys.argv[1]).read_text())
    worker = globals()[sys.argv[2]] if len(sys.argv) > 2 else ShardWorker
    try:
        prepared = plan_dataset.fn(settings)
        generate_shards.fn(prepared.job, worker)
        finish_dataset.fn(prepared.job)
    except Exception as error:
        code = exit_code(error)
        if code is None:
            raise
        print(f"told: {error}", file=sys.stderr)
        return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
