"""A class-conditional DiT of diffusers, fine-tuned with accelerate: DiffFit in a training loop of your own.

    python examples/diffusers_class_conditional.py                                   # digits and a toy model, any CPU
    accelerate launch --mixed_precision bf16 examples/diffusers_class_conditional.py \
        --pretrained-model facebook/DiT-XL-2-256 --data-path my_images --steps 24000

The images lie in one sub-folder a class; the n-th folder takes the n-th row of the model's class table. Writes the delta (a few
MB), a state to go on from (``--resume``), and a pipeline with the delta folded in.

For DiT alone ``difffit train --ckpt facebook/DiT-XL-2-256`` does all of this, and faster; this shows what to change in a
loop that exists.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, DiTPipeline, DiTTransformer2DModel
from torch.utils.data import DataLoader

from difffit_fast import apply_difffit
from difffit_fast.data import ImageFolder

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument(
    "--pretrained-model", help="folder or hub name of a DiTPipeline (default: a toy with random weights)"
)
parser.add_argument("--data-path", type=Path, help="folder with one sub-folder of images per class (default: digits)")
parser.add_argument("--work-dir", type=Path, default=Path("example_output"))
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--batch-size", type=int, default=8)
parser.add_argument("--learning-rate", type=float, default=1e-3)
parser.add_argument("--label-dropout", type=float, default=0.1)
parser.add_argument("--resume", action="store_true", help="go on from the state in --work-dir")
args = parser.parse_args()

accelerator = Accelerator()
set_seed(0)
if args.pretrained_model is None:
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, num_layers=2, sample_size=4, out_channels=8, norm_eps=1e-6
    )
    vae = AutoencoderKL(
        block_out_channels=(8,) * 4, norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
else:
    transformer = DiTTransformer2DModel.from_pretrained(args.pretrained_model, subfolder="transformer")
    vae = AutoencoderKL.from_pretrained(args.pretrained_model, subfolder="vae")

flip = True
if args.data_path is None:
    from digit_images import write_digit_images

    args.data_path, flip = write_digit_images(args.work_dir / "digits"), False  # a mirrored 2 is no 2
data = ImageFolder(args.data_path, image_size=8 * transformer.config.sample_size, flip=flip)
loader = DataLoader(
    [data.load(i, seed=0) for i in range(len(data))] if len(data) < 1000 else data,
    batch_size=args.batch_size, shuffle=True, drop_last=True,
)  # fmt: skip

# --- what is new in the loop: one line, and the optimizer's parameters ---
apply_difffit(transformer)
optimizer = torch.optim.AdamW(transformer.trainable_parameters(), lr=args.learning_rate, weight_decay=0.0)
# -------------------------------------------------------------------------
print(f"{transformer.num_trainable:,} of {sum(p.numel() for p in transformer.parameters()):,} parameters train")

transformer.train()
model, optimizer, loader = accelerator.prepare(transformer, optimizer, loader)
vae.requires_grad_(False).to(accelerator.device)
noise_scheduler = DDPMScheduler(beta_start=1e-4, beta_end=0.02, clip_sample=False)
state, step = args.work_dir / "state", 0
if args.resume:
    accelerator.load_state(state)
    step = int((state / "step.txt").read_text())

while step < args.steps:
    for images, labels in loader:
        with torch.no_grad():
            latents = vae.encode(images.to(vae.dtype)).latent_dist.sample() * vae.config.scaling_factor
        noise = torch.randn_like(latents)
        t = torch.randint(0, noise_scheduler.config.num_train_timesteps, (len(latents),), device=latents.device)
        labels = torch.where(torch.rand(len(labels), device=labels.device) < args.label_dropout, 1000, labels)
        output = model(noise_scheduler.add_noise(latents, noise, t), timestep=t, class_labels=labels).sample
        loss = F.mse_loss(output.chunk(2, 1)[0].float(), noise.float())  # the learned variance stays the base's
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 10 == 0 or step == args.steps:
            accelerator.print(f"step {step}: loss {loss.item():.4f}")
        if step == args.steps:
            break

accelerator.save_state(state)
accelerator.wait_for_everyone()
if accelerator.is_main_process:
    (state / "step.txt").write_text(str(step))
    transformer = accelerator.unwrap_model(model)
    delta = args.work_dir / "delta.safetensors"
    transformer.save_delta(delta, step=step)
    transformer.merge_()  # of diffusers' own class again
    names = {str(i): name for i, name in enumerate(data.class_names)}
    scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, clip_sample=False, set_alpha_to_one=True)
    pipeline = DiTPipeline(transformer.eval().to(vae.dtype), vae, scheduler, id2label=names)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(args.work_dir / "pipeline")
    generator = torch.Generator(accelerator.device).manual_seed(0)
    pipeline([0, 1], guidance_scale=4.0, num_inference_steps=10, generator=generator).images[0].save(
        args.work_dir / "sample.png"
    )
    print(f"{delta}: {delta.stat().st_size:,} bytes; the pipeline is in {args.work_dir / 'pipeline'}")
