"""The engine of a run: part of its identity when it is compiled, a last batch filled up, the code it compiled kept."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from facediffuser.batch_stage import ThisMachine
from facediffuser.compiled_code import CompiledCode, code_key
from facediffuser.dataset.schema import COMPUTED_WITH_KEY
from facediffuser.engine_options import COMPILED
from facediffuser.errors import InputError
from facediffuser.generation.job import automatic_batch_size, prepare
from facediffuser.generation.shard_generator import ShardGenerator
from facediffuser.storage import open_store


def nothing_compiles(*_, **__):
    raise RuntimeError("no C++ compiler")


class UnaskedMemory:
    gpus, cpus = 1, 0

    @property
    def gpu_gib(self):
        pytest.fail("the GPU's memory was asked for")


def images_of(job) -> list[str]:
    store = job.store()
    shards = [store.get(job.layout.shard_key(shard)) for shard in range(job.layout.shards)]
    return [name for data in shards for name in pq.read_table(io.BytesIO(data))["image_sha256"].to_pylist()]


def generated(settings):
    prepared = prepare(settings)
    prepared.write()
    generator = ShardGenerator(prepared.job)
    for shard in range(prepared.job.layout.shards):
        generator(shard)
    return prepared.job


def test_an_eager_run_says_nothing_of_engines_and_a_compiled_one_is_another_run(made, world, tmp_path):
    assert not {"engine", "engine_options"} & made[0].settings.keys() and made[0].engine is None
    job = prepare(world.settings(tmp_path / "x", engine="compiled")).job
    assert job.engine == COMPILED and job.fingerprint != made[0].fingerprint
    assert prepare(world.settings(tmp_path / "x", compiled_code=str(tmp_path))).job.fingerprint == made[0].fingerprint
    with pytest.raises(InputError, match="settings.engine None there, compiled here"):
        prepare(world.settings(made[0].output, engine="compiled"))


def test_auto_goes_on_with_the_engine_the_run_was_begun_with(world, tmp_path):
    begun = prepare(world.settings(tmp_path / "x", engine="compiled"))
    begun.write()
    assert prepare(world.settings(tmp_path / "x")).job.fingerprint == begun.job.fingerprint
    with pytest.raises(InputError, match="settings.engine compiled there, None here"):
        prepare(world.settings(tmp_path / "x", engine="eager"))


def test_auto_compiles_on_a_gpu_when_the_run_is_long_and_takes_the_batch_its_memory_holds(world, tmp_path, caplog):
    caplog.set_level("INFO")
    long = {"images_per_prompt": 1_000_000, "batch_size": None, "shard_size": 500}
    job = prepare(world.settings(tmp_path / "x", **long), ThisMachine(gpus=1, gpu_gib=80.0)).job
    assert job.engine == COMPILED and job.batch_size == 256
    assert "engine: compiled (" in caplog.text and "batch size: 256, for a GPU of 80 GiB" in caplog.text
    short = prepare(world.settings(tmp_path / "x", batch_size=None), UnaskedMemory()).job
    assert short.engine is None and short.batch_size == 3


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((512, 512, 140.0), 32), ((512, 512, 80.0), 32), ((512, 512, 24.0), 20), ((512, 512, 24.0, True), 4),
        ((512, 512, 8.0), 1), ((64, 64, 80.0), 256), ((1024, 1024, 80.0), 8),
    ],
)  # fmt: skip
def test_batch_size_by_memory(arguments, expected):
    assert automatic_batch_size(*arguments) == expected


def test_a_batch_size_of_auto_is_a_number_in_the_document(world, tmp_path):
    assert prepare(world.settings(tmp_path / "x", batch_size="auto")).job.settings["batch_size"] == 3
    job = prepare(
        world.settings(tmp_path / "x", batch_size="auto", shard_size=500), ThisMachine(gpus=1, gpu_gib=80.0)
    ).job
    assert job.settings["batch_size"] == 256 and job.engine is None


def test_a_row_has_the_same_bytes_in_a_full_batch_and_in_one_that_is_filled_up(world, tmp_path, monkeypatch, caplog):
    """Without a compiler a compiled run is made eager, batches filled up all the same; every shard says so."""
    monkeypatch.setattr(torch, "compile", nothing_compiles)
    given = {"engine": "compiled", "batch_size": 2, "images_per_prompt": 1, "compiled_code": str(tmp_path / "code")}
    odd = generated(world.settings(tmp_path / "odd", shard_size=3, **given))
    even = generated(world.settings(tmp_path / "even", shard_size=2, **given))
    assert images_of(odd) == images_of(even) and len(set(images_of(odd))) == 6
    marks = json.loads(pq.read_schema(tmp_path / "odd" / odd.layout.shard_key(0)).metadata[COMPUTED_WITH_KEY])
    assert marks["engine"] == "eager" and "install g++" in caplog.text
    assert not (tmp_path / "code").exists()


def test_the_key_of_compiled_code_is_of_the_shape_not_of_how_a_model_was_loaded():
    def key(**config) -> str:
        return code_key(COMPILED, torch.device("cpu"), {"unet": config}, {"batch_size": 1})

    noted = {"_name_or_path": "elsewhere", "_use_default_values": ["b", "a"]}
    assert key(sample_size=8, **noted) == key(sample_size=8) != key(sample_size=16)


def test_code_that_cannot_be_used_is_one_warning(tmp_path, caplog):
    store = open_store(tmp_path)
    store.put("x.torch", b"no code at all")
    assert not CompiledCode(store, "x.torch").load()
    assert "x.torch: cannot be used (it is damaged); compiling anew" in caplog.text


ONE_UNET = """
import hashlib, sys, torch
sys.path.insert(0, sys.argv[2])
from sampler.conftest import unet, vae
from facediffuser.batch_stage import ThisMachine
from facediffuser.compiled_code import CompiledCode, code_key
from facediffuser.engine import Engine
from facediffuser.engine_options import EngineOptions
from facediffuser.storage import open_store
torch.set_num_threads(1)
options = EngineOptions(compile="blocks", text_once=True)
model = unet(1)
engine = Engine({"unet": model}, vae(), options)
key = code_key(options, torch.device("cpu"), {"unet": dict(model.config)}, {"batch_size": 1})
code = CompiledCode(open_store(sys.argv[1]), key)
found = code.load()
torch.manual_seed(0)
rows, embeds = torch.randn(2, 4, 16, 16), torch.randn(2, 77, 32)
noise = engine.denoise("unet", rows, torch.tensor(5), embeds)
put = code.save()
counts = torch._dynamo.utils.counters["inductor"]
print(found, put, counts["fxgraph_cache_miss"], hashlib.sha256(noise.numpy().tobytes()).hexdigest())
"""


@pytest.mark.slow
def test_a_second_process_finds_the_code_of_the_first_and_makes_the_same_bytes(tmp_path, monkeypatch):
    def run(number: int) -> list[str]:
        # A cache of its own for each process, as on another machine.
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / f"cache{number}"))
        tests = str(Path(__file__).parents[1])
        command = [sys.executable, "-c", ONE_UNET, str(tmp_path / "code"), tests]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()

    first, second = run(1), run(2)
    assert first[:2] == ["False", "True"] and int(first[2]) > 0
    assert second[:3] == ["True", "False", "0"] and second[3] == first[3]
