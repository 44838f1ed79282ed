"""The tasks of the flow `evaluate`: check, score images in one process and tell how far it is."""

from collections.abc import Sequence

from prefect import task

from facediffuser.evaluation.evaluate_check import check_evaluate
from facediffuser.evaluation.evaluate_settings import EvaluateSettings
from facediffuser.evaluation.evaluator import Evaluation, Evaluator
from facediffuser.tasks.progress import Progress
from facediffuser.tasks.retrying import RETRIES


@task(name="check-input", cache_policy=None, **RETRIES)
def check_input(settings: EvaluateSettings) -> None:
    """Check images and datasets given, before hours are spent on making others.

    Raises:
        InputError: something is wrong with them.
    """
    check_evaluate(settings)
    Evaluator(settings)


@task(name="score-and-tabulate", cache_policy=None, **RETRIES)
def score_and_tabulate(settings: EvaluateSettings, made: Sequence[str] = ()) -> Evaluation:
    """Check the input, score what is to be scored, write the output and return the evaluation."""
    evaluator = Evaluator(settings, made)
    with Progress(evaluator.total, "images", "evaluate") as progress:
        return evaluator.run(progress.advance)
