"""Other scorers: found by name, checked at the start, their columns beside ours, their digests recorded."""

import importlib.metadata

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageFilter
from scoring.small_world import row, write_dataset

from facediffuser.cards.dataset_card import write_card
from facediffuser.dataset.added_columns import read_added_columns
from facediffuser.dataset.encoding import parquet_bytes
from facediffuser.errors import InputError
from facediffuser.evaluation.add_columns import ColumnWorker, column_stage
from facediffuser.evaluation.evaluate_settings import EvaluateSettings
from facediffuser.evaluation.evaluator import Evaluator
from facediffuser.evaluation.score_settings import ScoreSettings
from facediffuser.scoring.columns import Sharpness, column_scores, load_columns
from facediffuser.storage import StorageError, open_store
from facediffuser.tasks.local_driver import LocalDriver

pytestmark = pytest.mark.usefixtures("plain_plots")

BRIGHTNESS = "scoring.plugins:Brightness"
GREY, DARK = Image.new("RGB", (16, 16), (100, 100, 100)), Image.new("RGB", (16, 16), (40, 40, 40))


@pytest.fixture
def dataset(tmp_path):
    """Three rows: a grey picture, a dark one, a failed one; ada's reference is dark."""
    rows = [row(0, GREY), row(1, DARK, method="sdm"), row(2, None)]
    return open_store(write_dataset(tmp_path / "d", rows, {"ada": DARK}))


def add_columns(dataset, names, **others) -> list[str]:
    return LocalDriver().run(column_stage(ScoreSettings(url=dataset.url, add=names, device="cpu", **others)))


def test_sharpness_falls_with_blur_and_is_zero_for_an_even_picture(photograph):
    pictures = [photograph, *(photograph.filter(ImageFilter.GaussianBlur(width)) for width in (1, 3)), GREY]
    sharp, soft, softer, even = Sharpness("cpu").score(pictures, [], [])["sharpness"].to_pylist()
    assert sharp > 3 * soft > 9 * softer > 0 and even == 0


def test_columns_go_beside_the_shards_with_their_digests_and_twice_the_same(dataset):
    before = {info.key: dataset.get(info.key) for info in dataset.list("data/")}
    names = [BRIGHTNESS, "sharpness"]
    keys = add_columns(dataset, names, batch_size=2)
    first = [dataset.get(key) for key in keys]
    assert keys == ["scores/Brightness.parquet", "scores/sharpness.parquet"]
    assert {info.key: dataset.get(info.key) for info in dataset.list("data/")} == before
    found = pq.read_table(f"{dataset.url}/{keys[0]}")
    assert found.to_pydict() == {
        "sample_id": ["sample-00000", "sample-00001", "sample-00002"],
        "brightness": [100, 40, None],
        "reference_brightness": [40, 40, None],
        "words": [5, 5, None],
    }
    assert read_added_columns(dataset).digests() == {
        "Brightness": "b" * 64,
        "sharpness": load_columns(["sharpness"])["sharpness"].digest,
    }
    assert [dataset.get(key) for key in add_columns(dataset, names, batch_size=16)] == first
    assert not dataset.list("stats/")


def test_an_interrupted_run_is_resumed_by_shard(tmp_path, monkeypatch):
    shards = [[row(0, GREY)], [row(1, DARK)], [row(2, GREY)]]
    dataset = open_store(tmp_path / "d")
    for number, rows in enumerate(shards):
        one = open_store(write_dataset(tmp_path / f"one-{number}", rows, {"ada": DARK}))
        dataset.put(f"data/shard-{number}.parquet", one.get(one.list("data/")[0].key))
    dataset.put("subjects.parquet", one.get("subjects.parquet"))
    scored, score = [], ColumnWorker.score

    def fails_once(self, key):
        scored.append(key)
        if len(scored) == 2:
            raise StorageError("the disk is full")
        return score(self, key)

    monkeypatch.setattr(ColumnWorker, "score", fails_once)
    with pytest.raises(StorageError):
        add_columns(dataset, [BRIGHTNESS])
    assert len(dataset.list("stats/")) == 1 and not dataset.list("scores/")
    [key] = add_columns(dataset, [BRIGHTNESS])
    assert [name[-9] for name in scored] == ["0", "1", "1", "2"]
    assert pq.read_table(f"{dataset.url}/{key}")["brightness"].to_pylist() == [100, 40, 100]
    assert not dataset.list("stats/")


