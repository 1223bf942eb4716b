"""Every setting declares what is checked about it, and every one is checked."""

from __future__ import annotations

import math
import re
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from training import TINY, digits, flags

from difffit_fast._bounds import FRACTION, FROM_ONE, POSITIVE, Bounds
from difffit_fast.cli import main
from difffit_fast.data import ImageFolder, visit_seed
from difffit_fast.data.extract import ExtractConfig, Extraction
from difffit_fast.data.vae import vae_of
from difffit_fast.errors import DiffFitError
from difffit_fast.models.header import read_header
from difffit_fast.train import TrainConfig, Trainer
from difffit_fast.train.settings import flag, option, settings_of
from difffit_fast.train.source import open_source

SETTINGS = settings_of(TrainConfig)
NUMBERS = [name for name, setting in SETTINGS.items() if setting.kind in (int, float)]
HUGE = 10**400
WRONG_TYPE = {int: (True, 2.5, math.nan, math.inf, "1" + "0" * 400), float: (True, "fast", {}), bool: (1, "yes", None),
              str: (True, 3, {}), dict: ("a=1", 3, None)}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_every_field_declares_what_is_known_of_it(name: str) -> None:
    setting = SETTINGS[name]
    assert isinstance(setting.steers, bool) and setting.help and setting.group
    assert (setting.bounds is not None) == (setting.kind in (int, float))
    assert setting.rival is None or SETTINGS[setting.rival].rival == name
    assert setting.steers or not setting.part_of_model
    assert setting.default is None or setting.coerce(setting.default) == setting.default
    setting.check(setting.default)


def test_steering_is_never_left_to_a_default() -> None:
    with pytest.raises(TypeError, match="steers"):
        option("run", 1, "something new")  # type: ignore[call-arg]


def refused(name: str, value: object) -> str:
    """The sentence by which a value is refused, the same however the settings are made."""
    told = set()
    for make in (TrainConfig.from_dict, lambda values: TrainConfig(**values)):
        with pytest.raises(DiffFitError) as caught:
            make({name: value}).validate()
        told.add(str(caught.value))
    assert len(told) == 1
    return told.pop()


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_out_of_bounds_are_refused_by_one_sentence(name: str) -> None:
    setting = SETTINGS[name]
    values = [setting.bounds.low - 1, -HUGE, HUGE]
    if setting.kind is float:
        values += [math.nan, math.inf, -math.inf, "nan", "1e999"]
    if setting.bounds.open:
        values.append(setting.bounds.low)
    if setting.bounds.below < math.inf:
        values.append(setting.bounds.below)
    for value in values:
        text = refused(name, value)
        assert text.startswith(f"--{name.replace('_', '-')} must be ") and "; got " in text, (value, text)
        assert "\n" not in text and len(text) < 130, (value, text)


@pytest.mark.parametrize("name", SETTINGS)
def test_values_of_another_type_are_refused_by_one_sentence(name: str) -> None:
    setting = SETTINGS[name]
    for value in WRONG_TYPE[setting.kind]:
        if (value is None and setting.optional) or (value is True and "on" in (setting.choices or ())):
            continue
        text = refused(name, value)
        assert text.startswith(f"--{name.replace('_', '-')} must be ") and "; got " in text, (value, text)
        assert "\n" not in text and len(text) < 180, (value, text)


@pytest.mark.parametrize("name", NUMBERS)
def test_flags_and_files_refuse_them_too(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({name: HUGE}))
    flag = f"--{name.replace('_', '-')}"
    for words in ([f"{flag}=-1"], [flag, "1" + "0" * 400], ["--config", str(tmp_path / "run.yaml")]):
        assert main(["train", *words]) == 2
        told = capsys.readouterr().err
        assert told.startswith(f"difffit train: {flag} must be ") and told.count("\n") == 1, told


