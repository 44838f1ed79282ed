"""The flow `preprocess-ffhq`: photographs in, prepared Parquet out."""

from typing import Any

from facediffuser.cards.rendering import render
from facediffuser.flows.product_flow import product_flow
from facediffuser.preprocess.preprocess_settings import PreprocessSettings
from facediffuser.tasks.preprocess import prepare_photographs
from facediffuser.tasks.run_page import show_markdown


@product_flow("preprocess-ffhq", "prepare {settings.source} in {settings.output}")
def preprocess_ffhq(settings: PreprocessSettings) -> dict[str, Any]:
    """Prepare the photographs of `settings.source`; return counts by split, rejections by reason, output, seconds."""
    result = prepare_photographs(settings)
    lines = [(name, f"{result[name]:,}") for name in ("pictures", "train", "test")]
    lines += [(f"rejected: {reason}", f"{count:,}") for reason, count in result["rejected_by_reason"].items()]
    text = render("prepared_photographs.md.j2", output=result["output"], lines=lines)
    show_markdown(text, key="prepared-photographs")
    return result
