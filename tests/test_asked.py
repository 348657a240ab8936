"""A trained run on other tasks than its own: other shots, other classes, another domain, other partitions."""

from __future__ import annotations

import csv
import json
from itertools import chain, product
from pathlib import Path

import pytest
from commands import SHORT, call
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from test_contracts import presets, small

from mlframework.cli import evaluate, train
from mlframework.cli.command_line import for_jobs
from mlframework.cli.evaluate import with_asked
from mlframework.errors import InvalidValue
from mlframework.evaluation.task_set import TaskSet
from mlframework.runs import build
from mlframework.runs.asked import ANY_N_WAY, asked_task, check_divided_alike, combinations
from mlframework.runs.run import load_run
from mlframework.runs.run_folder import RunFolder
from mlframework.tasks import Digits, TaskDistribution

FEW = ("evaluation.tasks=4", "evaluation.validation_tasks=2", "evaluation/baseline=[]")
SPLITS = {"validation_digits": [4, 5, 6], "test_digits": [7, 8, 9]}
DIGITS = (
    *("task=digits", "task.validation_digits=[4,5,6]", "task.test_digits=[7,8,9]", "task.k_shot=1", "task.k_query=3"),
    *("base_layer.hidden=[8]", "evaluation=none"),
)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with a run of prototypes and one of MAML, 2-way 1-shot."""
    folder = tmp_path_factory.mktemp("world")
    for algorithm in ("prototypes", "maml"):
        said = call(train.main, *SHORT, *DIGITS, f"algorithm={algorithm}", f"run_dir={algorithm}", folder=folder)
        assert said.exit_code == 0, said.err
    return folder


def asked(world: Path, *typed: str, run: str = "prototypes"):
    return call(evaluate.main, f"run={run}", *FEW, *typed, folder=world)


def report_at(world: Path, said) -> dict:
    """The report in the file that the last line names."""
    return json.loads((world / said.out.splitlines()[-1].removeprefix("written to ")).read_text(encoding="utf-8"))


def test_the_same_weights_are_evaluated_at_other_shots_and_numbers_of_classes(world):
    said = asked(world, "task.k_shot=4", "task.n_way=3")
    assert said.exit_code == 0, said.err
    assert said.out.splitlines()[-1].endswith("_k_shot=4_n_way=3.json")
    report = report_at(world, said)
    task = Digits(n_way=3, k_shot=4, k_query=3, **SPLITS)
    assert report["task_hash"] == TaskSet(task, "test", tasks=4, seed=0).hash()
    assert report["overrides"][-2:] == ["task.k_shot=4", "task.n_way=3"] and report["task_config"]["n_way"] == 3
    trained = load_run(RunFolder(world / "prototypes"), weights="best", device="cpu").meta_layer
    trained.task = task
    found = [
        float(trained.query_metrics(trained.adapt(episode.support), episode)["query_accuracy"])
        for episode in TaskSet(task, "test", tasks=4, seed=0, chunk=1)
    ]
    assert report["rows"][0]["values"]["query_accuracy"] == pytest.approx(found, abs=1e-5)  # six digits


def test_several_combinations_give_a_file_each_and_one_table(world):
    before = {path: path.read_bytes() for path in (world / "prototypes").rglob("*") if path.is_file()}
    said = asked(world, "-m", "task.n_way=2,3", "task.k_shot=1,2")
    assert said.exit_code == 0, said.err
    kept = [line for line in said.out.splitlines() if line.startswith("written to ")]
    assert len({*kept}) == 5, "four reports and a table"
    table = (world / kept[-1].removeprefix("written to ")).read_text(encoding="utf-8")
    rows = list(csv.DictReader(table.splitlines()))
    assert [(row["n_way"], row["k_shot"]) for row in rows] == [("2", "1"), ("2", "2"), ("3", "1"), ("3", "2")]
    for row in rows:
        task = Digits(n_way=int(row["n_way"]), k_shot=int(row["k_shot"]), k_query=3, **SPLITS)
        assert row["hash"] == TaskSet(task, "test", tasks=4, seed=0).hash() and row["hash"] in said.out
        report = json.loads((world / "prototypes" / "evaluations" / row["file"]).read_text(encoding="utf-8"))
        (judged,) = [each for each in report["rows"] if each["method"] == row["method"]]
        assert float(row["mean"]) == judged["metrics"]["query_accuracy"][0]["mean"]
    assert all(path.read_bytes() == content for path, content in before.items()), "nothing is overwritten"
    assert not (world / "multirun").exists()


def test_only_an_evaluation_of_the_runs_own_tasks_is_the_latest(tmp_path):
    folder = RunFolder(tmp_path)
    own = folder.add_evaluation({"loss": 1.0})
    other = folder.add_evaluation({"loss": 2.0}, asked="path=/a b/c_k_shot=5")
    last = folder.add_evaluation({"loss": 3.0})
    names = [path.name for path in (own, other, last)]
    assert names == ["1.json", "2_path=_a_b_c_k_shot=5.json", "3.json"]
    assert json.loads((tmp_path / "evaluation.json").read_text())["loss"] == 3.0


def test_another_task_has_the_sizes_of_the_runs_own_unless_they_are_named(world):
    config = RunFolder(world / "prototypes").config()
    config.task.n_way = 3
    with build_configs():
        found = asked_task(config, "digits", ["task=glyphs", "task.k_query=2"])
    assert (found._target_, found.n_way, found.k_shot, found.k_query) == ("mlframework.tasks.Glyphs", 3, 1, 2)


@pytest.mark.slow
def test_another_part_of_the_task_leaves_its_other_settings(world):
    config = small("task=ratings", "task.held_out_items=0.3")
    config.task.k_query = 4
    with build_configs():
        found = asked_task(config, "ratings", ["task/source=movielens", "task.source.path=x"])
    assert (found.held_out_items, found.k_query, found.source.path) == (0.3, 4, "x")
    assert found.source._target_.endswith("MovieLens")


def build_configs():
    from hydra import initialize_config_module

    return initialize_config_module("mlframework.conf", version_base="1.3")


@pytest.mark.slow
def test_a_run_on_glyphs_is_evaluated_on_the_characters_of_other_tasks(tmp_path):
    typed = ("task=glyphs", "task.n_way=3", "algorithm=prototypes", "base_layer.filters=4", "evaluation=none")
    assert call(train.main, *SHORT, *typed, "run_dir=run", folder=tmp_path).exit_code == 0
    said = call(evaluate.main, "run=run", *FEW, "task=glyphs,omniglot", "task.k_query=2", folder=tmp_path)
    assert said.exit_code == 0 or "omniglot" in said.err, said.err
    assert "task=glyphs" in said.out


@pytest.mark.parametrize(
    ("run", "typed", "line"),
    [
        (
            "maml",
            "task.n_way=3",
            "task.n_way=3: algorithm=maml has learned 2 classes (base_layer.head.bias), and these",
        ),
        (
            "maml",
            "task=glyphs",
            "task=glyphs: base_layer.features.1.weight is for inputs of shape (1, 8, 8), and these",
        ),
        ("maml", "task=sinusoid", "task=sinusoid: is a regression, and the run has learned a classification"),
        ("maml", "task.k_shots=3", "task.k_shots=3: there is no task.k_shots (did you mean k_shot?); there are n_way,"),
        ("maml", "task.k_shot=x", "task.k_shot=x: must be a whole number or a list"),
        ("maml", "task.k_shot=0", "task.k_shot=0: must be at least 1, or [low, high]"),
        ("maml", "task=glyfs", "task=glyfs: no such option (did you mean glyphs?)"),
        (
            "prototypes",
            "task.test_digits=[5,6]",
            "task.test_digits=[5, 6]: says which data are trained on, and the run has",
        ),
    ],
)
def test_what_the_run_cannot_take_is_refused_in_one_line(world, run, typed, line):
    said = asked(world, typed, run=run)
    assert (said.exit_code, said.err.count("\n")) == (2, 1), said.err
    assert said.err.startswith(line), said.err


def test_a_combination_that_is_refused_leaves_the_others(world):
    said = asked(world, "task.n_way=2,3", run="maml")
    assert (said.exit_code, said.err.count("\n")) == (2, 1)
    assert said.err.startswith("task.n_way=3: algorithm=maml has learned 2 classes")
    assert "maml/evaluations/table_" in said.out


@pytest.mark.slow
def test_the_refusal_names_exactly_the_algorithms_whose_weights_fit_any_number_of_classes():
    found = []
    for algorithm in presets("algorithm"):
        config = small(f"algorithm={algorithm}", "task=digits", "base_layer.hidden=[4]")
        shapes = []
        for n_way in (2, 3):
            config.task.update(n_way=n_way, **SPLITS)
            task = build.build_task(config)
            if "classification" not in kinds_of(config):
                break
            layer = build.build_meta_layer(config, task)
            shapes.append({n: tuple(t.shape) for n, t in layer.state_dict().items() if n not in layer.unread})
        if len(shapes) == 2 and shapes[0] == shapes[1]:
            found.append(algorithm)
    assert sorted(ANY_N_WAY) == found


def kinds_of(config) -> tuple[str, ...]:
    from hydra.utils import get_class

    return get_class(config.algorithm._target_).kinds


@pytest.mark.slow
def test_proto_maml_takes_another_number_of_classes(tmp_path):
    said = call(train.main, *SHORT, *DIGITS, "algorithm=proto_maml", "run_dir=run", folder=tmp_path)
    assert said.exit_code == 0, said.err
    said = call(evaluate.main, "run=run", *FEW, "task.n_way=3", folder=tmp_path)
    assert said.exit_code == 0, said.err


@pytest.mark.slow
def test_partitions_of_ratings_are_evaluated_from_one_run(tmp_path):
    held_out = ("task.held_out_items=0.3", "task.held_out_ratings=0.3")
    typed = ("task=ratings", "algorithm=ridge_shared_head", *held_out, "evaluation=none", "base_layer.hidden=[8]")
    assert call(train.main, *SHORT, *typed, "run_dir=run", folder=tmp_path).exit_code == 0
    said = call(evaluate.main, "run=run", *FEW, "task.users=new,existing", "task.items=existing,new", folder=tmp_path)
    assert said.exit_code == 0, said.err
    reports = [json.loads(path.read_text()) for path in (tmp_path / "run" / "evaluations").glob("*.json")]
    assert len({report["task_hash"] for report in reports}) == len(reports) == 4
    said = call(evaluate.main, "run=run", *FEW, "task.held_out_items=0.4", folder=tmp_path)
    assert said.err.startswith("task.held_out_items=0.4: says which data are trained on, and the run has 0.3: ")


@pytest.mark.slow
def test_baselines_that_do_not_suit_the_other_tasks_are_left_out(world):
    typed = ("evaluation/baseline=[popularity,scikit_learn]", "task.k_shot=2")
    said = call(evaluate.main, "run=prototypes", *FEW[:2], *typed, folder=world)
    assert said.exit_code == 0, said.err
    assert "evaluation.baseline: popularity is left out: it is for" in said.err
    methods = [row["method"] for row in report_at(world, said)["rows"]]
    assert methods == ["prototypes", "scikit-learn LogisticRegression"]


def test_overrides_of_the_task_go_through_hydra_unread():
    typed = ["-m", "run=a,b", "task/source=x", "++task.a.b=1,2", "weights=best", "taskless=1"]
    found = with_asked(typed)
    assert found == ["-m", "run=a,b", "asked=['task/source=x','++task.a.b=1,2']", "weights=best", "taskless=1"]
    assert with_asked(["-m", "run=a", "task.k_shot=1,5"]) == ["run=a", "asked=['task.k_shot=1,5']"]
    assert combinations(["task.a=[1,2]", "task.b=x"]) == [["task.a=[1,2]", "task.b=x"]]


ODD_TEXTS = [
    *map("".join, chain.from_iterable(product("a'\\", repeat=length) for length in range(4))),
    *(
        "it's",
        r"it\'s",
        "x\\",
        "C:\\dir\\",
        "C:\\dir\\'",
        '"',
        "a,b",
        "[a]",
        "{a: b}",
        "$",
        "${task.n_way}",
        r"\${a}",
        r"'\\${a}\'",
    ),
    *(f"a{first}{second}" for first, second in product("'\\\"=#$ ", "'\\\"=#$ ")),
]


@pytest.mark.parametrize("text", ["task.x='it\\'s'", r"task.x='C:\\dir\\'", *ODD_TEXTS])
def test_an_override_with_quotes_and_backslashes_goes_through_hydra_unchanged(text):
    (typed,) = with_asked([f"task.path={text}"])
    (found,) = OverridesParser.create().parse_override(typed).value()
    assert OmegaConf.create({"asked": [str(getattr(found, "text", found))]}).asked[0] == f"task.path={text}"


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        (r"task.k_shot='it\'s'", "task.k_shot=it's: must be a whole number or a list"),
        ("task.k_shot='C:\\dir\\\\'", "task.k_shot=C:\\dir\\: must be a whole number or a list"),
        ("task.k_query=${task.k_shot}5", "task.k_query=15: must be a whole number"),
    ],
)
def test_quoted_text_reaches_the_task_as_in_a_training(world, typed, told):
    trained = call(train.main, *SHORT, *DIGITS, typed, "run_dir=unused", folder=world)
    assert trained.err.startswith(told), trained.err
    assert asked(world, typed).err.startswith(told)


# Sweeps over tasks.


@pytest.mark.slow
def test_settings_of_a_swept_task_are_checked_by_the_jobs_alone(tmp_path):
    typed = ("task=digits,glyphs", "task.n_way=2", "algorithm=prototypes", "base_layer=mlp", "evaluation=none")
    said = call(train.main, "-m", *SHORT, *typed, "hydra.sweep.dir=sweep", folder=tmp_path)
    assert said.exit_code == 0, said.err
    records = list((tmp_path / "sweep").rglob("overrides.yaml"))
    assert len(records) == 2
    for record in records:
        assert "task.n_way=2" in OmegaConf.load(record)
    said = call(train.main, "-m", "task=digits,glyphs", "task.n_wayz=2", "hydra.sweep.dir=other", folder=tmp_path)
    assert said.exit_code == 2 and "did you mean n_way?" in said.err


@pytest.mark.parametrize(
    ("typed", "passed"),
    [
        (["task=a,b", "task.x=1"], ["task=a,b", "task.x=1"]),
        (["-m", "task=a,b", "task.x=[1,2]", "seed=1"], ["-m", "task=a,b", "task.x=choice([1,2])", "seed=1"]),
        (["-m", "task=a,b", "task.x=1,2", "optimizer.lr=1"], ["-m", "task=a,b", "task.x=1,2", "optimizer.lr=1"]),
        (["-m", "experiment=a,b", "optimizer.lr=1"], ["-m", "experiment=a,b", "optimizer.lr=choice(1)"]),
        (["-m", "experiment=a,b", "hydra.sweep.dir=x"], ["-m", "experiment=a,b", "hydra.sweep.dir=x"]),
        (["-m", "seed=1,2", "task.x=1"], ["-m", "seed=1,2", "task.x=1"]),
    ],
)
def test_only_settings_of_a_swept_group_wait_for_the_jobs(typed, passed):
    assert for_jobs(typed) == passed


def test_flags_may_stand_after_the_settings_of_the_task():
    typed = ["run=mine", "task.k_shot=5", "evaluation.tasks=4", "--config-dir", "conf"]
    assert with_asked(typed) == ["run=mine", "asked=['task.k_shot=5']", *typed[2:]]


# Which data train.


def config_of(target: str, /, **settings):
    return OmegaConf.create({"_target_": f"mlframework.tasks.{target}", **settings})


CUTS = [
    ("TextFolder", {"path": "x", "task_column": "author"}, {"task_column": "topic"}, "task.task_column=topic: "),
    ("TextFolder", {"path": "x"}, {"text_column": "says"}, "task.text_column=says: "),
    ("TextLanguages", {"script": "latin", "data_dir": None}, {"script": "all"}, "task.script=all: "),
    ("Table", {"path": "x", "target": "a"}, {"target": "b"}, "task.target=b: "),
    ("Table", {"path": "x", "missing": []}, {"missing": ["-"]}, "task.missing=['-']: "),
    ("SklearnTables", {"train": ["iris"], "test": ["wine"]}, {"train": ["wine"], "test": ["iris"]}, "task.train="),
    ("Omniglot", {"splits": "vinyals"}, {"splits": "alphabet"}, "task.splits=alphabet: "),
]


@pytest.mark.parametrize(("target", "own", "changes", "line"), CUTS)
def test_settings_that_move_tasks_to_another_split_are_those_of_the_run(target, own, changes, line):
    config = config_of(target, **own)
    with pytest.raises(InvalidValue, match="says which data are trained on") as caught:
        check_divided_alike(config, OmegaConf.merge(config, changes))
    assert str(caught.value).startswith(line)
    check_divided_alike(config, OmegaConf.merge(config, {"k_shot": 3, "length": 7}))
    check_divided_alike(config, config)


def test_the_default_of_a_setting_is_its_value():
    own = config_of("TextFolder", path="x")
    check_divided_alike(own, config_of("TextFolder", path="x", task_column="task"))


def test_a_class_and_its_subclass_have_the_same_data():
    fixed = config_of("OmniglotFixedLabels", splits="vinyals")
    check_divided_alike(fixed, config_of("Omniglot", splits="vinyals"))
    for own, other in (("OmniglotFixedLabels", "Omniglot"), ("Omniglot", "OmniglotFixedLabels")):
        with pytest.raises(InvalidValue, match=r"task\.splits=alphabet"):
            check_divided_alike(config_of(own, splits="vinyals"), config_of(other, splits="alphabet"))


@pytest.mark.parametrize("other", ["./data", "data/", "link", "{here}/data", "~/data"])
def test_one_folder_has_many_names(tmp_path, monkeypatch, other):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to("data")
    other = other.format(here=tmp_path)
    ratings = [ratings_of(path, share) for path, share in (("data", 0.3), (other, 0.4), ("elsewhere", 0.4))]
    texts = [config_of("TextFolder", path=path, task_column=column) for path, column in (("data", "a"), (other, "b"))]
    roots = [config_of("Omniglot", data_dir=path, splits=s) for path, s in (("data", "vinyals"), (other, "alphabet"))]
    for own, asked in (ratings[:2], texts, roots):
        with pytest.raises(InvalidValue, match="says which data are trained on"):
            check_divided_alike(own, asked)
    check_divided_alike(ratings[0], ratings[2])


def test_no_data_folder_is_the_default_one(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFRAMEWORK_DATA", str(tmp_path))
    own, asked = (
        config_of("Omniglot", splits="vinyals"),
        config_of("Omniglot", splits="alphabet", data_dir=str(tmp_path)),
    )
    with pytest.raises(InvalidValue, match=r"task\.splits"):
        check_divided_alike(own, asked)


def ratings_of(path: str, held_out: float, **source):
    found = {"_target_": "mlframework.tasks.RatingTable", "path": path, **source}
    return config_of("RatingTasks", source=found, held_out_items=held_out)


def test_settings_of_a_source_that_say_who_a_user_is_are_those_of_the_run():
    with pytest.raises(InvalidValue, match=r"task\.source\.user=film: says which"):
        check_divided_alike(ratings_of("data", 0.3), ratings_of("data", 0.3, user="film", item="user"))
    with pytest.raises(InvalidValue, match=r"task\.held_out_items=0\.4"):
        check_divided_alike(ratings_of("data", 0.3), ratings_of("data", 0.4, list_separator=","))


class OwnTask(TaskDistribution):
    """A user's own, which says nothing of its settings."""

    def __init__(self, k_shot: int = 1, fold: int = 0) -> None:
        self.k_shot, self.fold = k_shot, fold

    def sample(self, num_tasks, split, generator):
        raise NotImplementedError


