"""Data and networks of one's own: each kind by name, with its result or the line that tells the fix."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch
from own_networks import Convolutions, DropsMask, Patches, RowReader
from PIL import Image
from torch import nn

from mlframework.base_layers import MLP, BaseLayer, MixesExamples, Stack
from mlframework.episode import Episode, Examples, TaskSpec
from mlframework.errors import InvalidData, InvalidValue, UserError
from mlframework.inner_loop import SGD
from mlframework.meta_layers import MAML, Exact, LearnedLoss, Prototypes
from mlframework.runs import FewShotClassifier, FewShotRegressor, Trained, train
from mlframework.tasks import Digits, ImageFolder, Sinusoid, TaskDistribution
from mlframework.tasks.check_episode import check_episode
from mlframework.tasks.images.own_images import as_images
from mlframework.tasks.own_data import as_inputs, as_numbers
from mlframework.testing import check_meta_layer, check_task_distribution

TASK = Digits(n_way=2, k_shot=3, k_query=2, validation_digits=[6, 7], test_digits=[8, 9])
BYTES = np.random.default_rng(0).integers(0, 140, (6, 1, 8, 8), dtype=np.uint8)
X, Y = (BYTES / 255).astype(np.float32), np.array([0, 1, 0, 1, 0, 1])


@pytest.fixture(scope="module")
def layer():
    torch.manual_seed(0)
    return Prototypes(MLP(TASK.spec, hidden=[8]), TASK)


@pytest.fixture(scope="module")
def wanted(layer):
    return FewShotClassifier(layer).fit(X, Y).predict_proba(X)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The images as files of dark ink on white paper."""
    folder = tmp_path_factory.mktemp("files")
    for number, image in enumerate(BYTES):
        Image.fromarray(255 - image[0]).save(folder / f"{number}.png")
    return [folder / f"{number}.png" for number in range(len(BYTES))]


def frames():
    """Pandas, of the extra `tables`."""
    return pytest.importorskip("pandas")


def pictures(mode="L"):
    return [Image.fromarray(255 - image[0]).convert(mode) for image in BYTES]


def read_only():
    same = X.copy()
    same.flags.writeable = False
    return same


#: Inputs that are converted: the numbers are those of `X`.
SAME = {
    "float32": lambda: X,
    "float64": lambda: X.astype(np.float64),
    "a float64 tensor": lambda: torch.from_numpy(X).double(),
    "a tensor with a gradient": lambda: torch.from_numpy(X).requires_grad_(),
    "bytes": lambda: BYTES,
    "a tensor of bytes": lambda: torch.from_numpy(BYTES),
    "int64 from 0 to 255": lambda: BYTES.astype(np.int64),
    "an int32 tensor": lambda: torch.from_numpy(BYTES).int(),
    "uint16": lambda: BYTES.astype(np.uint16),
    "another byte order": lambda: X.astype(">f4"),
    "another memory order": lambda: np.asfortranarray(X),
    "negative strides": lambda: X[::-1][::-1],
    "read-only memory": read_only,
    "nested lists": lambda: X.tolist(),
    "a list of arrays": lambda: list(X),
    "a list of tensors": lambda: list(torch.from_numpy(X)),
    "objects": lambda: X.astype(object),
    "flat rows": lambda: X.reshape(6, 64),
    "a data frame of flat rows": lambda: frames().DataFrame(X.reshape(6, 64)),
    "no axis of channels": lambda: X[:, 0],
    "channels last": lambda: X.transpose(0, 2, 3, 1),
    "grey in three channels": lambda: np.repeat(X, 3, 1),
    "colours last": lambda: np.repeat(X, 3, 1).transpose(0, 2, 3, 1),
    "an opaque fourth channel": lambda: np.concatenate([np.repeat(X, 3, 1), np.ones_like(X)], 1),
    "PIL images": pictures,
    "PIL images in colour": lambda: pictures("RGB"),
    "PIL images with transparency": lambda: pictures("RGBA"),
    "a list of several layouts": lambda: [X[0, 0], X[1], X[2].transpose(1, 2, 0), *X[3:]],
    "a list of several types": lambda: [BYTES[0], X[1], BYTES[2].astype(int), torch.from_numpy(X[3]).half(), *X[4:]],
    "a list of several layouts and types": lambda: [BYTES[0, 0], *X[1:]],
    "nested lists of several layouts": lambda: [X[0, 0].tolist(), *X[1:].tolist()],
}


@pytest.mark.parametrize("kind", SAME)
def test_inputs_are_converted_where_that_is_exact(kind, layer, wanted):
    x = SAME[kind]()
    found = FewShotClassifier(layer).fit(x, Y).predict_proba(x)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    np.testing.assert_allclose(Trained(layer).adapt(x, Y).predict(x).softmax(-1), wanted, atol=1e-5)


@pytest.mark.parametrize("form", [list, lambda f: [str(p) for p in f], lambda f: np.array([str(p) for p in f])])
def test_files_are_read_as_the_tasks_own(form, files, layer, wanted):
    x = form(files)
    np.testing.assert_allclose(FewShotClassifier(layer).fit(x, Y).predict_proba(x), wanted, atol=1e-5)


