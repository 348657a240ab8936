"""Judging what a text model generates, and the baselines that stand beside it."""

from __future__ import annotations

import math

import pytest
import torch
from commands import call
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mlframework.base_layers import BaseLayer
from mlframework.cli.train import main as train
from mlframework.episode import Examples
from mlframework.errors import InvalidValue
from mlframework.evaluation.baselines.ngram import NGrams, ngram_values
from mlframework.evaluation.displays.text_quality import TextQuality
from mlframework.evaluation.evaluation import Evaluation
from mlframework.evaluation.task_set import VALIDATION_SEED, TaskSet
from mlframework.meta_layers.meta_layer import MetaLayer
from mlframework.tasks import Source, TextTasks

ALPHABETS = ("abcde", "fghij", "klmno", "pqrst", "uvwxy")


class Alphabets(TextTasks):
    """Each source has five letters of its own, in words of four, all of them different."""

    def __init__(self):
        super().__init__(k_shot=6, k_query=6, length=6, running=False)

    def load(self, split):
        generator = torch.Generator().manual_seed({"train": 0, "validation": 1, "test": 2}[split])

        def words(letters):
            drawn = torch.randint(len(letters), (60, 4), generator=generator).tolist()
            return ["".join(letters[i] for i in word) for word in drawn]

        return [Source(letters, words(letters)) for letters in ALPHABETS]


class FromSupport(MetaLayer):
    """Any of the letters of the support set, four of them; before it has seen it, any letter at all."""

    test_inner_steps = 1

    def __init__(self, task):
        super().__init__(BaseLayer(torch.nn.Embedding(257, 1), torch.nn.Linear(1, 257)), task)

    def adapt(self, support):
        *_, last = self.trajectory(support, 1)
        return last

    def trajectory(self, support, steps):
        letters = torch.zeros(len(support.y), 257)
        letters[:, 97:122] = 1
        yield letters
        own = torch.zeros(len(support.y), 257)
        for task, (y, mask) in enumerate(zip(support.y, support.mask, strict=True)):
            own[task, y[mask > 0]] = 1
        own[:, 256] = 0
        yield own

    def predict(self, adapted, x, mask=None):
        return (adapted[:, None, None].expand(*x.shape, -1) + 1e-30).log()


def test_texts_are_recognised_once_a_model_has_adapted_and_not_before():
    task = Alphabets()
    quality = TextQuality(sources=5, texts=10).measure(FromSupport(task), "test", 1)
    assert quality.columns["after"]["task_fit"].mean == 1 == quality.columns["real"]["task_fit"].mean
    assert quality.columns["before"]["task_fit"].mean < 0.6
    assert quality.columns["after"]["ngram_distance"].mean < quality.columns["before"]["ngram_distance"].mean
    assert quality.columns["after"]["copied_share"].mean < 0.1 and quality.columns["after"]["distinct_3"].mean > 0.5
    assert quality.columns["after"]["task_fit"].values == 5


class Copies(FromSupport):
    """Says the first support text again."""

    test_inner_steps = 0

    def trajectory(self, support, steps):
        yield support.y[:, 0]

    def predict(self, adapted, x, mask=None):
        following = adapted[:, : x.shape[-1]].unsqueeze(1).expand(-1, x.shape[1], -1)
        return 50.0 * torch.nn.functional.one_hot(following, 257)


def test_copies_of_the_support_set_are_found():
    task = Alphabets()
    quality = TextQuality(sources=3, texts=4).measure(Copies(task), "test", 0)
    assert set(quality.columns) == {"after", "real"}
    assert quality.columns["after"]["copied_share"].mean == 1 and quality.columns["real"]["copied_share"].mean == 0


