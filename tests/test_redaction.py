"""Credentials in URLs: refused in every option, by Prefect's check of parameters too, and shown nowhere."""

import json
import re

import jsonschema
import pytest
from pydantic import ValidationError

from facediffuser.errors import InputError
from facediffuser.evaluation.evaluate_settings import EvaluateSettings
from facediffuser.evaluation.score_settings import CopySettings, ScoreSettings
from facediffuser.explain_settings import ExplainSettings
from facediffuser.flows import flow_settings
from facediffuser.flows.cli import main
from facediffuser.generation.generate_settings import GenerateSettings, RemakeSettings, RepairSettings, RetrySettings
from facediffuser.preprocess.preprocess_settings import PreprocessSettings
from facediffuser.redaction import JSON_PATTERN, has_credentials, redacted
from facediffuser.training.train_settings import TrainSettings

BAD = [
    "s3://user:MARKED@b",
    "s3://MARKED@b/prefix",
    "S3://user:MARKED@b",
    "s3:/user:MARKED@b",
    "https://user:MARKED@host/x",
    "https://user:SEC/MARKED@host/x",
    "https://user:SEC RET MARKED@host/x",
    "https://user:p@MARKED@host/x",
    "https://:MARKED@host",
    "https://user:MARKED@[::1]:9000/x",
    "fastcomposer=s3://user:MARKED@b/x",
    "user:MARKED@host/x",
    "user:SE/MARKED@host",
    "s3://b/x?X-Amz-Signature=MARKED",
    "s3://b/x?a=1&x-amz-security-token=MARKED&b=2",
    "https://b.s3.amazonaws.com/x?AWSAccessKeyId=MARKED&Signature=MARKED",
    "https://host/x?sig=MARKED",
    "https://host/x?X-Goog-Credential=MARKED",
    "https://host/x?ACCESS_TOKEN=MARKED",
    "https://host/x?password=MARKED",
]
GOOD = [
    "miniature", "out/mine", "/data/people", "s3://bucket/prefix", "s3://bucket/a@b/c", "file:///data/a@b", "./a@b",
    "org/model", "org/model@v1", "http://127.0.0.1:9000/x", "a photo of {subject}, 4:3", "module:Class", "cuda:1",
    "s3://b/x?versionId=3", "C:\\data\\x", "a woman, mail her: ada@host.org", "ada+bob~p0~1", "",
]  # fmt: skip
SETTINGS = [
    GenerateSettings, RepairSettings, RetrySettings, RemakeSettings, EvaluateSettings, ScoreSettings, CopySettings,
    ExplainSettings, PreprocessSettings, TrainSettings, flow_settings.DemoSettings, flow_settings.ClaimSettings,
    flow_settings.AssembleSettings, flow_settings.ConvertSettings, flow_settings.RenderSettings,
]  # fmt: skip


@pytest.mark.parametrize("text", BAD)
def test_a_credential_is_found_refused_by_the_schema_and_shown_in_no_error(text):
    assert has_credentials(text) and not re.search(JSON_PATTERN, text)
    for message in (text, f"{text}: no such folder", f"--output: wrong (given: {text!r})", f'cannot read "{text}"'):
        assert "MARKED" not in redacted(message)
        assert "MARKED" not in str(InputError(message))
        assert redacted(redacted(message)) == redacted(message)


@pytest.mark.parametrize("text", GOOD)
def test_what_carries_no_credential_is_left_as_it_is(text):
    assert not has_credentials(text) and re.search(JSON_PATTERN, text)
    for message in (text, f"{text}: no such folder (given: {text!r})"):
        assert redacted(message) == message


def text_fields(model) -> dict[str, dict]:
    """Name -> schema of the fields that take text or lists of it, without those of fixed choices."""
    return {
        name: schema for name, schema in model.model_json_schema()["properties"].items() if "pattern" in str(schema)
    }


