"""Samples a second that training learns from: with the cache, without it, and in a plain loop.

    python -m benchmarks.training [--role sdm|tdm] [--steps 8] [--rounds 2] [--batch-size N] [--threads 1] [--loaders 1]
    python -m benchmarks.training --full-size [--batch-size 8] [--loaders 8]

The plain loop works as the released script does: pictures decoded, varied and put through the VAE, captions through the text
encoder, all four places for subjects through the image encoder, one after the other in the loop; torch's fused attention and
an optimiser that is not fused. All ways have the same data, base, batch size and compute type, and run turn about in one
process; the fastest round of each counts. The CPU time is that of the loop's own process: on a machine with other work it says
more than the wall. Without --full-size it is the miniature on its renderings; with it Stable Diffusion
v1-5 and CLIP ViT-L/14 with random weights at 512 px, on the GPU if there is one, with the peak of its memory.
"""

import argparse
import gc
import io
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from PIL import Image
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModelWithProjection

from facediffuser.miniature.render import render_set
from facediffuser.pictures import stored_picture
from facediffuser.preprocess.parts import encode_part
from facediffuser.preprocess.prepared_schema import PREPARED_SCHEMA
from facediffuser.shipped import base_folder
from facediffuser.training.loop import TrainingRun
from facediffuser.training.throughput import Throughput
from facediffuser.training.train_settings import TrainSettings
from facediffuser.training.worker_context import Worker

WARM_UP, SLOTS = 2, 4
RENDERED_PX = 128


@dataclass(frozen=True)
class Size:
    """Sizes of a base model; the defaults are those of Stable Diffusion v1-5 and CLIP ViT-L/14."""

    unet: tuple[int, ...] = (320, 640, 1280, 1280)
    vae: tuple[int, ...] = (128, 256, 512, 512)
    text: tuple[int, int, int] = (768, 12, 12)
    """Width, layers, heads."""
    vision: tuple[int, int, int] = (1024, 24, 16)
    reference_px: int = 224
    patch_px: int = 14
    groups: int = 32
    blocks: int = 2
    heads: int = 8


