# SPDX-License-Identifier: Apache-2.0
"""gpu3d.batch: which files are taken, where targets go, and what failures, dead workers and interrupts leave behind."""

from __future__ import annotations

import functools
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

import gpu3d
from gpu3d import batch
from gpu3d.batch import Done, Failed, Report, imap_files, map_files

ROOT = Path(__file__).resolve().parent.parent
WINDOWS = sys.platform == "win32"

# ---- functions that workers import -----------------------------------------------------------------------------------


def size(path):
    return path.stat().st_size


def copy(path, target):
    target.write_bytes(path.read_bytes())


def copy_or_fail(path, target):
    copy(path, target)
    if path.read_bytes() == b"bad":
        raise ValueError("this scan is bad")


def copy_and_measure(path, target):
    copy_or_fail(path, target)
    return size(path)


def copy_or_die(path, target):
    copy(path, target)
    die(path)


def die(path):
    """Die in the way that the file says; with "once", only if no worker has died before."""
    how, _, once = path.read_text().partition(" ")
    if once and path.with_suffix(".died").exists():
        return "alive"
    if how in ("exit", "kill"):
        path.with_suffix(".died").touch()
    if how == "exit":
        os._exit(3)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


def leave(path):
    sys.exit("no more")


def give_what_cannot_be_sent(path):
    return lambda: path


def nothing(path, target):
    pass


def surroundings(path):
    time.sleep(0.1)  # so that the other worker gets a file too
    return os.getpid(), os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("OMP_NUM_THREADS")


class Unloadable:
    """A function that can be sent, and that no worker can load."""

    def __call__(self, path):
        pass

    def __reduce__(self):
        return import_what_is_missing, ()


def import_what_is_missing():
    import a_module_of_the_parent_only  # noqa: F401


# ---- helpers ---------------------------------------------------------------------------------------------------------


