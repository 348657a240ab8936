"""A user's own folder of images."""

import re
import struct
import unicodedata
import zlib
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mlframework.base_layers import Conv4
from mlframework.errors import InvalidValue, UserError
from mlframework.inner_loop import SGD
from mlframework.meta_layers import MAML, Exact
from mlframework.tasks import ImageFolder
from mlframework.training.meta_gradient import meta_gradient

SPLITS = ("train", "validation", "test")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFRAMEWORK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def paint(path, level, *, size=(12, 9), mode="RGB", **options):
    """An image all of one brightness."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, level).convert(mode).save(path, **options)


def fill(root, classes, images=4):
    """Class `i` holds `images` images of brightness `10 * i`."""
    for i in range(classes):
        for j in range(images):
            paint(root / f"class{i:02}" / f"{j}.png", 10 * i, size=(5 + i, 7 + j))
    return root


def image_folder(path, *, n_way=2, k_shot=1, k_query=2, image_size=8, **settings):
    return ImageFolder(path, n_way=n_way, k_shot=k_shot, k_query=k_query, image_size=image_size, **settings)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_every_image_of_any_size_is_drawn_with_its_own_class(tmp_path):
    tasks = image_folder(fill(tmp_path / "images", 20))
    for split in SPLITS:
        data = tasks.classes(split)
        brightness = data.x.flatten(1).float().mean(1).view(len(data.names), 4)
        assert (brightness == torch.tensor([10.0 * int(name[-2:]) for name in data.names])[:, None]).all()
    assert tasks.sample(3, "train", seeded()).query.x.shape[2:] == tasks.spec.x_shape == (3, 8, 8)


def test_a_cold_and_a_warm_cache_give_the_same_layout_loss_and_gradient(tmp_path):
    rng, outcomes = np.random.default_rng(0), []
    for i, j in product(range(12), range(4)):
        path = tmp_path / "images" / f"class{i}" / f"{j}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    for _ in ("cold", "warm"):
        task = image_folder(tmp_path / "images", image_size=16)
        episode = task.sample(3, "train", seeded())
        torch.manual_seed(0)
        network = Conv4(task.spec, filters=8)
        layer = MAML(network, task, update=partial(SGD, lr=0.4), meta_gradient=Exact(), inner_steps=3)
        layer.engine = "loop"
        losses, _ = meta_gradient(layer, episode)
        strides = [leaf.stride() for part in episode for leaf in part]
        outcomes.append((strides, losses, [p.grad for p in layer.parameters()]))
    (strides, *numbers), (warm_strides, *warm) = outcomes
    assert strides == warm_strides
    torch.testing.assert_close(numbers, warm, rtol=0, atol=0)


def test_classes_are_split_64_16_20_and_none_is_in_two(tmp_path):
    names = [image_folder(fill(tmp_path / "images", 25, 2)).classes(split).names for split in SPLITS]
    assert [len(split) for split in names] == [16, 4, 5]
    assert sorted(sum(names, ())) == [f"class{i:02}" for i in range(25)]


@pytest.mark.parametrize("validation", ["validation", "val"])
def test_folders_called_as_the_splits_are_taken_for_them(tmp_path, validation):
    for split, label in (("train", "a"), (validation, "b"), ("test", "c")):
        for i in range(2):
            paint(tmp_path / "images" / split / f"{label}{i}" / "0.png", 0)
            paint(tmp_path / "images" / split / f"{label}{i}" / "1.JPG", 0)
    tasks = image_folder(tmp_path / "images")
    assert [tasks.classes(split).names for split in SPLITS] == [("a0", "a1"), ("b0", "b1"), ("c0", "c1")]


def test_a_class_may_be_called_train(tmp_path):
    for name in ("bus", "car", "train", *"abcdefg"):
        for i in range(3):
            paint(tmp_path / "images" / name / f"{i}.png", 0)
    names = [image_folder(tmp_path / "images").classes(split).names for split in SPLITS]
    assert "train" in sum(names, ())


def test_classes_of_unequal_size_give_masked_queries(tmp_path):
    for i in range(12):
        for j in range(2 + i % 3):
            paint(tmp_path / "images" / f"class{i:02}" / f"{j}.png", i)
    tasks = image_folder(tmp_path / "images", k_query=3)
    assert tasks.spec.ragged
    data, episode = tasks.classes("train"), tasks.sample(30, "train", seeded())
    size_of = dict(zip((int(name[-2:]) for name in data.names), data.sizes.tolist(), strict=True))
    assert set(size_of.values()) == {2, 3, 4}
    assert episode.support.mask.min() == 1
    for x, y, mask in zip(*episode.query, strict=True):
        for label in range(2):
            shown = round(x[y == label][0].mean().item() * 255)
            assert mask[y == label].sum() == size_of[shown] - 1


def test_a_promised_size_makes_tasks_even_and_is_checked(tmp_path):
    root = fill(tmp_path / "images", 10)
    assert not image_folder(root, smallest_class=4, k_query=3).spec.ragged
    with pytest.raises(InvalidValue, match=r"smallest_class=5: class class\d\d \(.*\) has only 4 examples"):
        image_folder(root, smallest_class=5).sample(1, "train", seeded())


def two_classes(root):
    """A root with all three splits, to put special images into `train/a`."""
    for split, names in (("train", "ab"), ("val", "cd"), ("test", "ef")):
        for name in names:
            paint(root / split / name / "0.png", 0)
            paint(root / split / name / "1.png", 0)
    return root


def first_image(root, **settings):
    return image_folder(root, **settings).classes("train").x[0]


def test_colours_and_greys(tmp_path):
    root = two_classes(tmp_path / "images")
    Image.new("RGB", (5, 5), (255, 0, 0)).save(root / "train" / "a" / "0.png")
    assert first_image(root)[:, 0, 0].tolist() == [255, 0, 0]
    grey = first_image(root, channels=1)
    assert grey.shape == (1, 8, 8)
    assert grey[0, 0, 0] == 76  # 0.299 of 255


def test_an_image_is_scaled_and_not_turned(tmp_path):
    root = two_classes(tmp_path / "images")
    photo = Image.new("L", (16, 32))
    photo.paste(255, (0, 0, 16, 16))  # the upper half
    photo.save(root / "train" / "a" / "0.png")
    upper, lower = first_image(root)[:, :3].float(), first_image(root)[:, -3:].float()
    assert upper.min() > 250 and lower.max() < 5


def test_a_photo_is_turned_as_its_exif_says(tmp_path):
    root = two_classes(tmp_path / "images")
    photo, exif = Image.new("L", (16, 16)), Image.Exif()
    photo.paste(255, (0, 0, 8, 16))  # the left half; orientation 6: to be turned clockwise
    exif[0x0112] = 6
    photo.save(root / "train" / "a" / "0.png", exif=exif)
    upper, lower = first_image(root)[:, :3].float(), first_image(root)[:, -3:].float()
    assert upper.min() > 250 and lower.max() < 5


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_becomes_white(tmp_path, mode):
    root = two_classes(tmp_path / "images")
    options = {"transparency": 0} if mode == "P" else {}
    Image.new(mode, (5, 5)).save(root / "train" / "a" / "0.png", **options)
    assert first_image(root).min() == 255


def test_sixteen_bits_are_scaled_rather_than_clipped(tmp_path):
    root = two_classes(tmp_path / "images")
    Image.fromarray(np.full((5, 5), 0x8000, dtype=np.uint16)).save(root / "train" / "a" / "0.png")
    assert first_image(root)[0, 0, 0] == 0x80


def depth(root, largest, *, suffix="png", shape=(5, 5)):
    """A ramp from 0 to a largest value in a 16-bit file, in place of the first image."""
    ramp = np.linspace(0, largest, 25).round().astype(np.uint16).reshape(5, 5)
    (root / "train" / "a" / "0.png").unlink()
    Image.fromarray(ramp).save(root / "train" / "a" / f"0.{suffix}")
    return ramp


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_the_bits_that_a_sixteen_bit_file_uses_keep_their_levels(tmp_path, bits, suffix):
    root = two_classes(tmp_path / "images")
    ramp = depth(root, 2**bits - 1, suffix=suffix)
    read = first_image(root, bits=bits, channels=1, image_size=5)[0]
    assert read.tolist() == (ramp // 2 ** (bits - 8)).tolist()
    assert read.max() == 255 and read.unique().numel() == 25


@pytest.mark.parametrize(("largest", "advice"), [(255, 8), (1023, 10), (3000, 12), (4095, 12), (16383, 14)])
def test_a_sixteen_bit_file_that_would_lose_its_levels_is_named(tmp_path, largest, advice):
    root = two_classes(tmp_path / "images")
    depth(root, largest)
    with pytest.raises(InvalidValue, match=rf"bits=None: .*0\.png uses \d+ of its 16 bits.*: must be {advice}, or 16"):
        first_image(root)
    assert first_image(root, bits=16, image_size=5).max() == largest >> 8


def test_a_pixel_beyond_the_bits_is_named(tmp_path):
    root = two_classes(tmp_path / "images")
    depth(root, 5000)
    with pytest.raises(InvalidValue, match=r"bits=12: must be at least 13: .*0\.png holds the value 5000"):
        first_image(root, bits=12)


def test_a_black_sixteen_bit_file_is_black(tmp_path):
    root = two_classes(tmp_path / "images")
    depth(root, 0)
    assert first_image(root).max() == 0


def png_of_sixteen_bit_colours(value):
    """A PNG of 4x4 pixels of one 16-bit value in all three colours, which PIL cannot write."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = (b"\0" + struct.pack(">H", value) * 12) * 4
    header = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_sixteen_bit_colours_that_would_lose_their_levels_are_named(tmp_path):
    root = two_classes(tmp_path / "images")
    (root / "train" / "a" / "0.png").write_bytes(png_of_sixteen_bit_colours(0x0FFF))
    with pytest.raises(UserError, match=r"0\.png: uses 12 of the 16 bits of a colour"):
        first_image(root)
    assert first_image(root, bits=16).max() == 0x0F
    (root / "train" / "a" / "0.png").write_bytes(png_of_sixteen_bit_colours(0xABCD))
    assert first_image(root).unique().tolist() == [0xAB]


