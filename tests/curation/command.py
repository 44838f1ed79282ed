"""A command on datasets as a process of its own: `python command.py NAME SETTINGS.json` runs its stages without Prefect and Ray.

Exit codes are those of the command line.
"""

import logging
import sys
from pathlib import Path

from facediffuser.curation.curation_settings import ExportSettings, MergeSettings, RetractSettings
from facediffuser.flows.cli import exit_code
from facediffuser.generation.generate_settings import GenerateSettings
from facediffuser.tasks.curate import export_subset, merge_datasets, retract_subject
from facediffuser.tasks.generate import finish_dataset, generate_shards, plan_dataset
from facediffuser.tasks.local_driver import LocalDriver


def generate(settings: GenerateSettings, driver: LocalDriver) -> None:
    """Run the stages of the flow `generate-dataset`."""
    resumes = True
    while resumes:
        prepared = plan_dataset.fn(settings, driver)
        generate_shards.fn(prepared.job, driver=driver)
        finish_dataset.fn(prepared.job)
        resumes = prepared.resumes


COMMANDS = {
    "generate": (GenerateSettings, generate),
    "merge": (MergeSettings, merge_datasets.fn),
    "retract": (RetractSettings, retract_subject.fn),
    "export": (ExportSettings, export_subset.fn),
}


def main() -> int:
    logging.basicConfig(level=logging.INFO)
    model, run = COMMANDS[sys.argv[1]]
    try:
        run(model.model_validate_json(Path(sys.argv[2]).read_text()), LocalDriver())
    except Exception as error:
        code = exit_code(error)
        if code is None:
            raise
        print(error, file=sys.stderr)
        return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
