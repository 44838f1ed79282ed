"""Which run an output holds, and how it differs from the run at hand, named by its own plan and subjects."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq

from facediffuser.dataset.inputs import Prompt, Subject
from facediffuser.dataset.plan import Plan, part_names
from facediffuser.dataset.reading import read_columns, readable_parquet, row_groups
from facediffuser.dataset.schema import FINGERPRINT_KEY, RUN_KEY, SUBJECTS_KEY
from facediffuser.errors import InputError, first_few
from facediffuser.runs import Run, begin_or_resume, differences, has_fingerprint, identity_of, other_run_error
from facediffuser.storage import Store
from facediffuser.storage.reading import DamagedError, parse_json

SHOWN_NAMES = 3
SHOWN_TEXT = 60
# Parts of a run document whose values are digests by name: a reader wants to know which, not the digests.
DIGESTS = {"models", "scorers"}


@dataclass(frozen=True)
class PlannedPrompt:
    """A prompt as an earlier run's plan shows it: in the row of one set of subjects, class words filled in."""

    prompt_id: str
    category: str | None
    text: str
    subject_ids: tuple[str, ...]


def run_of_output(store: Store, name: str = "") -> Run | None:
    """Return the run that made a part of an output, None when the output holds none.

    Args:
        store: the output.
        name: the part's name, "" for the first.

    Raises:
        InputError: the plan there is not one that `generate` wrote.
    """
    every = [info.key for info in store.list("plan/")]
    plans = [key for key in every if part_names([key]) == [name]] or (every if not name else [])
    if not plans:
        return None
    try:
        with readable_parquet(store, plans[0]), store.open(plans[0]) as source:
            marks = pq.read_schema(source).metadata or {}
            document, fingerprint = parse_json(marks[RUN_KEY]), marks[FINGERPRINT_KEY].decode()
    except (DamagedError, KeyError):
        document, fingerprint = None, ""
    # A document that is not the one it was marked with may lack anything.
    if not has_fingerprint(document, fingerprint):
        raise InputError(f"{store.url}: {plans[0]} is damaged, or not a plan that `generate` wrote; put it back, or give an "
                         "empty output")  # fmt: skip
    return Run(document, fingerprint)


def begin_or_resume_dataset(
    store: Store, identity: Mapping[str, Any], plan: Plan | None = None, references: pa.Table | None = None
) -> Run:
    """Return the run to go on with: a new one, or the one in the output when it has the same identity.

    Args:
        store: the output.
        identity: this run's document, which is its identity.
        plan: this run's plan; with it the error names the prompts that differ.
        references: its table of SUBJECTS_SCHEMA; with it the error names the subjects that differ.

    Raises:
        InputError: the output holds another run; the differences are named.
    """
    there = run_of_output(store)
    run = begin_or_resume(identity, there)
    if run is not None:
        return run
    assert there is not None  # where there is no run, a new one begins
    _refuse(store, identity_of(there.document), identity, plan, references)


def require_same_run(
    store: Store, run: Run, plan: Plan | None = None, references: pa.Table | None = None, name: str = ""
) -> None:
    """Check that the output, or a part of it, is empty or holds this very run.

    Args:
        store: the output.
        run: the run at hand.
        plan: its plan, by which a difference is named.
        references: its references, a table of SUBJECTS_SCHEMA, for the same.
        name: the part's name, "" for the first.

    Raises:
        InputError: it holds another run; the error says what differs.
    """
    there = run_of_output(store, name)
    if there is not None and there.fingerprint != run.fingerprint:
        _refuse(store, identity_of(there.document), identity_of(run.document), plan, references)


def require_like_run(store: Store, known: Mapping[str, Any], undecided: Sequence[str], plan: Plan) -> None:
    """Check an output by what is known before models and pictures are read.

    Args:
        store: the output.
        known: a part of this run's document.
        undecided: names of settings that the document will have beside those.
        plan: the run's plan, by which a difference is named.

    Raises:
        InputError: it holds a run that differs already; the error says in what.
    """
    there = run_of_output(store)
    if there is None:
        return
    identity = identity_of(there.document)
    settings = {name: value for name, value in identity["settings"].items() if name not in undecided}
    alike = {**{name: identity.get(name) for name in known}, "settings": settings}
    if alike != known:
        _refuse(store, alike, known, plan, None)


