"""Images for trainings, as long rows of bytes, so that batches are cut from them as from text.

Sources: `digits`, scikit-learn's 1797 handwritten digits of 8 x 8 pixels, enlarged; `scenes`, made of them: one digit
at a random place of a large empty picture, whose patches are therefore mostly background; or parquet files that the
user names, such as the Hub's of CIFAR-10 and ImageNet. Every machine makes the same digits and scenes.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor

from ofutils import UserError, params
from ofutils.records import write_atomically

BUILT_IN = ("digits", "scenes")
_SCENES = {"train": 16384, "validation": 2048}
NOISE = 24  # the largest value of a pixel without a digit in `scenes`, of 255
_GRID = 4  # pixels: corners of the digits in `scenes` lie on multiples of it
_COLUMNS = {"image": ("img", "image"), "label": ("label", "fine_label")}


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
    """Images as they are, with their classes and the sha256 of both: `digits`, or parquet files.

    Args:
        source: `digits`; or a parquet file like those of the Hub's uoft-cs/cifar10, all of it in memory.

    Returns:
        (N, H, W) or (N, H, W, 3), of digits 0 to 16; (N,); sha256.

    Raises:
        UserError: a file that is not there, is no parquet or lacks a column; a row without an image like the first.
    """
    from sklearn.datasets import load_digits

    if source == "digits":
        pixels, labels = load_digits(return_X_y=True)
        pixels = pixels.reshape(-1, 8, 8)
    else:
        try:
            pairs = [(np.asarray(image), label) for image, label in _rows([Path(source)])]
            pixels = np.stack([pixel for pixel, _ in pairs])
            labels = np.array([label for _, label in pairs], dtype=np.uint8)
        except (ValueError, TypeError, OverflowError) as error:
            raise _unreadable(source, error) from error
    return pixels, labels, hashlib.sha256(pixels.tobytes() + labels.tobytes()).hexdigest()


def _unreadable(source: str, error: Exception) -> UserError:
    return UserError(f"images {source!r}: needs parquet of img (with bytes) and label: {error!r}")


def _rows(paths: list[Path]) -> Iterator[tuple]:
    """(picture, class) of each row of parquet files."""
    import pyarrow.parquet
    from PIL import Image

    for path in paths:
        try:
            names = pyarrow.parquet.read_schema(path).names
            columns = [next(name for name in known if name in names) for known in _COLUMNS.values()]
            for batch in pyarrow.parquet.ParquetFile(path).iter_batches(256, columns=columns):
                for image, label in zip(*(batch[name].to_pylist() for name in columns), strict=True):
                    yield Image.open(BytesIO(image["bytes"])), label
        except (OSError, ValueError, TypeError, LookupError, SyntaxError, StopIteration) as error:
            raise _unreadable(str(path), error) from error


@lru_cache(maxsize=2)
def load(source: str, image: ImageConfig) -> Images:
    """The two splits of a source, in one size.

    Args:
        source: `digits`, `scenes`, a parquet file, or a folder of them. Held out for validation are files whose names
            begin with test or val, else every fifth image; of digits, and of the digits in scenes, every fifth too.
        image: its size and channels. Pictures of a file are cut to squares from their middle and resized; digits and
            scenes have one channel.

    Raises:
        UserError: an unknown source, a size or channels that it does not have, and what `read` refuses.
    """
    path = Path(source).expanduser()
    if source not in BUILT_IN:
        known = f"{params.suggest(source, BUILT_IN)}; built in: {', '.join(BUILT_IN)}"
        params.require(source and path.exists(), f"images {source!r}: no such file or folder{known}")
        return _kept(sorted(path.glob("*.parquet")) if path.is_dir() else [path], image)
    fits = image.channels == 1 and image.size % 8 == 0
    params.require(
        fits, f"{source} have one channel and a size that 8 divides, not {image.channels} and {image.size}"
    )
    digits, labels, _ = read("digits")
    digits, held = (digits * 255 / 16).astype(np.uint8), np.arange(len(labels)) % 5 == 4
    splits = {}
    for seed, (split, own) in enumerate({"train": ~held, "validation": held}.items()):
        pixels, classes = digits[own], labels[own]
        if source == "digits":
            pixels = pixels.repeat(image.size // 8, 1).repeat(image.size // 8, 2)
        else:
            pixels, classes = _scenes(pixels, classes, image.size, _SCENES[split], seed)
        splits[split] = image.packed(pixels[:, None], classes)
    sha256 = hashlib.sha256(b"".join(one.tobytes() for one in splits.values())).hexdigest()
    return Images(sha256, **splits)


def _scenes(digits: np.ndarray, labels: np.ndarray, size: int, count: int, seed: int):
    """So many pictures (count, size, size) of one digit each on faint noise, and their classes (count,)."""
    draw = np.random.default_rng(seed)
    chosen, corners = (
        draw.integers(len(digits), size=count),
        _GRID * draw.integers((size - 8) // _GRID + 1, size=(2, count)),
    )
    pixels = draw.integers(NOISE + 1, size=(count, size, size), dtype=np.uint8)
    down, right = (corner[:, None] + np.arange(8) for corner in corners)  # (count, 8) each
    place = np.arange(count)[:, None, None], down[:, :, None], right[:, None, :]
    pixels[place] = np.maximum(pixels[place], digits[chosen])
    return pixels, labels[chosen]


def _kept(paths: list[Path], image: ImageConfig) -> Images:
    """Pictures of files, decoded once into `runs/images`, and read from there in a memory map."""
    seen = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    folder = (
        params.out()
        / "runs"
        / "images"
        / hashlib.sha256(repr((seen, image.channels, image.size)).encode()).hexdigest()[:16]
    )
    held = [path for path in paths if path.name.startswith(("test", "val"))]
    of = {"train": [path for path in paths if path not in held], "validation": held or paths}
    splits, digests = {}, []
    for split, own in of.items():
        kept, digest = folder / f"{split}.bytes", folder / f"{split}.sha256"
        if not digest.is_file():
            part = {"train": (0, 1, 2, 3), "validation": (4,)}[split] if not held else (0, 1, 2, 3, 4)
            write_atomically(kept, lambda temporary, own=own, part=part: _decode(own, part, image, temporary))
            with kept.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            write_atomically(digest, lambda temporary, sha256=sha256: temporary.write_text(sha256))
        digests.append(digest.read_text())
        params.require(kept.stat().st_size > 0, f"images {paths[0]}: nothing in them for the {split} split")
        splits[split] = np.memmap(kept, np.uint8, "r")
    return Images(hashlib.sha256("".join(digests).encode()).hexdigest(), **splits)


def _decode(paths: list[Path], part: tuple[int, ...], image: ImageConfig, target: Path) -> None:
    from PIL import ImageOps

    with target.open("wb") as file:
        for number, (picture, label) in enumerate(_rows(paths)):
            if number % 5 in part:
                square = ImageOps.fit(
                    picture.convert("L" if image.channels == 1 else "RGB"), (image.size, image.size)
                )
                pixels = np.asarray(square).reshape(1, image.size, image.size, image.channels).transpose(0, 3, 1, 2)
                file.write(image.packed(pixels, np.array([label])).tobytes())
