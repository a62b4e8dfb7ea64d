"""What a sequence's positions look like to the prefix cache: keys, what they refuse, and how much two of them share."""

from __future__ import annotations

import random

import numpy as np
import pytest

from vitalrt.engine.prefix_cache import IMAGE, LATENT, PrefixKey


@pytest.mark.parametrize(
    ("digests", "positions", "error", "words"),
    [
        (b"short", np.zeros(2, np.uint32), ValueError, "digests: expected 32 bytes"),
        (b"", np.zeros(2, np.uint32), ValueError, "digests: expected 32 bytes"),
        (bytes(32), np.array([IMAGE, 0], np.uint32), ValueError, "of 1 images, got 0"),
        (bytes(64), np.array([IMAGE, IMAGE], np.uint32), ValueError, "of 2 images, got 1"),
        (bytes(32), np.array([0, 3 << 30], np.uint32), ValueError, "got kind 3"),
        (bytes(32), np.zeros((1, 2), np.uint32), ValueError, "positions: expected one axis, got 2"),
        (bytes(32), np.zeros(2, np.int64), TypeError, "incompatible"),
    ],
)
def test_keys_that_are_none(digests: bytes, positions: np.ndarray, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        PrefixKey(digests, positions)


def test_a_key_is_its_own() -> None:
    positions = np.arange(4, dtype=np.uint32)
    key = PrefixKey(bytes(range(32)), positions)
    positions[:] = 7
    view = key.positions
    assert key.digests == bytes(range(32))
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1
    with pytest.raises(AttributeError):
        key.positions = positions
    del key
    assert view.tolist() == [0, 1, 2, 3]


def test_how_much_two_keys_share() -> None:
    draw = random.Random(0)
    seen = set()

    def random_key() -> PrefixKey:
        words: list[int] = []
        digests = [draw.choice([b"n", b"m"] if draw.random() < 0.1 else [b"n"])]
        while draw.random() < 0.7:
            if draw.random() < 0.5:
                words += [IMAGE + index for index in range(draw.randint(1, 3))]
                digests.append(draw.choice([b"a", b"b"]))
            else:
                words.append(draw.choice([3, 3, 4, LATENT + 1]))
        return PrefixKey(b"".join(digest * 32 for digest in digests), np.array(words, np.uint32))

    def meanings(key: PrefixKey) -> list[tuple[int, bytes]]:
        """Every position's word, with the digest of its image or of the namespace."""
        found, number = [], 0
        for word in key.positions.tolist():
            number += word == IMAGE
            is_image = IMAGE <= word < LATENT
            found.append((word, key.digests[32 * number :][:32] if is_image else b""))
        return found

    for _ in range(3000):
        one, other = random_key(), random_key()
        pairs = zip(meanings(one), meanings(other), strict=False)
        same = [mine == theirs for mine, theirs in pairs] if one.digests[:32] == other.digests[:32] else []
        expected = [*same, False].index(False)
        assert one.num_shared(other) == other.num_shared(one) == expected
        seen.add(expected)
    assert seen >= {0, 1, 2, 3, 4}
