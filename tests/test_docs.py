"""The worked examples of docs/, run as they stand there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

DOCS = Path(__file__).parents[1] / "docs"
FENCE = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def run_as_written(page: str, folder: Path) -> list[subprocess.CompletedProcess[str]]:
    """Writes the blocks that name a file, runs those of bash, in the order of the page.

    Packages go to a folder of their own, which stands on the path: the environment stays as it is.
    """
    site = folder / "site"
    scripts = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(site),
        "PIP_TARGET": str(site),
        "PIP_NO_INDEX": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "OMP_NUM_THREADS": "1",
    }
    work = folder / "work"
    work.mkdir()
    done = []
    for language, name, text in FENCE.findall((DOCS / page).read_text(encoding="utf-8")):
        if name:
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            (work / name).write_text(text, encoding="utf-8")
        elif language == "bash":
            result = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", text], cwd=work, env=environment, capture_output=True, text=True
            )
            assert result.returncode == 0, f"{text}\n{result.stdout}\n{result.stderr}"
            done.append(result)
    return done


@pytest.mark.slow
def test_a_task_distribution_in_three_ways(tmp_path):
    _, folder, _, package = run_as_written("add-a-task.md", tmp_path)
    assert "query loss on 20 test tasks" in folder.stdout
    assert re.search(r"^algorithm, .*\bpatient\b", package.stdout, re.MULTILINE)
    assert re.search(r"^task: blobs, .*\bdigits\b", package.stdout, re.MULTILINE)
    assert "query accuracy on 20 test tasks" in package.stdout


@pytest.mark.slow
def test_an_algorithm_in_one_file_and_one_yaml(tmp_path):
    _, layer, sweep, preset = run_as_written("add-an-algorithm.md", tmp_path)
    assert "nearest_mean" in layer.stdout
    assert "shrinking" in sweep.stdout
    assert "half_life: 2.0" in preset.stdout and "adapts: ^head" in preset.stdout
    assert len(list((tmp_path / "work" / "multirun").rglob("result.json"))) == 2


@pytest.mark.slow
def test_a_base_layer_in_one_file_and_one_yaml(tmp_path):
    *_, trained = run_as_written("add-a-base-layer.md", tmp_path)
    assert "query accuracy on 20 test tasks" in trained.stdout
    assert len(list((tmp_path / "work" / "runs").rglob("result.json"))) == 2


def test_the_drawing_of_the_tree_has_every_room():
    page, package = (DOCS / "architecture.md").read_text(encoding="utf-8"), DOCS.parent / "mlframework"
    (drawing,) = re.findall(r"^mlframework/\n((?:  .*\n)+)", page, re.MULTILINE)
    drawn = re.findall(r"^  ([\w./]+) ", drawing, re.MULTILINE)
    rooms = [f"{path.parent.name}/" for path in package.glob("*/__init__.py")]
    assert sorted(drawn) == sorted([*rooms, *(path.name for path in package.glob("[a-z]*.py"))])


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md")))
def test_every_path_on_a_page_exists(page):
    named = re.findall(
        r"`((?:mlframework|tests|conf|benchmarks|scripts)/[\w./]+)`", (DOCS / page).read_text(encoding="utf-8")
    )
    assert page != "architecture.md" or len(named) > 20
    assert not [path for path in named if not (DOCS.parent / path).exists()]


@pytest.mark.slow
def test_a_baseline_and_a_display_in_one_file_and_one_yaml_each(tmp_path):
    judged, _, waves = run_as_written("add-a-baseline.md", tmp_path)
    assert re.search(r"^│ nearest, [12] nearest ", judged.stdout, re.MULTILINE)
    assert "scikit-learn KernelRidge" in judged.stdout and "from scratch" not in judged.stdout
    assert "nearest, " in waves.stdout
    for run, figures in ("shown", {"tasks", "errors"}), ("waves", {"tasks", "errors", "by_inner_step"}):
        tags = EventAccumulator(str(tmp_path / "work" / "runs" / run)).Reload().Tags()
        assert set(tags["images"]) == {f"validation/{name}" for name in figures}
        assert "validation/largest_error" in tags["scalars"]


@pytest.mark.slow
def test_a_table_that_nobody_has_cleaned_and_its_run_in_use(tmp_path):
    trained, used, shipped = run_as_written("tables.md", tmp_path)
    said = trained.stdout + trained.stderr
    for line in re.findall(r"^shops\.csv: .*$", (DOCS / "tables.md").read_text(encoding="utf-8"), re.MULTILINE):
        assert line in said
    assert "classification of sold_out from weather, visitors, price" in said
    predicted = [float(number) for number in used.stdout.strip("[]\n").split(",")]
    assert len(predicted) == 2
    assert "nearest neighbours" in shipped.stdout


@pytest.mark.slow
def test_a_network_of_ones_own_that_is_trained_already(tmp_path):
    (run,) = run_as_written("pretrained.md", tmp_path)
    assert "nothing to learn" in run.stderr and "query accuracy on 20 test tasks" in run.stdout
    assert "head.weight, head.bias start anew" in run.stderr


@pytest.mark.slow
def test_a_generator_of_tables_in_one_file_and_one_yaml(tmp_path):
    trained, predicted = run_as_written("priors.md", tmp_path)
    assert "step 20: validation query_loss" in trained.stderr
    assert predicted.stdout.strip() == "(30, 3)"


@pytest.mark.slow
def test_a_contender_in_one_yaml(tmp_path):
    (compared,) = run_as_written("comparison.md", tmp_path)
    assert re.search(r"^│ naive bayes ", compared.stdout, re.MULTILINE)
    assert (tmp_path / "work" / "runs" / "digits" / "comparison.md").exists()


def test_the_site_has_every_page():
    """`mkdocs build --strict` says so too, where mkdocs is installed."""
    site = (DOCS.parent / ".site" / "mkdocs.yml").read_text(encoding="utf-8")
    assert {page.name for page in DOCS.glob("*.md")} <= set(re.findall(r": ([\w-]+\.md)$", site, re.MULTILINE))


@pytest.mark.parametrize(
    "page", ["add-a-task.md", "add-a-base-layer.md", "add-an-algorithm.md", "add-a-baseline.md", "priors.md"]
)
def test_examples_are_short(page):
    for language, name, text in FENCE.findall((DOCS / page).read_text(encoding="utf-8")):
        assert language != "python" or len(text.splitlines()) <= 35, name


@pytest.mark.slow
def test_a_regulariser_in_one_file_and_one_yaml(tmp_path):
    (trained,) = run_as_written("over-fitting.md", tmp_path)
    assert "step 4: validation query_loss" in trained.stderr


@pytest.mark.slow
def test_a_run_in_use_for_characters_images_and_a_table(tmp_path):
    _, characters, _, images, _, sales, grid = run_as_written("use.md", tmp_path)
    assert characters.stdout == "per cent, and, ask\n"
    assert float(re.search(r"right: (\S+)", images.stdout)[1]) > 0.8
    assert "False" not in images.stdout
    rain, middle = (float(number) for number in re.findall(r"[\d.]+", sales.stdout))
    assert rain == pytest.approx(1.5 * 25, abs=15) and middle == pytest.approx(1.5 * 50, abs=25)
    assert "inner_steps" in grid.stdout


def test_each_use_of_a_run_takes_at_most_twelve_lines():
    page = (DOCS / "use.md").read_text(encoding="utf-8")
    uses = {name: text for _, name, text in FENCE.findall(page) if name in ("characters.py", "images.py", "sales.py")}
    assert len(uses) == 3
    assert all(len([line for line in text.splitlines() if line.strip()]) <= 12 for text in uses.values())
