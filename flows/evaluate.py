"""The flow `evaluate`: images of datasets, of methods and of other systems in one table of IP and PC."""

from facediffuser.evaluation.benchmark_runs import benchmark_runs
from facediffuser.evaluation.evaluate_settings import EvaluateSettings
from facediffuser.flows.generate_dataset import generate_dataset
from facediffuser.flows.product_flow import product_flow
from facediffuser.tasks.run_page import show_markdown
from facediffuser.tasks.score_images import check_input, score_and_tabulate


@product_flow("evaluate", "evaluate {settings.dataset}")
def evaluate(settings: EvaluateSettings) -> str:
    """Score images, write the tables to `settings.output` when given, and return the table as Markdown.

    With `settings.benchmark` the images of each method are made first; run again, what is there is kept.
    """
    runs = benchmark_runs(settings)
    if runs:
        check_input(settings)
    made = [generate_dataset(run)["output"] for run in runs]
    evaluation = score_and_tabulate(settings, made)
    show_markdown(evaluation.markdown, key="evaluation", description="IP and PC by method and category")
    return evaluation.markdown
