"""Checkpoint directories and LoRA adapters: what loads, what it gives, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Qwen3VLForConditionalGeneration

import vitalrt
from vitalrt.errors import CheckpointError, VitalError

Tensors = dict[str, torch.Tensor]
Q_PROJ = "model.language_model.layers.0.self_attn.q_proj.weight"
K_PROJ = Q_PROJ.replace("q_proj", "k_proj")


@pytest.fixture
def directory(tiny, tmp_path) -> Path:
    """A copy of the tiny checkpoint that a test may spoil."""
    return Path(shutil.copytree(tiny.directory, tmp_path / "model"))


def load(directory: Path | str, **options: Any) -> vitalrt.Model:
    return vitalrt.load(directory, **{"device": "cpu", "cache_tokens": 256, **options})


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit_tensors(directory: Path, change: Callable[[Tensors], Any], name: str = "model.safetensors") -> None:
    tensors = load_file(directory / name)
    change(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, directory / name)


def outcome(tiny, model: vitalrt.Model) -> torch.Tensor:
    [answer] = model.run([tiny.prompt(1, [(1, 3, 2)])], k=2, max_new_tokens=3, return_logits=True)
    return torch.cat((answer.latents.flatten(), answer.logits.flatten()))


class TestWhatLoads:
    def test_sharded(self, tiny, tmp_path) -> None:
        tiny.reference.save_pretrained(tmp_path, max_shard_size="60KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 2
        assert torch.equal(outcome(tiny, load(tmp_path)), outcome(tiny, tiny.model))

    def test_bfloat16_files(self, tiny, tmp_path) -> None:
        Qwen3VLForConditionalGeneration.from_pretrained(tiny.directory, dtype="bfloat16").save_pretrained(tmp_path)
        widened = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path, dtype="float32").eval()
        model = load(tmp_path)
        assert model.weights.decoder.norm.weight.dtype == torch.float32  # "auto" on the CPU
        assert load(tmp_path, dtype="bfloat16").weights.decoder.norm.weight.dtype == torch.bfloat16
        prompt = tiny.prompt(1, [(1, 3, 2)])
        _, logits = type(tiny)(tmp_path, widened).generate(prompt, 5)
        [answer] = model.run([prompt], k=0, max_new_tokens=5, return_logits=True)
        torch.testing.assert_close(answer.logits, logits, atol=1e-4, rtol=0)

    @pytest.mark.parametrize("repeat_head", [False, True])
    def test_tied(self, make_tiny, repeat_head) -> None:
        tied = make_tiny(3, tie_word_embeddings=True)
        embedding = load_file(tied.directory / "model.safetensors")["model.language_model.embed_tokens.weight"]
        if repeat_head:
            edit_tensors(tied.directory, lambda tensors: tensors.update({"lm_head.weight": embedding.clone()}))
        decoder = load(tied.directory).weights.decoder
        assert decoder.head.weight is decoder.embed.weight
        assert torch.equal(decoder.head.weight, embedding)

    def test_config_of_transformers_4(self, tiny, directory) -> None:
        def make_old(config: dict[str, Any]) -> None:
            text = config["text_config"]
            rope = text.pop("rope_parameters")
            text["rope_theta"] = rope.pop("rope_theta")
            text["rope_scaling"] = rope
            config["vision_config"].pop("rope_parameters", None)
            config["torch_dtype"] = config.pop("dtype")

        edit_json(directory / "config.json", make_old)
        model = load(directory)
        assert model.weights.config == tiny.model.weights.config
        assert torch.equal(outcome(tiny, model), outcome(tiny, tiny.model))

    @pytest.mark.parametrize("place", ["generation_config", "text_config", "config"])
    def test_end_tokens_from_any_config(self, directory, place) -> None:
        edit_json(directory / "config.json", lambda c: c["text_config"].update(eos_token_id=[3, 4]))
        if place == "generation_config":
            assert load(directory).engine.stop_ids == {7}
            return
        (directory / "generation_config.json").unlink()
        edit_json(directory / "config.json", lambda c: c.update(eos_token_id=5 if place == "config" else None))
        assert load(directory).engine.stop_ids == ({5} if place == "config" else {3, 4})

    def test_vital_json(self, tiny, directory) -> None:
        assert load(directory).checkpoint.vital.k == 4
        (directory / "vital.json").write_text('{"k": 6, "provenance": "a test"}')
        [answer] = load(directory).run([tiny.prompt(1)], max_new_tokens=1)
        assert answer.usage.latent_steps == 6

    def test_without_tokenizer(self, tiny, model) -> None:
        [answer] = model.run([tiny.prompt(1)])
        assert answer.text == "" and answer.token_ids
        with pytest.raises(CheckpointError, match=r"^model: "):
            model.prepare(None, "What?")

    def test_progress(self, directory) -> None:
        seen: list[tuple[int, int]] = []
        load(directory, progress=lambda done, total: seen.append((done, total)))
        assert seen == [(done, len(seen)) for done in range(1, len(seen) + 1)]


def only_config(**values: Any) -> Callable[[Path], None]:
    return lambda d: edit_json(d / "config.json", lambda c: c.update(values))


def part_of_config(part: str, **values: Any) -> Callable[[Path], None]:
    return lambda d: edit_json(d / "config.json", lambda c: c[part].update(values))


def tensors(change: Callable[[Tensors], Any]) -> Callable[[Path], None]:
    return lambda d: edit_tensors(d, change)


def truncate(path: Path, fraction: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * fraction)])


def name_a_missing_shard(directory: Path) -> None:
    names = load_file(directory / "model.safetensors")
    index = {"weight_map": {**dict.fromkeys(names, "model.safetensors"), Q_PROJ: "model-00002.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


SUPPORTED = r"expected Qwen3-VL dense checkpoints .*2B, 4B, 8B, 32B"
BAD_DIRECTORIES = {
    "moe": (only_config(model_type="qwen3_vl_moe"), rf"{SUPPORTED}.*; got model_type 'qwen3_vl_moe'"),
    "older": (only_config(model_type="qwen2_5_vl"), rf"{SUPPORTED}.*; got model_type 'qwen2_5_vl'"),
    "text": (only_config(model_type="qwen3"), rf"{SUPPORTED}.*; got model_type 'qwen3'"),
    "quantized": (only_config(quantization_config={"quant_method": "fp8"}), "expected float weights .* quantized"),
    "activation": (part_of_config("text_config", hidden_act="gelu"), "text_config.hidden_act: expected 'silu'"),
    "rope": (
        part_of_config("text_config", rope_parameters={"rope_type": "yarn", "rope_theta": 1e6}),
        "text_config.rope_parameters.rope_type: expected 'default', got 'yarn'",
    ),
    "no text_config": (lambda d: edit_json(d / "config.json", lambda c: c.pop("text_config")), "'text_config'"),
    "no width": (lambda d: edit_json(d / "config.json", lambda c: c["text_config"].pop("hidden_size")), "hidden_size"),
    "no config": (lambda d: (d / "config.json").unlink(), "has no config.json"),
    "list": (lambda d: (d / "config.json").write_text("[]"), "config.json is not a JSON object"),
    "garbled": (lambda d: (d / "config.json").write_text("{"), "config.json is not valid JSON"),
    "binary": (lambda d: (d / "config.json").write_bytes(b"\xff\xfe"), "config.json is not valid JSON"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "has no model.safetensors"),
    "no shard": (name_a_missing_shard, r"model-00002.safetensors cannot be read"),
    "missing": (tensors(lambda t: t.pop(Q_PROJ)), rf"lacks 1 tensors, the first is {Q_PROJ}"),
    "extra": (tensors(lambda t: t.update(extra=torch.zeros(1))), "has unknown 1 tensors, the first is extra"),
    "narrow": (tensors(lambda t: t.update({Q_PROJ: t[Q_PROJ][:, 1:]})), rf"{Q_PROJ}: expected shape"),
    "short": (tensors(lambda t: t.update({Q_PROJ: t[Q_PROJ][1:]})), rf"{Q_PROJ}: expected shape .*\[63, 48\]"),
    "long": (tensors(lambda t: t.update({Q_PROJ: torch.cat([t[Q_PROJ]] * 2)})), r"expected shape .*\[128, 48\]"),
    "swapped": (tensors(lambda t: t.update({Q_PROJ: t[K_PROJ], K_PROJ: t[Q_PROJ]})), r"expected shape \[64, 48\]"),
    "qk norm": (
        tensors(lambda t: t.update({Q_PROJ.replace("_proj", "_norm"): torch.ones(2, 16)})),
        r"self_attn.q_norm.weight: expected shape .*\[2, 16\]",
    ),
    "patches": (
        tensors(lambda t: t.update({"model.visual.patch_embed.proj.weight": torch.ones(32)})),
        r"patch_embed.proj.weight: expected shape \[32, 96\] .*\[32\]",
    ),
    "norm": (
        tensors(lambda t: t.update({"model.language_model.norm.weight": torch.ones(47)})),
        r"model.language_model.norm.weight: expected shape \[48\] as config.json says, got \[47\]",
    ),
    "cut header": (lambda d: truncate(d / "model.safetensors", 0.001), r"model.safetensors cannot be read"),
    "cut": (lambda d: truncate(d / "model.safetensors", 0.7), r"model.safetensors cannot be read"),
    "empty": (lambda d: truncate(d / "model.safetensors", 0), r"model.safetensors cannot be read"),
    "unknown key": (lambda d: (d / "vital.json").write_text('{"steps": 3}'), r"unknown keys \['steps'\]"),
    "too many steps": (lambda d: (d / "vital.json").write_text('{"k": 65}'), r"k: expected 0..64, got 65"),
    "feedback": (lambda d: (d / "vital.json").write_text('{"feedback": "raw"}'), "feedback: expected 'final_norm'"),
}


@pytest.mark.parametrize("case", BAD_DIRECTORIES)
def test_a_bad_directory_is_named(directory, case) -> None:
    spoil, message = BAD_DIRECTORIES[case]
    spoil(directory)
    with pytest.raises(CheckpointError, match=rf"^(model|vital\.json): .*{message}") as caught:
        load(directory)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "device: expected"),
        ({"device": "meta"}, "device: expected 'auto', 'cpu' or 'cuda"),
        ({"device": None}, "device: expected"),
        ({"dtype": "int8"}, "dtype: expected 'auto' or one of"),
        ({"dtype": torch.float64}, "dtype: expected .* got 'float64'"),
        ({"dtype": None}, "dtype: expected"),
        ({"cache_tokens": 0}, "cache_tokens: expected a positive int, got 0"),
        ({"max_batch": "many"}, "max_batch: expected a positive int, got 'many'"),
        ({"adapter": "no/where/at/all"}, "adapter: expected a directory or a hub id"),
    ],
)
def test_bad_options_are_named(tiny, options, message) -> None:
    with pytest.raises(VitalError, match=rf"^{message}"):
        load(tiny.directory, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there(tiny) -> None:
    with pytest.raises(CheckpointError, match=r"^device: expected a device of this machine, got 'cuda'"):
        load(tiny.directory, device="cuda")


@pytest.mark.parametrize("name", ["nobody/no-such-model-8f2b", "no/such/directory", "missing", __file__])
def test_a_model_that_is_nowhere(name) -> None:
    with pytest.raises(CheckpointError, match=r"^model: (expected a directory or a hub id|no directory '.*the hub)"):
        load(name)


LAYER = "(q|k|v|o|gate|up|down)_proj"
TARGETS = rf".*language_model.*\.{LAYER}"


class TestLora:
    @pytest.mark.parametrize(
        "config",
        [
            {"target_modules": TARGETS, "r": 4, "lora_alpha": 8},
            {"target_modules": TARGETS, "r": 4, "lora_alpha": 3, "use_rslora": True},
            {"target_modules": ["q_proj", "lm_head"], "r": 2, "lora_alpha": 5},
            {
                "target_modules": rf".*(visual.*\.(qkv|proj|linear_fc1)|\.{LAYER})",
                "exclude_modules": r".*patch_embed.*",
            },
            {"target_modules": TARGETS, "r": 4, "alpha_pattern": {"k_proj": 32, r"layers.1.*\.up_proj": 1}},
            {"target_modules": TARGETS, "r": 4, "rank_pattern": {"down_proj": 7, "^model.*0.*v_proj": 1}},
            {
                "target_modules": TARGETS,
                "use_rslora": True,
                "rank_pattern": {"q_proj": 3},
                "alpha_pattern": {"q_proj": 9},
            },
        ],
    )
    def test_merged_is_what_peft_gives(self, tiny, tmp_path, config) -> None:
        base = Qwen3VLForConditionalGeneration.from_pretrained(tiny.directory)
        base.generation_config = tiny.reference.generation_config
        torch.manual_seed(0)
        adapted = get_peft_model(base, LoraConfig(init_lora_weights=False, lora_dropout=0.05, **config)).eval()
        adapted.save_pretrained(tmp_path, save_embedding_layers=False)
        reference = type(tiny)(tmp_path, adapted.get_base_model())
        prompt = tiny.prompt(4, [(1, 2, 3)])
        [answer] = load(tiny.directory, adapter=tmp_path).run([prompt], k=0, max_new_tokens=5, return_logits=True)
        expected, logits = reference.generate(prompt, 5)
        torch.testing.assert_close(answer.logits, logits, atol=1e-4, rtol=1e-4)
        assert answer.token_ids == [token for token in expected if token not in tiny.stop_ids]
        [plain] = tiny.model.run([prompt], k=0, max_new_tokens=1, return_logits=True)
        assert float((plain.logits[0] - logits[0]).abs().max()) > 0.01  # the adapter does something

    @pytest.fixture
    def adapter(self, tiny, tmp_path) -> Path:
        base = Qwen3VLForConditionalGeneration.from_pretrained(tiny.directory)
        adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj", "o_proj"], r=2, init_lora_weights=False))
        adapted.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    LORA_A = f"base_model.model.{Q_PROJ}".replace(".weight", ".lora_A.weight")

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("peft_type", "IA3", "expected peft_type LORA, got 'IA3'"),
            ("use_dora", True, "use_dora: only False can be merged"),
            ("fan_in_fan_out", True, "fan_in_fan_out: only False"),
            ("bias", "all", "bias: only 'none' can be merged, got 'all'"),
            ("modules_to_save", ["lm_head"], r"modules_to_save: only None can be merged, got \['lm_head'\]"),
        ],
    )
    def test_what_cannot_be_merged(self, tiny, adapter, key, value, message) -> None:
        edit_json(adapter / "adapter_config.json", lambda config: config.update({key: value}))
        with pytest.raises(CheckpointError, match=rf"^adapter: {message}"):
            load(tiny.directory, adapter=adapter)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t: t.pop(TestLora.LORA_A), r"q_proj: expected lora_A, lora_B for \[64, 48\], got \{'B'"),
            (lambda t: t.update({TestLora.LORA_A: torch.zeros(2, 47)}), r"q_proj: expected .*\[2, 47\]"),
            (lambda t: t.update({TestLora.LORA_A: torch.zeros(3, 48)}), r"q_proj: expected .*\[3, 48\]"),
            (lambda t: t.update({TestLora.LORA_A: torch.zeros(2)}), r"cannot merge tensor .* of shape \[2\]"),
            (lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(2, 2)}), "cannot merge tensor"),
            (
                lambda t: t.update({TestLora.LORA_A.replace("layers.0", "layers.9"): torch.zeros(2, 48)}),
                r"the model has no weight for model.language_model.layers.9.self_attn.q_proj",
            ),
        ],
    )
    def test_tensors_that_do_not_fit(self, tiny, adapter, change, message) -> None:
        edit_tensors(adapter, change, "adapter_model.safetensors")
        with pytest.raises(CheckpointError, match=rf"^adapter: .*{message}"):
            load(tiny.directory, adapter=adapter)

    def test_files_that_are_missing_or_cut(self, tiny, adapter) -> None:
        weights = adapter / "adapter_model.safetensors"
        edit_json(adapter / "adapter_config.json", lambda config: config.pop("lora_alpha"))
        with pytest.raises(CheckpointError, match=r"^adapter: adapter_config.json has no lora_alpha"):
            load(tiny.directory, adapter=adapter)
        edit_json(adapter / "adapter_config.json", lambda config: config.update(lora_alpha=1))
        truncate(weights, 0.6)
        with pytest.raises(CheckpointError, match=r"^adapter: .*adapter_model.safetensors cannot be read"):
            load(tiny.directory, adapter=adapter)
        weights.unlink()
        with pytest.raises(CheckpointError, match=r"^adapter: .*adapter_model.safetensors cannot be read"):
            load(tiny.directory, adapter=adapter)
        (adapter / "adapter_config.json").write_text("{")
        with pytest.raises(CheckpointError, match=r"^adapter: .*adapter_config.json is not valid JSON"):
            load(tiny.directory, adapter=adapter)
        (adapter / "adapter_config.json").unlink()
        with pytest.raises(CheckpointError, match=r"^adapter: .* has no adapter_config.json"):
            load(tiny.directory, adapter=adapter)
