"""The models that live workers serve, each with its tokenizer read once."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from baton.common.clock import Clock
from baton.common.errors import ModelError, NoWorker
from baton.common.messages import ModelInfo
from baton.common.sampling import Role
from baton.router.catalog import choose_model
from baton.router.fleet import AttachedWorker, WorkerState
from baton.router.served_model import ServedModel, load_served_model

log = logging.getLogger(__name__)


class LiveCatalog:
    """Implements `Catalog` over the fleet."""

    def __init__(
        self,
        workers: Callable[[], list[AttachedWorker]],
        clock: Clock,
        *,
        model_folder: Path | None = None,
    ) -> None:
        self._workers = workers
        self._clock = clock
        self._model_folder = model_folder
        self._loaded: dict[tuple[str, str], ServedModel] = {}
        self._is_serving = True
        self._loading: dict[tuple[str, str], asyncio.Task[None]] = {}

    def models(self) -> list[ServedModel]:
        return sorted(self._by_name().values(), key=lambda model: model.name)

    def get(self, name: str) -> ServedModel:
        """As `choose_model`; NoWorker for what was served before, or while nothing is served."""
        live = self._by_name()
        was_served = any(name == known for known, _ in self._loaded)
        if not live or (name not in live and was_served):
            # A model that is asked for again in a moment does exist.
            raise NoWorker("no worker serves the model now", retry_after_s=1.0)
        return choose_model(live, name)

    def stop_serving(self) -> None:
        """Be not ready from now on: whoever balances load looks elsewhere."""
        self._is_serving = False

    def is_ready(self) -> bool:
        roles = {
            worker.record.role
            for worker in self._ready()
            if worker.hello is not None and _key(worker.hello.model) in self._loaded
        }
        is_served = Role.UNIFIED in roles or {Role.PREFILL, Role.DECODE} <= roles
        return self._is_serving and is_served

    def learn(self, model: ModelInfo) -> None:
        """A worker joined with this model: read its tokenizer off the event loop, once."""
        key = _key(model)
        if key not in self._loaded and key not in self._loading:
            self._loading[key] = asyncio.create_task(self._load(model), name=f"load {model.name}")

    async def close(self) -> None:
        await asyncio.gather(*self._loading.values())

    async def _load(self, model: ModelInfo) -> None:
        folder = self._model_folder or Path(model.path)
        try:
            self._loaded[_key(model)] = await asyncio.to_thread(
                load_served_model,
                model.name,
                folder,
                model.max_model_len,
                model.vocab_size,
                self._clock,
            )
        except ModelError as error:
            log.error("model %s cannot be served: %s", model.name, error.message)
        finally:
            del self._loading[_key(model)]

    def _ready(self) -> list[AttachedWorker]:
        return [worker for worker in self._workers() if worker.state is WorkerState.READY]

    def _by_name(self) -> dict[str, ServedModel]:
        found: dict[str, ServedModel] = {}
        for worker in self._workers():
            if worker.hello is None or _key(worker.hello.model) not in self._loaded:
                continue
            model = self._loaded[_key(worker.hello.model)]
            known = found.get(model.name, model)
            if worker.record.role.decodes:
                here = worker.load.blocks_total * worker.hello.model.block_size
                known = replace(known, kv_tokens=max(here, known.kv_tokens or 0))
            found[model.name] = known
        return found


def _key(model: ModelInfo) -> tuple[str, str]:
    return model.name, model.fingerprint
