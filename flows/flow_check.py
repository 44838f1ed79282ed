"""Input checks of the flows that are made of other flows; without Prefect, Ray and torch."""

from facediffuser.explain_settings import ExplainSettings
from facediffuser.flows.flow_settings import ClaimSettings, DemoSettings
from facediffuser.generation.generate_check import check_models
from facediffuser.modelfolder import require_free
from facediffuser.pictures import open_picture
from facediffuser.prompts import require_marked_words
from facediffuser.scoring.folder import require_scorers
from facediffuser.storage import LocalStore, open_store
from facediffuser.storage.output import store_and_key
from facediffuser.training import training_run as runs


def check_demo(settings: DemoSettings) -> None:
    """Check what the demonstration writes and needs.

    Raises:
        InputError: the output cannot be written to or holds another training, or the shipped models are missing.
    """
    open_store(settings.root).require_writable()
    check_models("miniature")
    require_scorers("miniature")
    for role in settings.training.roles:
        role_settings = settings.training.for_role(role)
        runs.require_startable(open_store(role_settings.output), role_settings)


def check_explain(settings: ExplainSettings) -> None:
    """Check what `explain` reads and writes, before anything is loaded.

    Raises:
        InputError: the output cannot be written, or prompt, reference pictures or models cannot be used.
    """
    store_and_key(settings.output)
    require_marked_words(settings.prompt, "--prompt")
    for path in settings.reference:
        open_picture(open_store(path.parent), path.name)
    check_models(settings.models)


def check_new_folder(output: str) -> None:
    """Check that the output can be written, and is a new or empty folder where it is on this machine.

    Raises:
        InputError: it is not.
    """
    store = open_store(output)
    store.require_writable()
    if isinstance(store, LocalStore):
        require_free(store.root)


def check_claim(settings: ClaimSettings) -> None:
    """Check what the comparison reads and writes, before anything is loaded.

    Raises:
        InputError: the output cannot be written to, models or scorers cannot be had, or the choice is none.
    """
    settings.chosen()
    open_store(settings.output).require_writable()
    check_models(settings.models)
    require_scorers(settings.scorers)
