"""A text-to-image transformer of diffusers (PixArt), fine-tuned by DiffFit from cached text embeddings and latents.

    python examples/diffusers_text_to_image.py                                       # digits and a toy model, any CPU
    accelerate launch --mixed_precision bf16 examples/diffusers_text_to_image.py \
        --pretrained-model PixArt-alpha/PixArt-XL-2-512x512 --data-path my_images --steps 2000

``--data-path`` holds images and ``metadata.jsonl``, a line {"file_name": "a.png", "text": "a caption"} for each, as the
scripts of diffusers take them. Text encoder and autoencoder run once, in the first phase, and are gone in the second: what
trains needs the transformer alone. SD3, FLUX, Qwen-Image, Wan and Sana go the same way with their own loss and embeddings;
``apply_difffit`` is the same line.
"""

import argparse
import json
import os
import zlib
from pathlib import Path

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, DDPMScheduler, PixArtTransformer2DModel
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from difffit_fast import apply_difffit

TOKENS = 120  # PixArt's
parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--pretrained-model", help="folder or hub name of a PixArtAlphaPipeline (default: a toy)")
parser.add_argument("--data-path", type=Path, help="folder with images and metadata.jsonl (default: digits)")
parser.add_argument("--work-dir", type=Path, default=Path("example_output"))
parser.add_argument("--steps", type=int, default=10)
parser.add_argument("--batch-size", type=int, default=4)
parser.add_argument("--learning-rate", type=float, default=1e-3)
parser.add_argument("--gradient-checkpointing", action="store_true")
args = parser.parse_args()

accelerator = Accelerator()
set_seed(0)
dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32)


def load_models() -> tuple[PixArtTransformer2DModel, AutoencoderKL]:
    if args.pretrained_model is None:
        transformer = PixArtTransformer2DModel(
            num_attention_heads=2, attention_head_dim=16, num_layers=2, sample_size=4, in_channels=4, out_channels=8,
            cross_attention_dim=32, caption_channels=24,
        )  # fmt: skip
        vae = AutoencoderKL(
            block_out_channels=(8,) * 4, norm_num_groups=4, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        )  # fmt: skip
        return transformer, vae
    load = dict(pretrained_model_name_or_path=args.pretrained_model, torch_dtype=dtype)
    transformer = PixArtTransformer2DModel.from_pretrained(subfolder="transformer", **load)
    return transformer, AutoencoderKL.from_pretrained(subfolder="vae", **load)


def captioned_images() -> list[tuple[Path, str]]:
    if args.data_path is None:
        from digit_images import write_digit_images

        folder = write_digit_images(args.work_dir / "digits")
        return [(path, f"the {path.parent.name}") for path in sorted(folder.glob("*/*.png"))[::8]]
    lines = (args.data_path / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    return [(args.data_path / line["file_name"], line["text"]) for line in map(json.loads, lines)]


@torch.no_grad()
def embed(captions: list[str], channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings (N, 120, channels) and masks (N, 120)."""
    if args.pretrained_model is None:  # the toy has no text encoder: noise that hangs on the caption
        seeds = (torch.Generator().manual_seed(zlib.crc32(caption.encode())) for caption in captions)
        found = [torch.randn(TOKENS, channels, generator=seed) for seed in seeds]
        return torch.stack(found), torch.ones(len(captions), TOKENS, dtype=torch.long)
    from transformers import T5EncoderModel, T5Tokenizer

    tokenizer = T5Tokenizer.from_pretrained(args.pretrained_model, subfolder="tokenizer")
    encoder = T5EncoderModel.from_pretrained(args.pretrained_model, subfolder="text_encoder", torch_dtype=dtype)
    encoder.to(accelerator.device)
    words = tokenizer(captions, max_length=TOKENS, padding="max_length", truncation=True, return_tensors="pt")
    ids, masks = words.input_ids.to(accelerator.device), words.attention_mask.to(accelerator.device)
    parts = [encoder(i, attention_mask=m)[0] for i, m in zip(ids.split(8), masks.split(8), strict=True)]
    return torch.cat(parts).cpu(), masks.cpu()


@torch.no_grad()
def encode(paths: list[Path], vae: AutoencoderKL, side: int) -> torch.Tensor:
    """Means and deviations of the latents (N, 2, 4, side / 8, side / 8): noise is drawn anew at every step."""
    vae.to(accelerator.device).eval()
    found = []
    for path in paths:
        with Image.open(path) as image:
            square = min(image.size)
            left, top = (image.width - square) // 2, (image.height - square) // 2
            cut = image.convert("RGB").crop((left, top, left + square, top + square)).resize((side, side))
        pixels = torch.from_numpy(np.asarray(cut).copy()).permute(2, 0, 1)[None].to(accelerator.device, vae.dtype)
        moments = vae.encode(pixels / 127.5 - 1).latent_dist
        found.append(torch.stack([moments.mean, moments.std], 1).cpu())
    return torch.cat(found)


# -- first phase: what needs the text encoder and the autoencoder, once ------------------------------------------------
transformer, vae = load_models()
items = captioned_images()
embeddings, masks = embed([text for _, text in items], transformer.config.caption_channels)
moments = encode([path for path, _ in items], vae, 8 * transformer.config.sample_size)
scaling = vae.config.scaling_factor
del vae

# -- second phase ------------------------------------------------------------------------------------------------------
apply_difffit(transformer)
print(f"{transformer.num_trainable:,} of {sum(p.numel() for p in transformer.parameters()):,} parameters train")
if args.gradient_checkpointing:
    transformer.enable_gradient_checkpointing()
optimizer = torch.optim.AdamW(transformer.trainable_parameters(), lr=args.learning_rate, weight_decay=0.0)
loader = DataLoader(TensorDataset(moments, embeddings, masks), args.batch_size, shuffle=True, drop_last=True)
transformer.train()
model, optimizer, loader = accelerator.prepare(transformer, optimizer, loader)
noise_scheduler = DDPMScheduler(beta_start=1e-4, beta_end=0.02, clip_sample=False)
large = transformer.config.sample_size == 128  # the 1024-pixel model also reads size and aspect ratio
step = 0
while step < args.steps:
    for moment, embedding, mask in loader:
        mean, deviation = moment.unbind(1)
        latents = (mean + deviation * torch.randn_like(mean)) * scaling
        noise, n = torch.randn_like(latents), len(latents)
        t = torch.randint(0, noise_scheduler.config.num_train_timesteps, (n,), device=latents.device)
        size = {"resolution": None, "aspect_ratio": None}
        if large:
            side = torch.full((n, 1), 1024.0, device=latents.device)
            size = {"resolution": side.expand(n, 2), "aspect_ratio": torch.ones_like(side)}
        output = model(
            noise_scheduler.add_noise(latents, noise, t), encoder_hidden_states=embedding, encoder_attention_mask=mask,
            timestep=t, added_cond_kwargs=size,
        ).sample  # fmt: skip
        loss = F.mse_loss(output.chunk(2, 1)[0].float(), noise.float())
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 10 == 0 or step == args.steps:
            accelerator.print(f"step {step}: loss {loss.item():.4f}")
        if step == args.steps:
            break

accelerator.wait_for_everyone()
if accelerator.is_main_process:
    transformer = accelerator.unwrap_model(model)
    delta = args.work_dir / "text_to_image.safetensors"
    transformer.save_delta(delta, step=step)
    print(f"{delta}: {delta.stat().st_size:,} bytes; for a pipeline: apply_difffit(pipe.transformer).load_delta(...)")
