"""The last words of `device_check.py`: at most 60 lines, what fails first."""

LINES, WIDTH = 60, 150


def word(found: dict, rehearsal: bool) -> str:
    """A finding's verdict; a rehearsal has proved nothing about a device."""
    if found["holds"] is False:
        return "FAILS"
    if found["holds"] is None:
        return "" if found["measured"] != "not measured" else "not measured"
    return "rehearsed" if rehearsal else "holds"


def line(found: dict, rehearsal: bool) -> str:
    """A finding as text."""
    said = found["what"] if found["measured"] == "not measured" else f"{found['what']}: {found['measured']}"
    target = f" [{found['target']}]" if found["target"] else ""
    room = WIDTH - 26 - len(target)
    said = said if len(said) <= room else said[: room - 3] + "..."
    return f"{word(found, rehearsal):<13}{found['part']:<11}{said}{target}"


def table(results: dict) -> str:
    """Failures, then targets that hold, then those that were not measured, then what has no target."""
    rehearsal, machine = results["rehearsal"], results["machine"]
    head = ["REHEARSAL on the CPU: nothing was measured, nothing about a device is proved"] if rehearsal else []
    head.append(
        f"{machine.get('gpu', 'no GPU')}, torch {machine.get('torch', '?')}, triton {machine.get('triton', '?')}, "
        f"{results['began']}, source {results['source']['digest']} {results['source']['commit']}"
    )
    for row in results["parts"]:
        if row["status"] != "done":
            head.append(f"FAILS        {row['part']:<11}the part: {row['status']} after {row['seconds']} s")
    done = [f"{row['part']} {row['seconds']:.0f} s" for row in results["parts"] if row["status"] == "done"]
    head.append(f"parts that ended well: {', '.join(done) or 'none'}")
    order = {"FAILS": 0, "holds": 1, "rehearsed": 1, "not measured": 2, "": 3}
    found = sorted(results["findings"], key=lambda each: order[word(each, rehearsal)])
    body = [line(each, rehearsal) for each in found]
    room = LINES - len(head) - 1
    if len(body) > room:
        body = [*body[: room - 1], f"... {len(body) - room + 1} more in results.json"]
    counts = {name: sum(word(each, rehearsal) == name for each in found) for name in order if name}
    return "\n".join([*head, *body, ", ".join(f"{n} {name}" for name, n in counts.items() if n)])
