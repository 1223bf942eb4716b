"""A DiT as a pipeline of diffusers: a folder that ``DiTPipeline.from_pretrained(folder, trust_remote_code=True)`` reads."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .._files import new_folder, write_json, write_safetensors, write_text
from ..errors import DiffFitError
from ..models.diffusers_keys import CONFIG_FILE, PIPELINE_FILE, diffusers_config, row_of, to_diffusers
from ..models.dit import DiT

MODEL_FILE = Path(__file__).with_name("dit_transformer.py")
WEIGHTS = "diffusion_pytorch_model.safetensors"
# The steps of DiT's own DDIM: ``create_diffusion("ddim50")``.
SCHEDULER = {
    "_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02,
    "beta_schedule": "linear", "clip_sample": False, "set_alpha_to_one": True, "steps_offset": 0,
    "timestep_spacing": "leading", "prediction_type": "epsilon",
}  # fmt: skip


def export_pipeline(
    model: DiT,
    folder: str | os.PathLike[str],
    *,
    class_names: Sequence[str] | None = None,
    objective: str | None = None,
    vae: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write ``model`` as a pipeline of diffusers, whose samples are ours for the same noise.

    Stock are the pipeline, the scheduler and the autoencoder; the transformer is of a class that lies in the folder, see
    :mod:`.dit_transformer`, which is why diffusers asks for ``trust_remote_code=True``. ``DiTPipeline`` guides all channels
    (``cfg_channels="all"``) by DDIM, whose steps are those of ``create_diffusion("ddim50")`` for a number that divides 1000;
    another scheduler can be set on the pipeline. A class is asked for by ``pipe.get_label_ids([name])``, which for the
    first 1,000 is its number.

    Args:
        model: an ordinary DiT of latents (``model.merge()`` makes one), float32.
        folder: to be made; it must not exist or be empty.
        class_names: (num_classes,); numbers where there are none.
        objective: what the model predicts, where it does not say.
        vae: folder of an ``AutoencoderKL`` as diffusers saves it, which is copied. None: the pipeline has none, and is read with
            ``DiTPipeline.from_pretrained(folder, vae=…)``.
        overwrite: replace a folder that is there.

    Raises:
        DiffFitError: ``DiTPipeline`` cannot sample such a model, or the folder has something in it.
    """
    config, objective = model.config, model.objective or objective
    if type(model) is not DiT:
        raise DiffFitError(f"expected a plain DiT, which model.merge() makes; got {type(model).__name__}")
    if objective == "flow":
        raise DiffFitError("DiTPipeline samples models that predict noise; this one predicts a velocity (a SiT)")
    if config["in_channels"] != 4:
        raise DiffFitError(
            f"DiTPipeline samples latents of 4 channels and decodes them; this model has {config['in_channels']}"
        )
    if model.pos_embed_scale is None:
        raise DiffFitError("diffusers computes the table of positions; this model's is none that it can compute")
    names = [str(i) for i in range(config["num_classes"])] if class_names is None else list(class_names)
    if len(names) != config["num_classes"]:
        raise DiffFitError(f"expected {config['num_classes']} class names; got {len(names)}")
    settings = diffusers_config(config, model.pos_embed_scale)
    source = None if vae is None else Path(vae)
    if source is not None and not (source / CONFIG_FILE).is_file():
        raise DiffFitError(f"{source} holds no VAE: expected {CONFIG_FILE} and weights as diffusers saves them")
    with new_folder(folder, overwrite=overwrite) as out:
        transformer = out / "transformer"
        for each in (transformer, out / "scheduler"):
            each.mkdir()
        state = {key: tensor.detach().cpu().contiguous() for key, tensor in model.state_dict().items()}
        write_safetensors(transformer / WEIGHTS, to_diffusers(state, config["num_classes"]), {"format": "pt"})
        write_json(transformer / CONFIG_FILE, settings)
        write_text(transformer / MODEL_FILE.name, MODEL_FILE.read_text(encoding="utf-8"))
        write_json(out / "scheduler" / "scheduler_config.json", SCHEDULER)
        if source is not None:
            shutil.copytree(source, out / "vae")
        write_json(out / PIPELINE_FILE, _index(settings, names))


def _index(settings: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {
        "_class_name": "DiTPipeline",
        "id2label": {str(row_of(i)): name for i, name in enumerate(names)},
        "scheduler": ["diffusers", SCHEDULER["_class_name"]],
        "transformer": [MODEL_FILE.stem, settings["_class_name"]],
        "vae": ["diffusers", "AutoencoderKL"],
    }
