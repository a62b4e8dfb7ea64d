"""What a finished VITAL run leaves: an adapter with its scaffolding, and a report on the validation split.

One process makes both, from the run's last state: the model that was trained may be shared out among several.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from vitalrt.api import load
from vitalrt.config import ROI_INDEX, SCAFFOLD_TOKENIZER
from vitalrt.model.scaffold import SUPERVISED
from vitalrt_training.backbone import TINY
from vitalrt_training.data.roi_index import has_feature, index_regions
from vitalrt_training.data.tables import Tables
from vitalrt_training.evaluate import TablePictures, evaluate
from vitalrt_training.paradigms.vital import VitalCollator, VitalModel, to_device
from vitalrt_training.probes import probe
from vitalrt_training.recipes import VitalRecipe
from vitalrt_training.report import variant_of, write_report
from vitalrt_training.run_files import replacing_directory

PROBED_BATCHES = 8


def export_adapter(recipe: VitalRecipe, run_dir: Path, model: VitalModel, collator: VitalCollator) -> Path:
    """run_dir/adapter: PEFT's files, vital.json, the scaffolding's files and what explanations need beside them."""
    directory, tables, tokenizer = run_dir / "adapter", collator.tables, collator.chain_tokenizer
    scaffold = model.scaffold
    scaffold.supervised = _supervised(recipe, model, tables)
    scaffold.text_decoder.config.eos_token_id = tokenizer.eos_token_id  # which ended every step that it learnt
    index = index_regions(tables, recipe.indexed_regions) if "visual" in scaffold.supervised else None
    with replacing_directory(directory) as partial:
        model.backbone.save_pretrained(str(partial))
        scaffold.save(partial)
        if recipe.text_decoder != TINY:
            tokenizer.backend_tokenizer.save(str(partial / SCAFFOLD_TOKENIZER))
        if index is not None:
            index.save(partial / ROI_INDEX)
        (partial / "vital.json").write_text(json.dumps(_vital(recipe, model, tables), indent=2) + "\n")
    return directory


def report_run(
    recipe: VitalRecipe, run_dir: Path, model: VitalModel, collator: VitalCollator, accelerator: Accelerator
) -> None:
    """run_dir/report: accuracy on the validation split through the runtime, for every k, and what probes see."""
    tables, size = collator.tables, recipe.batch_size
    rows = tables.select("validation")
    rows = rows[:: max(1, len(rows) // (PROBED_BATCHES * size))].tolist()  # of many pictures
    runtime = load(recipe.backbone, adapter=run_dir / "adapter", device=accelerator.device)
    longest = runtime.checkpoint.vital.k
    starts = range(0, min(len(rows), PROBED_BATCHES * size), size)
    k = recipe.phases[-1].k
    batches = [to_device(collator.collate(rows[at : at + size], k), accelerator.device) for at in starts]
    with accelerator.autocast():
        probes = probe(model.to(accelerator.device), batches, longest)
    shown = TablePictures(tables, "validation")
    evaluation = {"split": "validation", **evaluate(runtime, shown, range(longest + 1))}
    write_report(run_dir, evaluation, probes)


def _supervised(recipe: VitalRecipe, model: VitalModel, tables: Tables) -> tuple[str, ...]:
    """The losses that trained scaffolding: those switched on that had latents and something to hold them to."""
    rows = tables.select("train")
    has_chains = bool(tables.num_steps[rows].any())
    if recipe.longest is None:
        thinks = has_chains
    else:
        thinks = any(recipe.k_weights[1:]) if recipe.k_weights else recipe.longest > 0
    has_targets = {"text": has_chains, "visual": bool(has_feature(tables, rows).any())}
    return tuple(name for name in SUPERVISED if model.weight_of(name) and thinks and has_targets[name])


def _vital(recipe: VitalRecipe, model: VitalModel, tables: Tables) -> dict[str, Any]:
    losses = ["task"] + [name for name in ("text", "visual") if model.weight_of(name)]
    return {
        "k": int(tables.num_steps.max()) if recipe.longest is None else recipe.longest,
        "feedback": "final_norm",
        "provenance": f"{variant_of(asdict(recipe))} on {Path(recipe.data).name}, losses {' + '.join(losses)}, "
        f"{recipe.schedule}, seed {recipe.seed}",
        "encoder": tables.encoder_id,
    }
