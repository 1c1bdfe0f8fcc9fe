"""Runs that go on, say and end what a test wants, without a worker."""

import contextlib

from core import Evaluated, Started, Step, TrainConfig
from studio.event_log import EventWriter
from studio.runs import Runs
from studio.specs import RunSpec


def step(number: int) -> Step:
    return Step(number, 2.0 / number, 1e-3, 0.25, 120, 80, step_seconds=0.5, memory_bytes=2 * 10**9)


class ByHand:
    """A run that goes on until `end` is called."""

    def __init__(self, workspace, name):
        self.run = Runs(workspace).create(RunSpec(name, train=TrainConfig(steps=40, device="cpu")))
        self.held = contextlib.ExitStack()
        self.held.enter_context(self.run.locked())
        self.say(Started(40, 384, 10_000, "cpu", "float32", "resident memory of the process"))
        self.say(Evaluated(0, 3.25, 9, 0.1), *map(step, range(1, 11)), Evaluated(10, 1.125, 9, 0.1))

    def say(self, *events):
        writer = EventWriter(self.run.log)
        for event in events:
            writer.write(event)
        writer.close()

    def end(self, *events):
        self.say(*events)
        self.held.close()
