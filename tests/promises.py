"""
What the README promises, and the tests that hold it.

Of every test and control that is named at least one case runs in `make test`; `test_promises.py` looks whether it does.
Names are those of pytest, without `tests/` and `.py`; a name without brackets stands for all cases.
"""

from typing import NamedTuple


class Promise(NamedTuple):
    """Tests that hold a promise, and tests that show that they could fail."""

    held_by: tuple[str, ...]
    controls: tuple[str, ...] = ()


STRATEGIES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
ONE_SHOT = ("wanda_2of4", "sparsegpt_2of4", "mrp_50", "mrp_2of4", "alps_50", "alps_2of4", "demo")
RECOVERY = ("gradual_cubic_80", "recover_distill", "recover_lora", "recover_masked_lora", "best_2of4", "best_50")
ABLATIONS = ("ablate_block_size", "ablate_damping", "ablate_calibration_windows", "ablate_calibration_corpus")
DEPLOY = ("deploy_2of4", "deploy_2of4_int8", "sparse_int4", "shrink_25", "permute_2of4")

CONSOLIDATED = "test_train_ranks::test_a_run_on_two_processes_and_its_checkpoint_consolidated"

RECIPES = {
    **{name: f"test_train::test_one_shot_recipes_in_small[{name}]" for name in ONE_SHOT},
    **{name: f"test_train::test_recovery_recipes_in_small[{name}]" for name in RECOVERY},
    **{name: f"test_train_deploy::test_every_run_leaves_a_report_and_zeros_that_held[{name}]" for name in DEPLOY},
    "sparsegpt_50": "test_run_folder::test_a_run_leaves_its_folder",
    "wanda_50": "test_train::test_a_killed_run_resumes_to_the_same_masks",
    "magnitude_50": "test_train::test_weights_and_biases_offline",
    "imp_90": "test_train::test_imp_beside_one_shot",
    "oneshot_90": "test_train::test_imp_beside_one_shot",
    "digits_imp_90": "test_digits::test_the_recipe_beside_one_shot",
    "digits_oneshot_90": "test_digits::test_the_recipe_beside_one_shot",
    **dict.fromkeys(("recover_deepspeed", "consolidate"), f"{CONSOLIDATED}[deepspeed_zero3]"),
    "prune_streaming": "test_streaming::test_the_recipe_prunes_a_tiny_checkpoint_and_goes_on",
    "sensitivity": "test_sensitivity::test_the_recipe_and_the_allocations_that_read_its_file",
    "sweep": "test_sweep::test_a_sweep_killed_again_and_again_ends_as_one_that_was_not",
    **{name: f"test_sweep::test_an_ablation_sweeps_by_itself[{name}]" for name in ABLATIONS},
}
"""Every recipe runs through all its stages, small."""

