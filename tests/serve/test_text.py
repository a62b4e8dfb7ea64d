"""Text that may be shown: the same whatever way the tokens come, and never a part of a stop string."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vitalrt.serve.text import TextStream


def decode_bytes(token_ids) -> str:
    """Tokens that are bytes: the hardest case, where most characters take several."""
    return bytes(token_ids).decode("utf-8", errors="replace")


def cut(text: str, stops: list[str]) -> str:
    """Before the stop string that is complete first."""
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    return text[: min(ends)[1]] if ends else text


texts = st.text(alphabet="abé€😀", max_size=24)
stop_lists = st.lists(st.text(alphabet="abé€😀", min_size=1, max_size=4), max_size=4)


@given(texts, stop_lists, st.lists(st.integers(0, 5), max_size=20))
def test_pieces_join_to_the_text_before_the_first_stop_string(text, stops, sizes):
    tokens = list(text.encode())
    stream = TextStream(decode_bytes, stops)
    shown, notes, position = "", [], 0
    for size in [*sizes, len(tokens)]:
        upto = min(len(tokens), position + size)
        is_last = upto == len(tokens)
        piece, ready = stream.push(tokens[position:upto], is_last, tokens[position:upto])
        shown, position = shown + piece, upto
        notes += ready
        assert shown.startswith(piece) or piece in shown
        assert cut(text, stops).startswith(shown)
        if is_last:
            break
    assert shown == cut(text, stops)
    assert stream.is_stopped == (shown != text)
    assert bytes(notes) == shown.encode()
    if not stream.is_stopped:
        assert stream.num_tokens == len(tokens)


def test_an_unfinished_character_is_shown_at_the_end_only():
    stream = TextStream(decode_bytes)
    assert stream.push([0xE2, 0x82], False) == ("", [])
    assert stream.push([], True)[0] == "\ufffd"


def test_what_may_begin_a_stop_string_waits_until_it_cannot():
    stream = TextStream(decode_bytes, ["abc"])
    assert [stream.push([byte], False)[0] for byte in b"xababd"] == ["x", "", "", "ab", "", "abd"][:6]


def test_tokens_after_a_stop_string_do_not_count():
    stream = TextStream(decode_bytes, ["b"])
    assert stream.push(list(b"abcd"), False) == ("a", [])
    assert (stream.num_tokens, stream.is_stopped) == (2, True)
    assert stream.push(list(b"efg"), True) == ("", [])
