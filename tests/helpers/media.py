"""Tiny classifiers of images and of sound, drawn images and tones."""

from __future__ import annotations

import numpy as np
import torch

CLASSES = {"num_labels": 2, "id2label": {0: "dark", 1: "light"}, "label2id": {"dark": 0, "light": 1}}
RATE = 4000  # samples a second


def make_vit(folder, **changes) -> str:
    """A ViT of 4 patches. changes: of its config."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    torch.manual_seed(0)
    shape = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    config = ViTConfig(**shape, image_size=16, patch_size=8, initializer_range=0.2, **changes)
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return str(folder)


def make_resnet(folder) -> str:
    """A ResNet of two blocks, with batch norms whose statistics are not the ones it starts from."""
    from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    model = ResNetForImageClassification(config).train()
    model(torch.randn(8, 3, 16, 16))
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return str(folder)


def make_ast(folder, **changes) -> str:
    """A spectrogram transformer over one second at most."""
    from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification

    torch.manual_seed(0)
    shape = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    sizes = dict(max_length=32, num_mel_bins=16)
    config = ASTConfig(
        **shape, **sizes, patch_size=8, frequency_stride=8, time_stride=8, initializer_range=0.2, **changes
    )
    ASTForAudioClassification(config).save_pretrained(folder)
    ASTFeatureExtractor(sampling_rate=RATE, mean=0.75, std=1.0, **sizes).save_pretrained(folder)
    return str(folder)


def make_wav2vec2(folder) -> str:
    """A wav2vec 2.0 whose first norm is over time, so that it hears padding."""
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2ForSequenceClassification

    torch.manual_seed(0)
    shape = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    layers = dict(conv_dim=(8, 8), conv_stride=(5, 4), conv_kernel=(10, 8))
    places = dict(num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, classifier_proj_size=8)
    config = Wav2Vec2Config(**shape, **layers, **places, mask_time_prob=0.0)
    Wav2Vec2ForSequenceClassification(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(sampling_rate=RATE).save_pretrained(folder)
    return str(folder)


def make_clap(folder) -> str:
    """A two-tower network: log-mel spectrograms through two stages of windows, names through two layers."""
    from transformers import ClapConfig, ClapFeatureExtractor, ClapModel

    from helpers.models import make_tokenizer

    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    text = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    text |= dict(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, max_position_embeddings=520)
    sound = dict(depths=[1, 1], num_attention_heads=[2, 2], patch_embeds_hidden_size=16, hidden_size=32)
    sound |= dict(num_mel_bins=16, spec_size=32, window_size=4, num_hidden_layers=2)
    config = ClapConfig(text_config=text, audio_config=sound, projection_dim=16, initializer_factor=1.0)
    model = ClapModel(config)
    rates = dict(sampling_rate=RATE, hop_length=80, fft_window_size=256, frequency_max=RATE // 2)
    extractor = ClapFeatureExtractor(feature_size=16, max_length_s=1, truncation="rand_trunc", **rates)
    sounds = [np.float32(tone(100 * 2**i)["array"]) for i in range(5)]
    mels = extractor(sounds, sampling_rate=RATE, return_tensors="pt")["input_features"]
    norm = model.audio_model.audio_encoder.batch_norm
    norm.running_mean.fill_(mels.mean())
    norm.running_var.fill_(mels.var())
    model.save_pretrained(folder)
    extractor.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def shade(level: float, seed: int = 0, size: tuple[int, int] = (16, 16)):
    """An image of noise around a grey level from 0 to 1."""
    from PIL import Image

    noise = np.random.default_rng(seed).normal(level * 255, 30, (*size, 3))
    return Image.fromarray(noise.clip(0, 255).astype(np.uint8))


def shades(count: int) -> list[dict]:
    """Dark and light images with their class."""
    rows = []
    for i in range(count):
        rows.append(
            {"image": shade(0.25 + 0.5 * (i % 2), i), "label": i % 2, "label_name": ("dark", "light")[i % 2]}
        )
    return rows


def tone(frequency: float, seed: int = 0, seconds: float = 0.5) -> dict:
    """A tone with noise, as `datasets` has it."""
    time = np.arange(int(RATE * seconds)) / RATE
    noise = np.random.default_rng(seed).normal(0, 0.05, len(time))
    return {"array": np.sin(2 * np.pi * frequency * time) + noise, "sampling_rate": RATE}


def tones(count: int) -> list[dict]:
    """Low and high tones of two lengths with their class."""
    return [
        {"audio": tone((250, 1000)[i % 2], i, (0.25, 0.35)[i // 2 % 2]), "label": ("low", "high")[i % 2]}
        for i in range(count)
    ]
