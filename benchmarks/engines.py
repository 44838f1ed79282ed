"""What each means of the engine brings at full size: a table, differences between ways, and a profile by kernel.

Used by `python -m benchmarks.sampler --full-size` and by benchmarks/gpu.py. All ways have the same two UNets of random
weights, the same noise and the same embeddings; each is built from a copy of them. Work is counted by PyTorch's
FlopCounterMode on the eager model and set against the rate of a large matrix product in the same process.
"""

import copy
import functools
import gc
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from diffusers.models.attention_processor import AttnProcessor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.beside import quiet
from facediffuser.engine_options import COMPILED, EAGER, EngineOptions
from facediffuser.pipeline import FaceDiffuserPipeline
from facediffuser.window import default_fusion_window

RELEASED = "released way (classic attention, eager)"
EAGER_WAY = "eager, as without an engine"
EXACT = "exact mode (compiled)"
CALLS = 5


@dataclass(frozen=True)
class Way:
    """A way of running the models: its name, the engine's options, images at once, whether whole images are timed."""

    name: str
    options: EngineOptions
    images: int
    whole: bool = False

    def expected_seconds(self, code_is_kept: bool) -> float:
        """About what it takes on an H200: compiling most of all, or reading the code that another process has kept."""
        compiling = (30 if code_is_kept else 100 + 60 * self.options.autotune) if self.options.compiles else 8
        return compiling + (15 if self.whole else 0)


@dataclass(frozen=True)
class Found:
    """What was measured of a way; NaN where it was not.

    first: seconds of the first call of the TDM's UNet, compiling included.
    rows: UNet rows a second.
    decoded: seconds an image to decode.
    image: seconds an image, whole.
    peak: GiB of the GPU's memory.
    """

    first: float
    rows: float
    decoded: float
    image: float
    peak: float


def ways(images: int, largest: int, all_of_them: bool = True) -> list[Way]:
    """Return the ways to compare, the most important first; `images` at once for all, `largest` where it pays."""
    means = {
        "eager + common start": replace(EAGER, common_start=True),
        "eager + channels_last": replace(EAGER, channels_last=True),
        "eager + fused projections": replace(EAGER, fused_projections=True),
        "eager + text once": replace(EAGER, text_once=True),
    }
    compiled = [
        Way("exact mode, no common start", replace(COMPILED, common_start=False), largest),
        Way("exact mode, no pointwise products", replace(COMPILED, pointwise_products=False), largest),
        Way("exact mode + autotuning", replace(COMPILED, autotune=True), largest),
        Way("exact mode, attention by cuDNN", replace(COMPILED, attention="cudnn"), largest),
        Way("exact mode, attention by flash", replace(COMPILED, attention="flash"), largest),
        Way("compiled alone", EngineOptions(compile="full"), largest),
        Way("exact mode, twice as many at once", COMPILED, 2 * largest),
        Way("exact mode + CUDA graphs", replace(COMPILED, cuda_graphs=True), largest),
        Way("exact mode, blocks alone compiled", replace(COMPILED, compile="blocks"), largest),
    ]
    chosen = [
        Way(RELEASED, EAGER, images, whole=True),
        Way(EAGER_WAY, EAGER, images, whole=True),
        Way(EXACT, COMPILED, largest, whole=True),
    ]
    alone = [Way(name, options, images) for name, options in means.items()]
    return chosen + alone[:1] + compiled + alone[1:] if all_of_them else chosen


