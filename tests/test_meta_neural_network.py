"""The Meta-Neural-Network family: each member is what a slow version of its formulas gives, task by task."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import NearestCentroid
from torch import nn

from mlframework.base_layers import MLP
from mlframework.episode import Episode, Examples
from mlframework.errors import IncompatibleKind, InvalidValue
from mlframework.meta_layers import (
    ConditionalNeuralProcess,
    Hypernetwork,
    Matching,
    MetaNetworks,
    Prototypes,
    RelationNetwork,
)
from mlframework.tasks import ArrayTasks, ClassIndexed, Sinusoid
from mlframework.testing import check_meta_layer

WAYS, TASKS = 3, 2

pytestmark = pytest.mark.usefixtures("float64")


def classes(k_shot=(1, 3), k_query=4):
    """Tasks of `WAYS` classes, by default with one to three shots, drawn anew for each task."""
    x = torch.randn(60, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    data = ClassIndexed.from_labels(x, torch.arange(60) % 6)
    return ArrayTasks({"train": data}, n_way=WAYS, k_shot=k_shot, k_query=k_query)


def waves():
    return Sinusoid(k_shot=4, k_query=3)


def drawn(task, seed=0):
    episode = task.sample(TASKS, "train", torch.Generator().manual_seed(seed))
    return Episode(*(Examples(*(t.double() if t.is_floating_point() else t for t in part)) for part in episode))


def made(kind, task, **settings):
    """A meta layer on a small network, with no parameter left at a value that hides it, such as zero."""
    meta_layer = kind(MLP(task.spec, hidden=[7]), task, **settings)
    with torch.no_grad():
        for parameter in meta_layer.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return meta_layer


def predicted(meta_layer, episode):
    return meta_layer.predict(meta_layer.adapt(episode.support), episode.query.x)


def each_task(meta_layer, episode):
    """What a slow version works with: support features, their targets, and query features, rows of padding left out."""
    features = meta_layer.base_layer.features
    for number in range(episode.num_tasks):
        counts = episode.support.mask[number].bool()
        yield (
            features(episode.support.x[number][counts]),
            episode.support.y[number][counts],
            features(episode.query.x[number]),
        )


def rows_of(labels, number):
    return [row for row, label in enumerate(labels.tolist()) if label == number]


# Prototypes.


# A feature whose ReLU never fires has no deviation, which scikit-learn needs only to shrink centroids.
@pytest.mark.filterwarnings("ignore:self.within_class_std_dev_ has at least 1 zero:UserWarning")
def test_prototypes_classify_like_scikit_learns_nearest_centroid():
    task = classes(k_query=7)
    meta_layer, episode = made(Prototypes, task), drawn(task)
    found = predicted(meta_layer, episode).argmax(-1)
    for number, (support, labels, query) in enumerate(each_task(meta_layer, episode)):
        centroids = NearestCentroid().fit(support.detach().numpy(), labels.numpy())
        assert found[number].tolist() == centroids.predict(query.detach().numpy()).tolist()


def test_logits_of_prototypes_are_the_formulas():
    task = classes()
    euclidean, cosine = made(Prototypes, task), made(Prototypes, task, distance="cosine", scale=3)
    for meta_layer in (euclidean, cosine):
        episode = drawn(task)
        found = predicted(meta_layer, episode)
        for number, (support, labels, query) in enumerate(each_task(meta_layer, episode)):
            for i, f in enumerate(query):
                for k in range(WAYS):
                    c = sum(support[row] for row in rows_of(labels, k)) / len(rows_of(labels, k))
                    distance = -sum((a - b) ** 2 for a, b in zip(f, c, strict=True))
                    likeness = f @ c / (f @ f).sqrt() / (c @ c).sqrt()
                    wanted = distance if meta_layer is euclidean else meta_layer.scale * likeness
                    torch.testing.assert_close(found[number, i, k], wanted)


# Hypernetwork.


def test_a_hypernetwork_starts_as_prototypes():
    task = classes()
    base_layer, episode = MLP(task.spec, hidden=[7]), drawn(task)
    ours, theirs = Hypernetwork(base_layer, task), Prototypes(base_layer, task)
    torch.testing.assert_close(predicted(ours, episode).softmax(-1), predicted(theirs, episode).softmax(-1))


def test_a_regressions_hypernetwork_starts_as_one_head_for_all_tasks():
    task = waves()
    head = Hypernetwork(MLP(task.spec, hidden=[7]), task).adapt(drawn(task).support)
    for leaf in head:
        assert torch.equal(leaf[0], leaf[1])


def test_predictions_of_a_hypernetwork_are_those_of_the_head_that_it_emits():
    for task in (classes(), waves()):
        meta_layer, episode = made(Hypernetwork, task, hidden=[5]), drawn(task)
        head = meta_layer.adapt(episode.support)
        found = meta_layer.predict(head, episode.query.x)
        for number, (_, _, query) in enumerate(each_task(meta_layer, episode)):
            torch.testing.assert_close(found[number], F.linear(query, head.weight[number], head.bias[number]))


def test_every_class_has_its_row_from_its_examples_and_the_sight_of_all_classes():
    task = classes()
    meta_layer, episode = made(Hypernetwork, task, hidden=[5]), drawn(task)
    head, parts = meta_layer.adapt(episode.support), meta_layer.emitter
    for number, (support, labels, _) in enumerate(each_task(meta_layer, episode)):
        codes = [torch.stack([parts.encoder(support[i]) for i in rows_of(labels, k)]).mean(0) for k in range(WAYS)]
        for k in range(WAYS):
            mean = support[rows_of(labels, k)].mean(0)
            correction = parts.correction(torch.cat([codes[k], sum(codes) / WAYS]))
            torch.testing.assert_close(head.weight[number, k], 2 * mean + correction[:-1])
            torch.testing.assert_close(head.bias[number, k], correction[-1] - mean @ mean)


def test_a_regressions_head_is_emitted_from_the_mean_code():
    task = waves()
    meta_layer, episode = made(Hypernetwork, task, hidden=[5]), drawn(task)
    head, parts = meta_layer.adapt(episode.support), meta_layer.emitter
    for number, (support, y, _) in enumerate(each_task(meta_layer, episode)):
        codes = [parts.encoder(torch.cat([f, value])) for f, value in zip(support, y, strict=True)]
        emitted = parts.correction(sum(codes) / len(codes))
        torch.testing.assert_close(head.weight[number, 0], parts.start.weight[0] + emitted[:-1])
        torch.testing.assert_close(head.bias[number, 0], parts.start.bias[0] + emitted[-1])


# Conditional neural processes.


def decoded(meta_layer, query, code, context):
    """The decoder on one query."""
    seen = meta_layer.query(query)
    return meta_layer.decoder(torch.cat([seen, code, context, seen * code]))


def test_a_conditional_neural_process_decodes_the_mean_code():
    task = waves()
    meta_layer, episode = made(ConditionalNeuralProcess, task, hidden=[5, 4]), drawn(task)
    found = predicted(meta_layer, episode)
    for number, (support, y, queries) in enumerate(each_task(meta_layer, episode)):
        codes = [meta_layer.encoder(torch.cat([f, value])) for f, value in zip(support, y, strict=True)]
        mean = sum(codes) / len(codes)
        for i, query in enumerate(queries):
            torch.testing.assert_close(found[number, i], decoded(meta_layer, query, mean, mean))


def test_a_conditional_neural_process_scores_every_class_by_its_own_mean_code():
    task = classes()
    meta_layer, episode = made(ConditionalNeuralProcess, task, hidden=[5, 4]), drawn(task)
    found = predicted(meta_layer, episode)
    for number, (support, labels, queries) in enumerate(each_task(meta_layer, episode)):
        means = [torch.stack([meta_layer.encoder(support[i]) for i in rows_of(labels, k)]).mean(0) for k in range(WAYS)]
        for i, query in enumerate(queries):
            wanted = [decoded(meta_layer, query, mean, sum(means) / WAYS) for mean in means]
            torch.testing.assert_close(found[number, i], torch.cat(wanted))


def test_a_conditional_neural_process_with_a_least_deviation_is_trained_by_the_likelihood():
    task = waves()

    def make(task):
        return made(ConditionalNeuralProcess, task, hidden=[5, 4], least_deviation=0.1)

    meta_layer, episode = make(task), drawn(task)
    adapted = meta_layer.adapt(episode.support)
    found = meta_layer.predict_distribution(adapted, episode.query.x)
    code = adapted[0, 0]
    emitted = decoded(meta_layer, meta_layer.features_of(episode.query.x)[0, 0], code, code)
    deviation = 0.1 + 0.9 * math.log1p(math.exp(emitted[1].item()))
    assert found.prediction[0, 0].item() == pytest.approx(emitted[0].item())
    assert found.variance[0, 0].item() == pytest.approx(deviation**2)
    likelihood = torch.distributions.Normal(found.prediction, found.variance.sqrt()).log_prob(episode.query.y)
    torch.testing.assert_close(meta_layer.meta_loss(episode)[0], -likelihood.squeeze(-1).mean(1))
    check_meta_layer(make, task)


@pytest.mark.parametrize(
    ("task", "deviation", "line"),
    [
        (
            classes,
            0.1,
            "least_deviation=0.1: values have deviations, and ArrayTasks is a classification: leave it",
        ),
        (waves, 1.0, "least_deviation=1.0: must be above 0 and below 1, or null"),
    ],
)
def test_a_wrong_least_deviation_is_named(task, deviation, line):
    with pytest.raises(InvalidValue, match=line):
        made(ConditionalNeuralProcess, task(), least_deviation=deviation)


# Relation networks.


def test_a_relation_network_compares_every_query_with_every_class():
    task = classes()
    meta_layer, episode = made(RelationNetwork, task, hidden=[5]), drawn(task)
    found = predicted(meta_layer, episode)
    for number, (support, labels, queries) in enumerate(each_task(meta_layer, episode)):
        means = [support[rows_of(labels, k)].mean(0) for k in range(WAYS)]
        for i, query in enumerate(queries):
            wanted = [meta_layer.comparator(torch.cat([query, mean])) for mean in means]
            torch.testing.assert_close(found[number, i], torch.cat(wanted))


# Matching networks.


def cosine(a, b):
    return a @ b / (a @ a).sqrt() / (b @ b).sqrt()


def weights_of(scores):
    """A softmax, written out."""
    exponentials = [score.exp() for score in scores]
    return [e / sum(exponentials) for e in exponentials]


@pytest.mark.parametrize("task", [classes(), waves()], ids=["classes", "values"])
def test_matching_is_the_mean_of_labels_weighted_by_a_softmax_of_cosines(task):
    meta_layer, episode = made(Matching, task, scale=2), drawn(task)
    found = predicted(meta_layer, episode)
    for number, (support, y, queries) in enumerate(each_task(meta_layer, episode)):
        for i, query in enumerate(queries):
            weights = weights_of([meta_layer.scale * cosine(query, f) for f in support])
            if task.spec.kind == "regression":
                wanted = sum(w * value for w, value in zip(weights, y, strict=True))
                torch.testing.assert_close(found[number, i], wanted)
            else:
                wanted = torch.stack([sum(weights[row] for row in rows_of(y, k)) for k in range(WAYS)])
                # Up to the floor under every probability.
                torch.testing.assert_close(found[number, i].softmax(-1), wanted, rtol=0, atol=1e-5)


def bidirectional(context, d):
    """torch's own LSTM in both directions, with the weights of the two cells."""
    lstm = nn.LSTM(d, d, bidirectional=True)
    for cell, suffix in ((context.forwards, ""), (context.backwards, "_reverse")):
        for name, value in cell.named_parameters():
            getattr(lstm, f"{name}_l0{suffix}").data = value.data
    return lstm


