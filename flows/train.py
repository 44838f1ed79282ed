"""The flow `train`: the TDM, the SDM, or both."""

from typing import Any

from facediffuser.flows.product_flow import product_flow
from facediffuser.tasks.latents import fill_latents_cache
from facediffuser.tasks.ray_train import train_on_ray
from facediffuser.training.train_settings import TrainSettings


@product_flow("train", "train {settings.role} in {settings.output}")
def train(settings: TrainSettings) -> dict[str, Any]:
    """Train what `settings.role` names from prepared Parquet; return per role step, loss, seconds and output.

    Both models train side by side when `both` are asked for, each on half of the GPUs, or of the cores where there are none; on a
    cluster without room for two the second waits.
    """
    fill_latents_cache(settings)
    running = {role: train_on_ray.submit(settings.for_role(role), len(settings.roles)) for role in settings.roles}
    return {role: future.result() for role, future in running.items()}
