"""The command line `facediffuser COMMAND`: its commands, the options of all of them, errors in one line, exit codes."""

import errno
import functools
import os
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import (
    App,
    CycloptsError,
    Group,
    MissingArgumentError,
    Parameter,
    UnknownOptionError,
    UnusedCliTokensError,
)
from cyclopts.argument import ArgumentCollection
from cyclopts.config import Dict
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from facediffuser import __version__
from facediffuser.errors import InputError, LimitReached, RunError, Stopped
from facediffuser.extras import missing_extra
from facediffuser.flows import commands
from facediffuser.flows.terminal import Verbosity, shown
from facediffuser.json_log import FORMAT_VARIABLE
from facediffuser.redaction import redacted
from facediffuser.storage import LocalStore

SHOWN = 200
"""Characters of a value that an error line repeats at most."""
MOST_CONFIG_BYTES = 1 << 20
MOST_CONFIG_DEPTH = 20
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_LIMIT = 3
EXIT_INTERRUPTED = 128 + 2
EXIT_TERMINATED = 128 + 15
# What the system answers about a path that cannot be used; the path is one that the user named.
PATH_ERRORS = (
    errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENXIO,
)  # fmt: skip
# Errors of a place, as of a full disk: no fault of the code's.
PLACE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


def _default_text(value: Any) -> str | None:
    """Return how `--help` shows a default; None for an option that is off or empty unless given."""
    if value is None or value is False or value in ("", []):
        return None
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


# Of an option given twice the last one counts; a list takes all of them.
_DEFAULTS = Parameter(negative_iterable=(), show_default=_default_text, allow_repeating=True)

app = App(
    name="facediffuser",
    version=f"facediffuser {__version__}",
    version_format="plaintext",
    help="Person-centric image datasets with Face-diffuser: people and prompts in, scored images in Parquet out.",
    help_epilogue="`facediffuser COMMAND --help` lists the options of a command and shows an example.",
    default_parameter=_DEFAULTS,
    suppress_keyboard_interrupt=False,
    result_action="return_value",
)
ORDER: tuple[Callable[..., Any], ...] = (
    commands.demo,
    commands.rehearse,
    commands.preprocess,
    commands.train,
    commands.assemble,
    commands.convert,
    commands.generate,
    commands.evaluate,
    commands.score,
    commands.copies,
    commands.verify,
    commands.repair,
    commands.retry_failed,
    commands.remake,
    commands.merge,
    commands.retract,
    commands.export,
    commands.publish,
    commands.card,
    commands.check,
    commands.explain,
)
"""The commands in the order of `--help`."""
for place, command in enumerate(ORDER):
    app.command(command, sort_key=place, help_epilogue="")
