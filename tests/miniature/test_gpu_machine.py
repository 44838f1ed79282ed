"""All of the two worlds on one machine without Ray and Prefect: in the smallest, cut short, and gone on with."""

import csv
import sys

import pytest

from facediffuser.pipeline import FaceDiffuserPipeline
from tools.miniature_weights import gpu
from tools.miniature_weights.make import link_shared_parts


class Refused:
    """Lets neither Ray nor Prefect be imported."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("ray", "prefect"):
            raise ModuleNotFoundError(f"{name} is not on the machine")


# Three minutes on two cores: renders, prepares, trains base, TDM and SDM, measures.
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_two_calls_train_and_measure_everything(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [Refused(), *sys.meta_path])
    words = [
        "gpu",
        str(tmp_path / "work"),
        "--results",
        str(tmp_path / "home"),
        "--small",
        "--cores",
        "2",
        "--device",
        "cpu",
    ]
    monkeypatch.setattr(sys, "argv", [*words, "--seconds", "26"])
    gpu.main()
    assert (tmp_path / "home" / "gpu.log").exists()
    monkeypatch.setattr(sys, "argv", [*words, "--seconds", "1200"])
    gpu.main()
    home = tmp_path / "home"
    for name in ("base/unet", "models/unet", "models/unet_text", "models/image_encoder", "models/subject_fuser"):
        assert list((home / "parts" / name).glob("*.safetensors")), name
    for name in ("forgetting/forgetting.png", "choice.json", "claim/claim.md", "words/words.csv", "tdm.log", "sdm.log"):
        assert (home / name).stat().st_size, name
    link_shared_parts(home / "parts")
    assert FaceDiffuserPipeline.from_pretrained(home / "parts" / "models").unet_text is not None
    with open(home / "forgetting" / "forgetting.csv") as file:
        rows = list(csv.DictReader(file))
    assert {(row["tdm_step"], row["sdm_step"]) for row in rows} == {("0", "0"), ("5", "9"), ("10", "18")}