def test_real_text_is_recognised_where_the_classifier_was_not_trained_on_it():
    """Words of all letters: what was learned by heart would be recognised, what was not cannot be."""

    class Alike(Alphabets):
        def load(self, split):
            generator = torch.Generator().manual_seed(0)
            draws = torch.randint(25, (5, 60, 4), generator=generator).tolist()
            return [Source(str(i), ["".join(chr(97 + c) for c in word) for word in own]) for i, own in enumerate(draws)]

    task = Alike()
    quality = TextQuality(sources=5, texts=10).measure(FromSupport(task), "test", 1)
    assert quality.columns["real"]["task_fit"].mean < 0.5


def test_real_text_is_none_of_the_support_and_not_its_own_reference():
    task = Alphabets()
    source = TextQuality(texts=30).texts_of(FromSupport(task), "test", 1, 1)
    assert source.name == ALPHABETS[1]
    assert len(set(source.support)) == 6 and len(source.real) == pytest.approx(len(source.reference), abs=1)
    parts = [set(texts) for texts in (source.support, source.real, source.reference)]
    assert sum(map(len, parts)) == len(set.union(*parts)), "two of them share a text"
    assert set.union(*parts) == set(task.load("test")[1].texts)


def test_one_source_of_one_text_has_nothing_to_be_told_from(caplog):
    class Lonely(Alphabets):
        def __init__(self):
            super().__init__()
            self.length = 1_000_000  # no text has two pieces

        def load(self, split):
            return [Source("one", ["abcd"] * 20)]

    task = Lonely()
    task._loaded = {split: ([Source("one", ["abcd"])], None) for split in ("train", "validation", "test")}
    assert TextQuality().measure(FromSupport(task), "test", 1) is None
    assert "there are not two sources" in caplog.text


@pytest.mark.parametrize(("field", "value"), [("temperature", -1.0), ("top_p", 0.0)])
def test_how_texts_are_drawn_is_checked_before_anything_is_trained(field, value):
    with pytest.raises(InvalidValue, match=f"{field}="):
        TextQuality(**{field: value})


@pytest.mark.parametrize("field", ["sources", "texts"])
def test_judging_nothing_is_refused(field):
    with pytest.raises(InvalidValue, match=f"{field}=0: must be at least 1"):
        TextQuality(**{field: 0})


def test_the_ngram_baseline_learns_letters_from_the_support_set():
    task = Alphabets()
    tasks = TaskSet(task, "test", tasks=20, seed=0)
    validation = TaskSet(task, "validation", tasks=100, seed=2)
    found = ngram_values(task, tasks, order=3, validation=validation)
    # Of a word of four letters and an end, the letters are one in five, and the end is certain.
    floor, unadapted = 4 * math.log2(5) / 5, 4 * math.log2(25) / 5
    bits = found["query_bits_per_character"].mean().item()
    assert floor < bits < (floor + unadapted) / 2
    assert found["query_loss"].mean().item() == pytest.approx(bits * math.log(2))


def test_the_ngram_baseline_knows_nothing_of_other_test_text():
    """What a task's support set and queries are given, the test split's other sources, and the tasks of these, are all
    the same to it.
    """

    class Mixed(Alphabets):
        def __init__(self, letters):
            super().__init__()
            self.letters = letters

        def load(self, split):
            first, *others = super().load(split)
            if split != "test":
                return [first, *others]
            renamed = str.maketrans(ALPHABETS[1], self.letters)
            return [first, others[0]._replace(texts=[text.translate(renamed) for text in others[0].texts])]

    found = []
    for letters in (ALPHABETS[1], ALPHABETS[0]):  # another's letters, or the first's
        task = Mixed(letters)
        generator = torch.Generator().manual_seed(0)
        tasks = [task.draw(torch.tensor([number]), "test", generator) for number in (0, *[1] * 20)]
        validation = TaskSet(task, "validation", tasks=20, seed=2)
        found.append(ngram_values(task, tasks, order=5, validation=validation)["query_loss"][0])
    assert torch.equal(found[0][:1], found[1][:1])
    assert not torch.equal(found[0], found[1])


