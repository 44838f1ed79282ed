"""The command line gives each flow exactly the settings that were typed, and refuses anything else in one line."""

import json
import re
import subprocess
import sys
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
from every_command import every_command
from pydantic import BaseModel

from facediffuser import __version__
from facediffuser.flows.cli import app, main
from facediffuser.settings import Settings

COMMANDS = every_command()
# What a command needs beside the option under test; values that only fit together, and those no kind can tell.
NEEDED = {
    "preprocess": "--source s --output o",
    "train": "tdm --data d --base b --output o",
    "assemble": "--base b --tdm t --sdm s --output o",
    "convert": "--base b --image-encoder i --sdm s --tdm t --output o",
    "generate": "--models m --subjects s --prompts p --output o --max-workers 9",
    "evaluate": "--dataset d --subjects s --models m --output o --prompts p",
    "check": "--models m",
    "explain": "--models m --prompt p --reference r",
    "miniature render": "--count 1 --output o",
    "rehearse": "--output o",
    **dict.fromkeys(("score", "copies", "verify", "repair", "retry-failed", "card"), "url"),
    "remake": "a~b~0 --dataset d",
    "merge": "one two --output o",
    "retract": "url --subject s",
    "export": "url --to lmdb --output o",
    "publish": "one hf://datasets/a/b",
}
SPECIAL = {
    ("generate", "benchmark"): ("--models m --subjects s --output o", "pairs-20"),
    ("generate", "workers"): ("--models m --subjects s --prompts p --output o", 3),
    ("generate", "negative_prompt"): (NEEDED["generate"], "a hat"),
    ("generate", "fast_scheduler"): (NEEDED["generate"] + " --speed fast", "euler"),
    ("generate", "merged"): (NEEDED["generate"] + " --encoder-every 2", True),
    ("generate", "max_cost"): (NEEDED["generate"] + " --gpu-hour-price 2", 9.0),
    ("miniature claim", "fusion_end"): ("", 12),
    ("merge", "urls"): ("--output o", ["one", "two"]),
    ("publish", "places"): ("", ["one", "hf://datasets/a/b"]),
    **{
        (name, "device"): (NEEDED[name], "cuda:1")
        for name in ("evaluate", "score", "copies", "check", "explain", "rehearse")
    },
    **{(name, "fusion_end"): (NEEDED[name], 40) for name in ("generate", "evaluate", "explain")},
}


def example(name: str, kind: Any, metadata: tuple = ()) -> Any:
    """Return a value that a field of this kind takes and that is no default."""
    if get_origin(kind) is Annotated:
        kind, *metadata = get_args(kind)
    options = get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        return example(name, next(one for one in options if one is not NoneType), metadata)
    if get_origin(kind) is Literal:
        return options[-1]
    if get_origin(kind) is list:
        return [example(name, options[0]), example(name, options[0])]
    if kind is bool:
        return True
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        fields = kind.model_fields.items()
        return kind(**{part: example(part, info.annotation, tuple(info.metadata)) for part, info in fields})
    if kind in (int, float):
        most = min([getattr(one, "le", getattr(one, "lt", 2)) for one in metadata], default=2)
        least = max([getattr(one, "ge", getattr(one, "gt", 0)) for one in metadata], default=0)
        return kind(least + 1) if least + 1 < most or kind is int else (least + most) / 2
    return kind(f"some/{name}")


def options() -> list[tuple[str, str]]:
    return [
        (command, field)
        for command, model in COMMANDS.items()
        for field in model.model_fields
        if field != model.positional
    ]


def parse(*words: str) -> Settings:
    command, bound, _ = app.parse_args(words, exit_on_error=False, print_error=False)
    return bound.arguments["settings"] if bound.arguments else every_command()[" ".join(words)]()


