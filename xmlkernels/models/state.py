"""What a model holds and a stop must not lose: weights, tables, optimizer, scaler, running mean."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from xmlkernels import dist
from xmlkernels.checkpoint import load_optimizer_tensors, optimizer_tensors
from xmlkernels.errors import InputError
from xmlkernels.models.graphed import GraphedPasses
from xmlkernels.models.running_mean import (
    PREFIX,
    RunningMean,
    averaged_weights,
    check_means,
    start_mean,
    with_means,
)
from xmlkernels.models.saved import check_tensors
from xmlkernels.models.training import TrainingSettings
from xmlkernels.nn.protocol import check_encoder
from xmlkernels.nn.shard import Shard, own_rows
from xmlkernels.nn.stored import StoredTable
from xmlkernels.nn.table import Table, without_states
from xmlkernels.optim import LossScaler
from xmlkernels.rows import stand_in

_PARTS = ("optimizer.", "scaler.", PREFIX)
_MOMENTS = ("exp_avg", "exp_avg_sq")


class ModelState(nn.Module):
    """The part of `Model` that holds tensors, knows where their rows are, and keeps them.

    It computes neither a step nor a score.

    Attributes:
        steps: steps trained so far.
        skipped_steps, skipped_encoder_steps: fp32 [1], steps in which something not finite kept
            every update, or the encoder's alone, from being taken.
        optimizer: of everything that is no table; None without training, or with nothing to train.
        average: the running mean of the weights, where the settings ask for one.
        graphs: what runs the passes of a step as CUDA graphs; None runs them as they are.

    Args:
        encoder: called as `encoder(*batch.inputs)`, with `width`, `autocast` and
            `encoder_config()`. One that trains a table of its own has `update(lr)`, called after
            every backward.
        training: None for prediction alone.
    """

    training_settings: TrainingSettings | None
    optimizer: torch.optim.Optimizer | None
    encoder: nn.Module
    skipped_steps: Tensor
    skipped_encoder_steps: Tensor

    def __init__(self, encoder: nn.Module, training: TrainingSettings | None) -> None:
        super().__init__()
        check_encoder(encoder)
        self.encoder, self.training_settings = encoder, training
        self.optimizer = None
        self.scaler: LossScaler | None = None
        self.average: RunningMean | None = None
        self.graphs: GraphedPasses | None = None
        self.steps = 0
        self.register_buffer("skipped_steps", torch.zeros(1))
        self.register_buffer("skipped_encoder_steps", torch.zeros(1))

    def _start_training(
        self, settings: TrainingSettings, optimizer: torch.optim.Optimizer | None
    ) -> None:
        """Make what training needs besides the modules, which must all be there."""
        self.optimizer = optimizer
        # Only fp16 needs a scale; elsewhere it stays 1 and the scaler is the check for non-finite
        # gradients.
        if self.encoder.autocast == torch.float16:
            self.scaler = LossScaler(self.device)
        else:
            self.scaler = LossScaler(self.device, init_scale=1.0, growth=1.0, backoff=1.0)
        self.average = start_mean(self.encoder, self._averaged(), settings.mean)

    def _averaged(self) -> dict[str, Tensor]:
        settings = self.training_settings
        wanted = settings is not None and settings.mean.tables
        if wanted and self.stored_tables():
            got, mend = "a mean of tables that are stored", "leave the tables out of the mean"
            raise InputError("running mean", "tables in memory", got, mend)
        return averaged_weights(self, self.tables() if wanted else {})

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `.to(device)` must take along what is no module: the loss scaler, the mean weights, and
        # the rows of sharded parameters that the optimizer has.
        whole: Any = super()
        sharded = {name: p for name, p in self.named_parameters() if dist.is_sharded(p)}
        own = {name: dist.own_parameter(parameter) for name, parameter in sharded.items()}
        whole._apply(fn, recurse)
        for name, parameter in self.named_parameters() if own else ():
            if name in own:
                dist.follow(own[name], parameter)
        if self.scaler is not None:
            self.scaler.move(fn)
        if self.average is not None:
            self.average.follow(self._averaged())
        self.graphs = None  # they know where the tensors were
        return self

    @property
    def device(self) -> torch.device:
        """The device that batches go to."""
        return self.skipped_steps.device

    # ---- tables ----

    def tables(self) -> dict[str, nn.Module]:
        """Name the tables that are trained in place, as `state_dict` does.

        Each has `weight`, `bias` (or None) and `counter`, whose second entry counts its steps; the
        first table's counts the model's.
        """
        raise NotImplementedError

    def stored_tables(self) -> dict[str, StoredTable]:
        """Name the tables whose rows are in files or on the host."""
        return {n: table for n, table in self.tables().items() if isinstance(table, StoredTable)}

    def stored_tensors(self) -> set[str]:
        """Name the tensors of these rows; a checkpoint need not bring them into memory."""
        tables = self.stored_tables().items()
        return {f"{name}.{buffer}" for name, table in tables for buffer in table.stored()}

    # ---- what this process has of them ----

    @property
    def shared(self) -> bool:
        """Whether several processes hold a table's rows between them.

        All of them then train and score together, each with its part of every batch's `inputs`.
        """
        return any(getattr(table, "shared", False) for table in self.tables().values())

    @property
    def encoder_shared(self) -> bool:
        """Whether several processes hold the encoder between them (`Encoder.shard`)."""
        return any(map(dist.is_sharded, self.encoder.parameters()))

    def shards(self) -> dict[str, Shard]:
        """Name the tensors of which this process holds some rows alone, as `tensors` does.

        Before a first step there are those that AdamW will keep, too, which a checkpoint may hold.
        """
        found = {
            f"{name}.{buffer}": table.shard
            for name, table in self.tables().items()
            if isinstance(table, Table) and table.shared
            for buffer in table.row_buffers()
        }
        found |= {
            name: Shard(*dist.own_range(parameter))
            for name, parameter in self.named_parameters()
            if dist.is_sharded(parameter)
        }
        means = () if self.average is None else self.average.names
        found |= {PREFIX + name: found[name] for name in means if name in found}
        return found | self._shards_of_states()

    def _shards_of_states(self) -> dict[str, Shard]:
        """Name states of sharded parameters, those of AdamW before there are any."""
        found = {}
        there = {} if self.optimizer is None else self.optimizer.state
        for name, parameter in self._optimized():
            if self.optimizer is None or not dist.is_sharded(parameter):
                continue
            own = dist.own_parameter(parameter)
            states = there.get(own, {}) if there else dict.fromkeys(_MOMENTS, own)
            for key, state in states.items():
                if state.shape == own.shape:
                    found[f"optimizer.{name}/{key}"] = Shard(*dist.own_range(parameter))
        return found

    # ---- checkpoints ----

    def _optimized(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Name everything that the optimizer trains, as checkpoints do."""
        return self.named_parameters()

    def _own_optimized(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Name what the optimizer has of it: of a sharded parameter this process's rows."""
        return ((name, dist.own_parameter(p)) for name, p in self._optimized())

    def _own_counters(self) -> dict[str, Tensor]:
        """Name the counters of shared tables that count this process's rows alone."""
        return {
            f"{name}.rescaled": table.rescaled
            for name, table in self.tables().items()
            if isinstance(table, Table) and table.shared and table.rescaled is not None
        }

    def _check_loaded(self, tensors: Mapping[str, Tensor]) -> None:
        """Refuse a checkpoint's tensors for more than names, shapes and formats."""

    def tensors(self) -> dict[str, Tensor]:
        """Collect everything that must survive a stop, by name.

        Weights, optimizer states, counters, loss scale, mean weights. Tensors without memory stand
        in for rows of stored tables. With shared tables all processes call it together; each has
        its own rows of what `shards` names.
        """
        out = {name: dist.own(value.detach()) for name, value in self.state_dict().items()}
        for name, table in self.stored_tables().items():
            rows = table.stored()
            out |= {f"{name}.{buffer}": stand_in(held) for buffer, held in rows.items()}
        for name, counter in self._own_counters().items():
            out[name] = dist.sum_(counter.clone())
        if self.optimizer is not None:
            states = optimizer_tensors(self.optimizer, self._own_optimized())
            out |= {f"optimizer.{name}": value for name, value in states.items()}
        if self.scaler is not None:
            out |= {f"scaler.{name}": value for name, value in self.scaler.tensors().items()}
        if self.average is not None:
            out |= self.average.tensors()
        return out

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `tensors` gave, whole tables or the own rows of those that are shared.

        A model without training takes the share that prediction needs: where there are mean
        weights, those.

        Raises:
            InputError: the tensors are those of another model.
        """
        shards = self.shards()
        # Whatever states the optimizer of the checkpoint kept.
        states = {
            f"optimizer.{name}": Shard(*dist.own_range(p))
            for name, p in self._optimized()
            if dist.is_sharded(p)
        }
        tensors = {
            name: own_rows(t, shards.get(name) or states.get(name.rpartition("/")[0]))
            for name, t in tensors.items()
        }
        parts = {
            p: {k.removeprefix(p): v for k, v in tensors.items() if k.startswith(p)} for p in _PARTS
        }
        rest = {k: v for k, v in tensors.items() if not k.startswith(_PARTS)}
        state, means = self.state_dict(), parts[PREFIX]
        own = {name: dist.own(value) for name, value in state.items()}
        if self.training_settings is None:
            rest = with_means(without_states(rest, own), means)
        self._check_loaded(rest)
        check_tensors(own, rest)
        if self.training_settings is not None:
            check_means(self.average, means)
        # Tensors that stand in for stored rows are on the meta device, where a copy does nothing.
        for name in filter(lambda name: dist.is_sharded(state[name]), own):
            own[name].copy_(rest.pop(name))
        self.load_state_dict(rest, strict=False)  # the names are those
        for name, table in self.stored_tables().items():
            buffers = table.stored()
            table.load_rows({buffer: rest[f"{name}.{buffer}"] for buffer in buffers})
        if dist.rank() > 0:
            for counter in self._own_counters().values():
                counter.zero_()
        first = next(iter(self.tables().values()))
        self.steps = int(first.counter[1])  # type: ignore[index]
        if self.optimizer is not None:
            load_optimizer_tensors(self.optimizer, self._own_optimized(), parts["optimizer."])
        if self.scaler is not None:
            self.scaler.load_tensors(parts["scaler."])
        if self.average is not None:
            self.average.load_tensors(means)
