"""Generation: what is remembered changes nothing, and what is asked for is what comes."""

from __future__ import annotations

import io
import logging
import re
import sys
from functools import partial

import pytest
import torch
from commands import call
from hydra import compose, initialize_config_module
from hydra.utils import instantiate

import mlframework
from mlframework.base_layers import GRU, Transformer
from mlframework.cli.evaluate import main as evaluate
from mlframework.cli.generate import main as generate_command
from mlframework.cli.train import main as train
from mlframework.errors import InvalidValue, UserError
from mlframework.evaluation.displays.samples import sample_sheet
from mlframework.tasks import Source, TextTasks
from mlframework.text.generation import Sampling, draw, generate, sample_rows

NETWORKS = {"transformer": partial(Transformer, width=8, depth=2, heads=2), "gru": partial(GRU, width=8)}
ALGORITHMS = ("maml", "anil", "lora", "cavia", "in_context", "matching", "hypernetwork", "prototypes", "ridge")


class Given(TextTasks):
    """Ten words, the same in every split."""

    def __init__(self):
        super().__init__(k_shot=4, k_query=4, length=6, running=False)

    def load(self, split):
        return [Source("words", ["ada", "bob", "cleo", "dan", "eve", "fay", "gus", "hal", "ida", "joe"])]


def made(algorithm, network="transformer"):
    """A meta layer with weights large enough to tell tokens apart, and its support set."""
    with initialize_config_module("mlframework.conf", version_base="1.3"):
        config = compose("train", [f"algorithm={algorithm}", "task=text_lists"])
    task = Given()
    meta_layer = instantiate(config.algorithm, _partial_=True)(NETWORKS[network](task.spec), task).double().eval()
    with torch.no_grad():
        for parameter in meta_layer.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    support = task.encode(["ada", "bob", "cleo", "dan"])
    return meta_layer, support._replace(mask=support.mask.double())


def without_memory(meta_layer, adapted, rows, sampling, generator):
    """Rows of tokens, every one of them predicted from the whole row before it."""
    for _ in range(sampling.length):
        with torch.no_grad():
            logits = meta_layer.predict(adapted, rows.unsqueeze(0))[0, :, -1]
        rows = torch.cat([rows, draw(logits, sampling, generator).unsqueeze(1)], dim=1)
    return rows.tolist()


def until_the_end(row, boundary):
    return row[: row.index(boundary, 1) + 1] if boundary in row[1:] else row


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("temperature", [0.0, pytest.param(1.0, marks=pytest.mark.slow)])
def test_generating_with_a_memory_is_generating_without(float64, algorithm, network, temperature):
    meta_layer, support = made(algorithm, network)
    adapted = meta_layer.adapt(support)
    boundary = meta_layer.task.tokens.boundary
    start, sampling = torch.tensor([[boundary, 97, 98]] * 3), Sampling(length=9, temperature=temperature)
    with_memory, without = (
        sample(meta_layer, adapted, start, sampling, torch.Generator().manual_seed(0))
        for sample in (sample_rows, without_memory)
    )
    assert [until_the_end(row, boundary) for row in with_memory] == [until_the_end(row, boundary) for row in without]


def generated(count=4, seed=0, prompt="", **sampling):
    meta_layer, support = made("maml")
    generator = torch.Generator().manual_seed(seed)
    adapted = meta_layer.adapt(support)
    return generate(meta_layer, adapted, count=count, sampling=Sampling(**sampling), generator=generator, prompt=prompt)


def test_the_same_seed_gives_the_same_texts(float64):
    torch.manual_seed(0)
    first = generated(seed=1)
    torch.manual_seed(0)
    assert generated(seed=1) == first
    torch.manual_seed(0)
    assert generated(seed=2) != first


def test_texts_start_with_the_prompt_and_stop_before_the_stop(float64):
    texts = generated(prompt="abX", stop="X", length=5)
    assert texts == ["ab"] * 4
    assert all(text.startswith("ada") for text in generated(prompt="ada", length=3))


def test_temperature_zero_takes_the_likeliest_token(float64):
    assert len(set(generated(temperature=0.0, length=8))) == 1


def test_draws_follow_the_truncated_distribution():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(20_000, -1)
    generator = torch.Generator().manual_seed(0)
    found = torch.bincount(draw(logits, Sampling(top_p=0.8), generator), minlength=4) / 20_000
    torch.testing.assert_close(found, torch.tensor([0.625, 0.375, 0.0, 0.0]), atol=0.02, rtol=0)
    found = torch.bincount(draw(logits, Sampling(temperature=0.5), generator), minlength=4) / 20_000
    squares = torch.tensor([0.25, 0.09, 0.0225, 0.0025])
    torch.testing.assert_close(found, squares / squares.sum(), atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"length": 0}, "length=0: must be at least 1"),
        ({"temperature": -1.0}, "temperature=-1.0: must be at least 0"),
        ({"top_p": 0.0}, "top_p=0.0: must be above 0"),
        ({"top_p": 1.5}, "top_p=1.5: must be above 0 and at most 1"),
        ({"stop": ""}, "stop=: must hold at least one character"),
        ({"count": 0}, "n=0: must be at least 1"),
    ],
)
def test_what_makes_no_sense_is_refused(wrong, line):
    with pytest.raises(InvalidValue, match=line):
        generated(**wrong)


