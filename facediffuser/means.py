"""The means of sampling faster than the exact mode, as named settings; all are off in exact mode. Without torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from facediffuser.errors import InputError


@dataclass(frozen=True)
class Means:
    """What is left out of a step, or kept from an earlier one.

    Every rule counts steps, so an image does not depend on the images beside it: a rule that looked at an image's own
    numbers (a threshold on a cosine, say) would either let one image of a batch decide for all, or give every batch
    another shape, which changes last bits and compiles anew.

    The steps of each stage are counted from 0 within it. Fused steps are made in full unless `in_fusion` is set.

    Attributes:
        guidance_every: both rows of the guidance (baseline and condition) are evaluated at every n-th step; between, the
            condition alone, and the difference of the two is kept. 1: at every step.
        unguided_text: share of the steps on the plain text alone (the TDM's own), the last ones, whose noise is the
            condition's alone, 0..1. The difference of condition and baseline has little to say there.
        unguided_subject: the same of the steps on the subjects alone (the SDM's own).
        deep_every: the whole UNet is evaluated at every n-th step; between, only the layers nearest to the latent, on
            the deep features of the last whole evaluation. 1: at every step.
        deep_layers: how many of the last layers are evaluated between.
        encoder_every: the UNet's encoder is evaluated at every n-th step; between, only the decoder, with the step's own
            time, on the encoder's features. 1: at every step.
        merged: the decoder's evaluations of steps that share an encoder's features are one call.
        in_fusion: the above holds for fused steps, too; then the mask is made of responses that are kept in part.
    """

    guidance_every: int = 1
    unguided_text: float = 0.0
    unguided_subject: float = 0.0
    deep_every: int = 1
    deep_layers: int = 1
    encoder_every: int = 1
    merged: bool = False
    in_fusion: bool = False

    def __post_init__(self):
        for name in ("guidance_every", "deep_every", "deep_layers", "encoder_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)}: give 1 or more")
        for name in ("unguided_text", "unguided_subject"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} {getattr(self, name)}: give a share of the steps, from 0 to 1")
        if self.deep_every > 1 and self.encoder_every > 1:
            raise InputError("deep_every and encoder_every: both keep features between steps; give one of the two")
        if self.merged and self.encoder_every == 1:
            raise InputError("merged: joins evaluations of the decoder; give encoder_every of 2 or more with it")

    @property
    def keeps_features(self) -> bool:
        """Whether parts of a UNet are evaluated alone."""
        return self.deep_every > 1 or self.encoder_every > 1

    def as_document(self) -> dict[str, Any]:
        """Return those that are on, by name, as a run document holds them."""
        return {name: value for name, value in asdict(self).items() if value != getattr(NONE, name)}

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> "Means":
        """Return the means that a run document holds.

        Raises:
            InputError: one of a later version.
        """
        unknown = document.keys() - asdict(NONE).keys()
        if unknown:
            raise InputError(f"means {min(unknown)!r}: unknown here; use the version that the run was begun with")
        return cls(**document)


NONE = Means()
"""Exact mode."""
