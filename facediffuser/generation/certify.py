"""The certificate's stage: rows of the sample made in exact mode, from the same noise, each beside the dataset's row."""

import functools
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from facediffuser.batch_stage import Counts, Stage, Unit
from facediffuser.dataset.certificate import (
    CERTIFICATE_PREFIX,
    CERTIFICATE_SCHEMA,
    choose_sample,
    encode_rows,
    part_keys,
    rows_per_part,
    stats_key,
)
from facediffuser.dataset.plan import read_shard_rows
from facediffuser.dataset.reading import read_columns
from facediffuser.dataset.schema import with_marks
from facediffuser.dataset.shards import shard_mark
from facediffuser.fast_sampling import part_shares, plan_steps, row_equivalents
from facediffuser.generation.job import GenerationJob
from facediffuser.generation.shard_generator import ShardGenerator, load_pipeline
from facediffuser.means import NONE
from facediffuser.pictures import stored_picture
from facediffuser.stage_timer import StageTimer
from facediffuser.stages import plan_stages
from facediffuser.storage import Store

Place = tuple[int, int]
_READ = ("sample_id", "image", "ip", "pc", "face_count", "status")


class CertificateWorker:
    """Makes parts of a certificate; `unit.data` holds the part's key and the (shard, place) of each of its rows."""

    def __init__(self, job: GenerationJob, pipeline=None, scorers=None):
        job.set_threads()
        assert job.exact_settings is not None  # a run in exact mode has no certificate
        self.job = job
        exact = exact_job(job)
        exact_pipeline = pipeline if pipeline is not None else load_pipeline(exact)
        self.exact = ShardGenerator(exact, exact_pipeline, scorers)
        self.warm = self.exact.device.type != "cuda"
        self.fast = ShardGenerator(job, exact_pipeline.with_scheduler(job.settings["scheduler"]), self.exact.scorers)

    def __call__(self, unit: Unit) -> Counts:
        key, places = unit.data
        store = self.job.store()
        planned, made = self._read(store, places)
        exact, fast, exact_settings = self.exact, self.fast, self.job.exact_settings or {}
        exact.cells, fast.cells = {}, {}
        exact_rows = [row | exact_settings for row in planned]
        if not self.warm:
            # The first images of a GPU wait for kernels to be chosen, loaded or compiled: they say nothing of its speed.
            fast.denoise(planned, StageTimer())
            exact.denoise(exact_rows, StageTimer())
            self.warm = True
        timers = {"exact": StageTimer(), "fast": StageTimer()}
        # Fast mode's images are made here once more, for their masks and to be timed beside exact mode's.
        fast.denoise(planned, timers["fast"])
        finished = exact.rows(exact_rows, timers["exact"])
        rows = [
            certificate_row(one, row, exact.cells.get(row["sample_id"]), fast.cells.get(row["sample_id"]))
            for one, row in zip(finished, made, strict=True)
        ]
        marks = self.job.fingerprint, self.job.run, self.job.settings["provenance"]
        schema = with_marks(CERTIFICATE_SCHEMA, *marks, computed_with=exact.provenance)
        seconds = {name: round(timer.seconds["denoise"], 4) for name, timer in timers.items()}
        counts = {"rows": len(rows), "seconds": seconds, "cost": self._cost()}
        # Timings first: a part that is there has them.
        store.put(stats_key(key), (json.dumps(counts, indent=1) + "\n").encode())
        store.put(key, encode_rows(rows, schema))
        return {"rows": len(rows)}

    def _read(self, store: Store, places: Sequence[Place]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Return the planned rows and those of the dataset; each shard is read once."""
        planned, made = {}, {}
        for shard in dict.fromkeys(shard for shard, _ in places):
            rows = read_shard_rows(store, self.job.layout, shard, self.job.fingerprint)
            table = read_columns(store, self.job.layout.shard_key(shard), _READ)
            wanted = [place for one, place in places if one == shard]
            found = table.take(pa.array(wanted)).to_pylist()
            for place, row in zip(wanted, found, strict=True):
                planned[shard, place], made[shard, place] = rows[place], row
        return [planned[one] for one in places], [made[one] for one in places]

    def _cost(self) -> dict[str, float]:
        """Return the UNet rows of an image in both modes."""
        settings, pipeline = self.job.settings, self.exact.pipeline
        unet = pipeline.unet if pipeline.unet is not None else pipeline.unet_text
        costs = {}
        for name, means, one in (("exact", NONE, self.exact), ("fast", self.job.means, self.fast)):
            row = settings | (self.job.exact_settings or {}) if name == "exact" else settings
            stages = plan_stages(
                row["method"],
                one.pipeline.num_timesteps,
                row["num_inference_steps"],
                row["fusion_start"],
                row["fusion_end"],
            )
            shares = part_shares(unet, means.deep_layers) if means.keeps_features else {"whole": 1.0}
            costs[name] = round(row_equivalents(plan_steps(stages, means), shares), 2)
        return costs


def certificate_row(
    exact: dict[str, Any], fast: dict[str, Any], exact_cells: torch.Tensor | None, fast_cells: torch.Tensor | None
) -> dict[str, Any]:
    """Return a row of CERTIFICATE_SCHEMA.

    Args:
        exact: the finished row in exact mode.
        fast: the dataset's row, with its image.
        exact_cells: the cells that the SDM won in most of the fused steps in exact mode, (h, w) bool; None without fusion.
        fast_cells: the same in fast mode.
    """
    failed = [name for name, row in (("exact", exact), ("fast", fast)) if row["status"] != "ok"]
    error = f"the row failed in {' and '.join(failed)} mode" if failed else None
    same = {
        name: exact[name]
        for name in ("sample_id", "prompt_id", "subject_ids", "height", "width", "image", "image_sha256")
    }
    row = {
        **same, "exact_ip": exact["ip"], "exact_pc": exact["pc"], "exact_faces": exact["face_count"],
        "fast_ip": fast["ip"], "fast_pc": fast["pc"], "fast_faces": fast["face_count"], "mask_cells": None, "ssim": None,
        "status": "failed" if failed else "ok", "error": error,
    }  # fmt: skip
    if failed:
        return row
    if exact_cells is not None and fast_cells is not None:
        row["mask_cells"] = float((exact_cells != fast_cells).float().mean())
    pictures = (stored_picture(one["image"]["bytes"], exact["sample_id"]) for one in (exact, fast))
    row["ssim"] = similarity(*(np.asarray(picture) for picture in pictures))
    return row


def similarity(one: np.ndarray, other: np.ndarray) -> float:
    """Return the structural similarity (SSIM) of two pictures, -1..1; 1 for equal ones.

    Args:
        one: (h, w, 3) of 0..255.
        other: the same.
    """
    from skimage.metrics import structural_similarity

    side = min(7, *one.shape[:2])
    window = side if side % 2 else side - 1
    return float(structural_similarity(one, other, win_size=window, channel_axis=2, data_range=255))


def exact_job(job: GenerationJob) -> GenerationJob:
    """Return the job whose rows are made in exact mode; it keeps the run's fingerprint, for the plan and references."""
    settings = {name: value for name, value in job.settings.items() if name != "speed"} | (job.exact_settings or {})
    return replace(job, run={**job.run, "settings": settings})


def certificate_parts(job: GenerationJob) -> dict[str, list[Place]]:
    """Return (shard, place) of the rows of each part of a run's certificate, by the part's key."""
    places = choose_sample(job.store(), job.layout)
    size = rows_per_part(job.batch_size)
    chunks = [places[start : start + size] for start in range(0, len(places), size)]
    return dict(zip(part_keys(len(places), size, job.layout.name), chunks, strict=True))


def missing_parts(job: GenerationJob, parts: Iterable[str]) -> list[str]:
    """Return the keys of parts that are not there whole, with this run's fingerprint and their timings."""
    store = job.store()
    there = {info.key for info in (*store.list(CERTIFICATE_PREFIX), *store.list("stats/"))}
    return [
        key for key in parts
        if key not in there or stats_key(key) not in there or shard_mark(store, key) != job.fingerprint
    ]  # fmt: skip


def certificate_stage(
    job: GenerationJob,
    parts: dict[str, list[Place]],
    missing: Sequence[str],
    worker: type[CertificateWorker] = CertificateWorker,
) -> Stage:
    """Return the stage that makes the missing parts of a certificate.

    Args:
        job: the run in fast mode.
        parts: the (shard, place) of the rows of each part, by its key.
        missing: the keys of the parts to make.
        worker: the class that makes a part.
    """
    units = [Unit(key, len(parts[key]), (key, parts[key])) for key in missing]
    finished = sum(len(places) for places in parts.values()) - sum(unit.rows for unit in units)
    return Stage(
        "Certify", "images", job.run, units, functools.partial(worker, job), finished=finished, pool=job.pool,
        limits=job.limits,
    )  # fmt: skip
