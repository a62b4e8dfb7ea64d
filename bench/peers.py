"""The same request through transformers, as one would plainly write it: what vitalrt is compared with.

B = 1 sequence, T tokens, d width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoTokenizer, Qwen2VLImageProcessorPil, Qwen3VLForConditionalGeneration

from bench.published_loop import think_and_answer
from vitalrt.latency import MAX_NEW_TOKENS, Thought

ENGINE = "transformers"


class TransformersPeer:
    """A Qwen3-VL directory in transformers, on the device and in the dtype that vitalrt runs it in.

    Qwen3VLProcessor itself wants torchvision for its video half; this does what it does for one image.
    """

    def __init__(self, directory: Path, adapter: str | None, device: torch.device, dtype: torch.dtype) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(directory)
        template = directory / "chat_template.jinja"
        self.chat_template = template.read_text() if template.is_file() else self.tokenizer.chat_template
        self.image_processor = Qwen2VLImageProcessorPil.from_pretrained(directory)
        model: Any = Qwen3VLForConditionalGeneration.from_pretrained(directory, dtype=dtype)
        if adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
        self.model = model.to(device).eval()
        self.stop_ids = torch.tensor(model.generation_config.eos_token_id).flatten().tolist()

    def ask(self, image: Path, question: str, thought: Thought, answer_tokens: int = 0) -> list[int]:
        """Ids of all that is written, the end token included. answer_tokens: how many follow a written thought."""
        if thought.written_tokens:
            return self.generate(image, question, thought.written_tokens + answer_tokens)
        return (
            self.think(image, question, thought.latent_steps)
            if thought.latent_steps
            else self.generate(image, question)
        )

    @torch.inference_mode()
    def generate(self, image: Path, question: str, num_tokens: int | None = None) -> list[int]:
        """Plain greedy generation: ids of the answer, the end token included, or exactly num_tokens of them."""
        inputs = self.prepare(image, question)
        limits = {"max_new_tokens": num_tokens or MAX_NEW_TOKENS, "min_new_tokens": num_tokens}
        output = self.model.generate(**inputs, **limits, do_sample=False)
        return self._decoded(output[0, inputs["input_ids"].shape[1] :].tolist())

    @torch.inference_mode()
    def think(self, image: Path, question: str, k: int) -> list[int]:
        """K latent steps and then greedy decoding on the same DynamicCache: ids as generate() gives them."""
        token_ids = think_and_answer(self.model, self.prepare(image, question), k, MAX_NEW_TOKENS, self.stop_ids)
        return self._decoded(token_ids)

    def prepare(self, image: Path, question: str) -> dict[str, torch.Tensor]:
        """File and question to model inputs: template, patches, one placeholder per visual token, ids."""
        with Image.open(image) as picture:
            pixels = self.image_processor(images=[picture.convert("RGB")], return_tensors="pt")
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=self.chat_template,
            add_generation_prompt=True,
            tokenize=False,
        )
        num_visual = int(pixels["image_grid_thw"].prod()) // self.image_processor.merge_size**2
        text = text.replace("<|image_pad|>", "<|image_pad|>" * num_visual, 1)
        inputs = dict(self.tokenizer(text, return_tensors="pt", return_token_type_ids=False)) | dict(pixels)
        # Tells get_rope_index which tokens are visual.
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == self.model.config.image_token_id).int()
        return {name: tensor.to(self.model.device) for name, tensor in inputs.items()}

    def _decoded(self, token_ids: list[int]) -> list[int]:
        """The request ends with text; the ids are what the benchmark looks at."""
        self.tokenizer.decode(token_ids, skip_special_tokens=True)
        return token_ids
