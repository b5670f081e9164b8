"""Checkpoints of a fit: one file, written atomically, with checksums that are verified when it is read."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import types
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .._files import previous, write_whole

_FORMAT = 1


def fingerprint(params: Mapping[str, Any], *arrays: Any) -> str:
    """A digest of settings and data, by which a checkpoint is matched to its fit."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps({k: _name(v) for k, v in sorted(params.items())}).encode())
    for array in arrays:
        for part in (array.data, array.indices, array.indptr) if hasattr(array, "indptr") else (array,):
            if part is None:
                digest.update(b"none")
                continue
            part = np.ascontiguousarray(part)
            digest.update(f"{part.shape}{part.dtype}".encode())
            digest.update(part.data if part.size else b"")
    return digest.hexdigest()


def details(params: Mapping[str, Any]) -> dict[str, str]:
    """Digests of the settings whose ``repr`` does not identify them: functions, objects with functions, generators.

    A function is identified by its bytecode, constants, defaults and closure. The bytecode, and so the digest, may
    differ between versions of Python.
    """
    return {
        name: hashlib.blake2b(repr(_content(value, set())).encode(), digest_size=8).hexdigest()
        for name, value in sorted(params.items())
        if callable(value) or " at 0x" in repr(value)
    }


def _content(value: Any, seen: set[int]) -> Any:
    """The content of a value as nested tuples of plain values, equal in every process."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | type):
        return repr(value)
    if id(value) in seen:
        return "seen before"
    seen = seen | {id(value)}
    if isinstance(value, np.ndarray | np.generic):
        return (str(value.dtype), value.shape, hashlib.blake2b(np.ascontiguousarray(value).tobytes()).hexdigest())
    if isinstance(value, Mapping):
        return tuple((_content(k, seen), _content(v, seen)) for k, v in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        parts = [_content(part, seen) for part in value]
        return tuple(sorted(map(repr, parts)) if isinstance(value, set | frozenset) else parts)
    if isinstance(value, types.CodeType):
        return (value.co_code, value.co_names, _content(value.co_consts, seen))
    if isinstance(value, types.FunctionType):
        cells = [_cell(cell) for cell in value.__closure__ or ()]
        return tuple(_content(part, seen) for part in (value.__code__, value.__defaults__, value.__kwdefaults__, cells))
    if isinstance(value, types.MethodType):
        return (_content(value.__func__, seen), _content(value.__self__, seen))
    if isinstance(value, functools.partial):
        return tuple(_content(part, seen) for part in (value.func, value.args, value.keywords))
    if isinstance(value, np.random.RandomState):
        return _content(value.get_state(legacy=False), seen)
    if isinstance(value, np.random.Generator):
        return _content(value.bit_generator.state, seen)
    name = getattr(value, "__qualname__", type(value).__qualname__)
    return (type(value).__module__, name, _content(getattr(value, "__dict__", {}), seen))


def _cell(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # an empty cell
        return None


def _name(value: Any) -> str:
    """A text for a setting that is equal in every process: its repr, or a qualified name if that has an address."""
    text = repr(value)
    if " at 0x" not in text:
        return text
    return f"{type(value).__module__}.{getattr(value, '__qualname__', type(value).__qualname__)}"


def save(path: Path, meta: Mapping[str, Any], arrays: Mapping[str, Any]) -> None:
    """Writes the checkpoint; the previous one is kept as ``<name>.previous``."""
    body = io.BytesIO()
    np.savez(body, **arrays)
    data = body.getvalue()
    head = json.dumps({**meta, "format": _FORMAT, "digest": hashlib.blake2b(data).hexdigest()}).encode()
    check = hashlib.blake2b(head, digest_size=16).digest()
    write_whole(path, lambda file: file.write(len(head).to_bytes(8, "little") + check + head + data))


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    head, data = raw[24 : 24 + size], raw[24 + size :]
    if len(head) != size or hashlib.blake2b(head, digest_size=16).digest() != raw[8:24]:
        raise ValueError("its header is damaged")
    meta = json.loads(head)
    if meta["format"] != _FORMAT:
        raise ValueError(f"its format {meta['format']} is unknown to this version")
    if hashlib.blake2b(data).hexdigest() != meta["digest"]:
        raise ValueError("its data are damaged")
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return meta, dict(arrays)


def load(path: Path, mark: str, wanted: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The checkpoint of the fit with this fingerprint and these details, or None if there is no file.

    If the file is damaged, warns, renames it and returns the previous checkpoint.

    Raises:
        ValueError: both files are damaged, or the file belongs to another fit. The files are left as they are.
    """
    problems = []
    for candidate in (path, previous(path)):
        if not candidate.exists():
            continue
        try:
            meta, arrays = _read(candidate)
        except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
            problems.append(f"{candidate}: {error}")
            continue
        if meta["fingerprint"] != mark:
            raise ValueError(
                f"checkpoint: {candidate} was written by a fit with other settings or other data; "
                "give another path, or delete it to start over"
            )
        found = meta.get("details", wanted)  # 0.1.0 did not write them
        if found != wanted:
            names = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
            raise ValueError(
                f"checkpoint: {candidate} was written by a fit with another {' and another '.join(names)}; "
                "give another path, or delete it to start over"
            )
        if problems:
            aside = path.with_name(path.name + ".damaged")
            os.replace(path, aside)
            warnings.warn(
                f"checkpoint: {problems[0]}; renamed it to {aside.name}, resuming from the previous one",
                stacklevel=2,
            )
        return meta, arrays
    if problems:
        raise ValueError(f"checkpoint: {'; '.join(problems)}. Delete it to start over")
    return None
