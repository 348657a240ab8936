"""Glyphs: characters of many scripts, drawn from the fonts that matplotlib ships."""

from __future__ import annotations

import hashlib
import math
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations_with_replacement
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, features
from PIL.ImageFont import FreeTypeFont
from torch import Tensor

from mlframework.episode import Split
from mlframework.errors import UserError
from mlframework.screen import stage
from mlframework.tasks.data_folder import Arrays, cached
from mlframework.tasks.few_shot import ClassIndexed, FewShotClassification, check_at_least, split_by_hash
from mlframework.tasks.images.own_images import as_images

__all__ = ["Glyphs"]

FACES = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"),
    *("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique"),
    *("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"),
)
# Some characters are twins in one of these and not in the others.
COMPARED = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSansMono", "STIXGeneral")

# Unicode's letters and digits in at least so many faces; of symbols, which have many near twins, the common ones.
MIN_FACES = {"Lu": 4, "Ll": 4, "Lo": 4, "Nd": 4, "Sm": 12, "Sc": 12}

# Correlations of two characters' pixels, both scaled to one box, above which they are taken for the same shape, and for
# one family. Families look at fonts of these sizes: thin strokes are rounded differently at different sizes.
ALIKE, FAMILY_ALIKE = 0.85, 0.88
BOX, FAMILY_SIZES = 20, (48, 64)


class Glyphs(FewShotClassification):
    """Which of `n_way` printed characters is it? Over a thousand characters of many scripts; nothing to download.

    Each drawing has its own typeface, stroke thickness, rotation, shear, proportions, size and place. Characters that
    cannot be told apart by shape, such as Latin A, Greek Alpha and Cyrillic A, or o and O, are one class: the first of
    them in Unicode's order. Characters that look alike across typefaces are one family, as are those alike to these.
    Splits are by family, in a fixed order: 64 % train, 16 % validation, 20 % test.

    Args:
        n_way, k_shot, k_query: see `FewShotClassification`.
        drawings: drawings of each character.
        image_size: height and width.
        seed: of the drawings. Same seed, same drawings, as long as the fonts, Pillow and FreeType are the same.

    >>> Glyphs(n_way=5, k_shot=1, k_query=15).spec.x_shape
    (1, 28, 28)
    """

    def __init__(
        self,
        *,
        n_way: int,
        k_shot: int | Sequence[int],
        k_query: int,
        drawings: int = 20,
        image_size: int = 28,
        seed: int = 0,
    ) -> None:
        check_at_least(2, drawings=drawings)
        check_at_least(8, image_size=image_size)
        shape = (1, image_size, image_size)
        super().__init__(shape, n_way=n_way, k_shot=k_shot, k_query=k_query, smallest_class=drawings)
        self.drawings, self.image_size, self.seed = drawings, image_size, seed

    def encode_inputs(self, x: Any, support: Tensor | None = None) -> Tensor:
        return as_images(x, self.spec.x_shape, ink=True)

    def load(self, split: Split) -> ClassIndexed:
        fonts = {face: font_file(face) for face in FACES}
        contents = [hashlib.sha256(path.read_bytes()).hexdigest() for path in fonts.values()]
        renderer = PIL.__version__, features.version("freetype2"), unicodedata.unidata_version
        settings = (contents, renderer, self.drawings, self.image_size, self.seed)
        arrays = cached("glyphs", settings, lambda: self._draw_all(fonts), source=__file__)
        row_of = {str(name): row for row, name in enumerate(arrays["names"])}
        found = cached("glyph_families", (contents, renderer), lambda: name_families(fonts), source=__file__)
        families: dict[str, list[str]] = defaultdict(list)
        for name, family in zip(row_of, found["families"], strict=True):
            families[str(family)].append(name)
        names = [name for family in split_by_hash(families)[split] for name in families[family]]
        images = torch.from_numpy(arrays["images"][[row_of[name] for name in names]])
        return ClassIndexed.from_classes(names, images.unsqueeze(2))

    def _draw_all(self, fonts: dict[str, Path]) -> Arrays:
        """`names` `[characters]` and uint8 `images` `[characters, drawings, height, width]`."""
        loaded = {face: open_font(path, 2 * self.image_size) for face, path in fonts.items()}
        names, images = [], []
        with stage("drawing glyphs"):
            for character, faces in distinct_characters(fonts).items():
                names.append(unicodedata.name(character))
                rng = Random(f"{self.seed} {character}")
                choices = [loaded[face] for face in faces]
                drawn = [draw(character, rng.choice(choices), self.image_size, rng) for _ in range(self.drawings)]
                images.append(drawn)
        return {"names": np.array(names), "images": np.array(images, dtype=np.uint8)}


def font_file(face: str) -> Path:
    import matplotlib  # here, as below: other tasks need not wait for it

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"
    if not path.is_file():
        raise UserError(f"{path}: not there, though matplotlib ships it: reinstall matplotlib")
    return path


def open_font(path: Path, size: int) -> FreeTypeFont:
    # BASIC: single characters need no shaping, and the other layout hangs on libraqm being there.
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


