"""The factory as deployments, on a real Prefect server with a real worker: deployed, run, refused."""

import json
from pathlib import Path

import httpx
import pyarrow.dataset
import pytest
import yaml
from PIL import Image

from facediffuser.miniature.render import render_set

ROOT = Path(__file__).resolve().parents[2]
RUN = "generate-dataset/generate-dataset"
RUN_TIMEOUT_S = 400


@pytest.fixture(scope="module")
def deployed(prefect_house):
    done = prefect_house.command("--no-prompt", "deploy", "--all")
    assert done.returncode == 0, done.stdout + done.stderr
    return prefect_house


def _run(house, name: str, settings: dict) -> tuple[int, str]:
    """Run the deployment and return the exit code of the command that watched it, and what the run said at its end."""
    done = house.command(
        *("deployment", "run", RUN, "--flow-run-name", name, "--param", f"settings={json.dumps(settings)}"),
        *("--watch", "--watch-timeout", str(RUN_TIMEOUT_S)),
        timeout=RUN_TIMEOUT_S + 60,
    )
    (run,) = _post(house, "flow_runs/filter", {"flow_runs": {"name": {"any_": [name]}}})
    return done.returncode, f"{run['state_type']}: {run['state']['message']}"


def _post(house, path: str, body: dict | None = None) -> list[dict]:
    answer = httpx.post(f"{house.api_url}/{path}", json=body or {}, timeout=20)
    answer.raise_for_status()
    return answer.json()


@pytest.fixture(scope="module")
def smallest(tmp_path_factory) -> dict:
    """The settings of the smallest dataset: one person, one prompt, four denoising steps."""
    folder = tmp_path_factory.mktemp("inputs")
    render_set(8, 0, folder / "photos")
    people = sorted((folder / "photos" / "subjects").iterdir())
    person = next(path for path in people if path.is_dir())
    (folder / "subjects").mkdir()
    person.rename(folder / "subjects" / person.name)
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt": "a photo of {subject} in a park"}) + "\n")
    return {
        "models": "miniature",
        "subjects": str(folder / "subjects"),
        "prompts": str(folder / "prompts.jsonl"),
        "output": str(folder / "dataset"),
        "steps": 4,
        "fusion_start": 1,
        "fusion_end": 3,
        "seed": 1,
    }


def test_deploy_all_makes_the_deployments_of_prefect_yaml(deployed):
    expected = {each["name"] for each in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]}
    found = {each["name"]: each for each in _post(deployed, "deployments/filter")}
    assert set(found) == expected
    assert {each["work_pool_name"] for each in found.values()} == {"face-diffuser"}
    # Relative paths are of the clone that was deployed, wherever it stands.
    directories = [step.values() for each in found.values() for step in each["pull_steps"]]
    assert {options["directory"] for (options,) in directories} == {str(ROOT)}
    (schedule,) = found["generate-dataset"]["schedules"]
    assert schedule["active"] is True


def test_a_deployed_run_makes_the_dataset(deployed, smallest):
    code, end = _run(deployed, "smallest", smallest)
    assert code == 0, f"{end}\n{deployed.log('worker')}"

    manifest = json.loads((Path(smallest["output"]) / "manifest.json").read_text())
    table = pyarrow.dataset.dataset(Path(smallest["output"]) / "data", format="parquet").to_table()
    assert table.num_rows == 1
    assert table["status"].to_pylist() == ["ok"]
    assert sum(shard["rows"] for shard in manifest["shards"]) == 1

    artifacts = _post(deployed, "artifacts/filter")
    assert {"progress", "markdown"} <= {each["type"] for each in artifacts}


def test_an_unknown_option_makes_no_run(deployed, smallest):
    before = len(_post(deployed, "flow_runs/filter"))
    wrong = json.dumps({**smallest, "no_such_option": 1})
    done = deployed.command("deployment", "run", RUN, "--param", f"settings={wrong}")
    assert done.returncode != 0
    assert len(_post(deployed, "flow_runs/filter")) == before


def test_a_run_with_bad_input_fails_with_its_one_line(deployed, smallest, tmp_path):
    (tmp_path / "subjects" / "nobody").mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(tmp_path / "subjects" / "nobody" / "0.png")
    wrong = {**smallest, "subjects": str(tmp_path / "subjects"), "output": str(tmp_path / "dataset")}
    code, end = _run(deployed, "faceless", wrong)
    assert code != 0
    assert end.startswith("FAILED")
    assert "nobody/0.png: no face" in end
    assert not (tmp_path / "dataset").exists()