@pytest.mark.parametrize(("command", "field"), options())
def test_every_option_of_every_command_can_be_given_on_a_command_line(command, field):
    model = COMMANDS[command]
    info = model.model_fields[field]
    needed, value = SPECIAL.get((command, field), (NEEDED.get(command, ""), None))
    value = example(field, info.annotation, info.metadata) if value is None else value
    name = f"--{field.replace('_', '-')}"
    if isinstance(value, BaseModel):
        given = [(f"{name}.{part.replace('_', '-')}", one) for part, one in value.model_dump().items()]
    else:
        given = [(name, one) for one in (value if isinstance(value, list) else [value])]
    words = [word for option, one in given for word in ([option] if one is True else [option, str(one)])]
    before = [word for word in needed.split() if word]
    # An option that the command needs anyhow is given once, with this value.
    if name in before:
        place = before.index(name)
        before[place : place + 2] = []
    settings = parse(*command.split(), *before, *words)
    assert getattr(settings, field) == value
    assert field in settings.model_fields_set


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_every_option_and_an_example(command, capsys):
    assert main([*command.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    assert re.search(rf"^ facediffuser {command} ", shown, re.MULTILINE) or f" facediffuser {command}\n" in shown
    for field in COMMANDS[command].model_fields:
        name = field.replace("_", "-")
        assert (name.upper() if field == COMMANDS[command].positional else f"--{name}") in shown
    assert all(option in shown for option in ("--config", "--quiet", "--verbose"))


def described(model: type[BaseModel], path: str = "") -> list[tuple[str, str]]:
    """Return the descriptions of all fields, also of models inside."""
    found = []
    for name, info in model.model_fields.items():
        found.append((f"{path}{name}", info.description or ""))
        for kind in (info.annotation, *get_args(info.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                found += described(kind, f"{path}{name}.")
    return found


@pytest.mark.parametrize("model", sorted(set(COMMANDS.values()), key=lambda model: model.__name__))
def test_descriptions_survive_being_rendered_as_markdown(model):
    for name, text in described(model, f"{model.__name__}."):
        assert text, f"{name} has no description"
        outside = re.sub(r"`[^`]*`", "", text)
        assert not re.search(r"[<>`*_]|://", outside), f"{name}: put into backticks: {text}"


def test_options_that_are_not_typed_keep_their_default_and_count_as_not_given():
    settings = parse("train", "tdm", "--data", "here", "--base", "b", "--output", "o", "--resume")
    assert (settings.role, settings.data, settings.resume, settings.workers) == ("tdm", "here", True, None)
    assert settings.model_fields_set == {"role", "data", "base", "output", "resume"}


@pytest.mark.parametrize(
    "words", [["--methods", "tdm,sdm"], ["--methods", "tdm", "--methods", "sdm"], ["--methods=tdm, sdm"]]
)
def test_a_list_is_given_with_commas_or_by_repeating_the_option(words):
    assert parse("evaluate", "--dataset", "d", *words).methods == ["tdm", "sdm"]


def test_the_environment_sets_no_option(monkeypatch, capsys):
    monkeypatch.setenv("URL", "from the environment")
    monkeypatch.setenv("FACEDIFFUSER_VERIFY_URL", "from the environment")
    assert main(["verify"]) == 2
    assert capsys.readouterr().err == "facediffuser verify: URL is required\n"


TRAIN = ["train", "tdm", "--data", "d", "--base", "b", "--output", "o"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["train", "tdm"], "train: --data is required; --base is required; --output is required"),
        ([*TRAIN, "--batch-size", "0"], "train: --batch-size: Input should be greater than or equal to 1 (given: '0')"),
        ([*TRAIN, "--batch-size", "many"], "train: --batch-size: Input should be a valid integer"),
        (["train", "other", *TRAIN[2:]], "train: ROLE: Input should be 'tdm', 'sdm' or 'both' (given: 'other')"),
        ([*TRAIN, "--batch", "3"], "train: Unknown option: --batch. Did you mean --batch-size?"),
        ([*TRAIN, "--batch-size"], "train: --batch-size: no value given"),
        ([*TRAIN, "more"], "train: unexpected argument 'more'"),
        ([*TRAIN, "--augmentation.zoom", "2"], "train: --augmentation.zoom: Input should be less than or equal to 1"),
        (["evaluate"], "evaluate: nothing to evaluate; give --dataset or --images"),
        (["evaluate", "--dataset", "d", "--methods", "ours"], "evaluate: --methods: Input should be 'face-diffuser', "),
        (["miniature", "render", "--count", "1", "--output", "o", "--size", "96"], "--size: Input should be 64 or 128"),
        (["miniature", "claim", "--steps", "0"], "facediffuser miniature claim: --steps: "),
        (["generat"], 'facediffuser: Unknown command "generat". Did you mean "generate"?'),
        (["miniature", "rende"], 'Unknown command "rende". Did you mean "render"?'),
    ],
)
def test_wrong_words_are_refused_in_one_line_that_names_them(words, line, capsys):
    assert main(words) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1
    assert line in shown.err and shown.err.startswith("facediffuser")


def test_the_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"facediffuser {__version__}"


@pytest.fixture
def parsed(monkeypatch) -> list[Settings]:
    """The settings that the command `miniature render` was run with, which renders nothing here."""
    seen: list[Settings] = []

    def render(count, seed, output, size, pairs, actions, world, workers):
        seen.append((count, seed, str(output), size, pairs, actions))

    monkeypatch.setattr("facediffuser.miniature.render.render_set", render)
    return seen


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("render.yaml", "count: 3\noutput: from/file\nsize: 128\nseed:\npairs: 0\n"),
        ("render.yml", "{count: 3, output: from/file, size: 128, pairs: 0.0}"),
        ("render.toml", 'count = 3\noutput = "from/file"\nsize = 128\npairs = 0\n'),
    ],
)
def test_a_file_gives_the_options_that_the_command_line_leaves_open(name, text, tmp_path, parsed):
    (tmp_path / name).write_text(text)
    words = ["miniature", "render", "--config", str(tmp_path / name)]
    assert main(words) == 0
    assert main([*words, "--count", "5", "--size", "64"]) == 0
    assert parsed == [(3, 0, "from/file", 128, 0.0, None), (5, 0, "from/file", 64, 0.0, None)]


