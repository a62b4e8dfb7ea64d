"""The paged KV cache: memory taken once, pages lent to sequences by the C++ block pool.

S slots (tokens), G key/value heads, D head dim.
"""

from __future__ import annotations

import torch

from vitalrt._core import BlockPool
from vitalrt.config import DecoderConfig, EngineConfig
from vitalrt.errors import CapacityError

DEFAULT_BYTES = 2 << 30
DEFAULT_MAX_TOKENS = 32768


class PagedCache:
    """k[layer], v[layer]: [S, G, D]. A page is page_size consecutive slots and belongs to one sequence at a time."""

    def __init__(self, config: DecoderConfig, engine: EngineConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.page_size = engine.page_size
        self.bytes_per_token = config.kv_values_per_token * dtype.itemsize
        num_tokens = engine.cache_tokens or min(DEFAULT_BYTES // self.bytes_per_token, DEFAULT_MAX_TOKENS)
        num_pages = max(1, -(-num_tokens // engine.page_size))
        self.pool = BlockPool(num_pages)
        self._slots = torch.arange(num_pages * engine.page_size, device=device).view(num_pages, engine.page_size)
        shape = (config.num_hidden_layers, num_pages * engine.page_size, config.num_key_value_heads, config.head_dim)
        try:
            self.k = torch.empty(shape, device=device, dtype=dtype)
            self.v = torch.empty(shape, device=device, dtype=dtype)
        except RuntimeError as error:
            size = num_pages * self.page_size * self.bytes_per_token
            raise CapacityError(f"cache_tokens: no room on {device} for {size / 2**30:.1f} GiB of KV cache") from error

    @property
    def num_tokens(self) -> int:
        return self.pool.num_blocks * self.page_size

    @property
    def num_bytes(self) -> int:
        return self.num_tokens * self.bytes_per_token

    def num_pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def require_room(self, num_tokens: int) -> None:
        """Raises CapacityError if a sequence of num_tokens could never be held, even alone."""
        if self.num_pages_for(num_tokens) > self.pool.num_blocks:
            raise CapacityError(
                f"cache_tokens: the request needs {num_tokens} tokens of KV cache (prompt, latent steps and "
                f"max_new_tokens), the engine has {self.num_tokens}; shorten it or load with a larger cache_tokens"
            )

    def take(self, num_tokens: int) -> list[int] | None:
        """Pages for num_tokens tokens, or None while others hold them."""
        num_pages = self.num_pages_for(num_tokens)
        return self.pool.allocate(num_pages) if num_pages <= self.pool.num_free else None

    def give_back(self, pages: list[int]) -> None:
        self.pool.release(pages)

    def slots_of(self, pages: list[int]) -> torch.Tensor:
        """[len(pages) * page_size] int64: the slot of each token position."""
        return self._slots.index_select(0, torch.tensor(pages, device=self._slots.device)).flatten()
