"""Random calls to the prefix cache for ten minutes, from several threads, over a pool that is always too small.

    python -m bench.soak_prefix_cache [--seconds 600] [--threads 4] [--pages 20000] [--seed 0]

Every thread runs sequences about shared images: matched, continued by latents and tokens, cached, forked, released.
Pages must hold what was written to them for those very positions. Once a second all threads pause for check_integrity.
Fails too if pages or memory leak.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import resource
import sys
import threading
import time
from pathlib import Path

import numpy as np

from vitalrt._core import BlockPool, OutOfBlocksError
from vitalrt.engine.prefix_cache import IMAGE, PrefixCache, PrefixKey, namespace_digest

PAGE_SIZE = 16
MAX_GROWTH_BYTES = 64 << 20


class Soak:
    """contents[page] is what its holder wrote there: a hash of all positions up to the page's end."""

    def __init__(self, num_pages: int) -> None:
        self.pool = BlockPool(num_pages)
        self.cache = PrefixCache(self.pool, PAGE_SIZE)
        self.contents: list[bytes] = [b""] * num_pages
        self.stop = threading.Event()
        self.faults: list[BaseException] = []
        self.num_sequences = 0
        self._count_lock = threading.Lock()

    def work(self, seed: int) -> None:
        draw = random.Random(seed)
        try:
            while not self.stop.is_set():
                num_done = self.run_batch(draw)
                with self._count_lock:
                    self.num_sequences += num_done
        except BaseException as fault:
            self.faults.append(fault)
            self.stop.set()

    def run_batch(self, draw: random.Random) -> int:
        keys = [random_key(draw) for _ in range(draw.randint(1, 8))]
        held = [pages.tolist() for pages in self.cache.match(keys)]
        try:
            for key, pages in zip(keys, held, strict=True):
                self.require_contents(key, pages)
                num_matched = len(pages)
                pages += self.take(-(-len(key.positions) // PAGE_SIZE) - num_matched)
                self.write(key, pages, num_matched)
            self.cache.insert(keys, held)
            num_tokens = [draw.randint(0, len(key.positions)) for key in keys]
            branches = self.cache.fork(held, num_tokens)
            for key, length, branch in zip(keys, num_tokens, branches, strict=True):
                self.require_contents(key, branch.pages.tolist()[: length // PAGE_SIZE])
            self.cache.release([branch.pages for branch in branches])
            for key, pages in zip(keys, held, strict=True):
                self.require_contents(key, pages[: len(key.positions) // PAGE_SIZE])
        except OutOfBlocksError:
            pass  # other threads hold the rest; what this one holds goes back below
        finally:
            self.cache.release(held)
        return len(keys)

    def take(self, count: int) -> list[int]:
        missing = count - self.pool.num_free
        if missing > 0:
            self.cache.evict(missing)
        return self.pool.allocate(count)

    def write(self, key: PrefixKey, pages: list[int], first: int) -> None:
        for index in range(first, len(key.positions) // PAGE_SIZE):
            self.contents[pages[index]] = content(key, index)

    def require_contents(self, key: PrefixKey, pages: list[int]) -> None:
        for index, page in enumerate(pages):
            if self.contents[page] != content(key, index):
                raise RuntimeError(f"page {page} does not hold positions {index * PAGE_SIZE} and on")


def content(key: PrefixKey, index: int) -> bytes:
    return hashlib.blake2b(key.digests + key.positions[: (index + 1) * PAGE_SIZE].tobytes(), digest_size=16).digest()


def random_key(draw: random.Random) -> PrefixKey:
    """One of 200 images in one of 2 namespaces, one of 5 questions, then up to 8 latents and some of an answer."""
    image = draw.randrange(200)
    numbers = np.random.default_rng(draw.randrange(5))
    placeholders = np.arange(64 + image, dtype=np.uint32) + np.uint32(IMAGE)
    question = numbers.integers(0, 1000, draw.choice((7, 40, 90)), dtype=np.uint32)
    digest = hashlib.sha256(str(image).encode()).digest()
    key = PrefixKey(namespace_digest("model", None, str(draw.randrange(2))) + digest, placeholders)
    key = key.then_tokens(question.tolist()).then_latents(draw.randint(0, 8))
    return key.then_tokens(draw.choices(range(3), k=draw.randint(0, 40)))


def resident_bytes() -> int:
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--pages", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    soak = Soak(arguments.pages)
    threads = [threading.Thread(target=soak.work, args=(arguments.seed + at,)) for at in range(arguments.threads)]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    resident: list[int] = []
    while (elapsed := time.monotonic() - start) < arguments.seconds and not soak.stop.wait(1):
        soak.cache.check_integrity()
        resident.append(resident_bytes())
    soak.stop.set()
    for thread in threads:
        thread.join()
    if soak.faults:
        raise soak.faults[0]
    soak.cache.check_integrity()
    soak.cache.evict(arguments.pages)
    if soak.pool.num_free != arguments.pages:
        raise RuntimeError(f"{arguments.pages - soak.pool.num_free} pages leaked")
    growth = resident[-1] - resident[len(resident) // 2] if resident else 0
    if growth > MAX_GROWTH_BYTES:
        raise RuntimeError(f"memory grew by {growth / 2**20:.0f} MiB in the second half")
    statistics = soak.cache.statistics()
    print(
        f"{elapsed:.0f} s, {soak.num_sequences:,} sequences, {statistics.pages_hit:,} of {statistics.pages_queried:,} "
        f"pages hit, {statistics.pages_evicted:,} evicted; memory grew by {growth / 2**20:.1f} MiB in the second half"
    )


if __name__ == "__main__":
    main()
