"""The miniature's stand-in for FaceNet: a small network that tells people apart by their faces."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from facediffuser.storage.reading import parse_json

SIDE = 64


class IdentityEmbedder(nn.Module):
    """A small network from face crops (n, 3, 64, 64) in -1..1 to unit vectors (n, dim)."""

    def __init__(self, widths: tuple[int, ...] = (24, 48, 96, 128), dim: int = 96):
        super().__init__()
        self.config = {"widths": list(widths), "dim": dim, "side": SIDE}
        layers, channels = [], 3
        for width in widths:
            layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.GroupNorm(8, width), nn.SiLU()]
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.SiLU()]
            channels = width
        self.features = nn.Sequential(*layers)
        cells = (SIDE // 2 ** len(widths)) ** 2
        self.head = nn.Sequential(nn.Flatten(), nn.LayerNorm(channels * cells), nn.Linear(channels * cells, dim))

    def forward(self, crops: torch.Tensor) -> torch.Tensor:
        """Return the unit vectors, (n, d), of face crops, (n, 3, height, width) in [-1, 1]."""
        return F.normalize(self.head(self.features(crops)), dim=-1)


def save_identity_embedder(model: IdentityEmbedder, folder: Path) -> None:
    """Write an embedder.

    Args:
        model: the embedder.
        folder: where `config.json` and `model.safetensors` (fp16) are written; created when it is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model.config, indent=1) + "\n")
    state = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    save_file(state, folder / "model.safetensors")


def load_identity_embedder(folder: Path) -> IdentityEmbedder:
    """Return the embedder that `save_identity_embedder` wrote, fp32, in evaluation mode, without gradients.

    Args:
        folder: holds `config.json` and `model.safetensors`.
    """
    config = parse_json((Path(folder) / "config.json").read_text())
    model = IdentityEmbedder(tuple(config["widths"]), config["dim"])
    model.load_state_dict(
        {name: value.float() for name, value in load_file(Path(folder) / "model.safetensors").items()}
    )
    return model.eval().requires_grad_(False)
