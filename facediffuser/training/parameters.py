"""Which parameters are trained: one table."""

from torch import nn

TRAINED = {
    "tdm": {"unet": "all"},
    "sdm": {"unet": "all", "subject_fuser": "all", "image_encoder": "last layers"},
}
"""By role and component. Whatever is not named here (text encoder, VAE, embeddings of the image encoder) is frozen."""


def select_trained(role: str, components: dict[str, nn.Module], image_encoder_layers: int) -> dict[str, nn.Parameter]:
    """Freeze and unfreeze the components' parameters by the table; return the trained ones by `component.name`.

    `image_encoder_layers`: how many of the vision tower's last layers train (-1: the whole image encoder).
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
