"""Which runs experiments/transfer.py consists of, and the file of their results."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from reporting import Results


def key_of(spec: dict[str, Any]) -> str:
    """A readable name of a run that ends in a digest of all its settings."""
    digest = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:10]
    return f"{spec['set']}/{spec['name']}/x{spec['multiple']:g}/seed{spec['seed']}/{digest}"


def make_spec(
    plan: dict[str, Any], name: str, image_set: str, seed: int, multiple: float, samples: bool = True
) -> dict:
    """The whole configuration of one run."""
    options = dict(plan["methods"][name])
    finetune = {**plan["finetune"], **({"steps": options.pop("steps")} if "steps" in options else {})}
    return {
        "set": image_set, "name": name, "seed": seed, "multiple": multiple, "method": options.pop("method"),
        "options": options, "model": plan["model"], "pretrain": plan["pretrain"],
        "finetune": {**finetune, "lr": multiple * plan["pretrain"]["lr"]},
        "sampling": plan["sampling"] if samples else None,
    }  # fmt: skip


def tuning_specs(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The runs that choose learning rates; they are not sampled from."""
    tuning = plan["tuning"]
    for name, options in plan["methods"].items():
        if options.get("steps") != 0 and name not in tuning["shared"]:
            for multiple in tuning["multiples"]:
                yield make_spec(plan, name, tuning["set"], tuning["seed"], multiple, samples=False)


def chosen_multiples(plan: dict[str, Any], results: Results) -> dict[str, float]:
    """The learning rate of each method whose tuning is complete, as a multiple of the pre-training rate."""
    losses: dict[str, dict[float, float]] = {}
    for spec in tuning_specs(plan):
        if run := results.runs.get(key_of(spec)):
            losses.setdefault(spec["name"], {})[spec["multiple"]] = run["val_loss"]
    count = len(plan["tuning"]["multiples"])
    chosen = {name: min(found, key=found.__getitem__) for name, found in losses.items() if len(found) == count}
    chosen |= {a: chosen[b] for a, b in plan["tuning"]["shared"].items() if b in chosen}
    return chosen | {name: 1.0 for name, options in plan["methods"].items() if options.get("steps") == 0}


def comparison_specs(plan: dict[str, Any], chosen: dict[str, float]) -> Iterator[dict[str, Any]]:
    """Every method on every set, seed by seed, so that an interrupted series is complete for the seeds it has."""
    for seed in plan["seeds"]:
        for image_set in plan["sets"]:
            for name in plan["methods"]:
                if name in chosen:
                    yield make_spec(plan, name, image_set, seed, chosen[name])


def sweep_specs(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    sweep = plan["sweep"]
    for seed in plan["seeds"]:
        for multiple in sweep["multiples"]:
            yield make_spec(plan, sweep["method"], sweep["set"], seed, multiple)