def test_sentences() -> None:
    assert FROM_ONE.objection(0) == "at least 1" and FROM_ONE.objection(1) is None
    assert FROM_ONE.objection(HUGE) == f"at least 1 and less than {2**63}"
    assert POSITIVE.objection(0) == POSITIVE.objection(math.nan) == "positive" and POSITIVE.objection(1e-300) is None
    assert POSITIVE.objection(math.inf) == "positive and finite"
    assert FRACTION.objection(1.0) == "at least 0 and less than 1" and FRACTION.objection(0.0) is None
    assert Bounds(2, open=True).objection(2) == "more than 2"
    assert "about 400 digits" in refused("max_steps", HUGE)


@pytest.mark.parametrize(("name", "rival"), [(n, s.rival) for n, s in SETTINGS.items() if s.rival])
def test_rivals(name: str, rival: str, tmp_path: Path) -> None:
    some = {int: 3, float: 0.5, str: "here"}
    values = {key: some[SETTINGS[key].kind] for key in (name, rival)}
    with pytest.raises(DiffFitError, match="not both; got both"):
        TrainConfig.from_dict(values).validate()
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({rival: values[rival]}))
    config = TrainConfig.load(tmp_path / "run.yaml", {name: values[name]})  # a flag beats its rival in the file
    assert getattr(config, rival) == SETTINGS[rival].default and getattr(config, name) == values[name]


def test_differences_are_those_of_settings_that_steer() -> None:
    config = TrainConfig(lr=0.1, results_dir="a", method="bitfit")
    assert config.differences({"lr": 0.2, "results_dir": "b", "method": "bitfit", "gone": 1}) == {"lr": (0.2, 0.1)}
    assert TrainConfig(vae=None).vae == "none"  # a bare `none` in YAML is text, a null is this


# ---------------------------------------------------------------- mirroring


def test_flip_as_yaml_and_flags_say_it(tmp_path):
    for text, expected in (("none", "none"), ("null", "none"), ("horizontal", "horizontal"), ("'none'", "none")):
        (tmp_path / "c.yaml").write_text(f"flip: {text}\n")
        assert TrainConfig.load(tmp_path / "c.yaml").flip == expected
    assert TrainConfig().flip == "horizontal"
    for text in ("false", "true", "no", "1", "vertical"):
        (tmp_path / "c.yaml").write_text(f"flip: {text}\n")
        with pytest.raises(DiffFitError, match="--flip must be one of horizontal, none; got"):
            TrainConfig.load(tmp_path / "c.yaml")


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("flip", ["none", "horizontal"])
def test_flip_reaches_images_and_features(tmp_path, cached, flip):
    images = digits(tmp_path / "digits", classes=2, each=1)
    where = {"data_path": str(images)}
    if cached:
        extraction = Extraction(ExtractConfig(str(images), str(tmp_path / "f"), image_size=16, vae="none"))
        extraction.run()
        extraction.finish()
        where = {"feature_path": str(tmp_path / "f")}
    config = TrainConfig(vae="none", image_size=16, flip=flip, **where).validate()
    data = open_source(config, torch.device("cpu"), None, None).data
    seen = [data.load(0, visit_seed(0, epoch, 0))[0] for epoch in range(40)]
    assert {torch.equal(x, seen[0]) for x in seen} == ({True} if flip == "none" else {True, False})


def test_given_data_that_mirrors_contradicts_flip_none(tmp_path):
    images = digits(tmp_path, classes=2, each=1)
    config = TrainConfig(vae="none", image_size=16, flip="none")
    with pytest.raises(DiffFitError, match="the given data mirrors images, and --flip is none"):
        open_source(config, torch.device("cpu"), ImageFolder(images, 16), None)
    assert open_source(config, torch.device("cpu"), ImageFolder(images, 16, flip=False), None).data.flip is False


