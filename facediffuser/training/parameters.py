"""Which parameters are trained and which are frozen, by role."""

from torch import nn

TRAINED = {
    "tdm": {"unet": "all"},
    "sdm": {"unet": "all", "subject_fuser": "all", "image_encoder": "last layers"},
}
"""Trained components by role; everything else (text encoder, VAE, embeddings of the image encoder) is frozen."""


def select_trained(role: str, components: dict[str, nn.Module], image_encoder_layers: int) -> dict[str, nn.Parameter]:
    """Set `requires_grad` of all parameters by the table TRAINED and return the trained ones.

    Args:
        role: `tdm` or `sdm`.
        components: modules by component name.
        image_encoder_layers: how many of the vision tower's last layers are trained; -1: the whole image encoder.

    Returns:
        The trained parameters by `component.parameter`.
    """
    trained: dict[str, nn.Parameter] = {}
    for component, module in components.items():
        module.requires_grad_(False)
        choice = TRAINED[role].get(component)
        if choice == "all" or (choice and image_encoder_layers < 0):
            chosen = dict(module.named_parameters())
        elif choice:
            layers = module.vision_model.encoder.layers
            last = range(max(0, len(layers) - image_encoder_layers), len(layers))
            prefixes = tuple(f"vision_model.encoder.layers.{number}." for number in last)
            chosen = {name: p for name, p in module.named_parameters() if prefixes and name.startswith(prefixes)}
        else:
            chosen = {}
        for name, parameter in chosen.items():
            parameter.requires_grad_(True)
            trained[f"{component}.{name}"] = parameter
    return trained