PROMISES = {
    "zeros stay zero on one device, with momentum from before, weight decay, clipping and accumulation": Promise(
        (
            "test_enforcer::test_zeros_stay_zero_through_every_step",
            "test_enforcer::test_momentum_that_predates_the_mask",
            "test_enforcer::test_pruned_gradients_do_not_enter_the_clipping_norm",
            "test_enforcer::test_other_optimizers",
            "test_enforcer::test_manual_optimization",
        ),
        ("test_enforcer::test_control_without_the_enforcer_the_zeros_come_back",),
    ),
    **{
        f"zeros stay zero under {name} in {precision}, masters and moments too": Promise(
            (f"test_parallel::test_after_every_step_weights_masters_and_moments_are_zero[{name}-{precision}-{steps}]",),
            (f"test_parallel::test_control_without_the_enforcer_they_come_back_at_once[{name}-{precision}-{steps}]",),
        )
        for name in STRATEGIES
        for precision, steps in (("32-true", 8), ("bf16-mixed", 4))
    },
    "wherever DeepSpeed keeps its masters": Promise(
        (
            "test_parallel::test_wherever_deepspeed_keeps_its_masters_the_losses_are_the_same[zero2_offload]",
            "test_parallel::test_wherever_deepspeed_keeps_its_masters_the_losses_are_the_same[zero3_offload]",
            "test_parallel::test_frozen_layers_without_a_master_keep_their_zeros[zero3_frozen]",
        ),
        ("test_parallel::test_the_losses_of_ddp_are_those_of_one_process",),
    ),
    "experts of a mixture keep their zeros": Promise(
        (
            "test_experts::test_zeros_of_experts_stay_zero_through_every_step",
            "test_parallel::test_zeros_of_experts_are_found_and_held_wherever_their_tensors_are[zero3]",
        ),
        ("test_experts::test_control_without_the_enforcer_the_zeros_of_experts_come_back",),
    ),
    "one rank decides the masks, and several prune as one does": Promise(
        (
            "test_ddp::test_two_ranks_get_rank_zeros_masks_and_hold_them",
            "test_parallel::test_two_ranks_prune_as_one_does",
            "test_parallel::test_an_error_on_one_rank_ends_all_of_them",
            "test_experts::test_two_ranks_prune_experts_as_one_does",
        )
    ),
    "rounds during training, under every strategy": Promise(
        (
            "test_iterative::test_imp_keeps_its_share_to_one_weight_and_never_takes_one_back",
            "test_iterative::test_rewinding_restores_weights_moments_and_learning_rate_from_the_file",
            *(
                f"test_parallel::test_a_change_of_the_masks_in_the_middle_holds_like_any_other[32-true-back-{name}]"
                for name in STRATEGIES
            ),
        ),
        (
            "test_iterative::test_control_without_zeroed_moments_they_stay",
            "test_iterative::test_control_a_weight_without_its_moments_zeroed_would_move",
            "test_parallel::test_control_the_three_ways_to_go_on_differ",
        ),
    ),
    "a run that is killed and resumed ends as one that was not": Promise(
        (
            "test_train::test_a_killed_run_resumes_to_the_same_masks",
            "test_train::test_imp_killed_in_its_third_round_ends_with_the_same_bits",
            "test_iterative::test_a_resumed_fit_ends_with_the_same_bits",
            "test_lora::test_a_killed_recovery_goes_on_to_the_same_bits",
            "test_parallel::test_a_resumed_fit_ends_with_the_same_bits[ddp]",
            "test_parallel::test_a_resumed_fit_ends_with_the_same_bits[fsdp2]",
            "test_parallel::test_a_resumed_fit_ends_with_the_same_bits[zero2]",
            "test_parallel::test_a_resumed_fit_ends_with_the_same_bits[zero3]",
        )
    ),
    "a killed rank ends the run with the checkpoint to resume from": Promise(
        (
            "test_train_ranks::test_a_killed_rank_ends_the_run_with_a_word_and_it_goes_on_from_its_checkpoint"
            "[deepspeed_zero3-0]",
            "test_train_ranks::test_whoever_starts_the_processes_none_is_left_when_one_is_killed[ddp-launcher0-1]",
            "test_lost_process::test_a_sigterm_that_interrupts_the_error_on_its_way_is_answered",
        )
    ),
    "training goes on with another number of processes": Promise(
        tuple(
            f"test_parallel::test_resuming_on_another_number_of_processes_keeps_the_masks[{name}]"
            for name in ("ddp", "fsdp2", "zero3")
        )
    ),
    "a checkpoint of any strategy is consolidated into a plain model": Promise(
        tuple(f"{CONSOLIDATED}[{name}]" for name in ("deepspeed_zero3", "fsdp2")),
        ("test_train_ranks::test_control_zeros_that_were_not_held_are_named",),
    ),
    "a model larger than memory is pruned from files, and kills lose nothing": Promise(
        (
            "test_streaming::test_it_is_what_pruning_the_loaded_model_makes",
            "test_streaming::test_a_call_that_goes_on_after_a_crash_anywhere_ends_the_same",
            "test_streaming::test_killed_processes_lose_nothing",
            "test_streaming::test_a_full_disk_loses_nothing",
            "test_streaming_families::test_streaming_writes_what_pruning_in_memory_saves",
        )
    ),
    "every family is pruned as by re-running the whole model": Promise(
        (
            "test_families",
            "test_experts::test_pruning_equals_rerunning_the_whole_model",
            "test_every_class::test_it_is_pruned_as_by_running_it_again_or_refused_by_name",
        ),
        ("test_every_class::test_control_another_order_of_blocks_gives_other_masks",),
    ),
    "blocks that are no chain are calibrated on the whole model, and a line says why": Promise(
        (
            "test_topologies::test_other_blocks_get_the_masks_of_running_the_model_again",
            "test_topologies::test_blocks_that_are_never_called_stay_dense_and_are_named",
            "test_fuzz::test_masks_are_those_of_rerunning_the_model",
        ),
        (
            "test_topologies::test_control_as_a_chain_the_masks_would_be_others",
            "test_fuzz::test_control_a_chain_that_is_none_has_other_masks",
        ),
    ),
    "every callback works on every kind of module, as by re-running the whole module": Promise(
        (
            "test_any_module::test_one_shot_equals_rerunning_the_whole_module",
            "test_any_module::test_iterative_pruning_removes_the_smallest_of_all_layers",
            "test_any_module::test_the_enforcer_finds_and_holds_the_zeros",
            "test_stages::test_layers_around_the_blocks_are_pruned_in_their_turn",
            "test_stages::test_a_chain_and_running_the_model_again_give_the_same",
        ),
        ("test_stages::test_at_once_takes_all_statistics_from_the_dense_model",),
    ),
    "convolutions are pruned as linear layers on patches, in bounded memory": Promise(
        (
            "test_convolutions::test_a_convolution_is_a_linear_layer_on_patches",
            "test_convolutions::test_statistics_of_layers_of_a_resnet_50_take_a_gram_and_a_batch",
        ),
        ("test_convolutions::test_the_order_of_columns_matters_for_groups_of_weights",),
    ),
    "calibration by a module's own step leaves no trace": Promise(
        (
            "test_own_steps::test_calibration_leaves_no_trace",
            "test_own_steps::test_training_draws_what_it_draws_without_pruning",
        ),
        ("test_own_steps::test_the_step_s_inputs_are_what_counts",),
    ),
    "what is left out of any module is named": Promise(
        (
            "test_stages::test_what_is_left_out_is_named_and_can_be_asked_for",
            "test_stages::test_layers_that_do_not_fit_stay_dense_by_default_and_are_refused_by_name",
            "test_stages::test_recurrent_layers_are_pruned_by_magnitude_and_it_is_said",
        ),
    ),
    "what the model takes of a batch is what it gets, and what is dropped is named": Promise(
        (
            "test_batches::test_padding_of_a_mapping_does_not_count_and_a_tuple_without_names_is_refused",
            "test_batches::test_keys_that_the_forward_does_not_take_are_named_once",
            "test_batches::test_pictures_reach_the_language_model",
        )
    ),
    "zeros in averages, in checkpoints and in the module that a fit hands back": Promise(
        (
            "test_copies::test_averages_have_the_zeros_too",
            "test_copies::test_what_writes_after_the_last_step_is_named",
            "test_copies::test_what_any_optimizer_keeps_of_a_pruned_weight_is_zero",
            "test_lora::test_the_best_checkpoint_is_tested_loaded_and_consolidated",
            "test_fuzz::test_zeros_stay_zero_in_any_training",
        ),
        (
            "test_copies::test_control_without_the_enforcer_the_average_is_dense",
            "test_fuzz::test_control_without_the_enforcer_pruned_weights_return",
        ),
    ),
    "the quality of a module without text is that of its own validation, and training goes on as without": Promise(
        (
            "test_validation_metrics::test_the_values_are_those_of_a_validation",
            "test_validation_report::test_a_module_is_measured_by_its_own_validation",
            "test_validation_report::test_training_goes_on_as_without_a_report",
            "test_untouched::test_nothing_of_a_step_is_left",
            "test_ddp::test_every_rank_validates_all_batches",
        ),
        (
            "test_untouched::test_the_same_step_in_the_open_changes_all_of_it",
            "test_validation_metrics::test_the_mean_of_the_batches_would_be_another",
        ),
    ),
    "a sparse module of any class is saved and loaded": Promise(
        ("test_plain_models::test_a_module_comes_back_as_it_was", "test_plain_models::test_tied_weights_are_kept_once")
    ),
    "trial runs change and measure nothing for good": Promise(
        ("test_trial_runs::test_a_trial_run_leaves_the_model_as_it_was_and_writes_nothing",)
    ),
    "adapters on a sparse model merge exactly, with every zero": Promise(
        ("test_lora::test_a_masked_lora_merges_exactly_and_keeps_every_zero",),
        ("test_lora::test_control_a_plain_lora_loses_the_zeros_when_it_is_merged",),
    ),
    "allocations meet their total to one weight": Promise(
        (
            "test_allocation::test_every_rule_meets_the_total_to_one_weight",
            "test_allocation::test_every_method_meets_the_total_and_layers_differ",
        )
    ),
    "rounding keeps every zero": Promise(
        (
            "test_quantization::test_without_a_pruner_it_is_gptq_and_zeros_stay",
            "test_deploy_callbacks::test_weights_are_rounded_after_training_and_zeros_held",
        )
    ),
    "packed files give the same bits back": Promise(
        ("test_compression::test_models_come_back_bit_for_bit_in_the_bytes_that_arithmetic_says",)
    ),
    "2:4 conversion is checked layer by layer": Promise(
        ("test_semi_structured::test_a_layer_with_wrong_outputs_stays_dense",),
        ("test_semi_structured::test_control_without_verification_wrong_outputs_get_through",),
    ),
    "smaller models compute what the zeros did": Promise(
        ("test_structured::test_shrunk_models_compute_what_the_zeros_did",),
        ("test_structured::test_a_shrunk_model_without_the_right_units_is_another",),
    ),
    "permuted models compute what they did": Promise(
        ("test_permutation::test_models_compute_what_they_did",),
        ("test_permutation::test_permuting_only_the_reader_changes_the_model",),
    ),
    "masks rest at one bit a weight": Promise(("test_masks::test_masks_rest_at_one_bit_per_weight_and_come_back",)),
    "nothing unsafe is loaded": Promise(
        ("test_train_ranks::test_a_sharded_checkpoint_that_asks_for_more_than_an_index_is_not_read",)
    ),
    "all callbacks and their parts in the YAML and on the shell of LightningCLI": Promise(
        (
            "test_lightning_cli::test_yaml_makes_it_and_what_is_printed_makes_it_again",
            "test_lightning_cli::test_every_public_part_is_among_the_cases",
            "test_lightning_cli::test_classes_of_a_users_own",
            "test_lightning_cli::test_the_shell_changes_the_last_callback",
            "test_lightning_cli::test_the_example_prunes_holds_and_runs_again_from_what_it_saved",
        ),
        ("test_lightning_cli::test_control_with_types_of_its_own_a_protocol_refuses_what_satisfies_it",),
    ),
    "classes of pytorch_lightning are refused by name": Promise(
        (
            "test_import_names::test_a_trainer_of_the_other_package_is_refused",
            "test_import_names::test_ready_made_callbacks_of_the_other_package_are_refused_by_name",
        ),
        ("test_import_names::test_control_one_package_and_an_own_callback_of_the_other_base_work",),
    ),
    "importing costs what is used": Promise(
        (
            "test_architecture::test_the_package_imports_nothing_and_its_core_tensors_only",
            "test_architecture::test_what_only_some_functions_need_is_imported_by_them",
        ),
        ("test_architecture::test_control_what_draws_imports_what_draws",),
    ),
    "block reconstruction keeps zeros, frozen and tied parameters and routers, and never ends worse": Promise(
        (
            "test_reconstruction::test_zeros_stay_and_whatever_may_not_change_is_bit_identical",
            "test_reconstruction::test_routers_stay_and_experts_are_trained",
            "test_reconstruction::test_a_block_that_would_end_worse_is_put_back",
            "test_reconstruction::test_a_block_without_a_nonlinearity_reaches_the_known_optimum",
            "test_reconstruction::test_loss_and_gradients_are_those_of_float64_autograd",
            "test_reconstruction::test_two_ranks_are_one",
            "test_reconstruction_fit::test_a_fit_begins_with_the_reconstructed_model_and_its_zeros_hold",
            "test_reconstruction_streaming::test_it_is_what_memory_makes",
            "test_reconstruction_streaming::test_a_call_that_goes_on_after_a_crash_anywhere_ends_the_same",
        ),
        ("test_reconstruction::test_control_without_masks_the_zeros_are_trained_away",),
    ),
    "ranks that prune from files together write what one writes, and lose nothing when one is killed": Promise(
        (
            "test_streaming_ranks::test_two_ranks_write_what_one_writes",
            "test_streaming_ranks::test_a_killed_rank_loses_nothing",
            "test_streaming_ranks::test_one_rank_goes_on_where_two_were_killed",
            "test_streaming_ranks::test_what_one_rank_cannot_do_is_refused_on_all_and_loses_nothing",
        ),
        ("test_streaming_ranks::test_two_ranks_write_what_one_writes",),
    ),
    "a module that is built from a path trains as one built in __init__, and a rank reads its part alone": Promise(
        ("test_path::test_a_fit_from_a_path_is_the_fit_of_a_model_built_in_init",),
        ("test_path::test_a_fit_from_a_path_is_the_fit_of_a_model_built_in_init",),
    ),
    "a model that is built later is pruned from files, and trains, resumes and is saved as one built in init": Promise(
        (
            "test_path_pruned::test_pruned_from_files_trained_in_shards_and_resumed",
            "test_path_pruned::test_rounds_of_a_model_from_a_path_are_those_of_one_built_in_init",
            "test_path_pruned::test_pruned_files_that_are_there_are_used_and_those_of_another_setting_refused",
            "test_path_pruned::test_a_fit_that_fails_while_it_prunes_goes_on_at_the_block_it_was_at",
            "test_path_pruned::test_the_recipe_loads_no_whole_model_on_any_rank",
            "test_checkpoint_perplexity::test_it_is_that_of_the_whole_model",
        ),
        (
            "test_path_pruned::test_pruned_from_files_trained_in_shards_and_resumed",
            "test_checkpoint_perplexity::test_control_the_last_hidden_states_decide",
        ),
    ),
    "windows that a model writes have its own distribution": Promise(
        (
            "test_written_windows::test_tokens_have_the_models_own_distribution",
            "test_written_windows::test_windows_begin_as_the_given_ones_in_turn_and_are_as_long_as_the_longest",
            "test_written_windows::test_one_shot_prune_calibrates_on_given_and_written_windows",
            "test_written_windows::test_the_seed_decides_and_nothing_else_changes",
        ),
        ("test_written_windows::test_tokens_have_the_models_own_distribution",),
    ),
    "an allocation measured in one step is the one measured by hand": Promise(
        (
            "test_measured_allocation::test_one_step_equals_measuring_by_hand_into_a_file",
            "test_measured_allocation::test_other_pruners_get_the_sparsities_that_wanda_measured",
            "test_measured_allocation::test_a_fit_allocates_and_the_report_shows_what_it_took",
        ),
    ),
    "solvers are exact whatever precision is set for products": Promise(
        ("test_precision::test_solvers_give_what_they_give_in_full_precision",),
        ("test_precision::test_the_users_precision_is_there_again_also_after_an_error",),
    ),
    **{f"recipe={name}": Promise((test,)) for name, test in RECIPES.items()},
}
