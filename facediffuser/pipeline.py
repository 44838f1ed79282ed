"""FaceDiffuserPipeline: two Stable Diffusion UNets, one latent, three stages.

The TDM (`unet_text`) makes the scene, both models share the middle steps by saliency-adaptive noise fusion, and the SDM
(`unet`), whose prompt carries the reference pictures, makes the person (arXiv 2311.10329, section 3).
"""

import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.schedulers import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from facediffuser import subject
from facediffuser.errors import InputError
from facediffuser.modelfolder import resolve_model
from facediffuser.pipeline_inputs import References, as_list, check_references, check_sampling, repeat_rows
from facediffuser.prompt_tokens import TokenizedPrompts, tokenize_with_markers
from facediffuser.schedulers import warn_of_few_steps
from facediffuser.stages import Conditions, Guidance, Method, Prediction, Stage, plan_stages, predict
from facediffuser.subject import SubjectFuser

logger = logging.getLogger(__name__)

Generators = torch.Generator | list[torch.Generator] | None
StepCallback = Callable[[DiffusionPipeline, int, Any, dict], dict | None]


@dataclass
class FaceDiffuserPipelineOutput(BaseOutput):
    """`images` in the form asked for; `subject_fraction`, one number per image, in [0, 1].

    The fraction is the share of latent cells that the SDM won, mean over the fusion steps; NaN when no step was fused.
    """

    images: Any
    subject_fraction: list[float]


