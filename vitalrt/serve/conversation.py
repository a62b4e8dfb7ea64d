"""Messages of a chat to the Prompt that the engine takes."""

from __future__ import annotations

import time
from typing import Any

from jinja2 import TemplateError

from vitalrt.api import Model
from vitalrt.errors import InputError, VitalError
from vitalrt.inputs.image import ReadOptions
from vitalrt.inputs.prompt import Prompt
from vitalrt.model.rope import Grid
from vitalrt.serve.errors import bad_request
from vitalrt.serve.images import ImageReader
from vitalrt.serve.protocol import ChatRequest
from vitalrt.serve.settings import ServeConfig


class PromptMaker:
    """Turns, texts and images in any order, through the checkpoint's own chat template.

    For one user turn with its images first this gives the very prompt of Model.prepare.
    """

    def __init__(self, model: Model, images: ImageReader, config: ServeConfig) -> None:
        self.engine, self.processor = model.engine, model.processor
        self.images = images
        self.config = config

    def make(self, asked: ChatRequest) -> Prompt:
        """Blocks while images are read.  Raises ApiError; its messages repeat nothing of the request."""
        started = time.perf_counter()
        turns, links = self._turns(asked)
        read = _read_options(asked)
        pictures = []
        for param, url in links:
            pixels = self.images.read(url, read, param)
            try:
                pictures.append(self.processor.picture(pixels))
            except InputError as error:
                raise bad_request(f"{param}: {error}", param, "invalid_image") from None
        ids = self._tokenize(turns, [picture.grid for picture in pictures])
        if len(ids) > self.config.max_prompt_tokens:
            came = f"{len(ids)} tokens of text and images exceed this server's limit of {self.config.max_prompt_tokens}"
            raise bad_request(f"messages: {came}", "messages", "context_length_exceeded")
        self.engine.make_patches(pictures, asked.vital.cache_salt)
        return self.processor.assemble(ids, pictures, started)

    def _turns(self, asked: ChatRequest) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
        """What the chat template takes, and (where, link) of each image."""
        turns: list[dict[str, Any]] = []
        links: list[tuple[str, str]] = []
        num_chars = 0
        for row, message in enumerate(asked.messages):
            content: list[dict[str, str]] = []
            for column, part in enumerate(message.parts()):
                if part.image_url is not None and part.type == "image_url":
                    links.append((f"messages[{row}].content[{column}].image_url.url", part.image_url.url))
                    content.append({"type": "image"})
                else:
                    content.append({"type": "text", "text": part.text or ""})
                    num_chars += len(part.text or "")
            turns.append({"role": "system" if message.role == "developer" else message.role, "content": content})
        if num_chars > self.config.max_text_chars:
            came = f"{num_chars} characters of text exceed this server's limit of {self.config.max_text_chars}"
            raise bad_request(f"messages: {came}", "messages", "context_length_exceeded")
        if len(links) > self.config.max_images:
            came = f"{len(links)} images exceed this server's limit of {self.config.max_images}"
            raise bad_request(f"messages: {came}", "messages", "too_many_images")
        return turns, links

    def _tokenize(self, turns: list[dict[str, Any]], grids: list[Grid]) -> list[int]:
        try:
            return self.processor.tokenize_chat(turns, grids, name="messages")
        except TemplateError:
            trouble = "the model's chat template does not take this sequence of roles"
            raise bad_request(f"messages: {trouble}", "messages") from None
        except InputError as error:
            raise bad_request(str(error), "messages") from None


def _read_options(asked: ChatRequest) -> ReadOptions:
    window = asked.vital.window
    try:
        return ReadOptions(
            frame=asked.vital.frame, window=(window[0], window[1]) if isinstance(window, list) else window
        )
    except VitalError as error:
        raise bad_request(f"vital.{error}", "vital.window") from None