def test_files_and_images_may_stand_in_one_list(files, layer, wanted):
    x = [*files[:3], *pictures()[3:]]
    np.testing.assert_allclose(FewShotClassifier(layer).fit(x, Y).predict_proba(x), wanted, atol=1e-5)


def test_images_of_another_size_are_scaled_as_files_are(layer):
    large = np.kron(BYTES, np.ones((1, 1, 3, 3), dtype=np.uint8))
    shown = [Image.fromarray(255 - image[0]) for image in large]
    one, other = (FewShotClassifier(layer).fit(x, Y).predict_proba(x) for x in (large, shown))
    np.testing.assert_allclose(one, other, atol=5e-3)  # files are rounded to bytes after the filter


def test_one_image_of_the_tasks_shape_is_one_query(layer, wanted):
    found = FewShotClassifier(layer).fit(X, Y).predict_proba(X[0])
    np.testing.assert_allclose(found, wanted[:1], atol=1e-5)


COLOUR = (3, 28, 28)

#: The layout of an array, the task's shape, and the images: their number, and which of the array they are.
LAYOUTS = {
    "one grey image, channel last": ((28, 28, 1), (1, 28, 28), lambda x: x.permute(2, 0, 1)[None]),
    "one of another size, channel last": ((20, 30, 1), (1, 20, 30), lambda x: x.permute(2, 0, 1)[None]),
    "one of another width, channel last": ((28, 14, 1), (1, 28, 14), lambda x: x.permute(2, 0, 1)[None]),
    "one grey image, channel first": ((1, 28, 28), (1, 28, 28), lambda x: x[None]),
    "grey images, channel last": ((5, 28, 28, 1), (1, 28, 28), lambda x: x.permute(0, 3, 1, 2)),
    "three grey images": ((3, 28, 28), (1, 28, 28), lambda x: x[:, None]),
    "grey for colours, channel last": ((28, 28, 1), COLOUR, lambda x: x.permute(2, 0, 1)[None].expand(1, 3, 28, 28)),
    "one image of the task's shape": (COLOUR, COLOUR, lambda x: x[None]),
    "two grey images for colours": ((2, 28, 28), COLOUR, lambda x: x[:, None].expand(2, 3, 28, 28)),
    "three grey images for colours, with their channel": (
        (3, 1, 28, 28),
        COLOUR,
        lambda x: x.expand(3, 3, 28, 28),
    ),
    "images of one pixel in height, channels last": ((5, 1, 4, 3), (3, 1, 4), lambda x: x.permute(0, 3, 1, 2)),
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_an_array_of_images_has_one_layout(kind):
    shape, task, wanted = LAYOUTS[kind]
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(as_images(x, task), wanted(x).float())


def test_one_grey_image_with_its_channel_last_is_one_query(layer, wanted):
    model = Trained(layer).adapt(X, Y)
    np.testing.assert_allclose(model.predict(X[0].transpose(1, 2, 0)).softmax(-1), wanted[:1], atol=1e-5)
    large = np.kron(X[0, 0], np.ones((3, 2)))[..., None]  # of another size
    assert model.predict(large).shape == (1, 2)


#: Layouts with two meanings, or none; the line.
UNCLEAR = {
    "three grey images, or colours of another size": (
        ((3, 84, 84), COLOUR),
        r"x=an array of shape \(3, 84, 84\): may be one image in colour, x\[None\], or 3 grey ones, x\[:, None\]",
    ),
    "four grey images, or transparency": (((4, 28, 28), COLOUR), r"may be one image in colour, .*, or 4 grey ones"),
    "channels at both ends": (((5, 1, 30, 3), COLOUR), r"\(5, 1, 30, 3\): may have its channels first or last"),
    "images without pixels": (((2, 1, 0, 30), COLOUR), r"x=an array of shape \(2, 1, 0, 30\): must be images"),
}


@pytest.mark.parametrize("kind", UNCLEAR)
def test_an_array_of_images_with_two_layouts_is_refused(kind):
    (shape, task), line = UNCLEAR[kind]
    with pytest.raises(InvalidData, match=line):
        as_images(np.zeros(shape), task)


def test_no_images_are_no_images():
    assert as_images(np.zeros((0, 1, 30, 30)), (1, 28, 28)).shape == (0, 1, 28, 28)
    assert as_images(np.zeros((0, 28, 28, 3)), COLOUR).shape == (0, 3, 28, 28)


#: Images of types and sizes beside one another, and the largest number of each.
SCALES = {
    "floats": ([np.ones((10, 10)), np.full((10, 10), 0.5)], [1.0, 0.5]),
    "bytes": ([np.ones((10, 10), np.uint8), np.full((10, 10), 200, np.uint8)], [1 / 255, 200 / 255]),
    "whole numbers": ([np.ones((10, 10), int), np.full((10, 10), 200)], [1 / 255, 200 / 255]),
    "truth values": ([np.ones((10, 10), bool), np.full((10, 10), 200, np.uint8)], [1.0, 200 / 255]),
    "nested lists": ([np.ones((10, 10), int).tolist(), np.full((10, 10), 0.5).tolist()], [1.0, 0.5]),
    "nested lists of whole numbers": (
        [np.ones((10, 10), int).tolist(), np.full((10, 10), 200).tolist()],
        [1 / 255, 200 / 255],
    ),
}


@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("size", [10, 12])
def test_the_scale_of_an_image_does_not_depend_on_the_sizes_beside_it(kind, size):
    (one, other), largest = SCALES[kind]
    grow = (
        (lambda image: image)
        if size == 10
        else (lambda image: np.kron(image, np.ones((2, 2), np.asarray(image).dtype)))
    )
    other = grow(other).tolist() if isinstance(other, list) and size != 10 else grow(other)
    found = as_images([one, other], (1, 28, 28))
    np.testing.assert_allclose(found.amax((1, 2, 3)), largest, rtol=1e-5)


def test_the_scale_of_a_query_does_not_depend_on_the_queries_beside_it(layer):
    dark = np.zeros_like(BYTES[:1])
    dark[0, 0, 2, 3] = 1
    model = Trained(layer).adapt(BYTES, Y)
    torch.testing.assert_close(model.predict(dark)[0], model.predict(np.concatenate([dark, BYTES]))[0])


@pytest.mark.parametrize("size", [10, 12])
def test_floats_from_0_to_255_are_refused_whatever_stands_beside_them(size):
    line = r"x=floats from \d+ to 200: must be in \[0, 1\]: x / 255 if 255 is white"
    for images in ([np.ones((10, 10)), np.full((size, size), 200.0)], np.full((2, 10, 10), 200.0)):
        with pytest.raises(InvalidData, match=line):
            as_images(images, (1, 28, 28))


def test_an_image_in_colour_is_one_image_of_a_task_in_colour():
    task = ImageFolder("nowhere", n_way=2, k_shot=1, k_query=1, image_size=28)
    image = np.random.default_rng(0).uniform(size=(3, 28, 28))
    found = task.encode_inputs(image)
    assert found.shape == (1, 3, 28, 28)
    torch.testing.assert_close(found[0], torch.from_numpy(image).float())
    torch.testing.assert_close(task.encode_inputs(image.transpose(1, 2, 0)), found)
    assert task.encode_inputs(image.mean(0)[None].repeat(5, 0)).shape == (5, 3, 28, 28)  # grey ones


def changed(value, place=(3, 0, 2, 2)):
    x = X.astype(np.float64)
    x[place] = value
    return x


#: Inputs that are refused, and the line.
REFUSED = {
    "NaN": (lambda: changed(np.nan), "x=NaN: stands in row 3: fill it in, or leave the row out"),
    "infinity": (lambda: changed(np.inf), r"x=(infinity: stands in row 3|numbers from 0 to inf)"),
    "complex numbers": (lambda: X.astype(complex), "x=complex numbers: must be real"),
    "standardised images": (lambda: 8 * X - 2, r"x=numbers from -2 to 2\.\d+: must be in \[0, 1\], or whole numbers"),
    "twelve bits": (lambda: 16 * BYTES.astype(np.uint16), r"x=numbers from \d+ to 2\d{3}: must be in \[0, 1\]"),
    "floats from 0 to 255": (lambda: BYTES.astype(float), r"x=floats from 0 to 1\d+: must be in \[0, 1\]: x / 255 if"),
    "whole numbers of 0 and 1": (
        lambda: (X > 0.2).astype(int),
        r"x=whole numbers of 0 and 1: may be 0 to 1, or 0 to 255: x\.astype\(float\) if 1 is white",
    ),
    "rows of different lengths": (lambda: [[1.0, 2.0], [1.0]] * 3, r"x=an array of shape \(1, 2\): must be images"),
    "images of rows of different lengths": (
        lambda: [[[0.1, 0.2], [0.3]], *[[[0.1, 0.2], [0.3, 0.4]]] * 5],
        "x=rows of different lengths: must be an array of numbers",
    ),
    "a sparse matrix": (lambda: scipy.sparse.csr_matrix(X.reshape(6, 64)), r"x=a sparse matrix: must be dense"),
    "rows of another length": (lambda: np.zeros((6, 5)), r"x=an array of shape \(6, 5\): must be images of shape"),
    "five axes": (
        lambda: X[:, None],
        r"x=an array of shape \(6, 1, 1, 8, 8\): must be images of shape \('n', 1, 8, 8\)",
    ),
    "five channels": (lambda: np.zeros((6, 5, 8, 8)), r"x=an array of shape \(6, 5, 8, 8\): must be images"),
    "dictionaries": (lambda: [{"a": 1}] * 6, "x=an array of dict: must be an array of numbers"),
    "None": (lambda: np.full((6, 1, 8, 8), None), "x=NaN: stands in row 0"),
    "files that are not there": (lambda: ["a.png"] * 6, r"a\.png: cannot be read \(.*No such file"),
    "tensors of different shapes": (
        lambda: [torch.zeros(64), torch.zeros(1, 8, 8, 1, 1)] * 3,
        r"x=an array of shape \(1, 1, 8, 8, 1, 1\): must be images",
    ),
    "no input": (lambda: X[:0], "(y=6 labels: must be one for each of 0 inputs)"),
    "a colour image for grey ones": (lambda: np.ones((3, 8, 8)), "y=6 labels: must be one for each of 3 inputs"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_inputs_that_have_no_one_meaning_are_refused_in_one_line(kind, layer):
    make, line = REFUSED[kind]
    with pytest.raises((UserError, ValueError), match=line) as caught:
        FewShotClassifier(layer).fit(make(), Y)
    assert "\n" not in str(caught.value)


#: Numbers that are taken as they are, and what they become.
NUMBERS = {
    "None": (lambda: [[None, 1.0]], torch.tensor([[torch.nan, 1.0]], dtype=torch.float64)),
    "masked values": (lambda: np.ma.array([1, 2], mask=[0, 1]), torch.tensor([1.0, torch.nan], dtype=torch.float64)),
    "objects": (lambda: np.array([1.5, Fraction(1, 2), Decimal(2)], object), torch.tensor([1.5, 0.5, 2.0]).double()),
    "whole objects": (lambda: np.array([1, 2**53 + 1], object), torch.tensor([1, 2**53 + 1])),
    "no objects": (lambda: np.zeros((0, 3), object), torch.zeros(0, 3, dtype=torch.float64)),
    "the largest int64": (lambda: np.array([2**63 - 1], np.uint64), torch.tensor([2**63 - 1])),
    "floats of eight bits": (lambda: torch.ones(2).to(torch.float8_e4m3fn), torch.ones(2, dtype=torch.float64)),
    "a view with its sign turned": (lambda: torch.tensor([1 + 2j]).conj().imag, torch.tensor([-2.0]).double()),
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_numbers_of_any_kind(kind):
    make, wanted = NUMBERS[kind]
    torch.testing.assert_close(as_numbers("x", make()), wanted, rtol=0, atol=0, equal_nan=True)


SPARSE = torch.eye(3).to_sparse()
SPARSE_LINE = r"x=a tensor of layout torch\.sparse_coo: must be dense: x\.to_dense\(\)"

#: What holds no numbers, or not exactly, and the line.
NO_NUMBERS = {
    "a text among objects": (lambda: np.array(["1.5", 2], object), "x=an array of texts: must be an array of numbers"),
    "a column of texts": (lambda: np.array(["0", "1"], object), "x=an array of texts"),
    "a series of texts": (lambda: frames().Series(["0", "1"], dtype=object), "x=an array of texts"),
    "a text beside None": (lambda: [None, "1"], "x=an array of texts"),
    "raw texts": (lambda: np.array([b"1"], object), "x=an array of bytes"),
    "complex objects": (lambda: np.array([np.complex128(1 + 2j)], object), "x=an array of complex128"),
    "durations": (lambda: np.array([np.timedelta64(5, "s")], object), "x=an array of timedelta64"),
    "uint64": (lambda: np.array([1, 2**63 + 5], np.uint64), f"x={2**63 + 5}: must be at most {2**63 - 1}"),
    "a tensor of uint64": (lambda: torch.tensor([2**63], dtype=torch.uint64), f"x={2**63}: must be at most"),
    "a very large number": (lambda: [10**400], "x=a whole number beyond float64"),
    "a sparse tensor": (lambda: SPARSE, SPARSE_LINE),
    "sparse tensors": (lambda: [SPARSE, SPARSE], SPARSE_LINE),
    "compressed rows": (lambda: torch.eye(3).to_sparse_csr(), r"x=a tensor of layout torch\.sparse_csr"),
    "a nested tensor": (
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        "x=a nested tensor: must be a tensor of one shape",
    ),
    "tensors in nested lists": (
        lambda: [[torch.ones(2, requires_grad=True)]],
        "x=nested lists of tensors: must be an array of numbers: Can't call numpy",
    ),
    "a complex tensor": (lambda: torch.ones(2, dtype=torch.complex64), "x=complex numbers: must be real"),
    "a tensor without data": (lambda: torch.empty(2, device="meta"), "x=a tensor on the device meta"),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning", "ignore:The PyTorch API of nested:UserWarning")
@pytest.mark.parametrize("kind", NO_NUMBERS)
def test_what_holds_no_numbers_is_refused_in_one_line(kind):
    make, line = NO_NUMBERS[kind]
    with pytest.raises(InvalidData, match=line) as caught:
        as_numbers("x", make())
    assert "\n" not in str(caught.value)


def test_bytes_beside_other_images_are_refused_where_the_task_is_of_ones_own():
    spec = TaskSpec("classification", (1, 8, 8), 2)
    line = r"x=images of types bool and uint8: must be of one type"
    with pytest.raises(InvalidData, match=line):
        as_inputs([BYTES[0] > 70, BYTES[1]], spec)
    torch.testing.assert_close(as_inputs(list(BYTES), spec), torch.from_numpy(X))


def test_a_broken_link_and_a_text_are_named(tmp_path, layer):
    (tmp_path / "link.png").symlink_to("gone.png")
    (tmp_path / "text.png").write_text("no image")
    for name, line in (("link.png", "cannot be read"), ("text.png", "cannot be read as an image")):
        with pytest.raises(UserError, match=f"{name}: {line}"):
            FewShotClassifier(layer).fit([tmp_path / name] * 6, Y)


def test_dark_ink_in_an_array_warns_where_the_task_has_light_ink(layer):
    with pytest.warns(UserWarning, match="x: most of it is bright, and this task has ink 1 on paper 0"):
        FewShotClassifier(layer).fit(1 - X, Y)


#: Labels: converted for the estimator; class ids are asked for by `adapt`.
LABELS = {
    "from 1": lambda: Y + 1,
    "texts": lambda: np.array(["a", "b"])[Y],
    "whole floats": lambda: Y.astype(float),
    "a tensor": lambda: torch.from_numpy(Y),
    "a list": lambda: Y.tolist(),
    "a series": lambda: frames().Series(Y, index=range(10, 16)),
    "a categorical series": lambda: frames().Series(np.array(["a", "b"])[Y]).astype("category"),
    "int8": lambda: Y.astype(np.int8),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_of_any_kind(kind, layer, wanted):
    estimator = FewShotClassifier(layer).fit(X, LABELS[kind]())
    np.testing.assert_allclose(estimator.predict_proba(X), wanted, atol=1e-6)


IDS = {
    "floats": (lambda: Y.astype(float), None),
    "truth values": (lambda: Y.astype(bool), None),
    "a column": (lambda: Y[:, None], None),
    "one-hot rows": (lambda: np.eye(2)[Y], None),
    "from 1": (lambda: Y + 1, r"y=2: must be a whole number from 0 to 1: FewShotClassifier takes labels of any kind"),
    "negative": (lambda: Y - 1, "y=-1: must be a whole number from 0 to 1"),
    "digits as texts": (lambda: np.array(["0", "1"], object)[Y], r"y=an array of texts: must be class ids 0\.\.\.1"),
    "texts": (lambda: np.array(["a", "b"])[Y], r"y=an array of texts: must be class ids 0\.\.\.1: FewShotClassifier"),
    "halves": (lambda: Y / 2, r"y=0\.5: must be a whole number"),
    "missing": (lambda: np.where(Y, np.nan, 0), "y=NaN: stands in row 1"),
    "too few": (lambda: Y[:4], "y=4 targets: must be one for each of 6 inputs"),
}


@pytest.mark.parametrize("kind", IDS)
def test_class_ids_of_any_kind_or_one_line(kind, layer, wanted):
    make, line = IDS[kind]
    if line is None:
        np.testing.assert_allclose(Trained(layer).adapt(X, make()).predict(X).softmax(-1), wanted, atol=1e-6)
        return
    with pytest.raises(InvalidData, match=line):
        Trained(layer).adapt(X, make())


ROWS = np.arange(6.0)[:, None]


def masked(values):
    """Six values, of which the last is missing."""
    return np.ma.array(values, mask=np.arange(6) == 5)


#: Inputs and targets of rows, where scikit-learn would read something else; the line.
MISREAD = {
    "texts of numbers": (
        lambda: (ROWS.astype(str).astype(object), ROWS[:, 0]),
        "x=an array of texts: must be an array",
    ),
    "targets as texts": (
        lambda: (ROWS, ROWS[:, 0].astype(str).astype(object)),
        "y=an array of texts: must be an array",
    ),
    "a series of texts": (lambda: (ROWS, frames().Series(["1"] * 6, dtype=object)), "y=an array of texts"),
    "masked inputs": (lambda: (masked(ROWS[:, 0])[:, None], ROWS[:, 0]), "x=NaN: stands in row 5"),
    "masked targets": (lambda: (ROWS, masked(ROWS[:, 0])), "y=masked values: must be a target for each input"),
    "rows of different lengths": (lambda: ([[1.0], [1.0, 2.0]], [1.0, 2.0]), "x=rows of different lengths: must be"),
}


@pytest.mark.parametrize("kind", MISREAD)
def test_rows_that_scikit_learn_would_misread_are_refused(kind):
    make, line = MISREAD[kind]
    task = Sinusoid()
    with pytest.raises(InvalidData, match=line):
        FewShotRegressor(maml(MLP(task.spec), task)).fit(*make())


def test_masked_labels_are_refused_and_a_tensor_with_a_gradient_is_taken(layer):
    with pytest.raises(InvalidData, match="y=masked values: must be a target for each input"):
        FewShotClassifier(layer).fit(X, masked(Y))
    task = Sinusoid()
    estimator = FewShotRegressor(maml(MLP(task.spec), task))
    found = estimator.fit(torch.from_numpy(ROWS).requires_grad_(), ROWS[:, 0]).predict(ROWS)
    np.testing.assert_array_equal(found, estimator.fit(ROWS, ROWS[:, 0]).predict(ROWS))


# What `sample` of a task distribution returns.


class Own(TaskDistribution):
    """Two classes of points, drawn as `make` has it."""

    def __init__(self, make, kind="classification"):
        self.make, self.spec = make, TaskSpec(kind, (2,), 2 if kind == "classification" else 1)

    def sample(self, num_tasks, split, generator):
        halves = []
        for _ in range(2):
            x = torch.randn(num_tasks, 4, 2, generator=generator)
            y = torch.arange(2).repeat(num_tasks, 2) if self.spec.kind == "classification" else x.sum(-1, keepdim=True)
            order = torch.randperm(2, generator=generator)
            y = order[y] if self.spec.kind == "classification" else y
            halves.append((x, y, torch.ones(num_tasks, 4)))
        return self.make(halves)


def each(change):
    return lambda halves: tuple(change(*half) for half in halves)


#: What is made of it, or the line; the kind of the task.
DRAWN = {
    "an episode": (lambda halves: Episode(*(Examples(*half) for half in halves)), None),
    "plain tuples": (each(lambda x, y, mask: (x, y, mask)), None),
    "lists": (lambda halves: [list(half) for half in halves], None),
    "no mask": (each(lambda x, y, mask: (x, y)), None),
    "dictionaries": (each(lambda x, y, mask: {"x": x, "y": y}), None),
    "a dictionary of dictionaries": (
        lambda halves: dict(zip(("support", "query"), ({"x": x, "y": y} for x, y, _ in halves), strict=True)),
        None,
    ),
    "arrays": (each(lambda x, y, mask: (x.numpy(), y.numpy(), mask.numpy())), None),
    "float64": (each(lambda x, y, mask: (x.double(), y, mask.double())), None),
    "float16": (each(lambda x, y, mask: (x.half(), y)), None),
    "int32 labels": (each(lambda x, y, mask: (x, y.int())), None),
    "labels as floats": (each(lambda x, y, mask: (x, y.float())), None),
    "labels as floats of eight bits": (each(lambda x, y, mask: (x, y.to(torch.float8_e4m3fn))), None),
    "uint64 labels": (each(lambda x, y, mask: (x, y.to(torch.uint64))), None),
    "labels as truth values": (each(lambda x, y, mask: (x, y.bool())), None),
    "a mask of whole numbers": (each(lambda x, y, mask: (x, y, mask.int())), None),
    "a mask of truth values": (each(lambda x, y, mask: (x, y, mask.bool())), None),
    "nested lists of numbers": (each(lambda x, y, mask: (x.tolist(), y.tolist())), None),
    "labels from 1": (each(lambda x, y, mask: (x, y + 1)), r"class ids are not all in 0\.\.\.1: y holds 1\.\.\.2"),
    "NaN": (each(lambda x, y, mask: (x.masked_fill(x > 1, torch.nan), y)), "support: x is not finite"),
    "numbers beyond float32": (
        each(lambda x, y, mask: (x.double() * 1e39, y)),
        r"support\.x=-?\S+e\+39: is beyond torch\.float32: scale the data, or call torch\.set_default_dtype",
    ),
    "bytes": (each(lambda x, y, mask: (x.byte(), y)), r"x is torch\.uint8, and must be torch\.float32"),
    "complex numbers": (each(lambda x, y, mask: (x + 0.5j, y)), r"support\.x=complex numbers: must be real"),
    "complex labels": (each(lambda x, y, mask: (x, y + 0.5j)), r"support\.y=complex numbers: must be real"),
    "a complex mask": (each(lambda x, y, mask: (x, y, mask + 0j)), r"support\.mask=complex numbers: must be real"),
    "a sparse tensor": (
        each(lambda x, y, mask: (x.to_sparse(), y)),
        r"support\.x=a tensor of layout torch\.sparse_coo: must be dense: support\.x\.to_dense\(\)",
    ),
    "a sparse mask in an episode": (
        lambda halves: Episode(*(Examples(x, y, mask.to_sparse()) for x, y, mask in halves)),
        r"support\.mask=a tensor of layout torch\.sparse_coo",
    ),
    "labels beyond int64": (each(lambda x, y, mask: (x, y * 1e30)), r"support\.y=1e\+30: is beyond torch\.int64"),
    "infinite labels": (each(lambda x, y, mask: (x, y / 0.0)), r"y is torch\.float32, and must be torch\.int64"),
    "uint64 beyond int64": (
        each(lambda x, y, mask: (x, torch.full_like(y, 2**63 + 5, dtype=torch.uint64))),
        r"support\.y=9\.22337e\+18: is beyond torch\.int64",
    ),
    "uint64 in an array beyond int64": (
        each(lambda x, y, mask: (x, np.full(y.shape, 2**63 + 5, np.uint64))),
        rf"support\.y={2**63 + 5}: must be at most",
    ),
    "a mask of twos": (each(lambda x, y, mask: (x, y, 2 * mask)), "the mask holds something other than 0 and 1"),
    "halves of labels": (each(lambda x, y, mask: (x, y + 0.5)), r"y is torch\.float32, and must be torch\.int64"),
    "texts": (each(lambda x, y, mask: (x, [["a"] * 4] * len(x))), "support.y=an array of texts: must be an array"),
    "one half": (lambda halves: halves[:1], "sample must return an Episode of Examples, .*, and returns a list of 1"),
    "None": (lambda halves: None, "sample must return an Episode of Examples, .*, and returns a NoneType"),
    "a half of four": (each(lambda x, y, mask: (x, y, mask, 0)), "and support is a tuple of 4"),
}


@pytest.mark.parametrize("kind", DRAWN)
def test_episodes_of_ones_own_are_converted_or_refused(kind):
    make, line = DRAWN[kind]

    def draw():
        episode = Own(make).sample(3, "train", torch.Generator().manual_seed(0))
        check_episode(episode, Own(make).spec, num_tasks=3, where="task")
        return episode

    if line is None:
        plain = Own(DRAWN["an episode"][0]).sample(3, "train", torch.Generator().manual_seed(0))
        found = draw()
        assert [leaf.dtype for part in found for leaf in part][::3] == [torch.float32] * 2
        for leaf, other in zip((*found.support, *found.query), (*plain.support, *plain.query), strict=True):
            torch.testing.assert_close(leaf, other, atol=1e-3, rtol=1e-3, check_dtype=False)
        check_task_distribution(Own(make), splits=["train"])
    else:
        with pytest.raises(UserError, match=line):
            draw()
        with pytest.raises(AssertionError, match=line):
            check_task_distribution(Own(make), splits=["train"])


@pytest.mark.parametrize("change", [lambda y: y[..., 0], lambda y: y.double(), lambda y: (8 * y).round().int()])
def test_values_of_a_regression_may_be_flat_double_or_whole(change):
    task = Own(each(lambda x, y, mask: (x, change(y))), "regression")
    episode = task.sample(3, "train", torch.Generator().manual_seed(0))
    check_episode(episode, task.spec, num_tasks=3, where="task")


def test_float64_is_rounded_unless_that_is_the_default(float64):
    x, y = torch.rand(3, 4, 2), torch.rand(3, 4, 1)
    task = Own(lambda halves: ((x, y), (x, y)), "regression")

    def drawn():
        return task.sample(3, "train", torch.Generator()).support

    torch.testing.assert_close(drawn()[:2], (x, y), rtol=0, atol=0)
    torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(drawn()[:2], (x.float(), y.float()), rtol=0, atol=0)


def test_a_class_in_place_of_a_task_is_refused():
    with pytest.raises(AssertionError, match=r"a class Own: hand over the object"):
        check_task_distribution(Own)


# Folders.


def fill(root, classes):
    """Folders of three small images; a class is the path of its folder."""
    for number, name in enumerate(classes):
        for image in range(3):
            place = root / name / f"{image}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 8, 3), 20 * number + image, dtype=np.uint8)).save(place)


def split_names(train="train", validation="validation", test="test"):
    return [f"{split}/{split[:2].lower()}{number}" for split in (train, validation, test) for number in range(2)]


def folder_task(root):
    return ImageFolder(root, n_way=2, k_shot=1, k_query=1, image_size=8)


FOLDERS = {
    "valid": split_names(validation="valid"),
    "val": split_names(validation="val"),
    "dev": split_names(validation="dev"),
    "any case": split_names("Train", "VAL", "Test"),
    "training and testing": split_names("training", "validation", "testing"),
    "__MACOSX beside": [*split_names(), "__MACOSX/x"],
    "hidden and thumbnails": [*split_names(), ".cache/x"],
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_folders_of_splits_have_the_usual_names(kind, tmp_path):
    fill(tmp_path / "data", FOLDERS[kind])
    (tmp_path / "data" / "Thumbs.db").write_text("")
    task = folder_task(tmp_path / "data")
    for split, place in zip(("train", "validation", "test"), FOLDERS[kind][::2], strict=False):
        assert set(task.classes(split).names) == {f"{Path(place).name[:2]}0", f"{Path(place).name[:2]}1"}


def test_two_folders_of_one_split_are_joined(tmp_path):
    fill(tmp_path, [*split_names(), "dev/d0"])
    assert set(folder_task(tmp_path).classes("validation").names) == {"va0", "va1", "d0"}


@pytest.mark.parametrize("given", [("train", "test"), ("Validation", "test"), ("val", "dev"), ("train", "training")])
def test_two_folders_of_splits_beside_others_are_no_classes(given, tmp_path):
    fill(tmp_path, [f"{name}/{number}" for name in (*given, "misc") for number in range(3)])
    with pytest.raises(UserError, match=f"misc: stands beside folders of splits .*{given[1]}.*: move its content"):
        folder_task(tmp_path).classes("train")


@pytest.mark.parametrize("name", ["train", "Test", "dev"])
def test_one_folder_with_the_name_of_a_split_may_be_a_class(name, tmp_path):
    fill(tmp_path, [name, *(f"c{number}" for number in range(9))])
    found = [each for split in ("train", "validation", "test") for each in folder_task(tmp_path).classes(split).names]
    assert sorted(found) == sorted([name, *(f"c{number}" for number in range(9))])


FOLDER_LINES = {
    "another folder beside the splits": ("extra/e0", r"extra: stands beside folders of splits \(train, validation, te"),
    "a link to nothing": (None, r"tr0/link\.png: is a link to gone\.png, which is not there: mend or remove it"),
}


@pytest.mark.parametrize("kind", FOLDER_LINES)
def test_folders_with_a_fault_are_named(kind, tmp_path):
    more, line = FOLDER_LINES[kind]
    fill(tmp_path, [*split_names(), *([more] if more else [])])
    if more is None:
        (tmp_path / "train" / "tr0" / "link.png").symlink_to("gone.png")
    with pytest.raises(UserError, match=line):
        folder_task(tmp_path).sample(1, "train", torch.Generator().manual_seed(0))


def test_a_split_that_is_missing_and_a_class_that_is_a_broken_link_are_named(tmp_path):
    fill(tmp_path / "two", split_names()[:4])
    with pytest.raises(UserError, match="test: holds no class folders: a split for each of train, validation, test"):
        folder_task(tmp_path / "two").classes("train")
    fill(tmp_path / "link", split_names())
    (tmp_path / "link" / "train" / "t9").symlink_to("gone")
    with pytest.raises(UserError, match="t9: is a link to gone, which is not there"):
        folder_task(tmp_path / "link").classes("train")


# Networks of one's own, and what the checks catch.

RULE = partial(SGD, lr=0.1)


def maml(network, task=TASK, **settings):
    return MAML(network, task, **{"update": RULE, "meta_gradient": Exact(), "inner_steps": 1, **settings})


NETWORKS = {"convolutions": Convolutions, "rows": RowReader, "patches": Patches}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_of_ones_own_trains_and_is_used(name):
    torch.manual_seed(0)
    layer = maml(NETWORKS[name](TASK.spec, dropout=0.1))
    assert all(np.isfinite(train(layer, steps=2, meta_batch=2)))
    found = FewShotClassifier(layer).fit(X, Y)
    np.testing.assert_allclose(found.predict_proba(X), found.predict_proba(X))  # no dropout in use


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_the_checks_pass_without_dropout_and_name_it(name):
    check_meta_layer(lambda task: maml(NETWORKS[name](task.spec), task), TASK, num_tasks=2, padding=False)
    where = "" if name == "patches" else r" \(base_layer\.features\.drop\)"
    with pytest.raises(AssertionError, match=rf"adapting draws random numbers{where}: leave dropout out"):
        check_meta_layer(lambda task: maml(NETWORKS[name](task.spec, dropout=0.5), task), TASK, num_tasks=2)


def test_running_statistics_are_refused_where_the_layer_is_built():
    with pytest.raises(InvalidValue, match=r"keeps running statistics, which mix tasks: give it track_running_stats"):
        maml(Convolutions(TASK.spec, running=True))


def features_with(part):
    return lambda task: Prototypes(
        BaseLayer(Stack(nn.Flatten(), nn.Linear(64, 4), part()), nn.Linear(4, 2)), task, batch_norm="support"
    )


class Centred(nn.Module):
    """Mixes examples, and says nothing of it."""

    def forward(self, x):
        return x - x.mean(0, keepdim=True)


class IgnoresMask(MixesExamples):
    def forward(self, x, mask=None):
        return x - x.mean(0, keepdim=True)


CAUGHT = {
    "a mask that is dropped": (features_with(partial(DropsMask, 4)), "other queries move|padding matters|moves the"),
    "a mask that is ignored": (features_with(IgnoresMask), "padding matters|queries move|alone gives another"),
    "examples that mix unannounced": (features_with(Centred), "depends on the examples beside it|padding matters"),
    "an update that is an object": (
        lambda task: maml(MLP(task.spec), task, update=SGD({}, lr=0.1)),
        r"update=a SGD: must be a function that builds one, as in functools\.partial\(SGD, lr=0\.01\)",
    ),
    "an update without its rate": (
        lambda task: maml(MLP(task.spec), task, update=SGD),
        r"update=SGD: cannot be built \(.*'lr'\): settings are bound before",
    ),
    "a class in place of a meta-gradient": (
        lambda task: maml(MLP(task.spec), task, meta_gradient=Exact),
        r"meta_gradient=Exact: must be an object, as in Exact\(\)",
    ),
    "an inner loss that is an object": (
        lambda task: maml(MLP(task.spec), task, inner_loss=LearnedLoss(task)),
        r"inner_loss=a LearnedLoss: must be a function that builds one",
    ),
    "no meta layer": (lambda task: MLP(task.spec), "makes a MLP, and must make a MetaLayer: hand over a function"),
}


@pytest.mark.parametrize("fault", CAUGHT)
def test_a_check_catches_what_the_command_would(fault):
    make, line = CAUGHT[fault]
    with pytest.raises(AssertionError, match=line) as caught:
        check_meta_layer(make, TASK, num_tasks=2)
    assert len(str(caught.value).splitlines()) == 1


def test_one_layer_in_place_of_a_function_is_refused(layer):
    with pytest.raises(AssertionError, match="a Prototypes is one layer: hand over a function that makes one"):
        check_meta_layer(layer, TASK)
    with pytest.raises(AssertionError, match="makes the same parameters twice: hand over a function"):
        check_meta_layer(lambda task: layer, TASK)
