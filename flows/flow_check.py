"""Input checks of the flows that are made of other flows; without Prefect, Ray and torch."""

from facediffuser.flows.flow_settings import ClaimSettings, DemoSettings
from facediffuser.generation.generate_check import check_models
from facediffuser.scoring.folder import require_scorers
from facediffuser.storage import open_store
from facediffuser.training import training_run as runs


def check_demo(settings: DemoSettings) -> None:
    """Raise InputError when the output cannot be written to, holds another training, or the shipped parts are missing."""
    open_store(settings.root).require_writable()
    check_models("miniature")
    require_scorers("miniature")
    for role in settings.training.roles:
        of_role = settings.training.of(role)
        runs.require_startable(open_store(of_role.output), of_role)


def check_claim(settings: ClaimSettings) -> None:
    """Raise InputError when the output cannot be written to, or models or scorers cannot be had."""
    open_store(settings.output).require_writable()
    check_models(settings.models)
    require_scorers(settings.scorers)
