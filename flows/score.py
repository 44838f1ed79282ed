"""The flows `score` and `copies`: columns added to a finished dataset, and its card written again with them."""

from facediffuser.evaluation.score_settings import CopySettings, ScoreSettings
from facediffuser.flows.product_flow import product_flow
from facediffuser.tasks.add_columns import add_scores, flag_copies, update_card


@product_flow("score", "score {settings.url}")
def score(settings: ScoreSettings) -> list[str]:
    """Add the columns of other scorers; return the keys of the files written."""
    keys = add_scores(settings)
    update_card(settings.url, keys)
    return keys


@product_flow("copies", "copies in {settings.url}")
def copies(settings: CopySettings) -> dict[str, int]:
    """Look for copies; return how many images each flag is raised on."""
    key, found = flag_copies(settings)
    update_card(settings.url, [key])
    return found
