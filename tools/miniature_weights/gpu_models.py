"""The second call on a GPU machine: TDM and SDM trained beside each other on `ffhq`, and what is measured of them."""

import logging
import shutil
import tarfile
import threading
import time
from pathlib import Path

from tools.miniature_weights.gpu_call import Call, forgetting_people, loaders_of, roles, say, window
from tools.miniature_weights.gpu_data import encode, prepare, render_ffhq
from tools.miniature_weights.packing import below, pack, put_copy
from tools.miniature_weights.paired_training import PairedTraining, TrainingFailedError, begin, progress
from tools.miniature_weights.task_pool import Task

logger = logging.getLogger("gpu")


def models_call(call: Call, base: Path | None, faces: Path | None) -> None:
    """The second call."""
    from facediffuser.shipped import base_folder

    work, size = call.work, call.size
    shutil.copytree(base_folder(), work / "base", dirs_exist_ok=True)
    for archive, target in ((base, work / "base"), (faces, work / "stages")):
        if archive:
            with tarfile.open(archive) as held:
                held.extractall(target, filter="data")
    measuring = Measuring(call)
    training = PairedTraining(work, size.batch, roles(size), call.device, loaders_of(call))
    try:
        begin(work, size.batch, roles(size))
        measuring.add_point(0)
        call.step("ffhq rendered", lambda: render_ffhq(work / "ffhq", size.ffhq_pictures, call.cores))
        for role in ("sdm", "tdm"):
            training.start(role)
        call.step("ffhq prepared", lambda: prepare(work / "ffhq", work / "prepared", call.cores, work / "stages"))
        encode(call)
        for role in ("sdm", "tdm"):
            training.let(role)
        taken = [0]

        def during() -> None:
            training.look_after()
            call.every(20, lambda: progressed(call, training, taken))

        def enough() -> bool:
            measuring_time = max(size.measure_seconds, size.measure_share * call.seconds)
            return not call.leaves(measuring_time) or 0 < size.most_units <= training.common_units()

        try:
            call.wait(enough, "training", during)
        except TrainingFailedError:
            logger.exception("training ended early; what both have kept until then is measured")
        for role in ("tdm", "sdm"):
            training.stop(role)
        units = progressed(call, training, taken)
        if units:
            measuring.trained(units)
            call.wait(measuring.finished, "measuring", lambda: call.every(5, measuring.write))
    finally:
        for role in ("tdm", "sdm"):
            training.stop(role)
        measuring.write(last=True)


def progressed(call: Call, training: PairedTraining, taken: list[int]) -> int:
    """Say how far the trainings are; pack the models of the last checkpoint that both have; return which that is."""
    for role in ("tdm", "sdm"):
        if now := progress(call.work, role):
            say(f"{role}: step {now.step}, loss {now.loss:.4f}, {now.images_per_second / call.size.batch:.1f} steps/s")
    units = training.common_units()
    if units > taken[0]:
        taken[0] = units
        models = final_models(call, units)
        say(f"models after {units * call.size.units[0]} and {units * call.size.units[1]} steps are kept")
        parts = {
            name: below(models / name, f"{name}/") for name in ("unet_text", "unet", "image_encoder", "subject_fuser")
        }
        pack(parts["unet_text"], call.out / "mini2-tdm.tar")
        pack(parts["unet"] | parts["image_encoder"] | parts["subject_fuser"], call.out / "mini2-sdm.tar")
    pack(call.logs(), call.out / "mini2-results.tar")
    return units


def final_models(call: Call, units: int) -> Path:
    """Return the model folder of so many units of both trainings, in fp16, as it would be shipped."""
    from tools.miniature_weights.checkpoint_models import write_models
    from tools.miniature_weights.make import halve_trained_parts

    folder = call.work / "models" / str(units)
    if not folder.exists():
        steps = [units * unit for unit in call.size.units]
        made = folder.with_name(f"making-{units}")
        write_models(call.work / "base", str(call.work / "tdm"), steps[0], str(call.work / "sdm"), steps[1], made)
        halve_trained_parts(made)
        made.rename(folder)
    return folder


