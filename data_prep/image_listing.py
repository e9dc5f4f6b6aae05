"""Which images a data set has, of which classes, in which split: the listing that a preparation works through."""

from __future__ import annotations

import glob
import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.corpus_files import InputError, file_place, find_sources
from data_prep.image_sources import IMAGE_SUFFIXES, Found, ImageRef, in_folder, in_parquet, in_tar
from data_prep.shard_schema import SPLITS

OTHER_ARCHIVES = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz", ".zip")
SPLIT_NAMES = {"train": re.compile(r"(^|[_-])train([_.-]|$)"), "val": re.compile(r"(^|[_-])val(id|idation)?([_.-]|$)")}
TEST_NAME = re.compile(r"(^|[_-])test([_.-]|$)")


@dataclass(frozen=True)
class Listing:
    """Every image of a data set."""

    classes: list[str]
    """Class names; a label is a place in this list."""
    images: dict[str, list[ImageRef]]
    """By split, in the order of the source."""

    def sha256(self) -> str:
        """Hash of classes, names, labels and sizes."""
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        for split in SPLITS:
            for ref in self.images[split]:
                digest.update(_bytes(f"{split}\0{ref.name}\0{ref.label}\0{ref.n_bytes}\n"))
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """Where the images and their labels are."""

    train: tuple[str, ...]
    """Sources of train: folders, archives, parquet files, globs, or OWNER/NAME of a data set on the hub."""
    val: tuple[str, ...] = ()
    """Sources of val; empty where a share of train becomes val."""
    val_fraction: float = 0.0
    """Share of each class that becomes val where `val` is empty."""
    seed: int = 0
    """Decides which images those are."""
    val_labels: str = ""
    """File with the classes of a val source that does not tell them."""
    class_names: str = ""
    """File with the names of parquet's numbered classes, one a line, where its schema does not tell them."""
    image_column: str = "image"
    label_column: str = "label"