@pytest.mark.parametrize("algorithm", ["maml", "matching"])
def test_a_sample_sheet_has_the_support_and_texts_before_and_after(algorithm):
    meta_layer, _ = made(algorithm)
    meta_layer.float()
    episode = meta_layer.task.sample(2, "validation", torch.Generator().manual_seed(0))
    state = torch.get_rng_state()
    parts = sample_sheet(meta_layer, episode).split("\n\n")
    assert torch.equal(torch.get_rng_state(), state)
    titles, tables = parts[::2], parts[1::2]
    assert titles == ["**task 1**", "**task 2**"] and len(tables) == 2
    columns = 3 if algorithm == "maml" else 2
    for table in tables:
        lines = table.split("\n")
        assert len(lines) == 7 and {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {columns + 1}
        assert {"ada", "bob", "cleo", "dan", "eve"} & set(table.split())


# From a folder of a user's own to new texts.

SMALL = (
    *("base_layer.width=8", "base_layer.depth=1", "base_layer.heads=2", "task.k_shot=2", "task.k_query=2"),
    *("task.length=8", "trainer.steps=2", "trainer.meta_batch=2", "trainer.validation_tasks=3"),
    *(
        "evaluation.tasks=3",
        "evaluation.validation_tasks=2",
        "evaluation.baseline.from_scratch.tasks=1",
        "evaluation.baseline.from_scratch.steps=2",
        "algorithm.inner_steps=1",
    ),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of a user's own: several scripts, and three files that cannot be used."""
    root = tmp_path_factory.mktemp("texts")
    mine = root / "mine"
    mine.mkdir()
    texts = {
        "english": "the quick brown fox\njumps over the lazy dog\nand runs away",
        "greek": "η γρήγορη καφέ αλεπού\nπηδάει πάνω από\nτο τεμπέλικο σκυλί",
        "russian": "быстрая рыжая лиса\nпрыгает через\nленивую собаку",
        "japanese": "素早い茶色の狐が\nのろまな犬を\n飛び越える",
        "hebrew": "השועל החום המהיר\nקופץ מעל\nהכלב העצלן",
    }
    for name, text in texts.items():
        (mine / f"{name}.txt").write_text(text, encoding="utf-8")
    (mine / "empty.txt").write_text("")
    (mine / "binary.txt").write_bytes(b"text\0\1\2")
    (mine / "short.txt").write_text("too short")
    (mine / "latin1.txt").write_bytes("déjà vu, plusieurs fois déjà vu".encode("latin-1"))
    return root


@pytest.fixture(scope="module")
def run(folder):
    said = call(train, "task=text_folder", "task.path=mine", "run_dir=run", *SMALL, folder=folder)
    assert said.exit_code == 0, said.err
    return said


def test_files_that_cannot_be_used_are_named_in_one_line_each(run):
    for line in (
        r"mine/binary.txt: is binary \(byte 4 is 0\), and text in UTF-8 is expected: left out",
        r"mine/empty.txt: is empty: left out",
        r"mine/latin1.txt: is no UTF-8 at byte 1 \(0xe9\): save it as UTF-8: left out",
        r"mine: short.txt: too short, 1 rows of 8 tokens, and 2 \+ 2 are needed: left out",
    ):
        assert len(re.findall(line, run.out + run.err)) == 1, line


@pytest.mark.slow
def test_a_run_on_a_users_folder_evaluates_and_generates(folder, run):
    assert "bits per character" in run.out
    few = ("evaluation.tasks=3", "evaluation.validation_tasks=2", "+evaluation.measure.text_quality.sources=1")
    said = call(evaluate, "run=run", *few, folder=folder)
    assert said.exit_code == 0 and "in context" in said.out and "task fit" in said.out, said.err
    (folder / "some.txt").write_text("вот они\nи вот\n", encoding="utf-8")
    said = call(generate_command, "run=run", "support=some.txt", "n=3", "length=5", folder=folder)
    assert (said.exit_code, len(said.out.split("\n"))) == (0, 4), said.err
    both = call(generate_command, "run=run", "support=[some.txt,mine/greek.txt]", "n=1", folder=folder)
    assert both.exit_code == 0 and both.out


def test_standard_input_holds_sets_of_examples(folder, run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("ada\nbob\n\ncleo\n"))
    said = call(generate_command, "run=run", "n=2", "length=4", "prompt=x", folder=folder)
    assert said.exit_code == 0, said.err
    lines = said.out.rstrip("\n").split("\n")
    assert len(lines) >= 4 and sum(line.startswith("x") for line in lines) == 4


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["support=nowhere.txt"], "nowhere.txt: cannot be read (No such file or directory)"),
        (["support=mine/binary.txt"], "mine/binary.txt: is binary (byte 4 is 0), and text in UTF-8 is expected"),
        (["support=mine/empty.txt"], "support=mine/empty.txt: holds no text"),
        (["support=[]"], "support=[]: must name a file, or - for standard input"),
        (["support=mine/greek.txt", "temperature=-1"], "temperature=-1: must be at least 0"),
        (["support=mine/greek.txt", "inner_steps=-1"], "inner_steps=-1: must be at least 0, or null"),
        (["support=mine/greek.txt", "unit=word"], "unit=word: must be one of line, paragraph, file"),
        (["support=mine/greek.txt", "n=many"], "n=many: must be a whole number"),
        (["support=mine/greek.txt", "run=nowhere"], "nowhere: there is no such run folder"),
    ],
)
def test_what_is_wrong_with_the_input_is_one_line(folder, run, arguments, line):
    said = call(generate_command, "run=run", *arguments, folder=folder)
    assert said.exit_code == 2
    assert said.err.startswith(line) and said.err.count("\n") == 1 and not said.out


