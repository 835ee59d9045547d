"""Files of columns of equal length: CSV, Parquet, NPZ and HDF5.

Columns are arrays of numbers, one entry per row; only text that tells rows apart, as the ids of episodes, is
kept as it is. Nothing is unpickled.
"""

from __future__ import annotations

import csv
import itertools
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np

__all__ = [
    "SUFFIXES",
    "Column",
    "Table",
    "intact_hdf5",
    "intact_npz",
    "npz_headers",
    "open_table",
]

PART = 10_000
"""Rows of a CSV file that are text at once."""

WORDS = {"true": 1.0, "false": 0.0, "": np.nan}
"""What cells may say beside numbers, in any case."""


@dataclass(frozen=True)
class Column:
    """What is known of a column before it is read.

    Attributes:
        shape: of all of it, ``[n, ...]``.
        dtype: of its entries; that of text for what is no array of numbers.
    """

    shape: tuple[int, ...]
    dtype: np.dtype


@dataclass(frozen=True)
class Table:
    """A file that was opened, of which nothing but the header was read.

    Attributes:
        path: of the file.
        columns: by name.
        read: reads columns, of which those in the second argument may be text.
        is_text: whether it has lines, after that of the names, and numbers of one kind, as a CSV file.
    """

    path: Path
    columns: Mapping[str, Column]
    read: Callable[[Collection[str], Collection[str]], dict[str, np.ndarray]]
    is_text: bool = False

    def place(self, row: int) -> str:
        """Say where a row is, as an editor counts it."""
        return f"line {row + 2}" if self.is_text else f"row {row}"


