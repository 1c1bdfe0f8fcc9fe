"""The heap of a forecast, against what must be so and against the C library's own."""

import json
import os
import platform
import random
import subprocess
import sys

import pytest

from core.heap import SPARE_BYTES, Heap
from studio.jobs import KEEPS_MEMORY


def test_a_freed_tensor_s_place_does_for_a_smaller_one_alone_and_two_neighbours_places_do_for_both():
    heap = Heap()
    first, second, _ = (heap.take(10**6) for _ in range(3))
    reach = heap.peak_bytes
    heap.give(*first)
    assert heap.take(10**6)[0] == reach  # what it needs to spare is not there
    reach = heap.peak_bytes
    assert heap.take(10**6 - SPARE_BYTES) == (first[0], first[1] - SPARE_BYTES)
    heap.give(*second)
    assert heap.take(10**6)[0] == first[1] - SPARE_BYTES
    assert heap.peak_bytes == reach


def test_what_lies_at_the_end_is_used_again_whatever_its_size():
    heap = Heap()
    heap.take(1000)
    for size in (5_000, 9_000, 7_000):
        heap.give(*heap.take(size))
    assert 10_000 <= heap.peak_bytes < 10_100


def tensors_that_come_and_go() -> list[tuple[int, int]]:
    """(number, bytes) of each that comes, (number, 0) as it goes: of few sizes, as in a model, some of which stay."""
    draw, events, held = random.Random(0), [], []
    for number in range(600):
        events.append((number, draw.choice([1 << 20, 1 << 20, 3 << 20, 300_000, 90_000])))
        held.append(number)
        while len(held) > 12 + number // 20:
            events.append((held.pop(draw.randrange(len(held) - 8, len(held))), 0))
    return events


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the heap is glibc's")
def test_it_reaches_as_far_as_glibc_s_does_for_the_same_tensors():
    code = """
import json, sys, torch
held, reach = {}, 0
start = torch.empty(1 << 20, dtype=torch.uint8).data_ptr()
for number, size in json.load(sys.stdin):
    if size:
        held[number] = torch.empty(size, dtype=torch.uint8)
        reach = max(reach, held[number].data_ptr() + size - start)
    else:
        del held[number]
print(reach)
"""
    events = tensors_that_come_and_go()
    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(events), env=os.environ | KEEPS_MEMORY, **OF_TEXT
    )
    heap, places = Heap(), {}
    held = most = 0
    for number, size in events:
        if size:
            places[number] = heap.take(size), size
            held += size
        else:
            place, freed = places.pop(number)
            heap.give(*place)
            held -= freed
        most = max(most, held)
    assert heap.peak_bytes > 1.1 * most  # there are holes to be told
    assert heap.peak_bytes == pytest.approx(int(done.stdout), rel=0.05)


OF_TEXT = {"check": True, "capture_output": True, "text": True}
