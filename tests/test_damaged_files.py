"""Every file that is read: damaged, of another type, wrongly built, too large, unreadable or no file at all.

Each is refused in one line that names the file, in bounded time and memory. `READERS` has a row for every kind of file;
a new one is tested by a row."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import shutil
import tempfile
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from commands import Said, call
from PIL import Image

from mlframework import MAML, MLP, Exact, Sinusoid, load
from mlframework.cli import train
from mlframework.cli.generate import examples_in
from mlframework.episode import Split
from mlframework.errors import UserError
from mlframework.inner_loop import SGD
from mlframework.reading import check_file, read_bytes, read_text
from mlframework.runs.board import BoardRecord
from mlframework.runs.build import start_from
from mlframework.runs.resume import Resumed
from mlframework.runs.run_folder import PARTS, RunFolder
from mlframework.runs.saved import save
from mlframework.tasks import ImageFolder, PretrainedTokenizer, Table, TextFolder, TextLanguages, TextRoles
from mlframework.tasks.images.own_images import as_images
from mlframework.tasks.ratings.movielens import MovieLens
from mlframework.tasks.ratings.rating_table import RatingTable
from mlframework.tasks.ratings.recbole import RecBole
from mlframework.training import checkpoint

#: More than any reader takes; the file has holes in the place of its content.
TOO_LARGE = 9 << 30

#: Bytes that a reader may take beside the file, to refuse it.
MEMORY = 200 << 20


class Reader(NamedTuple):
    """A kind of file that is read.

    Attributes:
        write: puts a right one into a folder, and returns its path.
        read: reads it there.
        wrong: contents of the right type and the wrong inner structure.
        tolerates: the damages after which such a file is still a right one: half a CSV is a CSV.
    """

    write: Callable[[Path], Path]
    read: Callable[[Path], Any]
    wrong: Mapping[str, str | bytes] = {}
    tolerates: tuple[str, ...] = ()


# Right files.


def text_file(name: str, text: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
        return folder / name

    return write


def json_file(name: str, content: Any) -> Callable[[Path], Path]:
    return text_file(name, json.dumps(content))


def packed_file(name: str, content: Any) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(packed(content))
        return folder / name

    return write


def packed(content: Any) -> bytes:
    return gzip.compress(json.dumps(content).encode())


def network(folder: Path) -> MAML:
    task, update = Sinusoid(k_shot=2, k_query=2), partial(SGD, lr=0.01)
    return MAML(
        MLP(task.spec, hidden=[4]), task, update=update, meta_gradient=Exact(), inner_steps=1, test_inner_steps=1
    )


def weights(name: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        state = network(folder).base_layer.state_dict()
        (safetensors.torch.save_file if name.endswith(".safetensors") else torch.save)(state, folder / name)
        return folder / name

    return write


def saved_model(folder: Path) -> Path:
    save(network(folder), folder / "model.safetensors")
    return folder / "model.safetensors"


def best_weights(folder: Path) -> Path:
    checkpoint.save_weights(folder / "best.safetensors", network(folder))
    return folder / "best.safetensors"


def parquet(folder: Path) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as writer

    rows = [{"school": n % 9, "score": n / 10, "x": n * 37 % 50} for n in range(90)]
    writer.write_table(pyarrow.Table.from_pylist(rows), folder / "table.parquet")
    return folder / "table.parquet"


def lists_in_parquet() -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as writer

    file = io.BytesIO()
    writer.write_table(pyarrow.table({"school": [[1], [2]], "score": [1.0, 2.0], "x": [1, 2]}), file)
    return file.getvalue()


def image(folder: Path) -> Path:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "drawing.png")
    return folder / "drawing.png"


def image_of_class(folder: Path) -> Path:
    for name in "abcdefghijklmnopqrst":
        (folder / name).mkdir()
        for number in range(2):
            shutil.copy(image(folder), folder / name / f"{number}.png")
    (folder / "drawing.png").unlink()
    return folder / "a" / "0.png"


def tokenizer(folder: Path) -> Path:
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.train_from_iterator(["to be or not to be"], tokenizers.trainers.BpeTrainer(vocab_size=50))
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def rated(separator: str, header: str = "") -> str:
    return header + "".join(f"{user}{separator}{item}{separator}3{separator}7\n" for user in "1234" for item in "5678")


def movielens(folder: Path) -> Path:
    text_file("u.genre", "drama|0\n")(folder)
    text_file("u.user", "".join(f"{user}|24|M|artist|10001\n" for user in "1234"))(folder)
    text_file("u.item", "".join(f"{item}|A film (1995)|1-1-1995||there|1\n" for item in "5678"))(folder)
    return text_file("u.data", rated("\t"))(folder)


CONFIG = {**{name: {"_target_": "mlframework.tasks.Sinusoid"} for name in PARTS}, "seed": 0}
SPEECHES = {f"ROLE {number}": [f"A speech, number {n}, of {number}." for n in range(40)] for number in range(12)}
CODES = [f"{first}{second}a" for first in "abcd" for second in "efgh"]
LANGUAGES = {"text": {code: f"All are born free, {code}.\n" * 40 for code in CODES}, "latin_script": CODES}
BOARD = Path(__file__).parents[1] / "results" / "board" / "sinusoid_ridge_3229e894_4bf4f4_0.json"
TABLE = "school,score,x\n" + "".join(f"{n % 9},{n / 10},{n * 37 % 50}\n" for n in range(90))
TEXTS = "task,text\n" + "".join(f"{n % 6},the words of number {n} are {n * 17}\n" for n in range(90))
LINES = "".join(json.dumps({"task": str(n % 6), "text": f"the words of {n} are {n * 17}"}) + "\n" for n in range(90))
DEEP = "[" * 100_000
#: Half a gigabyte of lists, once all names are followed.
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


def drawn(task: Any, split: Split = "train") -> Any:
    return task.sample(1, split, torch.Generator().manual_seed(0))


def of_images(folder: Path) -> ImageFolder:
    return ImageFolder(folder, n_way=2, k_shot=1, k_query=1, image_size=8, channels=1)


def of_text(path: Path) -> Any:
    return drawn(TextFolder(path, k_shot=1, k_query=1, length=8))


def of_table(path: Path) -> Any:
    return drawn(Table(path, task_column="school", target="score", k_shot=2))


def of_run(read: Callable[[RunFolder], Any]) -> Callable[[Path], Any]:
    return lambda path: read(RunFolder(path.parent))


def resumed_run(folder: Path) -> Path:
    text_file("config.yaml", yaml.safe_dump(CONFIG))(folder)
    return json_file("resumed.json", [])(folder)


def resume_record(path: Path) -> None:
    Resumed(None, [], {}, {}, ["trainer.steps=5"]).record(RunFolder(path.parent), 5)  # type: ignore[arg-type]


SHORTER = ("half", "one byte less")

READERS: dict[str, Reader] = {
    "config of a run": Reader(
        text_file("config.yaml", yaml.safe_dump(CONFIG)),
        of_run(RunFolder.config),
        {"a list": "[1, 2]", "no seed": yaml.safe_dump({**CONFIG, "seed": None}), "bomb": BOMB, "deep": DEEP},
        ("one byte less",),
    ),
    "step of a run's last checkpoint": Reader(
        json_file("progress.json", {"step": 0}),
        of_run(RunFolder.check_lost),
        {"a list": "[]", "a text as step": '{"step": "9"}'},
    ),
    "overrides of a run": Reader(
        text_file("overrides.yaml", "- seed=1\n- trainer.steps=5\n"),
        of_run(RunFolder.overrides),
        {"a text": "seed=1", "a mapping": "seed: 1", "bomb": f"- x\n- {{{BOMB.replace(chr(10), ',')}}}", "deep": DEEP},
        SHORTER,
    ),
    "choices of a run": Reader(
        json_file("choices.json", {"task": "sinusoid"}), of_run(RunFolder.choices), {"a list": "[]", "deep": DEEP}
    ),
    "what a task keeps": Reader(
        json_file("task.json", {"mean": 1.0}), of_run(RunFolder.kept), {"a number": "1", "deep": DEEP}
    ),
    "environment of a run": Reader(
        json_file("environment.json", {"folder": "/tmp"}),
        of_run(RunFolder.trained_in),
        {"a list": "[]", "a number in the place of the folder": '{"folder": 3}', "deep": DEEP},
    ),
    "result of a run": Reader(
        json_file("result.json", {"overrides": ["seed=1"]}),
        of_run(lambda folder: folder.finished(["seed=1"])),
        {"a list": "[]", "overrides of numbers": '{"overrides": 3}', "deep": DEEP},
    ),
    "failure of a job": Reader(
        json_file("failed.json", {"status": "diverged", "overrides": ["seed=1"], "error": "nan"}),
        of_run(lambda folder: folder.diverged(["seed=1"])),
        {"a list": "[]", "overrides of numbers": '{"status": "diverged", "overrides": 3}', "deep": DEEP},
    ),
    "resumes of a run": Reader(resumed_run, resume_record, {"a mapping": "{}", "deep": DEEP}),
    "record of the board": Reader(
        text_file("record.json", BOARD.read_text()),
        BoardRecord.read,
        {"a list": "[1, 2]", "a text": '"mean"', "nothing": "{}", "deep": DEEP},
        ("one byte less",),
    ),
    "table as CSV": Reader(
        text_file("table.csv", TABLE),
        of_table,
        {
            "columns": "school,score\n1\n2,3,4\n",
            "header alone": "school,score,x\n",
            "a page": "<html>\n<body>\n</html>\n",
        },
        SHORTER,
    ),
    "table as parquet": Reader(parquet, of_table, {"lists": lists_in_parquet()}),
    "texts as CSV": Reader(
        text_file("texts.csv", TEXTS), of_text, {"columns": "who,what\na,b\n", "header alone": "task,text\n"}, SHORTER
    ),
    "texts as JSON lines": Reader(
        text_file("texts.jsonl", LINES),
        of_text,
        {"lists": "[1]\n[2]\n", "other keys": '{"who": 1}\n', "deep": DEEP},
        ("one byte less",),
    ),
    "roles": Reader(
        packed_file("shakespeare_roles.json.gz", SPEECHES),
        lambda path: drawn(TextRoles(k_shot=1, k_query=1, length=8, data_dir=path.parent)),
        {
            "a list": packed([1]),
            "numbers": packed({"ROLE": [1, 2]}),
            "a text": packed({"ROLE": "speech"}),
            "not JSON": gzip.compress(b"speech"),
            "no UTF-8": gzip.compress(b"\xff\xfe\xfa"),
            "deep": gzip.compress(DEEP.encode()),
            "bomb": gzip.compress(bytes(65 << 20), 1),
        },
    ),
    "languages": Reader(
        packed_file("udhr_languages.json.gz", LANGUAGES),
        lambda path: drawn(TextLanguages(k_shot=1, k_query=1, length=8, data_dir=path.parent)),
        {
            "no scripts": packed({"text": LANGUAGES["text"]}),
            "no texts": packed({"text": [], "latin_script": []}),
            "a code without text": packed({"text": {"deu": "x"}, "latin_script": ["eng"]}),
            "numbers": packed({"text": {"deu": 1}, "latin_script": ["deu"]}),
        },
    ),
    "ratings as CSV": Reader(
        text_file("ratings.csv", rated(",", "user,item,rating,time\n")),
        lambda path: RatingTable(path).read(),
        {
            "columns": "user,item\n1,2\n",
            "no numbers": "user,item,rating\n1,2,good\n",
            "fields": "user,item,rating\n1,2\n",
        },
        SHORTER,
    ),
    "ratings of RecBole": Reader(
        text_file("x.inter", rated("\t", "user_id:token\titem_id:token\trating:float\ttime:float\n")),
        lambda path: RecBole(path.parent).read(),
        {
            "columns": "user:token\titem:token\n1\t2\n",
            "no numbers": "user_id:token\titem_id:token\trating:float\n1\t2\tx\n",
        },
        SHORTER,
    ),
    "ratings of MovieLens": Reader(
        movielens,
        lambda path: MovieLens(path.parent).read(),
        {"fields": "1\t2\n", "no numbers": "1\t2\tgood\t7\n"},
        SHORTER,
    ),
    "image of a class": Reader(
        image_of_class,
        lambda path: [drawn(of_images(path.parents[1]), split) for split in get_args(Split)],
        tolerates=("one byte less", "too large"),
    ),
    "image to adapt to": Reader(
        image, lambda path: as_images([path], (1, 8, 8)), tolerates=("one byte less", "too large")
    ),
    "weights in safetensors": Reader(
        weights("w.safetensors"), lambda path: start_from(str(path), network(path.parent).base_layer)
    ),
    "weights of torch.save": Reader(
        weights("w.pt"),
        lambda path: start_from(str(path), network(path.parent).base_layer),
        tolerates=("one byte less",),
    ),
    "best weights of a run": Reader(best_weights, lambda path: checkpoint.load_weights(path, network(path.parent))),
    "saved algorithm": Reader(
        saved_model,
        load,
        {
            "weights alone": safetensors.torch.save({"x": torch.ones(2)}),
            "parts of another kind": safetensors.torch.save({"x": torch.ones(2)}, {"mlframework.parts": "[]"}),
            "parts without a task": safetensors.torch.save({"x": torch.ones(2)}, {"mlframework.parts": "{}"}),
            "parts that are no JSON": safetensors.torch.save({"x": torch.ones(2)}, {"mlframework.parts": "x"}),
            "deep parts": safetensors.torch.save({"x": torch.ones(2)}, {"mlframework.parts": DEEP}),
            "wrong arguments": safetensors.torch.save(
                {"x": torch.ones(2)},
                {"mlframework.parts": '{"task": {"_target_": "mlframework.tasks.Sinusoid", "shots": 3}}'},
            ),
        },
    ),
    "tokenizer": Reader(
        tokenizer, PretrainedTokenizer, {"a list": "[]", "nothing": "{}", "deep": DEEP}, tolerates=("one byte less",)
    ),
    "examples to generate from": Reader(
        text_file("names.txt", "Ada\nGrace\n"), lambda path: examples_in([str(path)], "line"), {}, SHORTER
    ),
}


# Damages: each takes the path of a right file.


def of_half(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def without_the_last_byte(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def replaced(content: bytes) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.write_bytes(content)

    return damage


def too_large(path: Path) -> None:
    os.truncate(path, TOO_LARGE)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def linked_to(target: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.unlink()
        path.symlink_to(target.format(path=path))

    return damage


def archive() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        made.writestr("other.txt", "not what is asked for\n" * 20)
    return file.getvalue()


def picture() -> bytes:
    file = io.BytesIO()
    Image.new("L", (9, 9)).save(file, "bmp")
    return file.getvalue()


DAMAGED = random.Random(0).randbytes(5000)

DAMAGES: dict[str, Callable[[Path], None]] = {
    "half": of_half,
    "one byte less": without_the_last_byte,
    "empty": replaced(b""),
    "garbage": replaced(DAMAGED),
    "zeros": replaced(bytes(5000)),
    "a zip": replaced(archive()),
    "too large": too_large,
    "a folder": a_folder,
    "a pipe": a_pipe,
    "a link to itself": linked_to("{path}"),
    "a link to nothing": linked_to("nothing-there"),
    "a device that never ends": linked_to("/dev/zero"),
    "a file that fails while it is read": linked_to("/proc/self/mem"),
}


@contextmanager
def folder_for_anybody() -> Iterator[Path]:
    """A new folder into which every user of the machine may look."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@contextmanager
