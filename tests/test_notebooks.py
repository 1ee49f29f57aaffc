"Every notebook runs from top to bottom, one test each; `--slow` runs their slow cells too"
import multiprocessing as mp
from pathlib import Path

import pytest

pytest.importorskip('nbdev')
from nbdev import test as nbtest

NBS = Path(__file__).parents[1]/'nbs'
NOTEBOOKS = sorted(p for p in NBS.rglob('*.ipynb') if not any(part[0] in '._' for part in p.relative_to(NBS).parts))

def run(path, slow):
    "Run `path` in a process of its own: what it imports and patches stays there"
    ctx,opts = mp.get_context('spawn'), dict(skip_flags=[] if slow else ['slow'], cell_timeout=3600)
    with ctx.Pool(1) as pool: return pool.apply(nbtest.test_nb, (str(path),), opts)

@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: str(p.relative_to(NBS)))
def test_notebook(path, request, tmp_path, monkeypatch):
    monkeypatch.setenv('TMPDIR', str(tmp_path)) # what `mkdtemp` made goes when the test has passed
    ok, seconds = run(path, request.config.getoption('--slow'))
    assert ok, f'{path.relative_to(NBS)}: a cell failed, see standard error'
