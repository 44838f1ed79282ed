"""The import law: no circle of files or folders, and a dataset is read, verified and carded without torch, Ray, Prefect."""

import graphlib
import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("diffusers", "facenet_pytorch", "prefect", "ray", "torch", "torchvision", "transformers")
READ_VERIFY_CARD = """
import io, json, sys
from PIL import Image

HEAVY = set(json.loads(sys.argv[1]))

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HEAVY:
            raise ModuleNotFoundError(f"{name} is not installed here", name=name)

sys.meta_path.insert(0, Missing())

import hashlib
from facediffuser.cards.dataset_card import write_card
from facediffuser.cards.prepared_card import write_card as write_prepared_card
from facediffuser.dataset import added_columns, image_files, inputs, other_run, references, shards, suites
from facediffuser.dataset.manifest import build_manifest, build_part, object_entries, shard_entry
from facediffuser.dataset.plan import Layout, Plan, RowSettings, read_shard_rows, write_plan
from facediffuser.dataset.reading import count_rows, list_shards
from facediffuser.dataset.schema import DATASET_SCHEMA, PLAN_SCHEMA, SUBJECTS_SCHEMA, canonical_json, with_marks
from facediffuser.dataset.seal import seal
from facediffuser.dataset.verify import verify
from facediffuser.storage import open_store

store = open_store(sys.argv[2])
people = [inputs.Subject(name, "man", (f"{name}/1.png",)) for name in ("ada", "bob")]
prompts = [inputs.Prompt("p0", "context", ("a photo of ", ""), (0,)), inputs.Prompt("p1", None, ("", " at sea"), (0,))]
row = RowSettings(method="face-diffuser", num_inference_steps=2, guidance_scale=5.0, fusion_start=0, fusion_end=1,
                  scheduler="PNDMScheduler", height=8, width=8)
plan = Plan(tuple(people), tuple(prompts), 1, 7, row)
run = {"scorers": {}, "models": {}, "schema": {"version": "2", "embedding_size": 0}}
fingerprint = hashlib.sha256(canonical_json(run).encode()).hexdigest()
layout = Layout(len(plan), 2)
write_plan(store, plan, layout, with_marks(PLAN_SCHEMA, fingerprint, run, True))
entries = []
for shard in range(layout.shards):
    rows = read_shard_rows(store, layout, shard)
    for values in rows:
        data = image_files.encode_image(Image.new("RGB", (8, 8), "red"), "png", values["sample_id"])
        values |= {"image": {"bytes": data}, "image_sha256": hashlib.sha256(data).hexdigest(), "ip": 0.5, "pc": 0.2,
                   "status": "ok"}
    store.put(layout.shard_key(shard), shards.encode_shard(rows, with_marks(DATASET_SCHEMA, fingerprint, run, True)))
infos = list_shards(store)
entries = [shard_entry(store, layout, shard, info) for shard, info in enumerate(infos)]
store.put("subjects.parquet", references.encode_references(SUBJECTS_SCHEMA.empty_table(), SUBJECTS_SCHEMA))
table = write_card(store)
part = build_part(fingerprint, run, layout, entries)
seal(store, build_manifest([part], object_entries(store, [*layout.part_keys(), "subjects.parquet"])))
loaded = sorted(HEAVY & {name.partition(".")[0] for name in sys.modules})
print(json.dumps({"problems": verify(sys.argv[2]), "rows": count_rows(store), "table": len(table), "loaded": loaded}))
"""


@pytest.fixture(scope="module")
def graph():
    import grimp

    return grimp.build_graph("facediffuser", "tools", "benchmarks", cache_dir=None)


def imports(graph) -> dict[str, set[str]]:
    return {name: set(graph.find_modules_directly_imported_by(name)) for name in graph.modules}


def rooms(edges: dict[str, set[str]]) -> dict[str, set[str]]:
    """The same imports between rooms: the packages and the single files right below `facediffuser`."""

    def room(module: str) -> str:
        return ".".join(module.split(".")[:2])

    found = defaultdict(set)
    for importer, imported in edges.items():
        found[room(importer)] |= {room(name) for name in imported if room(name) != room(importer)}
    # The package itself holds the version, which anything may import; it imports the pipeline when it is asked for it.
    return {name: others - {"facediffuser"} for name, others in found.items()}


def circle(edges: dict[str, set[str]]) -> list[str]:
    try:
        graphlib.TopologicalSorter(edges).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_no_files_import_each_other_in_a_circle(graph):
    edges = imports(graph)
    assert "facediffuser.tasks.ray_session" in edges and "facediffuser.flows.cli" in edges
    assert circle(edges) == []


def test_no_folders_import_each_other_in_a_circle(graph):
    edges = rooms(imports(graph))
    assert edges["facediffuser.cards"] >= {"facediffuser.dataset", "facediffuser.storage"}
    assert circle(edges) == []


def test_a_circle_would_be_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) != []
    assert circle(
        rooms({"facediffuser.x.one": {"facediffuser.y.two"}, "facediffuser.y.three": {"facediffuser.x.four"}})
    )


def test_the_import_law_of_make_lint_holds():
    program = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([program, "--no-cache", "--no-logo"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_processes_load_what_they_need_and_no_more():
    """Each library costs a process seconds of a core at its start, and a run on Ray has some thirty processes."""
    code = f"""
import sys
import facediffuser.tasks.train_worker  # every process of Ray Train, of which one trains
print(sorted(set({HEAVY!r}) & set(sys.modules)))
import facediffuser.generation.estimate, facediffuser.generation.generate_stage, facediffuser.training.latent_stage
print(sorted({{"diffusers", "prefect", "ray", "transformers"}} & set(sys.modules)))  # workers before they load models
import facediffuser.flows.demo, facediffuser.flows.evaluate
print(sorted({{"diffusers", "transformers"}} & set(sys.modules)))  # the command, whose workers have the models
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["[]", "[]", "[]"], done.stdout + done.stderr


def test_a_dataset_is_read_verified_and_carded_where_torch_ray_and_prefect_are_missing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", READ_VERIFY_CARD, json.dumps(HEAVY), str(tmp_path / "people")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"problems": [], "rows": 4, "table": 9, "loaded": []}
    assert (tmp_path / "people" / "card" / "index.html").stat().st_size > 10_000
