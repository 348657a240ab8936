"""A sweep in TensorBoard as a person sees it: in a real browser, without a window.

`MLFRAMEWORK_SCREENSHOTS=<folder>` keeps pictures of the pages; those of docs/tensorboard.md are made so.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

MISSING = [program for program in ("chromium", "chromedriver") if shutil.which(program) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]

#: Jobs of the last algorithm fail: it takes no classes.
ALGORITHMS, SHOTS = ("maml", "meta_sgd", "ridge_shared_head"), (1, 5)
SWEEP = (
    *("task=digits", "trainer.steps=60", "trainer.meta_batch=4", "trainer.validate_every=20", "trainer.log_every=2"),
    *("trainer.validation_tasks=20", "evaluation.tasks=20", "evaluation.validation_tasks=4", "evaluation/baseline=[]"),
    "display=[by_inner_step,contact_sheet,confusion,learned,inner_steps,support_influence]",
)
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--window-size=1600,2400"),
)
PATIENCE = 60

#: All elements that a selector finds, within shadow roots too.
DEEP = """
const found = [];
const search = root => {
  found.push(...root.querySelectorAll(arguments[0]));
  root.querySelectorAll("*").forEach(each => each.shadowRoot && search(each.shadowRoot));
};
search(document);
"""
#: Their visible texts, each with the place of its left upper corner.
DEEP_TEXTS = f"""{DEEP}
return found.filter(each => each.checkVisibility()).map(each => {{
  const place = each.getBoundingClientRect();
  return [each.textContent.trim(), place.left, place.top];
}});
"""
#: Clicks on the first visible one that has the second argument as the first line of its text, or as its label.
DEEP_CLICK = f"""{DEEP}
const first = each => each.textContent.trim().split("\\n")[0].trim();
const named = each => [first(each), each.getAttribute("label")].includes(arguments[1]);
const one = found.find(each => each.checkVisibility() && named(each));
if (one) one.click();
return Boolean(one);
"""


@pytest.fixture(scope="session")
def sweep(tmp_path_factory):
    """The folder of a real sweep of three algorithms at two numbers of shots."""
    folder = tmp_path_factory.mktemp("multirun")
    command = [sys.executable, "-m", "mlframework.cli.train", "-m", f"hydra.sweep.dir={folder}"]
    chosen = [f"algorithm={','.join(ALGORITHMS)}", f"task.k_shot={','.join(map(str, SHOTS))}", *SWEEP]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([*command, *chosen], env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr  # as jobs have failed
    return folder


def answer(address):
    """What a server says in JSON, or None as long as it says nothing."""
    try:
        with urllib.request.urlopen(address, timeout=5) as response:
            return json.load(response)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return None


@pytest.fixture(scope="session")
def tensorboard(sweep):
    """The address of a TensorBoard that has read the sweep."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(sweep), "--host", "127.0.0.1"]
    with (sweep / "tensorboard.log").open("w") as log:
        server = subprocess.Popen([*command, "--port", str(port)], stdout=log, stderr=log)
    try:
        until = time.monotonic() + PATIENCE
        while len(answer(f"{address}/data/runs") or ()) < len(ALGORITHMS) * len(SHOTS):
            assert server.poll() is None, (sweep / "tensorboard.log").read_text()
            assert time.monotonic() < until, "TensorBoard does not list the runs"
            time.sleep(0.3)
        yield address
    finally:
        server.terminate()
        server.wait(20)


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


def eventually(browser, condition):
    """What the condition gives, once that is something; the page may change while it is looked at."""
    return WebDriverWait(browser, PATIENCE, ignored_exceptions=[StaleElementReferenceException]).until(
        lambda _: condition()
    )


def show(browser, address, tab, size=(1600, 2400)):
    browser.set_window_size(*size)
    browser.get("about:blank")  # a change of the fragment alone would not load the page
    browser.get(f"{address}/#{tab}")


def keep(browser, name):
    """Keeps a picture of the page where pictures are wanted."""
    if folder := os.environ.get("MLFRAMEWORK_SCREENSHOTS"):
        time.sleep(2)  # until what moves on the page has come to rest
        browser.save_screenshot(str(Path(folder) / f"{name}.png"))


def texts(browser, selector):
    return [text for text, *_ in browser.execute_script(DEEP_TEXTS, selector)]


def runs_of(sweep):
    """The names of all runs, and of those that were trained."""
    folders = sorted({events.parent for events in sweep.rglob("events.*")})
    names = {str(folder.relative_to(sweep)): folder for folder in folders}
    return names, {name: folder for name, folder in names.items() if (folder / "result.json").exists()}


