"""Made worlds for the scorers' tests: a face network that looks at colours, an untrained small CLIP, pictures."""

from pathlib import Path

import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel

from facediffuser.miniature.embedder import IdentityEmbedder, save_identity_embedder
from facediffuser.miniature.tokenizer import make_tokenizer


class ColourNetwork(torch.nn.Module):
    """A face to its coarse colours, 5x5 cells, without their mean: the same person is one in the same colours."""

    def forward(self, crops: torch.Tensor) -> torch.Tensor:
        cells = torch.nn.functional.adaptive_avg_pool2d(crops, 5).flatten(1)
        return cells - cells.mean(1, keepdim=True)


def beside(*faces: Image.Image, size: int = 256) -> Image.Image:
    """Faces side by side on grey ground."""
    canvas = Image.new("RGB", (size * max(len(faces), 1), size), (120, 120, 120))
    for index, face in enumerate(faces):
        canvas.paste(face, (index * size + (size - face.width) // 2, (size - face.height) // 2))
    return canvas


def save_scorers(folder: Path) -> Path:
    """Write untrained scorers in the miniature's layout; return the folder."""
    torch.manual_seed(0)
    save_identity_embedder(IdentityEmbedder((8, 16, 16, 16), 16), folder / "identity")
    tokenizer = make_tokenizer(["a person on the beach", "a man reading a book"], merges=20)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id}
    tokens |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    vision = size | {"image_size": 32, "patch_size": 8}
    config = CLIPConfig(text_config=size | tokens, vision_config=vision, projection_dim=16)
    CLIPModel(config).save_pretrained(folder / "prompt")
    tokenizer.save_pretrained(folder / "prompt")
    return folder
