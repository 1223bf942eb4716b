"""Install difffit_fast in every way, each into a fresh environment, train one step, uninstall; write a table.

    {pip, pip --no-build-isolation, uv} × {plain, editable, sdist} × {with a C++ compiler, without}
    {pip, uv} × wheel × {with, without}
    {pip, uv} × plain, without PyTorch: must be refused with one sentence, or install when told to

for the PyTorch of this environment and others. An environment is an empty virtual environment that sees one PyTorch and
nothing of this project, so PyTorch is not installed dozens of times. "Without a compiler" is a PATH that has every program
but the compilers. The wheel is built once, with a compiler and this environment's PyTorch: where it runs with another
PyTorch, the stable ABI has done it. Isolated builds fetch setuptools and ninja from the package index.

    python scripts/install_matrix.py                      this environment's PyTorch only
    python scripts/install_matrix.py --older 2.10.0       install that PyTorch from PyPI too (CUDA build, some 4 GB)
    python scripts/install_matrix.py --torch /other/env/bin/python    another PyTorch that is there already
    python scripts/install_matrix.py --tools uv --forms plain         a part

Exit status 1 when an installation fails or does not report what it should have.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "matrix"
COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "clang++", "cpp", "nvcc", "c89", "c99", "ld", "as")
TOOLS = ("pip", "pip --no-build-isolation", "uv")
FORMS = ("plain", "editable", "wheel", "sdist")

# Runs inside the environment, away from the sources: one training step, then what the package says of itself.
STEP = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    from difffit_fast import FastDiffFitDiT, build_info, kernel_report
    torch.manual_seed(0)
    model = FastDiffFitDiT(input_size=8, hidden_size=48, depth=2, num_heads=4, num_classes=10)
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=1e-2)
    before = [p.detach().clone() for p in model.trainable_parameters()]
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.tensor([1, 9])
    loss = (model(x, t, y) - torch.randn(2, 8, 8, 8)).square().mean()
    loss.backward()
    optimizer.step()
    moved = sum(not torch.equal(a, b) for a, b in zip(before, model.trainable_parameters()))
import difffit_fast.kernels
info = build_info()
ours = [str(w.message) for w in caught if w.category is RuntimeWarning and "difffit_fast" in str(w.message)]
print(json.dumps({
    "torch": info["torch"], "built": info["built"], "torch_built": info["torch_built"], "cpu": info["cpu_capability"],
    "cuda": info["cuda_built"], "warnings": ours, "loss": loss.item(), "moved": moved,
    "adaln": kernel_report()["cpu"]["adaln"]["float32"], "file": difffit_fast.__file__,
}))
"""


def run(command: list[str], **kwargs) -> str:
    """Run a command; its output, or a RuntimeError with the end of it."""
    done = subprocess.run([str(part) for part in command], text=True, capture_output=True, check=False, **kwargs)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


def path_without_compilers() -> str:
    """A folder with links to every program of the PATH except the compilers."""
    folder = WORK / "bin-without-compilers"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for directory in os.environ["PATH"].split(os.pathsep):
        for program in sorted(Path(directory).glob("*")) if Path(directory).is_dir() else []:
            name = program.name
            compiler = name in COMPILERS or any(word in name for word in ("gcc", "g++", "clang", "x86_64-linux-gnu"))
            if not compiler and os.access(program, os.X_OK):
                with contextlib.suppress(FileExistsError):
                    (folder / name).symlink_to(program)
    return str(folder)


def torch_view(python: str) -> Path:
    """A folder of links to what the environment of ``python`` has installed, without this project and without hooks."""
    site = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip())
    version = run([python, "-c", "import torch; print(torch.__version__)"]).strip()
    view = WORK / f"torch-{version}"
    shutil.rmtree(view, ignore_errors=True)
    view.mkdir(parents=True)
    for entry in site.iterdir():
        if "difffit" not in entry.name and not entry.name.startswith("pip") and entry.suffix != ".pth":
            (view / entry.name).symlink_to(entry)
    return view


def fresh_environment(name: str, view: Path) -> tuple[Path, Path]:
    """An empty virtual environment that sees ``view``: its Python and its site-packages."""
    folder = WORK / name
    shutil.rmtree(folder, ignore_errors=True)
    run([sys.executable, "-m", "venv", "--without-pip", folder])
    python = folder / "bin" / "python"
    site = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip())
    (site / "torch_view.pth").write_text(f"{view}\n")
    return python, site


def copy_sources(to: Path) -> Path:
    """The files git would commit, copied."""
    shutil.rmtree(to, ignore_errors=True)
    for name in run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT).splitlines():
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)
    return to


