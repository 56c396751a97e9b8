# SPDX-License-Identifier: Apache-2.0
"""Parameters and config in one file of the safetensors format, which any safetensors reader opens.

The file is the length of the header (8 bytes, little-endian), the header in JSON, and the float32 values of all tensors
one after another. The config stands in the header's metadata. The format is simple enough to be read and written here,
so that saving a model needs no further package. `Trainer` writes the moments of the optimizer into the same file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gpu3d import _arrays
from gpu3d.flash3d.config import Config
from gpu3d.flash3d.data import Task, default_task
from gpu3d.flash3d.params import check_fit, check_params, pack

CONFIG = "gpu3d.flash3d"  # the metadata's key for the config
TASK = "gpu3d.flash3d.task"
OPTIMIZER = "optimizer."  # begins the names of tensors that are no parameters
LENGTH_BYTES = 8  # of the header's length


def save(path: str | os.PathLike[str], params: dict[str, Any], config: Config, *, task: Task | None = None) -> None:
    """Write parameters and their config to a file.

    The file is written beside `path` first and then moved there, so `path` holds either the old file or the whole new
    one, also after a crash or on a full disk.

    Parameters
    ----------
    path : str or path-like
        Usually with the ending .safetensors. A file of this name is replaced.
    params : dict
        As `init` returns them, or arrays by path, like the state_dict of `gpu3d.interop.torch.Flash3D`. Arrays of any
        library, stored as float32. Copying from a GPU synchronizes.
    config : Config
        The config of the params.
    task : Task, optional
        What the features are, what the classes are called, and how scans were thinned. `gpu3d segment` reads it.

    Raises
    ------
    TypeError, ValueError
        The params or the task do not fit the config; the first mismatch is named.
    OSError
        The file cannot be written.

    Examples
    --------
    >>> import tempfile
    >>> from gpu3d import flash3d
    >>> config = flash3d.presets["tiny"]
    >>> params = flash3d.init(config)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     flash3d.save(f"{folder}/tiny.safetensors", params, config)
    ...     loaded, loaded_config = flash3d.load(f"{folder}/tiny.safetensors")
    >>> loaded_config == config, bool((loaded["stem"]["weight"] == params["stem"]["weight"]).all())
    (True, True)
    """
    metadata = {CONFIG: json.dumps(dataclasses.asdict(config))}
    if task is not None:
        task.check(config)
        metadata[TASK] = json.dumps(dataclasses.asdict(task))
    write(path, check_params(params, config), metadata)


def write(path: str | os.PathLike[str], arrays: dict[str, Any], metadata: dict[str, str]) -> None:
    """Write tensors, as float32, and metadata. `path` holds the old file until the new one is whole."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, array in arrays.items():
        begin, end = end, end + 4 * math.prod(array.shape)
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the values are aligned
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
            for name, array in arrays.items():
                file.write(_arrays.download(_arrays.read(array, name)).astype("<f4").tobytes())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:  # an interrupt, too
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def load(path: str | os.PathLike[str]) -> tuple[dict[str, Any], Config]:
    """Read what `save` or `Trainer.save` wrote.

    Parameters
    ----------
    path : str or path-like

    Returns
    -------
    params : dict
        Like those of `init`, as NumPy arrays.
    config : Config

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        The file is truncated, is not one that `save` wrote, or its tensors do not fit its config; the first mismatch is
        named.

    Examples
    --------
    >>> import tempfile
    >>> from gpu3d import flash3d
    >>> config = flash3d.presets["tiny"].replace(classes=7)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     flash3d.save(f"{folder}/tiny.safetensors", flash3d.init(config), config)
    ...     params, loaded_config = flash3d.load(f"{folder}/tiny.safetensors")
    >>> params["head"]["weight"].shape, loaded_config.classes
    ((7, 32), 7)
    """
    with reading(path) as (arrays, metadata):
        config = config_of(metadata)
        weights = {name: array for name, array in arrays.items() if not name.startswith(OPTIMIZER)}
        check_fit(weights, config)
        return pack(weights, config, np.float32), config


