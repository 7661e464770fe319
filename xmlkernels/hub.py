"""What predicts, as a model of the Hugging Face Hub, by huggingface_hub's `ModelHubMixin`.

    from xmlkernels import HubModel

    model = HubModel.from_pretrained("owner/words")
    for labels in model.predict(["a text to label"], k=5): ...

It needs `pip install "xmlkernels[hub]"`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from xmlkernels.errors import InputError
from xmlkernels.predict.base import Label, Text, TextPredictor
from xmlkernels.predict.hub import from_pretrained, missing, not_found, save_pretrained

try:
    from huggingface_hub import ModelHubMixin
except ImportError:

    class ModelHubMixin:  # type: ignore[no-redef]
        """Say what is missing, once somebody asks for it."""

        def __new__(cls, *_: Any, **__: Any) -> Self:
            """Refuse."""
            raise missing()

        @classmethod
        def from_pretrained(cls, *_: Any, **__: Any) -> Self:
            """Refuse."""
            raise missing()


class HubModel(ModelHubMixin):
    """A loaded predictor with `save_pretrained`, `from_pretrained` and `push_to_hub`.

    The folder is that of `xmlkernels.save_pretrained`: safetensors, JSON and text, and no code.

    Args:
        model: of `xmlkernels.load`.
        license: for the card, as the Hub names it ("apache-2.0"); None says that none is stated.

    Attributes:
        predictor: what answers.
        license: for the card.
    """

    # `config.json` has a key `predictor`, which ModelHubMixin would hand on to an argument of it.
    def __init__(self, model: TextPredictor, license: str | None = None) -> None:
        self.predictor, self.license = model, license

    def predict(self, texts: Iterable[Text], k: int = 10, **options: Any) -> Iterator[list[Label]]:
        """Predict the k best labels of each text; see `TextPredictor.predict`."""
        return self.predictor.predict(texts, k, **options)

    def predict_batches(
        self, batches: Iterable[Sequence[Text]], k: int = 10, **options: Any
    ) -> Iterator[list[list[Label]]]:
        """Predict batches of texts; see `TextPredictor.predict_batches`."""
        return self.predictor.predict_batches(batches, k, **options)

    def embed(self, texts: Iterable[Text], *, batch_size: int = 64) -> np.ndarray:
        """Embed N texts: fp32 [N, D]; see `TextPredictor.embed`."""
        return self.predictor.embed(texts, batch_size=batch_size)

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        config: Any = None,
        model_card_kwargs: Any = None,
        **options: Any,
    ) -> str | None:
        """Write the folder, as `xmlkernels.save_pretrained` does.

        Args:
            save_directory: a new or empty folder, or one that this wrote.
            repo_id: with `push_to_hub`; by default the name of the folder.
            push_to_hub: push it, too.
            config, model_card_kwargs: None: the folder has a `config.json` and a card of its own.
            options: of `push_to_hub`.

        Returns:
            The address on the Hub, where it was pushed.

        Raises:
            InputError: the folder holds something else, or a config or a card is given.
        """
        # ModelHubMixin's own deletes a config.json before it looks whose folder it is.
        for name, given in (("config", config), ("model_card_kwargs", model_card_kwargs)):
            if given:
                mend = "leave it out"
                raise InputError(name, "None: the model has its own", type(given).__name__, mend)
        self._save_pretrained(Path(save_directory))
        if not push_to_hub:
            return None
        return str(self.push_to_hub(repo_id or Path(save_directory).name, **options))

    def _save_pretrained(self, save_directory: Path) -> None:
        save_pretrained(self.predictor, save_directory, license=self.license)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, name: str | Path, **options: Any
    ) -> Self:
        """Load a folder that `save_pretrained` wrote, or a model from the Hub.

        Args:
            name: the folder, or "owner/name".
            options: `license` of the card; revision, token, cache_dir, force_download and
                local_files_only, as huggingface_hub has them; all others are of `xmlkernels.load`.

        Raises:
            InputError: no such folder, and no such repository, or none that can be reached.
        """
        try:
            found: Self = super().from_pretrained(name, **options)
        except InputError:
            raise
        except (OSError, ValueError) as error:
            raise not_found(name, error) from error
        return found

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        license: str | None = None,
        **options: Any,
    ) -> Self:
        """Load what `from_pretrained` names; `options` are those of `xmlkernels.load`."""
        found = from_pretrained(
            model_id,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            offline=local_files_only,
            force_download=force_download,
            **options,
        )
        return cls(found, license)


def push_to_hub(
    predictor: TextPredictor, repo_id: str, *, license: str | None = None, **options: Any
) -> str:
    """Write a loaded predictor to the Hub; return its address.

    Args:
        predictor: of `xmlkernels.load`.
        repo_id: "owner/name"; made where it does not exist.
        license: for the card.
        options: of `ModelHubMixin.push_to_hub`: private, token, branch, commit_message …
    """
    return str(HubModel(predictor, license).push_to_hub(repo_id, **options))
