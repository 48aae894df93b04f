"""The config of a job: the only module of the job that parses it."""

from __future__ import annotations

import copy
import functools
import inspect
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from monai.bundle import ComponentLocator, ConfigParser
from monai.bundle.reference_resolver import ReferenceResolver
from monai.bundle.utils import ID_SEP_KEY

import semisam_o1
from semisam_o1.data.cohort import Cohort
from semisam_o1.errors import chain, plainly
from semisam_o1.files import read_json
from semisam_o1.kinds import KINDS, is_code, line, refuse, refuse_unknown, refuse_wrong, shown, values_of
from semisam_o1.types import DatasetError

# Ids that MONAI's tracking adds.
TRACKING = ("tracking_uri", "experiment_name", "run_name", "is_not_rank0", "save_execute_config")
# Ids that are not settings.
STARTED = ("imports", "initialize", "finalize", "job", "stage", "run", "training", "propagate")
ACTIONS = (*STARTED, "displayable_configs", *TRACKING)
SEPARATOR = "#"  # between the parts of an id in configs and on the command line; MONAI's own is ID_SEP_KEY
OF_MONAI = ("_meta_",)  # ids that MONAI adds: a bundle's metadata
PLAIN = (int, float, str, bool, type(None))
GROUP, COMPONENT, VALUE = "group", "component", "value"


class Config:
    """A bundle's config whose ids and settings are checked.

    Args:
        raw: the config, merged from the bundle's files and the command line.

    Raises:
        DatasetError: an id is misspelt, or settings have the wrong kind; the message has a line for each.
    """

    def __init__(self, raw: dict):
        self.raw = raw
        self._refuse_references_to_nothing()
        self._refuse_misspelt()
        found = values_of(raw)
        self._codes = [id for id, value in found.items() if is_code(value)]
        refuse_wrong({id: value for id, value in found.items() if id not in self._codes})
        self._refuse_wrong_results(parser_of(raw), with_cohort=False)

    def value(self, id: str) -> Any:
        """What an id evaluates to, on its own."""
        return result(parser_of(self.raw), id)

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

    def _refuse_wrong_results(self, parser: ConfigParser, with_cohort: bool) -> None:
        """Check the settings that are code by their results: those that depend on the cohort, or the others."""
        ids = [id for id in self._codes if ("cohort" in self.needed([id])) == with_cohort]
        found, errors = {}, []
        for id in ids:
            if not KINDS[id].part:
                try:
                    found[id] = result(parser, id)
                except DatasetError as error:  # perhaps because a setting that it refers to is wrong
                    errors.append(error)
        refuse_wrong(found)
        if errors:
            raise errors[0]

    def _refuse_references_to_nothing(self) -> None:
        """Refuse references to ids that are not there, and "@" and "%" alone, which stand for the whole config."""
        found = {id: text for id, text in flatten(self.raw).items() if refers_to_nothing(text, self.raw)}
        refuse([f"{id} is {shown(text)}: the config has no such id." for id, text in found.items()])

    def _refuse_misspelt(self) -> None:
        """Refuse ids that no shipped config has and no other id refers to, and values in place of components."""
        shipped, used = shipped_ids("cohort" in self.raw), self._referred()
        refuse_unknown(self.raw, shipped, used | set(ACTIONS) | set(OF_MONAI))
        settings = {name: value for name, value in self.raw.items() if name not in ACTIONS}
        for name, group in list(settings.items()):
            if shipped.get(name) == GROUP and isinstance(group, dict) and "_target_" not in group:
                inside = {f"{name}{SEPARATOR}{key}": value for key, value in group.items()}
                refuse_unknown(inside, shipped, used)
                settings |= inside
        wrong = [
            line(id, value, "a component")
            for id, value in settings.items()
            if shipped.get(id) in (GROUP, COMPONENT) and id not in KINDS
            if isinstance(value, PLAIN) and not is_code(value)
        ]
        refuse(wrong)

    def _referred(self) -> set[str]:
        """Every id that the text of another refers to."""
        found = {name for text in texts_of(self.raw) for name in re.findall(r"%(\w+)", text)}
        for id, item in self._items.items():
            text = item.get_config()
            for name in references(id, text) if isinstance(text, str) else ():
                ends = [(outermost(id, length), outermost(name, length)) for length in (1, 2)]
                found |= {its for own, its in ends if own != its}
        return found

    def _parts(self, id: str) -> list[str]:
        """The ids that an id contains, and the ids that its own text refers to."""
        config = self._items[id].get_config()
        return [*references(id, config), *(f"{id}{SEPARATOR}{key}" for key in keys_of(config))]

    @functools.cached_property
    def _items(self) -> dict[str, Any]:
        """MONAI's items of the raw config by id, parsed but not built."""
        parser = parser_of(self.raw)
        try:
            parser.parse()
        except Exception as error:
            raise DatasetError(f"The config cannot be parsed: {last(error)}") from error
        return {id.replace(ID_SEP_KEY, SEPARATOR): item for id, item in parser.ref_resolver.items.items()}


