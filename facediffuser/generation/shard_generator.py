"""The shard generator: holds the models and the scorers, and generates shards."""

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import torch
from PIL import Image

from facediffuser.compiled_code import CompiledCode, code_key
from facediffuser.dataset.image_files import SUFFIXES, encode_image
from facediffuser.dataset.manifest import require_unchanged
from facediffuser.dataset.plan import read_shard_rows
from facediffuser.dataset.schema import RESULT_FIELDS
from facediffuser.dataset.shards import encode_shard, shard_mark
from facediffuser.engine import pad_rows
from facediffuser.errors import NotFiniteError
from facediffuser.generation.conditions import ConditionCache
from facediffuser.generation.energy import energy_meter
from facediffuser.generation.job import GenerationJob, Listed
from facediffuser.means import NONE
from facediffuser.number_words import counted
from facediffuser.prompts import without_markers
from facediffuser.runs import check_provenance, current_provenance
from facediffuser.schedulers import set_scheduler
from facediffuser.scoring.face_labels import label_faces
from facediffuser.scoring.scorers import load_scorers
from facediffuser.stage_timer import StageTimer
from facediffuser.storage import open_store
from facediffuser.storage.opening import default_cache

logger = logging.getLogger(__name__)

Row = dict[str, Any]
ERROR_LENGTH = 500
ENCODERS = 4
"""Threads that encode the images of a batch beside a GPU: Pillow's encoders release the interpreter."""


