"""What all pages share: the workspace, its runs, and things that are slow to load, loaded once."""

import functools
import inspect
import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from html import escape
from pathlib import Path
from typing import Any, TypeVar

import gradio as gr
import torch
from torch import Tensor, nn

from core import (
    Adapter,
    Amplification,
    Baseline,
    Comparison,
    Factors,
    Intruders,
    LoRAError,
    Spectrum,
    TrainConfig,
    WeightSVD,
    amplification,
    compare,
    intruder_dimensions,
    plan_method,
    quoted,
    resolve_devices,
    resolve_dtype,
    spectra,
    weight_svd,
)
from studio import data, hub, jobs, models, skeletons, sweeps, tasks
from studio.chat import KEPT_ADAPTERS, Engine
from studio.checkpoints import ADAPTER_FILES
from studio.heads import CAUSAL, Head
from studio.history import Shown
from studio.judge import Judge
from studio.model_files import STARTER, STARTER_ENCODER
from studio.opened import Opened, Source, read_matrix
from studio.panes import Pane
from studio.planner import Planner
from studio.runs import Run, Runs
from studio.specs import RunSpec
from studio.tables import Table, mends_of, read_table, split_source
from studio.watch import Pages
from studio.words import Vocabulary, vocabulary
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
        pages: The pages that are looked at.
    """

    def __init__(self, workspace: Workspace, allowed: Iterable[Path] = ()) -> None:
        self.workspace = workspace
        self.open_folders = (workspace.root, *(folder.resolve() for folder in allowed))
        self.runs = Runs(workspace)
        self.pages = Pages()
        self.shown = Shown(workspace.cache / "history.json")
        self.log_file = workspace.root / "studio.log"
        self._locks: defaultdict[str, threading.RLock] = defaultdict(threading.RLock)  # a slow kind holds up no other
        self._kept: defaultdict[str, dict[Any, Any]] = defaultdict(dict)
        self._guests: dict[str, Adapter] = {}  # what the engines run beside the adapters of runs

    def tokenizer(self, model: str) -> Any:
        """Returns the model's tokenizer."""
        return self._keep("tokenizer", model, lambda: models.load_tokenizer(model, self.workspace))

    def info(self, model: str) -> models.ModelInfo:
        """Returns what is known of a model before a weight is loaded."""
        return self._keep("info", model, lambda: models.describe(model, self.workspace))

    def skeleton(self, model: str, head: Head | None = None) -> nn.Module:
        """Returns the model's tree of modules on the meta device, with its own head or another."""
        return self._keep("skeleton", (model, head), lambda: models.skeleton(model, self.workspace, head), most=2)

    def base(self, model: str) -> nn.Module:
        """Returns the tree of which matrices are chosen: without a head for labels, which is trained in full."""

        def make() -> nn.Module:
            tree = self.skeleton(model) if self.info(model).can_write else models.skeleton(model, self.workspace)
            for name in skeletons.head_modules(tree) if not self.info(model).can_write else ():
                setattr(tree, name, nn.Identity())
            return tree

        return self._keep("base", model, make)

    def planner(self, model: str, head: Head = CAUSAL) -> Planner:
        """Returns what forecasts the memory of runs of a model with such a head."""
        return self._keep(
            "planner", (model, head), lambda: Planner(model, self.workspace, self.skeleton(model, head)), most=2
        )

    def settled(self, spec: RunSpec) -> RunSpec:
        """Returns a spec that says all of its task, as `tasks.settled`.

        Raises:
            LoRAError: As there, or pages may not open a file.
        """
        if not spec.data.is_labelled:
            return spec
        self.check_model(spec.model)
        if spec.data.task == "classification" and not spec.data.labels:
            table = self.table(spec.data.source, spec.data.eval_source)
            return tasks.settled(spec, self.workspace, table=table)
        return tasks.settled(spec, self.workspace, tree=self.skeleton(spec.model, spec.head))

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
            changed += [path.stat().st_mtime_ns if path.is_file() else 0, mends_of(one, self.workspace).content()]
        key = (source, eval_source, *changed)
        return self._keep("table", key, lambda: read_table(source, self.workspace, eval_source))

    def opened(self, source: Source) -> Opened:
        """Returns the adapter at `source`, as it is there now.

        Raises:
            LoRAError: There is none, it cannot be read or does not fit its model, or pages may not open its place.
        """
        key = self.place_of(source)
        return self._keep("opened", key, lambda: self._open(source, key), most=KEPT_ADAPTERS)

    def place_of(self, source: Source) -> tuple[Source, tuple[int, ...]]:
        """Returns `source` with the times of its files, which change with the adapter.

        Raises:
            LoRAError: As of `opened`, as far as that can be said without reading the adapter.
        """
        if source.run:
            run = self.runs.get(source.run)
            folder = run.adapter_folder if source.step is None else run.checkpoints.at(source.step)
            if source.step is None and not run.has_adapter:
                raise LoRAError(
                    f"“{run.spec.name}” has no adapter yet; it is saved at the first evaluation and at the end."
                )
            files = [folder / name for name in ADAPTER_FILES]
        else:
            self._check_place("adapter", source.path)
            place = Path(source.path)
            files = [place / name for name in ADAPTER_FILES] if place.is_dir() else [place]
        return source, tuple(file.stat().st_mtime_ns for file in files if file.exists())

    def spectra(self, opened: Opened) -> dict[str, tuple[Factors, Spectrum]]:
        """Returns path → factors and spectrum of an adapter.

        Raises:
            LoRAError: The adapter holds NaN or infinity.
        """
        return self._keep("spectra", opened.key, lambda: _spectra_of(opened.adapter), most=4)

    def weight(self, opened: Opened, path: str) -> Tensor:
        """Returns W of one matrix of an adapter's base model, (out_features, in_features), in the type stored.

        Raises:
            LoRAError: The base model is not at hand, or keeps that matrix in a form that cannot be read alone.
        """
        if opened.model is None:
            named = opened.adapter.base_model
            raise LoRAError(
                f"W must be at hand for this, and the base model ({named or 'which the adapter does not name'}) is "
                "not; name it where the adapter is opened."
            )
        return read_matrix(opened.model, self.workspace, path, self.skeleton(opened.model))

    def weight_svd(self, opened: Opened, path: str) -> WeightSVD:
        """Returns the whole SVD of W of one matrix; seconds for a large one, the first time.

        Raises:
            LoRAError: As of `weight`.
        """
        key = (opened.model, path)
        return self._keep(
            "svd", key, lambda: weight_svd(self.weight(opened, path), self.workspace.cache / "svd"), most=2
        )

    def comparison(self, first: Opened, second: Opened) -> Comparison:
        """Returns what two adapters share, matrix by matrix.

        Raises:
            LoRAError: Matrices of one path differ in shape, or one of the two is DoRA's.
        """
        make = functools.partial(compare, first.adapter, second.adapter)
        return self._keep("comparison", (first.key, second.key), make, most=2)

    def intruders(self, opened: Opened, k: int, paths: Iterable[str]) -> Iterator[dict[str, Intruders | LoRAError]]:
        """Yields, matrix by matrix, path → the k strongest directions of W + ΔW; what is known is kept.

        W's whole SVD is needed: seconds for each large W, the first time. An error stands where W cannot be read.

        Raises:
            LoRAError: The base model is not at hand.
        """
        known = self._keep("intruders", (opened.key, k), dict, most=4)
        for path in paths:
            if path not in known:
                try:
                    svd = self.weight_svd(opened, path)
                    known[path] = intruder_dimensions(opened.adapter.factors[path], svd, min(k, len(svd.sigma)))
                except LoRAError as error:
                    if opened.model is None:
                        raise
                    known[path] = error
            yield known

    def vocabulary(self, model: str, side: str) -> tuple[Vocabulary, float]:
        """Returns the vectors of a model's tokens, as they are read or written, and chance's largest cosine with them.

        Raises:
            LoRAError: The model has none, or they cannot be read.
        """

        def make() -> tuple[Vocabulary, float]:
            found = vocabulary(self.skeleton(model), model, self.workspace, side)
            return found, found.chance()

        return self._keep("vocabulary", (model, side), make, most=2)

    def amplifications(self, opened: Opened) -> Iterator[dict[str, Amplification | LoRAError | None]]:
        """Yields, matrix by matrix, path → how its ΔW lies towards W; what is known is kept, so it may be stopped.

        None stands where ΔW = 0, an error where W cannot be read.

        Raises:
            LoRAError: The base model is not at hand.
        """
        known = self._keep("amplification", opened.key, dict, most=4)
        for path, (_, found) in self.spectra(opened).items():
            if path not in known:
                try:
                    known[path] = amplification(found, self.weight(opened, path))
                except LoRAError as error:
                    if opened.model is None:
                        raise
                    known[path] = error  # such as of an expert whose stack is stored in pieces
            yield known

    @property
    def loaded(self) -> str | None:
        """The model that is held in memory to answer with, if one is."""
        return next((model for model, *_ in [*self._kept["engine"]]), None)

    def engine(self, run: Run) -> Engine:
        """Returns the engine of a run's base model, which finds the adapters of all runs on that model."""
        run.spec.must_write("a chat")
        return self._engine_of(run.spec.model, run.spec.train)

    def engine_for(self, opened: Opened) -> tuple[Engine, Pane]:
        """Returns the engine of an adapter's base model, which must be at hand, and the pane that runs the adapter."""
        name = f"{opened.name} ({hash(opened.key):x})"
        with self._locks["adapters"]:
            self._guests.pop(name, None)
            self._guests[name] = opened.adapter
            for old in list(self._guests)[:-KEPT_ADAPTERS]:
                del self._guests[old]
        return self._engine_of(opened.model or "", opened.run.spec.train if opened.run else TrainConfig()), Pane(name)

    def judge(self, run: Run) -> Judge:
        """Returns what gives the labels of a run's task, with its base model, its head, and adapters of such runs."""
        spec = run.spec
        device = resolve_devices(spec.train.device)[0]
        dtype = resolve_dtype("fp32" if device.type == "cpu" else spec.train.precision, device)

        def load() -> Judge:
            options: dict[str, Any] = {"head": spec.head, "seed": spec.train.seed, "dtype": dtype}
            model = models.load_model(spec.model, self.workspace, device=str(device), **options)
            return Judge(model, self.tokenizer(spec.model), functools.partial(self.adapter, spec.model))

        return self._keep("engine", (spec.model, spec.head, spec.train.seed, device, dtype), load)

    def _engine_of(self, model: str, train: TrainConfig) -> Engine:
        device = resolve_devices(train.device)[0]
        small = self.info(model).num_parameters <= FP32_CHAT_LIMIT
        dtype = resolve_dtype("fp32" if device.type == "cpu" and small else train.precision, device)
        return self._keep("engine", (model, device, dtype), lambda: self._load_engine(model, device, dtype))

    def adapter(self, model: str, run_id: str, step: int = 0) -> Adapter | Baseline:
        """Returns a run's adapter, or what another method trained; the same object as long as its file is the same.

        Args:
            model: The base model that it has to be of.
            run_id: The run.
            step: Of the checkpoint it is taken from; 0 for the adapter as it was saved last.

        Raises:
            LoRAError: There is no such run, adapter or checkpoint, or it is of another base model.
        """
        if run_id in self._guests:
            return self._guests[run_id]
        run = self.runs.get(run_id)
        if run.spec.model != model:
            raise LoRAError(f"`adapter` (={run_id!r}) must be of a run on {model}; it is on {run.spec.model}.")
        if step and step not in run.checkpoints.steps():
            there = ", ".join(map(str, run.checkpoints.steps())) or "none"
            raise LoRAError(f"`step` (={step}) must be that of a checkpoint of “{run.spec.name}”; it has {there}.")
        source = Source(run_id, step or None)
        if run.spec.method.method == "lora":
            return self.opened(source).adapter
        folder = run.checkpoints.at(step) if step else run.adapter_folder
        return self._keep("baseline", self.place_of(source), lambda: Baseline.load(folder), most=2)

    def check(self, spec: RunSpec) -> None:
        """Checks a spec against its model and data as far as that takes no weights.

        Raises:
            LoRAError: A column or a matrix does not exist, r is larger than a matrix, or pages may not open a file.
        """
        self.check_model(spec.model)
        plan_method(self.skeleton(spec.model, spec.head), spec.method, spec.lora)
        if spec.row_length:  # it raises where nothing is left of a row
            data.check_spec(spec.data, self.table(spec.data.source, spec.data.eval_source))

    def start(self, spec: RunSpec, sweep: str | None = "") -> Run:
        """Starts a run, or one for each combination of a sweep, once all of them are checked; returns the first.

        Raises:
            LoRAError: As of `check`; nothing is started then.
        """
        wanted = [self.settled(one) for one in sweeps.grid(spec, sweeps.parse((sweep or "").splitlines()))]
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
        if model not in (STARTER, STARTER_ENCODER) and not is_on_hub:
            self._check_place("model", model)

    def check_places(self, spec: RunSpec) -> None:
        """Checks that a page may open what a spec from elsewhere names.

        Raises:
            LoRAError: Its model or a source of its rows is a place outside of `open_folders`.
        """
        self.check_model(spec.model)
        for one in (*split_source(spec.data.source), *split_source(spec.data.eval_source or "starter:none")):
            if one.partition(":")[0] not in ("starter", "hub"):
                self._check_place("source", one)

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

    def _open(self, source: Source, key: Hashable) -> Opened:
        if source.run:
            run = self.runs.get(source.run)
            at = "" if source.step is None else f", step {source.step}"
            folder = run.adapter_folder if source.step is None else run.checkpoints.at(source.step)
            return Opened(source, run.spec.name + at, Adapter.load(folder), run.spec.model, run, key)
        adapter = Adapter.load(source.path, scaling=source.scaling, parts=source.parts or None)
        if source.model:
            self.check_model(source.model)
            adapter.check_fit(self.skeleton(source.model))
        return Opened(source, Path(source.path).name, adapter, source.model or self._model_of(adapter), None, key)

    def _model_of(self, adapter: Adapter) -> str | None:
        """Returns the base model that an adapter names, where it is here: nothing is fetched without being asked."""
        model = adapter.base_model or ""
        try:
            if model not in (STARTER, STARTER_ENCODER):
                self._check_place("model", model)
            adapter.check_fit(self.skeleton(model))
        except LoRAError:
            return None
        return model

    def _keep(self, kind: str, key: Hashable, make: Callable[[], Any], most: int = 1) -> Any:
        """Returns the thing of that kind and key, made now unless it is one of the last `most` that were."""
        with self._locks[kind]:
            kept = self._kept[kind]
            if key not in kept:
                for oldest in [*kept][: max(0, len(kept) - most + 1)]:
                    del kept[oldest]  # before the next is made: two models need not fit at once
                kept[key] = make()
            return kept[key]

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
    found = spectra(adapter.factors)
    return {path: (f, found[path]) for path, f in adapter.factors.items()}
