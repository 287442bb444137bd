"""
Small mistakes made in the package on purpose, one at a time, each of which the quick tests must notice.

`python tests/mutants.py` copies the repository's tracked files twice into temporary folders. The tests must pass there
as they are. Then it makes one mistake after another in the copies, two at a time, and runs the tests that should fail.
A mistake is killed if they do, or if they do not end in seven minutes, which is said; one that survives is behaviour
that no quick test guards. Names choose mutants:
`python tests/mutants.py wanda_norm_not_rooted solved_weights_not_broadcast`.

A mutant replaces a text that occurs exactly once in its file. Where the package has changed, `check` names those that
no longer fit, and nothing is run.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "prune_callbacks"
CARRIED = (PACKAGE, "tests", "recipes", "train.py", "benchmarks", "examples", "pyproject.toml", "README.md")
LEFT_OUT = (".venv", ".git", "runs", "__pycache__")
SECONDS = 420
WORKERS = 2
KILLED, ERRED = 1, (2, 3, 4, 5)
"""Exit codes of pytest: a test failed; interrupted, internal error, wrong usage, no tests collected."""


@dataclass(frozen=True)
class Mutant:
    """
    One mistake.

    Attributes:
        name: what goes wrong.
        file: where, relative to the package.
        old: text that occurs exactly once there.
        new: what replaces it.
        tests: arguments of pytest, relative to tests/, separated by spaces, that must fail.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str


