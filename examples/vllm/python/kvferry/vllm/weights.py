"""Fingerprints of weights: KV of one model loaded into another gives wrong answers, and poisons the prefix cache.

A fingerprint covers the names and sizes of the weight files, the headers of safetensors files, and samples of their bytes; the
files are not read as a whole, so 100 GB take less than a second. It also covers the model's configuration. It depends neither
on the directory nor on the tensor-parallel size.
"""

import hashlib
import json
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvferry.vllm.guard import logger

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

# Bytes of a sample, and samples of a file. A retrained weight file differs almost everywhere.
SAMPLE = 4096
SAMPLES = 32
# Longest header of a safetensors file that is read, in bytes.
HEADER = 64 << 20
# A directory with weights in one of the first formats may have copies in the later ones, which vLLM ignores.
FORMATS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
# Keys of a configuration that say nothing about the KV.
COMMENTS = ("_name_or_path", "transformers_version", "_commit_hash", "torch_dtype", "dtype")
# Methods of speculative decoding without a KV cache of their own.
NO_DRAFT_CACHE = ("ngram", "ngram_gpu", "suffix", "medusa", "mlp_speculator")


def of_engine(config: "VllmConfig") -> str:
    """The fingerprint of everything that the KV of an engine is computed from: 32 hexadecimal digits."""
    h = hashlib.blake2b(digest_size=16)
    _model(h, config.model_config, str(config.load_config.load_format))
    draft = getattr(config, "speculative_config", None)
    model = getattr(draft, "draft_model_config", None)
    if model is not None and str(getattr(draft, "method", "")) not in NO_DRAFT_CACHE:
        h.update(b"\0draft\0")
        _model(h, model, str(config.load_config.load_format))
    return h.hexdigest()


def _model(h: Any, model: "ModelConfig", load_format: str) -> None:
    h.update(json.dumps(_configuration(model), sort_keys=True, default=str).encode())
    h.update(f"\0{model.quantization}\0{model.dtype}".encode())
    if load_format == "dummy":
        h.update(f"\0dummy\0{getattr(model, 'seed', None)}".encode())
        return
    files = weight_files(_directory(model))
    if not files:
        logger.warning(
            "kvferry: no weight files of %s are on this host, so its name and revision stand for its weights; "
            "two engines with other weights of this name would exchange wrong KV",
            model.model,
        )
        h.update(f"\0{model.model}\0{model.revision}".encode())
    for path in files:
        _file(h, path)


def _configuration(model: "ModelConfig") -> dict[str, Any]:
    """The model's configuration, with the operator's overrides."""
    hf = getattr(model, "hf_config", None)
    given = hf.to_dict() if hf is not None and hasattr(hf, "to_dict") else {}
    return {k: v for k, v in given.items() if k not in COMMENTS}


def _directory(model: "ModelConfig") -> Path:
    """The directory, or the file, with the model's weights. A model of a hub is in the hub's local cache."""
    named = getattr(model, "model_weights", "") or model.model
    if os.path.exists(named):
        return Path(named)
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(named, revision=model.revision, local_files_only=True))
    except Exception as e:
        # For example, the weights are streamed from an object store.
        logger.debug("kvferry: %s has no directory: %s", named, e)
        return Path(named)


def weight_files(where: Path) -> list[Path]:
    """The files with weights at `where`, a directory or one file, in the order of their names."""
    if where.is_file():
        return [where]
    if not where.is_dir():
        return []
    for suffix in FORMATS:
        if found := sorted(p for p in where.iterdir() if p.suffix == suffix and p.is_file()):
            return found
    return []


def _file(h: Any, path: Path) -> None:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        h.update(f"\0{path.name}\0{size}\0".encode())
        start = 0
        if path.suffix == ".safetensors" and size >= 8:
            (length,) = struct.unpack("<Q", file.read(8))
            if length <= min(size - 8, HEADER):
                h.update(file.read(length))
                start = 8 + length
        for at in _samples(start, size):
            file.seek(at)
            h.update(file.read(SAMPLE))


