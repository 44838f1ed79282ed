"""The command line says no in one line with exit code 2, and gives each flow exactly the settings that were typed."""

import pytest
from pydantic import BaseModel, ConfigDict, Field

from facediffuser.errors import InputError
from facediffuser.flows.cli import COMMANDS, _load, main, parse_settings


class Settings(BaseModel):
    """Settings of a test."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: str = Field(description="which", pattern="tdm|sdm")
    data: str = Field(description="where")
    batch_size: int = Field(8, ge=1, description="how many")
    resume: bool = Field(False, description="go on")


def parse(*args: str) -> BaseModel:
    return parse_settings(Settings, list(args), "facediffuser train", ("role",))


def test_options_are_the_fields_and_untyped_ones_keep_their_default():
    settings = parse("tdm", "--data", "here", "--resume")
    assert settings == Settings(role="tdm", data="here", resume=True)
    assert settings.model_fields_set == {"role", "data", "resume"}


def test_the_environment_sets_no_option(monkeypatch):
    monkeypatch.setenv("DATA", "from the environment")
    monkeypatch.setenv("BATCH_SIZE", "99")
    with pytest.raises(InputError, match="--data is required"):
        parse("tdm")
    assert parse("tdm", "--data", "here").batch_size == 8


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["tdm"], "--data is required"),
        (["tdm", "--data", "d", "--batch-size", "0"], "--batch-size: Input should be greater than or equal to 1"),
        (["tdm", "--data", "d", "--batch-size", "many"], "--batch-size: Input should be a valid integer"),
        (["both", "--data", "d"], "ROLE: "),
        (["tdm", "--data", "d", "--batch", "3"], "--batch"),
        (["tdm", "--data"], "--data: expected one argument"),
    ],
)
def test_a_wrong_option_is_told_in_one_line(args, line):
    with pytest.raises(InputError) as error:
        parse(*args)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_command_names_the_known_ones_and_exits_2(capsys):
    assert main(["generat"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "'generat'" in message and "generate" in message


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    told = capsys.readouterr().out
    assert all(name in told for name in COMMANDS)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_help_made_from_its_settings(name, capsys):
    command = COMMANDS[name]
    model = _load(command.settings)
    assert callable(_load(command.function))
    with pytest.raises(SystemExit) as stop:
        parse_settings(model, ["--help"], f"facediffuser {name}", command.positional)
    assert stop.value.code == 0
    told = capsys.readouterr().out
    for field, info in model.model_fields.items():
        assert info.description, f"{model.__name__}.{field} has no description"
        name = field.replace("_", "-")
        assert (name.upper() if field in command.positional else f"--{name}") in told
