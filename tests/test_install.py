"""Building, loading and missing the extension: the decisions of the build, the one warning, the reports."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import difffit_fast
from difffit_fast import _ext

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def build() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "csrc"))
        yield importlib.import_module("build_extension")


@pytest.fixture
def find_torch(build) -> ModuleType:
    return build.find_torch


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


@pytest.mark.parametrize(("setting", "required"), [(None, None), ("", None), ("0", False), ("1", True), ("yes", True)])
def test_the_extension_may_be_required_or_waived(build, monkeypatch, setting, required):
    monkeypatch.delenv("DIFFFIT_FAST_REQUIRE_EXT", raising=False)
    if setting is not None:
        monkeypatch.setenv("DIFFFIT_FAST_REQUIRE_EXT", setting)
    assert build.required() is required


def test_giving_up_is_an_error_only_when_the_extension_is_required(build, monkeypatch):
    said = []
    monkeypatch.setattr(build, "announce", said.append)
    monkeypatch.delenv("DIFFFIT_FAST_REQUIRE_EXT", raising=False)
    build._give_up("no C++ compiler")
    assert "no C++ compiler" in said[0]
    monkeypatch.setenv("DIFFFIT_FAST_REQUIRE_EXT", "1")
    with pytest.raises(build.BuildError, match="no C\\+\\+ compiler"):
        build._give_up("no C++ compiler")


@pytest.mark.parametrize("command", ["dist_info", "bdist_wheel", "editable_wheel", "build_ext", "install"])
def test_without_pytorch_an_install_stops_with_one_sentence(build, monkeypatch, command):
    monkeypatch.setattr(build, "torch_problem", lambda: "there is no PyTorch to compile against: none. Install it.")
    monkeypatch.setattr(sys, "argv", ["setup.py", "--quiet", command])
    monkeypatch.delenv("DIFFFIT_FAST_REQUIRE_EXT", raising=False)
    with pytest.raises(SystemExit, match=r"difffit_fast: there is no PyTorch .* Install it\."):
        build.extensions()
    monkeypatch.setenv("DIFFFIT_FAST_REQUIRE_EXT", "0")
    assert [extension.name for extension in build.extensions()] == ["difffit_fast._C"]


@pytest.mark.parametrize("command", ["sdist", "egg_info", "--version", "clean"])
def test_without_pytorch_everything_but_an_install_goes_on(build, monkeypatch, command):
    monkeypatch.setattr(build, "torch_problem", lambda: "there is no PyTorch to compile against: none. Install it.")
    monkeypatch.setattr(sys, "argv", ["setup.py", command])
    assert [extension.name for extension in build.extensions()] == ["difffit_fast._C"]


def test_cuda_code_is_a_library_of_its_own(build, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["setup.py", "bdist_wheel"])
    monkeypatch.setattr(build, "wants_cuda", lambda *_: True)
    monkeypatch.setattr(build, "nvcc_version", lambda _: "13.0")
    monkeypatch.setattr(build, "check_cuda_versions", lambda *_: None)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a")
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", "/cuda")
    cpu, cuda = build.extensions()
    assert (cpu.name, cpu.libraries) == ("difffit_fast._C", ["torch_cpu"])
    assert not [source for source in cpu.sources if "cuda/" in source]
    assert (cuda.name, cuda.libraries) == ("difffit_fast._C_cuda", ["torch_cpu", "torch_cuda", "cudart"])
    assert {Path(source).suffix for source in cuda.sources} == {".cu", ".cpp"}
    # What registers operations must be in one of the two alone.
    both = set(cpu.sources) & set(cuda.sources)
    assert both and not [source for source in both if "STABLE_TORCH_LIBRARY" in (ROOT / source).read_text()]


def test_nothing_of_an_earlier_build_is_packed(build, tmp_path):
    from setuptools import Distribution

    (tmp_path / "difffit_fast").mkdir()
    (tmp_path / "difffit_fast" / "renamed_since.py").touch()
    (tmp_path / "other").touch()
    command = build.build_py_command()(Distribution({"name": "difffit_fast", "packages": []}))
    command.build_lib = str(tmp_path)
    command.ensure_finalized()
    command.run()
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_an_installer_that_swallows_output_does_not_swallow_the_announcement():
    """The process in between stands for pip: it keeps the output of the build to itself."""
    done = run_python(f"""
        import subprocess, sys
        build = "import sys; sys.path.insert(0, {str(ROOT / "csrc")!r}); import build_extension as b; b.announce('not built')"
        done = subprocess.run([sys.executable, "-c", build], capture_output=True, text=True)
        assert done.stderr == "not built\\n", done.stderr
        """)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == "not built"


# -- finding PyTorch from an isolated build --------------------------------------------------------------------------
def environment(folder: Path, sees_torch: bool) -> Path:
    """An empty virtual environment, which may see this one's packages by way of a .pth file; its interpreter."""
    import torch

    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    if sees_torch:
        site = subprocess.check_output([python, "-c", "import sysconfig as s; print(s.get_path('purelib'))"], text=True)
        (Path(site.strip()) / "outer.pth").write_text(f"{Path(torch.__file__).parent.parent}\n")
    return python