def _refuse(
    store: Store, there: Mapping[str, Any], here: Mapping[str, Any], plan: Plan | None, references: pa.Table | None
) -> NoReturn:
    found = explain_differences(store, there, here, plan, references)
    how = "repeat that run's options or give another output"
    if found and all(one.startswith(("prompts differ", "subjects differ")) for one in found):
        how = f"add new prompts and people with --extend, {how}"
    raise other_run_error(store.url, found, how)


def explain_differences(
    store: Store,
    there: Mapping[str, Any],
    here: Mapping[str, Any],
    plan: Plan | None = None,
    references: pa.Table | None = None,
) -> list[str]:
    """Return how two run documents differ, one phrase each: prompts, subjects and models by name, settings by value.

    Args:
        store: the output, where the run `there` has its plan and subjects.
        there: the identity of the run in the output.
        here: that of the run at hand.
        plan: the plan of the run at hand; without it prompts are compared by their digest.
        references: its references, a table of SUBJECTS_SCHEMA; without them pictures are compared by name.
    """
    found = []
    unlike = {name for name in there.keys() | here.keys() if there.get(name) != here.get(name)}
    if plan is not None and unlike & {"plan", "subjects"}:
        recorded = recorded_subjects(store)
        if "plan" in unlike:
            found += prompt_differences(planned_prompts(store), plan, class_words(plan, recorded))
        found += subject_differences(recorded, plan.subjects, references)
    for name in sorted(unlike & DIGESTS):
        one, two = there.get(name) or {}, here.get(name) or {}
        parts = sorted(part for part in one.keys() | two.keys() if one.get(part) != two.get(part))
        found.append(f"{name} differ in {', '.join(parts)}")
    # The plan's digest is made of the settings, too, and says nothing that they do not.
    named = {*DIGESTS, *(("plan", "subjects") if found or "settings" in unlike else ())}
    theirs, ours = ({k: v for k, v in run.items() if k not in named} for run in (there, here))
    return found + differences(theirs, ours)


# --- prompts ----------------------------------------------------------------------------------------------------------


def planned_prompts(store: Store) -> list[PlannedPrompt]:
    """Return the prompts of the plan in an output, in their order; memory holds one row group at a time."""
    found: dict[str, PlannedPrompt] = {}
    keys = [info.key for info in store.list("plan/")]
    for _, _, rows in row_groups(store, keys, ["prompt_id", "category", "prompt", "subject_ids"]):
        ids = rows["prompt_id"].to_pylist()
        new = {name: place for place, name in reversed(list(enumerate(ids))) if name not in found}
        for place in sorted(new.values()):
            row = rows.slice(place, 1).to_pylist()[0]
            found[row["prompt_id"]] = PlannedPrompt(
                row["prompt_id"], row["category"], row["prompt"], tuple(row["subject_ids"])
            )
    return list(found.values())


def prompt_differences(there: Sequence[PlannedPrompt], plan: Plan, words: Mapping[str, str]) -> list[str]:
    """Return a phrase that says how many prompts there are on both sides and which is the first that differs.

    Args:
        there: the prompts of the plan in the output.
        plan: the plan of the run at hand.
        words: the class words of the subjects there. With them a prompt of `plan` becomes the text it would have had
            there, so that other class words make no other prompts.
    """
    here = plan.prompts_in_order()
    for number, (one, two) in enumerate(zip_longest(there, here), 1):  # noqa: B007, used after the loop
        if one is None or two is None or not _same_prompt(one, two, words):
            break
    else:
        return []
    sides = [] if one is None else [f"{one.prompt_id} {_shown(one.text, one.category)} there"]
    if two is not None:
        text = two.text([subject.class_word for subject in plan.subjects[: two.subjects]])
        sides.append(f"{two.prompt_id} {_shown(text, two.category)} here")
    only = "the first only" if one is None or two is None else f"number {number}, the first that differs,"
    return [f"prompts differ ({_counts(there, here)}): {only} is {', '.join(sides)}"]


