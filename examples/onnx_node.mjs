// An exported model, driven by onnxruntime-node; docs/onnx.md explains every name. Research use only.
//
//   vitalrt export onnx --out exported
//   cd examples && ONNXRUNTIME_NODE_INSTALL=skip npm install      # the CPU is enough: no CUDA libraries are fetched
//   node onnx_node.mjs ../exported demo.png "Is the liver visible?" 4

import { readFileSync } from "node:fs";
import { join } from "node:path";
import { Tokenizer } from "@huggingface/tokenizers";
import * as ort from "onnxruntime-node";
import { PNG } from "pngjs";

const [directory, image, question, steps] = process.argv.slice(2);
const k = Number(steps);
const read = (name) => JSON.parse(readFileSync(join(directory, `${name}.json`), "utf8"));
const [config, generation, options, manifest] =
  ["config", "generation_config", "preprocessor_config", "onnx"].map(read);
const state = {}; // what graphs take and give, by name
const sessions = {};

async function run(graph, feeds) {
  Object.assign(state, feeds);
  sessions[graph] ??= await ort.InferenceSession.create(join(directory, `${graph}.onnx`));
  const inputs = Object.fromEntries(sessions[graph].inputNames.map((name) => [name, state[name]]));
  const outputs = await sessions[graph].run(inputs);
  for (const [name, value] of Object.entries(outputs)) state[name.replace("present", "past")] = value;
}

const floats = (values, dims) => new ort.Tensor("float32", values, dims);
const ints = (values, dims = [values.length]) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), dims);

// Pillow's bicubic filter along one axis: lines of `from` RGB pixels to lines of `to`, rounded to bytes in between.
function resizeLines(source, lines, from, to) {
  const cubic = (x) => (x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0);
  const scale = Math.max(from / to, 1);
  const out = new Uint8ClampedArray(lines * to * 3);
  for (let at = 0; at < to; at++) {
    const center = (at + 0.5) * (from / to);
    const first = Math.max(Math.trunc(center - 2 * scale + 0.5), 0);
    const last = Math.min(Math.trunc(center + 2 * scale + 0.5), from);
    const weights = [];
    for (let i = first; i < last; i++) weights.push(cubic(Math.abs((i - center + 0.5) / scale)));
    const total = weights.reduce((sum, weight) => sum + weight, 0);
    for (let line = 0; line < lines; line++)
      for (let c = 0; c < 3; c++) {
        let value = 0;
        weights.forEach((weight, i) => (value += weight * source[(line * from + first + i) * 3 + c]));
        out[(line * to + at) * 3 + c] = Math.floor(value / total + 0.5);
      }
  }
  return out;
}

// [rows, columns] of RGB pixels to [columns, rows].
function transpose(source, rows, columns) {
  const out = new Uint8ClampedArray(source.length);
  for (let y = 0; y < rows; y++)
    for (let x = 0; x < columns; x++)
      for (let c = 0; c < 3; c++) out[(x * rows + y) * 3 + c] = source[(y * columns + x) * 3 + c];
  return out;
}

// The picture: sides in multiples of a visual token, area within bounds, patches in blocks of merge x merge.
const { patch_size: patch, merge_size: merge, temporal_patch_size: frames, size } = options;
const side = patch * merge;
const png = PNG.sync.read(readFileSync(image));
const half = (x) => (x % 1 === 0.5 ? 2 * Math.round(x / 2) : Math.round(x)); // to even, as Python rounds
let [height, width] = [png.height, png.width].map((pixels) => half(pixels / side) * side);
const [low, high] = [size.shortest_edge, size.longest_edge];
if (height * width > high || height * width < low) {
  const [bound, fit] = height * width > high ? [high, Math.floor] : [low, Math.ceil];
  const ratio = Math.sqrt(bound / (png.height * png.width));
  [height, width] = [png.height, png.width].map((pixels) => Math.max(fit((pixels * ratio) / side), 1) * side);
}
const rgb = png.data.filter((_, i) => i % 4 < 3);
const narrow = resizeLines(rgb, png.height, png.width, width);
const pixels = transpose(resizeLines(transpose(narrow, png.height, width), width, png.height, height), width, height);
const [rows, columns] = [height / side, width / side];
const patches = [];
for (let token = 0; token < rows * columns; token++)
  for (let inner = 0; inner < merge * merge; inner++) {
    const y = Math.floor(token / columns) * side + Math.floor(inner / merge) * patch;
    const x = (token % columns) * side + (inner % merge) * patch;
    for (let c = 0; c < 3; c++)
      for (let frame = 0; frame < frames; frame++)
        for (let i = 0; i < patch * patch; i++) {
          const value = pixels[((y + Math.floor(i / patch)) * width + x + (i % patch)) * 3 + c];
          patches.push((value / 255 - options.image_mean[c]) / options.image_std[c]);
        }
  }
const numPatches = rows * columns * merge * merge;
await run("vision", {
  pixel_values: floats(Float32Array.from(patches), [1, numPatches, patches.length / numPatches]),
  grid_hw: ints([height / patch, width / patch]),
});

// The prompt: text advances all three axes; a picture counts rows and columns, then takes as many as its longer side.
const tokenizer = new Tokenizer(
  JSON.parse(readFileSync(join(directory, "tokenizer.json"), "utf8")),
  read("tokenizer_config"),
);
const text = manifest.prompt_template.replace("<|image_pad|>", "<|image_pad|>".repeat(rows * columns));
const { ids } = tokenizer.encode(text.replace("{question}", () => question));
const start = ids.indexOf(config.image_token_id);
const axes = [[], [], []];
ids.forEach((_, i) => {
  const token = i - start;
  const isImage = token >= 0 && token < rows * columns;
  const word = i < start ? i : i - rows * columns + Math.max(rows, columns);
  const place = isImage ? [start, start + Math.floor(token / columns), start + (token % columns)] : [word, word, word];
  place.forEach((position, axis) => axes[axis].push(position));
});
const following = Math.max(...axes.flat()) + 1;
await run("prefill", {
  input_ids: ints(ids, [1, ids.length]),
  positions: ints(axes.flat(), [3, 1, ids.length]),
  lengths: ints([ids.length]),
  capacity: ints([ids.length + k + 64]),
});

// K latent steps in one run, then one token at a time.
await run("latent_loop", { steps: ints([k]), positions: ints([following]), lengths: ints([ids.length]) });
const answer = [];
while (answer.length < 64) {
  const logits = state.logits.data;
  const token = logits.indexOf(logits.reduce((a, b) => Math.max(a, b)));
  if (generation.eos_token_id.includes(token)) break;
  const done = k + answer.length;
  await run("decode_step", {
    token_ids: ints([token]),
    positions: ints([following + done]),
    lengths: ints([ids.length + done]),
  });
  answer.push(token);
}
console.log(tokenizer.decode(answer, { skip_special_tokens: true }));
