"""Shared by all tests: one seed, no network, GPU tests skipped where there is no GPU, Triton's interpreter beside a
process that compiles, and uninitialised memory that cannot pass for a result."""

from __future__ import annotations

import collections
import contextlib
import ctypes
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # tensors are tiny; threads that spin at barriers only slow a busy machine
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the marks in this hook
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:  # for pytest-xdist: fixtures of a file are made once, and so is the interpreter's process
        item.add_marker(pytest.mark.xdist_group("interpreter" if "interpreter" in item.keywords else item.path.stem))
        if "interpreter" in item.keywords and not INTERPRETED:
            item.add_marker(pytest.mark.timeout(1500))  # the first of them waits for all
    if torch.cuda.is_available() and not INTERPRETED:
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# -- memory that was never written -----------------------------------------------------------------------------------
# Files whose tests look at numbers of operations and models. In the others (data, the command line, choosing by the
# clock, which deterministic mode forbids) memory is left as it comes.
_POISONED = {
    *(
        "test_adaln",
        "test_attention",
        "test_colsum",
        "test_dit",
        "test_fast_dit",
        "test_frozen_linear",
        "test_frozen_mlp",
    ),
    *("test_gemm", "test_kernels", "test_cpp_attention", "test_cpp_kernels", "test_ops", "test_residual"),
    *(
        "test_triton_attention",
        "test_triton_kernels",
        "test_triton_model",
        "test_poison",
        "test_stacked",
        "test_weights",
    ),
}
_M_PERTURB = -6  # of glibc's mallopt


@contextlib.contextmanager
def poison() -> Iterator[None]:
    """Until the end, what PyTorch allocates holds NaN (integers: the largest), and malloc gives bytes of 0xfe.

    An output that a kernel forgets can then not happen to be right. PyTorch's own switch does it, in ``at::empty``, so
    outputs that C++ allocates are filled too; it only works in deterministic mode, which changes nothing on a CPU.
    The partial sums of the C++ kernels come from malloc: glibc fills those of more than a kilobyte (−1.7e38 as float32).
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)  # only glibc has it
    mallopt(_M_PERTURB, 1)
    try:
        yield
    finally:
        mallopt(_M_PERTURB, 0)
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(autouse=True)
def _poison(request: pytest.FixtureRequest) -> Iterator[None]:
    with poison() if request.path.stem in _POISONED else contextlib.nullcontext():
        yield


# -- Triton's interpreter --------------------------------------------------------------------------------------------
# It is chosen when Triton is first imported, and other tests of a session compile. So the tests marked "interpreter"
# run in one process of their own, at the first of them, and each reports here what happened to it there.
_REPORT = "DIFFFIT_FAST_TEST_REPORT"
_outcomes: dict[str, dict[str, str]] | None = None


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if INTERPRETED and _REPORT in os.environ and (report.when == "call" or not report.passed):
        line = {"test": report.nodeid, "outcome": report.outcome, "text": report.longreprtext, "out": report.capstdout}
        if report.skipped and isinstance(report.longrepr, tuple):
            line["text"] = report.longrepr[2]
        with open(os.environ[_REPORT], "a") as file:
            file.write(json.dumps(line) + "\n")


def _name(item: pytest.Item) -> str:
    """Without the group that pytest-xdist puts behind it."""
    return item.nodeid.removesuffix("@interpreter")


def _interpret(session: pytest.Session) -> dict[str, dict[str, str]]:
    wanted = [item for item in session.items if "interpreter" in item.keywords and "gpu" not in item.keywords]
    names = list(map(_name, wanted))
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.jsonl"
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *names],
            env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", _REPORT: str(report)},
            cwd=session.config.rootpath,
            capture_output=True,
            text=True,
        )
        lines = report.read_text().splitlines() if report.exists() else []
    missing = {
        "outcome": "failed",
        "text": f"not run in the interpreter:\n{run.stdout[-3000:]}{run.stderr[-3000:]}",
        "out": "",
    }
    return dict.fromkeys(names, missing) | {line["test"]: line for line in map(json.loads, lines)}


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if INTERPRETED or "interpreter" not in pyfuncitem.keywords:
        return None
    global _outcomes
    if _outcomes is None:
        stopped = {"outcome": "failed", "text": "the interpreter's process was stopped before it ended", "out": ""}
        _outcomes = collections.defaultdict(lambda: stopped)  # unless it ends: it is not begun anew for every test
        _outcomes = _interpret(pyfuncitem.session)
    here = _outcomes[_name(pyfuncitem)]
    if here["out"]:
        print(here["out"])
    if here["outcome"] == "skipped":
        pytest.skip(here["text"])
    if here["outcome"] == "failed":
        pytest.fail(here["text"], pytrace=False)
    return True