def _same_prompt(one: PlannedPrompt, two: Prompt, words: Mapping[str, str]) -> bool:
    if (one.prompt_id, one.category) != (two.prompt_id, two.category):
        return False
    people = tuple(sorted(one.subject_ids))
    if len(people) != two.subjects or two.subjects_in_order(people) != one.subject_ids:
        return False
    return two.text([words.get(name, "") for name in people]) == one.text


def conflicting_prompts(store: Store, plan: Plan, words: Mapping[str, str]) -> list[str]:
    """Return a phrase for the first prompt of a plan that the output has with the same id and another text, or nothing.

    Args:
        store: the output.
        plan: the plan of the run at hand.
        words: the class words by subject id.
    """
    there = {one.prompt_id: one for one in planned_prompts(store)}
    for two in plan.prompts_in_order():
        one = there.get(two.prompt_id)
        if one is not None and not _same_prompt(one, two, words):
            text = two.text([words[subject.subject_id] for subject in plan.subjects[: two.subjects]])
            return [f"prompt {two.prompt_id} is {_shown(one.text, one.category)} there, "
                    f"{_shown(text, two.category)} here"]  # fmt: skip
    return []


def _counts(there: Sequence | Mapping, here: Sequence | Mapping) -> str:
    return f"{len(there)} there, {len(here)} here"


def _shown(text: str, category: str | None) -> str:
    shown = repr(text if len(text) <= SHOWN_TEXT else f"{text[:SHOWN_TEXT]}...")
    return f"{shown} of {category}" if category else shown


def class_words(plan: Plan, recorded: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the class word of each subject, by id: as an output has it, else as a plan says.

    Args:
        plan: the plan of the run at hand.
        recorded: what `recorded_subjects` returns of the output.
    """
    words = {subject.subject_id: subject.class_word for subject in plan.subjects}
    return words | {row["subject_id"]: row["class_word"] for row in recorded}


# --- subjects ---------------------------------------------------------------------------------------------------------


def recorded_subjects(store: Store) -> list[dict[str, Any]]:
    """Return id, class word, key and sha256 of each reference that an output keeps; empty where it keeps none yet."""
    if not store.exists(SUBJECTS_KEY):
        return []
    return read_columns(store, SUBJECTS_KEY, ["subject_id", "class_word", "reference", "source_sha256"]).to_pylist()


def subject_differences(
    rows: Sequence[Mapping[str, Any]], subjects: Sequence[Subject], references: pa.Table | None
) -> list[str]:
    """Return phrases for subjects that came or went, for other class words, and for reference pictures that changed.

    Args:
        rows: what `recorded_subjects` returns of the output.
        subjects: the subjects of the run at hand.
        references: a table of SUBJECTS_SCHEMA: the pictures' contents are compared too. None compares names alone.
    """
    if not rows:
        return []
    words = {row["subject_id"]: row["class_word"] for row in rows}
    ours = {subject.subject_id: subject.class_word for subject in subjects}
    found = []
    came, went = sorted(ours.keys() - words.keys()), sorted(words.keys() - ours.keys())
    if came or went:
        sides = [
            f"{first_few(names, SHOWN_NAMES)} only {side}" for names, side in ((went, "there"), (came, "here")) if names
        ]
        found.append(f"subjects differ ({_counts(words, ours)}): {', '.join(sides)}")
    for name in sorted(words.keys() & ours.keys()):
        if words[name] != ours[name]:
            found.append(f"class word of {name}: {words[name]} there, {ours[name]} here")
    pictures = {row["reference"]: row["source_sha256"] for row in rows if row["subject_id"] in ours}
    mine = {key: None for subject in subjects if subject.subject_id in words for key in subject.references}
    if references is not None:
        digests = zip(references["reference"].to_pylist(), references["source_sha256"].to_pylist(), strict=True)
        mine |= {key: digest for key, digest in digests if key in mine}
    gone, new = sorted(pictures.keys() - mine.keys()), sorted(mine.keys() - pictures.keys())
    changed = sorted(key for key in pictures.keys() & mine.keys() if mine[key] and pictures[key] != mine[key])
    kinds = ((gone, "only there"), (new, "only here"), (changed, "with another content"))
    parts = [f"{first_few(names, SHOWN_NAMES)} {what}" for names, what in kinds if names]
    return found + ([f"reference pictures differ: {', '.join(parts)}"] if parts else [])
