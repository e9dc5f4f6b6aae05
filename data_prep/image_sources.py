"""Where images come from: folders of class folders, tar archives, the hub's parquet. Lists them; reads any one of them.

Listing reads names, sizes and labels alone, so it takes seconds to minutes for a million images. Each image is then read
by itself, in any order: from its file, from its place in a tar archive (ILSVRC's train archive holds one archive a class:
nothing is unpacked), or, in parquet, with the rest of its row group.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.corpus_files import InputError, folders_below, open_binary, unreadable

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


class ImageRef(NamedTuple):
    """One image of a source, still to be read."""

    name: str
    """Its path inside the source: what people know it by."""
    label: int
    path: str
    n_bytes: int
    """Size of the file; in parquet, an even share of its row group."""
    offset: int = 0
    """First byte in the archive `path`; in parquet, the row in its row group."""
    group: int = -1
    """Row group; -1: not parquet."""


class Found(NamedTuple):
    """An image as a source lists it: `ref` without its label, and its class."""

    class_name: str | int | None
    """Name or number; None where the source does not tell."""
    ref: ImageRef


def in_folder(folder: Path) -> Iterator[Found]:
    """Images in class folders, at any depth below them; those at the top are of no class."""
    for place, names in folders_below(folder):
        below = Path(place).relative_to(folder)
        for name in names:
            if name.lower().endswith(IMAGE_SUFFIXES):
                path = os.path.join(place, name)
                class_name = below.parts[0] if below.parts else None
                yield Found(class_name, ImageRef((below / name).as_posix(), -1, path, os.stat(path).st_size))


def in_tar(path: str) -> Iterator[Found]:
    """Images of an archive: in archives of one class each, in class folders, beside a number, or of no class."""
    try:
        with tarfile.open(path, "r:") as outer:
            numbers = _numbers_beside(outer, path)
            for member in outer:
                if member.isfile() and member.name.endswith(".tar") and not _is_hidden(member):
                    inside = outer.extractfile(member)
                    assert inside is not None, "a regular file can be read"
                    with tarfile.open(fileobj=inside, mode="r:") as inner:
                        for image in _image_members(inner, f"{path}: {member.name}"):
                            yield _tar_image(path, image, Path(member.name).stem, member.offset_data)
                        _check_end(inner, f"{path}: {member.name}")
                elif _is_image(member, path):
                    class_name = numbers.get(_key(member.name), Path(member.name).parent.name or None)
                    yield _tar_image(path, member, class_name, 0)
            _check_end(outer, path)
    except (tarfile.TarError, OSError) as error:
        raise InputError(unreadable(path, error)) from error


def _check_end(archive: tarfile.TarFile, name: str) -> None:
    """Raise InputError unless the archive, gone through, ends as one does. `tarfile` takes a damaged header for the end."""
    assert archive.fileobj is not None, "an open archive"
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise InputError(unreadable(name, ValueError(f"no end of archive and no header at byte {archive.offset:,}")))


def _image_members(archive: tarfile.TarFile, name: str) -> Iterator[tarfile.TarInfo]:
    return (member for member in archive if _is_image(member, name))


def _is_image(member: tarfile.TarInfo, archive: str) -> bool:
    """Raises InputError for an image, or an archive of them, that is a link: it would be missing without a word."""
    if _is_hidden(member) or not member.name.lower().endswith((*IMAGE_SUFFIXES, ".tar")):
        return False
    if member.issym() or member.islnk():
        raise InputError(
            f"{archive}: {member.name} is a link to {member.linkname} and holds nothing itself: pack the archive again "
            "with tar --dereference --hard-dereference, or without its links"
        )
    return member.isfile() and member.name.lower().endswith(IMAGE_SUFFIXES)


def _is_hidden(member: tarfile.TarInfo) -> bool:
    """As in folders: a Mac's tar packs what it knows of KEY.cls beside it, as ._KEY.cls."""
    return any(part.startswith(".") for part in Path(member.name).parts)


def _numbers_beside(archive: tarfile.TarFile, path: str) -> dict[str, int]:
    """webdataset's classes: the number in KEY.cls is of the image KEY.jpg. Raises InputError where it is no number."""
    numbers: dict[str, int] = {}
    for member in archive:
        if member.isfile() and member.name.endswith(".cls") and not _is_hidden(member):
            file = archive.extractfile(member)
            assert file is not None, "a regular file can be read"
            try:
                numbers[_key(member.name)] = int(file.read())
            except ValueError:
                raise InputError(f"{path}: {member.name} holds no number") from None
    return numbers


