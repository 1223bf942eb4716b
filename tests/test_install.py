"""Building, loading and missing the extension: the decisions of the build, the one warning, the reports."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import pytest

import difffit_fast
from difffit_fast import _ext

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_extension", ROOT / "csrc" / "build_extension.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Run ``code`` in a fresh interpreter in which the extension can be hidden or broken."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "DIFFFIT_FAST_KERNELS": "auto", **environment},
        timeout=280,
    )


# -- decisions of the build ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("cores", "free", "cuda", "jobs"),
    [(2, 23.0, False, 2), (64, 8.0, False, 8), (64, 8.0, True, 2), (16, 0.3, False, 1), (1, 100.0, True, 1)],
)
def test_max_jobs_follow_cores_and_memory(build, cores, free, cuda, jobs):
    assert build.max_jobs(cores, free, cuda) == jobs


def test_free_memory_is_plausible(build):
    assert 0.01 < build.free_memory_gib() < 2**20


def test_nvcc_of_another_major_version_is_an_error(build):
    with pytest.raises(build.BuildError, match=r"nvcc is CUDA 12\.4.*built for CUDA 13\.0.*DIFFFIT_FAST_CUDA=0"):
        build.check_cuda_versions("12.4", "13.0")


def test_nvcc_of_another_minor_version_is_a_warning(build):
    assert build.check_cuda_versions("13.0", "13.0") is None
    assert "12.4" in build.check_cuda_versions("12.4", "12.8")


@pytest.mark.parametrize(
    ("setting", "torch_cuda", "nvcc", "wanted"),
    [
        (None, "13.0", "/nvcc", True),
        ("", "13.0", "/nvcc", True),
        (None, None, "/nvcc", False),
        (None, "13.0", None, False),
        ("0", "13.0", "/nvcc", False),
        ("1", "13.0", "/nvcc", True),
    ],
)
def test_cuda_sources_are_built_when_possible(build, setting, torch_cuda, nvcc, wanted):
    assert build.wants_cuda(setting, torch_cuda, nvcc) is wanted


def test_cuda_that_is_asked_for_but_impossible_is_an_error(build):
    with pytest.raises(build.BuildError, match=r"PyTorch with CUDA.*and nvcc"):
        build.wants_cuda("1", None, None)
    with pytest.raises(build.BuildError, match="must be 0 or 1; got 'yes'"):
        build.wants_cuda("yes", None, None)


def test_nvcc_version_is_read(build, tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.8, V12.8.93'\n")
    nvcc.chmod(0o755)
    assert build.nvcc_version(str(nvcc)) == "12.8"


def test_giving_up_is_an_error_only_when_the_extension_is_required(build, monkeypatch, capsys):
    monkeypatch.delenv("DIFFFIT_FAST_REQUIRE_EXT", raising=False)
    build._give_up("no C++ compiler")
    assert "no C++ compiler" in capsys.readouterr().err
    monkeypatch.setenv("DIFFFIT_FAST_REQUIRE_EXT", "1")
    with pytest.raises(build.BuildError, match="no C\\+\\+ compiler"):
        build._give_up("no C++ compiler")


# -- reports ---------------------------------------------------------------------------------------------------------
def test_build_info_has_its_keys():
    info = difffit_fast.build_info()
    assert set(info) == {
        *("version", "built", "problem", "compiler", "cxx_flags", "torch_built", "torch_target", "python_built"),
        *("cuda_built", "cuda_arch_list", "torch", "torch_cuda", "python", "cpu_capability", "triton", "xformers"),
        *("kernels", "cuda_problem"),
    }
    assert info["built"] is (info["problem"] is None)
    if info["built"]:
        assert info["cpu_capability"] in ("AVX512", "AVX2", "baseline")
        assert info["torch_target"] == "2.10"
    json.dumps(info)


def test_kernel_report_tells_what_dispatch_picks(monkeypatch):
    monkeypatch.setenv("DIFFFIT_FAST_KERNELS", "reference")
    report = difffit_fast.kernel_report()
    assert report["kernels"] == "reference"
    assert {room for stem in report["cpu"].values() for room in stem.values()} == {"reference"}

    monkeypatch.setenv("DIFFFIT_FAST_KERNELS", "auto")
    expected = "cpp" if _ext.load() else "reference"
    report = difffit_fast.kernel_report()
    assert report["cpu"]["adaln"]["float32"] == expected
    assert report["cpu"]["adaln"]["float16"] == "reference"


def test_kernel_report_shows_registered_choices(monkeypatch):
    monkeypatch.setattr(_ext, "_choices", {})
    _ext.register_choice("linear_gelu", lambda: {"256x1152": "fused"})
    assert difffit_fast.kernel_report()["choices"] == {"linear_gelu": {"256x1152": "fused"}}


# -- the one warning -------------------------------------------------------------------------------------------------
HIDE = """
    import sys, warnings
    sys.modules["difffit_fast._C"] = None      # importing it now raises ModuleNotFoundError
    warnings.simplefilter("always")
