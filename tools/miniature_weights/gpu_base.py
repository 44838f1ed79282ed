"""The first call on a GPU machine: the base of the broad world, the faces of `ffhq`, and how fast both roles train."""

import json
import logging
import multiprocessing
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from facediffuser.training.recipe import Role
from tools.miniature_weights.gpu_call import Call, Size, forgetting_people, loaders_of, roles, say, window
from tools.miniature_weights.gpu_data import encode, prepare, render_ffhq
from tools.miniature_weights.packing import below, pack, put_copy
from tools.miniature_weights.paired_training import ALONE, PairedTraining, TrainingFailedError, begin, progress
from tools.miniature_weights.running_clock import RunningClock
from tools.miniature_weights.task_pool import Task

logger = logging.getLogger("gpu")

BASE, BROAD_DONE = "mini1-base.tar", "broad-done"
BROAD_PEOPLE = 4_000_000
"""First person of the broad world's pictures: nobody of a scorer's, of a photo set's or of a test's."""


def train_broad(work: Path, size: Size, cores: int, device: str, seconds: float, wall_end: float) -> None:
    """Let the shipped base go on with the world `broad`, in a process of its own.

    It takes a share (`size.base_share`) of what is left of `seconds` and of the wall time when its first step begins. Each
    time it has saved its weights it packs them: the files themselves may be half written at any other time.
    """
    import torch
    from diffusers import AutoencoderKL
    from transformers import CLIPTokenizer

    from facediffuser.shipped import base_folder
    from tools.miniature_weights.base import train_base
    from tools.miniature_weights.photo_stream import load_photos

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    clock = RunningClock(seconds, wall_end)
    making = work / "broad-base"
    shutil.copytree(base_folder(), making, dirs_exist_ok=True)
    photos = load_photos(size.broad_pictures, BROAD_PEOPLE, work / "photos", cores, world="broad")
    (work / "photos-ready").touch()
    vae = AutoencoderKL.from_pretrained(making / "vae").float()
    tokenizer = CLIPTokenizer.from_pretrained(making / "tokenizer")
    training: list[RunningClock] = []

    def progress() -> float:
        # From the first step on: how long pictures take depends on who else uses the cores.
        if not training:
            wall = size.base_share * (wall_end - time.time())
            training.append(RunningClock(max(1.0, size.base_share * clock.left()), time.time() + wall))
        return training[0].progress()

    def after_save(step: int) -> None:
        said = {"steps": step, "batch": size.base_batch, "seconds": training[0].ran}
        parts = [below(making / part, f"{part}/") for part in ("unet", "text_encoder")]
        pack({**parts[0], **parts[1], "broad.json": json.dumps(said).encode()}, work / BASE)

    train_base(
        vae,
        photos,
        tokenizer,
        10**6,
        making,
        size.base_batch,
        device=device,
        progress=progress,
        after_save=after_save,
    )
    (work / BROAD_DONE).touch()


