"""What a run would take, before it is begun: parameters, memory beside full fine-tuning, and what makes it fit.

All of it comes from the model's config: no weight is read.
"""

import heapq
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import count
from typing import NamedTuple

import torch
from torch import nn

from core import (
    FRAMEWORK_BYTES,
    LoRAError,
    MemoryForecast,
    MethodConfig,
    device_memory,
    forecast_memory,
    plan_method,
    quoted,
    resolve_devices,
)
from studio import models, setup
from studio.heads import Head
from studio.jobs import ENVIRONMENT
from studio.remedies import Remedy, for_memory
from studio.specs import RunSpec
from studio.workspace import Workspace, write_whole

log = logging.getLogger("studio.planner")

MOST_FORECASTS, MOST_PROPOSALS = 40, 4
MOST_KEPT = 500

_forecasting = threading.Lock()
"""Held while shapes go through a model: two at once would take from each other, and from a training."""


@dataclass(frozen=True)
class Plan:
    """What a run would take.

    Attributes:
        device: On which; of several, each.
        num_devices: How many train together.
        dtype: Of the weights, in torch's words.
        num_parameters: Of the base model, tied ones once.
        num_trained: Of A and B and what else is trained.
        adapter_bytes: Of the adapter's file, float32.
        lora: Of one device, by the run's own method.
        full: The same step with every weight trained in the weights' type, by Adam with float32 moments.
        free_bytes, total_bytes: Of the device that has the least; 0 where nobody says.
        method: How the run trains.
    """

    device: str
    num_devices: int
    dtype: str
    num_parameters: int
    num_trained: int
    adapter_bytes: int
    lora: MemoryForecast
    full: MemoryForecast
    free_bytes: int
    total_bytes: int
    method: str = "lora"

    @property
    def fits(self) -> bool | None:
        """Whether the run fits what is free; None where nobody says what that is."""
        return self.lora.total <= self.free_bytes if self.free_bytes else None


class Planner:
    """Makes plans for one model with one head, whose skeleton it keeps."""

    def __init__(
        self, model: str, workspace: Workspace, skeleton: nn.Module | None = None, head: Head | None = None
    ) -> None:
        """Takes a model's name, and its skeleton if there is one already; else its head, if it is not its own.

        Raises:
            LoRAError: `model` names nothing that has a config which can be built from.
        """
        self._workspace = workspace
        self._skeleton = skeleton or models.skeleton(model, workspace, head, needs_weights=False)
        self._model = model
        self._known: dict[str, MemoryForecast] = {}

    def plan(self, spec: RunSpec, *, num_devices: int | None = None, free_bytes: int | None = None) -> Plan:
        """Returns what a run would take.

        Args:
            spec: The run.
            num_devices: How many devices train together; None for as many as its setting names.
            free_bytes: What each has; None for what is free now.

        Raises:
            LoRAError: The settings do not fit the model, or the device is not there.
        """
        devices = resolve_devices(spec.train.device)
        number = num_devices or len(devices)
        if number < 1:
            raise LoRAError(f"`devices` (={number}) must be at least 1.")
        free, total = room(devices)
        injection = plan_method(self._skeleton, spec.method, spec.lora)
        lora = self.forecast(spec, num_devices=number)
        return Plan(
            device=str(devices[0]),
            num_devices=number,
            dtype=str(spec.weights_dtype(devices[0])).removeprefix("torch."),
            num_parameters=sum(p.numel() for p in self._skeleton.parameters()),
            num_trained=injection.num_trainable,
            adapter_bytes=lora.adapter,
            lora=lora,
            full=self.forecast(spec, num_devices=number, full=True),
            free_bytes=free if free_bytes is None else free_bytes,
            total_bytes=total if free_bytes is None else free_bytes,
            method=spec.method.method,
        )

    def forecast(self, spec: RunSpec, *, num_devices: int | None = None, full: bool = False) -> MemoryForecast:
        """Returns what each of a run's devices would hold at its peak, the libraries' share included.

        What was asked before is answered at once.

        Raises:
            LoRAError: The settings do not fit the model, the device is not there, or the model wants values.
        """
        devices = resolve_devices(spec.train.device)
        dtype = spec.weights_dtype(devices[0])
        spec = replace(spec, method=MethodConfig(method="full")) if full else spec
        parts = (spec.lora, spec.method, spec.train)
        key = json.dumps([*(part.to_dict() for part in parts), num_devices, str(dtype)])
        with _forecasting:
            if key not in self._known:
                if len(self._known) >= MOST_KEPT:
                    self._known.clear()
                self._known[key] = self._forecast(spec, dtype, devices, num_devices)
            return replace(self._known[key], framework=framework_share(devices[0], self._workspace, dtype))

    def _forecast(
        self, spec: RunSpec, dtype: torch.dtype, devices: Sequence[torch.device], num_devices: int | None
    ) -> MemoryForecast:
        try:
            return forecast_memory(
                self._skeleton,
                spec.lora,
                spec.train,
                dtype,
                method=spec.method,
                prepare=setup.preparation(spec),
                num_devices=num_devices or len(devices),
                on_heap=devices[0].type == "cpu",
                per_row=spec.head.is_of_rows,
            )
        except LoRAError:
            raise
        except Exception as error:  # code of a model that does not run on shapes alone
            log.exception("The memory of %s could not be forecast", self._model)
            raise LoRAError(
                f"`model` (={quoted(self._model)}) must run on shapes alone for a forecast of its memory, and does not "
                f"({type(error).__name__}); a probe measures it."
            ) from error

    def fit(self, spec: RunSpec, free_bytes: int, *, num_devices: int | None = None) -> Iterator[Remedy | None]:
        """Yields a few changes, or several at once, after which a run fits, the cheapest in time first.

        Those that train the same come before those that train less.
        None is yielded after each look at one that does not fit, so that who waits sees that it goes on; at most
        `MOST_FORECASTS` are looked at, and one where the weights alone, in 16 bits and split, are too many.

        Raises:
            LoRAError: The settings do not fit the model, or the device is not there.
        """
        devices = resolve_devices(spec.train.device)
        most_smaller = len(devices) * spec.weights_dtype(devices[0]).itemsize / 2  # of the weights, by all changes
        order, seen = count(), {json.dumps(spec.to_dict())}
        waiting = [_Way(False, 1.0, next(order), spec, {})]
        found: list[_Way] = []
        for _ in range(MOST_FORECASTS):
            while waiting and any(done.steps.keys() <= waiting[0].steps.keys() for done in found):
                heapq.heappop(waiting)  # a part of it is enough
            if not waiting or len(found) == MOST_PROPOSALS:
                return
            way = heapq.heappop(waiting)
            forecast = self.forecast(way.spec, num_devices=num_devices)
            if (total := forecast.total) <= free_bytes:
                found.append(way)
                yield way.remedy(total)
                continue
            yield None
            if not way.steps and forecast.weights > free_bytes * most_smaller:
                return
            for step in for_memory(way.spec):
                try:
                    plan_method(self._skeleton, step.spec.method, step.spec.lora)
                except LoRAError:  # the model has no such matrices
                    continue
                if (key := json.dumps(step.spec.to_dict())) not in seen:
                    seen.add(key)
                    heapq.heappush(waiting, way.further(step, next(order)))