MUTANTS = (
    # sparsity
    Mutant(
        "last_of_equal_scores_kept",
        "sparsity/selection.py",
        "goes += (ends - extra.cumsum(0)).repeat_interleave(extra)",
        "goes += (ends - count_true(tied).flatten() - extra.cumsum(0) + extra).repeat_interleave(extra)",
        "test_patterns.py",
    ),
    Mutant(
        "nan_refused_only_if_all_are",
        "sparsity/selection.py",
        "if scores.numel() and bool(torch.isnan(scores.amax())):",
        "if scores.numel() and bool(torch.isnan(scores).all()):",
        "test_patterns.py",
    ),
    Mutant(
        "one_tie_too_few_over_all_layers",
        "sparsity/selection.py",
        "equal &= (equal.flatten().cumsum(0) <= left - passed).view(equal.shape)",
        "equal &= (equal.flatten().cumsum(0) < left - passed).view(equal.shape)",
        "test_schedules.py test_packed.py",
    ),
    Mutant(
        "groups_of_nm_are_strided",
        "sparsity/patterns.py",
        "places = scores.unflatten(-1, (-1, self.m)).movedim(-1, 0).contiguous()",
        "places = scores.unflatten(-1, (self.m, -1)).movedim(-2, 0).contiguous()",
        "test_patterns.py",
    ),
    Mutant(
        "and_of_masks_is_or",
        "sparsity/masks.py",
        "merged._bits[name] = self._bits[name] & other._bits[name]",
        "merged._bits[name] = self._bits[name] | other._bits[name]",
        "test_masks.py",
    ),
    Mutant(
        "imp_round_late",
        "sparsity/schedules.py",
        "max(0, (time - self._first) // self.every + 1)",
        "max(0, (time - self._first) // self.every)",
        "test_schedules.py",
    ),
    Mutant(
        "mix_of_groups_counts_what_is_kept",
        "allocation/counts.py",
        "gone = np.array([sizes[name] // m * (m - n) for name, n in choices], dtype=float)",
        "gone = np.array([sizes[name] // m * n for name, n in choices], dtype=float)",
        "test_allocation.py",
    ),
    # solvers
    Mutant(
        "damping_without_the_mean_diagonal",
        "solvers/linalg.py",
        "matrix.diagonal().add_(used * unit).add_(dead.to(gram) * unit)",
        "matrix.diagonal().add_(used).add_(dead.to(gram) * unit)",
        "test_solvers.py",
    ),
    Mutant(
        "errors_pushed_the_wrong_way",
        "solvers/sparsegpt.py",
        "columns[b:].addmm_(factor[a:b, b:].T, errors, alpha=-1)",
        "columns[b:].addmm_(factor[a:b, b:].T, errors)",
        "test_solvers.py::test_sparsegpt_equals_the_loop_over_columns test_pruners.py",
    ),
    Mutant(
        "weights_of_dead_columns_stay",
        "solvers/sparsegpt.py",
        "    columns[system.dead] = 0\n",
        "",
        "test_pruners.py test_quantization.py",
    ),
    Mutant(
        "mrp_score_multiplied_by_the_inverse",
        "solvers/mrp.py",
        "return current.square() / system.inverse_diagonal",
        "return current.square() * system.inverse_diagonal",
        "test_pruners.py",
    ),
    Mutant(
        "alps_returns_the_worse_of_two",
        "solvers/alps.py",
        "better = (loss <= other.loss) & (undamped <= other.undamped())",
        "better = (loss > other.loss) | (undamped > other.undamped())",
        "test_pruners.py::test_alps_is_never_above_mrp",
    ),
    Mutant(
        "gradient_of_least_squares_turned_round",
        "solvers/least_squares.py",
        "self._set_gradient((self.dense - self.weight) @ self.system.matrix)",
        "self._set_gradient((self.weight - self.dense) @ self.system.matrix)",
        "test_solvers.py",
    ),
    Mutant(
        "codes_rounded_down",
        "solvers/gptq.py",
        "return (weight / scale).round_().clamp_(-self.largest, self.largest)",
        "return (weight / scale).floor_().clamp_(-self.largest, self.largest)",
        "test_quantization.py",
    ),
    Mutant(
        "gram_is_a_mean_over_each_batch",
        "solvers/statistics.py",
        "self.matrix.addmm_(rows.T, rows)",
        "self.matrix.addmm_(rows.T, rows, alpha=1 / len(rows))",
        "test_solvers.py",
    ),
    Mutant(
        "units_go_from_one_pool",
        "solvers/structured.py",
        "losses[(gone | (gone.sum(1, keepdim=True) == removed)).flatten()] = torch.inf",
        "losses[gone.flatten()] = torch.inf",
        "test_structured.py",
    ),
    Mutant(
        "permutation_is_the_inverse",
        "solvers/permutation.py",
        "    return groups.flatten()\n",
        "    return groups.flatten().argsort()\n",
        "test_permutation.py",
    ),
    # pruners
    Mutant(
        "wanda_norm_not_rooted",
        "pruners/wanda.py",
        "widened(weight, statistic).abs() * statistic.squared_norm.sqrt()",
        "widened(weight, statistic).abs() * statistic.squared_norm",
        "test_pruners.py",
    ),
    Mutant(
        "layers_with_one_gram_share_a_pool",
        "pruners/joint.py",
        "return torch.cat([pattern.keep(part, start=start) for part in scores.split(heights)])",
        "return pattern.keep(scores, start=start)",
        "test_pruners.py",
    ),
    Mutant(
        "unseen_features_become_zero",
        "pruners/gptq.py",
        "solved[:, system.dead] = self.grid.rounded(sparse[:, system.dead], unseen)",
        "solved[:, system.dead] = 0",
        "test_quantization.py",
    ),
    Mutant(
        "readers_are_not_compensated",
        "pruners/structured.py",
        "solved = least_squares_on(working, system, features)",
        "solved = working * features",
        "test_structured.py",
    ),
    # calibration
    Mutant(
        "groups_of_channels_along_the_kernel",
        "anatomy/convolution.py",
        "        return replace(self, channels_last=True)",
        "        return self",
        "test_convolutions.py::test_the_order_of_columns_matters_for_groups_of_weights",
    ),
    Mutant(
        "patches_in_another_order_than_the_weight",
        "anatomy/convolution.py",
        "columns = (*kernel, 2) if self.channels_last else (2, *kernel)",
        "columns = (*kernel, 2)",
        "test_convolutions.py::test_a_convolution_is_a_linear_layer_on_patches",
    ),
    Mutant(
        "stages_in_the_order_of_their_definition",
        "calibration/in_turn.py",
        "return order_of_execution(model, blocks, mine[0]) if len(blocks) > 1 else [0]",
        "return list(range(len(blocks)))",
        "test_any_module.py::test_one_shot_equals_rerunning_the_whole_module",
    ),
    Mutant(
        "one_group_s_inputs_for_all",
        "solvers/statistics.py",
        "zip(self.parts, x.chunk(len(self.parts), -1), strict=True)",
        "zip(self.parts, [x.chunk(len(self.parts), -1)[0]] * len(self.parts), strict=True)",
        "test_convolutions.py::test_a_convolution_is_a_linear_layer_on_patches",
    ),
    Mutant(
        "layers_that_read_otherwise_share_a_statistic",
        "calibration/observer.py",
        "key = (id(x), self._targets[name].reading)",
        "key = (id(x), None)",
        "test_stages.py::test_at_once_takes_all_statistics_from_the_dense_model",
    ),
    Mutant(
        "an_attention_s_output_stays_the_identity",
        "calibration/products.py",
        "        return functional.linear(inner, weight, bias), weights",
        "        return inner, weights",
        "test_any_module.py::test_one_shot_equals_rerunning_the_whole_module",
    ),
    Mutant(
        "padding_of_the_second_sequence_counts",
        "calibration/pairs.py",
        "pair.masks = (encoder, decoder) if decoder is not None else (encoder, None)",
        "pair.masks = (encoder, None)",
        "test_batches.py::test_padding_of_two_sequences_counts_for_neither",
    ),
    Mutant(
        "two_sequences_of_one_length",
        "calibration/pairs.py",
        "if decoder is not None and decoder.shape == encoder.shape:",
        "if decoder is None:",
        "test_batches.py::test_padding_of_two_sequences_counts_for_neither",
    ),
    Mutant(
        "padding_counts",
        "calibration/observer.py",
        "real = x if not self.masks else None if patches else _real(x, self.masks)",
        "real = x",
        "test_blocks.py::test_padding_does_not_count",
    ),
    Mutant(
        "hooks_stay",
        "calibration/collect.py",
        "stack.callback(hook.remove)",
        "stack.callback(lambda: None)",
        "test_engine.py::test_a_real_error_behind_the_last_layer_is_not_swallowed",
    ),
    Mutant(
        "solved_weights_not_broadcast",
        "engine/solving.py",
        "self.ranks.broadcast(targets[name].stored, owner)",
        "pass",
        "test_parallel.py::test_two_ranks_prune_as_one_does",
    ),
    Mutant(
        "next_block_sees_the_dense_one",
        "engine/sequential.py",
        "    here, before = plan.in_block(index), len(run.masks)\n",
        """    here, before = plan.in_block(index), len(run.masks)
    if index < plan.last and plan.calibrated and here:
        source.advance(index, block, where)
""",
        "test_blocks.py::test_sequential_pruning_equals_rerunning_the_whole_model",
    ),
    Mutant(
        "rounds_do_not_transpose_conv1d",
        "engine/iterative.py",
        "target.oriented(target.part_of(whole)) for whole",
        "target.part_of(whole) for whole",
        "test_iterative.py::test_shrinking_reads_conv1d_the_other_way_round",
    ),
    Mutant(
        "matrices_of_experts_transposed",
        "anatomy/experts.py",
        'stored = getattr(owner, "is_transposed", None)\n    for',
        'stored = not getattr(owner, "is_transposed", None)\n    for',
        "test_experts.py::test_pruning_equals_rerunning_the_whole_model",
    ),
    Mutant(
        "interrupted_save_loses_the_model",
        "writing.py",
        "        rename(old, folder)  # an earlier call was interrupted between its two renames\n",
        "        shutil.rmtree(old)\n",
        "test_run_report.py::test_an_interrupted_save_is_taken_back",
    ),
    # parallel
    Mutant(
        "gradients_of_pruned_weights_stay",
        "parallel/access.py",
        "                    zero_removed(gradient, self._keep[name].unpacked())\n",
        "                    gradient.detach()\n",
        "test_enforcer.py::test_pruned_gradients_do_not_enter_the_clipping_norm "
        "test_enforcer.py::test_zeros_stay_zero_through_every_step",
    ),
    Mutant(
        "moments_are_not_reset",
        "parallel/access.py",
        "for value in (self._master(parameter), *self._moments(parameter)):",
        "for value in (self._master(parameter),):",
        "test_enforcer.py::test_momentum_that_predates_the_mask",
    ),
    Mutant(
        "offloaded_norms_count_pruned_gradients",
        "parallel/zero.py",
        "            super().mask_gradients()\n            self._mask_norms()\n",
        "            super().mask_gradients()\n",
        "test_parallel.py::test_wherever_deepspeed_keeps_its_masters_the_losses_are_the_same[zero2_offload]",
    ),
    Mutant(
        "sums_stay_with_each_rank",
        "ranks.py",
        "            dist.all_reduce(moved, group=self._group_for(moved))\n",
        "",
        "test_ddp.py",
    ),
    Mutant(
        "snapshot_keeps_its_temporary_name",
        "writing.py",
        "        rename(partial, path, durable=durable)\n",
        "",
        "test_iterative.py::test_rewinding_restores_weights_moments_and_learning_rate_from_the_file",
    ),
    Mutant(
        "file_renamed_before_it_is_on_the_disk",
        "writing.py",
        "            _sync(partial)\n",
        "            pass\n",
        "test_streaming.py::test_a_file_is_on_the_disk_before_it_has_its_name_and_its_folder_after",
    ),
    Mutant(
        "folder_with_a_renamed_file_is_not_on_the_disk",
        "writing.py",
        "        _sync(new.parent)\n",
        "        pass\n",
        "test_streaming.py::test_a_file_is_on_the_disk_before_it_has_its_name_and_its_folder_after",
    ),
    Mutant(
        "failed_fits_draw_no_page",
        "callbacks/run_report.py",
        "        with suppress(Exception):  # the one that is on its way says more\n"
        "            self._page.draw(self.run)\n",
        "",
        "test_run_report.py::test_a_fit_that_fails_leaves_a_page_that_says_so",
    ),
    Mutant(
        "shards_begin_at_a_row_number",
        "parallel/fsdp2.py",
        "start = offset[0] * row if shape[0] else 0",
        "start = offset[0] if shape[0] else 0",
        "test_parallel.py::test_after_every_step_weights_masters_and_moments_are_zero[fsdp2-32-true-8]",
    ),
    Mutant(
        "bits_unpacked_last_first",
        "parallel/packed.py",
        "torch.arange(7, -1, -1, dtype=torch.uint8)",
        "torch.arange(8, dtype=torch.uint8)",
        "test_packed.py",
    ),
    Mutant(
        "rewinding_forgets_the_optimizer",
        "parallel/snapshot.py",
        "        if optimizer:\n            trainer.strategy.load_optimizer_state_dict(state)\n",
        "        if not optimizer:\n            trainer.strategy.load_optimizer_state_dict(state)\n",
        "test_iterative.py::test_rewinding_restores_weights_moments_and_learning_rate_from_the_file",
    ),
    Mutant(
        "oldest_checkpoint_is_taken",
        "storage/checkpoints.py",
        "return max(found, key=lambda path: path.stat().st_mtime, default=None)",
        "return min(found, key=lambda path: path.stat().st_mtime, default=None)",
        "test_train_ranks.py::test_checkpoints_whose_writing_was_interrupted_are_passed_over",
    ),
    # callbacks
    Mutant(
        "new_masks_wait_for_the_next_step",
        "callbacks/mask_enforcer.py",
        "        self.weights.project()\n",
        "",
        "test_enforcer.py::test_momentum_that_predates_the_mask test_iterative.py",
    ),
    Mutant(
        "masks_of_the_checkpoint_not_restored",
        "callbacks/iterative_prune.py",
        '        self.masks = MaskSet.from_state_dict(state_dict["masks"])\n',
        "",
        "test_iterative.py::test_a_resumed_fit_ends_with_the_same_bits",
    ),
    Mutant(
        "pruning_moves_the_random_state",
        "callbacks/prune_module.py",
        "stack.enter_context(untouched(trainer, pl_module) if own else isolate_rng())",
        "pass",
        "test_enforcer.py::test_pruning_does_not_change_what_training_draws",
    ),
    Mutant(
        "rewind_file_written_a_step_late",
        "callbacks/rewind.py",
        "if self.path is not None or trainer.global_step < self.rewind.step:",
        "if self.path is not None or trainer.global_step <= self.rewind.step:",
        "test_iterative.py::test_rewinding_restores_weights_moments_and_learning_rate_from_the_file",
    ),
    Mutant(
        "adapters_of_a_failed_fit_stay",
        "callbacks/lora_recovery.py",
        "            self.peft_model.unload()\n        self._unfinished = True\n",
        "            self.peft_model = None\n        self._unfinished = True\n",
        "test_lora.py::test_a_fit_that_failed_leaves_no_adapters_for_the_next",
    ),
    # streaming
    Mutant(
        "files_written_in_place",
        "writing.py",
        "    partial = path.with_name(path.name + PARTIAL)",
        "    partial = path",
        "test_streaming.py::test_a_call_that_goes_on_after_a_crash_anywhere_ends_the_same",
    ),
    Mutant(
        "old_hidden_states_pile_up",
        "streaming/journal.py",
        "        self.records.append(dict(record))\n        self._ranks.first(self._tidy)\n",
        "        self.records.append(dict(record))\n",
        "test_streaming.py::test_finished_blocks_are_not_done_again",
    ),
    # reconstruction
    Mutant(
        "error_not_divided_by_the_norm",
        "reconstruction/loss.py",
        "return (squares / target.square().sum(-1).clamp(min=self._floor)).sum()",
        "return squares.sum()",
        "test_reconstruction.py",
    ),
    Mutant(
        "padding_counts_in_reconstruction",
        "reconstruction/loss.py",
        "        if values.shape[:-1] == tokens.shape:\n            return values[tokens]\n",
        "        if values.shape[:-1] == tokens.shape:\n            return values\n",
        "test_reconstruction.py::test_loss_and_gradients_are_those_of_float64_autograd",
    ),
    Mutant(
        "learning_rate_not_relative",
        "reconstruction/training.py",
        '"lr": rate * (scales[name] or common)}',
        '"lr": rate}',
        "test_reconstruction.py::test_steps_are_relative_to_the_scale_of_a_parameter_and_fall",
    ),
    Mutant(
        "learning_rate_does_not_fall",
        "reconstruction/training.py",
        "            self._schedule.step()\n",
        "            pass\n",
        "test_reconstruction.py::test_steps_are_relative_to_the_scale_of_a_parameter_and_fall",
    ),
    Mutant(
        "gradients_summed_in_tensors_of_autograd",
        "reconstruction/loss.py",
        "                        if part is not None:\n                            whole.add_(part)\n",
        "                        whole.set_(part) if len(self._mine(places)) == 1 else whole.add_(part)\n",
        "test_reconstruction.py::test_two_parameters_may_have_one_gradient",
    ),
    Mutant(
        "target_of_the_pruned_stream",
        "engine/rebuilding.py",
        "        self._dense.advance(index, block, where)\n",
        "        self._dense.inputs = self._pruned.copy().inputs\n        self._dense.advance(index, block, where)\n",
        "test_reconstruction.py::test_it_is_pruning_and_reconstructing_block_after_block",
    ),
    Mutant(
        "last_pass_kept_in_place_of_the_best",
        "reconstruction/training.py",
        "    optimizer.masters.restore(values)\n",
        "",
        "test_reconstruction.py",
    ),
    Mutant(
        "zeros_trained_in_reconstruction",
        "reconstruction/training.py",
        "PlainAccess(self.masters.holder, masks, [self._optimizer])",
        "PlainAccess(self.masters.holder, MaskSet({}), [self._optimizer])",
        "test_reconstruction.py",
    ),
    Mutant(
        "small_steps_rounded_away",
        "reconstruction/parameters.py",
        "nn.Parameter(parameter.detach().to(wide(parameter.dtype)))",
        "nn.Parameter(parameter.detach().clone())",
        "test_reconstruction.py::test_small_steps_of_16_bit_weights_are_not_rounded_away",
    ),
    Mutant(
        "gradients_of_one_rank",
        "reconstruction/loss.py",
        "return {name: self._ranks.sum(gradient) for name,",
        "return {name: gradient for name,",
        "test_reconstruction.py::test_two_ranks_are_one",
    ),
    Mutant(
        "tied_parameter_trained",
        "reconstruction/parameters.py",
        "        elif _memory(parameter) in outside:\n",
        "        elif False:\n",
        "test_reconstruction.py::test_zeros_stay_and_whatever_may_not_change_is_bit_identical",
    ),
    Mutant(
        "router_trained",
        "reconstruction/parameters.py",
        "        elif any(inside(path, router) for router in deciding):\n",
        "        elif False:\n",
        "test_reconstruction.py::test_routers_stay_and_experts_are_trained",
    ),
    Mutant(
        "held_out_windows_trained_on",
        "reconstruction/training.py",
        "    return training, range(len(training), count) or training\n",
        "    return range(count), range(len(training), count) or training\n",
        "test_reconstruction.py::test_held_out_windows_take_no_part",
    ),
    Mutant(
        "dense_stream_removed_too_early",
        "streaming/journal.py",
        "needed = (self.hidden(len(self.records)), self.dense(len(self.records)))",
        "needed = (self.hidden(len(self.records)),)",
        "test_reconstruction_streaming.py",
    ),
    Mutant(
        "streamed_block_run_before_it_is_pruned",
        "streaming/walk.py",
        """        if targets:
            record = self._prune(journal, index, targets, inputs, advance, show)
        if runs:
            store_next(index, block, inputs, self.where, journal.hidden(index + 1), self.ranks)
""",
        """        if runs:
            store_next(index, block, inputs, self.where, journal.hidden(index + 1), self.ranks)
        if targets:
            record = self._prune(journal, index, targets, inputs, advance, show)
""",
        "test_streaming.py::test_every_pruner_from_several_files",
    ),
    Mutant(
        "hidden_states_written_in_place",
        "streaming/inputs.py",
        "partial = folder.with_name(folder.name + PARTIAL)",
        "partial = folder",
        "test_streaming.py::test_a_call_that_goes_on_after_a_crash_anywhere_ends_the_same",
    ),
    # files that ranks share
    Mutant(
        "hidden_states_of_ranks_in_one_file",
        "streaming/inputs.py",
        'return f"{number * ranks.size + ranks.rank:05d}.safetensors"',
        'return f"{number:05d}.safetensors"',
        "test_streaming_ranks.py::test_two_ranks_write_what_one_writes",
    ),
    Mutant(
        "ranks_take_all_windows",
        "streaming/walk.py",
        "self.batches = batches[ranks.rank :: ranks.size]",
        "self.batches = batches",
        "test_streaming_ranks.py::test_two_ranks_write_what_one_writes",
    ),
    Mutant(
        "folder_renamed_before_all_have_written",
        "streaming/inputs.py",
        """    with _completing(folder, ranks) as partial:
        ranks.attempt(lambda: store(partial))
""",
        """    with _completing(folder, ranks) as partial:
        store(partial)
""",
        "test_streaming_ranks.py::test_what_one_rank_cannot_do_is_refused_on_all_and_loses_nothing",
    ),
    # windows that the model writes, and what it measures
    Mutant(
        "unlikely_tokens_are_not_written",
        "calibration/written.py",
        "top_k=0,",
        "top_k=50,",
        "test_written_windows.py::test_tokens_have_the_models_own_distribution",
    ),
    Mutant(
        "the_models_own_settings_write",
        "calibration/written.py",
        "model.generation_config = GenerationConfig()",
        "model.generation_config = settings",
        "test_written_windows.py::test_tokens_have_the_models_own_distribution",
    ),
    Mutant(
        "padding_begins_windows",
        "calibration/texts.py",
        "return list(ids) if real is None else",
        "return list(ids) if True else",
        "test_written_windows.py::test_padding_is_no_beginning_and_short_windows_begin_none",
    ),
    Mutant(
        "allocation_without_its_measurements",
        "studies/measured_allocation.py",
        "return self._weighted(ranks.first(measure))",
        "return self._weighted({})",
        "test_measured_allocation.py::test_one_step_equals_measuring_by_hand_into_a_file",
    ),
    # a module's own steps
    Mutant(
        "buffers_of_a_step_aside_stay",
        "callbacks/untouched.py",
        "for value in (part._buffers, *attributes.values()):",
        "for value in attributes.values():",
        "test_untouched.py",
    ),
    Mutant(
        "random_states_after_an_error_stay",
        "callbacks/untouched.py",
        "isolated.__exit__(None, None, None)",
        "isolated.gen.close()",
        "test_untouched.py",
    ),
    Mutant(
        "every_batch_of_a_validation_counts_alike",
        "callbacks/validation_metrics.py",
        "self._results.batch, self._results.batch_size = batch, None",
        "self._results.batch, self._results.batch_size = batch, 1",
        "test_validation_metrics.py",
    ),
    Mutant(
        "metrics_of_ranks_are_added",
        "callbacks/validation_metrics.py",
        "metric.sync_on_compute = metric._to_sync = False",
        "metric.sync_on_compute = metric._to_sync = True",
        "test_ddp.py::test_every_rank_validates_all_batches",
    ),
    Mutant(
        "tied_weights_are_written_twice",
        "storage/model_folder.py",
        "if tensor.numel() else name",
        "if tensor.numel() < 0 else name",
        "test_plain_models.py",
    ),
    # the rest
    Mutant(
        "protocols_compared_by_annotations",
        "interfaces.py",
        "dict.fromkeys(member.__annotations__, Any)",
        "dict(member.__annotations__)",
        "test_lightning_cli.py",
    ),
    Mutant(
        "trainer_of_the_other_package_accepted",
        "callbacks/import_names.py",
        "    if _second(trainer):\n",
        "    if False:\n",
        "test_import_names.py",
    ),
    Mutant(
        "error_on_one_rank_not_shared",
        "ranks.py",
        "problems = self.gather(shown)",
        "problems = [shown]",
        "test_parallel.py::test_an_error_on_one_rank_ends_all_of_them",
    ),
    Mutant(
        "first_of_two_models_is_taken",
        "storage/consolidation.py",
        "if len(fitting) > 1:",
        "if len(fitting) > 2:",
        "test_train_ranks.py::test_masks_under_the_modules_names_and_two_models_in_one_checkpoint",
    ),
    Mutant(
        "update_of_adapters_not_masked",
        "adapters/lora.py",
        "return update * (self.get_base_layer().weight != 0)",
        "return update",
        "test_lora.py::test_a_masked_lora_merges_exactly_and_keeps_every_zero",
    ),
    Mutant(
        "bits_packed_lowest_first",
        "deploy/packing.py",
        "places = torch.arange(bits - 1, -1, -1)",
        "places = torch.arange(bits)",
        "test_compression.py",
    ),
)


