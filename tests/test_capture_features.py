"""Where a solver branches on values, the features of a whole meta-batch are compiled, and the solver stays eager."""

import logging

import pytest
import torch

from mlframework.backend.algorithm import eager_gradients
from mlframework.backend.capture import Capture
from mlframework.base_layers import MLP
from mlframework.meta_layers.svm.kernels import LinearKernel
from mlframework.meta_layers.svm.regularised import Ridge
from mlframework.meta_layers.svm.support_vectors import CrammerSingerSVM
from mlframework.tasks import ArrayTasks, ClassIndexed


@pytest.mark.parametrize(
    ("algorithm", "width"),
    [
        pytest.param(Ridge, 6, marks=pytest.mark.slow),  # a system of the four examples
        pytest.param(Ridge, 3, marks=pytest.mark.slow),  # a system of the three features
        (CrammerSingerSVM, 6),
    ],
)
def test_a_solver_may_be_part_of_the_graph_or_stay_eager(algorithm, width, caplog):
    torch.manual_seed(0)
    data = ClassIndexed.from_labels(torch.rand(40, 5), torch.arange(4).repeat(10))
    task = ArrayTasks({"train": data}, n_way=2, k_shot=2, k_query=2)
    layer = algorithm(MLP(task.spec, hidden=[width]), task, kernel=LinearKernel())
    capture = Capture(layer, "true")
    with caplog.at_level(logging.WARNING):
        for seed in range(3):
            episode = task.sample(3, "train", torch.Generator().manual_seed(seed))
            found, expected = capture(episode), eager_gradients(layer, episode)
            torch.testing.assert_close(found.losses, expected.losses)
            torch.testing.assert_close(found.by_name, expected.by_name)
    assert not [record for record in caplog.records if record.name.startswith("mlframework")]
