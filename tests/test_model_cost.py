"""What a step moves: by hand for the 8B shape, and against the weights and products of models that exist.

d width, F FFN width, V vocabulary.
"""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vitalrt.cli import main
from vitalrt.config import ModelConfig
from vitalrt.errors import VitalError
from vitalrt.model.qwen3_vl import Qwen3VL
from vitalrt.model_cost import CARDS, KNOWN_MODELS, Card, ModelCost, find_config, prefill_flops, step_cost
from vitalrt_kernels import Int8Weight, quantise_int8
from vitalrt_training.plan import KNOWN_BACKBONES, backbone_config

H200 = CARDS["H200"]
EIGHT_B = KNOWN_MODELS["Qwen3-VL-8B"].decoder
PHANTOM = Path(__file__).parents[1] / "vitalrt" / "assets" / "phantom"


def on_meta(config: ModelConfig) -> Qwen3VL:
    with torch.device("meta"):
        return Qwen3VL(config)


def configs() -> list[ModelConfig]:
    return [*KNOWN_MODELS.values(), ModelConfig.from_directory(PHANTOM)]


class TestEightBillion:
    def test_floors_of_a_h200(self) -> None:
        latent, answer = (step_cost(EIGHT_B, answers=answers) for answers in (False, True))
        assert round(latent.streamed_bytes / 1e9, 2) == 13.89
        assert round(answer.streamed_bytes / 1e9, 2) == 15.14
        assert round(latent.floor_ms(H200), 2) == 3.23
        assert round(answer.floor_ms(H200), 2) == 3.52

    def test_operations_by_hand(self) -> None:
        """d 4096, 32 query and 8 key/value heads of 128, F 12288, V 151936; 36 layers; bf16."""
        step = {operation.name: operation for operation in step_cost(EIGHT_B, answers=True, context=999).operations}
        assert step["QKV"].weight_bytes == (6144 * 4096 + 4096) * 2
        assert step["O"].weight_bytes == 4096 * 4096 * 2
        assert step["gate/up"].weight_bytes == (24576 * 4096 + 4096) * 2
        assert step["down"].weight_bytes == 4096 * 12288 * 2
        assert step["attention"].weight_bytes == 40 * 128 * 2
        assert step["attention"].kv_bytes == 1000 * 2 * 8 * 128 * 2
        assert step["attention"].flops == 1000 * 2 * (2 * 4096)
        assert step["head, argmax"].weight_bytes == 151936 * 4096 * 2
        assert step["embedding"].weight_bytes == 4096 * 2
        assert step["down"].activation_bytes == (12288 + 4096 + 4096) * 2

    def test_a_token_of_context_is_147456_bytes(self) -> None:
        kv = [step_cost(EIGHT_B, answers=False, context=context).total("kv_bytes") for context in (0, 1, 1000)]
        assert kv[1] - kv[0] == 147_456
        assert kv[2] - kv[0] == 147_456_000
        assert kv[0] == 147_456  # its own token, written

    def test_int8_halves_linear_weights_and_adds_scales(self) -> None:
        bf16, int8 = (step_cost(EIGHT_B, answers=False, dtype=dtype) for dtype in ("bf16", "int8"))
        linear = 36 * (6144 * 4096 + 4096 * 4096 + 24576 * 4096 + 4096 * 12288)
        scales = 36 * (6144 + 4096 + 24576 + 4096) * 4
        assert bf16.streamed_bytes - int8.streamed_bytes == linear - scales
        assert int8.total("kv_bytes") == bf16.total("kv_bytes")
        assert round(int8.floor_ms(H200), 2) == 1.62

    def test_five_launches_a_layer(self) -> None:
        assert step_cost(EIGHT_B, answers=False).launches == 5 * 36 + 2
        assert step_cost(EIGHT_B, answers=True).launches == 5 * 36 + 3
        assert step_cost(EIGHT_B, answers=True, batch=16, dtype="int8").launches == 5 * 36 + 3
        for batch, dtype in ((2, "bf16"), (2, "fp32"), (17, "int8")):
            assert step_cost(EIGHT_B, answers=True, batch=batch, dtype=dtype).launches is None

    def test_a_batch_shares_weights_but_not_context(self) -> None:
        one, many = (step_cost(EIGHT_B, answers=False, context=500, batch=batch) for batch in (1, 64))
        assert many.total("weight_bytes") == one.total("weight_bytes")
        for kind in ("kv_bytes", "activation_bytes", "flops"):
            assert many.total(kind) == 64 * one.total(kind)

    def test_many_rows_are_bound_by_arithmetic(self) -> None:
        step = step_cost(EIGHT_B, answers=False, batch=512)
        seconds = 512 * 2 * 6_945_767_424 / 790e12
        assert step.floor_ms(H200) == pytest.approx(1000 * seconds, rel=1e-3)
        assert step.floor_ms(Card("slow", 4.3e12, None, "")) < step.floor_ms(H200)

    def test_prefill_by_hand(self) -> None:
        """6.95 G weights for each of 1000 tokens, but the last layer goes on with one; 4 x 4096 FLOPs for each pair."""
        after_attention = 4096 * 4096 + 3 * 4096 * 12288
        linear = 2 * (1000 * 6_945_767_424 - 999 * after_attention)
        found = prefill_flops(KNOWN_MODELS["Qwen3-VL-8B"], 1000)
        assert found.decoder == linear + 36 * 500_500 * 4 * 4096
        assert found.floor_ms(H200) == pytest.approx((found.decoder + found.vision) / 790e9)
        assert found.floor_ms(Card("unknown", 1e12, None, "")) is None


