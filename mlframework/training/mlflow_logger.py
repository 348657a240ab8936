"""MLflow, on local files unless another place is named."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from mlframework.errors import InvalidValue, UserError
from mlframework.files import write_json
from mlframework.reading import read_json
from mlframework.screen import stage
from mlframework.training.logger import Logger, finite, hyperparameters

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["MLflowLogger"]

#: The most points and parameters that MLflow takes at a time, and the longest parameter.
MOST_POINTS, MOST_PARAMETERS, LONGEST = 1000, 100, 6000

#: The numbers that stand for a histogram, which MLflow does not have.
QUANTILES = {"min": 0.0, "quartile_1": 0.25, "median": 0.5, "quartile_3": 0.75, "max": 1.0}


class MLflowLogger(Logger):
    """Writes to an MLflow run whose id lies in `mlflow.json` in the run folder; `mlflow ui` shows it.

    Points wait in memory until the next checkpoint, so that a killed and resumed run has each point once.

    Args:
        folder, start, figures: see `Logger`.
        uri: where MLflow keeps its runs, as in `sqlite:///mlflow.db` in the working directory; figures and texts then
            lie in `mlruns/` beside it.
        experiment: the name under which MLflow lists the run.
    """

    def __init__(self, folder: Path, *, start: int, uri: str, experiment: str, figures: bool = True) -> None:
        super().__init__(folder, start=start, figures=figures)
        self.client, self.points = client_of(uri), list[Any]()
        record = folder / "mlflow.json"
        if start and record.is_file():
            self.run = run_in(record)
            self.client.update_run(self.run, status="RUNNING")
        else:
            number = experiment_id(self.client, experiment)
            self.run = self.client.create_run(number, run_name=str(folder)).info.run_id
            write_json(record, {"uri": uri, "experiment": experiment, "run_id": self.run})

    @classmethod
    def check(cls, **settings: Any) -> None:
        client_of(settings["uri"])

    def config(self, config: DictConfig, choices: Mapping[str, str], overrides: Sequence[str] = ()) -> None:
        from mlflow.entities import Param

        if self.start:
            return
        self.client.log_text(self.run, OmegaConf.to_yaml(config, resolve=True), "config.yaml")
        self.client.set_tag(self.run, "overrides", " ".join(overrides)[:LONGEST])
        settings = [Param(key, str(value)[:LONGEST]) for key, value in hyperparameters(config, choices).items()]
        for first in range(0, len(settings), MOST_PARAMETERS):
            self.client.log_batch(self.run, params=settings[first : first + MOST_PARAMETERS])

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self.points += [Metric(tag, float(value), now, step) for tag, value in values.items()]

    def histograms(self, values: Mapping[str, Tensor], step: int) -> None:
        """The least, the greatest, the median and the quartiles of each tensor, as curves."""
        for tag, tensor in values.items():
            if len(numbers := finite(tensor).double()):
                self.scalars({f"{tag}/{name}": float(numbers.quantile(at)) for name, at in QUANTILES.items()}, step)

    def figure(self, tag: str, figure: Figure, step: int) -> None:
        self.client.log_figure(self.run, figure, f"{tag}/step_{step:08}.png")

    def text(self, tag: str, text: str, step: int | None = None) -> None:
        self.client.log_text(self.run, text, f"{tag}.md" if step is None else f"{tag}/step_{step:08}.md")

    def flush(self) -> None:
        for first in range(0, len(self.points), MOST_POINTS):
            self.client.log_batch(self.run, metrics=self.points[first : first + MOST_POINTS])
        self.points = []

    def close(self, error: str | None = None, *, finished: bool = False) -> None:
        self.flush()
        if error is not None:
            self.client.set_tag(self.run, "error", error[:LONGEST])
        status = "FINISHED" if finished else "KILLED" if error is None else "FAILED"
        self.client.set_terminated(self.run, status=status)


def run_in(record: Path) -> str:
    """The id of the MLflow run in a record."""
    found = read_json(record).get("run_id")
    if not isinstance(found, str):
        raise UserError(f"{record}: damaged (its run_id is no text)")
    return found


def client_of(uri: str) -> Any:
    """MLflow's client, which takes seconds to import; a `UserError` if it is not installed, or cannot write there."""
    try:
        with stage("importing MLflow"):
            from mlflow import MlflowClient
    except ImportError as error:
        raise UserError(f"logger=mlflow: needs an extra: pip install 'mlframework[mlflow]' ({error})") from error
    logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells of every table that it creates
    try:
        client = MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)
    except Exception as error:  # its stores raise what their databases do
        raise InvalidValue("uri", uri, f"MLflow cannot write there ({str(error).strip().splitlines()[0]})") from error
    return client


def experiment_id(client: Any, name: str) -> str:
    """The id of the experiment of a name, which is made if need be; another process may make it at the same time."""
    found = client.get_experiment_by_name(name)
    try:
        return str(found.experiment_id if found else client.create_experiment(name))
    except Exception:  # as many kinds as it has stores
        found = client.get_experiment_by_name(name)
        if found is None:
            raise
        return str(found.experiment_id)
