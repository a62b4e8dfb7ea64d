"""A radix tree in plain Python, the peer of bench_prefix_cache.py.

Built as SGLang's RadixCache is: edges of many pages, children by their first page's key, references along the path, a
set of the leaves that nobody holds, and a heap over them for each eviction. It has no tensors and no events, so that
only the tree is timed, and compares a whole edge at once before it looks page by page.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable
from itertools import count

PageKey = tuple[int, ...]


class Node:
    """An edge and what hangs below it. key: positions, whole pages of them.  pages: one per page of the key."""

    __slots__ = ("children", "key", "last_used", "num_users", "pages", "parent")

    def __init__(self, parent: Node | None, key: list[int], pages: list[int], last_used: int) -> None:
        self.parent = parent
        self.key = key
        self.pages = pages
        self.last_used = last_used
        self.num_users = 0
        self.children: dict[PageKey, Node] = {}

    def __lt__(self, other: Node) -> bool:
        return self.last_used < other.last_used


class PythonRadix:
    """Sequences are a namespace and positions: one integer each, which says all that the position holds.

    What match() and insert() return as a node is held until it is released.
    """

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.num_pages = 0
        self._roots: dict[Hashable, Node] = {}
        self._idle_leaves: set[Node] = set()
        self._clock = count(1)

    def match(self, namespace: Hashable, positions: list[int]) -> tuple[list[int], Node]:
        """The cached pages that the positions begin with, and the node that holds them."""
        node, pages = self._walk(namespace, positions)
        self._hold(node)
        return pages, node

    def insert(self, namespace: Hashable, positions: list[int], pages: list[int]) -> tuple[int, Node]:
        """Returns how many pages are now cached that were not, and the node that holds them all."""
        node, found = self._walk(namespace, positions)
        num_pages = len(positions) // self.page_size
        num_new = num_pages - len(found)
        if num_new:
            start = len(found) * self.page_size
            key = positions[start : num_pages * self.page_size]
            leaf = Node(node, key, pages[len(found) : num_pages], next(self._clock))
            node.children[tuple(key[: self.page_size])] = leaf
            self._idle_leaves.discard(node)
            self.num_pages += num_new
            node = leaf
        self._hold(node)
        return num_new, node

    def release(self, node: Node) -> None:
        while node.parent is not None:
            node.num_users -= 1
            if not node.num_users and not node.children:
                self._idle_leaves.add(node)
            node = node.parent

    def evict(self, num_pages: int) -> list[int]:
        """Drops least recently used leaves, whole edges, until so many pages are free; returns the pages."""
        heap = list(self._idle_leaves)
        heapq.heapify(heap)
        evicted: list[int] = []
        while heap and len(evicted) < num_pages:
            leaf = heapq.heappop(heap)
            parent = leaf.parent
            assert parent is not None
            evicted += leaf.pages
            del parent.children[tuple(leaf.key[: self.page_size])]
            self._idle_leaves.discard(leaf)
            if parent.parent is not None and not parent.children and not parent.num_users:
                self._idle_leaves.add(parent)
                heapq.heappush(heap, parent)
        self.num_pages -= len(evicted)
        return evicted

    def _walk(self, namespace: Hashable, positions: list[int]) -> tuple[Node, list[int]]:
        """The deepest node on the positions' way, split where they part from an edge, and the pages up to it."""
        now = next(self._clock)
        node = self._roots.get(namespace)
        if node is None:
            node = self._roots[namespace] = Node(None, [], [], now)
        pages: list[int] = []
        start = 0
        while start + self.page_size <= len(positions):
            child = node.children.get(tuple(positions[start : start + self.page_size]))
            if child is None:
                break
            child.last_used = now
            length = self._common_length(child.key, positions, start)
            if length < len(child.key):
                child = self._split(child, length)
            pages += child.pages
            start += length
            node = child
        return node, pages

    def _common_length(self, key: list[int], positions: list[int], start: int) -> int:
        """In positions, whole pages."""
        if positions[start : start + len(key)] == key:
            return len(key)
        length = self.page_size  # the first page is what the child was found by
        while length < len(key):
            end = length + self.page_size
            if key[length:end] != positions[start + length : start + end]:
                break
            length = end
        return length

    def _split(self, node: Node, length: int) -> Node:
        """Puts a new node above this one for the first part of its edge."""
        assert node.parent is not None
        num_pages = length // self.page_size
        upper = Node(node.parent, node.key[:length], node.pages[:num_pages], node.last_used)
        upper.num_users = node.num_users
        node.parent.children[tuple(node.key[: self.page_size])] = upper
        node.parent, node.key, node.pages = upper, node.key[length:], node.pages[num_pages:]
        upper.children[tuple(node.key[: self.page_size])] = node
        return upper

    def _hold(self, node: Node) -> None:
        while node.parent is not None:
            if not node.num_users:
                self._idle_leaves.discard(node)
            node.num_users += 1
            node = node.parent
