"""The page of an explanation: whole in itself, safe whatever the texts say, written whole or not at all."""

from __future__ import annotations

import base64
import io
import os
import re
import warnings
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from vitalrt.engine.request import Answer, Timings, Usage
from vitalrt.errors import VitalError
from vitalrt.explain.explanation import Explanation, Step
from vitalrt.explain.page import LONGEST_SIDE, MOST_OPAQUE, heat_colours, render
from vitalrt.explain.roi_index import Neighbour

VOID = {"meta", "img", "link", "br"}


class Read(HTMLParser):
    """Tags still open, images with the element they lie on, the style sheet, and the text a reader sees."""

    def __init__(self, html):
        super().__init__()
        self.open, self.images, self.text, self.style = [], [], "", ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        if tag == "img":
            self.images.append({**dict(attributes), "on": self.open[-1][1]})
        if tag not in VOID:
            self.open.append((tag, dict(attributes).get("class", "")))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open and self.open[-1][0] == "style":
            self.style += data
        else:
            self.text += data

    def pixels(self, number):
        """Of an image."""
        return decoded(self.images[number]["src"])

    def picture(self, number):
        """What lies beneath the images on .picture-number."""
        [address] = re.findall(rf'\.picture-{number} {{ background-image: url\("([^"]+)"\)', self.style)
        return decoded(address)


def decoded(address):
    data = base64.b64decode(address.removeprefix("data:image/png;base64,"))
    return np.asarray(Image.open(io.BytesIO(data)))


@pytest.fixture
def explanation():
    latents = torch.zeros(2, 3)
    usage, timings = Usage(10, 0, 2, 3), Timings(1.0, 1.0, 1.0, 1.0, 4.0)
    answer = Answer("lower left", [1, 2], "stop", latents, usage, timings)
    steps = tuple(
        Step(text, probability, (heat,), (Neighbour(label, 0.875),))
        for text, probability, heat, label in (
            ("It is low.", 0.5, torch.tensor([[0.0, 0.2, 0.1], [0.1, 0.2, 0.4]]), "cyst, CT"),
            ("It is left.", 0.25, torch.tensor([[0.1, 0.2, 0.1], [0.8, 0.2, 0.4]]), "liver, CT"),
        )
    )
    picture = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    return Explanation("Where is the cyst?", answer, steps, (picture,), {}, "VITAL on phantoms")


def test_everything_is_on_the_page_and_nothing_is_fetched(explanation):
    page = Read(render(explanation))
    assert not page.open
    for part in (
        *("Where is the cyst?", "lower left", "It is low.", "50%", "It is left.", "25%", "cyst, CT", "0.88"),
        *("not for clinical decisions", "not a faithful trace", "VITAL on phantoms"),
        *("83% from the left, 75% from the top", "17% from the left, 75% from the top", "0.80"),
    ):
        assert part in page.text, part
    html = render(explanation)
    assert not re.search(r"https?://|<script|@import", html)
    addresses = [image["src"] for image in page.images] + re.findall(r'url\("([^"]+)"\)', html)
    assert len(addresses) == 4 == html.count("url(") + html.count("src=")
    assert all(address.startswith("data:image/png;base64,") for address in addresses)


def test_one_colour_scale_serves_all_steps(explanation):
    page = Read(render(explanation))
    first, second, scale = range(3)
    assert np.array_equal(page.picture(1), explanation.pictures[0])
    assert [page.images[number]["on"] for number in (first, second)] == ["picture picture-1"] * 2
    assert "aspect-ratio: 6 / 4" in page.style
    most = round(255 * MOST_OPAQUE)
    opacity = [page.pixels(number)[..., 3] for number in (first, second)]
    assert opacity[0].shape == (2, 3)
    assert opacity[0][0, 0] == 0 and opacity[1][1, 0] == most  # least and greatest of both maps together
    assert opacity[0][1, 2] == opacity[1][1, 2] == round(most / 2)
    assert page.pixels(scale)[0, 0, 3] == 0 and page.pixels(scale)[0, -1, 3] == most


def test_each_map_lies_on_its_picture(explanation):
    pictures = (*explanation.pictures, np.full((5, 5, 3), 9, np.uint8))
    maps = (torch.zeros(2, 2), torch.ones(2, 2))
    page = Read(render(replace(explanation, pictures=pictures, steps=(replace(explanation.steps[0], heatmaps=maps),))))
    assert [image["on"] for image in page.images[:2]] == ["picture picture-1", "picture picture-2"]
    assert [page.pixels(number)[0, 0, 3] for number in (0, 1)] == [0, round(255 * MOST_OPAQUE)]
    assert np.array_equal(page.picture(2), pictures[1])


