"""Faults that tests/mutants.py plants, written by hand: rules that a run could lose silently."""

from __future__ import annotations

from dataclasses import dataclass

FIELDS = "tests/fields/test_config_fields.py"


@dataclass(frozen=True)
class Fault:
    """One change of the source.

    Attributes:
        path: of the file, from the root.
        old: text that occurs exactly once in it.
        new: its replacement.
        tests: pytest arguments, the narrowest that should notice; empty: those of the file
            (`mutants_drawn.TESTS`).
    """

    path: str
    old: str
    new: str
    tests: str = ""


def _of(fields: str) -> str:
    return f"{FIELDS} -k {' or '.join(fields.split())!r}"


_BUILD, _PLAN = "xmlkernels/training/build.py", "xmlkernels/training/plan.py"
_SESSION, _STATE = "xmlkernels/training/session.py", "xmlkernels/training/run_state.py"
_LOOP = "xmlkernels/training/loop.py"
_BASE, _CASCADE = "xmlkernels/models/base.py", "xmlkernels/models/cascade.py"
_LEVELS = "xmlkernels/models/level_steps.py"
_END = "xmlkernels/models/end_to_end.py"
_HEADS, _LEVEL = "xmlkernels/nn/cascade_heads.py", "xmlkernels/nn/cascade_level.py"
_HEAD = "xmlkernels/nn/full_head.py"
_OPTIM = "xmlkernels/optim.py"
_SELECT = "xmlkernels/reference/shortlist_select.py"

# Documents and, where label texts are trained on, one more document of every label.
_LABELS_COUNTED = """(
            __import__("scipy.sparse").sparse.vstack(
                [
                    train,
                    __import__("scipy.sparse").sparse.eye_array(
                        self.dataset.num_labels, format="csr"
                    ),
                ]
            ).tocsr()
            if config.label_text
            else train
        )"""

