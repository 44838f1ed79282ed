"""A stage of batch work as data: preprocess, generate, repair, score and the latents cache are each one `Stage`.

A driver runs it: `facediffuser.tasks.ray_driver` on Ray, `facediffuser.tasks.local_driver` in this process. Drivers are
interchangeable: the stage says what is done, the driver where.

    stage = Stage("Resize", "pictures", identity, units, worker=functools.partial(Resizer, settings))
    LocalDriver().run(stage)
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

Counts = dict[str, Any]


@dataclass(frozen=True)
class Unit:
    """One part of a stage's work: done by one worker in one call, as one object in storage.

    key: names the unit, once in a stage; usually the key of the object.
    rows: its size, in what the stage counts (images, pictures, ...).
    data: what the worker needs to know of it; picklable.
    """

    key: str
    rows: int
    data: Any = None


class Machines(Protocol):
    """What there is for workers now; asked only where it is needed, for the first question may start a cluster."""

    @property
    def gpus(self) -> int:
        """GPUs."""

    @property
    def cpus(self) -> int:
        """CPU cores; 0: not known, a worker has as many as torch takes."""

    @property
    def gpu_gib(self) -> float:
        """Memory of the smallest GPU, GiB; 0 where there is none."""


@dataclass(frozen=True)
class ThisMachine:
    """The machines of workers that run in this process."""

    gpus: int = 0
    cpus: int = 0
    gpu_gib: float = 0.0


@dataclass(frozen=True)
class WorkerPool:
    """How many workers a stage may have: a fixed number, or between two bounds, and what each of them occupies.

    workers: a fixed number; None: one per GPU, or one where there is none.
    fewest, most: bounds of a pool that grows and shrinks with the work; they apply when `most` is given.
    cpus: CPU cores of a worker.
    gpu: whether each worker has a GPU.
    """

    workers: int | None = None
    fewest: int | None = None
    most: int | None = None
    cpus: int = 1
    gpu: bool = False

    def size(self, gpus: int, units: int) -> tuple[int, int]:
        """Return the fewest and the most workers.

        Args:
            gpus: GPUs of the cluster, 0 or more.
            units: units to do; there are never more workers than units, and at least one.
        """
        units = max(1, units)
        if self.most:
            return min(self.fewest or 1, units), min(self.most, units)
        fixed = min(self.workers or (gpus if self.gpu else 0) or 1, units)
        return fixed, fixed

    def at_once(self, gpus: int, cpus: int, units: int) -> int:
        """Return how many workers find room at the same time, at least one.

        Args:
            gpus: GPUs of the cluster.
            cpus: its CPU cores.
            units: units to do.
        """
        fewest, most = self.size(gpus, units)
        places = gpus if self.gpu else cpus // max(1, min(self.cpus, cpus // fewest))
        return max(1, min(most, places))


class Spending:
    """What one run has taken of its limits so far, over all of its stages and every attempt at them.

    started: `time.monotonic()` when its first workers started; None: they did not yet.
    cost: what its workers cost in the stages that have ended.
    """

    def __init__(self, started: float | None = None, cost: float = 0.0):
        self.started, self.cost = started, cost


@dataclass(frozen=True)
class Limits:
    """When a run stops by itself, its units in hand finished; another run goes on from there.

    hours: wall-clock hours; None: no limit.
    cost: what the workers may cost; None: no limit.
    hour_price: what an hour of a worker costs, in the unit of `cost`.
    grace_s: seconds after SIGTERM until the units in hand are abandoned.
    spending: what the run has taken of them already; None: each attempt at a stage counts from zero.
    """

    hours: float | None = None
    cost: float | None = None
    hour_price: float | None = None
    grace_s: float = 90.0
    spending: Spending | None = field(default=None, compare=False)

    def of_one_run(self) -> "Limits":
        """Return limits that the stages of one run share: what one of them takes the others do not have."""
        return replace(self, spending=Spending())

    def first(self, workers: int) -> tuple[float, str] | None:
        """Return the limit that `workers` workers reach first, None where there is none.

        Returns:
            The seconds until then, 0 or less where it is reached, and the option that sets it.
        """
        used, found = self.spending or Spending(), []
        if self.hours:
            ago = 0.0 if used.started is None else time.monotonic() - used.started
            found.append((self.hours * 3600 - ago, f"--max-hours {self.hours:g}"))
        if self.cost and self.hour_price:
            left = (self.cost - used.cost) / self.hour_price / max(1, workers) * 3600
            found.append((left, f"--max-cost {self.cost:g}"))
        return min(found, default=None)

    @contextmanager
    def counted(self, workers: int) -> Iterator[None]:
        """Count what `workers` workers take within it."""
        used, began = self.spending or Spending(), time.monotonic()
        used.started = began if used.started is None else used.started
        try:
            yield
        finally:
            used.cost += (self.hour_price or 0.0) * workers * (time.monotonic() - began) / 3600


@dataclass(frozen=True)
class Stage:
    """A stage: what decides its output, its units, who does one of them, and what is written last.

    name: title of its progress, for example "Generate".
    noun: what is counted, in the plural, for example "images".
    identity: what decides the output; its digest marks every object (see `facediffuser.runs`).
    units: the units to do; those that are finished already are left out.
    worker: picklable; called once per worker process, returns the function that does a unit: it puts the unit's object
        and returns its counts, a dict of plain values. Numbers in it, and dicts of numbers, are summed up. Pixels are
        never returned. A worker may be handed a unit twice (its process died), so the same unit gives the same object.
    finish: called once when all units are done, with the results; writes manifest and card. Its result is the run's.
    finished: rows that were done before, for the progress.
    pool: how many workers, and what each occupies.
    read: for a source that can only be read from beginning to end (an archive): called in one process, yields the units
        with their contents in `data`; the drivers hold only a few at a time.
    limits: when it stops by itself.
    describe: returns a few words on the sums of the counts so far, for the progress line.
    observe: called with each unit's counts as they arrive, to warn of what they show.
    """

    name: str
    noun: str
    identity: Mapping[str, Any]
    units: Sequence[Unit]
    worker: Callable[[], Callable[[Unit], Counts]]
    finish: Callable[["Results"], Any] = lambda results: results
    finished: int = 0
    pool: WorkerPool = WorkerPool()
    limits: Limits = Limits()
    read: Callable[[], Iterable[Unit]] | None = None
    describe: Callable[[Counts], str] = lambda totals: ""
    observe: Callable[[Counts], None] = lambda counts: None

    @property
    def rows(self) -> int:
        """All rows, those finished before included."""
        return self.finished + sum(unit.rows for unit in self.units)


@dataclass
class Results:
    """What came back: each unit's counts by its key, and their sums.

    totals: numbers summed by name; dicts of numbers summed to a Counter by name.
    seconds: wall-clock seconds of the whole.
    """

    counts: dict[str, Counts] = field(default_factory=dict)
    totals: Counts = field(default_factory=dict)
    seconds: float = 0.0

    def add(self, unit: str, counts: Counts) -> bool:
        """Add a unit's counts; return False for a unit that came back before."""
        if unit in self.counts:
            return False
        self.counts[unit] = counts
        for name, value in counts.items():
            if isinstance(value, (int, float)):
                self.totals[name] = self.totals.get(name, 0) + value
            elif isinstance(value, dict) and all(isinstance(one, (int, float)) for one in value.values()):
                self.totals.setdefault(name, Counter()).update(value)
        return True
