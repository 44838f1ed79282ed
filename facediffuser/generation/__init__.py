"""Generation: settings, the checked run they stand for, and the worker that makes its shards."""
