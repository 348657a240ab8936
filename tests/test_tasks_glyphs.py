"""Glyphs: characters drawn from matplotlib's fonts."""

import unicodedata

import numpy as np
import pytest
import torch
from scipy.sparse.csgraph import connected_components

from mlframework.errors import InvalidValue
from mlframework.tasks import Glyphs
from mlframework.tasks.images.glyphs import (
    COMPARED,
    FACES,
    FAMILY_ALIKE,
    FAMILY_SIZES,
    boxed,
    distinct_characters,
    families_of,
    font_file,
    ink,
    open_font,
)

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def characters():
    return distinct_characters({face: font_file(face) for face in FACES})


def glyphs(*, n_way=5, k_shot=1, k_query=5, drawings=6, **settings):
    return Glyphs(n_way=n_way, k_shot=k_shot, k_query=k_query, drawings=drawings, **settings)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_splits_share_no_character_and_have_64_16_and_20_percent():
    tasks = glyphs()
    names = [tasks.classes(split).names for split in SPLITS]
    everything = [name for split in names for name in split]
    assert len(set(everything)) == len(everything) > 1000
    assert np.allclose([len(split) / len(everything) for split in names], [0.64, 0.16, 0.2], atol=0.01)


def test_there_are_many_scripts_in_every_split():
    for split in SPLITS:
        scripts = {name.split()[0] for name in glyphs().classes(split).names}
        assert {"LATIN", "GREEK", "CYRILLIC", "ARMENIAN", "GEORGIAN", "ARABIC", "LAO", "CANADIAN"} <= scripts


def test_no_two_classes_have_the_same_picture_in_any_face(characters):
    for face, path in {face: font_file(face) for face in FACES}.items():
        font = open_font(path, 40)
        pictures = [boxed(ink(c, font)).tobytes() for c, faces in characters.items() if face in faces]
        assert len(set(pictures)) == len(pictures), face


@pytest.mark.parametrize("twins", ["A\N{GREEK CAPITAL LETTER ALPHA}\N{CYRILLIC CAPITAL LETTER A}", "oO", "Cc\u0441"])
def test_of_characters_that_look_alike_one_is_kept(characters, twins):
    assert sum(character in characters for character in twins) == 1


@pytest.mark.parametrize("size", FAMILY_SIZES)
def test_no_character_has_a_twin_in_another_split(characters, size):
    """A twin: a correlation of pixels above 0.9, each character in any typeface, scaled to one box."""
    rendered = []  # each character's pictures in all its typefaces, of mean 0 and norm 1
    fonts = {face: open_font(font_file(face), size) for face in FACES}
    for character, faces in characters.items():
        pictures = np.stack([boxed(ink(character, fonts[face])).ravel() for face in faces]).astype(np.float32)
        pictures -= pictures.mean(1, keepdims=True)
        rendered.append(pictures / np.linalg.norm(pictures, axis=1, keepdims=True))
    of_name = dict(zip(map(unicodedata.name, characters), rendered, strict=True))
    stacked = [np.concatenate([of_name[name] for name in glyphs().classes(split).names]) for split in SPLITS]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert max((part @ stacked[other].T).max() for part in np.array_split(stacked[one], 20)) <= 0.9


def test_a_family_is_a_connected_component_of_characters_alike_in_two_typefaces(characters):
    some = {name: characters[name] for name in list(characters)[:100]}
    pictures = {  # of each character, in all its typefaces and at both sizes
        size: [
            np.stack([boxed(ink(name, open_font(font_file(face), size))).ravel() for face in faces])
            for name, faces in some.items()
        ]
        for size in FAMILY_SIZES
    }
    alike = np.array(
        [
            [
                max(np.corrcoef(each[i], each[j])[: len(each[i]), len(each[i]) :].max() for each in pictures.values())
                > FAMILY_ALIKE
                for j in range(len(some))
            ]
            for i in range(len(some))
        ]
    )
    _, wanted = connected_components(alike)
    found = families_of(some, {face: font_file(face) for face in FACES})
    names = list(some)
    assert 1 < len(set(found)) < len(names)
    assert found == [names[np.flatnonzero(wanted == wanted[row])[0]] for row in range(len(names))]


def test_no_class_is_another_with_an_accent(characters):
    assert not any(unicodedata.decomposition(character) for character in characters)


def test_every_face_that_is_named_has_the_character(characters):
    for face in COMPARED:
        font = open_font(font_file(face), 40)
        missing = font.getmask("\uffff").getbbox(), bytes(font.getmask("\uffff"))
        for character, faces in characters.items():
            if face in faces:
                assert (font.getmask(character).getbbox(), bytes(font.getmask(character))) != missing, character


def test_a_glyph_lies_wholly_inside_its_image():
    x = glyphs().classes("train").x
    rim = torch.cat([x[..., 0, :], x[..., -1, :], x[..., 0], x[..., -1]], dim=-1)
    assert rim.max() == 0
    assert (x.flatten(1).float().amax(1) > 100).all(), "an image is blank"
    height, width = (x.amax(-1) > 0).sum(-1), (x.amax(-2) > 0).sum(-1)
    assert torch.maximum(height, width).min() >= 28 / 3, "a glyph is tiny"


def test_drawings_of_a_class_differ():
    images = glyphs().classes("test").x.flatten(1).view(-1, 6, 28 * 28)
    assert all(len({image.numpy().tobytes() for image in drawings}) == 6 for drawings in images)


def test_images_are_those_of_the_seed_whether_drawn_or_read(tmp_path, monkeypatch):
    def episode(seed):
        return glyphs(drawings=3, k_query=2, image_size=16, seed=seed).sample(4, "test", seeded()).hash()

    drawn, read, other = episode(0), episode(0), episode(1)
    assert drawn == read != other
    monkeypatch.setenv("MLFRAMEWORK_CACHE", str(tmp_path))
    assert episode(0) == drawn


def test_a_drawings_label_is_that_of_its_character():
    tasks = glyphs()
    class_of = {image.numpy().tobytes(): row // 6 for row, image in enumerate(tasks.classes("test").x)}
    episode = tasks.sample(100, "test", seeded()).joined()
    as_bytes = (episode.x * 255).round().to(torch.uint8)
    for x, y in zip(as_bytes, episode.y, strict=True):
        classes = [{class_of[image.numpy().tobytes()] for image in x[y == label]} for label in range(5)]
        assert all(len(each) == 1 for each in classes) and len(set.union(*classes)) == 5


def test_nearest_pixels_do_better_than_chance_and_far_from_well():
    episode = glyphs().sample(400, "test", seeded())
    nearest = torch.cdist(episode.query.x.flatten(2), episode.support.x.flatten(2)).argmin(-1)
    assert 0.3 < (nearest == episode.query.y).float().mean() < 0.5


@pytest.mark.parametrize(
    ("field", "setting"), [("drawings", {"drawings": 1}), ("image_size", {"image_size": 7}), ("k_shot", {"k_shot": 6})]
)
def test_a_wrong_setting_is_named_at_once(field, setting):
    with pytest.raises(InvalidValue) as caught:
        glyphs(**setting)
    assert caught.value.field == field
