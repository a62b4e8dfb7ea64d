"""What compiled kernels run by ptx.py read and write, guarded: allocations, and the shared memory of a block."""

from __future__ import annotations

import numpy as np

SHARED_BYTES = 232448
ALIGNED = 256
SEVERAL = 1 << 20  # warps have read a byte


class PtxError(Exception):
    pass


class Memory:
    """Global memory: a few allocations, each surrounded by bytes that nobody may touch."""

    def __init__(self) -> None:
        self._base = 1 << 40
        self._starts: list[int] = []
        self._arrays: list[np.ndarray] = []

    def allocate(self, data: np.ndarray) -> int:
        """data: uint8, copied. Returns its address."""
        address = self._base
        self._base += (len(data) // ALIGNED + 2) * ALIGNED
        self._starts.append(address)
        self._arrays.append(data.copy())
        return address

    def find(self, addresses: np.ndarray, num_bytes: int) -> tuple[int, np.ndarray]:
        """Which allocation they are all in, and [lanes, num_bytes] offsets."""
        which = int(np.searchsorted(self._starts, addresses[0], side="right")) - 1
        start = self._starts[which] if which >= 0 else 0
        offsets = addresses.astype(np.int64) - start
        size = len(self._arrays[which]) if which >= 0 else 0
        if (offsets % num_bytes).any():
            raise PtxError("misaligned access to global memory")
        if offsets.min() < 0 or offsets.max() + num_bytes > size:
            raise PtxError(f"access outside of global memory: {offsets.min()} .. {offsets.max()} of {size} bytes")
        return which, offsets[:, None] + np.arange(num_bytes)

    def bytes_of(self, which: int) -> np.ndarray:
        return self._arrays[which]


class SharedMemory:
    """Of a block. Knows who has touched each byte since the last barrier."""

    def __init__(self) -> None:
        self.data = np.full(SHARED_BYTES, 0xFF, np.uint8)
        self._writer = np.full(SHARED_BYTES, -1)
        self._reader = np.full(SHARED_BYTES, -1)

    def pass_barrier(self) -> None:
        self._writer.fill(-1)
        self._reader.fill(-1)

    def _cells(self, addresses: np.ndarray, num_bytes: int) -> np.ndarray:
        cells: np.ndarray = addresses.astype(np.int64)[:, None] + np.arange(num_bytes)
        if cells.min() < 0 or cells.max() >= SHARED_BYTES:
            raise PtxError("access outside of shared memory")
        return cells

    def load(self, addresses: np.ndarray, num_bytes: int, warps: np.ndarray) -> np.ndarray:
        cells = self._cells(addresses, num_bytes)
        writer, warp = self._writer[cells], warps[:, None]
        if ((writer >= 0) & (writer != warp)).any():
            raise PtxError("race: a warp reads what another has written, with no barrier between")
        before = self._reader[cells]
        readers = np.where((before >= 0) & (before != warp), SEVERAL, warp)
        self._reader[cells] = readers
        self._reader[cells[self._reader[cells] != readers]] = SEVERAL  # at once
        return self.data[cells]

    def store(self, addresses: np.ndarray, values: np.ndarray, warps: np.ndarray) -> None:
        cells, warp = self._cells(addresses, values.shape[1]), warps[:, None]
        for owner in (self._writer[cells], self._reader[cells]):
            if ((owner >= 0) & (owner != warp)).any():
                raise PtxError("race: a warp writes what another has touched, with no barrier between")
        self._writer[cells] = np.broadcast_to(warp, cells.shape)
        self.data[cells] = values
        if ((self.data[cells] != values) & (self._writer[cells] != warp)).any():
            raise PtxError("race: two warps write different numbers at once")
