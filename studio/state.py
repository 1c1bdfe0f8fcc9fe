"""What all pages share: the workspace, its runs, and things that are slow to load, loaded once."""

import functools
import inspect
import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path
from typing import Any, TypeVar

import gradio as gr
import torch
from torch import nn

from core import Adapter, Factors, LoRAError, Spectrum, plan, quoted, resolve_devices, resolve_dtype, spectrum
from studio import data, hub, jobs, models, sweeps
from studio.chat import KEPT_ADAPTERS, Engine
from studio.checkpoints import ADAPTER_FILES
from studio.history import Shown
from studio.model_files import STARTER
from studio.runs import Run, Runs
from studio.specs import RunSpec
from studio.tables import Table, read_table, split_source
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
        open_folders: Where pages may open files: the workspace, and what the operator allows besides.
        shown: What lists show of them.
    """

    def __init__(self, workspace: Workspace, allowed: Iterable[Path] = ()) -> None:
        self.workspace = workspace
        self.open_folders = (workspace.root, *(folder.resolve() for folder in allowed))
        self.runs = Runs(workspace)
        self.shown = Shown(workspace.cache / "history.json")
        self.log_file = workspace.root / "studio.log"
        self._locks: defaultdict[str, threading.RLock] = defaultdict(threading.RLock)  # a slow kind holds up no other
        self._kept: dict[str, tuple[Any, Any]] = {}
        self._adapters: dict[tuple[str, int], tuple[Any, Adapter]] = {}

    def tokenizer(self, model: str) -> Any:
        """Returns the model's tokenizer."""
        return self._keep("tokenizer", model, lambda: models.load_tokenizer(model, self.workspace))

    def info(self, model: str) -> models.ModelInfo:
        """Returns what is known of a model before a weight is loaded."""
        return self._keep("info", model, lambda: models.describe(model, self.workspace))

    def skeleton(self, model: str) -> nn.Module:
        """Returns the model's tree of modules on the meta device."""
        return self._keep("skeleton", model, lambda: models.skeleton(model, self.workspace))

    def table(self, source: str, eval_source: str = "") -> Table:
        """Returns a data set's rows, read anew when a file of it has changed.

        Raises:
            LoRAError: It has a file that pages may not open, or it cannot be read.
        """
        changed = []
        for one in (*split_source(source), *(split_source(eval_source) if eval_source else ())):
            if one.partition(":")[0] not in ("starter", "hub"):
                self._check_place("source", one)
            path = Path(one)
            changed.append(path.stat().st_mtime_ns if path.is_file() else 0)
        key = (source, eval_source, *changed)
        return self._keep("table", key, lambda: read_table(source, self.workspace, eval_source))

    def spectra(self, run: Run) -> dict[str, tuple[Factors, Spectrum]]:
        """Returns path → factors and spectrum of a run's adapter, as it was last saved.

        Raises:
            LoRAError: The run has no adapter yet.
        """
        return self._keep("spectra", self._adapter_key(run), lambda: _spectra_of(Adapter.load(run.adapter_folder)))

    def engine(self, run: Run) -> Engine:
        """Returns the engine of a run's base model, which finds the adapters of all runs on that model."""
        model, device = run.spec.model, resolve_devices(run.spec.train.device)[0]
        small = self.info(model).num_parameters <= FP32_CHAT_LIMIT
        dtype = resolve_dtype("fp32" if device.type == "cpu" and small else run.spec.train.precision, device)
        return self._keep("engine", (model, device, dtype), lambda: self._load_engine(model, device, dtype))

    def adapter(self, model: str, run_id: str, step: int = 0) -> Adapter:
        """Returns a run's adapter; the same object as long as its file is the same.

        Args:
            model: The base model that it has to be of.
            run_id: The run.
            step: Of the checkpoint it is taken from; 0 for the adapter as it was saved last.

        Raises:
            LoRAError: There is no such run, adapter or checkpoint, or it is of another base model.
        """
        run = self.runs.get(run_id)
        if run.spec.model != model:
            raise LoRAError(f"`adapter` (={run_id!r}) must be of a run on {model}; it is on {run.spec.model}.")
        if step and step not in run.checkpoints.steps():
            there = ", ".join(map(str, run.checkpoints.steps())) or "none"
            raise LoRAError(f"`step` (={step}) must be that of a checkpoint of “{run.spec.name}”; it has {there}.")
        folder = run.checkpoints.at(step) if step else run.adapter_folder
        version = self._adapter_key(run) if not step else (folder / ADAPTER_FILES[0]).stat().st_mtime_ns
        with self._locks["adapters"]:
            kept = self._adapters.pop((run_id, step), None)
            if kept is None or kept[0] != version:
                kept = version, Adapter.load(folder)
            self._adapters[run_id, step] = kept  # the last one used stands last
            for old in list(self._adapters)[:-KEPT_ADAPTERS]:
                del self._adapters[old]
        return kept[1]

    def check(self, spec: RunSpec) -> None:
        """Checks a spec against its model and data as far as that takes no weights.

        Raises:
            LoRAError: A column or a matrix does not exist, r is larger than a matrix, or pages may not open a file.
        """
        self.check_model(spec.model)
        plan(self.skeleton(spec.model), spec.lora)
        data.check_spec(spec.data, self.table(spec.data.source, spec.data.eval_source))

    def start(self, spec: RunSpec, sweep: str | None = "") -> Run:
        """Starts a run, or one for each combination of a sweep, once all of them are checked; returns the first.

        Raises:
            LoRAError: As of `check`; nothing is started then.
        """
        wanted = sweeps.grid(spec, sweeps.parse((sweep or "").splitlines()))
        for one in wanted:
            self.check(one)
        first, *_ = [jobs.start(self.runs, one) for one in wanted]
        return first

    def check_model(self, model: str) -> None:
        """Checks that a page may open a model; what the command line names is not asked.

        Raises:
            LoRAError: `model` is a place outside of `open_folders`.
        """
        is_on_hub = hub.ID.fullmatch(model) and not Path(model).exists()  # a folder of that name would go before
        if model != STARTER and not is_on_hub:
            self._check_place("model", model)

    def _check_place(self, name: str, value: str) -> None:
        try:
            place = Path(value).expanduser().resolve()
            if any(place.is_relative_to(folder) for folder in self.open_folders):
                return
        except (OSError, RuntimeError, ValueError):  # no path on this system
            pass
        raise LoRAError(
            f"`{name}` (={quoted(value)}) must lie in {' or '.join(map(str, self.open_folders))} to be opened from "
            "the page; copy it there, or start the studio with --allow-path and its folder."
        )

    def _load_engine(self, model: str, device: torch.device, dtype: torch.dtype) -> Engine:
        loaded = models.load_model(model, self.workspace, device=str(device), dtype=dtype)
        ends = frozenset(models.end_token_ids(loaded, self.tokenizer(model)))
        return Engine(
            loaded,
            functools.partial(self.adapter, model),
            ends,
            is_cpu_shared=lambda: self.runs.running() is not None,
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
