"""What comes in and goes out at /v1/chat/completions: OpenAI's shapes, and ours under `vital`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vitalrt.config import MAX_LATENT_STEPS
from vitalrt.serve.errors import ApiError, bad_request

MAX_STOPS = 4
MAX_STOP_CHARS = 64
MAX_TOP_LOGPROBS = 20
MAX_MESSAGES = 256
MAX_PRIORITY = 100


class _Given(BaseModel):
    """Read from a request: unknown fields are ignored, types are not converted, numbers are finite."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, hide_input_in_errors=True)


class ImageUrl(_Given):
    url: str = Field(min_length=1, description="data:…;base64,… of a PNG, JPEG or DICOM file")


class ContentPart(_Given):
    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageUrl | None = None

    @model_validator(mode="after")
    def _has_its_own(self) -> ContentPart:
        if getattr(self, self.type) is None:
            raise ValueError(f"a part of type {self.type} needs the field {self.type}")
        return self


class Message(_Given):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[ContentPart], Field(min_length=1)]

    def parts(self) -> list[ContentPart]:
        return [ContentPart(type="text", text=self.content)] if isinstance(self.content, str) else self.content


class StreamOptions(_Given):
    include_usage: bool = False


class VitalOptions(_Given):
    """window: [center, width], or the index of a DICOM file's own view.  cache_salt: requests share a prefix cache only
    with those of the same salt.  priority: lower goes first.  deadline_s: from the arrival to the last byte."""

    latent_steps: int | None = Field(default=None, ge=0, le=MAX_LATENT_STEPS)
    return_latents: bool = False
    window: Annotated[int, Field(ge=0)] | Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    frame: int | None = Field(default=None, ge=0)
    cache_salt: str | None = Field(default=None, min_length=1, max_length=256)
    priority: int = Field(default=0, ge=-MAX_PRIORITY, le=MAX_PRIORITY)
    deadline_s: float | None = Field(default=None, gt=0)


StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]


class ChatRequest(_Given):
    """temperature: 0, the default, is greedy.  max_completion_tokens goes before max_tokens."""

    model: str
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    n: int | None = Field(default=None, ge=1)
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    vital: VitalOptions = Field(default_factory=VitalOptions)

    @model_validator(mode="after")
    def _agree(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: expected together with logprobs: true")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: expected together with stream: true")
        if not any(part.text and part.text.strip() for m in self.messages if m.role == "user" for part in m.parts()):
            raise ValueError("messages: expected a question in a message of the role user")
        return self

    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


def parse(body: bytes) -> ChatRequest:
    """Raises ApiError, which names the field and what was expected there, and repeats nothing of the body."""
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise _as_api_error(error) from None


def _as_api_error(error: ValidationError) -> ApiError:
    # A value that fits neither side of a union gives an error for each: the one deepest inside says most.
    found = max(
        error.errors(include_url=False, include_context=False, include_input=False), key=lambda e: len(e["loc"])
    )
    if found["type"] == "json_invalid":
        return bad_request("the body is not valid JSON", code="invalid_json")
    message = found["msg"].removeprefix("Value error, ")
    path = [
        part for part in found["loc"] if isinstance(part, int) or (part.isidentifier() and part not in ("str", "int"))
    ]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
    param = param or message.partition(":")[0]
    return bad_request(f"{param}: {message.removeprefix(f'{param}: ')}", param)


def _is_none(value: Any) -> bool:
    return value is None


class PromptDetails(BaseModel):
    cached_tokens: int


class ChatUsage(BaseModel):
    """latent_steps: over all choices. They are no tokens and are not part of the other counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    latent_steps: int
    prompt_tokens_details: PromptDetails


class TokenLogprob(BaseModel):
    """Of the model's own distribution, before temperature and top_p.  bytes: null inside an unfinished character."""

    token: str
    logprob: float
    bytes: list[int] | None


class ContentLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class Logprobs(BaseModel):
    content: list[ContentLogprob]


class Latents(BaseModel):
    """z_1..z_K of one choice.  data: base64 of float32, little-endian, row by row."""

    shape: list[int]
    dtype: Literal["float32"] = "float32"
    data: str


class ChoiceExtras(BaseModel):
    latents: Latents


class AnswerMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: Logprobs | None = None
    finish_reason: Literal["stop", "length"]
    vital: ChoiceExtras | None = Field(default=None, exclude_if=_is_none)


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: ChatUsage


class Delta(BaseModel):
    role: Literal["assistant"] | None = Field(default=None, exclude_if=_is_none)
    content: str | None = Field(default=None, exclude_if=_is_none)


class ChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: Logprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None
    vital: ChoiceExtras | None = Field(default=None, exclude_if=_is_none)


class ChatChunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: ChatUsage | None = Field(default=None, exclude_if=_is_none)


class ModelCard(BaseModel):
    """k: latent steps of a request that does not name its own."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["vitalrt"] = "vitalrt"
    root: str
    parent: str | None
    max_model_len: int
    k: int
    notice: str


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail


def component_schemas() -> dict[str, Any]:
    """Of requests, answers and errors, by name, for the OpenAPI document."""
    schemas: dict[str, Any] = {}
    for model in (ChatRequest, ChatCompletion, ChatChunk, ModelCard, ModelList, ErrorBody):
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {})
        schemas[model.__name__] = schema
    return schemas
