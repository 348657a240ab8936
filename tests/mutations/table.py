"""The faults: each is one line of the code, changed, with the test that must notice it."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["MUTATIONS", "Mutation"]


class Mutation(NamedTuple):
    """One fault.

    Attributes:
        name: in words.
        file: of the code, from the top of the repository.
        old: text that stands in the file once; lines around the one that changes tell it from others.
        new: what stands in its place, of as many lines, all but one of them the same.
        test: `file::test` that fails with the fault.
    """

    name: str
    file: str
    old: str
    new: str
    test: str


class File:
    """The mutations of one file, with the file of tests that most of them are noticed by."""

    def __init__(self, file: str, tests: str) -> None:
        self.file, self.tests = file, tests

    def __call__(self, name: str, old: str, new: str, test: str) -> Mutation:
        path = test if "::" in test else f"{self.tests}::{test}"
        return Mutation(name, f"mlframework/{self.file}", old, new, f"tests/{path}")


inner_loop = File("inner_loop/inner_loop.py", "test_inner_updates.py")
rates = File("inner_loop/learned_rates.py", "test_maml_plus_plus.py")
maml = File("meta_layers/gradient_descent/maml.py", "test_meta_gradients.py")
inner_losses = File("meta_layers/gradient_descent/inner_losses.py", "test_meta_gradients.py")
meta_gradients = File("meta_layers/gradient_descent/meta_gradients.py", "test_meta_gradients.py")
proximal = File("inner_loop/proximal.py", "test_imaml.py")
information = File("regularisers/information_penalty.py", "test_regularisers.py")
fixed_tasks = File("tasks/fixed_train_tasks.py", "test_tasks_fixed.py")
imaml = File("meta_layers/gradient_descent/imaml.py", "test_imaml.py")
conjugate = File("solvers/conjugate_gradient.py", "test_imaml.py")
cavia = File("meta_layers/gradient_descent/cavia.py", "test_cavia.py")
tables = File("tasks/tables/table.py", "test_tasks_table.py")
table_tasks = File("tasks/tables/table_tasks.py", "test_tasks_table.py")
columns = File("tasks/tables/columns.py", "test_tasks_table.py")
sklearn_tables = File("tasks/tables/sklearn_tables.py", "test_tasks_sklearn_tables.py")
pooled = File("evaluation/baselines/pooled.py", "test_table_baselines.py")
lora = File("meta_layers/gradient_descent/lora.py", "test_sequence_members.py")
proto_maml = File("meta_layers/gradient_descent/proto_maml.py", "test_proto_maml.py")
step_weights = File("meta_layers/gradient_descent/per_step.py", "test_maml_plus_plus.py")
norm_weights = File("meta_layers/gradient_descent/per_step.py", "test_maml_plus_plus.py")
prototypes = File("meta_layers/neural_network/prototypes.py", "test_meta_neural_network.py")
matching = File("meta_layers/neural_network/matching.py", "test_meta_neural_network.py")
process = File("meta_layers/neural_network/conditional_neural_process.py", "test_meta_neural_network.py")
hypernetwork = File("meta_layers/neural_network/hypernetwork.py", "test_meta_neural_network.py")
meta_networks = File("meta_layers/neural_network/meta_networks.py", "test_meta_neural_network.py")
networks = File("meta_layers/neural_network/networks.py", "test_meta_neural_network.py")
in_context = File("meta_layers/neural_network/in_context.py", "test_sequence_members.py")
on_features = File("meta_layers/feature_meta_layer.py", "test_meta_neural_network.py")
meta_layer = File("meta_layers/meta_layer.py", "test_evaluation.py")
kernel_machine = File("meta_layers/svm/kernel_machine.py", "test_sequence_members.py")
support_vectors = File("solvers/support_vectors.py", "test_solvers.py")
ridge = File("solvers/ridge.py", "test_solvers.py")
logistic = File("solvers/logistic.py", "test_solvers.py")
convolutions = File("backend/convolve.py", "test_precision.py")
outer_loop = File("training/outer_loop.py", "test_outer_loop.py")
meta_gradient = File("training/meta_gradient.py", "test_outer_loop.py")
episode = File("episode.py", "test_tasks_text.py")

evaluation = File("evaluation/evaluation.py", "test_evaluation.py")
choices = File("evaluation/choices.py", "test_choices.py")
trial = File("evaluation/choices.py", "test_evaluation.py")
report = File("evaluation/report.py", "test_evaluation.py")
from_scratch = File("evaluation/baselines/from_scratch.py", "test_evaluation.py")
fitted = File("evaluation/baselines/scikit_learn.py", "test_evaluation.py")
ngram_baseline = File("evaluation/baselines/ngram.py", "test_text_quality.py")
judging = File("evaluation/task_set.py", "test_evaluation.py")
interval = File("evaluation/interval.py", "test_sources.py")
trainer = File("training/trainer.py", "test_trainer.py")
run = File("runs/run.py", "test_trainer.py")
trained = File("runs/trained.py", "test_trained.py")
estimators = File("runs/estimators.py", "test_estimators.py")
own_images = File("tasks/images/own_images.py", "test_own_data.py")
checkpoint = File("training/checkpoint.py", "test_resume.py")

few_shot = File("tasks/few_shot.py", "test_tasks_few_shot.py")
sinusoid = File("tasks/regression/sinusoid.py", "test_tasks_sinusoid.py")
text_tasks = File("tasks/text/text_tasks.py", "test_tasks_text.py")
measures = File("text/measures.py", "test_text_measures.py")
quality = File("evaluation/displays/text_quality.py", "test_text_quality.py")
ngram = File("text/ngram.py", "test_ngram.py")
generation = File("text/generation.py", "test_generation.py")

checksums = File("base_layers/checksums.py", "test_faults.py")
last_checkpoints = File("training/last_checkpoints.py", "test_faults.py")
interrupt = File("training/interrupt.py", "test_faults.py")
event_file = File("training/event_file.py", "test_event_file.py")
files = File("files.py", "test_run_folder.py")
run_folder = File("runs/run_folder.py", "test_run_folder.py")
sweep = File("runs/sweep.py", "test_sweep.py")
sweep_table = File("runs/sweep_table.py", "test_sweep.py")
overrides = File("runs/overrides.py", "test_overrides.py")
search = File("runs/search.py", "test_search.py")

ALGORITHMS = (
    File("inner_loop/sgd.py", "test_inner_updates.py")(
        "the inner loop climbs",
        "torch.add(p, grads[name], alpha=-self.lr)",
        "torch.add(p, grads[name], alpha=self.lr)",
        "test_every_step_is_that_of_torchs_optimizer",
    ),
    File("inner_loop/adam.py", "test_inner_updates.py")(
        "inner Adam corrects its bias by another step",
        "mean[name] / (1 - self.beta1 ** (step + 1))",
        "mean[name] / (1 - self.beta1 ** (step + 2))",
        "test_every_step_is_that_of_torchs_optimizer",
    ),
    File("inner_loop/meta_curvature.py", "test_inner_updates.py")(
        "meta-curvature by transposed matrices",
        "@ matrix.mT).movedim",
        "@ matrix).movedim",
        "test_meta_curvature_multiplies_each_gradient_by_the_kronecker_product_of_its_matrices",
    ),
    rates(
        "Meta-SGD's rates are not learned",
        "dict(zip(self.names, self.rates, strict=True))",
        "dict(zip(self.names, [rate.detach() for rate in self.rates], strict=True))",
        "test_meta_gradients.py::test_the_meta_gradient_equals_finite_differences[mlp-meta_sgd-1]",
    ),
    rates(
        "MAML++ has one rate for all steps",
        "self.rates[:, min(step, self.steps - 1)]",
        "self.rates[:, 0]",
        "test_every_step_has_its_own_rate_and_later_steps_the_last_one",
    ),
    inner_loop(
        "MAML takes its inner gradients for constants",
        "exact = torch.is_grad_enabled() and not constant",
        "exact = False",
        "test_meta_gradients.py::test_the_first_order_gradient_is_another_than_the_exact_one",
    ),
    inner_loop(
        "FOMAML differentiates its inner gradients",
        "exact = torch.is_grad_enabled() and not constant",
        "exact = torch.is_grad_enabled()",
        "test_meta_gradients.py::test_the_first_order_gradient_is_another_than_the_exact_one",
    ),
    inner_loop(
        "one inner gradient too many is a constant",
        "index < detached_steps",
        "index <= detached_steps",
        "test_the_inner_loop_differentiates_through_all_steps_but_the_constant_ones",
    ),
    inner_loop(
        "inner weight decay lets weights grow",
        "grad + self.weight_decay * held[name]",
        "grad - self.weight_decay * held[name]",
        "test_decay_and_clipping_are_those_of_torch_for_each_task_alone",
    ),
    inner_loop(
        "inner clipping by the largest tensor's norm",
        "for grad in grads.values()]).sum(0)",
        "for grad in grads.values()]).amax(0)",
        "test_decay_and_clipping_are_those_of_torch_for_each_task_alone",
    ),
    inner_losses(
        "inner steps count the padding of the support set",
        "support.mask if self.task.spec.ragged else None",
        "None",
        "test_base_layers_text.py::test_a_meta_layer_through_it_keeps_the_contract_padding_included[gru]",
    ),
    maml(
        "queries meet the norms of the next step",
        "self.norm(max(step - 1, 0), len",
        "self.norm(step, len",
        "test_maml_plus_plus.py::test_each_step_uses_its_own_batch_norm_weights_and_later_steps_the_last",
    ),
    File("episode.py", "test_meta_gradients.py")(
        "Reptile trains on the first minibatch only",
        "torch.arange(step * size, (step + 1) * size,",
        "torch.arange(0, size,",
        "test_reptile_moves_by_initial_minus_trained_parameters[sinusoid-sgd-5]",
    ),
    meta_gradients(
        "a truncated gradient is one step shorter",
        "max(inner_steps - self.steps, 0)",
        "max(inner_steps - self.steps + 1, 0)",
        "test_a_truncated_gradient_is_exact_by_where_the_last_steps_start",
    ),
    meta_gradients(
        "MAML++ turns exact an outer step late",
        "outer_step < self.first_order_steps",
        "outer_step <= self.first_order_steps",
        "test_maml_plus_plus.py::test_the_gradient_is_first_order_before_the_given_outer_step_and_exact_from_it_on",
    ),
    meta_gradients(
        "Reptile moves away from what it trained",
        "(p - trained[name]).detach()",
        "(trained[name] - p).detach()",
        "test_reptile_moves_by_initial_minus_trained_parameters[sinusoid-sgd-None]",
    ),
    meta_gradients(
        "Reptile trains on the support set alone",
        "examples = episode.joined()\n        initial =",
        "examples = episode.support\n        initial =",
        "test_reptile_moves_by_initial_minus_trained_parameters[sinusoid-sgd-None]",
    ),
    meta_gradients(
        "joint training leaves the support set out",
        "Episode(examples, examples))",
        "Episode(examples, episode.query))",
        "test_sequence_members.py::test_joint_training_is_training_on_all_examples_without_adapting",
    ),
    meta_gradients(
        "joint training is selected after inner steps",
        "return 0  # the network that is trained has not adapted",
        "return inner_steps",
        "test_trainer.py::test_weights_are_selected_after_the_inner_steps_that_were_trained_or_asked_for[overrides3-0]",
    ),
    step_weights(
        "MAML++ does not anneal its step weights",
        "max(1 - outer_step / self.steps, self.floor) / inner_steps",
        "1 / inner_steps",
        "test_multi_step_weights_go_from_equal_to_the_last_step",
    ),
    norm_weights(
        "MAML++ has the first step's norms at every step",
        "weight[min(step, self.steps - 1)]",
        "weight[0]",
        "test_each_step_uses_its_own_batch_norm_weights_and_later_steps_the_last",
    ),
    inner_losses(
        "iMAML's support loss counts the padding",
        "support.mask if self.task.spec.ragged else None",
        "None",
        "test_imaml.py::test_padding_of_the_support_set_is_no_part_of_the_implicit_meta_gradient",
    ),
    imaml(
        "iMAML's linear system forgets lambda",
        "value + products[name] / strength",
        "value + products[name]",
        "test_it_is_the_dense_solve_wherever_the_inner_loop_ends",
    ),
    imaml(
        "iMAML's gradient of what does not adapt is turned round",
        "start[name] - gradient[name] / strength",
        "start[name] + gradient[name] / strength",
        "test_the_meta_gradient_equals_finite_differences_of_the_solved_problem[mlp-^head]",
    ),
    proximal(
        "the proximal term pushes away",
        "grads[name] + self.strength * (p - start[name])",
        "grads[name] - self.strength * (p - start[name])",
        "test_every_rule_solves_the_proximal_problem",
    ),
    conjugate(
        "conjugate gradients go on after convergence",
        "(curvature > 0) & (square > solved)",
        "(curvature > 0)",
        "test_steps_beyond_the_solution_change_nothing",
    ),
    conjugate(
        "conjugate gradients by inverted coefficients",
        "torch.where(going, square / last, 0.0)",
        "torch.where(going, last / square, 0.0)",
        "test_conjugate_gradients_equal_a_dense_solve",
    ),
    cavia(
        "CAVIA learns where the context starts",
        "modulated.context.requires_grad_(False)",
        "modulated.context.requires_grad_(True)",
        "test_an_outer_step_moves_the_network_and_the_map_and_leaves_the_context_at_zero",
    ),
    cavia(
        "CAVIA adapts the map of the context",
        r'adapts=r"\.context$"',
        r'adapts=r"\.(context|map\.weight)$"',
        "test_the_context_alone_adapts_from_zero_where_the_network_is_as_it_was",
    ),
    lora(
        "LoRA adapts one of its two factors",
        r'adapts=r"\.(down|up)$"',
        r'adapts=r"\.up$"',
        "test_lora_adapts_low_rank_changes_and_nothing_else",
    ),
    lora(
        "LoRA starts as another network",
        "torch.zeros(linear.out_features, rank)",
        "torch.ones(linear.out_features, rank)",
        "test_lora_starts_as_the_network_that_it_changes",
    ),
    proto_maml(
        "ProtoMAML's meta-gradient ends at the prototypes",
        "class_means(features, self.targets(support))",
        "class_means(features, self.targets(support)).detach()",
        "test_the_meta_gradient_equals_finite_differences[mlp-sgd-.]",
    ),
    prototypes(
        "ProtoMAML's head is half of the prototypes'",
        "return Head(2 * means,",
        "return Head(means,",
        "test_proto_maml.py::test_before_any_step_it_is_the_prototypical_network",
    ),
    prototypes(
        "a prototype is the sum of its class",
        "(targets.mT @ features) / targets.sum(1).clamp(min=1).unsqueeze(-1)",
        "(targets.mT @ features)",
        "test_prototypes_classify_like_scikit_learns_nearest_centroid",
    ),
    prototypes(
        "prototypes by mean squared differences",
        "(features.unsqueeze(2) - adapted.unsqueeze(1)).square().sum(-1)",
        "(features.unsqueeze(2) - adapted.unsqueeze(1)).square().mean(-1)",
        "test_logits_of_prototypes_are_the_formulas",
    ),
    matching(
        "matching without its scale",
        "attention(self.scale * cosines(queries",
        "attention(cosines(queries",
        "test_matching_is_the_mean_of_labels_weighted_by_a_softmax_of_cosines",
    ),
    convolutions(
        "a kernel that covers the image keeps its stride",
        "            stride = 1\n",
        "            stride = 2\n",
        "test_what_a_kernel_sees_of_the_padding_alone_has_no_gradient",
    ),
    matching(
        "the keys are multiplied by the weights of the query",
        "of_keys = F.linear(memory.keys, to_keys)",
        "of_keys = F.linear(memory.keys, to_features)",
        "test_full_context_embeddings_of_a_query_read_the_support_by_content",
    ),
    matching(
        "a row that does not count moves the state",
        "torch.where(counts, moved[0], hidden)",
        "torch.where(counts, moved[0], moved[0])",
        "test_full_context_embeddings_of_the_support_are_those_of_torchs_bidirectional_lstm",
    ),
    matching(
        "full context read backwards stays backwards",
        "features.flip(1), mask.flip(1)).flip(1)",
        "features.flip(1), mask.flip(1))",
        "test_full_context_embeddings_of_the_support_are_those_of_torchs_bidirectional_lstm",
    ),
    networks(
        "attention reads padding",
        "scores.masked_fill(mask.unsqueeze(1) == 0, -torch.inf).softmax(-1)",
        "scores.softmax(-1)",
        "test_full_context_embeddings_of_a_query_read_the_support_by_content",
    ),
    networks(
        "a mean over a set counts its padding",
        "/ weights.sum(-1).clamp(min=1)",
        "/ values.shape[1]",
        "test_meta_networks_and_their_meta_gradient_are_those_of_the_algorithm_task_by_task",
    ),
    process(
        "the neural process sums what it should average",
        "adapted.mean(1, keepdim=True)",
        "adapted.sum(1, keepdim=True)",
        "test_a_conditional_neural_process_scores_every_class_by_its_own_mean_code",
    ),
    hypernetwork(
        "the hypernetwork emits no bias",
        "Head(weight + correction[..., :-1], bias + correction[..., -1])",
        "Head(weight + correction[..., :-1], bias)",
        "test_every_class_has_its_row_from_its_examples_and_the_sight_of_all_classes",
    ),
    meta_networks(
        "fast weights go up the gradient",
        "squeeze(-1) - self.rate * gradient",
        "squeeze(-1) + self.rate * gradient",
        "test_meta_networks_and_their_meta_gradient_are_those_of_the_algorithm_task_by_task",
    ),
    in_context(
        "in context, the padding of the support set is read",
        "self.mask_or_none(adapted.mask))",
        "None)",
        "test_in_context_reads_the_support_set_before_each_query",
    ),
    in_context(
        "in context, the support set's predictions are the queries'",
        "[..., prompt.shape[-1] :, :]",
        "[..., : x.shape[-1], :]",
        "test_in_context_reads_the_support_set_before_each_query",
    ),
    on_features(
        "queries normalise each other while training",
        "torch.zeros_like(query.mask)], dim=1) if mixes",
        "torch.ones_like(query.mask)], dim=1) if mixes",
        "test_features_in_one_pass_give_the_meta_loss_of_adapting_and_judging",
    ),
    meta_layer(
        "padding has targets",
        "return torch.where(examples.mask.unsqueeze(-1) > 0, y, torch.zeros_like(y))",
        "return y",
        "test_meta_neural_network.py::test_prototypes_classify_like_scikit_learns_nearest_centroid",
    ),
    kernel_machine(
        "a kernel machine fits logits, not probabilities",
        "self.prior(features).softmax(-1)",
        "self.prior(features)",
        "test_ridge_fits_what_the_prior_leaves_like_scikit_learn",
    ),
    support_vectors(
        "a support vector may push without a bound",
        "upper = per_task(c, y) * classes",
        "upper = torch.full_like(classes, torch.inf)",
        "test_weights_are_those_of_scikit_learns_crammer_singer",
    ),
    support_vectors(
        "one against the rest has no rest",
        "signs = 2 * y.double().mT - 1",
        "signs = y.double().mT",
        "test_one_vs_rest_is_scikit_learns_linear_svc",
    ),
    ridge(
        "ridge by the inverse regulariser",
        "regularised(kernel, reg, mask)",
        "regularised(kernel, 1 / reg, mask)",
        "test_ridge_is_scikit_learns",
    ),
    ridge(
        "ridge by features forgets its regulariser",
        "regularised(known.mT @ known, reg, None)",
        "regularised(known.mT @ known, 1.0, None)",
        "test_ridge_by_features_is_ridge_by_their_kernel_with_its_derivatives",
    ),
    File("meta_layers/svm/kernels.py", "test_meta_svm.py")(
        "the features of a kernel have no offset",
        "return with_constant(a, self.constant)",
        "return with_constant(a, 0.0)",
        "test_predictions_are_those_of_scikit_learn_on_support_sets_of_any_size",
    ),
    logistic(
        "the softmax's derivative without its second term",
        "torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)",
        "torch.diag_embed(p)",
        "test_gradients_are_those_of_finite_differences_to_second_order_and_in_forward_mode",
    ),
    logistic(
        "logistic regression counts padding",
        "reg * dual + weight * (kernel @ dual).softmax(-1) - y",
        "reg * dual + (kernel @ dual).softmax(-1) - y",
        "test_what_the_mask_leaves_out_changes_nothing_and_gets_nothing",
    ),
    meta_gradient(
        "each chunk's mean counts alike",
        "1 / tasks))",
        "1 / part.num_tasks))",
        "test_chunks_change_neither_losses_metrics_nor_gradient",
    ),
    meta_gradient(
        "meta-gradients pile up",
        "p.grad = None",
        "pass",
        "test_gradients_do_not_pile_up",
    ),
    outer_loop(
        "algorithms are not told the outer step",
        "self.meta_layer.outer_step = self.scheduler.last_epoch",
        "self.meta_layer.outer_step = 0",
        "test_maml_plus_plus.py::test_the_outer_loop_says_which_step_it_is_and_goes_on_with_it_after_a_restart",
    ),
    episode(
        "means count padding",
        "kept.sum(axes) / mask.sum(axes).clamp(min=1)",
        "kept.mean(axes)",
        "test_bits_per_character_are_all_bits_by_all_characters",
    ),
)

EVALUATION = (
    evaluation(
        "validation drawn from test",
        'validation = set_of("validation",',
        "validation = set_of(self.split,",
        "test_every_row_is_judged_on_the_split_asked_for_and_chosen_on_validation",
    ),
    trial(
        "choices made on test",
        "over_ranks(candidate.judge, self.validation)",
        "over_ranks(candidate.judge, self.tasks)",
        "test_every_row_is_judged_on_the_split_asked_for_and_chosen_on_validation",
    ),
    trial(
        "scratch judged on other tasks",
        "self.tasks.first(tasks) if tasks",
        "self.validation.first(tasks) if tasks",
        "test_from_scratch_is_torchs_training_of_one_initialisation_by_every_rule_on_the_first_tasks",
    ),
    from_scratch(
        "initial networks from scratch differ between rules",
        "torch.manual_seed(tasks.seed)",
        "pass",
        "test_from_scratch_is_torchs_training_of_one_initialisation_by_every_rule_on_the_first_tasks",
    ),
    evaluation(
        "the other policy is reported after another number of steps",
        "row=other.steps.index(choice.steps)",
        "row=0",
        "test_the_costly_policy_is_judged_before_and_after_the_chosen_steps_alone",
    ),
    report(
        "a paired difference is unpaired",
        "Interval.of(ours - theirs, sources",
        "Interval.of(ours - theirs.flip(0), sources",
        "test_choices.py::test_a_difference_is_paired",
    ),
    trial(
        "intervals of methods ignore sources",
        "Interval.of(step, sources) for step in steps",
        "Interval.of(step) for step in steps",
        "test_methods_and_their_differences_have_intervals_over_sources",
    ),
    report(
        "intervals of differences ignore sources",
        "Interval.of(ours - theirs, sources and sources[: row.tasks])",
        "Interval.of(ours - theirs)",
        "test_methods_and_their_differences_have_intervals_over_sources",
    ),
    ngram_baseline(
        "the n-gram baseline of an evaluation is tuned on test tasks",
        "order=self.order, validation=trial.validation)",
        "order=self.order, validation=trial.tasks)",
        "test_an_evaluation_tunes_the_ngram_baseline_on_validation_tasks",
    ),
    choices(
        "choose() turned round",
        "value > best.value if higher_is_better else value < best.value",
        "value < best.value if higher_is_better else value > best.value",
        "test_the_best_setting_is_taken_at_its_best_number_of_steps",
    ),
    choices(
        "NaN taken as the best setting",
        "if math.isfinite(value) and better:",
        "if better:",
        "test_what_is_not_finite_is_never_the_best",
    ),
    choices(
        "numbers of steps are thinned otherwise",
        "for digit in (1, 2, 5))",
        "for digit in (1, 3, 5))",
        "test_evaluation.py::"
        "test_from_scratch_is_torchs_training_of_one_initialisation_by_every_rule_on_the_first_tasks",
    ),
    choices(
        "another rule stays",
        "stepping.update = own",
        "pass",
        "test_another_rule_is_followed_and_then_given_back",
    ),
    from_scratch(
        "from scratch is judged a step later than it says",
        "if step in shown)",
        "if max(step - 1, 0) in shown)",
        "test_from_scratch_is_torchs_training_of_one_initialisation_by_every_rule_on_the_first_tasks",
    ),
    ngram_baseline(
        "n-gram trained on test rows",
        'rows = task.rows("train")',
        'rows = task.rows("test")',
        "test_the_ngram_baseline_knows_nothing_of_other_test_text",
    ),
    ngram_baseline(
        "n-gram tuned on test tasks",
        "model.tune(validation)",
        "model.tune(tasks)",
        "test_the_ngram_baseline_knows_nothing_of_other_test_text",
    ),
    fitted(
        "an estimator is fitted to padding",
        "support.mask > 0, strict",
        "support.mask >= 0, strict",
        "test_a_class_that_an_estimator_has_not_met_has_a_small_probability",
    ),
    judging(
        "task sets ignore their seed",
        "generator = torch.Generator().manual_seed(self.seed)\n            for _",
        "generator = torch.Generator().manual_seed(0)\n            for _",
        "test_the_hash_tells_seeds_apart_and_nothing_else",
    ),
    judging(
        "the first tasks of a set are others",
        "replace(self, tasks=min(tasks, self.tasks))",
        "replace(self, tasks=min(tasks, self.tasks), seed=self.seed + 1)",
        "test_from_scratch_is_torchs_training_of_one_initialisation_by_every_rule_on_the_first_tasks",
    ),
    interval(
        "an interval ignores its sources",
        "None if sources is None else half_width_over_sources(values, sources)",
        "None",
        "test_with_a_source_for_each_task_both_intervals_are_one",
    ),
    judging(
        "the sources are those of other tasks",
        "generator.set_state(before))",
        "generator)",
        "test_sources.py::test_the_sources_of_a_classification_are_the_classes_that_were_drawn",
    ),
    interval(
        "a 90 % interval",
        "stdtrit(count - 1, 0.975)",
        "stdtrit(count - 1, 0.95)",
        "test_evaluation.py::test_interval_is_that_of_scipy",
    ),
    interval(
        "tasks of one source are independent",
        "deviations @ shares @ deviations",
        "deviations @ deviations",
        "test_the_interval_over_sources_is_that_of_a_bootstrap_over_sources",
    ),
    meta_layer(
        "the inductive policy sees the other queries",
        'if batch_norm == "transductive" or not',
        'if batch_norm != "support" or not',
        "test_inductive_queries_do_not_see_each_other_and_transductive_ones_do",
    ),
    meta_layer(
        "the support policy sees the other queries",
        "torch.zeros_like(query.mask)], dim=1)\n            return",
        "torch.ones_like(query.mask)], dim=1)\n            return",
        "test_inductive_queries_do_not_see_each_other_and_transductive_ones_do",
    ),
    trained(
        "predictions of a trained run are transductive",
        "policy = self.meta_layer.batch_norm if batch_norm is None else batch_norm",
        'policy = "transductive" if batch_norm is None else batch_norm',
        "test_a_query_alone_is_predicted_as_among_others_unless_queries_normalise_each_other[prototypes-support]",
    ),
    trained(
        "outputs of classes that a task does not have count",
        "return Predictive(values[..., : self.n_way])",
        "return Predictive(values)",
        "test_estimators.py::test_fewer_classes_than_in_training[maml]",
    ),
    estimators(
        "classes of a table are numbered by the labels at hand",
        "classes = np.array(names) if",
        "classes = np.unique(y) if",
        "test_a_table_keeps_its_classes_whichever_the_support_set_holds",
    ),
    own_images(
        "files are not inverted where the task has light ink",
        "return 1 - scaled if ink else scaled",
        "return scaled",
        "test_inputs_are_converted_where_that_is_exact[PIL images]",
    ),
    own_images(
        "one grey image with its channel last is as many as it has rows",
        "if last in CHANNELS and task[2] != last:",
        "if last in CHANNELS[1:] and task[2] != last:",
        "test_an_array_of_images_has_one_layout",
    ),
    own_images(
        "the pixels of floats say their scale",
        "if not array.is_floating_point() and low >= 0 and high <= 255:",
        "if (not array.is_floating_point() or high > MOST) and low >= 0 and high <= 255:",
        "test_floats_from_0_to_255_are_refused_whatever_stands_beside_them",
    ),
)

SELECTION_AND_RESUME = (
    trainer(
        "training validates on test tasks",
        'TaskSet(training.task, "validation", tasks=self.validation_tasks',
        'TaskSet(training.task, "test", tasks=self.validation_tasks',
        "test_training_sees_no_test_task",
    ),
    trainer(
        "training draws validation tasks",
        'self.meta_batch, "train", training.generator',
        'self.meta_batch, "validation", training.generator',
        "test_training_sees_no_test_task",
    ),
    trainer(
        "better() turned round",
        "value > than if higher else value < than",
        "value < than if higher else value > than",
        "test_the_best_is_the_first_of_the_best_finite_values",
    ),
    trainer(
        "NaN taken as the best checkpoint",
        "if not math.isfinite(value):\n            return False",
        "if not math.isfinite(value):\n            return than is None",
        "test_the_best_is_the_first_of_the_best_finite_values",
    ),
    trainer(
        "weights are selected after the last inner step",
        "rows[min(inner_steps, len(rows) - 1)]",
        "rows[-1]",
        "test_weights_are_selected_after_the_inner_steps_that_were_trained_or_asked_for[overrides0-1]",
    ),
    trainer(
        "weights are selected after the inner steps of validation",
        "min(meta_layer.trained_inner_steps, meta_layer.test_inner_steps)",
        "meta_layer.test_inner_steps",
        "test_weights_are_selected_after_the_inner_steps_that_were_trained_or_asked_for[overrides0-1]",
    ),
    run(
        "the last weights are reported as the best",
        "checkpoint.load_weights(training.best, training.meta_layer)\n    return progress",
        "pass\n    return progress",
        "test_the_best_weights_are_those_of_the_best_validation",
    ),
    run(
        "a run is not looked for again once the folder is locked",
        "folder.check_new()  # another process",
        "pass  # another process",
        "test_run_folder.py::test_of_two_processes_that_found_no_run_the_second_cannot_overwrite_the_first",
    ),
    *(
        checkpoint(name, old, new, "test_a_run_that_broke_off_goes_on_as_one_that_did_not")
        for name, old, new in (
            (
                "the task generator is not restored",
                'training.generator.set_state(state["generators"]["tasks"])',
                "pass",
            ),
            ("torch's generator is not restored", 'torch.set_rng_state(own["generators"]["torch"])', "pass"),
            ("the optimizer is not restored", 'outer.optimizer.load_state_dict(state["optimizer"])', "pass"),
            ("the schedule is not restored", 'outer.scheduler.load_state_dict(state["scheduler"])', "pass"),
            (
                "the meta-parameters are not restored",
                'load_state(training.meta_layer, state["meta_layer"], path)',
                "pass",
            ),
            ("progress is not restored", 'return Progress(**state["progress"])', "return Progress()"),
            (
                "the best value is not restored",
                'return Progress(**state["progress"])',
                'return Progress(**{**state["progress"], "best": None})',
            ),
        )
    ),
    checkpoint(
        "tied weights are saved twice",
        "if firsts[name] == name",
        "if firsts[name]",
        "test_checkpoint.py::test_a_tied_weight_is_in_the_file_once_and_stays_tied",
    ),
    checkpoint(
        "two weights are loaded into one",
        "if name != first and not torch.equal(tensors[name], tensors[first]):",
        "if name == first and not torch.equal(tensors[name], tensors[first]):",
        "test_checkpoint.py::test_two_weights_are_not_loaded_into_one",
    ),
    checksums(
        "the checksum of weights is not compared",
        "return digest.hexdigest().encode() == entry[1]",
        "return True",
        "test_any_flipped_bit_and_any_cut_of_weights_is_noticed",
    ),
    checksums(
        "a damaged entry passes for no checksum",
        "return not REMAINS.search(content, 8, end)",
        "return True",
        "test_any_flipped_bit_and_any_cut_of_weights_is_noticed",
    ),
    last_checkpoints(
        "no older checkpoint is kept",
        "if last.exists() and keep > 1:",
        "if last.exists() and keep > 9:",
        "test_a_damaged_newest_checkpoint_falls_back_to_the_one_before_and_says_so",
    ),
    interrupt(
        "every signal ends with the code of Ctrl-C",
        "return KeyboardInterrupt() if number == signal.SIGINT else Stopped(number)",
        "return KeyboardInterrupt()",
        "test_a_signal_is_obeyed_after_the_step_with_a_checkpoint_and_the_exit_code_of_shells",
    ),
    run_folder(
        "a folder that another run has taken is written to",
        "if os.path.samestat(found, os.fstat(self.lock.fileno())):",
        "if True:",
        "test_faults.py::test_a_run_folder_that_vanishes_is_one_line_and_is_not_made_again",
    ),
    event_file(
        "events beyond the checkpoint stay",
        "return bool(Event.FromString(content).step <= step)",
        "return Event.FromString(content) is not None",
        "test_events_are_cut_to_the_checkpoint",
    ),
    files(
        "locking removes the files of others",
        "if found and found[1] in names:",
        "if found:",
        "test_locking_removes_what_killed_writers_of_this_run_left_and_no_other_file",
    ),
    files(
        "locking removes files in subfolders",
        'folder.glob("*.part")',
        'folder.rglob("*.part")',
        "test_locking_removes_what_killed_writers_of_this_run_left_and_no_other_file",
    ),
    files(
        "files are written in place",
        "part = part_of(path)\n    try:\n        with",
        "part = path\n    try:\n        with",
        "test_tasks_data_folder.py::test_an_interrupted_write_leaves_the_old_file_and_nothing_else",
    ),
    run_folder(
        "a lock is shared",
        "fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB)",
        "fcntl.LOCK_SH | (0 if wait else fcntl.LOCK_NB)",
        "test_resume.py::test_a_folder_in_use_is_left_alone",
    ),
    sweep(
        "a finished job is marked failed by a second sweep",
        "if self.run.holds_run and not self.run.holds_job(self.overrides):",
        "if False:",
        "test_two_jobs_of_one_folder_are_refused_and_the_first_is_kept",
    ),
    sweep_table(
        "the test metric is that of the last step",
        'row["metrics"][metric][row["steps"].index(row["chosen"])]',
        'row["metrics"][metric][-1]',
        "test_the_test_metric_stands_beside_the_validation_metric",
    ),
    sweep_table(
        "jobs to come have finished",
        'in_use else "not started"',
        'in_use else "finished"',
        "test_failures_and_jobs_to_come_stand_in_the_page",
    ),
    overrides(
        "the order in which settings are typed makes another job",
        "sort_keys=True, default=str",
        "default=str",
        "test_the_same_settings_are_the_same_job_however_they_are_typed",
    ),
    overrides(
        "a launcher makes another job",
        'OF_THE_SWEEP = ("launcher", "sweep")',
        "OF_THE_SWEEP = ()",
        "test_the_same_settings_are_the_same_job_however_they_are_typed",
    ),
    search(
        "every trial is drawn from one seed",
        '{"seed": seed + number}',
        '{"seed": seed}',
        "test_a_search_goes_on_as_if_it_had_not_been_stopped",
    ),
    search(
        "a trial of another process is run as well",
        "return [Trial(number, overrides, lock)] if lock else []",
        'return [Trial(number, overrides, lock or open("lock", "w"))]',
        "test_a_trial_of_another_process_is_left_to_it",
    ),
    sweep_table(
        "seeds are finished when one is",
        'status="finished" if len(finished) == len(rows)',
        'status="finished" if finished',
        "test_a_group_of_seeds_says_how_many_finished",
    ),
    sweep(
        "a search goes the wrong way",
        'return "maximize" if metric.removeprefix("query_") in',
        'return "maximize" if metric.removeprefix("query_") not in',
        "test_a_search_goes_the_way_in_which_the_metric_is_better",
    ),
    run(
        "a failure of before outlives a job's success",
        "folder.failed.unlink(missing_ok=True)",
        "pass",
        "test_sweep.py::test_a_job_that_failed_before_runs_again_and_its_failure_is_gone",
    ),
)

EPISODES = (
    few_shot(
        "support and query overlap",
        "(rank + passed.sum(-1))[..., None]",
        "rank[..., None]",
        "test_support_and_query_are_different_examples_of_one_class_per_label",
    ),
    few_shot(
        "splits overlap",
        '"validation": order[validation:test]',
        '"validation": order[validation - 1 : test - 1]',
        "test_splitting_by_hash_does_not_depend_on_the_order_of_names",
    ),
    few_shot(
        "labels are not permuted",
        "data = self.classes(split)\n        drawn = self.drawn_classes(num_tasks, split, generator)",
        "data = self.classes(split)\n        drawn = self.drawn_classes(num_tasks, split, generator).sort(-1).values",
        "test_every_order_of_classes_is_equally_likely",
    ),
    few_shot(
        "one shot too many counts",
        "(shot_of_row < shots)",
        "(shot_of_row <= shots)",
        "test_the_number_of_shots_is_drawn_for_each_task",
    ),
    few_shot(
        "a small class repeats its examples as queries",
        "exists = torch.arange(wanted) < sizes[..., None]",
        "exists = torch.arange(wanted) >= 0 * sizes[..., None]",
        "test_a_small_class_gives_what_it_has_and_masks_the_rest",
    ),
    sinusoid(
        "support and query are of two waves",
        "amplitude = uniform(0.1, 5.0, (num_tasks, 1, 1), generator)",
        "amplitude = uniform(0.1, 5.0, (num_tasks, self.k_shot + self.k_query, 1), generator)",
        "test_every_task_is_one_wave_whose_amplitude_and_phase_are_uniform",
    ),
    information(
        "noise is not scaled by the learned deviation",
        "scaled = [log.exp() * noise for",
        "scaled = [noise for",
        "test_noise_stands_on_the_parameters_that_do_not_adapt_and_the_penalty_is_added",
    ),
    fixed_tasks(
        "fixed training tasks do not follow from the seed",
        "own = torch.Generator().manual_seed(self.seed)",
        "own = generator",
        "test_the_first_tasks_of_a_larger_number_are_those_of_a_smaller_one_and_seeds_differ",
    ),
    text_tasks(
        "text is queried by its support rows",
        "examples.rows(slice(self.k_shot, None))",
        "examples.rows(slice(self.k_query))",
        "test_rows_of_a_task_are_different_rows_of_one_source",
    ),
    text_tasks(
        "a row may stand in support and query",
        "first = np.sort(np.unique(as_bytes, return_index=True)[1])",
        "first = np.arange(len(as_bytes))",
        "test_a_list_forgets_what_it_holds_twice",
    ),
    text_tasks(
        "bits per character are nats",
        "return loss / math.log(2) / per_token",
        "return loss / per_token",
        "test_bits_per_character_are_all_bits_by_all_characters",
    ),
)

TEXT_MEASURES = (
    quality(
        "real text holds the support",
        "tuple(row) not in known",
        "tuple(row) is not known",
        "test_real_text_is_none_of_the_support_and_not_its_own_reference",
    ),
    quality(
        "real text is compared with itself",
        "unseen[::2], unseen[1::2]",
        "unseen[::2], unseen[::2]",
        "test_real_text_is_none_of_the_support_and_not_its_own_reference",
    ),
    quality(
        "texts before adapting are those after it",
        "(models[0], models[-1])",
        "(models[-1], models[-1])",
        "test_texts_are_recognised_once_a_model_has_adapted_and_not_before",
    ),
    quality(
        "real text is recognised where it was learned by heart",
        "fit.score({each.name: fit.held_out[each.name] for each in found})",
        "fit.score({each.name: each.real for each in found})",
        "test_real_text_is_recognised_where_the_classifier_was_not_trained_on_it",
    ),
    measures(
        "recognition is trained on the pieces it must recognise",
        "order[count:], order[:count]",
        "order, order[:count]",
        "test_text_measures.py::TestTaskFit::test_what_is_held_out_is_not_trained_on",
    ),
    measures(
        "n-grams are copied from the samples themselves",
        "known = {text[i : i + n] for text in support for",
        "known = {text[i : i + n] for text in samples for",
        "test_copied_ngrams_are_those_that_the_longest_match_covers",
    ),
    measures(
        "part of a word is a copy",
        r"(?<!\w){re.escape(sample)}(?!\w)",
        r"{re.escape(sample)}(?!\w)",
        "test_a_sample_is_copied_where_it_stands_word_for_word",
    ),
    measures(
        "the distance is the divergence",
        "float(np.sqrt(np.clip(divergence, 0.0, 1.0)))",
        "float(np.clip(divergence, 0.0, 1.0))",
        "test_the_distance_is_that_of_scipy_on_the_counts_of_scikit_learn",
    ),
    ngram(
        "n-grams of the support set are counted in the queries",
        "counts = Counts(Text.of(*support), owners=len(support.mask)",
        "counts = Counts(Text.of(*query), owners=len(support.mask)",
        "test_no_token_is_given_away_by_what_follows_it_or_by_other_rows",
    ),
    ngram(
        "all tasks share their support sets",
        "owner = torch.arange(len(x)).repeat_interleave(x.shape[1])",
        "owner = torch.zeros(len(x), dtype=int).repeat_interleave(x.shape[1])",
        "test_each_task_is_judged_by_its_own_support_set",
    ),
    generation(
        "temperature multiplies",
        "logits.double() / sampling.temperature",
        "logits.double() * sampling.temperature",
        "test_draws_follow_the_truncated_distribution",
    ),
)

TABLES = (
    tables(
        "statistics of a table come from all tasks",
        "[fitted(column, train) for column in inputs]",
        "[fitted(column, train | True) for column in inputs]",
        "test_no_statistic_comes_from_other_tasks_than_those_of_training",
    ),
    tables(
        "the target's scale comes from all tasks",
        "values = target.values[train]",
        "values = target.values[train | True]",
        "test_no_statistic_comes_from_other_tasks_than_those_of_training",
    ),
    tables(
        "tasks of a group are split one by one",
        "names = list(dict.fromkeys(groups.values()))",
        "groups = {name: name for name in groups}; names = list(groups)",
        "test_every_task_is_in_one_split_and_groups_stay_together",
    ),
    table_tasks(
        "queries start with a support row",
        "query = shots[:, None] + torch.arange(most_query)",
        "query = shots[:, None] - 1 + torch.arange(most_query)",
        "test_support_and_query_are_the_rows_of_one_task_each_once",
    ),
    table_tasks(
        "no row is left to query",
        "return (sizes - 1).clamp(max=low), (sizes - 1).clamp(max=high)",
        "return sizes.clamp(max=low), sizes.clamp(max=high)",
        "test_tasks_of_unequal_size_are_padded_and_a_row_is_left_to_query",
    ),
    columns(
        "a missing number is no mean",
        "standard = np.where(missing, 0.0,",
        "standard = np.where(missing, 1.0,",
        "test_a_missing_number_becomes_the_mean_and_is_marked",
    ),
    sklearn_tables(
        "queries say the scale of a table",
        "known = x[: shots * per_shot]",
        "known = x",
        "test_the_support_rows_that_count_say_the_scale",
    ),
    pooled(
        "padding shifts predictions",
        "return ((targets - predicted) * mask).sum(1) / (mask.sum(1) + self.strength)",
        "return (targets - predicted).sum(1) / (mask.sum(1) + self.strength)",
        "test_a_shift_of_a_regression_is_a_shrunken_mean_residual",
    ),
    pooled(
        "added rows are as heavy as others",
        "np.full(len(own.x), self.strength)",
        "np.full(len(own.x), 1.0)",
        "test_added_rows_are_weighed_beside_all_training_rows",
    ),
)

in_evaluation = File("base_layers/base_layer.py", "test_pretrained.py")
features = File("tasks/on_features.py", "test_pretrained.py")

PRETRAINED = (
    inner_loop(
        "parts of unequal tasks count alike",
        "losses * share.to(losses.dtype)",
        "losses * share.mean().to(losses.dtype)",
        "test_support_chunk.py::"
        "test_an_algorithm_in_parts_has_the_losses_the_meta_gradient_and_the_predictions_of_the_whole",
    ),
    in_evaluation(
        "a trained network goes into training mode",
        "return super().train(False)",
        "return super().train(mode)",
        "test_the_network_predicts_as_in_evaluation_mode_whatever_mode_is_asked_for",
    ),
    checksums(
        "a file of weights runs code",
        "weights_only=True",
        "weights_only=False",
        "test_pretrained.py::test_a_file_that_cannot_be_used_is_said_in_one_line_and_runs_no_code",
    ),
    features(
        "new weights keep old features",
        "KNOWN.get(module, []).clear()",
        "KNOWN.get(module, []).copy()",
        "test_new_weights_make_new_features",
    ),
    features(
        "features of other code are taken",
        "accept=agrees",
        "accept=lambda arrays: True",
        "test_kept_features_are_refused_when_the_code_of_the_network_has_changed",
    ),
)

meta_layer_in_parts = File("meta_layers/meta_layer.py", "test_support_chunk.py")
own_data = File("tasks/own_data.py", "test_own_data.py")
export = File("runs/export.py", "test_export.py")
asked = File("runs/asked.py", "test_asked.py")

IN_USE = (
    meta_layer_in_parts(
        "the backward pass keeps every part of a support set",
        "found.append(checkpoint(run, *args, use_reentrant=False) if graph else run(*args))",
        "found.append(run(*args))",
        "test_many_examples_in_parts_take_a_tenth_of_the_memory_of_the_whole",
    ),
    own_data(
        "a negative class id is the last class",
        "(ids != tensor) | (ids < 0) | (ids >= count)",
        "(ids != tensor) | (ids >= count)",
        "test_class_ids_of_any_kind_or_one_line",
    ),
    own_data(
        "a text that shows a number is one",
        "return isinstance(value, Real | np.bool_ | Decimal)",
        "return isinstance(value, Real | np.bool_ | Decimal | str)",
        "test_what_holds_no_numbers_is_refused_in_one_line",
    ),
    File("tasks/own_episodes.py", "test_own_data.py")(
        "numbers beyond float32 become infinite",
        "rounded.isinf() & ~tensor.isinf()",
        "rounded.isinf() & tensor.isinf()",
        "test_episodes_of_ones_own_are_converted_or_refused",
    ),
    File("runs/saved.py", "test_estimators.py")(
        "a saved model forgets its classes",
        'meta_layer = of_classes(meta_layer, model["n_way"])',
        "meta_layer = of_classes(meta_layer, 1)",
        "test_an_adapted_model_in_one_file[prototypes]",
    ),
    asked(
        "another task has sizes of its own",
        "task.update({name: size for name, size in sizes.items() if name in task})",
        "task.update({})",
        "test_another_task_has_the_sizes_of_the_runs_own_unless_they_are_named",
    ),
    asked(
        "training data are among the tests",
        "if (value := setting(ours, name)) != (other := setting(theirs, name)):",
        "if (value := setting(ours, name)) == (other := setting(theirs, name)):",
        "test_what_the_run_cannot_take_is_refused_in_one_line",
    ),
    export(
        "an exported file is compared with itself",
        "compare(run(rows), decode(predictor.outputs(rows)), scale, path)",
        "compare(run(rows), run(rows), scale, path)",
        "test_a_file_that_predicts_otherwise_is_not_written",
    ),
    export(
        "a norm that is called twice is fixed at its first call",
        "once = all(len(found.get(norm, ())) == 1 for norm in norms)",
        "once = all(len(found.get(norm, ())) >= 1 for norm in norms)",
        "test_a_norm_that_is_called_twice_has_no_statistics_to_fix",
    ),
    export(
        "an exported model has the classes of the training",
        "return self.decode(self.outputs(x))",
        "return self.outputs(x)",
        "test_fewer_classes_than_in_training_are_exported",
    ),
    File("evaluation/displays/confusion.py", "test_displays.py")(
        "the confusion has true classes in its rows",
        "logits.argmax(-1)[kept] * classes + episode.query.y[kept]",
        "episode.query.y[kept] * classes + logits.argmax(-1)[kept]",
        "test_columns_of_the_confusion_are_the_true_classes",
    ),
    File("screen.py", "test_screen.py")(
        "a long stage stands still",
        "max(SILENCE - TICK, SHARE * (now - self.began))",
        "max(60 * SILENCE, SHARE * (now - self.began))",
        "test_a_long_stage_is_told_again",
    ),
    File("training/mlflow_logger.py", "test_mlflow_logger.py")(
        "MLflow gets each point again with every checkpoint",
        "        self.points = []",
        "        self.points = list(self.points)",
        "test_a_resumed_run_goes_on_in_the_same_mlflow_run",
    ),
)

trusted = File("runs/trusted.py", "test_trust.py")
graph_cache = File("backend/graph_cache.py", "test_trust.py")
data_folder = File("tasks/data_folder.py", "test_tasks_data_folder.py")
keys = File("keys.py", "test_trust.py")
omniglot = File("tasks/images/omniglot.py", "test_trust.py")

TRUST = (
    trusted(
        "lists in a stored config are not looked into",
        "if isinstance(node, Mapping) or (isinstance(node, Sequence) and not isinstance(node, str)):",
        "if isinstance(node, Mapping):",
        "test_a_stored_config_with_a_nested_target_is_refused",
    ),
    trusted(
        "what a plug-in has imported counts as its own",
        'str(getattr(found, "__module__", "")).partition(".")[0] == package',
        'str(getattr(found, "__module__", "")).partition(".")[0] != ""',
        "test_what_a_plug_in_has_imported_is_none_of_its_parts",
    ),
    trusted(
        "a signature covers a module of the same name elsewhere",
        "(here in (None, modules[module]) or is_installed(here))",
        "(here in (None, here) or is_installed(here))",
        "test_ones_own_signature_does_not_cover_a_module_of_the_same_name_elsewhere",
    ),
    graph_cache(
        "a graph without a signature is loaded",
        "if not is_signed(content[:LENGTH], file.name, content[LENGTH:]):",
        "if is_signed(content[LENGTH:], file.name, content[:LENGTH]):",
        "test_a_pickle_in_place_of_a_graph_in_the_cache_is_not_loaded",
    ),
    files(
        "packages behind a link are sources",
        "for place in {*named, *map(os.path.realpath, named)})",
        "for place in {*named, *map(os.path.abspath, named)})",
        "test_kept_graphs.py::test_installed_packages_are_no_sources_wherever_they_lie",
    ),
    graph_cache(
        "a graph is the answer to any question",
        "if not is_signed(content[:LENGTH], file.name, content[LENGTH:]):",
        "if not is_signed(content[:LENGTH], '0.pickle.z', content[LENGTH:]):",
        "test_a_pickle_in_place_of_a_graph_in_the_cache_is_not_loaded",
    ),
    trusted(
        "an escaped interpolation in stored overrides is composed",
        'plain = override.replace("\\\\", "")',
        "plain = override",
        "test_stored_overrides_that_read_other_files_or_values_are_refused",
    ),
    trusted(
        "trust in a module covers what it imports",
        'return str(getattr(found, "__module__", "")).partition(".")[0] == name.partition(".")[0]',
        'return str(getattr(found, "__module__", "")).partition(".")[0] != ""',
        "test_trust_in_a_module_covers_what_it_defines_alone",
    ),
    trusted(
        "a signature covers the file as it is by then",
        "signed(modules, {**others, file.name: text})",
        "signed(modules, {**others, file.name: read_text(file)})",
        "test_a_signature_vouches_for_the_text_that_was_read_alone",
    ),
    keys(
        "a folder behind a link that others can change is one's own",
        "path = path.parent.resolve() / path.name",
        "path = path.parent / path.name",
        "test_compiled_code_lies_where_only_this_user_writes",
    ),
    keys(
        "a folder that the group can write to is one's own",
        "about.st_uid == os.geteuid() and not about.st_mode & WRITABLE",
        "about.st_uid == os.geteuid() and bool(about.st_mode)",
        "test_compiled_code_lies_where_only_this_user_writes",
    ),
    checksums(
        "a checkpoint unpacks to any size",
        "return sum(record.file_size for record in archive.infolist()) > path.stat().st_size",
        "return sum(record.file_size for record in archive.infolist()) > 10**15",
        "test_trust.py::test_a_bomb_in_place_of_weights_is_refused",
    ),
    event_file(
        "events behind a link are cut",
        "if not stat.S_ISREG(path.lstat().st_mode):",
        "if not stat.S_ISREG(path.stat().st_mode):",
        "test_what_is_no_plain_file_is_not_cut",
    ),
    event_file(
        "a record of events takes any memory",
        "if length + CHECKSUM > size - file.tell():",
        "if length + CHECKSUM > size + 2**64:",
        "test_a_record_that_claims_to_be_longer_than_its_file_ends_it",
    ),
    File("tasks/images/pixels.py", "test_trust.py")(
        "images are read in every format",
        "image = Image.open(file, formats=formats())",
        "image = Image.open(file)",
        "test_a_program_in_place_of_an_image_is_refused",
    ),
    File("runs/git_state.py", "test_trust.py")(
        "git runs the filters of a checkout",
        "if scope in OWN]",
        'if scope == "elsewhere"]',
        "test_git_runs_no_program_that_a_checkout_names",
    ),
    keys(
        "a key that others can read is used",
        "if about.st_uid != os.geteuid() or about.st_mode & OPEN or len(key) != LENGTH:",
        "if about.st_uid != os.geteuid() or len(key) != LENGTH:",
        "test_a_key_that_others_can_read_is_not_used",
    ),
    data_folder(
        "damage in the cache goes unnoticed",
        "right = length >= 0 and digest_of(file, length) == file.read()",
        "right = length >= 0",
        "test_every_flipped_bit_in_the_cache_is_noticed",
    ),
    File("tasks/download.py", "test_tasks_data_folder.py")(
        "a download is written behind a link",
        "flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK",
        "flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK",
        "test_a_download_writes_nothing_behind_a_link",
    ),
    omniglot(
        "a drawing unpacks to any size",
        "if (size := archive.getinfo(member).file_size) > MOST_BYTES:",
        "if (size := archive.getinfo(member).file_size) > 10**12:",
        "test_a_bomb_in_an_archive_is_refused",
    ),
)

processes = File("processes.py", "test_processes.py")
reading = File("reading.py", "test_damaged_files.py")

FAULTS = (
    processes(
        "ranks take the same tasks",
        "return slice(tasks * rank() // count(), tasks * (rank() + 1) // count())",
        "return slice(0, tasks * (rank() + 1) // count())",
        "test_shares_are_all_tasks_once_and_differ_by_one",
    ),
    processes(
        "a rank waits although another has said why it ended",
        '            return\n        if reason(group):\n            raise RuntimeError("another rank has ended")',
        '            return\n        if group.rank < 0:\n            raise RuntimeError("another rank has ended")',
        "test_rank_failures.py::test_a_rank_that_waits_hears_why_another_ended_though_their_connection_is_open",
    ),
    processes(
        "a mistake of all ranks is told by each",
        "    elif of_rank_0(group) == line:",
        "    elif of_rank_0(group) == group:",
        "test_rank_failures.py::test_a_mistake_of_all_ranks_is_told_once",
    ),
    processes(
        "the wrong rank is named",
        'return first(group, f"rank {number} (process {pid} on {where}) was killed, or {SILENTLY}")',
        'return first(group, f"rank {group.rank} (process {pid} on {where}) was killed, or {SILENTLY}")',
        "test_rank_failures.py::test_a_rank_that_is_killed_ends_the_run_with_a_line_that_names_it",
    ),
    File("training/all_reduce.py", "test_processes.py")(
        "each rank goes by its own tasks alone",
        "        processes.summed(self.flat)",
        "        processes.summed(self.flat.clone())",
        "test_a_whole_run_with_its_evaluation_ends_as_that_of_one_process",
    ),
    last_checkpoints(
        "the newest checkpoint is away for a moment",
        "copy_name(last, older(last, 1))",
        "os.replace(last, older(last, 1))",
        "test_a_whole_checkpoint_is_there_between_any_two_changes_of_names",
    ),
    last_checkpoints(
        "a damaged checkpoint is thrown away",
        'os.replace(path, path.with_name(f"{path.name}.damaged"))',
        "path.unlink()",
        "test_a_damaged_newest_checkpoint_falls_back_to_the_one_before_and_says_so",
    ),
    last_checkpoints(
        "one checkpoint too many is kept",
        "if age_of(path) + 1 < keep:",
        "if age_of(path) + 1 <= keep:",
        "test_the_last_checkpoints_are_kept_and_the_oldest_go",
    ),
    interrupt(
        "a forked process raises what its parent would",
        "    if os.getpid() != PROCESS:",
        "    if os.getpid() == 0:",
        "test_a_process_that_was_forked_dies_by_the_signal",
    ),
    reading(
        "files of any size are read",
        "    if size > limit:",
        "    if size > limit << 40:",
        "test_a_larger_limit_is_the_users_choice",
    ),
    reading(
        "numbers of any length in base 60 are read",
        "    if BASE_60.search(text):",
        "    if BASE_60.search(text[:100]):",
        "test_reading.py::test_a_number_in_base_60_has_few_places",
    ),
)

MUTATIONS = (
    *ALGORITHMS,
    *EVALUATION,
    *SELECTION_AND_RESUME,
    *EPISODES,
    *TEXT_MEASURES,
    *TABLES,
    *PRETRAINED,
    *IN_USE,
    *TRUST,
    *FAULTS,
)
