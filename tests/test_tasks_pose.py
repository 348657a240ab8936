"""Solids are closed and drawn right; poses are those of the views; what a training object keeps."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mlframework.errors import InvalidValue
from mlframework.tasks import Pose
from mlframework.tasks.regression import solids
from mlframework.tasks.regression.solids import CUBE, CUBE_FACES, LIGHT, PYRAMID, PYRAMID_FACES, Mesh, render


def volume(corners):
    """Of the solid inside triangles `[n, 3, 3]`, by the divergence theorem: right only if all face outwards."""
    return np.linalg.det(corners).sum() / 6


def test_the_parts_are_closed_and_face_outwards():
    assert volume(CUBE[CUBE_FACES]) == pytest.approx(1)
    assert volume(PYRAMID[PYRAMID_FACES]) == pytest.approx(1 / 3)
    for faces in (CUBE_FACES, PYRAMID_FACES):
        edges = {(int(a), int(b)) for face in faces for a, b in zip(face, np.roll(face, -1), strict=True)}
        assert edges == {(b, a) for a, b in edges}  # each edge is passed once in each direction


def facing(size, towards):
    """A triangle that faces the camera at elevation 0, half of a square of side `2 * size`, `towards` the camera."""
    # At elevation 0 the camera looks along the second axis.
    return np.array([[-size, -towards, -size], [size, -towards, -size], [-size, -towards, size]])


def test_a_triangle_covers_its_area_at_its_place_with_its_brightness():
    image = render(Mesh(facing(0.5, 0.0)[None]), 0.0, 0.0, 40) / 255
    lit = 0.25 + 0.75 * LIGHT[2]  # Lambert: the normal is the view's own axis
    assert image.max() == pytest.approx(lit, abs=1 / 255)
    assert image.sum() / lit / 40**2 == pytest.approx(0.5 / 4, abs=0.01)  # 0.5 of the square of side 2
    assert image[28, 12] > 0.5  # at the lower left: rows go downwards
    assert image[12, 28] == 0


def test_a_triangle_that_faces_away_is_not_drawn():
    assert render(Mesh(facing(0.5, 0.0)[None, ::-1]), 0.0, 0.0, 20).max() == 0


@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)])
def test_the_nearer_of_two_triangles_hides_the_other_in_whatever_order(order):
    near, far = facing(0.3, 0.2), facing(0.9, -0.2)
    tilted = far @ solids.about_upright(0.5).T  # another brightness
    both = render(Mesh(np.stack([near, tilted])[order]), 0.0, 0.0, 40)
    alone = render(Mesh(near[None]), 0.0, 0.0, 40)
    inside = np.s_[23:25, 15:19]
    assert (both[inside] == alone[inside]).all()
    assert alone[inside].min() > 0


def test_turning_an_object_is_a_change_of_azimuth():
    mesh = solids.random_object(np.random.default_rng(0))
    turned = Mesh(mesh.corners @ solids.about_upright(0.7).T)
    assert (render(turned, 0.4, 0.5, 28) == render(mesh, 1.1, 0.5, 28)).all()
    assert (render(mesh, 0.4 + 2 * math.pi, 0.5, 28) == render(mesh, 0.4, 0.5, 28)).all()
    assert (render(mesh, 0.4, 0.5, 28) != render(mesh, 1.1, 0.5, 28)).mean() > 0.1


def test_objects_fit_in_the_picture_and_differ():
    meshes = [solids.random_object(np.random.default_rng(seed)) for seed in range(20)]
    assert all(np.linalg.norm(mesh.corners, axis=-1).max() == pytest.approx(1) for mesh in meshes)
    views = {render(mesh, 0.0, 0.5, 16).tobytes() for mesh in meshes}
    assert len(views) == 20


def made(exclusive):
    return Pose(k_shot=4, k_query=4, exclusive=exclusive, objects=3, views=12, image_size=12, seed=3)


def turns(y):
    """Directions as shares of a full turn, from -0.5 to 0.5."""
    return torch.atan2(y[..., 1], y[..., 0]) / (2 * math.pi)


def pairs(task, split, draws=30):
    """All targets of each image, in some draws."""
    found, generator = {}, torch.Generator().manual_seed(0)
    for _ in range(draws):
        examples = task.sample(4, split, generator).joined()
        for x, turn in zip(examples.x.flatten(0, 1), turns(examples.y).flatten(), strict=True):
            found.setdefault(x.numpy().tobytes(), set()).add(round(float(turn), 3))
    return found


def test_a_training_object_keeps_its_pose_only_if_tasks_are_not_exclusive():
    fixed, drawn = pairs(made(False), "train"), pairs(made(True), "train")
    assert fixed.keys() == drawn.keys()
    assert all(len(targets) == 1 for targets in fixed.values())
    assert sum(len(targets) > 1 for targets in drawn.values()) > 30


def test_exclusive_tasks_are_fixed_ones_with_all_azimuths_moved_by_one_number():
    one, other = (made(e).sample(5, "train", torch.Generator().manual_seed(1)).joined() for e in (False, True))
    assert torch.equal(one.x, other.x)
    torch.testing.assert_close(other.y.norm(dim=-1), torch.ones(5, 8))
    moved = turns(other.y) - turns(one.y)
    assert ((moved - moved[:, :1] + 0.5) % 1 - 0.5).abs().max() < 1e-5
    assert moved[:, 0].std() > 0.1


def test_the_target_is_the_azimuth_of_the_view_and_degrees_are_its_error():
    task = made(False)
    images, azimuths = task.views_of("test")
    examples = task.sample(1, "test", torch.Generator().manual_seed(0)).joined()
    where = {
        image.numpy().tobytes(): float(t)
        for image, t in zip(images.flatten(0, 1).float() / 255, azimuths.flatten(), strict=True)
    }
    wanted = torch.tensor([where[x.numpy().tobytes()] for x in examples.x[0]])
    torch.testing.assert_close(turns(examples.y[0]) % 1, wanted, rtol=0, atol=1e-5)
    angle = torch.tensor([10.0, -170.0, 90.0]).deg2rad()
    y = torch.tensor([20.0, 175.0, 0.0]).deg2rad()
    prediction = 3 * torch.stack([angle.cos(), angle.sin()], -1)
    degrees = task.metrics(prediction, torch.stack([y.cos(), y.sin()], -1))["degrees"]
    torch.testing.assert_close(degrees, torch.tensor([10.0, 15.0, 90.0]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_validation_and_test_tasks_are_the_same_either_way(split):
    one, other = (made(e).sample(5, split, torch.Generator().manual_seed(1)).hash() for e in (False, True))
    assert one == other


def test_no_two_splits_share_an_object_and_a_task_is_one_object():
    images = {split: set(pairs(made(False), split, 5)) for split in ("train", "validation", "test")}
    assert not images["train"] & images["test"]
    assert not images["validation"] & images["test"]
    task, drawn = made(False), torch.Generator().manual_seed(5)
    names = task.drawn_from(6, "test", torch.Generator().manual_seed(5))
    episode = task.sample(6, "test", drawn)
    views = task.views_of("test")[0].float() / 255
    for (name,), x in zip(names, episode.support.x, strict=True):
        own = {view.numpy().tobytes() for view in views[int(name.removeprefix("object "))]}
        assert {image.numpy().tobytes() for image in x} <= own


def test_too_few_views_are_refused():
    with pytest.raises(InvalidValue, match=r"views=7: must be at least k_shot \+ k_query, 8"):
        Pose(k_shot=4, k_query=4, exclusive=False, views=7)
