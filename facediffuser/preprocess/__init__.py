"""From photographs to prepared Parquet: read and check, faces, captions, segments, subject phrases, splits."""
