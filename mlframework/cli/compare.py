"""`mlframework-compare`: meta-trains, or takes a trained run, and judges it beside conventional methods."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from mlframework.cli.command_line import command, job
from mlframework.cli.train import OTHERS, SETTINGS
from mlframework.errors import UserError
from mlframework.runs.check_config import check_config
from mlframework.runs.git_state import git_state
from mlframework.runs.run_folder import PARTS, RunFolder

if TYPE_CHECKING:  # it imports torch, which --help does without
    from mlframework.runs.compare import Compared

__all__ = ["compare_command"]

#: The keys of a comparison; a training does not know them.
OWN = {
    "run": str | None,
    "against": list[str] | None,
    "shots": list[int],
    "cross": list[str],
    "board": bool,
}

#: What may be typed beside `run=...`: all else is that of the run.
WITH_RUN = (*OWN, "curve", "evaluation", "device")


@job(settings={**SETTINGS, **OWN}, required=PARTS, others=(*OTHERS, "curve"))
def compare_command(config: DictConfig) -> None:
    """Compares a run, which is trained first unless it is named, and writes the report to its folder."""
    from mlframework.runs.compare import Plan, compare_run
    from mlframework.runs.contenders import add_contenders

    typed = list(HydraConfig.get().overrides.task)
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        config.run_dir = HydraConfig.get().runtime.output_dir
    folder = RunFolder(config.run_dir) if config.run is None else RunFolder(config.run, key="run")
    with_contenders = config.copy()
    if config.run is not None:
        refuse_settings_of_training(typed)
        with_contenders.evaluation.baseline = baselines_of_run(folder, typed)
    add_contenders(with_contenders.evaluation, config.against)
    check_config(with_contenders, settings={})
    trained = training_config(config) if config.run is None else folder.config()
    config.task = trained.task  # by which errors find their key
    trained.evaluation, trained.device = with_contenders.evaluation, config.device
    plan = Plan.of(trained, config)
    if config.run is None:
        train(config, folder, typed)
    folder.check_writable()
    commit = git_state()["commit"]  # before it takes its time: the working directory may move on
    compared = compare_run(folder, plan, device=config.device)
    about = about_comparison(plan.config, folder, typed, commit)
    record(compared, about, folder, next_seed=plan.config.evaluation.seed + 1, board=config.board)


def refuse_settings_of_training(typed: Sequence[str]) -> None:
    """A run that is trained keeps its task and its algorithm."""
    for override in typed:
        key = override.lstrip("+~").partition("=")[0]
        if key.replace("/", ".").split(".")[0] not in WITH_RUN:
            why = "run=... keeps the settings of the run: leave this out, or leave out run=... to train anew"
            raise UserError(f"{override}: {why}")


def baselines_of_run(folder: RunFolder, typed: Sequence[str]) -> DictConfig:
    """The baselines in the config of a run, with the settings that the user typed."""
    own = (folder.config().get("evaluation") or {}).get("baseline") or {}
    prefix = "evaluation.baseline."
    dots = [override.lstrip("+") for override in typed if override.lstrip("+").startswith(prefix)]
    settings = OmegaConf.from_dotlist([each.removeprefix(prefix) for each in dots])
    return OmegaConf.merge(own, settings)  # type: ignore[return-value]


def training_config(config: DictConfig) -> DictConfig:
    """The config of the training alone, without an evaluation at its end."""
    found: DictConfig = OmegaConf.masked_copy(config, [str(key) for key in config if key not in (*OWN, "curve")])
    found.evaluation = {name: value for name, value in config.evaluation.items_ex(resolve=False) if name != "_target_"}
    return found


def train(config: DictConfig, folder: RunFolder, typed: Sequence[str]) -> None:
    from mlframework.runs.run import train_run

    others = (*OWN, "curve", "resume")
    overrides = [each for each in typed if each.lstrip("+~").split("=")[0].split(".")[0] not in others]
    choices = {g: option for g, option in HydraConfig.get().runtime.choices.items() if not g.startswith("hydra/")}
    train_run(training_config(config), folder, overrides=overrides, choices=choices)


def about_comparison(config: DictConfig, folder: RunFolder, typed: Sequence[str], commit: str | None) -> dict[str, Any]:
    """The command, the code, the machine, the training seed and the tasks, for the record."""
    from mlframework.runs.board import machine

    return {
        "command": " ".join(["mlframework-compare", *typed]),
        "trained": " ".join(["mlframework-train", *(o for o in folder.overrides() if not o.startswith("run_dir="))]),
        "commit": commit,
        "machine": machine(),
        "seed": config.seed,
        "task": folder.choices().get("task") or str(config.task._target_),
        "task_config": OmegaConf.to_container(config.task, resolve=True),
    }


def record(compared: Compared, about: dict[str, Any], folder: RunFolder, *, next_seed: int, board: bool) -> None:
    """Shows a comparison and writes it: JSON, markdown, the figure, and records of the board."""
    from mlframework.files import atomic, write_json, write_text
    from mlframework.runs.board import BOARD, add_to_board
    from mlframework.runs.compare_report import comparison_figure, comparison_page, comparison_table, curve_lines
    from mlframework.runs.tables import print_table

    print_table(comparison_table(compared.own))
    for line in curve_lines(compared) if compared.curve else ():
        print(line)
    content = {**about, **compared.to_json()}
    write_json(folder.path / "comparison.json", content, indent=None)
    write_text(folder.path / "comparison.md", comparison_page(compared, about))
    with atomic(folder.path / "comparison.png") as part:
        comparison_figure(compared).savefig(part, format="png", dpi=110)
    print(f"written to {folder.path}: comparison.md, comparison.png, comparison.json")
    for path in add_to_board(content, BOARD) if board else ():
        print(f"on the board: {path}")
    print(f"next: mlframework-compare run={folder.path} evaluation.seed={next_seed} board=true")


main = command(compare_command, config_name="compare")

if __name__ == "__main__":
    main()
