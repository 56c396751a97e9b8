# SPDX-License-Identifier: Apache-2.0
"""Many files through one function, on several processes.

`map_files` runs a function on every scan of a folder and reports which failed. `imap_files` yields what it returns.
A worker process has one file at a time, so the parent knows which file a dead worker had, and waits for no other.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import pickle
import signal
import stat
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, field
from importlib import import_module
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from gpu3d.io.files import SCANS

__all__ = ["Done", "Failed", "Report", "imap_files", "map_files"]


@dataclass(frozen=True)
class Done:
    """A file that went through the function."""

    path: Path
    value: Any  # what the function returned
    seconds: float  # that the function took
    target: Path | None = None  # the file that was written, with `out`


@dataclass(frozen=True)
class Failed:
    """A file that did not."""

    path: Path
    error: str  # the type of the exception and its text, or how the worker died
    traceback: str = field(default="", repr=False)


@dataclass(frozen=True)
class Report:
    """What came of all files."""

    done: int
    skipped: int  # done by an earlier run, says the file `resume`
    failures: list[Failed]
    seconds: float


def map_files(
    function: Callable[..., Any],
    files: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    out: str | os.PathLike[str] | None = None,
    to: str | None = None,
    endings: Sequence[str] | None = None,
    jobs: int | None = None,
    retries: int = 0,
    devices: Sequence[int | str] | None = None,
    client: Any = None,
    resume: str | os.PathLike[str] | None = None,
    each: Callable[[Done | Failed], Any] | None = None,
    progress: bool = True,
) -> Report:
    """Run a function on many files, and report which failed.

    An exception fails its own file only. If a worker process dies, its file fails and another worker takes its place.
    After Ctrl-C, or an exception of the iterable, no worker is left running.

    Parameters
    ----------
    function : callable
        ``function(path)``, or with ``out``: ``function(path, target)``, which must write the file ``target``. Both are
        of type Path. What it returns goes to ``each``, and is dropped without it.

        Workers import the function by its name. So it stands at the top level of a module or a script, and a script
        calls `map_files` below ``if __name__ == "__main__":``. To pass more arguments, use ``functools.partial``.
    files : path, or iterable of paths
        A folder stands for all files below it whose names have one of ``endings``. Names that begin with a dot are left
        out, and so is everything below ``out``. Links to files are followed, and links to folders are not.

        An iterable is read as workers become free, or with ``out``, before the first file.
    out : path, optional
        The folder that targets are written to. It gets the tree of the folder ``files``, or the tree that the paths of
        an iterable have below their common folder. The function writes to a temporary name beside the target, which is
        renamed at the end. So every file with the name of a target is whole. Targets of earlier runs are replaced.
    to : str, optional
        The ending of the targets, as ``".laz"``. Default: that of the input.
    endings : sequence of str, optional
        The endings of files to take from a folder, in any case. Default: those that `gpu3d.io` reads, but .label, .txt
        and .csv.
    jobs : int, optional
        Number of worker processes. 1 runs the function in this process: it is easier to debug and need not be
        importable, but a crash ends the run. Default: the number of CPUs that this process may use, or of ``devices``.

        Libraries that use OpenMP or BLAS get one thread a worker, unless the variable OMP_NUM_THREADS is set.
    retries : int, default 0
        How often a file is tried again after its worker died. Exceptions are not tried again.
    devices : sequence of int or str, optional
        GPUs, as this process numbers them, or UUIDs. Worker i sees only GPU ``devices[i % len(devices)]``, as GPU 0. It
        is a process of its own even with ``jobs=1``.
    client : dask.distributed.Client, optional
        Run on Dask's workers instead. They must see the files under the same paths, so pass absolute ones to other
        machines.
    resume : path, optional
        A file that gets a line for each finished file, at once. Files that it names are skipped if their size and time
        of change are the same and their target exists. Failed files are tried again. Use one such file for each
        function and each ``out``.
    each : callable, optional
        Called in this process with what came of each file, as it ends: a `Done`, which has what the function returned,
        or a `Failed`. An exception of it ends the run.
    progress : bool, default True
        Show a bar on stderr if that is a terminal.

    Returns
    -------
    Report
        ``done`` and ``skipped`` (numbers of files), ``failures`` (for each ``path``, ``error`` and ``traceback``) and
        ``seconds``.

    Raises
    ------
    ValueError
        Two inputs would be written to one target, or a target is an input. Nothing has run then.
    TypeError
        The function cannot be sent to workers. Nothing has run then.
    RuntimeError
        A worker could not start.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import numpy as np
    >>> from gpu3d.batch import map_files
    >>> def thin(path, target):
    ...     np.save(target, np.load(path)[::10])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Path(folder, "scans").mkdir()
    ...     for i in range(3):
    ...         np.save(f"{folder}/scans/{i}.npy", np.zeros((1000, 3)))
    ...     report = map_files(thin, f"{folder}/scans", out=f"{folder}/thin", jobs=1)
    ...     np.load(f"{folder}/thin/2.npy").shape
    (100, 3)
    >>> report.done, report.failures
    (3, [])
    """
    begin = time.perf_counter()
    run = _runner(function, jobs, retries, devices, client, keep=each is not None)
    tasks, total = _tasks(files, out, to, endings)
    finished = {} if resume is None else _read_finished(Path(resume))
    done, skipped, failures = 0, 0, []

    def unfinished() -> Iterator[_Task]:
        nonlocal skipped
        for task in tasks:
            if _is_finished(task, finished):
                skipped += 1
                bar.update()
            else:
                yield task

    with (
        contextlib.nullcontext() if resume is None else open(resume, "a", encoding="utf-8") as record,
        tqdm(total=total, unit="file", disable=None if progress else True) as bar,  # None: where there is no terminal
        contextlib.closing(run(unfinished())) as results,
    ):
        for outcome, stamp in results:
            if isinstance(outcome, Failed):
                failures.append(outcome)
                bar.set_postfix(failed=len(failures), refresh=False)
            else:
                done += 1
                if record is not None:
                    record.write(_finished_line(outcome, stamp))
                    record.flush()
            bar.update()
            if each is not None:
                each(outcome)
    return Report(done, skipped, failures, time.perf_counter() - begin)


def imap_files(
    function: Callable[..., Any],
    files: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    out: str | os.PathLike[str] | None = None,
    to: str | None = None,
    endings: Sequence[str] | None = None,
    jobs: int | None = None,
    retries: int = 0,
    devices: Sequence[int | str] | None = None,
    client: Any = None,
) -> Iterator[Done | Failed]:
    """Run a function on many files, and yield what came of each, in the order in which they end.

    No more than one result a worker is waiting, so memory does not grow with the number of files. Leaving the loop ends
    the workers.

    Parameters
    ----------
    function, files, out, to, endings, jobs, retries, devices, client
        As in `map_files`.

    Yields
    ------
    Done or Failed
        ``Done`` has ``path``, ``value`` (what the function returned), ``seconds`` and ``target``. ``Failed`` has
        ``path``, ``error`` and ``traceback``.

    Raises
    ------
    ValueError, TypeError, RuntimeError
        As in `map_files`.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from gpu3d.batch import Failed, imap_files
    >>> from gpu3d.io import read_points
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.save(f"{folder}/good.npy", np.zeros((1000, 3)))
    ...     np.save(f"{folder}/bad.npy", np.zeros(1000))
    ...     for result in imap_files(read_points, folder, jobs=1):
    ...         print(result.path.name, "failed" if isinstance(result, Failed) else result.value.shape)
    bad.npy failed
    good.npy (1000, 3)
    """
    run = _runner(function, jobs, retries, devices, client, keep=True)
    tasks, _ = _tasks(files, out, to, endings)
    return (outcome for outcome, _ in run(tasks))


# ---- which files, and where their targets go -------------------------------------------------------------------------


class _Task(NamedTuple):
    path: Path
    target: Path | None = None


def _tasks(files: Any, out: Any, to: str | None, endings: Sequence[str] | None) -> tuple[Iterator[_Task], int | None]:
    """The tasks, and their number if it is known."""
    if endings is None:
        endings = SCANS
    endings = tuple(ending.lower() for ending in ([endings] if isinstance(endings, str) else endings))
    for ending in endings if to is None else (*endings, to):
        if not ending.startswith("."):
            raise ValueError(f"an ending begins with a dot, got {ending!r}: pass {'.' + ending!r}")
    if to is not None and out is None:
        raise ValueError(f"to={to!r} is the ending of targets, and there are none: pass the folder out= too")

    if isinstance(files, str | bytes | os.PathLike):
        root = _path(files)
        if not root.is_dir():
            raise NotADirectoryError(
                f"files must be a folder or an iterable of paths, got {root}: put one file in a list"
            )
        paths = list(_walk(root, endings, None if out is None else os.path.realpath(out)))
    elif out is None:
        return (_Task(_path(file)) for file in files), len(files) if isinstance(files, Sized) else None
    else:
        paths = [_path(file) for file in files]
        root = Path(os.path.commonpath([os.path.abspath(path.parent) for path in paths])) if paths else Path()
    if out is None:
        return map(_Task, paths), len(paths)
    tasks = [
        _Task(path, _path(out) / Path(os.path.relpath(path.parent, root), _with_ending(path.name, to, endings)))
        for path in paths
    ]
    _check_targets(tasks)
    return iter(tasks), len(tasks)


def _path(file: Any) -> Path:
    return Path(os.fsdecode(file))


def _walk(root: Path, endings: tuple[str, ...], out: str | None) -> Iterator[Path]:
    def stop(error: OSError) -> None:
        raise error  # os.walk would leave out a folder that cannot be read, and say nothing

    for folder, folders, names in os.walk(root, onerror=stop):
        folders[:] = sorted(
            name for name in folders if name[0] != "." and (out is None or os.path.realpath(Path(folder, name)) != out)
        )
        # Pipes and links to nothing stay in: a scan that is missing shall be reported.
        yield from (Path(folder, name) for name in sorted(names) if name[0] != "." and name.lower().endswith(endings))


def _with_ending(name: str, to: str | None, endings: tuple[str, ...]) -> str:
    if to is None:
        return name
    own = max((ending for ending in endings if name.lower().endswith(ending)), key=len, default=Path(name).suffix)
    return name[: len(name) - len(own)] + to


def _check_targets(tasks: list[_Task]) -> None:
    real = functools.cache(os.path.realpath)

    def place(path: Path) -> str:  # where a new file of this name would be, whatever links lead there
        return os.path.normcase(os.path.join(real(path.parent), path.name))

    inputs = {place(task.path) for task in tasks} | {os.path.normcase(os.path.realpath(task.path)) for task in tasks}
    taken: dict[str, Path] = {}
    for path, target in tasks:
        if target is None:
            continue
        where = place(target)
        if where in inputs:
            raise ValueError(
                f"{target} is an input itself, and an input is never overwritten: "
                "pass another folder out=, or another ending to="
            )
        if where in taken:
            raise ValueError(
                f"{taken[where]} and {path} would both be written to {target}: "
                "pass each path once, and files that differ only in their ending apart"
            )
        taken[where] = path


# ---- one file --------------------------------------------------------------------------------------------------------

_Result = tuple[Done | Failed, tuple[int, int]]  # with the size and the time of change that the file had before


def _attempt(function: Callable[..., Any], keep: bool, task: _Task) -> _Result:
    begin = time.perf_counter()
    try:
        status = os.stat(task.path)
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            raise ValueError("a pipe or a device, which could keep its reader waiting for ever: copy it to a file")
        if task.target is None:
            value = function(task.path)
        else:
            _remove_part(task)  # of a run that was killed
            task.target.parent.mkdir(parents=True, exist_ok=True)
            part = _part(task.target)
            value = function(task.path, part)
            if not part.exists():
                raise FileNotFoundError("the function did not write the file target, its second argument")
            os.replace(part, task.target)
    except KeyboardInterrupt:
        _remove_part(task)
        raise
    except BaseException as error:  # sys.exit() and panics of Rust too, which are no Exception
        _remove_part(task)
        return Failed(task.path, f"{type(error).__name__}: {error}", traceback.format_exc()), (0, 0)
    done = Done(task.path, value if keep else None, time.perf_counter() - begin, task.target)
    return done, (status.st_size, status.st_mtime_ns)


def _part(target: Path) -> Path:
    """What the function writes: hidden, short enough for any name, with the ending by which writers choose a format."""
    digest = hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]
    return target.with_name(f".part-{digest}-{target.name[-12:]}")


def _remove_part(task: _Task) -> None:
    if task.target is not None:
        with contextlib.suppress(OSError):  # mostly because it is not there
            _part(task.target).unlink()


# ---- where it runs ---------------------------------------------------------------------------------------------------


def _runner(
    function: Callable[..., Any],
    jobs: int | None,
    retries: int,
    devices: Sequence[int | str] | None,
    client: Any,
    keep: bool,
) -> Callable[[Iterator[_Task]], Any]:
    """What turns tasks into results, lazily; its arguments are checked here, before anything runs."""
    if client is not None:
        if jobs is not None or retries or devices is not None:
            raise ValueError("jobs, retries and devices are for a pool of processes: set up Dask's workers instead")
        return functools.partial(_on_dask, client, function, keep)
    if devices is not None and (isinstance(devices, int | str) or not devices):
        raise ValueError(f"devices must be a list of GPUs, got {devices!r}: pass [0] for the first")
    if jobs is None:
        jobs = _usable_cpus() if devices is None else len(devices)
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}: leave it out to use all CPUs")
    if retries < 0:
        raise ValueError(f"retries must be at least 0, got {retries}: 0 tries a file once")
    names = _visible(devices)
    if jobs == 1 and devices is None:
        return functools.partial(_in_turn, function, keep)
    try:
        pickle.dumps(function)
    except Exception as error:  # pickle raises errors of many kinds
        raise TypeError(
            f"the function cannot be sent to workers ({error}): define it with def at the top level of a module or "
            "script, pass arguments by functools.partial, or pass jobs=1"
        ) from error
    return functools.partial(_on_pool, function, keep, jobs, retries, names)


def _in_turn(function: Callable[..., Any], keep: bool, tasks: Iterator[_Task]) -> Iterator[_Result]:
    for task in tasks:
        yield _attempt(function, keep, task)


def _usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _visible(devices: Sequence[int | str] | None) -> list[str]:
    """The values of CUDA_VISIBLE_DEVICES. Where it is set already, GPU i of this process is the i-th that it names."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    known = None if seen is None else [name.strip() for name in seen.split(",") if name.strip()]
    names = []
    for device in devices or ():
        if isinstance(device, str) or known is None:
            names.append(str(device))
        elif 0 <= device < len(known):
            names.append(known[device])
        else:
            raise ValueError(
                f"devices has {device}, and this process sees {len(known)} GPUs: CUDA_VISIBLE_DEVICES is {seen!r}"
            )
    return names


