"""The command line: `facediffuser COMMAND`, whose options are the fields of the settings model its flow takes."""

import errno
import importlib
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError, create_model
from pydantic_settings import BaseSettings, CliPositionalArg, SettingsConfigDict, SettingsError

from facediffuser import __version__
from facediffuser.errors import InputError, Stopped
from facediffuser.extras import missing_extra

EXIT_BAD_INPUT = 2
EXIT_TERMINATED = 128 + 15
PLACE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


@dataclass(frozen=True)
class Command:
    """A command: what it is for, where its settings and its function stand, which fields are given by place.

    `check` raises InputError for what can be told of the settings without Prefect, Ray and torch, which take long to
    start; the flow's first task checks the same.
    """

    summary: str
    settings: str
    function: str
    positional: tuple[str, ...] = ()
    check: str | None = None


COMMANDS = {
    "demo": Command(
        "the whole factory at a small scale: photographs to scored dataset",
        "facediffuser.flows.flow_settings:DemoSettings",
        "facediffuser.flows.commands:demo",
        check="facediffuser.flows.flow_settings:check_demo",
    ),
    "preprocess": Command(
        "photographs to prepared Parquet",
        "facediffuser.preprocess.preprocess_settings:PreprocessSettings",
        "facediffuser.flows.commands:preprocess",
        check="facediffuser.preprocess.preprocess_check:check_preprocess",
    ),
    "train": Command(
        "train the TDM or the SDM from prepared Parquet",
        "facediffuser.training.train_settings:TrainSettings",
        "facediffuser.flows.commands:train",
        ("role",),
        check="facediffuser.training.train_check:check_train",
    ),
    "assemble": Command(
        "two trained models and their base to one model folder",
        "facediffuser.flows.commands:AssembleSettings",
        "facediffuser.flows.commands:assemble_models",
    ),
    "convert": Command(
        "released checkpoints to a model folder",
        "facediffuser.flows.commands:ConvertSettings",
        "facediffuser.flows.commands:convert_checkpoints",
    ),
    "generate": Command(
        "subjects and prompts to a scored image dataset",
        "facediffuser.generation.generate_settings:GenerateSettings",
        "facediffuser.flows.commands:generate",
        check="facediffuser.generation.generate_check:check_generate",
    ),
    "evaluate": Command(
        "IP and PC tables of datasets, of methods on a benchmark, of folders of images",
        "facediffuser.evaluation.evaluate_settings:EvaluateSettings",
        "facediffuser.flows.commands:evaluate_images",
        check="facediffuser.evaluation.evaluate_check:check_evaluate",
    ),
    "score": Command(
        "add the columns of other scorers to a dataset",
        "facediffuser.evaluation.add_columns:ScoreSettings",
        "facediffuser.flows.commands:score_dataset",
        ("url",),
        check="facediffuser.evaluation.evaluate_check:check_score",
    ),
    "copies": Command(
        "flag copied training faces, pasted references and near-duplicates in a dataset",
        "facediffuser.evaluation.copies:CopySettings",
        "facediffuser.flows.commands:flag_copies",
        ("url",),
        check="facediffuser.evaluation.evaluate_check:check_copies",
    ),
    "verify": Command(
        "check every shard of a dataset against its manifest",
        "facediffuser.flows.commands:DatasetSettings",
        "facediffuser.flows.commands:verify_dataset",
        ("url",),
    ),
    "repair": Command(
        "make again what verify finds missing or damaged, and nothing else",
        "facediffuser.generation.generate_settings:RepairSettings",
        "facediffuser.flows.commands:repair",
        ("url",),
        check="facediffuser.generation.generate_check:check_repair",
    ),
    "retry-failed": Command(
        "make the shards that hold failed rows again",
        "facediffuser.generation.generate_settings:RetrySettings",
        "facediffuser.flows.commands:retry",
        ("url",),
        check="facediffuser.generation.generate_check:check_repair",
    ),
    "remake": Command(
        "make one image again from its row and compare the bytes",
        "facediffuser.generation.generate_settings:RemakeSettings",
        "facediffuser.flows.commands:remake_image",
        ("sample_id",),
    ),
    "card": Command(
        "rebuild a dataset's card",
        "facediffuser.flows.commands:DatasetSettings",
        "facediffuser.flows.commands:card",
        ("url",),
    ),
    "explain": Command(
        "draw what both models want and who wins, step by step",
        "facediffuser.explain:ExplainSettings",
        "facediffuser.flows.commands:explain_picture",
    ),
    "miniature render": Command(
        "render a photo set of the miniature world, with subjects and prompts",
        "facediffuser.flows.commands:RenderSettings",
        "facediffuser.flows.commands:render",
    ),
    "miniature claim": Command(
        "all methods on the miniature's benchmark; exit 1 when the paper's ordering fails on it",
        "facediffuser.flows.flow_settings:ClaimSettings",
        "facediffuser.flows.commands:claim",
        check="facediffuser.flows.flow_settings:check_claim",
    ),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code.

    0; 1 when a check failed or a run broke; 2 when the input was bad; 143 when SIGTERM stopped it in good order.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    name, rest = _command_name(args)
    if name is None:
        return _usage(args)
    try:
        command = COMMANDS[name]
        settings = parse_settings(_load(command.settings), rest, f"facediffuser {name}", command.positional)
        if command.check:
            with _quietly():
                _load(command.check)(settings)
        _configure_logging()
        return _load(command.function)(settings) or 0
    except Exception as error:
        code = exit_code(error)
        if code is None:
            raise
        print(f"facediffuser {name}: {missing_extra(error) or error}", file=sys.stderr)
        return code
    except KeyboardInterrupt:
        print(f"facediffuser {name}: interrupted; run the same command again to go on", file=sys.stderr)
        return 130


def exit_code(error: Exception) -> int | None:
    """Return the exit code of an error that is told in one line, None for one that wants its traceback."""
    if isinstance(error, InputError) or missing_extra(error):
        return EXIT_BAD_INPUT
    if isinstance(error, Stopped):
        return EXIT_TERMINATED
    # A store that does not answer, a disk that is full or broken: no fault of the code's.
    if isinstance(error, OSError) and (error.errno in PLACE_ERRORS or type(error).__name__ == "StorageError"):
        return 1
    return None


def parse_settings(model: type[BaseModel], args: list[str], prog: str, positional: tuple[str, ...] = ()) -> BaseModel:
    """Return the settings that command line arguments give: `--batch-size 8` sets the field `batch_size`.

    Fields named in `positional` are given by place. Only the arguments count: neither the environment nor a file is
    read. Raises InputError, one line naming the option, for anything else than valid options.
    """
    sources = {
        name: (CliPositionalArg[model.model_fields[name].annotation], model.model_fields[name]) for name in positional
    }

    class Options(BaseSettings, create_model(model.__name__, __base__=model, **sources)):
        __doc__ = model.__doc__
        model_config = SettingsConfigDict(
            cli_prog_name=prog,
            cli_exit_on_error=False,
            cli_kebab_case=True,
            cli_implicit_flags=True,
            cli_hide_none_type=True,
            cli_avoid_json=True,
            cli_enforce_required=False,
            extra="forbid",
        )

        @classmethod
        def settings_customise_sources(cls, settings_cls, init_settings, **others):
            return (init_settings,)

    try:
        parsed = Options(_cli_parse_args=args)
        return model.model_validate(parsed.model_dump(exclude_unset=True))
    except ValidationError as error:
        raise InputError("; ".join(_complaint(item, positional) for item in error.errors())) from error
    except SettingsError as error:
        raise InputError(str(error).removeprefix("error parsing CLI: ")) from error


def _complaint(item: dict[str, Any], positional: tuple[str, ...]) -> str:
    field = str(item["loc"][0]) if item["loc"] else ""
    name = field.replace("_", "-")
    option = name.upper() if field in positional else f"--{name}" if name else "options"
    if item["type"] == "missing":
        return f"{option} is required"
    message = item["msg"].removeprefix("Value error, ")
    return f"{option}: {message}" + (
        f" (given: {item['input']!r})" if field and not isinstance(item["input"], dict) else ""
    )


def _command_name(args: list[str]) -> tuple[str | None, list[str]]:
    for words in (2, 1):
        if " ".join(args[:words]) in COMMANDS:
            return " ".join(args[:words]), args[words:]
    return None, args


def _usage(args: list[str]) -> int:
    if args and args[0] == "--version":
        print(f"facediffuser {__version__}")
        return 0
    if args and args[0] not in ("-h", "--help"):
        known = ", ".join(COMMANDS)
        print(f"facediffuser: no command {' '.join(args[:2])!r}; give one of: {known}", file=sys.stderr)
        return EXIT_BAD_INPUT
    print("usage: facediffuser COMMAND [options]     (facediffuser COMMAND --help tells a command's options)\n")
    for name, command in COMMANDS.items():
        print(f"  {name:<17} {command.summary}")
    return 0


def _load(reference: str) -> Any:
    module, name = reference.split(":")
    return getattr(importlib.import_module(module), name)


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep a check's warnings off the terminal: the flow's first task checks once more and tells them."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


class _InputErrorsAreTold(logging.Filter):
    """Keeps a flow's traceback off the terminal when the error is the user's to mend: `main` prints its one line."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info and not isinstance(record.exc_info, bool) else None
        return not isinstance(error, InputError) and "InputError" not in record.getMessage()


def _configure_logging() -> None:
    os.environ.setdefault("PREFECT_LOGGING_EXTRA_LOGGERS", "facediffuser")
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        from prefect.logging.configuration import setup_logging

        setup_logging()
    except ModuleNotFoundError:  # the base install: commands that are no flow work without Prefect
        logging.basicConfig(format="%(levelname)s | %(message)s")
    # Prefect leaves other packages at the root logger's level, WARNING; counts and rates are told at INFO.
    logging.getLogger("facediffuser").setLevel(logging.INFO)
    loggers = [
        logging.getLogger(name)
        for name in (
            "",
            "prefect",
            "prefect.flow_runs",
            "prefect.task_runs",
            "prefect.extra",
            "facediffuser",
        )
    ]
    for handler in {handler for logger in loggers for handler in logger.handlers}:
        if isinstance(handler, logging.StreamHandler):
            handler.addFilter(_InputErrorsAreTold())


if __name__ == "__main__":
    sys.exit(main())
