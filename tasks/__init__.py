"""Prefect tasks, one per stage, and the Ray drivers they call."""
