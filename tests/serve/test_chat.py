"""Answers of the server, by the openai client, against what the model says in this process."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import openai
import pytest
from PIL import Image

from vitalrt.serve.conversation import PromptMaker
from vitalrt.serve.images import ImageReader
from vitalrt.serve.protocol import ChatRequest
from vitalrt.serve.remote import Fetcher
from vitalrt.serve.settings import ServeConfig

DEMO = Path(__file__).parents[2] / "examples" / "demo.png"
QUESTION = "Where is the cyst?"
ANSWER = "lower left"


@pytest.fixture(scope="module")
def client(running):
    return running.openai()


@pytest.fixture
def ask(client, running):
    def ask(**options):
        return client.chat.completions.create(**{"model": "phantom", "messages": running.messages(), **options})

    return ask


def latents_of(choice) -> np.ndarray:
    latents = choice.model_extra["vital"]["latents"]
    return np.frombuffer(base64.b64decode(latents["data"]), "<f4").reshape(latents["shape"])


def test_a_whole_answer_is_the_models_own(ask, phantom):
    own = phantom.generate(DEMO, QUESTION)
    answer = ask(extra_body={"vital": {"return_latents": True}})
    [choice] = answer.choices
    assert (choice.message.content, choice.message.role, choice.finish_reason) == (str(own), "assistant", "stop")
    np.testing.assert_allclose(latents_of(choice), own.latents, atol=1e-5)
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (own.usage.prompt_tokens, own.usage.completion_tokens)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.latent_steps == 4
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens // 16 * 16  # its pages are in the cache


def test_a_streamed_answer_joins_to_the_whole_one(ask):
    chunks = list(
        ask(stream=True, stream_options={"include_usage": True}, extra_body={"vital": {"return_latents": True}})
    )
    *pieces, last, usage = chunks
    assert pieces[0].choices[0].delta.role == "assistant"
    assert [piece.choices[0].delta.content for piece in pieces] == ["", "lower", " left"]
    assert last.choices[0].finish_reason == "stop"
    assert latents_of(last.choices[0]).shape == (4, 192)
    assert usage.choices == [] and usage.usage.latent_steps == 4
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks[:-1])


@pytest.mark.parametrize(("options", "steps"), [({}, 4), ({"model": "phantom@k=2"}, 2), ({"model": "phantom@k=0"}, 0)])
def test_the_models_name_may_say_how_many_latent_steps(ask, options, steps):
    assert ask(**options).usage.latent_steps == steps


def test_latent_steps_may_be_asked_for(ask):
    assert ask(extra_body={"vital": {"latent_steps": 1}}).usage.latent_steps == 1
    assert ask(model="phantom@k=3", extra_body={"vital": {"latent_steps": 3}}).usage.latent_steps == 3


def test_choices_are_sampled_with_seeds_of_their_own(ask, phantom):
    answer = ask(n=3, seed=5, temperature=2.0, max_tokens=6)
    own = [str(phantom.generate(DEMO, QUESTION, temperature=2.0, seed=5 + i, max_new_tokens=6)) for i in range(3)]
    assert [choice.message.content for choice in answer.choices] == own
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len(set(own)) > 1
    assert answer.usage.latent_steps == 12


def test_streamed_choices_each_join_to_their_own(ask):
    options = {"n": 3, "seed": 5, "temperature": 2.0, "max_tokens": 6}
    texts = ["", "", ""]
    for chunk in ask(stream=True, **options):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in ask(**options).choices]


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_the_answer_may_be_cut(ask, name):
    answer = ask(**{name: 1})
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("lower", "length")
    assert answer.usage.completion_tokens == 1


def test_max_completion_tokens_goes_before_max_tokens(ask):
    assert ask(max_tokens=50, max_completion_tokens=1).usage.completion_tokens == 1


@pytest.mark.parametrize(
    ("stop", "text"), [("left", "lower "), (["zzz", "r le"], "lowe"), ([" "], "lower"), ("right", ANSWER), ([], ANSWER)]
)
def test_stop_strings_cut_streamed_and_whole_answers_alike(ask, running, until, stop, text):
    whole = ask(stop=stop)
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == (text, "stop")
    pieces = [chunk.choices[0].delta.content or "" for chunk in ask(stop=stop, stream=True)]
    assert "".join(pieces) == text
    until(lambda: running.num_pages_taken == 0)


def test_logprobs_are_those_of_the_models_logits(ask, phantom):
    own = phantom.run([phantom.prepare(DEMO, QUESTION)], return_logits=True)[0]
    entries = ask(logprobs=True, top_logprobs=3).choices[0].logprobs.content
    expected = own.logits.log_softmax(-1)
    assert [entry.token for entry in entries] == ["lower", " left"]
    for entry, token, row in zip(entries, own.token_ids, expected, strict=False):
        assert entry.logprob == pytest.approx(row[token].item(), abs=1e-5)
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(row.topk(3).values.tolist(), abs=1e-5)
        assert bytes(entry.bytes).decode() == entry.token


def test_logprobs_are_streamed_with_their_text_and_never_past_a_stop_string(ask):
    chunks = list(ask(logprobs=True, stream=True, stop="left"))
    tokens = [entry.token for chunk in chunks if (found := chunk.choices[0].logprobs) for entry in found.content]
    assert tokens == ["lower"]


def test_jpeg_dicom_and_several_images(ask, running, dicom_bytes):
    jpeg = io.BytesIO()
    Image.open(DEMO).convert("RGB").save(jpeg, "JPEG", quality=98)
    uris = [running.data_uri(jpeg.getvalue(), "image/jpeg"), running.data_uri(dicom_bytes, "application/dicom")]
    counts = [ask(messages=running.messages(QUESTION, urls)).usage.prompt_tokens for urls in (uris[:1], uris[1:], uris)]
    assert counts[2] > max(counts[:2]) + 20


def test_a_dicom_window_and_frame_reach_the_reader(ask, running, dicom_bytes):
    uri = running.data_uri(dicom_bytes, "application/dicom")
    shown = [
        latents_of(
            ask(
                messages=running.messages(QUESTION, [uri]),
                extra_body={"vital": {"window": window, "frame": 0, "return_latents": True}},
            ).choices[0]
        )
        for window in ([100, 50], [2000.0, 4000.0])
    ]
    assert np.abs(shown[0] - shown[1]).max() > 0.01
    with pytest.raises(openai.BadRequestError, match="frame"):
        ask(messages=running.messages(QUESTION, [uri]), extra_body={"vital": {"frame": 7}})


def test_turns_and_system_messages_are_taken(ask, running):
    one = running.messages()
    turns = [
        {"role": "system", "content": "Answer in two words."},
        *one,
        {"role": "assistant", "content": "lower left"},
        {"role": "user", "content": "Is the liver visible?"},
    ]
    assert ask(messages=turns).usage.prompt_tokens > ask(messages=one).usage.prompt_tokens + 10
    assert ask(messages=[{"role": "user", "content": "Is the liver visible?"}]).choices[0].finish_reason


def test_unknown_fields_are_ignored(running):
    answer = running.post(user="u", tools=[], frequency_penalty=0.0, vital={"future": 1}, response_format={"type": "x"})
    assert answer.json()["choices"][0]["message"]["content"] == ANSWER


def test_null_means_default(running):
    names = ("max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "n", "stop", "stream", "logprobs")
    assert running.post(**dict.fromkeys(names)).json()["choices"][0]["message"]["content"] == ANSWER


def test_a_turn_with_its_image_first_is_the_prompt_of_prepare(running, phantom):
    reader = ImageReader(Fetcher((), 1), 1 << 24)
    maker = PromptMaker(phantom, reader, ServeConfig())
    asked = ChatRequest.model_validate({"model": "phantom", "messages": running.messages()})
    ours, own = maker.make(asked), phantom.prepare(DEMO, QUESTION)
    assert ours.input_ids.tolist() == own.input_ids.tolist()
    assert (ours.pixel_values == own.pixel_values).all()
    assert ours.digests == own.digests
    assert ours.grids() == own.grids()


def test_an_image_may_stand_between_texts(running, phantom):
    [turn] = running.messages()
    image, text = turn["content"]
    asked = {"model": "phantom", "messages": [{"role": "user", "content": [text, image, text]}]}
    maker = PromptMaker(phantom, ImageReader(Fetcher((), 1), 1 << 24), ServeConfig())
    prompt = maker.make(ChatRequest.model_validate(asked))
    shown = phantom.processor.tokenizer.decode(prompt.input_ids)
    assert shown.count(QUESTION) == 2
    assert shown.index(QUESTION) < shown.index("<|image_pad|>") < shown.rindex(QUESTION)


def test_the_model_list_and_cards_carry_the_notice(client):
    cards = {card.id: card for card in client.models.list()}
    assert set(cards) == {"phantom", *(f"phantom@k={k}" for k in (0, 1, 2, 4))}
    assert "not for clinical decisions" in cards["phantom"].model_extra["notice"]
    assert client.models.retrieve("phantom@k=7").model_extra["k"] == 7
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("phantom@k=65")


def test_every_response_carries_the_notice(running):
    with running.http() as http:
        responses = [
            *(http.get(path) for path in ("/health", "/ready", "/version", "/metrics", "/nowhere", "/v1/models")),
            http.delete("/v1/models"),
            http.post("/v1/chat/completions", content=b"{"),
            running.post(),
        ]
    assert all("not for clinical decisions" in response.headers["x-vitalrt-notice"] for response in responses)
    assert len({response.headers["x-request-id"] for response in responses}) == len(responses)
