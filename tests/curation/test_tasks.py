"""The tasks of merge, retract, export and publish: what cannot be done is refused before Ray is started."""

import pytest

from facediffuser.curation.curation_settings import ExportSettings, MergeSettings, PublishSettings, RetractSettings
from facediffuser.errors import InputError
from facediffuser.tasks import curate


@pytest.mark.parametrize(
    ("task", "settings"),
    [
        (curate.merge_datasets, lambda one, other: MergeSettings(urls=[one, one], output=other)),
        (curate.retract_subject, lambda one, other: RetractSettings(url=one, subject="ann")),
        (curate.export_subset, lambda one, other: ExportSettings(url=one, output=other, to="imagefolder")),
        (curate.publish_dataset, lambda one, other: PublishSettings(places=[one, "hf://datasets/org/name"])),
    ],
)
def test_a_dataset_that_is_none_is_refused_before_ray_is_started(task, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(curate, "chosen_driver", lambda: pytest.fail("Ray is started"))
    (tmp_path / "dataset").mkdir()
    with pytest.raises(InputError):
        task.fn(settings(str(tmp_path / "dataset"), str(tmp_path / "output")))
    assert list(tmp_path.iterdir()) == [tmp_path / "dataset"]
