"""Images for trainings, as long rows of bytes, so that batches are cut from them as from text.

Sources: `digits`, scikit-learn's 1797 handwritten digits of 8 x 8 pixels, enlarged; `scenes`, made of them: one digit
at a random place of a large empty picture, whose patches are therefore mostly background; or parquet files that the
user names, such as the Hub's of CIFAR-10 and ImageNet, which are decoded once into memory-mapped arrays under
`runs/images` and never held in memory. Every machine makes the same digits and scenes.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from torch import Tensor

from ofutils import NUMERICS, UserError, params
from ofutils.records import save_rows, write_atomically

BUILT_IN = ("digits", "scenes")
_SCENES = {"train": 16384, "validation": 2048}
NOISE = 24  # the largest value of a pixel without a digit in `scenes`, of 255
_GRID = 4  # pixels: corners of the digits in `scenes` lie on multiples of it
_COLUMNS = ("img", "image"), ("label", "fine_label")  # of CIFAR-10 and ImageNet, of CIFAR-100
_AT_ONCE = 256  # images of a file that are in memory at a time


@params.settings
class ImageConfig:
    """Images in the place of text: cut into patches and classified. `size` 0: the model reads text."""

    size: params.Natural = 0  # pixels of a side
    patch: params.Count = 4  # pixels of a patch's side
    channels: params.Count = 1
    pool: Literal["class", "mean"] = "class"  # what the head reads: the class token, or the mean over the patches
    norm: bool = False  # a LayerNorm after the patch embedding (bondarenko2023, Table 7)

    @property
    def tokens(self) -> int:
        """T: patches, and the class token if there is one."""
        return (self.size // self.patch) ** 2 + (self.pool == "class")

    @property
    def row(self) -> int:
        """Bytes of an image and of one more line of pixels, whose first two say its class."""
        return self.channels * (self.size + 1) * self.size

    def packed(self, pixels: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Pixels (N, C, S, S) uint8 and labels (N,) -> (N x row,) uint8."""
        whole = np.zeros((len(pixels), self.channels, self.size + 1, self.size), np.uint8)
        whole[:, :, :-1] = pixels
        whole[:, 0, -1, :2] = np.stack(np.divmod(labels, 256), 1)
        return whole.ravel()

    def at(self, rows: Tensor, *number: int) -> Tensor:
        """(B, row) -> (B, C, S + 1, S), whatever the batch's number: see `batches.unpacked`."""
        return rows.view(-1, self.channels, self.size + 1, self.size)


def patches(pixels: Tensor, image: ImageConfig) -> Tensor:
    """(B, C, S, S) -> (B, n, C P P): n patches of P x P pixels, line by line.

    Raises:
        UserError: images of another shape.
    """
    shape, side = (image.channels, image.size, image.size), image.size // image.patch
    params.require(pixels.shape[1:] == shape, f"images must be {shape}, got {tuple(pixels.shape[1:])}")
    cut = pixels.unflatten(3, (side, image.patch)).unflatten(2, (side, image.patch))  # (B, C, n, P, n, P)
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


@dataclass(frozen=True)
class Images:
    """One set of images: its sha256, and each split as `ImageConfig.packed` has it."""

    corpus: str
    train: np.ndarray  # (N x row,) uint8
    validation: np.ndarray


@lru_cache(maxsize=2)
def read(source: str) -> tuple[np.ndarray, np.ndarray, str]:
    """Images as they are, with their classes and the sha256 of both; all in memory, and so for small ones.

    Args:
        source: `digits`; a parquet file, or a folder of them, like those of the Hub's uoft-cs/cifar10.

    Returns:
        (N, H, W) or (N, H, W, 3), of digits 0 to 16; (N,); sha256.

    Raises:
        UserError: a file that is not there, is no parquet or lacks a column; a row without an image like the first.
    """
    from PIL import Image
    from sklearn.datasets import load_digits

    if source == "digits":
        pixels, labels = load_digits(return_X_y=True)
        pixels = pixels.reshape(-1, 8, 8)
    else:
        with _readable(source):
            rows = pd.read_parquet(source)
            image, label = _named(rows)
            pixels = np.stack([np.asarray(Image.open(BytesIO(one["bytes"]))) for one in rows[image]])
            labels = np.array(rows[label].tolist(), dtype=np.uint16 if rows[label].max() > 255 else np.uint8)
    return pixels, labels, hashlib.sha256(pixels.tobytes() + labels.tobytes()).hexdigest()


@contextmanager
def _readable(source: object):
    """What is wrong with a file is one line."""
    try:
        yield
    except (OSError, ValueError, TypeError, LookupError, SyntaxError, OverflowError) as error:
        raise UserError(f"images '{source}': needs parquet of img (with bytes) and label: {error!r}") from error


def _named(has) -> list[str]:
    """The columns of images and of labels among those that there are."""
    return [next((one for one in known if one in has), known[0]) for known in _COLUMNS]


def check(source: str) -> None:
    """Refuse what is neither built in nor there.

    Raises:
        UserError: an unknown source.
    """
    known = f"{params.suggest(source, BUILT_IN)}; built in: {', '.join(BUILT_IN)}"
    there = source in BUILT_IN or bool(source and Path(source).exists())
    params.require(there, f"images {source!r}: no such file or folder{known}")