class TestAgainstModels:
    @pytest.mark.parametrize("config", configs(), ids=[*KNOWN_MODELS, "phantom"])
    def test_a_latent_step_reads_every_weight_but_embedding_and_head(self, config: ModelConfig) -> None:
        decoder = on_meta(config).decoder
        unread = {id(decoder.embed.weight), id(decoder.head.weight)}
        read = sum(parameter.numel() for parameter in decoder.parameters() if id(parameter) not in unread)
        assert step_cost(config.decoder, answers=False).total("weight_bytes") == 2 * read

    @pytest.mark.parametrize("config", configs(), ids=[*KNOWN_MODELS, "phantom"])
    def test_an_answer_step_reads_the_head_and_a_row_of_the_embedding_as_well(self, config: ModelConfig) -> None:
        decoder = on_meta(config).decoder
        read = sum(parameter.numel() for parameter in decoder.parameters())
        if not config.decoder.tie_word_embeddings:
            read -= decoder.embed.weight.numel()
        rows = 3 * config.decoder.hidden_size
        step = step_cost(config.decoder, answers=True, batch=3, dtype="fp32")
        assert step.total("weight_bytes") == 4 * (read + rows)

    def test_int8_weighs_what_quantised_linear_maps_weigh(self) -> None:
        config = ModelConfig.from_directory(PHANTOM)
        decoder = on_meta(config).decoder
        num_bytes = 2 * config.decoder.hidden_size  # the embedding's row
        for module in decoder.modules():
            if isinstance(module, torch.nn.Linear):
                quantised: Int8Weight = quantise_int8(module.weight)
                num_bytes += sum(tensor.numel() * tensor.element_size() for tensor in quantised)
            elif not isinstance(module, torch.nn.Embedding):
                num_bytes += sum(2 * parameter.numel() for parameter in module.parameters(recurse=False))
        assert step_cost(config.decoder, answers=True, dtype="int8").total("weight_bytes") == num_bytes

    def test_prefill_multiplies_what_torch_multiplies(self) -> None:
        """torch multiplies all pairs and masks half of them; the model counts those that causal attention needs."""
        config = ModelConfig.from_directory(PHANTOM)
        model, tokens = Qwen3VL(config), 24
        grid = (1, 8, 12)  # in patches: 4 x 6 visual tokens
        attend = _CausalAttention()
        with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH):
            with FlopCounterMode(display=False) as vision:
                model.vision(torch.zeros(96, config.vision.patch_dim), [grid])
            with FlopCounterMode(display=False) as decoder:
                last = torch.tensor([tokens - 1])
                positions = torch.arange(tokens)[None]
                model.decoder(torch.zeros(tokens, config.decoder.hidden_size), positions, attend, rows=last)
        q = config.decoder.num_attention_heads * config.decoder.head_dim
        masked = config.decoder.num_hidden_layers * 4 * q * (tokens * (tokens - 1) // 2)
        found = prefill_flops(config, tokens)
        assert found.vision == vision.get_total_flops()
        assert found.decoder == decoder.get_total_flops() - masked

    @pytest.mark.parametrize("name", KNOWN_BACKBONES)
    def test_training_plans_with_the_same_shapes(self, name: str) -> None:
        planned = ModelConfig.from_dict(backbone_config(name).to_dict())
        known = find_config(name)
        assert planned.vision == replace(known.vision, rope_theta=planned.vision.rope_theta)
        for field in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            assert getattr(planned.decoder, field) == getattr(known.decoder, field)
        assert planned.decoder.kv_values_per_token == known.decoder.kv_values_per_token
        assert planned.decoder.tie_word_embeddings == known.decoder.tie_word_embeddings


class _CausalAttention:
    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        heads_first = [tensor.transpose(0, 1)[None] for tensor in (q, k, v)]
        attended = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
        return attended[0].transpose(0, 1)


class TestArguments:
    @pytest.mark.parametrize("name", ["Qwen3-VL-8B", "Qwen/Qwen3-VL-8B-Instruct", "Qwen/Qwen3-VL-8B-Thinking"])
    def test_names_as_on_the_hub(self, name: str) -> None:
        assert find_config(name) is KNOWN_MODELS["Qwen3-VL-8B"]

    def test_a_directory_needs_no_weights(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text((PHANTOM / "config.json").read_text())
        assert find_config(str(tmp_path)) == ModelConfig.from_directory(PHANTOM)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"dtype": "fp8"}, "dtype: expected one of"),
            ({"context": -1}, "context, batch: expected"),
            ({"batch": 0}, "context, batch: expected"),
        ],
    )
    def test_what_has_no_meaning(self, given: dict, message: str) -> None:
        with pytest.raises(VitalError, match=message):
            step_cost(EIGHT_B, answers=False, **given)

    def test_an_unknown_model(self) -> None:
        with pytest.raises(VitalError, match="model: expected a directory or one of"):
            find_config("Qwen3-VL-9B")


