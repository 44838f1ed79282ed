"""The parts that the settings of several commands and flows share; each description and each default stands once.

A settings model is at once the options of a command, the form of a Prefect deployment and a Python object. Neither torch,
Ray nor Prefect is imported here or by the settings models.
"""

import re
from collections.abc import Iterator
from pathlib import PurePath
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    field_validator,
    model_validator,
)

from facediffuser.redaction import JSON_PATTERN, has_credentials
from facediffuser.schedulers import SCHEDULER_HELP, SchedulerName
from facediffuser.window import default_fusion_window, fusion_window

# Control characters, line separators, and surrogates: those stand for bytes of the command line that are not UTF-8.
_ODD = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")

Method = Literal["face-diffuser", "tdm", "sdm", "fastcomposer"]


def _split(value: Any) -> Any:
    """Return the parts of a text, or of every text in a list, that commas separate; anything else as it is.

    Raises ValueError for a text without any part.
    """
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, list | tuple):
        return value
    parts: list[Any] = []
    for item in given:
        found = [part for part in map(str.strip, item.split(",")) if part] if isinstance(item, str) else [item]
        if not found:
            raise ValueError("empty; name at least one, or leave the option out")
        parts += found
    return parts


CommaSeparated = BeforeValidator(_split)
"""Put on a list: its items may also be given as one text with commas, or several such texts."""

Names = Annotated[list[str], CommaSeparated]

Output = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, PurePath) else value)]
"""Where something is written: a local path, also as a `Path`, or an `s3://` URL, which a `Path` would spoil."""

Steps = Annotated[int, Field(ge=1, le=1000, description="denoising steps of an image")]
SubjectsPerImage = Annotated[int, Field(ge=1, le=16)]
ImagesPerPrompt = Annotated[int, Field(ge=1, le=1_000_000, description="images of each prompt and set of subjects")]

LARGEST = 2**63 - 1
"""The largest integer that Parquet, torch and numpy hold."""
MOST_WORKERS = 100_000
"""More than any cluster runs; a larger number is a typing error."""


def _choices(kind: Any) -> list[Any]:
    """Return the values that an annotation with `Literal` in it allows, none for another one."""
    if get_origin(kind) is Literal:
        return list(get_args(kind))
    return [choice for part in get_args(kind) for choice in _choices(part)]


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts in a value, and the paths as text."""
    if isinstance(value, str | PurePath):
        yield str(value)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _refuse_in_schema(schema: dict[str, Any]) -> None:
    if schema.get("type") == "string" and "enum" not in schema and "const" not in schema:
        schema.setdefault("pattern", JSON_PATTERN)
    for part in (*schema.get("anyOf", ()), schema.get("items")):
        if isinstance(part, dict):
            _refuse_in_schema(part)


class Settings(BaseModel):
    """Base of all settings: immutable, and an unknown field is an error.

    On the command line every field is an option, but for the one that `positional` names.
    """

    # A ValidationError shows no value: it may be refused for the password in it.
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    positional: ClassVar[str | None] = None

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_credentials(cls, value: Any) -> Any:
        """Refuse every value with a credential in a URL: settings are stored by Prefect, logged and quoted in errors."""
        if any(has_credentials(text) for text in _texts(value)):
            raise ValueError("a URL cannot carry credentials or a signature; set AWS_ACCESS_KEY_ID and "
                             "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE")  # fmt: skip
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_odd_characters(cls, value: Any) -> Any:
        """Refuse text that no path, line of a log or cell of Parquet can hold."""
        for text in _texts(value):
            if odd := _ODD.search(text):
                raise ValueError(f"holds the character {odd[0]!r}; give text without control characters, in UTF-8")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _refuse_large_integers(cls, value: Any) -> Any:
        if isinstance(value, int) and abs(value) > LARGEST:
            raise ValueError(f"too large; give at most {LARGEST}")
        return value

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Give every text the pattern that refuses credentials: a Prefect server checks it before it stores anything."""
        schema = handler(core_schema)
        for field in handler.resolve_ref_schema(schema).get("properties", {}).values():
            _refuse_in_schema(field)
        return schema

    @classmethod
    def __pydantic_init_subclass__(cls, **arguments: Any) -> None:
        super().__pydantic_init_subclass__(**arguments)
        for name, field in cls.model_fields.items():
            field.kw_only = name != cls.positional

    @model_validator(mode="before")
    @classmethod
    def _numbers_of_choices(cls, given: Any) -> Any:
        """Turn text into the number it stands for where a field is a choice of numbers.

        A command line and a form hand over text; pydantic reads it as a number for `int`, but not for `Literal[64, 128]`.
        """
        if not isinstance(given, dict):
            return given
        texts = {name for name, value in given.items() if isinstance(value, str)} & cls.model_fields.keys()
        numbers = {name: {str(one): one for one in _choices(cls.model_fields[name].annotation)} for name in texts}
        return given | {name: numbers[name].get(given[name], given[name]) for name in texts}

    def values_of(self, *parts: type["Settings"]) -> dict[str, Any]:
        """Return the fields that these parts define, name -> value, to make other settings with the same parts."""
        return {name: getattr(self, name) for part in parts for name in part.model_fields}


