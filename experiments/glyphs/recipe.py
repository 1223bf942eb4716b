"""The pinned fonts of ``fonts.yaml``: which package, under which licence, for what."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from shutil import which

from difffit_fast._files import read_json, read_yaml
from difffit_fast.errors import DiffFitError

RECIPE = Path(__file__).resolve().parent / "fonts.yaml"
STYLES = ("handwriting", "script", "brush", "blackletter", "pixel", "inline", "decorative")
BASE, BASE_HELD_OUT = "base", "base-held-out"
PARTS = ("shown", "held-out", "reader")  # of a style's families, see fonts.yaml
LICENCES = ("OFL-1.1", "Apache-2.0", "UFL-1.0")
ONE_IN = 12  # families of the base is held out


@dataclass(frozen=True)
class Family:
    """A package ``@fontsource/<name>``.

    Attributes:
        name: of the package and of its files.
        version: of the package.
        licence: SPDX identifier.
        role: ``base``, ``base-held-out`` or a style.
        part: of a style's family, one of :data:`PARTS`; None for the base and for the demo's.
        kin: families of one kin are held out together.
        demo: this is the demo's hand, and in no domain.
        capitals: its small letters are capitals drawn anew, which are not to be taken for small letters.
        without: a weight that is a blot at 24 pixels.
    """

    name: str
    version: str
    licence: str
    role: str
    part: str | None = None
    kin: str = ""
    demo: bool = False
    capitals: bool = False
    without: str = ""

    @property
    def package(self) -> str:
        return f"@fontsource/{self.name}"

    @property
    def folder(self) -> str:
        """Where its images are written, below the output folder."""
        if self.demo:
            return "demo"
        return {BASE: "base/train", BASE_HELD_OUT: "base/val"}.get(self.role) or f"domains/{self.role}/{self.part}"


def number_of(name: str) -> int:
    """A number that hangs on a name alone, the same everywhere."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16)


def is_held_out(kin: str) -> bool:
    """Whether the base's families of a kin are held out."""
    return number_of(kin) % ONE_IN == 0


def read_recipe(path: Path = RECIPE) -> list[Family]:
    """The families of a recipe, checked.

    Raises:
        DiffFitError: a licence, a role or a part is none that is known, or a family of the base is on the wrong side.
    """
    families = []
    for name, entry in (read_yaml(path).get("families") or {}).items():
        try:
            family = Family(name, **{"kin": name.partition("-")[0], **entry})
        except TypeError as error:
            raise DiffFitError(f"{path}: {name} should have a version, a licence and a role: {error}") from error
        if family.licence not in LICENCES:
            raise DiffFitError(f"{path}: {name} is under {family.licence}; expected one of {', '.join(LICENCES)}")
        if family.role in STYLES:
            if (family.part in PARTS) == family.demo:
                raise DiffFitError(
                    f"{path}: {name} should have a part ({', '.join(PARTS)}), or be the demo's; not both"
                )
        elif family.role not in (BASE, BASE_HELD_OUT):
            raise DiffFitError(f"{path}: {name} has the role {family.role!r}; expected the base or a style")
        elif (family.role == BASE_HELD_OUT) != is_held_out(family.kin):
            raise DiffFitError(f"{path}: {name} is {family.role}; the hash of its kin {family.kin!r} says otherwise")
        families.append(family)
    return families


def install(families: Iterable[Family], folder: Path) -> None:
    """Have npm put the pinned packages into ``folder/node_modules``, unless all of them are there.

    Raises:
        DiffFitError: npm is missing or fails, or a package is not under the licence that the recipe says.
    """
    families = list(families)
    if not all(_is_there(family, folder) for family in families):
        npm = which("npm")
        if npm is None:
            raise DiffFitError(
                "npm is needed to install the fonts and is not on the PATH; it comes with Node.js "
                "(Debian: apt-get install npm)"
            )
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "package.json").write_text('{"private": true}\n')  # else npm looks for one in the folders above
        flags = ["--no-save", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
        packages = [f"{family.package}@{family.version}" for family in families]
        done = subprocess.run([npm, "install", *flags, *packages], cwd=folder, capture_output=True, text=True)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            raise DiffFitError(f"npm could not install the fonts: {' '.join(lines[:3]) or done.returncode}")
    for family in families:
        found = read_json(package_folder(family, folder) / "package.json").get("license")
        if found != family.licence:
            raise DiffFitError(f"{family.package} is under {found}; the recipe says {family.licence}")


def package_folder(family: Family, folder: Path) -> Path:
    return folder / "node_modules" / "@fontsource" / family.name


def attribution(family: Family, folder: Path) -> str:
    """Whose font it is, as its package says."""
    try:
        licence = read_json(package_folder(family, folder) / "metadata.json").get("license")
    except DiffFitError:  # old packages have none
        return ""
    return " ".join(str(licence.get("attribution", "")).split()) if isinstance(licence, dict) else ""


def _is_there(family: Family, folder: Path) -> bool:
    try:
        text = (package_folder(family, folder) / "package.json").read_text(encoding="utf-8")
        return json.loads(text)["version"] == family.version
    except (OSError, ValueError, KeyError):
        return False
