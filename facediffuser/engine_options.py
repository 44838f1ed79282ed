"""How the models are run: the options of the engine, and which of its two kinds a run takes. Without torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from facediffuser.errors import InputError

EngineName = Literal["auto", "eager", "compiled"]
Compile = Literal["none", "full", "blocks"]

ATTENTION_KERNELS = ("default", "flash", "efficient", "cudnn", "math")

COMPILING_PAYS_FROM = 2000
"""Images of 512 px from which compiling pays: it takes about 100 s where no compiled code is kept, and saves about 0.15 s an
image on an H200."""
_PIXELS = 512 * 512


def parse_attention(text: str) -> dict[int | None, str]:
    """Return the kernel by head size that a text names; the key None stands for every size.

    Raises:
        InputError: neither a kernel's name nor `size=kernel` with commas.
    """
    if "=" not in text:
        return {None: text}
    found: dict[int | None, str] = {}
    for part in text.split(","):
        size, _, kernel = part.partition("=")
        if not size.strip().isdigit():
            raise InputError(f"attention {text!r}: give a kernel's name, or one per head size, as 40=flash,80=cudnn")
        found[int(size)] = kernel.strip()
    return found


@dataclass(frozen=True)
class EngineOptions:
    """How the two UNets and the VAE's decoder are run; the mathematics is the same in all of them.

    The last bits of an image depend on every option but `text_once`, so they are part of a run's identity.

    Attributes:
        compile: `none` runs the models as they are (eager), `full` compiles each UNet as one graph, `blocks` only its
            transformer blocks, which starts sooner.
        channels_last: keep images' channels last in memory, as the tensor cores of a GPU read them.
        fused_projections: compute query, key and value of self-attention as one matrix product.
        text_once: compute keys and values of a prompt once per image; they are the same at every step.
        attention: the kernel of attention (ATTENTION_KERNELS), one for all, or one per head size: `40=flash,80=cudnn`.
        compiled_decoder: compile the VAE's decoder, too.
        cuda_graphs: record the launches of a UNet and repeat them; it pays where launches take longer than the kernels.
        autotune: time several kernels for each product and take the quickest. Which it is can differ from one process to
            the next, so keep and share the compiled code (`compiled_code`).
        common_start: compute what lies before the first cross-attention once for baseline and condition, whose latents are
            the same; with `cuda_graphs` it has no effect.
        pointwise_products: compile convolutions of one pixel as matrix products.
    """

    compile: Compile = "none"
    channels_last: bool = False
    fused_projections: bool = False
    text_once: bool = False
    attention: str = "default"
    compiled_decoder: bool = False
    cuda_graphs: bool = False
    autotune: bool = False
    common_start: bool = False
    pointwise_products: bool = False

    def __post_init__(self):
        for kernel in parse_attention(self.attention).values():
            if kernel not in ATTENTION_KERNELS:
                raise InputError(
                    f"attention kernel {kernel!r}: unknown; choose one of {', '.join(ATTENTION_KERNELS)}, or one per head "
                    "size, as 40=flash,80=cudnn"
                )
        if (self.cuda_graphs or self.autotune or self.pointwise_products) and not self.compiles:
            raise InputError(
                "cuda_graphs, autotune and pointwise_products: they are of compiled code; set compile to full or blocks"
            )

    @property
    def compiles(self) -> bool:
        """Whether anything is compiled."""
        return self.compile != "none" or self.compiled_decoder

    def without_compiling(self) -> "EngineOptions":
        """Return these options without those of compiled code."""
        return replace(
            self, compile="none", compiled_decoder=False, cuda_graphs=False, autotune=False, pointwise_products=False
        )

    def as_document(self) -> dict[str, Any]:
        """Return the options by name, as a run document holds them."""
        return asdict(self)

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> "EngineOptions":
        """Return the options that a run document holds.

        Raises:
            InputError: an option of a later version.
        """
        unknown = document.keys() - {field.name for field in fields(cls)}
        if unknown:
            raise InputError(
                f"engine option {min(unknown)!r}: unknown here; use the version that the run was begun with"
            )
        return cls(**document)


EAGER = EngineOptions()
COMPILED = EngineOptions(
    compile="full",
    channels_last=True,
    fused_projections=True,
    text_once=True,
    compiled_decoder=True,
    common_start=True,
    pointwise_products=True,
)


def choose_engine(
    named: EngineName, images: int, height: int, width: int, gpu: bool, begun_with: str | None = None
) -> tuple[Literal["eager", "compiled"], str]:
    """Return the engine of a run, and why in a few words.

    Args:
        named: what the user gave.
        images: images of the run.
        height: that of an image in px.
        width: that of an image in px.
        gpu: whether workers have one.
        begun_with: the engine of the run that is resumed; None for a new one.
    """
    if named != "auto":
        return named, "as given"
    if begun_with is not None:
        return "compiled" if begun_with == "compiled" else "eager", "the run was begun with it"
    if not gpu:
        return "eager", "no GPU: compiling does not pay there"
    work = images * height * width / _PIXELS
    found = f"({images:,} of {width} x {height} px)"
    if work < COMPILING_PAYS_FROM:
        return "eager", f"too few images to pay for compiling {found}; --engine compiled does it"
    return "compiled", f"enough images to pay for compiling {found}; --engine eager leaves it out"