@pytest.mark.parametrize("bits", [7, 17, "12", True, 12.0])
def test_bits_that_no_file_can_use_are_refused(tmp_path, bits):
    (tmp_path / "images").mkdir()
    with pytest.raises(InvalidValue, match=f"bits={bits}: must be a whole number from 8 to 16, or null"):
        image_folder(tmp_path / "images", bits=bits)


def renamed(root, form):
    """Class folders and images whose names hold an accent, in a Unicode form."""
    for folder in sorted(root.iterdir()):
        for image in sorted(folder.iterdir()):
            image.rename(folder / unicodedata.normalize(form, f"\N{LATIN SMALL LETTER E WITH ACUTE}{image.name}"))
        folder.rename(root / unicodedata.normalize(form, f"\N{LATIN SMALL LETTER E WITH ACUTE}{folder.name}"))
    return root


def test_the_unicode_form_of_names_changes_no_episode(tmp_path):
    tasks = [image_folder(renamed(fill(tmp_path / form, 25), form)) for form in ("NFC", "NFD")]
    for split in SPLITS:
        first, second = (task.sample(4, split, seeded()).hash() for task in tasks)
        assert first == second


def test_two_unicode_forms_of_one_class_are_an_error(tmp_path):
    root = fill(tmp_path / "images", 10)
    (root / "class00").rename(root / "\N{LATIN SMALL LETTER E WITH ACUTE}")
    (root / "class01").rename(root / "e\N{COMBINING ACUTE ACCENT}")
    with pytest.raises(UserError, match="one name in two Unicode forms"):
        image_folder(root).classes("train")


