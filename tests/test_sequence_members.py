"""The three families on sequences: each member is what a slow version of its formulas gives, position by position."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge as SklearnRidge
from torch import nn

from mlframework.base_layers import GRU, BaseLayer, Stack, TakesMask, Transformer
from mlframework.episode import Episode, Examples, TaskSpec
from mlframework.inner_loop import SGD
from mlframework.meta_layers import (
    MAML,
    ConditionalNeuralProcess,
    Exact,
    Hypernetwork,
    InContext,
    Joint,
    Matching,
    Prototypes,
    Ridge,
)
from mlframework.meta_layers.gradient_descent.lora import LoRA, LowRank
from mlframework.meta_layers.svm.kernels import LinearKernel
from mlframework.tasks import Sinusoid, TaskDistribution

VOCABULARY, LENGTH, TASKS, WIDTH = 6, 4, 2, 5

pytestmark = pytest.mark.usefixtures("float64")


class Walks(TaskDistribution):
    """Random tokens in rows of unequal length; the next token is the target."""

    def __init__(self):
        self.spec = TaskSpec("sequence", (LENGTH,), VOCABULARY)

    def sample(self, num_tasks, split, generator):
        tokens = torch.randint(VOCABULARY, (num_tasks, 7, LENGTH + 1), generator=generator)
        lengths = torch.randint(1, LENGTH + 1, (num_tasks, 7, 1), generator=generator)
        examples = Examples(tokens[..., :-1], tokens[..., 1:], (torch.arange(LENGTH) < lengths).double())
        return Episode(examples.rows(slice(4)), examples.rows(slice(4, None)))


def made(kind, **settings):
    """A meta layer on a small network, with no parameter left at a value that hides it, such as zero."""
    task = Walks()
    features = nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Tanh())
    torch.manual_seed(0)
    meta_layer = kind(BaseLayer(features, nn.Linear(WIDTH, VOCABULARY)), task, **settings)
    with torch.no_grad():
        for parameter in meta_layer.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return meta_layer


def episode_of_walks():
    return Walks().sample(TASKS, "train", torch.Generator().manual_seed(0))


def each_position(meta_layer, episode):
    """Of each task: the features of the support positions that count with their tokens, and of all query positions."""
    features = meta_layer.base_layer.features
    for number in range(episode.num_tasks):
        counts = episode.support.mask[number].bool()
        support = features(episode.support.x[number])[counts]
        yield support, episode.support.y[number][counts], features(episode.query.x[number]).flatten(0, 1)


def predicted(meta_layer, episode):
    """`[tasks, positions, vocabulary]` of all query positions."""
    return meta_layer.predict(meta_layer.adapt(episode.support), episode.query.x).flatten(1, 2)


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_prototypes_of_tokens_are_shrunk_towards_shared_ones(distance):
    meta_layer, episode = made(Prototypes, distance=distance), episode_of_walks()
    tokens, found = meta_layer.tokens, predicted(meta_layer, episode)
    a, b = tokens.log_pseudo_counts.exp()
    for number, (support, labels, query) in enumerate(each_position(meta_layer, episode)):
        for i, x in enumerate(query):
            for token in range(VOCABULARY):
                rows = [row for row, label in zip(support, labels.tolist(), strict=True) if label == token]
                if distance == "cosine":
                    rows = [meta_layer.scale.sqrt() * row / row.norm() for row in rows]
                    x = meta_layer.scale.sqrt() * query[i] / query[i].norm()
                shared = tokens.shared[token]
                own = (a * shared + sum(rows)) / (a + len(rows))
                if distance == "cosine":
                    own, shared = (meta_layer.scale.sqrt() * p / p.norm() for p in (own, shared))
                closer = (x - shared).square().sum() - (x - own).square().sum()
                frequency = tokens.of_frequency * torch.log(1 + len(rows) / b)
                wanted = meta_layer.prior(query[i])[token] + tokens.log_closeness.exp() * closer + frequency
                torch.testing.assert_close(found[number, i, token], wanted)


class Averages(TakesMask):
    """The mean of what counts so far: a user's layer that remembers nothing."""

    def forward(self, x, mask=None):
        weight = torch.ones_like(x[..., :1]) if mask is None else mask.unsqueeze(-1)
        return (x * weight).cumsum(1) / weight.cumsum(1).clamp(min=1)


def averages(spec):
    return BaseLayer(Stack(nn.Embedding(VOCABULARY, WIDTH), Averages(), nn.Tanh()), nn.Linear(WIDTH, VOCABULARY))


@pytest.mark.parametrize(
    "network", [partial(Transformer, width=8, depth=2, heads=2), partial(GRU, width=6, layers=2), averages]
)
@pytest.mark.parametrize("engine", ["vectorised", "loop"])
def test_in_context_reads_the_support_set_before_each_query(network, engine):
    task, episode = Walks(), episode_of_walks()
    meta_layer = InContext(network(task.spec), task)
    meta_layer.engine = engine
    found = meta_layer.predict(meta_layer.adapt(episode.support), episode.query.x, episode.query.mask)
    for number in range(TASKS):
        prompt = episode.support.x[number][episode.support.mask[number].bool()]
        for row, (x, mask) in enumerate(zip(episode.query.x[number], episode.query.mask[number], strict=True)):
            read = torch.cat([prompt, x[mask.bool()]]).unsqueeze(0)
            wanted = meta_layer.base_layer(read)[0, len(prompt) :]
            torch.testing.assert_close(found[number, row, mask.bool()], wanted)


