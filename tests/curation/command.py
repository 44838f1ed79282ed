"""Commands on datasets as processes of their own, which a test can kill: their stages, without Prefect's server and Ray.

A server that has imported everything forks a process for each command, so that a command starts at once.
"""

import logging
import multiprocessing
import os
import sys
from collections.abc import Mapping
from multiprocessing.forkserver import ensure_running
from multiprocessing.process import BaseProcess
from pathlib import Path

from facediffuser.curation.curation_settings import ExportSettings, MergeSettings, RetractSettings
from facediffuser.flows.cli import exit_code
from facediffuser.generation.generate_settings import GenerateSettings
from facediffuser.settings import Settings
from facediffuser.tasks.chosen_driver import driven_by
from facediffuser.tasks.curate import export_subset, merge_datasets, retract_subject
from facediffuser.tasks.generate import finish_dataset, generate_shards, plan_dataset
from facediffuser.tasks.local_driver import LocalDriver

TESTS = Path(__file__).resolve().parents[1]
MODULE = "curation.command"
# What the stages import only when they run.
IMPORTED_LATE = (
    "facediffuser.generation.shard_generator", "facediffuser.cards.dataset_card", "facediffuser.curation.face_crops",
    "facediffuser.scoring.scorers", "facediffuser.storage.s3", "boto3", "duckdb", "lmdb", "torchvision",
)  # fmt: skip


def generate(settings: GenerateSettings) -> None:
    """Run the stages of the flow `generate-dataset`."""
    resumes = True
    while resumes:
        prepared = plan_dataset.fn(settings)
        generate_shards.fn(prepared.job)
        finish_dataset.fn(prepared.job)
        resumes = prepared.resumes


COMMANDS = {
    "generate": (GenerateSettings, generate),
    "merge": (MergeSettings, merge_datasets.fn),
    "retract": (RetractSettings, retract_subject.fn),
    "export": (ExportSettings, export_subset.fn),
}


def command_server() -> multiprocessing.context.ForkServerContext:
    """Return the context whose processes are forked by a server that has imported all that the commands need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([MODULE, *IMPORTED_LATE])
    before = os.environ.get("PYTHONPATH")
    # The server takes its module path from here, as `python` does; other processes of the tests must not.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    try:
        ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return context


def start(context: multiprocessing.context.ForkServerContext, name: str, settings: Settings, log: Path) -> BaseProcess:
    """Start a command; its exit codes are those of the command line, what it says is in `log`."""
    aws = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    process = context.Process(target=_run, args=(name, settings.model_dump_json(), str(log), aws))
    process.start()
    return process


def _run(name: str, settings: str, log: str, environment: Mapping[str, str]) -> None:
    os.environ.update(environment)
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    logging.basicConfig(level=logging.INFO)
    model, run = COMMANDS[name]
    try:
        with driven_by(LocalDriver()):
            run(model.model_validate_json(settings))
    except Exception as error:
        code = exit_code(error)
        if code is None:
            raise
        print(error, file=sys.stderr)
        sys.exit(code)
