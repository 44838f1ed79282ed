"""How much work the sampler saves: UNet rows per stage, and time against simpler ways of running the same method.

    python -m benchmarks.sampler [--models miniature|DIR] [--steps 50] [--images 4] [--repeats 3] [--device cpu|cuda]
    python -m benchmarks.sampler --full-size [--images 8] [--largest 32] [--seconds 600] [--small]

Without --models, small random models stand in, so the rows are exact and the times are this machine's. All ways run
turn about in one process, from the same noise and embeddings, and the fastest repeat of each counts.

With --full-size the models are of Stable Diffusion v1-5's size, in half precision on a GPU, and the table is that of the
engine: the released way, eager, exact mode, and each of its means alone, with the share of a matrix product's rate and the
peak of memory; then how far compiled images are from eager ones, the attention kernels, and a profile. A way that would
not fit into --seconds is left out, and said to be. --small tries the same on small models.
"""

import argparse
import logging
import sys
import time
from collections.abc import Callable

import torch
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel

from benchmarks.beside import quiet
from benchmarks.engines import EAGER_WAY, EXACT, Bench, attention_table
from benchmarks.engines import ways as engine_ways
from facediffuser.pipeline import FaceDiffuserPipeline
from facediffuser.rehearsal.random_models import Size, modules
from facediffuser.window import default_fusion_window


def small_random_pipeline(width: int = 64) -> FaceDiffuserPipeline:
    """A pipeline of random UNets with the blocks of Stable Diffusion; its text parts are never called."""
    torch.manual_seed(0)

    def unet() -> UNet2DConditionModel:
        return UNet2DConditionModel(
            sample_size=32, block_out_channels=(32, 64, 64), layers_per_block=1, cross_attention_dim=width,
            attention_head_dim=4, norm_num_groups=8, down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
            up_block_types=("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
        ).eval()  # fmt: skip

    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=32).eval()
    return FaceDiffuserPipeline(
        vae=vae, text_encoder=None, tokenizer=None, scheduler=_scheduler(), unet=unet(), unet_text=unet()
    )


def _scheduler() -> PNDMScheduler:
    return PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True)


def full_size_pipeline(device: str) -> FaceDiffuserPipeline:
    """Two UNets of Stable Diffusion v1-5's size with random weights, in half precision on a GPU; no text parts."""
    torch.manual_seed(0)
    with torch.device(device):
        first, second = modules(Size()), modules(Size())
    pipe = FaceDiffuserPipeline(
        vae=first["vae"].eval(), text_encoder=None, tokenizer=None, scheduler=_scheduler(),
        unet=first["unet"].eval(), unet_text=second["unet"].eval(),
    )  # fmt: skip
    return pipe.to(device, torch.float16 if device == "cuda" else torch.float32)


def count_rows(pipe: FaceDiffuserPipeline, run: Callable[[], None]) -> dict[str, int]:
    """Return the rows each UNet was called with while `run` ran."""
    rows = {"unet_text": 0, "unet": 0}

    def hook(name: str):
        def add(module, args):
            rows[name] += len(args[0])

        return add

    hooks = [getattr(pipe, name).register_forward_pre_hook(hook(name)) for name in rows]
    run()
    for handle in hooks:
        handle.remove()
    return rows


