"""The config of a job: the only module of the job that parses it."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser
from monai.bundle.reference_resolver import ReferenceResolver
from monai.bundle.utils import ID_SEP_KEY

import semisam_o1
from semisam_o1.data.cohort import Cohort
from semisam_o1.errors import chain
from semisam_o1.files import read_json
from semisam_o1.job.kinds import refuse_unknown, refuse_wrong, values_of
from semisam_o1.types import DatasetError

ACTIONS = ("imports", "initialize", "job", "stage", "run", "training", "propagate")  # ids that are not settings
SEPARATOR = "#"  # between the parts of an id in configs and on the command line; MONAI's own is ID_SEP_KEY
OF_MONAI = ("tracking_uri", "experiment_name", "run_name", "is_not_rank0", "save_execute_config")  # of its tracking
PLAIN = (int, float, str, bool, type(None))


class JobConfig:
    """Builds components from a bundle's config, for one stage after another.

    Every stage builds its components anew and drops them afterwards, so no state passes from one round to the next.
    Only the cohort is built once and shared.

    Args:
        raw: the config, merged from the bundle's files and the command line.

    Raises:
        DatasetError: the data set cannot be used.
    """

    def __init__(self, raw: dict):
        self.raw = raw
        self._refuse_misspelt()
        refuse_wrong(values_of(raw))
        self.cohort: Cohort = ConfigParser(copy.deepcopy(raw)).get_parsed_content("cohort")
        self.settings = self._settings()
        refuse_wrong(self.settings)

    def build(self, id: str, round: int | None = None, **changed: Any) -> Any:
        """Build ``id`` for ``round``, with the other ids ``changed``."""
        parser = self._parser()
        parser.update(changed | ({} if round is None else {"round": round}))
        return parser.get_parsed_content(id)

    def setting(self, id: str) -> Any:
        """The value of a top-level id that holds a number, a text or a list of these."""
        return self.settings[id]

    def leaves(self) -> dict[str, Any]:
        """Every value of the config by its full id (``train#optimizer#lr``); plain settings are resolved."""
        return flatten({name: value for name, value in (self.raw | self.settings).items() if name not in ACTIONS})

    def needed(self, ids: Iterable[str]) -> set[str]:
        """The ids that ``ids`` depend on: themselves, the ids they contain, and the ids these refer to."""
        found, waiting = set(), list(ids)
        while waiting:
            id = waiting.pop()
            if id not in found and id in self._items:
                found.add(id)
                waiting += self._parts(id)
        return found

    def refers_to(self, name: str) -> set[str]:
        """The other top-level ids that a top-level id and its contents refer to."""
        inside = {id for id in self._items if id.split("#")[0] == name}
        return {part.split("#")[0] for id in inside for part in self._parts(id)} - {name}

    def _refuse_misspelt(self) -> None:
        """Refuse ids that no shipped config has and no other id refers to."""
        shipped = shipped_ids()
        used = set().union(*(map(self.refers_to, self.raw)))
        names = [name for name in self.raw if not name.startswith("_")]
        refuse_unknown(names, shipped, used | set(ACTIONS) | set(OF_MONAI))
        for name in names:
            group, known = self.raw[name], shipped.get(name)
            if isinstance(group, dict) and "_target_" not in group and known:  # a component takes any argument
                refuse_unknown([f"{name}#{key}" for key in group], known, self._referred)

    @functools.cached_property
    def _referred(self) -> set[str]:
        """Every id that the text of another refers to."""
        return {part for id in self._items for part in self._parts(id)} - {
            f"{id}{SEPARATOR}{key}" for id, item in self._items.items() for key in keys_of(item.get_config())
        }

    def _parts(self, id: str) -> list[str]:
        """The ids that an id contains, and the ids that its own text refers to."""
        config = self._items[id].get_config()
        refers_to = ReferenceResolver.find_refs_in_config(config=config, id=id)
        names = [found.replace(ID_SEP_KEY, SEPARATOR) for found in refers_to]
        return [*names, *(f"{id}{SEPARATOR}{key}" for key in keys_of(config))]

    @functools.cached_property
    def _items(self) -> dict[str, Any]:
        """MONAI's items of the raw config by id, parsed but not built."""
        parser = ConfigParser(copy.deepcopy(self.raw))
        parser.parse()
        return {id.replace(ID_SEP_KEY, SEPARATOR): item for id, item in parser.ref_resolver.items.items()}

    def _parser(self) -> ConfigParser:
        return ConfigParser(
            copy.deepcopy({k: v for k, v in self.raw.items() if k != "cohort"}) | {"cohort": self.cohort}
        )

    def _settings(self) -> dict[str, Any]:
        parser, found = self._parser(), {}
        for name, value in self.raw.items():
            if name in ACTIONS or name == "cohort" or isinstance(value, dict):
                continue
            try:
                value = parser.get_parsed_content(name)
            except Exception as error:
                raise DatasetError(f"{name} cannot be evaluated: {[*chain(error)][-1]}") from error
            parts = value if isinstance(value, (list, tuple)) else [value]
            if all(isinstance(part, PLAIN) for part in parts):
                found[name] = list(value) if isinstance(value, tuple) else value
        if found.get("template"):  # as case names, or as pseudonyms
            found["template"] = [case.name for case in self.cohort.templates]
        return found


def keys_of(config: Any) -> Iterable:
    return config if isinstance(config, dict) else range(len(config)) if isinstance(config, list) else ()


@functools.cache
def shipped_ids() -> dict[str, set[str]]:
    """Every top-level id of the shipped configs, with the ids in it."""
    found: dict[str, set[str]] = {}
    configs = Path(semisam_o1.BUNDLE_ROOT) / "configs"
    for path in [configs / "train.json", *sorted(configs.glob("*/*.json"))]:
        for name, value in read_json(path).items():
            top, _, _ = name.partition(SEPARATOR)
            inside = {f"{name}{SEPARATOR}{key}" for key in keys_of(value)} if isinstance(value, dict) else set()
            found.setdefault(top, set()).update(inside, {name} - {top})
    return found


def flatten(value: Any, id: str = "") -> dict[str, Any]:
    """``{"a": {"b": [1]}}`` -> ``{"a#b#0": 1}``; an empty container stays a value."""
    if isinstance(value, Mapping) and value:
        pairs = list(value.items())
    elif isinstance(value, (list, tuple)) and value:
        pairs = list(enumerate(value))
    else:
        return {id: value}
    return {k: v for key, part in pairs for k, v in flatten(part, f"{id}#{key}" if id else str(key)).items()}


def reaches(needed: set[str], leaf: str) -> bool:
    """Whether ``needed`` contains the id of a value or an id that contains it."""
    parts = leaf.split("#")
    return any("#".join(parts[:length]) in needed for length in range(1, len(parts) + 1))


def config_in_use() -> dict:
    """The raw config of the parser that evaluates the ``$`` expression that calls this function.

    MONAI passes an expression the ids it refers to, but not the config itself, and a job builds its stages from the
    config. The command line passes its own config and does not need this function.
    """
    for caller in inspect.stack():
        parser = caller.frame.f_locals.get("self")
        if isinstance(parser, ConfigParser):
            return copy.deepcopy(parser.get())
    raise RuntimeError("config_in_use() works only inside an expression of a MONAI bundle config.")