def test_a_changed_image_is_read_anew(tmp_path):
    root = two_classes(tmp_path / "images")
    assert first_image(root).max() == 0
    paint(root / "train" / "a" / "0.png", 200)
    assert first_image(root).min() == 200


def test_constructing_reads_no_image(tmp_path):
    (tmp_path / "images").mkdir()
    assert image_folder(tmp_path / "images").spec.ragged


def few(root):
    (root / "train" / "a" / "1.png").unlink()


def none(root):
    few(root)
    (root / "val" / "c" / "0.png").unlink()
    (root / "val" / "c" / "1.png").unlink()


def no_text(root):
    (root / "train" / "a" / "0.png").write_text("not an image")


def half(root):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40), dtype=np.uint8)
    Image.fromarray(noise).save(root / "train" / "a" / "0.png")
    (root / "train" / "a" / "0.png").write_bytes((root / "train" / "a" / "0.png").read_bytes()[:900])


def floats(root):
    Image.new("F", (5, 5)).save(root / "train" / "a" / "0.tif")


def no_validation(root):
    (root / "val").rename(root.parent / "elsewhere")


def twice(root):
    (root / "test" / "e").rename(root / "test" / "a")


def one_class(root):
    (root / "val" / "c").rename(root.parent / "elsewhere")


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (few, "k_shot=1: {root}/train/a has only 1 images, and one must be left to query"),
        (none, "{root}/val/c: holds no images"),
        (no_text, "{root}/train/a/0.png: cannot be read as an image"),
        (half, "{root}/train/a/0.png: cannot be read as an image"),
        (floats, "{root}/train/a/0.tif: cannot be read as an image (32 bits per pixel, mode F)"),
        (no_validation, "{root}/validation: holds no class folders"),
        (twice, "{root}/test/a: is also at {root}/train/a"),
        (one_class, "n_way=2: {root} has only 1 classes for validation"),
    ],
)
def test_a_faulty_folder_or_file_is_named_in_one_line_at_the_first_draw(tmp_path, cache, spoil, line):
    root = two_classes(tmp_path / "images")
    spoil(root)
    with pytest.raises(UserError) as caught:
        image_folder(root).sample(1, "train", seeded())
    assert str(caught.value).startswith(line.format(root=root))
    assert "\n" not in str(caught.value)
    assert not cache.exists()


def test_a_folder_without_folders_is_named(tmp_path):
    paint(tmp_path / "images" / "0.png", 0)
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'images'}: holds no folders")):
        image_folder(tmp_path / "images").sample(1, "train", seeded())


@pytest.mark.parametrize(
    ("field", "setting"),
    [
        ("path", {"path": None}),
        ("channels", {"channels": 2}),
        ("image_size", {"image_size": 0}),
        ("k_shot", {"smallest_class": 1}),
    ],
)
def test_a_wrong_setting_is_named_at_once(field, setting):
    with pytest.raises(InvalidValue) as caught:
        image_folder(**{"path": Path(__file__).parent, **setting})
    assert caught.value.field == field


def test_a_path_that_is_not_there_is_named_when_tasks_are_drawn():
    task = image_folder("/nowhere")
    with pytest.raises(InvalidValue, match="path=/nowhere: there is no such folder, looked for at /nowhere: must name"):
        task.sample(1, "train", seeded())