def test_an_interpreter_is_asked_what_it_sees(find_torch, tmp_path):
    seen = find_torch.ask(environment(tmp_path / "with", True), dict(os.environ))
    assert seen["torch"] and seen["prefix"] == str(tmp_path / "with")
    assert find_torch.ask(environment(tmp_path / "without", False), {})["torch"] is False
    assert find_torch.ask(tmp_path / "missing", {}) is None


def test_under_pip_the_interpreter_is_its_own(find_torch, monkeypatch, tmp_path):
    monkeypatch.delenv("DIFFFIT_FAST_PYTHON", raising=False)
    pip = find_torch.Process(["bin/python3", "-m", "pip", "install", "."], {}, tmp_path)
    assert find_torch.interpreters(pip) == [Path(sys.executable), tmp_path / "bin" / "python3"]
    assert find_torch.interpreters(find_torch.Process(["/bin/sh"], {}, tmp_path)) == [Path(sys.executable)]
    monkeypatch.setenv("DIFFFIT_FAST_PYTHON", "/named/python")
    assert find_torch.interpreters(pip) == [Path("/named/python")]


def test_under_uv_the_interpreter_is_that_of_the_environment_uv_serves(find_torch, monkeypatch, tmp_path):
    monkeypatch.delenv("DIFFFIT_FAST_PYTHON", raising=False)
    project = tmp_path / "clone"
    for folder in (project / ".venv", tmp_path / "active", tmp_path / "asked"):
        folder.mkdir(parents=True)

    def first(*arguments: str, **variables: str) -> Path:
        return find_torch.interpreters(find_torch.Process(["/bin/uv", *arguments], variables, project))[0]

    active, asked = {"VIRTUAL_ENV": str(tmp_path / "active")}, str(tmp_path / "asked")
    assert first("pip", "install", ".") == project / ".venv" / "bin" / "python"
    assert first("pip", "install", ".", **active) == tmp_path / "active" / "bin" / "python"
    assert first("pip", "install", "--python", asked, ".", **active) == tmp_path / "asked" / "bin" / "python"
    assert first("build", f"--python={asked}", **active) == tmp_path / "asked" / "bin" / "python"
    assert first("build", "-p", "../asked", **active) == project / "../asked" / "bin" / "python"
    assert first("pip", "install", ".", UV_PYTHON=asked) == tmp_path / "asked" / "bin" / "python"
    assert first("pip", "install", "-p", "3.11", ".", **active) == tmp_path / "active" / "bin" / "python"


def test_what_is_borrowed_can_be_imported_and_offers_no_plugins(find_torch, monkeypatch, tmp_path):
    (tmp_path / "lent_module.py").write_text("value = 7\n")
    (tmp_path / "lent-1.0.dist-info").mkdir()
    (tmp_path / "lent-1.0.dist-info" / "METADATA").write_text("Name: lent\nVersion: 1.0\n")
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, find_torch.Borrowed([str(tmp_path)])])
    monkeypatch.delitem(sys.modules, "lent_module", raising=False)
    assert find_torch.borrowed()
    assert importlib.import_module("lent_module").value == 7
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("lent")


