"""A checkpoint directory in the official layout: found, read and checked against its sizes."""

import dataclasses
import os
import re
from collections.abc import Iterator
from pathlib import Path

from grokkit.checkpoint.manifest import check_finished
from grokkit.checkpoint.names import TensorKey, tensor_keys
from grokkit.checkpoint.refusal import DOWNLOAD_COMMAND, refusal
from grokkit.checkpoint.tensor_file import StackedTensors, TensorFile, read_tensor
from grokkit.config import GROK_1, GrokConfig

FOLDER = "ckpt-0"
CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.model"

_TENSOR_NAME = re.compile(r"tensor(\d{5})_000")
_UNFINISHED = (".incomplete", ".part", ".partial", ".crdownload", ".aria2", ".tmp", ".!qB")
_DOWNLOAD = f"download the missing files, for example with {DOWNLOAD_COMMAND}"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint: what it is (`key`) and where its bytes are (`file`)."""

    key: TensorKey
    file: TensorFile | StackedTensors

    def __str__(self) -> str:
        layer = "" if self.key.layer is None else f" layer {self.key.layer}"
        name = self.file.path.name
        return f"{name}  {self.key.path}{layer}  {self.file}  {self.file.size:,} B"


@dataclasses.dataclass(frozen=True, repr=False)
class Checkpoint:
    """A checkpoint whose files are all there and all of the right shape. Iterates over entries."""

    directory: Path
    """The directory that holds `ckpt-0/`, or the safetensors files."""
    config: GrokConfig
    entries: tuple[Entry, ...]
    """In the order of the official files."""
    layout: str = "official"
    """Or `"safetensors"`, grokkit's own, or `"hugging face"`, a port's."""

    @property
    def files(self) -> dict[Path, int]:
        """Every tensor file, with its size in bytes."""
        return {path: n for entry in self.entries for path, n in entry.file.files.items()}

    @property
    def nbytes(self) -> int:
        """Bytes in all tensor files together."""
        return sum(self.files.values())

    @property
    def tokenizer_file(self) -> Path | None:
        """The `tokenizer.model` beside the weights, if there is one."""
        path = self.directory / TOKENIZER_FILE
        return path if path.is_file() else None

    def __iter__(self) -> Iterator[Entry]:
        """Its tensors, in the order of the official files."""
        return iter(self.entries)

    def __len__(self) -> int:
        """How many tensors there are."""
        return len(self.entries)

    def __getitem__(self, name: str) -> Entry:
        """The entry of one of the original's parameter names."""
        for entry in self.entries:
            if entry.key.name == name:
                return entry
        raise KeyError(f"{name!r}; this checkpoint has {self.entries[0].key.name!r} and others")

    def describe(self, official: str = "") -> str:
        """How many files of which layout, and their bytes; `official` names official files."""
        kind = {"safetensors": "safetensors", "hugging face": "Hugging Face"}
        words = [str(len(self.files)), kind.get(self.layout, official)]
        words.append("file" if len(self.files) == 1 else "files")
        return f"{' '.join(filter(None, words))}, {self.nbytes:,} bytes"

    def __repr__(self) -> str:
        c = self.config
        lines = [
            f"Checkpoint({str(self.directory)!r})",
            f"  {self.describe()}, {c.n_params:,} parameters",
            (
                f"  {c.n_layers} layers, d_model {c.d_model}, {c.n_heads} heads of {c.d_head} "
                f"({c.n_kv_heads} key/value), {c.n_experts} experts of {c.d_ff}, vocab {c.vocab_size}"
            ),
        ]
        seen = {entry.key.path: entry for entry in reversed(self.entries)}
        counts = {path: 0 for path in seen}
        for entry in self.entries:
            counts[entry.key.path] += 1
        width = max(map(len, seen))
        for path, entry in sorted(seen.items(), key=lambda item: item[1].key.index):
            lines.append(f"  {path:{width}}  {counts[path]:3} x {entry.file}")
        return "\n".join(lines)


