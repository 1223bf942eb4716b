"""The CUDA sources compile for Hopper without warnings or spills, and match cuBLASLt's header; no GPU is needed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
PTXAS = """
ptxas info    : Compiling entry function '_Z1aPf' for 'sm_90a'
ptxas info    : Function properties for _Z1aPf
    24 bytes stack frame, 20 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 24 bytes cumulative stack size, 1024 bytes smem
ptxas info    : Compiling entry function '_Z1bPf' for 'sm_90a'
ptxas info    : Function properties for _Z1bPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers
"""


@pytest.fixture(scope="module")
def cuda_compile() -> ModuleType:
    if not (ROOT / "csrc" / "build_extension.py").exists():
        pytest.skip("the sources are not here")
    spec = importlib.util.spec_from_file_location("cuda_compile", ROOT / "scripts" / "cuda_compile.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_spills_are_read_from_the_compiler_s_report(cuda_compile):
    a, b = cuda_compile.parse_ptxas(PTXAS, "x.cu", "90a")
    assert (a.name, a.registers, a.shared, a.stack, a.spill_stores, a.spill_loads) == ("_Z1aPf", 255, 1024, 24, 20, 12)
    assert (b.registers, b.shared, b.stack, b.spill_stores, b.spill_loads) == (32, 0, 0, 0, 0)


def test_without_nvcc_nothing_is_claimed(cuda_compile, monkeypatch, capsys):
    monkeypatch.setattr(cuda_compile, "find_nvcc", lambda: None)
    assert cuda_compile.main([]) == 0
    assert "skipped: nvcc was not found" in capsys.readouterr().out
    assert cuda_compile.main(["--require"]) == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_cuda_source_compiles_for_hopper(cuda_compile, capsys):
    nvcc = cuda_compile.find_nvcc()
    if nvcc is None or cuda_compile.find_cublas_headers(nvcc) is None:
        pytest.skip("needs nvcc and the headers of nvidia-cublas")
    assert cuda_compile.main(["--arch", "90a", "--require"]) == 0, capsys.readouterr().out