class JobConfig(Config):
    """Builds components from a bundle's config, for one stage after another.

    Every stage builds its components anew and drops them afterwards, so no state passes from one round to the next.
    Only the cohort is built once and shared.

    Raises:
        DatasetError: settings cannot be used; for those that depend on the data set, and for the data set itself, at
            their first use.
    """

    @functools.cached_property
    def cohort(self) -> Cohort:
        """Opened at the first use, which also writes the key of pseudonyms."""
        return self.value("cohort")

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """Every top-level id that holds a number, a text or a list of these, nested or not."""
        parser, found = self._parser(), {}
        self._refuse_wrong_results(parser, with_cohort=True)
        for name, value in self.raw.items():
            if name in ACTIONS or name == "cohort" or isinstance(value, dict):
                continue
            value = result(parser, name)
            if is_plain(value):
                found[name] = list(value) if isinstance(value, tuple) else value
        if found.get("template"):  # as case names, or as pseudonyms
            found["template"] = [case.name for case in self.cohort.templates]
        return found

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

    def _parser(self) -> ConfigParser:
        parser = parser_of({id: value for id, value in self.raw.items() if id != "cohort"})
        parser["cohort"] = self.cohort
        return parser


def parser_of(raw: Mapping[str, Any]) -> ConfigParser:
    """A parser of a copy of ``raw``. All share the table of MONAI's classes, which takes long to build."""
    parser = ConfigParser(copy.deepcopy(dict(raw)))
    parser.locator = _locator()
    return parser


@functools.cache
def _locator() -> ComponentLocator:
    return ComponentLocator()


def override(parser: ConfigParser, changed: Mapping[str, Any]) -> None:
    """Set ids of a config.

    Raises:
        DatasetError: there is nothing in which an id could be.
    """
    for id, value in changed.items():
        try:
            parser[id] = value
        except Exception as error:  # MONAI raises many kinds for an id that leads nowhere
            above = id.rpartition(SEPARATOR)[0]
            raise DatasetError(f"The config has no id '{id}': '{above}' has no such part.") from error


def result(parser: ConfigParser, id: str) -> Any:
    """What an id of a config evaluates to.

    Raises:
        DatasetError: it cannot be evaluated.
    """
    try:
        return parser.get_parsed_content(id)
    except Exception as error:
        if text := plainly(error):
            raise DatasetError(text) from error
        raise DatasetError(f"{id} cannot be evaluated: {last(error)}") from error


def last(error: Exception) -> str:
    """The message of the error that began a chain of them, on one line."""
    return " ".join(str([*chain(error)][-1]).split())


def is_plain(value: Any) -> bool:
    """Whether a value is a number, a text, None or a list of these, nested or not."""
    return all(map(is_plain, value)) if isinstance(value, (list, tuple)) else isinstance(value, PLAIN)


def keys_of(config: Any) -> Iterable:
    return config if isinstance(config, dict) else range(len(config)) if isinstance(config, list) else ()


def outermost(id: str, length: int) -> str:
    """The first ``length`` parts of an id."""
    return SEPARATOR.join(id.split(SEPARATOR)[:length])


def references(id: str, config: Any) -> list[str]:
    """The ids that the text of an id refers to, or that it contains as components and expressions."""
    found = ReferenceResolver.find_refs_in_config(config=config, id=id)
    return [name.replace(ID_SEP_KEY, SEPARATOR) for name in found]


def refers_to_nothing(value: Any, ids: Iterable[str]) -> bool:
    """Whether a value is "@" or "%" alone, or "@name#part" or "%name#part" of none of the top-level ``ids``."""
    found = re.fullmatch(r"[@%](\w+)((#|::).*)?", value) if isinstance(value, str) else None
    return value in ("@", "%") or (found is not None and found[1] not in ids)


def texts_of(value: Any) -> list[str]:
    """All texts in a nested config."""
    return [text for text in flatten(value).values() if isinstance(text, str)]


@functools.cache
def shipped_ids(of_job: bool) -> dict[str, str]:
    """Ids of the shipped configs, of one or two parts -> GROUP, COMPONENT or VALUE. A group is no component itself."""
    configs = Path(semisam_o1.BUNDLE_ROOT) / "configs"
    job = [configs / "train.json", *sorted(configs.glob("*/*.json"))]
    found: dict[str, str] = {}
    for path in job if of_job else [configs / "inference.json"]:
        for id, value in read_json(path).items():
            found.setdefault(outermost(id, 2), kind_of(value))
            if kind_of(value) == GROUP:
                found |= {f"{id}{SEPARATOR}{key}": kind_of(part) for key, part in value.items()}
    return found


def kind_of(value: Any) -> str:
    if isinstance(value, dict):
        return COMPONENT if "_target_" in value else GROUP
    return COMPONENT if isinstance(value, list) and any(isinstance(part, dict) for part in value) else VALUE


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