def check() -> list[str]:
    """Names of the mutants whose old text does not occur exactly once in its file."""
    texts = {m.file: (ROOT / PACKAGE / m.file).read_text(encoding="utf-8") for m in MUTANTS}
    return [mutant.name for mutant in MUTANTS if texts[mutant.file].count(mutant.old) != 1]


def mutated(mutant: Mutant, text: str) -> str:
    """The file's text with the mistake in it."""
    assert text.count(mutant.old) == 1, mutant.name
    return text.replace(mutant.old, mutant.new)


def copy_repository(target: Path) -> None:
    """The tracked files as they are now; without git, all of them."""
    listed = None
    with suppress(FileNotFoundError):
        listed = subprocess.run(["git", "ls-files", "-z", *CARRIED], cwd=ROOT, capture_output=True, text=True)
    names = [name for name in listed.stdout.split("\0") if name] if listed is not None and not listed.returncode else []
    for name in names:
        if (ROOT / name).is_file():  # else it is deleted and not yet committed
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    if not names:
        shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(*LEFT_OUT), dirs_exist_ok=True)


def environment(copy: Path) -> dict[str, str]:
    """Of processes that import the copy; they keep no bytecode, which two changes within a second could outlive."""
    paths = os.pathsep.join([str(copy), str(copy / "tests")])
    return os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def check_copy(copy: Path) -> None:
    """Raises RuntimeError if another package than the copy's would be tested, such as the one that is installed."""
    command = [sys.executable, "-c", f"import {PACKAGE}; print({PACKAGE}.__file__)"]
    found = subprocess.run(command, cwd=copy, env=environment(copy), capture_output=True, text=True)
    lines = found.stdout.split("\n")
    if found.returncode or not Path(lines[0]).resolve().is_relative_to(copy.resolve()):
        raise RuntimeError(f"the tests would not import the copy in {copy}: {found.stdout}{found.stderr}")