class Bench:
    """Two UNets and a VAE to measure ways with.

    Args:
        pipe: the pipeline, on its device, without an engine.
        steps: of a whole image.
    """

    def __init__(self, pipe: FaceDiffuserPipeline, steps: int):
        self.pipe, self.steps, self.device = pipe, steps, pipe.unet.device
        self.gpu = self.device.type == "cuda"
        self.product = matrix_rate(self.device, pipe.unet.dtype)
        self.row_flops = self._row_flops()
        start, end = default_fusion_window(steps)
        # Each step's two rows for one model, in the fused steps for both; PNDM has a step more than its number.
        self.rows_per_image = 2 * (steps + 1 + end - start)

    def inputs(self, images: int) -> tuple[torch.Tensor, ...]:
        """Return null, plain and augmented embeddings (b, n, d) and the noise (b, c, h, w) of so many images.

        An image's numbers do not depend on how many there are.
        """
        width, channels, side = (
            self.pipe.unet.config[name] for name in ("cross_attention_dim", "in_channels", "sample_size")
        )
        shapes = [(77, width)] * 3 + [(channels, side, side)]
        generators = [torch.Generator().manual_seed(number) for number in range(images)]
        drawn = [[torch.randn(shape, generator=one) for shape in shapes] for one in generators]
        return tuple(torch.stack(parts).to(self.device, self.pipe.unet.dtype) for parts in zip(*drawn, strict=True))

    @torch.no_grad()
    def _row_flops(self) -> float:
        null, _, _, noise = self.inputs(1)
        with FlopCounterMode(display=False) as counter:
            self.pipe.unet(noise, torch.tensor(500, device=self.device), null)
        return counter.get_total_flops()

    def build(self, way: Way) -> FaceDiffuserPipeline:
        """Return a pipeline of copies of the models that runs this way."""
        unet, unet_text, vae = (copy.deepcopy(getattr(self.pipe, name)) for name in ("unet", "unet_text", "vae"))
        scheduler = self.pipe.scheduler
        pipe = FaceDiffuserPipeline(vae=vae, text_encoder=None, tokenizer=None, scheduler=scheduler, unet=unet,
                                    unet_text=unet_text)  # fmt: skip
        pipe.set_progress_bar_config(disable=True)
        if way.name == RELEASED:
            for one in (unet, unet_text):
                one.set_attn_processor(AttnProcessor())
        pipe.set_engine(way.options)
        return pipe

    def sample(self, pipe, images: int, steps: int | None = None, output_type: str = "pil", callback=None):
        """Return what the pipeline makes of so many of the images."""
        null, text, fused, noise = self.inputs(images)
        names = ("latents", "mask") if callback else ("latents",)
        return pipe(
            prompt_embeds=text, subject_prompt_embeds=fused, negative_prompt_embeds=null, latents=noise,
            num_inference_steps=steps or self.steps, output_type=output_type, callback_on_step_end=callback,
            callback_on_step_end_tensor_inputs=names,
        )  # fmt: skip

    @torch.no_grad()
    def measure(self, way: Way) -> tuple[Found, FaceDiffuserPipeline]:
        """Build a way and time it; return the pipeline, too, for other uses."""
        gc.collect()
        if self.gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        pipe = self.build(way)
        call = self._call(pipe, way.images)
        first = self.seconds(call)
        call()
        with quiet():
            rate = 2 * way.images * CALLS / self.seconds(lambda: [call() for _ in range(CALLS)])
        noise = self.inputs(way.images)[3]
        pipe.decode_latents(noise, "pil")
        with quiet():
            decoded = self.seconds(lambda: pipe.decode_latents(noise, "pil")) / way.images
        whole = float("nan")
        if way.whole:
            self.sample(pipe, way.images, steps=3)  # the SDM's UNet is compiled here
            with quiet():
                whole = self.seconds(lambda: self.sample(pipe, way.images)) / way.images
        peak = torch.cuda.max_memory_allocated() / 2**30 if self.gpu else float("nan")
        return Found(first, rate, decoded, whole, peak), pipe

    def _call(self, pipe: FaceDiffuserPipeline, images: int) -> Callable[[], torch.Tensor]:
        """Return a call of the TDM's UNet for so many images, both rows of each."""
        null, text, _, noise = self.inputs(images)
        embeds, rows, t = torch.cat([null, text]), torch.cat([noise, noise]), torch.tensor(500, device=self.device)
        engine = pipe._engine
        if engine is None:
            return torch.no_grad()(lambda: pipe.unet_text(rows, t, embeds, return_dict=False)[0])
        return lambda: engine.denoise("unet_text", rows, t, embeds, paired=True)

    def seconds(self, run: Callable[[], object]) -> float:
        """Return the seconds of one call, the GPU's work included."""
        if self.gpu:
            torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        if self.gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    def header(self) -> str:
        """Return what the numbers are measured with."""
        where = torch.cuda.get_device_name() if self.gpu else "CPU"
        return (
            f"{where}, torch {torch.__version__}, {str(self.pipe.unet.dtype).removeprefix('torch.')}; matrix product "
            f"{self.product / 1e12:.1f} TFLOP/s; a UNet row is {self.row_flops / 1e12:.4g} TFLOP, an image of {self.steps} PNDM "
            f"steps {self.rows_per_image} rows\n"
            f"{'way':<42}{'at once':>8}{'first s':>9}{'rows/s':>9}{'of product':>11}{'decode ms':>11}{'s/image':>9}"
            f"{'images/s':>9}{'peak GiB':>9}"
        )

    def line(self, way: Way, found: Found) -> str:
        """Return a way's line; images a second are of whole images where those were timed, else of rows and decoding."""
        estimated = self.rows_per_image / found.rows + found.decoded
        image = found.image if way.whole else estimated
        mark = " " if way.whole else "~"
        share = found.rows * self.row_flops / self.product
        return (
            f"{way.name:<42}{way.images:>8}{found.first:>9.1f}{found.rows:>9.1f}{100 * share:>10.1f}%"
            f"{1000 * found.decoded:>11.1f}{mark + format(image, '.3f'):>9}{mark + format(1 / image, '.2f'):>9}"
            f"{found.peak:>9.1f}"
        )

    # --- exactness and where time goes ----------------------------------------------------------------------------------

    def masks_and_latents(self, pipe: FaceDiffuserPipeline, images: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the SDM's mask of every step (steps, images, 1, h, w) and the last latents."""
        masks: list[torch.Tensor] = []

        def keep(_, number, t, tensors):
            masks.append(tensors["mask"].bool())

        latents = self.sample(pipe, images, output_type="latent", callback=keep).images
        return torch.stack(masks), latents

    def timed_convolutions(self, pipe: FaceDiffuserPipeline, images: int) -> str:
        """Return a line of exact mode where cuDNN times its kernels for each convolution and takes the quickest.

        No option of the engine: the next process may find another one the quickest, and make other bytes.
        """
        torch.backends.cudnn.benchmark = True
        try:
            first = self.seconds(lambda: self.sample(pipe, images, steps=3))
            with quiet():
                took = self.seconds(lambda: self.sample(pipe, images)) / images
        finally:
            torch.backends.cudnn.benchmark = False
        return f"{'exact mode, convolutions by timing':<42}{images:>8}{first:>9.1f}{took:>40.3f}{1 / took:>9.2f}"

    def differences(
        self, one: FaceDiffuserPipeline, other: FaceDiffuserPipeline, images: int, others: int | None = None
    ) -> list[str]:
        """Return how the second way's images differ from the first one's, beside what another batch size does to the first.

        `others`: how many images the second way makes at once, where it is compiled for another number.

        The latents' difference is relative to their size; the first fused step has the same past in both, so that its mask
        says what the way does, and the later ones what follows from it.
        """
        first_masks, first = self.masks_and_latents(one, images)
        lines = [f"{'compared':<52}{'latents':>10}{'cells, first fused step':>25}{'cells, all fused steps':>24}"]
        half = [self.masks_and_latents(one, images // 2)] if images > 1 else []
        start, end = default_fusion_window(self.steps)
        for name, (masks, latents) in [
            ("other way", self.masks_and_latents(other, others or images)),
            *((f"the first way, {images // 2} at once", found) for found in half),
        ]:
            count = min(len(latents), images)
            latents, masks = latents[:count], masks[:, :count]
            relative = ((latents - first[:count]).float().norm() / first[:count].float().norm()).item()
            differ = (masks != first_masks[:, :count]).float().mean(dim=(1, 2, 3, 4))
            lines.append(
                f"{name:<52}{relative:>10.2e}{100 * differ[start].item():>24.4f}%{100 * differ[start:end].mean().item():>23.4f}%"
            )
        return lines

    @torch.no_grad()
    def profile(self, pipe: FaceDiffuserPipeline, images: int, most: int = 14) -> Iterator[str]:
        """Yield the kernels of three UNet calls by their share of the time, and the shares of their kinds."""
        call = self._call(pipe, images)
        activities = [torch.profiler.ProfilerActivity.CUDA if self.gpu else torch.profiler.ProfilerActivity.CPU]
        with quiet(), torch.profiler.profile(activities=activities) as found:
            for _ in range(3):
                call()
            if self.gpu:
                torch.cuda.synchronize()
        yield from kernels(found, self.gpu, 3, most)


def kernels(found: torch.profiler.profile, gpu: bool, calls: int, most: int = 14) -> Iterator[str]:
    """Yield the kernels of a profile by their share of the time, and the shares of their kinds.

    Args:
        found: the profile.
        gpu: whether it is of a GPU.
        calls: how many calls it is of.
        most: kernels that are named.
    """
    spent = {
        one.key: (one.self_device_time_total if gpu else one.self_cpu_time_total, one.count)
        for one in found.key_averages()
    }
    total = sum(time for time, _ in spent.values()) or 1.0
    kinds: defaultdict[str, float] = defaultdict(float)
    for name, (time_spent, _) in spent.items():
        kinds[kind_of(name)] += time_spent / total
    yield f"{total / calls / 1000:.1f} ms a call; by kind: " + ", ".join(
        f"{name} {100 * share:.1f}%" for name, share in sorted(kinds.items(), key=lambda k: -k[1])
    )
    for name, (time_spent, count) in sorted(spent.items(), key=lambda item: -item[1][0])[:most]:
        yield f"{100 * time_spent / total:>6.1f}% {count // calls:>5} x  {name[:110]}"


def kind_of(kernel: str) -> str:
    """Return what a kernel does, by its name."""
    name = kernel.lower()
    kinds = {
        "attention": ("fmha", "flash", "attention", "sdpa"),
        "convolution": ("conv", "wgrad", "dgrad", "xmma_fprop", "fprop", "implicit_gemm"),
        "matrix product": ("gemm", "cutlass", "nvjet", "ampere_", "sm90_", "mm"),
        "generated (norms, activations, sums)": ("triton", "graph_", "cpp_fused"),
        "copies": ("memcpy", "memset", "copy"),
    }
    return next((kind for kind, parts in kinds.items() if any(part in name for part in parts)), "other")


def matrix_rate(device: torch.device, dtype: torch.dtype, side: int | None = None) -> float:
    """Return FLOP/s of a large square matrix product."""
    side = side or (8192 if device.type == "cuda" else 512)
    one, other = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        one @ other
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(10):
        one @ other
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 10 * 2 * side**3 / (time.perf_counter() - started)


def attention_table(device: torch.device, dtype: torch.dtype, images: int, side: int = 64) -> Iterator[str]:
    """Yield the milliseconds of each attention kernel for the layers of Stable Diffusion's UNet, self and cross."""
    from torch.nn.attention import SDPBackend

    backends = {"flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION,
                "cudnn": SDPBackend.CUDNN_ATTENTION, "math": SDPBackend.MATH}  # fmt: skip
    yield f"{'layer (rows, heads, queries, keys, head size)':<50}" + "".join(f"{name:>12}" for name in backends)
    for level, head in enumerate((40, 80, 160)):
        cells = (side // 2**level) ** 2
        for keys in (cells, 77):
            q = torch.randn(2 * images, 8, cells, head, device=device, dtype=dtype)
            k, v = (torch.randn(2 * images, 8, keys, head, device=device, dtype=dtype) for _ in range(2))
            times = []
            for name, backend in backends.items():
                large = name == "math" and cells * keys > 2**22
                times.append("-" if large else _milliseconds(backend, (q, k, v), device))
            yield f"{str((2 * images, 8, cells, keys, head)):<50}" + "".join(f"{one:>12}" for one in times)


def _milliseconds(backend: torch.nn.attention.SDPBackend, qkv: tuple[torch.Tensor, ...], device: torch.device) -> str:
    attend = functools.partial(torch.nn.functional.scaled_dot_product_attention, *qkv)
    try:
        with torch.nn.attention.sdpa_kernel(backend):
            return f"{1000 * _quick(attend, device):.3f}"
    except RuntimeError:
        return "none"  # this kernel does not take the shape


def _quick(run: Callable[[], object], device: torch.device, times: int = 10) -> float:
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(times):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / times