class TestOutput:
    def test_tables_name_every_operation_and_card_within_80_columns(self) -> None:
        console = Console(width=80, record=True, file=io.StringIO())
        cost = ModelCost.of("Qwen3-VL-8B", batch=17)
        console.print(cost.operations_table(), cost.floors_table([*CARDS.values()]), sep="\n")
        text = console.export_text()
        assert "…" not in text
        assert "several rows" in text
        for name in ("QKV", "paged_attention", "head_argmax", "13,892.502", *CARDS):
            assert name in text

    def test_command_line(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["bench", "--model-cost", "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert (report["model"], report["dtype"], report["latent_step"]["launches"]) == ("Qwen3-VL-8B", "bf16", 182)
        floors = {floor["name"]: floor for floor in report["floors"]}
        assert round(floors["H200"]["answer_token_ms"], 2) == 3.52
        assert len(floors) > 1

    def test_any_bandwidth(self, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = ["--model", str(PHANTOM), "--dtype", "fp32", "--context", "100", "--batch", "2"]
        assert main(["bench", "--model-cost", *arguments, "--bandwidth", "20", "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        [floor] = report["floors"]
        assert floor["latent_step_ms"] == pytest.approx(report["latent_step"]["streamed_bytes"] / 20e6)
        assert floor["prefill_ms"] == dict.fromkeys(floor["prefill_ms"])

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--context", "5"], "--context: expected together with --model-cost"),
            (["--model-cost", "--card", "abacus"], "--card: expected one of"),
            (["--model-cost", "--bandwidth", "0"], "--bandwidth: expected"),
            (["--model-cost", "--bandwidth", "nan"], "--bandwidth: expected"),
            (["--model-cost", "--bandwidth", "9", "--card", "H200"], "no --card"),
            (["--model-cost", "--model", "nowhere"], "model: expected"),
        ],
    )
    def test_wrong_arguments(self, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
        assert main(["bench", *arguments]) == 1
        assert message in capsys.readouterr().err