def run_tests(copy: Path, tests: str, seconds: float = SECONDS) -> tuple[int | None, str]:
    """The exit code of pytest, None if it took too long, and what it wrote."""
    chosen = [f"tests/{test}" for test in tests.split()]
    options = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow and not gpu"]
    checked = f"--jaxtyping-packages={PACKAGE},beartype.beartype"
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as written:
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *options, checked, *chosen],
            cwd=copy,
            env=environment(copy),
            stdin=subprocess.DEVNULL,
            stdout=written,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
        written.seek(0)
        return code, written.read()


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Interrupts pytest if it still runs, so that it ends the processes of its tests; kills it if that is no use."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGINT)
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def try_out(mutant: Mutant, copy: Path) -> bool:
    """Makes the mistake in a copy, runs the tests, and takes it back; prints what came of it: whether it is killed."""
    file = copy / PACKAGE / mutant.file
    before = file.read_text(encoding="utf-8")
    begin = time.perf_counter()
    try:
        file.write_text(mutated(mutant, before), encoding="utf-8")
        code, output = run_tests(copy, mutant.tests)
    finally:
        file.write_text(before, encoding="utf-8")
    if code is None or code == KILLED:
        late = " (it did not end)" if code is None else ""
        print(f"killed {time.perf_counter() - begin:.1f} s {mutant.name}{late}", flush=True)
        return True
    if code == 0:
        print(f"SURVIVED {mutant.name}", flush=True)
        return False
    why = f"exit code {code}" + (", an error of the list" if code in ERRED else "")
    last = "\n".join(f"    {line}" for line in deque(output.splitlines(), maxlen=15))
    print(f"ERROR {mutant.name}: {why}\n{last}", flush=True)
    return False


