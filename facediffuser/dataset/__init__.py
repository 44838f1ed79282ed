"""What readers of a dataset see: rows, plan, shards, manifest, verification, card."""
