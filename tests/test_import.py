import os
import resource
import subprocess
import sys

import pytest

import mmtp


def _seconds(code: str) -> float:
    """Processor time: what an import costs, whatever else runs on the machine."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_import_is_quick():
    bare = min(_seconds("pass") for _ in range(5))
    assert min(_seconds("import mmtp") for _ in range(5)) - bare < 0.1


def test_import_does_not_bring_torch():
    code = "import sys, mmtp; print(sorted({m.partition('.')[0] for m in sys.modules} & {'torch', 'numpy', 'transformers', 'cyclopts'}))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_hugging_face_tokenizers_is_not_shadowed(request):
    # The zoo's folder at the root has the same name; a package there would hide theirs from everybody who runs at the root.
    code = "import tokenizers; print(tokenizers.Tokenizer.__module__)"
    out = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=request.config.rootpath, env=os.environ)
    assert out.startswith("tokenizers")


@pytest.mark.parametrize("name", mmtp.__all__)
def test_every_public_name_resolves(name):
    assert getattr(mmtp, name) is not None
    assert name in dir(mmtp)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mmtp.nothing  # noqa: B018
