"""One made world, and one finished dataset of it, for all tests of generation."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from world import World

from facediffuser.generation.job import prepare
from facediffuser.generation.shard_generator import ShardGenerator


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