def distinct_characters(fonts: dict[str, Path]) -> dict[str, list[str]]:
    """The characters that become classes, in Unicode's order, with the faces that have them."""
    from matplotlib.ft2font import FT2Font

    faces_of: dict[str, list[str]] = defaultdict(list)
    for face, path in fonts.items():
        for code in FT2Font(str(path)).get_charmap():
            faces_of[chr(code)].append(face)
    wanted = {c for c, faces in faces_of.items() if len(faces) >= MIN_FACES.get(unicodedata.category(c), math.inf)}
    # Others are another one with an accent, or in another style.
    candidates = sorted(character for character in wanted if not unicodedata.decomposition(character))
    alike = np.zeros((len(candidates), len(candidates)), dtype=bool)
    for face in COMPARED:
        rows = [row for row, character in enumerate(candidates) if face in faces_of[character]]
        shapes = shapes_of([candidates[row] for row in rows], open_font(fonts[face], 48))
        alike[np.ix_(rows, rows)] |= shapes @ shapes.T > ALIKE
    kept: list[int] = []
    for row in range(len(candidates)):
        if not alike[row, kept].any():
            kept.append(row)
    return {candidates[row]: faces_of[candidates[row]] for row in kept}


def name_families(fonts: dict[str, Path]) -> Arrays:
    """The name of the first character in each one's family: `families` `[characters]`."""
    families = families_of(distinct_characters(fonts), fonts)
    return {"families": np.array([unicodedata.name(first) for first in families])}


def families_of(characters: dict[str, list[str]], fonts: dict[str, Path]) -> list[str]:
    """The first character of each one's family: alike in any two typefaces, or joined by a chain of such characters.

    A character in one typeface may be the twin of another character in another: Latin V in bold, Canadian FE.
    """
    names = list(characters)
    alike = np.eye(len(names), dtype=bool)
    for size in FAMILY_SIZES:
        drawn = []  # of each typeface, the rows that have it and their shapes
        for face, path in fonts.items():
            rows = np.array([row for row, name in enumerate(names) if face in characters[name]])
            drawn.append((rows, shapes_of([names[row] for row in rows], open_font(path, size)).astype(np.float32)))
        for (some, shapes), (others, other_shapes) in combinations_with_replacement(drawn, 2):
            one, other = np.nonzero(shapes @ other_shapes.T > FAMILY_ALIKE)
            alike[some[one], others[other]] = alike[others[other], some[one]] = True
    first = np.arange(len(names))
    while (earlier := np.where(alike, first, len(names)).min(1)).tolist() != first.tolist():
        first = earlier
    return [names[row] for row in first]


def shapes_of(characters: list[str], font: FreeTypeFont) -> np.ndarray:
    """Pixels up to size and place, of mean 0 and norm 1, whose products are correlations: `[characters, BOX * BOX]`."""
    pixels = np.stack([boxed(ink(character, font)).ravel() for character in characters])
    pixels -= pixels.mean(1, keepdims=True)
    pixels /= np.linalg.norm(pixels, axis=1, keepdims=True)
    return pixels


def ink(character: str, font: FreeTypeFont, stroke: int = 0) -> Image.Image:
    """The character in white on black, in an image that just holds it; `stroke` pixels thicker on each side."""
    left, top, right, bottom = font.getbbox(character, stroke_width=stroke)
    image = Image.new("L", (int(right - left), int(bottom - top)))
    ImageDraw.Draw(image).text((-left, -top), character, fill=255, font=font, stroke_width=stroke)
    return image.crop(image.getbbox())


def boxed(image: Image.Image) -> np.ndarray:
    """The image scaled to fill a box, in its middle: float64 `[BOX, BOX]`."""
    width, height = (max(1, round(side * BOX / max(image.size))) for side in image.size)
    box = Image.new("L", (BOX, BOX))
    box.paste(image.resize((width, height), Image.Resampling.BOX), ((BOX - width) // 2, (BOX - height) // 2))
    return np.asarray(box, dtype=np.float64)


def draw(character: str, font: FreeTypeFont, image_size: int, rng: Random) -> np.ndarray:
    """One drawing as uint8 `[image_size, image_size]`, ink 255 and paper 0; `font` of twice the image's size."""
    # The empty rim gives the outermost edges something to be smoothed with.
    glyph = ImageOps.expand(ink(character, font, stroke=rng.randrange(2)), border=1)
    # At twice the final size, so that averaging 2x2 pixels smooths the edges.
    size, affine = 2 * image_size, random_affine(glyph.size, 2 * image_size, rng)
    canvas = glyph.transform((size, size), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)
    return np.asarray(canvas.reduce(2))


def random_affine(size: tuple[int, int], canvas: int, rng: Random) -> tuple[float, ...]:
    """The map from canvas to glyph, as PIL wants it, that puts the turned and sheared glyph well inside the canvas."""
    angle, shear = math.radians(rng.uniform(-15, 15)), rng.uniform(-0.2, 0.2)
    stretch = math.exp(rng.uniform(-0.2, 0.2))
    cos, sin = math.cos(angle), math.sin(angle)
    # forward = rotation @ [[stretch, shear], [0, 1 / stretch]], glyph to canvas, before the size is known
    a, b, c, d = cos * stretch, cos * shear - sin / stretch, sin * stretch, sin * shear + cos / stretch
    width, height = abs(a) * size[0] + abs(b) * size[1], abs(c) * size[0] + abs(d) * size[1]
    scale = rng.uniform(0.55, 0.9) * canvas / max(width, height)
    x = canvas / 2 + rng.uniform(-0.25, 0.25) * (canvas - scale * width)
    y = canvas / 2 + rng.uniform(-0.25, 0.25) * (canvas - scale * height)
    a, b, c, d = d / scale, -b / scale, -c / scale, a / scale  # its inverse: the determinant is scale squared
    return a, b, size[0] / 2 - a * x - b * y, c, d, size[1] / 2 - c * x - d * y