def distributions() -> tuple[Path, Path]:
    """Build the source distribution and, from it, the wheel."""
    source, dist = copy_sources(WORK / "source"), WORK / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    backend = f"from setuptools import build_meta; build_meta.build_sdist({str(dist)!r})"
    run([sys.executable, "-c", backend], cwd=source)
    sdist = next(dist.glob("*.tar.gz"))
    wheel = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", dist, sdist]
    run(wheel, env={**os.environ, "DIFFFIT_FAST_REQUIRE_EXT": "1", "DIFFFIT_FAST_CUDA": "0"})
    return sdist, next(dist.glob("*.whl"))


def find_uv() -> str:
    """uv, from the PATH or installed into an environment of its own."""
    folder = WORK.parent / "uv"
    found = shutil.which("uv") or shutil.which(str(folder / "bin" / "uv"))
    if found is None:
        run([sys.executable, "-m", "venv", folder])
        run([folder / "bin" / "python", "-m", "pip", "install", "uv"])
    return found or str(folder / "bin" / "uv")


def commands(tool: str, form: str, python: Path, what: Path) -> tuple[list, list]:
    """How this tool installs this form into the environment of ``python``, and how it uninstalls.

    uv does not see what a .pth file makes visible, so it must not look for dependencies.
    """
    target = ["-e", what] if form == "editable" else [what]
    if tool == "uv":
        uv = [find_uv(), "pip"]
        return (
            [*uv, "install", "--python", python, "--no-deps", "--no-cache", *target],
            [*uv, "uninstall", "--python", python, "difffit_fast"],
        )
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    isolation = ["--no-index", "--no-build-isolation"] if "no-build-isolation" in tool else []
    return [*pip, "install", "--no-deps", *isolation, *target], [*pip, "uninstall", "-y", "difffit_fast"]


def variables(compiler: bool, bare_path: str) -> dict[str, str]:
    """The environment variables of an installation."""
    ours = ("CC", "CXX", "PYTHONPATH", "VIRTUAL_ENV", "DIFFFIT_FAST_KERNELS", "DIFFFIT_FAST_REQUIRE_EXT")
    environment = {k: v for k, v in os.environ.items() if k not in ours}
    environment |= {"DIFFFIT_FAST_CUDA": "0"}  # the C++ kernels are compared; CUDA sources need a matching nvcc
    return environment if compiler else environment | {"PATH": bare_path}


def one(tool: str, form: str, compiler: bool, view: Path, built: dict[str, Path], bare_path: str) -> dict[str, object]:
    """Install, train a step, uninstall; a row of the table."""
    name = f"{view.name}-{tool.replace(' ', '')}-{form}-{'compiler' if compiler else 'bare'}"
    python, site = fresh_environment(f"env-{name}", view)
    environment = variables(compiler, bare_path)
    what = built.get(form) or copy_sources(WORK / f"src-{name}")
    install, uninstall = commands(tool, form, python, what)
    row: dict[str, object] = {"torch": view.name.removeprefix("torch-"), "tool": tool, "form": form}
    row |= {"compiler": "yes" if compiler else "no"}
    try:
        start = time.perf_counter()
        done = subprocess.run(
            [str(part) for part in install], text=True, capture_output=True, env=environment, cwd=WORK
        )
        row["seconds"] = time.perf_counter() - start
        if done.returncode:
            raise RuntimeError((done.stdout + done.stderr)[-3000:])
        row |= json.loads(run([python, "-c", STEP], env=environment, cwd=WORK).splitlines()[-1])
        if str(row["file"]).startswith(str(ROOT / "difffit_fast")):
            raise RuntimeError(f"the working tree was imported, not the installation: {row['file']}")
        run(uninstall, env=environment, cwd=WORK)
        left = [str(p) for p in [*site.rglob("*difffit*"), *(python.parent).glob("difffit*")]]
        should_have = form == "wheel" or compiler
        problems = [f"{'no ' if should_have else ''}C++ kernels"] if row["built"] is not should_have else []
        problems += [f"{len(row['warnings'])} warnings"] if len(row["warnings"]) != (0 if should_have else 1) else []
        problems += ["the report does not match"] if row["adaln"] != ("cpp" if row["built"] else "reference") else []
        problems += ["nothing was trained"] if not row["moved"] else []
        problems += [f"left behind: {left}"] if left else []
        row["announced"] = "the C++ extension is not built: no C++ compiler" in done.stderr
        problems += ["the installer's output does not tell what was built"] if row["announced"] is should_have else []
        row["problem"] = "; ".join(problems)
    except RuntimeError as error:
        row["problem"] = str(error)
    return row


