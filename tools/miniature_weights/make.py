"""Make the miniature's shipped parts: `python -m tools.miniature_weights.make all --output DIR`.

Each part is trained for a set number of steps on the CPU, on pictures rendered here; what a part needs is read from the output
folder, so parts can be made one at a time, in the order of BUDGETS. What rests on a part is to be made again after it. `models`
comes last, from two trainings on the base: `... make models --output DIR --tdm RUN --sdm RUN`. `links` makes again what a copy of
DIR lacks of its links.
"""

import json
import logging
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from facediffuser.errors import InputError
from facediffuser.modelfolder import assemble
from facediffuser.scoring.miniature_embedder import save_identity_embedder
from facediffuser.subject import SubjectFuser
from tools.miniature_weights.base import new_scheduler, save_fp16, train_base
from tools.miniature_weights.command_line import command_parser
from tools.miniature_weights.photo_stream import PhotoSet, load_photos
from tools.miniature_weights.tokenizer import make_tokenizer
from tools.miniature_weights.train_scorers import train_clip, train_identity_embedder, train_prompt_scorer
from tools.miniature_weights.vae import round_trip_psnr, train_decoder, train_vae
from tools.miniature_weights.words import add_words

logger = logging.getLogger(__name__)

BUDGETS = {
    "tokenizer": 0,
    "vae": 1000,
    "vae-decoder": 2200,
    "clip": 1300,
    "base": 5000,
    "identity": 800,
    "prompt": 1500,
    "words": 0,
}
"""Steps of training per part."""

MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "safety_checker": [None, None],
    "feature_extractor": [None, None],
}
"""What makes the base a diffusers folder."""

MODEL_PEOPLE, SCORER_PEOPLE = 0, 1_000_000
"""First person of the models' pictures and of the scorers': nobody is in both."""

MODEL_PICTURES, SCORER_PICTURES = 30_000, 15_000

MODEL_PAIR_SHARE = 0.3
"""How many of the models' pictures show two people: who of them is who takes more of them to learn than one face."""

MODEL_ACTION_SHARE = 0.6
"""How many people do something in the pictures that words are learnt from: a balloon seen seldom is drawn seldom."""

TRAINED_PARTS = {
    "unet": UNet2DConditionModel,
    "unet_text": UNet2DConditionModel,
    "image_encoder": CLIPVisionModelWithProjection,
    "subject_fuser": SubjectFuser,
}
"""What the model folder does not take from the base."""


def make(part: str, output: Path, steps: int, cache: Path) -> None:
    """Make one part into `output`, in the layout of the package's `weights` folder."""
    base, scorers = output / "base", output / "scorers"
    if part == "words":
        make_words(output)
        return
    if part in ("identity", "prompt"):
        photos = load_photos(SCORER_PICTURES, SCORER_PEOPLE, cache)
    else:
        shares = {"pair_share": MODEL_PAIR_SHARE}
        if part in ("clip", "base"):
            shares["action_share"] = MODEL_ACTION_SHARE
        photos = load_photos(MODEL_PICTURES, MODEL_PEOPLE, cache, **shares)
    if part == "tokenizer":
        make_tokenizer(_texts(photos)).save_pretrained(base / "tokenizer")
        new_scheduler().save_pretrained(base / "scheduler")
        (base / "model_index.json").write_text(json.dumps(MODEL_INDEX, indent=2) + "\n")
    elif part == "vae":
        made = base / "vae"
        vae = train_vae(photos, steps, start=AutoencoderKL.from_pretrained(made).float() if made.exists() else None)
        logger.info("vae: %.2f dB on its own pictures", round_trip_psnr(vae, photos))
        save_fp16(vae, base / "vae")
    elif part == "vae-decoder":
        vae = train_decoder(photos, steps, AutoencoderKL.from_pretrained(base / "vae").float())
        logger.info("vae: %.2f dB on its own pictures", round_trip_psnr(vae, photos))
        save_fp16(vae, base / "vae")
    elif part == "base":
        for needed, maker in (("vae", "vae"), ("text_encoder", "clip")):
            if not (base / needed).is_dir():
                raise SystemExit(f"{base / needed}: missing; make the part `{maker}` first")
        vae = AutoencoderKL.from_pretrained(base / "vae").float()
        unet, text = train_base(vae, photos, CLIPTokenizer.from_pretrained(base / "tokenizer"), steps, base)
        save_fp16(unet, base / "unet")
        save_fp16(text, base / "text_encoder")
    elif part == "clip":
        text, vision = train_clip(photos, CLIPTokenizer.from_pretrained(base / "tokenizer"), steps)
        save_fp16(text, base / "text_encoder")
        save_fp16(vision, base / "image_encoder")
    elif part == "identity":
        save_identity_embedder(train_identity_embedder(photos, steps), scorers / "identity")
    elif part == "prompt":
        tokenizer = make_tokenizer(_texts(photos))
        save_fp16(train_prompt_scorer(photos, tokenizer, steps), scorers / "prompt")
        tokenizer.save_pretrained(scorers / "prompt")


