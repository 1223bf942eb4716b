"""How files are written: whose a temporary file is, links, devices, names."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from difffit_fast import _files
from difffit_fast._files import (
    beside,
    check_target,
    is_left,
    json_text,
    owner,
    read_json,
    replacing,
    sweep,
    write_safetensors,
    write_text,
    write_torch,
)
from difffit_fast.check.report import Report
from difffit_fast.check.run import check_run
from difffit_fast.data.prepare import layout
from difffit_fast.data.prepare.layout import begin
from difffit_fast.errors import DiffFitError
from difffit_fast.train.checkpoint import CheckpointFolder


def listed(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.fixture
def writers(tmp_path):
    """Starts processes that are in the middle of writing a file or folder; gives its temporary name and the pid."""
    started: list[int] = []

    def start(name: str) -> tuple[str, int]:
        read, write = os.pipe()
        pid = os.fork()
        if not pid:
            temporary = beside(tmp_path / name)
            temporary.mkdir() if name.endswith(".state") else temporary.touch()
            os.write(write, temporary.name.encode())
            time.sleep(600)
            os._exit(0)
        started.append(pid)
        return os.read(read, 1000).decode(), pid

    yield start
    for pid in started:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def kill(pid: int) -> None:
    """Leaves a zombie: nobody has waited for it."""
    os.kill(pid, signal.SIGKILL)
    while Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z":
        time.sleep(0.01)


# ---------------------------------------------------------------- whose it is


def test_what_a_dead_process_left_is_swept_and_a_living_one_keeps_its_own(tmp_path, writers):
    (_, one), (folder, two), (living, _) = writers("model.pt"), writers("0000001.state"), writers("model.pt")
    (tmp_path / folder / "tensors.safetensors").write_bytes(b"half")
    kill(one)
    kill(two)
    CheckpointFolder(tmp_path).sweep()
    assert listed(tmp_path) == [living]
    sweep(tmp_path)
    assert listed(tmp_path) == [living]


def test_a_writer_sweeps_when_it_starts(tmp_path, writers):
    left, process = writers("model.pt")
    kill(process)
    write_text(tmp_path / "other.txt", "whole")
    assert left not in listed(tmp_path) and listed(tmp_path) == ["other.txt"]


def test_a_pid_that_came_round_is_not_the_owner(tmp_path):
    place, pid, start = owner().split("-")
    mine = beside(tmp_path / "x")
    mine.touch()
    assert not is_left(f"{place}-{pid}-{start}", mine)
    assert is_left(f"{place}-{pid}-{int(start) - 1}", mine)  # the same pid, begun earlier
    assert is_left(f"{place}-{2**22 + 1}-{start}", mine)  # Linux has no such pid


def test_an_owner_in_another_container_is_judged_by_its_last_write(tmp_path):
    folder = tmp_path / f".tmp-0000001.state.00000000-{os.getpid()}-1-0"
    folder.mkdir()
    (folder / "tensors").touch()
    os.utime(folder, (1, 1))
    sweep(tmp_path)  # something in it is new
    assert folder.exists()
    os.utime(folder / "tensors", (1, 1))
    os.utime(folder, (1, 1))
    sweep(tmp_path)
    assert not folder.exists()


def test_names_of_older_versions(tmp_path):
    names = {name: tmp_path / name for name in (".tmp-a.pt.4194305", ".tmp-b.state.old", f".tmp-a.pt.{os.getpid()}")}
    foreign = tmp_path / ".tmp-thesis"
    for path in (*names.values(), foreign):
        path.touch()
    sweep(tmp_path)
    assert len(listed(tmp_path)) == 4  # all are new
    for path in (*names.values(), foreign):
        os.utime(path, (1, 1))
    sweep(tmp_path, "other.pt")
    assert len(listed(tmp_path)) == 4  # none is of that file
    sweep(tmp_path)
    assert listed(tmp_path) == [".tmp-thesis"]  # not ours. The living pid began long after the last write


def test_what_lives_here_under_an_old_name_is_kept(tmp_path, monkeypatch):
    path = tmp_path / f".tmp-a.pt.{os.getpid()}"
    path.touch()
    monkeypatch.setattr(_files, "STALE_SECONDS", -1.0)
    sweep(tmp_path)
    assert path.exists()


def test_two_writers_of_one_file_have_a_temporary_one_each(tmp_path):
    with replacing(tmp_path / "a") as one, replacing(tmp_path / "a") as two:
        one.write_text("1")
        two.write_text("2")
    assert one != two and (tmp_path / "a").read_text() == "1" and listed(tmp_path) == ["a"]


def test_a_second_prepare_leaves_the_first_alone(tmp_path):
    partial = begin(tmp_path / "food")
    (partial / "train").mkdir()
    with pytest.raises(DiffFitError, match="another difffit prepare is at work"):
        begin(tmp_path / "food")
    assert (partial / "train").is_dir()
    place, pid, _ = owner().split("-")
    (partial / ".difffit-prepare").write_text(f"{place}-{pid}-1")
    assert listed(begin(tmp_path / "food")) == [".difffit-prepare"]


def test_check_names_what_dead_processes_left_alone(tmp_path):
    living, dead = beside(tmp_path / "a"), tmp_path / ".tmp-b.state.old"
    for path in (living, dead):
        path.touch()
    os.utime(dead, (1, 1))
    report = Report(str(tmp_path), "run")
    check_run(tmp_path, report)
    found = [finding.examples for finding in report.findings if "half-written" in finding.what]
    assert found == [[dead.name]]


def test_of_two_that_make_a_file_one_is_told_so(tmp_path):
    path = tmp_path / "a"
    with pytest.raises(FileExistsError) as caught, replacing(path, new=True) as one:
        one.write_text("1")
        with replacing(path, new=True) as two:
            two.write_text("2")
    assert path.read_text() == "2" and caught.value.filename == str(path) and listed(tmp_path) == ["a"]


@pytest.mark.parametrize("name", ["n" * 255, "é" * 127, "n" * 241, os.fsdecode(b"\xff" * 200)])
def test_names_as_long_as_file_systems_allow(tmp_path, name):
    write_text(tmp_path / name, "1")
    assert listed(tmp_path) == [name]
    assert beside(tmp_path / name).name.startswith(".tmp-")


# ---------------------------------------------------------------- what is there already


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_written_through(tmp_path, there):
    (tmp_path / "disk").mkdir()
    real, link = tmp_path / "disk" / "real.json", tmp_path / "link.json"
    if there:
        real.write_text("old")
    (tmp_path / "between").symlink_to(Path("disk") / "real.json")
    link.symlink_to("between")
    write_text(link, "new")
    assert link.is_symlink() and not real.is_symlink() and real.read_text() == "new"
    assert listed(tmp_path / "disk") == ["real.json"] and listed(tmp_path) == ["between", "disk", "link.json"]


def test_permissions_of_a_replaced_file_stay(tmp_path):
    (tmp_path / "a").touch(mode=0o600)
    write_text(tmp_path / "a", "secret")
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600


def test_a_failed_write_leaves_link_and_file(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(OSError, match="space"), replacing(tmp_path / "link") as temporary:
        temporary.write_text("new")
        raise OSError(28, "No space left on device")
    assert (tmp_path / "link").read_text() == "old" and listed(tmp_path) == ["link", "real"]


def test_what_is_no_file_is_refused(tmp_path):
    import socket

    (tmp_path / "folder").mkdir()
    (tmp_path / "to").symlink_to("folder")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        for name, what in (("folder", "a folder"), ("to", "a folder"), ("socket", "a socket")):
            with pytest.raises(DiffFitError, match=f"expected the name of a file; it is {what}"):
                write_text(tmp_path / name, "x")
        assert (tmp_path / "socket").is_socket()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="loop"):
        write_text(tmp_path / "loop", "x")
    with pytest.raises(FileNotFoundError) as caught:
        write_text(tmp_path / "absent" / "a.txt", "x")
    assert caught.value.filename == str(tmp_path / "absent" / "a.txt")


def test_what_cannot_be_written_is_refused_before_any_work(tmp_path):
    (tmp_path / "to").symlink_to(Path("absent") / "a.json")
    for name, message in (
        (tmp_path, "it is a folder"),
        (tmp_path / "absent" / "a.json", f"the folder of --json does not exist: {tmp_path / 'absent'}"),
        (tmp_path / "to", f"the folder of --json does not exist: {tmp_path / 'absent'}"),
    ):
        with pytest.raises(DiffFitError, match=message):
            check_target(name, "--json")
    for name in (tmp_path / "a.json", "/dev/null", "/dev/stdout"):
        check_target(name, "--json")
    assert listed(tmp_path) == ["to"]


@pytest.mark.parametrize(
    ("verb", "flag"),
    [
        (["check", "{folder}"], "--json"),
        (["eval", "{folder}", "{folder}"], "--json"),
        (["eval", "{folder}", "{folder}"], "--cache"),
        (["sample", "--ckpt", "{folder}"], "--output"),
        (["export", "--to", "dit", "--delta", "{folder}"], "--out"),
    ],
)
def test_every_command_that_writes_a_file_refuses_it_first(tmp_path, capsys, verb, flag):
    from difffit_fast.cli import main

    target = tmp_path / "absent" / "x.safetensors"
    assert main([word.format(folder=tmp_path) for word in verb] + [flag, str(target)]) == 2
    assert f"the folder of {flag} does not exist" in capsys.readouterr().err
    target.mkdir(parents=True)
    more = ["--overwrite"] if flag == "--out" else []
    assert main([word.format(folder=tmp_path) for word in verb] + [flag, str(target), *more]) == 2
    assert "expected the name of a file; it is a folder" in capsys.readouterr().err


def test_an_open_file_of_another_process_is_no_stream_of_ours(tmp_path):
    with open(tmp_path / "out", "wb") as out:
        code = "import sys; sys.stdin.read()"
        other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=out)
    write_text(Path(f"/proc/{other.pid}/fd/1"), "theirs")
    other.communicate()
    assert (tmp_path / "out").read_text() == "theirs"


def test_devices_and_pipes_are_written_into(tmp_path):
    node = tmp_path / "null"  # stands for /dev/null, which a bug in this test must not cost the machine
    try:
        os.mknod(node, 0o666 | 0o020000, os.makedev(1, 3))
        node.write_bytes(b"")
    except OSError:
        pytest.skip("making a device node is not allowed here")
    write_text(node, "gone")
    assert node.is_char_device() and listed(tmp_path) == ["null"]

    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_text(tmp_path / "pipe", "through")
    assert os.read(reader, 100) == b"through" and (tmp_path / "pipe").is_fifo()
    os.close(reader)


def test_standard_output_keeps_what_was_printed_before_and_after(tmp_path):
    names = ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"]
    code = (
        "from pathlib import Path\nfrom difffit_fast._files import write_text\n"
        f"for name in {names}:\n    print('before')\n    write_text(Path(name), name)\n    print('after')"
    )
    with open(tmp_path / "out", "wb") as out:
        subprocess.run([sys.executable, "-c", code], stdout=out, check=True)
    assert (tmp_path / "out").read_text() == "".join(f"before\n{name}after\n" for name in names)
    assert listed(tmp_path) == ["out"]


def test_a_full_disk_is_an_error_of_the_system(tmp_path):
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    write_torch(tmp_path / "a.pt", torch.zeros(10))
    whole = (tmp_path / "a.pt").read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            write_torch(tmp_path / "a.pt", torch.zeros(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / "a.pt").read_bytes() == whole and listed(tmp_path) == ["a.pt"]


# ---------------------------------------------------------------- names that are not UTF-8


def test_json_keeps_names_that_are_not_unicode(tmp_path):
    value = {os.fsdecode(b"caf\xe9"): [os.fsdecode(b"\xff"), "é\n\\udcff"]}
    path = tmp_path / "a.json"
    _files.write_json(path, value)
    assert read_json(path) == value and json.loads(path.read_bytes()) == value
    assert json_text({"é": 1}) == '{"é": 1}'
    with pytest.raises(DiffFitError, match="not valid Unicode"):
        write_text(path, os.fsdecode(b"\xff"))


@pytest.mark.parametrize("text", ["{", "[]", '{"a": NaN}', '{"a": -Infinity}', "[" * 100_000])
def test_what_is_no_json_object_is_one_sentence(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DiffFitError, match="JSON"):
        read_json(tmp_path / "a.json")


def test_a_name_that_safetensors_could_not_read_is_not_written(tmp_path):
    with pytest.raises(DiffFitError, match="must be UTF-8"):
        write_safetensors(tmp_path / os.fsdecode(b"\xff.safetensors"), {"a": torch.zeros(1)})
    assert listed(tmp_path) == []


def test_the_listing_of_a_data_set_takes_any_name(tmp_path):
    partial = begin(tmp_path / "out")
    for name in ("a\u2028b.jpg", "a\x85.jpg", os.fsdecode(b"\xff.jpg")):
        path = partial / "train" / "k" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"1")
    layout.finish(partial, tmp_path / "out", {"name": "x"})
    assert layout.verify(tmp_path / "out") == {"name": "x"}
    done = subprocess.run(["sha256sum", "-c", "files.sha256"], cwd=tmp_path / "out", capture_output=True)
    assert done.returncode == 0 and done.stdout.count(b": OK\n") == 3