BY_HAND: tuple[Fault, ...] = (
    # Flags that the suite once let pass.
    Fault(
        _BUILD,
        "config.encoder_lr * config.head_lr_factor",
        "config.encoder_lr * 10",
        _of("head_lr_factor"),
    ),
    Fault(_BUILD, "        rw_loss=config.rw_loss,\n", "", _of("rw_loss")),
    Fault(_BUILD, "        config.clip,\n", "        0.0,\n", _of("clip")),
    Fault(_BUILD, "        clip=config.clip,\n", "", _of("clip")),
    Fault(
        _PLAN,
        "drops=config.embed_drops or _DROPS[tree.levels]",
        "drops=_DROPS[tree.levels]",
        _of("embed_drops"),
    ),
    Fault(_BUILD, "        reference_loss=config.reference_loss,\n", "", _of("reference_loss")),
    Fault(
        _BUILD,
        "positives_bound=config.positives_bound,",
        "positives_bound=32,",
        _of("positives_bound"),
    ),
    Fault(_BUILD, "schedule=config.schedule,", "", _of("schedule")),
    Fault(_BUILD, "            decoupled=config.decoupled,\n", "", _of("decoupled")),
    Fault(_BUILD, "decay=config.table_decay,", "decay=1e-4,", _of("table_decay")),
    Fault(
        _HEADS,
        "            out.append(drop(vector))",
        "            out.append(drop(vector) if r else vector)",
        _of("embed_drops"),
    ),
    Fault(
        _SESSION,
        "inverse_propensity(train, *self.dataset.propensity)",
        f"inverse_propensity({_LABELS_COUNTED}, *self.dataset.propensity)",
        _of("label_text"),
    ),
    Fault(
        _BUILD,
        "            epsilon=config.table_epsilon,\n"
        "            state_dtype=config.state,\n"
        "            decay=",
        "            state_dtype=config.state,\n            decay=",
        _of("table_epsilon"),
    ),
    Fault(_BUILD, "        encoder_epsilon=plan.encoder_epsilon,\n", "", _of("encoder_epsilon")),
    Fault(_BUILD, "        plan.encoder_epsilon,\n", "", _of("encoder_epsilon")),
    Fault(
        _PLAN,
        "cooldown=round(config.cooldown_epochs * epoch)",
        "cooldown=3 * epoch",
        _of("cooldown_epochs"),
    ),
    Fault(
        _PLAN,
        "MeanSettings(config.ema, start, config.ema_every,",
        "MeanSettings(config.ema, start, 1,",
        _of("ema_every"),
    ),
    Fault(_BUILD, "skip_units=config.skip_tiles", "skip_units=0.0", _of("skip_tiles")),
    Fault(
        _BUILD,
        '    if config.impl == "reference":\n        return PlainHead\n',
        "",
        _of("impl"),
    ),
    Fault(
        _BUILD,
        '    if config.impl == "reference":\n        return PlainLevel\n',
        "",
        _of("impl"),
    ),
    Fault(_BUILD, "level=_level(config)", "level=None", _of("table_compute")),
    # Steps of the models.
    Fault(
        _CASCADE,
        "set_rates(self.optimizer, encoder_lr, head_lr, beta1)",
        "set_rates(self.optimizer, encoder_lr, head_lr, None)",
    ),
    Fault(_BASE, "self.optimizer.zero_grad(set_to_none=True)", "pass"),
    Fault(_LEVELS, "pad_losses += scale * pads", "pad_losses += 0 * pads"),
    Fault(
        _LEVELS,
        "scores, clusters, row_ptr, k, width=width, positives=positives)",
        "scores, clusters, row_ptr, k, width=width)",
    ),
    Fault(
        _LEVELS,
        "lost.append((positives[r][0] < level.shard.rows).sum() - kept.forced)",
        "lost.append(0 * kept.forced)",
    ),
    Fault(
        _CASCADE,
        "        x = [torch.where(finite, f, torch.nan) for f in encoded.x]",
        "        x = list(encoded.x)",
    ),
    Fault(
        _END,
        "rates = [settings.encoder_lr]",
        "rates = [settings.head_lr]",
    ),
    Fault(_END, "batch, settings.head_lr * factor", "batch, settings.head_lr"),
    Fault(_BASE, "self.skipped_steps += overflow", "pass"),
    Fault(_END, "overflow, settings.encoder_lr * factor)", "overflow, settings.encoder_lr)"),
    Fault("xmlkernels/models/gradient_caching.py", "    put(state)\n", ""),
    Fault(
        "xmlkernels/models/running_mean.py",
        "max(1 - self.settings.decay, 1 / (self.count + 1))",
        "1 - self.settings.decay",
    ),
    Fault(
        "xmlkernels/models/running_mean.py",
        "        if late < 0 or (late + 1) % self.settings.every:",
        "        if late % self.settings.every:",
    ),
    Fault(
        "xmlkernels/models/descent.py",
        "exact > -0.6931471805599453, (-torch.expm1(exact)).log(), torch.log1p(-exact.exp())",
        "exact > 0, exact, torch.log1p(-exact.exp())",
    ),
    Fault(
        "xmlkernels/models/descent.py",
        'if above is not None and scheme == "path":',
        'if above is not None and scheme == "level":',
    ),
    # Tables and heads.
    Fault(_LEVEL, "if beta1 is not None and self.second is not None:", "if beta1 is not None:"),
    Fault(_LEVEL, "return dx, scores, loss / self.gain", "return dx, scores, loss"),
    Fault(_LEVEL, "optimizer.epsilon * self.gain", "optimizer.epsilon"),
    Fault(
        _HEAD,
        "share = (positives.double() + 0.5) / (documents + 1)",
        "share = positives.double() / documents",
    ),
    Fault(_HEAD, "torch.where(seen > 0, rows, self.rows(start, end))", "rows"),
    Fault(_HEAD, "        self.hyper[DX_SCALE] = dx_scale\n", ""),
    Fault(
        _SELECT,
        "    bits = (scores + 0.0).view(torch.int32)",
        "    bits = scores.view(torch.int32)",
    ),
    Fault(_SELECT, "((top >= FORCED) | (number < k))", "(number < k)"),
    Fault(_LEVEL, "        plain[DECAY] = 0  # biases do not decay\n", ""),
    Fault(
        "xmlkernels/nn/bow.py",
        "            decoupled=table.optimizer.decoupled,",
        "            decoupled=False,",
    ),
    Fault("xmlkernels/nn/encoder.py", "mask.sum(dim=1).clamp(min=1e-9)", "mask.shape[1]"),
    # Optimizer, schedules, scaler.
    Fault(_OPTIM, 'id(parameter) in in_norm or name.endswith("bias")', 'name.endswith("bias")'),
    Fault(_OPTIM, "        return (step + 1) / warmup", "        return step / warmup"),
    Fault(
        _OPTIM,
        "    found = scaler.unscale_(params) * (1 - overflow)",
        "    found = scaler.unscale_(params)",
    ),
    Fault(_OPTIM, "        self.scale.clamp_(1.0, 2.0**24)\n", ""),
    # Metrics, evaluation, data.
    Fault(
        "xmlkernels/metrics/ranking.py",
        "(np.log(labels.shape[0]) - 1) * (B + 1) ** A",
        "(np.log(labels.shape[0]) - 1) * B**A",
    ),
    Fault(
        "xmlkernels/metrics/ranking.py",
        "np.minimum(count, places)",
        "places[None]",
    ),
    Fault(
        "xmlkernels/evaluation.py",
        "losses.append(float(found.loss) * (1 if model.sums_loss else len(batch)))",
        "losses.append(float(found.loss))",
    ),
    Fault(
        "xmlkernels/evaluation.py",
        "inside = place < last[:, None]",
        "inside = place <= last[:, None]",
    ),
    Fault(
        "xmlkernels/data/batches/base.py",
        "np.unique(node[row] * count + sample)",
        "node[row] * count + sample",
    ),
    Fault(
        "xmlkernels/data/batches/base.py",
        "self.plan(epoch)[start::every]",
        "self.plan(0)[start::every]",
    ),
    Fault(
        "xmlkernels/data/vectorizer.py",
        '{"analyzer": Terms(longest)}',
        '{"analyzer": Terms(2)}',
        _of("ngrams"),
    ),
    # Sessions.
    Fault(
        _STATE,
        "if self.best and not metrics[by] > self.best[by]:",
        "if self.best and not metrics[by] >= self.best[by]:",
    ),
    Fault(_STATE, '        self.folder.rewind_log(state["log_bytes"])\n', ""),
    Fault(
        _LOOP,
        "session.batches.epoch(run.epoch, start=run.position)",
        "session.batches.epoch(run.epoch)",
    ),
    Fault(_LOOP, "% config.evaluate_every == 0 or last", "% config.evaluate_every == 0"),
)