class FaceDiffuserPipeline(DiffusionPipeline):
    """Text and reference pictures to images of those subjects.

    Components: `unet` (SDM), `unet_text` (TDM), `vae`, `text_encoder`, `tokenizer`, `image_encoder`, `subject_fuser`,
    `scheduler`. A method needs only its own: `tdm` does without `unet`, `image_encoder` and `subject_fuser`, `sdm` and
    `fastcomposer` do without `unet_text`.
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

    @classmethod
    def from_pretrained(cls, model: str | Path, **kwargs) -> "FaceDiffuserPipeline":
        """Return the pipeline of a model folder, an s3:// URL, a hub id, or `miniature`.

        Weights are loaded as float32 unless `dtype` says otherwise. Raises InputError when the model cannot be had.
        """
        if "torch_dtype" not in kwargs:
            kwargs.setdefault("dtype", torch.float32)
        return super().from_pretrained(str(resolve_model(str(model), kwargs.pop("revision", None))), **kwargs)

    # --- conditions ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_prompt(self, prompts: str | Sequence[str]) -> torch.Tensor:
        """Return the plain text embedding of prompts, (b, n, d), markers left out; `""` gives the null embedding."""
        tokens = tokenize_with_markers(self.tokenizer, as_list(prompts), lost="drop")
        return self._embed(tokens)

    @torch.no_grad()
    def encode_references(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Return one embedding per reference picture, (k, d)."""
        return subject.encode_references(self._component("image_encoder"), images)

    @torch.no_grad()
    def fuse(
        self,
        prompts: str | Sequence[str],
        image_embeds: Sequence[torch.Tensor],
        prompt_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the subject-augmented embedding of prompts, (b, n, d).

        `image_embeds`: per prompt, the (k, d) embeddings of its references in the order of its markers; `prompt_embeds`
        (b, n, d): what `encode_prompt` gave, if at hand. Raises InputError when the numbers do not match.
        """
        prompts = as_list(prompts)
        check_references(prompts, image_embeds, self._component("subject_fuser").config.max_subjects)
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
        fusion_start: int = 16,
        fusion_end: int = 31,
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
    ) -> FaceDiffuserPipelineOutput | tuple:
        """Return images of the prompts' subjects, b * num_images_per_prompt of them.

        Args:
            prompt: one prompt or b; `<|image|>` follows each word that names a subject. None with `prompt_embeds`.
            reference_images: the prompt's references, one per marker, in order; for a list of prompts, a list of lists.
            num_inference_steps: the scheduler's steps. PNDM wants 50 or more and warns of fewer; for fewer give the
                pipeline another, as `set_scheduler(pipe, "DPMSolverMultistepScheduler")` of facediffuser.schedulers does.
            guidance_scale: s of the paper.
            fusion_start, fusion_end: the TDM runs alone before index fusion_start of the scheduler's timesteps, the SDM
                alone from fusion_end on. The defaults belong to 50 steps (`window.default_fusion_window` scales them).
            method: face-diffuser, tdm (first stage only), sdm (last stage only), or fastcomposer (SDM's UNet against
                the null prompt, with the plain text for the first 1 - `alpha` of the steps).
            height, width: pixels; by default the UNet's own size.
            generator: one generator, or one per image. Noise is drawn in float32 on the generator's device, so that a
                CPU generator gives the same noise everywhere.
            latents: noise (images, c, h, w) of unit variance to start from instead.
            output_type: "pil", "np" (images, h, w, 3), "pt" (images, 3, h, w), both in [0, 1], or "latent".
            eta: passed to schedulers that know it (DDIM).
            text_temperature, subject_temperature: SNF's k_T and k_S.
            negative_prompt: what images should not show, one text or one per prompt; it takes the place of the null
                prompt in the guidance of the TDM's steps (alone and fused) and of FastComposer's. The SDM is guided
                from the plain prompt, so method sdm and the last stage do not read it.
            prompt_embeds, subject_prompt_embeds, negative_prompt_embeds: what `encode_prompt`, `fuse` and
                `encode_prompt("")` return, instead of prompt and references.
            callback_on_step_end: called as (pipe, i, t, tensors) after step i with the tensors named in
                `callback_on_step_end_tensor_inputs`: latents, noise_pred, mask (images, 1, h, w) float, 1 where the SDM
                made the noise, text_saliency and subject_saliency (None for a model that did not run). It may return a
                dict with other `latents`.

        Raises InputError, before the first step, for inputs that do not fit together.
        """
        # 1. Check what can be checked without computing
        check_sampling(
            guidance_scale, num_inference_steps, num_images_per_prompt, output_type,
            callback_on_step_end_tensor_inputs, self._callback_tensor_inputs,
        )  # fmt: skip
        guidance = Guidance(guidance_scale, text_temperature, subject_temperature)
        height, width = self._image_size(height, width, latents)

        # 2. Timesteps and the stage of each
        warn_of_few_steps(type(self.scheduler).__name__, num_inference_steps)
        self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
        timesteps = self.scheduler.timesteps
        stages = plan_stages(method, len(timesteps), num_inference_steps, fusion_start, fusion_end, alpha)
        self._check_stages(method, stages, fusion_start)

        # 3. Conditions
        needs_subject = any(stage.needs_subject for stage in stages)
        given = Conditions(negative_prompt_embeds, prompt_embeds, subject_prompt_embeds)
        conditions = self._conditions(
            prompt, reference_images, negative_prompt, given, needs_subject, num_images_per_prompt
        )

        # 4. Noise to start from
        latents = self._initial_latents(len(conditions.text), height, width, conditions.text, generator, latents)

        # 5. Denoise
        extra = self._step_arguments(generator, eta)
        with_saliency = any(name.endswith("_saliency") for name in callback_on_step_end_tensor_inputs)
        shares = []
        with self.progress_bar(total=len(timesteps)) as progress:
            for i, (t, stage) in enumerate(zip(timesteps, stages, strict=True)):
                step = self._predict(stage, latents, t, conditions, guidance, cross_attention_kwargs, with_saliency)
                noise_pred = step.noise.to(latents.dtype)
                latents = self.scheduler.step(noise_pred, t, latents, **extra, return_dict=False)[0]
                latents = latents.to(noise_pred.dtype)
                if stage is Stage.FUSION:
                    shares.append(step.mask.float().mean(dim=(1, 2, 3)))
                if callback_on_step_end is not None:
                    tensors = _callback_tensors(callback_on_step_end_tensor_inputs, latents, noise_pred, step)
                    latents = (callback_on_step_end(self, i, t, tensors) or {}).get("latents", latents)
                progress.update()

        # 6. Decode
        images = latents if output_type == "latent" else self.decode_latents(latents, output_type)
        fraction = torch.stack(shares).mean(dim=0).tolist() if shares else [float("nan")] * len(latents)
        self.maybe_free_model_hooks()
        return FaceDiffuserPipelineOutput(images, fraction) if return_dict else (images, fraction)

    # --- the steps of __call__ ----------------------------------------------------------------------------------------

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
        default = self._any_unet().config.sample_size
        sides = (default, default) if isinstance(default, int) else tuple(default)
        cells = tuple(latents.shape[-2:]) if latents is not None else sides
        sizes = tuple(given or side * self.vae_scale_factor for given, side in zip((height, width), cells, strict=True))
        if any(size <= 0 or size % self.vae_scale_factor for size in sizes):
            raise InputError(
                f"size {sizes[0]} x {sizes[1]}: give height and width in multiples of {self.vae_scale_factor} pixels"
            )
        return sizes

    def _check_stages(self, method: Method, stages: list[Stage], fusion_start: int) -> None:
        for stage in dict.fromkeys(stages):
            for name in stage.components:
                self._component(name)
        if method == "face-diffuser" and not any(stage.needs_subject for stage in stages):
            logger.warning("fusion_start %d of %d steps: the subjects are not used at all", fusion_start, len(stages))

    def _conditions(self, prompt, references, negative_prompt, given: Conditions, needs_subject, repeats) -> Conditions:
        if (prompt is None) == (given.text is None):
            raise InputError("prompt and prompt_embeds: give one of the two")
        text, fused = given.text, given.subject
        if prompt is not None:
            prompts = as_list(prompt)
            tokens = tokenize_with_markers(self.tokenizer, prompts, lost="error" if needs_subject else "drop")
            references = self._references(prompt, references, needs_subject and fused is None)
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
                None if embeds is None else repeat_rows(name, embeds.to(device, dtype), rows, repeats)
                for name, embeds in (("negative prompt", null), ("prompt", text), ("subject prompt", fused))
            )
        )

    def _references(self, prompt, references, needed: bool) -> list[list[Image.Image]]:
        prompts = as_list(prompt)
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
        check_references(prompts, references, limit)
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

    def _initial_latents(self, images, height, width, like: torch.Tensor, generator, latents) -> torch.Tensor:
        cells = (height // self.vae_scale_factor, width // self.vae_scale_factor)
        shape = (images, self._any_unet().config.in_channels, *cells)
        if isinstance(generator, list) and len(generator) != images:
            raise InputError(f"{len(generator)} generators for {images} images; give one per image")
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=like.device, dtype=torch.float32)
        elif tuple(latents.shape) != shape:
            raise InputError(f"latents of shape {tuple(latents.shape)}; these prompts and this size need {shape}")
        return latents.to(like.device, like.dtype) * self.scheduler.init_noise_sigma

    def _step_arguments(self, generator: Generators, eta: float) -> dict[str, Any]:
        accepted = inspect.signature(self.scheduler.step).parameters
        offered = {"eta": eta, "generator": generator}
        return {name: value for name, value in offered.items() if name in accepted}

    def _predict(self, stage, latents, t, conditions, guidance, cross_attention_kwargs, with_saliency) -> Prediction:
        def denoise(unet, rows, embeds):
            kwargs = {"cross_attention_kwargs": cross_attention_kwargs}
            return unet(rows, t, encoder_hidden_states=embeds, return_dict=False, **kwargs)[0]

        scaled = self.scheduler.scale_model_input(latents, t)
        return predict(
            stage, partial(denoise, self.unet_text), partial(denoise, self.unet), scaled, conditions, guidance,
            with_saliency,
        )  # fmt: skip

    @torch.no_grad()
    def decode_latents(self, latents: torch.Tensor, output_type: str = "pil"):
        """Return the images of latents (b, c, h, w), as `output_type` "pil", "np" or "pt"."""
        latents = latents.to(self.vae.dtype) / self.vae.config.scaling_factor
        images = self.vae.decode(latents, return_dict=False)[0]
        return self.image_processor.postprocess(images, output_type, do_denormalize=[True] * len(images))


def _callback_tensors(names: Sequence[str], latents, noise_pred, step: Prediction) -> dict[str, torch.Tensor | None]:
    tensors = {
        "latents": latents,
        "noise_pred": noise_pred,
        "mask": step.mask.float(),
        "text_saliency": step.text_saliency,
        "subject_saliency": step.subject_saliency,
    }
    return {name: tensors[name] for name in names}
