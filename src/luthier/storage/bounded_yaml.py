"""YAML as plain data, bounded before anything is built: a few hundred bytes of aliases may stand for more
values than any memory holds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from luthier.errors import RecipeError
from luthier.storage import files

MAX_CHARACTERS = 2_000_000  # of a file; parsing a million takes seconds
MAX_NODES = 200_000  # with each alias counted as what it stands for
MAX_DEPTH = 60


def load_yaml(text: str, name: str = "yaml") -> Any:
    """The value that a YAML text stands for. Raises RecipeError, with the line, for what is not valid, and
    for what is too large, nested too deeply or contains itself.
    """
    if len(text) > MAX_CHARACTERS:
        raise RecipeError(
            f"{name}: longer than {MAX_CHARACTERS:,} characters; rows belong in a file of their own"
        )
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            check_nodes(node, name)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except RecipeError:
        raise
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        if mark:
            name += f", line {mark.line + 1}"
        problem = getattr(error, "problem", None) or "unreadable"
        raise RecipeError(f"{name}: invalid YAML ({problem})") from None
    except RecursionError:
        raise RecipeError(f"{name}: nested more than {MAX_DEPTH} levels deep") from None
    except (ValueError, TypeError, OverflowError) as error:  # a date that is none, a number of 5,000 digits
        raise RecipeError(f"{name}: invalid YAML ({str(error)[:100]})") from None


def read_yaml(path: Path) -> Any:
    """The value that a YAML file stands for. Raises RecipeError as `load_yaml` does, and Damaged where there
    is no such text.
    """
    return load_yaml(files.read_text(path, 4 * MAX_CHARACTERS), path.name)


def check_nodes(root: yaml.Node, name: str) -> None:
    """Raise RecipeError where a document has too many nodes, too many levels, or contains itself."""
    sizes: dict[int, int] = {}
    depths: dict[int, int] = {}
    ancestors: set[int] = set()
    stack = [(root, False)]
    while stack:
        node, complete = stack.pop()
        if complete:
            inner = children(node)
            ancestors.discard(id(node))
            sizes[id(node)] = 1 + sum(sizes[id(child)] for child in inner)
            depths[id(node)] = 1 + max((depths[id(child)] for child in inner), default=0)
            if sizes[id(node)] > MAX_NODES:
                raise RecipeError(f"{name}: stands for more than {MAX_NODES:,} values")
            if depths[id(node)] > MAX_DEPTH:
                raise RecipeError(f"{name}: nested more than {MAX_DEPTH} levels deep")
        elif id(node) in ancestors:
            raise RecipeError(f"{name}: a value contains itself")
        elif id(node) not in sizes:
            ancestors.add(id(node))
            stack.append((node, True))
            for child in children(node):
                stack.append((child, False))


def children(node: yaml.Node) -> list[yaml.Node]:
    """The nodes in a node."""
    if isinstance(node, yaml.MappingNode):
        inner = []
        for key, value in node.value:
            inner += [key, value]
        return inner
    if isinstance(node, yaml.SequenceNode):
        return node.value
    return []