def base_call(call: Call) -> None:
    """The first call."""
    from facediffuser.shipped import base_folder

    work, size, out = call.work, call.size, call.out
    context = multiprocessing.get_context("spawn")
    child = context.Process(
        target=_broad_process, args=(work, size, call.cores, call.device, call.seconds, call.started + call.wall)
    )
    child.start()
    seen: list[int] = []
    training: PairedTraining | None = None

    def keep() -> None:
        saved = work / BASE
        if saved.exists() and seen != [saved.stat().st_mtime_ns]:
            seen[:] = [saved.stat().st_mtime_ns]
            put_copy(saved, out / BASE)
        pack(call.logs() | below(call.tasks.folder / "rows"), out / "mini1-results.tar")

    try:
        call.wait(lambda: (work / "photos-ready").exists() or not child.is_alive(), "broad rendered")
        call.step("ffhq rendered", lambda: render_ffhq(work / "ffhq", size.ffhq_pictures, call.cores))
        call.step("ffhq prepared", lambda: prepare(work / "ffhq", work / "prepared", call.cores, work / "stages"))
        pack(below(work / "stages"), out / "mini1-faces.tar.xz", compress=True)
        # The rates are measured from the shipped base: its latents and embeddings are what a training with any base has.
        (work / "base").symlink_to(base_folder())
        encode(call, lambda: call.every(10, keep))
        training = PairedTraining(work, size.batch, roles(size), call.device, loaders_of(call))
        for role in ("sdm", "tdm"):
            training.start(role)
        call.wait(lambda: not child.is_alive(), "base", lambda: call.every(10, keep))
        keep()
        bases = {"shipped": base_folder(), "broad": work / "broad-base"}
        if not (work / BROAD_DONE).exists():
            # What lies there may be half of one save and half of another, or the shipped base itself.
            say("the base's training did not come to its end: it is not measured")
            del bases["broad"]
        sheet = [
            Task("sheet.png", "base", str(folder), steps=2 if call.device == "cpu" else 25, guidance=5.0)
            for name, folder in bases.items()
            if name == "broad"
        ]
        call.tasks.put(sheet)
        try:
            measure_rates(call, training, keep)
        except TrainingFailedError:
            logger.exception("rates: not all were measured")
        rows = []
        for name, folder in bases.items():
            models = models_of_base(work / "plain" / name, folder, size)
            rows.append(
                Task(
                    f"rows/base-{name}.json", models=str(models), method="tdm", name=name, first=forgetting_people(),
                    people=size.forgetting_people,
                    stop=size.forgetting_people, prompts="claim", steps=size.sampling_steps, window=window(size),
                    most_prompts=size.most_prompts,
                )
            )  # fmt: skip
        call.tasks.put(rows)

        def shown() -> None:
            for task in call.tasks.made(sheet):
                put_copy(call.tasks.folder / task.file, out / "mini1-base.png")

        call.wait(lambda: call.tasks.done([*sheet, *rows]), "bases measured", shown)
        shown()
    finally:
        if child.is_alive():
            child.kill()
        if training:
            for role in ("sdm", "tdm"):
                training.stop(role)
        keep()


def _broad_process(*arguments) -> None:
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(message)s", stream=open(arguments[0] / "broad.log", "a")
    )
    try:
        train_broad(*arguments)
    except Exception:
        logger.exception("the base's training failed")
        raise


def models_of_base(folder: Path, base: Path, size: Size) -> Path:
    """Return a model folder whose UNets are both a base's, as if nothing had been trained."""
    from tools.miniature_weights.checkpoint_models import write_models

    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "base").exists():
        (folder / "base").symlink_to(base.resolve())
    begin(folder, size.batch, roles(size))
    return write_models(base, str(folder / "tdm"), 0, str(folder / "sdm"), 0, folder / "models")


def measure_rates(call: Call, training: PairedTraining, keep: Callable[[], None]) -> None:
    """Let the SDM train alone, both, and the TDM alone, some seconds each, and say at which rates."""
    seconds, begun = call.size.rate_seconds, set[Role]()

    def measured(name: str) -> None:
        """Wait until all that run have reported, then so long, and say what they did in that time."""
        call.wait(
            lambda: all(progress(call.work, role) for role in begun) or call.past(0.9),
            f"{name} begun",
            training.look_after,
        )
        before = {role: progress(call.work, role) for role in begun}
        ran = call.clock.ran
        call.wait(lambda: call.clock.ran - ran > seconds or call.past(0.9), name, training.look_after)
        for role, earlier in before.items():
            now = progress(call.work, role)
            if now and earlier and call.clock.ran > ran:
                rate = (now.step - earlier.step) / (call.clock.ran - ran)
                say(
                    f"rate, {name}: {role} {rate:.1f} steps/s of {call.size.batch}, loss {earlier.loss:.4f}, {now.loss:.4f}"
                )
        keep()

    def let(role: Role) -> None:
        training.let(role)
        begun.add(role)

    let("sdm")
    measured("sdm alone")
    let("tdm")
    measured("both")
    training.stop("sdm")
    begun.remove("sdm")
    (call.work / ALONE).touch()
    measured("tdm alone")
    training.stop("tdm")
