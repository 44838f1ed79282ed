"""The flows `score` and `copies`: columns added to a finished dataset, and its card written again with them."""

from prefect import flow

from facediffuser.evaluation.score_settings import CopySettings, ScoreSettings
from facediffuser.flows.stopping import report_stop, watch_process
from facediffuser.tasks.add_columns import add_scores, flag_copies, write_card_again


@flow(name="score", on_running=[watch_process], on_failure=[report_stop])
def score(settings: ScoreSettings) -> list[str]:
    """Add the columns of other scorers; return the keys of the files written."""
    keys = add_scores(settings)
    write_card_again(settings.url, keys)
    return keys


@flow(name="copies", on_running=[watch_process], on_failure=[report_stop])
def copies(settings: CopySettings) -> dict[str, int]:
    """Look for copies; return how many images each flag is raised on."""
    key, found = flag_copies(settings)
    write_card_again(settings.url, [key])
    return found
