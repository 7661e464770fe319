"""The base of every model: what it is, its training step, its scoring.

A model of a new kind subclasses `Model`; docs/adding-a-model.md is the recipe.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

from torch import Tensor, nn

from xmlkernels import dist
from xmlkernels.data.batches.bags import BagBatch
from xmlkernels.data.batches.tokens import Batch
from xmlkernels.errors import InputError
from xmlkernels.models.among import complement, limited
from xmlkernels.models.gradient_caching import EncoderPass, encoder_passes, gathered
from xmlkernels.models.graphed import Capturer, Card, GraphedPasses
from xmlkernels.models.running_mean import evaluating
from xmlkernels.models.scored import Answer, Scored
from xmlkernels.models.state import ModelState
from xmlkernels.models.training import decision_bytes
from xmlkernels.optim import scaled_step

if TYPE_CHECKING:
    from xmlkernels.tree.label_tree import LabelTree

Documents = Batch | BagBatch


class Model(ModelState):
    """A classifier over L labels with the step that trains it.

    A subclass makes its modules, calls `_start_training` where it is to be trained, and defines
    `step`, `tables`, `_answer`, `_loss`, `config` and `restore`.

    Its tensors, optimizer and checkpoints are those of `ModelState`.

    Attributes:
        kind: its name in `config()` and in `xmlkernels.models.kinds.KINDS`.
        head_config: the TypedDict of `config()["head"]`.
        sums_loss: whether losses are sums over the documents of a batch; otherwise they are means
            over its candidates.
        needs_frequencies: whether every new run calls `start_at_frequencies`; otherwise it does so
            with `--frequency-bias` alone.
        schemes: ways of scoring a label that `score` can be asked for; a model with one way has
            one without a name.
        tree: the label tree that the model scores along, or None.
    """

    kind: ClassVar[str]
    head_config: ClassVar[Any]
    sums_loss: ClassVar[bool] = True
    needs_frequencies: ClassVar[bool] = False
    schemes: ClassVar[tuple[str, ...]] = ("",)
    tree: "LabelTree | None" = None

    # ---- what it is ----

    @property
    def labels(self) -> int:
        """L."""
        raise NotImplementedError

    @property
    def width(self) -> int:
        """D, the width of an embedding."""
        raise NotImplementedError

    @property
    def scheme(self) -> str:
        """The scheme that `score` answers by; one of `schemes`."""
        return self.schemes[0]

    def use_scheme(self, scheme: str) -> None:
        """Answer by another scheme from here on.

        Raises:
            InputError: the model has no such scheme.
        """
        self._check_schemes([scheme])

    def _check_schemes(self, schemes: Iterable[str]) -> None:
        if unknown := [scheme for scheme in schemes if scheme not in self.schemes]:
            expected = f"one of {', '.join(map(repr, self.schemes))}"
            raise InputError("scheme", expected, repr(unknown[0]), "choose one of them")

    def describe(self) -> str:
        """Say in a few words what the kind of model alone decides; empty where there is nothing."""
        return ""

    def counters(self) -> dict[str, float]:
        """Count what was left out since the start: steps that were not finite, and more per kind.

        Reads the device.
        """
        return {
            "skipped_steps": int(self.skipped_steps),
            "skipped_encoder_steps": int(self.skipped_encoder_steps),
        }

    def label_rows(self, start: int, end: int) -> Tensor:
        """Copy the rows of the label table for labels start to end - 1: fp32 [end - start, D].

        Raises:
            InputError: a logit is more than the inner product of such a row and an embedding.
        """
        raise InputError(
            "model",
            "a label table without bias",
            f"a model of kind {self.kind}, whose logits are no inner products",
            "train end to end without --bias",
        )

    def start_at_frequencies(self, positives: Tensor, documents: int) -> None:
        """Set each label's bias so that the first predictions are the labels' frequencies.

        Raises InputError where a kind of model has no such start; positives [L] counts the
        documents that have each label.
        """
        raise self._no_start("frequencies")

    def start_at_centroids(
        self, vectors: Iterable[tuple[Tensor, Tensor, Tensor]], norm: float
    ) -> None:
        """Point each label's row to the mean embedding of its documents, off the mean of all.

        Raises InputError where a kind of model has no such start; vectors are (embeddings [B, D],
        pos_row, pos_sample) of every batch of training documents.
        """
        raise self._no_start("centroids")

    def _no_start(self, what: str) -> InputError:
        got = f"a model of kind {self.kind}"
        return InputError("model", f"a label table that can start at {what}", got, "leave it out")

    # ---- training ----

    def step(self, batch: Documents, *, need_loss: bool = False) -> Tensor:
        """Train on one batch.

        Several processes call it together, each with its own `inputs` (`AnyBatches.shared`): all
        take the step of the whole batch, and have its loss.

        Returns:
            The loss [1], or [0] when not asked for.
        """
        raise NotImplementedError

    def capture(
        self, tell: Callable[[str], None] | None = None, capturer: Capturer | None = None
    ) -> None:
        """Run the passes of every step from here on as CUDA graphs; see `GraphedPasses`.

        A move of the model ends that. Without gradient caching, in one process, with all tables on
        the model's device and an encoder of fixed shapes.

        Args:
            tell: told where a step cannot be captured and runs as it is; None raises InputError.
            capturer: None for the card that the model is on.

        Raises:
            InputError: a table's step reads the device.
        """
        for name, table in self.tables().items():
            if getattr(table, "WAITS", False):
                expected = "tables whose steps do not wait for the device"
                mend = "train without graphs, or with a table of another kind"
                raise InputError("capture", expected, name, mend)
        owned = self.optimizer.param_groups if self.optimizer is not None else []
        parameters = [parameter for group in owned for parameter in group["params"]]
        self.graphs = GraphedPasses(
            self._passes,
            parameters,
            self._rows(),
            self.device,
            Card(self.device) if capturer is None else capturer,
            tell,
        )

    def _rows(self) -> list[int]:
        """Count the rows of each table that a batch has positives of, the labels' last."""
        return [len(table.weight) for table in self.tables().values()]  # type: ignore[arg-type]

    def _passes(
        self, batch: Documents, lr: float | Tensor, beta1: float | Tensor | None, need_loss: bool
    ) -> tuple[Tensor, Tensor]:
        """Train the tables on a batch and compute the gradients of everything else.

        It reads no value on the host, and takes no memory that depends on one.

        Args:
            batch: on the model's device.
            lr: of the tables.
            beta1: of their Adam; None leaves it.
            need_loss: as in `step`.

        Returns:
            The loss, as `step` gives it; fp32 [1], 1 where the forward was not finite.
        """
        raise NotImplementedError

    def _run_passes(
        self, batch: Documents, lr: float, beta1: float | None, need_loss: bool
    ) -> tuple[Tensor, Tensor]:
        """Run `_passes` from gradients of none, as a graph where there are any."""
        if self.graphs is not None:
            return self.graphs(batch, lr, beta1, need_loss)
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)
        return self._passes(batch, lr, beta1, need_loss)

    def _encode(self, batch: Documents, micro_batch: int) -> EncoderPass:
        """Encode a batch, and keep the way back through the encoder."""
        together = self.encoder_shared
        return EncoderPass(self._features, batch.inputs, len(batch), micro_batch, together=together)

    def _finish_step(self, overflow: Tensor, encoder_lr: float) -> None:
        """Update the encoder, its own table and the mean, and count the step.

        Args:
            overflow: fp32 [1], 1 where the forward was not finite.
            encoder_lr: of this step, for an encoder with a table of its own.
        """
        settings = self.training_settings
        assert settings is not None and self.scaler is not None
        if self.optimizer is not None:
            dist.take_gradients(self.parameters())
            self.skipped_encoder_steps += scaled_step(
                self.optimizer, self.scaler, overflow, clip=settings.clip
            )
        if update := getattr(self.encoder, "update", None):
            update(encoder_lr)
        self.skipped_steps += overflow
        if self.average is not None:
            self.average.step(self.steps)
        self.steps += 1

    def _step_traffic(
        self,
        documents: int,
        widths: list[int],
        processes: int,
        *,
        need_loss: bool,
        terms: int,
        scattered: bool,
    ) -> dict[str, int]:
        """Return `dist.step_traffic` with what encoder and loss add; see a model's `traffic`."""
        apart = self.encoder_shared
        trained = [p for _, p in self._optimized() if p.requires_grad and not dist.is_sharded(p)]
        summed = sum(p.numel() * p.element_size() for p in trained)
        summed += 4 if need_loss and self.shared else 0
        settings = self.training_settings
        if apart:
            summed += decision_bytes(0.0 if settings is None else settings.clip)
        found = dist.step_traffic(documents, widths, processes, summed=summed, scattered=scattered)
        if own := getattr(self.encoder, "update_traffic", None):
            found["gathered"] += own(documents, terms, processes)
        if apart and processes > 1:
            micro_batch = 0 if settings is None else settings.micro_batch
            passes = encoder_passes(documents, processes, micro_batch)
            for kind, count in self.encoder.shard_traffic(processes, passes).items():  # type: ignore[operator]
                found[kind] += count
        return found

    # ---- scoring ----

    def _features(self, *inputs: Tensor) -> list[Tensor]:
        """Encode documents for the tables: fp32 [B, D] per level, the labels' last."""
        return [self.encoder(*inputs)]

    def _whole_features(self, batch: Documents) -> list[Tensor]:
        """Encode a batch, of which each process has a part where tables are shared."""
        x = self._features(*batch.inputs)
        return gathered(x, len(batch)) if self.shared else x

    def _answer(self, x: list[Tensor], k: int, exclude: Tensor | None) -> Answer:
        """Give the k best labels by the model's own scheme; levels are left out."""
        raise NotImplementedError

    def _answers(
        self, x: list[Tensor], k: int, exclude: Tensor | None, schemes: Sequence[str]
    ) -> dict[str, Answer]:
        """Give an answer with levels for each scheme."""
        return {scheme: self._answer(x, k, exclude) for scheme in schemes}

    def _answer_among(self, x: list[Tensor], k: int, allowed: Tensor) -> Answer:
        """Give the k best of the labels `allowed`, int64 [A], ascending, and of no others."""
        barred = complement(allowed, self.labels)
        return self._answer(x, k, barred.expand(len(x[-1]), -1))

    def _loss(self, x: list[Tensor], batch: Documents) -> Tensor:
        """Compute the loss [1] of a batch from its features."""
        raise NotImplementedError

    def _answers_and_loss(
        self,
        x: list[Tensor],
        k: int,
        exclude: Tensor | None,
        schemes: Sequence[str],
        batch: Documents,
    ) -> tuple[dict[str, Answer], Tensor]:
        """Do what `_answers` and `_loss` do; it may answer by more schemes than it is asked for."""
        return self._answers(x, k, exclude, schemes), self._loss(x, batch)

    @evaluating
    def score(
        self,
        batch: Documents,
        k: int,
        *,
        exclude: Tensor | None = None,
        loss: bool = False,
        embedding: bool = False,
        schemes: Sequence[str] = (),
        allow: Sequence[Tensor | None] = (),
    ) -> Scored:
        """Answer a batch with one pass of the encoder, without training.

        With shared tables all processes call it together, as they do `embed` and `loss`, each with
        its own `inputs`; all have the answer to the whole batch.

        Args:
            batch: on the model's device.
            k: labels per document.
            exclude: int64 [B, E], label ids never to be given; -1 pads.
            loss: give the batch's loss, too; it must have its positives.
            embedding: give the embeddings, too.
            schemes: give an answer, with the levels of the label tree, for each of these.
            allow: of each document int64 [A], ascending: the only labels that it may have, each
                of which is scored; None where it may have all but `exclude`. It does not count
                for `schemes`.

        Raises:
            InputError: a scheme that the model does not have, or an allow-list for tables that
                processes share.
        """
        self._check_schemes(schemes)
        x = self._whole_features(batch)
        total = None
        if loss:
            answers, total = self._answers_and_loss(x, k, exclude, schemes, batch)
        else:
            answers = self._answers(x, k, exclude, schemes)
        if any(labels is not None for labels in allow):
            if self.shared:
                mend = "predict in one process"
                raise InputError("allow", "a model that one process holds", "a shared one", mend)
            own = limited(self._answer, self._answer_among, x, k, exclude, allow)
        else:
            own = answers[self.scheme] if self.scheme in answers else self._answer(x, k, exclude)
        return Scored(
            own.values,
            own.labels,
            total,
            x[-1] if embedding else None,
            {scheme: answers[scheme] for scheme in schemes},
        )

    @evaluating
    def embed(self, batch: Documents) -> Tensor:
        """Encode documents for the label table: fp32 [B, D]."""
        return self._whole_features(batch)[-1]

    @evaluating
    def loss(self, batch: Documents) -> Tensor:
        """Compute the loss [1] that `step` would report, without training."""
        return self._loss(self._whole_features(batch), batch)

    # ---- its description ----

    def config(self) -> dict[str, Any]:
        """Describe the model as JSON from which `restored` builds it for prediction.

        {"kind": …, "encoder": {…}, "head": {…}}; its tensors are the rest.
        """
        raise NotImplementedError

    @classmethod
    def table_shapes(cls, head: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
        """Name the tensors of the tables that `config()["head"]` describes, with their shapes."""
        raise NotImplementedError

    @classmethod
    def restore(
        cls, config: Mapping[str, Any], encoder: nn.Module, tensors: Mapping[str, Tensor]
    ) -> Self:
        """Build the model that a checked `config()` describes; its weights are still to be loaded.

        Args:
            config: `config()` of the model that was saved.
            encoder: the one that it describes.
            tensors: of the same checkpoint, for a kind that keeps more than weights there.
        """
        raise NotImplementedError