def test_where_pytorch_was_looked_for_is_told(find_torch, monkeypatch, tmp_path):
    monkeypatch.setattr(find_torch, "_there", lambda: False)
    monkeypatch.setattr(find_torch, "interpreters", lambda _: [tmp_path / "missing", Path("/other")])
    assert "missing does not run" in find_torch.borrow()
    seen = {"soabi": "cpython-39", "prefix": "/other", "path": [], "torch": True}
    monkeypatch.setattr(find_torch, "ask", lambda *_: seen)
    assert find_torch.borrow() == "/other is for another Python (cpython-39)"


# A build backend that needs no package, so that the build is isolated like any other but asks nothing of an index.
BACKEND = """
import sys, zipfile
sys.path.insert(0, {csrc!r})
import find_torch
def build_wheel(folder, config_settings=None, metadata_directory=None):
    isolated = not find_torch._there()
    missing = find_torch.borrow()
    if missing:
        raise SystemExit(missing)
    import torch, torch.utils.cpp_extension
    with zipfile.ZipFile(folder + "/standin-1-py3-none-any.whl", "w") as file:
        file.writestr("standin.py", f"isolated, torch = {{isolated}}, {{torch.__version__!r}}")
        file.writestr("standin-1.dist-info/METADATA", "Metadata-Version: 2.1\\nName: standin\\nVersion: 1\\n")
        tags = "Root-Is-Purelib: true\\nTag: py3-none-any\\n"
        file.writestr("standin-1.dist-info/WHEEL", "Wheel-Version: 1.0\\nGenerator: test\\n" + tags)
        file.writestr("standin-1.dist-info/RECORD", "")
    return "standin-1-py3-none-any.whl"
"""


@pytest.mark.parametrize("tool", ["pip", "uv"])
def test_an_isolated_build_finds_the_pytorch_of_the_environment(tool, tmp_path):
    import torch

    uv = shutil.which("uv") or shutil.which(ROOT / "build" / "uv" / "bin" / "uv")
    if tool == "uv" and uv is None:
        pytest.skip("uv is not installed")
    project = tmp_path / "standin"
    project.mkdir()
    (project / "backend.py").write_text(BACKEND.format(csrc=str(ROOT / "csrc")))
    (project / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
        '[project]\nname = "standin"\nversion = "1"\n'
    )
    install = {
        "pip": [sys.executable, "-m", "pip", "--python", "PYTHON", "install", "--no-deps", "--no-index", project],
        "uv": [uv, "pip", "install", "--python", "PYTHON", "--no-deps", "--offline", "--no-cache", project],
    }[tool]
    for name, sees_torch in (("with", True), ("without", False)):
        python = environment(tmp_path / name, sees_torch)
        command = [python if part == "PYTHON" else part for part in install]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        if sees_torch:
            assert done.returncode == 0, done.stdout + done.stderr
            report = subprocess.check_output(
                [python, "-c", "import standin as s; print(s.isolated, s.torch)"], text=True
            )
            assert report.split() == ["True", torch.__version__]
        else:
            assert done.returncode != 0
            assert f"none is installed in {tmp_path / name}" in done.stdout + done.stderr


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
        assert info["cpu_capability"] in ("AVX512_BF16", "AVX512", "AVX2", "baseline")
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
    assert "pip install" in done.stderr


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
    assert "no C++ compiler" in _ext._problem(missing, {"not_built": "no C++ compiler (c++ not found)"}, [])
    assert "_C.cpython-39.so is for this Python" in _ext._problem(missing, {}, ["_C.cpython-39.so"])


def test_a_library_from_other_sources_is_refused(monkeypatch):
    if not _ext.load():
        pytest.skip("the extension is not built")
    monkeypatch.setattr(_ext, "OPERATIONS", ("adaln_forward", "not_there"))
    module, problem = _ext._library.__wrapped__()
    assert module is None
    assert "other sources: not_there missing" in problem


def copy_package(to: Path, *more: Path) -> Path:
    """A clone's Python files, without what was compiled in it, and the files of ``more``; the clone's folder."""
    unwanted = shutil.ignore_patterns("*.so", "build_info.json", "__pycache__")
    shutil.copytree(ROOT / "difffit_fast", to / "difffit_fast", ignore=unwanted)
    (to / "csrc").mkdir()
    for file in more:
        shutil.copy2(file, to / "difffit_fast")
    return to


