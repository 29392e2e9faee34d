"""``mmtp verify``: every byte of a data set."""

from pathlib import Path


def verify(folder: Path, /) -> int:
    """Check every byte of a data set, and say of each file that is damaged or missing what to do.

    The exit code is 0 where all is well and 1 where something is wrong.

    Args:
        folder: of the data set.

    Examples:
        mmtp verify tokens/easy-vqa
    """
    from mmtp.cli import CHECK_FAILED
    from mmtp.cli.tables import progress_bar, reasons
    from mmtp.data.verify import verify as check

    with progress_bar("verifying", "shards") as bar:
        verdict = check(folder, progress=bar)
    for problem in verdict.problems:
        print(problem)
    totals = verdict.totals
    summary = (
        f"{verdict.files} files, {verdict.bytes:,} bytes; {totals.ok + totals.quarantined:,} inputs = {totals.ok:,} ok + "
        f"{totals.quarantined:,} quarantined{reasons(totals.reasons)}; {totals.rows:,} documents, {totals.tokens:,} tokens"
    )
    if verdict.problems:
        print(f"{folder}: {len(verdict.problems)} problem{'s'[: len(verdict.problems) > 1]} in {summary}")
        return CHECK_FAILED
    print(f"{folder}: sound: {summary}")
    return 0
