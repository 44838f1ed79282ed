"""Compiled code, kept so that the next process need not compile: one object per model shape, card and compiler.

The object is a SHA-256 and what torch.compiler.save_cache_artifacts returns: the code, and the kernels that autotuning
chose. Reading it
runs what is in it, so a place that others can write to is to be trusted like a program (SECURITY.md).
"""

import hashlib
import importlib.metadata
import logging
import platform
from collections.abc import Mapping
from typing import Any

import torch

from facediffuser.engine_options import EngineOptions
from facediffuser.errors import InputError, first_line
from facediffuser.runs import canonical_json
from facediffuser.storage import Store

logger = logging.getLogger(__name__)

DIGEST_BYTES = 32


def code_key(options: EngineOptions, device: torch.device, models: Mapping[str, Any], shape: Mapping[str, Any]) -> str:
    """Return the key of compiled code: everything that it depends on, hashed.

    Args:
        options: of the engine.
        device: what it is compiled for.
        models: the configurations of the models that are compiled, by name; weights do not count, nor what diffusers notes
            of their loading (`_name_or_path`, `_use_default_values` in an order of each process's own).
        shape: batch size, height, width and type.
    """
    gpu = device.type == "cuda"
    described = {
        "options": options.as_document(),
        "device": torch.cuda.get_device_name(device) if gpu else [platform.machine(), torch.backends.cpu.get_cpu_capability()],
        "capability": torch.cuda.get_device_capability(device) if gpu else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "libraries": {name: importlib.metadata.version(name) for name in ("diffusers", "transformers")},
        "models": {
            name: {k: str(v) for k, v in config.items() if not k.startswith("_")} for name, config in models.items()
        },
        "shape": dict(shape),
    }  # fmt: skip
    return hashlib.sha256(canonical_json(described).encode()).hexdigest()[:40] + ".torch"


class CompiledCode:
    """The kept code of one key. A store that fails is one warning: the models are then compiled here."""

    def __init__(self, store: Store, key: str):
        self.store, self.key = store, key
        self.found = False

    def load(self) -> bool:
        """Give what is kept to the compiler; return whether there was any."""
        try:
            data = self.store.get(self.key)
            digest, code = data[:DIGEST_BYTES], data[DIGEST_BYTES:]
            if hashlib.sha256(code).digest() != digest:
                raise ValueError("it is damaged")
            self.found = torch.compiler.load_cache_artifacts(code) is not None
        except FileNotFoundError:
            logger.info("%s: no compiled code for these models yet; compiling takes a minute or two", self.store.url)
        except Exception as error:  # foreign bytes in the object make torch raise whatever it likes
            logger.warning("%s: cannot be used (%s); compiling anew", self.store.url_of(self.key), first_line(error))
        if self.found:
            logger.info("%s: compiled code taken from there", self.store.url)
        return self.found

    def save(self) -> bool:
        """Keep what this process compiled, unless it was found; return whether it was put."""
        if self.found:
            return False
        self.found = True  # once is enough
        try:
            made = torch.compiler.save_cache_artifacts()
            if made is None:
                return False
            self.store.put(self.key, hashlib.sha256(made[0]).digest() + made[0], if_absent=True)
        except FileExistsError:
            return False  # another worker was first
        except (OSError, InputError) as error:
            logger.warning("%s: the compiled code could not be kept (%s)", self.store.url, first_line(error))
            return False
        logger.info("%s: compiled code kept, %.1f MB", self.store.url, len(made[0]) / 1e6)
        return True