def _key(name: str) -> str:
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.partition('.')[0]}"


def _tar_image(path: str, member: tarfile.TarInfo, class_name: str | int | None, base: int) -> Found:
    name = member.name.removeprefix("./")
    if base:
        name = f"{class_name}/{name}"
    return Found(class_name, ImageRef(name, -1, path, member.size, base + member.offset_data))


def in_parquet(path: str, image_column: str, label_column: str) -> tuple[list[Found], list[str] | None]:
    """Images of a parquet file: a column of bytes or of {bytes, path}, and one of class numbers or names.

    Beside them the names of numbered classes, where the schema has them. Raises InputError.
    """
    try:
        file = pq.ParquetFile(open_binary(path))
        schema = file.schema_arrow
        for option, column in (("--image-column", image_column), ("--label-column", label_column)):
            if column not in schema.names:
                raise InputError(
                    f"{path}: no column {column!r}; it has {', '.join(schema.names)}. Name it with {option}"
                )
        kind = schema.field(image_column).type
        has_paths = pa.types.is_struct(kind) and kind.get_field_index("path") >= 0
        columns = [label_column, *([f"{image_column}.path"] if has_paths else [])]
        images: list[Found] = []
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=columns, use_threads=False)
            labels = table[label_column].to_pylist()
            paths = _struct_field(table, image_column, "path") if has_paths else [None] * len(labels)
            share = file.metadata.row_group(group).total_byte_size // max(1, len(labels))
            for row, (label, image_path) in enumerate(zip(labels, paths, strict=True)):
                name = str(image_path or f"{Path(path).stem}/{group}/{row}")
                if not isinstance(label, int | str):
                    raise InputError(f"{path}: {name} has label {label!r}: must be a number or a name")
                images.append(Found(label, ImageRef(name, -1, path, share, row, group)))
    except (pa.ArrowException, OSError) as error:
        raise InputError(unreadable(path, error)) from error
    return images, _names_in_schema(schema, label_column)


def _struct_field(table: pa.Table, column: str, name: str) -> list[Any]:
    return [value and value.get(name) for value in table[column].to_pylist()]


def _names_in_schema(schema: pa.Schema, label_column: str) -> list[str] | None:
    """Class names as the `datasets` library writes them beside a column of numbers."""
    try:
        info = json.loads((schema.metadata or {})[b"huggingface"])
        names = info["info"]["features"][label_column]["names"]
    except (KeyError, ValueError, TypeError):
        return None
    return [str(name) for name in names]


# --------------------------------------------------------------------------- their bytes


def read_images(refs: Sequence[ImageRef], image_column: str) -> Iterator[tuple[ImageRef, bytes]]:
    """Each image with its bytes: in order, but row groups one after the other, each read once.

    Raises InputError where a source cannot be read, or is no longer what was listed.
    """
    groups: dict[tuple[str, int], list[ImageRef]] = {}
    for ref in refs:
        if ref.group < 0:
            yield ref, _bytes_of(ref)
        else:
            groups.setdefault((ref.path, ref.group), []).append(ref)
    for (path, group), inside in groups.items():
        rows = _row_group(path, group, image_column)
        for ref in inside:
            yield ref, rows[ref.offset]


def _bytes_of(ref: ImageRef) -> bytes:
    try:
        data = (
            os.pread(_archive(ref.path).fileno(), ref.n_bytes, ref.offset)
            if ref.offset
            else Path(ref.path).read_bytes()
        )
    except OSError as error:
        raise InputError(f"{ref.path} cannot be read: {error}. What was done so far is kept") from error
    if len(data) != ref.n_bytes:
        raise InputError(f"{ref.path}: {ref.name} has {len(data)} bytes, {ref.n_bytes} were listed: the input changed")
    return data


@lru_cache(maxsize=64)
def _archive(path: str) -> BinaryIO:
    return open(path, "rb")  # closed when it falls out of the cache


@lru_cache(maxsize=4)
def _parquet_file(path: str) -> pq.ParquetFile:
    return pq.ParquetFile(open_binary(path))


def _row_group(path: str, group: int, image_column: str) -> list[bytes]:
    try:
        column = _parquet_file(path).read_row_group(group, columns=[image_column], use_threads=False)[image_column]
    except (pa.ArrowException, OSError) as error:
        raise InputError(unreadable(path, error)) from error
    values: Iterable[Any] = column.to_pylist()
    return [(value.get("bytes") if isinstance(value, dict) else value) or b"" for value in values]