def seconds(run: Callable[[], None]) -> float:
    """Return the wall time of one call, the GPU's work included."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def ways(pipe: FaceDiffuserPipeline, steps: int, images: int) -> dict[str, Callable[[], None]]:
    """Return the ways to compare, each making all the images."""
    width, channels = pipe.unet.config.cross_attention_dim, pipe.unet.config.in_channels
    side = pipe.unet.config.sample_size
    generator = torch.Generator().manual_seed(1)
    null, text, fused = (torch.randn(images, 77, width, generator=generator) for _ in range(3))
    noise = torch.randn(images, channels, side, side, generator=generator)
    start, end = default_fusion_window(steps)
    null, text, fused, noise = (one.to(pipe.unet.dtype) for one in (null, text, fused, noise))

    def sample(rows: slice, fusion_start: int, fusion_end: int, method: str = "face-diffuser") -> None:
        pipe(
            prompt_embeds=text[rows], subject_prompt_embeds=fused[rows], negative_prompt_embeds=null[rows],
            latents=noise[rows], num_inference_steps=steps, fusion_start=fusion_start, fusion_end=fusion_end,
            method=method, output_type="latent",
        )  # fmt: skip

    def image_by_image() -> None:
        for i in range(images):
            sample(slice(i, i + 1), start, end)

    every = slice(0, images)
    return {
        "face-diffuser": lambda: sample(every, start, end),
        "both models at every step": lambda: sample(every, 0, steps + 1),
        "face-diffuser, image by image": image_by_image,
        "tdm": lambda: sample(every, start, end, "tdm"),
        "sdm": lambda: sample(every, start, end, "sdm"),
    }


def engine_tables(
    bench: Bench,
    images: int,
    largest: int,
    seconds_left: Callable[[], float],
    most: int | None = None,
    code_is_kept: bool = False,
) -> tuple[FaceDiffuserPipeline | None, dict[str, float]]:
    """Print the tables of --full-size as they are made, the most important first.

    Args:
        bench: the models.
        images: images at once.
        largest: images at once where a compiled way is measured.
        seconds_left: how much time there is.
        most: so many of the ways alone; None for all.
        code_is_kept: the ways were compiled before, by another process.

    Returns:
        The pipeline of exact mode, None where it was not measured, and seconds an image by the name of the way.
    """
    say(bench.header())
    kept: dict[str, FaceDiffuserPipeline] = {}
    spent: dict[str, float] = {}
    for number, way in enumerate(engine_ways(images, largest)[:most]):
        expected = way.expected_seconds(code_is_kept)
        if expected > seconds_left():
            say(f"{way.name:<42} left out: {seconds_left():.0f} s left, it takes about {expected:.0f}")
            continue
        try:
            found, pipe = bench.measure(way)
        except Exception as error:  # one way that fails must not cost the others
            say(f"{way.name:<42} failed: {str(error).splitlines()[0][:200] if str(error) else type(error).__name__}")
            continue
        say(bench.line(way, found))
        if way.whole:
            spent[way.name] = found.image
        if way.name in (EXACT, EAGER_WAY):
            kept[way.name] = pipe
        del pipe
        if number == 2 and len(kept) == 2:
            if seconds_left() > 30:
                for line in bench.differences(kept.pop(EAGER_WAY), kept[EXACT], images, largest):
                    say(line)
            if seconds_left() > 30 and bench.gpu:
                say(bench.timed_convolutions(kept[EXACT], largest))
            if seconds_left() > 15:
                for line in bench.profile(kept[EXACT], largest):
                    say(line)
    if most is None and seconds_left() > 15:
        side = bench.pipe.unet.config.sample_size
        with quiet():
            for line in attention_table(bench.device, bench.pipe.unet.dtype, images, side):
                say(line)
    return kept.get(EXACT), spent


def say(line: str) -> None:
    """Print a line at once: a run on a borrowed machine may be cut off."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--models", help="model folder or `miniature`; default: small random models")
    kind.add_argument("--full-size", action="store_true", help="Stable Diffusion v1-5's size, random weights")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--largest", type=int, help="full size: images at once for compiled ways (default: 4 x --images)"
    )
    parser.add_argument("--seconds", type=float, default=900, help="full size: time for all of it")
    parser.add_argument("--small", action="store_true", help="full size: small models instead, to try it")
    options = parser.parse_args(argv)
    if options.full_size or options.small:
        logging.basicConfig(level=logging.WARNING)
        end = time.monotonic() + options.seconds
        pipe = small_random_pipeline() if options.small else full_size_pipeline(options.device)
        pipe.set_progress_bar_config(disable=True)
        engine_tables(
            Bench(pipe, options.steps),
            options.images,
            options.largest or 4 * options.images,
            lambda: end - time.monotonic(),
        )
        return
    pipe = FaceDiffuserPipeline.from_pretrained(options.models) if options.models else small_random_pipeline()
    pipe.set_progress_bar_config(disable=True)
    pipe.to(options.device)
    runs = ways(pipe, options.steps, options.images)
    rows = {name: count_rows(pipe, run) for name, run in runs.items()}  # the first run of each, which also warms up
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(options.repeats):
        for name, run in runs.items():
            best[name] = min(best[name], seconds(run))
    base = best["face-diffuser"]
    where = torch.cuda.get_device_name() if options.device == "cuda" else options.device
    lines = [f"{options.images} images, {options.steps} steps, {where}, {str(pipe.unet.dtype).removeprefix('torch.')}"]
    if options.device == "cuda":
        lines.append(f"peak of GPU memory: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    lines.append(f"{'way':<32}{'TDM rows/image':>16}{'SDM rows/image':>16}{'s/image':>10}{'time ratio':>12}")
    for name in runs:
        text, subject = (rows[name][unet] / options.images for unet in ("unet_text", "unet"))
        lines.append(
            f"{name:<32}{text:>16.0f}{subject:>16.0f}{best[name] / options.images:>10.3f}{best[name] / base:>12.2f}"
        )
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
