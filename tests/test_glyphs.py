"""Glyphs: the recipe, images of fonts in folders, the instrument and the measures. No network and no npm: matplotlib's fonts."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from difffit_fast.data.listing import list_images
from difffit_fast.errors import DiffFitError

ROOT = Path(__file__).resolve().parent.parent
GLYPHS = ROOT / "experiments" / "glyphs"
if not GLYPHS.is_dir():
    pytest.skip("the experiments are not part of this installation", allow_module_level=True)
sys.path.insert(0, str(GLYPHS))
matplotlib = pytest.importorskip("matplotlib")
pytest.importorskip("fontTools")

import alphabet  # noqa: E402
import measures  # noqa: E402
import reader as reading  # noqa: E402
import recipe  # noqa: E402
import render  # noqa: E402
from alphabet import ALPHABETS, LETTERS, Glyphs  # noqa: E402

FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
SANS = FONTS / "DejaVuSans.ttf"


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- characters and folders --------------------------------------------------------------------------------------------
def test_every_character_has_a_folder_of_its_own_where_case_does_not_count() -> None:
    characters = [c for a in ALPHABETS.values() for c in a]
    folders = [alphabet.folder_of(c) for c in characters]
    assert len({f.casefold() for f in folders}) == len(characters) == 52 + 10 + 28
    assert [alphabet.character_of(f) for f in folders] == characters
    assert folders[0] == "upper_A" and folders[51] == "lower_z" and folders[52] == "0"


def test_alphabets_and_families_are_told_by_their_names() -> None:
    assert alphabet.alphabet_of(["a", "Z"]) == "letters" and alphabet.alphabet_of("04") == "digits"
    with pytest.raises(DiffFitError, match="a4"):
        alphabet.alphabet_of("a4")
    assert alphabet.family_of("jersey-10-400") == "jersey-10" and alphabet.family_of("x-400-italic") == "x"
    with pytest.raises(DiffFitError, match="x"):
        alphabet.family_of("x")


# -- the recipe --------------------------------------------------------------------------------------------------------
def test_the_recipe_is_what_it_claims() -> None:
    families = recipe.read_recipe()
    base = [f for f in families if f.role == recipe.BASE]
    held_out = [f for f in families if f.role == recipe.BASE_HELD_OUT]
    assert len(base) >= 220 and 1 / 20 < len(held_out) / len(base) < 1 / 8
    assert not {f.kin for f in base} & {f.kin for f in held_out}
    for style in recipe.STYLES:
        parts = {f.name: f.part for f in families if f.role == style and not f.demo}
        assert set(parts.values()) == set(recipe.PARTS) and len(parts) >= 8
        for a in parts:
            for b in parts:
                assert parts[a] == parts[b] or a.split("-")[0] != b.split("-")[0] or a.split("-")[0] in ("the", "ms")
    (demo,) = [f for f in families if f.demo]
    assert demo.role == "handwriting" and demo.licence == "OFL-1.1" and demo.folder == "demo"


@pytest.mark.parametrize(
    ("entry", "what"),
    [
        ("{version: 1.0.0, licence: MIT, role: base}", "MIT"),
        ("{version: 1.0.0, licence: OFL-1.1, role: fancy}", "fancy"),
        ("{version: 1.0.0, licence: OFL-1.1, role: script}", "part"),
        ("{version: 1.0.0, licence: OFL-1.1, role: base, kin: KIN}", "hash"),
        ("{version: 1.0.0, role: base}", "licence"),
    ],
)
def test_a_recipe_that_means_nothing_is_refused(tmp_path: Path, entry: str, what: str) -> None:
    path = tmp_path / "fonts.yaml"
    path.write_text(f"families:\n  some-font: {entry.replace('KIN', kin(held_out=True))}\n")
    with pytest.raises(DiffFitError, match=what):
        recipe.read_recipe(path)


def kin(held_out: bool, number: int = 0) -> str:
    """The ``number``-th name that the hash holds out, or does not."""
    return [f"kin{i}" for i in range(500) if recipe.is_held_out(f"kin{i}") == held_out][number]


def test_npm_is_asked_only_for_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = recipe.Family("some-font", "1.2.3", "OFL-1.1", "base")
    monkeypatch.setattr(recipe, "which", lambda name: None)
    with pytest.raises(DiffFitError, match="npm is needed"):
        recipe.install([family], tmp_path)
    package = recipe.package_folder(family, tmp_path)
    package.mkdir(parents=True)
    (package / "package.json").write_text(json.dumps({"version": "1.2.3", "license": "OFL-1.1"}))
    recipe.install([family], tmp_path)
    (package / "package.json").write_text(json.dumps({"version": "1.2.3", "license": "MIT"}))
    with pytest.raises(DiffFitError, match="MIT"):
        recipe.install([family], tmp_path)


def test_what_npm_says_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "npm"
    fake.write_text("#!/bin/sh\necho 'npm error 404 not in this registry' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr(recipe, "which", lambda name: str(fake))
    with pytest.raises(DiffFitError, match="404 not in this registry"):
        recipe.install([recipe.Family("some-font", "1.2.3", "OFL-1.1", "base")], tmp_path)


# -- drawing -----------------------------------------------------------------------------------------------------------
def drawn(path: Path, characters: str = LETTERS, side: int = 24) -> dict[str, np.ndarray]:
    return render.draw(path, characters, render.fitting_size(path, side), side)


def test_a_glyph_lies_where_it_should() -> None:
    images = drawn(SANS)
    assert list(images) == list(LETTERS) and all(i.shape == (24, 24) and i.dtype == np.uint8 for i in images.values())
    rows, columns = np.where(images["H"] > 127)
    assert (rows.min(), rows.max()) == (5, 17)  # 13 pixels above the baseline
    assert abs(columns.min() + columns.max() - 23) <= 1
    assert np.where(images["p"] > 127)[0].max() > 18 and np.where(images["x"] > 127)[0].min() > 7
    assert images["H"].max() == 255 and images["H"].min() == 0


def test_the_other_resolution_shows_the_same() -> None:
    small, large = drawn(SANS, "Ag"), drawn(SANS, "Ag", 48)
    for c, image in small.items():
        averaged = large[c].reshape(24, 2, 24, 2).mean((1, 3))
        assert large[c].shape == (48, 48) and np.abs(averaged - image).mean() < 4


def test_a_font_that_is_too_large_is_shrunk_as_a_whole() -> None:
    box = {c: i > 0 for c, i in drawn(FONTS / "DejaVuSansMono-BoldOblique.ttf").items()}
    assert not any(i[0].any() or i[:, 0].any() for i in box.values())
    plain = render.fitting_size(SANS, 24)
    assert render.fitting_size(SANS, 24, [(SANS, "ﷺ" if render.covered(SANS, "ﷺ") else "‱")]) < plain


def test_characters_that_a_font_lacks_are_left_out() -> None:
    assert render.covered(SANS, "A一") == "A"
    assert render.draw(SANS, " A一", 20.0, 24).keys() == {"A"}


def test_small_letters_that_are_capitals_are_found() -> None:
    images = drawn(SANS)
    assert not render.lower_case_is_capitals(images)
    capitals = {c: images[c.upper()] for c in LETTERS}
    assert render.lower_case_is_capitals(capitals)
    size = render.fitting_size(SANS, 24)
    small = render.draw(SANS, LETTERS[:26], 0.7 * size, 24)
    assert render.lower_case_is_capitals({c: images[c] if c.isupper() else small[c.upper()] for c in LETTERS})


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, list[recipe.Family], Path]:
    """Everything from a recipe of six families, whose packages are matplotlib's fonts."""
    npm, out = tmp_path_factory.mktemp("npm"), tmp_path_factory.mktemp("out")
    trained, other, held = kin(False), kin(False, 1), kin(True)
    plan = [
        ("plain", "base", {"kin": trained}, {"400-normal": "DejaVuSans", "700-normal": "DejaVuSans-Bold"}),
        ("serif", "base", {"kin": other}, {"400-normal": "DejaVuSerif", "500-normal": "DejaVuSerif-Bold"}),
        ("twin", "base", {"kin": trained}, {"400-normal": "DejaVuSansMono"}),
        ("mono", "base-held-out", {"kin": held}, {"400-normal": "DejaVuSansMono"}),
        ("slanted", "script", {"part": "shown"}, {"400-normal": "DejaVuSans-Oblique", "700-normal": "DejaVuSans-Bold"}),
        ("upright", "pixel", {"part": "reader", "capitals": True}, {"700-normal": "DejaVuSerif-Bold"}),
        ("hand", "handwriting", {"demo": True}, {"400-normal": "DejaVuSerif-Italic"}),
        ("signs", "inline", {"part": "shown"}, {"400-normal": "STIXSizOneSymReg"}),
        ("empty", "base", {"kin": trained}, {}),
    ]
    text = "families:\n"
    for name, role, more, files in plan:
        text += f"  {name}: {json.dumps({'version': '1.0.0', 'licence': 'OFL-1.1', 'role': role, **more})}\n"
        package = npm / "node_modules" / "@fontsource" / name
        (package / "files").mkdir(parents=True)
        (package / "package.json").write_text(json.dumps({"version": "1.0.0", "license": "OFL-1.1"}))
        for weight, file in files.items():
            shutil.copy(FONTS / f"{file}.ttf", package / "files" / f"{name}-latin-{weight}.woff")
    shutil.copy(SANS, npm / "node_modules/@fontsource/plain/files/plain-greek-400-normal.woff")
    path = npm / "fonts.yaml"
    path.write_text(text)
    families = recipe.read_recipe(path)
    assert render.main(["--out", str(out), "--npm", str(npm), "--recipe", str(path)]) == 0
    return out, json.loads((out / "manifest.json").read_text()), families, npm


