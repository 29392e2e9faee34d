"""``mmtp doctor``: what may be wrong with a model on this machine."""

from pathlib import Path


def doctor(model: str, /, *, words: str = "a blue circle", seeds: int = 4, json: Path | None = None) -> int:
    """Find out what may be wrong with a model on this machine, and what to do.

    Looks at libraries, threads, memory, weights, the tokenizers that the model names, its golden file, and kernels. Then decodes a few
    streams of every medium plainly and speculatively, which must be equal, and compares the share of drafts that are accepted with what
    drafts that know nothing reach and with the card. Last, drafts of one medium are replaced by random ones: no token may move.

    The exit code is 1 where something is wrong; what a person should look at is a note.

    Args:
        model: zoo entry, folder or Hub id.
        words: what the model is asked to draw, say and answer; take such as it knows.
        seeds: streams per medium and temperature.
        json: write the findings to this file.

    Examples:
        mmtp doctor vqa-s
        mmtp doctor runs/mine/result --words "a red house" --json findings.json
    """
    import sys
    from dataclasses import asdict

    from mmtp.cli import CHECK_FAILED
    from mmtp.cli.eval import write_json
    from mmtp.cli.tables import show, table
    from mmtp.testing.doctor import DoctorError, examine

    if seeds < 1:
        raise DoctorError(f"--seeds {seeds}: at least 1 is wanted")
    findings = examine(
        model, words=words, seeds=seeds, progress=lambda check: print(f"{check} …", file=sys.stderr) if sys.stderr.isatty() else None
    )
    shown = table(f"{model} on this machine", "check", "", "found", "what to do")
    for finding in findings:
        colour = {"ok": "green", "note": "yellow", "wrong": "bold red"}[finding.state]
        shown.add_row(finding.check, f"[{colour}]{finding.state}[/]", _plain(finding.said), _plain(finding.advice))
    show(shown)
    wrong = sum(finding.state == "wrong" for finding in findings)
    print(f"{wrong} of {len(findings)} checks found something wrong" if wrong else "nothing wrong")
    if json is not None:
        write_json(json, {"model": model, "wrong": wrong, "findings": [asdict(finding) for finding in findings]})
    return CHECK_FAILED if wrong else 0


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)
