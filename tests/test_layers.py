"Who may import whom: the table of rooms, kept true by import-linter and by processes that look at `sys.modules`"
import subprocess, sys, tomllib

import pytest

LIGHT = 'data synthetic preprocessing evaluation inference ground risk watch serve'.split()
HEAVY = 'torch torchvision fastai timm'.split()
ROOMS = 'data synthetic preprocessing autoencoder segmentation counting evaluation inference ground risk watch serve report cli'.split()

BLOCK = f'''import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {HEAVY}: raise ModuleNotFoundError('blocked', name=name)
sys.meta_path.insert(0, Blocked())
'''

def python(code, **kw): return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, **kw)

def test_import_linter(root):
    pytest.importorskip('importlinter')
    got = subprocess.run([sys.executable, '-c', 'from importlinter.cli import lint_imports_command as f; f()', '--no-cache'],
        cwd=root, capture_output=True, text=True)
    assert got.returncode == 0, got.stdout + got.stderr

def test_contracts_name_every_room(root):
    cfg = tomllib.loads((root/'pyproject.toml').read_text())['tool']['importlinter']
    light = next(c for c in cfg['contracts'] if c['id'] == 'light')
    assert light['source_modules'] == [f'crowd_density.{m}' for m in LIGHT]
    assert set(light['forbidden_modules']) == set(HEAVY)
    have = {p.stem for p in (root/'crowd_density').glob('*.py') if p.stem[0] != '_'}
    assert have == set(ROOMS), have ^ set(ROOMS)

@pytest.mark.parametrize('room', LIGHT + ['cli'])
def test_light_rooms_load_no_torch(room):
    got = python(f'import sys, crowd_density.{room}; print([m for m in {HEAVY} if m in sys.modules])')
    assert got.returncode == 0, got.stderr
    assert got.stdout.strip() == '[]'

def test_light_rooms_load_with_torch_missing():
    got = python(BLOCK + '\n'.join(f'import crowd_density.{m}' for m in LIGHT))
    assert got.returncode == 0, got.stderr