def moved_by(cell, inputs, hidden, state):
    """One step of an LSTM for one example, by its formulas."""
    gates = cell.weight_ih @ inputs + cell.bias_ih + cell.weight_hh @ hidden + cell.bias_hh
    i, f, g, o = gates.chunk(4)
    state = f.sigmoid() * state + i.sigmoid() * g.tanh()
    return o.sigmoid() * state.tanh(), state


def with_holes(support):
    """The same examples with nonsense before, between and after them, which does not count."""

    def spread(leaf, filling):
        rows = [
            torch.full_like(leaf[:, :1], filling),
            *(part for row in leaf.split(1, 1) for part in (row, filling + 0 * row)),
        ]
        return torch.cat(rows, dim=1)

    return Examples(spread(support.x, 9), spread(support.y, 1), spread(support.mask, 0))


def test_full_context_embeddings_of_the_support_are_those_of_torchs_bidirectional_lstm():
    task = classes()
    meta_layer = made(Matching, task, full_context=True, reads=3)
    support = with_holes(drawn(task).support)
    keys, lstm = meta_layer.adapt(support).keys, bidirectional(meta_layer.context, 7)
    for number in range(TASKS):
        counts = support.mask[number].bool()
        features = meta_layer.base_layer.features(support.x[number][counts])
        onwards, back = lstm(features)[0].chunk(2, dim=-1)
        torch.testing.assert_close(keys[number][counts], features + onwards + back)