def test_folders_are_read_back(rendered: tuple) -> None:
    out = rendered[0]
    train = alphabet.load(out / "base" / "train")
    assert train.images.shape == (3 * 52, 1, 24, 24) and train.images.dtype == torch.uint8
    assert sorted(set(train.fonts)) == ["plain-400", "plain-700", "serif-400"]
    assert torch.equal(torch.bincount(train.labels), torch.full((52,), 3))
    glyph = train.where(torch.tensor([f == "plain-400" for f in train.fonts]) & (train.labels == LETTERS.index("g")))
    assert np.array_equal(glyph.images[0, 0].numpy(), drawn(SANS)["g"]) and glyph.families == ["plain"]
    assert len(Glyphs.joined([train, glyph])) == len(train) + 1
    assert len(list_images(out / "base" / "val").classes) == 52
    assert set(alphabet.load(out / "base" / "val").fonts) == {"mono-400"}
    assert alphabet.load(out / "demo").families == ["hand"] * 52
    assert len(alphabet.load(out / "domains/script/shown")) == 52  # the plainest font only
    assert len(alphabet.load(out / "domains/pixel/reader")) == 26  # capitals only
    assert alphabet.load(out / "domains/digits/held-out").alphabet == "digits"
    greek = [p for p in recipe.PARTS if (out / "domains/greek" / p).exists()]
    assert len(greek) == 1 and len(alphabet.load(out / "domains/greek" / greek[0])) == 28
    with pytest.raises(DiffFitError, match="there are none"):
        alphabet.load(out / "nowhere")


