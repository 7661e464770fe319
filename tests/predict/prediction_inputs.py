"""Ask a small run for labels."""

from __future__ import annotations

from typing import Any

from train_runs import ROOT

from xmlkernels.cli import predict
from xmlkernels.data.text_parts import TextParts

RUN = ROOT / "tests" / "fixtures" / "v1" / "run"  # 30 labels

LF = TextParts(separator=" [SEP] ")


def ask(**options: Any) -> None:
    predict.run(predict.Options(str(RUN), **options))