def open_table(path: Path) -> Table:
    """Open a file by its suffix, one of ``SUFFIXES``, and read what columns it has.

    Raises:
        FileNotFoundError: there is no such file.
        ModuleNotFoundError: pyarrow, which reads Parquet, is not installed.
        ValueError: it is damaged, now or when it is read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    return _OPENERS[path.suffix.lower()](path)


# --- CSV ---------------------------------------------------------------------------------------------------


def _open_csv(path: Path) -> Table:
    with _csv(path) as rows:
        header = [name.strip() for name in next(rows, [])]
        if not any(header):
            raise ValueError("is empty, expected a line with the names of the columns")
        if twice := sorted({name for name in header if header.count(name) > 1}):
            raise ValueError(f"has several columns {', '.join(twice)}")
        if all(_is_number(name) for name in header):
            raise ValueError(f"has no names of columns: its first line is {','.join(header[:8])}")
        number = sum(1 for _ in rows)
    column = Column((number,), np.dtype(np.float64))
    read = partial(_read_csv, path, header)
    return Table(path, dict.fromkeys(header, column), read, is_text=True)


@contextmanager
def _csv(path: Path) -> Iterator[Iterator[list[str]]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            yield _without_end(csv.reader(file))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"is no intact CSV file: {error}") from error


def _without_end(lines: Iterator[list[str]]) -> Iterator[list[str]]:
    """Leave out empty lines at the end."""
    empty = 0
    for line in lines:
        if line:
            yield from itertools.repeat([], empty)
            yield line
        empty = 0 if line else empty + 1


def _read_csv(
    path: Path, header: list[str], names: Collection[str], texts: Collection[str]
) -> dict[str, np.ndarray]:
    places = {name: header.index(name) for name in names}
    parts: dict[str, list[np.ndarray]] = {name: [np.empty(0)] for name in names}
    for name in texts:
        parts[name] = [np.empty(0, str)]
    with _csv(path) as lines:
        next(lines)
        for first in itertools.count(2, PART):
            if not (rows := list(itertools.islice(lines, PART))):
                break
            for i, row in enumerate(rows):
                if len(row) != len(header):
                    raise ValueError(
                        f"line {first + i} has {len(row)} cells, expected {len(header)}, as the first line"
                    )
            for name, place in places.items():
                cells = [row[place] for row in rows]
                made = np.array(cells) if name in texts else _numbers(cells, name, first)
                parts[name].append(made)
    return {name: np.concatenate(each) for name, each in parts.items()}


def _numbers(cells: list[str], name: str, first: int) -> np.ndarray:
    try:
        return np.array(cells).astype(np.float64)
    except ValueError:
        return np.array([_number(cell, name, first + i) for i, cell in enumerate(cells)])


def _number(cell: str, name: str, line: int) -> float:
    word = cell.strip().lower()
    if word in WORDS:
        return WORDS[word]
    if not _is_number(word):
        raise ValueError(f"line {line}, column {name} is {cell!r}, expected a number")
    return float(word)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


# --- Parquet -----------------------------------------------------------------------------------------------


def _open_parquet(path: Path) -> Table:
    with _parquet(path) as file:
        rows = file.metadata.num_rows
        # How long the lists of a column are is not in the header.
        first = next(file.iter_batches(batch_size=1), None)
        columns = {}
        for field in file.schema_arrow:
            try:
                value = (
                    _arrow_values(first.column(field.name), field.name) if first else np.empty(0)
                )
                columns[field.name] = Column((rows, *value.shape[1:]), value.dtype)
            except ValueError:  # told when it is read
                columns[field.name] = Column((rows,), np.dtype(np.float64))
    return Table(path, columns, partial(_read_parquet, path))


@contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ModuleNotFoundError(
            f"{path}: Parquet is read by pyarrow: pip install 'torchrl-iql[arrow]'"
        ) from error
    try:
        with ParquetFile(path) as file:
            yield file
    except (ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"is no intact Parquet file: {reason}") from error


def _read_parquet(
    path: Path, names: Collection[str], texts: Collection[str]
) -> dict[str, np.ndarray]:
    with _parquet(path) as file:
        table = file.read(columns=list(names))
        return {name: _arrow_values(table.column(name), name) for name in names}


def _arrow_values(column: Any, name: str, per_row: int = 1) -> np.ndarray:
    """Return a column as an array; its lists, which have to be equally long, as further dimensions."""
    import pyarrow as pa
    import pyarrow.compute

    pc: Any = pyarrow.compute  # whose functions are made when it is imported

    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # of no chunks
        column = pa.array([], column.type)
    kind = column.type
    if isinstance(kind, pa.BaseExtensionType):
        return _arrow_values(column.storage, name, per_row)
    if column.null_count:
        row = pc.index(column.is_null(), True).as_py() // per_row
        if not pa.types.is_floating(kind):
            raise ValueError(f"row {row}, column {name} is null, expected a value")
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        sizes = pc.list_value_length(column).to_numpy(zero_copy_only=False)
        size = int(sizes[0]) if len(sizes) else 0
        if (other := sizes != size).any():
            row = int(other.argmax())
            raise ValueError(
                f"row {row // per_row}, column {name} has {sizes[row]} entries, expected {size}, as row 0"
            )
        inner = _arrow_values(column.flatten(), name, per_row * max(1, size))
        return inner.reshape(len(column), size, *inner.shape[1:])
    if pa.types.is_dictionary(kind):
        return _arrow_values(column.dictionary_decode(), name, per_row)
    if pa.types.is_struct(kind):
        raise ValueError(f"column {name} holds structures, {kind}, expected numbers")
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return np.array(column.to_pylist(), dtype=str)
    return column.to_numpy(zero_copy_only=False)


# --- NPZ ---------------------------------------------------------------------------------------------------


def _open_npz(path: Path) -> Table:
    headers = npz_headers(path)
    columns = {name: its for name, its in headers.items() if its.shape}
    return Table(path, columns, partial(_read_npz, path))


@contextmanager
def intact_npz() -> Iterator[None]:
    """Say of what a damaged file raises, as a ValueError, what it is."""
    try:
        yield
    except (EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"is no intact NPZ file: {error}") from error


def npz_headers(path: Path) -> dict[str, Column]:
    """Return what arrays an NPZ file has, and of what shape and type, not what is in them.

    Raises:
        ValueError: it is damaged.
    """
    headers = {}
    with intact_npz(), zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            with archive.open(member) as file:
                version = np.lib.format.read_magic(file)
                old = version == (1, 0)
                read = (
                    np.lib.format.read_array_header_1_0
                    if old
                    else np.lib.format.read_array_header_2_0
                )
                shape, _, dtype = read(file)
            headers[member.removesuffix(".npy")] = Column(shape, dtype)
    return headers


def _read_npz(path: Path, names: Collection[str], texts: Collection[str]) -> dict[str, np.ndarray]:
    arrays = {}
    with intact_npz(), np.load(path, allow_pickle=False) as file:
        for name in names:
            try:
                arrays[name] = file[name]
            except ValueError as error:
                raise ValueError(f"column {name} can not be read: {error}") from error
    return arrays


# --- HDF5 --------------------------------------------------------------------------------------------------


def _open_hdf5(path: Path) -> Table:
    columns: dict[str, Column] = {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and item.shape:
            columns[name] = Column(item.shape, item.dtype)

    with intact_hdf5(path) as file:
        file.visititems(visit)
    return Table(path, columns, partial(_read_hdf5, path))


@contextmanager
def intact_hdf5(path: Path) -> Iterator[h5py.File]:
    """Open a file; a ValueError says what a damaged one is."""
    try:
        with h5py.File(path) as file:
            yield file
    except (KeyError, OSError, RuntimeError) as error:  # what h5py meets in damaged files
        raise ValueError(f"is no intact HDF5 file: {error}") from error


def _read_hdf5(path: Path, names: Collection[str], texts: Collection[str]) -> dict[str, np.ndarray]:
    arrays = {}
    with intact_hdf5(path) as file:
        for name in names:
            dataset: Any = file[name]
            try:
                is_text = h5py.check_string_dtype(dataset.dtype) is not None
                arrays[name] = dataset.asstr()[()].astype(str) if is_text else dataset[()]
            except (OSError, RuntimeError, TypeError) as error:
                raise ValueError(f"column {name} can not be read: {error}") from error
    return arrays


_OPENERS: dict[str, Callable[[Path], Table]] = {
    ".csv": _open_csv,
    ".parquet": _open_parquet,
    ".npz": _open_npz,
    ".hdf5": _open_hdf5,
    ".h5": _open_hdf5,
}
SUFFIXES = tuple(_OPENERS)