class Measuring:
    """What is measured of the models, as tasks, and what is written of it as far as it is there."""

    def __init__(self, call: Call):
        self.call, self.size, self.tasks = call, call.size, call.tasks
        self.points: dict[int, list[Task]] = {}
        self.candidates: list[Task] = []
        self.claims: dict[int, list[Task]] = {}
        self.words: list[Task] = []
        self.sheet: list[Task] = []
        self.units = 0
        self.choice = call.work / "choice.json"
        self.written: dict[str, object] = {}
        self.writer: threading.Thread | None = None

    def add_point(self, units: int, in_front: bool = False) -> None:
        """Measure forgetting after so many units of fine-tuning."""
        from tools.miniature_weights.forgetting import METHODS, PLAIN

        size = self.size
        models = str(final_models(self.call, units))
        same = dict(
            models=models, first=forgetting_people(), people=size.forgetting_people, stop=size.forgetting_people, prompts="claim",
            steps=size.sampling_steps, window=window(size), most_prompts=size.most_prompts,
        )  # fmt: skip
        tasks = [
            Task(f"rows/forgetting-{units}-{method}.json", method=method, name=method, **same) for method in METHODS
        ]
        tasks.append(Task(f"rows/forgetting-{units}-plain.json", method="tdm", name=PLAIN, plain=True, **same))
        self.points[units] = tasks
        self.tasks.put(tasks, in_front)

    def trained(self, units: int) -> None:
        """Plan what is measured of finished trainings: the choice, forgetting at the end, then at the points between."""
        from tools.miniature_weights.choose import FIRST_PERSON

        size, self.units = self.size, units
        models = str(final_models(self.call, units))
        same = dict(
            models=models,
            first=FIRST_PERSON,
            people=size.choice_people,
            stop=size.choice_people,
            prompts="choice",
            most_prompts=size.most_prompts,
        )
        self.candidates = [
            Task(
                f"rows/choice-{guidance}-{start}-{end}.json", guidance=guidance, window=(start, end), steps=size.sampling_steps,
                **same,
            )
            for guidance in size.guidances for start in size.starts for end in size.ends if start <= end
        ]  # fmt: skip
        self.tasks.put(self.candidates, in_front=True)
        self.add_point(units)
        for place in range(1, size.points):
            point = round(units * place / size.points)
            if point not in self.points:
                self.add_point(point)

    def _choose(self) -> None:
        """Plan the claim, the sheet and people's own words, with the guidance and window that are best."""
        from tools.miniature_weights import claim_here, own_words
        from tools.miniature_weights.choose import candidate_line, write_choice
        from tools.miniature_weights.claim_here import chosen_sampler
        from tools.miniature_weights.scored import Sampler

        size = self.size
        lines = [
            candidate_line(Sampler(task.steps, task.guidance, task.window), self.tasks.rows(task))
            for task in self.tasks.made(self.candidates)
        ]
        models = self.candidates[0].models
        chosen = Sampler(size.sampling_steps, window=window(size))
        if lines:
            said = write_choice(self.choice, lines, models, size.choice_people, size.sampling_steps)
            chosen = chosen_sampler(self.choice)
            say(f"chosen: guidance {said['guidance_scale']}, window {said['fusion_start']} to {said['fusion_end']}")
        else:
            say("nothing could be chosen: guidance and window are the claim's own")
        how = dict(
            models=models, guidance=chosen.guidance, window=chosen.window, steps=size.sampling_steps,
            most_prompts=size.most_prompts,
        )  # fmt: skip
        for first in range(0, size.claim_people, size.claim_set):
            self.claims[first] = [
                Task(
                    f"rows/claim-{first:02d}-{method}.json", method=method, name=method, first=claim_here.FIRST_PERSON,
                    people=size.claim_people, start=first, stop=first + size.claim_set, prompts="claim", **how,
                )
                for method in claim_here.METHODS
            ]  # fmt: skip
        self.words = [
            Task(
                f"rows/words-{prompts}-{word or 'own'}.json", first=own_words.FIRST_PERSON, people=size.words_people,
                stop=size.words_people, prompts=prompts, class_word=word, **how,
            )
            for prompts in ("words", "known") for word in ("person", None)
        ]  # fmt: skip
        self.sheet = [Task("sheet.png", "methods", people=min(6, size.claim_people), first=forgetting_people(), **how)]
        every = [*self.sheet, *(task for tasks in self.claims.values() for task in tasks)]
        self.tasks.put(every, in_front=True)
        self.tasks.put(self.words)

    def finished(self) -> bool:
        """Whether everything is measured; plans what depends on the choice as soon as that can be made."""
        if not self.claims and self.tasks.done(self.candidates):
            self._choose()
        every = [
            *self.sheet,
            *self.words,
            *(t for group in (self.points, self.claims) for ts in group.values() for t in ts),
        ]
        return bool(self.claims) and self.tasks.done(every)

    def write(self, last: bool = False) -> None:
        """Pack what is there, and write tables and curves of it beside all else: they take seconds.

        last: wait for them, as long as there is time, and pack them.
        """
        self._pack()
        if last and self.writer:
            self.writer.join(self._wall_left())
        if self.writer is None or not self.writer.is_alive():
            self.writer = threading.Thread(target=self._write_tables, daemon=True)
            self.writer.start()
        if last:
            self.writer.join(self._wall_left())
            self._pack()

    def _wall_left(self) -> float:
        """Seconds to wait for tables at the end: packing comes after them."""
        return max(0.0, self.call.wall_end - 1 - time.time())

    def _write_tables(self) -> None:
        making, out = self.call.work / "making-results", self.call.work / "results"
        for name, do in (("forgetting", self._write_forgetting), ("claim", self._write_claim)):
            try:
                making.mkdir(exist_ok=True)
                do(making)
                out.mkdir(exist_ok=True)
                for path in making.iterdir():
                    path.replace(out / path.name)
            except Exception:
                logger.exception("%s: not written", name)

    def _pack(self) -> None:
        files = self.call.logs() | below(self.call.work / "results") | below(self.tasks.folder / "rows", "rows/")
        pack(files | {"choice.json": self.choice}, self.call.out / "mini2-results.tar")
        if self.tasks.made(self.sheet):
            put_copy(self.tasks.folder / self.sheet[0].file, self.call.out / "mini2-methods.png")

    def _write_forgetting(self, out: Path) -> None:
        from tools.miniature_weights.command_line import write_csv
        from tools.miniature_weights.forgetting import TDM, plot, point_rows

        there = [units for units, tasks in sorted(self.points.items()) if self.tasks.made(tasks) == tasks]
        shown = there, self.units
        if not there or self.written.get("forgetting") == shown:
            return
        found = []
        for units in there:
            rows = [row for task in self.points[units] for row in self.tasks.rows(task)]
            rows += [row | {"method": TDM} for row in rows if row["method"] == "tdm"]
            found += point_rows(rows, units / max(1, self.units), *(units * unit for unit in self.size.units))
        write_csv(out / "forgetting.csv", found)
        plot(found).savefig(out / "forgetting.png", dpi=110)
        self.written["forgetting"] = shown

    def _write_claim(self, out: Path) -> None:
        from tools.miniature_weights.claim_here import numbered_from, write_claim
        from tools.miniature_weights.scored import Sampler

        there = [first for first, tasks in sorted(self.claims.items()) if self.tasks.made(tasks) == tasks]
        if not there or self.written.get("claim") == there:
            return
        rows = [
            row for first in there for task in self.claims[first] for row in numbered_from(first, self.tasks.rows(task))
        ]
        task = self.claims[there[0]][0]
        sampler = Sampler(task.steps, task.guidance, task.window)
        text = write_claim(out, rows, len(there) * self.size.claim_set, sampler, gate=False)
        self.written["claim"] = there
        say(text)
