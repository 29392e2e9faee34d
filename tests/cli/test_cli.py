import errno
import resource
import subprocess
import sys

import pytest

import mmtp
from mmtp import cli
from mmtp.types import MmtpError


@pytest.fixture
def verb(monkeypatch):
    """Puts a function in as the verb ``probe``."""

    def put(function):
        monkeypatch.setitem(cli.VERBS, "probe", (f"{__name__}:unused", "A probe."))
        monkeypatch.setattr(cli, "load_verb", lambda name: function)

    return put


def child_seconds():
    """Processor time of finished child processes: what a command costs, whatever else runs on the machine."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def raising(error):
    def probe() -> None:
        """Fails."""
        raise error

    return probe


@pytest.mark.parametrize("name", ["", *cli.VERBS])
def test_help_is_immediate_and_without_torch(name):
    code = (
        "import sys, atexit; sys.argv = ['mmtp', *sys.argv[1:]]\n"
        "atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))\n"
        "from mmtp.cli import main; main()"
    )
    seconds = []
    for _ in range(5):
        began = child_seconds()
        done = subprocess.run([sys.executable, "-c", code, *name.split(), "--help"], capture_output=True, text=True, check=True)
        seconds.append(child_seconds() - began)
        assert done.stderr.strip() == "False"
        assert done.stdout.startswith(f"Usage: mmtp {name or 'VERB'}")
        assert "Examples:\n  mmtp " in done.stdout
    assert min(seconds) < 0.3


def test_version(capsys):
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == mmtp.__version__ + "\n"


def test_nothing_is_help(capsys):
    assert cli.run([]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in cli.VERBS)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "mmtp: error: no verb is called 'trian'; did you mean 'train'?"),
        (["zzz"], "mmtp: error: no verb is called 'zzz'; there are: demo, tokenize"),
        (["--zzz"], "mmtp: error: no verb is called '--zzz'; there are: "),
        (["train"], 'mmtp: error: Command "train" parameter RECIPE requires an argument.'),
        (["train", "r.toml", "--max-minutes", "soon"], "mmtp: error: Invalid value"),
        (["train", "r.toml", "--max-minuts", "3"], "mmtp: error: Unknown option: --max-minuts. Did you mean --max-minutes?"),
        (["train", "no-such.toml"], "mmtp: error: no-such.toml: cannot be read (No such file or directory)"),
        (["zoo", "zzz"], "mmtp: error: zzz: no such path or zoo entry; "),
    ],
)
def test_a_user_error_is_one_line_and_code_2(argv, message, capsys):
    assert cli.run(argv) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(message)
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (MmtpError("shard.arrow: offset 17:\n  wrong"), 2, "mmtp: error: shard.arrow: offset 17: wrong\n"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.png"), 2, "mmtp: error: a.png: No such file or directory\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "out/x"),
            2,
            "mmtp: error: out/x: the disk is full; what is written so far is kept: make room and run the same command again\n",
        ),
        (OSError("no errno here"), 2, "mmtp: error: no errno here\n"),
        (MemoryError(), 2, "mmtp: error: out of memory; lower the batch size\n"),
        (KeyboardInterrupt(), 130, "mmtp: interrupted\n"),
        (KeyError("x"), 3, "mmtp: internal error: KeyError: 'x' (a fault of mmtp; run again with --debug for the traceback)\n"),
    ],
)
def test_errors_become_one_line_and_a_code(verb, capsys, error, code, message):
    verb(raising(error))
    assert cli.run(["probe"]) == code
    assert capsys.readouterr().err == message


def test_debug_shows_the_traceback_and_keeps_the_code(verb, capsys):
    verb(raising(MmtpError("wrong")))
    for argv in (["--debug", "probe"], ["probe", "--debug"]):
        assert cli.run(argv) == 2
        err = capsys.readouterr().err
        assert err.startswith("Traceback")
        assert err.endswith("mmtp: error: wrong\n")


def test_what_comes_after_two_dashes_is_left_alone(verb, capsys):
    def probe(*words: str) -> None:
        print(words)

    verb(probe)
    assert cli.run(["probe", "a", "--", "--debug", "--help"]) == 0
    assert capsys.readouterr().out == "('a', '--debug', '--help')\n"


@pytest.mark.parametrize(("result", "code"), [(None, 0), (0, 0), (1, 1), (True, 0), ("text", 0)])
def test_the_result_of_a_verb_is_its_exit_code(verb, result, code):
    def probe():
        return result

    verb(probe)
    assert cli.run(["probe"]) == code


def test_a_reader_that_goes_away_is_no_error():
    code = (
        "from mmtp import cli\n"
        "def probe():\n    for i in range(100_000):\n        print(i)\n"
        "cli.VERBS['probe'] = ('', ''); cli.load_verb = lambda name: probe\n"
        "cli.main(['probe'])"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == cli.BROKEN_PIPE


def test_python_m_mmtp_is_mmtp():
    assert subprocess.check_output([sys.executable, "-m", "mmtp", "--version"], text=True).strip() == mmtp.__version__