class Sampling(Settings):
    """How an image is sampled."""

    steps: Steps = 50
    guidance_scale: float = Field(5.0, ge=0, le=100, allow_inf_nan=False, description="classifier-free guidance scale")
    fusion_start: int | None = Field(
        None, ge=0, description="first step in which both models are fused (default: 16 of 50, scaled to the steps)"
    )
    fusion_end: int | None = Field(
        None, ge=0, description="first step of the SDM alone (default: 31 of 50, scaled to the steps)"
    )
    scheduler: SchedulerName | None = Field(None, description=SCHEDULER_HELP)

    @property
    def fusion_window(self) -> tuple[int, int]:
        """First fused step and first step of the SDM alone, defaults filled in."""
        return fusion_window(self.steps, self.fusion_start, self.fusion_end, self.default_fusion_window)

    @property
    def default_fusion_window(self) -> tuple[int, int]:
        """The window where none is given: the released one, scaled to the steps."""
        return default_fusion_window(self.steps)

    @model_validator(mode="after")
    def _check_fusion_window(self) -> "Sampling":
        _ = self.fusion_window
        return self


class Repeats(Settings):
    """How many images are made of the prompts and subjects."""

    images_per_prompt: ImagesPerPrompt = 1
    subject_sets: int | None = Field(
        None,
        ge=1,
        le=10_000_000,
        description="how many sets of subjects a prompt is made with, chosen evenly (default: every set there is)",
    )
    shard_size: int | None = Field(
        None,
        ge=1,
        le=100_000,
        description="rows of a shard, the unit of work and of resuming (default: about a minute of a worker, measured "
        "when the run begins)",
    )


class Workers(Settings):
    """How many processes work side by side."""

    workers: int | None = Field(None, ge=1, le=MOST_WORKERS, description="Ray workers (default: one per GPU, or 1)")


class Limited(Settings):
    """When a run stops by itself, to be resumed later."""

    max_hours: float | None = Field(
        None, gt=0, le=100_000, description="stop after so many hours, the shards in hand finished; exit code 3"
    )
    max_cost: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="stop when the workers have cost so much, by --gpu-hour-price; exit code 3",
    )
    gpu_hour_price: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="what an hour of a worker, a GPU's as a rule, costs"
    )
    stop_within: float = Field(
        90, gt=0, le=86_400, description="seconds after SIGTERM until the shards in hand are abandoned"
    )

    @model_validator(mode="after")
    def _cost_has_a_price(self) -> "Limited":
        if self.max_cost and not self.gpu_hour_price:
            raise ValueError("max_cost needs gpu_hour_price; give what an hour of a worker costs")
        return self


class Observed(Settings):
    """Where others see how a run gets on."""

    metrics_port: int | None = Field(
        None,
        ge=0,
        le=65_535,
        description="serve metrics for Prometheus at this port while the run works (0: a free one)",
    )
    metrics_address: str = Field("127.0.0.1", description="address that the metrics are served at; 0.0.0.0: all")


class GenerateWorkers(Workers):
    """How many processes make images, and on how many cores each."""

    cpus_per_worker: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="CPU cores of a worker without a GPU; the last bits of an image can depend on it",
    )


class Exact(Settings):
    """Whether the output must be computed in one way."""

    exact: bool = Field(
        False,
        description="refuse other versions of libraries or code, threads or hardware than those with which the output was "
        "computed so far (default: one warning)",
    )


class Seeded(Settings):
    """What random numbers are drawn from."""

    seed: int = Field(
        0, ge=0, le=LARGEST, description="random seed; the same seed gives the same result on the same hardware"
    )


class Device(Settings):
    """Where a single process computes."""

    device: str = Field("auto", description="`cpu`, `cuda`, `cuda:1`, or `auto`: the GPU where there is one")

    @field_validator("device")
    @classmethod
    def _check_device(cls, device: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", device):
            raise ValueError("no such device; give auto, cpu, cuda, or cuda:N with the GPU's number")
        return device


class Scoring(Device):
    """How a single process scores images."""

    batch_size: int = Field(16, ge=1, le=65_536, description="images scored at a time")


class Dataset(Settings):
    """A finished dataset, the first argument of its commands."""

    positional: ClassVar[str | None] = "url"

    url: str = Field(description="the dataset: a folder or `s3://bucket/prefix`")


class Moved(Settings):
    """Where the models and scorers that made a finished dataset are now."""

    models: str | None = Field(None, description="where the models are now (default: where `generate` found them)")
    scorers: str | None = Field(None, description="where the scorers are now (default: where `generate` found them)")