@pytest.mark.parametrize("model", SETTINGS, ids=lambda model: model.__name__)
def test_every_text_option_refuses_credentials_and_shows_none(model):
    fields = text_fields(model)
    named = {"url", "output", "models", "base", "source", "data", "tdm", "sdm", "subjects", "prompts", "dataset"}
    assert (named & model.model_fields.keys()) - fields.keys() <= {"subjects", "prompts"}
    others = {"prompts": "p.jsonl"} if model is GenerateSettings else {}
    validator = jsonschema.Draft202012Validator(model.model_json_schema())
    for name in fields:
        for bad in (BAD[0], BAD[4], BAD[13]):
            for value in (bad, [bad]):
                with pytest.raises(ValidationError) as error:
                    model.model_validate(others | {name: value})
                assert "MARKED" not in str(error.value)
                lines = [item for item in error.value.errors() if item["loc"][:1] == (name,)]
                # A benchmark is looked up before the fields are read.
                assert name == "benchmark" or "cannot carry credentials" in lines[0]["msg"]
            paths = {problem.path[0] for problem in validator.iter_errors({name: bad}) if problem.path}
            lists = {problem.path[0] for problem in validator.iter_errors({name: [bad]}) if problem.path}
            assert name in paths and name in lists


COMMANDS = {
    "generate": ["--models", "--subjects", "--prompts", "--output", "--scorers", "--measured-by"],
    "preprocess": ["--source", "--output", "--captioner", "--segmenter", "--matcher", "--earlier"],
    "train": ["--data", "--base", "--output", "--start-from", "--image-encoder", "--cache"],
    "evaluate": ["--dataset", "--images", "--scorers", "--output", "--subjects"],
    "explain": ["--models", "--output", "--reference"],
    "assemble": ["--base", "--tdm", "--sdm", "--output"],
    "convert": ["--base", "--image-encoder", "--tdm", "--sdm", "--output"],
    "demo": ["--output"],
    "rehearse": ["--output"],
    "verify": [""],
    "card": [""],
    "score": [""],
    "repair": [""],
    "remake": ["--dataset", "--output", "--models"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("bad", [BAD[0], BAD[4], BAD[13]])
def test_the_command_line_refuses_them_in_one_line_without_showing_them(command, bad, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for option in COMMANDS[command]:
        others = ["--prompts", "p.jsonl"] if command == "generate" else []
        assert main([command, *others, *([option] if option else []), bad, "--quiet"]) == 2
        said = "".join(capfd.readouterr())
        assert "MARKED" not in said and "cannot carry credentials" in said and len(said.splitlines()) == 1, said
    assert list(tmp_path.iterdir()) == []


def test_a_config_file_with_credentials_is_refused_without_showing_them(tmp_path, capfd):
    (tmp_path / "o.yaml").write_text(json.dumps({"models": "miniature", "output": BAD[0]}))
    assert main(["generate", "--config", str(tmp_path / "o.yaml"), "--quiet"]) == 2
    assert "MARKED" not in "".join(capfd.readouterr())


def test_a_prefect_server_refuses_them_before_it_stores_anything(prefect_harness):
    from prefect.client.orchestration import get_client
    from prefect.exceptions import PrefectHTTPStatusError

    from facediffuser.flows.generate_dataset import generate_dataset

    name = "refuses-credentials"
    deployment = generate_dataset.to_deployment(name, enforce_parameter_schema=True).apply()
    good = {"models": "miniature", "subjects": "people", "prompts": "p.jsonl", "output": "s3://bucket/prefix"}
    with get_client(sync_client=True) as client:
        run = client.create_flow_run_from_deployment(deployment, parameters={"settings": good})
        assert run.parameters["settings"]["output"] == "s3://bucket/prefix"
        for field in good:
            for bad in (BAD[0], BAD[4], BAD[13], BAD[15]):
                with pytest.raises(PrefectHTTPStatusError) as error:
                    client.create_flow_run_from_deployment(deployment, parameters={"settings": good | {field: bad}})
                assert error.value.response.status_code in (409, 422)
        stored = [each.parameters for each in client.read_flow_runs() if each.deployment_id == deployment]
    assert len(stored) == 1 and "MARKED" not in str(stored)