miniature = App(
    name="miniature", sort_key=len(ORDER), help="The miniature world: a photo set, and the paper's comparison on it."
)
miniature.command(commands.render, help_epilogue="")
miniature.command(commands.claim, help_epilogue="")
app.command(miniature)
app.register_install_completion_command(help="Install completion for the shell in use (bash, zsh or fish).")


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after `facediffuser`; those of this process when None.

    Returns:
        The exit code: 0; 1 when a check failed or a run broke; 2 when the input was bad; 3 when --max-hours
        or --max-cost stopped a run; 130 after Ctrl-C; 143 when SIGTERM stopped a run in good order.
    """
    words = sys.argv[1:] if argv is None else argv
    try:
        return app.meta(words, exit_on_error=False, print_error=False, result_action="return_value") or 0
    except CycloptsError as error:
        return _fail("facediffuser", error)


@app.meta.default
def _run(
    *words: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    config: Annotated[Path | None, Parameter(group=Group("Options of every command", sort_key=0))] = None,
    quiet: Annotated[bool, Parameter(negative=(), group="Options of every command", show_default=False)] = False,
    verbose: Annotated[bool, Parameter(negative=(), group="Options of every command", show_default=False)] = False,
    log_format: Annotated[Literal["text", "json"], Parameter(group="Options of every command")] = "text",
) -> int:
    """Run a command with the options of every command.

    Args:
        config: YAML or TOML file with options of the command; options on the command line win.
        quiet: show warnings and errors only, and the result.
        verbose: show the messages of Prefect, Ray and other libraries, too.
        log_format: how log lines are written; json: one object a line, with run, shard and worker.
    """
    names = app.parse_commands(words)[0]
    prog = " ".join(("facediffuser", *names))
    file = _ConfigFile(config) if config else None
    before = os.environ.get(FORMAT_VARIABLE)
    if log_format == "json":
        os.environ[FORMAT_VARIABLE] = log_format  # Ray's processes, started later, inherit it
    verbosity = Verbosity.VERBOSE if verbose else Verbosity.QUIET if quiet else Verbosity.NORMAL
    with shown(verbosity):
        try:
            app.config = (file,) if file else ()
            return app(words, exit_on_error=False, print_error=False) or 0
        except Exception as error:
            return _fail(prog, error, file)
        except KeyboardInterrupt:
            print(f"{prog}: interrupted; run the same command again to resume", file=sys.stderr)
            return EXIT_INTERRUPTED
        finally:
            app.config = ()
            if before is None:
                os.environ.pop(FORMAT_VARIABLE, None)


def _fail(prog: str, error: Exception, file: "_ConfigFile | None" = None) -> int:
    """Print the line of an expected error and return its exit code; raise any other error."""
    code = exit_code(error)
    if code is None:
        raise error
    line = (
        _option_errors(error, file)
        if isinstance(error, CycloptsError | ValidationError)
        else missing_extra(error) or _path_error(error) or error
    )
    print(redacted(f"{prog}: {line}"), file=sys.stderr)
    return code


def _path_error(error: Exception) -> str | None:
    """Return the line of a path that cannot be used, None for another error."""
    if not isinstance(error, OSError) or not error.filename or error.errno not in PATH_ERRORS:
        return None
    return f"{_shortened(os.fsdecode(error.filename))}: cannot be used ({error.strerror}); give another path"


def _shortened(text: str) -> str:
    """Return a text as one line of at most SHOWN characters."""
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def exit_code(error: Exception) -> int | None:
    """Return the exit code of an error that one line explains, None for one that needs its traceback."""
    if isinstance(error, InputError | CycloptsError | ValidationError) or missing_extra(error):
        return EXIT_BAD_INPUT
    if _path_error(error):
        return EXIT_BAD_INPUT
    if isinstance(error, LimitReached):
        return EXIT_LIMIT
    if isinstance(error, Stopped):
        return EXIT_TERMINATED
    if isinstance(error, RunError):
        return EXIT_FAILED
    # By name: the stores take long to import. An error of a subclass counts, too.
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if isinstance(error, OSError) and (error.errno in PLACE_ERRORS or "StorageError" in kinds):
        return EXIT_FAILED
    # An object that was there when the command began, and was removed under it.
    if isinstance(error, FileNotFoundError) and "://" in str(error.filename):
        return EXIT_FAILED
    return None


class _ConfigFile:
    """Options of a command from a YAML or TOML file: its keys are the options' names, with - or _ between words."""

    def __init__(self, path: Path):
        self.path = path
        self.used: set[str] = set()

    def __call__(self, app: App, names: tuple[str, ...], arguments: ArgumentCollection) -> None:
        """Give the options that the command line leaves open; cyclopts calls this."""
        options = self._read()
        for key in options.keys() & {"config", "quiet", "verbose", "log-format", "log_format"}:
            raise InputError(
                f"{self.path}: key {key!r} is not an option of the command; give --{key} on the command line"
            )
        nested = functools.reduce(lambda inner, name: {name: inner}, reversed(names), options)
        Dict(nested, source=str(self.path))(app, names, arguments)
        self.used = {
            argument.keys[0]
            for argument in arguments
            if len(argument.keys) and any(token.source == str(self.path) for token in argument.tokens)
        }

    def _read(self) -> dict[str, Any]:
        reader = _READERS.get(self.path.suffix.lower())
        if reader is None:
            raise InputError(f"--config {self.path}: not a YAML or TOML file; name it .yaml, .yml or .toml")
        try:
            with LocalStore(self.path.parent).open(self.path.name) as file:
                data = file.read(MOST_CONFIG_BYTES + 1)
            text = data.decode()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--config {self.path}: cannot be read ({error}); give a YAML or TOML file") from error
        except InputError as error:
            raise InputError(f"--config {error}") from None
        if len(data) > MOST_CONFIG_BYTES:
            raise InputError(f"--config {self.path}: file too large, at most {MOST_CONFIG_BYTES:,} bytes are read")
        try:
            found = reader(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"--config {self.path}: {error}") from error
        if not isinstance(found, dict):
            raise InputError(f"--config {self.path}: holds no options; write a line `option: value` for each")
        # An option without a value is one that is not given.
        return {str(key): value for key, value in found.items() if value is not None}


