"""Results as tables of text, for a terminal."""


def print_table(title, columns, rows, left=1):
    """Print a title, the names of the columns and a line for each row; nothing without values.

    columns: names; what follows a newline in a name goes on a second line
    rows: lists of cells: text, numbers (a float with three decimals), or None where there is no value
    left: the first columns hold names and are aligned on the left, all others on the right
    A column in which no row has a value is left out.
    """
    kept = [i for i in range(len(columns)) if any(row[i] is not None for row in rows)]
    if max(kept, default=0) < left:
        return
    head = [[(columns[i] + "\n").split("\n")[line] for i in kept] for line in (0, 1)]
    body = [["-" if row[i] is None else f"{row[i]:.3f}" if isinstance(row[i], float) else str(row[i])
             for i in kept] for row in rows]
    widths = [max(map(len, column)) for column in zip(*head, *body)]
    print(f"\n{title}\n")
    for line in [*filter(any, head), ["-" * width for width in widths], *body]:
        print("  ".join(cell.ljust(width) if i < left else cell.rjust(width)
                        for i, cell, width in zip(kept, line, widths)).rstrip())


def plus_minus(found):
    """0.434 ± 0.004: of {"mean", "stderr"}, where a single number has no error; None of None."""
    return found and " ± ".join(f"{number:.3f}" for number in found.values() if number is not None)


def percent(share, interval=None):
    """82.0 (78.0 to 86.1): a share in percent, with the interval of {"low", "high"} that belongs to it."""
    if share is None:
        return None
    low_high = f" ({100 * interval['low']:.1f} to {100 * interval['high']:.1f})" if interval else ""
    return f"{100 * share:.1f}{low_high}"


def win_tie_lose(found):
    """Three shares in percent, of {"win", "tie", "lose"}; None without them."""
    return " / ".join(f"{100 * found[key]:4.1f}" for key in ("win", "tie", "lose") if key in found) or None
