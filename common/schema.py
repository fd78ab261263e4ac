"""What a JSON file from anybody must hold: a kind for each of its fields, as settings have one. Nothing is converted.

    check_fields(read_json(file), {"names": list[str], "beta": Annotated[float, Range(0.001, 1000)]}, file)

A kind is str, int, float, bool, list[kind], dict[str, kind], kind | None, Literal[...], or {field: kind} for an object in the
object. A Range around it is for a number, or for how many a list has, or a text of characters. Numbers are finite; a whole number
is a float, too, and true is none.
"""

import sys
import types
import typing

from common.config import UserError, range_of, shown


def check_fields(content, needed: dict, file, others: dict | None = None) -> None:
    """UserError that names the file and the field, unless `content` is an object with the fields `needed`, each of its kind.

    others: fields that may be there or not. What stands there besides is passed over: another version may have written it.
    """
    if not isinstance(content, dict):
        raise UserError(f"{file} is damaged: it holds {shown(content)} where fields with names were expected")
    for name, kind in {**needed, **(others or {})}.items():
        if name not in content and name in needed:
            raise UserError(f"{file} is damaged: its {name} is missing")
        if name in content and not is_of_kind(content[name], kind):
            raise UserError(f"{file} is damaged: its {name} is {shown(content[name])}, which these scripts never write")


def is_of_kind(value, kind) -> bool:
    """Whether a value of a JSON file is of a kind; see above."""
    if limits := range_of(kind):
        number = isinstance(value, (int, float))
        return is_of_kind(value, typing.get_args(kind)[0]) and limits.holds(value if number else len(value))
    if isinstance(kind, dict):
        return isinstance(value, dict) and all(name in value and is_of_kind(value[name], kind[name]) for name in kind)
    outer, parts = typing.get_origin(kind), typing.get_args(kind)
    if outer is typing.Literal:
        return any(type(value) is type(choice) and value == choice for choice in parts)
    if outer in (types.UnionType, typing.Union):
        return any(is_of_kind(value, part) for part in parts)
    if outer is list:
        return isinstance(value, list) and all(is_of_kind(each, parts[0]) for each in value)
    if outer is dict:
        return isinstance(value, dict) and all(is_of_kind(each, parts[1]) for each in value.values())
    if kind is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max  # of NaN false
    return type(value) is kind