def modules(size: Size) -> dict[str, nn.Module]:
    """Return a base model of random weights, by part."""
    levels = len(size.unet)
    width, layers, heads = size.text
    seen, seen_layers, seen_heads = size.vision
    end = 49407
    text = CLIPTextConfig(
        vocab_size=end + 1, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=heads, max_position_embeddings=77, bos_token_id=end - 1, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=seen, intermediate_size=4 * seen, num_hidden_layers=seen_layers, num_attention_heads=seen_heads,
        image_size=size.reference_px, patch_size=size.patch_px, projection_dim=width,
    )  # fmt: skip
    return {
        "unet": UNet2DConditionModel(
            sample_size=64, in_channels=4, out_channels=4, block_out_channels=size.unet, layers_per_block=size.blocks,
            norm_num_groups=size.groups, attention_head_dim=size.heads, cross_attention_dim=width,
            down_block_types=("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
        ),
        "vae": AutoencoderKL(
            block_out_channels=size.vae, layers_per_block=size.blocks, latent_channels=4, norm_num_groups=size.groups,
            down_block_types=("DownEncoderBlock2D",) * len(size.vae), up_block_types=("UpDecoderBlock2D",) * len(size.vae),
            sample_size=512,
        ),
        "text_encoder": CLIPTextModel(text),
        "image_encoder": CLIPVisionModelWithProjection(vision),
    }  # fmt: skip


def write_base(folder: Path, size: Size) -> Path:
    """Write a base model of random weights with the miniature's tokenizer; return its folder."""
    torch.manual_seed(0)
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.38.0"}
    for name, part in modules(size).items():
        part.save_pretrained(folder / name)
        index[name] = ["diffusers" if name in ("unet", "vae") else "transformers", type(part).__name__]
    PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, skip_prk_steps=True,
        set_alpha_to_one=False,
    ).save_pretrained(folder / "scheduler")  # fmt: skip
    (folder / "tokenizer").mkdir()
    for path in (base_folder() / "tokenizer").iterdir():
        (folder / "tokenizer" / path.name).write_bytes(path.read_bytes())
    index |= {"scheduler": ["diffusers", "PNDMScheduler"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def write_prepared(folder: Path, count: int, side: int) -> Path:
    """Write renderings of `side` px as prepared Parquet, without the search for faces; return its folder."""
    render_set(count, 0, folder / "photos", min(side, RENDERED_PX))
    rows = [_row(path, side) for path in sorted((folder / "photos").glob("[0-9]*/*.json"))]
    (folder / "data" / "train").mkdir(parents=True)
    part = folder / "data" / "train" / "part-00000.parquet"
    part.write_bytes(encode_part(rows, PREPARED_SCHEMA, "benchmark"))
    files = {"train/part-00000.parquet": {"bytes": part.stat().st_size}}
    (folder / "data" / "manifest.json").write_text(json.dumps({"files": files}))
    return folder / "data"


def _row(path: Path, side: int) -> dict:
    content, picture = (
        json.loads(path.read_text()),
        stored_picture(next(path.parent.glob(f"{path.stem}.[jp][pn]g")).read_bytes(), path.stem),
    )
    factor = side // picture.width
    ids = np.kron(np.load(path.with_suffix(".npy")).astype(np.uint8), np.ones((factor, factor), np.uint8))
    jpeg, png = io.BytesIO(), io.BytesIO()
    picture.resize((side, side), Image.Resampling.BICUBIC).convert("RGB").save(jpeg, format="JPEG", quality=95)
    Image.fromarray(ids).save(png, format="PNG")
    subjects, faces = [], []
    for segment in content["segments"]:
        ys, xs = np.nonzero(ids == segment["id"])
        box = [int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1]
        head = [box[0], box[1], box[2], box[1] + box[2] - box[0]]
        start = content["caption"].rfind(" ", 0, segment["end"]) + 1
        subjects.append(
            {"phrase": content["caption"][start : segment["end"]], "start": start, "end": segment["end"],
             "segment_id": segment["id"], "box": box, "face_index": len(faces)}
        )  # fmt: skip
        faces.append({"box": head, "prob": 1.0, "landmarks": [[0.0, 0.0]] * 5, "crop_box": head, "crop_turn": 0.0})
    return {
        "image_id": path.stem, "image": {"bytes": jpeg.getvalue(), "path": f"{path.stem}.jpg"},
        "image_sha256": path.stem, "width": side, "height": side, "caption": content["caption"], "faces": faces,
        "subjects": subjects, "segmentation": png.getvalue(), "split": "train", "identity": None, "licence": None,
        "author": None, "source": "rendered",
    }  # fmt: skip


# --- the ways to compare ----------------------------------------------------------------------------------------------

Step = Callable[[], object]


def ours(settings: TrainSettings, loaders: int, device: str) -> Step:
    """Return a step of our loop."""
    run = TrainingRun(settings, Worker(device=device, loaders=loaders), lambda numbers: None)
    batches, throughput = run.batch_iterator(), Throughput(run.recipe.batch_size)
    return lambda: run.train_step(batches, throughput)


def plain(settings: TrainSettings, device: str) -> Step:
    """Return a step of a loop that does everything in its turn."""
    settings = settings.model_copy(update={"precompute": False, "attention": "sdpa", "ema": 0.0})
    run = TrainingRun(settings, Worker(device=device), lambda numbers: None)
    recipe, places = run.recipe, itertools.count(0, run.recipe.batch_size)
    optimiser = torch.optim.AdamW(run.trained, recipe.learning_rate, weight_decay=recipe.weight_decay, fused=False)

    def step() -> None:
        batch = run.batches[next(places)]
        if settings.role == "sdm":
            batch = replace(batch, references=_all_places(batch.references, recipe.batch_size * SLOTS))
        loss, _ = run.losses(batch.to(run.device))
        loss.backward()
        nn.utils.clip_grad_norm_(run.trained, recipe.max_grad_norm)
        optimiser.step()
        optimiser.zero_grad()
        float(loss.detach())  # printed

    return step


def _all_places(references: torch.Tensor, count: int) -> torch.Tensor:
    """The references, then zeros where no subject is: the image encoder is run on them, nobody reads what it says."""
    return torch.cat([references, references.new_zeros(count - len(references), *references.shape[1:])])


# --- measuring --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """Seconds a step, CPU seconds a step of the loop's process alone, the peak of the GPU's memory in GiB (0 on a CPU)."""

    seconds: float
    cpu_seconds: float
    peak: float


def measure(make: Callable[[], Step], steps: int, device: str) -> Measured:
    """Build a loop, run it warm, and return the time of `steps` steps of it."""
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    step = make()
    for _ in range(WARM_UP):
        step()
    if on_gpu:
        torch.cuda.synchronize()
    started, cpu_started = time.perf_counter(), time.process_time()
    for _ in range(steps):
        step()
    if on_gpu:
        torch.cuda.synchronize()
    seconds, cpu_seconds = (time.perf_counter() - started) / steps, (time.process_time() - cpu_started) / steps
    return Measured(seconds, cpu_seconds, torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0)


def compare(settings: TrainSettings, steps: int, rounds: int, loaders: int, device: str) -> dict[str, Measured]:
    """Return each way's fastest round; the ways take turns."""
    without = settings.model_copy(update={"precompute": False})
    ways: dict[str, Callable[[], Step]] = {
        "ours": lambda: ours(settings, loaders, device),
        "ours, no workers ahead": lambda: ours(settings, 0, device),
        "ours, without the cache": lambda: ours(without, loaders, device),
        "plain loop": lambda: plain(settings, device),
    }
    best: dict[str, Measured] = {}
    for _ in range(rounds):
        for name, make in ways.items():
            measured = measure(make, steps, device)
            gc.collect()
            best[name] = min_of(best[name], measured) if name in best else measured
    return best


def min_of(one: Measured, other: Measured) -> Measured:
    """Return the better of each number of two rounds."""
    return Measured(*(min(pair) for pair in zip(astuple(one), astuple(other), strict=True)))


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--role", choices=["tdm", "sdm"], default="sdm")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch-size", type=int, help="default: the preset's")
    parser.add_argument("--threads", type=int, default=1, help="of the loop on a CPU")
    parser.add_argument("--loaders", type=int, default=1)
    parser.add_argument("--pictures", type=int, default=128)
    parser.add_argument("--full-size", action="store_true", help="Stable Diffusion v1-5 at 512 px, random weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="facediffuser-benchmark-") as folder:
        root = Path(folder)
        base = str(write_base(root / "base", Size())) if options.full_size else "miniature"
        settings = TrainSettings(
            role=options.role, data=str(write_prepared(root, options.pictures, 512 if options.full_size else 64)),
            base=base, output=str(root / "run"), batch_size=options.batch_size, steps=10**6,
        )  # fmt: skip
        measured = compare(settings, options.steps, options.rounds, options.loaders, options.device)
        batch = settings.recipe().batch_size
    sys.stdout.write(table(measured, batch, options))


def table(measured: dict[str, Measured], batch: int, options: argparse.Namespace) -> str:
    """Return the measurements as text."""
    model = "Stable Diffusion v1-5, 512 px" if options.full_size else "miniature, 64 px"
    where = options.device if options.device != "cpu" else f"cpu, {options.threads} threads"
    lines = [f"{options.role} on {model}, batches of {batch}, {where}, {options.loaders} processes ahead"]
    lines.append(f"{'way':<28}{'samples/s':>12}{'s/step':>10}{'speed-up':>10}{'CPU s/step':>12}{'peak GiB':>10}")
    slowest = measured["plain loop"].seconds
    for name, one in measured.items():
        lines.append(
            f"{name:<28}{batch / one.seconds:>12.1f}{one.seconds:>10.3f}{slowest / one.seconds:>10.2f}{one.cpu_seconds:>12.3f}"
            + (f"{one.peak:>10.1f}" if one.peak else f"{'-':>10}")
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