def _read_yaml(text: str) -> Any:
    import yaml

    try:
        # The loader in C, which reads what is nested deeply as quickly as other text; not every build of PyYAML has it.
        loader, depth = getattr(yaml, "CSafeLoader", yaml.SafeLoader), 0
        for event in yaml.parse(text, loader):
            # A few hundred bytes of aliases of aliases stand for more values than the memory holds.
            if isinstance(event, yaml.AliasEvent):
                raise ValueError("holds an alias (*name); write the value out")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MOST_CONFIG_DEPTH:
                raise ValueError(f"nested more than {MOST_CONFIG_DEPTH} deep; write `option: value` lines")
        return yaml.load(text, loader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


_READERS: dict[str, Callable[[str], Any]] = {".yaml": _read_yaml, ".yml": _read_yaml, ".toml": tomllib.loads}


def _option_errors(error: CycloptsError | ValidationError, file: _ConfigFile | None) -> str:
    """Return what is wrong with the options, in one line that names each of them."""
    wrong = error if isinstance(error, ValidationError) else error.__cause__
    if isinstance(wrong, ValidationError):
        fields = getattr(getattr(error, "argument", None), "children", ())
        arguments = {field.field_info.name for field in fields if field.index is not None}
        return "; ".join(_option_error(item, arguments, file) for item in wrong.errors())
    if isinstance(error, UnknownOptionError) and file and error.token.source == str(file.path):
        key = (error.token.keyword or "").strip("[]").replace("][", ".")
        return f"{file.path}: unknown key {key!r}; give an option of the command"
    if isinstance(error, UnusedCliTokensError):
        return f"unexpected argument {(error.unused_tokens or [''])[0]!r}; remove it, or write it as the value of an option"
    if isinstance(error, MissingArgumentError) and error.argument:
        if error.keyword or error.argument.tokens:
            return f"{error.keyword or error.argument.name}: no value given; give one"
        name = error.argument.name
        return f"{name.lstrip('-').upper() if error.argument.index is not None else name} is required"
    return " ".join(str(error).split())


def _option_error(item: ErrorDetails, arguments: set[str], file: _ConfigFile | None) -> str:
    message = item["msg"].removeprefix("Value error, ")
    place = [str(part) for part in item["loc"] if not isinstance(part, int)]
    if not place:
        return message
    option = ".".join(part.replace("_", "-") for part in place)
    if file and place[0] in file.used:
        name = f"{file.path}: {option}"
    else:
        name = option.upper() if place[0] in arguments else f"--{option}"
    if item["type"] == "missing":
        return f"{name} is required"
    return f"{name}: {message}" + (
        "" if isinstance(item["input"], dict) else f" (given: {_shortened(repr(item['input']))})"
    )


if __name__ == "__main__":
    sys.exit(main())
