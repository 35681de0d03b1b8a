"""Images for trainings, as long rows of bytes, so that batches are cut from them as from text.

Sources: `digits`, scikit-learn's 1797 handwritten digits of 8 x 8 pixels, enlarged; `scenes`, made of them: one digit
at a random place of a large empty picture, whose patches are therefore mostly background; or parquet files that the
user names, such as the Hub's of CIFAR-10 and ImageNet. Every machine makes the same digits and scenes.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from torch import Tensor

from ofutils import UserError, params

BUILT_IN = ("digits", "scenes")
_SCENES = {"train": 16384, "validation": 2048}
NOISE = 24  # the largest value of a pixel without a digit in `scenes`, of 255
_GRID = 4  # pixels: corners of the digits in `scenes` lie on multiples of it
_COLUMNS = ("img", "image"), ("label", "fine_label")  # of CIFAR-10 and ImageNet, of CIFAR-100


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
def read(source: str, size: int = 0, channels: int = 3) -> tuple[np.ndarray, np.ndarray, str]:
    """Images as they are, or in one size, with their classes and the sha256 of both; all in memory.

    Args:
        source: `digits`; a parquet file, or a folder of them, like those of the Hub's uoft-cs/cifar10.
        size: pictures of files are cut to squares from their middle and resized to so many pixels; 0: they are not.
        channels: 1 or 3, of what is resized.

    Returns:
        (N, H, W) or (N, H, W, 3), of digits 0 to 16; (N,); sha256.

    Raises:
        UserError: a file that is not there, is no parquet or lacks a column; a row without an image like the first.
    """
    from PIL import Image, ImageOps
    from sklearn.datasets import load_digits

    if source == "digits":
        pixels, labels = load_digits(return_X_y=True)
        pixels = pixels.reshape(-1, 8, 8)
    else:
        try:
            rows = pd.read_parquet(source)
            image, label = (next((one for one in known if one in rows), known[0]) for known in _COLUMNS)
            pictures = (Image.open(BytesIO(one["bytes"])) for one in rows[image])
            if size:
                mode = "L" if channels == 1 else "RGB"
                pictures = (ImageOps.fit(one.convert(mode), (size, size)) for one in pictures)
            pixels = np.stack([np.asarray(one) for one in pictures])
            labels = np.array(rows[label].tolist(), dtype=np.uint16 if rows[label].max() > 255 else np.uint8)
        except (OSError, ValueError, TypeError, LookupError, SyntaxError, OverflowError) as error:
            raise UserError(f"images {source!r}: needs parquet of img (with bytes) and label: {error!r}") from error
    return pixels, labels, hashlib.sha256(pixels.tobytes() + labels.tobytes()).hexdigest()


@lru_cache(maxsize=2)
def load(source: str, image: ImageConfig) -> Images:
    """The two splits of a source in one size; held out for validation is every fifth image, or digit of scenes.

    Args:
        source: `digits`, `scenes`, or what `read` takes.
        image: its size and channels; digits and scenes are grey, the same in every channel.

    Raises:
        UserError: an unknown source, a size that it does not have, and what `read` refuses.
    """
    built_in = source in BUILT_IN
    known = f"{params.suggest(source, BUILT_IN)}; built in: {', '.join(BUILT_IN)}"
    params.require(built_in or Path(source).exists(), f"images {source!r}: no such file or folder{known}")
    pixels, labels, _ = read("digits") if built_in else read(source, image.size, image.channels)
    held, splits = np.arange(len(labels)) % 5 == 4, {}
    if built_in:
        params.require(image.size % 8 == 0, f"{source} have a size that 8 divides, not {image.size}")
        pixels = (pixels * 255 / 16).astype(np.uint8)
    if source == "digits":
        pixels = pixels.repeat(image.size // 8, 1).repeat(image.size // 8, 2)
    for seed, (split, own) in enumerate({"train": ~held, "validation": held}.items()):
        found, classes = pixels[own], labels[own]
        if source == "scenes":
            found, classes = _scenes(found, classes, image.size, _SCENES[split], seed)
        shaped = found.reshape(len(found), image.size, image.size, -1).transpose(0, 3, 1, 2)  # grey: in every channel
        splits[split] = image.packed(shaped, classes)
    sha256 = hashlib.sha256(b"".join(one.tobytes() for one in splits.values())).hexdigest()
    return Images(sha256, **splits)


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