def as_nobody() -> Iterator[None]:
    """Without root's right to read every file."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def outcome(reader: Reader, path: Path) -> str:
    """What is wrong with the way in which a reader refuses a file; '' where nothing is."""
    tracemalloc.start()
    try:
        reader.read(path)
    except UserError as error:
        said = str(error)
        most = tracemalloc.get_traced_memory()[1]
        known = (path.name, path.parent.name)  # a folder of which no file can be used is named itself
        if "\n" in said.strip() or len(said) > 700:
            return f"not one line: {said[:400]}"
        if not any(name in said for name in known):
            return f"does not name the file: {said}"
        return "" if most < MEMORY else f"takes {most >> 20} MB to be refused"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"[:400]
    finally:
        tracemalloc.stop()
    return "is read as if nothing were wrong"


#: The damages of the fast tests, and the readers that take longer to write a right file than to refuse a wrong one.
QUICK, LONG = ("half", "garbage", "too large", "a folder", "a pipe"), ("image of a class", "roles", "saved algorithm")


@pytest.fixture
def cache(monkeypatch):
    """A cache that every user of the machine may write to."""
    with folder_for_anybody() as folder:
        folder.chmod(0o777)
        monkeypatch.setenv("MLFRAMEWORK_CACHE", str(folder))
        yield


@pytest.mark.parametrize("name", [name for name in READERS if name not in LONG])
def test_a_damaged_file_is_refused_in_one_line_that_names_it(name, cache):
    check_refusals(READERS[name], {label: DAMAGES[label] for label in QUICK})


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_a_file_that_cannot_be_right_is_refused_in_one_line_that_names_it(name, cache):
    check_refusals(READERS[name], DAMAGES)


def check_refusals(reader: Reader, damages: Mapping[str, Callable[[Path], None]]) -> None:
    """Every damage and every wrong inner structure is refused, but for what the reader tolerates."""
    wrong = {}
    contents = {label: text if isinstance(text, bytes) else text.encode() for label, text in reader.wrong.items()}
    for label, damage in {**damages, **{label: replaced(content) for label, content in contents.items()}}.items():
        with folder_for_anybody() as folder:
            path = reader.write(folder)
            damage(path)
            if said := outcome(reader, path):
                wrong[label] = said
    assert {label: said for label, said in wrong.items() if label not in reader.tolerates} == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_a_file_that_may_not_be_read_is_refused_in_one_line_that_names_it(name, cache):
    with folder_for_anybody() as folder:
        path = READERS[name].write(folder)
        path.chmod(0)
        with as_nobody():
            assert outcome(READERS[name], path) == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_the_files_are_right_before_they_are_damaged(name, cache):
    with folder_for_anybody() as folder:
        READERS[name].read(READERS[name].write(folder))


#: What may stand in a config of the user's own.
CONFIGS = {
    "no end": "_target_: [mlframework.tasks",
    "a tab": "_target_:\n\t- x\n",
    "garbage": DAMAGED,
    "zeros": bytes(5000),
    "a picture": picture(),
    "a list": "[1, 2]",
    "a number": "3",
    "a bomb": BOMB,
    "deep": DEEP,
}


def refused(folder: Path, content: str | bytes | Callable[[Path], None]) -> Said:
    """What a training says whose task is a config with this content, or with this damage."""
    path = text_file("conf/task/mine.yaml", "_target_: mlframework.tasks.Sinusoid")(folder)
    (replaced(content.encode() if isinstance(content, str) else content) if not callable(content) else content)(path)
    return call(train.main, "--config-dir", str(folder / "conf"), "task=mine", "run_dir=run", folder=folder)


def check_refusal(said: Said) -> None:
    assert said.exit_code == 2 and said.out == ""
    assert said.err.count("\n") == 1 and ("mine" in said.err or "task=[" in said.err), said.err


@pytest.mark.parametrize("name", ["no end", "a folder"])
def test_a_config_of_the_users_that_cannot_be_read_ends_a_command_in_one_line(name, tmp_path):
    check_refusal(refused(tmp_path, {**CONFIGS, **DAMAGES}[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CONFIGS, "too large", "a pipe", "a link to itself", "a device that never ends"])
def test_every_damaged_config_of_the_users_ends_a_command_in_one_line(name, tmp_path):
    check_refusal(refused(tmp_path, {**CONFIGS, **DAMAGES}[name]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("typed", "write"),
    [
        (["task=table", "task.path={}", "task.task_column=school", "task.target=score"], READERS["table as CSV"].write),
        (["task=text_folder", "task.path={}"], READERS["texts as JSON lines"].write),
        (["task=ratings", "task/source=table", "task.source.path={}"], READERS["ratings as CSV"].write),
        (["init={}", "base_layer.hidden=[4]"], READERS["weights in safetensors"].write),
    ],
    ids=["table", "texts", "ratings", "weights"],
)
def test_a_command_ends_with_exit_code_2_and_one_line_and_leaves_no_run(typed, write, tmp_path):
    path = write(tmp_path)
    path.write_bytes(DAMAGED)
    said = call(train.main, *(each.format(path) for each in typed), "run_dir=run", folder=tmp_path)
    assert said.exit_code == 2 and not (tmp_path / "run" / "config.yaml").exists()
    assert said.err.count("\n") == 1 and path.name in said.err, said.err


@pytest.mark.slow
def test_a_damaged_record_of_mlflow_is_named(tmp_path):
    from mlframework.training.mlflow_logger import run_in

    for content in ("", "[1]", "{}", '{"run_id": 3}', DEEP):
        path = text_file("mlflow.json", content)(tmp_path)
        with pytest.raises(UserError, match=r"mlflow\.json: damaged"):
            run_in(path)


def test_a_larger_limit_is_the_users_choice(tmp_path, monkeypatch):
    path = text_file("long.txt", "a" * 2000)(tmp_path)
    monkeypatch.setattr("mlframework.reading.MOST_DATA", 1000)
    with pytest.raises(UserError, match=r"long.txt: holds 2000 bytes, and at most 1000 bytes are read: .*_FILE=1 "):
        read_text(path)
    monkeypatch.setenv("MLFRAMEWORK_LARGEST_FILE", "0.001")
    assert len(read_bytes(path)) == check_file(path) == 2000
    monkeypatch.setenv("MLFRAMEWORK_LARGEST_FILE", "much")
    with pytest.raises(UserError, match="MLFRAMEWORK_LARGEST_FILE=much: must be a number of gigabytes"):
        read_text(path)