def _samples(start: int, size: int) -> Iterable[int]:
    """Where to read samples of the bytes from `start` to `size`: at both ends, and evenly between."""
    room = size - start
    if room <= SAMPLE * SAMPLES:
        return range(start, size, SAMPLE)
    return (start + (room - SAMPLE) * i // (SAMPLES - 1) for i in range(SAMPLES))


def of_adapter(path: str) -> str:
    """The fingerprint of a LoRA adapter's files, 32 hexadecimal digits. An adapter is small: its files are read as a whole.

    Raises `OSError` if it has no files on this host."""
    h = hashlib.blake2b(digest_size=16)
    files = _adapter_files(path)
    if not files:
        raise FileNotFoundError(f"{path} has no adapter files")
    for file in files:
        with file.open("rb") as f:
            h.update(f"\0{file.name}\0{os.fstat(f.fileno()).st_size}\0".encode())
            while piece := f.read(1 << 20):
                h.update(piece)
    return h.hexdigest()


def stamp_of_adapter(path: str) -> tuple[Any, ...]:
    """Changes when an adapter's files do: their names, sizes, times and inodes."""
    return tuple((f.name, (s := f.stat()).st_size, s.st_mtime_ns, s.st_ino) for f in _adapter_files(path))


def _adapter_files(path: str) -> list[Path]:
    where = Path(path)
    if not where.is_dir():
        try:
            from huggingface_hub import snapshot_download

            where = Path(snapshot_download(path, local_files_only=True))
        except Exception as e:
            raise FileNotFoundError(f"{path} is not a directory: {e}") from e
    names = ("adapter_config.json", "new_embeddings.safetensors", "new_embeddings.bin")
    return [*weight_files(where), *(where / n for n in names if (where / n).is_file())]


class Adapters:
    """The LoRA adapters of an engine, as they were when the engine loaded them."""

    def __init__(self) -> None:
        # By id and path: the files' stamp, and their fingerprint.
        self._loaded: dict[tuple[int, str], tuple[tuple[Any, ...], str]] = {}
        # By name and path, which are the keys of the engine's prefix cache: the last fingerprint, and those whose weights have
        # changed since the cache was last reset. It may hold KV of the old weights.
        self._last: dict[tuple[str, str], str] = {}
        self._changed: set[tuple[str, str]] = set()

    def loading(self, adapter: Any) -> None:
        """The engine loads this adapter, a `LoRARequest`, unless it has it already."""
        key = (adapter.lora_int_id, adapter.lora_path)
        known = self._loaded.get(key)
        if known is not None and (not adapter.load_inplace or _stamp(adapter.lora_path) == known[0]):
            return
        self._loaded.pop(key, None)
        # The engine itself reports an adapter that it cannot read.
        if (now := _read(adapter.lora_path)) is not None:
            self._loaded[key] = now
            name = (adapter.lora_name, adapter.lora_path)
            if self._last.get(name, now[1]) != now[1]:
                self._changed.add(name)
            self._last[name] = now[1]

    def removing(self, adapter_id: int) -> None:
        """The engine removes this adapter."""
        self._loaded = {k: v for k, v in self._loaded.items() if k[0] != adapter_id}

    def cache_reset(self) -> None:
        """The engine's prefix cache is empty."""
        self._changed.clear()

    def fingerprint(self, adapter: Any) -> str:
        """The fingerprint of an adapter's weights in the engine's memory. Raises `Unknown`."""
        # vLLM reads an adapter with the first request for it, and with each one that says `load_inplace`.
        self.loading(adapter)
        loaded = self._loaded.get((adapter.lora_int_id, adapter.lora_path))
        if loaded is None:
            raise Unknown(f"the files of its LoRA adapter {adapter.lora_name} cannot be read")
        if _stamp(adapter.lora_path) != loaded[0]:
            raise Unknown(
                f"the files of its LoRA adapter {adapter.lora_name} have changed since they were loaded; load it again"
            )
        return loaded[1]

    def is_stale(self, adapter: Any) -> bool:
        """Whether the prefix cache may hold KV of earlier weights of this adapter."""
        return (adapter.lora_name, adapter.lora_path) in self._changed


class Unknown(ValueError):
    """Weights that have no fingerprint, so their KV is not transferred."""


def _stamp(path: str) -> tuple[Any, ...] | None:
    try:
        return stamp_of_adapter(path)
    except OSError:
        return None


def _read(path: str) -> tuple[tuple[Any, ...], str] | None:
    try:
        stamp = stamp_of_adapter(path)
        return stamp, of_adapter(path)
    except OSError as e:
        logger.warning("kvferry: prompts of the LoRA adapter at %s are not transferred: %s", path, e)
        return None
