"""The phantoms' own vision encoder: a tiny SigLIP that learns images from captions and is frozen afterwards.

It stands in for a medical SigLIP where none can be had. It shares nothing with the backbone it later supervises: not
the weights, not the objective, not the phantoms it is trained on.  Everything random in a step is drawn from
(seed, step), so a resumed run goes on exactly as if it had not stopped.

N views (images and close-ups of a batch).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.nn.functional import logsigmoid, normalize
from transformers import PreTrainedTokenizerFast, SiglipConfig, SiglipImageProcessorPil, SiglipModel

from vitalrt.errors import VitalError
from vitalrt.model.vision_encoder import VisionEncoder
from vitalrt_training.data import teacher
from vitalrt_training.data.modalities import KINDS
from vitalrt_training.data.phantom import MODALITIES, Phantom, Target, draw_phantom
from vitalrt_training.data.roi import peaks_within, phantom_mask, roi_features, square_crop
from vitalrt_training.optimizing import cosine_rate, new_adamw, update
from vitalrt_training.run_files import (
    claim_directory,
    progress_bar,
    replacing_directory,
    restore_state,
    save_state,
    trim_log,
    write_atomically,
)

ENCODER_SEED = 4_000_003  # the encoder's training phantoms are its own
IMAGE_SIDE = 96
PATCH_SIZE = 8
WIDTH = 128
CAPTION_TOKENS = 48
CLOSE_UP_MARGIN = 0.3
STAGE = "encoder"


@dataclass(frozen=True)
class EncoderRecipe:
    """A training run of the encoder.

    phantoms_per_batch: each gives two views, itself and a close-up of something it shows.
    modalities_per_batch: few, so that most pairs of a batch can only be told apart by what the images show.
    caption_phantoms: phantoms whose captions the vocabulary is made from.  checkpoint_every: in steps.
    judged_phantoms: validation phantoms of the report.  threads: of torch; part of what makes a run repeatable.
    """

    seed: int
    steps: int
    phantoms_per_batch: int
    modalities_per_batch: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    max_grad_norm: float
    caption_phantoms: int
    judged_phantoms: int
    checkpoint_every: int
    threads: int

    def __post_init__(self) -> None:
        for name in ("steps", "phantoms_per_batch", "caption_phantoms", "judged_phantoms", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise VitalError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 1 <= self.modalities_per_batch <= len(MODALITIES):
            raise VitalError(f"modalities_per_batch: expected 1 to {len(MODALITIES)}, got {self.modalities_per_batch}")


def phantom_encoder() -> EncoderRecipe:
    """About a quarter of an hour on one CPU core."""
    return EncoderRecipe(
        seed=0,
        steps=700,
        phantoms_per_batch=16,
        modalities_per_batch=3,
        learning_rate=1e-3,
        warmup_steps=50,
        weight_decay=0.05,
        max_grad_norm=1.0,
        caption_phantoms=600,
        judged_phantoms=300,
        checkpoint_every=50,
        threads=1,
    )


def caption(phantom: Phantom) -> str:
    """Modality, and of each thing shown its size, shape, brightness, name and place, the largest first."""
    things = sorted(phantom.targets, key=lambda target: -int(target.mask.sum()))
    phrases = []
    for target in things:
        spot = teacher.place(target.mask)
        phrases.append(f"{teacher.size(target.mask)} {_look(phantom, target)}" + (f" {spot}" if spot else ""))
    return f"{phantom.modality} : {' , '.join(phrases) or 'nothing'}"


def close_up_caption(phantom: Phantom, name: str) -> str:
    """What can be said of all targets of a name when nothing around them is seen."""
    shown = [target for target in phantom.targets if target.name == name]
    if len(shown) == 1:
        return f"{phantom.modality} close-up : {_look(phantom, shown[0])}"
    return f"{phantom.modality} close-up : {teacher.NUMBERS[len(shown)]} {KINDS[name].plural}"


def _look(phantom: Phantom, target: Target) -> str:
    words = (teacher.shape(target.mask), teacher.brightness(phantom.image, target.mask), target.name)
    return " ".join(word for word in words if word)


def draw_views(recipe: EncoderRecipe, step: int) -> tuple[list[np.ndarray], list[str]]:
    """Images and captions of a step: N from phantoms_per_batch, where they show nothing, to twice as many."""
    rng = np.random.default_rng((recipe.seed, step))
    modalities = rng.choice(MODALITIES, recipe.modalities_per_batch, replace=False)
    images, captions = [], []
    for number in range(recipe.phantoms_per_batch):
        index = step * recipe.phantoms_per_batch + number
        modality = str(modalities[number % len(modalities)])
        phantom = draw_phantom("train", ENCODER_SEED + recipe.seed, index, modality)
        images.append(phantom.image)
        captions.append(caption(phantom))
        if phantom.targets:
            name = phantom.targets[rng.integers(len(phantom.targets))].name
            mask = phantom_mask(phantom, name)
            assert mask is not None  # the name is one of its targets'
            images.append(square_crop(phantom.image, mask, rng.uniform(0, CLOSE_UP_MARGIN)).image)
            captions.append(close_up_caption(phantom, name))
    return images, captions


def sigmoid_loss(logits: torch.Tensor, captions: Sequence[str]) -> torch.Tensor:
    """logits: [N, N] of texts and images.  Mean over images of SigLIP's loss; equal captions are pairs as well."""
    _, codes = np.unique(captions, return_inverse=True)
    labels = torch.from_numpy(np.where(codes[:, None] == codes[None], 1.0, -1.0)).to(logits)
    return -logsigmoid(labels * logits).sum(dim=-1).mean()


