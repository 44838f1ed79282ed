"""The settings of `facediffuser train`: inputs, output, a preset, and what should differ from the preset."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field, create_model, model_validator

from facediffuser.settings import Exact, Seeded, Settings, Workers
from facediffuser.training.recipe import PRESETS, Augmentation, Preset, Recipe, Role


def _overrides(model: type[BaseModel]) -> type[BaseModel]:
    """A model with the same fields, none of which must be given: the presets know them."""
    fields: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        kind: Any = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
        fields[name] = (kind | None, Field(None, description=f"{field.description} [the preset's]"))
    return create_model("Overrides", __base__=Settings, **fields)


class RunSettings(Settings):
    """What is trained, from what, and where the run goes."""

    positional: ClassVar[str | None] = "role"

    role: Literal["tdm", "sdm", "both"] = Field(
        description="`tdm`, `sdm`, or `both`, which then go to `OUTPUT/tdm` and `OUTPUT/sdm`"
    )
    data: str = Field(min_length=1, description="prepared data: a folder or `s3://bucket/prefix`")
    base: str = Field(
        min_length=1, description="base model: a diffusers folder, an `s3://` URL, a hub id, or `miniature`"
    )
    output: str = Field(min_length=1, description="where the run goes: a folder or `s3://bucket/prefix`")
    start_from: str | None = Field(
        None,
        description="model folder, `s3://` URL, hub id or `miniature`: training starts from its TDM or SDM (default: the base's parts)",
    )
    image_encoder: str = Field(
        "openai/clip-vit-large-patch14",
        description="image encoder of the SDM when the base has none: a transformers folder, `s3://` URL or hub id",
    )


# A base class made at run time is beyond mypy: it does not know the recipe's fields in these settings.
class TrainSettings(_overrides(Recipe), Exact, Workers, Seeded, RunSettings):  # type: ignore[misc]
    """Train the TDM or the SDM from prepared Parquet. A preset fills in what is not given."""

    preset: Preset | None = Field(
        None, description="numbers to start from (default: the paper's for the role; miniature for that base)"
    )
    resume: bool = Field(False, description="continue from the run's last checkpoint; a new output starts a new run")
    cpus_per_worker: int | None = Field(None, ge=1, description="CPU cores of each worker (default: its even share)")
    loaders: int | None = Field(
        None, ge=0, description="processes of each worker that make batches ahead; 0: none (default: by its CPU cores)"
    )
    precompute: bool = Field(
        True, description="compute latents and text embeddings once and keep them; off: anew in every step, for data "
        "whose latents do not fit on the disk"
    )  # fmt: skip
    cache: str | None = Field(
        None, description="where latents and text embeddings are kept (default: beside the data, or in the output)"
    )
    checkpoint_every: int = Field(1000, ge=1, description="steps between checkpoints")
    keep_last: int = Field(2, ge=1, description="checkpoints to keep, the newest")
    keep_every: int = Field(0, ge=0, description="keep those of every so many steps as well; 0: none")
    log_every: int = Field(10, ge=1, description="steps between two reports of the losses")
    validate_every: int = Field(0, ge=0, description="steps between validation losses on the test split; 0: none")
    validation_images: int = Field(64, ge=1, description="images of a validation loss")
    sample_every: int = Field(0, ge=0, description="steps between sample grids; 0: none")
    sample_images: int = Field(8, ge=1, description="images of a sample grid")
    max_failures: int = Field(3, ge=0, description="lost workers after which the run is given up")

    @model_validator(mode="after")
    def _check_preset(self) -> "TrainSettings":
        for role in self.roles:
            if (self.chosen_preset(role), role) not in PRESETS:
                raise ValueError(f"preset {self.preset} is not for the {role}; give another preset or role")
        return self

    @property
    def roles(self) -> tuple[Role, ...]:
        """The models to train."""
        return ("tdm", "sdm") if self.role == "both" else (self.role,)

    def chosen_preset(self, role: Role) -> Preset:
        """Return the preset of a role: the one given, else the miniature's for its base, else the paper's."""
        paper: Preset = "paper-tdm" if role == "tdm" else "paper-sdm"
        return self.preset or ("miniature" if self.base == "miniature" else paper)

    def for_role(self, role: Role) -> "TrainSettings":
        """Return the settings of one role alone, with its own output below this one's when there are two."""
        if self.role != "both":
            return self
        return self.model_copy(update={"role": role, "output": f"{self.output.rstrip('/')}/{role}"})

    def recipe(self) -> Recipe:
        """Return the preset's recipe with what was given in place of its own; for a single role."""
        if self.role == "both":
            raise ValueError("role both: a recipe is of one role; take `for_role` first")
        preset = PRESETS[self.chosen_preset(self.role), self.role]
        given = {name: value for name in Recipe.model_fields if (value := getattr(self, name)) is not None}
        if "augmentation" in given and isinstance(given["augmentation"], Augmentation):
            chosen = given["augmentation"].model_dump(exclude_unset=True)
            given["augmentation"] = preset.augmentation.model_copy(update=chosen)
        return preset.model_copy(update=given)

    def content(self) -> dict[str, Any]:
        """Return what decides the weights that come out: not places, not workers' cores, not how often progress is reported.

        The number of steps is left out while the learning rate does not depend on it, so that a run can be prolonged.
        """
        recipe = self.recipe()
        content = {"role": self.role, "seed": self.seed, "workers": self.workers, **recipe.model_dump(mode="json")}
        # Where it is not given, only the last bits depend on it: provenance, as in runs of before, which say False.
        content["compile"] = bool(recipe.compile)
        if self.start_from:
            content["start_from"] = self.start_from
        if recipe.schedule == "constant":
            content.pop("steps")
        return content
