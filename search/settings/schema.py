"""JSON schema of settings files, with the keys of every kind, for editors and programs."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from secateur.search.settings.settings import REGISTRIES, Settings

_ENTRY = re.compile(r"^ {4}(\w+(?:, \w+)*): (.*?)(?=^ {4}\w|\Z)", re.MULTILINE | re.DOTALL)


def settings_schema() -> dict[str, Any]:
    """JSON schema of the settings, draft 2020-12: one branch for each kind of `space`, `controller` and `executor`."""
    models: dict[str, dict[str, type[BaseModel]]] = {
        name: {kind: row.settings for kind, row in registry.items()}
        for name, (registry, _) in REGISTRIES.items()
    }
    every: list[type[BaseModel]] = [
        Settings,
        *(model for kinds in models.values() for model in kinds.values()),
    ]
    found, shared = models_json_schema([(model, "validation") for model in dict.fromkeys(every)])
    definitions: dict[str, Any] = shared["$defs"]
    for model in (*every, *_inside(every)):
        if model.__name__ in definitions:
            _describe(definitions[model.__name__], model)
    top = definitions.pop(_name(found[Settings, "validation"]))
    for name, kinds in models.items():
        default = REGISTRIES[name][1]
        branches = [
            _branch(found[model, "validation"], kind, default=kind == default)
            for kind, model in kinds.items()
        ]
        top["properties"][name] = {
            "anyOf": branches,
            "description": top["properties"][name].get("description", ""),
        }
    top["required"] = []
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **top, "$defs": definitions}


def field_docs(model: type[BaseModel]) -> Mapping[str, str]:
    """Description of each field, from the docstring's ``Args``, on one line."""
    text = inspect.getdoc(model) or ""
    arguments = text.partition("Args:\n")[2].partition("\n\n")[0]
    rows: dict[str, str] = {}
    for names, words in _ENTRY.findall(arguments):
        rows |= dict.fromkeys(names.split(", "), " ".join(words.split()).replace("``", "`"))
    return {name: rows[name] for name in model.model_fields if name in rows}


def _branch(schema: Mapping[str, Any], kind: str, *, default: bool) -> dict[str, Any]:
    """Section of one kind, which must be named unless it is the default."""
    is_kind = {"properties": {"kind": {"const": kind}}}
    return {"allOf": [dict(schema), is_kind if default else is_kind | {"required": ["kind"]}]}


def _describe(schema: dict[str, Any], model: type[BaseModel]) -> None:
    schema["description"] = (inspect.getdoc(model) or "").partition("\n")[0]
    for name, words in field_docs(model).items():
        if name in schema.get("properties", {}):
            schema["properties"][name]["description"] = words


def _inside(models: list[type[BaseModel]]) -> list[type[BaseModel]]:
    """Models of sections within these."""
    found: list[type[BaseModel]] = []

    def look(annotation: Any) -> None:
        if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
            if annotation not in found:
                found.append(annotation)
                for field in annotation.model_fields.values():
                    look(field.annotation)
            return
        for member in getattr(annotation, "__args__", ()):
            look(member)

    for model in models:
        look(model)
    return found


def _name(schema: Mapping[str, Any]) -> str:
    return str(schema["$ref"]).rpartition("/")[2]