def test_an_evaluation_tunes_the_ngram_baseline_on_validation_tasks():
    task = Alphabets()
    report = Evaluation(tasks=6, seed=0, validation_tasks=10, baseline={"ngram": NGrams(order=3)}).run(
        "letters", FromSupport(task), lambda: None, torch.device("cpu")
    )
    (row,) = (row for row in report.rows if row.method.startswith("3-gram"))
    wanted = ngram_values(
        task,
        TaskSet(task, "test", tasks=6, seed=0),
        order=3,
        validation=TaskSet(task, "validation", tasks=10, seed=VALIDATION_SEED),
    )
    assert row.values["query_loss"] == pytest.approx(wanted["query_loss"][0].tolist(), rel=1e-6)


@pytest.mark.slow
def test_an_evaluation_of_text_has_its_baselines_and_tensorboard_the_samples(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    for letters in ALPHABETS:
        (mine / f"{letters}.txt").write_text(
            "\n".join(Alphabets().load("train")[0].texts).translate(str.maketrans("abcde", letters))
        )
    said = call(
        train,
        *("task=text_folder", "task.path=mine", "task.running=false", "task.k_shot=3", "task.k_query=3"),
        *("task.length=6", "base_layer.width=8", "base_layer.depth=1", "base_layer.heads=2", "run_dir=run"),
        *("trainer.steps=2", "trainer.meta_batch=2", "trainer.validation_tasks=3", "trainer.validate_every=1"),
        *(
            "evaluation.tasks=4",
            "evaluation.validation_tasks=2",
            "evaluation.baseline.from_scratch.tasks=1",
            "evaluation.baseline.from_scratch.steps=1",
            "algorithm.inner_steps=1",
        ),
        *("evaluation.measure.text_quality.sources=1", "evaluation.measure.text_quality.texts=2"),
        "evaluation.baseline.ngram.order=3",
        folder=tmp_path,
    )
    assert said.exit_code == 0, said.err
    for row in ("maml", "from scratch", "in context", "3-gram", "task fit", "copied share"):
        assert row in said.out
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert {"validation/samples_before/task_fit", "validation/samples_after/copied_share"} <= set(
        events.Tags()["scalars"]
    )
    assert "validation/samples/text_summary" in events.Tags()["tensors"]
    sheet = events.Tensors("validation/samples/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert "| support | before | after" in sheet


@pytest.mark.slow
def test_positions_that_know_no_longer_sequence_leave_in_context_out_and_nothing_else(tmp_path, caplog):
    (tmp_path / "mine").mkdir()
    for letters in ALPHABETS:
        (tmp_path / "mine" / letters).write_text("\n".join(letters[i:] + letters[:i] for i in range(5)) * 4)
    said = call(
        train,
        *("task=text_folder", "task.path=mine", "task.k_shot=2", "task.k_query=2", "task.length=6", "run_dir=run"),
        *("base_layer.width=8", "base_layer.depth=1", "base_layer.heads=2", "base_layer.positions=learned"),
        *("trainer.steps=1", "trainer.meta_batch=2", "trainer.validation_tasks=2", "logger.figures=false"),
        *(
            "evaluation.tasks=2",
            "evaluation.validation_tasks=2",
            "evaluation/baseline=[in_context]",
            "evaluation/measure=[]",
        ),
        folder=tmp_path,
    )
    assert said.exit_code == 0, said.err
    assert "in context: left out, base_layer.positions=learned: " in said.out + said.err + caplog.text
    assert "in context (same weights)" not in said.out and "maml" in said.out


def test_examples_of_a_task_are_those_of_its_source():
    task = Alphabets()
    episode = task.draw(torch.tensor([2, 4]), "test", torch.Generator().manual_seed(0))
    for number, letters in enumerate((ALPHABETS[2], ALPHABETS[4])):
        support: Examples = episode.support
        text = "".join(task.decode(row.tolist()) for row in support.y[number])
        assert set(text) <= set(letters)
