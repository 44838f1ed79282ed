"""Training of the two models from prepared Parquet: settings, data, losses, the loop. Nothing here knows Ray."""