def make_words(output: Path) -> None:
    """Teach the text encoder and the prompt scorer of `output` the words for people that captions lack (`words.LIKE`).

    A model folder `output`/models that is there already follows its base.
    """
    base, models = output / "base", output / "models"
    for kind, folder, tokens in (
        (CLIPTextModel, base / "text_encoder", base / "tokenizer"),
        (CLIPModel, output / "scorers" / "prompt", output / "scorers" / "prompt"),
    ):
        if not folder.is_dir():
            raise SystemExit(f"{folder}: missing; make the parts `base` and `prompt` first")
        tokenizer, model = CLIPTokenizer.from_pretrained(tokens), kind.from_pretrained(folder).float()
        tower = model.text_model if kind is CLIPModel else model
        tower.config.vocab_size = add_words(tokenizer, tower.get_input_embeddings())
        save_fp16(model, folder)
        # Alone, for nothing else of the tokenizer changes.
        tokenizer.backend_tokenizer.save(str(tokens / "tokenizer.json"))
    if models.is_dir():
        for name in ("tokenizer/tokenizer.json", "text_encoder/config.json"):
            shutil.copyfile(base / name, models / name)


def make_models(output: Path, tdm: str, sdm: str) -> Path:
    """Make `output`/models, the package's model folder, from `output`/base and the URLs of two trainings on it; return it.

    In fp16; the base's autoencoder and text encoder are links. Raises InputError as `assemble` does.
    """
    models = assemble(output / "base", tdm, sdm, output / "models")
    halve_trained_parts(models)
    link_shared_parts(output)
    return models


def halve_trained_parts(models: Path) -> None:
    """Write what a model folder does not take from its base anew, in fp16."""
    for name, kind in TRAINED_PARTS.items():
        save_fp16(kind.from_pretrained(models / name), models / name)


def link_shared_parts(output: Path) -> None:
    """Make the weights of the autoencoder and the text encoder in `output`/models links to those of `output`/base.

    Also where they are missing: links do not come home from every machine.
    """
    for name in ("vae", "text_encoder"):
        for path in (output / "base" / name).glob("*.safetensors"):
            link = output / "models" / name / path.name
            link.unlink(missing_ok=True)
            link.symlink_to(Path("../../base", name, path.name))


def _texts(photos: PhotoSet) -> list[str]:
    return [*photos.captions, *photos.full_captions, *photos.identity_texts]


def main() -> None:
    """The command line."""
    parser = command_parser("make", __doc__)
    parser.add_argument("part", choices=[*BUDGETS, "all", "models", "links"])
    parser.add_argument("--output", type=Path, required=True, help="folder for base/, scorers/ and models/")
    parser.add_argument("--tdm", help="models: folder or s3:// URL of the TDM's training")
    parser.add_argument("--sdm", help="models: folder or s3:// URL of the SDM's training")
    parser.add_argument("--cache", type=Path, help="folder for rendered pictures (default: OUTPUT/photos)")
    parser.add_argument("--steps", type=int, help="training steps of a part (default: the table BUDGETS)")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    if args.part == "links":
        link_shared_parts(args.output)
        return
    if args.part == "models":
        if not (args.tdm and args.sdm):
            parser.error("models: give --tdm and --sdm")
        try:
            print(make_models(args.output, args.tdm, args.sdm))
        except InputError as error:
            raise SystemExit(str(error)) from None
        return
    for part in BUDGETS if args.part == "all" else [args.part]:
        make(
            part,
            args.output,
            BUDGETS[part] if args.steps is None else args.steps,
            args.cache or args.output / "photos",
        )


if __name__ == "__main__":
    main()