def open_official(directory: str | os.PathLike[str], config: GrokConfig | None) -> Checkpoint:
    """Open a checkpoint in the official layout, as `open_checkpoint` does."""
    folder = _find(Path(directory))
    root = folder.parent
    check_finished(root)
    path = root / CONFIG_FILE
    is_known = config is not None or path.is_file()
    if config is None:
        config = GrokConfig.from_json(path) if is_known else GROK_1
    keys = tensor_keys(config)
    _check_names(folder, keys, config, is_known)
    entries = []
    for key in keys:
        file = read_tensor(folder / key.file_name)
        _check_shape(key, file)
        entries.append(Entry(key, file))
    return Checkpoint(root, config, tuple(entries))


def _find(directory: Path) -> Path:
    """The folder with the tensor files."""
    directory = directory.expanduser()
    expected = f"a checkpoint directory: one that holds {FOLDER}/"
    if not directory.is_dir():
        found = "a file" if directory.exists() else "nothing"
        remedy = "give the directory that holds ckpt-0/, or put the checkpoint there"
        raise refusal(directory, expected, found, remedy)
    folder = directory.absolute() / FOLDER
    if folder.is_dir():
        return folder
    content = sorted(path.name for path in directory.iterdir())
    if directory.absolute().name == FOLDER or any(map(_TENSOR_NAME.fullmatch, content)):
        return directory.absolute()
    inside = [name for name in content if (directory / name / FOLDER).is_dir()]
    if inside:
        remedy = f"give {directory / inside[0]} instead"
    elif any(name.endswith((".gguf", ".pt", ".bin")) for name in content):
        remedy = (
            "this looks like a conversion; the original release (xai-org/grok-1) is needed, or "
            "safetensors files"
        )
    else:
        remedy = _DOWNLOAD
    shown = ", ".join(content[:5]) + (", ..." if len(content) > 5 else "")
    raise refusal(directory, expected, shown or "an empty directory", remedy)


def _check_names(
    folder: Path, keys: tuple[TensorKey, ...], config: GrokConfig, is_known: bool
) -> None:
    """All files must be there, and no others."""
    names = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
    expected = {key.file_name for key in keys}
    missing, extra = sorted(expected - set(names)), sorted(set(names) - expected)
    if not missing and not extra:
        return
    _check_unfinished(folder, names)
    if not is_known and len(names) != len(keys):
        raise refusal(
            folder,
            f"the {len(keys)} files of Grok-1, or a {CONFIG_FILE} beside {FOLDER}/ that says which "
            "model this is",
            f"{len(names)} files and no {CONFIG_FILE}",
            f"for Grok-1, {_DOWNLOAD}; for another model, write its {CONFIG_FILE} with "
            "GrokConfig.to_json",
        )
    what = (
        f"the {len(keys)} files {min(expected)} to {max(expected)} of a model of "
        f"{config.n_layers} layers"
    )
    if missing and extra:
        found = f"{_listed(missing)} missing, and {_listed(extra)} instead"
        remedy = "give the files their official names back; the number decides what a file is"
    elif missing:
        found, remedy = f"{_listed(missing)} missing", _DOWNLOAD
    else:
        found = f"{_listed(extra)} besides"
        remedy = f"move other files away, or correct {CONFIG_FILE} if the model is larger"
    raise refusal(folder, what, found, remedy)


def _check_unfinished(folder: Path, names: list[str]) -> None:
    unfinished = [name for name in names if name.endswith(_UNFINISHED)]
    cache = folder.parent / ".cache" / "huggingface" / "download" / folder.name
    if cache.is_dir():
        unfinished += sorted(path.name for path in cache.iterdir() if path.suffix == ".incomplete")
    if unfinished:
        raise refusal(
            folder,
            "a finished download",
            f"unfinished files: {_listed(unfinished)}",
            "start the download again with the same command: complete files are not fetched again",
        )


def _check_shape(key: TensorKey, file: TensorFile) -> None:
    if str(file) != str(key):
        layer = "" if key.layer is None else f" of layer {key.layer}"
        raise refusal(
            file.path,
            f"{key.name} ({key.path}{layer}): {key}",
            str(file),
            f"check that {CONFIG_FILE} describes this checkpoint, and that no file was renamed: "
            "the layers are numbered 0, 1, 10, 11, ..., 2, 20, ...",
        )


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
