"""Pieces of HTML that many parts of the page are made of."""


def table(head: str, body: str) -> str:
    """Returns HTML of a table; where it is wider than its place it scrolls there, by keys, too.

    Args:
        head, body: HTML of its rows.
    """
    rows = f"<thead>{head}</thead><tbody>{body}</tbody>"
    return f'<div class="scroll-x" tabindex="0"><table class="plain">{rows}</table></div>'