def test_full_context_embeddings_of_a_query_read_the_support_by_content():
    task = classes()
    meta_layer, episode = made(Matching, task, full_context=True, reads=3), drawn(task)
    memory = meta_layer.adapt(episode.support)
    found = meta_layer.context.embed_queries(meta_layer.features_of(episode.query.x), memory)
    for number, (_, _, queries) in enumerate(each_task(meta_layer, episode)):
        keys = memory.keys[number][episode.support.mask[number].bool()]
        for i, query in enumerate(queries):
            hidden = state = torch.zeros_like(query)
            for _ in range(3):
                weights = weights_of([hidden @ key for key in keys])
                read = sum(w * key for w, key in zip(weights, keys, strict=True))
                output, state = moved_by(meta_layer.context.reader, torch.cat([query, read]), hidden, state)
                hidden = output + query
            torch.testing.assert_close(found[number, i], hidden)


def test_only_full_context_embeddings_depend_on_the_order_of_the_support():
    task = classes(k_shot=2)
    episode = drawn(task)
    turned = episode._replace(support=Examples(*(leaf.flip(1) for leaf in episode.support)))
    for full_context in (False, True):
        meta_layer = made(Matching, task, full_context=full_context)
        same = torch.allclose(predicted(meta_layer, turned), predicted(meta_layer, episode), rtol=1e-10)
        assert same is not full_context
        assert meta_layer.support_order_matters is full_context