def main(names: list[str]) -> int:
    """Tries the mutants of these names, or all; returns the exit status."""
    unknown = [name for name in names if name not in {mutant.name for mutant in MUTANTS}]
    if unknown:
        print(f"no such mutants: {', '.join(unknown)}; known are {', '.join(mutant.name for mutant in MUTANTS)}")
        return 1
    if unfit := check():
        print(f"the old text of these mutants does not occur exactly once in its file: {', '.join(unfit)}")
        return 1
    chosen = [mutant for mutant in MUTANTS if not names or mutant.name in names]
    with tempfile.TemporaryDirectory(prefix="mutants_") as folder:
        free: SimpleQueue[Path] = SimpleQueue()
        for number in range(min(WORKERS, len(chosen))):
            copy = Path(folder) / str(number) / ROOT.name
            copy.mkdir(parents=True)
            copy_repository(copy)
            check_copy(copy)
            free.put(copy)
        every = " ".join(dict.fromkeys(test for mutant in chosen for test in mutant.tests.split()))
        code, output = run_tests(copy, every, seconds=4 * SECONDS)
        if code != 0:
            print(f"the tests fail without any mistake:\n{output}")
            return 1

        def in_a_copy(mutant: Mutant) -> bool:
            copy = free.get()
            try:
                return try_out(mutant, copy)
            finally:
                free.put(copy)

        with ThreadPoolExecutor(WORKERS) as pool:
            results = list(pool.map(in_a_copy, chosen))
    print(f"{sum(results)} of {len(results)} killed")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
