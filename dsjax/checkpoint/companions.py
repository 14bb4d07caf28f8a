"""What lies beside the weights of a released checkpoint and stays with the model: configuration, tokenizer, chat."""

import ast
import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from dsjax.checkpoint.array_files import write_error
from dsjax.checkpoint.errors import CheckpointError
from dsjax.checkpoint.model_folder import HF, ModelFolder
from dsjax.checkpoint.safetensors_files import read_file

# File names, beside config.json, that transformers and inference engines look for.
_PATTERNS = ("tokenizer*", "special_tokens_map.json", "generation_config.json", "chat_template*")
ENCODING = "encoding.json"

# For a tokenizer of ours: with it AutoTokenizer loads tokenizer.json.
_TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<｜begin▁of▁sentence｜>",
    "eos_token": "<｜end▁of▁sentence｜>",
    "pad_token": "<｜▁pad▁｜>",
    "clean_up_tokenization_spaces": False,
}


def keep_companions(source: Path, folder: Path, config: dict[str, Any]) -> None:
    """Copies the files, and writes ``config`` to ``config.json`` and the texts of ``encoding/*.py`` to one file."""
    contents = {"config.json": _encoded(config)}
    for pattern in _PATTERNS:
        contents |= {path.name: _read(path) for path in sorted(source.glob(pattern)) if not path.is_dir()}
    texts = encoding_texts(source / "encoding")
    if texts:
        contents[ENCODING] = _encoded(texts)
    _write(folder, contents)


def copy_kept(source: ModelFolder, folder: Path, config: dict[str, Any] | None = None) -> None:
    """Copies what was kept with a model of ours, and the tokenizer of the run that made it.

    ``config`` takes the place of its ``config.json``.
    """
    _write(folder, _kept(source.path) | ({"config.json": _encoded(config)} if config else {}))


def _kept(folder: Path) -> dict[str, bytes]:
    """What lies in ``hf`` of a model's folder; where a run prepared text with another tokenizer, that one."""
    contents = {path.name: _read(path) for path in sorted((folder / HF).glob("*")) if not path.is_dir()}
    trained = folder / "data" / "tokenizer.json"
    if trained.exists() and contents.get("tokenizer.json") != _read(trained):
        for pattern in _PATTERNS:  # of the other tokenizer
            contents = {name: content for name, content in contents.items() if not fnmatch(name, pattern)}
        contents |= {"tokenizer.json": _read(trained), "tokenizer_config.json": _encoded(_TOKENIZER_CONFIG)}
    return contents


def _read(path: Path) -> bytes:
    try:
        return read_file(path)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}): download it again, or delete it to do without"
        ) from error


def _encoded(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()


def _write(folder: Path, contents: dict[str, bytes]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            (folder / name).write_bytes(content)
    except OSError as error:
        raise write_error(folder, error) from error


def encoding_texts(folder: Path) -> dict[str, str]:
    """The texts that the Python files in ``folder`` assign to names at top level: tool preamble and templates.

    The files are parsed, never executed. Raises CheckpointError for one that is not Python.
    """
    texts: dict[str, str] = {}
    for path in sorted(folder.glob("*.py")):
        program = _read(path)
        try:
            statements = ast.parse(program).body
        except (SyntaxError, RecursionError, MemoryError, ValueError) as error:
            raise CheckpointError(
                f"{path} cannot be parsed ({error or type(error).__name__}): download it again, or delete it to do "
                "without"
            ) from None
        for statement in statements:
            texts |= _assigned(statement)
    return texts


def _assigned(statement: ast.stmt) -> dict[str, str]:
    if isinstance(statement, ast.Assign):
        targets, value = statement.targets, statement.value
    elif isinstance(statement, ast.AnnAssign):
        targets, value = [statement.target], statement.value
    else:
        return {}
    if not (isinstance(value, ast.Constant) and isinstance(value.value, str)):
        return {}
    return {target.id: value.value for target in targets if isinstance(target, ast.Name)}
