"""The tests of the marker `card`: what a card is asked first, where its time is short.

Each format, tiles that are not full, repeats by their bits, and every op in a CUDA graph: about 140
of the `gpu` tests, chosen so that few kernels are compiled. The table stands here, not at the
tests: how many there are, and that every op has some, is one thing to look at.
"""

import re

_LOW = "(bfloat16|float16)"
_ALL = "(float32|bfloat16|float16)"
# `shortlist_select` compiles nothing on a card: its graphs are asked alone.
# File and test, then a pattern of the whole id in brackets without `-cuda`; None is all of them.
TESTS: dict[str, str | None] = {
    "test_graphs.py::test_two_replays_are_two_eager_calls": None,
    "test_bce_step.py::test_by_hand": None,
    "test_bce_step.py::test_no_worse_than_torch_on_every_shape": f"100x2051x100-{_ALL}"
    f"|257x1537x384-{_ALL}|1x1x1-bfloat16|0x37x16-bfloat16|5x0x7-bfloat16",
    "test_bce_step.py::test_no_worse_than_torch_with_every_option": "(bias|adam bf16|kahan adamw)"
    "-bfloat16",
    "test_bce_step_bits.py::test_sgd_bits": f"64x3001x100-{_ALL}",
    "test_bce_step_bits.py::test_repeats_change_nothing_on_the_card": None,
    "test_bce_step_bits.py::test_two_shards_are_the_whole_to_the_bit_where_sums_are_exact": None,
    "test_bce_step_skip.py::test_a_graph_replays_the_choice": None,
    "test_bce_step_skip.py::test_bits_where_sums_are_exact": "(bfloat16|float8_e4m3fn)",
    "test_bce_pass.py::test_the_bits_of_tritons_pass_on_the_card": None,
    "test_bce_pass.py::test_repeats_and_a_graph_change_nothing_on_the_card": None,
    "test_bce_pass.py::test_a_batch_that_is_not_finite_touches_nothing_on_the_card": None,
    "test_bce_pass.py::test_what_it_does_not_serve_is_refused_on_the_card": None,
    "test_bce_loss.py::test_by_hand": None,
    "test_bce_loss.py::test_no_worse_than_torch": f"100x2051x100-{_ALL}|257x1537x384-bfloat16",
    "test_bce_loss.py::test_gradient_bits_where_every_sum_is_exact": None,
    "test_fp8.py::test_no_worse_than_torch": r"\(100, 2051, 100\)-(sgd|adam)"
    r"|\(65, 1537, 384\)-(sgd|momentum)",
    "test_fp8.py::test_exact_sums_give_the_bits_of_the_reference": None,
    "test_fp8.py::test_the_kernels_decode_every_code": None,
    "test_fp8.py::test_loss_and_topk_on_the_decoded_table": None,
    "test_matmul_topk.py::test_by_hand": None,
    "test_matmul_topk.py::test_no_worse_than_torch": f"65x2051x100-{_ALL}|257x1537x384-bfloat16"
    "|0x37x16-bfloat16",
    "test_matmul_topk.py::test_ties_take_the_lower_row": None,
    "test_matmul_topk.py::test_exclusions": None,
    "test_matmul_topk.py::test_nan_scores_are_never_returned": None,
    "test_cluster_step.py::test_by_hand": None,
    "test_cluster_step.py::test_no_worse_than_torch_on_every_shape": f"shortlist-{_ALL}"
    "|(wide|level 0|some large|ragged|empty clusters)-bfloat16",
    "test_cluster_step.py::test_no_worse_than_torch_with_every_option": "(adam bf16|adam by rows)"
    "-bfloat16",
    "test_cluster_step_bits.py::test_one_cluster_of_all_rows_is_bce_step": None,
    "test_cluster_step_fp8.py::test_exact_sums_give_the_bits_of_the_reference": None,
    "test_sparse_update.py::test_adam_by_hand": None,
    "test_sparse_update.py::test_no_worse_than_torch": f"(sgd|adam)-{_ALL}-70x300x385",
    "test_sparse_update_bits.py::test_repeats_change_nothing_on_the_card": None,
    "test_sparse_update_bits.py::test_bits": f"adam-{_ALL}-65x100x100",
    "test_bag_step.py::test_by_hand": None,
    "test_bag_step.py::test_bits": f"adam-{_ALL}",
    "test_rescale_rows.py::test_the_reference_bit_for_bit": None,
    "test_shortlist_matmul.py::test_by_hand": None,
    "test_shortlist_matmul.py::test_no_worse_than_torch": f"33x270x5000x100-{_LOW}-.*",
    "test_shortlist_matmul_fp8.py::test_by_hand": None,
}
FILES = tuple(dict.fromkeys(name.split("::")[0] for name in TESTS))


def chosen(file: str, name: str) -> str | None:
    """The entry of the table that a test of a card falls under, by file and whole name."""
    function, _, rest = name.partition("[")
    entry = f"{file}::{function}"
    pattern = TESTS.get(entry, "")
    if pattern is None:
        return entry
    inside = re.sub(r"^cuda-|-?cuda$", "", rest.removesuffix("]"))
    return entry if entry in TESTS and re.fullmatch(pattern, inside) else None
