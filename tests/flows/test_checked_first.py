"""Bad input is refused before Prefect, Ray or torch is imported, whichever command it is given to."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from every_command import every_command
from PIL import Image
from skimage import data

from facediffuser.training import training_run as runs
from facediffuser.training.train_settings import TrainSettings

# Runs the commands one after another in a process that has imported nothing yet, and says after each what it has now.
SCRIPT = """
import contextlib, io, json, sys
from facediffuser.flows.cli import main
told = []
for args in json.load(sys.stdin):
    with contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(args)
    told.append([code, err.getvalue(), sorted({"prefect", "ray", "torch"} & sys.modules.keys())])
print(json.dumps(told))
"""


def cases(root: Path) -> dict[str, tuple[list[str], str]]:
    """Name -> a command's words and what its one line must say; made in `root`."""
    (root / "people" / "ada").mkdir(parents=True)
    Image.fromarray(data.astronaut()).save(root / "people" / "ada" / "1.png")
    texts = {"good": "{subject}", "bad": "an empty beach", "pair": "{subject_1} and {subject_2}"}
    texts["long"] = "a photo " * 90 + "of {subject}"
    for name, text in texts.items():
        (root / f"{name}.jsonl").write_text(json.dumps({"prompt": text}) + "\n")
    (root / "full").mkdir()
    (root / "full" / "thesis.txt").write_text("precious")
    demo = TrainSettings(role="tdm", data="x", base="miniature", output=str(root / "demo/training/tdm"), seed=9)
    for place in ("demo", "earlier"):
        (root / place).mkdir()
    from facediffuser.storage import open_store

    runs.begin_or_resume_training(open_store(demo.output), demo)
    (root / "photos").mkdir()
    shutil.copy(root / "people" / "ada" / "1.png", root / "photos" / "1.png")
    out, people = ["--output", str(root / "out")], ["--subjects", str(root / "people")]
    generate = ["generate", "--models", "miniature", *people, *out]
    methods = ["evaluate", "--models", "miniature", *people, *out]
    photos = ["preprocess", "--source", str(root / "photos"), "--captioner", "none", "--segmenter", "none"]
    nowhere = str(root / "nowhere")
    return {
        "generate option": (["generate", "--models", "miniature"], "give --prompts or --benchmark"),
        "generate prompts": ([*generate, "--prompts", str(root / "bad.jsonl")], "names no subject"),
        "generate sizes": ([*generate, "--prompts", str(root / "pair.jsonl")], "shows 2 subjects"),
        "generate length": ([*generate, "--prompts", str(root / "long.jsonl")], "the text encoder's input ends"),
        "generate subjects": (["generate", "--models", "miniature", "--subjects", nowhere, *out, "--prompts",
                               str(root / "good.jsonl")], "nowhere"),
        "generate models": ([*generate, "--prompts", str(root / "good.jsonl"), "--models", nowhere], "no such folder"),
        "generate scorers": ([*generate, "--prompts", str(root / "good.jsonl"), "--scorers", nowhere], "nowhere"),
        "generate output": ([*generate[:-1], str(root / "full"), "--prompts", str(root / "good.jsonl")], "thesis.txt"),
        "evaluate dataset": (["evaluate", "--dataset", str(root / "people")], "no data/*.parquet there"),
        "evaluate benchmark": ([*methods, "--benchmark", "pairs-20"], "shows 2 in an image"),
        "evaluate scorers": (["evaluate", "--images", str(root / "photos"), *people, "--prompts", "single-30"], "1.png"),
        "preprocess source": (["preprocess", "--source", nowhere, *out], "nowhere"),
        "preprocess archive": (["preprocess", "--source", f"{nowhere}.tgz", *out], "no such file"),
        "preprocess models": ([*photos[:-1], nowhere, *out], "--segmenter"),
        "preprocess output": ([*photos, "--matcher", "none", "--output", str(root / "full")], "holds something else"),
        "train data": (["train", "tdm", "--data", nowhere, "--base", "miniature", *out], "no train/*.parquet there"),
        "train output": (["train", "tdm", "--data", nowhere, "--base", "miniature", "--output", str(root / "full")],
                         "holds something else"),
        "demo": (["demo", "--output", str(root / "demo")], "holds another run (encoder_learning_rate None there, 5e-05 here"),
        "rehearse": (["rehearse", "--output", str(root / "full")], "holds 'thesis.txt'; give a new or an empty output"),
        "score": (["score", str(root / "people")], "no data/*.parquet there"),
        "copies": (["copies", str(root / "people")], "no data/*.parquet there"),
        "repair": (["repair", nowhere], "no such folder"),
        "retry-failed": (["retry-failed", str(root / "photos")], "manifest.json"),
        "merge": (["merge", str(root / "photos"), str(root / "people"), *out], "manifest.json"),
        "retract": (["retract", nowhere, "--subject", "ada"], "no such folder"),
        "export": (["export", str(root / "photos"), "--to", "lmdb", *out], "manifest.json"),
        "publish": (["publish", str(root / "photos"), "hf://datasets/org"], "give hf://datasets/ORG/NAME"),
        "miniature claim": (["miniature", "claim", "--models", nowhere, *out], "no such folder"),
    }  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, tuple]:
    """Name -> (exit code, what was printed, modules imported, what the line must say)."""
    root = tmp_path_factory.mktemp("checked first")
    given = cases(root)
    before = sorted(root.rglob("*"))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], input=json.dumps([args for args, _ in given.values()]), text=True,
        capture_output=True, check=True,
    )  # fmt: skip
    assert sorted(root.rglob("*")) == before, "nothing is written"
    told = json.loads(done.stdout.splitlines()[-1])
    return {name: (*one, says) for (name, (_, says)), one in zip(given.items(), told, strict=True)}


def test_it_is_one_line_with_exit_code_2_and_nothing_slow_was_imported(outcomes):
    for name, (code, err, imported, says) in outcomes.items():
        # Before it stands, at most, the line that says what the command starts.
        *before, line = err.splitlines()
        assert code == 2 and line.startswith("facediffuser ") and says in line, (name, code, err)
        assert len(before) <= 1 and not any("rror" in text for text in before), (name, err)
        assert not imported, (name, imported)


def test_every_command_that_starts_a_flow_is_checked_first(outcomes):
    without_flow = {"assemble", "convert", "verify", "remake", "card", "check", "explain", "miniature render"}
    checked = every_command().keys() - without_flow
    assert {next(command for command in checked if name.startswith(command)) for name in outcomes} == checked
