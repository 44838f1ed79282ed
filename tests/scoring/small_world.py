"""Made worlds for the scorers' tests: a face network that looks at colours, an untrained small CLIP, pictures."""

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel

from facediffuser.dataset.schema import DATASET_SCHEMA, SUBJECTS_SCHEMA
from facediffuser.scoring.miniature_embedder import IdentityEmbedder, save_identity_embedder
from tools.miniature_weights.tokenizer import make_tokenizer


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


def row(number: int, image: Image.Image | None, **values) -> dict:
    """A dataset's row, ok when it has an image; `values` replace what it would hold."""
    made = {
        "sample_id": f"sample-{number:05d}",
        "prompt_id": f"prompt-{number % 6}",
        "prompt": "a person <|image|> on the beach",
        "category": ("context", "style")[number % 2],
        "subject_ids": ["ada"],
        "seed": number,
        "method": "face-diffuser",
        "num_inference_steps": 30,
        "guidance_scale": 5.0,
        "fusion_start": 10,
        "fusion_end": 19,
        "scheduler": "PNDMScheduler",
        "height": 64,
        "width": 64,
        "image": {"bytes": png(image), "path": f"{number}.png"} if image else None,
        "ip": 0.5 if image else None,
        "pc": 0.25 if image else None,
        "status": "ok" if image else "failed",
        "error": None if image else "out of memory\nwhere it happened",
    }
    return made | values


def write_dataset(folder: Path, rows: list[dict], references: dict[str, Image.Image], shards: int = 2) -> Path:
    """Write rows as a dataset's shards, with its subjects.parquet; return the folder."""
    (folder / "data").mkdir(parents=True)
    size = -(-len(rows) // shards)
    for shard in range(shards):
        table = pa.Table.from_pylist(rows[shard * size : (shard + 1) * size], schema=DATASET_SCHEMA)
        pq.write_table(table, folder / "data" / f"shard-{shard:05d}-of-{shards:05d}.parquet", row_group_size=4)
    subjects = [
        {
            "subject_id": name,
            "class_word": "person",
            "reference": f"{name}/1.png",
            "source_sha256": "0" * 64,
            "image": {"bytes": png(image)},
        }
        for name, image in references.items()
    ]
    pq.write_table(pa.Table.from_pylist(subjects, SUBJECTS_SCHEMA), folder / "subjects.parquet")
    return folder


def png(image: Image.Image) -> bytes:
    """Return the picture as PNG bytes."""
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()
