"""Embedding tables by several processes; some are killed, and another number of them goes on.

Run as a program by `test_build_processes`; it imports once and forks for each process.

::

    python tables_processes.py DATA OUTPUT KILL_AT_PARTS WORLD
"""

import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import numpy as np

from embeddings import contents, distributed, encoding, vector_store
from embeddings.build import build_tables_together

AT_ONCE = 4


class Grouped:
    """Encodes a text as its length, its image's red and the lengths of all texts of the call.

    The last one tells whether the same calls were made.
    """

    fingerprint = "grouped-1"
    dim = 3
    normalized = False
    reads_images = True

    def __init__(self, seconds_a_call=0.0):
        self.seconds_a_call = seconds_a_call

    def encode_products(self, titles, images=None):
        reds = [im.getpixel((0, 0))[0] if im else -1 for im in images or [None] * len(titles)]
        return self._encode(titles, reds)

    def encode_queries(self, texts):
        return self._encode(texts, [0] * len(texts))

    def _encode(self, texts, numbers):
        time.sleep(self.seconds_a_call)
        total = sum(map(len, texts))
        rows = [[len(text), number, total] for text, number in zip(texts, numbers, strict=True)]
        return np.array(rows, np.float32)


def small_calls(patch=setattr):
    """Let calls be small and parts hold one of them."""
    patch(contents, "_AT_ONCE", AT_ONCE)
    patch(encoding, "_TEXTS_AT_ONCE", AT_ONCE)
    patch(vector_store, "_SECONDS_A_PART", 0.0)


def fork(data: Path, output: Path, world: int, seconds_a_call: float) -> list[int]:
    """Start processes with the environment that torchrun gives them; returns their ids."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    children = []
    for rank in range(world):
        child = os.fork()
        if not child:
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
            os.environ |= place | {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
            try:
                with distributed.process_group():
                    build_tables_together(data, output, Grouped(seconds_a_call))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    return children


def main(data: Path, output: Path, kill_at: int, world: int) -> None:
    if kill_at:
        children = fork(data, output, 2, 0.1)
        while len(list((output / ".parts").glob("*.parquet"))) < kill_at:
            time.sleep(0.005)
        for child in children:
            os.kill(child, signal.SIGKILL)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert not (output / "product.parquet").exists()
    for child in fork(data, output, world, 0.0):
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


if __name__ == "__main__":
    small_calls()
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