def test_the_manifest_says_what_there_is(rendered: tuple) -> None:
    out, manifest, _, _ = rendered
    for folder, found in manifest["sets"].items():
        assert found["images"] == len(list((out / folder).rglob("*.png")))
    assert manifest["sets"]["base/train"]["fonts"] == ["plain-400", "plain-700", "serif-400"]
    assert manifest["sets"]["domains/pixel/reader"]["capitals_only"] == ["upright-700"]
    reasons = {entry["font"]: entry["reason"] for entry in manifest["skipped"]}
    assert reasons.keys() == {"twin-400", "signs-400", "empty"}
    assert "mono-400" in reasons["twin-400"] and "missing" in reasons["signs-400"]
    assert manifest["complete"] and manifest["size"] == 24 and manifest["licences"] == {"OFL-1.1": 6}


def test_the_same_bytes_on_every_run(rendered: tuple, tmp_path: Path) -> None:
    out, manifest, families, npm = rendered
    again = render.render(families, npm, tmp_path, recipe=npm / "fonts.yaml")
    assert again == manifest
    first = {p.relative_to(out): p.read_bytes() for p in out.rglob("*.png")}
    assert first == {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*.png")}
    assert render.render(families, npm, tmp_path, 48)["sha256"] != manifest["sha256"]  # in place of what it had made
    assert alphabet.load(tmp_path / "demo").images.shape == (52, 1, 48, 48)
    assert not list(tmp_path.glob(".tmp*"))


def test_what_others_made_is_not_replaced(rendered: tuple, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "mine.txt").write_text("mine")
    with pytest.raises(DiffFitError, match="was not made by this program"):
        render.render(rendered[2], rendered[3], tmp_path)
    assert (tmp_path / "base" / "mine.txt").exists()


# -- the reader --------------------------------------------------------------------------------------------------------
def glyphs(count: int, seed: int = 0, name: str = "letters", side: int = 24) -> Glyphs:
    g = seeded(seed)
    images = torch.randint(0, 256, (count, 1, side, side), generator=g, dtype=torch.uint8)
    labels = torch.randint(len(ALPHABETS[name]), (count,), generator=g)
    return Glyphs(images, labels, [f"font{i % 5}-400" for i in range(count)], name)


@pytest.fixture(scope="module")
def lessons() -> reading.Lessons:
    styles = {style: glyphs(20, i) for i, style in enumerate(recipe.STYLES)}
    return reading.Lessons(glyphs(60), styles, glyphs(20, 8, "digits"), glyphs(20, 9, "greek"))


def test_the_reader_is_the_same_every_time_and_small(lessons: reading.Lessons, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    first, second = (reading.train_reader(lessons, steps=3, batch=40) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    path = tmp_path / "reader.safetensors"
    reading.save_reader(first, path, {"steps": 3})
    assert path.stat().st_size < 500_000
    loaded = reading.load_reader(path)
    read = loaded.read(glyphs(7).images, batch=3)
    assert read.features.shape == (7, 64) and read.style.shape == (7, 8)
    assert {n: tuple(s.shape) for n, s in read.characters.items()} == {
        "letters": (7, 52), "digits": (7, 10), "greek": (7, 28),
    }  # fmt: skip
    whole = first.read(glyphs(7).images)
    assert not loaded.training and torch.allclose(read.features, whole.features, rtol=0.05, atol=0.05)
    with pytest.raises(DiffFitError, match="other"):
        reading.load_reader(tmp_path / "other.safetensors")
    reading.write_safetensors(tmp_path / "wrong.safetensors", {"x": torch.zeros(1)})
    with pytest.raises(DiffFitError, match="does not hold a reader"):
        reading.load_reader(tmp_path / "wrong.safetensors")


def test_it_learns_letters() -> None:
    """Two fonts' letters, seen again: a loop that has its labels mixed up would not get here."""
    images = np.stack([drawn(FONTS / f"{f}.ttf")[c] for f in ("DejaVuSans", "DejaVuSerif") for c in LETTERS])
    labels = torch.arange(52).repeat(2)
    known = Glyphs(torch.from_numpy(images)[:, None], labels, ["a-400"] * 52 + ["b-400"] * 52, "letters")
    places = torch.tensor([LETTERS.index(c) for c in "ABCDEFGHIJ"])
    digits = Glyphs(known.images[places], torch.arange(10), ["a-400"] * 10, "digits")
    greek = Glyphs(known.images[places], torch.arange(10), ["a-400"] * 10, "greek")
    lessons = reading.Lessons(known, dict.fromkeys(recipe.STYLES, known), digits, greek)
    reader = reading.train_reader(lessons, steps=60, batch=64)
    assert measures.letters_read(known.images, labels, reader, merge_cases=True) > 0.7
    assert measures.letters_read(digits.images, digits.labels, reader, "digits") > 0.7


def test_variations_stay_images() -> None:
    images = reading.as_input(torch.from_numpy(np.stack(list(drawn(SANS).values())))[:, None])
    labels = torch.arange(52)
    small, target = reading.shrunk(images, labels, seeded())
    for changed in (reading.varied(images, seeded()), reading.restyled(images, seeded()), small):
        assert changed.shape == images.shape and changed.min() >= -1 and changed.max() <= 1
        assert not torch.equal(changed, images)
    assert torch.equal(reading.varied(images, seeded(1)), reading.varied(images, seeded(1)))
    assert torch.allclose(target.sum(1), torch.ones(52)) and bool((target[labels, labels] >= 0.5).all())
    assert bool((target[26:].max(1).values == 1).all())  # a small c is no C
    doubtful = {LETTERS[i] for i in (target.max(1).values < 1).nonzero()[:, 0]}
    assert doubtful and doubtful <= set(reading.SAME_IN_BOTH_CASES)


def test_what_the_reader_takes() -> None:
    images = glyphs(3, side=48).images
    x = reading.as_input(images)
    assert x.shape == (3, 1, 24, 24)
    assert torch.allclose(x, reading.as_input(images.float() / 127.5 - 1))
    assert torch.allclose(x[0, 0, 0, 0], images[0, 0, :2, :2].float().mean() / 127.5 - 1)
    for wrong in (images[:, 0], images.repeat(1, 3, 1, 1), images[..., :30, :30], images[:0], images.long()):
        with pytest.raises(DiffFitError, match="expected images"):
            reading.as_input(wrong)


def test_the_reader_from_folders(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    writer = render.Writer(tmp_path)
    letters, digits = drawn(SANS), drawn(SANS, ALPHABETS["digits"])
    greek = drawn(SANS, ALPHABETS["greek"])
    sets = {"base/train": letters, "base/val": letters, "demo": letters}
    for name in (*recipe.STYLES, "digits", "greek"):
        images = {"digits": digits, "greek": greek}.get(name, letters)
        sets |= {f"domains/{name}/{part}": images for part in recipe.PARTS}
    for folder, images in sets.items():
        writer.write(folder, "sans-400", images)
    out = tmp_path / "reader.safetensors"
    threads = torch.get_num_threads()
    try:
        assert reading.main(["--data", str(tmp_path), "--out", str(out), "--steps", "2"]) == 0
    finally:
        torch.set_num_threads(threads)
    report = json.loads(out.with_suffix(".json").read_text())
    assert report["base/val"].keys() == {"images", "letters", "cases_merged", "style"}
    assert report["domains/digits/shown"].keys() == {"images", "letters"}
    assert "domains/script/held-out" in capsys.readouterr().out


# -- measures ----------------------------------------------------------------------------------------------------------
class Answers:
    """A reader that reads the label and the style from two pixels."""

    def read(self, images: Tensor) -> reading.Reading:
        x = images.float().flatten(1)
        characters = {n: nn.functional.one_hot(x[:, 0].long() % len(a), len(a)) for n, a in ALPHABETS.items()}
        style = 50.0 * nn.functional.one_hot(x[:, 1].long(), len(reading.NAMES))
        return reading.Reading(x[:, :3].double(), characters, style)


def marked(labels: list[int], styles: list[int]) -> Tensor:
    images = torch.zeros(len(labels), 1, 24, 24, dtype=torch.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = torch.tensor(labels), torch.tensor(styles)
    return images


def test_letters_and_styles_read() -> None:
    c, C, l, I, a = (LETTERS.index(x) for x in "cClIa")
    images = marked([c, C, l, a], [0, 1, 1, 2])
    wanted = torch.tensor([C, C, I, I])
    assert measures.letters_read(images, wanted, Answers()) == 0.25
    assert measures.letters_read(images, wanted, Answers(), merge_cases=True) == 0.75
    assert measures.letters_read(marked([3, 14], [0, 0]), torch.tensor([3, 4]), Answers(), "digits") == 1
    assert measures.style_read(images, reading.NAMES[1], Answers()) == pytest.approx(0.5)
    with pytest.raises(DiffFitError, match="labels"):
        measures.letters_read(images, torch.tensor([0, 1, 2, 10]), Answers(), "digits")
    with pytest.raises(DiffFitError, match="cursive"):
        measures.style_read(images, "cursive", Answers())
    with pytest.raises(DiffFitError, match="two cases"):
        measures.letters_read(images, torch.zeros(4).long(), Answers(), "greek", merge_cases=True)


def test_frechet_distance_of_known_features() -> None:
    images = torch.randint(0, 100, (200, 1, 24, 24), generator=seeded(), dtype=torch.uint8)
    images[..., 1] = 0
    assert measures.frechet(images, images, Answers()) == pytest.approx(0, abs=1e-6)
    moved = images.clone()
    moved[:, 0, 0, 0] += 5
    assert measures.frechet(moved, images, Answers()) == pytest.approx(25, rel=1e-6)


def test_distances_to_the_nearest() -> None:
    images = torch.from_numpy(np.stack(list(drawn(SANS, "AgQ").values())))[:, None]
    assert measures.nearest(torch.roll(images, (1, -1), (2, 3)), images).max() < 1e-6
    assert measures.nearest(images, images[:1])[1] > 0.1
    half = torch.zeros(2, 1, 24, 24)
    half[0, ..., :10], half[1, ..., 14:] = 1, 1
    assert measures.nearest(half[:1] * 2 - 1, half[1:] * 2 - 1).item() == pytest.approx(1)


def shapes(count: int, seed: int) -> Tensor:
    """Smooth random blots (count, 1, 24, 24) in [-1, 1]."""
    noise = torch.randn(count, 1, 8, 8, generator=seeded(seed))
    return nn.functional.interpolate(noise, 24, mode="bicubic").clamp(-1, 1)


def test_copies_are_told_from_fresh_images() -> None:
    shown, held_out, fresh = shapes(60, 0), shapes(300, 1), shapes(300, 2)
    families = [f"family{i % 6}" for i in range(300)]
    assert measures.memorised(shown, shown, held_out, families) == 1
    nearly = (torch.roll(shown, 1, 2) + 0.2 * torch.randn(shown.shape, generator=seeded())).clamp(-1, 1)
    assert measures.memorised(nearly, shown, held_out, families) > 0.95
    assert measures.memorised(fresh, shown, held_out, families) < 0.04
    assert 0.1 < measures.memorised(fresh, shown, held_out, families, rare=0.2) < 0.3
    mixed = torch.cat([shown[:30], fresh[:30]])
    assert measures.memorised(mixed, shown, held_out, families) == pytest.approx(0.5, abs=0.04)
    with pytest.raises(DiffFitError, match="two at least"):
        measures.memorised(fresh, shown, held_out, ["one"] * 300)


def test_a_real_glyph_that_was_shown_too_does_not_hide_copies() -> None:
    """Pixels that a held-out family shares with a shown one: a quotient of nothing by nothing."""
    shown = shapes(40, 0)
    held_out = torch.cat([shown[:4], shapes(40, 1)])
    assert measures.memorised(shown[:4], shown, held_out, [str(i % 4) for i in range(44)]) == 1


class Guess(nn.Module):
    """Predicts no noise, or what it is told to."""

    learn_sigma = False

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.seen.append(t)
        assert not self.training
        return self.scale * x


def test_the_denoising_loss_sees_every_time_and_repeats() -> None:
    images, labels = glyphs(50).images, glyphs(50).labels
    model = Guess().train()
    loss = measures.denoising_loss(model, images, labels, seed=3)
    assert model.training and loss == pytest.approx(1, abs=0.05)  # of normal noise
    times = torch.cat(model.seen).sort().values
    assert torch.equal(times // 20, torch.arange(50))
    with torch.no_grad():
        model.scale.fill_(0.5)
    first = measures.denoising_loss(model, images, labels, seed=3)
    assert first == measures.denoising_loss(model, images.float() / 127.5 - 1, labels, seed=3)
    assert first == pytest.approx(measures.denoising_loss(model, images, labels, seed=3, batch=7), rel=1e-6)
    assert first != measures.denoising_loss(model, images, labels, seed=4)
    model.seen.clear()
    measures.denoising_loss(model, images, labels, rounds=3)
    assert len(torch.cat(model.seen)) == 150
    with pytest.raises(DiffFitError, match="label for each"):
        measures.denoising_loss(model, images, labels[:3])
