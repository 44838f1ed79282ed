"""The lines that docs/read.md and a dataset's own card give a reader work as they stand, failed rows and nulls included."""

import re
from pathlib import Path

import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scoring.small_world import row, write_dataset

from facediffuser.cards.dataset_card import write_card
from facediffuser.dataset import open_dataset
from facediffuser.dataset.schema import DATASET_SCHEMA, with_marks
from facediffuser.errors import InputError
from facediffuser.storage import open_store

pytestmark = pytest.mark.usefixtures("plain_plots")

ROOT = Path(__file__).resolve().parents[2]
GREEN = Image.new("RGB", (64, 64), (0, 160, 0))


@pytest.fixture
def dataset(tmp_path, monkeypatch) -> Path:
    """Ten rows, the last of which failed, with a card beside them; caches lie in the test's own folder."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [*(row(number, GREEN, ip=number / 10, pc=0.3, category=None) for number in range(9)), row(9, None)]
    folder = Path(write_dataset(tmp_path / "out" / "demo" / "dataset", rows, {"ada": GREEN}))
    schema = with_marks(DATASET_SCHEMA, "0" * 64, {}, synthetic=True)
    for path in (folder / "data").iterdir():
        pq.write_table(pq.read_table(path).replace_schema_metadata(schema.metadata), path)
    write_card(open_store(folder))
    return folder


def lines_below(text: str, heading: str) -> str:
    """The first block of Python after a heading."""
    return re.search(rf"{heading}.*?```python\n(.*?)```", text, re.DOTALL)[1]


def require_what_they_say(found: dict) -> None:
    assert [len(found[name]) for name in ("made", "columns")] == [9, 9]
    assert found["batch"]["image"].shape == (8, 3, 64, 64) and str(found["batch"]["image"].dtype) == "torch.uint8"
    assert len(found["batch"]["prompt"]) == 8 and found["batch"]["ip"].shape == (8,)


def test_the_documents_lines(dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec(lines_below((ROOT / "docs" / "read.md").read_text(), "# Reading a dataset"), found)
    require_what_they_say(found)
    assert found["good"].num_rows == 3 and found["rows"].count_rows() == 10


def test_the_cards_lines(dataset, monkeypatch):
    monkeypatch.chdir(dataset)
    found: dict = {}
    exec(lines_below((dataset / "README.md").read_text(), "## Reading it"), found)
    require_what_they_say(found)
    assert found["table"].num_rows == 3


def test_a_dataset_is_opened_at_its_root_where_pyarrow_alone_meets_other_files(dataset, tmp_path):
    with pytest.raises(Exception, match="README.md"):
        ds.dataset(str(dataset))
    assert open_dataset(str(dataset)).count_rows(filter=ds.field("status") == "failed") == 1
    with pytest.raises(InputError, match="no data/"):
        open_dataset(str(tmp_path))


def test_a_dataset_on_s3_is_opened_at_its_root(dataset, s3_bucket):
    store = open_store(f"{s3_bucket.url}/people/dataset")
    for path in (path for path in dataset.rglob("*") if path.is_file()):
        store.put(path.relative_to(dataset).as_posix(), path.read_bytes())
    table = open_dataset(store.url).to_table(["ip"], filter=ds.field("ip") > 0.5)
    assert table.num_rows == 3