class _Way(NamedTuple):
    """Changes of a run, in the order in which they are tried."""

    trains_less: bool
    relative_time: float
    number: int
    spec: RunSpec
    steps: dict[str, Remedy]

    def further(self, step: Remedy, number: int) -> "_Way":
        steps = {**self.steps, step.setting: step}  # half of the half stands for both
        less, time = self.trains_less or step.trains_less, self.relative_time * step.relative_time
        return _Way(less, time, number, step.spec, steps)

    def remedy(self, total: int) -> Remedy:
        label = " + ".join(step.label for step in self.steps.values())
        cost = "; ".join(step.cost for step in self.steps.values())
        names = ",".join(self.steps)
        return Remedy(names, label, self.spec, total, self.relative_time, self.trains_less, cost)


def room(devices: Sequence[torch.device]) -> tuple[int, int]:
    """Returns (free_bytes, total_bytes) that each of the devices has: of the one with the least.

    What is named several times, as in cpu,cpu, is shared.
    """
    shares = [tuple(size // devices.count(device) for size in device_memory(device)) for device in devices]
    return min((free, total) for free, total in shares)


def framework_share(device: torch.device, workspace: Workspace, dtype: torch.dtype = torch.float32) -> int:
    """Returns what the libraries take without a model: on a CPU as measured, else by a constant.

    It is measured once for a workspace, versions of the libraries and a type of weights, by a process that does what a
    worker does with a model of hardly any size: code that is used, and what it sets up for itself, takes memory, too.
    """
    if device.type != "cpu":
        return FRAMEWORK_BYTES[device.type]
    name = str(dtype).removeprefix("torch.")
    place = workspace.cache / f"framework-{name}.json"
    key = f"torch {torch.__version__}, transformers {version('transformers')}, Python {sys.version}"
    try:
        known = json.loads(place.read_text())
        if known["of"] == key:
            return int(known["bytes"])
    except (OSError, ValueError, KeyError, TypeError):  # not measured yet, or not with these versions
        pass
    command = [sys.executable, "-P", "-m", "studio.probe", "--framework", name, str(workspace.root)]
    environment = {**ENVIRONMENT, **os.environ}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, env=environment
    )
    if done.returncode:
        log.warning("What the libraries take could not be measured: %s", done.stderr[-500:])
        return FRAMEWORK_BYTES["cpu"]
    found = int(done.stdout)
    write_whole(place, json.dumps({"of": key, "bytes": found}).encode())
    return found
