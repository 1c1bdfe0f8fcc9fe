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


def test_of_two_places_that_do_the_smaller_is_taken_wherever_it_lies():
    heap = Heap()
    for sizes in ((3_000, 2_000), (2_000, 3_000)):
        places = [(heap.take(size), heap.take(100))[0] for size in sizes]
        for place in places:
            heap.give(*place)
        assert heap.take(1_500)[0] == places[sizes.index(2_000)][0]


def test_what_lies_at_the_end_is_used_again_whatever_its_size():
    heap = Heap()
    heap.take(1000)
    for size in (5_000, 9_000, 7_000):
        heap.give(*heap.take(size))
    assert 10_000 <= heap.peak_bytes < 10_100


def tensors_that_come_and_go(seed: int) -> list[tuple[int, int]]:
    """(number, bytes) of each that comes, (number, 0) as it goes: of few sizes, as in a model, some of which stay."""
    draw, events, held = random.Random(seed), [], []
    for number in range(600):
        events.append((number, draw.choice(SIZES)))
        held.append(number)
        while len(held) > 12 + number // 20:
            events.append((held.pop(draw.randrange(len(held) - 8, len(held))), 0))
    return events


# Multiples of 64 with what stands before them, so that aligned tensors lie side by side with nothing between them, in
# which something of the process might settle.
SIZES = [(1 << 20) - 16, (1 << 20) - 16, (3 << 20) - 16, 299_968 - 16, 89_984 - 16]

CHILD = """
import ctypes, json, sys, torch
sbrk = ctypes.CDLL(None).sbrk
sbrk.restype, sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
room = lambda size: torch.empty(size, dtype=torch.uint8)
sizes, rounds = json.load(sys.stdin)
before = [room(size) for size in 8 * sizes]
del before[::2]  # a process has holes, the more the longer it has run: they are filled, so that none does for a tensor
filled = []
for events in rounds:
    for size in sorted({*sizes}, reverse=True):
        end = sbrk(0)
        while sbrk(0) == end:
            filled.append(room(size))
    held, reach, start = {}, 0, room(1 << 20).data_ptr()
    for number, size in events:
        if size:
            held[number] = room(size)
            reach = max(reach, held[number].data_ptr() + size - start)
        else:
            del held[number]
    print(reach)
    filled.append(held)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the heap is glibc's")
def test_it_reaches_as_far_as_glibc_s_does_for_the_same_tensors():
    rounds = [tensors_that_come_and_go(seed) for seed in range(12)]
    said = json.dumps([SIZES, rounds])
    done = subprocess.run([sys.executable, "-c", CHILD], input=said, env=os.environ | KEEPS_MEMORY, **OF_TEXT)
    measured = [int(line) for line in done.stdout.split()]
    told = []
    for events in rounds:
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
        told.append(heap.peak_bytes)
    assert len(measured) == len(told)
    # Of equal places each takes another, from which each goes its own way: of one round that is a tenth, of all little.
    assert sum(told) == pytest.approx(sum(measured), rel=0.06)


OF_TEXT = {"check": True, "capture_output": True, "text": True}
