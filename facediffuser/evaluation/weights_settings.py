"""The settings of `facediffuser check`."""

from pydantic import Field, model_validator

from facediffuser.settings import Device


class CheckSettings(Device):
    """Whose weights are looked at: a model folder, scorers, or both."""

    models: str | None = Field(None, description="model folder: a folder, an `s3://` URL, a hub id, or `miniature`")
    scorers: str | None = Field(None, description="`paper`, `miniature`, or a folder with `identity/` and `prompt/`")

    @model_validator(mode="after")
    def _names_something(self) -> "CheckSettings":
        if not self.models and not self.scorers:
            raise ValueError("give --models, --scorers or both")
        return self