def test_sources_that_shadow_the_installed_package_say_so(tmp_path):
    """The editable finder of this environment offers its own library as difffit_fast._C; it is not taken."""
    clone = copy_package(tmp_path / "clone")
    code = """
    import difffit_fast, torch
    info = difffit_fast.build_info()
    assert not info["built"] and not hasattr(torch.ops.difffit_fast_cpp, "adaln_forward")
    print(info["problem"])
    """
    done = run_python(code, PYTHONPATH=str(clone), PYTHONSAFEPATH="1")
    assert done.returncode == 0, done.stderr
    assert f"{clone / 'difffit_fast'} is the source of difffit_fast, in which nothing has been compiled" in done.stdout
    assert "PyTorch could not be imported" not in done.stdout
    if "The installed package is" in done.stdout:
        assert f"The installed package is {difffit_fast.__path__[0]}." in done.stdout
        assert "run Python from another folder" in done.stdout


def test_of_two_copies_each_loads_its_own_library_and_one_process_loads_one(tmp_path):
    if not _ext.load():
        pytest.skip("the extension is not built")
    library = _ext._beside("_C")
    first = copy_package(tmp_path / "first", library)
    second = copy_package(tmp_path / "second", library)
    code = f"""
    import sys
    def package(clone):
        for name in [name for name in sys.modules if name.partition(".")[0] == "difffit_fast"]:
            del sys.modules[name]
        sys.path.insert(0, clone)
        import difffit_fast._ext
        return sys.modules["difffit_fast._ext"]
    one = package({str(first)!r})
    assert one.load() and one._library()[0].__file__.startswith({str(first)!r}), one._library()
    again = package({str(first)!r})
    assert again is not one and again.load()
    other = package({str(second)!r})
    assert other._PACKAGE.parent.name == "second"
    print(other.build_info()["problem"])
    """
    done = run_python(code, PYTHONSAFEPATH="1")
    assert done.returncode == 0, done.stderr
    assert f"already loaded that of another copy of the package, from {first}" in done.stdout


def test_a_cuda_library_that_does_not_load_costs_only_itself(monkeypatch, tmp_path):
    if not _ext.load():
        pytest.skip("the extension is not built")
    (tmp_path / "_C_cuda.so").write_bytes(b"not a library")
    beside = _ext._beside
    monkeypatch.setattr(_ext, "_beside", lambda name: tmp_path / "_C_cuda.so" if name == "_C_cuda" else beside(name))
    monkeypatch.setattr(_ext.torch.version, "cuda", None)
    assert _ext._cuda_library.__wrapped__() is None  # a PyTorch without CUDA does not try
    monkeypatch.setattr(_ext.torch.version, "cuda", "13.0")
    problem = _ext._cuda_library.__wrapped__()
    assert "_C_cuda.so" in problem and "Triton" in problem


# -- the wheel for others --------------------------------------------------------------------------------------------
def test_a_wheel_holds_our_libraries_alone_and_they_need_pytorch_alone(monkeypatch, tmp_path):
    pytest.importorskip("elftools", reason="needs auditwheel, which make wheel installs")
    if not _ext.load():
        pytest.skip("the extension is not built")
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    wheel = importlib.import_module("build_wheel")
    library = _ext._beside("_C")
    file = tmp_path / "difffit_fast-0-cp-cp-linux.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.write(library, f"difffit_fast/{library.name}")
    (needed,) = wheel.check_contents(file).values()
    assert "libtorch_cpu.so" in needed and not [name for name in needed if "omp" in name or "cuda" in name]
    with zipfile.ZipFile(file, "a") as archive:
        archive.write(library, "difffit_fast.libs/libgomp-1.so.1")
    with pytest.raises(RuntimeError, match=r"has taken in difffit_fast.libs/libgomp"):
        wheel.check_contents(file)


# -- the package -----------------------------------------------------------------------------------------------------
def test_the_kernels_folder_is_the_package_kernels():
    import difffit_fast.kernels as kernels

    assert kernels.__name__ == "difffit_fast.kernels"


def test_importing_the_package_imports_neither_torch_nor_triton():
    done = run_python("import difffit_fast, sys; assert 'torch' not in sys.modules and 'triton' not in sys.modules")
    assert done.returncode == 0, done.stderr
