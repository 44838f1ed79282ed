"""A resumable run: what is another run and refused, what is another provenance and warned of."""

import json

import pytest

from facediffuser.errors import InputError
from facediffuser.runs import (
    Run,
    begin_or_resume,
    check_provenance,
    count_provenances,
    current_provenance,
    differences,
    fingerprint_of,
    identity_of,
    provenance_of,
)

IDENTITY = {"settings": {"steps": 30, "seed": 0}, "models": {"unet": "a"}}
# As an earlier version wrote it: provenance among the rest.
OLD = {
    "settings": {"steps": 30, "seed": 0, "threads": 1},
    "models": {"unet": "a"},
    "libraries": {"pillow": "11.0"},
    "code": "0.1.0",
}


def test_a_new_run_is_marked_by_its_identity_alone():
    run = begin_or_resume(IDENTITY, None)
    assert run == Run(IDENTITY, fingerprint_of(IDENTITY))
    assert begin_or_resume(dict(reversed(IDENTITY.items())), run).fingerprint == run.fingerprint


def test_a_run_of_an_earlier_version_is_resumed_under_its_own_fingerprint():
    there = Run(OLD, fingerprint_of(OLD))
    assert identity_of(OLD) == IDENTITY
    assert begin_or_resume(IDENTITY, there) is there
    assert provenance_of(OLD) == {"libraries": {"pillow": "11.0"}, "code": "0.1.0", "threads": 1}
    assert provenance_of(IDENTITY) == {}


@pytest.mark.parametrize("there", [OLD, IDENTITY])
def test_another_identity_is_another_run(there):
    other = {**IDENTITY, "settings": {"steps": 50, "seed": 0}}
    assert begin_or_resume(other, Run(there, fingerprint_of(there))) is None
    assert differences(identity_of(there), other) == ["settings.steps 30 there, 50 here"]


def test_another_provenance_is_one_line_of_warning_or_refused(caplog):
    here = {"code": "0.1.0", "libraries": {"pillow": "11.1"}, "threads": 2}
    check_provenance("out", [provenance_of(OLD)], here, exact=False)
    [line] = caplog.messages
    assert "libraries.pillow 11.0 there, 11.1 here; threads 1 there, 2 here" in line and "\n" not in line
    with pytest.raises(InputError, match=r"libraries.pillow 11.0 there, 11.1 here.*leave --exact out"):
        check_provenance("out", [provenance_of(OLD)], here, exact=True)


def test_the_same_provenance_or_none_says_nothing(caplog):
    here = current_provenance(threads=1)
    check_provenance("out", [here, {}], here, exact=True)
    check_provenance("out", [], here, exact=True)
    assert caplog.messages == []


def test_a_provenance_names_hardware_and_no_machine():
    import platform

    here = current_provenance(threads=1)
    assert here["hardware"] and here["libraries"]["torch"] and here["driver"] is None
    assert platform.node() not in json.dumps(here)
    gpu = current_provenance(threads=8, gpu="NVIDIA H100")
    assert (gpu["hardware"], gpu["threads"]) == ("NVIDIA H100", None)


def test_provenances_are_counted_most_frequent_first():
    one, two = {"code": "1"}, {"code": "2"}
    assert count_provenances([two, one, two, None, {}], "shards") == [{"shards": 2, **two}, {"shards": 1, **one}]