def without_torch(tool: str, bare_path: str) -> list[dict[str, object]]:
    """Install where there is no PyTorch: unasked, and with DIFFFIT_FAST_REQUIRE_EXT=0."""
    rows = []
    for allowed in (False, True):
        name = f"no-torch-{tool.replace(' ', '')}-{'allowed' if allowed else 'unasked'}"
        python, site = fresh_environment(f"env-{name}", WORK / "nothing")
        install, _ = commands(tool, "plain", python, copy_sources(WORK / f"src-{name}"))
        environment = variables(True, bare_path) | ({"DIFFFIT_FAST_REQUIRE_EXT": "0"} if allowed else {})
        start = time.perf_counter()
        done = subprocess.run(
            [str(part) for part in install], text=True, capture_output=True, env=environment, cwd=WORK
        )
        row: dict[str, object] = {"torch": "none", "tool": tool, "form": "plain", "compiler": "yes"}
        row["seconds"] = time.perf_counter() - start
        installed = (site / "difffit_fast" / "__init__.py").exists()
        text = " ".join((done.stdout + done.stderr).split())
        if allowed:
            row["form"] = "plain, DIFFFIT_FAST_REQUIRE_EXT=0"
            row["announced"] = "the C++ extension is not built: there is no PyTorch" in text
            good = done.returncode == 0 and installed and row["announced"]
            row["outcome"] = "installed without"
        else:
            good = done.returncode != 0 and not installed and "Install PyTorch >= 2.10 into this environment" in text
            row["outcome"] = "refused, in one sentence"
        row["problem"] = "" if good else text[-3000:]
        rows.append(row)
    return rows


def table(rows: list[dict[str, object]]) -> str:
    """The rows as Markdown."""
    head = ("PyTorch", "with", "form", "compiler", "install", "announced", "kernels reported", "warnings", "loss")
    lines = [f"| {' | '.join(head)} | result |", "|---" * (len(head) + 1) + "|"]
    for row in rows:
        kernels = f"C++ ({row['cpu']}, built for {row['torch_built']})" if row.get("built") else "plain PyTorch"
        ran = "adaln" in row
        cells = [
            row["torch"],
            row["tool"],
            row["form"],
            row["compiler"],
            f"{row['seconds']:.0f} s" if "seconds" in row else "",
            "not built" if row.get("announced") else "",
            kernels if ran else row.get("outcome", ""),
            len(row["warnings"]) if ran else "",
            f"{row['loss']:.6f}" if ran else "",
            f"FAILED: {str(row['problem']).splitlines()[-1][:100]}" if row["problem"] else "ok",
        ]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def older_torch(version: str) -> str:
    """An environment with that PyTorch from PyPI; kept for the next run."""
    folder = WORK.parent / f"torch-{version}"
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        run([sys.executable, "-m", "venv", folder])
        packages = [f"torch=={version}", "numpy", "safetensors", "pyyaml", "tqdm", "pillow", "setuptools>=77", "ninja"]
        subprocess.run([python, "-m", "pip", "install", "--no-cache-dir", *packages], check=True)
        (folder / "complete").touch()
    return str(python)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", action="append", default=[], help="a Python whose environment has another PyTorch")
    parser.add_argument("--older", action="append", default=[], help="a version of PyTorch to install from PyPI")
    parser.add_argument("--tools", nargs="+", default=list(TOOLS), choices=TOOLS)
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS)
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "install_matrix.md")
    args = parser.parse_args()

    WORK.mkdir(parents=True, exist_ok=True)
    pythons = [sys.executable, *args.torch, *(older_torch(version) for version in args.older)]
    views = [torch_view(python) for python in pythons]
    built = dict(zip(("sdist", "wheel"), distributions(), strict=True)) if {"sdist", "wheel"} & {*args.forms} else {}
    bare_path = path_without_compilers()
    rows: list[dict[str, object]] = []

    def add(*more: dict[str, object]) -> None:
        for row in more:
            rows.append(row)
            print(table([row]).splitlines()[-1], flush=True)
            if row["problem"]:
                print(row["problem"], file=sys.stderr, flush=True)

    for tool in args.tools:
        if "no-build-isolation" not in tool and "plain" in args.forms:
            add(*without_torch(tool, bare_path))
        for view in views:
            for form in args.forms:
                if form == "wheel" and "no-build-isolation" in tool:
                    continue  # nothing is built
                for compiler in (True, False):
                    add(one(tool, form, compiler, view, built, bare_path))
    pip = run([sys.executable, "-m", "pip", "--version"]).split()[1]
    uv = run([find_uv(), "--version"]).split()[1] if "uv" in args.tools else "not used"
    text = f"Python {platform.python_version()}, pip {pip}, uv {uv}. Written by `make install-matrix`.\n\n{table(rows)}"
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(text)
    print(f"\n{text}\nWritten to {args.output}")
    return int(any(row["problem"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
