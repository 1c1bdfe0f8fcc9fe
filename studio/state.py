"""What all pages share: the workspace, its runs, and things that are slow to load, loaded once."""

import functools
import inspect
import logging
import threading
from collections import defaultdict
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any, TypeVar

import gradio as gr
from torch import nn

from core import Adapter, Factors, LoRAError, Spectrum, plan, resolve_device, resolve_dtype, spectrum
from studio import data, models
from studio.chat import Engine
from studio.runs import Run, Runs, RunSpec
from studio.tables import Table, read_table
from studio.workspace import Workspace

log = logging.getLogger("studio")

F = TypeVar("F", bound=Callable[..., Any])

FP32_CHAT_LIMIT = 1_000_000_000
"""Models up to so many parameters chat in float32 on a CPU, where merging is exact to the eye."""


class Studio:
    """The state behind every page of one server.

    Attributes:
        workspace: Where everything is written.
        runs: The runs in it.
    """

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.runs = Runs(workspace)
        self.log_file = workspace.root / "studio.log"
        self._locks: defaultdict[str, threading.RLock] = defaultdict(threading.RLock)  # a slow kind holds up no other
        self._kept: dict[str, tuple[Any, Any]] = {}

    def tokenizer(self, model: str) -> Any:
        """Returns the model's tokenizer."""
        return self._keep("tokenizer", model, lambda: models.load_tokenizer(model, self.workspace))

    def info(self, model: str) -> models.ModelInfo:
        """Returns what is known of a model before a weight is loaded."""
        return self._keep("info", model, lambda: models.describe(model, self.workspace))

    def skeleton(self, model: str) -> nn.Module:
        """Returns the model's tree of modules on the meta device."""
        return self._keep("skeleton", model, lambda: models.skeleton(model, self.workspace))

    def table(self, source: str) -> Table:
        """Returns a data set's rows, read anew when its file has changed."""
        path = Path(source)
        changed = path.stat().st_mtime_ns if path.is_file() else 0
        return self._keep("table", (source, changed), lambda: read_table(source, self.workspace))

    def spectra(self, run: Run) -> dict[str, tuple[Factors, Spectrum]]:
        """Returns path → factors and spectrum of a run's adapter, as it was last saved.

        Raises:
            LoRAError: The run has no adapter yet.
        """
        return self._keep("spectra", self._adapter_key(run), lambda: _spectra_of(Adapter.load(run.adapter_folder)))

    def engine(self, run: Run) -> Engine:
        """Returns the chat engine of a run: its base model, its adapter, and the merged twin."""
        return self._keep("engine", self._adapter_key(run), lambda: self._load_engine(run))

    def check(self, spec: RunSpec) -> None:
        """Checks a spec against its model and data as far as that takes no weights.

        Raises:
            LoRAError: A column or a matrix does not exist, or r is larger than a matrix.
        """
        plan(self.skeleton(spec.model), spec.lora)
        data.check_spec(spec.data, self.table(spec.data.source))

    def _load_engine(self, run: Run) -> Engine:
        model = run.spec.model
        device = resolve_device(run.spec.train.device)
        small = self.info(model).num_parameters <= FP32_CHAT_LIMIT
        dtype = resolve_dtype("fp32" if device.type == "cpu" and small else run.spec.train.precision, device)
        loaded = models.load_model(model, self.workspace, device=str(device), dtype=dtype)
        ends = frozenset(models.end_token_ids(loaded, self.tokenizer(model)))
        return Engine(
            loaded, Adapter.load(run.adapter_folder), ends, is_cpu_shared=lambda: self.runs.running() is not None
        )

    def _adapter_key(self, run: Run) -> tuple[str, int]:
        if not run.has_adapter:
            raise LoRAError(
                f"“{run.spec.name}” has no adapter yet; it is saved at the first evaluation and at the end."
            )
        return run.id, (run.adapter_folder / "adapter_model.safetensors").stat().st_mtime_ns

    def _keep(self, kind: str, key: Any, make: Callable[[], Any]) -> Any:
        """Returns the last thing of its kind if it was made for `key`, or makes it and forgets the last."""
        with self._locks[kind]:
            kept = self._kept.get(kind)
            if kept is None or kept[0] != key:
                self._kept.pop(kind, None)  # before the next is made: two models need not fit at once
                self._kept[kind] = (key, make())
            return self._kept[kind][1]

    def guard(self, handler: F) -> F:
        """Returns `handler` for use as an event handler: what it raises is shown as one sentence.

        A `LoRAError` is shown as it stands; anything else goes to the log with its traceback.
        """
        if inspect.isgeneratorfunction(handler):

            @functools.wraps(handler)
            def stream(*args: Any) -> Any:
                try:
                    yield from handler(*args)
                except Exception as error:
                    raise self._shown(error) from error

            return stream  # type: ignore[return-value]

        @functools.wraps(handler)
        def call(*args: Any) -> Any:
            try:
                return handler(*args)
            except Exception as error:
                raise self._shown(error) from error

        return call  # type: ignore[return-value]

    def _shown(self, error: Exception) -> gr.Error:
        if isinstance(error, gr.Error):
            return error
        if isinstance(error, LoRAError):
            message = str(error)
        else:
            log.exception("An error that was not foreseen")
            message = f"Something went wrong that was not foreseen ({type(error).__name__}); see {self.log_file}."
        # The toast takes HTML, and messages quote data.
        return gr.Error(escape(message), title="That did not work", duration=None, print_exception=False)


def _spectra_of(adapter: Adapter) -> dict[str, tuple[Factors, Spectrum]]:
    return {path: (f, spectrum(f)) for path, f in adapter.factors.items()}