@dataclass
class _Worker:
    process: BaseProcess
    slot: int
    task: _Task
    retries: int  # left for this task
    started: bool = False


def _on_pool(
    function: Callable[..., Any], keep: bool, jobs: int, retries: int, devices: list[str], tasks: Iterator[_Task]
) -> Iterator[_Result]:
    context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
    workers: dict[Any, _Worker] = {}  # by the connection to each
    retired = []

    def start(slot: int, task: _Task, retries: int) -> None:
        connection, other_end = context.Pipe()
        # Daemon: ended with this process at the latest, should nobody close this generator.
        process = context.Process(target=_work, args=(other_end, function, keep), daemon=True)
        # Libraries read these at their import, and a worker imports the main script before it runs anything of ours.
        variables = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        if devices:
            variables["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
        with _environment(variables):
            process.start()
        other_end.close()  # the worker alone holds it now, so its death ends the connection
        workers[connection] = _Worker(process, slot, task, retries)
        _send(connection, task)

    try:
        for slot, task in zip(range(jobs), tasks, strict=False):
            start(slot, task, retries)
        while workers:
            ready: list[Any] = wait(list(workers))
            for connection in ready:
                worker = workers[connection]
                try:
                    message = connection.recv_bytes()
                except (EOFError, OSError):
                    del workers[connection]
                    connection.close()
                    cause = _cause_of_death(worker.process)
                    _remove_part(worker.task)
                    if not worker.started:
                        raise RuntimeError(
                            f"a worker could not start: {cause}. What it printed is on stderr. The function must be in "
                            'a module or script, and a script must call this below if __name__ == "__main__":'
                        ) from None
                    if worker.retries:
                        start(worker.slot, worker.task, worker.retries - 1)
                        continue
                    for task in itertools.islice(tasks, 1):
                        start(worker.slot, task, retries)
                    yield Failed(worker.task.path, cause), (0, 0)
                    continue
                if message == _STARTED:
                    worker.started = True
                    continue
                following = next(tasks, None)
                if following is None:
                    del workers[connection]
                    connection.close()  # which ends the worker
                    retired.append(worker.process)
                else:  # before the result is handed on, so that the worker does not wait for who takes it
                    worker.task, worker.retries = following, retries
                    _send(connection, following)
                yield pickle.loads(message)
    finally:
        for worker in workers.values():
            worker.process.kill()
        for process in retired + [worker.process for worker in workers.values()]:
            _join(process)
        for connection, worker in workers.items():
            connection.close()
            _remove_part(worker.task)


_STARTED = b""


def _work(connection: Any, function: Callable[..., Any], keep: bool) -> None:
    """What a worker process does, until its parent closes the connection or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all; the parent ends its workers itself
    with contextlib.suppress(EOFError, OSError):
        connection.send_bytes(_STARTED)
        while True:
            task = pickle.loads(connection.recv_bytes())
            result = _attempt(function, keep, task)
            try:
                message = pickle.dumps(result)
            except Exception as error:
                text = f"{type(error).__name__}: the returned value cannot be sent to the parent: {error}"
                message = pickle.dumps((Failed(task.path, text, traceback.format_exc()), (0, 0)))
            connection.send_bytes(message)


def _send(connection: Any, task: _Task) -> None:
    with contextlib.suppress(OSError):  # a worker that has died meanwhile shows at the next read
        connection.send_bytes(pickle.dumps(task))


def _join(process: BaseProcess) -> None:
    process.join(5)
    process.kill()  # threads or libraries of the function can keep a process from its end; else this does nothing
    process.join()


def _cause_of_death(process: BaseProcess) -> str:
    _join(process)
    code = process.exitcode
    if code is None or code >= 0:
        return f"the worker process ended with exit code {code}"
    name = next((known.name for known in signal.Signals if known == -code), f"signal {-code}")
    hint = ", perhaps for want of memory: pass fewer jobs" if name == "SIGKILL" else ""
    return f"the worker process was killed by {name}{hint}"


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _on_dask(client: Any, function: Callable[..., Any], keep: bool, tasks: Iterator[_Task]) -> Iterator[_Result]:
    try:
        distributed = import_module("distributed")
    except ImportError as error:
        raise ImportError('client= needs Dask: pip install "gpu3d[dask]"') from error
    running: dict[Any, _Task] = {}
    completed = distributed.as_completed(loop=client.loop)

    def fill() -> None:
        # Asked each time, because workers of a cluster come and go.
        room = 2 * max(1, sum(client.nthreads().values())) - len(running)
        for task in itertools.islice(tasks, max(0, room)):
            future = client.submit(_attempt, function, keep, task, pure=False)
            running[future] = task
            completed.add(future)

    try:
        fill()
        for future in completed:
            task = running.pop(future)
            try:
                result = future.result()
            except Exception as error:  # of Dask: a worker died, or the value cannot be sent
                _remove_part(task)
                result = Failed(task.path, f"{type(error).__name__}: {error}", traceback.format_exc()), (0, 0)
            fill()
            yield result
    finally:
        if client.status == "running":  # a client that was closed has given them up already
            client.cancel(list(running))


# ---- the file of finished files --------------------------------------------------------------------------------------

_LINE_BEGIN = b'{"path": '  # so that no other file is cut


def _finished_line(done: Done, stamp: tuple[int, int]) -> str:
    target = None if done.target is None else os.path.abspath(done.target)
    line = {"path": os.path.abspath(done.path), "size": stamp[0], "mtime_ns": stamp[1], "target": target}
    return json.dumps(line) + "\n"  # ASCII, whatever bytes a name has


def _read_finished(resume: Path) -> dict[str, tuple[int, int, str | None]]:
    """Size, time of change and target of each finished file. A last line without an end is cut off."""
    if not resume.exists():
        return {}
    finished = {}
    *lines, torn = resume.read_bytes().split(b"\n")
    try:
        for line in lines:
            entry = json.loads(line)
            finished[entry["path"]] = entry["size"], entry["mtime_ns"], entry["target"]
        if not (torn.startswith(_LINE_BEGIN) or _LINE_BEGIN.startswith(torn)):
            raise ValueError("the last line is of another kind")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{resume} was not written by map_files, so nothing is added to it: name a new file"
        ) from error
    if torn:  # the process was killed while it wrote
        os.truncate(resume, resume.stat().st_size - len(torn))
    return finished


def _is_finished(task: _Task, finished: dict[str, tuple[int, int, str | None]]) -> bool:
    entry = finished.get(os.path.abspath(task.path)) if finished else None
    if entry is None:
        return False
    try:
        status = os.stat(task.path)
    except OSError:
        return False  # the function's attempt reports it
    target = None if task.target is None else os.path.abspath(task.target)
    return entry == (status.st_size, status.st_mtime_ns, target) and (task.target is None or task.target.exists())
