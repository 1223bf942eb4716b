"""Build difffit_fast: Python, and the extension of csrc/ where there is a compiler (csrc/build_extension.py)."""

import sys
from pathlib import Path

from setuptools import find_packages, setup

sys.path.insert(0, str(Path(__file__).parent / "csrc"))
import build_extension

setup(
    packages=[*find_packages(include=["difffit_fast", "difffit_fast.*"]), "difffit_fast.kernels"],
    package_dir={"difffit_fast.kernels": "kernels"},
    ext_modules=build_extension.extensions(),
    cmdclass={"build_py": build_extension.build_py_command(), "build_ext": build_extension.build_ext_command()},
)
