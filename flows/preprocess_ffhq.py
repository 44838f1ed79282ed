"""The flow `preprocess-ffhq`: photographs in, prepared Parquet out."""

from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from facediffuser.flows.stopping import report_stop, watch_process
from facediffuser.preprocess.preprocess_settings import PreprocessSettings
from facediffuser.tasks.preprocess import prepare_photographs


@flow(name="preprocess-ffhq", on_running=[watch_process], on_failure=[report_stop])
def preprocess_ffhq(settings: PreprocessSettings) -> dict[str, Any]:
    """Prepare the photographs of `settings.source`; return counts by split, rejections by reason, output, seconds."""
    result = prepare_photographs(settings)
    rows = [("pictures", result["pictures"]), ("train", result["train"]), ("test", result["test"])]
    rows += [(f"rejected: {reason}", count) for reason, count in result["rejected_by_reason"].items()]
    table = "\n".join(f"| {name} | {count:,} |" for name, count in rows)
    create_markdown_artifact(f"`{result['output']}`\n\n| | |\n|---|---:|\n{table}\n", key="prepared-photographs")
    return result
