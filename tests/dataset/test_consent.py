"""What people agreed to: read from subjects.csv, required, kept, told on the card, and named when it has expired."""

import datetime
import io

import pyarrow as pa
import pytest
from dataset.finished import finish_dataset
from PIL import Image

from facediffuser.cards.dataset_card import write_card
from facediffuser.dataset.consent import consent_facts, expired_subjects, require_consent, subjects_schema
from facediffuser.dataset.extension import add_references, read_references
from facediffuser.dataset.inputs import read_subjects
from facediffuser.dataset.references import encode_references
from facediffuser.dataset.schema import SUBJECTS_SCHEMA
from facediffuser.errors import InputError

pytestmark = pytest.mark.usefixtures("plain_plots")

TODAY = datetime.date(2026, 11, 27)
HEAD = "subject_id,class_word,consent,licence,source,expires\n"


@pytest.fixture
def people(tmp_path):
    sink = io.BytesIO()
    Image.new("RGB", (8, 8)).save(sink, "PNG")
    for name in ("ada", "bob"):
        (tmp_path / "people" / name).mkdir(parents=True)
        (tmp_path / "people" / name / "1.png").write_bytes(sink.getvalue())
    return tmp_path / "people"


def subjects(people, *lines):
    (people / "subjects.csv").write_text(HEAD + "".join(line + "\n" for line in lines))
    return read_subjects(str(people))


def test_terms_are_read_and_columns_stand_only_where_there_are_some(people):
    ada, bob = subjects(people, "ada,woman,signed 2025-02-01,CC BY 4.0,studio,2027-01-31", "bob,man,,,,")
    assert dict(ada.terms) == {
        "consent": "signed 2025-02-01",
        "licence": "CC BY 4.0",
        "source": "studio",
        "expires": "2027-01-31",
    }
    assert bob.terms == () and subjects_schema([bob]) == SUBJECTS_SCHEMA
    assert subjects_schema([ada, bob]).names[-4:] == ["consent", "licence", "source", "expires"]


def test_consent_can_be_required(people):
    found = subjects(people, "ada,woman,yes,,,2026-11-27", "bob,man,yes,,,")
    require_consent(found, "people", TODAY)
    with pytest.raises(InputError, match="1 subject with a consent that expired before 2026-11-28 .*ada"):
        require_consent(found, "people", TODAY + datetime.timedelta(1))
    with pytest.raises(InputError, match="1 subject with no consent .*bob"):
        require_consent(subjects(people, "ada,woman,yes,,,", "bob,man,,CC0,,"), "people", TODAY)


@pytest.mark.parametrize("date", ["soon", "2027-02-30", "31.12.2027", "2027-1-1"])
def test_what_is_no_day_is_refused_with_its_row(people, date):
    with pytest.raises(InputError, match="subjects.csv row 2: expires"):
        subjects(people, f"ada,woman,yes,,,{date}")


def test_the_card_says_it_and_expired_ones_are_named(tmp_path, people):
    store = finish_dataset(tmp_path / "dataset")
    assert consent_facts(store) == [] == expired_subjects(store, TODAY)
    found = subjects(people, "ada,woman,yes,CC BY 4.0,studio,2026-11-26", "bob,man,,,,")
    table = read_references(store)
    terms = [dict(subject.terms) for subject in found]
    for name in ("consent", "licence", "source", "expires"):
        table = table.append_column(name, pa.array([one.get(name) for one in terms], pa.string()))
    store.put("subjects.parquet", encode_references(table, table.schema))
    assert expired_subjects(store, TODAY) == [
        "subjects.parquet: consent of ada expired on 2026-11-26; `facediffuser retract` takes them out"
    ]
    assert expired_subjects(store, TODAY - datetime.timedelta(1)) == []
    write_card(store)
    readme = store.get("README.md").decode()
    assert "recorded for 1 of 2 subjects" in readme and "CC BY 4.0 (1)" in readme
    # Together with references without terms the columns stay.
    assert add_references(read_references(store), read_references(store).select(SUBJECTS_SCHEMA.names)).num_rows == 2
