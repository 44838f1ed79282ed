"""Captioner, segmenter and matcher as their real transformers classes: tiny, with random weights, saved to folders."""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BertTokenizerFast,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    PreTrainedTokenizerFast,
    SwinConfig,
)

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a man woman and young on the beach photo".split()
SMALL = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}


def _save(folder: Path, model, processor) -> Path:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _words_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordPiece({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", bos_token="[CLS]", eos_token="[SEP]",
        model_max_length=32,
    )  # fmt: skip


def tiny_blip(folder: Path) -> Path:
    """A BLIP captioner."""
    torch.manual_seed(0)
    text = {**SMALL, "vocab_size": len(WORDS), "max_position_embeddings": 64, "encoder_hidden_size": 32,
            "bos_token_id": 2, "sep_token_id": 3, "eos_token_id": 3, "pad_token_id": 0}  # fmt: skip
    vision = {**SMALL, "image_size": 32, "patch_size": 8}
    model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision, projection_dim=16))
    tokenizer = BertTokenizerFast(vocab={word: number for number, word in enumerate(WORDS)})
    return _save(folder, model, BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer))


def tiny_blip2(folder: Path) -> Path:
    """A BLIP-2 captioner with an OPT language model, as the smallest published one has."""
    torch.manual_seed(1)
    config = Blip2Config(
        vision_config={**SMALL, "image_size": 32, "patch_size": 8},
        qformer_config={**SMALL, "vocab_size": len(WORDS), "encoder_hidden_size": 32},
        text_config={
            "model_type": "opt", "vocab_size": len(WORDS) + 1, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 37,
            "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0,
            "bos_token_id": 2, "eos_token_id": 3,
        },
        num_query_tokens=4, image_token_index=len(WORDS),
    )  # fmt: skip
    processor = Blip2Processor(
        BlipImageProcessor(size={"height": 32, "width": 32}), _words_tokenizer(), num_query_tokens=4
    )
    model = Blip2ForConditionalGeneration(config)
    with torch.no_grad():
        # Words only: the embedding is the output layer too, and a row of zeros is never the likeliest.
        model.language_model.get_input_embeddings().weight[[0, 1, 2, 3, 4, len(WORDS)]] = 0
    return _save(folder, model, processor)


def tiny_mask2former(folder: Path) -> Path:
    """A panoptic Mask2Former whose first class is `person`, sure enough of itself to name segments."""
    torch.manual_seed(0)
    backbone = SwinConfig(image_size=32, patch_size=2, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[2, 2, 2, 2],
                          window_size=2, out_features=["stage1", "stage2", "stage3", "stage4"])  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, hidden_dim=32, feature_size=32, mask_feature_size=32, num_queries=4,
        num_attention_heads=2, encoder_layers=1, decoder_layers=2, dim_feedforward=32, encoder_feedforward_dim=32,
        id2label={0: "person", 1: "tree"}, num_labels=2,
    )  # fmt: skip
    model = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        model.class_predictor.bias[0] = 9.0
    processor = Mask2FormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 128}, num_labels=2)
    return _save(folder, model, processor)


def tiny_clip(folder: Path) -> Path:
    """A CLIP model that compares phrases and crops."""
    torch.manual_seed(0)
    text = {**SMALL, "vocab_size": len(WORDS), "max_position_embeddings": 32, "eos_token_id": 3, "bos_token_id": 2}
    vision = {**SMALL, "image_size": 32, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    tokenizer = _words_tokenizer()
    image_processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return _save(folder, model, CLIPProcessor(image_processor, tokenizer))
