"""The task that fills the cache of latents and caption embeddings before a training."""

from prefect import task

from facediffuser.batch_stage import WorkerPool
from facediffuser.storage import open_store
from facediffuser.tasks.chosen_driver import chosen_driver
from facediffuser.tasks.retrying import RETRIES
from facediffuser.training import training_run as runs
from facediffuser.training.latent_stage import latent_stage
from facediffuser.training.train_check import check_train, is_local_model
from facediffuser.training.train_settings import TrainSettings


@task(name="fill-latents-cache", cache_policy=None, persist_result=False, **RETRIES)
def fill_latents_cache(settings: TrainSettings) -> None:
    """Compute what the cache lacks for the models to train; an interrupted run is resumed part by part.

    Nothing is done for a model that is trained already, without the cache, and for a base that only the workers have.

    Raises:
        InputError: the output holds another run, or data or base cannot be used.
        Stopped: SIGTERM arrived; the parts in hand are finished.
    """
    check_train(settings)
    if not settings.precompute or not is_local_model(settings.base):
        return
    driver = chosen_driver()
    for role in settings.roles:
        role_settings = settings.for_role(role)
        done = runs.finished_step(open_store(role_settings.output))
        if done is None or done < role_settings.recipe().steps:
            gpu = driver.gpus > 0
            cpus = settings.cpus_per_worker or (1 if gpu else max(1, driver.cpus // (settings.workers or 1)))
            driver.run(latent_stage(role_settings, WorkerPool(settings.workers, cpus=cpus, gpu=gpu)))
