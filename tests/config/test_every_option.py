"""Every option is set off its default by a test that fails where the option is ignored.

OFF_DEFAULT names that test for each option of the schema (tests/schema.py). What the table says is checked: the test
is there, and its own source sets the option, on a command line or in the constructor's call, to another value than
its default. That it fails without the option was tried by making each constructor ignore each of its parameters.
"""

import ast

# ruff: noqa: E501  a row of the table is one line
from pathlib import Path

import pytest

from tests.schema import TESTS, definitions, is_set_by, schema, what_is_set

OFF_DEFAULT = {
    "benchmark.case": "benchmarking/test_benchmark.py::test_each_layout_is_measured_on_the_same_examples",
    "benchmark.layouts": "benchmarking/test_benchmark.py::test_each_layout_is_measured_on_the_same_examples",
    "benchmark.scale": "benchmarking/test_benchmark.py::test_each_layout_is_measured_on_the_same_examples",
    "benchmark.warm_up": "benchmarking/test_benchmark.py::test_each_layout_is_measured_on_the_same_examples",
    "benchmark.windows": "benchmarking/test_benchmark.py::test_each_layout_is_measured_on_the_same_examples",
    "benchmark.steps_per_window": "benchmarking/test_benchmark.py::test_each_layout_is_measured_on_the_same_examples",
    "benchmark.output": "benchmarking/test_benchmark.py::test_each_layout_is_measured_on_the_same_examples",
    "benchmark.profile": "benchmarking/test_benchmark.py::test_each_layout_is_measured_on_the_same_examples",
    "benchmark.compare": "benchmarking/test_benchmark.py::test_a_regression_is_marked_and_ends_with_1",
    "benchmark.tolerance": "benchmarking/test_benchmark.py::test_a_regression_is_marked_and_ends_with_1",
    "estimate.device": "estimating/test_estimate.py::test_a_run_fits_or_the_smallest_change_is_named",
    "estimate.mfu": "estimating/test_estimate.py::test_data_that_is_not_read_is_what_is_said_of_it",
    "estimate.price_per_hour": "estimating/test_estimate.py::test_seventy_billion_parameters_on_64_ranks_by_hand",
    "estimate.read_data": "estimating/test_estimate.py::test_data_that_is_not_read_is_what_is_said_of_it",
    "estimate.num_examples": "estimating/test_estimate.py::test_data_that_is_not_read_is_what_is_said_of_it",
    "estimate.tokens_per_example": "estimating/test_estimate.py::test_data_that_is_not_read_is_what_is_said_of_it",
    "estimate.shared_tokens_per_example": "estimating/test_estimate.py::test_data_that_is_not_read_is_what_is_said_of_it",
    "estimate.targets_per_example": "estimating/test_estimate.py::test_data_that_is_not_read_is_what_is_said_of_it",
    "estimate.changes": "estimating/test_estimate.py::test_the_command_needs_no_network_and_queues_nothing",
    "estimate.output": "estimating/test_estimate.py::test_the_command_needs_no_network_and_queues_nothing",
    "cache.remove": "data/test_kept.py::test_what_is_named_is_removed_once_it_is_confirmed",
    "cache.confirmed": "data/test_kept.py::test_what_is_named_is_removed_once_it_is_confirmed",
    "schema.output": "config/test_schema.py::test_the_command_prints_or_writes_it",
    "doctor.folder": "health/test_doctor.py::test_every_check_answers_on_this_machine",
    "doctor.only": "health/test_doctor.py::test_some_checks_and_json",
    "doctor.json": "health/test_doctor.py::test_some_checks_and_json",
    "doctor.launcher": "health/test_doctor.py::test_every_node_is_shown_and_one_broken_node_ends_with_1",
    "convert.file": "config/test_convert.py::test_a_config_of_axolotl",
    "convert.output": "config/test_convert.py::test_a_config_of_axolotl",
    "convert.overwrite": "config/test_convert.py::test_a_config_of_automodel",
    "evaluate.run": "scoring/test_evaluate.py::test_the_loss_is_the_run_s_own",
    "evaluate.limit": "scoring/test_evaluate.py::test_a_limit_takes_the_same_sample_every_time_and_leaves_the_whole_alone",
    "evaluate.baseline": "scoring/test_evaluate.py::test_a_base_that_is_not_known_is_said_before_anything_is_measured",
    "evaluate.tokens": "scoring/test_token_page.py::test_the_page_says_what_was_worked_out_by_hand",
    "evaluate.answers": "scoring/test_evaluate.py::test_a_limit_takes_the_same_sample_every_time_and_leaves_the_whole_alone",
    "evaluate.tasks": "scoring/test_evaluate.py::test_a_task_scores_as_on_the_harness_s_own_command_line",
    "evaluate.tasks_path": "scoring/test_evaluate.py::test_a_task_scores_as_on_the_harness_s_own_command_line",
    "evaluate.output_dir": "scoring/test_evaluate.py::test_a_base_that_is_not_known_is_said_before_anything_is_measured",
    "evaluate.max_new_tokens": "scoring/test_evaluate.py::test_a_model_folder_without_its_run",
    "evaluate.batch_size": "scoring/test_evaluate.py::test_as_many_examples_are_computed_together_as_asked",
    "evaluate.data": "scoring/test_evaluate.py::test_a_sample_of_other_data_and_no_answers",
    "export.run": "config/test_keys.py::test_an_export_is_of_the_step_the_dtype_and_the_place_that_were_typed",
    "export.step": "config/test_keys.py::test_an_export_is_of_the_step_the_dtype_and_the_place_that_were_typed",
    "export.dtype": "config/test_keys.py::test_an_export_is_of_the_step_the_dtype_and_the_place_that_were_typed",
    "export.output": "config/test_keys.py::test_an_export_is_of_the_step_the_dtype_and_the_place_that_were_typed",
    "export.shard_size": "config/test_keys.py::test_an_export_is_of_the_step_the_dtype_and_the_place_that_were_typed",
    "export.merge": "inference/test_adapter.py::test_gauntlet_43_adapter_merged_model_and_server_agree",
    "generate.run": "inference/test_generate.py::test_the_answer_is_that_of_transformers",
    "generate.prompt": "inference/test_generate.py::test_a_prompt_is_taken_literally",
    "generate.prompts": "inference/test_generate.py::test_a_file_is_answered_with_every_setting_and_each_is_written_beside_the_answers",
    "generate.output": "inference/test_generate.py::test_a_file_is_answered_with_every_setting_and_each_is_written_beside_the_answers",
    "generate.chat": "inference/test_generate.py::test_a_conversation_is_held_over_standard_input",
    "generate.system": "inference/test_generate.py::test_a_system_message_is_heard",
    "generate.max_new_tokens": "inference/test_generate.py::test_the_answer_is_that_of_transformers",
    "generate.temperature": "inference/test_generate.py::test_a_file_of_prompts_goes_on_where_it_was_left",
    "generate.top_k": "inference/test_generate.py::test_answers_made_with_other_settings_are_not_gone_on_with",
    "generate.top_p": "inference/test_generate.py::test_answers_made_with_other_settings_are_not_gone_on_with",
    "generate.batch_size": "inference/test_generate.py::test_answers_made_with_other_settings_are_not_gone_on_with",
    "preview.rows": "config/test_keys.py::test_preview_draws_the_step_that_was_typed",
    "preview.row": "training/test_preview.py::test_rows_are_shown_with_what_is_supervised_and_any_row_by_number",
    "preview.step": "config/test_keys.py::test_preview_draws_the_step_that_was_typed",
    "preview.output": "training/test_preview.py::test_files_are_written_where_they_are_asked_for",
    "preview.picture": "training/test_preview.py::test_a_picture",
    "publish.run": "publishing/test_publish.py::test_dry_run_writes_the_folder_and_asks_nobody",
    "publish.repo_id": "publishing/test_publish.py::test_dry_run_writes_the_folder_and_asks_nobody",
    "publish.private": "publishing/test_publish.py::test_a_repository_is_private_unless_it_is_said_to_be_public",
    "publish.dry_run": "publishing/test_publish.py::test_dry_run_writes_the_folder_and_asks_nobody",
    "publish.update": "publishing/test_publish.py::test_existing_repository_is_left_alone_without_update",
    "publish.license": "publishing/test_publish.py::test_unknown_licence_is_said_never_guessed",
    "publish.prompt": "publishing/test_publish.py::test_a_prompt_that_is_given_stands_in_the_card",
    "publish.message": "publishing/test_publish.py::test_the_commit_says_what_it_is_told_or_what_the_run_came_to",
    "serve.run": "serving/test_serve.py::test_a_busy_port",
    "serve.engine": "serving/test_serve.py::test_a_busy_port",
    "serve.host": "serving/test_serve.py::test_a_busy_port",
    "serve.allowed_hosts": "serving/test_serve.py::test_the_door_is_as_typed",
    "serve.allowed_origins": "serving/test_serve.py::test_the_door_is_as_typed",
    "serve.port": "serving/test_serve.py::test_a_busy_port",
    "serve.name": "serving/test_serve.py::test_a_busy_port",
    "serve.prompt": "serving/test_serve.py::test_a_busy_port",
    "serve.vllm_python": "serving/test_serve.py::test_host_port_and_engine_are_those_typed",
    "serve.vllm_arguments": "serving/test_serve.py::test_vllm_gets_everything_that_was_typed",
    "compare.runs": "sweeps/test_compare.py::test_runs_may_be_typed_as_a_list",
    "compare.metric": "sweeps/test_compare.py::test_two_runs_typed_by_their_folders",
    "compare.score": "sweeps/test_compare.py::test_two_runs_typed_by_their_folders",
    "compare.output": "sweeps/test_compare.py::test_two_runs_typed_by_their_folders",
    "weights_and_biases.project": "trackers/test_wandb.py::test_an_offline_run_read_back",
    "weights_and_biases.entity": "trackers/test_wandb.py::test_an_offline_run_read_back",
    "weights_and_biases.tags": "trackers/test_wandb.py::test_an_offline_run_read_back",
    "weights_and_biases.offline": "trackers/test_wandb.py::test_an_offline_run_read_back",
    "mlflow.project": "trackers/test_mlflow.py::test_a_run_on_a_server_and_its_resume",
    "mlflow.uri": "trackers/test_mlflow.py::test_a_run_on_a_server_and_its_resume",
    "mlflow.tags": "trackers/test_mlflow.py::test_a_run_on_a_server_and_its_resume",
    "mlflow.offline": "trackers/test_mlflow.py::test_an_offline_run_does_not_ask_a_server_that_answers",
    "trackio.project": "trackers/test_trackio.py::test_a_run_in_the_local_database_and_its_resume",
    "trackio.space_id": "trackers/test_trackio.py::test_a_run_is_in_the_space_unless_it_is_offline",
    "trackio.tags": "trackers/test_trackio.py::test_a_run_in_the_local_database_and_its_resume",
    "trackio.offline": "trackers/test_trackio.py::test_a_run_is_in_the_space_unless_it_is_offline",
    "sweep.dir": "sweeps/test_sweep.py::test_from_sweep_to_answer_and_back",
    "sweep.metric": "sweeps/test_sweep_command.py::test_metric_and_score_reach_the_table_the_report_and_best_yaml",
    "sweep.score": "sweeps/test_sweep_command.py::test_metric_and_score_reach_the_table_the_report_and_best_yaml",
    "sweep.retry": "sweeps/test_sweep.py::test_from_sweep_to_answer_and_back",
    "sweep.cancel": "sweeps/test_sweep_command.py::test_cancel_ends_the_jobs_that_live_and_names_what_it_cannot_end",
    "sweep.watch": "sweeps/test_sweep_command.py::test_ctrl_c_ends_the_watching_only",
    "sweep.report": "sweeps/test_sweep_command.py::test_a_retry_waits_where_its_launcher_waits_and_exits_with_1_if_one_fails_again",
    "train.name": "config/test_keys.py::test_the_default_cadence_is_every_step_and_the_end",
    "train.seed": "config/test_keys.py::test_a_step_has_the_examples_in_the_order_and_the_layout_that_were_typed",
    "train.run_dir": "config/test_keys.py::test_steps_are_logged_evaluated_and_saved_as_often_as_typed",
    "train.resume": "config/test_keys.py::test_resume_takes_up_another_run_and_resume_anyway_with_other_settings",
    "train.resume_despite_changes": "config/test_keys.py::test_resume_takes_up_another_run_and_resume_anyway_with_other_settings",
    "train.model": "config/test_options.py::test_a_named_model_is_built_from_its_yaml_alone",
    "train.peft": "models/test_adapters.py::test_an_adapter_has_a_learning_rate_of_its_own",
    "train.data": "config/test_keys.py::test_the_columns_typed_are_read",
    "train.schedule": "config/test_keys.py::test_the_learning_rate_follows_the_schedule_that_was_typed",
    "train.launcher": "config/test_command.py::test_a_launcher_makes_a_sweep_without_a_flag",
    "train.tracker": "config/test_keys.py::test_the_default_cadence_is_every_step_and_the_end",
    "train.sweeper": "sweeps/test_search.py::test_search_over_local_processes",
    "train.experiment": "config/test_options.py::test_the_guides_recipe",
    "TrainerSettings.batch_size": "config/test_keys.py::test_steps_are_logged_evaluated_and_saved_as_often_as_typed",
    "TrainerSettings.epochs": "config/test_keys.py::test_steps_are_logged_evaluated_and_saved_as_often_as_typed",
    "TrainerSettings.max_steps": "config/test_keys.py::test_the_default_cadence_is_every_step_and_the_end",
    "TrainerSettings.rows_per_microbatch": "config/test_keys.py::test_rows_of_a_microbatch_are_as_many_as_typed",
    "TrainerSettings.clip_grad_norm": "config/test_keys.py::test_the_first_update_is_that_of_adamw_with_what_was_typed",
    "TrainerSettings.neftune_alpha": "models/test_neftune.py::test_runs_of_every_layout_rank_count_and_resume_agree",
    "TrainerSettings.patience": "training/test_ending.py::test_a_run_that_has_lost_patience_is_finished_with_its_best_model",
    "TrainerSettings.max_hours": "training/test_ending.py::test_more_patience_or_more_hours_resume_a_finished_run",
    "TrainerSettings.export": "training/test_ending.py::test_the_best_model_and_its_scores_are_what_a_sweep_ranks",
    "TrainerSettings.log_every": "config/test_keys.py::test_steps_are_logged_evaluated_and_saved_as_often_as_typed",
    "TrainerSettings.eval_every": "config/test_keys.py::test_steps_are_logged_evaluated_and_saved_as_often_as_typed",
    "TrainerSettings.save_every": "config/test_keys.py::test_steps_are_logged_evaluated_and_saved_as_often_as_typed",
    "TrainerSettings.keep_checkpoints": "config/test_keys.py::test_steps_are_logged_evaluated_and_saved_as_often_as_typed",
    "TrainerSettings.on_failed_save": "config/test_keys.py::test_a_save_that_fails_stops_the_run_where_that_was_typed",
    "TrainerSettings.skip_nonfinite": "config/test_keys.py::test_a_number_that_is_none_is_skipped_as_often_as_typed",
    "TrainerSettings.compile": "config/test_keys.py::test_the_models_own_switches_reach_it",
    "TrainerSettings.activation_checkpointing": "config/test_keys.py::test_the_models_own_switches_reach_it",
    "TrainerSettings.profile": "training/test_profile.py::test_a_run_s_profile_is_of_four_steps_and_linked_in_its_report",
    "TrainerSettings.deterministic": "config/test_keys.py::test_the_models_own_switches_reach_it",
    "EvaluationSettings.num_answers": "config/test_keys.py::test_answers_are_as_many_and_as_long_as_typed",
    "EvaluationSettings.max_new_tokens": "config/test_keys.py::test_answers_are_as_many_and_as_long_as_typed",
    "EvaluationSettings.batch_size": "config/test_keys.py::test_the_models_own_switches_reach_it",
    "EvaluationSettings.gather": "config/test_keys.py::test_the_models_own_switches_reach_it",
    "Data.path": "config/test_keys.py::test_rows_are_read_kept_and_held_out_as_typed",
    "Data.split": "config/test_keys.py::test_the_hub_is_asked_for_what_was_typed",
    "Data.subset": "config/test_keys.py::test_the_hub_is_asked_for_what_was_typed",
    "Data.revision": "config/test_keys.py::test_the_hub_is_asked_for_what_was_typed",
    "Data.val_path": "config/test_keys.py::test_rows_are_as_long_and_as_many_as_the_longest_example_asks",
    "Data.val_split": "config/test_keys.py::test_the_hub_is_asked_for_what_was_typed",
    "Data.val_examples": "config/test_keys.py::test_rows_are_read_kept_and_held_out_as_typed",
    "Data.limit": "config/test_keys.py::test_rows_are_read_kept_and_held_out_as_typed",
    "Data.on_error": "config/test_keys.py::test_rows_are_read_kept_and_held_out_as_typed",
    "Data.control_tokens": "config/test_keys.py::test_conversations_are_worded_as_typed",
    "Data.max_length": "config/test_keys.py::test_long_examples_are_treated_as_typed",
    "Data.overlong": "config/test_keys.py::test_long_examples_are_treated_as_typed",
    "Data.layout": "config/test_keys.py::test_a_step_has_the_examples_in_the_order_and_the_layout_that_were_typed",
    "Data.row_length": "config/test_keys.py::test_a_step_has_the_examples_in_the_order_and_the_layout_that_were_typed",
    "Data.group_by_prefix": "config/test_keys.py::test_a_step_has_the_examples_in_the_order_and_the_layout_that_were_typed",
    "Data.shuffle": "config/test_keys.py::test_a_step_has_the_examples_in_the_order_and_the_layout_that_were_typed",
    "Data.num_workers": "config/test_keys.py::test_the_hub_is_asked_for_what_was_typed",
    "Chat.supervise": "config/test_keys.py::test_the_turns_and_the_template_typed_are_learned",
    "Chat.turns": "config/test_keys.py::test_conversations_are_worded_as_typed",
    "Chat.reasoning": "config/test_keys.py::test_conversations_are_worded_as_typed",
    "Chat.date": "config/test_keys.py::test_conversations_are_worded_as_typed",
    "Chat.template_path": "config/test_keys.py::test_the_turns_and_the_template_typed_are_learned",
    "Chat.template_kwargs": "config/test_keys.py::test_conversations_are_worded_as_typed",
    "Squad.unanswerable": "config/test_keys.py::test_the_word_typed_is_learned_where_there_is_no_answer",
    "Instruction.instruction": "config/test_keys.py::test_the_instructions_columns_typed_are_read",
    "Instruction.input": "config/test_keys.py::test_the_instructions_columns_typed_are_read",
    "Instruction.output": "config/test_keys.py::test_the_instructions_columns_typed_are_read",
    "Instruction.with_input": "config/test_keys.py::test_the_instructions_columns_typed_are_read",
    "Instruction.without_input": "config/test_keys.py::test_the_instructions_columns_typed_are_read",
    "Chat.columns": "config/test_keys.py::test_the_names_of_columns_typed_are_read",
    "Squad.columns": "config/test_keys.py::test_the_names_of_columns_typed_are_read",
    "Gsm8k.columns": "config/test_keys.py::test_the_names_of_columns_typed_are_read",
    "Instruction.columns": "config/test_keys.py::test_the_names_of_columns_typed_are_read",
    "PromptCompletion.columns": "config/test_keys.py::test_the_names_of_columns_typed_are_read",
    "PlainText.columns": "config/test_keys.py::test_the_names_of_columns_typed_are_read",
    "FromColumns.prompt": "config/test_keys.py::test_a_wording_of_ones_own_is_made_of_columns",
    "FromColumns.completion": "config/test_keys.py::test_a_wording_of_ones_own_is_made_of_columns",
    "FromColumns.system": "config/test_keys.py::test_a_wording_of_ones_own_is_made_of_columns",
    "FromColumns.messages": "config/test_keys.py::test_a_wording_of_ones_own_is_made_of_columns",
    "FromColumns.into": "config/test_keys.py::test_a_wording_of_ones_own_is_made_of_columns",
    "FromColumns.tools": "config/test_keys.py::test_a_wording_of_ones_own_is_made_of_columns",
    "FromColumns.supervise": "config/test_keys.py::test_a_wording_of_ones_own_is_made_of_columns",
    "FromColumns.template_path": "config/test_keys.py::test_a_wording_of_ones_own_is_made_of_columns",
    "FromColumns.template_kwargs": "config/test_keys.py::test_a_conversation_of_ones_own_wording_is_worded_as_one_of_chat",
    "FromColumns.turns": "config/test_keys.py::test_a_wording_of_ones_own_is_made_of_columns",
    "FromColumns.reasoning": "config/test_keys.py::test_a_conversation_of_ones_own_wording_is_worded_as_one_of_chat",
    "FromColumns.date": "config/test_keys.py::test_a_conversation_of_ones_own_wording_is_worded_as_one_of_chat",
    "FromColumns.group_chars": "config/test_keys.py::test_a_wording_of_ones_own_is_made_of_columns",
    "FromColumns.columns": "config/test_keys.py::test_a_wording_of_ones_own_is_made_of_columns",
    "Data.unknown": "config/test_keys.py::test_keys_that_nobody_reads_are_counted_where_that_was_typed",
    "Mixture.sources": "config/test_keys.py::test_a_mixture_is_weighed_cut_and_laid_out_as_typed",
    "Mixture.weights": "config/test_keys.py::test_a_mixture_is_weighed_cut_and_laid_out_as_typed",
    "Mixture.max_length": "config/test_keys.py::test_a_mixture_is_weighed_cut_and_laid_out_as_typed",
    "Mixture.overlong": "config/test_keys.py::test_a_mixture_is_weighed_cut_and_laid_out_as_typed",
    "Mixture.layout": "config/test_keys.py::test_a_mixture_is_weighed_cut_and_laid_out_as_typed",
    "Mixture.row_length": "config/test_keys.py::test_a_mixture_is_weighed_cut_and_laid_out_as_typed",
    "Mixture.group_by_prefix": "config/test_keys.py::test_a_mixture_is_weighed_cut_and_laid_out_as_typed",
    "Mixture.shuffle": "config/test_keys.py::test_a_mixture_is_weighed_cut_and_laid_out_as_typed",
    "PromptCompletion.prompt": "config/test_keys.py::test_the_columns_typed_are_read",
    "PromptCompletion.completion": "config/test_keys.py::test_the_columns_typed_are_read",
    "PromptCompletion.group_chars": "config/test_keys.py::test_the_columns_typed_are_read",
    "PlainText.column": "config/test_keys.py::test_the_columns_typed_are_read",
    "PlainText.group_chars": "config/test_keys.py::test_the_columns_typed_are_read",
    "Local.processes_per_node": "sweeps/test_points_composed.py::test_the_local_launcher_runs_points_as_told",
    "Local.parallel_points": "launchers/test_launchers.py::test_a_local_driver_that_is_told_to_end_ends_its_points_which_save_first",
    "Local.fail_fast": "launchers/test_local.py::test_with_fail_fast_a_failed_point_ends_the_others",
    "Slurm.fail_fast": "sweeps/test_points_composed.py::test_with_fail_fast_one_failed_point_cancels_the_others",
    "Local.dry_run": "sweeps/test_search_command.py::test_a_search_that_cannot_be_is_refused",
    "Slurm.nodes": "launchers/test_launchers.py::test_every_option_reaches_the_script",
    "Slurm.processes_per_node": "launchers/test_launchers.py::test_every_option_reaches_the_script",
    "Slurm.timeout_min": "launchers/test_launchers.py::test_every_option_reaches_the_script",
    "Slurm.signal_delay_s": "launchers/test_launchers.py::test_every_option_reaches_the_script",
    "Slurm.gpus_per_node": "launchers/test_launchers.py::test_every_option_reaches_the_script",
    "Slurm.cpus_per_task": "launchers/test_launchers.py::test_every_option_reaches_the_script",
    "Slurm.mem_gb": "launchers/test_launchers.py::test_every_option_reaches_the_script",
    "Slurm.partition": "launchers/test_launchers.py::test_every_option_reaches_the_script",
    "Slurm.account": "launchers/test_launchers.py::test_every_option_reaches_the_script",
    "Slurm.qos": "launchers/test_launchers.py::test_every_option_reaches_the_script",
    "Slurm.constraint": "launchers/test_launchers.py::test_every_option_reaches_the_script",
    "Slurm.array_parallelism": "launchers/test_launchers.py::test_every_option_reaches_the_script",
    "Slurm.setup": "launchers/test_launchers.py::test_every_option_reaches_the_script",
    "Slurm.python": "launchers/test_launchers.py::test_every_option_reaches_the_script",
    "Slurm.sbatch": "launchers/test_launchers.py::test_every_option_reaches_the_script",
    "Slurm.max_stalled": "sweeps/test_points_composed.py::test_points_are_queued_with_the_options_of_the_command_line_and_not_waited_for",
    "Slurm.device": "estimating/test_estimate.py::test_points_that_do_not_fit_are_named_before_anything_is_queued",
    "Slurm.check_memory": "estimating/test_estimate.py::test_points_that_do_not_fit_are_named_before_anything_is_queued",
    "Slurm.wait": "sweeps/test_points_composed.py::test_a_second_command_adds_to_the_sweep_in_its_directory",
    "Slurm.dry_run": "launchers/test_launchers.py::test_dry_run_needs_no_slurm_and_leaves_nothing",
    "Model.name_or_path": "config/test_keys.py::test_the_models_revision_typed_is_loaded",
    "Model.learning_rate": "config/test_keys.py::test_the_learning_rate_follows_the_schedule_that_was_typed",
    "Adapter.rank": "distributed/test_adapters.py::test_every_step_is_that_of_peft_in_a_plain_loop",
    "Adapter.alpha": "distributed/test_adapters.py::test_every_step_is_that_of_peft_in_a_plain_loop",
    "Adapter.targets": "distributed/test_adapters.py::test_every_step_is_that_of_peft_in_a_plain_loop",
    "Adapter.modules_to_save": "distributed/test_adapters.py::test_every_step_is_that_of_peft_in_a_plain_loop",
    "Adapter.rslora": "distributed/test_adapters.py::test_every_step_is_that_of_peft_in_a_plain_loop",
    "Adapter.dora": "distributed/test_adapters.py::test_every_step_is_that_of_peft_in_a_plain_loop",
    "Adapter.quantize": "distributed/test_adapters.py::test_every_step_is_that_of_peft_in_a_plain_loop",
    "Adapter.dropout": "models/test_adapters.py::test_a_value_that_cannot_be_is_refused_with_one_that_can",
    "Adapter.learning_rate": "models/test_adapters.py::test_an_adapter_has_a_learning_rate_of_its_own",
    "NoAdapter.learning_rate": "models/test_adapters.py::test_an_adapter_has_a_learning_rate_of_its_own",
    "Model.adapter_learning_rate": "models/test_adapters.py::test_an_adapter_has_a_learning_rate_of_its_own",
    "Model.tokenizer": "config/test_keys.py::test_the_tokenizer_typed_reads_the_data_and_goes_with_the_model",
    "Model.init": "config/test_keys.py::test_random_weights_are_the_seeds_and_have_the_architecture_typed",
    "Model.attention": "config/test_keys.py::test_the_models_own_switches_reach_it",
    "Model.trust_remote_code": "models/test_load.py::test_revision_and_trust_reach_the_hub_with_all_that_is_loaded",
    "Model.tokenizer_revision": "trust/test_silent_change.py::test_a_tokenizer_of_another_repository_has_a_revision_of_its_own",
    "Model.revision": "config/test_keys.py::test_the_models_revision_typed_is_loaded",
    "Model.add_tokens": "models/test_vocabulary.py::test_special_tokens_and_words",
    "Model.add_words": "models/test_vocabulary.py::test_special_tokens_and_words",
    "Model.new_rows_from": "models/test_vocabulary.py::test_a_row_that_no_token_had_is_begun_anew_and_one_that_a_token_has_is_not",
    "Model.vocabulary_multiple": "models/test_vocabulary.py::test_a_tokenizer_that_is_larger_than_the_model",
    "Model.architecture": "config/test_keys.py::test_random_weights_are_the_seeds_and_have_the_architecture_typed",
    "adamw.lr": "config/test_keys.py::test_the_first_update_is_that_of_adamw_with_what_was_typed",
    "adamw.weight_decay": "config/test_keys.py::test_the_first_update_is_that_of_adamw_with_what_was_typed",
    "adamw.betas": "config/test_keys.py::test_the_first_update_is_that_of_adamw_with_what_was_typed",
    "adamw.eps": "config/test_keys.py::test_the_first_update_is_that_of_adamw_with_what_was_typed",
    "fsdp2.param_dtype": "config/test_keys.py::test_computing_in_bfloat16_is_done_told_and_exported",
    "fsdp2.replicate": "parallel/test_fsdp2.py::test_copies_divide_the_ranks",
    "fsdp2.reshard_after_forward": "parallel/test_options.py::test_fsdp2_hands_on_what_is_typed",
    "fsdp2.prefetch": "parallel/test_options.py::test_fsdp2_hands_on_what_is_typed",
    "hsdp.replicate": "parallel/test_options.py::test_hsdp_hands_on_what_is_typed",
    "hsdp.param_dtype": "parallel/test_options.py::test_hsdp_hands_on_what_is_typed",
    "hsdp.reshard_after_forward": "parallel/test_options.py::test_hsdp_hands_on_what_is_typed",
    "hsdp.prefetch": "parallel/test_options.py::test_hsdp_hands_on_what_is_typed",
    "hsdp.cpu_offload": "parallel/test_options.py::test_hsdp_hands_on_what_is_typed",
    "ddp.param_dtype": "parallel/test_options.py::test_ddp_hands_on_what_is_typed",
    "ddp.cpu_offload": "parallel/test_options.py::test_ddp_hands_on_what_is_typed",
    "fsdp2_tp.tensor": "parallel/test_options.py::test_fsdp2_tp_hands_on_what_is_typed",
    "fsdp2_tp.replicate": "parallel/test_options.py::test_fsdp2_tp_hands_on_what_is_typed",
    "fsdp2_tp.param_dtype": "parallel/test_options.py::test_fsdp2_tp_hands_on_what_is_typed",
    "fsdp2_tp.reshard_after_forward": "parallel/test_options.py::test_fsdp2_tp_hands_on_what_is_typed",
    "fsdp2_tp.prefetch": "parallel/test_options.py::test_fsdp2_tp_hands_on_what_is_typed",
    "fsdp2_tp.cpu_offload": "parallel/test_options.py::test_fsdp2_tp_hands_on_what_is_typed",
    "adamw_bf16.lr": "training/test_optimisers.py::test_bfloat16_weights_follow_float32_ones",
    "adamw_bf16.weight_decay": "training/test_optimisers.py::test_bfloat16_weights_follow_float32_ones",
    "adamw_bf16.betas": "training/test_optimisers.py::test_bfloat16_weights_follow_float32_ones",
    "adamw_bf16.eps": "training/test_optimisers.py::test_bfloat16_weights_follow_float32_ones",
    "adamw_bf16.master_dtype": "training/test_optimisers.py::test_bfloat16_weights_are_what_the_optimiser_asks_for",
    "adamw_8bit.lr": "training/test_optimisers.py::test_8_bits_are_those_of_torchao",
    "adamw_8bit.weight_decay": "training/test_optimisers.py::test_8_bits_are_those_of_torchao",
    "adamw_8bit.betas": "training/test_optimisers.py::test_8_bits_are_those_of_torchao",
    "adamw_8bit.eps": "training/test_optimisers.py::test_8_bits_are_those_of_torchao",
    "muon.lr": "training/test_optimisers.py::test_muon_is_torchs_and_the_rest_adamw",
    "muon.weight_decay": "training/test_optimisers.py::test_muon_is_torchs_and_the_rest_adamw",
    "muon.momentum": "training/test_optimisers.py::test_muon_is_torchs_and_the_rest_adamw",
    "muon.betas": "training/test_optimisers.py::test_muon_is_torchs_and_the_rest_adamw",
    "muon.eps": "training/test_optimisers.py::test_muon_is_torchs_and_the_rest_adamw",
    "train.optim": "parallel/test_division.py::test_an_optimiser_that_cannot_run_is_refused_before_data_and_weights",
    "train.parallel": "parallel/test_division.py::test_bad_sizes_are_refused_before_anything_is_loaded",
    "constant.warmup_steps": "config/test_keys.py::test_the_learning_rate_follows_the_schedule_that_was_typed",
    "cosine.warmup_steps": "config/test_keys.py::test_the_learning_rate_follows_the_schedule_that_was_typed",
    "cosine.final_ratio": "config/test_keys.py::test_the_learning_rate_follows_the_schedule_that_was_typed",
    "linear.warmup_steps": "config/test_keys.py::test_the_learning_rate_follows_the_schedule_that_was_typed",
    "linear.final_ratio": "config/test_keys.py::test_the_learning_rate_follows_the_schedule_that_was_typed",
    "wsd.warmup_steps": "config/test_keys.py::test_the_learning_rate_follows_the_schedule_that_was_typed",
    "wsd.final_ratio": "config/test_keys.py::test_the_learning_rate_follows_the_schedule_that_was_typed",
    "wsd.decay_ratio": "config/test_keys.py::test_the_learning_rate_follows_the_schedule_that_was_typed",
    "sweeper.num_trials": "sweeps/test_search.py::test_search_over_local_processes",
    "sweeper.parallel_trials": "sweeps/test_search.py::test_search_over_local_processes",
}

# Options whose test sets them in a loop or from a table, where the source does not show the value: the name must stand
# in the test.
SET_IN_A_TABLE = {
    **dict.fromkeys(
        [f"{command}.trust" for command in ("evaluate", "generate", "serve", "publish", "export", "sweep")],
        "trust/test_run_folder.py::test_the_word_of_the_command_line_reaches_what_may_run",
    ),
    "evaluate.num_fewshot": "scoring/test_evaluate.py::test_each_setting_of_a_task_reaches_the_harness",
    "generate.seed": "inference/test_generate.py::test_each_setting_of_sampling_reaches_the_answer",
    "generate.fields": "inference/test_generate.py::test_the_answer_is_that_of_transformers",
    "fsdp2.cpu_offload": "parallel/test_fsdp2.py::test_every_block_and_then_the_root_are_sharded_as_the_options_say",
    "sweeper.metric": "sweeps/test_search_command.py::test_every_key_of_the_sweeper_reaches_the_search",
    "sweeper.seed": "sweeps/test_search_command.py::test_every_key_of_the_sweeper_reaches_the_search",
    "sweeper.startup_trials": "sweeps/test_search_command.py::test_every_key_of_the_sweeper_reaches_the_search",
    "sweeper.pruner": "sweeps/test_search_command.py::test_every_key_of_the_sweeper_reaches_the_search",
    "sweeper.min_steps": "sweeps/test_search_command.py::test_every_key_of_the_sweeper_reaches_the_search",
    "sweeper.reduction_factor": "sweeps/test_search_command.py::test_every_key_of_the_sweeper_reaches_the_search",
}


@pytest.mark.parametrize("option", schema())
def test_a_test_sets_the_option_off_its_default(option: str) -> None:
    keys, default = " or ".join(sorted(schema()[option].keys)), schema()[option].defaults[0]
    if option in SET_IN_A_TABLE:
        file, _, test = SET_IN_A_TABLE[option].partition("::")
        assert option.rpartition(".")[2] in ast.unparse(definitions(TESTS / file)[test]) + constants(TESTS / file)
        return
    assert option in OFF_DEFAULT, (
        f"no test is named for {option}. Write one that sets {keys} to another value than {default!r} and fails where "
        "that is ignored, and name it in OFF_DEFAULT"
    )
    file, _, test = OFF_DEFAULT[option].partition("::")
    path = TESTS / file
    assert path.is_file() and test in definitions(path), f"{OFF_DEFAULT[option]}, named for {option}, is not there"
    assert is_set_by(schema()[option], what_is_set(path, test)), (
        f"{OFF_DEFAULT[option]} is named for {option}, but sets {keys} to nothing but its default, {default!r}"
    )


def test_the_table_names_no_option_that_is_gone() -> None:
    assert sorted({*OFF_DEFAULT, *SET_IN_A_TABLE} - set(schema())) == [] and not OFF_DEFAULT.keys() & SET_IN_A_TABLE


def constants(path: Path) -> str:
    """Return the assignments at the top of a test's file, as source."""
    return "\n".join(ast.unparse(node) for node in ast.parse(path.read_text()).body if isinstance(node, ast.Assign))


SOURCE = """
'''A test of optim.eps=1.'''
import pytest

MORE = {"trainer.log_every": 7, "trainer.epochs": 1}
NUMBER = 3

@pytest.fixture
def config():
    return compose("optim.lr=1e-3", *MORE)

@pytest.mark.parametrize("layout", ["data.layout=packed"])
def test_sets(config, layout):
    '''Of trainer.save_every=2.'''  # and optim.eps=1
    "optim.betas=[0,1]"
    compose(config, f"seed={NUMBER}", "schedule=wsd", "schedule.decay_ratio=0.5", name("wsd"))
    assert "trainer.eval_every=2" in config
    TrainerSettings(batch_size=4, keep_checkpoints=2)

def test_another():
    compose("optim.weight_decay=0.5")
"""


def test_only_what_a_test_itself_sets_counts(tmp_path: Path) -> None:
    """A table that words in a comment could satisfy would prove nothing."""
    file = tmp_path / "test_sample.py"
    file.write_text(SOURCE)
    sets = what_is_set(file, "test_sets")
    found = {name for name, option in schema().items() if is_set_by(option, sets)}
    assert found == {
        *("adamw.lr", "TrainerSettings.log_every", "Data.layout", "train.seed", "train.schedule", "wsd.decay_ratio"),
        "TrainerSettings.batch_size",
    }
