"""The settings of `facediffuser preprocess`, and which of them decide the prepared rows."""

from typing import Any, Literal

from pydantic import Field

from facediffuser.settings import Exact, Settings, Workers

NONE = "none"


class SourceSettings(Settings):
    """Which photographs are prepared, and where the result goes."""

    source: str = Field(
        min_length=1, description="photographs: a folder, `s3://bucket/prefix`, or a `.tgz` or `.tar` file in either"
    )
    output: str = Field(min_length=1, description="where the prepared data goes: a folder or `s3://bucket/prefix`")
    stages: str | None = Field(
        None,
        description="where what each stage finds is kept, so that another run needs only the stages whose settings "
        "changed: a folder or `s3://bucket/prefix` (default: `stages` in the output)",
    )


class PreprocessSettings(Exact, Workers, SourceSettings):
    """Photographs become prepared Parquet: faces, captions, segments, subject phrases, splits."""

    format: Literal["auto", "ffhq", "ffhq-fastcomposer", "folder"] = Field(
        "auto", description="layout of the source; `auto` looks at its file names"
    )
    ffhq_images: Literal["auto", "aligned", "in-the-wild", "thumbnails"] = Field(
        "auto", description="which of FFHQ's picture sets to read; `auto` takes the first of them that is there"
    )
    part_size: int = Field(100, ge=1, le=100_000, description="pictures a part; memory per worker grows with it")
    size: int | None = Field(
        None, ge=32, description="reduce pictures to this shorter side, px (default: keep the files untouched)"
    )
    encode: Literal["same", "jpeg", "png"] = Field(
        "same", description="file format of pictures that must be encoded again; `same` keeps lossy and lossless apart"
    )
    min_side: int = Field(64, ge=1, description="reject pictures whose shorter side is smaller, px")
    max_megapixels: float = Field(100.0, gt=0, description="reject pictures that decode to more megapixels")
    face_search_side: int = Field(
        160, ge=0, description="enlarge smaller pictures to this shorter side, px, to find faces; 0: search as they are"
    )
    reference_crop: Literal["margin", "ffhq"] = Field(
        "margin", description="square of a face: its box with a margin, or FFHQ's, turned as the landmarks say"
    )
    face_margin: float = Field(0.3, ge=0, le=3, description="margin on each side, in face sizes, for `margin`")
    captioner: str = Field(
        "Salesforce/blip-image-captioning-large",
        description="BLIP or BLIP-2 for pictures without a caption: a transformers folder, `s3://` URL, hub id, or `none`",
    )
    caption_tokens: int = Field(40, ge=1, description="longest caption made, tokens")
    segmenter: str = Field(
        "facebook/mask2former-swin-large-coco-panoptic",
        description="panoptic Mask2Former for pictures without segments: a folder, `s3://` URL, hub id, or `none`",
    )
    matcher: str = Field(
        "openai/clip-vit-large-patch14",
        description="CLIP that tells which phrase is which segment where the source does not: a folder, `s3://` URL, "
        "hub id, or `none` (then from left to right)",
    )
    batch_size: int = Field(8, ge=1, description="pictures of a batch for the models")
    test_share: float = Field(
        0.1, ge=0, le=1, description="share of pictures in test, for sources without splits of their own"
    )
    near_duplicate_bits: int = Field(
        10,
        ge=0,
        le=31,
        description="pictures whose 256-bit perceptual hashes differ in at most so many bits stay in one split",
    )
    earlier: str | None = Field(
        None,
        description="prepared data of this set before it grew, whose pictures keep their side: a folder or "
        "`s3://bucket/prefix`",
    )
    cpus_per_worker: int = Field(1, ge=1, description="CPU cores of each worker")

    def content(self) -> dict[str, Any]:
        """Return the settings that decide the prepared rows: not places, not workers and their cores."""
        others = {"source", "output", "stages", "earlier", "format", "workers", "cpus_per_worker", "exact"}
        return self.model_dump(exclude=others)