"""


def test_a_missing_library_warns_exactly_once_and_the_package_goes_on():
    done = run_python(
        HIDE
        + """
    import torch
    from difffit_fast import _ext, build_info, kernel_report
    assert build_info()["built"] is False
    assert not _ext.load() and not _ext.load()
    from difffit_fast.ops.adaln import adaln
    x = torch.randn(2, 5, 16, requires_grad=True)
    adaln(x, torch.ones(2, 16), torch.zeros(2, 16)).sum().backward()
    assert x.grad is not None
    assert kernel_report()["cpu"]["adaln"]["float32"] == "reference"
    """
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("RuntimeWarning") == 1, done.stderr
    assert "slower" in done.stderr
    assert "--no-build-isolation" in done.stderr


def test_the_reference_does_not_miss_the_library():
    code = (
        HIDE
        + """
    import torch
    from difffit_fast.ops.adaln import adaln
    adaln(torch.randn(2, 5, 16), torch.ones(2, 16), torch.zeros(2, 16))
    """
    )
    done = run_python(code, DIFFFIT_FAST_KERNELS="reference")
    assert done.returncode == 0, done.stderr
    assert "RuntimeWarning" not in done.stderr


def test_the_warning_names_both_sides_when_the_library_does_not_load():
    recorded = {"torch": "2.12.1+cu130", "torch_target": "2.10", "python": "3.12.1"}
    text = _ext._problem(ImportError("undefined symbol: aoti_torch_x"), recorded, ["_C.cpython-311.so"])
    assert "undefined symbol: aoti_torch_x" in text
    assert "2.12.1+cu130" in text
    assert "3.12.1" in text
    assert _ext.torch.__version__ in text


def test_the_warning_tells_a_library_for_another_python_from_none():
    missing = ModuleNotFoundError("No module named 'difffit_fast._C'", name="difffit_fast._C")
    assert "installed without its C++ extension" in _ext._problem(missing, {}, [])
    assert "no C++ compiler" in _ext._problem(missing, {"not_built": "no C++ compiler (c++ not found)"}, [])
    assert "_C.cpython-39.so is for this Python" in _ext._problem(missing, {}, ["_C.cpython-39.so"])


def test_a_library_from_other_sources_is_refused(monkeypatch):
    if not _ext.load():
        pytest.skip("the extension is not built")
    monkeypatch.setattr(_ext, "OPERATIONS", ("adaln_forward", "not_there"))
    module, problem = _ext._library.__wrapped__()
    assert module is None
    assert "other sources: not_there missing" in problem


# -- the package -----------------------------------------------------------------------------------------------------
def test_the_kernels_folder_is_the_package_kernels():
    import difffit_fast.kernels as kernels

    assert kernels.__name__ == "difffit_fast.kernels"


def test_importing_the_package_imports_neither_torch_nor_triton():
    done = run_python("import difffit_fast, sys; assert 'torch' not in sys.modules and 'triton' not in sys.modules")
    assert done.returncode == 0, done.stderr