def train_encoder(recipe: EncoderRecipe, run_dir: Path) -> Path:
    """Train, or go on training, in run_dir; returns the encoder's directory run_dir/encoder.

    run_dir holds recipe.json, log.jsonl (a line per step), encoder.pt (weights and optimiser, replaced atomically)
    and, when done, encoder/, an ordinary SiglipModel directory, and report.json, what judge_encoder says of it and of
    the weights it began with.  Raises VitalError if run_dir belongs to another recipe, or if the loss stops being
    finite.
    """
    torch.set_num_threads(recipe.threads)
    claim_directory(run_dir, json.dumps(asdict(recipe), indent=2) + "\n")
    tokenizer, processor = _caption_tokenizer(recipe), _image_processor()
    model = _new_model(recipe, tokenizer)
    optimizer = new_adamw(model, recipe.weight_decay)
    state_path, log_path = run_dir / f"{STAGE}.pt", run_dir / "log.jsonl"
    first_step = restore_state(state_path, model, optimizer)
    trim_log(log_path, STAGE, first_step)
    with progress_bar() as bar, log_path.open("a") as log:
        task = bar.add_task(STAGE, total=recipe.steps, completed=first_step, status="")
        for step in range(first_step, recipe.steps):
            started = time.perf_counter()
            images, captions = draw_views(recipe, step)
            loss = sigmoid_loss(_logits(model, tokenizer, processor, images, captions), captions)
            record = {"stage": STAGE, "step": step, "views": len(images)}
            rate = cosine_rate(recipe.learning_rate, step, recipe.steps, recipe.warmup_steps)
            what = f"step {step} (phantoms from index {step * recipe.phantoms_per_batch}, seed {recipe.seed})"
            record |= update(model, optimizer, loss, rate, recipe.max_grad_norm, what)
            record["seconds"] = round(time.perf_counter() - started, 3)
            log.write(json.dumps(record) + "\n")
            log.flush()
            if (step + 1) % recipe.checkpoint_every == 0 or step + 1 == recipe.steps:
                save_state(state_path, model, optimizer, step + 1)
            bar.update(task, advance=1, status=f"loss {record['loss']:.3f}")
    report = {}
    with TemporaryDirectory() as untrained:
        # Even weights that never saw a picture tell some targets apart: what training adds is the difference.
        for name, directory, weights in (
            ("untrained", Path(untrained) / "encoder", _new_model(recipe, tokenizer)),
            ("trained", run_dir / "encoder", model),
        ):
            with replacing_directory(directory) as partial:
                for part in (weights, tokenizer, processor):
                    part.save_pretrained(partial)
            report[name] = judge_encoder(VisionEncoder(directory), recipe.seed, recipe.judged_phantoms)
    write_atomically(run_dir / "report.json", json.dumps(report, indent=2) + "\n")
    return run_dir / "encoder"