def filtered(browser, tags):
    """Shows the cards of some tags alone."""
    box = eventually(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "input[placeholder^='Filter tags']"))[0]
    box.clear()
    box.send_keys(tags, Keys.ENTER)


def cards(browser, kind):
    """The cards to be seen; TensorBoard keeps others hidden in the page."""
    return [card for card in browser.find_elements(By.CSS_SELECTOR, kind) if card.is_displayed()]


def rows_of(card):
    """The rows of the table beneath the curves of a card: one for each run."""
    return card.find_elements(By.CSS_SELECTOR, "tb-data-table-content-row")


def test_time_series_shows_a_curve_of_every_run_by_its_name(browser, tensorboard, sweep):
    show(browser, tensorboard, "timeseries")
    every, trained = runs_of(sweep)
    assert (len(every), len(trained)) == (6, 4)
    eventually(browser, lambda: set(every) <= {text.strip() for text in texts(browser, "tb-data-table-content-cell")})
    filtered(browser, "^validation/(query_loss|query_accuracy)$")
    eventually(browser, lambda: len(cards(browser, "scalar-card")) == 2)
    for number in range(2):
        eventually(browser, lambda number=number: len(rows_of(cards(browser, "scalar-card")[number])) == len(trained))
        assert cards(browser, "scalar-card")[number].find_element(By.CSS_SELECTOR, "line-chart canvas").is_displayed()


def test_time_series_shows_figures_that_can_be_read(browser, tensorboard):
    show(browser, tensorboard, "timeseries")
    filtered(browser, "^validation/(tasks|confusion)$|by_step_and_layer")

    def widths():
        pictures = [card.find_element(By.CSS_SELECTOR, "img") for card in cards(browser, "image-card")]
        return [(int(p.get_property("naturalWidth")), p.size["width"]) for p in pictures if p.is_displayed()]

    # Three figures of each of the four runs that were trained: one page of cards.
    eventually(browser, lambda: len(widths()) == 12 and all(natural > 100 for natural, _ in widths()))
    shares = [shown / natural for natural, shown in widths()]
    assert min(shares) > 0.45, "figures are shrunk to thumbnails whose letters cannot be read"


def test_time_series_shows_histograms(browser, tensorboard):
    show(browser, tensorboard, "timeseries", size=(1800, 1300))
    filtered(browser, "^learned/update/features.1.weight|validation/(confusion|tasks)|by_step_and_layer")
    found = eventually(browser, lambda: len(cards(browser, "histogram-card")) == 2 and cards(browser, "histogram-card"))
    eventually(browser, lambda: all(card.find_elements(By.CSS_SELECTOR, "tb-histogram svg path") for card in found))
    keep(browser, "tensorboard")


def test_hparams_sorts_runs_by_test_accuracy_and_shows_failed_ones(browser, tensorboard, sweep):
    show(browser, tensorboard, "hparams", size=(2600, 800))

    def column(name):
        """The cells below a heading, from above: number or text."""
        cells = browser.execute_script(DEEP_TEXTS, "tf-hparams-table-view .table-cell, vaadin-grid .table-cell")
        heads = browser.execute_script(DEEP_TEXTS, "tf-hparams-table-view .table-header, vaadin-grid .table-header")
        head = next((head for head in heads if head[0] == name), None)
        below = sorted((y, text) for text, x, y in cells if head and abs(x - head[1]) < 2 and y > head[2] + 20)
        return [text for _, text in below]

    eventually(browser, lambda: sorted(column("algorithm")) == sorted(ALGORITHMS * 2))
    assert sorted(column("task.k_shot")) == sorted([f"{float(shots):.4f}" for shots in SHOTS] * 3)
    for menu, choice in {"Sort by": "test/query_accuracy", "Direction": "Descending"}.items():
        eventually(browser, lambda menu=menu: browser.execute_script(DEEP_CLICK, "paper-dropdown-menu", menu))
        eventually(browser, lambda choice=choice: browser.execute_script(DEEP_CLICK, "paper-item", choice))
    _, trained = runs_of(sweep)
    reached = [
        EventAccumulator(str(folder)).Reload().Scalars("test/query_accuracy")[-1].value for folder in trained.values()
    ]
    wanted = [pytest.approx(value, rel=1e-3) for value in sorted(reached, reverse=True)]
    eventually(browser, lambda: [float(cell) for cell in column("test/query_accuracy") if cell] == wanted)
    assert sorted(float(cell) for cell in column("run/finished")) == [0, 0, 1, 1, 1, 1]
    browser.set_window_size(1900, 520)
    keep(browser, "tensorboard_hparams")


def test_the_error_of_a_failed_job_is_a_text(browser, tensorboard):
    show(browser, tensorboard, "text")
    eventually(browser, lambda: any("takes regression tasks" in text for text in texts(browser, "p")))
