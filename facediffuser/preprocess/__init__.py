"""From photographs to prepared Parquet: read and check, faces, captions, segments, subject phrases, splits."""

from facediffuser.preprocess.schema import PREPARED_SCHEMA, SCHEMA_VERSION
from facediffuser.preprocess.settings import PreprocessSettings

__all__ = ["PREPARED_SCHEMA", "SCHEMA_VERSION", "PreprocessSettings"]
