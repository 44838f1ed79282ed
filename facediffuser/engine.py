"""The engine: runs a pipeline's UNets and decoder by `EngineOptions`, compiled or not, with the same mathematics.

    pipe.set_engine(EngineOptions(compile="full", channels_last=True, text_once=True))

Without an engine a pipeline calls its models as diffusers made them.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from cachetools import LRUCache
from torch import nn

from facediffuser.engine_options import EngineOptions, parse_attention
from facediffuser.unet_parts import common_start, has_common_start

logger = logging.getLogger(__name__)

DECODED_TOGETHER = 8
"""Images that a compiled decoder takes: one shape to compile, and its memory does not grow with the batch."""

# One UNet's blocks are compiled for several widths, sides and batch sizes; PyTorch's own limit of 8 is below that.
_MOST_SHAPES = 128

# Keys and values of 64 rows take 0.25 GB for Stable Diffusion. A UNet reads two sets of embeddings in a call, or parts of them.
_MOST_KEPT = 4

_BACKENDS = {
    "flash": torch.nn.attention.SDPBackend.FLASH_ATTENTION,
    "efficient": torch.nn.attention.SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": torch.nn.attention.SDPBackend.CUDNN_ATTENTION,
    "math": torch.nn.attention.SDPBackend.MATH,
}


class Engine:
    """Runs the models of one pipeline. Made by `FaceDiffuserPipeline.set_engine`, on the device that they stay on.

    Args:
        unets: UNet2DConditionModel by name; changed in place (attention processors, memory format).
        vae: the AutoencoderKL.
        options: how they are run.
    """

    def __init__(self, unets: dict[str, nn.Module], vae: nn.Module, options: EngineOptions):
        self.options = options
        self._unets = {name: _Unet(unet, options) for name, unet in unets.items()}
        self._vae = vae
        self._decode: Callable[[torch.Tensor], torch.Tensor] | None = None
        if options.compiled_decoder:
            if options.channels_last:
                vae.to(memory_format=torch.channels_last)
            self._decode = _compiled(_decoder_of(vae), options, graphs=False)

    def denoise(
        self, name: str, rows: torch.Tensor, t: torch.Tensor, embeds: torch.Tensor, paired: bool = False
    ) -> torch.Tensor:
        """Return the noise that a UNet predicts, (r, c, h, w).

        Args:
            name: the UNet's.
            rows: latents (r, c, h, w), as the scheduler scales them.
            t: the timestep, without dimensions, on the device.
            embeds: (r, n, d); what is computed of them once is kept until another tensor is given.
            paired: the second half of the rows is the first again, with other embeddings.
        """
        return self._unets[name](rows, t, embeds, paired)

    def evaluate(
        self, name: str, function: Callable, first: Any, t: torch.Tensor, embeds: torch.Tensor, *others: Any
    ) -> Any:
        """Return what a function of a UNet gives, compiled if whole UNets are: `function(unet, first, t, embeds, *others)`.

        Args:
            name: the UNet's.
            function: a plain function of a UNet and tensors, as those of `facediffuser.unet_parts`.
            first: rows, or features of rows.
            t: the timestep, without dimensions or one per row, on the device.
            embeds: (rows, n, d), as for `denoise`.
            others: further arguments.
        """
        return self._unets[name].evaluate(function, first, t, embeds, *others)

    def decode(self, latents: torch.Tensor) -> torch.Tensor | None:
        """Return the pictures of latents.

        Args:
            latents: (b, c, h, w), not divided by the scaling factor yet.

        Returns:
            (b, 3, H, W), about -1..1; None where the decoder is not compiled.
        """
        if self._decode is None or latents.dtype != self._vae.dtype:
            return None
        parts = []
        for start in range(0, len(latents), DECODED_TOGETHER):
            part = latents[start : start + DECODED_TOGETHER]
            parts.append(self._decode(_in_format(pad_rows(part, DECODED_TOGETHER), self.options))[: len(part)])
        return torch.cat(parts).contiguous()


def pad_rows(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """Return a tensor with its last row repeated until it has `rows` rows; one that has as many is returned as it is."""
    missing = rows - len(tensor)
    return tensor if missing <= 0 else torch.cat([tensor, tensor[-1:].expand(missing, *tensor.shape[1:])])


def can_compile(device: str | torch.device) -> bool:
    """Return whether torch.compile works on a device: it needs a C++ compiler, and Triton on a GPU.

    Another answer than True is logged as one warning.
    """
    try:
        torch.compile(_probe)(torch.ones(8, device=device))
    except Exception as error:  # whatever a missing compiler, a foreign compiler or a full disk raises
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        logger.warning("nothing can be compiled here (%s); install g++, the models run eager", reason[:200])
        return False
    return True


def _probe(x: torch.Tensor) -> torch.Tensor:
    return x * 2 + 1


# --- the UNet ---------------------------------------------------------------------------------------------------------


class _Unet:
    """A UNet prepared by the options: called with rows, timestep and embeddings."""

    def __init__(self, unet: nn.Module, options: EngineOptions):
        self.unet, self.options = unet, options
        if options.channels_last:
            unet.to(memory_format=torch.channels_last)
        self._cross: list[tuple[nn.Module, _Attention]] = []
        self._kept: LRUCache[int, tuple[torch.Tensor, list]] = LRUCache(_MOST_KEPT)
        self._functions: dict[Callable, Callable] = {}
        kernels = parse_attention(options.attention)
        if options.fused_projections or options.text_once or kernels != {None: "default"}:
            self._set_processors(kernels)
        self._run: Callable[..., Any] = unet
        # What CUDA graphs record is the UNet's own call.
        self._common_start = options.common_start and not options.cuda_graphs and has_common_start(unet)
        if options.compile == "full":
            self._run = _compiled(unet, options, graphs=options.cuda_graphs)
        elif options.compile == "blocks":
            with _compiler_settings(options):
                unet.compile_repeated_blocks(**_compile_arguments(options, graphs=options.cuda_graphs))
            self._run = _with_settings(unet, options)

    def _set_processors(self, kernels: dict[int | None, str]) -> None:
        for module in self.unet.modules():
            if not hasattr(module, "to_q") or not hasattr(module, "set_processor"):
                continue
            head = module.to_q.out_features // module.heads
            processor = _Attention(_BACKENDS.get(kernels.get(head, kernels.get(None, "default"))))
            if not module.is_cross_attention and self.options.fused_projections:
                module.fuse_projections()
                processor.fused = True
            module.set_processor(processor)
            if module.is_cross_attention and self.options.text_once:
                self._cross.append((module, processor))

    @torch.no_grad()
    def __call__(self, rows: torch.Tensor, t: torch.Tensor, embeds: torch.Tensor, paired: bool) -> torch.Tensor:
        if paired and self._common_start:
            return self.evaluate(common_start, _in_format(rows[: len(rows) // 2], self.options), t, embeds)
        with self._text(embeds):
            if self.options.cuda_graphs:
                torch.compiler.cudagraph_mark_step_begin()
            # float32 whatever the scheduler counts in: one type to compile for; the embedding of t is computed in it anyway.
            noise = self._run(
                _in_format(rows, self.options), t.float(), encoder_hidden_states=embeds, return_dict=False
            )[0]
            # What CUDA graphs return lies in memory that the next call writes.
            return noise.clone() if self.options.cuda_graphs else noise

    @torch.no_grad()
    def evaluate(self, function: Callable, first: Any, t: torch.Tensor, embeds: torch.Tensor, *others: Any) -> Any:
        if function not in self._functions:
            if self.options.compile == "full":
                self._functions[function] = _compiled(function, self.options, graphs=False)
            else:  # blocks that it calls may be compiled
                self._functions[function] = (
                    _with_settings(function, self.options) if self.options.compiles else function
                )
        with self._text(embeds):
            return self._functions[function](self.unet, first, t.float(), embeds, *others)

    @contextlib.contextmanager
    def _text(self, embeds: torch.Tensor) -> Iterator[None]:
        """Give the cross-attention its keys and values of the text during the block; the UNet is as it was after it."""
        if id(embeds) not in self._kept:
            # The tensor is kept along, so that no other one can have its id.
            self._kept[id(embeds)] = embeds, [(module.to_k(embeds), module.to_v(embeds)) for module, _ in self._cross]
        for (_, processor), made in zip(self._cross, self._kept[id(embeds)][1], strict=True):
            processor.keys, processor.values = made
        try:
            yield
        finally:
            for _, processor in self._cross:
                processor.keys = processor.values = None


class _Attention:
    """Attention of a diffusers `Attention` module, without what Stable Diffusion's UNets do not have (masks, norms).

    Attributes:
        backend: the kernel; None lets PyTorch choose.
        fused: query, key and value come out of one product, `to_qkv`.
        keys, values: those of the text, (2b, n, heads * d), where they are computed before.
    """

    def __init__(self, backend: torch.nn.attention.SDPBackend | None):
        self.backend, self.fused = backend, False
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, **others):
        if self.fused:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query = attn.to_q(hidden_states)
            context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
            key = attn.to_k(context) if self.keys is None else self.keys
            value = attn.to_v(context) if self.values is None else self.values
        rows, cells, width = query.shape
        query, key, value = (
            one.view(rows, -1, attn.heads, width // attn.heads).transpose(1, 2) for one in (query, key, value)
        )
        if self.backend is None:
            mixed = F.scaled_dot_product_attention(query, key, value)
        else:
            with torch.nn.attention.sdpa_kernel(self.backend):
                mixed = F.scaled_dot_product_attention(query, key, value)
        return attn.to_out[1](attn.to_out[0](mixed.transpose(1, 2).reshape(rows, cells, width)))


# --- compiling --------------------------------------------------------------------------------------------------------


def _decoder_of(vae: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    def decode(latents: torch.Tensor) -> torch.Tensor:
        return vae.decoder(latents if vae.post_quant_conv is None else vae.post_quant_conv(latents))

    return decode


def _compiled(function: Callable[..., Any], options: EngineOptions, graphs: bool) -> Callable[..., Any]:
    return _with_settings(torch.compile(function, **_compile_arguments(options, graphs)), options)


def _compile_arguments(options: EngineOptions, graphs: bool) -> dict[str, Any]:
    modes = {
        (False, False): None, (True, False): "reduce-overhead",
        (False, True): "max-autotune-no-cudagraphs", (True, True): "max-autotune",
    }  # fmt: skip
    return {"fullgraph": True, "dynamic": False, "mode": modes[graphs, options.autotune]}


def _with_settings(function: Callable[..., Any], options: EngineOptions) -> Callable[..., Any]:
    """Return a compiled function that is called, and so compiled, under the compiler's settings."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with _compiler_settings(options):
            return function(*args, **kwargs)

    return call


@contextlib.contextmanager
def _compiler_settings(options: EngineOptions) -> Iterator[None]:
    """Set torch's compiler so that two processes on the same card make the same code, unless it may choose by timing."""
    patches = [torch._dynamo.config.patch(recompile_limit=_MOST_SHAPES)]
    if options.pointwise_products:
        patches.append(torch._inductor.config.patch(conv_1x1_as_mm=True))
    if not options.autotune and hasattr(torch._inductor.config, "deterministic"):
        patches.append(torch._inductor.config.patch(deterministic=True))
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


def _in_format(tensor: torch.Tensor, options: EngineOptions) -> torch.Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if options.channels_last else tensor
