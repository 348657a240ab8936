"""A sweep in TensorBoard as a person sees it: in a real browser, without a window."""

import json
import os
import re
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
from selenium.webdriver.support.ui import WebDriverWait
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

MISSING = [program for program in ("chromium", "chromedriver") if shutil.which(program) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]

ALGORITHMS, TASKS = ("anil", "maml"), ("digits", "sinusoid")
SHORT = ("trainer.steps=4", "trainer.meta_batch=2", "trainer.validate_every=2", "trainer.log_every=1")
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--window-size=1600,2400"),
)
PATIENCE = 60

#: All elements that a selector finds, within shadow roots too, by their visible text.
DEEP_TEXTS = """
const found = [];
const search = root => {
  found.push(...root.querySelectorAll(arguments[0]));
  root.querySelectorAll("*").forEach(each => each.shadowRoot && search(each.shadowRoot));
};
search(document);
return found.filter(each => each.checkVisibility()).map(each => each.textContent.trim());
"""


@pytest.fixture(scope="session")
def sweep(tmp_path_factory):
    """The folder of a real sweep of two algorithms over two tasks."""
    folder = tmp_path_factory.mktemp("multirun")
    command = [sys.executable, "-m", "mlframework.cli.train", "-m", f"hydra.sweep.dir={folder}"]
    chosen = [f"algorithm={','.join(ALGORITHMS)}", f"task={','.join(TASKS)}", "evaluation=none", *SHORT]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [*command, *chosen, "trainer.validation_tasks=4"], env=environment, cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
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
        while len(answer(f"{address}/data/runs") or ()) < len(ALGORITHMS) * len(TASKS):
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


def show(browser, address, tab):
    browser.get("about:blank")  # a change of the fragment alone would not load the page
    browser.get(f"{address}/#{tab}")


def rows_of(card):
    """The rows of the table beneath the curves of a card: one for each run."""
    return card.find_elements(By.CSS_SELECTOR, "tb-data-table-content-row")


def test_time_series_shows_a_curve_of_every_run_and_the_figures(browser, tensorboard):
    show(browser, tensorboard, "timeseries")
    box = eventually(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "input[placeholder^='Filter tags']"))[0]
    box.send_keys("^validation/(query_loss|query_accuracy|tasks)$")

    def cards(kind):
        """The cards to be seen, by tag; TensorBoard keeps others hidden in the page."""
        shown = [card for card in browser.find_elements(By.CSS_SELECTOR, kind) if card.is_displayed()]
        return {"".join(card.text.split()[:2]): card for card in shown}

    eventually(browser, lambda: cards("scalar-card").keys() == {"validation/query_accuracy", "validation/query_loss"})
    for tag, runs in {"validation/query_loss": 4, "validation/query_accuracy": 2}.items():
        eventually(browser, lambda tag=tag, runs=runs: len(rows_of(cards("scalar-card")[tag])) == runs)
        assert cards("scalar-card")[tag].find_element(By.CSS_SELECTOR, "line-chart canvas").is_displayed()

    def picture_widths():
        pictures = browser.find_elements(By.CSS_SELECTOR, "image-card img")
        return [int(each.get_property("naturalWidth")) for each in pictures if each.is_displayed()]

    eventually(browser, lambda: [width > 300 for width in picture_widths()] == [True] * 4)


def test_hparams_shows_every_run_with_what_was_swept_and_what_it_reached(browser, tensorboard, sweep):
    show(browser, tensorboard, "hparams")

    def texts(kind):
        return browser.execute_script(DEEP_TEXTS, f"tf-hparams-table-view {kind}, vaadin-grid {kind}")

    eventually(browser, lambda: {"digits", "sinusoid"} <= set(texts(".table-cell")))
    headers, cells = texts(".table-header"), texts(".table-cell")
    assert {"algorithm", "task", "validation/query_loss", "validation/query_accuracy"} <= set(headers)
    assert all(cells.count(option) == 2 for option in (*ALGORITHMS, *TASKS))
    numbers = [float(cell) for cell in cells if re.fullmatch(r"[0-9.]+", cell)]
    for run in (events.parent for events in sweep.glob("*/events*")):
        last = EventAccumulator(str(run)).Reload().Scalars("validation/query_loss")[-1].value
        assert any(number == pytest.approx(last, rel=1e-3) for number in numbers), run
