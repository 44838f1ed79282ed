"""The flow `evaluate`: images of datasets and of other systems in one table of IP and PC."""

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from facediffuser.scoring.settings import EvaluateSettings
from tasks.evaluate import score_and_tabulate


@flow(name="evaluate")
def evaluate(settings: EvaluateSettings) -> str:
    """Score images, write the tables to `settings.output` when given, and return the table as Markdown."""
    evaluation = score_and_tabulate(settings)
    create_markdown_artifact(evaluation.markdown, key="evaluation", description="IP and PC by method and category")
    return evaluation.markdown
