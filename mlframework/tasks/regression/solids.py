"""Small solid objects of boxes and pyramids, and a rasteriser that draws them in grey."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

__all__ = ["Mesh", "draw_views", "random_object", "render"]

#: Corners of the unit cube around zero, and its faces as triangles, anticlockwise from outside.
CUBE = np.array([[x, y, z] for x in (-0.5, 0.5) for y in (-0.5, 0.5) for z in (-0.5, 0.5)])
CUBE_FACES = np.array(
    [
        *([0, 1, 3], [0, 3, 2], [4, 6, 7], [4, 7, 5], [0, 4, 5], [0, 5, 1]),
        *([2, 3, 7], [2, 7, 6], [0, 2, 6], [0, 6, 4], [1, 5, 7], [1, 7, 3]),
    ]
)
#: A pyramid on a square.
PYRAMID = np.array([[-0.5, -0.5, -0.5], [0.5, -0.5, -0.5], [0.5, 0.5, -0.5], [-0.5, 0.5, -0.5], [0.0, 0.0, 0.5]])
PYRAMID_FACES = np.array([[0, 2, 1], [0, 3, 2], [0, 1, 4], [1, 2, 4], [2, 3, 4], [3, 0, 4]])

#: The direction of the light, as the camera sees it: right, up, towards the camera.
LIGHT = np.array([0.5, 0.6, 0.62]) / np.linalg.norm([0.5, 0.6, 0.62])
#: Samples of a pixel along each axis.
SAMPLES = 2
#: The range of the camera's elevation.
ELEVATION = (0.3, 0.8)


class Mesh(NamedTuple):
    """Triangles in space; the third axis is up."""

    corners: np.ndarray  # [triangles, 3, 3]: the corners of each, anticlockwise from outside


def draw_views(rng: np.random.Generator, views: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Views of a random object: uint8 images `[views, size, size]`, and azimuths `[views]` as shares of a full turn."""
    solid = random_object(rng)
    turns, elevations = rng.random(views), rng.uniform(*ELEVATION, views)
    pairs = zip(2 * math.pi * turns, elevations, strict=True)
    return np.array([render(solid, turn, elevation, size) for turn, elevation in pairs]), turns


def random_object(rng: np.random.Generator) -> Mesh:
    """A body with three to five parts that stand out of it to various sides; it fits in the unit ball."""
    parts = [placed(CUBE, CUBE_FACES, rng.uniform((0.5, 0.3, 0.3), (0.9, 0.6, 0.7)), np.zeros(3), 0.0)]
    for _ in range(rng.integers(3, 6)):
        corners, faces = (CUBE, CUBE_FACES) if rng.random() < 0.6 else (PYRAMID, PYRAMID_FACES)
        around, height = rng.uniform(0, 2 * math.pi), rng.uniform(-0.3, 0.6)
        place = np.array([0.55 * math.cos(around), 0.4 * math.sin(around), height])
        parts.append(placed(corners, faces, rng.uniform(0.15, 0.6, 3), place, rng.uniform(0, 2 * math.pi)))
    corners = np.concatenate(parts) @ about_upright(rng.uniform(0, 2 * math.pi)).T
    return Mesh(corners / np.linalg.norm(corners, axis=-1).max())


def placed(corners: np.ndarray, faces: np.ndarray, size: np.ndarray, place: np.ndarray, turn: float) -> np.ndarray:
    """The triangles `[triangles, 3, 3]` of a solid that is scaled, turned about the upright axis, and moved."""
    return (corners * size @ about_upright(turn).T + place)[faces]


def about_upright(angle: float) -> np.ndarray:
    """The rotation by an angle in radians about the third axis."""
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


def render(mesh: Mesh, azimuth: float, elevation: float, size: int) -> np.ndarray:
    """The object turned by `azimuth`, seen from `elevation` above, in parallel projection: uint8 `[size, size]`.

    Faces are lit from above and shaded by Lambert's law; the background is 0. Angles are in radians.
    """
    # To the camera's axes: right, up, towards the camera.
    down = np.array([math.sin(elevation), math.cos(elevation)])
    turned = mesh.corners @ about_upright(azimuth).T
    right, away, up = turned[..., 0], turned[..., 1], turned[..., 2]
    seen = np.stack([right, up * down[1] + away * down[0], up * down[0] - away * down[1]], -1)
    first, second, third = seen[:, 0], seen[:, 1], seen[:, 2]
    normals = np.cross(second - first, third - first)
    facing = normals[:, 2] > 1e-9
    grey = shade(normals[facing])
    fine = size * SAMPLES
    line = (np.arange(fine) + 0.5) / fine * 2 - 1
    depth, image = np.full((fine, fine), -np.inf), np.zeros((fine, fine))
    for corners, brightness in zip(seen[facing], grey, strict=True):
        inside, height = covered(corners, line)
        front = inside & (height > depth)
        depth[front], image[front] = height[front], brightness
    pixels = image.reshape(size, SAMPLES, size, SAMPLES).mean((1, 3))
    return np.round(255 * pixels).astype(np.uint8)


def shade(normals: np.ndarray) -> np.ndarray:
    """The brightness `[faces]` in (0, 1] of faces with these normals `[faces, 3]`."""
    unit = normals / np.linalg.norm(normals, axis=1, keepdims=True)
    return 0.25 + 0.75 * np.clip(unit @ LIGHT, 0, 1)


def covered(corners: np.ndarray, line: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which samples `[rows, columns]` a triangle `[3, 3]` covers, and how near it is at each; rows go downwards."""
    (ax, ay, az), (bx, by, bz), (cx, cy, cz) = corners
    x, y = line[None, :], -line[:, None]
    area = (bx - ax) * (cy - ay) - (cx - ax) * (by - ay)
    of_b = ((x - ax) * (cy - ay) - (cx - ax) * (y - ay)) / area
    of_c = ((bx - ax) * (y - ay) - (x - ax) * (by - ay)) / area
    inside = (of_b >= 0) & (of_c >= 0) & (of_b + of_c <= 1)
    return inside, az + of_b * (bz - az) + of_c * (cz - az)
