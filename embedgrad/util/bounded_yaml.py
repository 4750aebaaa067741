"""A YAML loader for untrusted texts. It counts what aliases stand for before it expands anything."""

from __future__ import annotations

import yaml

MOST = 1_000_000  # characters and values, with every alias written out


class TooLarge(yaml.YAMLError):
    """The text stands for too much; the message continues a sentence that begins with the text's name."""


class BoundedLoader(yaml.SafeLoader):
    """yaml.SafeLoader that raises TooLarge where a text of a few lines stands for more than MOST values."""

    def get_single_node(self) -> yaml.Node | None:
        """The text's only document as a graph, in which an alias is another edge to the same node."""
        node = super().get_single_node()
        if node is not None:
            _expanded(node)
        return node


def _expanded(root: yaml.Node) -> int:
    """The number of characters and values that `root` stands for. Raises TooLarge."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()
    stack = [root]
    while stack:
        node = stack[-1]
        children = _children(node)
        if id(node) not in open_nodes and id(node) not in sizes:
            open_nodes.add(id(node))
            for child in children:
                if id(child) in open_nodes:
                    raise TooLarge("has an alias inside of what it stands for")
                if id(child) not in sizes:
                    stack.append(child)
            continue
        stack.pop()
        if id(node) in sizes:
            continue
        open_nodes.discard(id(node))
        own = len(node.value) if isinstance(node, yaml.ScalarNode) else 0
        sizes[id(node)] = 1 + own + sum(sizes[id(child)] for child in children)
        if sizes[id(node)] > MOST:
            raise TooLarge(f"stands for more than {MOST:,} characters and values, with its aliases written out")
    return sizes[id(root)]


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []
