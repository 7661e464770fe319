"""The test of each option of the commands other than `train`: file::test, from tests/."""

from xmlkernels.cli import compare, ensemble, export, neighbours, predict, report, serve
from xmlkernels.data.prepare import PrepareConfig
from xmlkernels.data.tables.options import Tables
from xmlkernels.training import auto, planned_sizes, ranker, tree
from xmlkernels.training.calibrating import CalibrateConfig
from xmlkernels.training.relabel import LabelsConfig

HERE = "fields/test_command_options.py::"
_PREDICT = "predict/test_predict.py::"
_RANKED = "predict/test_ranked.py::"
_TREE = "tree/test_command.py::"
_EXPORT = "cli/test_export.py::"
_ENSEMBLE = "cli/test_ensemble.py::"
_NEIGHBOURS = "cli/test_neighbours.py::"
_RANKER = "cli/test_ranker_command.py::"
_PLAN = "cli/test_plan.py::"
_LABELS = "training/test_relabel.py::"
_CALIBRATION = "predict/test_calibration.py::"
_AUTO = "cli/test_train_auto.py::"
_TABLES = "data/test_tables.py::"
_SERVE = "serve/test_options.py::"
_PREPARE = "data/test_prepare.py::"
_WITH_MODEL = HERE + "test_what_a_ranker_of_a_model_is_told"
_WITH_TREE = HERE + "test_what_a_ranker_of_a_tree_is_told"
_MADE_WITH = HERE + "test_what_a_tree_is_made_with"


def _all(test: str, *names: str) -> dict[str, str]:
    return dict.fromkeys(names, test)


HELD: dict[type, dict[str, str]] = {
    predict.Options: {
        **_all(
            HERE + "test_what_predict_asks_of_a_model",
            "checkpoint",
            "text",
            "top_k",
            "batch",
            "which",
            "device",
            "threads",
        ),
        **_all(_PREDICT + "test_files_in_and_out", "input", "output"),
        "model": "predict/test_folders.py::test_predict_takes_the_folder_of_any_model",
        "filter": "predict/test_predict_filters.py::test_filter_pairs",
        "allow": "predict/test_limits.py::test_the_files_of_the_command",
        "exclude": "predict/test_limits.py::test_the_files_of_the_command",
        "threshold": _CALIBRATION + "test_predict_cuts_at_thresholds",
        "propensity": _CALIBRATION + "test_predict_ranks_by_propensity",
        "ranker": _RANKED + "test_a_forest_is_the_mean_of_its_rankers",
        "ranker_input": _RANKED + "test_texts_of_the_test_split_are_answered_as_the_split_was",
        **_all(_RANKED + "test_one_text", "latency", "ranker_text"),
    },
    LabelsConfig: {
        **_all(_LABELS + "test_added_and_dropped", "run", "output", "add", "documents", "drop"),
        **_all(_LABELS + "test_the_sample_and_its_batches", "sample", "batch"),
        **_all(
            _LABELS + "test_frozen_rows_keep_their_bits_while_others_are_trained",
            "epochs",
            "lr",
            "freeze",
        ),
    },
    CalibrateConfig: {
        **_all(_CALIBRATION + "test_the_command_finds_what_training_found", "folder", "checkpoint"),
        **_all(
            _CALIBRATION + "test_options_of_the_command",
            "dataset",
            "bands",
            "method",
            "precision",
            "batch",
        ),
    },
    serve.Options: {
        **_all(_SERVE + "test_where_it_listens_and_what_it_is_called", "host", "port", "name"),
        **_all(
            _SERVE + "test_bounds_and_defaults",
            "queue",
            "max_texts",
            "max_bytes",
            "k",
            "max_k",
            "uri_prefix",
        ),
        **_all(_SERVE + "test_how_the_queue_is_told", "max_batch", "max_wait_ms"),
        **_all(
            _SERVE + "test_which_model_is_served",
            "folder",
            "checkpoint",
            "which",
            "device",
            "threads",
        ),
        **_all(_SERVE + "test_neighbours_are_those_of_a_dataset", "dataset", "neighbours"),
    },
    planned_sizes.PlanConfig: {
        **_all(
            _PLAN + "test_sizes_that_are_given",
            "labels",
            "dim",
            "validation",
            "test",
            "longest",
            "words",
            "positives",
            "vocabulary",
        ),
        **_all(_PLAN + "test_processes_share_the_table", "gpus"),
        **_all(_PLAN + "test_what_does_not_fit_is_mended", "memory", "host_memory"),
        **_all(_PLAN + "test_rates_and_a_price", "copy_rate", "mm_rate", "wire_rate", "price"),
        "store_rate": _PLAN + "test_a_stored_table_is_where_it_is_said_to_be",
        "run": _PLAN + "test_flags_of_the_run_are_planned_with",
    },
    tree.TreeConfig: {
        **_all(
            _MADE_WITH,
            "dataset",
            "output",
            "ngrams",
            "terms",
            "common",
            "keep",
            "graph",
            "visits",
            "restart",
            "top",
            "most_documents",
            "prune",
            "label_vectors",
            "starts",
            "tolerance",
            "seed",
            "threads",
        ),
        **_all(_TREE + "test_made_once_for_each_content", "depths", "clusters", "overwrite"),
        "features": _TREE + "test_given_features_and_label_vectors",
        "label_text": _TREE + "test_label_texts_by_an_encoder",
        "plot": _TREE + "test_what_the_folder_gets",
    },
    ranker.RankerConfig: {
        **_all(
            _WITH_MODEL,
            "dataset",
            "output",
            "checkpoint",
            "longest",
            "min_df",
            "max_features",
            "shortlist",
            "device",
            "embedding_weight",
            "tfidf_weight",
            "training",
            "threads",
            "share",
            "blend",
            "top_k",
        ),
        **_all(_WITH_TREE, "tree", "beam"),
        **_all(_RANKER + "test_given_share_and_no_embedding", "tfidf", "embedding"),
        **_all(
            _RANKER + "test_texts_and_features_from_files", "one_vs_all", "features", "test_text"
        ),
        **_all(
            _RANKER + "test_wrong_texts_are_told_before_the_model_runs",
            "train_text",
            "validation_text",
        ),
        "label_text": _RANKER + "test_label_texts_are_documents_of_their_labels",
        "report": "training/test_linear.py::test_the_command_trains_predicts_and_says_how",
        "show": "training/test_linear.py::test_the_command_trains_predicts_and_says_how",
    },
    neighbours.Options: {
        **_all(
            _NEIGHBOURS + "test_scores_are_shares_of_the_votes",
            "dataset",
            "output",
            "split",
            "neighbours",
            "power",
            "top_k",
        ),
        "label_text": _NEIGHBOURS + "test_label_texts_vote_for_all_but_their_own_documents",
    },
    export.Options: {
        **_all(
            HERE + "test_what_export_asks_of_a_model",
            "checkpoint",
            "output",
            "what",
            "batch",
            "which",
            "device",
            "top_k",
        ),
        "index": _EXPORT + "test_an_index_of_the_labels",
        "format": _EXPORT + "test_a_quantized_run_is_loaded_and_measured",
        "normalize": _EXPORT + "test_label_vectors",
        "dataset": _EXPORT + "test_shortlists_are_cut",
    },
    ensemble.Options: {
        **_all(
            HERE + "test_scores_of_another_split_and_few_labels",
            "files",
            "dataset",
            "split",
            "output",
            "top_k",
        ),
        **_all(_ENSEMBLE + "test_sum_is_that_of_dense_matrices", "weights", "sum"),
        "calibrated": _CALIBRATION + "test_sums_on_one_scale",
        "scores": _ENSEMBLE + "test_probabilities_and_logits_of_the_same_scores_agree",
        **_all(_ENSEMBLE + "test_a_sum_that_is_learned", "learn", "learn_dataset", "learn_split"),
        "threshold": _ENSEMBLE + "test_labels_that_reach_a_threshold",
        "propensity": _ENSEMBLE + "test_propensity_multiplies_the_probabilities_of_the_sum",
        "show": _ENSEMBLE + "test_every_metric_is_shown_with_its_sentence",
        "metrics": _ENSEMBLE + "test_output_holds_logits_that_measure_the_same",
    },
    compare.Options: {
        **_all("report/test_compare.py::test_the_command", "runs", "dataset", "json")
    },
    report.Options: {
        **_all(
            "report/test_reports.py::test_later_elsewhere_and_of_another_dataset",
            "run",
            "dataset",
        )
    },
    PrepareConfig: {
        **_all(
            HERE + "test_what_prepare_reads_beside_the_texts",
            "validation_filter",
            "label_format",
            "propensity_a",
            "validation_text",
            "validation_labels",
            "num_labels",
            "merge_duplicates",
        ),
        **_all(
            _PREPARE + "test_text_files",
            "output",
            "tokenizer",
            "train_text",
            "train_labels",
            "test_text",
            "test_labels",
            "label_text",
            "keep_texts",
            "max_length",
        ),
        **_all(_PREPARE + "test_lf_json", "source", "fields"),
        **_all(_PREPARE + "test_unlabelled_documents", "unlabelled", "train_filter", "test_filter"),
        **_all(_PREPARE + "test_validation_share", "validation_share", "seed", "name"),
        **_all(_PREPARE + "test_propensity_is_never_guessed", "propensity", "propensity_b"),
        "token_maps": _PREPARE + "test_upstream_token_maps",
        "documents": _PREPARE + "test_built_in_corpus",
        "label_names": "data/test_prepare_bow.py::test_features_and_labels_apart",
        "overwrite": "data/test_prepare_again.py::test_other_inputs_need_overwrite",
        "remap_labels": "data/test_label_ids.py::test_far_apart_ids_are_refused_or_numbered_anew",
        "label_divider": "data/test_label_ids.py::test_divided_names",
        "tables": "data/test_table_refusals.py::test_a_table_or_raw_files",
    },
    auto.AutoConfig: {
        **_all(
            _AUTO + "test_a_table_becomes_a_model_that_answers_with_names",
            "tables",
            "output",
            "cache",
        ),
        **_all(
            _AUTO + "test_the_recipe_follows_from_documents_time_and_labels",
            "minutes",
            "recipe",
            "max_length",
        ),
        "validation_share": _AUTO + "test_a_tenth_is_held_back_where_nothing_else_splits",
        "unlabelled": _AUTO + "test_unlabelled_documents_are_left_out_of_training",
    },
    Tables: {
        "data": "cli/test_prepare_command.py::test_a_table_is_prepared_by_its_flags",
        **_all(
            _TABLES + "test_splits_by_files_and_by_a_column", "validation", "test", "split_column"
        ),
        **_all(
            _TABLES + "test_several_columns_of_the_text_are_joined_and_so_are_texts_to_predict",
            "text",
            "labels",
            "text_separator",
        ),
        "text_parts": "data/test_text_parts.py::"
        "test_a_word_of_one_column_is_another_than_the_same_word_of_the_next",
        "label_separator": _TABLES + "test_what_divides_labels_is_found_or_given",
        **_all(
            _TABLES + "test_names_of_labels_come_from_a_second_file",
            "label_file",
            "language",
            "all_labels",
        ),
        "test_share": _TABLES + "test_shares_are_drawn_by_a_hash_that_keeps_equal_texts_together",
        **_all(
            _TABLES + "test_a_format_that_the_name_hides_and_other_encodings",
            "format",
            "encoding",
            "repair_encoding",
        ),
        **_all(
            _TABLES + "test_csv_without_names_without_quotes_and_of_another_separator",
            "columns",
            "separator",
            "quotes",
        ),
    },
}