def test_matching_mixes_the_prior_with_what_attention_reads_from_the_support_set():
    meta_layer, episode = made(Matching), episode_of_walks()
    found = predicted(meta_layer, episode).exp()
    for number, (support, labels, query) in enumerate(each_position(meta_layer, episode)):
        for i, x in enumerate(query):
            scores = torch.stack([meta_layer.scale * x @ row / x.norm() / row.norm() for row in support])
            share = meta_layer.gate(x).sigmoid()
            cache = torch.zeros(VOCABULARY)
            for weight, label in zip(scores.softmax(0), labels.tolist(), strict=True):
                cache[label] += weight.detach()
            wanted = (1 - share) * meta_layer.prior(x).softmax(-1) + share * cache
            torch.testing.assert_close(found[number, i], wanted, atol=1e-5, rtol=0)  # the floor of the cache is 1e-6
        torch.testing.assert_close(found[number].sum(-1), torch.ones(len(query)), atol=1e-5, rtol=0)


def test_a_neural_process_changes_the_feature_that_the_prior_reads():
    meta_layer, episode = made(ConditionalNeuralProcess, hidden=[7]), episode_of_walks()
    found = predicted(meta_layer, episode)
    for number, (support, labels, query) in enumerate(each_position(meta_layer, episode)):
        pairs = zip(support, labels.tolist(), strict=True)
        codes = [meta_layer.encoder(torch.cat([f, torch.eye(VOCABULARY)[label]])) for f, label in pairs]
        code = sum(codes) / len(codes)
        for i, x in enumerate(query):
            q = meta_layer.query(x)
            change = meta_layer.decoder(torch.cat([q, code, code, q * code]))
            torch.testing.assert_close(found[number, i], meta_layer.prior(x + change))


def test_a_hypernetwork_adds_a_row_per_token_to_the_prior():
    meta_layer, episode = made(Hypernetwork, hidden=[7]), episode_of_walks()
    emitter, found = meta_layer.emitter, predicted(meta_layer, episode)
    for number, (support, labels, query) in enumerate(each_position(meta_layer, episode)):
        encoded = emitter.encoder(support)
        for token in range(VOCABULARY):
            rows = [row for row, label in zip(encoded, labels.tolist(), strict=True) if label == token]
            mean = sum(rows) / len(rows) if rows else torch.zeros_like(encoded[0])
            count = torch.log(torch.tensor([1.0 + len(rows)]))
            *weight, bias = emitter.emitter(torch.cat([mean, encoded.mean(0), count, emitter.tokens[token]]))
            for i, x in enumerate(query):
                wanted = meta_layer.prior(x)[token] + x @ torch.stack(weight) + bias
                torch.testing.assert_close(found[number, i, token], wanted)


def test_ridge_fits_what_the_prior_leaves_like_scikit_learn():
    meta_layer, episode = made(Ridge, kernel=LinearKernel(), reg=0.7, scale=3.0), episode_of_walks()
    reg, scale = (meta_layer.positive[name].item() for name in ("reg", "scale"))
    found = predicted(meta_layer, episode).detach().numpy()
    for number, (support, labels, query) in enumerate(each_position(meta_layer, episode)):
        left = torch.eye(VOCABULARY)[labels] - meta_layer.prior(support).softmax(-1)
        ridge = SklearnRidge(alpha=reg, fit_intercept=False).fit(support.detach().numpy(), left.detach().numpy())
        wanted = meta_layer.prior(query).detach().numpy() + scale * ridge.predict(query.detach().numpy())
        np.testing.assert_allclose(found[number], wanted, atol=1e-8)


# LoRA.


def test_lora_adapts_low_rank_changes_and_nothing_else():
    meta_layer = made(LoRA, layers=".", rank=2, update=partial(SGD, lr=0.5), meta_gradient=Exact(), inner_steps=2)
    assert meta_layer.adapted_names == [
        f"{layer}.{part}" for layer in ("features.1", "head") for part in ("down", "up")
    ]
    adapted = meta_layer.adapt(episode_of_walks().support)
    linear, down, up = meta_layer.base_layer.head.linear, adapted["head.down"][0], adapted["head.up"][0]
    x = torch.randn(3, WIDTH)
    changed = torch.func.functional_call(meta_layer.base_layer.head, {"down": down, "up": up}, (x,))
    torch.testing.assert_close(changed, x @ (linear.weight + up @ down).mT + linear.bias)
    assert torch.linalg.matrix_rank(up @ down) == 2


def test_lora_starts_as_the_network_that_it_changes():
    linear = nn.Linear(4, 3)
    x = torch.randn(5, 4)
    torch.testing.assert_close(LowRank(linear, 2)(x), linear(x), rtol=0, atol=0)


# Joint training.


def test_joint_training_is_training_on_all_examples_without_adapting():
    task = Sinusoid(k_shot=4, k_query=3)
    torch.manual_seed(0)
    network = BaseLayer(nn.Sequential(nn.Linear(1, 7), nn.Tanh()), nn.Linear(7, 1))
    meta_layer = MAML(network, task, update=partial(SGD, lr=0.1), meta_gradient=Joint(), inner_steps=5)
    episode = task.sample(3, "train", torch.Generator().manual_seed(0))
    episode = Episode(*(Examples(*(leaf.double() for leaf in part)) for part in episode))
    losses, _ = meta_layer.meta_loss(episode)
    found = torch.autograd.grad(losses.mean(), list(network.parameters()))
    x, y = (torch.cat([s, q], dim=1).flatten(0, 1) for s, q in zip(episode.support[:2], episode.query[:2], strict=True))
    wanted = torch.autograd.grad((network(x) - y).square().mean(), list(network.parameters()))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not meta_layer.exact