def test_added_columns_are_in_the_table_and_on_the_card(dataset, tmp_path):
    add_columns(dataset, [BRIGHTNESS])
    found = Evaluator(EvaluateSettings(dataset=dataset.url, output=str(tmp_path / "out"))).run()
    means = {(line.method, line.metric): line.mean for line in found.table if line.category == "all"}
    assert means["face-diffuser", "brightness"] == 100 and means["sdm", "brightness"] == 40
    assert found.digests["Brightness"] == "b" * 64
    assert pq.read_table(tmp_path / "out" / "scores.parquet")["brightness"].to_pylist() == [100, 40, None]
    write_card(dataset)
    assert "| brightness (sdm, one subject) | 40.000 |" in dataset.get("README.md").decode()


def test_a_folder_or_dataset_can_be_scored_with_others_for_one_table_only(dataset):
    found = Evaluator(EvaluateSettings(dataset=dataset.url, add=f"sharpness,{BRIGHTNESS}")).run()
    assert found.images["reference_brightness"].to_pylist() == [40, 40, None]
    assert found.images["sharpness"].to_pylist()[2] is None
    assert "| brightness |" in found.markdown and not dataset.list("scores/")


def test_two_files_with_one_column_are_refused(dataset):
    add_columns(dataset, [BRIGHTNESS])
    dataset.put("scores/copy.parquet", dataset.get("scores/Brightness.parquet"))
    with pytest.raises(InputError, match=r"copy\.parquet: column 'brightness' is there already"):
        read_added_columns(dataset)


def test_missing_weights_are_reported_before_the_first_image_and_nothing_is_written(dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("TASTE_WEIGHTS", str(tmp_path / "taste.bin"))
    given = EvaluateSettings(
        dataset=dataset.url, add="scoring.plugins:NeedsWeights", output=str(tmp_path / "out"), device="cpu"
    )
    with pytest.raises(InputError, match=r"taste\.bin: the taste's weights are missing"):
        Evaluator(given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (
            ["sharpnes"],
            "'sharpnes': no such scorer; give one of aesthetic, dlib, nsfw, onnx-face, sharpness, or module:Class",
        ),
        (["no.such.module:Scorer"], "cannot be imported"),
        (["scoring.plugins:Nothing"], "cannot be imported"),
        ([BRIGHTNESS, "scoring.plugins:Rival"], "both add 'brightness'"),
        (["json:loads"], "'json:loads': does not load"),
        (["os:getcwd"], "'os:getcwd': does not load .TypeError"),
        (["builtins:len"], "has no columns, digest and score"),
        (["scoring.plugins:Words"], "column 'words' of type string; give numbers, booleans or lists"),
        (["scoring.plugins:Clumsy"], "does not load .ZeroDivisionError"),
        (["sharpness", "scoring.plugins:sharpness"], "both write sharpness.parquet"),
    ],
)
def test_a_scorer_that_cannot_be_used_is_reported_by_name(names, says):
    with pytest.raises(InputError, match=says):
        load_columns(names)


def test_an_entry_point_names_a_scorer(monkeypatch):
    point = importlib.metadata.EntryPoint("glow", BRIGHTNESS, "facediffuser.scorers")
    points = importlib.metadata.EntryPoints([point])
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **wanted: points.select(**wanted))
    assert load_columns(["glow"])["glow"].columns.names == ["brightness", "reference_brightness", "words"]


def test_a_scorer_that_returns_too_few_rows_is_named():
    with pytest.raises(ValueError, match="scorer scoring.plugins:Short: returned 1 row "):
        column_scores(load_columns(["scoring.plugins:Short"]), [GREY, DARK], [[], []], ["a", "b"])


def test_values_that_are_not_finite_are_null_and_counted(caplog):
    table = column_scores(load_columns(["scoring.plugins:Wild"]), [GREY] * 4, [[]] * 4, ["a"] * 4)
    assert table["wild"].to_pylist() == [1.0, None, None, None]
    assert "scorer scoring.plugins:Wild: 2 values of wild not finite" in caplog.text


@pytest.mark.parametrize("name", ["Taken", "Brightness"])
def test_a_column_that_is_there_already_is_refused_before_it_is_computed(dataset, name):
    if name == "Brightness":
        copy = pa.table({"sample_id": ["a"], "brightness": [0.5]})
        dataset.put("scores/earlier.parquet", parquet_bytes(copy))
    before = dataset.list()
    with pytest.raises(InputError, match=rf"scorer {name}: adds column '.*', which .* has already"):
        column_stage(ScoreSettings(url=dataset.url, add=[f"scoring.plugins:{name}"], device="cpu"))
    assert dataset.list() == before
