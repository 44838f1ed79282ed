"""One made world, and one finished dataset of it, for all tests of generation."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from world import World

from facediffuser.generation import certify, job, repair, shard_generator
from facediffuser.generation.job import prepare
from facediffuser.generation.shard_generator import ShardGenerator
from facediffuser.modelfolder import model_digests, resolve_model
from facediffuser.scoring.folder import scorers_folder


@contextmanager
def one_thread() -> Iterator[None]:
    """As many threads as each of two workers has on two cores: the last bits of an image depend on them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def images_by_one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module", autouse=True)
def cards_without_plots(plain_plots) -> None:
    """Cards are not what these tests are about."""


def _state(folder: Path) -> tuple:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files)


@pytest.fixture(scope="module", autouse=True)
def models_loaded_once() -> Iterator[None]:
    """Runs in this process share a folder's models while its files do not change: loading took a fifth of the time."""
    pipelines, scorers = {}, {}

    def load_pipeline(given, load=shard_generator.load_pipeline):
        if given.engine:  # it changes the models in place
            return load(given)
        folder = resolve_model(given.models)
        shard_generator._require_same("models", model_digests(folder), given.run["models"])
        key = (_state(folder), given.settings["dtype"], given.device)
        if key not in pipelines:
            pipelines[key] = load(given)
        return pipelines[key].with_scheduler(given.settings["scheduler"])

    def load_scorers(name, device="cpu", load=shard_generator.load_scorers):
        key = (name, str(device), _state(scorers_folder(name)) if name != "paper" else ())
        if key not in scorers:
            scorers[key] = load(name, device)
        return scorers[key]

    with pytest.MonkeyPatch.context() as patched:
        for module in (shard_generator, certify):
            patched.setattr(module, "load_pipeline", load_pipeline)
        for module in (shard_generator, job, repair):
            patched.setattr(module, "load_scorers", load_scorers)
        yield


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def made(world, tmp_path_factory):
    """(job, generator) of a run whose shards are all made, by one worker in this process."""
    with one_thread():
        prepared = prepare(world.settings(tmp_path_factory.mktemp("made") / "dataset"))
        prepared.write()
        generator = ShardGenerator(prepared.job)
        for shard in range(prepared.job.layout.shards):
            generator(shard)
    return prepared.job, generator
