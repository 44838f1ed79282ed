"""The task of the flow `evaluate`: score images in one process and tell how far it is."""

from prefect import task

from facediffuser.scoring.evaluation import Evaluation, Evaluator
from facediffuser.scoring.settings import EvaluateSettings
from tasks.progress import Progress


@task(name="score-and-tabulate", cache_policy=None)
def score_and_tabulate(settings: EvaluateSettings) -> Evaluation:
    """Check the input, score what is to be scored, write the output and return the evaluation."""
    evaluator = Evaluator(settings)
    with Progress(evaluator.total, "images", "evaluate") as progress:
        return evaluator.run(progress.advance)
