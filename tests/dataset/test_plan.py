"""The plan: the same rows for the same inputs, each once, in memory that does not grow with their number."""

import itertools
import math
from collections import Counter

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from facediffuser.dataset.inputs import Prompt, Subject, parse_template
from facediffuser.dataset.plan import GROUPS_PER_PART, Layout, Plan, RowSettings, read_shard_rows, row_seed, write_plan
from facediffuser.dataset.schema import FINGERPRINT_KEY, PLAN_SCHEMA, with_marks
from facediffuser.storage import open_store

ROW = RowSettings(method="face-diffuser", num_inference_steps=50, guidance_scale=5.0, fusion_start=16, fusion_end=31,
                  scheduler="PNDMScheduler", height=512, width=512)  # fmt: skip
TEMPLATES = {1: "{subject} reading", 2: "{subject_2} and {subject_1}"}
MARKS = with_marks(PLAN_SCHEMA, "f" * 64, {"settings": {"steps": 50}}, False)


def plan_of(subjects=3, prompts=2, together=1, images=2, seed=0, sets=None) -> Plan:
    people = tuple(Subject(f"person{n}", "man" if n % 2 else "woman", ("x.png",)) for n in range(subjects))
    template = "{subject} reading" if together == 1 else " and ".join(f"{{subject_{n + 1}}}" for n in range(together))
    texts = tuple(Prompt(f"p{n}", None, *parse_template(template, together, "row")) for n in range(prompts))
    return Plan(people, texts, images, seed, ROW, sets)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**40))
def test_every_set_prompt_and_image_is_planned_once(subjects, prompts, together, images, seed):
    plan = plan_of(subjects, prompts, together, images, seed)
    rows = list(plan.rows())
    assert len(rows) == len(plan)
    assert len({row[0] for row in rows}) == len(rows)
    sets = {(frozenset(row[4]), row[1]) for row in rows}
    people = [person.subject_id for person in plan.subjects]
    assert sets == {
        (frozenset(group), f"p{n}") for group in itertools.combinations(people, together) for n in range(prompts)
    }
    assert all(0 <= row[5] < 2**63 for row in rows)


@given(st.integers(2, 9), st.integers(1, 3), st.integers(1, 40))
def test_of_the_sets_as_many_as_asked_are_planned_and_every_subject_comes_equally_often(subjects, together, sets):
    plan = plan_of(subjects, 1, together, 1, sets=sets)
    groups = [row[4] for row in plan.rows()]
    assert len(groups) == len(set(groups)) == len(plan) == min(sets, math.comb(subjects, together))
    if sets % subjects == 0 and together <= 2:
        counts = Counter(person for group in groups for person in group)
        assert len(set(counts.values())) <= 1


@given(st.integers(2, 6), st.lists(st.integers(1, 2), min_size=1, max_size=5), st.integers(1, 20))
def test_each_prompt_is_planned_with_sets_of_as_many_subjects_as_it_shows(subjects, shown, sets):
    people = plan_of(subjects).subjects
    prompts = tuple(
        Prompt(f"p{n}", None, *parse_template(TEMPLATES[size], None, "row")) for n, size in enumerate(shown)
    )
    plan = Plan(people, prompts, 1, 0, ROW, sets)
    rows = list(plan.rows())
    assert len(rows) == len(plan) == len({row[0] for row in rows})
    for n, size in enumerate(shown):
        groups = {frozenset(row[4]) for row in rows if row[1] == f"p{n}"}
        assert len(groups) == min(sets, math.comb(subjects, size)) and {len(group) for group in groups} == {size}
    assert [prompt.prompt_id for prompt in plan.prompts_in_order()] == list(dict.fromkeys(row[1] for row in rows))


def test_a_plan_of_one_size_keeps_the_digest_that_earlier_code_gave_it():
    assert plan_of().digest() == "038acfe3093f4aa83179b59d471b478c0df7cafc73013e65f43c63cd3245e374"
    pairs = plan_of(together=2, sets=2)
    assert pairs.digest() == "c1fd98aafa31e7987e87f4868bb7688ea9b7341b59d81144752c4e3f282fa6e8"
    assert list(pairs.rows())[-1][0::5] == ("person1+person2~p1~1", 987102369301183384)


def test_the_same_inputs_give_the_same_rows_and_seeds():
    assert list(plan_of().rows()) == list(plan_of().rows())
    assert plan_of().digest() == plan_of().digest()
    one, other = list(plan_of(seed=1).rows()), list(plan_of(seed=2).rows())
    assert [row[:5] for row in one] == [row[:5] for row in other]
    assert not {row[5] for row in one} & {row[5] for row in other}


def test_a_seed_belongs_to_its_row_not_to_the_rows_around_it():
    few = {row[0]: row[5] for row in plan_of(subjects=2).rows()}
    many = {row[0]: row[5] for row in plan_of(subjects=5, prompts=4, images=3).rows()}
    assert few.items() <= many.items()
    assert row_seed(0, "person0~p0~0") == few["person0~p0~0"]