def test_python_loads_adapts_and_generates(folder, run, monkeypatch):
    monkeypatch.chdir(folder)  # the run's task.path is relative to it
    model = mlframework.load("run").adapt(["ada", "bob"])
    assert model.generate(2, seed=3, length=5) == model.generate(2, seed=3, length=5)
    x = torch.randint(256, (3, 8))
    assert model.predict(x).shape == (3, 8, 257)


def test_a_run_on_other_tasks_generates_nothing(tmp_path):
    small = ("trainer.steps=1", "trainer.validation_tasks=2", "evaluation=none", "logger.figures=false")
    assert call(train, "run_dir=run", *small, folder=tmp_path).exit_code == 0
    (tmp_path / "a.txt").write_text("ada")
    said = call(generate_command, "run=run", "support=a.txt", folder=tmp_path)
    assert said.exit_code == 2
    assert said.err == "Sinusoid is no text task\n"
    with pytest.raises(UserError, match="no text task"):
        mlframework.load(tmp_path / "run").adapt(["ada"])


# Tables.


def test_tables_have_a_task_and_a_text_in_each_row(tmp_path, caplog):
    from mlframework.tasks import TextFolder

    rows = [(task, f"{task} says {number} things") for number in range(8) for task in ("a", "b", "c", "d")]
    (tmp_path / "t.csv").write_text("task,text\n" + "".join(f'{task},"{text}"\n' for task, text in rows))
    (tmp_path / "t.jsonl").write_text("".join(f'{{"task": "{task}", "text": "{text}"}}\n' for task, text in rows))
    caplog.set_level(logging.WARNING)
    for name in ("t.csv", "t.jsonl"):
        task = TextFolder(tmp_path / name, k_shot=2, k_query=2, length=8)
        sources = {s.name: s.texts for split in ("train", "validation", "test") for s in task.sources(split)}
        assert sources == {t: [text for other, text in rows if other == t] for t in "abcd"}
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("t.csv", "who,text\na,b\n", r"t.csv: line 2: has no task; there are who, text \(task.task_column"),
        ("t.jsonl", '{"task": "a", "text": "b"}\n{"task"\n', "t.jsonl: line 2: cannot be read as JSON"),
        ("t.jsonl", "[1]\n", "t.jsonl: line 1: must be an object"),
    ],
)
def test_what_is_wrong_with_a_table_is_said_with_its_line(tmp_path, name, content, line):
    from mlframework.tasks import TextFolder

    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=line):
        TextFolder(tmp_path / name, k_shot=2, k_query=2, length=8).sources("train")


def test_given_splits_are_kept(tmp_path):
    from mlframework.tasks import TextFolder

    for split in ("train", "val", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / f"{split}.txt").write_text("one text after another\n" * 3)
    task = TextFolder(tmp_path, k_shot=1, k_query=1, length=8)
    assert [task.sources(split)[0].name for split in ("train", "validation", "test")] == [
        "train.txt",
        "val.txt",
        "test.txt",
    ]


@pytest.mark.parametrize("path", [None, "nowhere", __file__])
def test_a_path_that_holds_no_tasks_is_refused(path):
    from mlframework.tasks import TextFolder

    with pytest.raises(InvalidValue, match=r"path=.*: must"):
        TextFolder(path, k_shot=1, k_query=1, length=8).sample(1, "train", torch.Generator())
