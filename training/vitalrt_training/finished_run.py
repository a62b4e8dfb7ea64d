"""What a finished VITAL run leaves: an adapter with its scaffolding, and a report on the validation split.

One process makes both, from the run's last state: the model that was trained may be shared out among several.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from vitalrt.api import load
from vitalrt_training.data.tables import Tables
from vitalrt_training.evaluate import TablePictures, evaluate
from vitalrt_training.paradigms.vital import VitalCollator, VitalModel, to_device
from vitalrt_training.probes import probe
from vitalrt_training.recipes import VitalRecipe
from vitalrt_training.report import write_report
from vitalrt_training.run_files import replacing_directory

PROBED_BATCHES = 8


def export_adapter(recipe: VitalRecipe, run_dir: Path, model: VitalModel, tables: Tables) -> Path:
    """run_dir/adapter: PEFT's files, the scaffolding's, vital.json."""
    directory = run_dir / "adapter"
    with replacing_directory(directory) as partial:
        model.backbone.save_pretrained(str(partial))
        model.scaffold.save(partial)
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
    batches = [to_device(collator.collate(rows[at : at + size]), accelerator.device) for at in starts]
    with accelerator.autocast():
        probes = probe(model.to(accelerator.device), batches, longest)
    shown = TablePictures(tables, "validation")
    evaluation = {"split": "validation", **evaluate(runtime, shown, range(longest + 1))}
    write_report(run_dir, evaluation, probes)


def _vital(recipe: VitalRecipe, model: VitalModel, tables: Tables) -> dict[str, Any]:
    losses = ["task"] + [name for name in ("text", "visual") if model.weight_of(name)]
    return {
        "k": len(recipe.k_weights) - 1 if recipe.k_weights else int(tables.num_steps.max()),
        "feedback": "final_norm",
        "provenance": f"VITAL on {Path(recipe.data).name}, losses {' + '.join(losses)}, {recipe.schedule}, seed "
        f"{recipe.seed}",
        "encoder": tables.encoder_id,
    }
