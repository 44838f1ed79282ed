"""FaceDiffuserPipeline: two Stable Diffusion UNets, one latent, three stages.

The TDM (`unet_text`) makes the scene, both models share the middle steps by saliency-adaptive noise fusion, and the SDM
(`unet`), whose prompt carries the reference pictures, makes the person (arXiv 2311.10329, section 3).
"""

import inspect
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.schedulers import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from facediffuser import subject
from facediffuser.engine import Engine, can_compile
from facediffuser.engine_options import EAGER, EngineOptions
from facediffuser.errors import InputError
from facediffuser.fast_sampling import FastPredictor
from facediffuser.means import NONE, Means
from facediffuser.model_check import check_model_folder
from facediffuser.modelfolder import resolve_model
from facediffuser.number_words import counted
from facediffuser.prompt_tokens import TokenizedPrompts, tokenize_with_markers
from facediffuser.prompts import count_markers, require_marked_words
from facediffuser.schedulers import set_scheduler, warn_of_few_steps
from facediffuser.stages import Conditions, Guidance, Method, Prediction, Stage, plan_stages, predict
from facediffuser.subject import SubjectFuser
from facediffuser.unet_parts import require_parts
from facediffuser.window import default_fusion_window

logger = logging.getLogger(__name__)

OUTPUT_TYPES = ("pil", "np", "pt", "latent")

Generators: TypeAlias = torch.Generator | list[torch.Generator] | None
References = Image.Image | Sequence[Image.Image] | Sequence[Sequence[Image.Image]]
StepCallback = Callable[[DiffusionPipeline, int, Any, dict], dict | None]


@dataclass
class FaceDiffuserPipelineOutput(BaseOutput):
    """Result of a call.

    Attributes:
        images: b images in the form of `output_type`.
        subject_fraction: per image, the share of latent cells that the SDM won, 0..1, mean over the fusion steps; NaN
            when no step was fused.
        errors: per image, None, or why it is unusable: its latents were not finite from some step on, or its decoded
            pixels are not finite or all equal.
        subject_cells: per image, the share of the fused steps in which the SDM won each cell, (b, h, w) float32 on the
            CPU, 0..1; None when no step was fused.
    """

    images: Any
    subject_fraction: list[float]
    errors: list[str | None] = field(default_factory=list)
    subject_cells: torch.Tensor | None = None