def load_task(path: str | os.PathLike[str]) -> Task:
    """The task that `save` wrote beside the parameters.

    Parameters
    ----------
    path : str or path-like

    Returns
    -------
    Task
        If `save` was given none: coordinates as features if there are 3 of them, coordinates and intensity if there
        are 4, numbers as names of the classes, and no thinning.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        As in `load`, or the file has no task and its features are neither 3 nor 4.

    Examples
    --------
    >>> import tempfile
    >>> from gpu3d import flash3d
    >>> config = flash3d.presets["tiny"].replace(classes=2)
    >>> task = flash3d.Task(features=("x", "y", "z", "intensity"), classes=("ground", "other"), voxel=0.2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     flash3d.save(f"{folder}/tiny.safetensors", flash3d.init(config), config, task=task)
    ...     flash3d.load_task(f"{folder}/tiny.safetensors") == task
    True
    """
    with reading(path) as (_, metadata):
        config = config_of(metadata)
        if TASK not in metadata:
            return default_task(config)
        task = Task(**json.loads(metadata[TASK]))
        task.check(config)
        return task


@contextlib.contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[tuple[dict[str, np.ndarray], dict[str, str]]]:
    """The tensors of a file, and its metadata. Errors about what they hold name the file."""
    content = Path(path).read_bytes()
    try:
        header, data = _split(content)
        metadata = header.pop("__metadata__", {})
        yield {name: _tensor(name, entry, data) for name, entry in header.items()}, metadata
    except (TypeError, ValueError) as error:
        raise ValueError(f"cannot load {os.fspath(path)}: {error}") from error


def _split(content: bytes) -> tuple[dict[str, Any], memoryview]:
    """The header, and the bytes of the tensors, of which none may be missing or left over."""
    start = content[: LENGTH_BYTES + 1]
    if len(start) <= LENGTH_BYTES or start[-1:] != b"{":
        raise ValueError("it is no safetensors file, which begins with the length of its header and a header in JSON.")
    begin = LENGTH_BYTES + int.from_bytes(start[:LENGTH_BYTES], "little")
    if begin > len(content):
        raise ValueError(f"it is truncated: its header ends at byte {begin}, the file at byte {len(content)}.")
    header, data = json.loads(content[LENGTH_BYTES:begin]), memoryview(content)[begin:]
    try:
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    except (IndexError, KeyError):
        raise ValueError("it is no safetensors file: a tensor of its header has no data_offsets.") from None
    if end > len(data):
        raise ValueError(f"it is truncated: its tensors end at byte {begin + end}, the file at byte {len(content)}.")
    if end < len(data):
        raise ValueError(f"it holds {len(data) - end} bytes behind its last tensor, so it is damaged.")
    return header, data


def config_of(metadata: dict[str, str]) -> Config:
    """The config in the metadata of a file."""
    if CONFIG not in metadata:
        raise ValueError(f"flash3d.save did not write it, because its metadata has no {CONFIG!r}.")
    fields, known = json.loads(metadata[CONFIG]), {field.name for field in dataclasses.fields(Config)}
    for name in fields:
        if name not in known:
            raise ValueError(
                f"its config has a field {name!r}, which this release of gpu3d does not know: update gpu3d."
            )
    return Config(**fields)


def _tensor(name: str, entry: dict[str, Any], data: memoryview) -> np.ndarray:
    dtype, shape, (begin, end) = entry.get("dtype"), entry.get("shape", []), entry["data_offsets"]
    size = 4 * math.prod(shape)
    if dtype != "F32" or end - begin != size:
        raise ValueError(f"{name} of shape {shape} must be F32 in {size} bytes, got {dtype} in {end - begin} bytes.")
    return np.frombuffer(data[begin:end], "<f4").reshape(shape)