@pytest.mark.parametrize(
    "change", [{"subjects": 4}, {"prompts": 3}, {"images": 3}, {"seed": 1}, {"together": 2}, {"sets": 2}]
)
def test_whatever_changes_the_rows_changes_the_digest(change):
    assert plan_of(**change).digest() != plan_of().digest()


def test_a_prompt_becomes_class_word_and_marker_in_the_order_of_its_places():
    pieces, order = parse_template("{subject_2} waving at {subject_1}", 2, "row")
    prompt = Prompt("p", None, pieces, order)
    assert prompt.text(("man", "woman")) == "woman <|image|> waving at man <|image|>"
    assert prompt.subjects_in_order(("ada", "bob")) == ("bob", "ada")
    literal = Prompt("p", None, *parse_template("a man <|image|> reading", 1, "row"))
    assert literal.text(("woman",)) == "a man <|image|> reading"
    assert literal.subjects_in_order(("ada",)) == ("ada",)


@pytest.mark.parametrize(("rows", "shard_size"), [(1, 1), (12, 5), (1000, 7), (601, 1)])
def test_shards_hold_the_planned_rows_in_their_order(tmp_path, rows, shard_size):
    plan, layout = plan_of(subjects=1, prompts=1, images=rows), Layout(rows, shard_size)
    store = open_store(tmp_path)
    assert write_plan(store, plan, layout, MARKS) == layout.parts
    read = [row for shard in range(layout.shards) for row in read_shard_rows(store, layout, shard)]
    assert [row["sample_id"] for row in read] == [row[0] for row in plan.rows()]
    assert layout.parts == -(-layout.shards // GROUPS_PER_PART)
    assert read[0].keys() == set(PLAN_SCHEMA.names) and read[0]["scheduler"] == "PNDMScheduler"
    assert sum(layout.shard_rows(shard) for shard in range(layout.shards)) == rows


def test_a_plan_is_one_table_to_a_reader_and_carries_its_fingerprint(tmp_path):
    plan, layout = plan_of(images=500), Layout(3000, 2)
    write_plan(open_store(tmp_path), plan, layout, MARKS)
    assert layout.parts > 1
    assert pq.read_table(tmp_path / "plan").num_rows == 3000
    assert pq.read_schema(tmp_path / layout.part_key(0)).metadata[FINGERPRINT_KEY] == b"f" * 64


def test_a_plan_that_was_interrupted_is_completed_with_the_same_bytes(tmp_path):
    plan, layout, store = plan_of(images=500), Layout(3000, 2), open_store(tmp_path)
    write_plan(store, plan, layout, MARKS)
    before = {info.key: store.get(info.key) for info in store.list()}
    store.delete(layout.part_key(1))
    assert write_plan(store, plan, layout, MARKS) == 1
    assert write_plan(store, plan, layout, MARKS) == 0
    assert {info.key: store.get(info.key) for info in store.list()} == before


def test_of_two_runs_that_begin_at_once_one_loses(tmp_path):
    store, layout = open_store(tmp_path), Layout(12, 5)
    write_plan(store, plan_of(), layout, MARKS)
    late = plan_of(seed=1)
    store.list = lambda prefix="": []  # looked before the other wrote
    with pytest.raises(FileExistsError):
        write_plan(store, late, layout, MARKS)


def test_of_two_runs_with_plans_of_several_files_one_writes_nothing(tmp_path):
    store, layout = open_store(tmp_path), Layout(3000, 2)
    write_plan(store, plan_of(images=500), layout, MARKS)
    before = {info.key: store.get(info.key) for info in store.list()}
    others = MARKS.with_metadata({FINGERPRINT_KEY: b"e" * 64})
    late, listed = open_store(tmp_path), store.list
    late.list = lambda prefix="": listed(prefix)[:1]  # looked when the other had written its first file
    with pytest.raises(FileExistsError, match="another run"):
        write_plan(late, plan_of(seed=1, images=500), layout, others)
    assert {info.key: store.get(info.key) for info in store.list()} == before
    # One of another number of files, which has looked before the other wrote.
    looks = iter([[]])
    late.list = lambda prefix="": next(looks, listed(prefix))
    with pytest.raises(FileExistsError, match="another run"):
        write_plan(late, plan_of(seed=1, images=100), Layout(600, 2), others)
    assert {info.key: store.get(info.key) for info in store.list()} == before


def test_keys_of_other_layouts_are_not_taken_for_shards():
    layout = Layout(12, 5)
    assert [layout.shard_of_key(layout.shard_key(shard)) for shard in range(3)] == [0, 1, 2]
    for key in ("data/shard-00003-of-00003.parquet", "data/shard-00000-of-00004.parquet", "data/shard-0-of-3.parquet"):
        assert layout.shard_of_key(key) is None