def test_a_map_that_is_the_same_everywhere_shows_nothing(explanation):
    step = replace(explanation.steps[0], heatmaps=(torch.full((2, 2), 0.5),))
    with warnings.catch_warnings(action="error"):
        assert Read(render(replace(explanation, steps=(step,)))).pixels(0)[..., 3].max() == 0


def test_texts_cannot_become_markup(explanation):
    evil = "<script>alert('x')</script><img src=http://e.vil>"
    step = replace(explanation.steps[0], text=evil, neighbours=(Neighbour(evil, 0.5),))
    answer = replace(explanation.answer, text=evil)
    told = replace(explanation, question=evil, answer=answer, steps=(step,), missing={"words": evil}, provenance=evil)
    page = Read(render(told))
    assert page.text.count(evil) == 6 and len(page.images) == 2


def test_what_is_missing_or_cut_is_told(explanation):
    step = replace(explanation.steps[0], text=None, text_probability=None, heatmaps=(), neighbours=())
    answer = replace(explanation.answer, finish_reason="length")
    page = Read(render(replace(explanation, steps=(step,), answer=answer, missing={"words": "nobody read"})))
    assert "No words" in page.text and "nobody read" in page.text and "cut off: length" in page.text
    assert "cosine" not in page.text and not page.images
    silent = Read(render(replace(explanation, steps=(replace(step, text="", text_probability=0.5),))))
    assert "(nothing) 50%" in " ".join(silent.text.split())
    assert "nothing to read" in Read(render(replace(explanation, steps=()))).text


def test_a_large_picture_is_made_smaller(explanation):
    picture = np.zeros((300, 2 * LONGEST_SIDE, 3), np.uint8)
    assert Read(render(replace(explanation, pictures=(picture,)))).picture(1).shape == (150, LONGEST_SIDE, 3)


def test_a_picture_is_held_once_however_many_steps_there_are(explanation):
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    few, many = (
        len(render(replace(explanation, pictures=(noise,), steps=explanation.steps * times))) for times in (1, 30)
    )
    assert many - few < noise.nbytes


def test_colours_are_darker_and_clearer_the_less_alike():
    colours = heat_colours(torch.linspace(0, 1, 50)[None])[0].astype(int)
    assert (np.diff(colours[:, 3]) >= 0).all()
    assert (np.diff(colours[:, :3].sum(-1)) > 0).all()
    assert heat_colours(torch.tensor([[float(v) for v in (-1, 2)]]))[0, :, 3].tolist() == [0, round(255 * MOST_OPAQUE)]


def test_saving_replaces_whole_and_leaves_no_trace_of_a_failure(explanation, tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    path.write_text("old")
    assert explanation.save(path) == path
    assert path.read_text(encoding="utf-8") == render(explanation)
    assert path.stat().st_mode & 0o077 == 0  # patients' pictures are for who asked
    monkeypatch.setattr("vitalrt.files.os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "no space")))
    with pytest.raises(VitalError, match=r"path: .*page\.html cannot be written \(no space\)"):
        replace(explanation, question="other").save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]
    assert "other" not in path.read_text(encoding="utf-8")
    with pytest.raises(VitalError, match=r"path: .*cannot be written"):
        explanation.save(tmp_path / "nowhere" / "page.html")


def test_saving_follows_links_and_takes_nothing_but_files(explanation, tmp_path):
    real, link, pipe = tmp_path / ("x" * 250 + ".html"), tmp_path / "link.html", tmp_path / "pipe"
    link.symlink_to(real)
    os.mkfifo(pipe)
    explanation.save(link)
    assert link.is_symlink() and real.read_text(encoding="utf-8") == render(explanation)
    for place in (pipe, tmp_path):
        with pytest.raises(VitalError, match="path: expected an ordinary file"):
            explanation.save(place)
    assert pipe.is_fifo()
    for place in ("a\0b", None, 3.5):
        with pytest.raises(VitalError, match="path: expected a path"):
            explanation.save(place)


def test_json_holds_all_but_pictures_and_latents(explanation):
    record = replace(explanation, missing={"words": "nobody read"}).as_dict()
    assert record["steps"][1]["heatmaps"][0][1][0] == pytest.approx(0.8)
    assert record["steps"][0]["neighbours"] == [{"label": "cyst, CT", "cosine": 0.875}]
    assert record["missing"] == {"words": "nobody read"} and "faithful" in record["notice"]
