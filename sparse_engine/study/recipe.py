"""Recipes: a study's data, models and rows, read from YAML and checked before anything runs."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparse_engine import pruners, registry, value_types
from sparse_engine.checkpoint import storage
from sparse_engine.errors import InputError
from sparse_engine.evaluate.metrics import choose
from sparse_engine.hf.loading import parse_dtype
from sparse_engine.pattern import SparsityPattern
from sparse_engine.train.settings import FinetuneSettings

__all__ = ["SPLITS", "Recipe", "Row", "Source", "Step", "load_recipe", "shipped_recipes"]

SPLITS = ("validation", "test")
"""Splits that a table has columns for."""

_KINDS = ("prune", "finetune", "merge", "store")
_EVALUATE = {"dtype": str, "backend": str} | dict.fromkeys(
    ("batch_size", "max_new_tokens", "max_text_tokens", "max_summary_tokens", "decode_tokens"), int
)
_CALIBRATION = {"source": str, "samples": int, "length": int, "prompts": bool, "seed": int}
_SCORE = {"metrics": list, "bertscore_model": str, "bertscore_layers": int}
_STORE = {"format": str, "values": str, "lm_head": str}
_SOURCE = {"source": object, "limit": int, "text_column": str, "summary_column": str}
_OPTIONAL = {"backend", "dtype", "length", "metrics", "bertscore_layers", "limit"}
"""Settings that may be left empty."""
_KIND_NAMES = {int: "a whole number above 0", str: "a text", bool: "true or false", list: "a list"}
_PUBLISHED = {"validation_rougeL", "validation_bertscore", "test_rougeL", "test_bertscore", "seconds", "nonzero", "size_mb"}


@dataclass(frozen=True, slots=True)
class Source:
    """Where a split's examples come from: "billsum", or files whose rows are joined; ``limit`` of them by the recipe's seed."""

    sources: tuple[str, ...]
    limit: int | None = None
    text_column: str = "text"
    summary_column: str = "summary"


@dataclass(frozen=True, slots=True)
class Step:
    """One change of a model: ``kind`` is prune, finetune, merge, or store (a packed one in another form, or with quantised values)."""

    kind: str
    settings: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: a model, what is done to it, and how it is run.

    Attributes:
        start: id of a row whose final checkpoint the steps start from, or None for the model's own.
        labels: technique, pruning and sparsity as the table prints them.
        published: the study's figures for this row, by column.
    """

    id: str
    model: str
    start: str | None
    steps: tuple[Step, ...]
    evaluate: dict[str, Any]
    labels: dict[str, str]
    published: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Recipe:
    """A checked recipe; ``text`` is the file as it was read, ``dense`` names each model's reference row."""

    name: str
    text: str
    seed: int
    models: dict[str, str]
    dense: dict[str, str]
    data: dict[str, Source]
    calibration: dict[str, Any]
    score: dict[str, Any]
    rows: dict[str, Row]
    examples: int


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    return {file.stem: file for file in sorted((Path(__file__).parent / "recipes").glob("*.yaml"))}


def load_recipe(source: str) -> Recipe:
    """Read a recipe file, or a shipped one by its name.

    ``${NAME}`` stands for an environment variable; relative paths are relative to the working directory.

    Raises:
        InputError: the file is missing or no YAML, a key is unknown or missing, a variable is not set, or a row cannot be run.
    """
    shipped = shipped_recipes()
    path = Path(source)
    if not path.is_file():
        name = path.name.removesuffix(".yaml")
        if name not in shipped or path.parent != Path():
            raise InputError(f"there is no recipe {source}: give a file, or one of {', '.join(shipped)}")
        path = shipped[name]
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no UTF-8 text: {error.reason}") from None
    try:
        yaml = importlib.import_module("yaml")
    except ModuleNotFoundError:
        raise InputError("recipes need the PyYAML package: pip install 'sparse-engine[eval]'") from None
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    try:
        return _recipe(_mapping(_expand(content), "the recipe"), text)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _recipe(content: dict[str, Any], text: str) -> Recipe:
    known = {"name", "seed", "models", "data", "calibration", "finetune", "evaluate", "score", "examples", "rows"}
    _check_keys(content, known, "the recipe", needed={"name", "models", "data", "rows"})
    models, dense = {}, {}
    for name, model in _mapping(content["models"], "models").items():
        _check_keys(_mapping(model, f"model {name}"), {"checkpoint", "dense"}, f"model {name}", needed={"checkpoint", "dense"})
        models[name], dense[name] = str(model["checkpoint"]), str(model["dense"])
    data = {name: _source(entry, name) for name, entry in _mapping(content["data"], "data").items()}
    _check_keys(data, {"train", "heldout", *SPLITS}, "data", needed={"train", "test"})
    calibration = {"source": "train", "samples": 128, "length": None, "prompts": False, "seed": 0} | _settings(content, "calibration")
    _check_values(calibration, _CALIBRATION, "calibration")
    score = _settings(content, "score")
    _check_values(score, _SCORE, "score")
    choose(score.get("metrics"))
    rows: dict[str, Row] = {}
    if not isinstance(content["rows"] or [], list):
        raise InputError(f"rows must be a list, got {type(content['rows']).__name__}")
    for entry in content["rows"] or ():
        row = _row(_mapping(entry, "a row"), models, content, rows)
        rows[row.id] = row
    if not rows:
        raise InputError("it has no rows")
    for name, reference in dense.items():
        if reference not in rows:
            raise InputError(f"model {name} names the row {reference!r} as its dense reference, which is not there")
    others = {key: content.get(key, default) for key, default in (("seed", 0), ("examples", 3))}
    _check_values(others, {"seed": int, "examples": int}, "the recipe")
    return Recipe(str(content["name"]), text, others["seed"], models, dense, data, calibration, score, rows, others["examples"])