def load(source: str, image: ImageConfig) -> Images:
    """The two splits of a source in one size; held out for validation is every fifth image, or digit of scenes.

    Pictures of files are cut to squares from their middle and resized. They are decoded once, a few at a time, into
    `runs/images`, and again where the files, `size`, `channels` or `NUMERICS` are others; the splits are memory maps.

    Args:
        source: `digits`, `scenes`, a parquet file, or a folder of them at any depth, like those of the Hub's
            uoft-cs/cifar10.
        image: its size and channels; digits and scenes are grey, the same in every channel.

    Raises:
        UserError: an unknown source, a size that it does not have; a file that is no parquet or lacks a column, a row
            without a picture or a label; fewer than five images.
    """
    check(source)
    return _of_digits(source, image) if source in BUILT_IN else _of_files(Path(source), image)


@lru_cache(maxsize=2)
def _of_digits(source: str, image: ImageConfig) -> Images:
    """The splits of what is built in."""
    params.require(image.size % 8 == 0, f"{source} have a size that 8 divides, not {image.size}")
    pixels, labels, _ = read("digits")
    held, splits, pixels = np.arange(len(labels)) % 5 == 4, {}, (pixels * 255 / 16).astype(np.uint8)
    if source == "digits":
        pixels = pixels.repeat(image.size // 8, 1).repeat(image.size // 8, 2)
    for seed, (split, own) in enumerate({"train": ~held, "validation": held}.items()):
        found, classes = pixels[own], labels[own]
        if source == "scenes":
            found, classes = _scenes(found, classes, image.size, _SCENES[split], seed)
        splits[split] = _in_channels(found, classes, image)
    return Images(_sha256(**splits), **splits)


def _sha256(train: np.ndarray, validation: np.ndarray) -> str:
    digest = hashlib.sha256(train)
    digest.update(validation)
    return digest.hexdigest()


def _in_channels(pixels: np.ndarray, labels: np.ndarray, image: ImageConfig) -> np.ndarray:
    """(N, S, S), the same in every channel, or (N, S, S, C), and (N,) -> (N x row,)."""
    return image.packed(pixels.reshape(len(pixels), image.size, image.size, -1).transpose(0, 3, 1, 2), labels)


def _of_files(source: Path, image: ImageConfig) -> Images:
    """The splits as memory maps; written, where the sha256, which comes last, is not there."""
    paths = sorted(source.rglob("*.parquet")) if source.is_dir() else [source]
    params.require(len(paths) > 0, f"images '{source}': no parquet files in that folder")
    seen = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    name = hashlib.sha256(repr((seen, image.size, image.channels)).encode()).hexdigest()[:16]
    folder = params.out() / "runs" / "images" / f"{name}-{NUMERICS}"
    whole, splits = folder / "sha256", [folder / f"{split}.npy" for split in ("train", "validation")]
    for held, path in enumerate(() if whole.is_file() else splits):
        rows = _decoded(paths, image, bool(held))
        write_atomically(path, lambda temporary, rows=rows: save_rows(temporary, rows, np.uint8))
    try:
        loaded = [np.load(path, mmap_mode="r") for path in splits]
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"the images in {folder} are not readable; delete that folder") from error
    params.require(all(map(len, loaded)), f"images '{source}': too few, every fifth one is held out")
    if not whole.is_file():
        write_atomically(whole, lambda temporary: temporary.write_text(_sha256(*loaded)))
    return Images(whole.read_text(), *loaded)


def _decoded(paths: list[Path], image: ImageConfig, held: bool) -> Iterator[np.ndarray]:
    """The packed images of one split of parquet files, some at a time."""
    from PIL import Image, ImageOps
    from pyarrow.parquet import ParquetFile

    number, mode, columns = 0, "L" if image.channels == 1 else "RGB", []
    for path in paths:
        with _readable(path):
            file = ParquetFile(path)
            columns = columns or _named(file.schema_arrow.names)
            for batch in file.iter_batches(_AT_ONCE, columns=columns):
                own = (np.arange(number, number + len(batch)) % 5 == 4) == held
                number += len(batch)
                chosen = batch.filter(own).to_pydict()
                pictures, labels = (chosen[column] for column in columns)
                if not all(isinstance(label, int) for label in labels):
                    raise TypeError("a label is no whole number")
                opened = (Image.open(BytesIO(one["bytes"])).convert(mode) for one in pictures)
                if pixels := [np.asarray(ImageOps.fit(one, (image.size, image.size))) for one in opened]:
                    yield _in_channels(np.stack(pixels), np.array(labels, np.uint16), image)


def _scenes(digits: np.ndarray, labels: np.ndarray, size: int, count: int, seed: int):
    """So many pictures (count, size, size) of one digit each on faint noise, and their classes (count,)."""
    draw = np.random.default_rng(seed)
    chosen = draw.integers(len(digits), size=count)
    corners = _GRID * draw.integers((size - 8) // _GRID + 1, size=(2, count))
    pixels = draw.integers(NOISE + 1, size=(count, size, size), dtype=np.uint8)
    down, right = (corner[:, None] + np.arange(8) for corner in corners)  # (count, 8) each
    place = np.arange(count)[:, None, None], down[:, :, None], right[:, None, :]
    pixels[place] = np.maximum(pixels[place], digits[chosen])
    return pixels, labels[chosen]