class ShardGenerator:
    """Generates shards of one run: `generator(shard)` puts the shard and its stats and returns the stats.

    `replace` puts a shard that is there already, `rows` generates a few rows and puts nothing.

    Loads the models and the scorers once; `pipeline`, `scorers` and `references` (by default the dataset's) take their
    place where given. Scoring and encoding of a batch run beside the denoising of the next. Where `cells` is a dict, it
    gets of each row the cells that the SDM won in most of the fused steps, (h, w) bool, by sample_id.

    Raises:
        InputError: the job demands an exact provenance, and this worker has another.
    """

    def __init__(self, job: GenerationJob, pipeline=None, scorers=None, references: pa.Table | None = None):
        self.job = job
        self.store = job.store()
        self.device = torch.device(job.device)
        self.pipeline = pipeline if pipeline is not None else load_pipeline(job)
        for recorded in job.required:
            check_provenance(job.output, [recorded], self.provenance, exact=True)
        self._code = _compiled_code(job, self.pipeline) if job.engine else None
        if self._code is not None:
            self._code.load()
        self.scorers = scorers if scorers is not None else load_scorers(job.scorers, self.device)
        self.meter = energy_meter(self.device)
        self.cells: dict[str, torch.Tensor] | None = None
        _require_same("models' scorers", dict(self.scorers.digests), job.run["scorers"])
        self._means = {"means": job.means} if job.means != NONE else {}
        self.conditions = ConditionCache(
            self.pipeline,
            self.store,
            job.fingerprint,
            with_subjects=job.settings["method"] != "tdm",
            references=references,
            negative_prompt=job.settings.get("negative_prompt", ""),
            references_key=job.references_key,
            plan_keys=job.layout.part_keys(),
        )

    def __call__(self, shard: int) -> dict[str, Any]:
        """Return the stats of one shard, generated now, or found finished by a killed run or another worker."""
        layout = self.job.layout
        key = layout.shard_key(shard)
        if self.store.exists(key) and shard_mark(self.store, key) == self.job.fingerprint:
            return {"shard": shard, "rows": layout.shard_rows(shard), "found": True}
        return self._generate_and_put(shard, lambda stats: True)

    @property
    def provenance(self) -> dict[str, Any]:
        """What this process computes with: libraries, code, threads, hardware."""
        gpu = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None
        found = current_provenance(torch.get_num_threads(), gpu)
        if self.job.engine:
            # A compiled run runs eager where nothing can be compiled: the last bits are others there.
            found["engine"] = "compiled" if self.pipeline.engine.compiles else "eager"
        return found

    def replace(
        self,
        shard: int,
        listed: Listed | None = None,
        changed: bool = True,
        fewer_failed_than: int | None = None,
        manifest: str | None = None,
    ) -> dict[str, Any]:
        """Generate a shard whether it is there or not, and return its stats with `put`: whether it was put.

        Args:
            shard: its number.
            listed: what the manifest says of it. Where the same bytes come out they are put, with the provenance listed.
            changed: put a shard that comes out with other bytes than those listed, with the provenance here.
            fewer_failed_than: put it only when fewer of its rows failed.
            manifest: the digest of the manifest that the command began with. Once another stands there nothing is put: the
                shard may have been made without a person who was taken out.

        Raises:
            StorageError: the manifest is another by now.
        """

        def accepted(stats: dict[str, Any]) -> bool:
            if manifest is not None:
                require_unchanged(self.store, manifest)
            same = listed is not None and stats["sha256"] == listed.sha256
            return same or (changed and (fewer_failed_than is None or stats["failed"] < fewer_failed_than))

        return self._generate_and_put(shard, accepted, listed)

    def rows(self, planned: list[Row], timer: StageTimer | None = None) -> list[Row]:
        """Return planned rows finished, in batches from the first on; nothing is put.

        Args:
            planned: rows of the plan.
            timer: gets the seconds spent.
        """
        self.conditions.open(planned)
        return self._generate(planned, timer or StageTimer())[0]

    def denoise(self, planned: list[Row], timer: StageTimer) -> None:
        """Make the images of planned rows, in batches, for their `cells` and the seconds they take; they are not kept."""
        self.conditions.open(planned)
        for start in range(0, len(planned), self.job.batch_size):
            batch = planned[start : start + self.job.batch_size]
            self._denoise_or_split(batch, timer, Counter(), self.job.batch_size)

    def _generate_and_put(
        self, shard: int, accepted: Callable[[dict[str, Any]], bool], listed: Listed | None = None
    ) -> dict[str, Any]:
        layout, timer = self.job.layout, StageTimer()
        joules_before = self.meter.joules() if self.meter else 0.0
        planned = read_shard_rows(self.store, layout, shard, self.job.fingerprint)
        self.conditions.open(planned)
        rows, counts = self._generate(planned, timer)
        with timer("pack"):
            data, computed_with = self._encode(rows, listed)
        failed = sum(row["status"] == "failed" for row in rows)
        stats = {
            "shard": shard,
            "rows": len(rows),
            "ok": len(rows) - failed,
            "failed": failed,
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "retries": dict(counts),
            "device": device_name(self.device),
            "computed_with": computed_with,
            "joules": round(self.meter.joules() - joules_before, 3) if self.meter else None,
        }
        if not accepted(stats):
            return stats | {"seconds": _seconds(timer), "put": False}
        # Stats of an earlier try must not be taken for this one's, should this process end between the two puts.
        self.store.delete(layout.stats_key(shard))
        with timer("upload"):
            self.store.put(layout.shard_key(shard), data)
        stats["seconds"] = _seconds(timer)
        self.store.put(layout.stats_key(shard), (json.dumps(stats, indent=1) + "\n").encode())
        return stats | {"put": True}

    def _encode(self, rows: list[Row], listed: Listed | None) -> tuple[bytes, dict[str, Any] | None]:
        """Return a shard's bytes and the provenance in its footer.

        The rows may come out as listed although a library is another now: then the bytes are those listed, footer and all.
        """
        if listed is not None:
            data = encode_shard(rows, self.job.schema_with(listed.computed_with))
            if hashlib.sha256(data).hexdigest() == listed.sha256:
                return data, listed.computed_with
        return encode_shard(rows, self.job.schema_with(self.provenance)), self.provenance

    # --- a shard's rows -----------------------------------------------------------------------------------------------

    def _generate(self, planned: list[Row], timer: StageTimer) -> tuple[list[Row], Counter]:
        counts: Counter[str] = Counter()
        size = self.job.batch_size
        batches = [planned[start : start + size] for start in range(0, len(planned), size)]
        finished: list[Row] = []
        with ThreadPoolExecutor(1, thread_name_prefix="finish") as pool:
            pending: Future | None = None
            for batch in batches:
                denoised = self._denoise_or_split(batch, timer, counts, size)
                if self._code is not None:
                    self._code.save()
                if pending is not None:
                    # One batch is finished while the next is denoised: no more than two are in memory.
                    with timer("wait"):
                        finished += pending.result()
                pending = pool.submit(self._finish_or_split, denoised, timer, counts)
            if pending is not None:
                with timer("wait"):
                    finished += pending.result()
        return finished, counts

    def _denoise_or_split(
        self, rows: list[Row], timer: StageTimer, counts: Counter, size: int, retry: bool = False
    ) -> list[tuple[Row, Any]]:
        """Return each row with (image, subject fraction), or with the error that a single row kept making.

        A compiled engine computes `size` rows whatever there are: it is compiled for that many, and a row's bytes do not
        depend on how many came with it.

        A batch that fails is retried whole once (a passing fault then leaves no trace in the bytes), then row by row;
        one that does not fit the memory is halved.
        """
        try:
            with timer("denoise"):
                return list(zip(rows, self._denoise(rows, size), strict=True))
        except Exception as error:
            _require_row_error(error)
            if len(rows) == 1 and retry:
                logger.warning("%s: failed: %s", rows[0]["sample_id"], error_line(error))
                return [(rows[0], error)]
            if isinstance(error, torch.OutOfMemoryError):
                counts["out_of_memory"] += 1
                parts = [rows[: len(rows) // 2], rows[len(rows) // 2 :]] if len(rows) > 1 else [rows]
                size = max(1, -(-size // 2))
            else:
                counts["denoise"] += 1
                parts = [[row] for row in rows] if retry else [rows]
            logger.warning(
                "a batch of %d failed (%s); retried in %s", len(rows), error_line(error), counted(len(parts), "part")
            )
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return [result for part in parts for result in self._denoise_or_split(part, timer, counts, size, retry=True)]

    def _denoise(self, rows: list[Row], size: int) -> list[tuple[Image.Image, float | None] | NotFiniteError]:
        first, count = rows[0], len(rows)
        text, fused, null = self.conditions.embeddings(rows)
        if self.job.engine:
            rows = rows + rows[-1:] * (size - count)
            text, fused = pad_rows(text, size), None if fused is None else pad_rows(fused, size)
        out = self.pipeline(
            prompt_embeds=text,
            subject_prompt_embeds=fused,
            negative_prompt_embeds=null,
            num_inference_steps=first["num_inference_steps"],
            guidance_scale=first["guidance_scale"],
            fusion_start=first["fusion_start"],
            fusion_end=first["fusion_end"],
            method=first["method"],
            height=first["height"],
            width=first["width"],
            # Noise of a row's own generator on the CPU: the same wherever and beside whatever rows it is denoised.
            generator=[torch.Generator("cpu").manual_seed(row["seed"]) for row in rows],
            **self._means,
        )
        if self.cells is not None and out.subject_cells is not None:
            self.cells |= {row["sample_id"]: won > 0.5 for row, won in zip(rows, out.subject_cells, strict=True)}
        # Rows whose numbers are not finite fail by themselves: a retry would end the same way.
        results = zip(out.images, out.subject_fraction, out.errors, strict=True)
        return [
            NotFiniteError(error) if error else (image, None if fraction != fraction else float(fraction))
            for image, fraction, error in list(results)[:count]
        ]

    def _finish_or_split(self, denoised: list[tuple[Row, Any]], timer: StageTimer, counts: Counter) -> list[Row]:
        succeeded = [(row, result) for row, result in denoised if not isinstance(result, Exception)]
        finished = iter(self._finish_parts(succeeded, timer, counts))
        return [
            failed_row(row, result) if isinstance(result, Exception) else next(finished) for row, result in denoised
        ]

    def _finish_parts(
        self, denoised: list[tuple[Row, Any]], timer: StageTimer, counts: Counter, retry: bool = False
    ) -> list[Row]:
        if not denoised:
            return []
        try:
            return self._finish(denoised, timer)
        except Exception as error:
            _require_row_error(error)
            if len(denoised) == 1 and retry:
                return [failed_row(denoised[0][0], error)]
            counts["finish"] += 1
            parts = [[one] for one in denoised] if retry else [denoised]
            logger.warning(
                "scoring %s failed (%s); retried in %s",
                counted(len(denoised), "image"),
                error_line(error),
                counted(len(parts), "part"),
            )
        return [row for part in parts for row in self._finish_parts(part, timer, counts, retry=True)]

    def _finish(self, denoised: list[tuple[Row, tuple[Image.Image, float | None]]], timer: StageTimer) -> list[Row]:
        images = [image for _, (image, _) in denoised]
        with timer("score"):
            references = [self.conditions.identities(row["subject_ids"]) for row, _ in denoised]
            prompts = [without_markers(row["prompt"]) for row, _ in denoised]
            scores = self.scorers.score(images, references, prompts)
            for score in scores:
                score.require_finite()
            labels = [
                label_faces(image, score.found, row["subject_ids"], score.subject_faces, self.conditions.gallery)
                for (row, (image, _)), score in zip(denoised, scores, strict=True)
            ]
        with timer("encode"):
            kind = self.job.settings["image_format"]
            marked = self.job.settings["provenance"]
            with ThreadPoolExecutor(ENCODERS if self.device.type == "cuda" else 1) as pool:
                ids = [row["sample_id"] for row, _ in denoised]
                files = list(pool.map(lambda image, name: encode_image(image, kind, name, marked), images, ids))
        return [
            row
            | {
                "image": {"bytes": data, "path": row["sample_id"] + SUFFIXES[kind]},
                "image_sha256": hashlib.sha256(data).hexdigest(),
                "ip": score.ip,
                "ip_per_subject": score.ip_per_subject,
                "face_count": score.face_count,
                "face_boxes": score.face_boxes,
                "face_probs": score.face_probs,
                "pc": score.pc,
                "subject_fraction": fraction,
                "status": "ok",
                "error": None,
                "faces": label.faces,
                "ip_margin": label.ip_margin,
            }
            for (row, (_, fraction)), data, score, label in zip(denoised, files, scores, labels, strict=True)
        ]


def failed_row(row: Row, error: Exception) -> Row:
    """Return a planned row with the error for which it has no image."""
    return row | {field.name: None for field in RESULT_FIELDS} | {"status": "failed", "error": error_line(error)}


def error_line(error: BaseException) -> str:
    """Return an error in one line, without the credentials of this process."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0] if lines else ''}".removesuffix(": ")
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID"):
        secret = os.environ.get(name)
        if secret:
            text = text.replace(secret, f"${name}")
    return text[:ERROR_LENGTH]


def _require_row_error(error: Exception) -> None:
    """Raise the error again unless it is one of its rows: a useless device or a full disk must not fail all to come."""
    if isinstance(error, torch.OutOfMemoryError):
        return
    if isinstance(error, (torch.AcceleratorError, OSError, MemoryError)) or "CUDA error" in str(error):
        raise error


def _require_same(what: str, here: dict[str, str], planned: dict[str, str]) -> None:
    if here != planned:
        raise RuntimeError(f"{what} on this node are not those of the run: {here}, planned {planned}")


def load_pipeline(job: GenerationJob):
    """Return the pipeline of a run on the worker's device, with the run's scheduler and precision.

    Raises:
        InputError: the models have other digests than the run's.
    """
    from facediffuser.modelfolder import model_digests, resolve_model
    from facediffuser.pipeline import FaceDiffuserPipeline

    folder = resolve_model(job.models)
    _require_same("models", model_digests(folder), job.run["models"])
    # The driver checked files of these digests.
    pipeline = FaceDiffuserPipeline.from_pretrained(folder, checked=True, dtype=getattr(torch, job.settings["dtype"]))
    set_scheduler(pipeline, job.settings["scheduler"])
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(job.device)
    if job.engine:
        pipeline.set_engine(job.engine)
    return pipeline


def _compiled_code(job: GenerationJob, pipeline) -> CompiledCode | None:
    """Return where the code of a compiled run is kept; None where the worker compiles nothing."""
    if not pipeline.engine.compiles:
        return None
    configs = {name: dict(part.config) for name in ("unet", "unet_text", "vae") if (part := getattr(pipeline, name))}
    shape = {name: job.settings[name] for name in ("batch_size", "height", "width", "dtype")} | job.means.as_document()
    key = code_key(pipeline.engine, torch.device(job.device), configs, shape)
    return CompiledCode(open_store(job.compiled_code or default_cache() / "compiled"), key)


def _seconds(timer: StageTimer) -> dict[str, float]:
    """The seconds of each stage, and of all in `total`."""
    stages = [*sorted(timer.seconds.items()), ("total", timer.elapsed())]
    return {stage: round(seconds, 4) for stage, seconds in stages}


def device_name(device: torch.device) -> str:
    """Return what the worker computes on, for the stats."""
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu, {counted(torch.get_num_threads(), 'thread')}"
    )