def test_a_list_on_the_command_line_replaces_that_of_the_file(tmp_path):
    from facediffuser.flows import cli

    (tmp_path / "table.yaml").write_text("dataset: [one, two]\nmethods: tdm,sdm\nsubjects_per_image: 2\n")
    cli.app.config = (cli._ConfigFile(tmp_path / "table.yaml"),)
    try:
        settings = parse("evaluate", "--methods", "fastcomposer")
    finally:
        cli.app.config = ()
    assert (settings.dataset, settings.methods, settings.subjects_per_image) == (["one", "two"], ["fastcomposer"], 2)


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("a.yaml", "count: 1\noutput: o\nsides: 64\n", "a.yaml: unknown key 'sides'"),
        ("a.yaml", "count: 1\noutput: o\nverify: 64\n", "a.yaml: unknown key 'verify'"),
        ("a.yaml", "count: 1\noutput: o\nquiet: true\n", "a.yaml: key 'quiet'"),
        (
            "a.toml",
            "count = 0\noutput = 'o'\n",
            "a.toml: count: Input should be greater than or equal to 1 (given: '0')",
        ),
        ("a.toml", "count = \n", "a.toml: "),
        ("a.yaml", "count: [1\n", "a.yaml: "),
        ("a.yaml", "- count\n", "a.yaml: holds no options"),
        ("a.json", "{}", "not a YAML or TOML file"),
        (None, "", "cannot be read"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line_that_names_it_and_the_key(name, text, line, tmp_path, capsys, parsed):
    if name:
        (tmp_path / name).write_text(text)
    assert main(["miniature", "render", "--config", str(tmp_path / (name or "none.yaml"))]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("facediffuser miniature render: ") and line in shown and shown.count("\n") == 1
    assert not parsed


def test_quiet_shows_the_result_alone(capsys, parsed):
    words = ["miniature", "render", "--count", "1", "--output", "o"]
    assert main(words) == 0
    assert "Rendering 1 picture in o" in capsys.readouterr().err
    assert main([*words, "--quiet"]) == 0
    shown = capsys.readouterr()
    assert shown.err == "" and shown.out.startswith("o: 1 picture,")


def test_help_version_verify_and_card_import_neither_torch_nor_ray_nor_prefect(tmp_path):
    script = """
import json, sys
from facediffuser.flows.cli import main
codes = [main(words) for words in json.load(sys.stdin)]
print(json.dumps([codes, sorted({"prefect", "ray", "torch", "transformers"} & sys.modules.keys())]))
"""
    commands = [["--help"], ["generate", "--help"], ["--version"], ["verify", str(tmp_path)], ["card", str(tmp_path)]]
    done = subprocess.run(
        [sys.executable, "-c", script], input=json.dumps(commands), capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout.splitlines()[-1]) == [[0, 0, 0, 2, 2], []]


def test_of_an_option_given_twice_the_last_one_counts(parsed):
    assert main(["miniature", "render", "--count", "1", "--output", "o", "--count", "2", "--output", "p"]) == 0
    assert parsed == [(2, 0, "p", 64, None, None)]
