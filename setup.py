"""Build difffit_fast: pure Python plus, where a compiler and PyTorch are there, the extension of csrc/ (csrc/build.py)."""

import sys
from pathlib import Path

from setuptools import find_packages, setup

sys.path.insert(0, str(Path(__file__).parent / "csrc"))
import build  # noqa: E402

setup(
    packages=[*find_packages(include=["difffit_fast", "difffit_fast.*"]), "difffit_fast.kernels"],
    package_dir={"difffit_fast.kernels": "kernels"},
    ext_modules=build.extensions(),
    cmdclass={"build_ext": build.build_ext_command()},
)