def find_splits(path: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(sources of train, sources of val) in the folder `path`, or on the hub; no val where it has none of that name.

    By name: folders train/ and val/ (or validation/), ILSVRC2012_img_train.tar, train-00000-of-00294.parquet, ... What is
    called test beside train is left alone.
    """
    folder = Path(path)
    if folder.is_dir():
        names = sorted(str(entry) for entry in folder.iterdir() if not entry.name.startswith("."))
        # Labels and boxes lie beside ILSVRC's archives, and its dogs (_t3) are in the archive of all.
        names = [n for n in names if Path(n).is_dir() or n.endswith((".tar", ".parquet"))] or names
        names = [n for n in names if not n.endswith("_t3.tar") or f"{n.removesuffix('_t3.tar')}.tar" not in names]
        if [Path(name).name for name in names] == ["data"]:  # as a snapshot of a hub data set lies on a disk
            return find_splits(names[0])
    else:
        names = [path] if glob.glob(path) else [source.path for source in find_sources([path])]
    found = {
        split: tuple(n for n in names if pattern.search(Path(n).name.lower())) for split, pattern in SPLIT_NAMES.items()
    }
    if found["train"] and found["val"]:
        return found["train"], found["val"]
    others = [name for name in names if name not in found["train"]]
    if found["train"] and all(TEST_NAME.search(Path(name).name.lower()) for name in others):
        return found["train"], ()
    return (path,), ()  # a class may be called train


def list_images(options: SourceOptions) -> Listing:
    """Every image that `options` names. Raises InputError where a class is in one split alone, or a label is unknown."""
    given_names = _lines(options.class_names, "--class-names") if options.class_names else None
    found, names = _list_sources(options.train, "--train", options, given_names)
    if any(one.class_name is None for one in found):
        raise InputError(
            f"--train {' '.join(options.train)}: {next(one.ref.name for one in found if one.class_name is None)} lies in "
            "no class folder: put the images of each class in a folder named after it"
        )
    classes = names or sorted({str(one.class_name) for one in found})
    _check_names(classes, found, options)
    label_of = {name: label for label, name in enumerate(classes)}
    train = [one.ref._replace(label=label_of[str(one.class_name)]) for one in found]
    if options.val:
        val_found, val_names = _list_sources(options.val, "--val", options, given_names)
        if val_names is not None and names is not None and val_names != names:
            raise InputError("the parquet files of train and val name other classes, or in another order: mend --val")
        if options.val_labels:
            val_found = _with_labels(val_found, options.val_labels)
        val = [one.ref._replace(label=_known(one, label_of, options)) for one in val_found]
    else:
        train, val = _share_out(train, options.val_fraction, options.seed)
    _check_once(train, val)
    _check_classes(classes, train, val, bool(options.val))
    return Listing(classes, {"train": train, "val": val})


def _check_names(classes: list[str], found: list[Found], options: SourceOptions) -> None:
    """Refuse names that do not tell the classes apart, and images of none of them."""
    twice = next((name for name, n in Counter(classes).items() if n > 1), None)
    if twice is not None:
        raise InputError(
            f"--train {' '.join(options.train)}: two classes are called {twice!r} (ImageNet has two cranes): give each a "
            "name of its own with --class-names"
        )
    known = set(classes)
    if stray := next((one for one in found if one.class_name not in known), None):
        raise InputError(
            f"--train {' '.join(options.train)}: {stray.ref.name} is of class {stray.class_name!r}, which is not among "
            f"the names of the numbered classes, {', '.join(classes[:5])}, ...: mend --class-names, or leave its source out"
        )


def _list_sources(
    sources: Sequence[str], option: str, options: SourceOptions, given_names: list[str] | None
) -> tuple[list[Found], list[str] | None]:
    """The images of several sources and, where a source numbers the classes, their names in that order."""
    images: list[Found] = []
    names: list[str] | None = None
    for path in sources:
        files = _files(path, option)
        for file in files:
            more, file_names = _list_file(file, options, given_names, is_one_of_many=len(files) > 1)
            images += more
            if names is not None and file_names is not None and file_names != names:
                raise InputError(f"{file} names other classes than the files before it")
            names = file_names or names
    if not images:
        raise InputError(f"{option} {' '.join(sources)}: no image there (looked for {', '.join(IMAGE_SUFFIXES)})")
    numbers = {one.class_name for one in images if isinstance(one.class_name, int)}
    if numbers and names is None:
        names = given_names or [str(number) for number in range(max(numbers) + 1)]
    return [_named(one, names) for one in images], names


def _list_file(
    file: str, options: SourceOptions, given_names: list[str] | None, *, is_one_of_many: bool
) -> tuple[list[Found], list[str] | None]:
    if file.endswith(".parquet"):
        images, names = in_parquet(file, options.image_column, options.label_column)
        return images, given_names or names
    if file.endswith(".tar"):
        return [
            one._replace(class_name=Path(file).stem) if one.class_name is None and is_one_of_many else one
            for one in in_tar(file)
        ], None
    return list(in_folder(Path(file))), None


def _named(one: Found, names: list[str] | None) -> Found:
    if not isinstance(one.class_name, int):
        return one
    if one.class_name < 0:
        raise InputError(
            f"{one.ref.path}: {one.ref.name} has label {one.class_name}: an unlabelled split (test?) can be neither "
            "train nor val"
        )
    assert names is not None, "where classes are numbers, they have names"
    if one.class_name >= len(names):
        raise InputError(
            f"{one.ref.path}: {one.ref.name} has label {one.class_name}, but there are {len(names)} class names: mend "
            "--class-names"
        )
    return one._replace(class_name=names[one.class_name])


def _files(path: str, option: str) -> list[str]:
    """The archives and parquet files that a source names, or the folder itself where it holds neither."""
    if Path(path).is_dir():
        folders = (Path(path), Path(path) / "data")
        kinds = ("[!.]*.tar", "[!.]*.parquet")  # what is hidden is left out, as among class folders
        inside = sorted(str(p) for folder in folders for kind in kinds for p in folder.glob(kind))
        if inside and (loose := next(iter(in_folder(Path(path))), None)) is not None:
            raise InputError(
                f"{option} {path}: holds archives or parquet files ({Path(inside[0]).name}) and image files "
                f"({loose.ref.name}): name the ones that are meant, or move the others away"
            )
        return inside or [path]
    matches = [path] if Path(path).is_file() else sorted(glob.glob(path, recursive=True))
    for match in matches:
        if match.endswith(OTHER_ARCHIVES):
            raise InputError(
                f"{option} {match}: an image must be readable by itself, and a compressed archive is read from its start: "
                "decompress it to .tar, or unpack it"
            )
        if not match.endswith((".tar", ".parquet")) and not Path(match).is_dir():
            raise InputError(f"{option} {match}: unknown kind. Use a folder, .tar or .parquet")
    if matches:
        return matches
    return [source.path for source in find_sources([path])]  # the hub; raises where there is nothing of that name


def _bytes(text: str) -> bytes:
    """UTF-8, of file names that are none too."""
    return text.encode(errors="surrogateescape")


def _lines(path: str, option: str) -> list[str]:
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()  # spreadsheets put a mark before the first
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{option} {path}: cannot be read ({error})") from None
    return [line.strip() for line in lines if line.strip()]


def _with_labels(found: list[Found], path: str) -> list[Found]:
    """The images with the classes that `path` gives: "NAME CLASS" lines (also Kaggle's csv), or one class a line.

    The latter are for the images in the order of their names. Raises InputError where a name is not of one image, or one class.
    """
    lines = [re.split(r"[\s,]+", line) for line in _lines(path, "--val-labels")]
    if all(len(words) == 1 for words in lines):
        if len(lines) != len(found):
            raise InputError(f"--val-labels {path}: {len(lines)} classes for {len(found)} images: one line for each")
        in_order = sorted(one.ref.name for one in found)
        _check_differ(in_order, path)
        classes = {name: words[0] for name, words in zip(in_order, lines, strict=True)}
        return [one._replace(class_name=classes[one.ref.name]) for one in found]
    _check_differ([_label_key(one.ref.name) for one in found], path)
    classes = {}
    for name, class_name in (words[:2] for words in lines if len(words) > 1):
        if classes.setdefault(_label_key(name), class_name) != class_name:
            raise InputError(f"--val-labels {path}: {name} is of class {classes[_label_key(name)]} and of {class_name}")
    missing = [one.ref.name for one in found if _label_key(one.ref.name) not in classes]
    if missing:
        raise InputError(f"--val-labels {path}: says nothing of {len(missing)} images, {missing[0]} among them")
    return [one._replace(class_name=classes[_label_key(one.ref.name)]) for one in found]


def _label_key(name: str) -> str:
    """What --val-labels calls an image: its file's name, and Kaggle's leave out that it is a JPEG."""
    path = Path(name)
    return path.stem if path.suffix.lower() in IMAGE_SUFFIXES else path.name


def _check_differ(names: list[str], path: str) -> None:
    twice = next((name for name, n in Counter(names).items() if n > 1), None)
    if twice is not None:
        raise InputError(
            f"--val-labels {path}: two images of val are called {twice}, so a name does not tell them apart: put the "
            "images of each class in a folder named after it"
        )


def _known(one: Found, label_of: dict[str, int], options: SourceOptions) -> int:
    if one.class_name is None:
        raise InputError(
            f"--val {' '.join(options.val)}: {one.ref.name} lies in no class folder: give the classes with --val-labels "
            "(for ILSVRC: one synset a line, or Kaggle's LOC_val_solution.csv)"
        )
    if one.class_name not in label_of:
        hint = ""
        if str(one.class_name).isdigit():
            hint = " (ILSVRC's ground_truth.txt numbers classes in an order of its own: use a list of synsets)"
        raise InputError(
            f"val: {one.ref.name} is of class {one.class_name!r}, which train does not have{hint}. Its classes: "
            f"{', '.join(list(label_of)[:5])}, ... ({len(label_of)})"
        )
    return label_of[one.class_name]


def _share_out(images: list[ImageRef], fraction: float, seed: int) -> tuple[list[ImageRef], list[ImageRef]]:
    """(train, val): of each class the `fraction` whose names hash lowest with the seed goes to val, one at the least."""
    if not 0 < fraction < 1:
        raise InputError(
            f"--val-fraction {fraction}: there is no val source, so a share of each class above 0 and below 1 must "
            "become val. Give --val-fraction, or --val"
        )
    by_class: dict[int, list[tuple[str, int]]] = {}
    for place, ref in enumerate(images):
        key = hashlib.sha256(_bytes(f"{seed} {ref.name}")).hexdigest()
        by_class.setdefault(ref.label, []).append((key, place))
    chosen: set[int] = set()
    for keys in by_class.values():
        chosen |= {place for _, place in sorted(keys)[: max(1, round(fraction * len(keys)))]}
    train = [ref for place, ref in enumerate(images) if place not in chosen]
    return train, [images[place] for place in sorted(chosen)]


def _check_once(train: list[ImageRef], val: list[ImageRef]) -> None:
    seen: set[tuple[str, int, int]] = set()
    for ref in (*train, *val):
        place = (file_place(ref.path), ref.group, ref.offset)
        if place in seen:
            raise InputError(
                f"{ref.path}: {ref.name} is named twice: by two of the sources of train, or by train and val"
            )
        seen.add(place)


def _check_classes(classes: list[str], train: list[ImageRef], val: list[ImageRef], has_val: bool) -> None:
    for split, images in (("train", train), ("val", val)):
        present = {ref.label for ref in images}
        missing = [name for label, name in enumerate(classes) if label not in present]
        if missing:
            way_out = (
                "add images of it, remove the class, or leave --val out and give --val-fraction"
                if has_val
                else "a class needs at least two images, one of them for val: add some, or remove the class"
            )
            raise InputError(
                f"split {split} has no image of {len(missing)} of {len(classes)} classes, "
                f"{', '.join(repr(name) for name in missing[:5])} among them: {way_out}"
            )
