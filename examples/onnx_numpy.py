"""An exported model, driven by onnxruntime and numpy alone; docs/onnx.md explains every name. Research use only.

vitalrt export onnx --out exported && python examples/onnx_numpy.py exported examples/demo.png "Is the liver visible?" 4
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image
from tokenizers import Tokenizer

directory, image, question, k = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
files = (directory / f"{name}.json" for name in ("config", "generation_config", "preprocessor_config", "onnx"))
config, generation, options, manifest = (json.loads(file.read_text()) for file in files)
sessions = {path.stem: onnxruntime.InferenceSession(path) for path in directory.glob("*.onnx")}
state = {}  # what graphs take and give, by name


def run(graph, **feeds):
    state.update(feeds)
    outputs = sessions[graph].run(None, {value.name: state[value.name] for value in sessions[graph].get_inputs()})
    for value, output in zip(sessions[graph].get_outputs(), outputs, strict=True):
        state[value.name.replace("present", "past")] = output


# The picture: sides in multiples of a visual token, area within bounds, patches in blocks of merge x merge.
patch, merge, frames = options["patch_size"], options["merge_size"], options["temporal_patch_size"]
picture, side = Image.open(image).convert("RGB"), patch * merge
sides, (low, high) = np.array(picture.size[::-1]), (options["size"][f"{edge}_edge"] for edge in ("shortest", "longest"))
height, width = np.rint(sides / side).astype(int) * side
if not low <= height * width <= high:
    bound, fit = (high, np.floor) if height * width > high else (low, np.ceil)
    height, width = np.maximum(fit(sides * (bound / sides.prod()) ** 0.5 / side).astype(int), 1) * side
pixels = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC), np.float32) / 255
pixels = (pixels - np.float32(options["image_mean"])) / np.float32(options["image_std"])
rows, columns = height // side, width // side
blocks = pixels.reshape(rows, merge, patch, columns, merge, patch, 3).transpose(0, 3, 1, 4, 6, 2, 5)
patches = np.repeat(blocks[:, :, :, :, :, None], frames, axis=5).reshape(1, rows * columns * merge**2, -1)
run("vision", pixel_values=patches, grid_hw=np.array([height, width]) // patch)

# The prompt: text advances all three axes; a picture counts rows and columns, then takes as many as its longer side.
text = manifest["prompt_template"].replace("<|image_pad|>", "<|image_pad|>" * (rows * columns))
tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
ids = np.array([tokenizer.encode(text.replace("{question}", question)).ids])
start, words = int(np.argmax(ids[0] == config["image_token_id"])), np.arange(ids.shape[1] - rows * columns)
inside = np.stack((np.zeros((rows, columns), int), *np.mgrid[:rows, :columns])).reshape(3, -1) + start
words = np.tile(np.where(words < start, words, words + max(rows, columns)), (3, 1))
positions, length = np.insert(words, [start] * (rows * columns), inside, axis=1), np.array([ids.shape[1]])
run("prefill", input_ids=ids, positions=positions[:, None], lengths=length, capacity=length + k + 64)

# K latent steps in one run, then one token at a time.
run("latent_loop", steps=np.array([k]), positions=np.array([positions.max() + 1]), lengths=length)
answer, places = [], ("positions", "lengths")
while len(answer) < 64 and (token := int(state["logits"].argmax())) not in generation["eos_token_id"]:
    run("decode_step", token_ids=np.array([token]), **{name: state[name] + (1 if answer else k) for name in places})
    answer.append(token)
print(tokenizer.decode(answer))
