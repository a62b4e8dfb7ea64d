"""The paged KV cache: memory taken once, pages lent to sequences by the C++ block pool, and kept for others to find.

S slots (tokens), G key/value heads, D head dim, d width, T prompt tokens.
"""

from __future__ import annotations

from collections.abc import Sequence as Many

import torch

from vitalrt._core import BlockPool
from vitalrt.config import DecoderConfig, EngineConfig
from vitalrt.engine.prefix_cache import PrefixCache, PrefixKey
from vitalrt.engine.sequence import Sequence
from vitalrt.errors import CapacityError
from vitalrt.transfers import rows_of

DEFAULT_BYTES = 2 << 30
DEFAULT_MAX_TOKENS = 32768


class PagedCache:
    """k[layer], v[layer]: [S, G, D]. A page is page_size consecutive slots; full ones are shared by who begins alike.

    A sequence that goes on from a latent step needs the hidden states there, which keys and values do not contain. They
    are kept by page: thoughts[page][offset] is what the token at that offset gave, [d].
    """

    def __init__(self, config: DecoderConfig, engine: EngineConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.page_size = engine.page_size
        self.bytes_per_token = config.kv_values_per_token * dtype.itemsize
        num_tokens = engine.cache_tokens or min(DEFAULT_BYTES // self.bytes_per_token, DEFAULT_MAX_TOKENS)
        num_pages = max(1, -(-num_tokens // engine.page_size))
        self.pool = BlockPool(num_pages)
        self.prefixes = PrefixCache(self.pool, engine.page_size)
        self._thoughts: dict[int, dict[int, torch.Tensor]] = {}
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

    @property
    def num_available_pages(self) -> int:
        """Free, or kept for nobody in particular: what take() can give."""
        return self.pool.num_free + self.prefixes.statistics().pages_idle

    def num_pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def require_room(self, num_tokens: int) -> None:
        """Raises CapacityError if a sequence of num_tokens could never be held, even alone."""
        if self.num_pages_for(num_tokens) > self.pool.num_blocks:
            raise CapacityError(
                f"cache_tokens: the request needs {num_tokens} tokens of KV cache (prompt, latent steps and "
                f"max_new_tokens), the engine has {self.num_tokens}; shorten it or load with a larger cache_tokens"
            )

    def take(self, sequence: Sequence, num_pages: int) -> bool:
        """Give it that many pages more, at the cost of the prefixes used least recently; False if others hold them."""
        if num_pages > self.num_available_pages:
            return False
        self.prefixes.evict(max(0, num_pages - self.pool.num_free))
        pages = self.pool.allocate(num_pages)
        for page in pages:
            self._thoughts.pop(page, None)  # of what it held before
        sequence.place(pages, self._slots_of(pages))
        return True

    def give_back(self, sequences: Many[Sequence]) -> None:
        """Take all pages from these. Those that are kept stay, for whoever begins alike."""
        self.prefixes.release([sequence.take_pages() for sequence in sequences])

    def find(self, sequence: Sequence) -> None:
        """Give a sequence without pages those that are kept of what it begins with, and its thoughts so far.

        Its last known input is left to compute, for the sequence goes on from what that gives.
        """
        key = sequence.whole_key()
        if key is None:
            return
        pages: list[int] = self.prefixes.match([key])[0].tolist()
        if not sequence.thoughts:
            sequence.thoughts = self._thoughts_in(pages, sequence)
        num_kept = min(len(pages), (sequence.num_known - 1) // self.page_size)
        self.prefixes.release([pages[num_kept:]])
        if num_kept:
            sequence.place(pages[:num_kept], self._slots_of(pages[:num_kept]))
            sequence.num_tokens = num_kept * self.page_size

    def keep(self, sequences: Many[Sequence], num_tokens: Many[int]) -> None:
        """Let others find the full pages of each one's first num_tokens tokens, and the thoughts in them."""
        keys, pages = [], []
        for sequence, count in zip(sequences, num_tokens, strict=True):
            key = sequence.whole_key()
            num_pages = count // self.page_size
            if key is None or not num_pages:
                continue
            keys.append(PrefixKey(key.digests, key.positions[:count]))
            pages.append(sequence.pages[:num_pages])
            for k, thought in enumerate(sequence.thoughts):
                page, offset = divmod(sequence.prompt.num_tokens - 1 + k, self.page_size)
                if page < num_pages:
                    # Cloned: it may be a row of a whole batch, which would stay in memory with it.
                    self._thoughts.setdefault(sequence.pages[page], {}).setdefault(offset, thought.clone())
        self.prefixes.insert(keys, pages)

    def _thoughts_in(self, pages: list[int], sequence: Sequence) -> list[torch.Tensor]:
        """z_0, z_1, .. as far as these pages' thoughts go without a gap."""
        found: list[torch.Tensor] = []
        while len(found) <= sequence.decoding.k:
            page, offset = divmod(sequence.prompt.num_tokens - 1 + len(found), self.page_size)
            thought = self._thoughts.get(pages[page], {}).get(offset) if page < len(pages) else None
            if thought is None:
                break
            found.append(thought)
        return found

    def _slots_of(self, pages: list[int]) -> torch.Tensor:
        """[len(pages) * page_size] int64: the slot of each token position."""
        return rows_of(self._slots, pages).flatten()