def judge_encoder(encoder: VisionEncoder, seed: int, num_phantoms: int) -> dict[str, float]:
    """How well ROI features tell targets apart, on validation phantoms.

    retrieval: how often the ROI feature most like a target's, among those of other phantoms, is of the same name;
    retrieval_chance: the same for one picked at random.  pointing: how often the patch of the whole image that is most
    like a target's ROI feature lies on the target; pointing_chance: the mean share of the image that targets cover.
    """
    phantoms = [draw_phantom("validation", seed, index) for index in range(num_phantoms)]
    shown = [(p, name) for p in phantoms for name in dict.fromkeys(target.name for target in p.targets)]
    pairs = [(phantom.image, mask) for phantom, name in shown if (mask := phantom_mask(phantom, name)) is not None]
    features = torch.from_numpy(np.stack([found.feature for found in roi_features(encoder, pairs)]))
    owners = np.array([phantom.index for phantom, _ in shown])
    names = np.array([name for _, name in shown])
    others = torch.from_numpy(owners[:, None] != owners[None])
    nearest = (features @ features.T).masked_fill(~others, -torch.inf).argmax(dim=-1).numpy()
    alike = (names[:, None] == names[None]) & others.numpy()
    hits = []
    for feature, (image, mask) in zip(features, pairs, strict=True):
        similarity = normalize(encoder.encode([image])[0], dim=-1) @ feature
        hits.append(peaks_within(similarity, mask))
    return {
        "retrieval": float((names[nearest] == names).mean()),
        "retrieval_chance": float(alike.sum() / others.sum()),
        "pointing": float(np.mean(hits)),
        "pointing_chance": float(np.mean([mask.mean() for _, mask in pairs])),
        "num_targets": float(len(pairs)),
    }


def _caption_tokenizer(recipe: EncoderRecipe) -> PreTrainedTokenizerFast:
    """Whole words: captions have few. Padded to one length, as SigLIP reads its text at the last token."""
    texts = []
    for index in range(recipe.caption_phantoms):
        phantom = draw_phantom("train", ENCODER_SEED + recipe.seed, index)
        texts += [caption(phantom), *(close_up_caption(phantom, target.name) for target in phantom.targets)]
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.train_from_iterator(
        texts, trainers.WordLevelTrainer(special_tokens=["<pad>", "<unk>"], show_progress=False)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=CAPTION_TOKENS,
        model_input_names=["input_ids"],
    )


def _image_processor() -> SiglipImageProcessorPil:
    half = [0.5, 0.5, 0.5]
    return SiglipImageProcessorPil(size={"height": IMAGE_SIDE, "width": IMAGE_SIDE}, image_mean=half, image_std=half)


def _new_model(recipe: EncoderRecipe, tokenizer: PreTrainedTokenizerFast) -> SiglipModel:
    config = SiglipConfig(
        vision_config={
            "hidden_size": WIDTH,
            "intermediate_size": 3 * WIDTH,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": IMAGE_SIDE,
            "patch_size": PATCH_SIZE,
        },
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": CAPTION_TOKENS,
            "projection_size": WIDTH,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.pad_token_id,  # captions have neither; transformers wants ids that exist
            "eos_token_id": tokenizer.pad_token_id,
        },
    )
    torch.manual_seed(recipe.seed)
    model = SiglipModel(config)
    with torch.no_grad():
        # Temperature as in SigLIP; the bias so that a pair starts as likely as pairs are in a batch.
        model.logit_scale.fill_(math.log(10))
        model.logit_bias.fill_(-math.log(2 * recipe.phantoms_per_batch))
    return model


def _logits(
    model: SiglipModel,
    tokenizer: PreTrainedTokenizerFast,
    processor: SiglipImageProcessorPil,
    images: list[np.ndarray],
    captions: list[str],
) -> torch.Tensor:
    """[N, N]: row for text, column for image."""
    ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    return model(input_ids=ids, pixel_values=pixels).logits_per_text