def _row(entry: dict[str, Any], models: Mapping[str, str], content: Mapping[str, Any], before: Mapping[str, Row]) -> Row:
    known = {"id", "model", "start", "technique", "pruning", "sparsity", "steps", "evaluate", "published"}
    name = str(entry.get("id", "?"))
    what = f"row {name}"
    _check_keys(entry, known, what, needed={"id", "model"})
    if not re.fullmatch(r"[\w.-]+", name):
        raise InputError(f"{what}: an id is made of letters, digits, dots and dashes")
    if name in before:
        raise InputError(f"{what} is there twice")
    if entry["model"] not in models:
        raise InputError(f"{what} has the unknown model {entry['model']!r}; known: {', '.join(models)}")
    start = entry.get("start")
    steps = tuple(_step(step, what, _settings(content, "finetune")) for step in entry.get("steps") or ())
    for other in [start, *(step.settings.get("teacher") for step in steps)]:
        if other is not None and other not in before:
            raise InputError(f"{what} builds on the row {other!r}, which must come before it")
    evaluate = _settings(content, "evaluate") | _settings(entry, "evaluate")
    _check_values(evaluate, _EVALUATE, f"{what}, evaluate")
    if (backend := evaluate.get("backend")) is not None:
        registry.get(backend)
    if evaluate.get("dtype") != "auto":
        parse_dtype(evaluate.get("dtype"))
    published = _settings(entry, "published")
    _check_keys(published, _PUBLISHED, f"{what}, published")
    if wrong := [key for key, value in published.items() if type(value) not in (int, float)]:
        raise InputError(f"{what}, published: {wrong[0]} must be a number, got {published[wrong[0]]!r}")
    labels = {key: str(entry.get(key, "–")) for key in ("technique", "pruning", "sparsity")}
    return Row(name, str(entry["model"]), start, steps, evaluate, labels, {key: float(value) for key, value in published.items()})


def _step(step: Any, what: str, defaults: dict[str, Any]) -> Step:
    if not isinstance(step, Mapping) or len(step) != 1 or next(iter(step)) not in _KINDS:
        raise InputError(f"{what}: a step is one of {', '.join(_KINDS)} with its settings, got {step!r}")
    kind, given = next(iter(step.items()))
    settings = _settings({kind: given}, kind)
    if kind == "prune":
        _check_keys(settings, {"pruner", "pattern", "calibration"}, f"{what}, prune", needed={"pruner", "pattern"})
        pruners.get(settings["pruner"])
        if isinstance(settings["pattern"], int):
            raise InputError(f'{what}: a pattern such as "2:4" stands in quotes, as YAML takes 2:4 for the number {settings["pattern"]}')
        SparsityPattern.parse(str(settings["pattern"]))
        _check_values(_settings(settings, "calibration"), _CALIBRATION, f"{what}, calibration")
    elif kind == "finetune":
        extra = {key: settings.pop(key) for key in ("teacher", "dtype") if key in settings}
        parse_dtype(extra.get("dtype"))
        settings = FinetuneSettings.from_dict(defaults | settings).to_dict() | extra
    elif kind == "merge":
        _check_keys(settings, {"apply_mask"}, f"{what}, merge")
    else:
        _check_values(settings, _STORE, f"{what}, store")
        storage.get(settings.get("format", "packed"))
        if "values" in settings:
            value_types.quantised(settings["values"])
    return Step(kind, settings)


def _source(entry: Any, name: str) -> Source:
    what = f"data, {name}"
    entry = _mapping(entry, what)
    _check_keys(entry, _SOURCE.keys(), what, needed={"source"})
    _check_values(entry, _SOURCE, what)
    sources = entry["source"] if isinstance(entry["source"], list) else [entry["source"]]
    others = {key: value for key, value in entry.items() if key != "source"}
    return Source(tuple(map(str, sources)), **others)


def _settings(entry: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A copy of the settings under ``name``, which may be absent or empty."""
    return dict(_mapping(entry.get(name) or {}, name))


def _check_values(found: Mapping[str, Any], kinds: Mapping[str, type], what: str) -> None:
    _check_keys(found, kinds.keys(), what)
    for key, value in found.items():
        kind = kinds[key]
        if value is None and key in _OPTIONAL:
            continue
        # True is an int to Python, and no number to anyone who writes a recipe.
        number = isinstance(value, int) and not isinstance(value, bool) and value >= (0 if key == "seed" else 1)
        if not (number if kind is int else isinstance(value, kind)):
            wanted = "a whole number from 0 on" if key == "seed" else _KIND_NAMES[kind]
            raise InputError(f"{what}: {key} must be {wanted}, got {value!r}")


def _check_keys(found: Mapping[str, Any], known: AbstractSet[str], what: str, needed: AbstractSet[str] = frozenset()) -> None:
    if unknown := sorted(set(found) - known):
        raise InputError(f"{what} has the unknown key {unknown[0]!r}; known: {', '.join(sorted(known))}")
    if missing := sorted(needed - set(found)):
        raise InputError(f"{what} lacks {missing[0]!r}")


def _mapping(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{what} must be a mapping, got {type(value).__name__}")
    return value


def _expand(value: Any) -> Any:
    """Replace ${NAME} in every string."""
    if isinstance(value, dict):
        return {key: _expand(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_expand(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"\$\{(\w+)\}", _variable, value)
    return value


def _variable(match: re.Match[str]) -> str:
    if match[1] == "SPARSE_ENGINE_ASSETS":
        return str(Path(__file__).parent.parent / "assets")
    if match[1] not in os.environ:
        raise InputError(f"the environment variable {match[1]} is not set: it names the folder that the recipe reads from")
    return os.environ[match[1]]
