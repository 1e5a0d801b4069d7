"""The models that can be asked for now."""

from collections.abc import Sequence
from typing import Protocol

from baton.common.errors import InvalidRequest, ModelNotFound
from baton.router.served_model import ServedModel


class Catalog(Protocol):
    """What the fronts know of the cluster. Never blocks."""

    def models(self) -> list[ServedModel]:
        """The models that live workers serve, by name."""
        ...

    def get(self, name: str) -> ServedModel:
        """The model called `name`; empty takes the only one. Raises ModelNotFound."""
        ...

    def is_ready(self) -> bool:
        """Whether a unified worker lives, or a prefill and a decode worker."""
        ...


class FixedCatalog:
    """A catalog that changes only when told."""

    def __init__(self, models: Sequence[ServedModel], *, is_ready: bool = True) -> None:
        self._models = {model.name: model for model in models}
        self._is_ready = is_ready

    def models(self) -> list[ServedModel]:
        return [self._models[name] for name in sorted(self._models)]

    def get(self, name: str) -> ServedModel:
        return choose_model(self._models, name)

    def is_ready(self) -> bool:
        return self._is_ready

    def set_ready(self, is_ready: bool) -> None:
        self._is_ready = is_ready


def choose_model(models: dict[str, ServedModel], name: str) -> ServedModel:
    """The model called `name`; empty takes the only one.

    Raises ModelNotFound, and InvalidRequest when the name is empty and there is a choice.
    """
    if not name and len(models) == 1:
        return next(iter(models.values()))
    if not name and models:
        raise InvalidRequest(f"name a model: {', '.join(sorted(models))}", field="model")
    if name in models:
        return models[name]
    served = f"served are {', '.join(sorted(models))}" if models else "no model is served now"
    # The name asked for is the client's text and stays out of the message.
    raise ModelNotFound(f"the model asked for does not exist; {served}", field="model")
