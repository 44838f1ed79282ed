"""Captions for pictures that have none, by BLIP or BLIP-2."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from facediffuser.errors import InputError


class Captioner:
    """A captioning model in transformers layout (a folder or a hub id): BLIP or BLIP-2."""

    def __init__(self, model: str | Path, device: str | torch.device = "cpu", max_tokens: int = 40):
        from transformers import (
            AutoConfig,
            AutoProcessor,
            Blip2ForConditionalGeneration,
            BlipForConditionalGeneration,
        )

        kinds = {"blip": BlipForConditionalGeneration, "blip-2": Blip2ForConditionalGeneration}
        kind = AutoConfig.from_pretrained(model).model_type
        if kind not in kinds:
            raise InputError(f"captioner {model}: a {kind} model; give a BLIP or BLIP-2 model")
        self.device = torch.device(device)
        self.max_tokens = max_tokens
        # Half precision on a GPU: BLIP-2's smallest language model alone takes 11 GB in full.
        self.dtype = torch.float16 if self.device.type == "cuda" else torch.float32
        self.processor = AutoProcessor.from_pretrained(model)
        self.model = kinds[kind].from_pretrained(model, dtype=self.dtype).to(self.device).eval()

    @torch.no_grad()
    def caption(self, images: Sequence[Image.Image]) -> list[str]:
        """Return one caption for each picture: the likeliest words one after another, so the same ones every time."""
        inputs = self.processor(images=list(images), return_tensors="pt").to(self.device, self.dtype)
        tokens = self.model.generate(**inputs, max_new_tokens=self.max_tokens, do_sample=False, num_beams=1)
        texts = self.processor.batch_decode(tokens, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]