def test_a_task_of_ones_own_that_declares_nothing_is_warned_of(caplog):
    own = OmegaConf.create({"_target_": f"{__name__}.OwnTask", "k_shot": 1})
    check_divided_alike(own, OmegaConf.merge(own, {"k_shot": 5, "fold": 0}))
    assert not caplog.records
    check_divided_alike(own, OmegaConf.merge(own, {"k_shot": 5, "fold": 2}))
    (said,) = [record.getMessage() for record in caplog.records]
    assert said == "task.fold: training data might be among the tests: OwnTask.divided_by does not say"


def test_a_function_that_makes_a_task_is_no_error():
    own = OmegaConf.create({"_target_": f"{__name__}.ratings_of", "path": "a"})
    check_divided_alike(own, own)


@pytest.mark.slow
def test_a_run_in_another_folder_finds_its_texts_and_refuses_another_cut(tmp_path):
    """The path is relative to the folder of the training, and the evaluation is typed in another."""
    (tmp_path / "home").mkdir()
    (tmp_path / "away").mkdir()
    rows = [
        json.dumps({"author": f"author {a}", "topic": f"topic {t}", "text": f"{a} says of {t}, {n} times, again"})
        for a in range(8)
        for t in range(8)
        for n in range(3)
    ]
    (tmp_path / "home" / "mine.jsonl").write_text("\n".join(rows))
    typed = ("task=text_folder", "task.path=mine.jsonl", "task.task_column=author", "task.length=8", "task.k_query=2")
    typed += ("algorithm=in_context", "base_layer.width=8", "base_layer.depth=1", "display=[]")
    said = call(train.main, *SHORT, *typed, "evaluation=none", "run_dir=run", folder=tmp_path / "home")
    assert said.exit_code == 0, said.err
    run = f"run={tmp_path / 'home' / 'run'}"
    said = call(evaluate.main, run, *FEW, "task.k_shot=2", folder=tmp_path / "away")
    assert said.exit_code == 0, said.err
    for typed in (["task.task_column=topic"], ["task.task_column=topic", f"task.path={tmp_path}/home/mine.jsonl"]):
        said = call(evaluate.main, run, *FEW, *typed, folder=tmp_path / "away")
        assert said.exit_code == 2 and said.err.startswith("task.task_column=topic: says which data are"), said.err