# Meta Networks.


def fast_weight(meta_learner, gradient):
    """A meta learner on one weight matrix, number by number."""
    scale = math.exp(7)
    fast = torch.zeros_like(gradient)
    for place in torch.cartesian_prod(*(torch.arange(size) for size in gradient.shape)):
        g = gradient[tuple(place)]
        seen = torch.stack([(g * scale + ((g * scale) ** 2 + 1).sqrt()).log() / 7, (g * scale).tanh()])
        fast = fast.index_put(tuple(place), meta_learner.correction(seen)[0] - meta_learner.rate * g)
    return fast


def meta_networks_of_one_task(meta_layer, support, y, queries):
    """Predictions `[queries, out]`: the paper's algorithm, with a Python loop over everything."""
    loss = lambda prediction, target: meta_layer.task.loss(prediction[None], target[None])[0]  # noqa: E731
    grad = lambda value, weight: torch.autograd.grad(value, weight, create_graph=True)[0]  # noqa: E731
    with_one = lambda f: torch.cat([f, torch.ones(1)])  # noqa: E731
    slow, base = meta_layer.representation.weight, meta_layer.learner.weight
    found = []
    for f, target in zip(support, y, strict=True):
        represented = meta_layer.representation_head(F.silu(slow @ with_one(f)))
        found.append(fast_weight(meta_layer.to_representation, grad(loss(represented, target), slow)))
    fast = sum(found) / len(found)

    def represent(f):
        return F.silu(slow @ with_one(f)) + F.silu(fast @ with_one(f))

    memory, keys = [], []
    for f, target in zip(support, y, strict=True):
        memory.append(fast_weight(meta_layer.to_learner, grad(loss(base @ with_one(f), target), base)))
        keys.append(represent(f))
    predictions = []
    for f in queries:
        weights = weights_of([cosine(represent(f), key) for key in keys])
        read = sum(w * stored for w, stored in zip(weights, memory, strict=True))
        predictions.append(base @ with_one(f) + read @ with_one(f))
    return torch.stack(predictions)