class FaceDiffuserPipeline(DiffusionPipeline):
    """Text and reference pictures to images of those subjects.

    A method needs only its own components: `tdm` works without `unet`, `image_encoder` and `subject_fuser`, `sdm` and
    `fastcomposer` work without `unet_text`.

    Args:
        vae: autoencoder of the latents.
        text_encoder: CLIP text model, width d.
        tokenizer: its tokenizer.
        scheduler: any diffusers scheduler whose `step` takes predicted noise.
        unet: the SDM.
        unet_text: the TDM.
        image_encoder: CLIP vision tower whose projection has the text encoder's width d.
        subject_fuser: joins image embeddings to the marked words of a prompt.

    Examples:
        >>> import torch
        >>> from PIL import Image
        >>> from facediffuser import FaceDiffuserPipeline
        >>> pipe = FaceDiffuserPipeline.from_pretrained("miniature")
        >>> reference = Image.open("man.png")
        >>> out = pipe(
        ...     "a man <|image|> reading a book", [reference], num_inference_steps=50, guidance_scale=5.0,
        ...     generator=torch.Generator("cpu").manual_seed(0),
        ... )
        >>> out.images[0].save("reading.png")
        >>> out.subject_fraction  # share of the latent that the subject model decided while both models ran
        [0.41]
    """

    model_cpu_offload_seq = "text_encoder->image_encoder->subject_fuser->unet_text->unet->vae"
    _optional_components = ["unet", "unet_text", "image_encoder", "subject_fuser"]
    _callback_tensor_inputs = ["latents", "noise_pred", "mask", "text_saliency", "subject_saliency"]

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        scheduler: SchedulerMixin,
        unet: UNet2DConditionModel | None = None,
        unet_text: UNet2DConditionModel | None = None,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        subject_fuser: SubjectFuser | None = None,
    ):
        super().__init__()
        self.register_modules(
            unet=unet,
            unet_text=unet_text,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            image_encoder=image_encoder,
            subject_fuser=subject_fuser,
            scheduler=scheduler,
        )
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self._guidance_scale, self._num_timesteps, self._interrupt = 0.0, 0, False
        self._engine: Engine | None = None

    @classmethod
    def from_pretrained(cls, model: str | Path, *, checked: bool = False, **kwargs) -> "FaceDiffuserPipeline":
        """Return the pipeline of a model folder, in float32 unless `dtype` says otherwise.

        Args:
            model: a diffusers folder, an s3:// URL, a hub id, or `miniature`.
            checked: its files were checked already; they are not read once more for it.
            **kwargs: passed to diffusers' `from_pretrained`, such as `dtype`, `revision`, or a component by name.

        Raises:
            InputError: the model cannot be found, or a file of it is missing, damaged or not finite.
        """
        if "torch_dtype" not in kwargs:
            kwargs.setdefault("dtype", torch.float32)
        folder = resolve_model(str(model), kwargs.pop("revision", None))
        if not checked:
            check_model_folder(folder, skip=kwargs, variant=kwargs.get("variant"))
        return super().from_pretrained(str(folder), **kwargs)

    @property
    def guidance_scale(self) -> float:
        """Guidance scale s of the current call, or of the last one."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Timesteps of the current call, or of the last one; PNDM has 51 for 50 inference steps."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the rest of the steps is skipped; set `pipe._interrupt = True` in a callback to stop after its step."""
        return self._interrupt

    @property
    def engine(self) -> EngineOptions:
        """How the models are run; the default options where `set_engine` was not called."""
        return self._engine.options if self._engine is not None else EAGER

    def set_engine(self, options: EngineOptions) -> EngineOptions:
        """Run the UNets and the decoder by these options from now on; return the options that hold.

        Call it once, last: when the pipeline is on its device and in its type. UNets and VAE are changed in place, so
        another engine needs a pipeline loaded anew. Where nothing can be compiled the models are prepared all the same and
        run eager, with a warning. Not for a pipeline whose models are offloaded to the CPU. Calls with
        `cross_attention_kwargs` run without it.

        Args:
            options: how the models are run; the default options are no engine.

        Raises:
            InputError: the pipeline has an engine already.
        """
        if self._engine is not None:
            raise InputError("set_engine: this pipeline has an engine already; load another pipeline")
        if options.compiles and not can_compile(self._execution_device):
            options = options.without_compiling()
        if options != EAGER:
            unets = {name: unet for name in ("unet", "unet_text") if (unet := getattr(self, name)) is not None}
            self._engine = Engine(unets, self.vae, options)
        return options

    def with_scheduler(self, kind: str) -> "FaceDiffuserPipeline":
        """Return a pipeline of the same models, run in the same way, with a scheduler of its own.

        Args:
            kind: the diffusers class of the scheduler; its configuration is this one's.
        """
        other = type(self)(**{**self.components, "scheduler": type(self.scheduler).from_config(self.scheduler.config)})
        set_scheduler(other, kind)
        other._engine = self._engine
        other.set_progress_bar_config(**getattr(self, "_progress_bar_config", {}))
        return other

    # --- conditions ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_prompt(self, prompts: str | Sequence[str]) -> torch.Tensor:
        """Return the plain text embeddings of prompts, markers left out.

        Args:
            prompts: one prompt or b; `""` gives the null embedding.

        Returns:
            (b, n, d): n tokens (77 for CLIP) of width d.

        Raises:
            InputError: no prompt, or one that is not a string.
        """
        return self._embed(tokenize_with_markers(self.tokenizer, _prompt_list(prompts), lost="drop"))

    @torch.no_grad()
    def encode_references(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Return one embedding per reference picture, (k, d).

        Args:
            images: k pictures of any size and mode; each is made RGB and resized to the image encoder's square.

        Raises:
            InputError: the pipeline has no image encoder, or something is not a picture.
        """
        return subject.encode_references(self._component("image_encoder"), images)

    @torch.no_grad()
    def fuse(
        self,
        prompts: str | Sequence[str],
        image_embeds: Sequence[torch.Tensor],
        prompt_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the subject-augmented embeddings of prompts.

        Args:
            prompts: one prompt or b, with a marker per subject.
            image_embeds: per prompt, the (k, d) embeddings of its references in the order of its k markers.
            prompt_embeds: (b, n, d), the result of `encode_prompt` if at hand.

        Returns:
            (b, n, d).

        Raises:
            InputError: references and markers differ in number, or are more than the model takes.
        """
        prompts = _prompt_list(prompts)
        _check_references(prompts, image_embeds, self._component("subject_fuser").config.max_subjects)
        tokens = tokenize_with_markers(self.tokenizer, prompts)
        return self._fuse(tokens, self._embed(tokens) if prompt_embeds is None else prompt_embeds, image_embeds)

    # --- sampling -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        reference_images: References | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 5.0,
        fusion_start: int | None = None,
        fusion_end: int | None = None,
        method: Method = "face-diffuser",
        height: int | None = None,
        width: int | None = None,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        *,
        alpha: float = 0.5,
        eta: float = 0.0,
        text_temperature: float = 1.0,
        subject_temperature: float = 1.0,
        negative_prompt: str | list[str] = "",
        num_images_per_prompt: int = 1,
        prompt_embeds: torch.Tensor | None = None,
        subject_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        cross_attention_kwargs: dict[str, Any] | None = None,
        means: Means = NONE,
    ) -> FaceDiffuserPipelineOutput | tuple:
        """Return images of the prompts' subjects, b * num_images_per_prompt of them.

        Args:
            prompt: one prompt or b; `<|image|>` follows each word that names a subject. None with `prompt_embeds`.
            reference_images: the prompt's references, one per marker, in order; for a list of prompts, a list of lists.
            num_inference_steps: the scheduler's steps, >= 1. PNDM needs 50 or more and warns of fewer; for fewer give
                the pipeline another with `set_scheduler(pipe, "DPMSolverMultistepScheduler")` of facediffuser.schedulers.
            guidance_scale: guidance scale s of the paper, finite.
            fusion_start: index of the first timestep at which both models run; before it the TDM runs alone. None: the
                released 16 of 50, scaled to `num_inference_steps`.
            fusion_end: index of the first timestep at which the SDM runs alone. None: the released 31 of 50, scaled.
            method: face-diffuser, tdm (first stage only), sdm (last stage only), or fastcomposer (the SDM's UNet against
                the null prompt, with the plain text for the first 1 - `alpha` of the steps).
            height: px, a multiple of the VAE's factor (8 for Stable Diffusion); None: the UNet's own size.
            width: as `height`.
            generator: one generator, or one per image. Noise is drawn in float32 on the generator's device, so that a
                CPU generator gives the same noise everywhere.
            latents: noise (images, c, h, w) of unit variance to start from instead.
            output_type: "pil", "np" (images, h, w, 3), "pt" (images, 3, h, w), both in [0, 1], or "latent".
            alpha: FastComposer's share of steps that are conditioned on the subject, 0..1.
            eta: passed to schedulers that know it (DDIM), 0..1.
            text_temperature: SNF's k_T.
            subject_temperature: SNF's k_S.
            negative_prompt: what images should not show, one text or one per prompt; it takes the place of the null
                prompt in the guidance of the TDM's steps (alone and fused) and of FastComposer's. The SDM is guided
                from the plain prompt, so method sdm and the last stage do not read it.
            num_images_per_prompt: >= 1.
            prompt_embeds: what `encode_prompt` returns, instead of `prompt`.
            subject_prompt_embeds: what `fuse` returns, instead of `reference_images`.
            negative_prompt_embeds: what `encode_prompt` returns for the negative prompt.
            return_dict: return a FaceDiffuserPipelineOutput; else the tuple (images, subject_fraction).
            callback_on_step_end: called as (pipe, i, t, tensors) after step i; it may return a dict with other
                `latents`, and stops sampling by setting `pipe._interrupt = True`.
            callback_on_step_end_tensor_inputs: names of the tensors it gets: latents, noise_pred, mask (images, 1, h, w)
                float, 1 where the SDM made the noise, text_saliency and subject_saliency (None for a model that did not
                run).
            cross_attention_kwargs: passed to the attention processors of both UNets.
            means: what is left out of steps, or kept from one to the next, to be faster; by default nothing.

        Returns:
            The images, their subject fractions, and for each image that cannot be used its error.

        Raises:
            InputError: before the first step, for inputs that do not fit together.
        """
        # 1. Check what can be checked without computing
        if fusion_start is None or fusion_end is None:
            start, end = default_fusion_window(num_inference_steps)
            fusion_start = start if fusion_start is None else fusion_start
            fusion_end = end if fusion_end is None else fusion_end
        self.check_inputs(
            prompt, prompt_embeds, guidance_scale, num_inference_steps, num_images_per_prompt, output_type,
            callback_on_step_end_tensor_inputs,
        )  # fmt: skip
        height, width = self._image_size(height, width, latents)
        guidance = Guidance(guidance_scale, text_temperature, subject_temperature)
        self._guidance_scale, self._interrupt = guidance_scale, False

        # 2. Timesteps and the stage of each
        warn_of_few_steps(type(self.scheduler).__name__, num_inference_steps)
        # An engine's scheduler counts on the CPU: a step that reads its timestep would wait for the GPU to be idle.
        counting = torch.device("cpu") if self._engine else self._execution_device
        self.scheduler.set_timesteps(num_inference_steps, device=counting)
        timesteps = self.scheduler.timesteps
        on_device = timesteps.to(self._execution_device)
        self._num_timesteps = len(timesteps)
        stages = plan_stages(method, len(timesteps), num_inference_steps, fusion_start, fusion_end, alpha)
        self._check_stages(method, stages, fusion_start)
        self._check_means(means, stages, cross_attention_kwargs)

        # 3. Prompt embeddings
        given = Conditions(negative_prompt_embeds, prompt_embeds, subject_prompt_embeds)
        needs_subject = any(stage.needs_subject for stage in stages)
        conditions = self._conditions(
            prompt, reference_images, negative_prompt, given, needs_subject, num_images_per_prompt
        )

        # 4. Noise to start from
        text = conditions.text
        latents = self.prepare_latents(len(text), height, width, text.dtype, text.device, generator, latents)

        # 5. Denoise
        extra_step_kwargs = self.prepare_extra_step_kwargs(generator, eta)
        with_saliency = any(name.endswith("_saliency") for name in callback_on_step_end_tensor_inputs)
        fractions, cells = [], torch.zeros_like(latents[:, 0], dtype=torch.float32)
        fast = self._fast_predictor(means, stages, on_device, conditions, guidance, cross_attention_kwargs)
        # Index of the first step whose latents are not finite, per image; kept on the device and read once, at the end.
        first_bad_step = torch.full((len(latents),), -1, device=latents.device)
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for i, (t, stage) in enumerate(zip(timesteps, stages, strict=True)):
                if self.interrupt:
                    continue
                scaled = self.scheduler.scale_model_input(latents, t)
                if fast is not None:
                    step = fast(i, scaled, with_saliency)
                else:
                    step = self._predict(
                        stage, scaled, on_device[i], conditions, guidance, cross_attention_kwargs, with_saliency
                    )
                noise_pred = step.noise.to(latents.dtype)
                latents = self.scheduler.step(noise_pred, t, latents, **extra_step_kwargs, return_dict=False)[0]
                latents = latents.to(noise_pred.dtype)
                if stage is Stage.FUSION:
                    fractions.append(step.mask.float().mean(dim=(1, 2, 3)))
                    cells += step.mask[:, 0]
                if callback_on_step_end is not None:
                    tensors = _callback_tensors(callback_on_step_end_tensor_inputs, latents, noise_pred, step)
                    latents = (callback_on_step_end(self, i, t, tensors) or {}).get("latents", latents)
                bad = ~_finite_rows(latents, step)
                first_bad_step = torch.where((first_bad_step < 0) & bad, i, first_bad_step)
                progress_bar.update()

        # 6. Decode
        errors = [_step_error(step, len(timesteps)) for step in first_bad_step.tolist()]
        images = latents
        if output_type != "latent":
            images, decoding_errors = self._decode(latents, output_type)
            errors = [error or other for error, other in zip(errors, decoding_errors, strict=True)]
        for number, error in enumerate(errors):
            if error:
                logger.warning("image %d: %s", number, error)
        fraction = torch.stack(fractions).mean(dim=0).tolist() if fractions else [math.nan] * len(latents)
        self.maybe_free_model_hooks()
        if not return_dict:
            return images, fraction
        won = (cells / len(fractions)).cpu() if fractions else None
        return FaceDiffuserPipelineOutput(images, fraction, errors, won)

    # --- the steps of __call__ ----------------------------------------------------------------------------------------

    def check_inputs(
        self,
        prompt: str | list[str] | None,
        prompt_embeds: torch.Tensor | None = None,
        guidance_scale: float = 5.0,
        num_inference_steps: int = 50,
        num_images_per_prompt: int = 1,
        output_type: str = "pil",
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> None:
        """Check the arguments of a call that can be judged without computing.

        Raises:
            InputError: one line naming the argument, its value and what to give instead.
        """
        if (prompt is None) == (prompt_embeds is None):
            raise InputError("prompt and prompt_embeds: give one of the two")
        for text in () if prompt is None else _prompt_list(prompt):
            require_marked_words(text)
        if not math.isfinite(guidance_scale):
            raise InputError(f"guidance_scale {guidance_scale}: give a finite number")
        counts = {"num_inference_steps": num_inference_steps, "num_images_per_prompt": num_images_per_prompt}
        for name, value in counts.items():
            if value < 1:
                raise InputError(f"{name} {value}: give 1 or more")
        if output_type not in OUTPUT_TYPES:
            raise InputError(f"output_type {output_type!r}: unknown; choose one of {', '.join(OUTPUT_TYPES)}")
        for name in callback_on_step_end_tensor_inputs:
            if name not in self._callback_tensor_inputs:
                known = ", ".join(self._callback_tensor_inputs)
                raise InputError(f"callback tensor {name!r}: unknown; choose from {known}")

    def prepare_latents(
        self,
        batch_size: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the noise to start from, scaled as the scheduler wants it.

        Args:
            batch_size: number of images.
            height: px, a multiple of `vae_scale_factor`.
            width: px, a multiple of `vae_scale_factor`.
            dtype: type of the result; noise is drawn in float32 all the same.
            device: device of the result.
            generator: one, or one per image.
            latents: noise of unit variance to use instead of drawing it.

        Returns:
            (batch_size, c, height / vae_scale_factor, width / vae_scale_factor).

        Raises:
            InputError: generators or latents do not fit the number of images or their size.
        """
        cells = (height // self.vae_scale_factor, width // self.vae_scale_factor)
        shape = (batch_size, self._any_unet().config.in_channels, *cells)
        if isinstance(generator, list) and len(generator) != batch_size:
            raise InputError(
                f"{counted(len(generator), 'generator')} for {counted(batch_size, 'image')}; give one per image"
            )
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif tuple(latents.shape) != shape:
            raise InputError(f"latents of shape {tuple(latents.shape)}; these prompts and this size need {shape}")
        return latents.to(device, dtype) * self.scheduler.init_noise_sigma

    def prepare_extra_step_kwargs(self, generator: Generators, eta: float) -> dict[str, Any]:
        """Return those of `eta` and `generator` that the scheduler's `step` accepts."""
        accepted = inspect.signature(self.scheduler.step).parameters
        offered = {"eta": eta, "generator": generator}
        return {name: value for name, value in offered.items() if name in accepted}

    @torch.no_grad()
    def decode_latents(self, latents: torch.Tensor, output_type: str = "pil"):
        """Return the images of latents.

        A half-precision VAE whose image is not finite or of a single colour decodes it again in float32.

        Args:
            latents: (b, c, h, w), as the last step leaves them.
            output_type: "pil", "np" (b, H, W, 3) or "pt" (b, 3, H, W), both in [0, 1].
        """
        return self._decode(latents, output_type)[0]

    def _decode(self, latents: torch.Tensor, output_type: str) -> tuple[Any, list[str | None]]:
        """Return the images and, per image, None or why its pixels cannot be used."""
        images = self._decode_with(self.vae.dtype, latents)
        bad = _unusable(images)
        if self.vae.dtype != torch.float32 and bad.any():
            again = bad & latents.isfinite().flatten(1).all(dim=1)
            if again.any():
                images = images.float()
                images[again] = self._decode_with(torch.float32, latents[again])
                bad = _unusable(images)
        errors: list[str | None] = [None] * len(images)
        for number in bad.nonzero().flatten().tolist():
            finite = bool(images[number].isfinite().all())
            errors[number] = (
                "all pixels of the decoded image are equal" if finite else "the decoded image is not finite"
            )
        if output_type == "pil":
            return [Image.fromarray(pixels) for pixels in _bytes_of(images)], errors
        return self.image_processor.postprocess(images, output_type, do_denormalize=[True] * len(images)), errors

    def _decode_with(self, dtype: torch.dtype, latents: torch.Tensor) -> torch.Tensor:
        """Return decoded pixels (b, 3, H, W), about -1..1, from a VAE that computes in `dtype`."""
        own = self.vae.dtype
        if dtype != own:
            self.vae.to(dtype)
        try:
            unscaled = latents.to(dtype) / self.vae.config.scaling_factor
            pixels = self._engine.decode(unscaled) if self._engine is not None and dtype == own else None
            return self.vae.decode(unscaled, return_dict=False)[0] if pixels is None else pixels
        finally:
            if dtype != own:
                self.vae.to(own)

    def _component(self, name: str):
        component = getattr(self, name, None)
        if component is None:
            raise InputError(
                f"{name}: this pipeline has none and the method needs it; load a model folder that holds it"
            )
        return component

    def _any_unet(self) -> UNet2DConditionModel:
        return self.unet if self.unet is not None else self._component("unet_text")

    def _image_size(self, height: int | None, width: int | None, latents: torch.Tensor | None) -> tuple[int, int]:
        """Return height and width in px: as given, else those of the latents, else the UNet's own."""
        default = self._any_unet().config.sample_size
        sides = (default, default) if isinstance(default, int) else tuple(default)
        rows, columns = tuple(latents.shape[-2:]) if latents is not None else sides
        sizes = height or rows * self.vae_scale_factor, width or columns * self.vae_scale_factor
        if any(size <= 0 or size % self.vae_scale_factor for size in sizes):
            raise InputError(
                f"size {sizes[0]} x {sizes[1]}: give height and width in multiples of {self.vae_scale_factor} pixels"
            )
        return sizes

    def _check_stages(self, method: Method, stages: list[Stage], fusion_start: int) -> None:
        """Raise InputError for a stage whose model is missing; warn when no stage reads the subjects."""
        for stage in dict.fromkeys(stages):
            for name in stage.components:
                self._component(name)
        if method == "face-diffuser" and not any(stage.needs_subject for stage in stages):
            logger.warning("fusion_start %d of %d steps: the subjects are not used at all", fusion_start, len(stages))

    def _check_means(self, means: Means, stages: list[Stage], cross_attention_kwargs: dict[str, Any] | None) -> None:
        if not means.keeps_features:
            return
        if cross_attention_kwargs:
            raise InputError("cross_attention_kwargs: not with deep_every or encoder_every; leave one of the two out")
        for name in {name for stage in stages for name in stage.components}:
            require_parts(self._component(name), means.deep_layers)

    def _fast_predictor(
        self, means, stages, timesteps, conditions, guidance, cross_attention_kwargs
    ) -> FastPredictor | None:
        if means == NONE:
            return None

        def denoise(name: str):
            def of_rows(rows: torch.Tensor, t: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
                paired = len(rows) > len(conditions.text)  # baseline and condition, not the condition alone
                return self._denoise(name, rows, t, embeds, cross_attention_kwargs, paired)

            return of_rows

        unets = {name: getattr(self, name, None) for name in ("unet_text", "unet")}
        evaluate = self._engine.evaluate if self._engine is not None else None
        return FastPredictor(means, stages, timesteps, unets, denoise, conditions, guidance, evaluate)

    def _conditions(self, prompt, references, negative_prompt, given: Conditions, needs_subject, repeats) -> Conditions:
        """Return all embeddings that the stages read, each (images, n, d), on the device and in the UNets' type."""
        text, fused = given.text, given.subject
        if prompt is not None:
            prompts = _prompt_list(prompt)
            tokens = tokenize_with_markers(self.tokenizer, prompts, lost="error" if needs_subject else "drop")
            references = self._reference_lists(prompt, references, needs_subject and fused is None)
            text = self._embed(tokens)
            if needs_subject and fused is None:
                fused = self._fuse(tokens, text, self._embed_references(references))
        elif needs_subject and fused is None:
            raise InputError("subject_prompt_embeds: give them along with prompt_embeds; `fuse` makes them")
        null = given.null if given.null is not None else self.encode_prompt(negative_prompt)
        device, dtype = self._execution_device, self._any_unet().dtype
        rows = len(text)
        return Conditions(
            *(
                None if embeds is None else _repeat_rows(name, embeds.to(device, dtype), rows, repeats)
                for name, embeds in (("negative prompt", null), ("prompt", text), ("subject prompt", fused))
            )
        )

    def _reference_lists(self, prompt, references, needed: bool) -> list[list[Image.Image]]:
        """Return one list of references per prompt, checked against the markers."""
        prompts = _prompt_list(prompt)
        if references is None and not needed:
            return [[] for _ in prompts]
        limit = self.subject_fuser.config.max_subjects if self.subject_fuser is not None else None
        if references is None:
            references = [[] for _ in prompts]
        elif isinstance(references, Image.Image):
            references = [[references]]
        elif isinstance(prompt, str):
            references = [list(references)]
        else:
            references = [[item] if isinstance(item, Image.Image) else list(item) for item in references]
        _check_references(prompts, references, limit)
        return references

    def _embed(self, tokens: TokenizedPrompts) -> torch.Tensor:
        # The last hidden state after the final layer norm, without attention mask, as Stable Diffusion v1 reads it.
        return self.text_encoder(tokens.input_ids.to(self._execution_device)).last_hidden_state

    def _embed_references(self, references: list[list[Image.Image]]) -> list[torch.Tensor]:
        if not any(references):
            return [torch.zeros(0, self.text_encoder.config.hidden_size) for _ in references]
        embeds = self.encode_references([image for group in references for image in group])
        return list(embeds.split([len(group) for group in references]))

    def _fuse(self, tokens: TokenizedPrompts, text: torch.Tensor, image_embeds: Sequence[torch.Tensor]) -> torch.Tensor:
        device = self._execution_device
        padded = torch.nn.utils.rnn.pad_sequence([embeds.to(device) for embeds in image_embeds], batch_first=True)
        fuser = self._component("subject_fuser")
        return fuser(text.to(fuser.dtype), padded, tokens.subject_mask.to(device), tokens.subject_counts.to(device))

    def _denoise(self, name: str, rows, t, embeds, cross_attention_kwargs, paired: bool) -> torch.Tensor:
        if self._engine is not None and not cross_attention_kwargs:
            return self._engine.denoise(name, rows, t, embeds, paired)
        kwargs = {"cross_attention_kwargs": cross_attention_kwargs}
        return getattr(self, name)(rows, t, encoder_hidden_states=embeds, return_dict=False, **kwargs)[0]

    def _predict(self, stage, scaled, t, conditions, guidance, cross_attention_kwargs, with_saliency) -> Prediction:
        def denoise(name: str, rows: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
            return self._denoise(name, rows, t, embeds, cross_attention_kwargs, paired=True)

        return predict(
            stage, partial(denoise, "unet_text"), partial(denoise, "unet"), scaled, conditions, guidance, with_saliency
        )


# --- helpers ----------------------------------------------------------------------------------------------------------


def _prompt_list(prompts: str | Sequence[str]) -> list[str]:
    """Return one prompt or a sequence of them as a list; InputError for none, or one that is not a string."""
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts:
        raise InputError("no prompts; give at least one")
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise InputError(f"prompt {prompt!r} is not a string; give a string or a list of strings")
    return prompts


def _check_references(prompts: Sequence[str], references: Sequence[Sequence], max_subjects: int | None) -> None:
    """Raise InputError unless every prompt has one reference per marker and not more than the model takes."""
    if len(references) != len(prompts):
        lists = counted(len(references), "list")
        raise InputError(f"{lists} of references for {counted(len(prompts), 'prompt')}; give one list per prompt")
    for prompt, group in zip(prompts, references, strict=True):
        markers = count_markers(prompt)
        if len(group) != markers:
            raise InputError(
                f"{prompt!r}: {counted(len(group), 'reference image')} for {counted(markers, '<|image|> marker')}; "
                "give one image per marker"
            )
        if max_subjects is not None and markers > max_subjects:
            raise InputError(
                f"{prompt!r}: {counted(markers, 'subject')}; this model takes up to {max_subjects}, name fewer in the prompt"
            )


def _repeat_rows(name: str, embeds: torch.Tensor, rows: int, repeats: int) -> torch.Tensor:
    """Return embeddings (1 or rows, n, d) as (rows * repeats, n, d), each row `repeats` times in succession."""
    if embeds.ndim != 3 or len(embeds) not in (1, rows):
        raise InputError(f"{name} embeddings of shape {tuple(embeds.shape)}; give ({rows}, tokens, width)")
    return embeds.expand(rows, -1, -1).repeat_interleave(repeats, dim=0)


def _bytes_of(images: torch.Tensor) -> np.ndarray:
    """Return pixels (b, 3, H, W) of about -1..1 as (b, H, W, 3) uint8; NaN is black.

    What diffusers' VaeImageProcessor computes, but on the images' device: a quarter of float32's bytes travel.
    """
    shown = (images.nan_to_num(nan=-1.0) * 0.5 + 0.5).clamp(0, 1)
    return (shown.float() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def _unusable(images: torch.Tensor) -> torch.Tensor:
    """Return, per image (b, 3, H, W) of about -1..1, whether it is not finite or shows a single colour when clamped."""
    pixels = images.float().clamp(-1, 1).flatten(2)
    finite = images.isfinite().flatten(1).all(dim=1)
    constant = (pixels.amax(dim=2) == pixels.amin(dim=2)).all(dim=1)
    return ~finite | constant


def _finite_rows(latents: torch.Tensor, step: Prediction) -> torch.Tensor:
    """Return, per image, whether its latents and the saliencies of a fused step are finite, (b,) bool on the device.

    A model whose response is not finite loses every cell to the other one, so the latents alone do not show it.
    """
    finite = latents.isfinite().flatten(1).all(dim=1)
    for saliency in (step.text_saliency, step.subject_saliency):
        if saliency is not None:
            finite = finite & saliency.isfinite().flatten(1).all(dim=1)
    return finite


def _step_error(step: int, steps: int) -> str | None:
    return None if step < 0 else f"latents are not finite at step {step} of {steps}"


def _callback_tensors(names: Sequence[str], latents, noise_pred, step: Prediction) -> dict[str, torch.Tensor | None]:
    tensors = {
        "latents": latents,
        "noise_pred": noise_pred,
        "mask": step.mask.float(),
        "text_saliency": step.text_saliency,
        "subject_saliency": step.subject_saliency,
    }
    return {name: tensors[name] for name in names}
