"""`llamajax models`: the names there are."""

from llamajax import hub

from ..render import human_bytes, human_count


def models() -> None:
    """List the models that have a short name, and which are on disk already."""
    rows = [("NAME", "PARAMETERS", "CONTEXT", "SIZE", "LICENCE", "ON DISK")]
    for alias in hub.ALIASES.values():
        licence = alias.licence + (" (to be accepted on the hub)" if alias.gated else "")
        rows.append(
            (
                alias.name + (" *" if alias.name == hub.DEFAULT else ""),
                human_count(alias.parameters),
                str(alias.context),
                human_bytes(alias.size_bytes),
                licence,
                "yes" if hub.on_disk(alias) else "no",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(
        "\n* the default. -m also takes a directory, a .gguf file, or a repository on the hub:\n"
        "org/repo, org/repo:Q4_K_M, or its address"
    )
