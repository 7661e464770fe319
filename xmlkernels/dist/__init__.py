"""Several processes that train one model; nothing happens at world size 1.

The only caller of torch.distributed.

Every process draws the same global batch and encodes its own part of it (`part`). The vectors of
all parts are gathered (`gather_rows`). Each process takes the step of the whole batch on the rows
of the label table that it holds; the gradients of the vectors are then sums over all processes, of
which each has those of its own documents (`scatter_sum`), and the gradients of the encoder are
summed (`sum_gradients`). Where every process holds a copy of the table, each cuts the gradient of
its own vectors from the result. Either way the step is that of one process with the whole batch,
but for the order of additions. Labels are never sent: every process knows those of the whole batch.
Predictions are the best of what each process finds among its rows (`merge_topk`).

The encoder itself may lie in parts on all processes (`shard_module`): it is gathered part by part
where it is passed, and the gradients of its rows are summed where they belong.

What this process receives is counted (`traffic`) and known beforehand (`step_traffic`).
"""

from xmlkernels.dist.agreement import agree, agree_on_tensors
from xmlkernels.dist.group import (
    PATIENCE,
    ProcessLost,
    abreast,
    apart,
    board,
    launched,
    local_rank,
    missing,
    part,
    parts,
    rank,
    running,
    size,
    start,
    stop,
    when_lost,
)
from xmlkernels.dist.messages import (
    Scattered,
    ScatteredColumns,
    Vote,
    collect_rows,
    fill_rows,
    first_alone,
    from_first,
    gather_columns,
    gather_ragged,
    gather_rows,
    gather_texts,
    gather_together,
    merge_topk,
    scatter_sum,
    scatter_sums,
    sum_,
    sum_gradients,
    wait,
)
from xmlkernels.dist.sharded import (
    OwnRows,
    follow,
    is_sharded,
    own,
    own_parameter,
    own_range,
    rows_of_each,
    shard_module,
    take_gradients,
)
from xmlkernels.dist.wire import counted, step_traffic, traffic

__all__ = [
    "PATIENCE",
    "OwnRows",
    "ProcessLost",
    "Scattered",
    "ScatteredColumns",
    "Vote",
    "abreast",
    "agree",
    "agree_on_tensors",
    "apart",
    "board",
    "collect_rows",
    "counted",
    "fill_rows",
    "follow",
    "first_alone",
    "from_first",
    "gather_columns",
    "gather_ragged",
    "gather_rows",
    "gather_texts",
    "gather_together",
    "is_sharded",
    "launched",
    "local_rank",
    "merge_topk",
    "missing",
    "own",
    "own_parameter",
    "own_range",
    "part",
    "parts",
    "rank",
    "rows_of_each",
    "running",
    "scatter_sum",
    "scatter_sums",
    "shard_module",
    "size",
    "start",
    "step_traffic",
    "stop",
    "sum_",
    "sum_gradients",
    "take_gradients",
    "traffic",
    "wait",
    "when_lost",
]