def tree(folder, **files):
    """Write files, by name ("a/b.bin") and content; return the folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


def contents(folder):
    """The content of every file below a folder, hidden ones too, by name."""
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def names(results):
    return sorted(result.path.name for result in results)


def run_script(tmp_path, script, *arguments, **options):
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(script))
    # A group of its own, so that a signal to it reaches all its processes and no other, like Ctrl-C in a terminal.
    return subprocess.Popen(
        [sys.executable, path, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def assert_no_process_is_left(group):
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)
    raise AssertionError("a process is left")


# ---- which files -----------------------------------------------------------------------------------------------------


def test_folder(tmp_path):
    folder = tree(
        tmp_path,
        **{"b.BIN": "12", "a/c.pcd.bin": "123", "a/x.las/d.npy": "", ".hidden.bin": "", ".git/e.bin": "", "f.md": ""},
    )
    results = list(imap_files(size, str(folder), jobs=1))
    assert [(result.path, result.value) for result in results] == [
        (folder / "b.BIN", 2),
        (folder / "a" / "c.pcd.bin", 3),
        (folder / "a" / "x.las" / "d.npy", 0),
    ]
    assert all(isinstance(result, Done) and result.seconds >= 0 and result.target is None for result in results)
    assert names(imap_files(size, folder, endings=(".MD",), jobs=1)) == ["f.md"]
    assert names(imap_files(size, folder, endings=".md", jobs=1)) == ["f.md"]


def test_endings_are_those_of_scans(tmp_path):
    folder = tree(tmp_path, **{"a.bin": "", "b.label": "", "c.csv": "", "d.txt": "", "e.LAZ": "", "f.md": ""})
    assert names(imap_files(size, folder, jobs=1)) == ["a.bin", "e.LAZ"]


@pytest.mark.skipif(WINDOWS, reason="no FIFOs")
def test_links_and_fifos(tmp_path):
    folder = tree(tmp_path / "scans", **{"a.bin": "1"})
    elsewhere = tree(tmp_path / "elsewhere", **{"b.bin": "12"})
    os.mkfifo(folder / "fifo.bin")
    (folder / "dangling.bin").symlink_to(tmp_path / "nothing")
    (folder / "link.bin").symlink_to(elsewhere / "b.bin")
    (folder / "loop").symlink_to(folder)
    report = map_files(size, folder, jobs=1)
    assert report.done == 2
    fifo, dangling = sorted(report.failures, key=lambda failed: failed.path.name, reverse=True)
    assert fifo.path.name == "fifo.bin" and fifo.error.startswith("ValueError: a pipe or a device")
    assert dangling.path.name == "dangling.bin" and dangling.error.startswith("FileNotFoundError: ")


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    folder = tree(tmp_path, **{"a.bin": "", "b/c.bin": ""})
    scandir = os.scandir

    def refuse(path):  # permissions do not bind the superuser
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError):
        map_files(size, folder, jobs=1)


def test_iterables_are_read_as_workers_become_free(tmp_path):
    path = tree(tmp_path, **{"a.bin": ""}) / "a.bin"
    read = 0

    def paths():
        nonlocal read
        for _ in range(100):
            read += 1
            yield path

    results = imap_files(size, paths(), jobs=2)
    assert read == 0
    for taken, _ in enumerate(results, start=1):
        assert read <= taken + 4
        if taken == 20:
            break


def test_an_error_of_the_iterable_ends_the_workers(tmp_path):
    path = tree(tmp_path, **{"a.bin": ""}) / "a.bin"

    def paths():
        yield from [path] * 3
        raise LookupError("no more paths")

    with pytest.raises(LookupError, match="no more paths"):
        map_files(size, paths(), jobs=2)


@pytest.mark.parametrize("files", ["absent", "file"])
def test_one_file_is_not_a_folder(tmp_path, files):
    tree(tmp_path, file="")
    with pytest.raises(NotADirectoryError, match=rf"got {re.escape(str(tmp_path / files))}: put one file in a list"):
        map_files(size, str(tmp_path / files))


def test_nothing_to_do(tmp_path):
    assert map_files(size, tmp_path, jobs=2).done == 0
    assert list(imap_files(copy, [], out=tmp_path / "out", jobs=2)) == []


# ---- targets ---------------------------------------------------------------------------------------------------------


def test_targets_mirror_the_folder(tmp_path):
    folder = tree(tmp_path / "in", **{"a.pcd.bin": "1", "b/c.bin": "2", "b/d.LAS": "3"})
    out = tmp_path / "new" / "out"
    results = list(imap_files(copy, folder, out=out, jobs=2))
    assert contents(out) == {"a.pcd.bin": "1", "b/c.bin": "2", "b/d.LAS": "3"}
    assert all(result.target == out / result.path.relative_to(folder) for result in results)
    map_files(copy, folder, out=tmp_path / "laz", to=".laz", jobs=1)
    assert contents(tmp_path / "laz") == {"a.laz": "1", "b/c.laz": "2", "b/d.laz": "3"}


def test_targets_of_an_iterable_are_below_the_common_folder(tmp_path, monkeypatch):
    folder = tree(tmp_path, **{"in/1/scan.bin": "1", "in/2/scan.bin": "2"})
    monkeypatch.chdir(folder)
    results = list(imap_files(copy, ["in/1/scan.bin", folder / "in/2/scan.bin"], out="out", jobs=1))
    assert contents(folder / "out") == {"1/scan.bin": "1", "2/scan.bin": "2"}
    assert results[0].path == Path("in/1/scan.bin") and results[0].target == Path("out/1/scan.bin")
    map_files(copy, [b"in/1/scan.bin"], out="one", jobs=1)
    assert contents(folder / "one") == {"scan.bin": "1"}


def test_targets_below_the_inputs_are_not_inputs_of_the_next_run(tmp_path):
    folder = tree(tmp_path, **{"a.bin": "1"})
    for _ in range(2):
        assert map_files(copy, folder, out=folder / "out", jobs=1).done == 1
    assert contents(folder) == {"a.bin": "1", "out/a.bin": "1"}


def test_names_of_all_kinds(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    given = [
        b"a b.bin",
        b"$HOME.bin",
        b"-rf.bin",
        b"%s{}.bin",
        b"new\nline.bin",
        "点云.bin".encode(),
        b"x" * 251 + b".bin",
    ]
    if sys.platform == "linux":
        given.append(b"caf\xe9 \xff.bin")  # not UTF-8
    for i, name in enumerate(given):
        (folder / os.fsdecode(name)).write_text(str(i))
    resume = tmp_path / "resume"
    report = map_files(copy, folder, out=tmp_path / "out", resume=resume, jobs=2)
    assert (report.done, report.failures) == (len(given), [])
    assert contents(tmp_path / "out") == contents(folder)
    assert map_files(copy, folder, out=tmp_path / "out", resume=resume, jobs=2).skipped == len(given)


@pytest.mark.parametrize(
    ("files", "options", "error"),
    [
        (["a.bin", "a.npy"], {"out": "out", "to": ".las"}, "a.bin and .*a.npy would both be written to .*a.las"),
        (["a.bin", "./a.bin"], {"out": "out"}, "would both be written to"),
        (["a.bin", "a.npy"], {"out": "."}, "a.bin is an input itself, and an input is never overwritten"),
        (["a.bin", "a.npy"], {"out": ".", "to": ".npy"}, "a.npy is an input itself"),
        (["a.bin"], {"out": "link"}, "a.bin is an input itself"),
        (["a.bin"], {"out": "out", "to": "las"}, "an ending begins with a dot, got 'las': pass '.las'"),
        (["a.bin"], {"endings": ["las"]}, "an ending begins with a dot, got 'las'"),
        (["a.bin"], {"to": ".las"}, "pass the folder out= too"),
        (["a.bin"], {"jobs": 0}, "jobs must be at least 1, got 0"),
        (["a.bin"], {"retries": -1}, "retries must be at least 0, got -1"),
        (["a.bin"], {"devices": []}, r"devices must be a list of GPUs, got \[\]"),
        (["a.bin"], {"devices": "01"}, "devices must be a list of GPUs, got '01'"),
        (["a.bin"], {"devices": [2]}, "devices has 2, and this process sees 2 GPUs: CUDA_VISIBLE_DEVICES is '5,3'"),
        (["a.bin"], {"client": object(), "jobs": 2}, "jobs, retries and devices are for a pool of processes"),
    ],
)
def test_mistakes_are_found_before_anything_runs(tmp_path, monkeypatch, files, options, error):
    monkeypatch.chdir(tree(tmp_path, **{"a.bin": "", "a.npy": ""}))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3")
    (tmp_path / "link").symlink_to(tmp_path)

    def never(*arguments):
        raise AssertionError("it ran")

    with pytest.raises(ValueError, match=error):
        map_files(never, files, **({"jobs": 1} if not options.keys() & {"client", "devices"} else {}) | options)
    assert contents(tmp_path).keys() == {"a.bin", "a.npy"}


def test_an_input_behind_a_link_is_not_overwritten(tmp_path):
    kept = tree(tmp_path, **{"out/a.bin": "kept"}) / "out" / "a.bin"
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.bin").symlink_to(kept)
    with pytest.raises(ValueError, match="an input is never overwritten"):
        map_files(copy, tmp_path / "in", out=tmp_path / "out", jobs=1)


def test_a_target_is_whole_or_not_there(tmp_path):
    folder = tree(tmp_path / "in", **{"a.bin": "good", "b.bin": "bad", "c.bin": "bad"})
    out = tree(tmp_path / "out", **{"c.bin": "of an earlier run"})
    report = map_files(copy_or_fail, folder, out=out, jobs=1)
    assert contents(out) == {"a.bin": "good", "c.bin": "of an earlier run"}
    assert [failed.error for failed in report.failures] == ["ValueError: this scan is bad"] * 2


def test_a_function_that_writes_nothing_has_failed(tmp_path):
    folder = tree(tmp_path / "in", **{"a.bin": ""})
    (failed,) = imap_files(nothing, folder, out=tmp_path / "out", jobs=1)
    assert failed.error == "FileNotFoundError: the function did not write the file target, its second argument"
    # What a killed run left under the temporary name is not taken for what the function wrote.
    batch._part(tmp_path / "out" / "a.bin").touch()
    assert isinstance(next(imap_files(nothing, folder, out=tmp_path / "out", jobs=1)), Failed)
    assert contents(tmp_path / "out") == {}


# ---- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jobs", [1, 2])
def test_good_files_among_failing_ones(tmp_path, jobs):
    folder = tree(tmp_path / "in", **{f"{i}.bin": "bad" if i % 3 == 0 else "good" for i in range(10)})
    report = map_files(copy_or_fail, folder, out=tmp_path / "out", jobs=jobs)
    assert isinstance(report, Report)
    assert (report.done, report.skipped) == (6, 0) and report.seconds > 0
    assert names(report.failures) == ["0.bin", "3.bin", "6.bin", "9.bin"]
    failed = report.failures[0]
    assert failed.error == "ValueError: this scan is bad"
    assert "in copy_or_fail" in failed.traceback and "Traceback" not in repr(failed)
    assert contents(tmp_path / "out") == {f"{i}.bin": "good" for i in (1, 2, 4, 5, 7, 8)}


@pytest.mark.parametrize("jobs", [1, 2])
def test_sys_exit_is_a_failure(tmp_path, jobs):
    (failed,) = imap_files(leave, tree(tmp_path, **{"a.bin": ""}), jobs=jobs)
    assert failed.error == "SystemExit: no more"


@pytest.mark.skipif(WINDOWS, reason="no signals")
def test_dead_workers_are_replaced(tmp_path):
    how = {f"{i}.bin": "live" for i in range(8)} | {"exit.bin": "exit", "kill.bin": "kill"}
    folder = tree(tmp_path / "in", **how)
    report = map_files(copy_or_die, folder, out=tmp_path / "out", endings=[".bin"], jobs=2)
    assert report.done == 8
    assert {failed.path.name: failed.error for failed in report.failures} == {
        "exit.bin": "the worker process ended with exit code 3",
        "kill.bin": "the worker process was killed by SIGKILL, perhaps for want of memory: pass fewer jobs",
    }
    assert contents(tmp_path / "out") == {f"{i}.bin": "live" for i in range(8)}  # and no part of a file


@pytest.mark.skipif(WINDOWS, reason="no signals")
def test_retries(tmp_path):
    folder = tree(tmp_path, **{"once.bin": "kill once", "always.bin": "exit"})
    results = {result.path.name: result for result in imap_files(die, folder, endings=[".bin"], retries=1, jobs=2)}
    assert results["once.bin"].value == "alive"
    assert results["always.bin"].error == "the worker process ended with exit code 3"


def test_a_function_that_cannot_be_sent(tmp_path):
    folder = tree(tmp_path, **{"a.bin": ""})
    with pytest.raises(TypeError, match=r"cannot be sent to workers .*: define it with def at the top level"):
        map_files(lambda path: None, folder, jobs=2)
    assert map_files(lambda path: None, folder, jobs=1).done == 1


def test_a_path_that_is_no_path(tmp_path):
    with pytest.raises(TypeError, match=r"expected str, bytes or os\.PathLike object, not int"):
        map_files(size, [1], jobs=2)


def test_a_function_that_cannot_be_loaded(tmp_path, capfd):
    folder = tree(tmp_path, **{"a.bin": "", "b.bin": "", "c.bin": ""})
    with pytest.raises(RuntimeError, match="a worker could not start: the worker process ended with exit code 1"):
        map_files(Unloadable(), folder, jobs=2)
    assert "a_module_of_the_parent_only" in capfd.readouterr().err


def test_a_value_that_cannot_be_sent(tmp_path):
    folder = tree(tmp_path, **{"a.bin": ""})
    (failed,) = imap_files(give_what_cannot_be_sent, folder, jobs=2)
    assert "the returned value cannot be sent" in failed.error
    assert map_files(give_what_cannot_be_sent, folder, jobs=2).failures == []  # it is not asked for


def test_a_script_without_guard(tmp_path):
    script = """
        import sys
        from gpu3d.batch import map_files

        def size(path):
            return path.stat().st_size

        map_files(size, sys.argv[1:], jobs=2)
    """
    process = run_script(tmp_path, script, __file__)
    error = process.communicate(timeout=30)[1]
    assert process.returncode == 1
    assert error.splitlines()[-1].startswith("RuntimeError: a worker could not start")
    assert 'if __name__ == "__main__"' in error.splitlines()[-1]


# ---- workers ---------------------------------------------------------------------------------------------------------


def test_devices_and_threads(tmp_path, monkeypatch):
    folder = tree(tmp_path, **{f"{i}.bin": "" for i in range(6)})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    seen = {result.value for result in imap_files(surroundings, folder, devices=[1, "GPU-0a1b"])}
    assert sorted(seen_by[1:] for seen_by in seen) == [("3", "1"), ("GPU-0a1b", "1")]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5,3" and "OMP_NUM_THREADS" not in os.environ

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    ((pid, *variables),) = {result.value for result in imap_files(surroundings, folder, devices=[1], jobs=1)}
    assert pid != os.getpid() and variables == ["1", "2"]
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_one_job_runs_here(tmp_path):
    (result,) = imap_files(surroundings, tree(tmp_path, **{"a.bin": ""}), jobs=1)
    assert result.value[0] == os.getpid()


def test_many_tiny_files(tmp_path):
    folder = tree(tmp_path, **{f"{i % 7}/{i}.bin": "x" * i for i in range(500)})
    begin = time.perf_counter()
    values = [result.value for result in imap_files(size, folder, jobs=2)]
    assert sorted(values) == list(range(500))
    assert time.perf_counter() - begin < 20  # a second; the rest is for a busy machine


def test_arguments_and_arrays(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(6.0))
    (result,) = imap_files(functools.partial(np.load, mmap_mode=None), [tmp_path / "a.npy"], jobs=2)
    np.testing.assert_array_equal(result.value, np.arange(6.0))
    assert pickle.loads(pickle.dumps(result)).path == result.path


# ---- resume ----------------------------------------------------------------------------------------------------------


def test_resume(tmp_path):
    folder = tree(tmp_path / "in", **{"a.bin": "1", "b.bin": "2", "c.bin": "3", "d.bin": "4", "e.bin": "bad"})
    out, resume = tmp_path / "out", tmp_path / "resume.jsonl"
    again = functools.partial(map_files, copy_or_fail, folder, resume=resume, jobs=1)
    first = again(out=out)
    assert (first.done, first.skipped, names(first.failures)) == (4, 0, ["e.bin"])
    assert len(resume.read_text().splitlines()) == 4

    (folder / "a.bin").write_text("another size")
    os.utime(folder / "b.bin", ns=(0, 0))
    (out / "c.bin").unlink()
    (folder / "e.bin").write_text("good")
    second = again(out=out)
    assert (second.done, second.skipped, second.failures) == (4, 1, [])
    assert contents(out) == contents(folder)
    assert again(out=out).skipped == 5
    assert again(out=tmp_path / "other").done == 5  # these targets are not there


@pytest.mark.parametrize("jobs", [1, 2])
def test_each_gets_what_came_of_a_file(tmp_path, jobs):
    folder = tree(tmp_path / "in", **{"a.bin": "good", "b.bin": "bad"})
    outcomes = []
    report = map_files(copy_and_measure, folder, out=tmp_path / "out", jobs=jobs, each=outcomes.append)
    good, bad = sorted(outcomes, key=lambda outcome: outcome.path.name)
    assert (good.value, good.target.read_text()) == (4, "good") and bad == report.failures[0]
    with pytest.raises(KeyError):
        map_files(size, folder, jobs=1, each=lambda outcome: {}[outcome.path])


def test_resume_after_a_torn_line(tmp_path):
    folder = tree(tmp_path / "in", **{"a.bin": "1", "b.bin": "2"})
    resume = tmp_path / "resume.jsonl"
    map_files(size, folder, resume=resume, jobs=1)
    whole = resume.read_bytes()
    for lost in (1, 20, len(whole.splitlines()[1]) - 3, len(whole.splitlines()[1])):
        resume.write_bytes(whole[:-lost])
        report = map_files(size, folder, resume=resume, jobs=1)
        assert (report.done, report.skipped) == (1, 1)
        assert resume.read_bytes() == whole


@pytest.mark.parametrize("content", [b"LASF\1\2\xff", b'{"a": 1}', b'{"a": 1}\n', b"[]\n", b"1\n", b"\n", b"\xff\n"])
def test_a_file_of_another_kind_is_not_written_to(tmp_path, content):
    other = tmp_path / "a.las"
    other.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.las was not written by map_files, so nothing is added to it"):
        map_files(size, tmp_path, resume=other, jobs=1)
    assert other.read_bytes() == content


@pytest.mark.skipif(WINDOWS, reason="no process groups")
@pytest.mark.parametrize("jobs", [1, 2])
def test_interrupt_and_resume(tmp_path, jobs):
    script = """
        import sys, time
        from pathlib import Path
        from gpu3d.batch import map_files

        def copy(path, target):
            target.write_bytes(path.read_bytes())
            time.sleep(float(sys.argv[1]))

        if __name__ == "__main__":
            jobs = int(sys.argv[2])
            try:
                report = map_files(copy, "in", out="out", resume="resume.jsonl", jobs=jobs)
            except KeyboardInterrupt:
                sys.exit(130)
            print(report.done, report.skipped, len(report.failures))
    """
    tree(tmp_path / "in", **{f"{i}.bin": str(i) for i in range(40)})
    resume = tmp_path / "resume.jsonl"
    process = run_script(tmp_path, script, "0.1", str(jobs), cwd=tmp_path)
    end = time.monotonic() + 20
    while (not resume.exists() or resume.read_text().count("\n") < 4) and time.monotonic() < end:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    error = process.communicate(timeout=20)[1]
    assert (process.returncode, error) == (130, "")
    assert_no_process_is_left(process.pid)
    finished = {Path(json.loads(line)["path"]).name for line in resume.read_text().splitlines()}
    assert 4 <= len(finished) < 40
    written = contents(tmp_path / "out")
    assert finished <= written.keys() <= {f"{i}.bin" for i in range(40)}  # no part of a file
    assert len(written) <= len(finished) + jobs
    assert all(written[name] == name.removesuffix(".bin") for name in written)

    process = run_script(tmp_path, script, "0", str(jobs), cwd=tmp_path, stdout=subprocess.PIPE)
    output, error = process.communicate(timeout=20)
    assert (output.split(), error) == ([str(40 - len(finished)), str(len(finished)), "0"], "")
    assert len(contents(tmp_path / "out")) == 40


@pytest.mark.skipif(WINDOWS, reason="no process groups")
def test_no_process_is_left_when_the_parent_is_killed(tmp_path):
    script = """
        import sys, time
        from gpu3d.batch import imap_files

        def wait(path):
            time.sleep(0.2)

        if __name__ == "__main__":
            for _ in imap_files(wait, [__file__] * 1000, jobs=2):
                print("one", flush=True)
    """
    process = run_script(tmp_path, script, stdout=subprocess.PIPE)
    assert process.stdout.readline() == "one\n"
    process.kill()
    process.communicate(timeout=20)
    assert_no_process_is_left(process.pid)


# ---- progress --------------------------------------------------------------------------------------------------------


def test_no_bar_without_terminal(tmp_path, capfd):
    map_files(size, tree(tmp_path, **{"a.bin": ""}), jobs=1)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("progress", [True, False])
def test_bar_on_a_terminal(tmp_path, monkeypatch, capsys, progress):
    folder = tree(tmp_path / "in", **{"a.bin": "good", "b.bin": "bad"})
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    map_files(copy_or_fail, folder, out=tmp_path / "out", jobs=1, progress=progress)
    drawn = capsys.readouterr().err
    assert ("2/2" in drawn and "failed=1" in drawn) if progress else drawn == ""


# ---- Dask ------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("default")  # of Dask's own
def test_dask(tmp_path):
    distributed = pytest.importorskip("distributed")
    how = {f"{i}.bin": "bad" if i % 10 == 0 else "good" for i in range(40)}
    folder = tree(tmp_path / "in", **how)
    resume = tmp_path / "resume.jsonl"
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        report = map_files(copy_or_fail, folder, out=tmp_path / "out", resume=resume, client=client)
        assert (report.done, report.skipped, len(report.failures)) == (36, 0, 4)
        assert {failed.error for failed in report.failures} == {"ValueError: this scan is bad"}
        assert contents(tmp_path / "out") == {name: text for name, text in how.items() if text == "good"}
        report = map_files(copy_or_fail, folder, out=tmp_path / "out", resume=resume, client=client)
        assert (report.done, report.skipped, len(report.failures)) == (0, 36, 4)

        read = 0

        def paths():
            nonlocal read
            for path in sorted(folder.iterdir()):
                read += 1
                yield path

        results = imap_files(size, paths(), client=client)
        assert next(results).value in (3, 4) and read <= 2 * 2 + 1
        assert len(list(results)) == 39

        (folder / "0.bin").write_text("exit")
        results = list(imap_files(die, [folder / "0.bin", folder / "1.bin"], client=client))
        assert {result.path.name: isinstance(result, Failed) for result in results} == {"0.bin": True, "1.bin": False}
        assert "KilledWorker" in next(result.error for result in results if isinstance(result, Failed))


def test_a_dask_array_itself_is_refused():
    da = pytest.importorskip("dask.array")
    points = da.zeros((100, 3), chunks=(50, 3), dtype=np.float32)
    with pytest.raises(TypeError, match=r"points is a Dask collection.*points\.compute\(\).*map_blocks"):
        gpu3d.bucketize(points)
    blocks = points.map_blocks(lambda block: gpu3d.normals(block).normals, dtype=np.float32)
    assert blocks.compute(scheduler="synchronous").shape == (100, 3)


def test_dask_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ImportError, match=r'client= needs Dask: pip install "gpu3d\[dask\]"'):
        map_files(size, tree(tmp_path, **{"a.bin": ""}), client=object())
