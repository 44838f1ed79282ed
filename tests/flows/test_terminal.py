"""What a command shows: the product's own lines; those of Prefect, Ray and other libraries with --verbose only."""

import io
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from facediffuser.errors import InputError, LimitReached, RunError, Stopped
from facediffuser.flows.cli import exit_code, main
from facediffuser.flows.product_flow import show_log
from facediffuser.flows.terminal import Verbosity, shown
from facediffuser.json_log import FORMAT_VARIABLE, JsonFormatter, log_json
from facediffuser.tasks.progress import Progress

OURS = re.compile(r"\d\d:\d\d:\d\d ")


@pytest.mark.parametrize(
    ("verbosity", "expected"),
    [
        (Verbosity.QUIET, ["warning: is slow"]),
        (Verbosity.NORMAL, ["begins", "warning: is slow"]),
        (
            Verbosity.VERBOSE,
            [
                "facediffuser.tasks.generate: begins",
                "facediffuser.tasks.generate: warning: is slow",
                "library: begins",
                "library: warning: is slow",
            ],
        ),
    ],
)
def test_which_lines_are_shown(verbosity, expected, capsys):
    levels = logging.getLogger().level, logging.getLogger("facediffuser").level
    with shown(verbosity):
        for name in ("facediffuser.tasks.generate", "library"):
            logging.getLogger(name).info("begins")
            logging.getLogger(name).warning("is slow")
    assert [OURS.sub("", line) for line in capsys.readouterr().err.splitlines()] == expected
    assert (logging.getLogger().level, logging.getLogger("facediffuser").level) == levels


@pytest.mark.parametrize(("verbosity", "expected"), [
    (Verbosity.QUIET, ["is slow"]), (Verbosity.NORMAL, ["begins", "is slow"]),
])  # fmt: skip
def test_a_line_of_json_is_written_once_and_quiet_holds_in_a_flow(verbosity, expected, capsys, monkeypatch):
    monkeypatch.setenv(FORMAT_VARIABLE, "json")
    product = logging.getLogger("facediffuser")
    handlers = list(product.handlers)
    try:
        with shown(verbosity):
            for _ in range(2):  # a flow in a flow
                show_log(None, None, None)
            logging.getLogger("facediffuser.tasks.generate").info("begins")
            logging.getLogger("facediffuser.tasks.generate").warning("is slow")
        assert [json.loads(line)["message"] for line in capsys.readouterr().err.splitlines()] == expected
    finally:
        product.handlers[:] = handlers


@pytest.mark.parametrize("propagate", [True, False])
def test_a_logger_gets_json_of_its_own_where_no_line_of_it_is_written_as_json(propagate, monkeypatch):
    above, below = logging.Logger("above"), logging.Logger("below")
    below.parent, below.propagate = above, propagate
    plain, written = logging.StreamHandler(io.StringIO()), logging.StreamHandler(io.StringIO())
    written.setFormatter(JsonFormatter())
    above.addHandler(plain)
    log_json(below)
    assert len(below.handlers) == 1
    below.handlers.clear()
    above.addHandler(written)
    log_json(below)
    log_json(below)
    assert len(below.handlers) == (0 if propagate else 1)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("verbosity", "bar"), [(Verbosity.QUIET, False), (Verbosity.NORMAL, True)])
def test_a_bar_is_shown_where_lines_are(verbosity, bar, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with shown(verbosity), Progress(2, "images", "Generate") as progress:
        progress.advance(2)
    assert ("100%" in terminal.getvalue()) == bar and bool(terminal.getvalue()) == bar


@pytest.mark.parametrize("verbosity", Verbosity)
def test_bars_of_libraries_are_shown_with_verbose_alone(verbosity):
    script = f"""
from facediffuser.flows.terminal import Verbosity, shown
with shown(Verbosity.{verbosity.name}):
    from tqdm.auto import tqdm
    list(tqdm(range(3), desc="Loading pipeline components..."))
"""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("TQDM_")}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=clean)
    assert bool(done.stderr) == (verbosity is Verbosity.VERBOSE)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("bad"), 2),
        (RunError("3 of 9 rows failed"), 1),
        (Stopped("stopped"), 143),
        (LimitReached("stopped"), 3),
        (OSError(28, "No space left on device"), 1),
        (FileNotFoundError(2, "no such object", "s3://bucket/plan/part"), 1),
        (FileNotFoundError(2, "No such file or directory", "a file of ours"), None),
        (RuntimeError("a fault of ours"), None),
    ],
)
def test_exit_codes(error, code):
    assert exit_code(error) == code


@pytest.mark.parametrize(
    ("error", "line", "code"),
    [
        (RunError("3 of 9 rows failed"), "facediffuser miniature render: 3 of 9 rows failed", 1),
        (KeyboardInterrupt(), "facediffuser miniature render: interrupted; run the same command again to resume", 130),
    ],
)
def test_an_expected_end_of_a_run_is_one_line(error, line, code, capsys, monkeypatch):
    def render(*arguments):
        raise error

    monkeypatch.setattr("facediffuser.miniature.render.render_set", render)
    assert main(["miniature", "render", "--count", "1", "--output", "o", "--quiet"]) == code
    assert capsys.readouterr().err.splitlines() == [line]


def test_lines_of_ray_s_core_are_dropped_and_others_kept():
    script = """
import os, sys
from facediffuser.flows.terminal import Verbosity, shown
with shown(Verbosity.NORMAL):
    os.write(2, b"[2026-11-27 08:37:18,012 E 17541 17541] core_worker.cc:2465: Actor ...\\n")
    print("ours", file=sys.stderr)
os.write(2, b"after\\n")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "core_worker" not in done.stderr
    assert {"ours", "after"} <= set(done.stderr.splitlines())


# A whole run with Prefect and Ray in a process of its own: most of a minute.
@pytest.mark.slow
def test_a_healthy_run_shows_the_product_s_lines_alone(tmp_path: Path):
    people = ["miniature", "render", "--count", "2", "--seed", "1", "--output", str(tmp_path / "photos"), "--quiet"]
    assert main(people) == 0
    command = [
        *(sys.executable, "-m", "facediffuser.flows.cli", "generate", "--models", "miniature", "--steps", "2"),
        *("--subjects", str(tmp_path / "photos/subjects"), "--prompts", str(tmp_path / "photos/prompts.jsonl")),
        *("--output", str(tmp_path / "dataset"), "--subject-sets", "1"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if not OURS.match(line)] == []
    assert done.stderr.splitlines()[0].endswith(f"with miniature in {tmp_path / 'dataset'}")
    assert done.stdout.lstrip().startswith(f"{tmp_path / 'dataset'}: ")