def test_runs_from_before_flip_was_a_setting_mirrored():
    before = TrainConfig().to_dict()
    del before["flip"]
    assert TrainConfig().differences(before) == {}
    assert TrainConfig(flip="none").differences(before) == {"flip": ("horizontal", "none")}
    assert TrainConfig.from_dict(before).flip == "horizontal"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("depth=[", r"--model-args 'depth=\[' is not valid YAML"),
        ("depth={a", "is not valid YAML"),
        ("depth=*a", "undefined alias"),
        ("depth=!!python/object/apply:os.getcwd []", "is not valid YAML"),
        ("depth=2001-99-99", "is not valid YAML"),
        ("depth=" + "9" * 6000, "is not valid YAML"),
        ("depth=" + "[" * 3000, "is not valid YAML"),
        ("depth=yes", "depth must be a whole number, got True"),
        ("depth=2.0", "depth must be a whole number, got 2.0"),
        ("depth=0", "there must be at least one; got depth 0"),
        ("learn_sigma=maybe", "learn_sigma must be true or false, got 'maybe'"),
        ("learn_sigma=1", "learn_sigma must be true or false, got 1"),
        ("class_dropout_prob=2", "class_dropout_prob must be in 0..1, got 2"),
        ("num_classes=7", "--model-args has num_classes=7, but by the data it is 3"),
        ("input_size=8", "--model-args has input_size=8, but by the data it is 16"),
    ],
)
def test_sizes_that_make_no_model_are_refused_before_the_first_step(word: str, message: str, tmp_path, capsys) -> None:
    words = flags(data_path=digits(tmp_path / "images", each=2), results_dir=tmp_path / "runs")
    words.insert(words.index("--model-args") + 1 + len(TINY), word)  # the last of a key counts
    assert main(["train", *words]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not list((tmp_path / "runs").rglob("metrics.jsonl"))


def test_a_probability_among_the_sizes_is_the_models(tmp_path) -> None:
    words = flags(data_path=digits(tmp_path / "images", each=4), results_dir=tmp_path / "runs")
    words.insert(words.index("--model-args") + 1, "class_dropout_prob=0.5")
    assert main(["train", *words]) == 0
    (delta,) = (tmp_path / "runs").rglob("0000001.safetensors")
    assert read_header(delta)["config"]["class_dropout_prob"] == 0.5


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_classes", 10**12), ("global_batch_size", 10**12), ("num_samples", 1 << 62), ("num_workers", 10**6),
        ("epochs", 1 << 62), ("num_sampling_steps", 10**9), ("fid_samples", 10**12), ("image_size", 10**9),
    ],
)  # fmt: skip
def test_numbers_that_nobody_means_are_refused_before_anything_is_made(name: str, value: int) -> None:
    with pytest.raises(DiffFitError, match=rf"{flag(name)} must be at least [01] and less than \d+; got {value}"):
        TrainConfig(data_path="images", **{name: value}).validate()


@pytest.mark.parametrize("asked", [None, 48])
def test_images_have_size_and_channels_of_the_base_where_nothing_else_is_said(
    tmp_path: Path, asked: int | None
) -> None:
    digits(tmp_path / "images", classes=2, each=3)
    config = TrainConfig(
        data_path=str(tmp_path / "images"), ckpt="glyphs", flip="none", max_steps=1, image_size=asked, device="cpu",
        num_workers=0, results_dir=str(tmp_path / "runs"), global_batch_size=2,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # classes that the base does not have
        trainer = Trainer(config)
    assert trainer.config.image_size == trainer.model.input_size == (asked or 24)
    assert trainer.config.vae == "none" and trainer.model.in_channels == 1


@pytest.mark.parametrize(
    ("header", "channels", "vae"),
    [
        ({"vae": "mse"}, 4, "mse"), ({"vae": "none"}, 3, "none"), ({}, 4, "ema"), ({}, 3, "none"), ({}, 1, "none"),
        ({"vae": None}, None, "ema"),
    ],
)  # fmt: skip
def test_the_autoencoder_where_nobody_says(header: dict, channels: int | None, vae: str) -> None:
    assert vae_of(header, channels) == vae
