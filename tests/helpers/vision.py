"""Tiny vision-language models with their processors, and drawn images."""

from __future__ import annotations

import numpy as np
import torch

from helpers.models import make_tokenizer

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'image' %}<image>{% else %}{{ p.text }}{% endif %}{% endfor %}"
    "{% endif %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
MARKS = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
for i in (1, 2, 3):
    MARKS += [f"<row_{i}_col_{j}>" for j in (1, 2, 3)]


def tokenizer_with_marks():
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [*tokenizer.all_special_tokens, *MARKS]})
    tokenizer.chat_template = TEMPLATE
    text = TEXT | {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    text |= {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    return tokenizer, text


def make_llava(folder) -> str:
    """One image is one picture of 16 patches."""
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    torch.manual_seed(0)
    tokenizer, text = tokenizer_with_marks()
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER, projection_dim=32),
        text_config=LlamaConfig(**text),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
        vision_feature_layer=-1,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    pictures = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    return str(folder)


def make_idefics(folder) -> str:
    """One image is several pictures, as many as its shape needs, and tokens between them."""
    from transformers import (
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        Idefics3ImageProcessor,
        Idefics3Processor,
    )

    torch.manual_seed(0)
    tokenizer, text = tokenizer_with_marks()
    config = Idefics3Config(
        vision_config=TOWER,
        text_config={"model_type": "llama", **text},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    Idefics3ForConditionalGeneration(config).save_pretrained(folder)
    pictures = Idefics3ImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    Idefics3Processor(pictures, tokenizer, image_seq_len=4).save_pretrained(folder)
    return str(folder)


def make_clip(folder) -> str:
    """Two towers, of texts and of images, whose weights are random."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }
    text = {**shape, **ends, "vocab_size": len(tokenizer), "max_position_embeddings": 64}
    sight = {**shape, "image_size": 16, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=sight, projection_dim=8, initializer_factor=3.0)
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"height": 16, "width": 16}, do_center_crop=False).save_pretrained(folder)
    return str(folder)


def make_florence(folder) -> str:
    """A Florence-2 that reads an image as two by two places."""
    from transformers import (
        BartConfig,
        CLIPImageProcessor,
        Florence2Config,
        Florence2ForConditionalGeneration,
    )
    from transformers.models.florence2.configuration_florence2 import Florence2VisionConfig

    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    sight = Florence2VisionConfig(
        depths=(1, 1),
        patch_size=(7, 3),
        patch_stride=(4, 2),
        patch_padding=(3, 1),
        patch_prenorm=(False, True),
        embed_dim=(8, 12),
        num_heads=(2, 2),
        num_groups=(2, 2),
        window_size=2,
        drop_path_rate=0.0,
        projection_dim=16,
    )
    text = BartConfig(
        vocab_size=len(tokenizer),
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        max_position_embeddings=64,
    )
    config = Florence2Config(vision_config=sight, text_config=text, image_token_id=3)
    Florence2ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    pictures = CLIPImageProcessor(size={"height": 16, "width": 16}, do_center_crop=False)
    pictures.save_pretrained(folder)
    return str(folder)


def colour_rows(count: int) -> list[dict]:
    """Plain images of two colours, and which it is."""
    from PIL import Image

    rows = []
    for i in range(count):
        name, colour = (("red", (200 + i, 20, 10)), ("blue", (20, 30, 180 + i)))[i % 2]
        content = [{"type": "image"}, {"type": "text", "text": "?"}]
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": name}]
        rows.append({"messages": turns, "images": [Image.new("RGB", (32, 32), colour)]})
    return rows


def picture(seed: int, width: int = 40, height: int = 40):
    """An image of noise."""
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)