@pytest.mark.parametrize("task", [classes(), waves()], ids=["classes", "values"])
def test_meta_networks_and_their_meta_gradient_are_those_of_the_algorithm_task_by_task(task):
    meta_layer, episode = made(MetaNetworks, task, size=4, hidden=[5], rate=0.3), drawn(task)
    found = predicted(meta_layer, episode)
    wanted = torch.stack([meta_networks_of_one_task(meta_layer, *parts) for parts in each_task(meta_layer, episode)])
    torch.testing.assert_close(found, wanted)
    learned = list(meta_layer.parameters())
    gradients = [torch.autograd.grad(value.sin().sum(), learned) for value in (found, wanted)]
    torch.testing.assert_close(*gradients)


def test_meta_networks_predict_alike_with_and_without_a_meta_gradient_to_take():
    task = classes()
    meta_layer, episode = made(MetaNetworks, task, size=4), drawn(task)
    with torch.no_grad():
        without = predicted(meta_layer, episode)
    assert not without.requires_grad
    torch.testing.assert_close(without, predicted(meta_layer, episode))


# All of them.

SYMMETRIC = [
    (Prototypes, {}),
    (Prototypes, {"distance": "cosine"}),
    (Hypernetwork, {"hidden": [5]}),
    (ConditionalNeuralProcess, {"hidden": [5]}),
    (Matching, {}),
    (RelationNetwork, {"hidden": [5]}),
]
NAMES = ["prototypes", "prototypes_cosine", "hypernetwork", "conditional_neural_process", "matching", "relation"]


@pytest.mark.parametrize(("kind", "settings"), SYMMETRIC, ids=NAMES)
def test_permuted_labels_permute_the_predictions(kind, settings):
    task = classes()
    meta_layer, episode = made(kind, task, **settings), drawn(task)
    order = torch.tensor([2, 0, 1])
    renamed = episode._replace(support=episode.support._replace(y=order[episode.support.y]))
    torch.testing.assert_close(predicted(meta_layer, renamed)[..., order], predicted(meta_layer, episode))


@pytest.mark.parametrize("task", [classes(), waves()], ids=["classes", "values"])
@pytest.mark.parametrize(
    ("kind", "settings"), [(Hypernetwork, {"hidden": [5]}), (MetaNetworks, {"size": 4, "hidden": [5]})]
)
def test_networks_that_start_as_zero_keep_the_contract_elsewhere_too(kind, settings, task):
    check_meta_layer(lambda made_for: made(kind, made_for, **settings), task, num_tasks=2)


@pytest.mark.parametrize("kind", [Prototypes, RelationNetwork])
def test_a_class_per_mean_takes_no_regression(kind):
    with pytest.raises(IncompatibleKind):
        kind(MLP(waves().spec), waves())


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (Prototypes, {"distance": "manhattan"}),
        (Prototypes, {"scale": 0}),
        (Matching, {"scale": -1}),
        (Matching, {"reads": 0}),
        (Hypernetwork, {"hidden": []}),
        (ConditionalNeuralProcess, {"hidden": [0]}),
        (RelationNetwork, {"hidden": []}),
        (MetaNetworks, {"hidden": []}),
        (MetaNetworks, {"size": 0}),
    ],
)
def test_a_setting_that_makes_no_network_is_named(kind, settings):
    (field,) = settings
    with pytest.raises(InvalidValue) as raised:
        kind(MLP(classes().spec), classes(), **settings)
    assert raised.value.field == field


@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize("kind", [Prototypes, Matching, ConditionalNeuralProcess])
def test_features_in_one_pass_give_the_meta_loss_of_adapting_and_judging(kind, norm):
    task = classes()
    layer, episode = kind(MLP(task.spec, hidden=[8], norm=norm), task, batch_norm="support"), drawn(task)
    losses, metrics = layer.meta_loss(episode)
    expected = layer.query_metrics(layer.adapt(episode.support), episode)
    torch.testing.assert_close(losses, expected["query_loss"])
    torch.testing.assert_close(metrics, expected)
